"""Measures: statistics of attention weights, computed without ever holding all weights.

A measure is a part called on a `View` of complete rows and their `Tile`, `measure(view, tile)`; `tile.visible` has the
shape of the weights. Its `over` says what the core does with the results of one block of queries after another:

    "rows"    [..., N, T, *c], one result per query: put one after the other, returned as [..., T, N, *c]
    "sum"     any shape, a contribution of these queries to one result: added up, returned as it is

A `LinearMeasure` is a weighted sum over keys of numbers that depend on the key's position alone. The measure says which
numbers. It needs no complete rows: the numbers are read as more columns of the values, so "tiled" serves it too.

Memory is therefore linear in length whatever is measured, and each measure is its dense definition. All results are
differentiable but for positions (`ArgMax`, those of `TopWeights`). The weights are those that read the values: after
normalisation and weight maps, before dropout. Weights need not sum to one (sigmoid, maps). A measure that normalises
rows says so.
"""

import abc
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.tile import Tile
from jaxattn.core.checks import check_entries, check_static_int, count_ids
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.core.table import take


class View(NamedTuple):
    """Complete rows of weights and scores. Rows of empty query slots see nothing: their weights are 0.

    Attributes:
        weights: [..., N, T, S].
        scores: [..., N, T, S].
        lse: [..., N, T], the log of each row's total weight.
    """

    weights: Float[Array, "*b n t s"]
    scores: Float[Array, "*b n t s"]
    lse: Float[Array, "*b n t"]


class Measure(abc.ABC):
    """The base class of measures beside `out`; the head of this file says what they must offer.

    Attributes:
        over: How the results of blocks of queries are put together.
    """

    over: ClassVar[Literal["rows", "sum"]] = "rows"

    @abc.abstractmethod
    def __call__(self, view: View, tile: Tile) -> Any:
        """Returns the results for these rows."""


class LinearMeasure(Measure):
    """A measure finish(Σ_j w_ij c_j): the sums of a few numbers c_j per key under the weights, turned into a result."""

    @abc.abstractmethod
    def columns(self, key: Int[Array, "*b #n 1 s"]) -> Array:
        """Returns the c of the keys at these positions, [..., 1 or N, S, C]; finite also at −1, an empty slot."""

    def finish(self, sums: Float[Array, "*b n t c"]) -> Any:
        """Returns the results for rows with these sums, [..., N, T, *c]. Without an override they are the sums."""
        return sums

    def __call__(self, view, tile):
        columns = self.columns(tile.key).astype(view.weights.dtype)
        return self.finish(jnp.matmul(view.weights, columns, precision=jax.lax.Precision.HIGHEST))


def _check_ints(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(type(x) is int for x in value):
        raise TypeError(f"{owner}: {name} must be a tuple of ints such as (1,), got {value!r}")


def _shares(weights: Float[Array, "*b n t s"]) -> Float[Array, "*b n t s"]:
    """Divides rows by their totals; rows without weight stay 0."""
    return ratio(weights, weights.sum(-1, keepdims=True))


@part
class Entropy(Measure):
    """Entropy in nats, H_i = −Σ_j p_ij log p_ij, where p is the row divided by its total. [..., T, N]

    The entropy is 0 for one key and log n for n equal ones. A row without weight has 0. For softmax H = lse − Σ_j p_j
    s_j.
    """

    def __call__(self, view, tile):
        p = _shares(view.weights)
        some = ~(p <= 0)  # NaN stays NaN
        return -jnp.where(some, p * jnp.log(jnp.where(some, p, 1)), 0).sum(-1)


@part
class Mass(LinearMeasure):
    """The weight of each group of keys, m_ig = Σ_{j in group g} w_ij: `attend` with one-hot values. [..., T, N, G]

    Attributes:
        groups: Integers [..., P], a table over key positions of ids 0 .. size − 1. Keys with another id, or outside the
            table, count for none.
        size: G, by default one more than the largest id. Under `jit`, where ids are not known, give it.

    Raises:
        ValueError: `groups` is traced and `size` is not given, or `size` is below 1.
    """

    groups: Int[Array, "*batch positions"]
    size: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "size", count_ids("Mass", self.groups, self.size))

    def columns(self, key):
        groups = jnp.asarray(self.groups)[..., None, :]
        check_entries("Mass", "groups", groups, key)
        return take(groups, key, 2, fill=-1)[..., 0, :, None] == jnp.arange(self.size)


@part
class AtKeys(LinearMeasure):
    """The weights of the keys at a few positions, 0 where no key stands. [..., T, N, positions]

    Position 0 is the sink of many models.

    Attributes:
        positions: A tuple of whole numbers from 0.

    Raises:
        TypeError: `positions` is no tuple of ints.
        ValueError: A position is negative.
    """

    positions: tuple[int, ...]

    def __post_init__(self):
        _check_ints("AtKeys", "positions", self.positions)
        if min(self.positions, default=0) < 0:
            raise ValueError(f"AtKeys: positions is {self.positions}: need positions from 0, no key stands before")

    def columns(self, key):
        return key[..., 0, :, None] == jnp.asarray(self.positions)


@part
class MeanPosition(LinearMeasure):
    """Where a query looks on average, Σ_j p_ij · (key position j), where p is the row divided by its total. [..., T, N]

    A row without weight has 0. Under a causal mask `Distance` is the query's position less this mean, which needs no
    complete rows.
    """

    def columns(self, key):
        place = jnp.maximum(key, 0)[..., 0, :].astype(jnp.float32)
        return jnp.stack([place, jnp.ones_like(place)], -1)

    def finish(self, sums):
        return ratio(sums[..., 0], sums[..., 1])


@part
class Received(Measure):
    """The weight that each key receives from all queries, r_j = Σ_i w_ij: the column sums. [..., S, N]

    For softmax r is the gradient of Σ_i lse_i in a zero bias per key, and Σ_j r_j is the number of queries that see a
    key.

    Attributes:
        since: The position from which queries count, one number or one per batch entry [...]; None for all.
    """

    since: Int[Array, "*batch"] | int | None = None

    over: ClassVar[Literal["rows", "sum"]] = "sum"

    def __call__(self, view, tile):
        weights = view.weights
        if self.since is not None:
            weights = jnp.where(tile.query >= jnp.asarray(self.since)[..., None, None, None], weights, 0)
        return weights.sum(-2).swapaxes(-1, -2)


@part
class SeenBy(Measure):
    """The number of queries that see each key: how often it could have received weight. [..., S, N]"""

    over: ClassVar[Literal["rows", "sum"]] = "sum"

    def __call__(self, view, tile):
        return tile.shown(view.weights.shape).sum(-2, dtype=view.weights.dtype).swapaxes(-1, -2)


@part
class TopFor(Measure):
    """The number of queries that have the key among their k largest weights. [..., S, N]

    Among equal weights the first keys are taken. A weight of 0 never counts.

    Attributes:
        k: The number of keys per query, at least 0.

    Raises:
        TypeError: `k` is not an int.
        ValueError: `k` is below 0.
    """

    k: int

    over: ClassVar[Literal["rows", "sum"]] = "sum"

    def __post_init__(self):
        check_static_int("TopFor", "k", self.k, 0)

    def __call__(self, view, tile):
        keys = view.weights.shape[-1]
        weights, index = jax.lax.top_k(jnp.where(tile.shown(view.weights.shape), view.weights, 0), min(self.k, keys))
        hits = jnp.put_along_axis(jnp.zeros_like(view.weights), index, weights > 0, axis=-1, inplace=False)
        return hits.sum(-2).swapaxes(-1, -2)


@part
class MaxWeight(Measure):
    """The largest weight of a row, max_j w_ij, and 0 for a row that sees nothing. [..., T, N]

    For softmax it is exp(max_j s_ij − lse_i).
    """

    def __call__(self, view, tile):
        best = jnp.where(tile.visible, view.weights, -jnp.inf).max(-1)
        return jnp.where(tile.visible.any(-1), best, 0)


@part
class ArgMax(Measure):
    """The position of the key with the largest weight (ties: the first), −1 for a row that sees nothing. [..., T, N]"""

    def __call__(self, view, tile):
        return TopWeights(1)(view, tile)[1][..., 0]


@part
class TopWeights(Measure):
    """The k keys with the largest weights, in descending order: a pair (weights, positions), each [..., T, N, k].

    Among equal weights the first keys are taken. Where fewer keys are visible, weight is 0 and position −1.

    Attributes:
        k: The number of keys, at least 1.

    Raises:
        TypeError: `k` is not an int.
        ValueError: `k` is below 1.
    """

    k: int

    def __post_init__(self):
        check_static_int("TopWeights", "k", self.k, 1)

    def __call__(self, view, tile):
        weights = jnp.where(tile.visible, view.weights, -jnp.inf)
        best, index = jax.lax.top_k(weights, min(self.k, weights.shape[-1]))
        places = jnp.broadcast_to(tile.key, view.weights.shape)
        seen = ~jnp.isneginf(best)
        found = jnp.where(seen, best, 0), jnp.where(seen, jnp.take_along_axis(places, index, -1), -1)
        short = [(0, 0)] * (best.ndim - 1) + [(0, self.k - best.shape[-1])]
        return jnp.pad(found[0], short), jnp.pad(found[1], short, constant_values=-1)


@part
class Distance(Measure):
    """The mean distance, Σ_j p_ij |query position − key position|, where p is the row divided by its total. [..., T, N]

    A row without weight has 0.
    """

    def __call__(self, view, tile):
        apart = jnp.abs(tile.query - tile.key).astype(view.weights.dtype)
        return (_shares(view.weights) * apart).sum(-1)


@part
class LagProfile(Measure):
    """How much is read d tokens back, a_d = Σ_i w_{i, i−d} for d = 0 .. lags − 1, by positions. [..., N, lags]

    Lag 1 is the previous-token head. For a mean, divide by the number of queries at positions ≥ d.

    Attributes:
        lags: The number of lags, at least 1.

    Raises:
        TypeError: `lags` is not an int.
        ValueError: `lags` is below 1.
    """

    lags: int

    over: ClassVar[Literal["rows", "sum"]] = "sum"

    def __post_init__(self):
        check_static_int("LagProfile", "lags", self.lags, 1)

    def __call__(self, view, tile):
        lag = tile.query - tile.key
        shape = view.weights.shape
        index = jnp.broadcast_to(jnp.where((lag >= 0) & (lag < self.lags), lag, self.lags), shape)
        flat, index = (x.reshape(*shape[:-2], -1) for x in (view.weights, index))
        total = jnp.zeros((*shape[:-2], self.lags + 1), flat.dtype)
        heads = tuple(i[..., None] for i in jnp.indices(shape[:-2], sparse=True))
        return total.at[(*heads, index)].add(flat)[..., :-1]


@part
class AtLags(Measure):
    """The weights of the keys some tokens back, w_{i, i−d} by positions, 0 where there is none. [..., T, N, lags]

    Lag 0 is the query's own token and lag 1 the one before. Where tokens repeat with period P, induction heads look at
    lag P − 1.

    Attributes:
        lags: A tuple of whole numbers.

    Raises:
        TypeError: `lags` is no tuple of ints.
    """

    lags: tuple[int, ...]

    def __post_init__(self):
        _check_ints("AtLags", "lags", self.lags)

    def __call__(self, view, tile):
        here = ((tile.query - tile.key)[..., None, :] == jnp.asarray(self.lags)[:, None]) & tile.visible[..., None, :]
        return jnp.where(here, view.weights[..., None, :], 0).sum(-1)


@part
class Matching(Measure):
    """The weight of the keys that bear the mark of the query, Σ_j w_ij [b_j = a_i]. [..., T, N]

    If a_i is the token at i and b_j the one at j, that is the weight of the same token; if b_j is the token before j,
    the weight behind earlier occurrences of the token at i, the score of prefix matching of Olsson et al. (2022).

    Attributes:
        query: a, integers [..., P], a table over positions; −1, and outside of it, for a query that nothing matches.
        key: b, likewise.
    """

    query: Int[Array, "*batch positions"]
    key: Int[Array, "*batch positions"]

    def __call__(self, view, tile):
        asked, there = (jnp.asarray(x)[..., None, :] for x in (self.query, self.key))
        check_entries("Matching", "query", asked, tile.query)
        check_entries("Matching", "key", there, tile.key)
        asked, there = take(asked, tile.query, 2, fill=-1), take(there, tile.key, 2, fill=-1)
        return jnp.where((asked == there) & (asked >= 0) & tile.visible, view.weights, 0).sum(-1)


@part
class LocalMass(Measure):
    """The weight of the first `sinks` positions and the last `window` ones, the query's own among them. [..., T, N]

    Where a head has a share of at least a threshold there, it needs no other keys: the rule that `cache.QAdA` estimates
    without reading them (2025).

    Attributes:
        sinks: At least 0.
        window: At least 1.
    """

    sinks: Int[Array, ""] | int
    window: Int[Array, ""] | int

    def __call__(self, view, tile):
        local = (tile.key < self.sinks) | (tile.query - tile.key < self.window)
        return jnp.where(local & tile.visible, view.weights, 0).sum(-1)


@part
class RowsOf(Measure):
    """All weights of the queries at a few positions, [..., N, R, S]. Rows are zeros where no query stands.

    Attributes:
        positions: Integers [R].
    """

    positions: Int[Array, " rows"]

    over: ClassVar[Literal["rows", "sum"]] = "sum"

    def __call__(self, view, tile):
        here = (jnp.asarray(self.positions)[:, None] == tile.query[..., 0, :, 0][..., None, None, :]) & (
            tile.query[..., 0, :, 0][..., None, None, :] >= 0
        )
        weights = jnp.where(here.any(-2)[..., None], view.weights, 0)  # rows that are not asked for may be NaN
        return jnp.matmul(here.astype(weights.dtype), weights, precision=jax.lax.Precision.HIGHEST)


@part
class Latest(Measure):
    """The weights that each key gets from the last queries, one by one, [..., S, count, N]: entry i is from now − i.

    Entries are 0 where no query stands. Memory is that of `count` rows of weights.

    Attributes:
        now: The position of the newest query, one number or one per batch entry [...].
        count: The number of positions up to `now`, at least 1.

    Raises:
        TypeError: `count` is not an int.
        ValueError: `count` is below 1.
    """

    now: Int[Array, "*batch"] | int
    count: int

    over: ClassVar[Literal["rows", "sum"]] = "sum"

    def __post_init__(self):
        check_static_int("Latest", "count", self.count, 1)

    def __call__(self, view, tile):
        asked = jnp.asarray(self.now)[..., None] - jnp.arange(self.count)
        queries = tile.query[..., 0, :, 0]
        here = (asked[..., :, None] == queries[..., None, :]) & (queries >= 0)[..., None, :]  # [..., count, T]
        weights = jnp.where(here.any(-2)[..., None, :, None], view.weights, 0)  # others may be NaN
        rows = jnp.matmul(here[..., None, :, :].astype(weights.dtype), weights, precision=jax.lax.Precision.HIGHEST)
        return jnp.moveaxis(rows, -1, -3).swapaxes(-1, -2)  # from [..., N, count, S]


@part
class BlockMax(Measure):
    """The largest weight in each block of `size` key positions. [..., T, N, blocks]

    Attributes:
        size: The number of positions per block, at least 1.
        blocks: The number of blocks, at least 1. Keys behind them count for none.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1.
    """

    size: int
    blocks: int

    def __post_init__(self):
        check_static_int("BlockMax", "size", self.size, 1)
        check_static_int("BlockMax", "blocks", self.blocks, 1)

    def __call__(self, view, tile):
        block = jnp.where(tile.key < 0, self.blocks, tile.key // self.size)
        block = jnp.moveaxis(jnp.broadcast_to(block, view.weights.shape), -1, 0)
        weights = jnp.moveaxis(jnp.where(tile.visible, view.weights, 0), -1, 0)  # [S, ..., N, T]
        most = jnp.zeros((self.blocks, *weights.shape[1:]), weights.dtype)
        index = block, *jnp.indices(weights.shape[1:], sparse=True)
        return jnp.moveaxis(most.at[index].max(weights, mode="drop"), 0, -1)


@part
class Lookback(Measure):
    """The lookback ratio ā_C / (ā_C + ā_G)  (Chuang et al., 2024). [..., T, N]

    ā_C is the mean weight of visible keys before `split`, and ā_G that of the others: how much is read from the
    context, against the tokens generated since. Equal weights give ½ wherever both parts are visible. A part of which
    nothing is visible has mean 0, and where both means are 0 the ratio is 0.

    Attributes:
        split: A position, one number or one per batch entry [...].
    """

    split: Int[Array, "*batch"] | int

    def __call__(self, view, tile):
        split = jnp.asarray(self.split)[..., None, None, None]
        before = tile.key < split

        def mean(some: Array) -> Array:
            some = some & tile.visible
            return jnp.where(some, view.weights, 0).sum(-1) / jnp.maximum(some.sum(-1), 1)

        context, new = mean(before), mean(~before)
        return jnp.where(context + new <= 0, 0, ratio(context, context + new))
