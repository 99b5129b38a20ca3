"""Closed-form predictors of real functions: each answers as a statistician would from the examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.checks import check_all_positive, check_static_int
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.icl.inputs import check_covariance, check_dimension, root
from jaxattn.icl.predict import Predictor, check_single, shown

PATIENCE = 4  # sweeps that do not make the loss less, after which rounding is all that is left


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
    """Returns X⁺; singular values below max(N, d) · ε of the largest count as 0."""
    return jnp.linalg.pinv(x, rtol=max(x.shape) * float(jnp.finfo(x.dtype).eps))


@part
class Ridge(Predictor):
    """ŷ = ŵ·x with ŵ = argmin Σ_j (y_j − w·x_j)² + penalty · wᵀ C⁻¹ w = (XᵀX + penalty C⁻¹)⁻¹ Xᵀ y.

    With penalty = σ²/ψ² it is the Bayes answer for w ~ N(0, ψ² C) under noise of variance σ². The answer is the least
    squares of X C^½ and of d more examples √penalty e_k whose answer is 0, by a QR decomposition, which does not square
    the condition number. So small penalties may be asked for too.

    Attributes:
        penalty: Positive. For none use `LeastSquares`.
        covariance: C [d, d], by default the identity; it may be singular.

    Raises:
        ValueError: `penalty` is not positive or `covariance` is not a covariance, where their numbers are known, or the
            predictor answers in another dimension.
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


class LassoFit(NamedTuple):
    """The result of `Lasso.fit`.

    Attributes:
        weights: w [d], the weights with the least loss of all that were tried.
        gap: The duality gap at w, up to rounding: its loss is at most so much above the least there is.
        sweeps: The number of passes over the coordinates.
        converged: Whether the gap is small enough, or further passes make the loss no less in the numbers' precision.
    """

    weights: Float[Array, " d"]
    gap: Float[Array, ""]
    sweeps: Int[Array, ""]
    converged: Bool[Array, ""]


@part
class Lasso(Predictor):
    """ŷ = ŵ·x with ŵ = argmin (1 / 2i) Σ_j (y_j − w·x_j)² + alpha ‖w‖₁ over the i examples seen, without intercept.

    The method is coordinate descent from 0, w_k ← soft(g_k + G_kk w_k, alpha) / G_kk with G = XᵀX / i, g = Xᵀ(y − Xw) /
    i and soft(a, b) = sign(a) max(|a| − b, 0). After each sweep over the coordinates come Newton steps on those that
    are not 0, each as far as none of them changes its sign: there the loss is a parabola (feature-sign search, Lee et
    al., 2007). At the minimum |g_k| ≤ alpha, and g_k = alpha sign(w_k) where w_k is not 0.

    The descent ends where the duality gap is at most `tolerance` times the loss, or where rounding lets the loss become
    no less. With s = min(1, alpha / max_k |g_k|) the gap is ½ (1 − s)² ‖y − Xw‖² / i + Σ_k (alpha |w_k| − s g_k w_k),
    that of the dual point s (y − Xw); `fit` returns it. Gradients are those of the minimum.

    Attributes:
        alpha: The weight of ‖w‖₁, positive. Garg et al. (2022) take the best of 1, .1, .01, .001 and .0001.
        sweeps: The largest number of passes over all coordinates. An answer that needs more is NaN.
        tolerance: The tolerance of the gap, relative to the loss.

    Raises:
        TypeError: `sweeps` is not an int.
        ValueError: `alpha` or `tolerance` is not positive, or `sweeps` is below 1.
    """

    alpha: Float[Array, ""] | float
    sweeps: int = 1000
    tolerance: float = 1e-6

    def __post_init__(self):
        check_all_positive("Lasso", "alpha", self.alpha)
        check_static_int("Lasso", "sweeps", self.sweeps, 1)
        check_all_positive("Lasso", "tolerance", self.tolerance)

    def fit(self, x: Float[Array, "n d"], y: Float[Array, " n"], seen: Bool[Array, " n"]) -> LassoFit:
        """Returns ŵ from the examples that are seen, and how near it is to the minimum."""
        x, y = shown(x, y, seen)
        given = _LassoProblem(x, y, jnp.maximum(seen.sum(), 1), jnp.asarray(self.alpha, x.dtype))
        problem = jax.lax.stop_gradient(given)
        eps, dim = jnp.finfo(x.dtype).eps, x.shape[1]

        def unfinished(state: _LassoState) -> Array:
            near = state.gap <= self.tolerance * state.loss
            return ~near & (state.idle < PATIENCE) & (state.sweeps < self.sweeps)

        def step(state: _LassoState) -> _LassoState:
            w = problem.descend(problem.sweep(state.now))
            loss, gap = problem.loss_and_gap(w)
            better = loss < state.loss
            idle = jnp.where(loss < (1 - 4 * eps) * state.loss, 0, state.idle + 1)
            best, gap = jnp.where(better, w, state.best), jnp.where(better, gap, state.gap)
            return _LassoState(w, best, jnp.minimum(loss, state.loss), gap, state.sweeps + 1, idle)

        w, none = jnp.zeros(dim, x.dtype), jnp.zeros((), jnp.int32)
        end = jax.lax.while_loop(unfinished, step, _LassoState(w, w, *problem.loss_and_gap(w), none, none))
        converged = (end.gap <= self.tolerance * end.loss) | (end.idle >= PATIENCE)
        converged = converged & jnp.isfinite(end.loss) & jnp.isfinite(end.gap)
        moved = given.newton_step(end.best)  # 0, but with the derivatives of the minimum
        return LassoFit(end.best + moved - jax.lax.stop_gradient(moved), end.gap, end.sweeps, converged)

    def weights(self, x: Float[Array, "n d"], y: Float[Array, " n"], seen: Bool[Array, " n"]) -> Float[Array, " d"]:
        """Returns ŵ from the examples that are seen; NaN where `sweeps` are too few to find it."""
        found = self.fit(x, y, seen)
        return jnp.where(found.converged, found.weights, jnp.nan)

    def answer(self, x, y, seen, query):
        check_single("Lasso", y)
        return query @ self.weights(x, y, seen)


class _LassoState(NamedTuple):
    """The weights now and the best so far, their loss and gap, the passes made, and how many of them did not help."""

    now: Float[Array, " d"]
    best: Float[Array, " d"]
    loss: Float[Array, ""]
    gap: Float[Array, ""]
    sweeps: Int[Array, ""]
    idle: Int[Array, ""]


class _LassoProblem(NamedTuple):
    x: Float[Array, "n d"]
    y: Float[Array, " n"]
    examples: Int[Array, ""]
    alpha: Float[Array, ""]

    @property
    def gram(self) -> Float[Array, "d d"]:
        return self.x.T @ self.x / self.examples

    def pull(self, w: Float[Array, " d"]) -> Float[Array, " d"]:
        """Returns g = Xᵀ(y − Xw) / i."""
        return self.x.T @ (self.y - self.x @ w) / self.examples

    def loss_and_gap(self, w: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        residual, g = self.y - self.x @ w, self.pull(w)
        square, most = residual @ residual / self.examples, jnp.abs(g).max()
        s = jnp.where(most <= self.alpha, 1, ratio(self.alpha, most))
        gap = (1 - s) ** 2 * square / 2 + (self.alpha * jnp.abs(w) - s * g * w).sum()
        return square / 2 + self.alpha * jnp.abs(w).sum(), jnp.maximum(gap, 0)

    def sweep(self, w: Float[Array, " d"]) -> Float[Array, " d"]:
        gram = self.gram

        def update(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            w, g = state
            pull = g[k] + gram[k, k] * w[k]
            new = ratio(jnp.sign(pull) * jnp.maximum(jnp.abs(pull) - self.alpha, 0), gram[k, k])
            return w.at[k].set(new), g - gram[:, k] * (new - w[k])

        return jax.lax.fori_loop(0, len(w), update, (w, self.pull(w)))[0]

    def newton_step(self, w: Float[Array, " d"]) -> Float[Array, " d"]:
        """Returns the step to the parabola's minimum on the coordinates that are not 0; 0 if it cannot be computed."""
        active, gram = w != 0, jax.lax.stop_gradient(self.gram)
        # Columns that depend on each other make it singular: along what they leave open the loss is a line, and the
        # step long.
        damping = 2 * jnp.finfo(w.dtype).eps * jnp.trace(gram)
        system = jnp.where(active[:, None] & active, gram, 0) + jnp.diag(jnp.where(active, damping, 1))
        slope = jnp.where(active, self.pull(w) - self.alpha * jnp.sign(w), 0)
        factor = jnp.linalg.cholesky(system)
        fine = jnp.isfinite(factor).all()
        factor = jnp.where(fine, factor, jnp.eye(len(w), dtype=w.dtype))
        return jnp.where(fine, jax.scipy.linalg.cho_solve((factor, True), slope), 0)

    def descend(self, w: Float[Array, " d"]) -> Float[Array, " d"]:
        """Takes Newton steps until one goes all the way; any other takes a coordinate to 0."""

        def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            w, _, count = state
            change = self.newton_step(w)
            zero_at = jnp.where(w * (w + change) < 0, ratio(-w, change), jnp.inf)
            length = jnp.minimum(1, zero_at.min())
            return jnp.where(zero_at <= length, 0, w + length * change), length < 1, count + 1

        def cut(state: tuple[Array, Array, Array]) -> Array:
            return state[1] & (state[2] < len(w))

        return jax.lax.while_loop(cut, step, (w, jnp.array(True), jnp.zeros((), jnp.int32)))[0]
