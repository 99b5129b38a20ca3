"""Closed forms for an attention layer that regresses in context: its best weights, its risk, its training.

The prompt has n examples with x ~ N(0, Σ), w ~ N(0, psi2 · I_d) and y = w·x + noise of variance sigma2. A risk is
E (ŷ − y)² at a new x with its own noise, so it has sigma2 in it. Functions are differentiable in all arguments but
integers. All raise ValueError for dimensions below 1, negative variances, and matrices that are no covariance of their
dimension.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.checks import check_positive, check_range, check_static_int
from jaxattn.icl.inputs import check_covariance
from jaxattn.icl.theory import Number, check_setting

Matrix = Float[Array, "d d"]


def _check(owner: str, covariance: Any, n: int, sigma2: Any, psi2: Any) -> None:
    dim = jnp.shape(covariance)[0] if jnp.ndim(covariance) else 0
    check_setting(owner, dim, n, sigma2, psi2, least=1)
    check_covariance(owner, covariance, dim)


def moment_matrix(covariance: Matrix, *, n: int, sigma2: Number = 0.0, psi2: Number = 1.0) -> Matrix:
    """Returns C_n = E[ŵ ŵᵀ] for ŵ = Xᵀy / n: Σ ( psi2 (n + 1) / n Σ + (psi2 tr Σ + sigma2) / n I ).

    The formula follows from E[A²] = (n + 1) / n Σ² + tr Σ / n Σ for A = XᵀX / n.
    """
    _check("moment_matrix", covariance, n, sigma2, psi2)
    eye = jnp.eye(len(covariance))
    return covariance @ (psi2 * (n + 1) / n * covariance + (psi2 * jnp.trace(covariance) + sigma2) / n * eye)


def lsa_optimum(covariance: Matrix, *, n: int, sigma2: Number = 0.0, psi2: Number = 1.0) -> Matrix:
    """Returns the best Γ in ŷ = xᵀ Γ Xᵀy / n: Γ* = ( (n + 1) / n Σ + (tr Σ + sigma2 / psi2) / n I )⁻¹ = psi2 Σ C_n⁻¹.

    One layer of linear attention learns Γ* (Ahn et al., 2023; Zhang et al., 2023; with noise Wu et al., 2024). Γ* tends
    to Σ⁻¹ with n.

    Raises:
        ValueError: `psi2` is 0, or Σ = 0.
    """
    _check("lsa_optimum", covariance, n, sigma2, psi2)
    check_range("lsa_optimum: psi2", psi2, lambda x: x > 0, "above 0")
    check_range("lsa_optimum: the trace of covariance", jnp.trace(covariance), lambda x: x > 0, "above 0")
    eye = jnp.eye(len(covariance))
    return jnp.linalg.inv((n + 1) / n * covariance + (jnp.trace(covariance) + sigma2 / psi2) / n * eye)


def linear_icl_risk(
    gamma: Matrix, covariance: Matrix, *, m: int, sigma2: Number = 0.0, psi2: Number = 1.0
) -> Float[Array, ""]:
    """Returns the risk of ŷ = xᵀ Γ Xᵀy / m after m examples, for any Γ and m (Wu et al., 2024):

        sigma2 + psi2 tr Σ − 2 psi2 tr(Σ Γ Σ) + tr(Σ Γ C_m Γᵀ)

    Raises:
        ValueError: gamma has another shape than the covariance.
    """
    moments = moment_matrix(covariance, n=m, sigma2=sigma2, psi2=psi2)
    if jnp.shape(gamma) != jnp.shape(covariance):
        raise ValueError(f"linear_icl_risk: gamma has shape {jnp.shape(gamma)}: need {jnp.shape(covariance)}")
    signal = psi2 * (jnp.trace(covariance) - 2 * jnp.trace(covariance @ gamma @ covariance))
    return sigma2 + signal + jnp.trace(covariance @ gamma @ moments @ gamma.T)


def lsa_minimum(covariance: Matrix, *, n: int, sigma2: Number = 0.0, psi2: Number = 1.0) -> Float[Array, ""]:
    """Returns the risk of `lsa_optimum`, the least of one layer of linear attention: sigma2 + psi2 tr(Σ (I − Γ* Σ))."""
    gamma = lsa_optimum(covariance, n=n, sigma2=sigma2, psi2=psi2)
    return sigma2 + psi2 * jnp.trace(covariance - covariance @ gamma @ covariance)


def lsa_rank_one_risk(covariance: Matrix, *, n: int, sigma2: Number = 0.0, psi2: Number = 1.0) -> Float[Array, ""]:
    """Returns the risk of the best Γ of rank one, sigma2 + psi2 (tr Σ − λ₁² γ₁).

    λ₁ is the largest eigenvalue of Σ and γ₁ its eigenvalue in Γ*. Free layers that start at random often end here,
    since they put Γ in a place of rank one.
    """
    largest = jnp.linalg.eigvalsh(covariance)[-1]
    gamma = jnp.linalg.eigvalsh(lsa_optimum(covariance, n=n, sigma2=sigma2, psi2=psi2))[0]
    return sigma2 + psi2 * (jnp.trace(covariance) - largest**2 * gamma)


# Stochastic gradient descent with a fresh task at every step, Γ ← Γ − g_t (ŷ − y) x (Xᵀy / n)ᵀ (Wu et al., 2024).


def halving_rates(*, rate: Number, tasks: int) -> Float[Array, " t"]:
    """Returns g_1 .. g_T: `rate`, halved every ⌊T / ln T⌋ tasks.

    Args:
        rate: The first rate, positive.
        tasks: T, at least 2.

    Raises:
        TypeError: `tasks` is not an int.
        ValueError: `tasks` is below 2, or `rate` is not positive.
    """
    check_static_int("halving_rates", "tasks", tasks, 2)
    check_positive("halving_rates", "rate", rate)
    return rate * 0.5 ** (jnp.arange(tasks) // int(tasks / math.log(tasks)))


def mean_path_bias(
    rates: Float[Array, " t"],
    covariance: Matrix,
    *,
    n: int,
    sigma2: Number = 0.0,
    psi2: Number = 1.0,
    start: Matrix | None = None,
) -> Float[Array, ""]:
    """Returns the exact excess risk of E Γ_T:

        tr(Σ D_T C_n D_Tᵀ)  with  D_t = D_{t−1} − g_t Σ D_{t−1} C_n  and  D_0 = Γ_0 − Γ*

    In the eigenbasis of Σ it is Σ_ij λ_i c_j Π_t (1 − g_t λ_i c_j)² (Γ_0 − Γ*)_ij², with λ, c the eigenvalues of Σ and
    C_n. Since risks are convex the mean excess of Γ_T is never less.

    Args:
        rates: g_1 .. g_T.
        covariance: Σ [d, d].
        n: The number of examples.
        sigma2: The variance of the noise.
        psi2: The variance of weights.
        start: Γ_0, by default 0.
    """
    optimum, moments = (f(covariance, n=n, sigma2=sigma2, psi2=psi2) for f in (lsa_optimum, moment_matrix))
    offset = -optimum if start is None else start - optimum

    def after(offset: Matrix, rate: Array) -> tuple[Matrix, None]:
        return offset - rate * covariance @ offset @ moments, None

    offset, _ = jax.lax.scan(after, offset, rates)
    return jnp.trace(covariance @ offset @ moments @ offset.T)


def _moments_of(values: Float[Array, " d"], n: int, sigma2: Any, psi2: Any) -> Float[Array, " d"]:
    """Returns the eigenvalues of C_n from those of Σ."""
    return values * (psi2 * (n + 1) / n * values + (psi2 * values.sum() + sigma2) / n)


def effective_dimension(
    covariance: Matrix, *, rate: Number, tasks: int, n: int, sigma2: Number = 0.0, psi2: Number = 1.0
) -> Float[Array, ""]:
    """Returns how many of the d² weights T tasks determine: D = Σ_ij min(1, (T_e g_0 λ_i c_j)²), T_e = T / ln T.

    λ, c are the eigenvalues of Σ and C_n. D is at most d², far less for spectra that decay (Wu et al., 2024).

    Args:
        rate: g_0, positive.
        tasks: T, at least 2.
        covariance: Σ [d, d].
        n: The number of examples.
        sigma2: The variance of the noise.
        psi2: The variance of weights.
    """
    _check("effective_dimension", covariance, n, sigma2, psi2)
    check_static_int("effective_dimension", "tasks", tasks, 2)
    check_positive("effective_dimension", "rate", rate)
    values = jnp.linalg.eigvalsh(covariance)
    curvature = values[:, None] * _moments_of(values, n, sigma2, psi2)
    return jnp.minimum(1, (tasks / math.log(tasks) * rate * curvature) ** 2).sum()


def task_complexity_bound(
    covariance: Matrix, *, rate: Number, tasks: int, n: int, sigma2: Number = 0.0, psi2: Number = 1.0
) -> Float[Array, ""]:
    """Returns the risk that noise adds to `mean_path_bias` in T tasks, up to a constant: (psi2 tr Σ + sigma2) D / T_e.

    D and T_e are those of `effective_dimension`, with the same arguments (Wu et al., 2024).
    """
    dimension = effective_dimension(covariance, rate=rate, tasks=tasks, n=n, sigma2=sigma2, psi2=psi2)
    return (psi2 * jnp.trace(covariance) + sigma2) * dimension * math.log(tasks) / tasks


# Softmax attention with scores ω_h x_l·x and values μ_h y_l, on x ~ N(0, I_d), w ~ N(0, I / d) (He et al., 2025).


def softmax_icl_loss(
    omega: Float[Array, " h"], mu: Float[Array, " h"], *, d: int, n: int, sigma2: Number = 0.0
) -> Float[Array, ""]:
    """Returns the risk of heads (ω, μ) to leading order in large d and n (He et al., 2025):

        sigma2 + (1 − μ·ω)² + (1 + sigma2) / n Σ_gh μ_g μ_h exp(d ω_g ω_h)

    Raises:
        ValueError: omega and mu are not vectors of the same length, or n is below 1.
    """
    check_setting("softmax_icl_loss", d, n, sigma2, least=1)
    if jnp.ndim(omega) != 1 or jnp.shape(omega) != jnp.shape(mu):
        raise ValueError(f"softmax_icl_loss: omega and mu are {jnp.shape(omega)}, {jnp.shape(mu)}: need [H] and [H]")
    spread = mu @ jnp.exp(d * omega[:, None] * omega) @ mu
    return sigma2 + (1 - mu @ omega) ** 2 + (1 + sigma2) / n * spread


def one_head_optimum(*, d: int, n: int, sigma2: Number = 0.0) -> tuple[Array, Array, Array]:
    """Returns (ω, μ, risk) of the least `softmax_icl_loss` of one head.

    ω = 1 / √d, μ ω = 1 / (1 + c) and risk = sigma2 + c / (1 + c) with c = e d (1 + sigma2) / n.
    """
    check_setting("one_head_optimum", d, n, sigma2, least=1)
    cost = math.e * d * (1 + jnp.asarray(sigma2, float)) / n
    omega = jnp.asarray(d**-0.5)
    return omega, 1 / (1 + cost) / omega, sigma2 + cost / (1 + cost)


def two_head_infimum(*, d: int, n: int, sigma2: Number = 0.0) -> Float[Array, ""]:
    """Returns the limit of `softmax_icl_loss` of heads (ω, −ω), (μ, −μ) as ω → 0 with the best 2 μ ω = 1 / (1 + c).

    The limit is sigma2 + c / (1 + c) with c = d (1 + sigma2) / n, e times less than for one head. No pair attains it.
    """
    check_setting("two_head_infimum", d, n, sigma2, least=1)
    cost = d * (1 + jnp.asarray(sigma2, float)) / n
    return sigma2 + cost / (1 + cost)
