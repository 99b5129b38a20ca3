"""How close linear attention comes to softmax attention, by its feature map and the number of features.

Random features have an error that theory foretells: its fall with the number of features, and its size for one value of
the kernel. Taylor features have one that falls with the degree. Hedgehog features are fitted to the attention of random
tokens, and log-normal ones are set by moments; both are measured by how alike their weights are to those of softmax.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from jaxattn import analysis
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, outside, within
from jaxattn.core.linear import (
    Elu1Features,
    Features,
    HedgehogFeatures,
    LogNormalFeatures,
    RandomFeatures,
    TaylorFeatures,
    distillation_loss,
    moment_match,
    orthogonal_gaussian,
)
from jaxattn.core.linear.feature import HedgehogKind


@dataclass(frozen=True)
class Config:
    """Four parts on synthetic queries and keys.

    Attributes:
        counts: Numbers m of random directions.
        trials: Draws of the directions that an error is averaged over.
        length: Tokens in the part on random features.
        head_dim: Channels H there; queries and keys are N(0, 1/4), so that |x|² is 1 for x = q H^(−1/4) at H = 16.
        draws: Draws of 16 directions for the variance of one kernel value.
        distilled_length: Tokens in the part on Hedgehog.
        distilled_dim: Channels there.
        distilled_batch: Sequences per step.
        distilled_steps: Steps of Adam at a rate of 0.01.
        normal_length: Tokens in the part on log-normal features.
        normal_dim: Channels there.
        normal_stds: Standard deviations of queries and keys there.
    """

    counts: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    trials: int = 64
    length: int = 64
    head_dim: int = 16
    draws: int = 20000
    distilled_length: int = 128
    distilled_dim: int = 32
    distilled_batch: int = 8
    distilled_steps: int = 300
    normal_length: int = 512
    normal_dim: int = 64
    normal_stds: tuple[float, ...] = (1.0, 1.3, 1.6)


QUICK = Config(counts=(8, 32, 128), trials=16, draws=5000, distilled_batch=4, distilled_steps=150, normal_length=256)

HALF = within(-0.6, -0.4)
SAME = within(0.8, 1.25)
CLAIMS = (
    *(
        Claim(
            f"The error of attention by {kind} random features falls with the root of their number.",
            paper="performer",
            number=f"slope, {kind}",
            confirmed=HALF,
            refuted=at_least(-0.25),
        )
        for kind in ("positive", "positive orthogonal", "hyperbolic", "hyperbolic orthogonal")
    ),
    Claim(
        "Orthogonal directions have a smaller error than independent ones, at every number of them.",
        paper="performer",
        number="largest error of orthogonal over independent, positive",
        confirmed=at_most(1),
        refuted=outside(at_most(1)),
    ),
    *(
        Claim(
            f"The mean squared error of {kind} features is what the formula says, for |x| = |y| = 1 at cosine −0.9.",
            paper="performer",
            number=f"squared error over formula, {kind}",
            confirmed=SAME,
            refuted=outside(SAME),
        )
        for kind in ("positive", "hyperbolic", "trigonometric")
    ),
    Claim(
        "Positive features are far better than trigonometric ones where weights are small.",
        paper="performer",
        number="squared error of positive over trigonometric, cosine −0.9",
        confirmed=at_most(0.1),
        refuted=at_least(1),
    ),
    Claim(
        "Positive features are worse than trigonometric ones where weights are large.",
        paper="performer",
        number="squared error of positive over trigonometric, cosine 0.9",
        confirmed=at_least(10),
        refuted=at_most(1),
    ),
    Claim(
        "Hyperbolic features halve the squared error of positive ones, or better.",
        paper="performer",
        number="squared error of hyperbolic over positive, cosine −0.9",
        confirmed=at_most(0.5),
        refuted=outside(at_most(0.5)),
    ),
    Claim(
        "Taylor features converge to softmax as their degree grows.",
        paper="fastmax",
        number="error of Taylor degree 3 over degree 1",
        confirmed=at_most(0.25),
        refuted=at_least(1),
    ),
    Claim(
        "Distilled Hedgehog features mimic softmax far better than elu+1: held-out divergence below 0.6 of its.",
        paper="hedgehog",
        number="divergence, Hedgehog over elu+1",
        confirmed=at_most(0.6),
        refuted=at_least(1),
    ),
    Claim(
        "Rows of Hedgehog are spiky like those of softmax: their excess entropy is below 0.75 of that of elu+1.",
        paper="hedgehog",
        number="excess entropy, Hedgehog over elu+1",
        confirmed=at_most(0.75),
        refuted=at_least(1),
    ),
    Claim(
        "Weights of Hedgehog rise with q·k more monotonically than those of elu+1.",
        paper="hedgehog",
        number="rank correlation with q·k, Hedgehog less elu+1",
        confirmed=at_least(0),
        refuted=outside(at_least(0)),
    ),
    Claim(
        "Matched log-normal features have the log-variance of softmax, within 30 percent at every scale of q and k.",
        paper="lln",
        number="log-variance, largest deviation of matched features",
        confirmed=at_most(0.3),
        refuted=outside(at_most(0.3)),
    ),
    Claim(
        "Unmatched log-normal features (α = β = 1) concentrate far less: softmax has 5 times their log-variance.",
        paper="lln",
        number="log-variance, least ratio of softmax to unmatched features",
        confirmed=at_least(5),
        refuted=at_most(1),
    ),
)


def softmax_weights(query, key):
    """Softmax attention [..., N, T, S] of query [..., T, N, H] and key [..., S, N, H]."""
    return jax.nn.softmax(jnp.einsum("...tnh,...snh->...nts", query, key) * query.shape[-1] ** -0.5)


def weights(features: Features, query, key):
    """The attention [..., N, T, S] of a feature map: rows of φ_i · ψ_j, divided by their total."""
    kernel = jnp.einsum("...tnf,...snf->...nts", *features(query, key))
    return kernel / kernel.sum(-1, keepdims=True)


def error(approximation, exact):
    """Mean over rows of Σ_j |difference|: 0 to 2 for weights that are positive."""
    return jnp.abs(approximation - exact).sum(-1).mean()


def entropy(p):
    """Mean over rows, in nats."""
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1).mean()


def divergence(p, approximation):
    """Mean over rows of KL(p ‖ approximation), in nats."""
    return distillation_loss(p, approximation) - entropy(p)


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line through log y against log x, by least squares."""
    xs, ys = np.log(np.array(points)).T
    return float(np.polyfit(xs, ys, 1)[0])


# Random features


KINDS = {
    f"{kind}{' orthogonal' if scaling == 'chi' else ''}": (kind, scaling)
    for scaling in ("none", "chi")
    for kind in ("positive", "hyperbolic", "trigonometric")
}


@partial(jax.jit, static_argnames=("kind", "scaling", "most", "trials"))
def random_error(seed, query, key, counts, kind, scaling, most, trials):
    """The mean error of attention for each number of directions, over draws of `most` of which it takes the first."""
    exact = softmax_weights(query, key)

    def one(seed):
        features = RandomFeatures(orthogonal_gaussian(seed, most, query.shape[-1], scaling), kind)
        phi, psi = features(query, key)

        def of_first(count):
            taken = jnp.tile(jnp.arange(most) < count, phi.shape[-1] // most)
            kernel = jnp.einsum("tnf,snf->nts", phi * taken, psi)
            return error(kernel / kernel.sum(-1, keepdims=True), exact)

        return jax.lax.map(of_first, counts)

    return jax.lax.map(one, jax.random.split(seed, trials)).mean(0)


def against_features(config: Config, seed: jax.Array, console):
    """Lines of the error of attention against the number of features."""
    for_query, for_key, for_directions = jax.random.split(seed, 3)
    query, key = (jax.random.normal(x, (config.length, 1, config.head_dim)) / 2 for x in (for_query, for_key))
    exact = softmax_weights(query, key)
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, (kind, scaling) in track(KINDS.items(), "random features", console=console):
        counts, most = jnp.array(config.counts), max(config.counts)
        means = random_error(for_directions, query, key, counts, kind, scaling, most, config.trials)
        per_direction = 1 if kind == "positive" else 2
        lines[name] = [(float(per_direction * m), float(x)) for m, x in zip(config.counts, means, strict=True)]
    lines["Taylor"] = [
        (float(features.size(config.head_dim)), float(error(weights(features, query, key), exact)))
        for features in map(TaylorFeatures, (1, 2, 3))
    ]
    return lines


def formula(kind: str, cosine, count: int):
    """Squared error over the squared kernel exp(x·y), for |x| = |y| = 1 and `count` independent directions."""
    total, between = 2 + 2 * cosine, 2 - 2 * cosine
    positive = np.exp(total) * (1 - np.exp(-total)) / count
    match kind:
        case "positive":
            return positive
        case "hyperbolic":
            return positive * (1 - np.exp(-total)) / 2
    return np.exp(-4 * cosine + total) * (1 - np.exp(-between)) ** 2 / (2 * count)


@partial(jax.jit, static_argnames=("kind", "scaling", "draws"))
def squared_error(seed, cosine, kind, scaling, draws):
    """The measured one, over draws of 16 directions in 16 dimensions."""
    x = jnp.eye(16)[0]
    y = cosine * x + jnp.sqrt(1 - cosine**2) * jnp.eye(16)[1]

    def one(key):
        features = RandomFeatures(orthogonal_gaussian(key, 16, 16, scaling), kind, scale=1.0)
        phi, psi = features(x[None, None], y[None, None])
        return jnp.square((phi * psi).sum() * jnp.exp(-cosine) - 1)

    return jax.vmap(one)(jax.random.split(seed, draws)).mean()


def variances(config: Config, seed: jax.Array, console):
    """Lines of the squared error of one kernel value, over its square, against the cosine of query and key."""
    cosines = (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9)
    lines: dict[str, list[tuple[float, float]]] = {}
    for number, (name, (kind, scaling)) in enumerate(track(KINDS.items(), "variances", console=console)):
        key = jax.random.fold_in(seed, number)
        lines[name] = [(c, float(squared_error(key, c, kind, scaling, config.draws))) for c in cosines]
    for kind in ("positive", "hyperbolic", "trigonometric"):
        lines[f"{kind}, formula"] = [(float(c), float(formula(kind, c, 16))) for c in np.linspace(-0.9, 0.9, 19)]
    return lines


# Hedgehog


def distilled(config: Config, seed: jax.Array, kind: HedgehogKind, sample: Callable[[jax.Array], tuple]):
    """Hedgehog features after training on the weights of softmax attention."""

    def loss(features, key):
        query, key = sample(key)
        return distillation_loss(softmax_weights(query, key), weights(features, query, key))

    optimizer = optax.adam(1e-2)
    first = HedgehogFeatures.identity(1, config.distilled_dim, kind=kind, normalized=kind == "exp")

    def step(carry, key):
        features, state = carry
        updates, state = optimizer.update(jax.grad(loss)(features, key), state)
        return (optax.apply_updates(features, updates), state), None

    keys = jax.random.split(seed, config.distilled_steps)
    return jax.jit(lambda: jax.lax.scan(step, (first, optimizer.init(first)), keys)[0][0])()


def mimicry(config: Config, seed: jax.Array, console):
    """What maps make of held-out queries and keys that share a projection: a table, and the weights of one sequence."""
    for_mixing, for_training, for_test, for_features = jax.random.split(seed, 4)
    width = config.distilled_dim
    mixing = jax.random.normal(for_mixing, (width, width)) / width**0.5

    def sample(key, batch=config.distilled_batch):
        for_tokens, for_noise = jax.random.split(key)
        shape = (batch, config.distilled_length, 1, width)
        tokens = jax.random.normal(for_tokens, shape) @ mixing
        return 1.2 * tokens, 1.2 * (tokens + 0.3 * jax.random.normal(for_noise, shape))

    query, key = sample(for_test, 16)
    scores = jnp.einsum("btnh,bsnh->bnts", query, key)
    exact = softmax_weights(query, key)
    maps: dict[str, Features] = {
        "elu+1": Elu1Features(),
        "log-normal, matched": LogNormalFeatures(*moment_match(query.std(), key.std()), normalized=True),
        "Taylor, degree 2": TaylorFeatures(2),
        "positive orthogonal": RandomFeatures(orthogonal_gaussian(for_features, 2 * width, width), normalized=True),
        "Hedgehog, untrained": HedgehogFeatures.identity(1, width),
    }
    learned: dict[str, HedgehogKind] = {"Hedgehog": "softmax", "Hedgehog, exp": "exp"}
    for name, kind in track(learned.items(), "distillation", console=console):
        maps[name] = distilled(config, for_training, kind, sample)
    approximations = {"softmax": exact} | {name: weights(features, query, key) for name, features in maps.items()}
    rows = [
        {
            "map": name,
            "features": maps[name].size(width) if name in maps else "–",
            "divergence": float(divergence(exact, p)),
            "entropy": float(entropy(p)),
            "rank correlation with q·k": float(analysis.rank_correlation(p, scores).mean()),
        }
        for name, p in approximations.items()
    ]
    shown = ("softmax", "Hedgehog", "Taylor, degree 2", "elu+1")
    pictures = {name: np.asarray(approximations[name][0, 0, :32, :32]).round(4).tolist() for name in shown}
    return rows, pictures


# Log-normal features


def concentration(config: Config, seed: jax.Array):
    """The variance of the log-weights of Gaussian queries and keys, by their standard deviation."""
    for_query, for_key = jax.random.split(seed)
    shape = (config.normal_length, 1, config.normal_dim)
    rows = []
    for std in config.normal_stds:
        query, key = (std * jax.random.normal(x, shape) for x in (for_query, for_key))
        matched = LogNormalFeatures(*moment_match(query.std(), key.std()), normalized=True)
        variance = {
            "softmax": softmax_weights(query, key),
            "matched": weights(matched, query, key),
            "unmatched": weights(LogNormalFeatures(1.0, 1.0, normalized=True), query, key),
        }
        rows.append({"deviation of q and k": f"{std:g}"} | {x: float(jnp.log(p).var()) for x, p in variance.items()})
    return rows


def run(config, seed, folder, console):
    keys = jax.random.split(jax.random.key(seed), 4)
    errors = against_features(config, keys[0], console)
    squares = variances(config, keys[1], console)
    mimics, pictures = mimicry(config, keys[2], console)
    concentrated = concentration(config, keys[3])

    independent, orthogonal = (errors[name] for name in ("positive", "positive orthogonal"))
    square = {name: dict(points) for name, points in squares.items()}
    by_map = {row["map"]: row for row in mimics}
    hedgehog, elu, softmax = (by_map[name] for name in ("Hedgehog", "elu+1", "softmax"))
    numbers = {f"slope, {name}": slope(errors[name]) for name in KINDS}
    numbers |= {
        "largest error of orthogonal over independent, positive": max(
            a / b for (_, a), (_, b) in zip(orthogonal, independent, strict=True)
        ),
        **{
            f"squared error over formula, {kind}": square[kind][-0.9] / float(formula(kind, -0.9, 16))
            for kind in ("positive", "hyperbolic", "trigonometric")
        },
        **{
            f"squared error of positive over trigonometric, cosine {name}": square["positive"][cosine]
            / square["trigonometric"][cosine]
            for name, cosine in (("−0.9", -0.9), ("0.9", 0.9))
        },
        "squared error of hyperbolic over positive, cosine −0.9": square["hyperbolic"][-0.9] / square["positive"][-0.9],
        "error of Taylor degree 3 over degree 1": errors["Taylor"][2][1] / errors["Taylor"][0][1],
        "divergence, Hedgehog over elu+1": hedgehog["divergence"] / elu["divergence"],
        "excess entropy, Hedgehog over elu+1": (hedgehog["entropy"] - softmax["entropy"])
        / (elu["entropy"] - softmax["entropy"]),
        "rank correlation with q·k, Hedgehog less elu+1": hedgehog["rank correlation with q·k"]
        - elu["rank correlation with q·k"],
        "log-variance, largest deviation of matched features": max(
            abs(row["matched"] / row["softmax"] - 1) for row in concentrated
        ),
        "log-variance, least ratio of softmax to unmatched features": min(
            row["softmax"] / row["unmatched"] for row in concentrated
        ),
    }
    return Result(
        numbers,
        {"Mimicry of softmax": mimics, "Variance of the log-weights": concentrated},
        {
            "Error of attention": Curves("features", "mean over rows of Σ |difference|", errors, log="xy"),
            "Squared error of one weight": Curves(
                "cosine of query and key", "relative squared error", squares, log="y"
            ),
            "Weights of held-out tokens": Maps(pictures, value="weight"),
        },
    )
