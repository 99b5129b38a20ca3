"""Owners of merged attention layers: they hold the matrices, and return the part of `core.merged` when called.

Tokens are (x, y) of `features` channels, of which the last `outputs` are y.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.core import merged
from jaxattn.core.checks import check_static_int
from jaxattn.core.merged import Scale
from jaxattn.nn.parameter import decayed


def _check_sizes(owner: nnx.Module, features: int, outputs: int) -> int:
    """Returns the number of channels of x; raises for sizes that do not fit."""
    name = type(owner).__name__
    check_static_int(name, "outputs", outputs, 1)
    check_static_int(name, "features", features, 1)
    if outputs >= features:
        raise ValueError(f"{name}: outputs is {outputs} of {features} features: need fewer")
    return features - outputs


class MergedLinearAttention(nnx.Module):
    """Owns W_KQ and W_PV of `LinearSelfAttention`, [features, features].

    Structured, the layer starts as W_KQ = start · diag(ΘΘᵀ, 0) and W_PV = start · diag(0, I) with a random Θ,
    ‖ΘΘᵀ‖ = 1: from there gradient flow reaches the best layer (Zhang et al., 2024). Otherwise all entries start N(0,
    start²), and training often ends in a matrix Γ of rank one (`jaxattn.icl.layer_theory.lsa_rank_one_risk`).

    Args:
        features: The channels of a token.
        outputs: The channels of y, fewer than `features`.
        structured: Whether the layer starts structured.
        start: The size of the initial entries.
        scale: The scale of the layer, as of the part.
        mask_query: As of the part.
        rngs: Streams for the initial parameters.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1, or there are as many outputs as features.
    """

    def __init__(
        self,
        features: int,
        outputs: int = 1,
        *,
        structured: bool = True,
        start: float = 0.1,
        scale: Scale = "context",
        mask_query: bool = True,
        rngs: nnx.Rngs,
    ):
        inputs = _check_sizes(self, features, outputs)
        self.scale, self.mask_query = scale, mask_query
        if structured:
            theta = jax.random.normal(rngs.params(), (inputs, inputs))
            gram = theta @ theta.T
            kq = jnp.zeros((features, features)).at[:inputs, :inputs].set(start * gram / jnp.linalg.norm(gram))
            pv = jnp.diag(jnp.where(jnp.arange(features) < inputs, 0, start))
        else:
            kq, pv = (start * jax.random.normal(rngs.params(), (features, features)) for _ in range(2))
        self.kq, self.pv = decayed(kq), decayed(pv)

    def __call__(self) -> merged.LinearSelfAttention:
        return merged.LinearSelfAttention(self.kq[...], self.pv[...], self.scale, self.mask_query)


class MergedSoftmaxHeads(nnx.Module):
    """Owns KQ [H, features, features] and OV of `SoftmaxHeads`, [H, features], or [H, outputs, features] for several.

    Otherwise than structured, all entries start N(0, start²) (He et al., 2025). Structured, only ω_h and μ_h start so,
    in KQ_h = diag(ω_h I, 0) and OV_h = (0, μ_h), which reads only y.

    Args:
        heads: H, the number of heads.
        features: The channels of a token.
        outputs: The channels of y, fewer than `features`.
        structured: Whether the heads start structured.
        start: The size of the initial entries.
        rngs: Streams for the initial parameters.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1, or there are as many outputs as features.
    """

    def __init__(
        self,
        heads: int,
        features: int,
        outputs: int = 1,
        *,
        structured: bool = False,
        start: float = 0.1,
        rngs: nnx.Rngs,
    ):
        check_static_int(type(self).__name__, "heads", heads, 1)
        inputs = _check_sizes(self, features, outputs)
        kq_shape, ov_shape = (heads, features, features), (heads, outputs, features)
        if structured:
            omega = start * jax.random.normal(rngs.params(), (heads, 1, 1))
            mu = start * jax.random.normal(rngs.params(), (heads, outputs, 1))
            kq = jnp.zeros(kq_shape).at[:, :inputs, :inputs].set(omega * jnp.eye(inputs))
            ov = jnp.zeros(ov_shape).at[:, :, inputs:].set(mu * jnp.eye(outputs))
        else:
            kq = start * jax.random.normal(rngs.params(), kq_shape)
            ov = start * jax.random.normal(rngs.params(), ov_shape)
        self.kq, self.ov = decayed(kq, "heads", None, None), decayed(ov[:, 0] if outputs == 1 else ov)

    def __call__(self) -> merged.SoftmaxHeads:
        return merged.SoftmaxHeads(self.kq[...], self.ov[...])
