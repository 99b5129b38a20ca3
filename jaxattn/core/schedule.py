"""Which tiles of the (query, key) plane are worth computing."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxattn.core.mask import Mask
from jaxattn.core.parts import part


@part
class Schedule:
    """For each query tile, the key tiles it needs, those that need no mask first.

    Row i of `tiles` starts with `full[i]` tiles in which every pair is visible, goes on to `count[i]` with those in
    which some may be, and ends with tiles that are not computed. A query tile is computed once for all batch entries
    and heads, so a tile is skipped when it is empty for all of them. NumPy arrays when known at trace time.
    """

    tiles: Int[Array, "qb a"]
    full: Int[Array, " qb"]
    count: Int[Array, " qb"]


def schedule(
    mask: Mask | None, query: Int[Array, "*b 1 qb 1 bq"], key: Int[Array, "*b 1 1 kb bk"]
) -> tuple[Schedule, tuple[bool, bool]]:
    """The active tiles of a mask over tiled positions (−1 is an empty slot).

    Also whether any tile is full, and whether any is partial, as far as trace time can tell.
    """
    possible, certain = (np.True_, np.True_) if mask is None else mask.bounds(query, key)
    possible = possible & (query >= 0).any(-1) & (key >= 0).any(-1)
    certain = certain & (query >= 0).all(-1) & (key >= 0).all(-1)
    static = isinstance(possible, np.ndarray | np.bool_) and isinstance(certain, np.ndarray | np.bool_)
    xp: Any = np if static else jnp
    grid = (query.shape[-3], key.shape[-2])
    over = tuple(range(np.ndim(possible) - 2))
    possible = xp.broadcast_to(possible.any(over), grid)
    certain = xp.broadcast_to(certain.all(over), grid)
    rank = xp.where(possible, xp.where(certain, 0, 1), 2)
    tiles = xp.argsort(rank, axis=-1, stable=True).astype(np.int32)
    full = (rank == 0).sum(-1).astype(np.int32)
    count = (rank < 2).sum(-1).astype(np.int32)
    if not static:
        return Schedule(tiles, full, count), (True, True)
    tiles = tiles[:, : max(int(count.max()), 1)]
    return Schedule(tiles, full, count), (bool(full.any()), bool((count > full).any()))


# Tile sizes (queries, keys) to choose from: large ones use the cores well, small ones fit narrow masks.
BLOCKS = {"cpu": ((256, 512), (256, 256), (128, 128))}
PARALLEL_BLOCKS = ((512, 1024), (256, 256), (128, 128))
# What starting a tile costs, in (query, key) pairs; fitted to causal and window masks of length 8192 on two CPU cores.
TILE_COST = 2**12


def choose_block(
    index_of: Callable[[tuple[int, int]], Schedule], lengths: tuple[int, int], blocks: Sequence | None = None
) -> tuple[int, int]:
    """The tile size that computes the fewest pairs, counting `TILE_COST` per tile; the largest if that is not known."""
    blocks = blocks or BLOCKS.get(jax.default_backend(), PARALLEL_BLOCKS)
    blocks = [(min(queries, lengths[0]), min(keys, lengths[1])) for queries, keys in blocks]

    def cost(block: tuple[int, int]) -> int:
        return int(index_of(block).count.sum()) * (block[0] * block[1] + TILE_COST)

    return min(blocks, key=cost) if isinstance(index_of(blocks[0]).count, np.ndarray) else blocks[0]
