"""Which layers, heads and models attend alike: similarities and divergences of rows, and a map of what is near."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.numeric import ratio


def attention_similarity(weights: Float[Array, "layers b n t s"], *, skip: int = 1) -> Float[Array, "layers layers"]:
    """Returns the mean over batch, heads and queries of the cosine between the rows of two layers (EchoAtt, 2024).

        cos(A_l, A_m) = a_l · a_m / (|a_l| |a_m|),   a_l the row of a query in layer l

    Rows of weights are at least 0, so results are between 0 and 1. Rows that are empty in one of both layers are left
    out. Causal rows with few keys are alike in all layers, which is why the first ones are left out.

    Args:
        weights: [L, B, N, T, S], recorded attention weights.
        skip: The number of first queries that are left out, at least 0 and below T.

    Raises:
        ValueError: The weights have another number of axes, or `skip` is out of range.
    """
    if jnp.ndim(weights) != 5:
        raise ValueError(f"weights has shape {jnp.shape(weights)}: need [layers, batch, heads, queries, keys]")
    if not 0 <= skip < weights.shape[-2]:
        raise ValueError(f"skip is {skip}: need a number from 0 to {weights.shape[-2] - 1}, below that of queries")
    rows = weights[..., skip:, :]
    unit = ratio(rows, jnp.linalg.norm(rows, axis=-1, keepdims=True))
    there = (rows > 0).any(-1).astype(unit.dtype)

    def with_all(one: tuple[Array, Array]) -> Array:
        found = jnp.einsum("bnts,lbnts->l", one[0], unit, precision=jax.lax.Precision.HIGHEST)
        return ratio(found, jnp.einsum("bnt,lbnt->l", one[1], there))

    return jax.lax.map(with_all, (unit, there))


def similar_blocks(similarity: Any, *, size: int, count: int, edge: int = 1) -> list[tuple[int, ...]]:
    """Returns up to `count` disjoint blocks of adjacent layers with the largest sum of mean similarities.

    The similarity of a block is the mean over the pairs of its layers with its first layer, whose attention they would
    share. The first and the last layers of the model stay by themselves.

    Args:
        similarity: [L, L], as `attention_similarity` returns it.
        size: The layers of a block, at least 2.
        count: The most blocks.
        edge: The number of layers at either end that are in no block.

    Raises:
        ValueError: The similarity is not square, or a number is out of range.
    """
    table = np.asarray(similarity, np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise ValueError(f"similarity has shape {table.shape}: need [layers, layers]")
    for name, value, least in (("size", size, 2), ("count", count, 1), ("edge", edge, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    last = len(table) - edge  # of the layers that may be in a block, the one after
    # best[c][l]: the largest sum, and its blocks, of up to c blocks among the layers below l.
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] * (last + 1)]
    for _ in range(count):
        row = [best[0][0]] * (last + 1)
        for end in range(1, last + 1):
            row[end] = row[end - 1]
            first = end - size
            if first >= edge:
                total, starts = best[-1][first]
                total += table[first, first + 1 : end].mean()
                row[end] = max(row[end], (total, (*starts, first)), key=lambda each: each[0])
        best.append(row)
    return [tuple(range(first, first + size)) for first in best[-1][max(last, 0)][1]]


def js_divergence(p: Float[Array, "*#b s"], q: Float[Array, "*#b s"]) -> Float[Array, "*b"]:
    """Returns the Jensen-Shannon divergence of rows, in nats, from 0 to log 2:

        ½ Σ_j p_j log (p_j / m_j) + ½ Σ_j q_j log (q_j / m_j),   m = (p + q) / 2

    Rows are divided by their sums first. A row without weight is no distribution: NaN.

    Args:
        p: [..., S], at least 0.
        q: [..., S], likewise; leading axes broadcast.
    """
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    middle = (p + q) / 2

    def to_middle(x: Array) -> Array:
        some = ~(x <= 0)  # NaN stays NaN
        return jnp.where(some, x * jnp.log(jnp.where(some, x, 1) / jnp.where(some, middle, 1)), 0).sum(-1)

    return jnp.maximum((to_middle(p) + to_middle(q)) / 2, 0)  # rounding may be below 0


def head_distances(weights: Float[Array, "layers b n t s"]) -> Float[Array, "heads heads"]:
    """Returns the mean `js_divergence` between the rows of every two heads, of all texts (Clark et al., 2019).

    Heads are numbered layer by layer, so that head n of layer l is row l N + n. Rows that are empty in one of both
    heads are left out; two heads without a common row are NaN. The paper adds up over tokens where this is a mean, and
    mixes 0.001 of uniform attention into the rows, which the divergence does not need to be finite.

    Args:
        weights: [L, B, N, T, S], recorded attention weights.

    Raises:
        ValueError: The weights have another number of axes.
    """
    if jnp.ndim(weights) != 5:
        raise ValueError(f"weights has shape {jnp.shape(weights)}: need [layers, batch, heads, queries, keys]")
    rows = jnp.moveaxis(jnp.asarray(weights), 2, 1).reshape(-1, *weights.shape[1:2], *weights.shape[3:])
    there = ~(rows.sum(-1) <= 0)

    def with_all(one: tuple[Array, Array]) -> Array:
        both = one[1] & there
        apart = jnp.where(both, js_divergence(one[0], rows), 0).sum((1, 2))
        return apart / both.sum((1, 2))

    return jax.lax.map(with_all, (rows, there))


def depth_divergence(
    ours: Float[Array, "layers n t s"], theirs: Float[Array, "others m t s"], parts: int = 4
) -> Float[Array, " parts"]:
    """Returns how differently two models attend to the same text in each part of their depth (Gao et al., 2023).

    Weights are averaged over heads, and over the layers of each quarter of the depth, so that models of different
    numbers of layers and heads can be compared. The figure is the mean of `js_divergence` over the rows that have
    weight in both. Hold it against the divergence of two versions of one model.

    Args:
        ours: [L, N, T, S], the weights of one model.
        theirs: [M, K, T, S], those of the other.
        parts: How many parts the depth has, at least 1 and at most the number of layers of either.

    Raises:
        ValueError: The texts differ in length, or `parts` is out of range.
    """
    least = min(len(ours), len(theirs))
    if not 1 <= parts <= least:
        raise ValueError(f"parts is {parts}: need 1 to {least}, the number of layers")
    if ours.shape[-2:] != theirs.shape[-2:]:
        raise ValueError(f"ours is of {ours.shape[-2:]} tokens and theirs of {theirs.shape[-2:]}: need the same text")

    def means(weights: Any) -> Array:
        by_layer = jnp.asarray(weights).mean(1)
        ends = [len(by_layer) * part // parts for part in range(parts + 1)]
        return jnp.stack([by_layer[a:b].mean(0) for a, b in itertools.pairwise(ends)])

    ours, theirs = means(ours), means(theirs)
    both = ~(ours.sum(-1) <= 0) & ~(theirs.sum(-1) <= 0)
    return jnp.where(both, js_divergence(ours, theirs), 0).sum(-1) / both.sum(-1)


def classical_mds(distances: Float[np.ndarray, "n n"], dimensions: int = 2) -> Float[np.ndarray, "n k"]:
    """Returns points whose distances are near the given ones: multidimensional scaling in closed form.

        X = V Λ^½,   V Λ Vᵀ the leading eigenpairs of −½ J D² J,   J = I − 1/n

    Distances of points in `dimensions` dimensions come back exactly. Points are centred, each axis is turned so that
    its largest coordinate is positive, and axes that have nothing left are 0. Clark et al. (2019) use the metric kind,
    which lowers a sum of squared errors of distances step by step.

    Args:
        distances: [n, n], symmetric.
        dimensions: k, from 1 to n.

    Raises:
        ValueError: The distances are not square or not finite, or `dimensions` is out of range.
    """
    table = np.asarray(distances, np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not np.isfinite(table).all():
        raise ValueError(f"distances has shape {table.shape}: need a square of finite numbers")
    if not 1 <= dimensions <= len(table):
        raise ValueError(f"dimensions is {dimensions}: need 1 to {len(table)}")
    squares = (table**2 + table.T**2) / 2
    centred = squares - squares.mean(0) - squares.mean(1)[:, None] + squares.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    order = np.argsort(values)[::-1][:dimensions]
    points = vectors[:, order] * np.sqrt(np.maximum(values[order], 0))
    largest = points[abs(points).argmax(0), np.arange(dimensions)]
    return points * np.where(largest < 0, -1, 1)
