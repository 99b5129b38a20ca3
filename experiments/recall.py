"""Multi-query associative recall: which token mixers learn to look up pairs that stand in their context.

A sequence holds pairs of a key and a value, and then asks for each of them once, at a random distance. Two layers of
each token mixer are trained on fresh sequences. What counts are the accuracy at the end, the step at which it passed 95
percent, and the size of the state that a layer has to carry.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import decoders
from experiments.decoders import OPTIMIZER
from jaxattn import Causal, Window, icl, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_names, outside
from jaxattn.core.linear import Elu1Features, IdentityFeatures, TaylorFeatures
from jaxattn.train import Drawn, OptimizerConfig


class Mixer(NamedTuple):
    """What one run trains: a spec for every layer, and the number of tokens that its state must keep (None: all)."""

    spec: models.Spec
    keeps: int | None = None


def _attention(window: int | None = None) -> Mixer:
    mask = Causal() if window is None else Window(window - 1)
    return Mixer(models.Spec(nn.MultiHeadAttention, heads=2, position=None, mask=mask, convolution=3), window)


def _linear(feature_map: Any, key_dim: int = 16, normalize: bool = True) -> Mixer:
    return Mixer(
        models.Spec(
            nn.LinearAttention, heads=2, feature_map=feature_map, key_dim=key_dim, normalize=normalize, convolution=3
        )
    )


# A layer must see a key and its value together: each has a short convolution, but RWKV-7 its own mix of two tokens.
MIXERS = {
    "softmax": _attention(),
    "window 16": _attention(16),
    "window 8": _attention(8),
    "Taylor": _linear(TaylorFeatures(2)),
    "Taylor 4": _linear(TaylorFeatures(2), key_dim=4),
    "elu+1": _linear(Elu1Features()),
    "elu+1 4": _linear(Elu1Features(), key_dim=4),
    "elu+1 8": _linear(Elu1Features(), key_dim=8),
    "elu+1 32": _linear(Elu1Features(), key_dim=32),
    "linear": _linear(IdentityFeatures(), normalize=False),
    "Hedgehog": _linear(models.Spec(nn.HedgehogMap)),
    "RetNet": Mixer(models.Spec(nn.RetNet, heads=2, convolution=3)),
    "GLA": Mixer(models.Spec(nn.GLA, heads=2, convolution=3)),
    "HGRN2": Mixer(models.Spec(nn.HGRN2, heads=2, convolution=3)),
    "DeltaNet": Mixer(models.Spec(nn.DeltaNet, heads=2, key_dim=16, convolution=3)),
    "gated DeltaNet": Mixer(models.Spec(nn.DeltaNet, heads=2, key_dim=16, decay="head", convolution=3)),
    "Kimi delta": Mixer(models.Spec(nn.DeltaNet, heads=2, key_dim=16, decay="channel", convolution=3)),
    "Mamba-2": Mixer(models.Spec(nn.Mamba2, heads=4, convolution=3)),
    "RWKV-7": Mixer(models.Spec(nn.RWKV7, heads=2)),
    "Latte": Mixer(models.Spec(nn.Latte, heads=2, latents=16, convolution=3)),
    "TTT": Mixer(models.Spec(nn.TTT, heads=2, inner_batch=8, convolution=3)),
    "Titans": Mixer(models.Spec(nn.NeuralMemory, heads=2, hidden=(32,), max_rate=0.02, inner_batch=8, convolution=3)),
}


@dataclass(frozen=True)
class Config:
    """Two layers of one mixer and a feed-forward block each, trained on fresh sequences.

    Attributes:
        mixers: Names in `MIXERS`; those that have claims if not given.
        pairs: Key-value pairs per sequence, each asked for once.
        length: Tokens per sequence, at least 4 per pair.
        keys: Different keys.
        values: Different values.
        power: Queries are drawn towards the pairs with probability ∝ gap^(power − 1); 1 is uniform.
        width: Width of the model.
        layers: Number of layers.
        steps: Training steps.
        batch_size: Sequences per step.
        eval_every: Steps between measurements of the accuracy.
        eval_batches: Batches per measurement.
        optimizer: The optimiser.
    """

    mixers: tuple[str, ...] = (
        "softmax",
        "window 8",
        "Taylor",
        "Taylor 4",
        "elu+1",
        "elu+1 4",
        "elu+1 32",
        "DeltaNet",
        "Latte",
    )
    pairs: int = 16
    length: int = 64
    keys: int = 64
    values: int = 64
    power: float = 0.01
    width: int = 64
    layers: int = 2
    steps: int = 1000
    batch_size: int = 64
    eval_every: int = 25
    eval_batches: int = 4
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(
    mixers=("softmax",),
    pairs=4,
    length=16,
    keys=8,
    values=8,
    width=32,
    steps=200,
    batch_size=32,
    optimizer=replace(OPTIMIZER, warmup_steps=20),
)

CLAIMS = (
    Claim(
        "Softmax attention recalls the value of a key anywhere in its context.",
        paper="zoology",
        number="softmax: accuracy",
        confirmed=at_least(0.95),
    ),
    Claim(
        "Softmax attention learns it early: 95 percent by step 500.",
        paper="based",
        number="softmax: steps to 95 percent",
        confirmed=at_most(500),
    ),
    Claim(
        "A state too small for the pairs loses them: in a window of 8, two layers stay below 20 percent.",
        paper="based",
        number="window 8: accuracy",
        confirmed=at_most(0.2),
        refuted=at_least(0.5),
    ),
    Claim(
        "Taylor features of degree 2 learn it as early as softmax: 95 percent by step 500.",
        paper="based",
        number="Taylor: steps to 95 percent",
        confirmed=at_most(500),
    ),
    Claim(
        "The map elu + 1 recalls less: it has not reached 95 percent after 1000 steps.",
        paper="based",
        number="elu+1: accuracy",
        confirmed=at_most(0.95),
        refuted=outside(at_most(0.95)),
    ),
    Claim(
        "A larger state recalls more: Taylor features of 16 channels are ahead of those of 4 by 2 points or more.",
        paper="based",
        number="Taylor of 16 channels over 4: accuracy gained",
        confirmed=at_least(0.02),
        refuted=at_most(-0.02),
    ),
    Claim(
        "So it does under elu + 1: 32 channels are ahead of 4 by 10 points or more.",
        paper="based",
        number="elu+1 of 32 channels over 4: accuracy gained",
        confirmed=at_least(0.1),
        refuted=at_most(-0.02),
    ),
    Claim(
        "The delta rule recalls the value of a key anywhere in its context.",
        paper="deltanet",
        number="DeltaNet: accuracy",
        confirmed=at_least(0.95),
    ),
    Claim(
        "Attention over 16 latents is nearly as good as softmax attention: it loses 10 points at most.",
        paper="latte",
        number="softmax over Latte: accuracy gained",
        confirmed=at_most(0.1),
    ),
)

# The differences that claims are about: name -> (the one, the other).
DIFFERENCES = {
    "Taylor of 16 channels over 4: accuracy gained": ("Taylor", "Taylor 4"),
    "elu+1 of 32 channels over 4: accuracy gained": ("elu+1 32", "elu+1 4"),
    "softmax over Latte: accuracy gained": ("softmax", "Latte"),
}


def task(config: Config) -> Drawn:
    """The task of a config. Raises ValueError for pairs that do not fit."""
    options = {name: getattr(config, name) for name in ("pairs", "length", "keys", "values", "power")}
    recall = icl.AssociativeRecall(**options)
    return Drawn(lambda key, rows: recall.sample(key, rows).tokens(), config.length, json.dumps(options))


def build(config: Config, mixer: Mixer, seed: int) -> models.Transformer:
    return decoders.build(
        mixer.spec,
        vocabulary=1 + config.keys + config.values,
        length=config.length,
        width=config.width,
        layers=config.layers,
        seed=seed,
    )


def state_size(config: Config, mixer: Mixer) -> int:
    """Numbers that one sequence keeps for decoding, over all layers, at the full length."""
    kept = config.length if mixer.keeps is None else min(mixer.keeps, config.length)
    state = jax.eval_shape(lambda: build(config, mixer, 0).init_state(1, kept))
    return sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))


def train(config, mixer, seed, folder, console) -> tuple[list[tuple[float, float]], float]:
    """((step, accuracy) at every measurement, tokens per second in training)."""
    _, result = decoders.train(
        build(config, mixer, seed),
        task(config),
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        eval_batches=config.eval_batches,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"mixer": repr(mixer), "recall": asdict(config) | {"mixers": None}},
        folder=folder,
        console=console,
    )
    return decoders.measured(result, "correct"), result.tokens_per_second


def run(config, seed, folder, console):
    check_names("mixers", config.mixers, MIXERS)
    numbers: dict[str, float | None] = {}
    for name in MIXERS:
        numbers |= {f"{name}: accuracy": None, f"{name}: steps to 95 percent": None}
    rows, learning, by_state = [], {}, {}
    for name in config.mixers:
        console.print(f"recall: {name}")
        size = state_size(config, MIXERS[name])
        learning[name], speed = train(config, MIXERS[name], seed, folder / name.replace(" ", "_"), console)
        accuracy = learning[name][-1][1]
        step = decoders.first_step(learning[name], 0.95)
        reached = None if step is None else float(step)
        numbers |= {f"{name}: accuracy": accuracy, f"{name}: steps to 95 percent": reached}
        row = {"mixer": name, "state": size, "accuracy": accuracy, "steps to 95 percent": reached}
        rows.append(row | {"tokens per second in training": speed})
        by_state[name] = [(size, accuracy)]
    for name, pair in DIFFERENCES.items():
        one, other = (numbers[f"{mixer}: accuracy"] for mixer in pair)
        numbers[name] = None if one is None or other is None else one - other
    return Result(
        numbers,
        {"Recall": rows},
        {
            "Accuracy against step": Curves("step", "accuracy", learning),
            "Accuracy against state": Curves("numbers kept per sequence", "accuracy", by_state, log="x"),
        },
    )
