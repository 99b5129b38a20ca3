"""Masks: which keys a query may see, as boolean functions of positions that compose with `&`, `|` and `~`.

A mask is called on the positions of a tile, `mask(query [..., 1, T, 1], key [..., 1, 1, S])`, and returns booleans that
broadcast to [..., N, T, S]. Position −1 marks an empty slot; the core hides those, masks need not. Because masks
read positions and never offsets, one mask serves training, padding, packed documents, caches and permuted tokens.

`bounds` says what is known of whole tiles, so that empty ones are skipped and full ones are not masked. It gets the
positions cut into tiles, `query [..., 1, QB, 1, bq]` and `key [..., 1, 1, KB, bk]`, and returns (possible, certain):
False in `possible` promises that the tile hides every pair of slots, True in `certain` that it shows every pair of
non-empty slots. It is evaluated with NumPy when positions and mask are static, with JAX otherwise.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxattn.core.parts import check_static_int, part, take, take_pairs

Bounds = tuple[Any, Any]


def tile_range(positions: Any, valid: Any = None) -> tuple[Any, Any]:
    """The least and the greatest non-negative value of each tile (last axis); (2³¹−1, −1) if it has none."""
    xp = np if isinstance(positions, np.ndarray) else jnp
    valid = positions >= 0 if valid is None else valid
    largest = np.iinfo(np.int32).max
    return xp.where(valid, positions, largest).min(-1), xp.where(valid, positions, -1).max(-1)


class Mask(abc.ABC):
    """What a part must offer to stand in the mask slot. A new mask needs `__call__`; `bounds` makes it fast."""

    @abc.abstractmethod
    def __call__(self, query: Int[Array, "*b 1 t 1"], key: Int[Array, "*b 1 1 s"]) -> Bool[Array, "*b n t s"]:
        """True where the query may see the key."""

    def bounds(self, query: Int[Array, "*b 1 qb 1 bq"], key: Int[Array, "*b 1 1 kb bk"]) -> Bounds:
        """(possible, certain) per tile, [..., 1 or N, QB, KB]; by default nothing is known and nothing is skipped."""
        return np.True_, np.False_

    def __and__(self, other: "Mask") -> "And":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Or":
        return Or(self, other)

    def __invert__(self) -> "Not":
        return Not(self)


def visible(mask: Mask | None, query: Int[Array, "*b 1 t 1"], key: Int[Array, "*b 1 1 s"]) -> Bool[Array, "#*b #n t s"]:
    """The mask (None shows all) with the empty slots hidden."""
    shown = (query >= 0) & (key >= 0)
    return shown if mask is None else shown & mask(query, key)


@part
class And(Mask):
    """Visible to both masks; what `a & b` makes."""

    first: Mask
    second: Mask

    def __call__(self, query, key):
        return self.first(query, key) & self.second(query, key)

    def bounds(self, query, key):
        (possible, certain), (possible2, certain2) = self.first.bounds(query, key), self.second.bounds(query, key)
        return possible & possible2, certain & certain2


@part
class Or(Mask):
    """Visible to either mask; what `a | b` makes."""

    first: Mask
    second: Mask

    def __call__(self, query, key):
        return self.first(query, key) | self.second(query, key)

    def bounds(self, query, key):
        (possible, certain), (possible2, certain2) = self.first.bounds(query, key), self.second.bounds(query, key)
        return possible | possible2, certain | certain2


@part
class Not(Mask):
    """Visible where the mask hides; what `~a` makes. Empty slots stay hidden."""

    mask: Mask

    def __call__(self, query, key):
        return ~self.mask(query, key)

    def bounds(self, query, key):
        possible, certain = self.mask.bounds(query, key)
        return ~certain, ~possible


@part
class Causal(Mask):
    """Keys at the query's position and before: key ≤ query."""

    def __call__(self, query, key):
        return key <= query

    def bounds(self, query, key):
        (first, last), (first_key, last_key) = tile_range(query), tile_range(key)
        return self(last, first_key), self(first, last_key)


@part
class Window(Mask):
    """The query at position p sees keys at positions p − left .. p + right, itself included.

    `Window(left)` alone is causal. A window of W keys that counts the query itself is `Window(W − 1)`.
    Raises ValueError for a negative `left` or `right`, TypeError for anything but ints.
    """

    left: int
    right: int = 0

    def __post_init__(self):
        check_static_int("Window", "left", self.left, 0)
        check_static_int("Window", "right", self.right, 0)

    def __call__(self, query, key):
        return (key >= query - self.left) & (key <= query + self.right)

    def bounds(self, query, key):
        (first, last), (first_key, last_key) = tile_range(query), tile_range(key)
        possible = (last_key >= first - self.left) & (first_key <= last + self.right)
        return possible, (first_key >= last - self.left) & (last_key <= first + self.right)


@part
class Sinks(Mask):
    """Keys at positions below `count`: the first tokens, seen by every query (StreamingLLM, Xiao et al., 2024).

    It shows them to earlier queries too: compose it with `Causal()`.
    """

    count: int

    def __post_init__(self):
        check_static_int("Sinks", "count", self.count, 0)

    def __call__(self, query, key):
        return key < self.count

    def bounds(self, query, key):
        first_key, last_key = tile_range(key)
        return first_key < self.count, last_key < self.count


@part
class Documents(Mask):
    """Query and key belong to the same document: ids[query position] == key_ids[key position].

    `ids` [..., P] is a table over positions (one id per token of the packed sequence); `key_ids` defaults to `ids`.
    A negative id is padding, which sees nothing and is not seen; so is a position outside the table.
    """

    ids: Int[Array, "*batch positions"]
    key_ids: Int[Array, "*batch positions"] | None = None

    def _of(self, query, key, grid):
        key_ids = self.ids if self.key_ids is None else self.key_ids
        ids, key_ids = jnp.asarray(self.ids), jnp.asarray(key_ids)
        return take(ids[..., None, :], query, grid, fill=-1), take(key_ids[..., None, :], key, grid, fill=-1)

    def __call__(self, query, key):
        ids, key_ids = self._of(query, key, grid=2)
        return (ids == key_ids) & (ids >= 0)

    def bounds(self, query, key):
        ids, key_ids = self._of(query, key, grid=3)
        (first, last), (first_key, last_key) = tile_range(ids), tile_range(key_ids)
        shown = ((query < 0) | (ids >= 0)).all(-1) & ((key < 0) | (key_ids >= 0)).all(-1)
        possible = (first <= last_key) & (first_key <= last)
        return possible, shown & (first == last) & (first_key == last_key) & (first == first_key)


@part
class Lengths(Mask):
    """Keys at positions below the sequence's length: the padding mask of a right-padded batch. `lengths` is [...]."""

    lengths: Int[Array, "*batch"]

    def __call__(self, query, key):
        return key < jnp.asarray(self.lengths)[..., None, None, None]

    def bounds(self, query, key):
        first_key, last_key = tile_range(key)
        return self(query, first_key), self(query, last_key)


@part
class Explicit(Mask):
    """array[..., n, query position, key position]: any boolean table over positions; outside it, hidden.

    `array` is [..., N or 1, P, R]. It holds every pair, so memory is quadratic in length whatever reads it.
    """

    array: Bool[Array, "*batch heads query_positions key_positions"]

    def __call__(self, query, key, grid=2):
        return take_pairs(self.array, query, key, grid, fill=False)

    def bounds(self, query, key):
        def one_row_of_tiles(query):  # [..., 1, 1, 1, bq]: all tiles at once would be a second T x S array of indices
            query, each_key = query[..., None], key[..., None, :]
            shown = self(query, each_key, grid=4)
            return shown.any((-1, -2)), (shown | (query < 0) | (each_key < 0)).all((-1, -2))

        rows = jnp.moveaxis(jnp.asarray(query), -3, 0)[..., None, :, :]
        possible, certain = jax.lax.map(one_row_of_tiles, rows)  # each [QB, ..., n, 1, KB]
        return jnp.moveaxis(possible, 0, -2)[..., 0, :, :], jnp.moveaxis(certain, 0, -2)[..., 0, :, :]
