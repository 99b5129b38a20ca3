"""Attention as a posterior: a prior over distances that is inferred for each sequence, against one fixed slope.

Queries are noisy copies of keys, whose distances are geometric with a window that differs by sequence. A bias of ALiBi
is that prior. Its slope is fixed, inferred from the queries of a sequence, or known; the best answer weighs all
windows.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import Alibi, analysis, attend, icl
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, outside, within
from jaxattn.core.attend import NegativeDistance, OneHotSample


@dataclass(frozen=True)
class Config:
    """Sequences of keys and queries, and priors that read them.

    Attributes:
        dim: Channels of keys.
        keys: Keys of a sequence.
        queries: Queries of a sequence.
        noise: Standard deviation of a query around its key.
        shortest: The least window.
        longest: The largest.
        sequences: Sequences, a multiple of 64.
        slopes: Slopes of which the best is the fixed one.
        windows: Windows that the best answer weighs, from 1 to 4 times the largest.
        samples: Numbers of draws of hard attention.
    """

    dim: int = 4
    keys: int = 128
    queries: int = 16
    noise: float = 0.5
    shortest: float = 2.0
    longest: float = 32.0
    sequences: int = 2048
    slopes: tuple[float, ...] = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
    windows: int = 64
    samples: tuple[int, ...] = (1, 4, 16, 64, 256)


QUICK = Config(keys=32, queries=4, longest=8.0, sequences=64, slopes=(0.0, 0.1, 0.5), windows=8, samples=(1, 16))

PAPER = "bayes_attention"
CLAIMS = (
    Claim(
        "A slope that is inferred for each sequence beats every fixed slope: its squared error is at most 0.95 of that "
        "of the best.",
        paper=PAPER,
        number="error, inferred slope over best fixed slope",
        confirmed=at_most(0.95),
        refuted=at_least(1.0),
    ),
    Claim(
        "It is nearly as good as to know the window: an error of at most 1.05 of that.",
        paper=PAPER,
        number="error, inferred slope over known slope",
        confirmed=at_most(1.05),
        refuted=at_least(1.25),
    ),
    Claim(
        "The window is recovered: the inferred slope and the true one have a rank correlation of 0.8 or more.",
        paper=PAPER,
        number="rank correlation of inferred and true slope",
        confirmed=at_least(0.8),
        refuted=at_most(0.3),
    ),
    Claim(
        "What is inferred is the posterior: its mean is within a tenth of that by enumeration of windows, in the "
        "median.",
        paper=PAPER,
        number="median deviation from the mean by enumeration",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "Hard attention, one key drawn from the weights, converges to soft attention with the root of the draws.",
        paper=PAPER,
        number="slope of the log of the error over the log of the draws",
        confirmed=within(-0.55, -0.45),
        refuted=outside(within(-0.65, -0.35)),
    ),
)


def answers(
    query: jax.Array, key: jax.Array, value: jax.Array, noise: float, slope: jax.Array, **options: Any
) -> jax.Array:
    """What the queries [Q, H] of a sequence, behind its keys [S, H], read of values [S] under the bias of a slope."""
    given = {"score": NegativeDistance(0.5 / noise**2), "bias": Alibi(slope[None])} | options
    behind = jnp.full(len(query), len(key))
    return attend(query[:, None], key[:, None], value[:, None, None], query_positions=behind, **given)[:, 0, 0]


def enumerated(query: jax.Array, key: jax.Array, noise: float, probability: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the posterior [G] of a g that is uniform among these before, weights [G, Q, S] given each)."""
    behind = len(key) - 1 - jnp.arange(len(key))  # keys that stand after a key
    prior = jnp.log(probability)[:, None] + jnp.log1p(-probability)[:, None] * behind
    prior = jax.nn.log_softmax(prior, -1)
    likelihood = -jnp.square(query[:, None] - key).sum(-1) / (2 * noise**2)
    joint = likelihood + prior[:, None]
    evidence = jax.nn.logsumexp(joint, -1)
    return jax.nn.softmax(evidence.sum(-1)), jnp.exp(joint - evidence[..., None])


@partial(jax.jit, static_argnames=("config",))
def measured(config: Config, x: jax.Array, y: jax.Array, probability: jax.Array) -> dict[str, jax.Array]:
    """Squared errors and slopes of one sequence, by how the prior is chosen."""
    key, value, query = x[: config.keys, :-1], x[: config.keys, -1], x[config.keys :, :-1]
    truth = y[config.keys :]
    read = partial(answers, query, key, value, config.noise)
    posterior = icl.infer_window(query, key, config.noise)
    # g is uniform before in what is inferred, so windows are enumerated by g, at the middles of equal parts.
    grid = (jnp.arange(config.windows) + 0.5) / config.windows
    shares, weights = enumerated(query, key, config.noise, grid)
    error = lambda answer: jnp.square(answer - truth).mean()  # noqa: E731
    known = -jnp.log1p(-probability)
    return {
        "fixed": jnp.stack([error(read(jnp.asarray(slope))) for slope in config.slopes]),
        "inferred": error(read(posterior.slope)),
        "known": error(read(known)),
        "all windows": error(jnp.einsum("g,gqs,s->q", shares, weights, value)),
        "slope": posterior.slope,
        "true slope": known,
        "mean": posterior.mean,
        "mean by enumeration": shares @ grid,
    }


def hard(config: Config, seed: int) -> list[tuple[float, float]]:
    """(draws, the root of the mean squared error of their mean to soft attention) of one sequence's queries."""
    task = icl.WindowRecall(config.dim, config.keys, config.queries, config.noise)
    x = task.sample(jax.random.fold_in(jax.random.key(seed), 2), 1).x[0]
    key, value, query = x[: config.keys, :-1], x[: config.keys, -1], x[config.keys :, :-1]
    read = partial(answers, query, key, value, config.noise, jnp.asarray(0.1))
    draw = jax.jit(jax.vmap(lambda key: read(normalize=OneHotSample(key))))
    soft, most, repeats = read(), max(config.samples), 16
    drawn = draw(jax.random.split(jax.random.key(seed), most * repeats)).reshape(repeats, most, -1)
    return [(n, float(jnp.sqrt(jnp.square(drawn[:, :n].mean(1) - soft).mean()))) for n in config.samples]


def run(config, seed, folder, console):
    if config.sequences % 64:
        raise ValueError(f"sequences is {config.sequences}: need a multiple of 64")
    task = icl.WindowRecall(config.dim, config.keys, config.queries, config.noise, config.shortest, config.longest)
    every = []
    for number in range(config.sequences // 64):
        prompt = task.sample(jax.random.fold_in(jax.random.key(seed), 100 + number), 64)
        found = jax.vmap(partial(measured, config))(prompt.x, prompt.y, prompt.hidden.probability)
        every.append(jax.tree.map(np.asarray, found))
    console.print(f"priors: {config.sequences} sequences")
    all_of = {name: np.concatenate([each[name] for each in every]) for name in every[0]}
    fixed = all_of["fixed"].mean(0)
    errors = {name: float(all_of[name].mean()) for name in ("inferred", "known", "all windows")}
    draws = hard(config, seed)
    log = np.log(np.asarray(draws))
    deviation = abs(all_of["mean"] / all_of["mean by enumeration"] - 1)
    numbers = {
        "error, inferred slope over best fixed slope": errors["inferred"] / float(fixed.min()),
        "error, inferred slope over known slope": errors["inferred"] / errors["known"],
        "error, all windows over known slope": errors["all windows"] / errors["known"],
        "best fixed slope": float(config.slopes[int(fixed.argmin())]),
        "rank correlation of inferred and true slope": float(
            analysis.rank_correlation(all_of["slope"], all_of["true slope"])
        ),
        "median deviation from the mean by enumeration": float(np.median(deviation)),
        "slope of the log of the error over the log of the draws": float(np.polyfit(log[:, 0], log[:, 1], 1)[0]),
    }
    window = 1 / (-np.expm1(-all_of["true slope"]))
    edges = np.geomspace(config.shortest, config.longest, 7)
    lines: dict[str, list[tuple[float, float]]] = {"best fixed slope": [], "inferred slope": [], "known slope": []}
    best = all_of["fixed"][:, int(fixed.argmin())]
    for low, high in pairwise(edges):
        inside = (window >= low) & (window < high)
        for name, error in zip(lines, (best, all_of["inferred"], all_of["known"]), strict=True):
            if inside.any():
                lines[name].append((float(np.sqrt(low * high)), float(error[inside].mean())))
    rows: list[dict[str, Any]] = [
        {"prior": f"fixed, slope {slope:g}", "squared error": float(e)}
        for slope, e in zip(config.slopes, fixed, strict=True)
    ]
    rows += [{"prior": name, "squared error": error} for name, error in errors.items()]
    some, inferred = slice(0, 256), -np.log2(all_of["mean"])
    return Result(
        numbers,
        {"Squared error of values": rows},
        {
            "Error by window": Curves("window of the sequence (keys)", "squared error", lines, "x"),
            "Inferred window": Curves(
                "log2 of the true window",
                "log2 of the inferred window",
                {"sequences": list(zip(np.log2(window[some]).tolist(), inferred[some].tolist(), strict=True))},
                cloud=True,
            ),
            "Hard attention": Curves("draws", "error to soft attention", {"mean of draws": draws}, "xy"),
        },
    )
