"""The store of attention: keys and values of earlier tokens, and which of them are kept, chosen and measured.

A store has static shapes, is a pytree, and has no length: positions say which slots hold a token (−1 is empty). Every
call of a layer uses three verbs in this order: `append`, `read` and `observe`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.cache.key_position import Absolute, KeyPosition
from jaxattn.cache.retain import Everything, Retain
from jaxattn.cache.select import Select, chosen
from jaxattn.core.attend.mask import Mask
from jaxattn.core.part import part

BY_ROW = ("key", "value", "positions", "last", "statistics", "summary", "past", "fresh")  # fields with a batch axis


class Held(NamedTuple):
    """Keys and values that a query attends to.

    Attributes:
        key: [B, S, K, H].
        value: [B, S, K, V].
        positions: [B, S, 1 or K], where they stand.
        slots: The slots that they are in, or None.
    """

    key: Float[Array, "b s k h"]
    value: Float[Array, "b s k v"]
    positions: Int[Array, "b s g"]
    slots: Int[Array, "b s g"] | None = None


@part
class Store:
    """Keys and values in C slots.

    Attributes:
        key: [B, C, K, H].
        value: [B, C, Kv, V].
        positions: [B, C, 1] of the tokens in the slots, or [B, C, K] where key heads keep different ones; −1: empty.
        last: [B], the position of the newest token so far; −1 before any.
        retain: The policy that says which tokens are kept when the slots are full.
        statistics: The statistics of `retain` on each slot, by name.
        select: The policy that says which pages a single query reads; None for all.
        summary: The summary of each page that `select` uses.
        budget: The number of slots that may be filled, one number or one per key head [K]; None for all C.
        past: The earlier tokens that a convolution before the keys sees.
        fresh: Tokens that came together, until they were attended to.
        span: The number of positions that the store is for, and that records of weights cover.
        key_position: The policy that says where keys and queries stand for a rotary position. Keys are held as they are
            turned at those places, or where it turns them when they are read, unturned.
    """

    key: Float[Array, "b c k h"]
    value: Float[Array, "b c k v"]
    positions: Int[Array, "b c g"]
    last: Int[Array, " b"]
    retain: Retain = Everything()
    statistics: Any = dataclasses.field(default_factory=dict)
    select: Select | None = None
    summary: Any = None
    budget: Int[Array, "..."] | None = None
    past: Any = dataclasses.field(default_factory=dict)
    fresh: Any = None
    span: int = 0
    key_position: KeyPosition = Absolute()

    def append(
        self, key: Float[Array, "b t k h"], value: Float[Array, "b t k v"], positions: Int[Array, "b t"]
    ) -> "Store":
        """Returns the store with new tokens; those at position −1 are not kept.

        A single token takes a free slot or that of the token that is worth least. Several stand beside the slots until
        `observe`, so that queries can attend to all of them and to all that is held. If nothing is ever evicted, each
        token takes the slot of its position, and a token at a position beyond the capacity takes none: `unseen` says
        for which tokens that matters.
        """
        positions = positions.astype(jnp.int32)
        key, value = key.astype(self.key.dtype), value.astype(self.value.dtype)
        new = dataclasses.replace(self, last=jnp.maximum(self.last, positions.max(-1)))
        if not self.retain.evicts:
            check_room(self, positions)
            return new._written(jnp.where(positions < 0, self.positions.shape[1], positions)[..., None], key, value,
                                positions[..., None])  # fmt: skip
        if positions.shape[1] > 1:
            return new.beside(key, value, positions)
        return new._written(new._free(positions), key, value, positions[..., None])

    def beside(
        self, key: Float[Array, "b t k h"], value: Float[Array, "b t k v"], positions: Int[Array, "b t"]
    ) -> "Store":
        """Returns the store with new tokens beside its slots: `read` shows them, and nothing else has changed."""
        fresh = Held(key.astype(self.key.dtype), value.astype(self.value.dtype), positions[..., None].astype(jnp.int32))
        return dataclasses.replace(self, fresh=fresh)

    def joined(self, chosen: Bool[Array, "b t"]) -> "Store":
        """Returns the store after some of the tokens beside it were appended; the others are gone."""
        positions = jnp.where(chosen, self.fresh.positions[..., 0], -1)
        return dataclasses.replace(self, fresh=None).append(self.fresh.key, self.fresh.value, positions)

    def _free(self, positions: Int[Array, "b 1"]) -> Int[Array, "b 1 g"]:
        """Returns the slot for a single token: an empty one, or that of the least worth; C for padding."""
        worth, filled = self._worth(self.positions, self.statistics), self.positions >= 0
        if self.budget is not None:
            full = filled.sum(1, keepdims=True) >= self.budget
            worth = jnp.where(~filled & full, jnp.inf, worth)
        least = worth == worth.min(1, keepdims=True)
        oldest = jnp.where(least, self.positions, np.iinfo(np.int32).max).argmin(1, keepdims=True)
        return jnp.where(positions[..., None] < 0, self.positions.shape[1], oldest)

    def _worth(self, positions: Int[Array, "b c g"], statistics: Any) -> Float[Array, "b c g"]:
        """Returns the worth of the slots; −inf for empty ones."""
        worth = self.retain.keep(positions, statistics, self.last[:, None, None])
        return jnp.where(positions < 0, -jnp.inf, worth)

    def _written(self, slots: Int[Array, "b t g"], key: Array, value: Array, positions: Int[Array, "b t 1"]) -> "Store":
        """Returns the store with tokens in these slots."""
        at = jnp.arange(len(key))[:, None, None], slots, jnp.arange(slots.shape[-1])
        of_heads: Any = at if slots.shape[-1] > 1 else (at[0][..., 0], slots[..., 0])  # one slot for all heads
        pairs = (self.key, key), (self.value, value)
        new_key, new_value = (held.at[of_heads].set(x, mode="drop") for held, x in pairs)
        start = self.retain.start(self.positions.shape)
        statistics = {
            name: held.at[at].set(jnp.broadcast_to(start[name], held.shape)[:, :1], mode="drop")
            for name, held in self.statistics.items()
        }
        places = self.positions.at[at].set(jnp.broadcast_to(positions, slots.shape), mode="drop")
        new = dataclasses.replace(self, key=new_key, value=new_value, positions=places, statistics=statistics)
        return new if self.select is None else new._summarised(slots if slots.shape[1] == 1 else None)

    def _summarised(self, slots: Int[Array, "b 1 g"] | None) -> "Store":
        """Returns the store with the summary of the page of these slots made anew, or of all pages."""
        select: Any = self.select
        key, there = (_pages(x, select.size) for x in (self.key, self.positions >= 0))
        there = jnp.broadcast_to(there, key.shape[:-1])
        if slots is None:
            return dataclasses.replace(self, summary=select.summarise(key, there))
        page = jnp.minimum(slots // select.size, key.shape[1] - 1)  # [B, 1, G]
        page = jnp.broadcast_to(page, (*page.shape[:2], key.shape[3]))
        of_key = jnp.take_along_axis(key, page[:, :, None, :, None], 1)
        of_there = jnp.take_along_axis(there, page[:, :, None], 1)
        row, head = jnp.arange(len(key))[:, None, None], jnp.arange(key.shape[3])
        made = select.summarise(of_key, of_there)
        return dataclasses.replace(
            self, summary=jax.tree.map(lambda all_, x: all_.at[row, page, head].set(x), self.summary, made)
        )

    def read(self, query: Float[Array, "b t n h"]) -> Held:
        """Returns the keys and values that these queries attend to.

        These are all that is held and the fresh tokens, or of single queries the chosen pages.
        """
        if self.fresh is not None:
            fresh = self.fresh.positions
            fresh = jnp.broadcast_to(fresh, (*fresh.shape[:2], self.positions.shape[-1]))
            pairs = (self.key, self.fresh.key), (self.value, self.fresh.value), (self.positions, fresh)
            key, value, positions = (jnp.concatenate(pair, 1) for pair in pairs)
            return Held(key, value, positions)
        if self.select is None or query.shape[1] > 1 or self.key.shape[1] <= self.select.pages * self.select.size:
            return Held(self.key, self.value, self.positions)
        size, heads = self.select.size, self.key.shape[2]
        scores = self.select.score(query[:, 0].reshape(len(query), heads, -1, query.shape[-1]), self.summary)
        pages = chosen(scores, self.select.pages, _pages(self.positions, size))  # [B, P, K]
        slots = (pages[:, :, None] * size + jnp.arange(size)[:, None]).reshape(len(query), -1, heads)
        key, value, positions = (_take(x, slots) for x in (self.key, self.value, self.positions))
        return Held(key, value, positions, slots)

    def rolled_back(self, last: Int[Array, "#b"]) -> "Store":
        """Returns the store without the tokens behind position `last` [1 or B], as if they had not been appended.

        Raises:
            ValueError: The policy evicts, since the token that an evicted one made room for cannot be brought back; or
                the store holds the past of a convolution, which is that of the newest tokens alone.
        """
        if self.retain.evicts or self.past:
            why = (
                "holds the past of a convolution" if self.past else f"has evicted tokens ({type(self.retain).__name__})"
            )
            raise ValueError(f"the store {why}, which cannot be brought back: need a store that keeps everything")
        last = jnp.minimum(self.last, last)
        positions = jnp.where(self.positions > last[:, None, None], -1, self.positions)
        new = dataclasses.replace(self, positions=positions, last=last)
        return new if self.select is None else new._summarised(None)

    def reordered(self, rows: Int[Array, " r"]) -> "Store":
        """Returns the store whose row i is row rows[i] of this one."""
        return dataclasses.replace(
            self, **{name: jax.tree.map(lambda x: x[rows], getattr(self, name)) for name in BY_ROW}
        )

    def replaced(self, rows: Int[Array, " r"], other: "Store") -> "Store":
        """Returns the store with these rows taken by the rows of another of the same policy and capacity."""
        fields = {name: (getattr(self, name), getattr(other, name)) for name in BY_ROW}
        put = {name: jax.tree.map(lambda x, new: x.at[rows].set(new), *pair) for name, pair in fields.items()}
        return dataclasses.replace(self, **put)

    def observe(self, measured: Mapping[str, Float[Array, "b s k"]], seen: Held) -> "Store":
        """Returns the store after the queries have attended to the result of `read`.

        Statistics are updated, and tokens that do not fit are cut.
        """
        if self.fresh is None:
            statistics = self.statistics
            if seen.slots is None:
                statistics = self.retain.observe(statistics, measured)
            elif statistics:
                row, head = jnp.arange(len(self.key))[:, None, None], jnp.arange(seen.slots.shape[-1])
                of_seen = self.retain.observe({name: _take(x, seen.slots) for name, x in statistics.items()}, measured)
                statistics = {name: x.at[row, seen.slots, head].set(of_seen[name]) for name, x in statistics.items()}
            return dataclasses.replace(self, statistics=statistics)
        count, capacity = seen.positions.shape[1] - self.positions.shape[1], self.positions.shape[1]
        beside = self.retain.start((*seen.positions.shape[:1], count, seen.positions.shape[2]))
        statistics = {name: jnp.concatenate([x, beside[name]], 1) for name, x in self.statistics.items()}
        statistics = self.retain.observe(statistics, measured)
        worth = self._worth(seen.positions, statistics)
        order = jnp.lexsort((-seen.positions, -worth), axis=1)[:, :capacity]
        positions = jnp.take_along_axis(seen.positions, order, 1)
        if self.budget is not None:
            positions = jnp.where(jnp.arange(capacity)[:, None] < self.budget, positions, -1)
        by_place = jnp.where(positions < 0, np.iinfo(np.int32).max, positions).argsort(1)
        order, positions = (jnp.take_along_axis(x, by_place, 1) for x in (order, positions))
        new = dataclasses.replace(
            self,
            key=_take(seen.key, order),
            value=_take(seen.value, order),
            positions=positions,
            statistics={name: _take(x, order) for name, x in statistics.items()},
            fresh=None,
        )
        return new if self.select is None else new._summarised(None)


def _take(x: Array, slots: Int[Array, "b s g"]) -> Array:
    """Returns x [B, C, 1 or K, ...] at the slots of each head."""
    heads = max(x.shape[2], slots.shape[2])
    index = jnp.broadcast_to(slots, (*slots.shape[:2], heads)).reshape(*slots.shape[:2], heads, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(jnp.broadcast_to(x, (*x.shape[:2], heads, *x.shape[3:])), index, 1)


def _pages(x: Array, size: int) -> Array:
    """Cuts x [B, C, ...] in pages, [B, P, size, ...]."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


@part
class Policy:
    """How a store keeps and chooses tokens. Its arrays can change without another program.

    Attributes:
        retain: The policy that says which tokens are kept when the slots are full.
        slots: C, the number of slots; by default one for each position.
        select: The policy that says which pages a single query reads.
        budget: The number of slots that may be filled, one number or one per key head.
        key_position: The policy that says where keys and queries stand for a rotary position.
    """

    retain: Retain = Everything()
    slots: int | None = None
    select: Select | None = None
    budget: Int[Array, "..."] | None = None
    key_position: KeyPosition = Absolute()


def empty(
    batch: int,
    capacity: int,
    key_shape: tuple[int, int],
    value_shape: tuple[int, int],
    dtype: Any,
    policy: Policy | None = None,
) -> Store:
    """Makes a store without tokens, for positions below `capacity`.

    Args:
        batch: B.
        capacity: The number of positions.
        key_shape: (heads, head dim) of keys.
        value_shape: (heads, head dim) of values.
        dtype: The dtype of keys and values.
        policy: How the store keeps and chooses tokens.

    Raises:
        ValueError: A size is below 1, the policy cannot work with the slots, or a budget does not fit.
    """
    if min(batch, capacity) < 1:
        raise ValueError(f"batch and capacity must be at least 1, got {batch} and {capacity}")
    policy = Policy() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(f"store must be a policy such as Policy(Recent(4), slots=64), got {policy!r}")
    retain, select, budget = policy.retain, policy.select, policy.budget
    slots = capacity if policy.slots is None else policy.slots
    if slots < 1 or (not retain.evicts and slots != capacity):
        kind = type(retain).__name__
        raise ValueError(f"slots is {slots}: need at least 1, and under {kind} the capacity, {capacity}")
    room = slots if budget is None or isinstance(budget, jax.core.Tracer) else int(np.min(np.asarray(budget)))
    if not isinstance(retain.least, jax.core.Tracer) and retain.evicts and room <= int(retain.least):
        raise ValueError(
            f"{type(retain).__name__} never evicts {int(retain.least)} tokens, but there is room for {room}: need more "
            "slots, or a larger budget"
        )
    if budget is not None:
        if not retain.evicts:
            raise ValueError(f"budget is given, but {type(retain).__name__} keeps all tokens: need None")
        if jnp.shape(budget) not in ((), (key_shape[0],)) or room < 1:
            raise ValueError(f"budget has shape {jnp.shape(budget)}: need () or ({key_shape[0]},), numbers from 1 on")
        budget = jnp.asarray(budget)
    by_head = retain.by_head or (budget is not None and budget.ndim == 1)
    if by_head and key_shape[0] != value_shape[0]:
        raise ValueError(f"keys have {key_shape[0]} heads and values {value_shape[0]}: to evict by head need the same")
    retain = jax.tree.map(jnp.asarray, retain)  # so that another number is not another program
    if select is not None and select.needs_turned and not policy.key_position.at_write:
        raise ValueError(
            f"select is {type(select).__name__}, which bounds scores by keys as they are written, but key_position is "
            f"{type(policy.key_position).__name__}, which turns them when they are read: need Absolute()"
        )
    if select is not None and slots % select.size:
        raise ValueError(f"slots is {slots}: need a multiple of the page size, {select.size}")
    positions = jnp.full((batch, slots, key_shape[0] if by_head else 1), -1, jnp.int32)
    store = Store(
        jnp.zeros((batch, slots, *key_shape), dtype),
        jnp.zeros((batch, slots, *value_shape), dtype),
        positions,
        jnp.full(batch, -1, jnp.int32),
        retain,
        retain.start(positions.shape),
        select,
        budget=budget,
        span=capacity,
        key_position=policy.key_position,
    )
    return store if select is None else store._summarised(None)


def check_room(state: Any, positions: Int[Array, "#b t"]) -> None:
    """Raises ValueError if the state of attention, or one of a tuple of them, has no slot for one of the positions.

    Positions that are traced, stores that evict, and states of other mixers are not checked.
    """
    if isinstance(state, tuple):
        for each in state:
            check_room(each, positions)
    if not isinstance(state, Store) or state.retain.evicts or isinstance(positions, jax.core.Tracer):
        return
    last, capacity = int(np.max(np.asarray(positions), initial=-1)), state.positions.shape[-2]
    if last >= capacity:
        raise ValueError(
            f"positions reaches {last} but the state has capacity {capacity}: need at most {capacity - 1}, or a state "
            "for more tokens"
        )


def unseen(store: Store, positions: Int[Array, "b t"], mask: Mask | None) -> Bool[Array, "b t"]:
    """Returns which of these tokens may see one of them for which the store has no slot, itself included.

    A token has no slot if it is at a position beyond the capacity and nothing is evicted. Under masks without a bound
    on the keys that they show, all tokens of the row may see it.
    """
    if store.retain.evicts:
        return jnp.zeros(positions.shape, bool)
    lost = positions >= store.positions.shape[1]
    possible: Any = True
    if mask is not None:
        of_lost = jnp.where(lost, positions, -1)
        possible, _ = mask.bounds(positions[:, None, :, None, None], of_lost[:, None, None, None, :])
    possible = jnp.broadcast_to(
        possible, np.broadcast_shapes(np.shape(possible), (len(positions), 1, *positions.shape[1:], 1))
    )
    return lost | (lost.any(-1, keepdims=True) & possible.any((1, 3)))


def by_position(
    x: Float[Array, "b n t c"], positions: Int[Array, "b c g"], span: int, fill: float
) -> Float[Array, "b n t p"]:
    """Returns an array of one number per slot by the slots' positions instead; `fill` at positions that no slot holds.

    A row that holds a position beyond the span is NaN.
    """
    places = jnp.repeat(positions, x.shape[1] // positions.shape[-1], -1).swapaxes(1, 2)  # [B, N, C]

    def of_head(x: Float[Array, "t c"], positions: Int[Array, " c"]) -> Float[Array, "t p"]:
        places = jnp.where(positions < 0, span, positions)
        placed = jnp.full((*x.shape[:-1], span), fill, x.dtype).at[..., places].set(x, mode="drop")
        return jnp.where((positions >= span).any(), jnp.nan, placed)

    return jax.vmap(jax.vmap(of_head))(x, places)
