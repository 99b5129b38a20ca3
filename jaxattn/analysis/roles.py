"""What heads are for, as an overview colours them: those that read what matters to an answer, and how sure they are."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.numeric import ratio


def semantic_scores(
    weights: Float[Array, "*layers b n t s"], saliency: Float[Array, "b s"]
) -> Float[Array, "*layers b n"]:
    """Returns how well what a head reads agrees with what matters, cos(saliency, column sums) (Wang et al., 2021).

    The saliency of the paper is the sum of sizes of the gradient of the predicted logit at the embedding of a token:
    `input_gradients(...).saliency(order=1)`. Of numbers that are at least 0 the cosine is from 0 to 1.

    Args:
        weights: [..., B, N, T, S], recorded attention weights.
        saliency: [B, S].

    Returns:
        [..., B, N]; 0 for a head that reads nothing, and for a text without saliency.
    """
    received = jnp.asarray(weights).sum(-2)
    theirs = jnp.asarray(saliency)[:, None]
    sizes = jnp.linalg.norm(received, axis=-1) * jnp.linalg.norm(theirs, axis=-1)
    return ratio((received * theirs).sum(-1), sizes)


def confidence(
    weights: Float[Array, "*layers b n t s"], counted: Bool[Array, "b s"] | None = None
) -> Float[Array, "*layers b n"]:
    """Returns the largest weight of each head in each text (Wang et al., 2021); mean over texts it sizes the overview.

    Args:
        weights: [..., B, N, T, S], recorded attention weights.
        counted: [B, S], which tokens count, as queries and as keys where these are the same text. Special tokens have
            the largest weights of many heads: leave them out. None for all.

    Returns:
        [..., B, N]; 0 where nothing counts.
    """
    weights = jnp.asarray(weights)
    if counted is not None:
        there = jnp.asarray(counted)
        both = there[:, None, None] & (there[:, None, :, None] if weights.shape[-2] == weights.shape[-1] else True)
        weights = jnp.where(both, weights, 0)
    return weights.max((-2, -1))
