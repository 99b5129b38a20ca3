"""LLM Modules: a small decoder that reads the vectors of a frozen larger one, beside one that has to do alone.

A byte-level decoder is trained on the Python standard library and frozen. A smaller one reads its vectors by gated
cross-attention, with a bias by distance or without positions, and is trained on the same text. A third one has as many
steps alone; what counts are the bits per byte of held-out text.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from flax import nnx

from experiments.stages import Stages
from jaxattn import Alibi, Causal, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, outside
from jaxattn.train import OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=4e-3, warmup_steps=40)


@dataclass(frozen=True)
class Config:
    """Byte-level decoders of the Python standard library.

    Attributes:
        context: Tokens per window.
        wide: Width of the frozen decoder.
        layers: Its layers.
        steps: Its training steps.
        small: Width of the decoder that reads it.
        small_layers: Layers of the small decoders.
        small_steps: Training steps of the small decoders.
        gate: The start of the bias of the gates: nearly closed.
        heads: Heads of every layer.
        batch_size: Windows per step.
        eval_batches: Batches of the validation data per measurement.
        optimizer: The optimiser of all of them.
    """

    context: int = 64
    wide: int = 96
    layers: int = 3
    steps: int = 1000
    small: int = 32
    small_layers: int = 2
    small_steps: int = 600
    gate: float = -4.0
    heads: int = 4
    batch_size: int = 8
    eval_batches: int = 48
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(
    context=16,
    wide=16,
    layers=1,
    steps=10,
    small=8,
    small_layers=1,
    small_steps=10,
    heads=2,
    batch_size=4,
    eval_batches=2,
    optimizer=replace(OPTIMIZER, warmup_steps=2),
)

CLAIMS = (
    Claim(
        "A small decoder that reads a frozen larger one is better than a small decoder alone with as many trained "
        "parameters: it saves 0.1 bits per byte, or more.",
        paper="llm_modules",
        number="bits saved by reading",
        confirmed=at_least(0.1),
        refuted=at_most(0.0),
    ),
    Claim(
        "So it is where attention is told nothing of positions, and has to find the vector of a token by what it says: "
        "0.1 bits per byte, or more.",
        paper="llm_modules",
        number="bits saved by reading without positions",
        confirmed=at_least(0.1),
        refuted=at_most(0.0),
    ),
    Claim(
        "It comes near the larger decoder: it closes half of the gap between the decoder alone and the larger one, or "
        "more.",
        paper="llm_modules",
        number="share of the gap closed",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "A gate that is nearly closed lets little through: the untrained reader says what the same parameters without "
        "the branch that reads would say, to 0.05 bits per byte.",
        paper="llm_modules",
        number="bits by which reading changes the untrained decoder",
        confirmed=at_most(0.05),
        refuted=outside(at_most(0.05)),
    ),
)


def layer(heads: int, reads: int | None = None, gate: float = 0.0, near: bool = True) -> models.Layer:
    """Attention and a feed-forward block; between them, with `reads`, a gated branch that reads so many channels.

    With `near` it prefers near tokens (ALiBi), so that it finds the vector of the token itself.
    """
    own = models.Branch(models.Spec(nn.MultiHeadAttention, heads=heads))
    block = models.Branch(models.Spec(nn.FeedForward))
    if reads is None:
        return models.Layer([own, block])
    cross = models.Spec(nn.MultiHeadAttention, heads=heads, keys_from="context", context_features=reads)
    cross = cross.replace(position=None, mask=Causal(), bias=models.Spec(Alibi.geometric) if near else None)
    return models.Layer([own, models.Branch(cross, gate=models.Spec(nn.AdapterGate, start=gate), name="cross"), block])


def decoder(config: Config, width: int, layers: list[models.Layer]) -> models.TransformerConfig:
    return models.TransformerConfig(length=config.context, width=width, layers=layers)


def trained(model: nnx.Module) -> int:
    """The number of parameters that are trained."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def alone(config: Config, parameters: int, seed: int) -> models.Transformer:
    """The narrowest decoder of the small depth with so many parameters, or more: in doubt it has the advantage."""
    width = config.small
    while True:
        made = decoder(config, width, [layer(config.heads)] * config.small_layers)
        model = nnx.eval_shape(lambda made=made: models.Transformer(made, rngs=nnx.Rngs(0)))
        if trained(model) >= parameters:
            return models.Transformer(made, rngs=nnx.Rngs(seed))
        width += 2 * config.heads  # rotary positions turn pairs of channels of a head


def run(config, seed, folder, console):
    stages = Stages("llm_modules", asdict(config), seed, folder, console)

    def fitted(name: str, model: Any, steps: int) -> Any:
        return stages.on_text(name, model, steps, config.optimizer)

    wide = decoder(config, config.wide, [layer(config.heads)] * config.layers)
    frozen = fitted("frozen", models.Transformer(wide, rngs=nnx.Rngs(seed)), config.steps)
    readers = {}
    for name, near in (("reader", True), ("reader without positions", False)):
        reads = layer(config.heads, config.wide, config.gate, near)
        small = decoder(config, config.small, [reads] * config.small_layers)
        readers[name] = models.FrozenReader(frozen, small, rngs=nnx.Rngs(seed))
    reader = readers["reader"]
    shut = nnx.clone(reader)
    for branch in (branch for run in shut.reader.runs for branch in run.branches if branch.gate is not None):
        branch.gate.gate.bias[...] = branch.gate.gate.bias[...] - float("inf")
    other = alone(config, trained(reader), seed)
    before = abs(stages.bits(reader) - stages.bits(shut))
    measured = {"frozen": (trained(frozen), stages.bits(frozen))}
    for name, model in {"alone": other, **readers}.items():
        measured[name] = trained(model), stages.bits(fitted(name, model, config.small_steps))
    saved, saved_without, gap = (measured["alone"][1] - measured[name][1] for name in (*readers, "frozen"))
    numbers: dict[str, float | None] = {
        "bits saved by reading": saved,
        "bits saved by reading without positions": saved_without,
        "share of the gap closed": saved / gap if gap > 0 else None,
        "bits by which reading changes the untrained decoder": before,
    }
    rows: list[dict[str, str | int | float | None]] = [
        {"model": name, "trained parameters": parameters, "bits per byte": value}
        for name, (parameters, value) in measured.items()
    ]
    return Result(
        numbers | {f"{name}: bits per byte": value for name, (_, value) in measured.items()},
        {"Quality on held-out text": rows},
        {"Training": Curves("step", "bits per byte of the step's batch", stages.learning)},
    )
