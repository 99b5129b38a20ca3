"""A line in which queries wait before they attend, so that they also see tokens behind them (Attendre)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxattn.core.checks import check_static_int


class Waiting(NamedTuple):
    """What waits, the oldest first.

    Attributes:
        x: [B, C, ...].
        positions: [B, C], where it stands in the text; −1 where nothing waits yet.
    """

    x: Array
    positions: Int[Array, "b c"]


def waiting(batch: int, capacity: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Waiting:
    """Makes a line in which nothing waits.

    Args:
        batch: B.
        capacity: C, the number of tokens that each one waits for, at least 0.
        shape: The shape of what waits of a token, such as (heads, channels) of queries.
        dtype: Its dtype.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is out of range.
    """
    check_static_int("waiting", "batch", batch, 1)
    check_static_int("waiting", "capacity", capacity, 0)
    return Waiting(jnp.zeros((batch, capacity, *shape), dtype), jnp.full((batch, capacity), -1, jnp.int32))


def delay_line(line: Waiting, x: Array, positions: Int[Array, "#b t"]) -> tuple[Waiting, Array, Int[Array, "b t"]]:
    """Puts T tokens at the end of the line, and takes as many from its front (Attendre, Yang & Hua, 2024).

        line, late, places = delay_line(line, query, positions)

    If queries wait for C tokens and keys do not, query i attends when the keys up to i + C are there. In a store of the
    last S keys it sees i + C − S < j ≤ i + C: a window with two sides, though tokens come one by one. Tokens that came
    first have left when C more have been put in, which may be empty ones, at position −1. Their results come late, in
    the order of the text, so that a residual stream has to wait as they do.

    Args:
        line: The line before, from `waiting` or an earlier call.
        x: [B, T, ...], what comes.
        positions: [1 or B, T], where it stands.

    Returns:
        A triple: the line, and what leaves it, x [B, T, ...] and positions [B, T]. Before anything leaves, positions
        are −1, at which `attend` reads nothing.

    Raises:
        ValueError: The shapes do not fit the line.
    """
    if x.shape[:1] + x.shape[2:] != line.x.shape[:1] + line.x.shape[2:]:
        raise ValueError(f"x has shape {x.shape} but what waits has {line.x.shape}: need the same but for axis 1")
    count = x.shape[1]
    places = jnp.broadcast_to(jnp.asarray(positions, jnp.int32), x.shape[:2])
    x, places = (jnp.concatenate(pair, 1) for pair in ((line.x, x.astype(line.x.dtype)), (line.positions, places)))
    return Waiting(x[:, count:], places[:, count:]), x[:, :count], places[:, :count]
