"""The plain cache: one slot per position, static shapes, a pytree.

It has no length field. Which slots hold a token is said by `positions` (−1 is empty), and masks read positions, so
ragged batches, padding and per-sequence stopping need nothing more.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.mask import Mask
from jaxattn.core.part import part


@part
class Cache:
    """Keys and values of the tokens so far, in slots 0..C−1, and the position of each slot's token (−1: empty).

    span: how many positions it is for, if it is a ring that keeps all that a mask can show, and so goes on beyond them;
    None: one slot for each position, and no room for others.
    """

    key: Float[Array, "b c k h"]
    value: Float[Array, "b c kv v"]
    positions: Int[Array, "b c"]
    span: int | None = None


def empty(
    batch: int,
    capacity: int,
    key_shape: tuple[int, int],
    value_shape: tuple[int, int],
    dtype,
    span: int | None = None,
) -> Cache:
    """A cache with `capacity` slots; the shapes are (heads, head dim). Raises ValueError for a size below 1."""
    if min(batch, capacity) < 1:
        raise ValueError(f"batch and capacity must be at least 1, got {batch} and {capacity}")
    return Cache(
        jnp.zeros((batch, capacity, *key_shape), dtype),
        jnp.zeros((batch, capacity, *value_shape), dtype),
        jnp.full((batch, capacity), -1, jnp.int32),
        span,
    )


def append(
    cache: Cache,
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t kv v"],
    positions: Int[Array, "b t"],
    pinned: int | None = None,
) -> Cache:
    """Writes each token to the slot of its position. Tokens at position −1 are not written.

    pinned: the first slots keep the positions below it, and the others are a ring, in which a token takes the place of
    the one as many positions before it; None for no ring.

    Without a ring a position beyond the capacity has no slot: where positions are known that is a ValueError, as are
    more tokens than the capacity. Elsewhere such a token is not written, so that what is read for it, or for any other
    that sees it, is wrong: `unseen` says for which, and attention makes them NaN.
    """
    capacity = cache.positions.shape[1]
    if pinned is None and positions.shape[1] > capacity:
        raise ValueError(f"key has {positions.shape[1]} tokens but the cache has capacity {capacity}")
    if pinned is None:
        check_room(cache, positions)
    rows = jnp.arange(positions.shape[0])[:, None]
    slots = positions
    if pinned is not None:
        ring = capacity - pinned
        slots = jnp.where(positions < pinned, positions, pinned + (positions - pinned) % ring)
        passed = (positions >= pinned) & (positions <= positions.max(-1, keepdims=True) - ring)
        slots = jnp.where(passed, -1, slots)
    slots = jnp.where(slots < 0, capacity, slots)  # out of range: dropped
    return Cache(
        cache.key.at[rows, slots].set(key.astype(cache.key.dtype), mode="drop"),
        cache.value.at[rows, slots].set(value.astype(cache.value.dtype), mode="drop"),
        cache.positions.at[rows, slots].set(positions.astype(jnp.int32), mode="drop"),
        cache.span,
    )


def check_room(state: Any, positions: Int[Array, "#b t"]) -> None:
    """Raises ValueError if the state of attention, or one of a tuple of them, has no slot for one of the positions.

    Positions that are traced, rings, and states of other mixers are not looked at.
    """
    if isinstance(state, tuple) and not isinstance(state, Cache):
        for each in state:
            check_room(each, positions)
    if not isinstance(state, Cache) or state.span is not None or isinstance(positions, jax.core.Tracer):
        return
    last = int(np.max(np.asarray(positions), initial=-1))
    if last >= state.positions.shape[-1]:
        raise ValueError(
            f"positions reaches {last} but the state has capacity {state.positions.shape[-1]}: need at most "
            f"{state.positions.shape[-1] - 1}, or a state for more tokens"
        )


def unseen(cache: Cache, positions: Int[Array, "b t"], mask: Mask | None) -> Bool[Array, "b t"]:
    """Which of these tokens may see one of them for which the cache has no slot, itself included: in a row that is not
    a ring, one at a position beyond the capacity. Of masks that do not bound what they show, all tokens of the row."""
    lost = positions >= cache.positions.shape[1]
    if cache.span is not None:
        return jnp.zeros(positions.shape, bool)
    possible: Any = True
    if mask is not None:
        of_lost = jnp.where(lost, positions, -1)
        possible, _ = mask.bounds(positions[:, None, :, None, None], of_lost[:, None, None, None, :])
    possible = jnp.broadcast_to(
        possible, np.broadcast_shapes(np.shape(possible), (len(positions), 1, *positions.shape[1:], 1))
    )
    return lost | (lost.any(-1, keepdims=True) & possible.any((1, 3)))


def by_position(
    x: Float[Array, "b n t c"], positions: Int[Array, "b c"], span: int, fill: float
) -> Float[Array, "b n t p"]:
    """What is one number per slot, at the slots' positions instead; `fill` at positions that no slot holds. A row that
    holds a position beyond the span is NaN."""

    def of_row(x: Float[Array, "n t c"], positions: Int[Array, " c"]) -> Float[Array, "n t p"]:
        places = jnp.where(positions < 0, span, positions)
        placed = jnp.full((*x.shape[:-1], span), fill, x.dtype).at[..., places].set(x, mode="drop")
        return jnp.where((positions >= span).any(), jnp.nan, placed)

    return jax.vmap(of_row)(x, positions)
