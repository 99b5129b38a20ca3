"""Packed rows laid out anew, where documents need slots of their own: whole blocks, or room for a prefix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Layout(NamedTuple):
    """Where the tokens of a row [T] stand in a longer row [S].

    place: the slot of each token, S for one that has none. ids: the document of each slot, counted from 1 in the row.
    within: the slot's place in its document, from 0. filled: whether a token or a prefix stands there. lost: whether
    the row holds more documents than there is room for.
    """

    place: Int[Array, "b t"]
    ids: Int[Array, "b s"]
    within: Int[Array, "b s"]
    filled: Bool[Array, "b s"]
    lost: Bool[Array, " b"]

    def put(self, x: Float[Array, "b t ..."]) -> Float[Array, "b s ..."]:
        """x in its slots, zeros in the others."""
        return _scatter(x, self.place, self.ids.shape[1])

    def take(self, x: Float[Array, "b s ..."]) -> Float[Array, "b t ..."]:
        """x of each token's slot. Rows that lost a document are NaN."""
        place = jnp.minimum(self.place, x.shape[1] - 1).reshape(*self.place.shape, *(1,) * (x.ndim - 2))
        lost = self.lost.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(lost, jnp.nan, jnp.take_along_axis(x, place, 1))


def layout(
    seen: Bool[Array, "b t"], segments: Int[Array, "b t"], *, documents: int, prefix: int = 0, align: int = 1
) -> Layout:
    """Every document from a multiple of `align` slots on, behind `prefix` slots of its own.

    segments do not decrease; tokens that are not seen get no slot. There is room for `documents` documents a row, or so
    many short ones that they still fit.
    """
    length = seen.shape[1]
    start = seen & (segments != earlier(jax.lax.cummax(jnp.where(seen, segments, -1), axis=1), 1, -1))
    index = jnp.cumsum(seen, -1) - 1
    within = prefix + index - jax.lax.cummax(jnp.where(start, index, 0), axis=1)
    opens = jnp.where(start, 1 + prefix // align, within % align == 0) * seen
    slots = align * (-(-length // align) + documents * (-(-prefix // align) + (align > 1)))
    place = (jnp.cumsum(opens, -1) - 1) * align + within % align
    has = seen & (place < slots)
    begins = _scatter(start, jnp.where(start & has, place - within, slots), slots)
    slot = jnp.arange(slots)
    ids, inside = jnp.cumsum(begins, -1), slot - jax.lax.cummax(jnp.where(begins, slot, 0), axis=1)
    place = jnp.where(has, place, slots)
    filled = _scatter(seen, place, slots) | ((ids > 0) & (inside < prefix))
    return Layout(place, ids, inside, filled, (seen & ~has).any(-1))


def in_order(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Segments numbered in their order, whatever their ids were; padding (−1) goes with the segment before it."""
    return jnp.cumsum((segments != earlier(segments, 1, -1)) & (segments >= 0), -1)


def earlier(x: Int[Array, "b t"], lag: int, fill: int) -> Int[Array, "b t"]:
    """x as it was `lag` tokens ago."""
    return jnp.pad(x, ((0, 0), (lag, 0)), constant_values=fill)[:, : x.shape[1]]


def _scatter(x: Array, place: Int[Array, "b t"], slots: int) -> Array:
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros((x.shape[0], slots, *x.shape[2:]), x.dtype).at[rows, place].set(x, mode="drop")
