"""Which blocks of the (query, key) plane are active: found from masks, positions or scores, and used as a mask.

Block selection (MoBA, NSA, Quest, ...) is a table of booleans. `BlockIndex` makes the table, `Blocks` reads it in the
mask slot, and `attend(implementation="tiled")` skips the blocks that it leaves out. Nothing of size T x S is held. For
decoding, where one query chooses single tokens, `select_tokens` copies the chosen tokens out instead.
"""

import math
import operator
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.mask import Mask, every_slot, tile_range
from jaxattn.core.checks import check_static_int, positions_fit
from jaxattn.core.matmul import accumulator
from jaxattn.core.part import part
from jaxattn.core.table import take, take_pairs

Block = tuple[int, int]


@part
class BlockIndex:
    """active[..., n, i, j]: whether head n's block i of queries attends to block j of keys.

    `a | b` is the union of two indices and `a & b` their intersection.

    Attributes:
        active: Booleans [..., N or 1, QB, KB].
        block: (queries, keys), the size of a block. Block i holds the slots i · size .. (i + 1) · size − 1 of its axis.
            With blocks of one query, each row is a query's own choice.

    Raises:
        TypeError: `block` is not two ints.
        ValueError: A block size is below 1, or the indices of a union or intersection differ in their blocks.
    """

    active: Bool[Array, "*batch heads query_blocks key_blocks"]
    block: tuple[int, int]

    def __post_init__(self):
        _check_block(self.block)

    @classmethod
    def from_mask(cls, mask: Mask, lengths: tuple[int, int], block: Block) -> "BlockIndex":
        """The blocks in which a mask shows something, at the positions 0..T−1 and 0..S−1.

        `Blocks(index) & mask` is the same mask again. The errors are those of `from_positions`.

        Args:
            mask: The mask.
            lengths: (T, S).
            block: (queries, keys), the size of a block.
        """
        query, key = (np.arange(length, dtype=np.int32) for length in lengths)
        return cls.from_positions(query, key, mask, block)

    @classmethod
    def from_positions(
        cls,
        query_positions: Int[Array, "*#b t"] | np.ndarray,
        key_positions: Int[Array, "*#b s"] | np.ndarray,
        mask: Mask | None,
        block: Block,
    ) -> "BlockIndex":
        """The blocks of slots in which a mask may show a pair at these positions.

        `Blocks.at(index, query_positions, key_positions)` is the mask of the index. Blocks are judged by the mask's
        `bounds`: a block that these cannot rule out is active.

        Args:
            query_positions: Integers [..., T] in any order. Empty slots, in a cache or in padding, are at −1, and
                blocks of empty slots are inactive.
            key_positions: Integers [..., S], likewise.
            mask: The mask. None shows all keys.
            block: (queries, keys), the size of a block.

        Returns:
            The index, with a NumPy array if the positions are NumPy arrays and the mask is static.

        Raises:
            TypeError: Positions are not integers.
        """
        _check_block(block)
        _check_integers(query_positions, key_positions)
        query = cut(query_positions, block[0])[..., None, :, None, :]
        key = cut(key_positions, block[1])[..., None, None, :, :]
        possible = np.True_ if mask is None else mask.bounds(query, key)[0]
        return cls(possible & (query >= 0).any(-1) & (key >= 0).any(-1), block)

    @classmethod
    def from_scores(
        cls,
        scores: Float[Array, "*b n qb kb"],
        k: int,
        block: Block,
        forced: Bool[Array, "*#b #n #qb #kb"] | None = None,
        causal: bool = True,
    ) -> "BlockIndex":
        """For each block of queries, the k blocks of keys with the highest scores.

        Among equal scores the first blocks are taken. A score of −∞ or NaN is never chosen, so a row may have fewer
        than k blocks. The choice has no gradient. Scores that pool several queries look ahead within their block,
        whatever is masked later.

        Args:
            scores: Floating point [..., N, QB, KB].
            k: The number of blocks per row, at least 1.
            block: (queries, keys), the size of a block.
            forced: Blocks that are active whatever their score. They count among the k; if a row has more of them, all
                are active.
            causal: Both axes start at position 0. Blocks that lie in the future of all queries of the row are then
                never active, forced or not. The current blocks, those not wholly past for the row's first query, are
                forced (MoBA, Lu et al., 2025). Mask the current blocks with `Causal()` as well. When queries do not
                start at position 0, as in decoding, give `causal=False`, scores of −∞ for the future and `forced` for
                the present.

        Raises:
            TypeError: `k` is not an int.
            ValueError: `k` is below 1, or `scores` has fewer than three axes.
        """
        _check_block(block)
        check_static_int("from_scores", "k", k, 1)
        if scores.ndim < 3 or not jnp.issubdtype(scores.dtype, jnp.floating):
            raise ValueError(f"scores is {scores.dtype}{list(scores.shape)}: need floating point [..., N, QB, KB]")
        rows, columns = scores.shape[-2:]
        first, start = np.arange(rows)[:, None] * block[0], np.arange(columns) * block[1]
        eligible = (start < first + block[0]) if causal else np.ones((rows, columns), bool)
        must = eligible & (start + block[1] > first) if causal else np.zeros((rows, columns), bool)
        if forced is not None:
            must = must | (forced & eligible)
        # A zero of either sign is the same score; a score of +∞ must not pass before a forced block.
        ranked = jnp.where(scores == 0, 0, jnp.minimum(scores, jnp.finfo(scores.dtype).max))
        ranked = jnp.where(must, jnp.inf, jnp.where(eligible & ~jnp.isnan(scores), ranked, -jnp.inf))
        best, chosen = jax.lax.top_k(jax.lax.stop_gradient(ranked), min(k, columns))
        active = jnp.put_along_axis(jnp.zeros(ranked.shape, bool), chosen, best > -jnp.inf, axis=-1, inplace=False)
        return cls(active | must, block)

    def transpose(self) -> "BlockIndex":
        """Returns the query blocks that read each key block."""
        return BlockIndex(self.active.swapaxes(-1, -2), self.block[::-1])

    def density(self) -> Float[Array, ""]:
        """Returns the share of blocks that are active."""
        return jnp.asarray(self.active, jnp.float32).mean()

    def __or__(self, other: "BlockIndex") -> "BlockIndex":
        return BlockIndex(self.active | self._fitting(other).active, self.block)

    def __and__(self, other: "BlockIndex") -> "BlockIndex":
        return BlockIndex(self.active & self._fitting(other).active, self.block)

    def _fitting(self, other: "BlockIndex") -> "BlockIndex":
        mine, its = ((index.block, index.active.shape[-2:]) for index in (self, other))
        if mine != its:
            raise ValueError(f"blocks of {mine[0]}, {mine[1]} of them, and of {its[0]}, {its[1]}: need the same")
        return other


@part
class Standing:
    """Which slot a position stands in. Called on positions, it returns slots.

    Attributes:
        positions: [..., P], in ascending order.
        slots: [..., P], the slot of each position.
    """

    positions: Int[Array, "*batch places"]
    slots: Int[Array, "*batch places"]

    @classmethod
    def of(cls, positions: Int[Array, "*batch places"]) -> "Standing":
        """The slots of positions[..., i] in slot i. Of equal positions the first slot counts."""
        order = jnp.argsort(positions, axis=-1, stable=True)
        return cls(jnp.take_along_axis(positions, order, -1), order)

    def __call__(self, positions: Int[Array, "*b 1 a c"], grid: int) -> Int[Array, "*b 1 a c"]:
        """Returns the slots of the positions, and −1 for a position at which no slot stands.

        Args:
            positions: The positions to look up.
            grid: The number of axes after that of heads.
        """
        places, slots = (jnp.asarray(x)[..., None, :] for x in (self.positions, self.slots))
        most = np.iinfo(np.int32).max
        # How many places are below each position, a binary digit at a time.
        below = jnp.zeros_like(positions)
        for digit in reversed(range(places.shape[-1].bit_length())):
            more = below + 2**digit
            below = jnp.where(take(places, more - 1, grid, fill=most) < positions, more, below)
        found = (take(places, below, grid, fill=-1) == positions) & (positions >= 0)
        return jnp.where(found, take(slots, below, grid, fill=-1), -1)


@part
class Blocks(Mask):
    """Shows the blocks of an index: index.active[..., n, ⌊i / queries⌋, ⌊j / keys⌋] for query slot i and key slot j.

    Without `query_slots` and `key_slots`, slot i is where position i stands, as in a call with the default positions.
    In a call with other positions (an offset, a cache, permuted tokens) say where each slot stands, with `at`. Slots
    outside the index are hidden. A call skips the tiles in which no block is active and masks no tile in which all are.
    Where heads choose apart, each head skips its own tiles.

    Attributes:
        index: The blocks that are active.
        query_slots: Where the query positions stand.
        key_slots: Where the key positions stand.
    """

    index: BlockIndex
    query_slots: Standing | None = None
    key_slots: Standing | None = None

    @classmethod
    def at(
        cls,
        index: BlockIndex,
        query_positions: Int[Array, "*#b t"] | np.ndarray,
        key_positions: Int[Array, "*#b s"] | np.ndarray,
    ) -> "Blocks":
        """The mask of an index over the slots of a call with these positions.

        `BlockIndex.from_positions` and `from_scores` make such an index.

        Args:
            index: The blocks that are active.
            query_positions: Integers [..., T], all different but for empty slots, which are at −1.
            key_positions: Integers [..., S], likewise.

        Raises:
            TypeError: Positions are not integers.
        """
        _check_integers(query_positions, key_positions)
        return cls(index, *(Standing.of(jnp.asarray(x, jnp.int32)) for x in (query_positions, key_positions)))

    def _slots(self, query, key, grid):
        return tuple(
            at if standing is None else standing(at, grid)
            for standing, at in ((self.query_slots, query), (self.key_slots, key))
        )

    def __call__(self, query, key):
        slots, block = self._slots(query, key, grid=2), self.index.block
        rows, columns = (jnp.asarray(x) // size for x, size in zip(slots, block, strict=True))
        look_up = partial(take_pairs, jnp.asarray(self.index.active), grid=2, fill=False)
        # Where tiles fit the blocks, slots stand in even groups, and one look-up does for all pairs of two groups.
        of_rows, of_columns = math.gcd(block[0], rows.shape[-2]), math.gcd(block[1], columns.shape[-1])
        few = rows[..., ::of_rows, :], columns[..., ::of_columns]

        def spread(rows: Array, columns: Array) -> tuple[Array, Array]:
            return jnp.repeat(rows, of_rows, -2), jnp.repeat(columns, of_columns, -1)

        def of_groups() -> Array:
            return jnp.repeat(jnp.repeat(look_up(*few), of_rows, -2), of_columns, -1)

        if of_rows == of_columns == 1:
            return look_up(rows, columns)
        even = reduce(operator.and_, ((x == y).all() for x, y in zip(spread(*few), (rows, columns), strict=True)))
        return jax.lax.cond(even, of_groups, lambda: look_up(rows, columns))

    def bounds(self, query, key):
        # The active blocks in the rectangle that a tile's slots span, from sums over all blocks above and left.
        active = jnp.asarray(self.index.active, jnp.int32)
        sums = jnp.pad(active.cumsum(-1).cumsum(-2), [(0, 0)] * (active.ndim - 2) + [(1, 0), (1, 0)])
        places, (query, key) = (query, key), self._slots(query, key, grid=3)

        def span(slots, size, count):
            first, last = (x // size for x in tile_range(slots))
            return jnp.clip(first, 0, count), jnp.clip(last + 1, 0, count), last - first + 1

        top, bottom, rows = span(query, self.index.block[0], active.shape[-2])
        left, right, columns = span(key, self.index.block[1], active.shape[-1])

        def above(row, column):
            return take_pairs(sums, row, column, grid=2, fill=0)

        found = above(bottom, right) - above(top, right) - above(bottom, left) + above(top, left)
        shown = (every_slot(at, slots >= 0) for at, slots in zip(places, (query, key), strict=True))
        return found > 0, reduce(operator.and_, shown, found == rows * columns)

    @property
    def grain(self):
        return self.index.block

    def describe(self):
        return f"active blocks of {self.index.block[0]} x {self.index.block[1]}"


def block_means(
    key: Float[Array, "*b s k h"], size: int, there: Bool[Array, "*#b s"] | np.ndarray | None = None
) -> Float[Array, "*b kb k h"]:
    """The mean of each block of `size` keys, MoBA's centroids (Lu et al., 2025), by which `MoBA` chooses.

    Args:
        key: [..., S, K, H].
        size: The number of keys per block, at least 1. The last block may be shorter; its mean is over the keys it has.
        there: Booleans [..., S], which keys count; others may hold anything. By default all. A block of none is 0.

    Returns:
        The means [..., KB, K, H], in float32 or better.

    Raises:
        TypeError: `size` is not an int.
        ValueError: `size` is below 1.
    """
    check_static_int("block_means", "size", size, 1)
    key = key.astype(accumulator(key))
    if there is None:
        there = np.ones(key.shape[-3], bool)
    else:
        key = jnp.where(there[..., None, None], key, 0)
    short = -key.shape[-3] % size
    blocks = jnp.pad(key, [(0, short) if axis == key.ndim - 3 else (0, 0) for axis in range(key.ndim)])
    blocks = blocks.reshape(*key.shape[:-3], -1, size, *key.shape[-2:])
    count = (cut(there - 1, size) >= 0).sum(-1)
    return blocks.sum(-3) / count.clip(1)[..., None, None].astype(key.dtype)


def select_tokens(
    scores: Float[Array, "*b k s"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s k v"],
    k: int,
    key_positions: Int[Array, "*#b s"] | None = None,
) -> tuple[Float[Array, "*b c k h"], Float[Array, "*b c k v"], Int[Array, "*b c k"]]:
    """Copies out the k best-scored tokens of every key head, for decoding.

        key, value, positions = select_tokens(scores, key, value, k)
        attend(query, key, value, key_positions=positions)

    The few queries that share a key head then read these tokens, and nothing else of a long cache is touched again.
    Among equal scores the first tokens are taken. A score of −∞ or NaN is never chosen, and a head with fewer than k
    other tokens gets empty slots (position −1). With k ≥ S all tokens are taken, and the result is plain attention.
    Gradients flow to keys and values, not to scores.

    Args:
        scores: [..., K, S], a score for each token and key head.
        key: [..., S, K, H].
        value: [..., S, K, V].
        k: The number of tokens per key head, at least 1.
        key_positions: Integers [..., S], by default 0..S−1.

    Returns:
        A triple (key, value, key positions): [..., k, K, H], [..., k, K, V] and [..., k, K].

    Raises:
        TypeError: `k` is not an int.
        ValueError: `k` is below 1, or shapes do not fit.
    """
    check_static_int("select_tokens", "k", k, 1)
    *batch, length, heads, _ = key.shape
    if scores.shape != (*batch, heads, length):
        raise ValueError(f"scores has shape {scores.shape}: need [..., K, S] = {(*batch, heads, length)}")
    ranked = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.where(scores == 0, 0, scores))
    best, slots = jax.lax.top_k(jax.lax.stop_gradient(ranked), min(k, length))
    return take_tokens(jnp.where(best > -jnp.inf, slots, -1), key, value, key_positions)


def take_tokens(
    slots: Int[Array, "*b k c"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s k v"],
    key_positions: Int[Array, "*#b s"] | None = None,
) -> tuple[Float[Array, "*b c k h"], Float[Array, "*b c k v"], Int[Array, "*b c k"]]:
    """Copies out the tokens in the given slots of every key head.

    Args:
        slots: Integers [..., K, c]. A slot outside 0..S−1, such as −1, gives an empty one: position −1.
        key: [..., S, K, H].
        value: [..., S, K, V].
        key_positions: Integers [..., S], by default 0..S−1.

    Returns:
        A triple (key, value, key positions): [..., c, K, H], [..., c, K, V] and [..., c, K].

    Raises:
        TypeError: Slots or positions are not integers.
        ValueError: Shapes do not fit.
    """
    *batch, length, heads, _ = key.shape
    if not jnp.issubdtype(slots.dtype, jnp.integer):
        raise TypeError(f"slots must be integers, got {slots.dtype}")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value has shape {value.shape} but key has {key.shape}: need the same but for the last axis")
    if slots.shape[:-1] != (*batch, heads):
        raise ValueError(f"slots has shape {slots.shape}: need [..., K, c] = {(*batch, heads)} and any c")
    places = jnp.arange(length, dtype=jnp.int32) if key_positions is None else jnp.asarray(key_positions)
    if not jnp.issubdtype(places.dtype, jnp.integer):
        raise TypeError(f"key_positions must be integers, got {places.dtype}")
    if not positions_fit(places.shape, tuple(batch), length):
        raise ValueError(f"key_positions has shape {places.shape}: need [..., {length}] with batch axes {tuple(batch)}")
    slots = slots.swapaxes(-1, -2)
    inside = (slots >= 0) & (slots < length)
    index = jnp.where(inside, slots, 0)
    taken = (jnp.take_along_axis(x, index[..., None], axis=-3) for x in (key, value))
    places = jnp.take_along_axis(jnp.broadcast_to(places[..., None], key.shape[:-1]), index, axis=-2)
    return (*taken, jnp.where(inside, places, -1))  # type: ignore[return-value]


def _check_block(block: Any) -> None:
    if not isinstance(block, tuple) or len(block) != 2:
        raise TypeError(f"block must be a tuple of two, (queries, keys), got {block!r}")
    for size in block:
        check_static_int("BlockIndex", "block", size, 1)


def _check_integers(query_positions: Any, key_positions: Any) -> None:
    for name, places in (("query_positions", query_positions), ("key_positions", key_positions)):
        if not hasattr(places, "dtype") or not jnp.issubdtype(places.dtype, jnp.integer):
            raise TypeError(f"{name} must be an integer array, got {getattr(places, 'dtype', type(places).__name__)}")


def cut(positions: Any, size: int) -> Any:
    """Cuts [..., L] into [..., ceil(L / size), size], padded with empty slots."""
    xp: Any = np if isinstance(positions, np.ndarray) else jnp
    short = -positions.shape[-1] % size
    padding = [(0, 0)] * (positions.ndim - 1) + [(0, short)]
    padded = xp.pad(positions.astype(np.int32), padding, constant_values=-1)
    return padded.reshape(*positions.shape[:-1], -1, size)
