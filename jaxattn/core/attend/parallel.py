"""Parallel context: pieces that are read apart at the same places, and a question that reads all of them."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxattn.core.attend.maps import Map, kept_weights
from jaxattn.core.attend.mask import Mask, every_slot, tile_range
from jaxattn.core.checks import check_entries, check_static_int, count_ids
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.core.table import take

SHARED: int = -1
"""The piece of a token that all later tokens see, as those of a prefix that all pieces have."""

READER: int = -2
"""The piece of a token that sees all tokens before it, as those of a question."""


@part
class Pieces(Mask):
    """Shows keys of the same piece, and shared ones; readers see every key (parallel context encoding, 2025).

    `Causal() & Pieces(ids)` is the attention of pieces that are encoded apart, each behind a prefix that they share,
    and of a question behind them. With one piece it is `Causal()`.

    Attributes:
        ids: Integers [..., P], by position: the number of the piece from 0, `SHARED` or `READER`. Positions outside the
            table are readers.
    """

    ids: Int[Array, "*batch positions"]

    def _of(self, query, key, grid):
        """Returns numbers from 0 on: readers have 0, and shared tokens 1."""
        ids = jnp.asarray(self.ids)[..., None, :]
        check_entries("Pieces", "ids", ids, query, key)
        return tuple(take(ids, at, grid, fill=READER) - READER for at in (query, key))

    def __call__(self, query, key):
        of_query, of_key = self._of(query, key, grid=2)
        return (of_query == 0) | (of_key == SHARED - READER) | (of_query == of_key)

    def bounds(self, query, key):
        of_query, of_key = self._of(query, key, grid=3)
        reads, shared = of_query == 0, of_key == SHARED - READER
        (first, last), (first_key, last_key) = tile_range(of_query, query >= 0), tile_range(of_key, key >= 0)
        possible = reads.any(-1) | shared.any(-1) | ((first <= last_key) & (first_key <= last))
        same = (first == last) & (first_key == last_key) & (first == first_key)
        return possible, every_slot(query, reads) | every_slot(key, shared) | same

    def describe(self):
        return "the same piece, and shared keys; readers see all"


def piece_places(ids: Int[Array, "*b p"]) -> Int[Array, "*b p"]:
    """Returns where tokens stand if each piece begins behind the shared prefix, and readers behind the longest piece.

    They are places for rotary positions. Masks keep the positions in the row, which tell the pieces apart.

    Args:
        ids: [..., P], as of `Pieces`.
    """
    ids = jnp.asarray(ids)
    count = ids.shape[-1]
    order = jnp.argsort(ids, axis=-1, stable=True)
    in_order = jnp.take_along_axis(ids, order, -1)
    begins = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), in_order[..., 1:] != in_order[..., :-1]], -1)
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(count), 0), axis=ids.ndim - 1)
    rank = jnp.take_along_axis(jnp.arange(count) - start, jnp.argsort(order, axis=-1), -1)  # within the piece
    prefix = (ids == SHARED).sum(-1, keepdims=True)
    longest = jnp.where(ids >= 0, rank + 1, 0).max(-1, keepdims=True)
    place = rank + jnp.where(ids == SHARED, 0, prefix) + jnp.where(ids == READER, longest, 0)
    return place.astype(jnp.int32)


@part
class KeepGroups(Map):
    """Keeps in each row the weights of the `keep` groups with the largest scores, and scales them to the row's total.

    The score of a group is the sum of its `top` largest weights in the row (ties: the first group). Keys of no group
    are always kept. After softmax the map equals hiding the other groups. It repairs attention to many pieces, whose
    entropy is too high (parallel context encoding, 2025).

    Attributes:
        groups: Integers [..., P], by key position, of ids 0 .. size − 1. Keys with another id, or outside the table,
            are of no group.
        keep: The number of groups to keep, at least 1; 2 in the paper.
        top: The number of weights that count, at least 1; 0 for the mean over the visible keys of the group.
        size: The number of groups, by default one more than the largest id. Under `jit`, where ids are not known, give
            it.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range, or `groups` is traced and `size` is not given.
    """

    groups: Int[Array, "*batch positions"]
    keep: int = 2
    top: int = 5
    size: int | None = None

    heads_apart: ClassVar[bool] = True

    def __post_init__(self):
        check_static_int("KeepGroups", "keep", self.keep, 1)
        check_static_int("KeepGroups", "top", self.top, 0)
        object.__setattr__(self, "size", count_ids("KeepGroups", self.groups, self.size))

    def __call__(self, x, tile):
        groups = jnp.asarray(self.groups)[..., None, :]
        check_entries("KeepGroups", "groups", groups, tile.key)
        ids = take(groups, tile.key, 2, fill=-1)  # [..., 1 or N, 1, S]
        shown, size = tile.shown(x.shape), self.size or 1

        def score(group: Array) -> Array:
            """Returns the score of a group in each row, −1 where the row sees none of its keys."""
            member = (ids == group) & shown
            if self.top == 0:
                found = ratio(jnp.where(member, x, 0).sum(-1), member.sum(-1).astype(x.dtype))
            else:
                found = jax.lax.top_k(jnp.where(member, x, 0), min(self.top, x.shape[-1]))[0].sum(-1)
            return jnp.where(member.any(-1), found, -1)

        scores = jnp.moveaxis(jax.lax.map(score, jnp.arange(size)), 0, -1)  # [..., N, T, size]
        best = jax.lax.top_k(jax.lax.stop_gradient(scores), min(self.keep, size))[1]
        kept = jnp.zeros(scores.shape, bool)
        kept = jnp.put_along_axis(kept, best, True, axis=-1, inplace=False)
        of_key = jnp.broadcast_to(jnp.clip(ids, 0, size - 1), x.shape)
        grouped = (ids >= 0) & (ids < size)
        return kept_weights(x, ~grouped | jnp.take_along_axis(kept, of_key, -1))
