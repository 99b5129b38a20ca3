"""Which layers attend alike: the similarity of their attention, and blocks of layers that could share it."""

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
