"""Policies for a full store: one number per slot, and the slots with the largest stay."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.expiry import NEVER, OPEN
from jaxattn.core.attend.measure import Measure, Received, SeenBy, TopFor
from jaxattn.core.checks import check_range, check_static_int
from jaxattn.core.part import part

Slots = Float[Array, "b c g"]
Statistics = dict[str, Array]  # [B, C, G, ...] each


class Attended(NamedTuple):
    """What was seen of the slots when queries attended to them.

    Attributes:
        measured: The results of the policy's measures, [B, C, ..., K].
        positions: [B, C, G], the positions of the tokens in the slots; −1: empty.
        now: [B, 1, 1], the position of the newest token.
        several: Whether several tokens came together, as a prompt does.
    """

    measured: Mapping[str, Slots]
    positions: Int[Array, "b c g"]
    now: Int[Array, "b 1 1"]
    several: bool


class Retain(abc.ABC):
    """The base class of policies that say which tokens a store keeps.

    Attributes:
        evicts: Whether the policy ever gives a slot to another token. Otherwise a store has one slot for each position.
        by_head: Whether key heads keep different tokens.
        facts: The statistics that are known of a token when it comes, and that the layer must give with it.
    """

    evicts: ClassVar[bool] = True
    by_head: ClassVar[bool] = False
    facts: ClassVar[tuple[str, ...]] = ()

    def measures(self, now: Int[Array, " b"], queries: int) -> Mapping[str, Measure]:
        """Returns the measures that the policy needs of attention to the store: one number per key, as `Received`.

        Args:
            now: [B], the position of the newest token.
            queries: The number of queries that attend together.
        """
        return {}

    @property
    def least(self) -> int | Array:
        """The number of tokens that the policy never evicts: a store needs more slots."""
        return 0

    def start(self, shape: tuple[int, ...]) -> Statistics:
        """Returns the statistics of empty slots, each [B, C, 1 or K, ...]; a slot begins with them anew.

        Those that `facts` names begin with what the layer gives of the token.
        """
        return {}

    @abc.abstractmethod
    def keep(self, positions: Int[Array, "b c g"], statistics: Statistics, now: Int[Array, "b 1 1"]) -> Slots:
        """Returns the worth of each slot when the newest token is at position `now`.

        Of equals the older goes first. A token that is worth −∞ goes at once, also where slots are free.
        """

    def observe(self, statistics: Statistics, attended: Attended) -> Statistics:
        """Returns the statistics after the slots were attended to."""
        return statistics


def protect(
    worth: Slots, positions: Int[Array, "b c g"], now: Int[Array, "b 1 1"], sinks: int | Array, recent: int | Array
) -> Slots:
    """Returns the worth with ∞ for the first `sinks` positions and the last `recent` ones."""
    return jnp.where((positions < sinks) | (positions > now - recent), jnp.inf, worth)


@part
class Everything(Retain):
    """Keeps all tokens, in the slot of their position."""

    evicts: ClassVar[bool] = False

    def keep(self, positions, statistics, now):
        return positions.astype(jnp.float32)


@part
class Recent(Retain):
    """Keeps the first `sinks` tokens and the most recent ones (StreamingLLM, Xiao et al., 2024); a ring for sinks = 0.

    Attributes:
        sinks: Positions below it stay; at least 0.

    Raises:
        ValueError: `sinks` is known and negative.
    """

    sinks: Int[Array, ""] | int = 4

    def __post_init__(self):
        check_range("Recent: sinks", self.sinks, lambda x: x >= 0, "at least 0")

    @property
    def least(self):
        return self.sinks

    def keep(self, positions, statistics, now):
        return jnp.where(positions < self.sinks, jnp.inf, positions.astype(jnp.float32))


@part
class HeavyHitters(Retain):
    """Keeps the first `sinks` tokens, the last `recent`, and those with the most attention (H2O, Zhang et al., 2023).

    The attention that a slot got is Σ over queries of its weight, and over the query heads that read the key head,
    which evicts by itself. Sums favour old tokens, which more queries have seen: with `mean` the sum is divided by the
    number of those queries. Prompts count as their queries attend; a prompt in pieces may keep other tokens than one
    read at once.

    Attributes:
        sinks: The number of first tokens that stay, at least 0; 0 in the paper.
        recent: The number of last tokens that stay, at least 1.
        mean: Whether attention is counted per query that saw the token; not in the paper.

    Raises:
        ValueError: `sinks` or `recent` is known and below its least value.
    """

    sinks: Int[Array, ""] | int = 4
    recent: Int[Array, ""] | int = 8
    mean: bool = False

    by_head: ClassVar[bool] = True

    def __post_init__(self):
        check_range("HeavyHitters: sinks", self.sinks, lambda x: x >= 0, "at least 0")
        check_range("HeavyHitters: recent", self.recent, lambda x: x >= 1, "at least 1")

    def measures(self, now, queries):
        return {"mass": Received()} | ({"queries": SeenBy()} if self.mean else {})

    @property
    def least(self):
        return self.sinks + self.recent

    def start(self, shape):
        return {name: jnp.zeros(shape) for name in self.measures(jnp.zeros(0), 1)}

    def keep(self, positions, statistics, now):
        mass = statistics["mass"]
        worth = mass / jnp.maximum(statistics["queries"], 1) if self.mean else mass
        return protect(worth, positions, now, self.sinks, self.recent)

    def observe(self, statistics, attended):
        return {name: x + attended.measured[name] for name, x in statistics.items()}


def around(
    x: Float[Array, "b s k"], positions: Int[Array, "b s g"], count: int, join: Callable[..., Any]
) -> Float[Array, "b s k"]:
    """Returns numbers from 0 on of tokens joined with those of their neighbours in the order of positions.

    Args:
        x: [B, S, K].
        positions: [B, S, 1 or K]; −1: no token. There, and beyond the ends, the numbers are 0.
        count: The number of neighbours, with the token in their middle, odd.
        join: `jax.lax.add` or `jax.lax.max`.
    """
    x = jnp.where(positions < 0, 0, x)
    if count == 1:
        return x
    order = jnp.broadcast_to(jnp.where(positions < 0, np.iinfo(np.int32).max, positions), x.shape).argsort(1)
    in_order = jnp.take_along_axis(x, order, 1)
    joined = jax.lax.reduce_window(in_order, 0.0, join, (1, count, 1), (1, 1, 1), "SAME")
    return jnp.take_along_axis(joined, order.argsort(1), 1)


@part
class SnapKV(Retain):
    """Keeps of a prompt what its last queries attend to, by key head (SnapKV, Li et al., 2024).

    The votes of a token are the weights that it gets from the last `window` queries of the call, over the query heads
    that read the key head; then the mean of votes over `pool` neighbours in the order of positions, zeros beyond the
    ends. Of the prompt stay the first `sinks` tokens, the window and the most votes.

    The paper cuts a prompt to a capacity and keeps all that is generated. Give `capacity` for that, and as many slots
    more as tokens will come. When slots are full, generated tokens go before those with votes, the oldest first. The
    paper votes once; here every call of several tokens votes anew.

    Attributes:
        window: The number of last tokens that vote and stay, at least 1.
        pool: The number of neighbours, an odd number; 1 for none.
        sinks: The number of first tokens that stay, at least 0; 0 in the paper.
        capacity: The number of tokens that stay of a prompt; None for as many as there are slots.

    Raises:
        TypeError: `pool` is not an int.
        ValueError: A number is out of range, where it is known.
    """

    window: Int[Array, ""] | int = 32
    pool: int = 5
    sinks: Int[Array, ""] | int = 4
    capacity: Int[Array, ""] | int | None = None

    by_head: ClassVar[bool] = True

    def __post_init__(self):
        check_range("SnapKV: window", self.window, lambda x: x >= 1, "at least 1")
        check_range("SnapKV: sinks", self.sinks, lambda x: x >= 0, "at least 0")
        if self.capacity is not None:
            least: Any = self.least
            check_range("SnapKV: capacity", self.capacity, lambda x: x > least, f"above sinks + window, {least}")
        check_static_int("SnapKV", "pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise ValueError(f"SnapKV: pool is {self.pool}: need an odd number of neighbours")

    def measures(self, now, queries):
        return {"votes": Received(now - self.window + 1)}

    @property
    def least(self):
        return self.sinks + self.window

    def start(self, shape):
        return {"votes": jnp.full(shape, -1.0)}  # of a token that came by itself

    def keep(self, positions, statistics, now):
        votes = statistics["votes"]
        worth = jnp.where(votes == -1, -1 / (2.0 + positions), votes)
        return jnp.where(votes == -jnp.inf, votes, protect(worth, positions, now, self.sinks, self.window))

    def observe(self, statistics, attended):
        if not attended.several:
            return statistics
        positions, votes = attended.positions, attended.measured["votes"]
        votes = around(votes, positions, self.pool, jax.lax.add) / self.pool
        if self.capacity is not None:
            worth = self.keep(positions, {"votes": votes}, attended.now)
            by_worth = jnp.lexsort((-positions, jnp.where(positions < 0, jnp.inf, -worth)), axis=1)
            votes = jnp.where(by_worth.argsort(1) < self.capacity, votes, -jnp.inf)
        return {"votes": votes}


@part
class Attentive(Retain):
    """Keeps the tokens that were attended to last, or most often (LRA and LFA of Attendre, Yang & Hua, 2024).

    A query attends to the `top` keys with its largest weights. "last" keeps the tokens whose last query of that kind is
    the newest; "count" those with the most such queries. The card of the paper reconstructs this bookkeeping: its
    abstract names the two policies alone. Key heads evict apart, and the query heads that read one count together.

    Attributes:
        by: "last" or "count".
        top: The number of keys that a query attends to, at least 0; with 0 the policy is that of `Recent`.
        sinks: The number of first tokens that stay, at least 0.
        recent: The number of last tokens that stay, at least 1. New tokens have not been counted yet.

    Raises:
        TypeError: `top` is not an int.
        ValueError: A number is out of range, where it is known, or `by` is unknown.
    """

    by: Literal["last", "count"] = "last"
    top: int = 4
    sinks: Int[Array, ""] | int = 4
    recent: Int[Array, ""] | int = 8

    by_head: ClassVar[bool] = True

    def __post_init__(self):
        if self.by not in ("last", "count"):
            raise ValueError(f"Attentive: by is {self.by!r}: need 'last' or 'count'")
        check_static_int("Attentive", "top", self.top, 0)
        check_range("Attentive: sinks", self.sinks, lambda x: x >= 0, "at least 0")
        check_range("Attentive: recent", self.recent, lambda x: x >= 1, "at least 1")

    def measures(self, now, queries):
        return {"hits": TopFor(self.top)}

    @property
    def least(self):
        return self.sinks + self.recent

    def start(self, shape):
        return {self.by: jnp.zeros(shape, jnp.int32)}

    def keep(self, positions, statistics, now):
        # A token counts as attended to when it comes.
        of_all = jnp.maximum(statistics["last"], positions) if self.by == "last" else statistics["count"]
        return protect(of_all.astype(jnp.float32), positions, now, self.sinks, self.recent)

    def observe(self, statistics, attended):
        hits = attended.measured["hits"]
        if self.by == "last":
            return {"last": jnp.where(hits > 0, attended.now, statistics["last"])}
        return {"count": statistics["count"] + hits.astype(jnp.int32)}


@part
class Spans(Retain):
    """Keeps by key head the first `sinks` tokens and the last α + β n of n tokens (MoA, Fu et al., 2025).

    A token goes when it leaves the span of its head, itself included: a step reads what a window of ⌊α + β n⌋ and sinks
    shows. With β = 0 the span is one number; with α = 0 and β = 1 all tokens stay. Prompts read themselves in full.

    Attributes:
        alpha: α, one number or one per key head [K].
        beta: β, likewise.
        sinks: The number of first tokens that stay, at least 0.

    Raises:
        ValueError: `sinks` is known and negative.
    """

    alpha: Float[Array, "..."] | float
    beta: Float[Array, "..."] | float = 0.0
    sinks: Int[Array, ""] | int = 4

    by_head: ClassVar[bool] = True

    def __post_init__(self):
        check_range("Spans: sinks", self.sinks, lambda x: x >= 0, "at least 0")

    @property
    def least(self):
        return self.sinks

    def keep(self, positions, statistics, now):
        span = jnp.floor(jnp.asarray(self.alpha) + jnp.asarray(self.beta) * (now + 1))
        worth = jnp.where(now - positions < jnp.maximum(span, 1), positions, -jnp.inf)
        return jnp.where(positions < self.sinks, jnp.inf, worth)


@part
class Unexpired(Retain):
    """Keeps by key head the tokens that have not expired (Neural Attention Search, 2025).

    The layer says of each token when it expires: never, a number of steps later, or with the next global token of the
    key head (`core.attend.open_expiry`). So this policy needs a layer that has types of tokens,
    `MultiHeadAttention(types=)`. When slots are full all the same, the oldest token goes, but for the first `sinks`.

    Attributes:
        sinks: The number of first tokens that stay, at least 0. The first token of a row is global.

    Raises:
        ValueError: `sinks` is known and negative.
    """

    sinks: Int[Array, ""] | int = 1

    by_head: ClassVar[bool] = True
    facts: ClassVar[tuple[str, ...]] = ("expires",)

    def __post_init__(self):
        check_range("Unexpired: sinks", self.sinks, lambda x: x >= 0, "at least 0")

    @property
    def least(self):
        return self.sinks

    def start(self, shape):
        return {"expires": jnp.full(shape, NEVER, jnp.int32)}

    def keep(self, positions, statistics, now):
        expires = statistics["expires"]
        # The last global token that `now` comes after. Local tokens before it were seen by it for the last time.
        closing = jnp.where((expires == NEVER) & (positions < now), positions, -1).max(1, keepdims=True)
        expires = jnp.where((expires == OPEN) & (positions < closing), closing, expires)
        worth = jnp.where(positions < self.sinks, jnp.inf, positions.astype(jnp.float32))
        return jnp.where(expires < now, -jnp.inf, worth)
