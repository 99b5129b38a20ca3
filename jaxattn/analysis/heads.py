"""Per-head statistics of recorded attention weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.part import part


@part
class HeadStatistics:
    """Numbers per layer and head, each a mean over batch and queries.

    Attributes:
        entropy: [L, N], in nats.
        sink_mass: [L, N], in 0..1.
    """

    entropy: Float[Array, "*layers n"]
    sink_mass: Float[Array, "*layers n"]


def head_statistics(weights: Float[Array, "*layers b n t s"]) -> HeadStatistics:
    """Returns the entropy −Σ_j p_ij log p_ij and the sink mass p_i0 of each head.

    Here p_i is row i of the weights, normalised. Rows are normalised first, so weights that do not sum to 1 (sigmoid)
    are compared on the same footing, as in the sink metric of Gu et al. (2024). Rows without any weight are left out of
    the means; a head that has none gives 0.

    Args:
        weights: [..., B, N, T, S], recorded attention weights, with leading axes for layers.
    """
    total = weights.sum(-1, keepdims=True)
    seen = total[..., 0] > 0
    p = weights / jnp.where(total > 0, total, 1)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)

    def mean(rows: Float[Array, "*layers b n t"]) -> Float[Array, "*layers n"]:
        return (rows * seen).sum((-3, -1)) / jnp.maximum(seen.sum((-3, -1)), 1)

    return HeadStatistics(mean(entropy), mean(p[..., 0]))
