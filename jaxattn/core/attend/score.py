"""Scores: how well a query matches a key.

A score is a part called on a tile, `score(query [..., N, T, H], key [..., K, S, H], tile) -> [..., N, T, S]`, heads
first, in float32 or better. Query head n belongs to key head n // (N / K). The `Tile` says where both stand.
"""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.attend.tile import Tile
from jaxattn.core.matmul import accumulator, grouped_matmul, precision, product
from jaxattn.core.part import part

Scores = Float[Array, "*b n t s"]


class Score(abc.ABC):
    """The base class of parts for the score slot; the head of this file says what they must offer."""

    @abc.abstractmethod
    def __call__(self, query: Float[Array, "*b n t h"], key: Float[Array, "*b k s h"], tile: Tile) -> Scores:
        """Returns how well each query matches each key, [..., N, T, S]."""


def mapped_scores(score: Any, bias: Any, score_maps: tuple, query: Array, key: Array, tile: Tile) -> Scores:
    """Returns score(q, k) + bias, through the score maps: a tile of [..., N, T, S], in the accumulator's dtype.

    `bias` is a part, the numbers it gave for this tile, or None.
    """
    scores = score(query, key, tile).astype(accumulator(query, key))
    if bias is not None:
        scores = scores + (bias(tile) if callable(bias) else bias).astype(scores.dtype)
    for score_map in score_maps:
        scores = score_map(scores, tile)
    return scores


@part
class Dot(Score):
    """Scaled dot product: score = scale · q·k  (Vaswani et al., 2017).

    Attributes:
        scale: The factor, by default H**-0.5. An array is learned.

    Raises:
        ValueError: The head dims of query and key differ.
    """

    scale: Float[Array, ""] | float | None = None

    def __call__(self, query: Float[Array, "*b n t h"], key: Float[Array, "*b k s h"], tile: Tile) -> Scores:
        if query.shape[-1] != key.shape[-1]:
            raise ValueError(
                f"query has head dim {query.shape[-1]} but key has {key.shape[-1]}: Dot needs them to be equal"
            )
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return grouped_matmul(query, key, -1, gathered=tile.key.shape[-3] > 1) * scale


def _spread(heads: Float[Array, "*b k s h"], count: int) -> Float[Array, "*b n s h"]:
    """Repeats every key head for the query heads that read it."""
    return jnp.repeat(heads, count // heads.shape[-3], -3)


@part
class Bilinear(Score):
    """score = qᵀ W k, the `general` score of Luong et al. (2015). W = I/√H is scaled dot product.

    Attributes:
        weight: W [H, H'], shared by the heads, or [N, H, H'] with one per head. Query and key head dims may differ.
    """

    weight: Float[Array, "h g"] | Float[Array, "heads h g"]

    def __call__(self, query: Float[Array, "*b n t h"], key: Float[Array, "*b k s g"], tile: Tile) -> Scores:
        rotated = jnp.matmul(
            query, self.weight, precision=precision(query, self.weight), preferred_element_type=accumulator(query)
        )
        return grouped_matmul(rotated, key.astype(rotated.dtype), -1)


# A score that is not a matrix product holds [rows, S, hidden] numbers per head for as many query rows at once as keep
# this below so many; never T x S x hidden.
PAIR_NUMBERS = 2**20


def _pairwise(
    of_pair: Callable[[Array, Array], Array],
    query: Float[Array, "*b n t d"],
    key: Float[Array, "*b n s d"],
    hidden: int = 0,
) -> Float[Array, "*b n t s"]:
    """Computes out[..., t, s] = of_pair(query[..., t, :] [..., 1, d], key [..., s, d]), a few rows at a time.

    The rows are recomputed for gradients. `of_pair` must broadcast; it holds up to max(d, hidden) numbers per pair.
    """
    length, width = query.shape[-2:]
    per_row = query.size // (length * width) * key.shape[-2] * max(width, hidden)
    rows = max(1, min(length, PAIR_NUMBERS // per_row))

    @jax.checkpoint
    def some_rows(query: Array, key: Array) -> Array:
        return of_pair(query[..., :, None, :], key[..., None, :, :])

    if rows == length:
        return some_rows(query, key)
    padded = jnp.pad(query, [(0, 0)] * (query.ndim - 2) + [(0, -length % rows), (0, 0)])
    blocks = jnp.moveaxis(padded.reshape(*query.shape[:-2], -1, rows, width), -3, 0)
    out = jnp.moveaxis(jax.lax.map(lambda block: some_rows(block, key), blocks), 0, -3)
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])[..., :length, :]


@part
class Additive(Score):
    """score = vᵀ tanh(A q + B k), shared by all heads  (Bahdanau et al., 2015).

    With A = 0 the score does not depend on the query.

    Attributes:
        query_weight: A [H, D].
        key_weight: B [H', D].
        vector: v [D].
    """

    query_weight: Float[Array, "h d"]
    key_weight: Float[Array, "g d"]
    vector: Float[Array, " d"]

    def __call__(self, query: Float[Array, "*b n t h"], key: Float[Array, "*b k s g"], tile: Tile) -> Scores:
        dtype = accumulator(query, key)
        query, key = product(query.astype(dtype), self.query_weight), product(key.astype(dtype), self.key_weight)
        return _pairwise(lambda q, k: product(jnp.tanh(q + k), self.vector), query, _spread(key, query.shape[-3]))


@part
class Neural(Score):
    """score = w₃ᵀ relu(W₂ᵀ relu(W₁ᵀ [q; k] + b₁) + b₂), a network on the pair, shared by all heads.

    The score is that of neural attention (2025). It has no scale: the last layer sets the temperature. The memory is
    never T x S x D.

    Attributes:
        w1: W₁ [H + H', D]. Its first H rows read the query, and the others the key.
        b1: b₁ [D].
        w2: [D] for a network that ends here, w₂ᵀ relu(...), or [D, E] for one with a second hidden layer.
        b2: b₂ [E], with a second hidden layer.
        w3: w₃ [E], with a second hidden layer.

    Raises:
        ValueError: Widths do not fit.
    """

    w1: Float[Array, "pair d"]
    b1: Float[Array, " d"]
    w2: Float[Array, " d"] | Float[Array, "d e"]
    b2: Float[Array, " e"] | None = None
    w3: Float[Array, " e"] | None = None

    def __call__(self, query: Float[Array, "*b n t h"], key: Float[Array, "*b k s g"], tile: Tile) -> Scores:
        width, deep = query.shape[-1], jnp.ndim(self.w2) == 2
        if jnp.shape(self.w1)[0] != width + key.shape[-1] or deep != (self.b2 is not None and self.w3 is not None):
            raise ValueError(
                f"Neural: w1 has shape {jnp.shape(self.w1)} and w2 {jnp.shape(self.w2)}: with head dims {width} and "
                f"{key.shape[-1]} need w1 [{width + key.shape[-1]}, D], and b2 and w3 if and only if w2 is [D, E]"
            )
        dtype = accumulator(query, key)
        # The first layer of a pair is a sum of one part per query and one per key.
        query = product(query.astype(dtype), self.w1[:width]) + self.b1
        key = product(key.astype(dtype), self.w1[width:])

        def network(q: Array, k: Array) -> Array:
            hidden = product(jax.nn.relu(q + k), self.w2)
            return hidden if self.b2 is None or self.w3 is None else product(jax.nn.relu(hidden + self.b2), self.w3)

        widest = max(jnp.shape(self.w1)[-1], jnp.shape(self.w2)[-1])
        return _pairwise(network, query, _spread(key, query.shape[-3]), widest)


@part
class NegativeDistance(Score):
    """score = −scale · |q − k|², which under softmax is a Gaussian kernel of variance 1 / (2 scale).

    The score equals 2 scale · q·k − scale · |k|² up to a term that a row shares.

    Attributes:
        scale: The factor, by default 1 / (2 √H), which is scaled dot product where all keys have the same norm.

    Raises:
        ValueError: The head dims of query and key differ.
    """

    scale: Float[Array, ""] | float | None = None

    def __call__(self, query: Float[Array, "*b n t h"], key: Float[Array, "*b k s h"], tile: Tile) -> Scores:
        if query.shape[-1] != key.shape[-1]:
            raise ValueError(
                f"query has head dim {query.shape[-1]} but key has {key.shape[-1]}: NegativeDistance needs them equal"
            )
        dtype = accumulator(query, key)
        scale = query.shape[-1] ** -0.5 / 2 if self.scale is None else self.scale
        # Distances do not change when both sides move: seen from one of the keys, the largest so that it is no empty
        # slot, squares that are large beside the distances do not have to cancel.
        key = jnp.asarray(key, dtype)
        largest = jnp.square(key).sum(-1, keepdims=True).argmax(-2, keepdims=True)
        origin = jax.lax.stop_gradient(jnp.take_along_axis(key, largest, -2))
        query, key = query.astype(dtype) - _spread(origin, query.shape[-3]), key - origin
        sizes = [jnp.square(x).sum(-1) for x in (query, _spread(key, query.shape[-3]))]
        products = grouped_matmul(query, key, -1)
        return -scale * (sizes[0][..., :, None] - 2 * products + sizes[1][..., None, :])


@part
class PairSum(Score):
    """score = LeakyReLU(a·q + b·k): graph attention (Veličković et al., 2018).

    All queries rank their keys alike, since LeakyReLU is monotone. Without it (slope 1) softmax does not see the query.

    Attributes:
        query_vector: a [H], or [N, H] with one per head.
        key_vector: b [H'], or [N, H'] with one per head.
        negative_slope: The slope of the LeakyReLU below 0.
    """

    query_vector: Float[Array, " h"] | Float[Array, "heads h"]
    key_vector: Float[Array, " g"] | Float[Array, "heads g"]
    negative_slope: float = 0.2

    def __call__(self, query: Float[Array, "*b n t h"], key: Float[Array, "*b k s g"], tile: Tile) -> Scores:
        dtype = accumulator(query, key)
        heads = (query.astype(dtype), self.query_vector), (_spread(key, query.shape[-3]).astype(dtype), self.key_vector)
        a, b = ((x * jnp.asarray(vector)[..., None, :]).sum(-1) for x, vector in heads)
        return jax.nn.leaky_relu(a[..., :, None] + b[..., None, :], self.negative_slope)


@part
class Location(Score):
    """score_ij = q_i · w_j with a learned vector per key position, whatever the key holds (Luong et al., 2015).

    Attributes:
        weight: [R, H], or [N, R, H] with one table per head. Key positions outside the table score 0, and R = 1 is one
            vector for all.
    """

    weight: Float[Array, "positions h"] | Float[Array, "heads positions h"]

    def __call__(self, query: Float[Array, "*b n t h"], key: Float[Array, "*b k s g"], tile: Tile) -> Scores:
        weight = jnp.asarray(self.weight)
        weight = weight if weight.ndim == 3 else weight[None]
        by_position = jnp.matmul(
            query,
            weight.swapaxes(-1, -2),
            precision=precision(query, weight),
            preferred_element_type=accumulator(query, weight),
        )
        key_positions = jnp.minimum(tile.key, 0) if weight.shape[-2] == 1 else tile.key
        inside = (key_positions >= 0) & (key_positions < weight.shape[-2])
        index = jnp.where(inside, key_positions, 0)
        index = index.reshape((1,) * (by_position.ndim - index.ndim) + index.shape)
        return jnp.where(inside, jnp.take_along_axis(by_position, index, -1), 0)
