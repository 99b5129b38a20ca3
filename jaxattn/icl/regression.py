"""Closed-form predictors of real functions: each is what a statistician would answer from the examples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.parts import check_all_positive, check_static_int, part, ratio
from jaxattn.icl.inputs import check_covariance, check_dimension, root
from jaxattn.icl.predict import Predictor, check_single, shown


@part
class Zero(Predictor):
    """ŷ = 0."""

    def answer(self, x, y, seen, query):
        return jnp.zeros(y.shape[1:], y.dtype)


@part
class Averaging(Predictor):
    """ŷ = ŵ·x with ŵ = (1/i) Σ_j y_j x_j, unbiased for x ~ N(0, I); 0 without examples."""

    def answer(self, x, y, seen, query):
        x, y = shown(x, y, seen)
        return query @ (x.T @ y) / jnp.maximum(seen.sum(), 1)


@part
class LeastSquares(Predictor):
    """ŷ = ŵ·x with ŵ = X⁺ y, the shortest w that fits the examples best.

    Singular values below max(N, d) · ε of the largest count as 0.
    """

    def answer(self, x, y, seen, query):
        x, y = shown(x, y, seen)
        return query @ (pseudo_inverse(x) @ y)


def pseudo_inverse(x: Float[Array, "n d"]) -> Float[Array, "d n"]:
    """X⁺; singular values below max(N, d) · ε of the largest count as 0."""
    return jnp.linalg.pinv(x, rtol=max(x.shape) * float(jnp.finfo(x.dtype).eps))


@part
class Ridge(Predictor):
    """ŷ = ŵ·x with ŵ = argmin Σ_j (y_j − w·x_j)² + penalty · wᵀ C⁻¹ w = (XᵀX + penalty C⁻¹)⁻¹ Xᵀ y.

    With penalty = σ²/ψ² it is the Bayes answer for w ~ N(0, ψ² C) under noise of variance σ². C is the identity if not
    given, and may be singular: it is the least squares of X C^½ and of d more examples √penalty e_k whose answer is 0,
    by a QR decomposition, which does not square the condition number. So small penalties may be asked for too.

    Raises ValueError for a penalty that is not positive (for none, `LeastSquares`) and for what is no covariance, where
    their numbers are known, and when it answers in another dimension.
    """

    penalty: Float[Array, ""] | float
    covariance: Float[Array, "d d"] | None = None

    def __post_init__(self):
        check_all_positive("Ridge", "penalty", self.penalty)
        if self.covariance is not None:
            check_covariance("Ridge", self.covariance)

    def answer(self, x, y, seen, query):
        x, y = shown(x, y, seen)
        if self.covariance is not None:
            check_dimension("Ridge", self.covariance, x.shape[1])
            half = root(self.covariance).astype(x.dtype)
            x, query = x @ half, query @ half
        penalty = jnp.maximum(jnp.asarray(self.penalty, x.dtype), jnp.finfo(x.dtype).tiny)
        q, r = jnp.linalg.qr(jnp.concatenate([x, jnp.sqrt(penalty) * jnp.eye(x.shape[1], dtype=x.dtype)]))
        return query @ jax.scipy.linalg.solve_triangular(r, q[: len(x)].T @ y)


@part
class Lasso(Predictor):
    """ŷ = ŵ·x with ŵ = argmin (1 / 2i) Σ_j (y_j − w·x_j)² + alpha ‖w‖₁ over the i examples seen, without intercept.

    By coordinate descent from 0, w_k ← soft(g_k + G_kk w_k, alpha) / G_kk with G = XᵀX / i, g = (Xᵀy / i) − G w and
    soft(a, b) = sign(a) max(|a| − b, 0), for a fixed number of sweeps over the coordinates. At the minimum
    |g_k| <= alpha, and g_k = alpha sign(w_k) where w_k is not 0.

    Attributes:
        alpha: Weight of ‖w‖₁, positive. Garg et al. (2022) take the best of 1, .1, .01, .001 and .0001.
        sweeps: Passes over all coordinates. Small alphas with about as many examples as dimensions need most.

    Raises ValueError for an alpha that is not positive and for fewer than 1 sweep.
    """

    alpha: Float[Array, ""] | float
    sweeps: int = 200

    def __post_init__(self):
        check_all_positive("Lasso", "alpha", self.alpha)
        check_static_int("Lasso", "sweeps", self.sweeps, 1)

    def weights(self, x: Float[Array, "n d"], y: Float[Array, " n"], seen: Bool[Array, " n"]) -> Float[Array, " d"]:
        """ŵ from the examples that are seen."""
        x, y = shown(x, y, seen)
        count = jnp.maximum(seen.sum(), 1)
        gram, target = x.T @ x / count, x.T @ y / count

        def update(k: Array, w: Array) -> Array:
            pull = target[k] - gram[k] @ w + gram[k, k] * w[k]
            return w.at[k].set(ratio(jnp.sign(pull) * jnp.maximum(jnp.abs(pull) - self.alpha, 0), gram[k, k]))

        def sweep(_: Array, w: Array) -> Array:
            return jax.lax.fori_loop(0, x.shape[1], update, w)

        return jax.lax.fori_loop(0, self.sweeps, sweep, jnp.zeros_like(target))

    def answer(self, x, y, seen, query):
        check_single("Lasso", y)
        return query @ self.weights(x, y, seen)
