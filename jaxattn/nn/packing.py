"""Packed rows laid out anew, where documents need slots of their own: whole blocks, or room for a prefix."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

Carry = TypeVar("Carry")


class Layout(NamedTuple):
    """The place of the tokens of a row [T] in a longer row [S].

    Attributes:
        place: The slot of each token, S for one that has none.
        ids: The document of each slot, counted from 1 in the row.
        within: The slot's place in its document, from 0.
        filled: Whether a token or a prefix stands in the slot.
        lost: Whether the row holds more documents than there is room for.
    """

    place: Int[Array, "b t"]
    ids: Int[Array, "b s"]
    within: Int[Array, "b s"]
    filled: Bool[Array, "b s"]
    lost: Bool[Array, " b"]

    def put(self, x: Float[Array, "b t ..."]) -> Float[Array, "b s ..."]:
        """Returns x in its slots, zeros in the others."""
        return scatter(x, self.place, self.ids.shape[1])

    def take(self, x: Float[Array, "b s ..."]) -> Float[Array, "b t ..."]:
        """Returns x of each token's slot. Rows that lost a document are NaN."""
        place = jnp.minimum(self.place, x.shape[1] - 1).reshape(*self.place.shape, *(1,) * (x.ndim - 2))
        lost = self.lost.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(lost, jnp.nan, jnp.take_along_axis(x, place, 1))


def layout(
    seen: Bool[Array, "b t"], segments: Int[Array, "b t"], *, documents: int, prefix: int = 0, align: int = 1
) -> Layout:
    """Lays out every document from a multiple of `align` slots on, behind `prefix` slots of its own.

    Args:
        seen: [B, T], which tokens are there; tokens that are not seen get no slot.
        segments: [B, T], the document of each token; the numbers do not decrease.
        documents: The number of documents a row has room for. Shorter documents may be more, as long as they still fit.
        prefix: The number of slots before every document.
        align: The size of the blocks; every document begins one.
    """
    length = seen.shape[1]
    start = seen & (segments != earlier(jax.lax.cummax(jnp.where(seen, segments, -1), axis=1), 1, -1))
    index = jnp.cumsum(seen, -1) - 1
    within = prefix + index - jax.lax.cummax(jnp.where(start, index, 0), axis=1)
    opens = jnp.where(start, 1 + prefix // align, within % align == 0) * seen
    slots = align * (-(-length // align) + documents * (-(-prefix // align) + (align > 1)))
    place = (jnp.cumsum(opens, -1) - 1) * align + within % align
    has = seen & (place < slots)
    begins = scatter(start, jnp.where(start & has, place - within, slots), slots)
    slot = jnp.arange(slots)
    ids, inside = jnp.cumsum(begins, -1), slot - jax.lax.cummax(jnp.where(begins, slot, 0), axis=1)
    place = jnp.where(has, place, slots)
    filled = scatter(seen, place, slots) | ((ids > 0) & (inside < prefix))
    return Layout(place, ids, inside, filled, (seen & ~has).any(-1))


def scan_segments(
    step: Callable[[Carry, Array, Array], tuple[Carry, Array]],
    start: Carry,
    x: Float[Array, "b t d"],
    seen: Bool[Array, "b t"],
    segments: Int[Array, "b t"] | None,
    *,
    size: int,
    documents: int,
    bptt: int | None = None,
) -> Float[Array, "b t d"]:
    """Returns y of (carry, y_s) = step(carry, x_s [B, size, D], filled_s [B, size]), segment by segment.

    Every document begins a segment, from `start`. A segment is computed again in the backward pass.

    Args:
        step: The function of one segment.
        start: The carry before a document.
        x: [B, T, D].
        seen: [B, T], which tokens are there.
        segments: [B, T], the document of each token; None where nothing is packed.
        size: The number of tokens of a segment.
        documents: The number of documents a row has room for, as in `layout`.
        bptt: The number of segments that gradients go back through the carry; None for no limit.
    """
    batch = x.shape[0]
    ids = jnp.zeros(seen.shape, jnp.int32) if segments is None else in_order(segments)
    rows = layout(seen, ids, documents=0 if segments is None else documents, align=size)

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    def one(carry: Carry, given: tuple[Array, ...]) -> tuple[Carry, Array]:
        number, x, filled, opens = given
        if bptt is not None:
            held = jax.tree.map(jax.lax.stop_gradient, carry)
            carry = jax.tree.map(lambda a, b: jnp.where(number % bptt == 0, a, b), held, carry)
        return step(where_row(opens, start, carry), x, filled)

    opens = cut((rows.within == 0) & (rows.ids > 0))[:, :, 0]
    given = jnp.arange(len(opens)), cut(rows.put(x)), cut(rows.filled), opens
    _, y = jax.lax.scan(jax.checkpoint(one), start, given)
    return rows.take(jnp.moveaxis(y, 0, 1).reshape(batch, -1, y.shape[-1]))


def where_row(condition: Bool[Array, " b"], a: Any, b: Any) -> Any:
    """Returns a in the rows of the batch where the condition holds, b in the others."""
    return jax.tree.map(lambda x, y: jnp.where(condition.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b)


def in_order(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns segments numbered in their order, whatever their ids; padding (−1) goes with the segment before it."""
    return jnp.cumsum((segments != earlier(segments, 1, -1)) & (segments >= 0), -1)


def earlier(x: Int[Array, "b t"], lag: int, fill: int) -> Int[Array, "b t"]:
    """Returns x as it was `lag` tokens ago, with `fill` before the first."""
    return jnp.pad(x, ((0, 0), (lag, 0)), constant_values=fill)[:, : x.shape[1]]


def scatter(
    x: Shaped[Array, "b t ..."], place: Int[Array, "b t"], slots: int, fill: int = 0
) -> Shaped[Array, "b s ..."]:
    """Returns x in rows of `slots` slots, each token at its place, or nowhere for a place after the last.

    Slots without a token hold `fill`.
    """
    rows = jnp.arange(x.shape[0])[:, None]
    empty = jnp.full((x.shape[0], slots, *x.shape[2:]), fill, x.dtype)
    return empty.at[rows, place].set(x, mode="drop")
