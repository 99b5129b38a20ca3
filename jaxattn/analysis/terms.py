"""A score as an exact sum of parts, in three bases: channels, rotary pairs, and the singular vectors of a head.

All are one call, `score_terms(query, key, basis)`: the parts of the score of one query and one key add up to the score.
"""

import abc

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.analysis.factors import Factored
from jaxattn.core.attend.position import rotary_channels
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part


class Basis(abc.ABC):
    """The base class of ways to split a score into parts."""

    @abc.abstractmethod
    def __call__(self, query: Float[Array, "*b d"], key: Float[Array, "*b e"]) -> Float[Array, "*b parts"]:
        """Returns the parts, which add up to the score before its scale 1 / √H."""


@part
class Channels(Basis):
    """q_d k_d, the products of single channels of query and key as they meet: the neurons of BertViz (Vig, 2019)."""

    def __call__(self, query, key):
        return query * key


@part
class RotaryPairs(Basis):
    """Σ of q_d k_d over both channels of a rotary pair: p and p + R/2 of R rotated ones, slowest last.

    Query and key are those after rotation. With complex pairs before it, q̂ and k̂, and θ_p the angle per token, part p
    is Re(q̂_p conj(k̂_p) e^{i (i − j) θ_p}), so rotating both does not change it. Channels that are not rotated, if any,
    are one further part, the last.

    Attributes:
        fraction: The fraction of the channels that is rotated, as of `Rotary`.
    """

    fraction: float = 1.0

    def __call__(self, query, key):
        products = query * key
        rotated = rotary_channels(query.shape[-1], self.fraction)
        pairs = products[..., :rotated].reshape(*products.shape[:-1], 2, -1).sum(-2)
        rest = products[..., rotated:].sum(-1, keepdims=True)
        return pairs if rotated == query.shape[-1] else jnp.concatenate([pairs, rest], -1)


@part
class SingularVectors(Basis):
    """S_m (x_i · u_m) (x_j · v_m) with QK = U S Vᵀ: x are the streams, with what QK is applied to before (2024).

    Franco and Crovella trace circuits by the few m that carry a score. Under rotary positions QK depends on the
    distance: it is that of `qk(model, offset=i − j)`. With the entry 1 behind x it is that of `biases=True`.

    Attributes:
        left: U, [..., D, H].
        values: S, [..., H], the largest first.
        right: Vᵀ, [..., H, D].
    """

    left: Float[Array, "*b d h"]
    values: Float[Array, "*b h"]
    right: Float[Array, "*b h e"]

    @classmethod
    def of(cls, qk: Factored) -> "SingularVectors":
        """Returns the basis of a head, from its QK."""
        return cls(*qk.svd())

    def __call__(self, query, key):
        ours = jnp.einsum("...d,...dh->...h", query, self.left)
        theirs = jnp.einsum("...e,...he->...h", key, self.right)
        return ours * self.values * theirs


def score_terms(query: Float[Array, "*b d"], key: Float[Array, "*b e"], basis: Basis) -> Float[Array, "*b parts"]:
    """Returns the parts of the scores of these pairs: their sum is the score before its scale, bias, maps and mask.

    Args:
        query: [..., D], of one query in each entry: as queries meet keys, or the stream for `SingularVectors`.
        key: [..., E], of one key in each entry.
        basis: `Channels()`, `RotaryPairs()` or `SingularVectors.of(...)`.

    Raises:
        TypeError: `basis` is none.
    """
    if not isinstance(basis, Basis):
        raise TypeError(f"basis is {type(basis).__name__}: need a Basis, such as Channels() or RotaryPairs()")
    return basis(query, key)


def fewest_terms(terms: Float[Array, "*b parts"], share: float = 1.0) -> Bool[Array, "*b parts"]:
    """Returns the fewest of the largest parts whose sum reaches a share of the whole sum.

    Parts are taken from the largest on until they have the share. Since negative ones are left, few may do even for
    all of a sum (share 1). Where the sum is not above 0, none is taken. A small sum beside large parts ends early, so
    compare numbers of terms at equal sums, or see `participation`. Parts that hold a NaN take none.

    Args:
        terms: As `score_terms` returns them.
        share: Above 0, at most 1.

    Raises:
        ValueError: `share` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: need a number above 0 and at most 1")
    order = jnp.argsort(-terms, axis=-1, stable=True)
    ordered = jnp.take_along_axis(terms, order, -1)
    total = terms.sum(-1, keepdims=True)
    before = jnp.cumsum(ordered, -1) - ordered
    rounding = terms.shape[-1] * jnp.finfo(terms.dtype).eps * jnp.abs(terms).sum(-1, keepdims=True)
    taken = (before < share * total - rounding) & (total > 0) & (ordered > 0)
    return jnp.put_along_axis(jnp.zeros(terms.shape, bool), order, taken, -1, inplace=False)


def writer_signals(
    writers: Float[Array, "*b c d"],
    stream: Float[Array, "*b d"],
    vectors: Float[Array, "*b d h"],
    values: Float[Array, "*b h"],
    kept: Bool[Array, "*b h"],
) -> Float[Array, "*b c"]:
    """Returns how much each writer put into the stream along the vectors of the kept terms of a score, [..., C]:

        Σ_{m kept} sign(x · u_m) √S_m  u_m · w_c,   x = Σ_c w_c

    The sum over all writers is Σ_{m kept} √S_m |x · u_m|, so large ones supplied what the terms read (Franco and
    Crovella, 2024). At the key give V and the stream there. The entry 1 of biases belongs to one writer alone.

    Args:
        writers: w, what the embedding, each head and each block wrote, divided by the scale of the norm.
        stream: x.
        vectors: U, [..., D, H], or V = `right` with its last two axes exchanged.
        values: S.
        kept: Which terms, such as `fewest_terms`.
    """
    weight = jnp.where(kept, jnp.sign(jnp.einsum("...d,...dh->...h", stream, vectors)) * jnp.sqrt(values), 0)
    return jnp.einsum("...cd,...dh,...h->...c", writers, vectors, weight)


def participation(terms: Float[Array, "*b parts"]) -> Float[Array, "*b"]:
    """Returns (Σ |t|)² / Σ t²: how many parts carry a score, 1 for one and n for n of equal size; 0 for none.

    Args:
        terms: As `score_terms` returns them.
    """
    size = jnp.abs(terms)
    return ratio(jnp.square(size.sum(-1)), jnp.square(size).sum(-1))


def pair_correlations(
    query: Float[Array, "*b t h"],
    key: Float[Array, "*b t h"],
    *,
    distance: int = 0,
    fraction: float = 1.0,
    others: bool = False,
) -> Float[Array, "*b parts"]:
    """Returns how well each rotary pair explains a head's scores of far keys: a correlation over keys, mean over i.

        ρ_p = mean over i of corr over j with i − j > δ of (part p of s_ij, s_ij)

    Positional heads are those whose slow pairs explain them (arXiv 2410.08703); the paper's own form is not known to
    us, and this is the most sensible one that fits its abstract. A part correlates with a sum that holds it even where
    all parts are independent: `others` takes the sum of the other parts in place of the whole. Rows with fewer than
    three such keys, or without any spread, do not count; where none counts the result is NaN. T x T x P numbers are
    held, so give long texts head by head. The pair p turns once in 2π / θ_p tokens, θ = `rotary_frequencies`.

    Args:
        query: [..., T, H], queries of one head after rotation, of the token at each place of a row without padding.
        key: [..., T, H], keys likewise.
        distance: δ, at least 0.
        fraction: As of `RotaryPairs`.
        others: Whether a part is held against the sum of the others.

    Returns:
        [..., P], the fastest pair first.

    Raises:
        ValueError: `distance` is negative.
    """
    if distance < 0:
        raise ValueError(f"distance is {distance}: need at least 0")
    length = query.shape[-2]
    parts = score_terms(query[..., :, None, :], key[..., None, :, :], RotaryPairs(fraction))  # [..., T, T, P]
    whole = parts.sum(-1, keepdims=True) - (parts if others else 0)
    place = jnp.arange(length)
    far = (place[:, None] - place > distance)[..., None]
    count = far.sum(-2, keepdims=True)

    def centred(x: Array) -> Array:
        return jnp.where(far, x - jnp.where(far, x, 0).sum(-2, keepdims=True) / jnp.maximum(count, 1), 0)

    ours, theirs = centred(parts), centred(whole)
    both = jnp.square(ours).sum(-2) * jnp.square(theirs).sum(-2)
    found = ratio((ours * theirs).sum(-2), jnp.sqrt(both))
    counts = (count[..., 0, :] >= 3) & (both > 0)
    return jnp.where(counts.any(-2), ratio(jnp.where(counts, found, 0).sum(-2), counts.sum(-2) * 1.0), jnp.nan)
