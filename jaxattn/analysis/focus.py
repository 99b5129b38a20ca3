"""How much of a head's attention goes to a part of the text, such as an image or an instruction, and how narrowly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.attend.measure import Measure
from jaxattn.core.checks import check_static_int
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.core.table import take


class SegmentFocus(NamedTuple):
    """Attention to a segment of the keys.

    Attributes:
        mass: W = Σ_{j in segment} w_j.
        concentration: 1 − H(w / W) / log |segment|: 0 for equal weights, 1 for a single key. NaN without weight in the
            segment, or where it has one key.
    """

    mass: Array
    concentration: Array


def segment_focus(weights: Float[Array, "*b s"], segment: Bool[Array, "*#b s"], *, without: int = 0) -> SegmentFocus:
    """Returns how much of each row is in a segment, and how narrow it is there.

    A head that reads an image has a large W · C over its queries (Bi et al., 2024, whose formula of concentration is
    not known here). A patch that many queries rest on looks like a narrow gaze: leave out the largest keys.

    Args:
        weights: [..., S], at least 0.
        segment: [..., S], the keys that are in the segment, such as those of the image that a query sees.
        without: How many of the largest weights of the segment are left out of it, in each row.

    Raises:
        TypeError: `without` is not an int.
        ValueError: `without` is negative.
    """
    check_static_int("segment_focus", "without", without, 0)
    weights = jnp.asarray(weights)
    inside = jnp.broadcast_to(segment, weights.shape)
    if without:
        _, top = jax.lax.top_k(jnp.where(inside, weights, -1), min(without, weights.shape[-1]))
        inside = jnp.put_along_axis(inside, top, False, axis=-1, inplace=False)
    kept = jnp.where(inside, weights, 0)
    mass, count = kept.sum(-1), inside.sum(-1)
    p = ratio(kept, mass[..., None])
    some = ~(p <= 0)
    entropy = -jnp.where(some, p * jnp.log(jnp.where(some, p, 1)), 0).sum(-1)
    narrow = 1 - entropy / jnp.log(jnp.maximum(count, 2))
    return SegmentFocus(mass, jnp.where((mass <= 0) | (count < 2), jnp.nan, narrow))


@part
class Focus(Measure):
    """`segment_focus` of every row: the pair (mass, concentration), each [..., T, N], of the keys that a query sees.

    Attributes:
        segment: [..., P], a table over key positions of booleans. Keys outside of it are not in the segment.
        without: How many of the largest weights of the segment are left out.
    """

    segment: Bool[Array, "*batch positions"]
    without: int = 0

    def __call__(self, view, tile):
        table = jnp.asarray(self.segment).astype(int)[..., None, :]
        inside = (take(table, tile.key, 2, fill=0) > 0) & tile.shown(view.weights.shape)
        return segment_focus(view.weights, inside, without=self.without)


def span_attention(
    weights: Float[Array, "layers b n t s"],
    span: Bool[Array, "#b s"],
    queries: Bool[Array, "#b t"],
    *,
    first: int = 1,
) -> Float[Array, " b"]:
    """Returns how much a response reads a span of the prompt: strategy-relevant attention (SRA; Madani et al., 2024).

        a_t = mean over layers of (mean over heads of the row of t, without the first key, divided by its sum)
        SRA = mean over t of the response and over keys j of the span of a_t[j]

    The figure is a mean per key and not a sum: compare spans of equal length. The first key is left out because many
    heads rest there; other sinks stay. Uniform rows over S keys have 1 / (S − 1).

    Args:
        weights: [L, B, N, T, S], recorded attention weights.
        span: [B, S], the keys of the span.
        queries: [B, T], the tokens that write the response: those before the token that is written, in a decoder.
        first: How many first keys are left out.

    Returns:
        [B]; NaN for a text without span, or without queries that see more than the first keys.

    Raises:
        TypeError: `first` is not an int.
        ValueError: `first` is negative.
    """
    check_static_int("span_attention", "first", first, 0)
    rows = jnp.where(jnp.arange(weights.shape[-1]) < first, 0, jnp.asarray(weights).mean(2))
    total = rows.sum(-1, keepdims=True)
    read = ratio(rows, total).mean(0)  # [B, T, S]
    there = jnp.broadcast_to(queries, read.shape[:2]) & ~(total <= 0).any(0)[..., 0]
    keys = jnp.broadcast_to(span, (read.shape[0], read.shape[2]))
    found = jnp.where(there[..., None] & keys[:, None], read, 0).sum((1, 2))
    return found / (there.sum(1) * keys.sum(1))
