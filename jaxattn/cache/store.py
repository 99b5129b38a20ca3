"""The store of attention: keys and values of earlier tokens, and which of them are kept, chosen and measured.

A store has static shapes, is a pytree, and has no length: positions say which slots hold a token (−1 is empty). Every
call of a layer uses three verbs in this order: `append`, `read` and `observe`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.cache.key_position import Absolute, KeyPosition
from jaxattn.cache.retain import Attended, Everything, Retain
from jaxattn.cache.select import Remembered, Select, Sizes, Step, chosen, paged
from jaxattn.cache.storage import Dense, Storage, take_slots, write_slots
from jaxattn.core.attend.mask import Mask
from jaxattn.core.attend.measure import Measure
from jaxattn.core.part import part

# The fields with a batch axis, beside `held`.
BY_ROW = ("positions", "last", "statistics", "summary", "remembered", "past", "fresh")


class Held(NamedTuple):
    """Keys and values that a query attends to.

    Attributes:
        key: [B, S, K, H].
        value: [B, S, K, V].
        positions: [B, S, 1 or K], where they stand.
        slots: The slots that they are in, or None.
        query: [B, T, N, H], the queries that read them, if the policy that chose them looks back at them; else None.
        asked: [B, T], the positions of these queries, likewise.
        whole: Which rows, or key heads, read all slots, [B, 1 or K]; None for all.
        facts: What the layer gave of tokens beside a store, by name.
    """

    key: Float[Array, "b s k h"]
    value: Float[Array, "b s k v"]
    positions: Int[Array, "b s g"]
    slots: Int[Array, "b s g"] | None = None
    query: Float[Array, "b t n h"] | None = None
    asked: Int[Array, "b t"] | None = None
    whole: Bool[Array, "b g"] | None = None
    facts: Any = None


@part
class Store:
    """Keys and values in C slots.

    Attributes:
        held: Keys and values, as `storage` holds them.
        positions: [B, C, 1] of the tokens in the slots, or [B, C, K] where key heads keep different ones; −1: empty.
        last: [B], the position of the newest token so far; −1 before any.
        retain: The policy that says which tokens are kept when the slots are full.
        statistics: The statistics of `retain` on each slot, by name.
        select: The policy that says which pages a single query reads; None for all.
        summary: The summary of each page that `select` uses.
        remembered: What `select` remembers of earlier steps.
        budget: The number of slots that may be filled, one number or one per key head [K]; None for all C.
        past: The earlier tokens that a convolution before the keys sees.
        fresh: Tokens that came together, until they were attended to.
        span: The number of positions that the store is for, and that records of weights cover.
        queries: The number of query heads that read the key heads.
        storage: The way in which keys and values lie in memory.
        key_position: The policy that says where keys and queries stand for a rotary position. Keys are held as they are
            turned at those places, or where it turns them when they are read, unturned.
    """

    held: Any
    positions: Int[Array, "b c g"]
    last: Int[Array, " b"]
    storage: Storage = Dense()
    retain: Retain = Everything()
    statistics: Any = dataclasses.field(default_factory=dict)
    select: Select | None = None
    summary: Any = None
    remembered: Remembered = dataclasses.field(default_factory=lambda: Remembered({}, {}))
    budget: Int[Array, "..."] | None = None
    past: Any = dataclasses.field(default_factory=dict)
    fresh: Any = None
    span: int = 0
    queries: int = 0
    key_position: KeyPosition = Absolute()

    @property
    def dtype(self) -> Any:
        """The dtype in which keys and values are read."""
        return jax.eval_shape(lambda: self.key).dtype

    @property
    def key(self) -> Float[Array, "b c k h"]:
        """The keys in all slots, as they are read; those of empty slots may be anything."""
        return self.storage.take(self.held, None, self.positions)[0]

    @property
    def value(self) -> Float[Array, "b c k v"]:
        """The values in all slots, as they are read; those of empty slots may be anything."""
        return self.storage.take(self.held, None, self.positions)[1]

    def append(
        self,
        key: Float[Array, "b t k h"],
        value: Float[Array, "b t k v"],
        positions: Int[Array, "b t"],
        facts: Mapping[str, Array] | None = None,
    ) -> "Store":
        """Returns the store with new tokens; those at position −1 are not kept.

        A single token takes a free slot or that of the token that is worth least. Several stand beside the slots until
        `observe`, so that queries can attend to all of them as they are, and to all that is held. If nothing is ever
        evicted, each token takes the slot of its position, and a token at a position beyond the capacity takes none:
        `unseen` says for which tokens that matters.

        Args:
            key: [B, T, K, H].
            value: [B, T, K, V].
            positions: [B, T].
            facts: What the policy cannot know of the tokens, [B, T, K, ...] each: the statistics that `Retain.facts`
                names begin with them. Others are not looked at.

        Raises:
            ValueError: A fact is missing, or a position that is known has no slot.
        """
        facts = {name: x for name, x in (facts or {}).items() if name in self.retain.facts}
        if missing := sorted(set(self.retain.facts) - set(facts)):
            raise ValueError(
                f"facts lacks {missing}, by which {type(self.retain).__name__} keeps tokens: need a layer that gives "
                "them, such as MultiHeadAttention(types=Spec(TokenTypes)), or another policy"
            )
        positions = positions.astype(jnp.int32)
        key, value = key.astype(self.dtype), value.astype(self.dtype)
        new = dataclasses.replace(self, last=jnp.maximum(self.last, positions.max(-1)))
        if self.retain.evicts:
            # What is worth nothing to the first of the tokens is worth nothing to all of them.
            first = jnp.where(positions < 0, new.last[:, None], positions).min(-1)
            worth = self._worth(self.positions, self.statistics, jnp.maximum(self.last, first))
            new = dataclasses.replace(new, positions=jnp.where(worth == -jnp.inf, -1, self.positions))
        else:
            check_room(self, positions)
        if positions.shape[1] > 1 and (self.retain.evicts or not self.storage.exact):
            return new.beside(key, value, positions, facts)
        slots = new._free(positions) if self.retain.evicts else self._own_slots(positions)
        return new._written(slots, key, value, positions[..., None], facts)

    def measures(self, queries: int = 1) -> Mapping[str, Measure]:
        """Returns the measures of attention that `observe` needs, of what so many queries `read`.

        Those of `select` are named "select.*".
        """
        own = {} if self.select is None else self.select.measures(self.last, queries)
        return {**self.retain.measures(self.last, queries), **{f"select.{name}": x for name, x in own.items()}}

    def _own_slots(self, positions: Int[Array, "b t"]) -> Int[Array, "b t 1"]:
        """Returns the slots of tokens that each have the slot of their position; C for padding, and beyond the span."""
        return jnp.where((positions < 0) | (positions >= self.span), self.positions.shape[1], positions)[..., None]

    def beside(
        self,
        key: Float[Array, "b t k h"],
        value: Float[Array, "b t k v"],
        positions: Int[Array, "b t"],
        facts: Mapping[str, Array] | None = None,
    ) -> "Store":
        """Returns the store with new tokens beside its slots: `read` shows them, and nothing else has changed."""
        places = positions[..., None].astype(jnp.int32)
        fresh = Held(key.astype(self.dtype), value.astype(self.dtype), places, facts=dict(facts or {}))
        return dataclasses.replace(self, fresh=fresh)

    @property
    def all_statistics(self) -> dict[str, Array]:
        """The statistics of the slots, and behind them those with which fresh tokens begin, [B, S, 1 or K, ...]."""
        if self.fresh is None:
            return self.statistics
        start = self.retain.start((*self.fresh.positions.shape[:2], self.positions.shape[2])) | self.fresh.facts
        return {name: jnp.concatenate([x, start[name].astype(x.dtype)], 1) for name, x in self.statistics.items()}

    def joined(self, chosen: Bool[Array, "b t"]) -> "Store":
        """Returns the store after some of the tokens beside it were appended; the others are gone.

        Raises:
            ValueError: The policy looks at attention, and what queries of the other tokens saw cannot be taken out.
        """
        if self.measures() or self._remembers:
            kind = type(self.retain if self.retain.measures(self.last, 1) else self.select).__name__
            raise ValueError(
                f"the store keeps or reads tokens by the attention that they get ({kind}), and that of nodes which are "
                "gone counts no more: need a policy that does not look at attention"
            )
        positions = jnp.where(chosen, self.fresh.positions[..., 0], -1)
        fresh = self.fresh
        new = dataclasses.replace(self, fresh=None).append(fresh.key, fresh.value, positions, fresh.facts)
        return new if new.fresh is None else new.observe({}, new.read(new.fresh.key))

    def _free(self, positions: Int[Array, "b 1"]) -> Int[Array, "b 1 g"]:
        """Returns the slot for a single token: an empty one, or that of the least worth; C for padding."""
        worth, filled = self._worth(self.positions, self.statistics, self.last), self.positions >= 0
        if self.budget is not None:
            full = filled.sum(1, keepdims=True) >= self.budget
            worth = jnp.where(~filled & full, jnp.inf, worth)
        least = worth == worth.min(1, keepdims=True)
        oldest = jnp.where(least, self.positions, np.iinfo(np.int32).max).argmin(1, keepdims=True)
        return jnp.where(positions[..., None] < 0, self.positions.shape[1], oldest)

    def _worth(self, positions: Int[Array, "b c g"], statistics: Any, now: Int[Array, " b"]) -> Float[Array, "b c g"]:
        """Returns the worth of the slots; −inf for empty ones."""
        worth = self.retain.keep(positions, statistics, now[:, None, None])
        return jnp.where(positions < 0, -jnp.inf, worth)

    def _written(
        self, slots: Int[Array, "b t g"], key: Array, value: Array, positions: Int[Array, "b t 1"], facts: Any = None
    ) -> "Store":
        """Returns the store with tokens in these slots."""
        facts = facts or {}
        start = self.retain.start(self.positions.shape)
        by_slot = (*slots.shape[:2], self.positions.shape[2])

        def anew(name: str, held: Array) -> Array:
            return jnp.broadcast_to(facts.get(name, start[name][:, :1]), (*by_slot, *held.shape[3:]))

        statistics = {name: write_slots(held, slots, anew(name, held)) for name, held in self.statistics.items()}
        places = write_slots(self.positions, slots, jnp.broadcast_to(positions, by_slot))
        held = self.storage.write(self.held, slots, key, value, places)
        new = dataclasses.replace(self, held=held, positions=places, statistics=statistics)
        if self.select is None:
            return new
        marks, rows = self.remembered
        if marks:
            begin = self.select.start(self._sizes._replace(slots=slots.shape[1])).slots
            marks = {name: write_slots(x, slots, begin[name]) for name, x in marks.items()}
        new = dataclasses.replace(new, remembered=Remembered(marks, rows))
        return new._summarised(slots if slots.shape[1] == 1 else None)

    @property
    def _sizes(self) -> Sizes:
        """The sizes that a `Select` is told."""
        batch, slots, heads, width = jax.eval_shape(lambda: self.key).shape
        return Sizes(batch, slots, heads, width, self.queries)

    @property
    def _remembers(self) -> bool:
        """Whether the policy of what is read looks back at earlier steps."""
        return bool(self.remembered.slots or self.remembered.rows)

    def _summarised(self, slots: Int[Array, "b 1 g"] | None) -> "Store":
        """Returns the store with the summary of the page of these slots made anew, or of all pages."""
        select: Any = self.select
        if slots is None:
            key, there = (paged(x, select.size) for x in (self.key, self.positions >= 0))
            return dataclasses.replace(self, summary=select.summarise(key, jnp.broadcast_to(there, key.shape[:-1])))
        page = jnp.minimum(slots // select.size, self.positions.shape[1] // select.size - 1)
        of_page = page * select.size + jnp.arange(select.size)[:, None]  # [B, size, G]
        key, _ = self.storage.take(self.held, of_page, self.positions)
        there = jnp.broadcast_to(take_slots(self.positions, of_page) >= 0, key.shape[:-1])
        made = select.summarise(key[:, None], there[:, None])
        return dataclasses.replace(
            self, summary=jax.tree.map(lambda all_, x: write_slots(all_, page, x), self.summary, made)
        )

    def whole(self, query: Float[Array, "b t n h"], asked: Int[Array, "b t"]) -> Bool[Array, "b g"] | None:
        """Returns which rows, or key heads, read all slots in this step; None if that is not a question of the step.

        Args:
            query: The queries, as they meet the keys.
            asked: Their positions; −1: none.
        """
        if not self._chooses(query):
            return None
        found = self.select.whole(self._by_group(query), self)  # type: ignore[union-attr]
        return None if found is None else found & (asked >= 0)

    def read(
        self,
        query: Float[Array, "b t n h"],
        asked: Int[Array, "b t"] | None = None,
        whole: Bool[Array, "b g"] | None = None,
    ) -> Held:
        """Returns the keys and values that these queries attend to.

        These are all that is held and the fresh tokens, or of single queries the chosen pages.

        Args:
            query: The queries, as they meet the keys.
            asked: Their positions; −1: none. A store whose policy looks back at earlier steps needs them.
            whole: Which rows, or key heads, see all slots. All slots are read then, and the others see the chosen ones.
        """
        back: dict[str, Any] = {"query": query, "asked": asked} if self._remembers else {}
        if self.fresh is not None:
            fresh = self.fresh.positions
            fresh = jnp.broadcast_to(fresh, (*fresh.shape[:2], self.positions.shape[-1]))
            held = *self.storage.take(self.held, None, self.positions), self.positions
            beside = self.fresh.key, self.fresh.value, fresh
            return Held(*(jnp.concatenate(pair, 1) for pair in zip(held, beside, strict=True)), **back)
        if not self._chooses(query) or (whole is not None and whole.size == 1):
            return Held(*self.storage.take(self.held, None, self.positions), self.positions, **back)
        slots = self.few(self._by_group(query))
        if whole is not None:
            shown = jnp.broadcast_to(whole[:, None], (*self.positions.shape[:2], slots.shape[-1]))
            shown = write_slots(shown, slots, jnp.ones(slots.shape, bool))
            positions = jnp.where(shown, self.positions, -1)
            return Held(*self.storage.take(self.held, None, self.positions), positions, **back, whole=whole)
        if back:
            back["whole"] = jnp.zeros((len(query), 1), bool)
        positions = take_slots(self.positions, slots)
        return Held(*self.storage.take(self.held, slots, self.positions), positions, slots, **back)

    def few(self, query: Float[Array, "b k g h"]) -> Int[Array, "b s k"]:
        """Returns the slots of the pages that are chosen for single queries, by key head."""
        select: Any = self.select
        size, scores = select.size, select.score(query, self)
        scores = jnp.broadcast_to(scores, (*scores.shape[:2], query.shape[1]))
        pages = chosen(scores, select.pages, paged(self.positions, size))  # [B, P, K]
        return (pages[:, :, None] * size + jnp.arange(size)[:, None]).reshape(len(query), -1, query.shape[1])

    def keys(self, slots: Int[Array, "b s g"]) -> Float[Array, "b s k h"]:
        """Returns the keys in these slots of each head; those of empty slots may be anything."""
        return self.storage.take(self.held, slots, self.positions)[0]

    def _chooses(self, query: Float[Array, "b t n h"]) -> bool:
        """Returns whether these queries may read less than everything."""
        select, slots = self.select, self.positions.shape[1]
        if select is None or self.fresh is not None or query.shape[1] > 1:
            return False
        return slots > select.pages * select.size

    def _by_group(self, query: Float[Array, "b 1 n h"]) -> Float[Array, "b k g h"]:
        """Returns single queries with those that read one key head side by side."""
        heads = jax.eval_shape(lambda: self.key).shape[2]
        return query[:, 0].reshape(len(query), heads, -1, query.shape[-1])

    def by_slot(self, x: Array, seen: Held, fill: Any) -> Array:
        """Returns x [B, S, 1 or K, ...] of what was read by the slots instead, [B, C, K, ...]; `fill` at others."""
        heads = jax.eval_shape(lambda: self.key).shape[2]
        x = jnp.broadcast_to(x, (*x.shape[:2], heads, *x.shape[3:]))
        if seen.slots is None:
            return x
        return write_slots(jnp.full((len(x), self.positions.shape[1], *x.shape[2:]), fill, x.dtype), seen.slots, x)

    @property
    def rolls_back(self) -> bool:
        """Whether the newest tokens can be taken back."""
        return not (self.retain.evicts or self.past or self._remembers) and self.storage.rolls_back

    def rolled_back(self, last: Int[Array, "#b"]) -> "Store":
        """Returns the store without the tokens behind position `last` [1 or B], as if they had not been appended.

        Raises:
            ValueError: The policy evicts, since the token that an evicted one made room for cannot be brought back; the
                storage rounds tokens together; or the store holds the past of a convolution, which is that of the
                newest tokens alone; or the policy of what is read remembers earlier steps.
        """
        if not self.rolls_back:
            why = "holds the past of a convolution"
            if self._remembers:
                why = f"remembers what earlier steps have read ({type(self.select).__name__})"
            if not self.storage.rolls_back:
                why = f"has rounded tokens together ({type(self.storage).__name__})"
            if self.retain.evicts:
                why = f"has evicted tokens ({type(self.retain).__name__})"
            raise ValueError(f"the store {why}, which cannot be brought back: need a store that keeps everything")
        last = jnp.minimum(self.last, last)
        positions = jnp.where(self.positions > last[:, None, None], -1, self.positions)
        held = self.storage.cleared(self.held, positions)
        new = dataclasses.replace(self, held=held, positions=positions, last=last)
        return new if self.select is None else new._summarised(None)

    def reordered(self, rows: Int[Array, " r"]) -> "Store":
        """Returns the store whose row i is row rows[i] of this one."""
        fields = {name: jax.tree.map(lambda x: x[rows], getattr(self, name)) for name in BY_ROW}
        return dataclasses.replace(self, held=self.storage.reordered(self.held, rows), **fields)

    def replaced(self, rows: Int[Array, " r"], other: "Store") -> "Store":
        """Returns the store with these rows taken by the rows of another of the same policy and capacity."""
        fields = {name: (getattr(self, name), getattr(other, name)) for name in BY_ROW}
        put = {name: jax.tree.map(lambda x, new: x.at[rows].set(new), *pair) for name, pair in fields.items()}
        held = self.storage.replaced(self.held, rows, other.held, put["positions"])
        return dataclasses.replace(self, held=held, **put)

    def observe(self, measured: Mapping[str, Float[Array, "b s k"]], seen: Held) -> "Store":
        """Returns the store after the queries have attended to the result of `read`.

        Statistics are updated, and tokens that do not fit are cut.

        Args:
            measured: The results of `measures`. Those of "select.*" are by query head, [B, S, K, G, ...].
            seen: What was read.
        """
        if self.fresh is None:
            statistics = self.statistics
            attended = Attended(measured, seen.positions, self.last[:, None, None], several=False)
            if seen.slots is None:
                statistics = self.retain.observe(statistics, attended)
            elif statistics:
                before = {name: take_slots(x, seen.slots) for name, x in statistics.items()}
                after = self.retain.observe(before, attended)
                statistics = {name: write_slots(x, seen.slots, after[name]) for name, x in statistics.items()}
            new = dataclasses.replace(self, statistics=statistics)
            return new._noted({name: self.by_slot(x, seen, 0) for name, x in measured.items() if "." in name}, seen)
        if not self.retain.evicts:
            fresh = self.fresh
            new = dataclasses.replace(self, fresh=None)
            slots = self._own_slots(fresh.positions[..., 0])
            new = new._written(slots, fresh.key, fresh.value, fresh.positions, fresh.facts)
            count = self.positions.shape[1]
            by_slot = {name: write_slots(x[:, :count], slots, x[:, count:]) for name, x in measured.items()}
            return new._noted(by_slot, seen)
        count, capacity = seen.positions.shape[1] - self.positions.shape[1], self.positions.shape[1]
        attended = Attended(measured, seen.positions, self.last[:, None, None], several=True)
        statistics = self.retain.observe(self.all_statistics, attended)
        worth = self._worth(seen.positions, statistics, self.last)
        seen_positions = jnp.where(worth == -jnp.inf, -1, seen.positions)
        order = jnp.lexsort((-seen_positions, -worth), axis=1)[:, :capacity]
        positions = jnp.take_along_axis(seen_positions, order, 1)
        if self.budget is not None:
            positions = jnp.where(jnp.arange(capacity)[:, None] < self.budget, positions, -1)
        by_place = jnp.where(positions < 0, np.iinfo(np.int32).max, positions).argsort(1)
        order, positions = (jnp.take_along_axis(x, by_place, 1) for x in (order, positions))
        new = dataclasses.replace(
            self,
            held=self.storage.fill(self.held, take_slots(seen.key, order), take_slots(seen.value, order), positions),
            positions=positions,
            statistics={name: take_slots(x, order) for name, x in statistics.items()},
            fresh=None,
        )
        if self.select is None:
            return new
        marks, rows = self.remembered
        if marks:
            begin = self.select.start(self._sizes._replace(slots=count)).slots
            marks = {name: take_slots(jnp.concatenate([x, begin[name]], 1), order) for name, x in marks.items()}
        new = dataclasses.replace(new, remembered=Remembered(marks, rows))._summarised(None)
        return new._noted({name: take_slots(x, order) for name, x in measured.items() if "." in name}, seen)

    def _noted(self, measured: Mapping[str, Array], seen: Held) -> "Store":
        """Returns the store after its policy of what is read has seen a step; rows without a query keep what it had."""
        if not self._remembers:
            return self
        select: Any = self.select
        query: Any = seen.query
        asked = seen.asked
        if asked is None:
            raise ValueError(
                f"read was not given the positions of the queries, which {type(select).__name__} looks back at: need "
                "read(query, positions)"
            )
        whole = jnp.ones((len(asked), 1), bool) if seen.whole is None else seen.whole
        own = {name.removeprefix("select."): x for name, x in measured.items()}
        step = Step(query, asked, own, whole, seen.key, seen.positions, self.positions)
        after = select.observe(self.remembered, step)
        active = (asked >= 0).any(1)

        def kept(new: Array, old: Array) -> Array:
            return jnp.where(active.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        return dataclasses.replace(self, remembered=jax.tree.map(kept, after, self.remembered))


@part
class Policy:
    """How a store keeps and chooses tokens. Its arrays can change without another program.

    Attributes:
        retain: The policy that says which tokens are kept when the slots are full.
        slots: C, the number of slots; by default one for each position, up to the end of the last page.
        select: The policy that says which pages a single query reads, and which steps read everything.
        budget: The number of slots that may be filled, one number or one per key head.
        key_position: The policy that says where keys and queries stand for a rotary position.
        storage: The way in which keys and values lie in memory.
    """

    retain: Retain = Everything()
    slots: int | None = None
    select: Select | None = None
    budget: Int[Array, "..."] | None = None
    key_position: KeyPosition = Absolute()
    storage: Storage = Dense()


def empty(
    batch: int,
    capacity: int,
    key_shape: tuple[int, int],
    value_shape: tuple[int, int],
    dtype: Any,
    policy: Policy | None = None,
    queries: int | None = None,
) -> Store:
    """Makes a store without tokens, for positions below `capacity`.

    Args:
        batch: B.
        capacity: The number of positions.
        key_shape: (heads, head dim) of keys.
        value_shape: (heads, head dim) of values.
        dtype: The dtype of keys and values.
        policy: How the store keeps and chooses tokens.
        queries: The number of query heads, a multiple of the key heads; by default as many.

    Raises:
        ValueError: A size is below 1, the policy cannot work with the slots, or a budget does not fit.
    """
    if min(batch, capacity) < 1:
        raise ValueError(f"batch and capacity must be at least 1, got {batch} and {capacity}")
    policy = Policy() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(f"store must be a policy such as Policy(Recent(4), slots=64), got {policy!r}")
    slots_of = ("retain", Retain), ("select", Select | None), ("key_position", KeyPosition), ("storage", Storage)
    for name, base in slots_of:
        if not isinstance(getattr(policy, name), base):
            wanted = base.__name__ if isinstance(base, type) else "Select or None"
            raise TypeError(f"Policy: {name} is {getattr(policy, name)!r}: need a {wanted}")
    retain, select, budget = policy.retain, policy.select, policy.budget
    whole = _whole_pages(capacity, policy)
    slots = whole if policy.slots is None else policy.slots
    if slots < 1 or (not retain.evicts and slots not in (capacity, whole)):
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
    # So that another number is not another program.
    retain, select = (jax.tree.map(jnp.asarray, each) for each in (retain, select))
    if select is not None and select.needs_turned and not policy.key_position.at_write:
        raise ValueError(
            f"select is {type(select).__name__}, which bounds scores by keys as they are written, but key_position is "
            f"{type(policy.key_position).__name__}, which turns them when they are read: need Absolute()"
        )
    if select is not None and slots % select.size:
        raise ValueError(f"slots is {slots}: need a multiple of the page size, {select.size}")
    positions = jnp.full((batch, slots, key_shape[0] if by_head else 1), -1, jnp.int32)
    _check_worth(retain, positions)
    store = Store(
        policy.storage.start(batch, slots, key_shape, value_shape, dtype),
        positions,
        jnp.full(batch, -1, jnp.int32),
        policy.storage,
        retain,
        retain.start(positions.shape),
        select,
        budget=budget,
        span=capacity,
        queries=key_shape[0] if queries is None else queries,
        key_position=policy.key_position,
    )
    if select is None:
        return store
    remembered = select.start(Sizes(batch, slots, *key_shape, store.queries))
    return dataclasses.replace(store, remembered=remembered)._summarised(None)


def _whole_pages(capacity: int, policy: Policy) -> int:
    """Returns the number of slots, from `capacity` on, that are whole pages of what is read and of the storage."""
    unit = math.lcm(policy.storage.unit, 1 if policy.select is None else policy.select.size)
    return -(-capacity // unit) * unit


def _check_worth(retain: Retain, positions: Int[Array, "b c g"]) -> None:
    """Raises ValueError if the policy does not give one number for each slot, as with arrays for other key heads."""
    statistics, now = retain.start(positions.shape), jnp.zeros((len(positions), 1, 1), jnp.int32)
    wrong = f"{type(retain).__name__} does not give one worth per slot, {list(positions.shape)}"
    wanted = "need arrays that are one number, or one per key head"
    try:
        worth = jax.eval_shape(retain.keep, positions, statistics, now)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wrong}: {wanted} ({error})") from None
    if worth.shape != positions.shape:
        raise ValueError(f"{wrong}, but {list(worth.shape)}: {wanted}")


def check_room(state: Any, positions: Int[Array, "#b t"]) -> None:
    """Raises ValueError if the state of attention, or one of a tuple of them, has no slot for one of the positions.

    Positions that are traced, stores that evict, and states of other mixers are not checked.
    """
    if isinstance(state, tuple):
        for each in state:
            check_room(each, positions)
    if not isinstance(state, Store) or state.retain.evicts or isinstance(positions, jax.core.Tracer):
        return
    last, capacity = int(np.max(np.asarray(positions), initial=-1)), state.span
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
    lost = positions >= store.span
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
