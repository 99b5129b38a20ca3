"""Length extrapolation: what mixers trained on short sequences make of longer ones.

Two layers of each mixer are trained on sequences of 64 tokens, each of a Markov chain of its own. They then read
sequences of 2, 4 and 8 times that length. Their loss at the end stands beside that of the best predictor there is,
because longer sequences also say more about their chain.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments import decoders
from jaxattn import Alibi, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_names
from jaxattn.train import Drawn, OptimizerConfig

MIXERS: dict[str, models.Spec] = {
    "rotary": models.Spec(nn.MultiHeadAttention, heads=2, convolution=3),
    "ALiBi": models.Spec(
        nn.MultiHeadAttention, heads=2, position=None, bias=models.Spec(Alibi.geometric), convolution=3
    ),
    "RetNet": models.Spec(nn.RetNet, heads=2, convolution=3),
    "GLA": models.Spec(nn.GLA, heads=2, convolution=3),
    "gated DeltaNet": models.Spec(nn.DeltaNet, heads=2, key_dim=16, decay="head", convolution=3),
    "Mamba-2": models.Spec(nn.Mamba2, heads=4, state=16, convolution=3),
    "Latte": models.Spec(nn.Latte, heads=2, latents=16, convolution=3),
}
TIMES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Config:
    """Two layers of one mixer and a feed-forward block each, trained on the first of these lengths.

    Every sequence is of a Markov chain of its own, whose transitions can only be learned from the sequence. Beside the
    loss of a model stands that of the best predictor there is (`posterior`).

    Attributes:
        mixers: Names in `MIXERS`.
        letters: States of a chain.
        concentration: Of the Dirichlet distribution that transitions from a state are drawn from.
        length: Tokens per sequence in training; the trained model reads 8 times as many.
        width: Width of the model.
        layers: Number of layers.
        steps: Training steps.
        batch_size: Sequences per step.
        eval_every: Steps between measurements of the loss at the length of training.
        eval_batches: Batches per measurement.
        long_batches: Batches of long sequences that the trained model reads.
        optimizer: The optimiser.
    """

    mixers: tuple[str, ...] = tuple(MIXERS)
    letters: int = 8
    concentration: float = 0.3
    length: int = 64
    width: int = 64
    layers: int = 2
    steps: int = 400
    batch_size: int = 32
    eval_every: int = 50
    eval_batches: int = 2
    long_batches: int = 8
    optimizer: OptimizerConfig = decoders.OPTIMIZER


QUICK = Config(
    mixers=("ALiBi",),
    letters=4,
    length=16,
    width=32,
    layers=1,
    steps=100,
    eval_every=50,
    long_batches=2,
    optimizer=replace(decoders.OPTIMIZER, warmup_steps=20),
)


def _keeps(mixer: str, paper: str) -> Claim:
    return Claim(
        f"{mixer} keeps what it learned at 8 times the length: it loses at most 0.05 nats per token more.",
        paper=paper,
        number=f"{mixer}: loss grown at 8 times the length",
        confirmed=at_most(0.05),
        refuted=at_least(0.2),
    )


CLAIMS = (
    Claim(
        "Attention with rotary positions does not keep it: it loses 0.1 nats per token more at 8 times the length.",
        paper="alibi",
        number="rotary: loss grown at 8 times the length",
        confirmed=at_least(0.1),
        refuted=at_most(0.0),
    ),
    _keeps("ALiBi", "alibi"),
    _keeps("RetNet", "retnet"),
    _keeps("GLA", "gla"),
    _keeps("gated DeltaNet", "gated_deltanet"),
    Claim(
        "Twice the length is enough to see it: rotary positions lose more there than ALiBi.",
        paper="alibi",
        number="rotary over ALiBi: loss grown at 2 times the length",
        confirmed=at_least(0.01),
        refuted=at_most(-0.01),
    ),
)


def chain_batch(key: jax.Array, rows: int, *, letters: int, concentration: float, length: int) -> dict[str, jax.Array]:
    """Sequences of Markov chains x₀ ... x_L, as `next_token_loss` takes them: each token's target is the next.

    x₀ is uniform, and every row has transitions of its own, drawn from Dirichlet(concentration).
    """
    for_chain, for_first, for_next = jax.random.split(key, 3)
    # Log-space: with a small concentration some gammas are too small for a float.
    log_gamma = jax.random.loggamma(for_chain, concentration, (rows, letters, letters))
    first = jax.random.randint(for_first, (rows,), 0, letters)

    def step(state, key):
        state = jax.random.categorical(key, log_gamma[jnp.arange(rows), state])
        return state, state

    _, rest = jax.lax.scan(step, first, jax.random.split(for_next, length))
    tokens = jnp.concatenate([first[None], rest]).swapaxes(0, 1)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((rows, length))}


def posterior(tokens: jax.Array, letters: int, concentration: float) -> jax.Array:
    """The log-probability of each next token, given those before it: p(j | i) = (n_ij + c) / (n_i + letters c).

    n_ij counts how often j has followed i so far. No predictor that sees the tokens alone has a smaller mean loss.
    """
    one = jax.nn.one_hot(tokens, letters)
    followed = jnp.cumsum(one[:, :-1, :, None] * one[:, 1:, None, :], 1)
    counts = jnp.pad(followed, ((0, 0), (1, 0), (0, 0), (0, 0))) + concentration
    now = jnp.einsum("bti,btij->btj", one, counts)
    return jnp.log(now / now.sum(-1, keepdims=True))


def task(config: Config, times: int = 1) -> Drawn:
    """Sequences of `times` the length of training."""
    length = times * config.length
    draw = partial(chain_batch, letters=config.letters, concentration=config.concentration, length=length)
    return Drawn(draw, length, json.dumps(draw.keywords))


def losses(config: Config, model: models.Transformer, seed: int) -> tuple[list[float], list[float]]:
    """Losses of the model and of `posterior` at each position, in nats, on sequences 8 times as long as in training."""

    @jax.jit
    def one(key):
        batch = task(config, TIMES[-1]).draw(key, config.batch_size)
        logits, *_ = model(batch["tokens"])
        predicted = jax.nn.log_softmax(logits), posterior(batch["tokens"], config.letters, config.concentration)
        said = jnp.take_along_axis(jnp.stack(predicted), batch["targets"][None, ..., None], -1)
        return -said[..., 0].mean(1)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), config.long_batches)
    own, best = (sum(one(key) for key in keys) / config.long_batches).tolist()
    return own, best


def halves(config: Config, x: list[float]) -> list[float]:
    """The mean over each half of the length of training; number 2 n − 1 ends at n times that length."""
    half = config.length // 2
    return [sum(x[start : start + half]) / half for start in range(0, len(x), half)]


def run(config, seed, folder, console):
    check_names("mixers", config.mixers, MIXERS)
    numbers: dict[str, float | None] = {}
    for name in MIXERS:
        numbers |= {f"{name}: loss grown at {times} times the length": None for times in TIMES[1:]}
    rows: list[dict[str, Any]] = []
    lines, learning = {}, {}
    for name in config.mixers:
        console.print(f"extrapolation: {name}")
        model, result = decoders.train(
            decoders.build(
                MIXERS[name],
                vocabulary=config.letters,
                length=TIMES[-1] * config.length,
                width=config.width,
                layers=config.layers,
                seed=seed,
            ),
            task(config),
            steps=config.steps,
            batch_size=config.batch_size,
            eval_every=config.eval_every,
            eval_batches=config.eval_batches,
            optimizer=config.optimizer,
            seed=seed,
            run_config={"mixer": repr(MIXERS[name]), "extrapolation": asdict(config) | {"mixers": None}},
            folder=folder / name.replace(" ", "_"),
            console=console,
        )
        learning[name] = decoders.measured(result, "loss")
        own, best = (halves(config, each) for each in losses(config, model, seed))
        at = {times: own[2 * times - 1] for times in TIMES}
        numbers |= {f"{name}: loss grown at {times} times the length": at[times] - at[1] for times in TIMES[1:]}
        rows.append({"mixer": name} | {f"loss at {times} times the length": at[times] for times in TIMES})
        places = [config.length * (number + 0.5) / 2 for number in range(len(own))]
        lines[name] = list(zip(places, own, strict=True))
        lines["best predictor"] = list(zip(places, best, strict=True))
    one, other = (numbers[f"{name}: loss grown at 2 times the length"] for name in ("rotary", "ALiBi"))
    gained = None if one is None or other is None else one - other
    numbers["rotary over ALiBi: loss grown at 2 times the length"] = gained
    at = {times: best[2 * times - 1] for times in TIMES}
    rows.append({"mixer": "best predictor"} | {f"loss at {times} times the length": at[times] for times in TIMES})
    return Result(
        numbers,
        {"Loss": rows},
        {
            "Loss by position": Curves("position", "nats per token", lines, log="x"),
            "Loss in training": Curves("step", "nats per token", learning),
        },
    )
