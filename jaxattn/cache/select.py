"""Which slots of a store a single query reads: a few pages of slots, or in some steps all of them."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.cache.retain import Statistics, around
from jaxattn.cache.storage import take_slots
from jaxattn.core.attend.bulk import Moments, bulk_log_mass
from jaxattn.core.attend.measure import Measure, Received
from jaxattn.core.checks import check_range, check_static_int
from jaxattn.core.matmul import accumulator
from jaxattn.core.part import part

Query = Float[Array, "b k g h"]
"""A single query of each row: the G heads that read one of K key heads are side by side."""


class Sizes(NamedTuple):
    """The sizes of a store: batch B, slots C, key heads K, channels of a key H; and N query heads that read it."""

    batch: int
    slots: int
    heads: int
    width: int
    queries: int


class Remembered(NamedTuple):
    """What a policy remembers of earlier steps.

    Attributes:
        slots: Name -> [B, C, K, ...], on each slot. A slot begins anew with every token that is written to it.
        rows: Name -> a pytree of arrays [B, ...], on each row.
    """

    slots: Statistics
    rows: dict[str, Any]


class Step(NamedTuple):
    """What a step, or a prompt, has read.

    Attributes:
        query: [B, T, N, H], the queries as they met the keys.
        asked: [B, T], their positions; −1: none.
        measured: Name -> [B, C, K, G, ...], the results of the policy's measures; 0 for slots that were not read.
        whole: Which rows, or key heads, have read all slots, [B, 1 or K].
        key: [B, S, K, H], the keys that were read.
        key_positions: [B, S, 1 or K], where they stand; −1: none.
        positions: [B, C, 1 or K], the positions of the tokens in all slots; −1: empty.
    """

    query: Float[Array, "b t n h"]
    asked: Int[Array, "b t"]
    measured: Mapping[str, Array]
    whole: Bool[Array, "b g"]
    key: Float[Array, "b s k h"]
    key_positions: Int[Array, "b s g"]
    positions: Int[Array, "b c g"]

    @property
    def newest(self) -> Float[Array, "b n h"]:
        """The query of the newest token of each row."""
        return jnp.take_along_axis(self.query, self.asked.argmax(1)[:, None, None, None], 1)[:, 0]


class Select(abc.ABC):
    """The base class of policies that choose pages of slots: for each key head, by a score of each page.

    A policy may summarise the keys of a page (`summarise`), and remember what earlier steps have read (`start`,
    `measures`, `observe`). It may also say of each step which rows read everything (`whole`). The methods are given the
    store, of which `summary`, `remembered`, `positions` and `last` are made for them.

    Attributes:
        pages: The number of pages that are read for each key head; a store of no more pages is read in whole.
        size: The number of slots per page.
        needs_turned: Whether keys must be summarised as they meet the queries.
    """

    pages: int
    size: int
    needs_turned: ClassVar[bool] = True

    def summarise(self, key: Float[Array, "b p s k h"], there: Bool[Array, "b p s k"]) -> Any:
        """Returns a pytree of arrays [B, P, K, ...] that stands for the keys of each page, leaving out empty slots."""
        return ()

    def start(self, sizes: Sizes) -> Remembered:
        """Returns what is remembered before any token."""
        return Remembered({}, {})

    def measures(self, now: Int[Array, " b"], queries: int) -> Mapping[str, Measure]:
        """Returns the measures that the policy needs of attention: results [B, S, ..., N], as those of `Received`.

        Args:
            now: [B], the position of the newest token.
            queries: The number of queries of the call.
        """
        return {}

    def whole(self, query: Query, store: Any) -> Bool[Array, "b g"] | None:
        """Returns which rows, or which key heads, read all slots in this step; None if none ever does.

        Where any does, the step is run on all slots, and the others still see only the pages that are chosen for them.
        """
        return None

    @abc.abstractmethod
    def score(self, query: Query, store: Any) -> Float[Array, "b p g"]:
        """Returns the worth of each page to the queries of the G heads that read a key head."""

    def observe(self, remembered: Remembered, step: Step) -> Remembered:
        """Returns what is remembered after a step or a prompt; rows without a query keep what they had."""
        return remembered

    @property
    def decides(self) -> bool:
        """Whether steps may read everything."""
        return type(self).whole is not Select.whole


@part
class Quest(Select):
    """Reads the pages with the largest bound on q·k over their keys (Quest, Tang et al., 2024):

        Σ_c max(q_c min_c, q_c max_c)

    The bound of a key head is the largest of its query heads'. The page of the newest token is always read.

    Attributes:
        pages: The number of pages that are read, at least 1.
        size: The number of slots per page, at least 1.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1.
    """

    pages: int
    size: int = 16

    def __post_init__(self):
        check_static_int("Quest", "pages", self.pages, 1)
        check_static_int("Quest", "size", self.size, 1)

    def summarise(self, key, there):
        least = jnp.where(there[..., None], key, jnp.inf).min(2)
        most = jnp.where(there[..., None], key, -jnp.inf).max(2)
        empty = ~there.any(2)[..., None]
        return {"least": jnp.where(empty, 0, least), "most": jnp.where(empty, 0, most)}

    def score(self, query, store):
        sides = (query[:, None] * store.summary[side][..., None, :] for side in ("least", "most"))  # [B, P, K, G, H]
        return jnp.maximum(*sides).sum(-1).max(-1)


@part
class MeanKeys(Select):
    """Reads the pages whose mean key the queries match best: MoBA in decoding (Lu et al., 2025).

        q · mean of the page's keys

    The worth to a key head is the largest over the query heads that read it, or, as NSA has it, their sum. In the paper
    each query head chooses by itself; here those that read one key head read the same pages. The page of the newest
    token is always read, and is one of the `pages`.

    Attributes:
        pages: The number of pages that are read, at least 1.
        size: The number of slots per page, at least 1.
        over_heads: "max" or "sum".

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1, or `over_heads` is unknown.
    """

    pages: int
    size: int = 16
    over_heads: Literal["max", "sum"] = "max"

    def __post_init__(self):
        check_static_int("MeanKeys", "pages", self.pages, 1)
        check_static_int("MeanKeys", "size", self.size, 1)
        if self.over_heads not in ("max", "sum"):
            raise ValueError(f"MeanKeys: over_heads is {self.over_heads!r}: need 'max' or 'sum'")

    def summarise(self, key, there):
        return mean_key(key, there)

    def score(self, query, store):
        mean = store.summary
        scores = jnp.einsum("bkgh,bpkh->bpkg", query.astype(mean.dtype), mean, precision="highest")
        return scores.max(-1) if self.over_heads == "max" else scores.sum(-1)


@part
class Landmarks(Select):
    """Reads the pages whose landmark, the token in their last slot, the queries match best (Mohtashami & Jaggi, 2023).

        q · key of the landmark

    Among the pages are those that each of the query heads likes best, the same number for each head that reads the key
    head: a page is worth its best rank. A page without its landmark is that of the newest token, which is always read.

    Attributes:
        pages: The number of pages that are read, at least 1: with G query heads per key head, G times as many as each
            of them needs, and the newest.
        size: The number of slots per page with its landmark, at least 2.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below its least value.
    """

    pages: int
    size: int = 64

    def __post_init__(self):
        check_static_int("Landmarks", "pages", self.pages, 1)
        check_static_int("Landmarks", "size", self.size, 2)

    def summarise(self, key, there):
        return {"landmark": jnp.where(there[:, :, -1, :, None], key[:, :, -1], 0), "whole": there[:, :, -1]}

    def score(self, query, store):
        past = store.summary["whole"] & (paged(store.positions, self.size)[:, :, -1] < store.last[:, None, None])
        scores = jnp.einsum("bkgh,bpkh->bpkg", query, store.summary["landmark"], precision="highest")
        scores = jnp.where(past[..., None], scores, -jnp.inf)
        rank = (-scores).argsort(1).argsort(1)
        return -rank.min(-1).astype(jnp.float32)


@part
class Recycled(Select):
    """Reads the tokens that the last full step attended to most (Recycled Attention, Xu et al., 2024).

    A full step reads all slots, and its weights choose the tokens of the steps after it: for each key head those with
    the largest weight to one of its query heads. New tokens are read too until the next full step, in place of the
    tokens with the least weight. A prompt is a full step whose weights are those of its last token. The store keeps all
    tokens: the policy saves reading, not memory.

    With `pool` a token counts as the largest weight among so many neighbours (7 in the second version of the paper,
    RefreshKV), so that tokens are read together with what stands around them.

    Every `every`-th step is full. With `below`, such a step is full only if the query has turned away from that of the
    last full step: both are averaged over the heads, and their cosine is below the number.

    Attributes:
        pages: The number of pages that are read, at least 1; with pages of one slot, of tokens.
        every: The number of steps from one full step, or one look at the query, to the next, at least 1. With 1 and no
            `below` every step is full.
        below: A cosine; None for full steps by their number alone. Above 1 the query has always turned away.
        size: The number of slots per page, at least 1. A page counts as its token with the largest weight.
        pool: The number of neighbours in the order of positions, the token in their middle; odd, and 1 for none.

    Raises:
        TypeError: A static number is not an int.
        ValueError: A number is below 1, where it is known, or `pool` is even.
    """

    pages: int
    every: Int[Array, ""] | int = 10
    below: Float[Array, ""] | float | None = None
    size: int = 1
    pool: int = 1

    needs_turned: ClassVar[bool] = False

    def __post_init__(self):
        for name in ("pages", "size", "pool"):
            check_static_int("Recycled", name, getattr(self, name), 1)
        if self.pool % 2 == 0:
            raise ValueError(f"Recycled: pool is {self.pool}: need an odd number of neighbours")
        check_range("Recycled: every", self.every, lambda x: x >= 1, "at least 1")

    def start(self, sizes):
        weight = jnp.full((sizes.batch, sizes.slots, sizes.heads), -1.0)  # of a token that came after the full step
        query = jnp.zeros((sizes.batch, sizes.width))
        steps = jnp.full(sizes.batch, jnp.iinfo(jnp.int32).max - 1)
        return Remembered({"weight": weight}, {"query": query, "steps": steps})

    def measures(self, now, queries):
        return {"weight": Received(now)}

    def whole(self, query, store):
        rows = store.remembered.rows
        due = rows["steps"] + 1 >= self.every
        if self.below is not None:
            due = due & (_cosine(query.mean((1, 2)), rows["query"]) < self.below)
        return due[:, None]

    def score(self, query, store):
        weight = store.remembered.slots["weight"]
        worth = jnp.where(weight < 0, weight.max(1, keepdims=True) + 2 + store.positions, weight)  # the newest first
        return paged(jnp.where(store.positions < 0, -jnp.inf, worth), self.size).max(2)

    def observe(self, remembered, step):
        weight, (rows, whole) = remembered.slots["weight"], (remembered.rows, step.whole[:, 0])
        new = around(step.measured["weight"].max(-1), step.positions, self.pool, jax.lax.max)
        weight = jnp.where(step.whole[:, None], new, weight)
        query = jnp.where(whole[:, None], step.newest.mean(1), rows["query"])
        looked = whole | (rows["steps"] + 1 >= self.every)
        return Remembered({"weight": weight}, {"query": query, "steps": jnp.where(looked, 0, rows["steps"] + 1)})


@part
class QAdA(Select):
    """Reads sinks and a window where they have most of the attention, and everything elsewhere (QAdA, 2025):

        local where   sigmoid(lse of the sinks and the window − log mass of the others) ≥ threshold

    The log mass of the others is `bulk_log_mass`, an estimate from the mean and the covariance of all keys behind the
    sinks. Each query decides anew, and each head: those that read one key head are local only if all of them are. A
    step in which every row and head is local reads the sinks and the window alone. `LocalMass` is the share itself, for
    which all keys must be read. The store keeps all tokens.

    The card of the paper has the formula from memory, and no numbers: those here are ours.

    Attributes:
        sinks: The number of first tokens, at least 0.
        window: The number of last tokens with the newest, at least 1.
        threshold: A share: with 0 all steps are local, above 1 none is.
        scale: The scale of the scores, by default H^−½.

    Raises:
        TypeError: A static number is not an int.
        ValueError: A number is below its least value.
    """

    sinks: int = 16
    window: int = 1024
    threshold: Float[Array, ""] | float = 0.6
    scale: float | None = None

    def __post_init__(self):
        check_static_int("QAdA", "sinks", self.sinks, 0)
        check_static_int("QAdA", "window", self.window, 1)

    @property
    def pages(self):  # type: ignore[override]
        return self.sinks + self.window

    @property
    def size(self):  # type: ignore[override]
        return 1

    def start(self, sizes):
        batch, _, heads, width, _ = sizes
        zeros = jnp.zeros((batch, heads))
        moments = Moments(zeros, jnp.zeros((batch, heads, width)), jnp.zeros((batch, heads, width, width)))
        return Remembered({}, {"moments": moments, "until": jnp.full(batch, -1)})

    def _local(self, positions: Int[Array, "b s g"], now: Int[Array, " b"]) -> Bool[Array, "b s g"]:
        return (positions >= 0) & ((positions < self.sinks) | (positions > now[:, None, None] - self.window))

    def whole(self, query, store):
        slots = store.few(query)
        key, local = store.keys(slots), self._local(take_slots(store.positions, slots), store.last)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = jnp.einsum("bkgh,bskh->bkgs", query, jnp.where(local[..., None], key, 0), precision="highest")
        scores = jnp.where(jnp.moveaxis(local, 1, -1)[:, :, None], scale * scores.astype(accumulator(key)), -jnp.inf)
        moments = store.remembered.rows["moments"]
        others = (store.positions >= 0).sum(1) - self._local(store.positions, store.last).sum(1)
        by_head = query.reshape(len(query), 1, -1, query.shape[-1])
        bulk = bulk_log_mass(by_head, moments.mean, moments.covariance, others, scale)[:, 0].reshape(query.shape[:3])
        more = jnp.where(bulk == -jnp.inf, jnp.inf, jax.nn.logsumexp(scores, -1) - bulk)
        return (jax.nn.sigmoid(more) < self.threshold).any(-1)

    def score(self, query, store):
        return jnp.where(self._local(store.positions, store.last), 1.0, 0.0)

    def observe(self, remembered, step):
        moments, until = remembered.rows["moments"], remembered.rows["until"]
        key, places = step.key, step.key_positions
        if step.asked.shape[1] == 1:
            newest = places.argmax(1, keepdims=True)
            key, places = take_slots(key, newest), jnp.take_along_axis(places, newest, 1)
        new = (places > until[:, None, None]) & (places >= self.sinks)
        moments = jax.tree.map(lambda x, y: x.astype(y.dtype), moments + Moments.of(key, new), moments)
        return Remembered({}, {"moments": moments, "until": jnp.maximum(until, step.asked.max(1))})


def mean_key(key: Float[Array, "b p s k h"], there: Bool[Array, "b p s k"]) -> Float[Array, "b p k h"]:
    """Returns the mean of the keys of each page, leaving out empty slots; 0 for an empty page."""
    total = jnp.where(there[..., None], key, 0).sum(2, dtype=accumulator(key))
    return total / jnp.maximum(there.sum(2), 1)[..., None]


def _cosine(a: Float[Array, "b h"], b: Float[Array, "b h"]) -> Float[Array, " b"]:
    """Returns the cosine of two vectors; −∞ if one is 0."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    size = jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return jnp.where(size > 0, (a * b).sum(-1) / jnp.where(size > 0, size, 1), -jnp.inf)


def paged(x: Array, size: int) -> Array:
    """Cuts x [B, C, ...] in pages, [B, P, size, ...]."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def chosen(scores: Float[Array, "b p k"], pages: int, positions: Int[Array, "b p s g"]) -> Int[Array, "b n k"]:
    """Returns the pages to read: those of the largest scores, and that of the newest token; empty ones last."""
    newest = positions.max(2)
    worth = jnp.where(newest < 0, -jnp.inf, scores)
    worth = jnp.where(newest == newest.max(1, keepdims=True), jnp.inf, worth)
    return jnp.moveaxis(jax.lax.top_k(jnp.moveaxis(worth, 1, -1), pages)[1], -1, 1)
