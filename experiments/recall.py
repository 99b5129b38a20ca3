"""Multi-query associative recall: which token mixers learn to look up pairs that stand in their context."""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.experiment import Claim, Curves, Result, at_least, at_most, outside
from jaxattn import Causal, Elu1Features, Features, TaylorFeatures, Window, models
from jaxattn.train import Drawn, OptimizerConfig, TrainConfig, fit, make_optimizer, next_token_loss


class ShortConvolution(nnx.Module):
    """y_t = Σ_w c_w ⊙ (W x)_{t−w} over the last `width` tokens: a linear map, then a causal convolution per channel."""

    def __init__(self, linear: nnx.Linear, width: int, rngs: nnx.Rngs):
        self.linear, self.in_features = linear, linear.in_features
        self.taps = nnx.Param(jax.random.normal(rngs.params(), (width, linear.out_features)) / width**0.5)

    def __call__(self, x):
        y = self.linear(x)
        taps = jnp.asarray(self.taps)
        shifted = (jnp.pad(y, ((0, 0), (w, 0), (0, 0)))[:, : y.shape[1]] for w in range(len(taps)))
        return sum(tap * each for tap, each in zip(taps, shifted, strict=True))


@dataclass(frozen=True)
class Convolved:
    """The spec of attention on convolved queries, keys and values: one layer sees a key and its value together."""

    attention: models.Attention
    width: int = 3

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> Any:
        module = self.attention.build(features, dtype, rngs)
        for name in ("query", "key", "value"):
            setattr(module, name, ShortConvolution(getattr(module, name), self.width, rngs))
        return module


class FeatureAttention(nnx.Module):
    """out_t = Σ_{j ≤ t} (φ(q_t) · ψ(k_j)) v_j / Σ_{j ≤ t} φ(q_t) · ψ(k_j), with q, k, v convolved; quadratic in T."""

    def __init__(self, features: Features, width: int, heads: int, key_dim: int, rngs: nnx.Rngs):
        self.features, self.heads = nnx.data(features), heads
        self.query, self.key, self.value = (
            ShortConvolution(nnx.Linear(width, size, use_bias=False, rngs=rngs), 3, rngs)
            for size in (heads * key_dim, heads * key_dim, width)
        )
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.state_shape = (heads, features.size(key_dim), width // heads + 1)

    def __call__(self, x, *, positions=None, mask=None, state=None, record=()):
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.query, self.key, self.value))
        phi, psi = self.features(q, k)
        kernel = jnp.tril(jnp.einsum("btnf,bsnf->bnts", phi, psi))
        weights = kernel / (kernel.sum(-1, keepdims=True) + 1e-12)
        return self.out(jnp.einsum("bnts,bsnv->btnv", weights, v).reshape(x.shape)), state, {}

    def init_state(self, batch: int, capacity: int) -> jax.Array:
        return jnp.zeros((batch, *self.state_shape))


@dataclass(frozen=True)
class LinearMixer:
    """The spec of `FeatureAttention` with queries and keys of `key_dim` channels."""

    features: Features
    key_dim: int = 16
    heads: int = 2

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> FeatureAttention:
        return FeatureAttention(self.features, features, self.heads, self.key_dim, rngs)


class Mixer(NamedTuple):
    """What one run trains: a spec for every layer, and the number of tokens that its state must keep (None: all)."""

    spec: Any
    keeps: int | None = None


def _attention(window: int | None = None) -> Mixer:
    mask = Causal() if window is None else Window(window - 1)
    return Mixer(Convolved(models.Attention(heads=2, rotary_base=None, mask=mask)), window)


OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=50, final_fraction=0.0)
MIXERS = {
    "softmax": _attention(),
    "window 16": _attention(16),
    "window 8": _attention(8),
    "Taylor": Mixer(LinearMixer(TaylorFeatures(2))),
    "Taylor 4": Mixer(LinearMixer(TaylorFeatures(2), key_dim=4)),
    "elu+1": Mixer(LinearMixer(Elu1Features())),
}


@dataclass(frozen=True)
class Config:
    """Two layers of one mixer and a feed-forward block each, trained on fresh sequences.

    Attributes:
        mixers: Names in `MIXERS`.
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

    mixers: tuple[str, ...] = tuple(MIXERS)
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
    steps=100,
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
)


def recall_batch(
    key: jax.Array, rows: int, *, pairs: int, length: int, keys: int, values: int, power: float
) -> dict[str, jax.Array]:
    """Sequences k₁ v₁ ... k_n v_n, then each key again, its value the target there; as `next_token_loss` takes them.

    Token 0 fills the rest, 1 .. keys are keys, and those after them values. Keys of a row differ, and so do its values.
    The part after the pairs is cut into slots of two tokens; the n slots that hold a query are drawn without
    replacement with probability ∝ gap^(power − 1), gap = 1, 2, ... counted from the pairs, as in Zoology.
    """
    for_keys, for_values, for_slots = jax.random.split(key, 3)

    def some(key: jax.Array, count: int) -> jax.Array:
        return jax.random.uniform(key, (rows, count)).argsort(-1)[:, :pairs]

    asked = 1 + some(for_keys, keys)
    answers = 1 + keys + some(for_values, values)
    context = jnp.stack([asked, answers], -1).reshape(rows, 2 * pairs)
    gaps = jnp.arange(1, (length - 2 * pairs) // 2 + 1)
    # The largest of log-probabilities with Gumbel noise are a draw without replacement.
    noisy = (power - 1) * jnp.log(gaps) + jax.random.gumbel(for_slots, (rows, len(gaps)))
    places = 2 * pairs + 2 * noisy.argsort(-1, descending=True)[:, :pairs]
    row = jnp.arange(rows)[:, None]
    empty = jnp.zeros((rows, length), jnp.int32)
    return {
        "tokens": empty.at[:, : 2 * pairs].set(context).at[row, places].set(asked),
        "targets": empty.at[row, places].set(answers),
        "weights": jnp.zeros((rows, length)).at[row, places].set(1.0),
    }


def task(config: Config) -> Drawn:
    """The task of a config. Raises ValueError for pairs that do not fit."""
    if config.length % 2 or config.length < 4 * config.pairs:
        raise ValueError(f"length is {config.length} for {config.pairs} pairs: need an even number, 4 per pair or more")
    for name in ("keys", "values"):
        if getattr(config, name) < config.pairs:
            raise ValueError(f"{name} is {getattr(config, name)} for {config.pairs} pairs: need at least as many")
    options = {name: getattr(config, name) for name in ("pairs", "length", "keys", "values", "power")}
    return Drawn(partial(recall_batch, **options), config.length, json.dumps(options))


def build(config: Config, mixer: Mixer, seed: int) -> models.Decoder:
    layer = models.Layer(mixer.spec, models.FeedForward(hidden=2 * config.width, kind="gelu"))
    vocabulary = 1 + config.keys + config.values
    decoder = models.DecoderConfig(vocabulary, config.length, config.width, [layer] * config.layers, tied=False)
    return models.Decoder(decoder, rngs=nnx.Rngs(seed))


def state_size(config: Config, mixer: Mixer) -> int:
    """Numbers that one sequence keeps for decoding, over all layers, at the full length."""
    kept = config.length if mixer.keeps is None else min(mixer.keeps, config.length)
    state = jax.eval_shape(lambda: build(config, mixer, 0).init_state(1, kept))
    return sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))


def train(config, mixer, seed, folder, console) -> list[tuple[float, float]]:
    """(step, accuracy) at every measurement; raises KeyboardInterrupt if it was stopped, to be taken up again."""
    graph, params, *rest = nnx.split(build(config, mixer, seed), nnx.Param, ...)

    def loss_fn(params, batch, key):
        logits, *_ = nnx.merge(graph, params, *rest)(batch["tokens"])
        total, sums = next_token_loss(logits, batch)
        return total, {name: sums[name] for name in ("weight", "correct")}

    source, every = task(config), config.eval_every
    result = fit(
        loss_fn=loss_fn,
        params=params,
        optimizer=make_optimizer(config.optimizer, config.steps),
        train_data=source,
        validation_data=source,
        config=TrainConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            eval_every=every,
            eval_batches=config.eval_batches,
            save_every=4 * every,
            keep=2,
            log_every=every,
            seed=seed,
        ),
        run_config={"mixer": repr(mixer), "recall": asdict(config) | {"mixers": None}},
        folder=folder,
        console=console,
    )
    if not result.complete:
        raise KeyboardInterrupt
    return [(line["step"], line["validation_correct"]) for line in result.history if "validation_correct" in line]


def run(config, seed, folder, console):
    if unknown := set(config.mixers) - set(MIXERS):
        raise ValueError(f"mixers holds {sorted(unknown)}: need some of {list(MIXERS)}")
    numbers: dict[str, float | None] = {}
    for name in MIXERS:
        numbers |= {f"{name}: accuracy": None, f"{name}: steps to 95 percent": None}
    rows, learning, by_state = [], {}, {}
    for name in config.mixers:
        console.print(f"recall: {name}")
        size = state_size(config, MIXERS[name])
        learning[name] = train(config, MIXERS[name], seed, folder / name.replace(" ", "_"), console)
        accuracy = learning[name][-1][1]
        reached = next((float(step) for step, correct in learning[name] if correct >= 0.95), None)
        numbers |= {f"{name}: accuracy": accuracy, f"{name}: steps to 95 percent": reached}
        rows.append({"mixer": name, "state": size, "accuracy": accuracy, "steps to 95 percent": reached})
        by_state[name] = [(size, accuracy)]
    large, small = numbers["Taylor: accuracy"], numbers["Taylor 4: accuracy"]
    gained = None if large is None or small is None else large - small
    numbers["Taylor of 16 channels over 4: accuracy gained"] = gained
    return Result(
        numbers,
        {"Recall": rows},
        {
            "Accuracy against step": Curves("step", "accuracy", learning),
            "Accuracy against state": Curves("numbers kept per sequence", "accuracy", by_state, log="x"),
        },
    )
