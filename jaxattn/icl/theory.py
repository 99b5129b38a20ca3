"""The risk that regression in context must have, in closed form.

Unless said otherwise a prompt has n examples with x ~ N(0, I_d), w ~ N(0, psi2 · I_d) and y = w·x + noise of variance
sigma2, and an excess risk is E (ŷ − w·x)² at a new x: the noise of the answer, sigma2, is not in it. Functions are
scalar and differentiable in all arguments but integers. All raise ValueError for dimensions below 1, negative numbers
of examples and negative variances. `layer_theory.py` has the closed forms for attention layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.checks import check_range, check_static_int
from jaxattn.icl.inputs import check_covariance
from jaxattn.icl.wishart import eigenvalue_mean

Number = Float[Array, ""] | float


def check_setting(owner: str, dim: int, count: int, sigma2: Any, psi2: Any = 1.0, *, least: int = 0) -> None:
    """Raises unless this is a dimension, a number of examples from `least` on, and two variances."""
    check_static_int(owner, "d", dim, 1)
    check_static_int(owner, "n", count, least)
    check_range(f"{owner}: sigma2", sigma2, lambda x: x >= 0, "from 0 on")
    check_range(f"{owner}: psi2", psi2, lambda x: x >= 0, "from 0 on")


def averaging_excess(*, d: int, n: int, sigma2: Number = 0.0, psi2: Number = 1.0) -> Number:
    """The excess risk of `Averaging`: (psi2 d (d + 1) + sigma2 d) / n, and psi2 d without examples."""
    check_setting("averaging_excess", d, n, sigma2, psi2)
    return psi2 * d if n == 0 else (psi2 * d * (d + 1) + sigma2 * d) / n


def sparse_averaging_excess(*, d: int, nonzero: int, n: int, sigma2: Number = 0.0) -> Number:
    """The excess risk of `Averaging` on `SparseLinear(nonzero)`: (nonzero (d + 1) + sigma2 d) / n.

    Without examples it is `nonzero`. The weights that are not 0 are N(0, 1).

    Raises:
        ValueError: `nonzero` is larger than d.
    """
    check_setting("sparse_averaging_excess", d, n, sigma2)
    check_static_int("sparse_averaging_excess", "nonzero", nonzero, 0)
    if nonzero > d:
        raise ValueError(f"sparse_averaging_excess: nonzero is {nonzero} of d {d}: need at most as many")
    return nonzero if n == 0 else (nonzero * (d + 1) + sigma2 * d) / n


def ols_excess(*, d: int, n: int, sigma2: Number = 0.0, psi2: Number = 1.0) -> Number:
    """The excess risk of `LeastSquares`, the shortest w that fits best: the share not seen, and the noise fitted.

        psi2 (d − n) + sigma2 n / (d − n − 1)   for n < d − 1,
        sigma2 d / (n − d − 1)                  for n > d + 1,
        infinite for n = d − 1, d, d + 1, but for psi2 (d − n)⁺ without noise.

    The formulas are the means of inverse Wishart matrices. For sparse or otherwise distributed w psi2 is E ‖w‖² / d.
    """
    check_setting("ols_excess", d, n, sigma2, psi2)
    bias = psi2 * max(d - n, 0)
    if n == 0:
        return bias
    if abs(d - n) <= 1:
        return jnp.where(jnp.asarray(sigma2) > 0, jnp.inf, bias)
    return bias + sigma2 * min(n, d) / (abs(d - n) - 1)


def ridge_excess(
    *, d: int, n: int, sigma2: Number = 0.0, psi2: Number = 1.0, penalty: Number | None = None
) -> Float[Array, ""]:
    """The excess risk of `Ridge(penalty)`: E Σ_k (psi2 penalty² + sigma2 λ_k) / (λ_k + penalty)².

    The sum is over the eigenvalues λ of XᵀX. The result is exact for every n and d (`wishart.py`): to ten digits in
    float64 for penalties above 1e−4, to six in float32.

    Args:
        d: The dimension.
        n: The number of examples.
        sigma2: The variance of the noise.
        psi2: The variance of weights.
        penalty: Positive (for none, `ols_excess`). The default is sigma2 / psi2, that of the Bayes answer: then the
            excess is sigma2 E tr (XᵀX + penalty)⁻¹, the least risk of all predictors.

    Raises:
        ValueError: `penalty` is not positive.
    """
    check_setting("ridge_excess", d, n, sigma2, psi2)
    penalty = _bayes_penalty("ridge_excess", sigma2, psi2, penalty)
    return eigenvalue_mean(d, n, lambda x: (psi2 * penalty**2 + sigma2 * x) / (x + penalty) ** 2)


def _bayes_penalty(owner: str, sigma2: Any, psi2: Any, penalty: Any) -> Any:
    """Returns the penalty, or that of the Bayes answer; raises ValueError unless it is positive."""
    if penalty is None:
        check_range(f"{owner}: psi2", psi2, lambda x: x > 0, "above 0 where no penalty is given")
        penalty = sigma2 / psi2
    check_range(f"{owner}: penalty (sigma2 / psi2 unless given)", penalty, lambda x: x > 0, "above 0")
    return penalty


def ridge_excess_spectral(
    covariance: Float[Array, "d d"], *, n: int, sigma2: Number = 0.0, psi2: Number = 1.0, penalty: Number | None = None
) -> Float[Array, ""]:
    """The excess risk of `Ridge(penalty)` on x ~ N(0, Σ) to leading order in n and d, its deterministic equivalent:

        ( psi2 κ² Σ_k λ_k / (λ_k + κ)² + sigma2 df / n ) / (1 − df / n),   df = Σ_k λ_k² / (λ_k + κ)²,

    over the eigenvalues λ of Σ, with κ > 0 the root of n κ = penalty + κ Σ_k λ_k / (λ_k + κ). For Σ = I it is the law
    of Marchenko and Pastur; for the Bayes penalty it is psi2 n κ − sigma2.

    The approximation is worst at n ≈ d with small penalties: for Σ = I, d = 20 and sigma2 = 1/4 it is 0.2%, 8% and 5%
    below `ridge_excess` at n = 10, 20 and 40, and for sigma2 = 1/100 it is 37% below it at n = 21.

    Raises:
        ValueError: n is below 1, `penalty` is not positive, or `covariance` is not a covariance.
    """
    d = jnp.shape(covariance)[0] if jnp.ndim(covariance) else 0
    check_setting("ridge_excess_spectral", d, n, sigma2, psi2, least=1)
    check_covariance("ridge_excess_spectral", covariance, d)
    penalty = _bayes_penalty("ridge_excess_spectral", sigma2, psi2, penalty)
    values = jnp.linalg.eigvalsh(covariance)

    def newton(kappa: Array, penalty: Any, values: Array) -> Array:
        # n κ − penalty − Σ κ λ / (λ + κ) is convex in κ: from above its root, Newton's method comes down to it.
        excess = n * kappa - penalty - (kappa * values / (values + kappa)).sum()
        return kappa - excess / (n - (values**2 / (values + kappa) ** 2).sum())

    # Until rounding lets it come down no more: each step at least halves κ as long as it is far above the root.
    fixed = jax.lax.stop_gradient((penalty, values))
    first = (fixed[0] + fixed[1].sum()) / n
    _, kappa = jax.lax.while_loop(
        lambda pair: pair[1] < pair[0], lambda pair: (pair[1], newton(pair[1], *fixed)), (first, newton(first, *fixed))
    )
    for _ in range(2):  # with the derivatives of the root, up to the third
        kappa = newton(kappa, penalty, values)
    freedom = (values**2 / (values + kappa) ** 2).sum() / n
    return (psi2 * kappa**2 * (values / (values + kappa) ** 2).sum() + sigma2 * freedom) / (1 - freedom)


def gd_step(*, d: int, n: int, sigma2: Number = 0.0, psi2: Number = 1.0) -> Number:
    """The step of one step of `GradientDescent` with the least risk: n / (n + 1 + d + sigma2 / psi2)."""
    check_setting("gd_step", d, n, sigma2, psi2)
    check_range("gd_step: psi2", psi2, lambda x: x > 0, "above 0")
    return n / (n + 1 + d + sigma2 / psi2)


def gd_excess(*, d: int, n: int, sigma2: Number = 0.0, psi2: Number = 1.0, step: Number | None = None) -> Number:
    """The excess risk of one step of `GradientDescent`: psi2 d ((1 − step)² + step² (d + 1) / n) + sigma2 step² d / n.

    With step 1 it is `averaging_excess`. Without examples it is psi2 d.

    Args:
        d: The dimension.
        n: The number of examples.
        sigma2: The variance of the noise.
        psi2: The variance of weights.
        step: By default the best step, `gd_step`; the excess is then psi2 d (d + 1 + r) / (n + 1 + d + r) with
            r = sigma2 / psi2.
    """
    check_setting("gd_excess", d, n, sigma2, psi2)
    if n == 0:
        return psi2 * d
    step = gd_step(d=d, n=n, sigma2=sigma2, psi2=psi2) if step is None else step
    return psi2 * d * ((1 - step) ** 2 + step**2 * (d + 1) / n) + sigma2 * step**2 * d / n


def debiased_gd_step(*, d: int, n: int, sigma2: Number = 0.0, psi2: Number = 1.0) -> Number:
    """The step of `DebiasedDescent` with the least risk: n / (n + d + sigma2 / psi2)."""
    check_setting("debiased_gd_step", d, n, sigma2, psi2, least=1)
    check_range("debiased_gd_step: psi2", psi2, lambda x: x > 0, "above 0")
    return n / (n + d + sigma2 / psi2)


def debiased_gd_excess(
    *, d: int, n: int, sigma2: Number = 0.0, psi2: Number = 1.0, step: Number | None = None
) -> Number:
    """The excess risk of `DebiasedDescent`, with η = step (n − 1) / n:

        psi2 d (1 − 2 η + η² (n + d) / (n − 1)) + sigma2 η² d / (n − 1)

    The centred Gram matrix is Wishart with n − 1 degrees of freedom.

    Args:
        d: The dimension.
        n: The number of examples, at least 1.
        sigma2: The variance of the noise.
        psi2: The variance of weights.
        step: By default the best step, `debiased_gd_step`; the excess is then psi2 d (d + 1 + r) / (n + d + r) with
            r = sigma2 / psi2: that of `gd_excess` from one example less.

    Raises:
        ValueError: n is below 1.
    """
    check_setting("debiased_gd_excess", d, n, sigma2, psi2, least=1)
    step = debiased_gd_step(d=d, n=n, sigma2=sigma2, psi2=psi2) if step is None else step
    share = (n - 1) / n
    bias = 1 - 2 * step * share + step**2 * share * (n + d) / n
    return psi2 * d * bias + sigma2 * step**2 * share * d / n
