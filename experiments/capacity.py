"""What heads can represent: heads of low rank in place of one, head sizes, labels by heart, and a distributed memory.

The target of heads is the point of a set that is nearest to a query: one head of full rank has it, at any number of
points. Heads of rank 1 see one direction each. A head size limits the rank of scores, and so the weights that a head
can have. Labels are learned by least squares on what heads read. The weights of a sparse distributed memory are
compared with a softmax of cosines.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattn import attend
from jaxattn.claims import Claim, Curves, Result, at_least, at_most
from jaxattn.icl import capacity


@dataclass(frozen=True)
class Config:
    """Sizes of five measurements.

    Attributes:
        dims: Dimensions of points, in which heads of rank 1 are summed up.
        heads: Numbers of these heads.
        samples: Pairs of points by which a product with the target is measured.
        trained_dim: The dimension, and the number of points and of channels of all heads together, in training.
        steps: Training steps, of points and of weights.
        batch: Sets of points per step.
        keys: Keys whose weights are fitted.
        rows: Tables of such weights.
        context: Tokens of the context of which labels are learned.
        memorising: Heads that learn labels.
        bits: Bits of addresses.
        radius: The radius of the memory.
        patterns: Patterns in the memory.
        flips: Numbers of bits by which queries differ from a pattern.
    """

    dims: tuple[int, ...] = (2, 4, 8, 16)
    heads: tuple[int, ...] = (1, 4, 16, 64, 256)
    samples: int = 200_000
    trained_dim: int = 8
    steps: int = 12000
    batch: int = 256
    keys: int = 8
    rows: int = 16
    context: int = 10
    memorising: int = 4
    bits: int = 64
    radius: int = 11
    patterns: int = 200
    flips: tuple[int, ...] = (4, 10, 16)


QUICK = Config(
    dims=(2, 4), heads=(1, 4, 64), samples=2000, steps=30, batch=16, rows=2, context=4, memorising=2, patterns=50
)

CLAIMS = (
    Claim(
        "In the plane heads of rank 1 make up for rank by their number: 64 of them have at most a tenth of the error "
        "of none.",
        paper="rank_benefit",
        number="error of 64 random heads of rank 1, dimension 2",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "In more dimensions they do not: in 8, 64 of them have an error of a quarter or more.",
        paper="rank_benefit",
        number="error of 64 random heads of rank 1, dimension 8",
        confirmed=at_least(0.25),
        refuted=at_most(0.1),
    ),
    Claim(
        "Nor if they are trained: one head of rank 8 has at most a tenth of the error of 8 heads of rank 1.",
        paper="rank_benefit",
        number="trained, rank 8 over 8 heads of rank 1",
        confirmed=at_most(0.1),
        refuted=at_least(1.0),
    ),
    Claim(
        "A head size below the number of keys keeps a head from most weights: with 2 channels for 8 keys, the best fit "
        "of random weights is 0.05 nats away or more.",
        paper="low_rank_bottleneck",
        number="KL of the best fit, 2 channels",
        confirmed=at_least(0.05),
        refuted=at_most(0.001),
    ),
    Claim(
        "As many channels as keys are needed for all weights: with one less the best fit is 0.01 nats away or more.",
        paper="low_rank_bottleneck",
        number="KL of the best fit, 7 channels",
        confirmed=at_least(0.01),
        refuted=at_most(0.001),
    ),
    Claim(
        "Four heads that read one context of 10 tokens learn 37 random labels by heart: the error is rounding.",
        paper="mha_memorisation",
        number="error of labels, as many as can be learned",
        confirmed=at_most(1e-6),
        refuted=at_least(0.01),
    ),
    Claim(
        "And no more: with 16 labels more a tenth of the variance is left, or more.",
        paper="mha_memorisation",
        number="error of labels, 16 more",
        confirmed=at_least(0.1),
        refuted=at_most(1e-6),
    ),
    Claim(
        "The weights of a sparse distributed memory are those of a softmax of cosines: near a pattern, the total "
        "variation between both is at most 0.05.",
        paper="sdm_attention",
        number="total variation, 4 flips",
        confirmed=at_most(0.05),
        refuted=at_least(0.3),
    ),
)


def sphere(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Directions that are uniform on the sphere."""
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_heads(rng: np.random.Generator, dim: int, heads: tuple[int, ...], samples: int) -> list[float]:
    """The errors of the best sums of so many random heads of rank 1, of two points."""
    queries, keys = sphere(rng, 2, max(heads), dim)
    if dim > 2:
        points, target = sphere(rng, samples, 2, dim), sphere(rng, samples, dim)
        nearer = (points[:, 0] * target).sum(-1) >= (points[:, 1] * target).sum(-1)
        inner = (points[:, 0] * points[:, 1]).sum(-1)
        first = ((points[:, 0] - points[:, 1]) @ keys.T) * (target @ queries.T) >= 0
        measured = np.where(first == nearer[:, None], 1, inner[:, None]).mean(0)
    with jax.enable_x64(True):
        queries, keys = jnp.asarray(queries), jnp.asarray(keys)
        products = capacity.rank_one_product(queries[:, None], keys[:, None], queries, keys)
        targets = capacity.rank_one_target(queries, keys) if dim == 2 else jnp.asarray(measured)
        return [float(capacity.combination_error(products[:n, :n], targets[:n])) for n in heads]


def trained_heads(key: jax.Array, dim: int, heads: int, steps: int, batch: int) -> list[tuple[float, float]]:
    """(step, mean squared error) of softmax heads of rank dim / heads, which learn the nearest of dim points."""
    rank = dim // heads
    of_maps, of_data = jax.random.split(key)
    query, keys = jax.random.normal(of_maps, (2, heads, dim, rank)) / dim**0.5
    params = {"query": query, "key": keys, "out": jnp.broadcast_to(jnp.eye(dim) / heads, (heads, dim, dim))}
    schedule = optax.cosine_decay_schedule(0.01, steps)
    optimizer = optax.adam(schedule)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        of_points, of_targets = jax.random.split(key)
        points = jax.random.normal(of_points, (batch, dim, dim))
        target = jax.random.normal(of_targets, (batch, 1, dim))
        points, target = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (points, target))
        q = jnp.einsum("btd,hdr->bthr", target, params["query"])
        k = jnp.einsum("bnd,hdr->bnhr", points, params["key"])
        values = jnp.broadcast_to(points[:, :, None], (batch, dim, heads, dim))
        read = jnp.einsum("bthd,hde->be", attend(q, k, values), params["out"])
        nearest = jnp.take_along_axis(points, (points * target).sum(-1).argmax(1)[:, None, None], 1)[:, 0]
        return ((read - nearest) ** 2).sum(-1).mean()

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    _, values = run((params, optimizer.init(params)), jax.random.split(of_data, steps))
    window = max(steps // 30, 1)
    means = np.asarray(values)[: steps // window * window].reshape(-1, window).mean(1)
    return [((i + 1) * window, float(mean)) for i, mean in enumerate(means)]


@partial(jax.jit, static_argnames=("head_dim", "steps"))
def fitted(key: jax.Array, weights: jax.Array, *, head_dim: int, steps: int) -> jax.Array:
    """Factors [2, R, N, H] whose dot products have the softmax nearest to weights [R, N, N], by their KL divergence."""
    factors = jax.random.normal(key, (2, *weights.shape[:-1], head_dim)) * 0.5
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def loss(factors: jax.Array) -> jax.Array:
        log = jax.nn.log_softmax(factors[0] @ factors[1].swapaxes(-1, -2), -1)
        return (weights * (jnp.log(weights) - log)).sum(-1).mean(-1).sum()

    def step(carry: Any, _: None) -> tuple[Any, None]:
        factors, state = carry
        updates, state = optimizer.update(jax.grad(loss)(factors), state)
        return (optax.apply_updates(factors, updates), state), None

    (factors, _), _ = jax.lax.scan(step, (factors, optimizer.init(factors)), length=steps)
    return factors


def divergence(scores: jax.Array, factors: jax.Array) -> float:
    """The mean KL divergence of the softmax of scores [R, N, N] from that of dot products of factors, in float64."""
    with jax.enable_x64(True):
        scores, factors = (jnp.asarray(np.asarray(x, np.float64)) for x in (scores, factors))
        expected, log = (jax.nn.log_softmax(x, -1) for x in (scores, factors[0] @ factors[1].swapaxes(-1, -2)))
        return float((jnp.exp(expected) * (expected - log)).sum(-1).mean())


def labels(rng: np.random.Generator, heads: int, context: int, more: tuple[int, ...]) -> list[float]:
    """The share of the variance of random labels that least squares on what heads read leaves, in float64.

    There are as many labels as can be learned, and so many more.
    """
    most = capacity.memorised(heads, context)
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(rng.normal(size=(n, heads, 16))) for n in (most + max(more), context, context))
        read = np.asarray(attend(query, key, value)).reshape(len(query), -1)
    given = rng.normal(size=len(read))
    found = []
    for count in (most + n for n in more):
        solved = np.linalg.lstsq(read[:count], given[:count], rcond=1e-12)[0]
        found.append(float(((read[:count] @ solved - given[:count]) ** 2).sum() / (given[:count] ** 2).sum()))
    return found


def memory(rng: np.random.Generator, config: Config) -> tuple[float, float, list[dict[str, float]]]:
    """(slope of the log of weights over cosines, share of variance, by flips: total variation and right bits)."""
    log = capacity.log_overlap(config.bits, config.radius)
    cosine = 1 - 2 * np.arange(config.bits + 1) / config.bits
    there = log > -np.inf
    slope, offset = np.polyfit(cosine[there], log[there], 1)
    left = log[there] - slope * cosine[there] - offset
    patterns = rng.choice([-1, 1], (config.patterns, config.bits))
    rows = []
    for flips in config.flips:
        asked = patterns[: config.patterns // 2].copy()
        for each in asked:
            each[rng.choice(config.bits, flips, replace=False)] *= -1
        distance = (config.bits - asked @ patterns.T) // 2
        kinds = {"memory": np.exp(log[distance] - log.max()), "attention": np.exp(slope * (cosine[distance] - 1))}
        shares = {name: x / np.maximum(x.sum(-1, keepdims=True), 1e-300) for name, x in kinds.items()}
        right = {
            name: float((np.sign(share @ patterns) == patterns[: len(asked)]).mean()) for name, share in shares.items()
        }
        apart = abs(shares["memory"] - shares["attention"]).sum(-1).mean() / 2
        rows.append(
            {"flips": flips, "total variation": float(apart)} | {f"bits right, {n}": x for n, x in right.items()}
        )
    return float(slope), float(1 - left.var() / log[there].var()), rows


def run(config, seed, folder, console):
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    numbers: dict[str, float | None] = {}
    by_heads = {}
    for dim in config.dims:
        console.print(f"capacity: heads of rank 1 in dimension {dim}")
        errors = random_heads(rng, dim, config.heads, config.samples)
        by_heads[f"dimension {dim}"] = list(zip(config.heads, errors, strict=True))
    for dim in (2, 8):
        found = dict(by_heads.get(f"dimension {dim}", ())).get(64)
        numbers[f"error of 64 random heads of rank 1, dimension {dim}"] = found
    console.print("capacity: trained heads")
    size = config.trained_dim
    training = {
        name: trained_heads(key, size, heads, config.steps, config.batch)
        for name, heads in ((f"one head of rank {size}", 1), (f"{size} heads of rank 1", size))
    }
    last = [lines[-1][1] for lines in training.values()]
    numbers["trained, rank 8 over 8 heads of rank 1"] = last[0] / last[1] if size == 8 else None
    console.print("capacity: weights by head size")
    scores = jax.random.normal(jax.random.fold_in(key, 1), (config.rows, config.keys, config.keys))
    weights = jax.nn.softmax(scores, -1)
    fits = [
        (n, divergence(scores, fitted(jax.random.fold_in(key, n), weights, head_dim=n, steps=config.steps)))
        for n in range(1, config.keys + 1)
    ]
    numbers |= {f"KL of the best fit, {n} channels": dict(fits).get(n) for n in (2, 7)}
    more = (0, 1, 4, 8, 16)
    left = labels(rng, config.memorising, config.context, more)
    numbers["error of labels, as many as can be learned"], numbers["error of labels, 16 more"] = left[0], left[-1]
    slope, share, rows = memory(rng, config)
    numbers["slope of the log of overlaps over the cosine"], numbers["share of its variance"] = slope, share
    numbers["total variation, 4 flips"] = {row["flips"]: row["total variation"] for row in rows}.get(4)
    most = capacity.memorised(config.memorising, config.context)
    return Result(
        numbers,
        {
            "A memory of 64 bits" if config.bits == 64 else "A memory": rows,
            "Labels": [{"labels": most + n, "variance left": each} for n, each in zip(more, left, strict=True)],
        },
        {
            "Error by the number of heads of rank 1": Curves("heads", "error of the best sum", by_heads, log="xy"),
            "Training": Curves("step", "mean squared error", training, log="y"),
            "Weights by head size": Curves("channels", "KL divergence (nats)", {"best fit": fits}, log="y"),
        },
    )
