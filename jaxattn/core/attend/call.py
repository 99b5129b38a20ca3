"""One attention call, as the user gave it and as the implementations get it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.maps import Dropout
from jaxattn.core.attend.mask import Mask, visible
from jaxattn.core.attend.slots import Slots
from jaxattn.core.attend.tile import Tile
from jaxattn.core.matmul import not_finite
from jaxattn.core.part import part


class Given(NamedTuple):
    """The arguments of a call to `attend` that describe the computation, as the user gave them."""

    query: Any
    key: Any
    value: Any
    slots: Slots
    query_positions: Any
    key_positions: Any

    def in_parts(self) -> "Given":
        """Replaces arrays and functions in the slots of mask and bias by the parts that they stand for.

        Raises:
            ValueError: An array does not broadcast to [..., N, T, S].
            TypeError: An array is of the wrong kind.
        """
        for slot in ("mask", "bias"):
            given = getattr(self.slots, slot)
            if hasattr(given, "dtype") and self.query_positions is None and self.key_positions is None:
                check_pairs(slot, given, self.query, self.key)
        return self._replace(slots=self.slots.in_parts())


def check_pairs(name: str, x: Any, query: Any, key: Any) -> None:
    """Raises ValueError for an array that does not broadcast to [..., N, T, S], one number per pair of a call."""
    if not all(len(getattr(x, "shape", ())) > 2 for x in (query, key)):
        return  # which is what is wrong with the call
    rows = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    pairs = zip(x.shape[::-1], rows[::-1], strict=False)
    if len(x.shape) > len(rows) or any(a not in (1, b) for a, b in pairs):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: need one that broadcasts to [..., N, T, S] = {rows}")


@part
class Call:
    """A checked call with positions that broadcast over tiles, as every implementation is given it.

    Positions are NumPy arrays when they are the default 0..length−1, so that masks can be read at trace time. The
    dropout among the slots has its seeds drawn.
    """

    query: Float[Array, "*batch t heads h"]
    key: Float[Array, "*batch s heads h"]  # K of them
    value: Float[Array, "*batch s heads v"]  # Kv of them
    slots: Slots
    query_positions: Int[Array, "*batch 1 t 1"]
    key_positions: Int[Array, "*batch heads 1 s"]  # N of them or 1

    @property
    def tile(self) -> Tile:
        """The tile of all queries and keys, with the pairs that the mask shows."""
        places = self.query_positions, self.key_positions
        return Tile(*places, visible(self.slots.mask, *places))


def prepare(given: Given) -> Call:
    """Fills in default positions, zeroes queries in empty slots (which may hold anything) and draws dropout seeds."""
    query, key, value = given.query, given.key, given.value
    *batch, length, heads, _ = query.shape
    query_positions, key_positions = given.query_positions, given.key_positions
    if query_positions is None:
        query_positions = np.arange(length, dtype=np.int32)
    else:
        query = jnp.where((query_positions >= 0)[..., None, None], query, 0)
    query_positions = query_positions.astype(np.int32)[..., None, :, None]
    if key_positions is None:
        key_positions = np.arange(key.shape[-3], dtype=np.int32)
    elif key_positions.ndim == len(batch) + 2:
        key_positions = jnp.repeat(key_positions, heads // key.shape[-2], -1).swapaxes(-1, -2)[..., None, :]
    if key_positions.ndim < len(batch) + 2:
        key_positions = key_positions[..., None, None, :]
    key_positions = key_positions.astype(np.int32)
    slots = given.slots
    if isinstance(slots.dropout, Dropout):
        slots = dataclasses.replace(slots, dropout=slots.dropout.draw(tuple(batch), heads))
    return Call(query, key, value, slots, query_positions, key_positions)


def _to_any_head(shown: Bool[Array, "*b #n s"], heads: int) -> Bool[Array, "*b #k s"]:
    """Returns which keys are shown to any of the query heads that read key head k."""
    if shown.shape[-2] > 1:
        shown = shown.reshape(*shown.shape[:-2], heads, -1, shown.shape[-1]).any(-2)
    return shown


# A weight of 0 does not keep an infinite or undefined number out of a product, so keys and values with one are set to 0
# beforehand, and the rows that see them to NaN afterwards. The cotangents of such rows are dropped. Thus what is not
# finite reaches no other row, neither forward nor in a gradient. What no query reads is set to 0 with them.


class WrongKeys(NamedTuple):
    """Keys and values that must not be multiplied: they are not finite, or no query reads them.

    A field is None where the call can have nothing of the kind.
    """

    seen: Bool[Array, "*b g s"] | None  # keys that make a row wrong which sees them, of G = K or N heads
    keys: Bool[Array, "*b s k"] | None
    values: Bool[Array, "*b s kv"] | None


class Wrong(NamedTuple):
    """Queries and keys that are not finite, and keys that no query reads.

    A field is None where nothing needs to be kept out. With maps, which may mix heads, all heads of a token are wrong
    or none in `queries` and `keys.seen`.
    """

    queries: Bool[Array, "*b n t"] | None
    of_keys: WrongKeys


class Guard(NamedTuple):
    """How wrong queries and keys are found; static.

    Attributes:
        queries: Whether queries are checked for numbers that are not finite.
        keys: Whether keys and values are checked.
        one: Whether the call has a single query, so that the mask alone says which keys are read.
        empty: Whether the call may have empty slots.
        heads: N.
        mixed: Whether maps may mix heads.
    """

    queries: bool
    keys: bool
    one: bool
    empty: bool
    heads: int
    mixed: bool

    def in_all_heads(self, x: Bool[Array, "*b g s"]) -> Bool[Array, "*b g s"]:
        """Returns x, or, where heads may be mixed, whether x holds in any head."""
        return jnp.broadcast_to(x.any(-2, keepdims=True), x.shape) if self.mixed else x


def guard_of(call: Call) -> Guard:
    """Decides which arrays of a call are checked.

    The keys of a single query are not checked, which would take as long as attending to them: a wrong key that the
    query sees makes its row wrong, and a key that it does not see is not read. The exception is a call in which heads
    that share a key see different keys.
    """
    maps = call.slots.maps
    rows_alone = not any(each.halo or "matrix" in (each.scores_need, each.weights_need) for each in maps)
    one, empty = call.query.shape[-3] == 1, not isinstance(call.key_positions, np.ndarray)
    apart = False
    if one and call.slots.mask is not None:
        positions = call.query_positions, call.key_positions
        told_apart = jax.eval_shape(lambda *places: visible(call.slots.mask, *places), *positions).shape[-3]
        apart = told_apart not in (1, min(call.key.shape[-2], call.value.shape[-2]))
    one_sees = rows_alone and one and call.slots.mask is not None
    mixed = not all(each.heads_apart for each in maps)
    return Guard(rows_alone, rows_alone and (apart or not one), one_sees, empty, call.query.shape[-2], mixed)


def wrong_queries(guard: Guard, query: Float[Array, "*b t n h"]) -> Bool[Array, "*b n t"] | None:
    """Returns which queries are not finite."""
    return guard.in_all_heads(not_finite(query).swapaxes(-1, -2)) if guard.queries else None


def wrong_keys(
    guard: Guard,
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s kv v"],
    mask: Mask | None,
    query_positions: Int[Array, "*#b 1 t 1"],
    key_positions: Int[Array, "*#b #n 1 s"],
) -> WrongKeys:
    """Returns which of these keys and values must not be multiplied."""
    seen = keys = values = None
    if guard.keys:
        keys, values = not_finite(key), not_finite(value)
        of_key, of_value = keys.swapaxes(-1, -2), values.swapaxes(-1, -2)
        if of_key.shape[-2] != of_value.shape[-2]:
            of_key, of_value = repeated(of_key, guard.heads), repeated(of_value, guard.heads)
        seen = guard.in_all_heads(of_key | of_value)
    if guard.one or guard.empty:
        read = (visible(mask, query_positions, key_positions) if guard.one else key_positions >= 0)[..., 0, :]
        of_key, of_value = (~_to_any_head(read, x.shape[-2]).swapaxes(-1, -2) for x in (key, value))
        keys, values = (of_key if keys is None else of_key | keys), (of_value if values is None else of_value | values)
    return WrongKeys(seen, keys, values)


def hide(call: Call) -> tuple[Call, Wrong]:
    """Puts zeros in place of numbers that must not be multiplied, and returns the call and where they were."""
    guard = guard_of(call)
    of_keys = wrong_keys(guard, call.key, call.value, call.slots.mask, call.query_positions, call.key_positions)
    wrong = Wrong(wrong_queries(guard, call.query), of_keys)
    query = call.query if wrong.queries is None else without(call.query, wrong.queries.swapaxes(-1, -2))
    key, value = without(call.key, of_keys.keys), without(call.value, of_keys.values)
    return dataclasses.replace(call, query=query, key=key, value=value), wrong


def without(x: Float[Array, "*b h"], wrong: Bool[Array, "*#b"] | None) -> Float[Array, "*b h"]:
    """Returns x with zeros for the wrong vectors."""
    return x if wrong is None else jnp.where(wrong[..., None], 0, x)


def repeated(x: Bool[Array, "*b g s"], heads: int) -> Bool[Array, "*b n s"]:
    """Repeats an array for G heads for the N heads that read them."""
    return x if x.shape[-2] == heads else jnp.repeat(x, heads // x.shape[-2], -2)
