"""Landmark attention: the last token of each block stands for the block (Mohtashami & Jaggi, 2023)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.api import attend, attention_weights
from jaxattn.core.attend.blocks import BlockIndex, cut
from jaxattn.core.attend.choose import in_order, places_of, seen_by
from jaxattn.core.attend.mask import Causal, Chunked, Mask
from jaxattn.core.attend.partial import Partial, merge, merge_axis, with_log_mass
from jaxattn.core.checks import check_static_int
from jaxattn.core.part import part


@part
class _NoLandmarks(Mask):
    """Hides the last key of each block."""

    size: int

    def __call__(self, query, key):
        return key % self.size != self.size - 1


def landmark_attention(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s k v"],
    size: int,
    *,
    pages: int | None = None,
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | None = None,
) -> Float[Array, "*b t n v"]:
    """Reads past blocks through their landmarks: causal attention in which a landmark says what its block weighs.

    Every `size`-th token is a landmark and ends its block. With s_ij = q_i · k_j / √H, the weight of a token j in an
    earlier block c, whose landmark is l, is p_i(l) p_i(j | c):

        p_i(j | c) = softmax of s_ij over the tokens of c, without the landmark
        p_i        = softmax over the landmarks of all earlier blocks, and the tokens up to i of its own block

    Landmarks themselves are never read. In partial results: the one over a block takes the landmark's score for its log
    mass (`with_log_mass`), and all are merged. Were each score the log mass that the block has, the result would be
    softmax attention without the landmarks. With `pages`, a query reads only the blocks of the largest landmark scores,
    besides its own. No later token has a say. Tokens are counted in the order of their positions.

    Memory is linear in length, forward and backward. All pairs are computed, the future ones too.

    Args:
        query: [..., T, N, H].
        key: [..., S, K, H], where K divides N.
        value: [..., S, Kv, V].
        size: The number of tokens per block with its landmark, at least 2.
        pages: The number of earlier blocks that are read, at least 1; None for all.
        query_positions: As in `attend`; positions differ but for empty slots, which are −1.
        key_positions: As in `attend`, [..., S].

    Raises:
        TypeError or ValueError: A number is too small, or an array does not fit.
    """
    check_static_int("landmark_attention", "size", size, 2)
    if pages is not None:
        check_static_int("landmark_attention", "pages", pages, 1)
    at = seen_by(query, key, query_positions, key_positions)
    (key, of_key), (value, _) = (in_order(x, key_positions) for x in (key, value))
    last, places = (jnp.asarray(x) for x in places_of(at, of_key))
    near: Any = {"mask": Causal() & Chunked(size) & _NoLandmarks(size), "return_lse": True}
    out, extras = attend(query, key, value, query_positions=last, key_positions=places, **near)
    own = Partial(out, extras["lse"])

    def blocks(x: Array, axis: int) -> Array:
        """Cuts the axis of keys into blocks, in front."""
        short = -x.shape[axis] % size
        x = jnp.pad(x, [(0, short) if i == x.ndim + axis else (0, 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], -1, size, *x.shape[x.ndim + axis + 1 :])
        return jnp.moveaxis(x, axis - 1, 0)

    keys, values = blocks(key, -3), blocks(value, -3)
    tokens = jnp.moveaxis(cut(places, size), -2, 0)[..., :-1]  # [KB, ..., size - 1]
    ends = size * np.arange(1, len(keys) + 1)  # a block is past from the place after its landmark on
    landmarks = jnp.moveaxis(keys[..., -1, :, :], 0, -3)

    @jax.checkpoint
    def earlier(tile: tuple[Array, Array]) -> Partial:
        """What a tile of queries reads in the blocks before their own."""
        query, last = tile
        places: Any = {"query_positions": last, "key_positions": ends}
        scores = attention_weights(query, landmarks, mask=Causal(), **places)[1]
        if pages is not None:
            scores = jnp.where(BlockIndex.from_scores(scores, pages, (1, 1), causal=False).active, scores, -jnp.inf)

        def of_block(key: Array, value: Array, places: Array, end: Array, mass: Array) -> Partial:
            seen = jnp.where(last >= end, last, -1)
            options: Any = {"query_positions": seen, "key_positions": places, "return_lse": True}
            out, extras = attend(query, key[..., :-1, :, :], value[..., :-1, :, :], implementation="dense", **options)
            return with_log_mass(Partial(out, extras["lse"]), mass)

        masses = jnp.moveaxis(scores, -1, 0).swapaxes(-1, -2)  # [KB, ..., t, N]
        return merge_axis(jax.vmap(of_block)(keys, values, tokens, jnp.asarray(ends), masses), 0)

    length, count = query.shape[-3], min(size, query.shape[-3])
    last = jnp.broadcast_to(last, query.shape[:-2])
    short = -length % count
    widths = [(0, 0)] * (query.ndim - 3) + [(0, short)]
    padded = jnp.pad(query, [*widths, (0, 0), (0, 0)]), jnp.pad(last, widths, constant_values=-1)
    axis = query.ndim - 3
    tiles = [jnp.moveaxis(x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :]), axis, 0) for x in padded]

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])[(slice(None),) * axis + (slice(length),)]

    return merge(own, jax.tree.map(joined, jax.lax.map(earlier, tuple(tiles)))).out
