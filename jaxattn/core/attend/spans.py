"""Spans of a text, found as dense triangles of its attention map (Ltri-LLM, 2024)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.checks import check_static_int
from jaxattn.core.matmul import accumulator


class Intervals(NamedTuple):
    """Intervals of tokens, the best first.

    Attributes:
        start: [..., M], the first token.
        end: [..., M], the last token.
        valid: [..., M], whether there is such an interval; where not, start and end are −1.
    """

    start: Int[Array, "*b m"]
    end: Int[Array, "*b m"]
    valid: Bool[Array, "*b m"]


def triangle_scores(
    weights: Float[Array, "*b t t"], threshold: Float[Array, "*#b #t #t"] | float
) -> Float[Array, "*b t t"]:
    """Returns how dense the triangle below the diagonal is between every two tokens x ≤ y:

        S_xy = Σ_{i=x..y} Σ_{j=x..i} (A_ij − θ_ij)

    A triangle has a positive score if its weights are above the threshold on average. All scores come from one prefix
    sum C of the causal part, S_xy = C_yy − C_{y,x−1}, with the sum C_ij over rows up to i and columns up to j.

    Args:
        weights: A [..., W, W], the attention of W tokens to each other; what is above the diagonal does not count.
        threshold: θ, a number or an array that broadcasts to A. Rows of A sum to 1, so early triangles are dense
            whatever they hold: c / (i + 1) in row i makes up for that.

    Returns:
        [..., W, W], first token × last token; −∞ for y < x.

    Raises:
        ValueError: `weights` is not square.
    """
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights has shape {weights.shape}: need [..., W, W]")
    length = weights.shape[-1]
    causal = jnp.tri(length, dtype=bool)
    above = jnp.where(causal, weights - threshold, 0).astype(accumulator(weights))
    total = jnp.pad(above.cumsum(-2).cumsum(-1), [(0, 0)] * (above.ndim - 1) + [(1, 0)])  # [..., y, x]: columns below x
    score = jnp.diagonal(total[..., 1:], axis1=-2, axis2=-1)[..., :, None] - total[..., :-1]  # [..., y, x]
    return jnp.where(causal, score, -jnp.inf).swapaxes(-1, -2)


def interval_nms(
    scores: Float[Array, "*b t t"], overlap: float, count: int, least: int = 1, most: int | None = None
) -> Intervals:
    """Returns the best intervals, without those that overlap a better one: greedy non-maximum suppression.

    An interval with a positive score is taken if its overlap with each that is taken already, the number of common
    tokens over that of all of both, is at most `overlap`. With 0 the intervals are disjoint. Of equal scores the
    interval that begins first goes first, and then the shorter one.

    Args:
        scores: [..., W, W], first token × last token, as from `triangle_scores`.
        overlap: From 0 to 1.
        count: M, the largest number of intervals, at least 1.
        least: The least number of tokens of an interval, at least 1.
        most: The largest number; None for any.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range, or `scores` is not square.
    """
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"scores has shape {scores.shape}: need [..., W, W]")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap}: need a number from 0 to 1")
    check_static_int("interval_nms", "count", count, 1)
    check_static_int("interval_nms", "least", least, 1)
    if most is not None:
        check_static_int("interval_nms", "most", most, least)
    width = scores.shape[-1]
    first, last = jnp.arange(width)[:, None], jnp.arange(width)
    length = last - first + 1
    fits = (length >= least) & (length <= (width if most is None else most))

    def of_one(scores: Array) -> Intervals:
        def take(left: Array, _: None) -> tuple[Array, tuple]:
            best = left.reshape(-1).argmax()
            x, y = best // width, best % width
            valid = left[x, y] > 0
            common = jnp.maximum(jnp.minimum(last, y) - jnp.maximum(first, x) + 1, 0)
            near = common > overlap * (length + (y - x + 1) - common)
            left = jnp.where(near | ((first == x) & (last == y)), -jnp.inf, left)
            return left, (jnp.where(valid, x, -1), jnp.where(valid, y, -1), valid)

        left = jnp.where(fits & ~jnp.isnan(scores), scores, -jnp.inf)
        return Intervals(*jax.lax.scan(take, left, None, count)[1])

    found = jax.vmap(of_one)(scores.reshape(-1, width, width))
    return Intervals(*(x.reshape(*scores.shape[:-2], count) for x in found))


def span_of_tokens(intervals: Intervals, length: int) -> Int[Array, "*b t"]:
    """Returns the number of the span of each token, 0, 1, ... in the order of the text: pages of any length.

    A token in several intervals belongs to the best one. Tokens between the intervals make spans of their own.
    """
    at, where = jnp.arange(length), (..., slice(None), None)
    inside = intervals.valid[where] & (at >= intervals.start[where]) & (at <= intervals.end[where])
    owner = jnp.where(inside.any(-2), inside.argmax(-2), -1)
    return jnp.pad((owner[..., 1:] != owner[..., :-1]).cumsum(-1), [(0, 0)] * (owner.ndim - 1) + [(1, 0)])
