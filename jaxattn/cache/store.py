"""The plain cache: one slot per position, static shapes, a pytree.

It has no length field. Which slots hold a token is said by `positions` (−1 is empty), and masks read positions, so
ragged batches, padding and per-sequence stopping need nothing more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.parts import part


@part
class Cache:
    """Keys and values of the tokens so far, in slots 0..C−1, and the position of each slot's token (−1: empty).

    span: how many positions it is for, where that is more than its slots: a ring.
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
    """Writes each token to the slot of its position. Tokens at position −1, or beyond the capacity, are not written.

    pinned: the first slots keep the positions below it, and the others are a ring, in which a token takes the place of
    the one as many positions before it; None for no ring.

    Positions are data, so one beyond the capacity cannot raise here: callers check lengths before they compile. More
    tokens than the capacity are a ValueError, without a ring.
    """
    capacity = cache.positions.shape[1]
    if pinned is None and positions.shape[1] > capacity:
        raise ValueError(f"key has {positions.shape[1]} tokens but the cache has capacity {capacity}")
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


def by_position(
    x: Float[Array, "b n t c"], positions: Int[Array, "b c"], span: int, fill: float
) -> Float[Array, "b n t p"]:
    """What is one number per slot, at the slots' positions instead; `fill` at positions that no slot holds."""

    def of_row(x: Float[Array, "n t c"], positions: Int[Array, " c"]) -> Float[Array, "n t p"]:
        places = jnp.where(positions < 0, span, positions)
        return jnp.full((*x.shape[:-1], span), fill, x.dtype).at[..., places].set(x, mode="drop")

    return jax.vmap(of_row)(x, positions)
