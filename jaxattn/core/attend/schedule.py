"""Which parts of the (query, key) plane are worth computing."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxattn.core.attend.mask import Mask
from jaxattn.core.part import part


@dataclasses.dataclass(frozen=True)
class Block:
    """A tile of `queries` x `keys`. Query tiles lie on a grid; keys are taken from any multiple of `granule` on."""

    queries: int
    keys: int
    granule: int


@part
class Schedule:
    """For each query tile, the granules at which its tiles start, those that need no mask first.

    The tiles of a row do not overlap. A query tile is computed once for all batch entries and heads, so keys are
    skipped when they are empty for all of them. A call that is cut into pieces (see `Apart`) has a schedule for each,
    along leading axes. The arrays are NumPy arrays when known at trace time.

    Attributes:
        starts: Row i begins with `full[i]` tiles in which every pair is visible, goes on to `count[i]` with tiles in
            which some pairs may be, and ends with tiles that are not computed.
        full: The number of tiles of each row that need no mask.
        count: The number of tiles of each row that are computed.
    """

    starts: Int[Array, "*pieces qb a"]
    full: Int[Array, "*pieces qb"]
    count: Int[Array, "*pieces qb"]


class Apart(NamedTuple):
    """How a call is cut into pieces that each have their own schedule. A number of 1 means no cut.

    Attributes:
        entries: The number of batch entries.
        groups: The number of groups of heads that read a key head.
        members: The number of members of a group.
    """

    entries: int = 1
    groups: int = 1
    members: int = 1

    @property
    def pieces(self) -> tuple[int, ...]:
        """The leading axes of the schedule."""
        return tuple(size for size in self if size > 1)


TOGETHER = Apart()


@dataclasses.dataclass(frozen=True)
class Kinds:
    """The facts about a schedule that are known at trace time.

    Attributes:
        full: Whether any tile is full.
        partial: Whether any tile is not full.
        single: Whether every query tile has exactly one tile.
    """

    full: bool
    partial: bool
    single: bool


def _tile_starts(possible: Bool[Array, "qb g"], run: int) -> Bool[Array, "qb g"]:
    """Returns where tiles of `run` granules start that cover all possible ones: each at the first not yet covered."""
    if run == 1:
        return possible
    if isinstance(possible, np.ndarray):
        starts, free = np.zeros_like(possible), np.zeros(len(possible), int)
        for granule in range(possible.shape[-1]):
            starts[:, granule] = possible[:, granule] & (granule >= free)
            free = np.where(starts[:, granule], granule + run, free)
        return starts

    def step(covered: Array, column: Array) -> tuple[Array, Array]:
        start = column & (covered == 0)
        return jnp.where(start, run - 1, jnp.maximum(covered - 1, 0)), start

    _, starts = jax.lax.scan(step, jnp.zeros_like(possible[:, 0], int), possible.T)
    return starts.T


def schedule(
    mask: Mask | None,
    query: Int[Array, "*b 1 qb 1 bq"],
    key: Int[Array, "*b #n 1 g gk"],
    run: int = 1,
    apart: Apart = TOGETHER,
    batch: tuple[int, ...] = (),
) -> tuple[Schedule, Kinds]:
    """Returns the tiles of `run` granules that a mask needs, and their kinds.

    Args:
        mask: The mask.
        query: The positions of queries in tiles, −1 for an empty slot.
        key: The positions of keys in granules, −1 for an empty slot.
        run: The number of granules per tile.
        apart: How the call is cut into pieces.
        batch: The axes of the batch of which `apart` makes pieces.
    """
    possible, certain = (np.True_, np.True_) if mask is None else mask.bounds(query, key)
    possible = possible & (query >= 0).any(-1) & (key >= 0).any(-1)
    certain = certain & (query >= 0).all(-1) & (key >= 0).all(-1)
    static = isinstance(possible, np.ndarray | np.bool_) and isinstance(certain, np.ndarray | np.bool_)
    xp: Any = np if static else jnp
    grid = (query.shape[-3], key.shape[-2])

    def of_pieces(x: Any, over: Any) -> Any:
        """[*b, N or 1, QB, G] as [pieces · QB, G]: whether it holds over the batch entries and heads of each piece."""
        heads = x.shape[-3]
        entries = batch if apart.entries > 1 else np.shape(x)[:-3]
        x = xp.broadcast_to(x, (*entries, heads, *grid)).reshape(apart.entries, -1, heads, *grid)
        groups = apart.groups * apart.members
        x = over(over(x, 1).reshape(apart.entries, min(groups, heads), -1, *grid), 2)
        return xp.broadcast_to(x, (apart.entries, groups, *grid)).reshape(-1, grid[1])

    possible, certain = of_pieces(possible, xp.any), of_pieces(certain, xp.all)
    starts = _tile_starts(possible, run)
    beyond = xp.zeros((len(certain), run - 1), bool)
    padded = xp.concatenate([certain, beyond], -1)
    every = xp.stack([padded[:, i : i + grid[1]] for i in range(run)]).all(0)
    rank = xp.where(starts, xp.where(every, 0, 1), 2)
    order = xp.argsort(rank, axis=-1, stable=True).astype(np.int32)
    full = (rank == 0).sum(-1).astype(np.int32)
    count = (rank < 2).sum(-1).astype(np.int32)
    kinds = Kinds(True, True, False)
    if static:
        order = order[:, : max(int(count.max()), 1)]
        kinds = Kinds(bool(full.any()), bool((count > full).any()), bool((count == 1).all()))
    rows = (*apart.pieces, grid[0])
    return Schedule(order.reshape(*rows, -1), full.reshape(rows), count.reshape(rows)), kinds


# Tiles to choose from: large ones use the cores well, small ones fit narrow masks.
BLOCKS = {"cpu": (Block(256, 512, 512), Block(256, 512, 128), Block(128, 384, 128), Block(128, 128, 128))}
PARALLEL_BLOCKS = (Block(512, 1024, 1024), Block(256, 256, 256), Block(128, 128, 128))
# What starting a tile costs, in (query, key) pairs; fitted to causal and window masks of length 8192 on two CPU cores.
TILE_COST = 2**14


# Up to so many queries are bound by reading keys. A tile of these should stay in cache after it was cut out:
# with 8 x 2 KiB per key, 256 keys were 1.3 times as fast as 512 and 1.8 times as fast as 1024 (two CPU cores).
FEW_QUERIES, READ_BYTES = 16, 2**22
# Up to so many bytes of keys and values, decoding takes less time with a copy of them than in tiles: 8 MiB took 0.7 ms
# in place of 1.3 (two CPU cores, AMD EPYC).
COPIED_BYTES = 2**24


def blocks_for(
    queries: int, bytes_per_key: int, grain: tuple[int, int] | None = None, alone: bool = False
) -> tuple[Block, ...]:
    """Returns the blocks to choose from on this backend. The first fits the `grain` of the mask, if there is one.

    Args:
        queries: The number of queries.
        bytes_per_key: The bytes that a key takes over batch and heads.
        grain: The grain of the mask.
        alone: Whether a piece is one head, or the heads of one key head.
    """
    backend = jax.default_backend()
    if backend == "cpu" and queries <= FEW_QUERIES:
        keys = 2 ** min(max((READ_BYTES // bytes_per_key).bit_length() - 1, 6), 11)
        return (Block(queries, keys, keys),)
    blocks: tuple[Block, ...] = BLOCKS.get(backend, PARALLEL_BLOCKS)
    if alone and backend == "cpu":
        blocks = blocks[-1:]  # of one head, the fastest for every mask and direction that was measured
    if grain is None:
        return blocks
    keys = _in_grains(grain[1], blocks[-1].keys, blocks[0].keys)
    return (Block(_in_grains(grain[0], blocks[-1].queries, blocks[0].queries), keys, keys), *blocks)


def _in_grains(grain: int, least: int, most: int) -> int:
    """Returns a size that fits blocks of this grain.

    The size is the grain itself if it is from `least` to `most`, an even part of a larger grain, and as many of a
    smaller grain as make up `least`.
    """
    if grain < least:
        return -(-least // grain) * grain
    fewest = -(-grain // most)
    return next((grain // n for n in range(fewest, max(fewest, 2 * grain // most) + 1) if grain % n == 0), most)


def choose_block(index_of: Callable[[Block], Schedule], lengths: tuple[int, int], blocks: Iterable[Block]) -> Block:
    """Returns the block that computes the fewest pairs, counting `TILE_COST` per tile; if unknown, the first."""
    blocks = [fit(block, lengths) for block in blocks]

    def cost(block: Block) -> int:
        return int(index_of(block).count.sum()) * (block.queries * block.keys + TILE_COST)

    return min(blocks, key=cost) if isinstance(index_of(blocks[0]).count, np.ndarray) else blocks[0]


def fit(block: Block, lengths: tuple[int, int]) -> Block:
    """Returns the block, no larger than the lengths need."""
    granule = min(block.granule, lengths[1])
    return Block(min(block.queries, lengths[0]), min(block.keys, -(-lengths[1] // granule) * granule), granule)
