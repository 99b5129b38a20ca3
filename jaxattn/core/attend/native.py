"""Native sparse attention: compressed blocks, chosen blocks and a window, added by gates (Yuan et al., 2025)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.api import attend
from jaxattn.core.attend.blocks import BlockIndex, block_means, cut
from jaxattn.core.attend.choose import Choice, Ordered, in_order, places_of, seen_by, weights_at
from jaxattn.core.attend.mask import Causal, Window
from jaxattn.core.attend.score import Dot
from jaxattn.core.checks import check_static_int
from jaxattn.core.part import part


@part
class CompressedBlocks(Choice):
    """The blocks whose mean key has the largest softmax weight, as native sparse attention chooses (Yuan et al., 2025).

        p_tc = softmax_c(q_t · mean(k_j : j in block c) / √H)   over the blocks that end at t or before

    A query reads the first block, its own, the one before, and those of the largest p, on average over the query heads
    that share a key head; among equal ones the first. No later token has a say.

    Attributes:
        size: The number of keys per block, at least 1.
        pages: The number of blocks that are read, at least 1; those that are always read count.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1.
    """

    size: int
    pages: int

    def __post_init__(self):
        for name in ("size", "pages"):
            check_static_int("CompressedBlocks", name, getattr(self, name), 1)

    def is_dense(self, keys):
        return keys <= self.size * self.pages

    def choose(self, given: Ordered) -> BlockIndex:
        key = block_means(given.key, self.size, given.places >= 0)
        weights = weights_at(given.query, key, Dot(), jnp.asarray(given.last), _ends(given.places, self.size))
        *batch, heads, length, count = weights.shape
        group = heads // key.shape[-2]
        shared = weights.reshape(*batch, -1, group, length, count).mean(-3)
        past, own = given.near((1, self.size))
        column = np.arange(count)
        forced = own | (column == 0) | (column == given.last[..., None, :, None] // self.size - 1)
        shared = jnp.where(past, shared, -jnp.inf)
        index = BlockIndex.from_scores(shared, self.pages, (1, self.size), forced=forced & past, causal=False)
        return BlockIndex(jnp.repeat(index.active, group, -3), index.block)


def _ends(places: Any, size: int) -> Int[Array, "*#b kb"]:
    """Returns the place of the last key of each block, −1 for a block that is not whole."""
    return jnp.asarray(cut(places, size)[..., -1])


def native_sparse_attention(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s k v"],
    gates: Float[Array, "*b t n 3"],
    *,
    size: int = 64,
    blocks: int = 16,
    window: int = 512,
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | None = None,
) -> Float[Array, "*b t n v"]:
    """Adds what a query reads from three views of the keys, each normalised for itself:

        out = g_1 o_compressed + g_2 o_chosen + g_3 o_window

    - Compressed: the mean key and mean value of every block that ends at the query or before; 0 where there is none.
    - Chosen: the tokens of `blocks` blocks, causal: the first block, the query's own, the one before, and the blocks of
      the largest compressed weights, on average over the query heads that share a key head (`CompressedBlocks`).
    - Window: the last `window` tokens, the query itself among them.

    The choice has no gradient; it is learned by the compressed branch, whose scores make it. This is the variant of
    the open implementations: means in place of a learned compression, one block size without overlap, and the same keys
    and values in all branches. The paper's compresses by an MLP over overlapping blocks and has keys and values per
    branch. With gates (0, 1, 0) and as many blocks as there are, the result is causal attention; with (0, 0, 1) it is
    `Window(window − 1)`. No later token has a say in anything. Memory is that of a number per query, block and head.

    Blocks are cut from the tokens that are there, in the order of their positions, as by `Choice`.

    Args:
        query: [..., T, N, H].
        key: [..., S, K, H], where K divides N.
        value: [..., S, K, V].
        gates: [..., T, N, 3], for instance σ(W_g x).
        size: The number of keys per block, at least 1.
        blocks: The number of blocks that are chosen, at least 1; those that are always chosen count.
        window: The number of tokens of the window, at least 1.
        query_positions: As in `attend`; positions differ but for empty slots, which are −1.
        key_positions: As in `attend`, [..., S].

    Raises:
        TypeError or ValueError: A number is too small, or an array does not fit.
    """
    for name, number in (("size", size), ("blocks", blocks), ("window", window)):
        check_static_int("native_sparse_attention", name, number, 1)
    if gates.shape != (*query.shape[:-1], 3):
        raise ValueError(f"gates has shape {gates.shape}: need [..., T, N, 3] = {(*query.shape[:-1], 3)}")
    mask = CompressedBlocks(size, blocks)(query, key, query_positions=query_positions, key_positions=key_positions)
    positions: Any = {"query_positions": query_positions, "key_positions": key_positions}
    chosen = attend(query, key, value, mask=Causal() & mask, **positions)
    near = attend(query, key, value, mask=Window(window - 1), **positions)

    at = seen_by(query, key, query_positions, key_positions)
    (key, of_key), (value, _) = (in_order(x, key_positions) for x in (key, value))
    last, places = places_of(at, of_key)
    means = (block_means(x, size, places >= 0).astype(x.dtype) for x in (key, value))
    within: Any = {"query_positions": jnp.asarray(last), "key_positions": _ends(places, size)}
    compressed = attend(query, *means, mask=Causal(), **within)
    branches = zip(jnp.moveaxis(gates, -1, 0), (compressed, chosen, near), strict=True)
    return sum((gate[..., None] * out for gate, out in branches), jnp.zeros((), value.dtype)).astype(value.dtype)
