"""The weight of keys that are not read, estimated from their mean and covariance."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.matmul import accumulator, precision
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part


@part
class Moments:
    """How keys are spread, for each key head.

    Attributes:
        count: [..., K], n, the number of keys.
        mean: [..., K, H], μ.
        scatter: [..., K, H, H], Σ_i (k_i − μ)(k_i − μ)ᵀ: n times the covariance.
    """

    count: Float[Array, "*b k"]
    mean: Float[Array, "*b k h"]
    scatter: Float[Array, "*b k h h"]

    @classmethod
    def of(cls, key: Float[Array, "*b s k h"], there: Bool[Array, "*b s #k"]) -> "Moments":
        """Returns the moments of the keys that are `there`; the others may hold anything."""
        there = jnp.broadcast_to(there, key.shape[:-1])[..., None]
        dtype = accumulator(key)
        count = there.sum(-3, dtype=dtype)
        mean = jnp.where(there, key, 0).sum(-3, dtype=dtype) / jnp.maximum(count, 1)
        away = jnp.where(there, key - mean[..., None, :, :], 0)
        scatter = jnp.einsum("...skh,...ski->...khi", away, away, precision=precision(away))
        return cls(count[..., 0], mean, scatter)

    def __add__(self, other: "Moments") -> "Moments":
        """Returns the moments of the keys of both (Chan, Golub & LeVeque, 1983)."""
        total = self.count + other.count
        share = ratio(other.count, total)[..., None]
        away = other.mean - self.mean
        outer = away[..., :, None] * away[..., None, :]
        scatter = self.scatter + other.scatter + (self.count[..., None] * share)[..., None] * outer
        return Moments(total, self.mean + share * away, scatter)

    @property
    def covariance(self) -> Float[Array, "*b k h h"]:
        """The covariance of the keys, 0 where there are none."""
        return self.scatter / jnp.maximum(self.count, 1)[..., None, None]


def bulk_log_mass(
    query: Float[Array, "*b t n h"],
    mean: Float[Array, "*b k h"],
    covariance: Float[Array, "*b k h h"],
    count: Int[Array, "*b #k"] | Float[Array, "*b #k"] | float,
    scale: float | None = None,
) -> Float[Array, "*b t n"]:
    """Returns an estimate of log Σ_i exp(s_i) over n keys, from their mean μ and covariance Σ alone (QAdA, 2025):

        log n + m + v / 2,   m = scale q·μ,   v = scale² qᵀΣq

    The scores s_i = scale q·k_i are taken for Gaussian. Then the estimate is the truth for n → ∞. The estimate is exact
    where all keys are equal. In general log Σ_i exp(s_i) is log n and the series of the cumulants of the scores, and
    the estimate is its first two terms: the error begins with the third cumulant over 6. One key far from all others
    is hardly seen in two moments.

    Args:
        query: [..., T, N, H].
        mean: μ [..., K, H], where K divides N.
        covariance: Σ [..., K, H, H].
        count: n, one number, or [..., K]; 0 gives −∞.
        scale: By default H^−½.

    Raises:
        ValueError: The shapes do not fit.
    """
    heads, width = mean.shape[-2:]
    if query.shape[-1] != width or query.shape[-2] % heads or covariance.shape[-3:] != (heads, width, width):
        raise ValueError(
            f"query has shape {query.shape}, mean {mean.shape} and covariance {covariance.shape}: need [..., N, H], "
            "[..., K, H] and [..., K, H, H] with K a divisor of N"
        )
    scale = width**-0.5 if scale is None else scale
    dtype = accumulator(query, mean, covariance)
    grouped = query.reshape(*query.shape[:-2], heads, -1, width).astype(dtype)
    exact = precision(grouped)
    first = jnp.einsum("...tkgh,...kh->...tkg", grouped, mean.astype(dtype), precision=exact)
    second = jnp.einsum("...tkgh,...khi,...tkgi->...tkg", grouped, covariance.astype(dtype), grouped, precision=exact)
    of_count = jnp.asarray(count, dtype)
    of_count = of_count if of_count.ndim == 0 else of_count[..., None, :, None]
    return (jnp.log(of_count) + scale * first + scale**2 * second / 2).reshape(query.shape[:-1])
