"""What a model says about its own activations: scores along an axis, labels made of them, and the size of effects.

In the protocol of neurofeedback (arXiv 2505.13763) a model is shown sentences with labels that say whether its own
activation along an axis is high, and is then asked for the label of a new one.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def axis_scores(
    activations: Float[Array, "b t d"], axis: Float[Array, " d"], seen: Bool[Array, "b t"] | None = None
) -> Float[Array, " b"]:
    """Returns the mean over a sentence's tokens of the activation along an axis, [B].

    Scores are linear in the activations. The protocol centres them, and calls those from 0 on high.

    Args:
        activations: [B, T, D], such as the record of `resid` of one layer.
        axis: [D], such as one of `principal_axes`, or the weight of a logistic probe.
        seen: [B, T], which tokens belong to the sentence; all by default. A row without any has NaN.
    """
    along = activations @ axis
    on = jnp.ones(along.shape, bool) if seen is None else jnp.asarray(seen)
    count = on.sum(-1)
    return jnp.where(count > 0, jnp.where(on, along, 0).sum(-1) / jnp.maximum(count, 1), jnp.nan)


class Effect(NamedTuple):
    """The difference of two groups of scores.

    Attributes:
        d: Cohen's d, (mean₁ − mean₀) / pooled deviation.
        half_width: Of the interval of 95 percent, 1.96 √((n₁ + n₀) / (n₁ n₀) + d² / (2 (n₁ + n₀))).
    """

    d: Float[Array, ""]
    half_width: Float[Array, ""]


def cohens_d(high: Float[Array, " n"], low: Float[Array, " m"]) -> Effect:
    """Returns Cohen's d of two groups of scores, such as those under the instruction to raise and to lower them.

    The pooled variance is ((n₁ − 1) s₁² + (n₀ − 1) s₀²) / (n₁ + n₀ − 2). Without any spread d is NaN.

    Args:
        high: Scores of one group, at least 2.
        low: Of the other, at least 2.

    Raises:
        ValueError: A group has fewer than 2.
    """
    n, m = len(high), len(low)
    if min(n, m) < 2:
        raise ValueError(f"the groups have {n} and {m} scores: need 2 or more in each")
    pooled = ((n - 1) * jnp.var(high, ddof=1) + (m - 1) * jnp.var(low, ddof=1)) / (n + m - 2)
    d = jnp.where(pooled > 0, (high.mean() - low.mean()) / jnp.sqrt(jnp.where(pooled > 0, pooled, 1)), jnp.nan)
    return Effect(d, 1.96 * jnp.sqrt((n + m) / (n * m) + jnp.square(d) / (2 * (n + m))))
