"""Choices: parts that look at queries and keys and say which blocks of keys each block of queries reads.

A choice is called on the arrays of a call to `attend` and returns a mask:

    attend(query, key, value, mask=Causal() & MoBA(512, 3)(query, key))

All choices are causal: a block is hidden that lies in the future of every query of the block of queries. Blocks are cut
from the tokens that are there, in the order of their positions. So padding and the order of slots change nothing: empty
slots (position −1) are in no mean and are never chosen, and a permuted sequence is cut into the same blocks. A choice
has no gradient; the pairs that it shows have all of theirs.
"""

import abc
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.api import attention_weights
from jaxattn.core.attend.blocks import BlockIndex, Blocks, Standing, block_means, cut
from jaxattn.core.attend.call import Given
from jaxattn.core.attend.check import check
from jaxattn.core.attend.mask import Causal, Mask, tile_range
from jaxattn.core.attend.score import Dot, Score
from jaxattn.core.attend.slots import Slots
from jaxattn.core.checks import check_positive, check_static_int
from jaxattn.core.matmul import grouped_matmul
from jaxattn.core.mesh import vary_like
from jaxattn.core.part import part
from jaxattn.core.table import take

LAST = np.iinfo(np.int32).max  # where empty slots are put, behind all positions


FAST_FROM = 1024
"""The number of keys from which reading 0.4 to 0.6 of the causal blocks was faster than dense attention, with the time
that the choice takes. With 512 keys it was not (`benchmarks.prefill`, blocks of 128, two CPU cores)."""


class Ordered(NamedTuple):
    """Queries and keys in the order of their positions, zeros in empty slots, which come last.

    Integers are NumPy arrays where positions are the default ones.

    Attributes:
        query: [..., T, N, H].
        key: [..., S, K, H].
        last: [..., T], the place among the keys of the last one that is not in the query's future; −1 for a query that
            sees none, and for an empty slot.
        places: [..., S], the places of the keys, 0..S−1; −1 for an empty slot.
    """

    query: Float[Array, "*b t n h"]
    key: Float[Array, "*b s k h"]
    last: Int[Array, "*#b t"] | np.ndarray
    places: Int[Array, "*#b s"] | np.ndarray

    def blocks(self, block: tuple[int, int]) -> tuple[Any, Any]:
        """Returns the blocks of keys, [..., QB], in which the first and the last query of each block of queries stand.

        Of a block without queries, they are a large number and −1.
        """
        first, last = tile_range(cut(self.last, block[0]))
        return first // block[1], last // block[1]

    def near(self, block: tuple[int, int]) -> tuple[Any, Any]:
        """Returns which blocks of keys are not wholly in the future, and which of these hold a query of the block.

        Both are booleans [..., 1, QB, KB].
        """
        first, last = (x[..., None, :, None] for x in self.blocks(block))
        column = np.arange(-(-self.key.shape[-3] // block[1]))
        return column <= last, (first <= column) & (column <= last)

    def latest(self, count: int) -> tuple[Float[Array, "*b c n h"], Int[Array, "*#b c"]]:
        """Returns the last `count` queries, and their `last`; −1 stands for those that are too few."""
        there = self.last >= 0
        end = (there * np.arange(1, there.shape[-1] + 1)).max(-1)
        index = end[..., None] - count + np.arange(count)
        last = jnp.where(index >= 0, jnp.take_along_axis(jnp.asarray(self.last), jnp.maximum(index, 0), -1), -1)
        index = index.reshape(*(1,) * (self.query.ndim - 2 - index.ndim), *index.shape)[..., None, None]
        return jnp.take_along_axis(self.query, jnp.maximum(index, 0), -3), last


class Choice(abc.ABC):
    """The base class of parts that choose blocks of keys. A new choice needs `choose`."""

    @abc.abstractmethod
    def choose(self, given: Ordered) -> BlockIndex:
        """Returns the blocks that are read, over places in the order of positions; per query head or for all."""

    def is_dense(self, keys: int) -> bool:
        """Returns whether, for so many keys, all that is not in the future is read; by default no."""
        return False

    def __call__(
        self,
        query: Float[Array, "*b t n h"],
        key: Float[Array, "*b s k h"],
        *,
        query_positions: Int[Array, "*#b t"] | None = None,
        key_positions: Int[Array, "*#b s"] | None = None,
    ) -> Mask:
        """Returns the mask of the blocks that are read; `Causal()` where that is all of them.

        Args:
            query: As in `attend`, [..., T, N, H].
            key: [..., S, K, H], where K divides N.
            query_positions: Integers [..., T] in any order, different but for empty slots, which are −1; by default
                0..T−1.
            key_positions: Integers [..., S], likewise. Positions by key head are refused.

        Raises:
            TypeError or ValueError: An array or positions do not fit, as in `attend`.
        """
        check_shared(query, key, query_positions, key_positions)
        if self.is_dense(key.shape[-3]):
            return Causal()
        (query, of_query), (key, of_key) = (
            in_order(jax.lax.stop_gradient(x), positions)
            for x, positions in ((query, query_positions), (key, key_positions))
        )
        index = self.choose(Ordered(query, key, *places_of(of_query, of_key)))
        if query_positions is None and key_positions is None:
            return Blocks(index)
        return Blocks(index, *(Standing(jnp.asarray(x), jnp.arange(x.shape[-1])) for x in (of_query, of_key)))


def in_order(x: Float[Array, "*b l n h"], positions: Any) -> tuple[Array, Any]:
    """Returns x and its positions [..., L] in ascending order; empty slots come last, at `LAST`, with zeros.

    Without positions, they are 0..L−1 as a NumPy array.
    """
    if positions is None:
        return x, np.arange(x.shape[-3], dtype=np.int32)
    positions = jnp.where(jnp.asarray(positions) < 0, LAST, positions).astype(jnp.int32)
    order = jnp.argsort(positions, axis=-1, stable=True)
    positions = jnp.take_along_axis(positions, order, -1)
    index = order.reshape(*(1,) * (x.ndim - 2 - order.ndim), *order.shape)[..., None, None]
    return jnp.where((positions == LAST)[..., None, None], 0, jnp.take_along_axis(x, index, -3)), positions


def seen_by(query: Any, key: Any, query_positions: Any, key_positions: Any) -> Any:
    """Returns the positions of the queries [..., T] for `places_of`, in their slots, of a call that is checked."""
    check_shared(query, key, query_positions, key_positions)
    if query_positions is None:
        return np.arange(query.shape[-3], dtype=np.int32)
    return jnp.where(jnp.asarray(query_positions) < 0, LAST, query_positions).astype(jnp.int32)


def check_shared(query: Any, key: Any, query_positions: Any, key_positions: Any) -> None:
    """Raises TypeError or ValueError for arrays that `attend` refuses, and for positions by key head."""
    check(Given(query, key, key, Slots(), query_positions, key_positions))
    if key_positions is not None and key_positions.ndim == key.ndim - 1:
        raise ValueError(f"key_positions has shape {key_positions.shape}: need positions [..., S] that all heads share")


def places_of(query_positions: Any, key_positions: Any) -> tuple[Any, Any]:
    """Returns `last` and `places` of `Ordered`, from positions with `LAST` for empty slots; those of keys ascend."""
    places = np.arange(key_positions.shape[-1], dtype=np.int32)
    if isinstance(query_positions, np.ndarray) and isinstance(key_positions, np.ndarray):
        return np.minimum(query_positions, places[-1]), places
    rank = jnp.vectorize(partial(jnp.searchsorted, side="right"), signature="(s),(t)->(t)")
    last = jnp.where(query_positions == LAST, -1, rank(key_positions, query_positions) - 1)
    return last, jnp.where(key_positions == LAST, -1, places)


@part
class MoBA(Choice):
    """Mixture of block attention (Lu et al., 2025): a query reads its own block and the past blocks it matches best.

        g_tc = q_t · mean(k_j : j in block c)     for the blocks c before that of t

    The `pages` blocks are the query's own and those of the largest g; among equal ones the first. Each query head
    chooses for itself, and the scale of scores plays no part. `Causal()` must be and-ed, since a query sees its own
    block in part. With `pages` blocks or fewer, attention is dense.

    Attributes:
        size: The number of keys per block, at least 1.
        pages: The number of blocks that are read, at least 1: the query's own counts.
        queries: The number of queries that choose together, by the mean of their g. 1, the default, is the published
            mechanism: each query chooses by itself, and no later token has a say. In "tiled" a tile is computed where
            one of its queries needs it, so that 128 queries which choose together are faster, up to 1/density. They
            look ahead within their block.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1.
    """

    size: int
    pages: int
    queries: int = 1

    def __post_init__(self):
        for name in ("size", "pages", "queries"):
            check_static_int("MoBA", name, getattr(self, name), 1)

    def is_dense(self, keys):
        return keys <= self.size * self.pages

    def choose(self, given):
        block = self.queries, self.size
        query, key = means_of(given, block)
        scores = grouped_matmul(query.swapaxes(-2, -3), key.swapaxes(-2, -3), -1)
        past, own = given.near(block)
        scores = jnp.where(past, scores, -jnp.inf)
        return BlockIndex.from_scores(scores, self.pages, block, forced=own, causal=False)


def means_of(given: Ordered, block: tuple[int, int]) -> tuple[Float[Array, "*b qb n h"], Float[Array, "*b kb k h"]]:
    """Returns the means of the blocks of queries and of keys."""
    return block_means(given.query, block[0], given.last >= 0), block_means(given.key, block[1], given.places >= 0)


@part
class VerticalSlash(Choice):
    """The first blocks, the nearest ones, and the columns and diagonals that the last queries weigh most.

    A fixed number of each, for every head its own if given so, as in MInference (Jiang et al., 2024) by blocks. With
    P the weights of the last `block` queries, causal,

        vertical_j = mean_i P_ij,        slash_o = mean_i P_{i, i−o}

    each summed over blocks of keys and of distances. A block of queries reads the `sinks` first blocks of keys and the
    `vertical` best other ones, and of the diagonals of blocks the `local` nearest and the `slash` best other ones. With
    `vertical = slash = 0` the pattern is a window with sinks, which nothing is computed for but the mask.

    The last queries choose for all, so an output depends on later tokens: use it to read prompts, not to train.

    Attributes:
        vertical: The number of columns of blocks besides the first, an int or an array with one per query head.
        slash: The number of diagonals of blocks besides the nearest, likewise.
        sinks: The number of first blocks, at least 0.
        local: The number of nearest diagonals, at least 1: the block itself.
        block: The number of queries and of keys per block, at least 1.
        score: How well a query matches a key, as in the call to `attend`.
        dense_below: With fewer keys attention is dense, as that is faster.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is too small.
    """

    vertical: Int[Array, " heads"] | int
    slash: Int[Array, " heads"] | int
    sinks: int = 1
    local: int = 1
    block: int = 128
    score: Score = Dot()
    dense_below: int = FAST_FROM

    def __post_init__(self):
        least = {"sinks": 0, "local": 1, "block": 1, "dense_below": 0}
        for name in ("vertical", "slash"):
            least |= {name: 0} if not hasattr(getattr(self, name), "shape") else {}
        for name, number in least.items():
            check_static_int("VerticalSlash", name, getattr(self, name), number)

    def is_dense(self, keys):
        return keys < self.dense_below

    def choose(self, given):
        vertical, slash = (_in_blocks(x, self.block) for x in _profiles(given, self.block, self.score))
        columns = _best(vertical, self.vertical, self.sinks)
        return BlockIndex(_lines(given, self.block, columns, _best(slash, self.slash, self.local)), (self.block,) * 2)


@part
class FlexPrefill(Choice):
    """Reads the fewest blocks that hold a share γ of the weights, by an estimate from the last queries.

    Each query head and prompt has the pattern that fits it (Lai et al., 2025). P, vertical and slash are those of
    `VerticalSlash`, and

        ā = softmax_c(s(mean q̂, mean k_c)),  v̄_c = Σ_{j in c} vertical_j,  D = √JSD(ā, v̄)

    with q̂ the last `block` queries and c the blocks of keys. Where D < τ, means of blocks foretell the weights, and
    the choice is made from the row-wise softmax of s(mean q_r, mean k_c): its entries over all rows r are taken from
    the largest down until their sum exceeds γ times the number of rows, beside the least pattern of columns and
    diagonals. Elsewhere columns are counted that hold the share γ of `vertical`, and diagonals that of `slash`, token
    by token. As many tokens as there are, in whole blocks and one more, are the number of the best blocks of either,
    the first column and the main diagonal among them.

    The last queries choose for all, so an output depends on later tokens: use it to read prompts, not to train.
    Differences from the published code: tokens are counted in blocks of the size that is used and not always of 128;
    both selections keep the entry with which the sum exceeds γ; a share of 0 adds 0 to the divergence, and not NaN.

    Attributes:
        gamma: γ, above 0. From 1 on attention is dense.
        tau: τ, at least 0. With 0 all heads have columns and diagonals.
        block: The number of queries and of keys per block, at least 1.
        least: The number of tokens that the columns, and the diagonals, have at least.
        most: The number that they have at most; None for no limit.
        score: s, how well a query matches a key, as in the call to `attend`.
        dense_below: With fewer keys attention is dense, as that is faster; also with at most 2 `block` or `least`.

    Raises:
        TypeError: A count is not an int.
        ValueError: A number is out of range.
    """

    gamma: float = 0.9
    tau: float = 0.1
    block: int = 128
    least: int = 512
    most: int | None = None
    score: Score = Dot()
    dense_below: int = FAST_FROM

    def __post_init__(self):
        for name in ("block", "least", "dense_below"):
            check_static_int("FlexPrefill", name, getattr(self, name), 0 if name == "dense_below" else 1)
        if self.most is not None:
            check_static_int("FlexPrefill", "most", self.most, self.least)
        check_positive("FlexPrefill", "gamma", self.gamma)
        if not self.tau >= 0:
            raise ValueError(f"FlexPrefill: tau must be at least 0, got {self.tau}")

    def is_dense(self, keys):
        return self.gamma >= 1 or keys < self.dense_below or keys <= max(2 * self.block, self.least)

    def choose(self, given):
        block = self.block, self.block
        by_token = _profiles(given, self.block, self.score)
        vertical, slash = (_in_blocks(x, self.block) for x in by_token)
        fewest, most = (None if n is None else -(-n // self.block) for n in (self.least, self.most))

        def lines(columns: Any, diagonals: Any) -> Array:
            return _lines(given, self.block, _best(vertical, columns - 1, 1), _best(slash, diagonals - 1, 1))

        counts = (_kept(-jnp.sort(-x, axis=-1), self.gamma).sum(-1) // self.block + 1 for x in by_token)
        by_lines = lines(*(jnp.clip(count, fewest, most) for count in counts))

        query, key = means_of(given, block)
        there = cut(given.places, self.block).max(-1)
        blocks = jnp.where(there >= 0, np.arange(there.shape[-1]), -1)
        few, last = given.latest(min(self.block, given.query.shape[-3]))
        of_few = block_means(few, few.shape[-3], last >= 0)
        rows = jnp.asarray(given.blocks(block)[1])
        pooled = weights_at(of_few, key, self.score, last.max(-1, keepdims=True) // self.block, blocks)[..., 0, :]
        weights = weights_at(query, key, self.score, rows, blocks)
        share = self.gamma * (rows >= 0).sum(-1)
        flat = weights.reshape(*weights.shape[:-2], -1)
        by_means = cumulative_select(flat, share[..., None, None]).reshape(weights.shape) | lines(fewest, fewest)

        aware = sqrt_jsd(pooled, vertical) < self.tau
        return BlockIndex(jnp.where(aware[..., None, None], by_means, by_lines), block)


def weights_at(query: Array, key: Array, score: Score, query_places: Array, key_places: Array) -> Array:
    """Returns the weights of causal attention, [..., N, T, S]."""
    places: Any = {"query_positions": query_places, "key_positions": key_places}
    return attention_weights(query, key, score=score, mask=Causal(), **places)[0]


def _profiles(given: Ordered, count: int, score: Score) -> tuple[Float[Array, "*b n s"], Float[Array, "*b n s"]]:
    """Returns the mean weights of the last `count` queries by key, and by distance from the query in places."""
    query, last = given.latest(min(count, given.query.shape[-3]))
    keys = jnp.asarray(given.places)
    weights = weights_at(query, given.key, score, last, keys)
    rows = jnp.maximum((last >= 0).sum(-1), 1)[..., None, None]
    return weights.sum(-2) / rows, _by_distance(weights, last) / rows


def _by_distance(weights: Float[Array, "*b n c s"], last: Int[Array, "*#b c"]) -> Float[Array, "*b n s"]:
    """Returns the sums of weights by distance in places, Σ_i weights[i, last_i − o].

    One row after the other is turned around and shifted, several times faster than looking each weight up.
    """
    length = weights.shape[-1]

    @partial(jnp.vectorize, signature="(n,s),()->(n,s)")
    def shifted(row: Array, at: Array) -> Array:
        padded = jnp.pad(row[:, ::-1], ((0, 0), (0, length)))
        return jax.lax.dynamic_slice_in_dim(padded, length - 1 - at, length, 1)

    def step(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        return total + shifted(*row), None

    rows = jnp.moveaxis(weights, -2, 0), jnp.moveaxis(last, -1, 0)
    return jax.lax.scan(step, vary_like(jnp.zeros_like(weights[..., 0, :]), weights), rows)[0]


def _in_blocks(x: Float[Array, "*b s"], size: int) -> Float[Array, "*b kb"]:
    """Returns the sum over each block."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    return padded.reshape(*x.shape[:-1], -1, size).sum(-1)


def _best(x: Float[Array, "*b n c"], count: Any, first: int) -> Bool[Array, "*b n c"]:
    """Returns the `first` entries, and the `count` [..., N] largest of the others; the first of equal ones."""
    forced = np.arange(x.shape[-1]) < first
    order = jnp.argsort(jnp.where(forced, -jnp.inf, -x), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < first + jnp.asarray(count)[..., None]


def _lines(
    given: Ordered, size: int, columns: Bool[Array, "*b n kb"], diagonals: Bool[Array, "*b n kb"]
) -> Bool[Array, "*b n qb kb"]:
    """Returns the blocks in these columns and on these diagonals, and those that hold a query of the block."""
    past, own = given.near((size, size))
    _, last = given.blocks((size, size))
    distance = last[..., None, :, None] - np.arange(columns.shape[-1])
    return past & (columns[..., None, :] | take(diagonals, distance, grid=2, fill=False) | own)


def cumulative_select(p: Float[Array, "*b c"], mass: Float[Array, "*#b 1"] | float) -> Bool[Array, "*b c"]:
    """Returns the fewest entries of p whose sum exceeds `mass`: the largest ones, of equal ones the first.

    Where the sum of all is no more than `mass`, they are all entries above 0.

    Args:
        p: Numbers of at least 0, [..., C].
        mass: The sum, a number or an array [..., 1].
    """
    order = jnp.argsort(-p, axis=-1, stable=True)
    kept = _kept(jnp.take_along_axis(p, order, -1), mass)
    return jnp.put_along_axis(jnp.zeros(p.shape, bool), order, kept, axis=-1, inplace=False)


def _kept(ranked: Float[Array, "*b c"], mass: Any) -> Bool[Array, "*b c"]:
    """Returns `cumulative_select` of numbers in descending order."""
    return (jnp.cumsum(ranked, -1) - ranked <= mass) & (ranked > 0)


def sqrt_jsd(p: Float[Array, "*b c"], q: Float[Array, "*b c"]) -> Float[Array, "*b"]:
    """Returns the square root of the Jensen-Shannon divergence of two distributions, in nats: from 0 to √ln 2.

        JSD(p, q) = ½ Σ p log(p / m) + ½ Σ q log(q / m),  m = (p + q) / 2

    An entry of 0 adds 0. The root is a distance, 0 where the two are equal alone.

    Args:
        p: [..., C], with sum 1.
        q: [..., C], likewise.
    """
    middle = (p + q) / 2

    def part_of(x: Array) -> Array:
        return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1) / jnp.where(middle > 0, middle, 1)), 0).sum(-1)

    return jnp.sqrt(jnp.maximum((part_of(p) + part_of(q)) / 2, 0))
