"""Predictors that iterate: gradient descent on the examples, plain, preconditioned and debiased, and Newton's method.

Linear and softmax attention layers can compute these predictors (`constructed.py` has those layers).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.checks import check_all_positive, check_range, check_static_int
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.icl.predict import Predictor, shown
from jaxattn.icl.regression import pseudo_inverse

Scale = Literal["context"] | float
"""What a sum over examples is divided by: their number, or a constant (often that of training)."""


@part
class GradientDescent(Predictor):
    """ŷ = w·x after `steps` steps w ← w + (step / i) Σ_j (y_j − w·x_j) x_j from w = 0, over the i examples seen.

    One step is `step` times `Averaging`. With steps below 2 / λ_max(XᵀX / i) the answer tends to `LeastSquares`.

    Attributes:
        step: The step size.
        steps: The number of steps, at least 1.

    Raises:
        TypeError: `steps` is not an int.
        ValueError: `steps` is below 1.
    """

    step: Float[Array, ""] | float
    steps: int = 1

    def __post_init__(self):
        check_static_int("GradientDescent", "steps", self.steps, 1)

    def answer(self, x, y, seen, query):
        x, y = shown(x, y, seen)
        rate = self.step / jnp.maximum(seen.sum(), 1)

        def descend(_: Array, w: Array) -> Array:
            return w + rate.astype(w.dtype) * (x.T @ (y - x @ w))

        return query @ jax.lax.fori_loop(0, self.steps, descend, jnp.zeros_like(x.T @ y))


@part
class Preconditioned(Predictor):
    """Preconditioned gradient descent, one step per matrix Γ_l: w ← w + Γ_l (1 / scale) Σ_j (y_j − w·x_j) x_j from 0.

    With transforms B_l each step also moves every input, the query included, x ← x − B_l G Γ_lᵀ x with
    G = (1 / scale) Σ_j x_j x_jᵀ of the inputs as they are: GD++ (von Oswald et al., 2023), for conditioning.
    A step then adds x_qᵀ Γ_l (1 / scale) Σ_j r_j x_j to the answer and takes x_jᵀ Γ_l (1 / scale) Σ_k r_k x_k off the
    residual r_j, which starts as y_j. Γ = step · I without transforms is `GradientDescent`.

    Attributes:
        gammas: [d, d] for one step, or [L, d, d].
        transforms: [L, d, d], one for each step, if inputs move.
        scale: "context", the number of examples seen, or a positive constant.

    Raises:
        ValueError: Shapes do not fit, or `scale` is neither.
    """

    gammas: Float[Array, "*l d d"]
    transforms: Float[Array, "l d d"] | None = None
    scale: Scale = "context"

    def __post_init__(self):
        shape = jnp.shape(self.gammas)
        if len(shape) not in (2, 3) or shape[-1] != shape[-2]:
            raise ValueError(f"Preconditioned: gammas has shape {shape}: need [d, d] or [L, d, d]")
        if self.transforms is not None and jnp.shape(self.transforms) != shape:
            raise ValueError(f"Preconditioned: transforms has shape {jnp.shape(self.transforms)}: need {shape}")
        if isinstance(self.scale, str):
            if self.scale != "context":
                raise ValueError(f"Preconditioned: scale is {self.scale!r}: need 'context' or a positive number")
            return
        check_all_positive("Preconditioned", "scale", self.scale)

    def answer(self, x, y, seen, query):
        shape, dim = jnp.shape(self.gammas), query.shape[-1]
        if shape[-1] != dim:
            raise ValueError(f"Preconditioned: gammas has shape {shape} but x has {dim} coordinates")
        x, residual = shown(x, y, seen)
        scale = jnp.maximum(seen.sum(), 1) if isinstance(self.scale, str) else self.scale
        gammas = jnp.reshape(self.gammas, (-1, dim, dim))
        transforms = None if self.transforms is None else jnp.reshape(self.transforms, gammas.shape)
        answer = jnp.zeros(y.shape[1:], x.dtype)
        for layer, gamma in enumerate(gammas):
            step = gamma @ (x.T @ residual) / scale
            answer, residual = answer + query @ step, residual - x @ step
            if transforms is not None:
                move = gamma @ (x.T @ x) @ transforms[layer].T / scale
                x, query = x - x @ move, query - query @ move
        return answer


@part
class DebiasedDescent(Predictor):
    """ŷ = (step / i) Σ_j y_j (x_j − x̄)·x: one gradient step on examples whose mean is taken off.

    Several softmax heads whose values cancel (Σ_h μ_h = 0) tend to this predictor (He et al., 2025). The answer does
    not change when a constant is added to all y, and is 0 from fewer than two examples.

    Attributes:
        step: The step size.
    """

    step: Float[Array, ""] | float

    def answer(self, x, y, seen, query):
        x, y = shown(x, y, seen)
        count = jnp.maximum(seen.sum(), 1)
        centred = jnp.where(seen[:, None], x - x.sum(0) / count, 0)
        return self.step / count * (query @ (centred.T @ y))


@part
class Newton(Predictor):
    """ŷ = xᵀ M_k Xᵀ y with M_k the Newton-Schulz iterate to (XᵀX + penalty I)⁻¹: M ← 2 M − M S M.

    S = XᵀX + penalty I and M_0 = S / ‖S‖_F², so that I − M_k S = (I − M_0 S)^(2^k): the error is squared at each step,
    where gradient descent multiplies it by a constant. The limit is `Ridge`, or `LeastSquares` without penalty. M is
    kept to the range of Xᵀ, since nothing else counts: elsewhere each step would double what rounding left. Fu et al.
    (2023) have compared transformers with this method.

    Attributes:
        steps: The number of steps k, at least 0.
        penalty: At least 0.

    Raises:
        TypeError: `steps` is not an int.
        ValueError: `steps` or `penalty` is negative.
    """

    steps: int
    penalty: Float[Array, ""] | float = 0.0

    def __post_init__(self):
        check_static_int("Newton", "steps", self.steps, 0)
        check_range("Newton: penalty", self.penalty, lambda x: x >= 0, "from 0 on")

    def answer(self, x, y, seen, query):
        x, y = shown(x, y, seen)
        system = x.T @ x + self.penalty * jnp.eye(x.shape[1], dtype=x.dtype)
        inside = pseudo_inverse(x) @ x
        inverse = inside @ ratio(system, (system**2).sum())
        inverse = jax.lax.fori_loop(0, self.steps, lambda _, m: inside @ (2 * m - m @ system @ m), inverse)
        return query @ inverse @ (x.T @ y)
