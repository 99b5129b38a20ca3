"""Closed-form predictors of real functions: each is what a statistician would answer from the examples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.parts import check_positive, part
from jaxattn.icl.inputs import root
from jaxattn.icl.predict import Predictor


def _shown(x: Array, y: Array, seen: Bool[Array, " n"]) -> tuple[Array, Array]:
    """The examples, with zeros for those that are not seen: they drop out of XᵀX and Xᵀy."""
    return jnp.where(seen[:, None], x, 0), jnp.where(seen.reshape(-1, *(1,) * (y.ndim - 1)), y, 0)


@part
class Zero(Predictor):
    """ŷ = 0."""

    def answer(self, x, y, seen, query):
        return jnp.zeros(y.shape[1:], y.dtype)


@part
class Averaging(Predictor):
    """ŷ = ŵ·x with ŵ = (1/i) Σ_j y_j x_j, unbiased for x ~ N(0, I); 0 without examples."""

    def answer(self, x, y, seen, query):
        x, y = _shown(x, y, seen)
        return query @ (x.T @ y) / jnp.maximum(seen.sum(), 1)


@part
class LeastSquares(Predictor):
    """ŷ = ŵ·x with ŵ = X⁺ y, the shortest w that fits the examples best.

    Singular values below max(N, d) · ε of the largest count as 0.
    """

    def answer(self, x, y, seen, query):
        x, y = _shown(x, y, seen)
        return query @ (jnp.linalg.pinv(x, rtol=max(x.shape) * float(jnp.finfo(x.dtype).eps)) @ y)


@part
class Ridge(Predictor):
    """ŷ = ŵ·x with ŵ = argmin Σ_j (y_j − w·x_j)² + penalty · wᵀ C⁻¹ w = (XᵀX + penalty C⁻¹)⁻¹ Xᵀ y.

    With penalty = σ²/ψ² it is the Bayes answer for w ~ N(0, ψ² C) under noise of variance σ². C is the identity if not
    given. It is computed as C^½ (C^½ XᵀX C^½ + penalty)⁻¹ C^½ Xᵀ y, so C may be singular.

    Raises ValueError for a penalty that is not positive (for none, `LeastSquares`).
    """

    penalty: Float[Array, ""] | float
    covariance: Float[Array, "d d"] | None = None

    def __post_init__(self):
        check_positive("Ridge", "penalty", self.penalty)

    def answer(self, x, y, seen, query):
        x, y = _shown(x, y, seen)
        if self.covariance is not None:
            half = root(self.covariance).astype(x.dtype)
            x, query = x @ half, query @ half
        gram = x.T @ x + self.penalty * jnp.eye(x.shape[1], dtype=x.dtype)
        return query @ jax.scipy.linalg.solve(gram, x.T @ y, assume_a="pos")
