"""Masks: which keys a query may see, as boolean functions of positions that compose with `&`, `|` and `~`.

A mask is called on the positions of a tile, `mask(query [..., 1, T, 1], key [..., 1, 1, S])`. It returns booleans that
broadcast to [..., N, T, S]. Position −1 marks an empty slot. The core hides empty slots, so a mask need not. Masks use
the positions that they are given, never array indices. One mask then serves training, padding, packed documents, caches
and permuted tokens.

`bounds` says what is known of whole tiles, so that empty tiles are skipped and full ones are not masked. It gets the
positions cut into tiles, `query [..., 1, QB, 1, bq]` and `key [..., 1, 1, KB, bk]`, and returns (possible, certain).
False in `possible` promises that the tile hides every pair of slots. True in `certain` promises that it shows every
pair of non-empty slots. `bounds` is evaluated with NumPy when positions and mask are static, with JAX otherwise.

Every mask can be looked at: `to_array`, `density`, `describe` (and `viz.show_mask`).
"""

import abc
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxattn.core.checks import check_entries, check_static_int
from jaxattn.core.part import part
from jaxattn.core.table import on_shared_axis, take, take_pairs

Bounds = tuple[Any, Any]


class Reach(NamedTuple):
    """The most that a mask may show: keys at positions below `first`, and the last `recent` up to the query's own."""

    first: int
    recent: int


def tile_range(positions: Any, valid: Any = None) -> tuple[Any, Any]:
    """Returns the least and the greatest non-negative value of each tile (last axis); (2³¹−1, −1) if it has none."""
    xp = np if isinstance(positions, np.ndarray) else jnp
    valid = positions >= 0 if valid is None else valid
    largest = np.iinfo(np.int32).max
    return xp.where(valid, positions, largest).min(-1), xp.where(valid, positions, -1).max(-1)


def every_slot(positions: Any, condition: Any) -> Any:
    """Returns whether the condition holds for every non-empty slot of a tile (last axis)."""
    return ((positions < 0) | condition).all(-1)


def _as_mask(other: Any) -> Any:
    other = as_mask(other)
    if not isinstance(other, Mask):
        raise TypeError(f"a mask combines with masks, arrays and functions, got {type(other).__name__}")
    return other


class Mask(abc.ABC):
    """The base class of parts for the mask slot. A new mask needs `__call__`; `bounds` makes it fast."""

    @abc.abstractmethod
    def __call__(self, query: Int[Array, "*b 1 t 1"], key: Int[Array, "*b 1 1 s"]) -> Bool[Array, "*b n t s"]:
        """Returns True where the query may see the key."""

    def bounds(self, query: Int[Array, "*b 1 qb 1 bq"], key: Int[Array, "*b 1 1 kb bk"]) -> Bounds:
        """Returns (possible, certain) per tile, [..., 1 or N, QB, KB].

        By default nothing is known and nothing is skipped.
        """
        return np.True_, np.False_

    @property
    def is_relative(self) -> bool:
        """Whether the mask depends on the distance between query and key alone; by default it may read more."""
        return False

    @property
    def reach(self) -> Reach | None:
        """How few keys the mask shows a query, so that a cache need not keep others; by default None, no limit."""
        return None

    @property
    def grain(self) -> tuple[int, int] | None:
        """(queries, keys), the blocks in which the mask shows and hides pairs, so that tiles can fit them.

        None, the default, means that the mask shows nothing in blocks.
        """
        return None

    def to_array(self, queries: Any, keys: Any = None) -> Bool[Array, "*b n t s"]:
        """Returns what each query sees, [..., N or 1, T, S].

        `Explicit` of the result is the same mask at the positions 0..length−1.

        Args:
            queries: A number of positions, counted from 0, or an int array of positions [..., T]. Those of an empty
                slot, −1, are hidden.
            keys: A number of positions, or an int array of positions [..., S]; by default the queries.

        Raises:
            TypeError: Positions are not integers.
            ValueError: A number is below 1.
        """
        query, key = _places("queries", queries), _places("keys", queries if keys is None else keys)
        shown = visible(self, query[..., None, :, None], key[..., None, None, :])
        return jnp.broadcast_to(shown, np.broadcast_shapes(shown.shape, (1, query.shape[-1], key.shape[-1])))

    def density(self, queries: Any, keys: Any = None) -> float:
        """Returns the share of the pairs of `to_array` that are visible.

        The method holds all pairs, and does not run under `jit`.
        """
        return float(self.to_array(queries, keys).mean())

    def describe(self) -> str:
        """Returns a few words on which keys the mask shows."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        static = [f"{name}={x}" for name, x in values.items() if isinstance(x, int | np.integer | str)]
        return f"{type(self).__name__}({', '.join(static)})"

    def __and__(self, other: "Mask") -> "And":
        return And(self, _as_mask(other))

    def __or__(self, other: "Mask") -> "Or":
        return Or(self, _as_mask(other))

    def __invert__(self) -> "Not":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            "a mask is neither true nor false: combine masks by &, | and ~, since Python's `and`, `or` and `not` would "
            "drop one of them"
        )


def as_mask(mask: Any) -> Any:
    """Makes a mask of an array, `Explicit(array)`, or of a function, `MaskFunction(function)`; a mask stays as it is.

    Raises:
        TypeError: An array is not boolean.
    """
    if mask is None or isinstance(mask, Mask | type) or dataclasses.is_dataclass(mask):
        return mask
    if hasattr(mask, "shape") and hasattr(mask, "dtype"):
        if mask.dtype != bool:
            raise TypeError(f"mask has dtype {mask.dtype}: need booleans, True where a query sees a key, or a Mask")
        return Explicit(mask)
    return MaskFunction(mask) if callable(mask) else mask


def _places(name: str, given: Any) -> Any:
    if isinstance(given, int | np.integer):
        check_static_int("to_array", name, given, 1)
        return np.arange(given, dtype=np.int32)
    if not hasattr(given, "dtype") or not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be an int or an integer array, got {getattr(given, 'dtype', type(given).__name__)}"
        )
    return given.astype(np.int32)


def visible(mask: Mask | None, query: Int[Array, "*b 1 t 1"], key: Int[Array, "*b 1 1 s"]) -> Bool[Array, "#*b #n t s"]:
    """Returns the mask (None shows all) with the empty slots hidden."""
    shown = (query >= 0) & (key >= 0)
    return shown if mask is None else shown & mask(query, key)


def _finer(*masks: Mask) -> tuple[int, int] | None:
    """Returns the grain of masks that are combined: blocks into which the blocks of all of them can be cut."""
    grains = [mask.grain for mask in masks if mask.grain is not None]
    return (math.gcd(*(x for x, _ in grains)), math.gcd(*(x for _, x in grains))) if grains else None


def anded(mask: Mask | None) -> list[Mask]:
    """Returns the masks that are and-ed together; an empty list for None."""
    if mask is None:
        return []
    return anded(mask.first) + anded(mask.second) if isinstance(mask, And) else [mask]


def _grouped(mask: Mask, kinds: Any) -> str:
    return f"({mask.describe()})" if isinstance(mask, kinds) else mask.describe()


class _OfTwo(Mask):
    """The shared part of `&` and `|` of two masks."""

    first: Mask
    second: Mask

    @property
    def is_relative(self):
        return self.first.is_relative and self.second.is_relative

    @property
    def grain(self):
        return _finer(self.first, self.second)


@part
class And(_OfTwo):
    """Shows the keys that both masks show; `a & b` makes it."""

    first: Mask
    second: Mask

    def __call__(self, query, key):
        return self.first(query, key) & self.second(query, key)

    def bounds(self, query, key):
        (possible, certain), (possible2, certain2) = self.first.bounds(query, key), self.second.bounds(query, key)
        return possible & possible2, certain & certain2

    @property
    def reach(self):
        both = [reach for reach in (self.first.reach, self.second.reach) if reach is not None]
        return min(both, key=sum, default=None)  # what both show, either of them shows

    def describe(self):
        return f"{_grouped(self.first, Or)} and {_grouped(self.second, Or)}"


@part
class Or(_OfTwo):
    """Shows the keys that either mask shows; `a | b` makes it."""

    first: Mask
    second: Mask

    def __call__(self, query, key):
        return self.first(query, key) | self.second(query, key)

    def bounds(self, query, key):
        (possible, certain), (possible2, certain2) = self.first.bounds(query, key), self.second.bounds(query, key)
        return possible | possible2, certain | certain2

    @property
    def reach(self):
        first, second = self.first.reach, self.second.reach
        return None if first is None or second is None else Reach(*map(max, first, second))

    def describe(self):
        return f"{_grouped(self.first, And)} or {_grouped(self.second, And)}"


@part
class Not(Mask):
    """Shows the keys that the mask hides; `~a` makes it. Empty slots stay hidden."""

    mask: Mask

    def __call__(self, query, key):
        return ~self.mask(query, key)

    def bounds(self, query, key):
        possible, certain = self.mask.bounds(query, key)
        return ~certain, ~possible

    @property
    def is_relative(self):
        return self.mask.is_relative

    @property
    def grain(self):
        return self.mask.grain

    def describe(self):
        return f"not {_grouped(self.mask, (And, Or, PerHead))}"


@part
class Causal(Mask):
    """Shows keys at the query's position and before: key ≤ query."""

    def __call__(self, query, key):
        return key <= query

    def bounds(self, query, key):
        (first, last), (first_key, last_key) = tile_range(query), tile_range(key)
        return self(last, first_key), self(first, last_key)

    @property
    def is_relative(self):
        return True

    def describe(self):
        return "causal"


@part
class Window(Mask):
    """Shows a query at position p the keys at positions p − left .. p + right, itself included.

    `Window(left)` alone is causal. A window of W keys that counts the query itself is `Window(W − 1)`.

    Attributes:
        left: The number of positions before the query, at least 0.
        right: The number of positions after the query, at least 0.

    Raises:
        TypeError: `left` or `right` is not an int.
        ValueError: `left` or `right` is negative.
    """

    left: int
    right: int = 0

    def __post_init__(self):
        check_static_int("Window", "left", self.left, 0)
        check_static_int("Window", "right", self.right, 0)

    def __call__(self, query, key):
        ahead = key - query  # which fits an int32, as query + right may not
        return (ahead >= -self.left) & (ahead <= self.right)

    def bounds(self, query, key):
        (first, last), (first_key, last_key) = tile_range(query), tile_range(key)
        possible = (last_key - first >= -self.left) & (first_key - last <= self.right)
        return possible, (first_key - last >= -self.left) & (last_key - first <= self.right)

    @property
    def is_relative(self):
        return True

    @property
    def reach(self):
        return None if self.right else Reach(0, self.left + 1)

    def describe(self):
        if self.right:
            return f"{self.left} back to {self.right} ahead"
        return f"the last {self.left + 1} keys" if self.left else "itself"


@part
class Sinks(Mask):
    """Shows every query the first tokens: keys at positions below `count` (StreamingLLM, Xiao et al., 2024).

    Earlier queries see them too: compose the mask with `Causal()`. In a row of packed documents the first positions are
    those of the row, so `Sinks(4) & Documents(ids)` shows sinks to the first document alone.
    `Documents(ids).within(Sinks(4))` gives every document its own.

    Attributes:
        count: The number of tokens, at least 0.

    Raises:
        TypeError: `count` is not an int.
        ValueError: `count` is negative.
    """

    count: int

    def __post_init__(self):
        check_static_int("Sinks", "count", self.count, 0)

    def __call__(self, query, key):
        return key < self.count

    def bounds(self, query, key):
        first_key, last_key = tile_range(key)
        return first_key < self.count, last_key < self.count

    @property
    def reach(self):
        return Reach(self.count, 0)

    def describe(self):
        return "the first key" if self.count == 1 else f"the first {self.count} keys"


@part
class Dilated(Mask):
    """Shows keys at a distance from the query that `step` divides, before it and after it.

    Direction and distance are not limited, since other masks do so. `Dilated(s) & Window(n * s)` is a dilated window,
    which shows the keys at distances 0, s, .., n·s. `Causal() & (Window(s) | Dilated(s))` joins the two patterns of the
    strided sparse transformer (Child et al., 2019).

    Attributes:
        step: The step, at least 1.

    Raises:
        TypeError: `step` is not an int.
        ValueError: `step` is below 1.
    """

    step: int

    def __post_init__(self):
        check_static_int("Dilated", "step", self.step, 1)

    def __call__(self, query, key):
        return (query - key) % self.step == 0

    def bounds(self, query, key):
        (first, last), (first_key, last_key) = tile_range(query), tile_range(key)
        least, most = first - last_key, last - first_key
        possible = most // self.step * self.step >= least
        return possible, possible & ((least == most) | (self.step == 1))

    @property
    def is_relative(self):
        return True

    def describe(self):
        return f"distances divisible by {self.step}"


@part
class Chunked(Mask):
    """Shows keys in the same chunk of `size` positions: ⌊query / size⌋ = ⌊key / size⌋ (local block attention).

    Attributes:
        size: The number of positions per chunk, at least 1.

    Raises:
        TypeError: `size` is not an int.
        ValueError: `size` is below 1.
    """

    size: int

    def __post_init__(self):
        check_static_int("Chunked", "size", self.size, 1)

    def __call__(self, query, key):
        return query // self.size == key // self.size

    def bounds(self, query, key):
        (first, last), (first_key, last_key) = ([x // self.size for x in tile_range(places)] for places in (query, key))
        return (first <= last_key) & (first_key <= last), (first == last_key) & (first_key == last)

    def describe(self):
        return f"the same chunk of {self.size}"


@part
class Documents(Mask):
    """Shows keys of the same document: ids[query position] == key_ids[key position].

    Attributes:
        ids: Integers [..., P], a table over positions (one id per token of the packed sequence). A negative id is
            padding, which sees nothing and is not seen; so is a position outside the table.
        key_ids: The table of the keys, by default `ids`.
    """

    ids: Int[Array, "*batch positions"]
    key_ids: Int[Array, "*batch positions"] | None = None

    def _of(self, query, key, grid):
        key_ids = self.ids if self.key_ids is None else self.key_ids
        ids, key_ids = jnp.asarray(self.ids), jnp.asarray(key_ids)
        check_entries("Documents", "ids", ids, query)
        check_entries("Documents", "key_ids" if self.key_ids is not None else "ids", key_ids, key)
        return take(ids[..., None, :], query, grid, fill=-1), take(key_ids[..., None, :], key, grid, fill=-1)

    def __call__(self, query, key):
        ids, key_ids = self._of(query, key, grid=2)
        return (ids == key_ids) & (ids >= 0)

    def bounds(self, query, key):
        ids, key_ids = self._of(query, key, grid=3)
        (first, last), (first_key, last_key) = tile_range(ids), tile_range(key_ids)
        shown = every_slot(query, ids >= 0) & every_slot(key, key_ids >= 0)
        possible = (first <= last_key) & (first_key <= last)
        return possible, shown & (first == last) & (first_key == last_key) & (first == first_key)

    def within(self, mask: Mask) -> Mask:
        """Returns `mask` with positions counted from the start of each document, which sees no other document.

        `Documents(ids).within(Causal() & (Window(w) | Sinks(n)))` is the mask that each document would have if it were
        alone in its row.

        Raises:
            ValueError: `key_ids` are given. Queries and keys then stand in different rows.
        """
        if self.key_ids is not None:
            raise ValueError("Documents: within counts places in one row: need key_ids=None")
        return Within(_as_mask(mask), places_in_documents(self.ids)) & self

    def describe(self):
        return "the same document"


@part
class Within(Mask):
    """Reads another mask at other places than the positions: mask(places[query position], places[key position]).

    With the place of each token in its document, `Causal() & (Window(w) | Sinks(n))` shows the first n tokens of each
    document of a packed row, not those of the row.

    Attributes:
        mask: The mask to read.
        places: Integers [..., P], a table over positions like that of `Documents`, with which it is combined. −1, and
            all positions beyond the table, are empty slots.
    """

    mask: Mask
    places: Int[Array, "*batch positions"]

    def _of(self, query, key, grid):
        places = jnp.asarray(self.places)[..., None, :]
        check_entries("Within", "places", places, query, key)
        return take(places, query, grid, fill=-1), take(places, key, grid, fill=-1)

    def __call__(self, query, key):
        return visible(self.mask, *self._of(query, key, grid=2))

    def bounds(self, query, key):
        places = self._of(query, key, grid=3)
        possible, certain = self.mask.bounds(*places)
        shown = (every_slot(at, place >= 0) for at, place in zip((query, key), places, strict=True))
        return possible, certain & functools.reduce(operator.and_, shown)

    def describe(self):
        return f"{_grouped(self.mask, (And, Or))}, counted from the start of the document"


def documents_of(mask: Mask | None) -> Int[Array, "*batch positions"] | None:
    """Returns the ids of the `Documents` in a mask, alone or and-ed with others; None if the mask has none."""
    if isinstance(mask, And):
        first = documents_of(mask.first)
        return documents_of(mask.second) if first is None else first
    return mask.ids if isinstance(mask, Documents) and mask.key_ids is None else None


def places_in_documents(ids: Int[Array, "*batch positions"]) -> Int[Array, "*batch positions"]:
    """Returns the place of each token in its document, counted from 0 where the run of equal ids began."""
    ids = jnp.asarray(ids)
    index = jnp.arange(ids.shape[-1])
    starts = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], -1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=ids.ndim - 1)


@part
class Lengths(Mask):
    """Shows keys at positions below the sequence's length: the padding mask of a right-padded batch.

    Attributes:
        lengths: Integers [...], one per batch entry.
    """

    lengths: Int[Array, "*batch"]

    def __call__(self, query, key):
        return key < jnp.asarray(self.lengths)[..., None, None, None]

    def bounds(self, query, key):
        first_key, last_key = tile_range(key)
        return self(query, first_key), self(query, last_key)

    def describe(self):
        return "within the length"


@part
class Prefix(Mask):
    """Shows key ≤ query or key < length: a prefix that sees itself in both directions, then causal (prefix-LM).

    The prefix is that of Raffel et al. (2020). A length known when the program is written may be left to static masks,
    so that tiles are skipped at trace time: `Causal() | Sinks(n)`.

    Attributes:
        length: An int, or an array [...] with one length per batch entry.
    """

    length: Int[Array, "*batch"] | int

    def __call__(self, query, key):
        return (Causal() | Lengths(jnp.asarray(self.length)))(query, key)

    def bounds(self, query, key):
        return (Causal() | Lengths(jnp.asarray(self.length))).bounds(query, key)

    def describe(self):
        return f"a prefix{f' of {self.length}' if isinstance(self.length, int | np.integer) else ''}, then causal"


@part
class Explicit(Mask):
    """Shows the pairs of a boolean table over positions, array[..., n, query position, key position].

    Positions outside the table are hidden. A table of every pair has memory quadratic in length, whichever
    implementation reads it.

    Attributes:
        array: Booleans [..., N, P, R] or with fewer axes, [P, R], [R], []. An axis of size 1 is shared by all
            positions, heads or batch entries, as in `jax.nn`: [B, 1, 1, S] hides the padding of a batch.
    """

    array: Bool[Array, "*batch heads p r"] | Bool[Array, "p r"] | Bool[Array, " r"] | Bool[Array, ""]

    def __call__(self, query, key, grid=2):
        table = jnp.asarray(self.array)
        table = table.reshape((1,) * (3 - table.ndim) + table.shape)
        query, key = on_shared_axis(table.shape[-2], query, -2), on_shared_axis(table.shape[-1], key, -1)
        return take_pairs(table, query, key, grid, fill=False)

    def bounds(self, query, key):
        def one_row_of_tiles(query):  # [..., 1, 1, 1, bq]: all tiles at once would be a second T x S array of indices
            query, each_key = query[..., None], key[..., None, :]
            shown = self(query, each_key, grid=4)
            return shown.any((-1, -2)), (shown | (query < 0) | (each_key < 0)).all((-1, -2))

        rows = jnp.moveaxis(jnp.asarray(query), -3, 0)[..., None, :, :]
        possible, certain = jax.lax.map(one_row_of_tiles, rows)  # each [QB, ..., n, 1, KB]
        return jnp.moveaxis(possible, 0, -2)[..., 0, :, :], jnp.moveaxis(certain, 0, -2)[..., 0, :, :]

    def describe(self):
        return "a table of pairs"


@part
class MaskFunction(Mask):
    """Shows the pairs where function(query position, key position): what a plain function in the mask slot becomes.

    Arrays that the function closes over are constants, and another function is another program: define it once. A mask
    class can say more, such as which tiles are empty (`bounds`).

    Attributes:
        function: The function, called on arrays of positions [..., 1, T, 1] and [..., 1, 1, S]. It returns booleans
            that broadcast against both.
    """

    function: Callable[..., Any]

    def __call__(self, query, key):
        return self.function(query, key)

    def describe(self):
        return getattr(self.function, "__name__", "a function of positions")


@part
class PerHead(Mask):
    """Shows head n the keys that masks[n] shows, for instance another window for every head.

    A mask of the tuple that itself differs by head stands for its own head n. Each key head computes the tiles that the
    query heads which read it need.

    Attributes:
        masks: A tuple with one mask per head.

    Raises:
        TypeError: `masks` is not a tuple.
        ValueError: `masks` is empty or, when called, one of them has another number of heads.
    """

    masks: tuple[Mask, ...]

    def __post_init__(self):
        if not isinstance(self.masks, tuple):
            raise TypeError(f"PerHead: masks must be a tuple of masks, got {type(self.masks).__name__}")
        if not self.masks:
            raise ValueError("PerHead: masks is empty: need one per head")

    def __call__(self, query, key):
        return _stack_heads([mask(query, key) for mask in self.masks])

    def bounds(self, query, key):
        possible, certain = zip(*(mask.bounds(query, key) for mask in self.masks), strict=True)
        return _stack_heads(possible), _stack_heads(certain)

    @property
    def is_relative(self):
        return all(mask.is_relative for mask in self.masks)

    @property
    def grain(self):
        return _finer(*self.masks)

    def describe(self):
        groups, first = [], 0
        for text, same in itertools.groupby(mask.describe() for mask in self.masks):
            last = first + len(list(same)) - 1
            groups.append(f"head {first}: {text}" if first == last else f"heads {first}-{last}: {text}")
            first = last + 1
        return "; ".join(groups)


def _stack_heads(each: Any) -> Any:
    """Makes element n of a list of [..., 1 or N, a, b] arrays head n of one array."""
    xp: Any = np if all(isinstance(x, np.ndarray | np.bool_) for x in each) else jnp
    for heads in (x.shape[-3] for x in each if np.ndim(x) > 2):
        if heads not in (1, len(each)):
            raise ValueError(f"PerHead: {len(each)} masks, but one of them is itself for {heads} heads: need the same")
    of_head = [x[..., n if x.shape[-3] > 1 else 0, :, :] if np.ndim(x) > 2 else x for n, x in enumerate(each)]
    shape = np.broadcast_shapes((1, 1), *(np.shape(x) for x in of_head))
    return xp.stack([xp.broadcast_to(x, shape) for x in of_head], axis=-3)
