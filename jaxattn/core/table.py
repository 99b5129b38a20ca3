"""Tables over positions, looked up a tile at a time."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num


def on_shared_axis(size: int, positions: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
    """Returns the positions along an axis of a table. An axis of size 1 is shared by all: 0, or −1 if all are empty."""
    return jnp.minimum(positions, 0).max(axis, keepdims=True) if size == 1 else positions


def take_pairs(table: Array, query: Int[Array, "..."], key: Int[Array, "..."], grid: int, fill: Any) -> Array:
    """Looks pairs up in a table: out[..., n, g] = table[..., n, query, key], `fill` outside it [..., 1 or N, P, R]."""
    rows, columns = table.shape[-2:]
    inside = (query >= 0) & (query < rows) & (key >= 0) & (key < columns)
    index = jnp.where(inside, query * columns + key, -1)
    return take(jnp.reshape(table, (*table.shape[:-2], rows * columns)), index, grid, fill)


def take(table: Num[Array, "*b n p"] | Bool[Array, "*b n p"], index: Int[Array, "..."], grid: int, fill: Any) -> Array:
    """Looks positions up in a table: out[..., n, g] = table[..., n, index[..., n, g]], `fill` outside the table.

    Args:
        table: [..., N, P].
        index: [..., 1 or N, *g], where g are its last `grid` axes. Batch and head axes broadcast against the table's.
        grid: The number of axes g.
        fill: The value outside the table.
    """
    shape = index.shape[len(index.shape) - grid :]
    flat = index.reshape(*index.shape[: index.ndim - grid], -1)
    rank = max(table.ndim, flat.ndim)
    table, flat = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (table, flat))
    inside = (flat >= 0) & (flat < table.shape[-1])
    found = jnp.take_along_axis(table, jnp.where(inside, flat, 0), axis=-1)
    found = jnp.where(inside, found, jnp.asarray(fill, found.dtype))
    return found.reshape(*found.shape[:-1], *shape)
