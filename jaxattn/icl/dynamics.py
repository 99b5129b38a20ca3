"""How attention learns: the training path of one layer whose tokens are types, by gradients that are written out.

The layer reads a context as a bag: what counts is how often each type of token occurs in it. So attention is a softmax
over types with the log of the frequency as a bias, which is the softmax over tokens, summed by type.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.checks import check_range, check_static_int
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part


@part
class Facts:
    """Facts of a language: the last token of a text, what occurs before it, and the token that comes next.

    Attributes:
        last: [F], the last token, which chooses the row of attention scores.
        next: [F], the token that comes next.
        frequency: [F, M], how often each type occurs before the last token, in any unit: P(l | last, next) in a long
            context, counts in a short one.

    Raises:
        ValueError: Shapes do not fit, or a known frequency is below 0.
    """

    last: Int[Array, " f"]
    next: Int[Array, " f"]
    frequency: Float[Array, "f m"]

    def __post_init__(self):
        last, following, frequency = jnp.shape(self.last), jnp.shape(self.next), jnp.shape(self.frequency)
        if len(frequency) != 2 or last != frequency[:1] or following != frequency[:1]:
            raise ValueError(
                f"Facts: last, next and frequency have shapes {last}, {following} and {frequency}: need [F], [F] and "
                "[F, M]"
            )
        check_range("Facts: frequency", self.frequency, lambda x: x >= 0, "from 0 on")


class Language(NamedTuple):
    """Facts whose tokens are distinct or common.

    Attributes:
        facts: The facts.
        distinct: [F, D], the types that occur with this next token alone, the rarest first.
        common: [C], the types that occur with all.
    """

    facts: Facts
    distinct: Int[np.ndarray, "f d"]
    common: Int[np.ndarray, " c"]


def distinct_and_common(
    last: int, following: int, probabilities: Float[np.ndarray, " d"] | None = None, common: int = 10
) -> Language:
    """Returns a language in which every next token has types of its own, and others occur with all of them.

    Types are numbered: first the last tokens, then `following` next tokens of each, then the distinct types of each of
    these, then the common ones (Tian et al., 2023).

    Args:
        last: The number of last tokens.
        following: The number of next tokens of each.
        probabilities: [D], how often distinct types occur, where each common one has 1; 0.1, 0.2, .. 1 by default.
        common: The number of common types.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below its least value (1, 1 and 0), or a probability is not positive.
    """
    check_static_int("distinct_and_common", "last", last, 1)
    check_static_int("distinct_and_common", "following", following, 1)
    check_static_int("distinct_and_common", "common", common, 0)
    given = np.linspace(0.1, 1, 10) if probabilities is None else np.asarray(probabilities, float)
    check_range("distinct_and_common: probabilities", given, lambda x: x > 0, "above 0")
    count = last * following
    of_fact = last + count + np.arange(count * len(given)).reshape(count, len(given))
    shared = of_fact.size + last + count + np.arange(common)
    frequency = np.zeros((count, last + count + of_fact.size + common))
    frequency[np.arange(count)[:, None], of_fact] = given
    frequency[:, shared] = 1
    frequency /= frequency.sum(-1, keepdims=True)
    by_fact = np.arange(count)
    facts = Facts(jnp.asarray(by_fact // following), jnp.asarray(last + by_fact), jnp.asarray(frequency))
    return Language(facts, of_fact[:, np.argsort(given, kind="stable")], shared)


def type_weights(scores: Float[Array, "*b m"], frequency: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
    """Returns c_l = n_l exp(z_l) / Σ_k n_k exp(z_k), attention to types of which there are n_l tokens in the context.

    That is softmax(z + log n), where attention to tokens has softmax(z); a context without tokens has weights 0.
    """
    there = frequency > 0
    most = jnp.where(there, scores, -jnp.inf).max(-1, keepdims=True)
    most = jax.lax.stop_gradient(jnp.where(jnp.isfinite(most), most, 0))
    each = jnp.where(there, frequency * jnp.exp(jnp.where(there, scores - most, 0)), 0)
    return ratio(each, each.sum(-1, keepdims=True))


class Slopes(NamedTuple):
    """A loss and its gradients.

    Attributes:
        loss: The mean over facts of −log p of the next token.
        decoder: [N, M], its gradient by Y.
        scores: [R, M], its gradient by Z.
    """

    loss: Float[Array, ""]
    decoder: Float[Array, "n m"]
    scores: Float[Array, "r m"]


def scan_snap_loss(decoder: Float[Array, "n m"], scores: Float[Array, "r m"], facts: Facts) -> Float[Array, ""]:
    """Returns the mean over facts of −log softmax(Y f)_next with f = c / |c| and c = `type_weights(Z_last, frequency)`.

    Args:
        decoder: Y [N, M], logits of N next tokens by types of the context.
        scores: Z [R, M], the attention scores of types, a row for each last token.
        facts: The facts.
    """
    _, _, logits = _forward(decoder, scores, facts)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), facts.next[:, None], -1)
    return -chosen.mean()


def scan_snap_slopes(decoder: Float[Array, "n m"], scores: Float[Array, "r m"], facts: Facts) -> Slopes:
    """Returns the loss of `scan_snap_loss` and its gradients, written out (Tian et al., 2023):

        dY = mean (softmax(Y f) − e_next) fᵀ,   dZ_last = mean f ⊙ (I − f fᵀ) g,   g = Yᵀ (softmax(Y f) − e_next)

    As f has length 1, f ⊙ (I − f fᵀ) g is all that the softmax of attention leaves of c ⊙ (I − f fᵀ) g / |c|: the mean
    that it takes off, c · (I − f fᵀ) g, is 0. A type that does not occur has no gradient.
    """
    f, _, logits = _forward(decoder, scores, facts)
    log = jax.nn.log_softmax(logits)
    error = jnp.exp(log) - jax.nn.one_hot(facts.next, len(decoder), dtype=log.dtype)
    g = error @ decoder
    to_scores = f * (g - f * (f * g).sum(-1, keepdims=True))
    count = len(facts.next)
    return Slopes(
        -jnp.take_along_axis(log, facts.next[:, None], -1).mean(),
        error.T @ f / count,
        jnp.zeros_like(scores).at[facts.last].add(to_scores / count),
    )


def scan_snap_step(
    decoder: Float[Array, "n m"],
    scores: Float[Array, "r m"],
    facts: Facts,
    decoder_rate: Float[Array, ""] | float,
    score_rate: Float[Array, ""] | float,
) -> tuple[Float[Array, "n m"], Float[Array, "r m"], Float[Array, ""]]:
    """Returns (Y, Z, the loss before) after a step of gradient descent with a rate of its own for each of both.

    From Y = Z = 0, attention first scans: scores of distinct types rise, the faster the more often they occur, and
    those of common types fall. Then it snaps: once the decoder has fitted, scores nearly stand still (Tian et al.,
    2023).
    """
    loss, to_decoder, to_scores = scan_snap_slopes(decoder, scores, facts)
    return decoder - decoder_rate * to_decoder, scores - score_rate * to_scores, loss


def _forward(decoder: Array, scores: Array, facts: Facts) -> tuple[Array, Array, Array]:
    """(f, c, logits) of every fact."""
    c = type_weights(scores[facts.last], facts.frequency)
    squared = (c * c).sum(-1, keepdims=True)
    f = c / jnp.sqrt(jnp.where(squared > 0, squared, 1))
    return f, c, f @ decoder.T
