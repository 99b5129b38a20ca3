"""How keys and values lie in memory: as they are, in shared pages, or in a few bits."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.checks import check_static_int
from jaxattn.core.part import part

Shape = tuple[int, int]


class Storage(abc.ABC):
    """The base class of ways to hold the keys and values of C slots.

    What is held is a pytree of arrays that only the storage reads. Slots may belong to all key heads (G = 1) or to one
    each (G = K); a slot C and beyond stands for none. `places` [B, C, G] are the positions of the tokens in the slots
    (−1: empty), as the store has them.

    Attributes:
        exact: Whether a token is read as it was written. Otherwise prompts attend to themselves before they are
            written, so that they meet keys and values as they are.
        rolls_back: Whether the newest tokens can be taken back, as if they had never been written.
    """

    exact: ClassVar[bool] = True
    rolls_back: ClassVar[bool] = True

    @property
    def unit(self) -> int:
        """The number of slots that lie together: a store has a multiple of it."""
        return 1

    @abc.abstractmethod
    def start(self, batch: int, slots: int, key_shape: Shape, value_shape: Shape, dtype: Any) -> Any:
        """Returns what is held before any token.

        Args:
            batch: B.
            slots: C.
            key_shape: (heads, head dim) of keys.
            value_shape: (heads, head dim) of values.
            dtype: The dtype in which keys and values are read.

        Raises:
            ValueError: The storage cannot hold so many slots, or keys and values of such shapes.
        """

    @abc.abstractmethod
    def write(
        self,
        held: Any,
        slots: Int[Array, "b t g"],
        key: Float[Array, "b t k h"],
        value: Float[Array, "b t kv v"],
        places: Int[Array, "b c g"],
    ) -> Any:
        """Returns what is held with tokens in these slots; `places` holds them already."""

    @abc.abstractmethod
    def take(
        self, held: Any, slots: Int[Array, "b s g"] | None, places: Int[Array, "b c g"]
    ) -> tuple[Float[Array, "b s k h"], Float[Array, "b s kv v"]]:
        """Returns keys and values of these slots of each head, or of all slots; of empty slots they may be anything."""

    def fill(
        self, held: Any, key: Float[Array, "b c k h"], value: Float[Array, "b c kv v"], places: Int[Array, "b c g"]
    ) -> Any:
        """Returns what is held with other tokens in all slots."""
        slots = jnp.broadcast_to(jnp.arange(places.shape[1])[:, None], places.shape)
        return self.write(held, jnp.where(places < 0, places.shape[1], slots), key, value, places)

    def of_a_row(self) -> "Storage":
        """Returns the storage of a single row that is to replace one of a batch: without memory for other rows."""
        return self

    def reordered(self, held: Any, rows: Int[Array, " r"]) -> Any:
        """Returns what is held of these rows of the batch."""
        return jax.tree.map(lambda x: x[rows], held)

    def replaced(self, held: Any, rows: Int[Array, " r"], other: Any, places: Int[Array, "b c g"]) -> Any:
        """Returns what is held with these rows taken by all rows of what another store holds."""
        return jax.tree.map(lambda x, new: x.at[rows].set(new), held, other)

    def cleared(self, held: Any, places: Int[Array, "b c g"]) -> Any:
        """Returns what is held after slots have become empty in `places`."""
        return held


def take_slots(x: Array, slots: Int[Array, "b s g"] | None) -> Array:
    """Returns x [B, C, 1 or K, ...] at the slots of each head, [B, S, K, ...]; all of x for None."""
    if slots is None:
        return x
    row = jnp.arange(len(x))[:, None]
    if slots.shape[-1] == 1:  # one slot for all heads
        return x[row, slots[..., 0]]
    # Heads come first, as attention takes them.
    head = jnp.arange(slots.shape[-1])[:, None] if x.shape[2] > 1 else 0
    return x[row[..., None], slots.swapaxes(1, 2), head].swapaxes(1, 2)


def write_slots(x: Array, slots: Int[Array, "b t g"], new: Array) -> Array:
    """Returns x [B, C, 1 or K, ...] with new ones [B, T, 1 or K, ...] in the slots of each head; slot C is none."""
    row = jnp.arange(len(x))[:, None]
    if slots.shape[-1] == 1:
        return x.at[row, slots[..., 0]].set(new.astype(x.dtype), mode="drop")
    return x.at[row[..., None], slots, jnp.arange(slots.shape[-1])].set(new.astype(x.dtype), mode="drop")


@part
class Dense(Storage):
    """Holds keys and values as they are, [B, C, K, H] and [B, C, Kv, V]."""

    def start(self, batch, slots, key_shape, value_shape, dtype):
        return {"key": jnp.zeros((batch, slots, *key_shape), dtype),
                "value": jnp.zeros((batch, slots, *value_shape), dtype)}  # fmt: skip

    def write(self, held, slots, key, value, places):
        return {"key": write_slots(held["key"], slots, key), "value": write_slots(held["value"], slots, value)}

    def take(self, held, slots, places):
        return take_slots(held["key"], slots), take_slots(held["value"], slots)

    def fill(self, held, key, value, places):
        return {"key": key.astype(held["key"].dtype), "value": value.astype(held["value"].dtype)}


@part
class Paged(Storage):
    """Holds keys and values in pages of a pool that all rows share (vLLM, Kwon et al., 2023).

    Slot c of row b lies in slot c mod `size` of page table[b, ⌊c / size⌋]. A row gets a page when it first writes to
    it, so that memory is that of the tokens that are there: a row wastes less than one page. Rows that were made from
    one row (`reordered`: beams, samples of one prompt) share its pages. A row that writes to a shared page first gets a
    copy of it. A page is free when no row has it in its table.

    Where the pool has no free page, the token is lost, and what attends to it is NaN.

    Attributes:
        size: The number of slots per page, at least 1.
        pages: The number of pages in the pool, at least 1; None for as many as all rows can fill.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1.
    """

    size: int = 16
    pages: int | None = None

    def __post_init__(self):
        check_static_int("Paged", "size", self.size, 1)
        if self.pages is not None:
            check_static_int("Paged", "pages", self.pages, 1)

    @property
    def unit(self):
        return self.size

    def start(self, batch, slots, key_shape, value_shape, dtype):
        if slots % self.size:
            raise ValueError(f"slots is {slots}: need a multiple of the page size of Paged, {self.size}")
        by_row = slots // self.size
        pages = batch * by_row if self.pages is None else self.pages
        pools = (jnp.zeros((pages, self.size, *shape), dtype) for shape in (key_shape, value_shape))
        return dict(zip(("key", "value"), pools, strict=True)) | {"table": jnp.full((batch, by_row), -1, jnp.int32)}

    def write(self, held, slots, key, value, places):
        table, count = held["table"], len(held["key"])
        row = jnp.arange(len(table))[:, None, None]
        touched = jnp.zeros(table.shape, bool).at[row, slots // self.size].set(True, mode="drop")
        owners = self.owners(held)
        alone = (table >= 0) & (owners[table] == 1)
        # The i-th page that is needed is the i-th free one.
        most = min(table.size, slots.size)
        need = jnp.nonzero((touched & ~alone).reshape(-1), size=most, fill_value=table.size)[0]
        free = jnp.nonzero(owners == 0, size=most, fill_value=-1)[0].astype(jnp.int32)
        old = table.reshape(-1).at[need].get(mode="fill", fill_value=-1)
        table = table.reshape(-1).at[need].set(free, mode="drop").reshape(table.shape)
        onto = jnp.where((free < 0) | (old < 0) | (need == table.size), count, free)
        page = jnp.take_along_axis(
            table, jnp.minimum(slots // self.size, table.shape[1] - 1).reshape(len(table), -1), 1
        )
        page = page.reshape(slots.shape)
        page = jnp.where((page < 0) | (slots >= places.shape[1]), count, page)

        def written(pool, new):
            pool = pool.at[onto].set(pool[jnp.maximum(old, 0)], mode="drop")
            return pool.at[self._index(page, slots)].set(new.astype(pool.dtype), mode="drop")

        return {"key": written(held["key"], key), "value": written(held["value"], value), "table": table}

    def take(self, held, slots, places):
        table = held["table"]
        if slots is None:
            slots = jnp.broadcast_to(jnp.arange(places.shape[1])[:, None], (*places.shape[:2], 1))
        page = jnp.take_along_axis(table, (slots // self.size).reshape(len(table), -1), 1).reshape(slots.shape)
        index, lost = self._index(page, slots), (page < 0)[..., None]
        return tuple(jnp.where(lost, jnp.nan, held[name][index]) for name in ("key", "value"))

    def fill(self, held, key, value, places):
        return super().fill(self.cleared(held, jnp.full_like(places, -1)), key, value, places)

    def of_a_row(self):
        return dataclasses.replace(self, pages=None)

    def reordered(self, held, rows):
        return held | {"table": held["table"][rows]}

    def replaced(self, held, rows, other, places):
        held = held | {"table": held["table"].at[rows].set(-1)}
        of_rows = places[rows]
        new = self.take(other, None, of_rows)
        key, value = (jnp.zeros((len(places), *x.shape[1:]), x.dtype).at[rows].set(x) for x in new)
        mine = jnp.zeros(len(places), bool).at[rows].set(True)[:, None, None]
        return super().fill(held, key, value, jnp.where(mine, places, -1))

    def cleared(self, held, places):
        there = (places >= 0).any(-1).reshape(len(places), -1, self.size).any(-1)
        return held | {"table": jnp.where(there, held["table"], -1)}

    def _index(self, page: Int[Array, "b t g"], slots: Int[Array, "b t g"]) -> tuple[Array, ...]:
        """Returns where in a pool the slots of each head lie, or of all heads if they share them."""
        within = slots % self.size
        if slots.shape[-1] == 1:
            return page[..., 0], within[..., 0]
        return page, within, jnp.arange(slots.shape[-1])

    def owners(self, held: Any) -> Int[Array, " p"]:
        """Returns how many rows have each page of the pool in their table."""
        table, count = held["table"], len(held["key"])
        return jnp.zeros(count, jnp.int32).at[jnp.where(table < 0, count, table)].add(1, mode="drop")


@part
class Quantised(Storage):
    """Holds keys and values in a few bits, and the newest tokens as they are (KIVI, Liu et al., 2024).

        code = round((x − z) / Δ),   z = min x,   Δ = (max x − min x) / (2^bits − 1),   x̂ = code · Δ + z

    Minimum and maximum of a channel of keys are over a group of `group` slots, those of a value over a group of
    `group` channels of one token; |x − x̂| is at most Δ / 2. Keys are taken as they are written, which is turned under
    the key position `Absolute()`. Numbers z and Δ are float32: with groups of 64 they take one bit per number held.

    A prompt attends to itself as it is. Where nothing is evicted, a group of keys gets its final codes from the keys
    as they are. Where a token takes the slot of another one, its group is rounded again to the new range.

    Attributes:
        bits: 2, 4, 8 or 16.
        group: The number of slots, and of channels, that share z and Δ; at least 1.
        recent: The number of newest positions whose tokens are held as they are, at least `group`.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range.
    """

    bits: int = 4
    group: int = 64
    recent: int = 64

    exact: ClassVar[bool] = False
    rolls_back: ClassVar[bool] = False

    def __post_init__(self):
        for name in ("bits", "group", "recent"):
            check_static_int("Quantised", name, getattr(self, name), 1)
        if self.bits not in (2, 4, 8, 16):
            raise ValueError(f"Quantised: bits is {self.bits}: need 2, 4, 8 or 16")
        if self.recent < self.group:
            raise ValueError(
                f"Quantised: recent is {self.recent} and group {self.group}: need at least as many recent tokens, so "
                "that a group is rounded when all its tokens are there"
            )

    @property
    def unit(self):
        return self.group

    def start(self, batch, slots, key_shape, value_shape, dtype):
        together = max(1, 8 // self.bits)
        if slots % self.group:
            raise ValueError(f"slots is {slots}: need a multiple of the group of Quantised, {self.group}")
        if key_shape[1] % together or value_shape[1] % together:
            raise ValueError(
                f"keys have {key_shape[1]} channels and values {value_shape[1]}: need multiples of {together}, the "
                f"numbers of {self.bits} bits in a byte"
            )
        if value_shape[1] % self._together(value_shape[1]):
            raise ValueError(f"values have {value_shape[1]} channels: need a multiple of the group, {self.group}")
        whole = jnp.uint16 if self.bits == 16 else jnp.uint8
        groups = value_shape[1] // self._together(value_shape[1])
        recent = min(self.recent, slots)

        def ranges(*shape):
            return {"least": jnp.zeros((batch, *shape)), "step": jnp.zeros((batch, *shape))}

        def codes(heads, width):
            return jnp.zeros((batch, slots, heads, width // together), whole)

        return {
            "key": ranges(slots // self.group, *key_shape) | {"code": codes(*key_shape)},
            "value": ranges(slots, value_shape[0], groups) | {"code": codes(*value_shape)},
            "recent": {
                "key": jnp.zeros((batch, recent, *key_shape), dtype),
                "value": jnp.zeros((batch, recent, *value_shape), dtype),
                "positions": jnp.full((batch, recent, key_shape[0]), -1, jnp.int32),
            },
        }

    def write(self, held, slots, key, value, places):
        recent = held["recent"]
        dtype, capacity = recent["key"].dtype, places.shape[1]
        inside = jnp.minimum(slots, capacity - 1)
        positions = jnp.where(slots < capacity, take_slots(places, inside), -1)  # of the new tokens, [B, T, G]
        if slots.shape[1] == 1:
            page = jnp.broadcast_to(inside // self.group, (len(key), 1, places.shape[2]))
            of_page = page * self.group + jnp.arange(self.group)[:, None]  # [B, group, G]
            around, _ = self.take(held, of_page, places)
            is_new = of_page == slots
            around = jnp.where(is_new[..., None], key.astype(dtype), around)
            codes, least, step = self._encoded_keys(around, take_slots(places, of_page) >= 0)
            touched = (slots < capacity).any(1, keepdims=True)
            of_page = jnp.where(touched, of_page, capacity)
            page = jnp.where(touched, page, capacity)
            of_keys = {
                "code": write_slots(held["key"]["code"], of_page, codes),
                "least": write_slots(held["key"]["least"], page, least),
                "step": write_slots(held["key"]["step"], page, step),
            }
        else:
            around = write_slots(self.take(held, None, places)[0], slots, key)
            made = dict(zip(("code", "least", "step"), self._encoded_keys(around, places >= 0), strict=True))
            row, head = jnp.arange(len(key))[:, None, None], jnp.arange(places.shape[2])
            touched = jnp.zeros((len(key), capacity // self.group, places.shape[2]), bool)
            touched = touched.at[row, slots // self.group, head].set(True, mode="drop")[..., None]
            of_keys = {
                name: jnp.where(jnp.repeat(touched, self.group, 1) if name == "code" else touched, x, held["key"][name])
                for name, x in made.items()
            }
        codes, least, step = self._encoded_values(value.astype(dtype))
        made = {"code": codes, "least": least, "step": step}
        of_values = {name: write_slots(held["value"][name], slots, x) for name, x in made.items()}
        return {"key": of_keys, "value": of_values, "recent": self._with_recent(recent, positions, key, value)}

    def _with_recent(self, recent: Any, positions: Int[Array, "b t g"], key: Array, value: Array) -> Any:
        """Returns the newest tokens, each in the place of its position modulo their number."""
        count, heads = recent["positions"].shape[1:]
        by_head = jnp.broadcast_to(positions, (*positions.shape[:2], heads))
        last = jnp.maximum(recent["positions"].max(1, keepdims=True), by_head.max(1, keepdims=True))
        ring = jnp.where((by_head >= 0) & (by_head > last - count), by_head % count, count)
        shared = ring[..., :1] if positions.shape[-1] == 1 else ring
        return {
            "key": write_slots(recent["key"], shared, key),
            "value": write_slots(recent["value"], shared, value),
            "positions": write_slots(recent["positions"], ring, by_head),
        }

    def take(self, held, slots, places):
        of_keys, of_values, recent = held["key"], held["value"], held["recent"]
        if slots is None:  # a group at a time, so that the ranges are not repeated for each slot
            codes = of_keys["code"]
            grouped = codes.reshape(len(codes), -1, self.group, *codes.shape[2:])
            of_keys = {"code": grouped} | {name: of_keys[name][:, :, None] for name in ("least", "step")}
        else:
            places = take_slots(places, slots)
            of_keys = {name: take_slots(x, slots if name == "code" else slots // self.group)
                       for name, x in of_keys.items()}  # fmt: skip
            of_values = {name: take_slots(x, slots) for name, x in of_values.items()}
        key = self._decoded(of_keys["code"], of_keys)
        key = key.reshape(len(key), -1, *key.shape[-2:])
        codes, groups = of_values["code"], of_values["least"].shape[-1]
        grouped = codes.reshape(*codes.shape[:-1], groups, codes.shape[-1] // max(groups, 1))
        value = self._decoded(grouped, {name: of_values[name][..., None] for name in ("least", "step")})
        value = value.reshape(*value.shape[:-2], recent["value"].shape[-1])
        count, (length, heads) = recent["positions"].shape[1], places.shape[1:]
        last = recent["positions"].max(1, keepdims=True)[..., :heads]
        ring = jnp.where(places < 0, 0, places % count)
        newest = (take_slots(recent["positions"][..., :heads], ring) == places) & (places > last - count)
        # Where each of the recent tokens lies among those that are taken: nowhere, or in one place.
        index = jnp.broadcast_to(jnp.arange(length)[:, None], places.shape)
        lies = write_slots(jnp.full((len(key), count, heads), length), jnp.where(newest, ring, count), index)
        dtype = recent["key"].dtype
        return tuple(
            write_slots(x.astype(dtype), lies, as_they_are)
            for x, as_they_are in ((key, recent["key"]), (value, recent["value"]))
        )

    def _together(self, width: int) -> int:
        """Returns how many of so many channels of a value share a range; values may have none, as latents do."""
        return max(1, min(self.group, width))

    def _encoded_keys(self, key: Array, there: Array) -> tuple[Array, Array, Array]:
        """Returns (codes, least, step) of keys [B, S, K, H], of which `there` [B, S, G] are tokens."""
        grouped, there = (x.reshape(len(x), -1, self.group, *x.shape[2:]) for x in (key.astype(jnp.float32), there))
        there = there[..., None]
        least = jnp.where(there, grouped, jnp.inf).min(2)
        most = jnp.where(there, grouped, -jnp.inf).max(2)
        some = there.any(2)
        least, most = jnp.where(some, least, 0), jnp.where(some, most, 0)
        codes, step = self._codes(grouped, least[:, :, None], most[:, :, None])
        return self._packed(codes.reshape(key.shape)), least, step[:, :, 0]

    def _encoded_values(self, value: Array) -> tuple[Array, Array, Array]:
        """Returns (codes, least, step) of values [B, S, K, V]."""
        width = value.shape[-1]
        together = self._together(width)
        grouped = value.astype(jnp.float32).reshape(*value.shape[:-1], width // together, together)
        least, most = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
        codes, step = self._codes(grouped, least, most)
        return self._packed(codes.reshape(value.shape)), least[..., 0], step[..., 0]

    def _codes(self, x: Array, least: Array, most: Array) -> tuple[Array, Array]:
        levels = 2**self.bits - 1
        step = (most - least) / levels
        codes = jnp.round((x - least) / jnp.where(step > 0, step, 1))
        return jnp.clip(codes, 0, levels), step

    def _packed(self, codes: Float[Array, "*b c"]) -> Array:
        """Returns whole numbers below 2^bits side by side in bytes; in 16 bits each by itself."""
        if self.bits == 16:
            return codes.astype(jnp.uint16)
        together = 8 // self.bits
        parts = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // together, together)
        return (parts << (self.bits * jnp.arange(together, dtype=jnp.uint8))).sum(-1, dtype=jnp.uint8)

    def _decoded(self, codes: Array, ranges: dict[str, Array]) -> Float[Array, "*b c"]:
        """Returns the numbers of which these are the codes."""
        if self.bits == 16:
            whole = codes
        else:
            together = 8 // self.bits
            parts = codes[..., None] >> (self.bits * jnp.arange(together, dtype=jnp.uint8))
            whole = (parts & (2**self.bits - 1)).reshape(*codes.shape[:-1], codes.shape[-1] * together)
        return whole.astype(jnp.float32) * ranges["step"] + ranges["least"]
