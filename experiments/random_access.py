"""Parity in four formats: what attention can do by offset or by content, and not by counting to a place.

Decoders learn parities of 3 to 15 bits and are asked for up to 40. The formats differ in how the bit of a step is
found: not at all (direct), at an index (scratchpad), next to it (interleaved), or after a copy of its anchor
(mnemonic).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import decoders
from jaxattn import Alibi, icl, models, nn, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, check_names
from jaxattn.train import OptimizerConfig, drawn

FORMATS = ("direct", "scratchpad", "interleaved", "mnemonic")
KINDS = ("learned", "ALiBi", "convolution")
RUNS = (
    "direct, learned",
    "scratchpad, learned",
    "scratchpad, convolution",
    "interleaved, learned",
    "interleaved, convolution",
    "mnemonic, convolution",
)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=100, final_fraction=0.0, weight_decay=0.01, beta2=0.99)


@dataclass(frozen=True)
class Config:
    """Decoders of attention and feed-forward blocks, one for each format and kind of positions.

    Attributes:
        runs: What is trained, "format, positions": learned vectors, the bias of ALiBi, or none but for a causal
            convolution over three tokens before queries, keys and values.
        shortest: Least number of bits in training.
        longest: Largest number of bits in training.
        tested: Numbers of bits that are tested.
        mapped: Numbers of bits of which attention maps are shown: one from training, and one beyond.
        anchors: Different anchors of the mnemonic format.
        width: Width of the model.
        layers: Number of layers.
        heads: Heads of a layer.
        steps: Training steps.
        batch_size: Prompts per step.
        eval_every: Steps between measurements in training.
        prompts: Prompts per test.
        optimizer: The optimiser.
    """

    runs: tuple[str, ...] = RUNS
    shortest: int = 3
    longest: int = 15
    tested: tuple[int, ...] = (5, 10, 15, 16, 20, 40)
    mapped: tuple[int, int] = (15, 25)
    anchors: int = 48
    width: int = 64
    layers: int = 2
    heads: int = 4
    steps: int = 3000
    batch_size: int = 32
    eval_every: int = 250
    prompts: int = 64
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(
    runs=("scratchpad, learned", "interleaved, convolution"),
    longest=5,
    tested=(5, 8),
    mapped=(5, 8),
    width=32,
    layers=1,
    steps=150,
    eval_every=50,
    prompts=50,
    optimizer=replace(OPTIMIZER, warmup_steps=20),
)

PAPER = "random_access"
CLAIMS = (
    Claim(
        "Without steps, the parity of 15 bits is not learned: the answer is a guess.",
        paper=PAPER,
        number="direct, learned: bits right, 15 bits",
        confirmed=at_most(0.6),
        refuted=at_least(0.9),
    ),
    Claim(
        "With a scratchpad it is: at 15 bits, the longest in training, 95 of 100 prompts have no wrong step.",
        paper=PAPER,
        number="scratchpad, learned: no error, 15 bits",
        confirmed=at_least(0.95),
        refuted=at_most(0.5),
    ),
    Claim(
        "Beyond, the scratchpad is of no use: at 40 bits a step is a guess, even if all before it are shown right.",
        paper=PAPER,
        number="scratchpad, learned: bits right if shown, 40 bits",
        confirmed=at_most(0.6),
        refuted=at_least(0.9),
    ),
    Claim(
        "Nor do relative offsets help a scratchpad, whose bits are at an index.",
        paper=PAPER,
        number="scratchpad, convolution: bits right if shown, 40 bits",
        confirmed=at_most(0.6),
        refuted=at_least(0.9),
    ),
    Claim(
        "A step attends to the bit that it needs in training, and beyond it at most half as much.",
        paper=PAPER,
        number="weight on the bit of the step, beyond over in training",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "Interleaved with its bits a parity needs no index: with relative offsets 99 of 100 bits are right at 40 bits.",
        paper=PAPER,
        number="interleaved, convolution: bits right, 40 bits",
        confirmed=at_least(0.99),
        refuted=at_most(0.7),
    ),
    Claim(
        "It needs them: with a vector for each position, which 40 bits go beyond, it is a guess too.",
        paper=PAPER,
        number="interleaved, learned: bits right, 40 bits",
        confirmed=at_most(0.7),
        refuted=at_least(0.95),
    ),
    Claim(
        "Anchors that are found by content take the place of an index: 95 of 100 bits are right at 40 bits.",
        paper=PAPER,
        number="mnemonic, convolution: bits right, 40 bits",
        confirmed=at_least(0.95),
        refuted=at_most(0.7),
    ),
)


def task(config: Config, name: Any) -> icl.BitParity:
    return icl.BitParity(name, config.shortest, config.longest, config.anchors if name == "mnemonic" else 0)


def train(config: Config, run: str, seed: int, folder, console) -> tuple[models.Transformer, list[tuple[float, float]]]:
    """(a decoder of one format and kind of positions, (step, accuracy per bit) in training)."""
    name, kind = run.split(", ")
    of_format = task(config, name)
    kinds: dict[str, dict[str, Any]] = {
        "ALiBi": {"bias": models.Spec(Alibi.geometric)},
        "convolution": {"convolution": 3},
    }
    mixer = models.Spec(nn.MultiHeadAttention, heads=config.heads, position=None, **kinds.get(kind, {}))
    model, result = decoders.train(
        decoders.build(
            mixer,
            vocabulary=of_format.vocabulary,
            length=of_format.with_bits(max(config.tested)).length,
            width=config.width,
            layers=config.layers,
            seed=seed,
            positions=models.Spec(nn.PositionEmbedding) if kind == "learned" else None,
        ),
        drawn(of_format),
        loss=decoders.answered_tokens,
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        eval_batches=4,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"run": run, "random_access": asdict(config) | {"runs": None, "mapped": None}},
        folder=folder / run.replace(", ", "_"),
        console=console,
    )
    return model, decoders.measured(result, "correct")


def tested(config: Config, model: models.Transformer, name: str, seed: int) -> list[dict[str, Any]]:
    """By the number of bits: the share of prompts without an error and of right bits, freely and with right p shown."""
    graph, state = nnx.split(model)

    @jax.jit
    def says(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x)[0][..., :2].argmax(-1)

    rows = []
    for bits in config.tested:
        prompt = task(config, name).with_bits(bits).sample(jax.random.key(1000 + seed), config.prompts)
        prompt = padded(prompt, model.config.length)
        wrong = {
            "free": icl.answered_freely(lambda x, _: says(state, x), prompt) != prompt.y,
            "shown": says(state, prompt.x) != prompt.y,
        }
        counts = {way: np.asarray((prompt.weights * each).sum(-1)) for way, each in wrong.items()}
        asked = float(prompt.weights[0].sum())
        rows.append(
            {
                "bits": bits,
                "no error": float((counts["free"] == 0).mean()),
                "bits right": float(1 - counts["free"].mean() / asked),
                "bits right if shown": float(1 - counts["shown"].mean() / asked),
            }
        )
    return rows


def padded(prompt: icl.Prompt, length: int) -> icl.Prompt:
    """The prompt with rows of this length, so that all numbers of bits are one program."""
    width = ((0, 0), (0, length - prompt.x.shape[1]))
    rest = {name: jnp.pad(getattr(prompt, name), width) for name in ("y", "weights", "clean")}
    return prompt._replace(x=jnp.pad(prompt.x, width, constant_values=4), **rest)


def maps(config: Config, model: models.Transformer, seed: int) -> list[np.ndarray]:
    """The mean weight [steps, bits] that steps of a scratchpad give to bits, for each number of bits in `mapped`.

    The head is the one that in training gives most to the bit of the step.
    """
    found, chosen = [], 0
    for number, bits in enumerate(config.mapped):
        prompt = task(config, "scratchpad").with_bits(bits).sample(jax.random.key(2000 + seed), config.prompts)
        _, records = trace.run(model, padded(prompt, model.config.length).x, record=("weights",))
        weights = np.asarray(records["weights"], np.float64).mean(1).reshape(-1, *records["weights"].shape[-2:])
        weights = weights[:, bits + 1 : 2 * bits + 1, 1 : bits + 1]  # [layers * heads, steps, bits]
        if not number:
            chosen = int(np.trace(weights, axis1=1, axis2=2).argmax())
        found.append(weights[chosen])
    return found


def run(config, seed, folder, console):
    check_names("runs", config.runs, [f"{name}, {kind}" for name in FORMATS for kind in KINDS])
    numbers: dict[str, float | None] = dict.fromkeys(claim.number for claim in CLAIMS)
    rows: list[dict[str, Any]] = []
    learning, free, shown = {}, {}, {}
    figures: dict[str, Any] = {}
    for name in config.runs:
        console.print(f"random_access: {name}")
        model, learning[name] = train(config, name, seed, folder, console)
        found = tested(config, model, name.split(", ")[0], seed)
        rows += [{"run": name} | row for row in found]
        free[name] = [(row["bits"], row["bits right"]) for row in found]
        shown[name] = [(row["bits"], row["bits right if shown"]) for row in found]
        for row in found:
            kinds = ("no error", "bits right", "bits right if shown")
            numbers |= {f"{name}: {kind}, {row['bits']} bits": row[kind] for kind in kinds}
        if name == "scratchpad, learned":
            weights = maps(config, model, seed)
            means = [float(np.diagonal(each).mean()) for each in weights]
            for bits, mean in zip(config.mapped, means, strict=True):
                numbers[f"weight on the bit of the step, {bits} bits"] = mean
            numbers["weight on the bit of the step, beyond over in training"] = means[1] / means[0]
            panels = {f"{bits} bits": each.tolist() for bits, each in zip(config.mapped, weights, strict=True)}
            figures["Attention of a scratchpad"] = Maps(panels, y="step, from 0", x="bit, from 0")
    figures["Bits right by the number of bits"] = Curves("bits", "share of bits that are right", free)
    figures["Bits right if all before are shown"] = Curves("bits", "share of bits that are right", shown)
    figures["Learning"] = Curves("step", "share of bits that are right", learning)
    return Result(numbers, {"Parities": rows}, figures)
