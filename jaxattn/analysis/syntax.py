"""Heads as predictors of which word depends on which: single heads, fixed offsets, and a probe of all maps together.

A tree, or any other relation, is given by the number of the head of each word, −1 for words without one, such as the
root. What "head" means here is that of linguistics; heads of attention are called maps where both occur.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.analysis.probe import newton
from jaxattn.core.part import part

HIDDEN = -1e30  # the score of what is no candidate; finite, so that a text of one word has no NaN


def merge_pieces(weights: Float[np.ndarray, "*b t t"], words: Int[np.ndarray, " t"]) -> Float[np.ndarray, "*b w w"]:
    """Returns weights between words from those between their pieces (Clark et al., 2019).

    Attention to a word is the sum over its pieces, and attention from it the mean over them, so that rows keep their
    sums. Tokens that belong to no word, such as [SEP], are left out, and with them what is read from them.

    Args:
        weights: [..., T, T].
        words: [T], the number of the word of each token, from 0 to W − 1; −1 for tokens of none.

    Raises:
        ValueError: There are not as many words as tokens, or a word has no token.
    """
    words = np.asarray(words)
    if words.shape != weights.shape[-1:] or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"words has shape {words.shape} but weights {weights.shape}: need one word for each token")
    member = np.arange(words.max(initial=-1) + 1)[:, None] == words
    if not member.any(1).all():
        raise ValueError(f"word {int(np.flatnonzero(~member.any(1))[0])} has no token: need numbers without a gap")
    return (member / member.sum(1, keepdims=True)) @ np.asarray(weights, np.float64) @ member.T


def relation_accuracy(weights: Float[np.ndarray, "*b w w"], heads: Int[np.ndarray, " w"]) -> Float[np.ndarray, "*b 2"]:
    """Returns the share of words whose head has the most attention, in both directions.

    The head of word i is guessed as the j ≠ i with the largest w_ij, the word that i reads most; or as the one with the
    largest w_ji, the word that reads i most. Of equal weights the first counts.

    Args:
        weights: [..., W, W], between words, such as those of `merge_pieces`.
        heads: [W], the head of each word, −1 for none.

    Returns:
        [..., 2], (words read their heads, heads read their words); NaN where no word has a head.

    Raises:
        ValueError: There are not as many heads as words.
    """
    heads = np.asarray(heads)
    count = len(heads)
    if weights.shape[-2:] != (count, count):
        raise ValueError(f"heads has {count} words but weights has shape {weights.shape}: need [..., {count}, {count}]")
    others = np.where(np.eye(count, dtype=bool), -np.inf, weights)
    has = heads >= 0
    if not has.any():
        return np.full((*weights.shape[:-2], 2), np.nan)
    guesses = np.stack([others.argmax(-1), others.argmax(-2)], -1)
    return (guesses == heads[:, None])[..., has, :].mean(-2)


def best_offset(heads: Int[np.ndarray, "b w"], most: int = 5) -> tuple[int, float]:
    """Returns the pair (offset, accuracy) of the best guess that the head of a word is a fixed number of words away.

    The baseline for `relation_accuracy`. Of equal offsets the nearest counts, and of these the one to the right.

    Args:
        heads: [..., W], the head of each word, −1 for none.
        most: The largest offset that is tried, at least 1.
    """
    heads = np.asarray(heads)
    away = (heads - np.arange(heads.shape[-1]))[heads >= 0]
    offsets = [sign * size for size in range(1, most + 1) for sign in (1, -1)]
    shares = [float((away == offset).mean()) if away.size else float("nan") for offset in offsets]
    at = int(np.argmax(shares))
    return offsets[at], shares[at]


@part
class AttentionProbe:
    """Scores of all words as the head of each: Σ_k (w_k A^k_ij + u_k A^k_ji).

    Attributes:
        reads: w, [K], of the attention of a word to the candidate.
        read_by: u, [K], of the attention of the candidate to the word.
    """

    reads: Float[Array, " k"]
    read_by: Float[Array, " k"]

    def __call__(self, maps: Float[Array, "*b k w w"]) -> Float[Array, "*b w w"]:
        to = jnp.tensordot(self.reads, jnp.moveaxis(maps, -3, 0), 1)
        return to + jnp.tensordot(self.read_by, jnp.moveaxis(maps, -3, 0), 1).swapaxes(-1, -2)

    def guess(self, maps: Float[Any, "*b k w w"], words: Bool[Any, "*b w"] | None = None) -> Int[Array, "*b w"]:
        """Returns the word with the largest score as the head of each, which is never the word itself.

        Args:
            maps: A, [..., K, W, W].
            words: [..., W], where words stand; None where no text is padded.
        """
        maps = jnp.asarray(maps)
        return jnp.where(_candidates(words, maps.shape[-1]), self(maps), HIDDEN).argmax(-1)


def _candidates(words: Bool[Any, "*b w"] | None, length: int) -> Bool[Array, "*b w w"]:
    others = ~jnp.eye(length, dtype=bool)
    return others if words is None else others & jnp.asarray(words)[..., None, :]


def fit_attention_probe(
    maps: Float[Any, "b k w w"],
    heads: Int[Any, "b w"],
    words: Bool[Any, "b w"] | None = None,
    *,
    penalty: float = 1.0,
    steps: int = 20,
) -> AttentionProbe:
    """Returns the attention-only probe of Clark et al. (2019), fitted by Newton's method:

        p(head of i is j) ∝ exp Σ_k (w_k A^k_ij + u_k A^k_ji)      over all words j ≠ i

    It has the least −Σ log p(head) + penalty/2 (‖w‖² + ‖u‖²) over the words that have a head. The paper also gives the
    root a weight at the first and last tokens, and weights that depend on the words; neither is done here.

    Args:
        maps: A, [B, K, W, W], the attention of K heads between the words of B texts.
        heads: [B, W], the head of each word, −1 for none.
        words: [B, W], where words stand; None where no text is padded.
        penalty: Above 0.
        steps: The number of steps.

    Raises:
        ValueError: The shapes do not fit, a head is no other word of the text, or `penalty` is not above 0.
    """
    maps, heads = jnp.asarray(maps), jnp.asarray(heads)
    batch, count, length = maps.shape[0], maps.shape[1], maps.shape[-1]
    if heads.shape != (batch, length) or maps.shape[-2] != length:
        raise ValueError(f"maps has shape {maps.shape} and heads {heads.shape}: need [B, K, W, W] and [B, W]")
    if not penalty > 0:
        raise ValueError(f"penalty is {penalty}: need a number above 0")
    there = jnp.broadcast_to(_candidates(words, length), (batch, length, length))
    if not isinstance(heads, jax.core.Tracer) and not isinstance(there, jax.core.Tracer):
        chosen = jnp.take_along_axis(there, jnp.clip(heads, 0, length - 1)[..., None], -1)[..., 0] & (heads < length)
        if not (chosen | (heads < 0)).all():
            raise ValueError("heads has one that is the word itself, or no word: need another word, or -1 for none")
    features = jnp.moveaxis(jnp.concatenate([maps, maps.swapaxes(-1, -2)], 1), 1, -1)  # [B, W, W, 2 K]
    target = jax.nn.one_hot(heads, length, dtype=maps.dtype)
    counts = target.sum(-1)

    def logits(w: Array) -> Array:
        return jnp.where(there, features @ w, HIDDEN)

    def loss(w: Array) -> Array:
        chosen = jnp.where(target > 0, jax.nn.log_softmax(logits(w)), 0)
        return -chosen.sum() + penalty * (w @ w) / 2

    def derivatives(w: Array) -> tuple[Array, Array]:
        p = jax.nn.softmax(logits(w)) * counts[..., None]
        mean = jnp.einsum("bij,bijf->bif", p, features)
        gradient = jnp.einsum("bij,bijf->f", p - target, features) + penalty * w
        square = jnp.einsum("bij,bijf,bijg->fg", p, features, features)
        return gradient, square - jnp.einsum("bif,big->fg", mean, mean) + penalty * jnp.eye(len(w), dtype=w.dtype)

    w = newton(loss, derivatives, jnp.zeros(2 * count, maps.dtype), steps)
    return AttentionProbe(w[:count], w[count:])
