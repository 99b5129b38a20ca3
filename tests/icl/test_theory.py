"""Closed forms against independent routes: simulation, formulas worked by hand, each other, and gradients at optima."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxattn import icl
from jaxattn.core.merged import SoftmaxHeads
from jaxattn.icl import layer_theory, theory, wishart
from jaxattn.icl.wishart import eigenvalue_mean

KEY = jax.random.key(0)
SKEWED = np.diag(1 / np.arange(1.0, 6))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def within(mean, error, expected, factor=4):
    assert abs(mean - expected) <= factor * error, f"{mean} ± {error} is not {expected}"


# The eigenvalues of Wishart matrices.


@pytest.mark.parametrize(("d", "n"), [(1, 1), (1, 4), (2, 2), (3, 3), (3, 8), (5, 2), (7, 5), (20, 40), (33, 33)])
def test_moments_of_eigenvalues_are_those_of_wishart_matrices(d, n):
    """E tr 1 = d, E tr W = d n, E tr W² = d n (n + d + 1), and E tr W⁻¹ = d / (n − d − 1)."""
    np.testing.assert_allclose(eigenvalue_mean(d, n, jnp.ones_like), d, rtol=1e-11)
    np.testing.assert_allclose(eigenvalue_mean(d, n, lambda x: x), d * n, rtol=1e-11)
    np.testing.assert_allclose(eigenvalue_mean(d, n, jnp.square), d * n * (n + d + 1), rtol=1e-11)
    if n > d + 1:
        np.testing.assert_allclose(eigenvalue_mean(d, n, lambda x: 1 / x), d / (n - d - 1), rtol=1e-11)


@pytest.mark.parametrize(("d", "n"), [(2, 2), (3, 4), (3, 2), (8, 8)])
def test_means_over_eigenvalues_are_those_of_random_matrices(d, n):
    x = np.random.default_rng(0).normal(size=(40000, n, d))
    values = (1 / (np.linalg.eigvalsh(np.swapaxes(x, 1, 2) @ x) + 0.3)).sum(-1)
    within(values.mean(), values.std() / 200, eigenvalue_mean(d, n, lambda x: 1 / (x + 0.3)))


def test_where_the_method_fails_it_says_so(monkeypatch):
    monkeypatch.setattr(wishart, "NODES", 12)
    with pytest.raises(ValueError, match="dim and count are 10 and 11: too large"):
        eigenvalue_mean(10, 11, jnp.ones_like)


def test_ridge_in_one_dimension_is_an_integral_over_the_chi_square_distribution():
    """d = 1: XᵀX is chi-square with n degrees of freedom, and the excess E sigma2 / (XᵀX + sigma2)."""
    for n in (1, 2, 5):
        log_norm = (n / 2) * np.log(2) + np.log(float(jnp.exp(jax.scipy.special.gammaln(n / 2))))

        def density(s, n=n, log_norm=log_norm):  # of s = √x
            return 2 * s ** (n - 1) * np.exp(-(s**2) / 2 - log_norm)

        expected, _ = integrate.quad(lambda s: density(s) * 0.3 / (s**2 + 0.3), 0, 20, epsabs=1e-13)
        np.testing.assert_allclose(theory.ridge_excess(d=1, n=n, sigma2=0.3), expected, rtol=1e-9)


# Ridge, least squares, averaging.


def test_ridge_excess_at_the_bayes_penalty_is_least_and_the_noise_times_the_trace():
    for d, n in ((5, 3), (4, 4), (6, 20)):
        trace = eigenvalue_mean(d, n, lambda x: 1 / (x + 0.5))
        np.testing.assert_allclose(theory.ridge_excess(d=d, n=n, sigma2=0.4, psi2=0.8), 0.4 * trace, rtol=1e-12)
        slope = jax.grad(lambda p: theory.ridge_excess(d=d, n=n, sigma2=0.4, psi2=0.8, penalty=p))(0.5)  # noqa: B023
        np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_ridge_excess_tends_to_its_limits():
    np.testing.assert_allclose(theory.ridge_excess(d=5, n=0, sigma2=0.4, psi2=2.0), 10)
    np.testing.assert_allclose(theory.ridge_excess(d=5, n=3, sigma2=0.4, psi2=2.0, penalty=1e12), 10, rtol=1e-9)
    np.testing.assert_allclose(
        theory.ridge_excess(d=5, n=12, sigma2=0.4, penalty=1e-9), theory.ols_excess(d=5, n=12, sigma2=0.4), rtol=1e-8
    )
    np.testing.assert_allclose(
        theory.ridge_excess(d=12, n=5, sigma2=0.4, penalty=1e-9), theory.ols_excess(d=12, n=5, sigma2=0.4), rtol=1e-8
    )


def test_the_spectral_form_is_marchenko_and_pasturs():
    for d, n, sigma2 in ((20, 10, 0.25), (20, 40, 0.25), (30, 30, 1.0)):
        g, k = d / n, sigma2 / n
        m = (-(1 - g + k) + np.sqrt((1 - g + k) ** 2 + 4 * g * k)) / (2 * g * k)
        spectral = theory.ridge_excess_spectral(jnp.eye(d), n=n, sigma2=sigma2)
        np.testing.assert_allclose(spectral, sigma2 * d / n * m, rtol=1e-10)


def test_the_spectral_form_is_as_far_off_as_it_says_and_no_more_in_large_dimension():
    def off(d, n, sigma2):
        return float(
            theory.ridge_excess_spectral(jnp.eye(d), n=n, sigma2=sigma2) / theory.ridge_excess(d=d, n=n, sigma2=sigma2)
            - 1
        )

    np.testing.assert_allclose([off(20, n, 0.25) for n in (10, 20, 40)], [-0.002, -0.082, -0.047], atol=5e-4)
    np.testing.assert_allclose(off(20, 21, 0.01), -0.365, atol=5e-4)
    assert abs(off(100, 200, 0.25)) < 0.25 * abs(off(20, 40, 0.25))


def test_the_spectral_form_is_the_limit_of_simulation_for_any_covariance_and_penalty():
    """With each of 20 eigenvalues m times, and n, sigma2 and penalty times m, it is what simulation tends to: they are
    off by a term in 1/m, 3 to 4% at m = 1, and without that, 4/3 of off(4) less 1/3 of off(1), they agree."""
    for penalty in (0.5, 2.0):
        off, error = {}, {}
        for m, draws in ((1, 2000), (4, 500)):
            values = np.repeat(np.arange(1, 21) ** -0.7, m)
            d, n, lam, sigma2 = 20 * m, 30 * m, penalty * m, 0.5 * m
            x = np.random.default_rng(m).normal(size=(draws, n, d)) * np.sqrt(values)
            inverse = np.linalg.inv(np.swapaxes(x, 1, 2) @ x + lam * np.eye(d))
            # E (x·(ŵ − w))² = lam² tr(Σ M M) + sigma2 tr(Σ M XᵀX M), with M the inverse and XᵀX = M⁻¹ − lam.
            square = (inverse**2 * values[:, None]).sum((1, 2))
            excess = lam**2 * square + sigma2 * (np.einsum("bii,i->b", inverse, values) - lam * square)
            given = None if lam == sigma2 else lam  # the Bayes penalty is the one that is not given
            ratio = excess / float(
                theory.ridge_excess_spectral(jnp.diag(jnp.asarray(values)), n=n, sigma2=sigma2, penalty=given)
            )
            off[m], error[m] = ratio.mean() - 1, ratio.std() / draws**0.5
        assert 0.02 < off[1] < 0.05
        within((4 * off[4] - off[1]) / 3, (16 * error[4] ** 2 + error[1] ** 2) ** 0.5 / 3, 0)


def test_least_squares_under_noise():
    """d = 20, sigma .5, after 5, 10, 15, 25, 30, 40 examples."""
    found = [theory.ols_excess(d=20, n=n, sigma2=0.25) for n in (5, 10, 15, 25, 30, 40)]
    np.testing.assert_allclose(found, [15.09, 10.28, 5.94, 1.25, 0.556, 0.263], rtol=2e-3)
    assert all(jnp.isinf(theory.ols_excess(d=20, n=n, sigma2=0.25)) for n in (19, 20, 21))
    assert [float(theory.ols_excess(d=20, n=n)) for n in (0, 19, 20, 21)] == [20, 1, 0, 0]
    assert theory.ols_excess(d=1, n=0, sigma2=0.5) == 1


def test_averaging_is_a_step_of_descent_is_the_linear_layer_of_the_identity():
    for d, n in ((1, 1), (5, 10)):
        averaging = theory.averaging_excess(d=d, n=n, sigma2=0.3, psi2=2.0)
        np.testing.assert_allclose(averaging, theory.gd_excess(d=d, n=n, sigma2=0.3, psi2=2.0, step=1.0), rtol=1e-12)
        layer = layer_theory.linear_icl_risk(jnp.eye(d), jnp.eye(d), m=n, sigma2=0.3, psi2=2.0)
        np.testing.assert_allclose(averaging, layer - 0.3, rtol=1e-12)
    np.testing.assert_allclose(
        theory.sparse_averaging_excess(d=20, nonzero=20, n=7, sigma2=0.3),
        theory.averaging_excess(d=20, n=7, sigma2=0.3),
    )


def test_best_steps_are_best_and_have_the_excess_they_say():
    d, n, sigma2, psi2 = 5, 40, 0.1, 0.2
    r = sigma2 / psi2
    for excess, step, rest in (
        (theory.gd_excess, theory.gd_step(d=d, n=n, sigma2=sigma2, psi2=psi2), 1),
        (theory.debiased_gd_excess, theory.debiased_gd_step(d=d, n=n, sigma2=sigma2, psi2=psi2), 0),
    ):
        of_step = partial(excess, d=d, n=n, sigma2=sigma2, psi2=psi2)
        np.testing.assert_allclose(jax.grad(lambda s: of_step(step=s))(step), 0, atol=1e-12)  # noqa: B023
        best = psi2 * d * (d + 1 + r) / (n + rest + d + r)
        np.testing.assert_allclose(of_step(), best, rtol=1e-12)
        np.testing.assert_allclose(of_step(step=step), best, rtol=1e-12)
    # One step of the best layer on isotropic inputs is descent.
    np.testing.assert_allclose(
        layer_theory.lsa_minimum(jnp.eye(d), n=n, sigma2=sigma2, psi2=psi2) - sigma2,
        theory.gd_excess(d=d, n=n, sigma2=sigma2, psi2=psi2),
        rtol=1e-12,
    )
    # With noise these are .2398 and .2429, and the Bayes answer's .1145 (d 5, L 40, sigma2 .1, psi2 1 / d).
    np.testing.assert_allclose(theory.gd_excess(d=d, n=n, sigma2=sigma2, psi2=psi2) + sigma2, 0.2398, atol=5e-5)
    np.testing.assert_allclose(
        theory.debiased_gd_excess(d=d, n=n, sigma2=sigma2, psi2=psi2) + sigma2, 0.2429, atol=5e-5
    )
    np.testing.assert_allclose(theory.ridge_excess(d=d, n=n, sigma2=sigma2, psi2=psi2) + sigma2, 0.1145, atol=5e-5)


def test_without_noise_the_best_step_leaves_1154_after_20_examples():
    np.testing.assert_allclose(theory.gd_excess(d=5, n=20), 30 / 26, rtol=1e-12)


# Linear attention.


@pytest.mark.parametrize("m", [3, 10, 30])
def test_the_risk_of_any_linear_layer_is_exact_at_any_length(m):
    covariance, rng = jnp.asarray(SKEWED), np.random.default_rng(0)
    gamma = jnp.asarray(rng.normal(size=(5, 5)))
    task = icl.FunctionTask(icl.Linear(1.2), icl.Gaussian(5, covariance), m + 1, noise=0.5)
    risk = icl.compare(task, {"layer": icl.Preconditioned(gamma)}, [m], KEY, batch=4096, batches=8).risks["layer"]
    within(risk.mean[0], risk.error[0], layer_theory.linear_icl_risk(gamma, covariance, m=m, sigma2=0.25, psi2=1.44))


def test_the_best_linear_layer():
    """d 5, N 10, sigma .5, eigenvalues 1 / k: the least risk is 1.1012, 0.9 and 1.1 of it cost 1.1155."""
    gamma = layer_theory.lsa_optimum(SKEWED, n=10, sigma2=0.25)
    np.testing.assert_allclose(layer_theory.lsa_minimum(SKEWED, n=10, sigma2=0.25), 1.1012, atol=5e-5)
    risks = [layer_theory.linear_icl_risk(a * gamma, SKEWED, m=10, sigma2=0.25) for a in (0.9, 1, 1.1)]
    np.testing.assert_allclose(risks, [1.1155, 1.1012, 1.1155], atol=5e-5)
    slope = jax.grad(layer_theory.linear_icl_risk)(gamma, SKEWED, m=10, sigma2=0.25, psi2=1.0)
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    np.testing.assert_allclose(layer_theory.lsa_rank_one_risk(SKEWED, n=10, sigma2=0.25), 1.79, atol=5e-3)


def test_a_linear_layer_is_best_at_its_own_length():
    """From 10 used at 3, 10, 30, 1000: 2.278, 1.101, .765, .6018, where the best are 1.733, 1.101, .644, .265."""
    gamma, lengths = layer_theory.lsa_optimum(SKEWED, n=10, sigma2=0.25), (3, 10, 30, 1000)
    used = [layer_theory.linear_icl_risk(gamma, SKEWED, m=m, sigma2=0.25) for m in lengths]
    best = [layer_theory.lsa_minimum(SKEWED, n=m, sigma2=0.25) for m in lengths]
    np.testing.assert_allclose(used, [2.278, 1.101, 0.765, 0.6018], atol=5e-4)
    np.testing.assert_allclose(best, [1.733, 1.101, 0.644, 0.265], atol=5e-4)


def test_with_many_examples_the_best_layer_inverts_the_covariance():
    np.testing.assert_allclose(
        layer_theory.lsa_optimum(SKEWED, n=10**8, sigma2=0.25), jnp.linalg.inv(SKEWED), rtol=1e-6
    )
    np.testing.assert_allclose(layer_theory.lsa_minimum(SKEWED, n=10**8, sigma2=0.25), 0.25, rtol=1e-6)


def test_the_rank_one_risk_is_that_of_the_best_matrix_of_rank_one():
    """Over a uᵀ v with u, v unit vectors the least risk is found by descent from many starts."""

    def risk(u, v):
        return layer_theory.linear_icl_risk(u[:, None] * v, SKEWED, m=10, sigma2=0.25)

    @jax.jit
    def descend(u, v):
        slope = jax.grad(risk, (0, 1))
        return jax.lax.fori_loop(
            0, 3000, lambda _, p: tuple(x - 0.02 * g for x, g in zip(p, slope(*p), strict=True)), (u, v)
        )

    starts = jax.random.normal(KEY, (2, 20, 5)) * 0.5
    ends = jax.vmap(risk)(*jax.vmap(descend)(*starts))
    np.testing.assert_allclose(ends.min(), layer_theory.lsa_rank_one_risk(SKEWED, n=10, sigma2=0.25), rtol=1e-6)


def test_the_scale_decides_about_other_lengths():
    """Best at N = 20 without noise: at M = 100 the excess is .44 divided by M and 44.9 divided by N (3.2 at 40)."""
    gamma = layer_theory.lsa_optimum(np.eye(5), n=20)
    divided = [layer_theory.linear_icl_risk(gamma, np.eye(5), m=m) for m in (40, 100)]
    constant = [layer_theory.linear_icl_risk(m / 20 * gamma, np.eye(5), m=m) for m in (40, 100)]
    np.testing.assert_allclose(divided[1], 0.444, atol=5e-4)
    np.testing.assert_allclose(constant, [3.225, 44.94], atol=5e-3)
    task = icl.FunctionTask(icl.Linear(), icl.Gaussian(5), 101)
    predictors = {"divided": icl.Preconditioned(gamma), "constant": icl.Preconditioned(gamma, scale=20.0)}
    risks = icl.compare(task, predictors, [40, 100], KEY, batch=1024, batches=2).risks
    for j in (0, 1):
        within(risks["divided"].mean[j], risks["divided"].error[j], divided[j])
        within(risks["constant"].mean[j], risks["constant"].error[j], constant[j])


# Pretraining by stochastic gradient descent.

SPECTRUM = np.diag(np.arange(1.0, 21) ** -1.5)


def trained_excess(key, rates, seeds):
    """The excess risk of Γ after one task per rate, d 20, N 40, sigma .5, [seeds]."""
    task = icl.FunctionTask(icl.Linear(), icl.Gaussian(20, SPECTRUM), 41, noise=0.5)

    def step(gamma, drawn):
        key, rate = drawn
        prompt = task.sample(key, 1)
        x, y = prompt.x[0], prompt.y[0]
        pooled = x[:-1].T @ y[:-1] / 40
        return gamma - rate * (x[-1] @ gamma @ pooled - y[-1]) * jnp.outer(x[-1], pooled), None

    def run(key):
        gamma, _ = jax.lax.scan(step, jnp.zeros((20, 20)), (jax.random.split(key, len(rates)), rates))
        return gamma

    gammas = jax.jit(jax.vmap(run))(jax.random.split(key, seeds))
    least = layer_theory.lsa_minimum(SPECTRUM, n=40, sigma2=0.25)
    excess = jax.vmap(lambda g: layer_theory.linear_icl_risk(g, SPECTRUM, m=40, sigma2=0.25) - least)(gammas)
    return gammas, excess


def test_one_task_per_step_takes_the_stated_path():
    """At c = .15 and T = 100 the bias is .665, the bound on what noise adds .148, and the excess between them."""
    curvature = jnp.trace(SPECTRUM) * jnp.trace(layer_theory.moment_matrix(SPECTRUM, n=40, sigma2=0.25))
    rate = 0.15 / curvature
    biases = [
        layer_theory.mean_path_bias(layer_theory.halving_rates(rate=rate, tasks=t), SPECTRUM, n=40, sigma2=0.25)
        for t in (100, 1000)
    ]
    bounds = [
        layer_theory.task_complexity_bound(rate=rate, tasks=t, covariance=SPECTRUM, n=40, sigma2=0.25)
        for t in (100, 1000, 10000, 40000)
    ]
    np.testing.assert_allclose(biases, [0.665, 0.443], atol=1e-3)
    np.testing.assert_allclose(bounds, [0.148, 0.116, 0.065, 0.032], atol=5e-4)

    _, excess = trained_excess(KEY, layer_theory.halving_rates(rate=rate, tasks=100), 256)
    mean, error = float(excess.mean()), float(excess.std() / 16)
    assert biases[0] <= mean + 2 * error
    assert mean <= biases[0] + bounds[0] + 2 * error


def test_the_mean_path_shrinks_each_entry_in_the_eigenbasis():
    """Σ_ij λ_i c_j Π_t (1 − g_t λ_i c_j)² (Γ_0 − Γ*)_ij², from a start of its own, in a basis that is not the axes."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    values = np.array([1.0, 0.5, 0.3, 0.1])
    covariance = jnp.asarray(basis @ np.diag(values) @ basis.T)
    start, rates = jnp.asarray(rng.normal(size=(4, 4))), layer_theory.halving_rates(rate=0.3, tasks=50)
    moments = np.diag(basis.T @ layer_theory.moment_matrix(covariance, n=10, sigma2=0.25, psi2=2.0) @ basis)
    offset = basis.T @ (start - layer_theory.lsa_optimum(covariance, n=10, sigma2=0.25, psi2=2.0)) @ basis
    curvature = np.outer(values, moments)
    expected = (curvature * (np.prod([1 - rate * curvature for rate in rates], axis=0) * offset) ** 2).sum()
    bias = layer_theory.mean_path_bias(rates, covariance, n=10, sigma2=0.25, psi2=2.0, start=start)
    np.testing.assert_allclose(bias, expected, rtol=1e-9)


def test_the_effective_dimension_counts_all_weights_at_most():
    assert layer_theory.effective_dimension(rate=1e9, tasks=100, covariance=SPECTRUM, n=40, sigma2=0.25) == 400
    assert layer_theory.effective_dimension(rate=1e-3, tasks=100, covariance=SPECTRUM, n=40, sigma2=0.25) < 1
    flat = [
        layer_theory.effective_dimension(rate=0.1, tasks=1000, covariance=jnp.eye(d), n=40, sigma2=0.25)
        for d in (5, 10)
    ]
    assert flat == [25, 100]


# Softmax attention.


def test_the_best_one_head_and_two_heads():
    """d 5, L 40, sigma2 .1: .3721 with one head and .2209 with two, both with the noise."""
    omega, mu, risk = layer_theory.one_head_optimum(d=5, n=40, sigma2=0.1)
    np.testing.assert_allclose(risk, 0.3721, atol=5e-5)
    np.testing.assert_allclose(
        layer_theory.softmax_icl_loss(omega[None], mu[None], d=5, n=40, sigma2=0.1), risk, rtol=1e-12
    )
    slopes = jax.grad(layer_theory.softmax_icl_loss, (0, 1))(omega[None], mu[None], d=5, n=40, sigma2=0.1)
    np.testing.assert_allclose(slopes, 0, atol=1e-12)
    infimum = layer_theory.two_head_infimum(d=5, n=40, sigma2=0.1)
    np.testing.assert_allclose(infimum, 0.2209, atol=5e-5)
    total = (infimum - 0.1 - 1) * -1  # μ·ω = 1 / (1 + c) = 1 − c / (1 + c)
    pair = jnp.array([1.0, -1.0])
    risks = [
        layer_theory.softmax_icl_loss(w * pair, total / 2 / w * pair, d=5, n=40, sigma2=0.1) for w in (0.1, 0.03, 0.01)
    ]
    assert risks[0] > risks[1] > risks[2] > infimum
    np.testing.assert_allclose(risks[2], infimum, rtol=1e-5)


def test_the_loss_of_softmax_heads_is_right_in_large_dimension():
    """One head at its best and two near theirs, d 40 and L 320: the formula is 5% off at most, an e between them."""
    d, n = 40, 320
    omega, mu, loss = layer_theory.one_head_optimum(d=d, n=n, sigma2=0.1)
    infimum = layer_theory.two_head_infimum(d=d, n=n, sigma2=0.1)
    settings = {"one": ([omega], [mu]), "two": ([0.02, -0.02], (1.1 - infimum) / 0.04 * np.array([1, -1]))}
    predictors = {}
    for name, (omegas, mus) in settings.items():
        diagonal = np.append(np.ones(d), 0)
        kq = np.asarray(omegas)[:, None, None] * np.diag(diagonal)
        ov = np.asarray(mus)[:, None] * (1 - diagonal)
        predictors[name] = icl.SoftmaxLayer(SoftmaxHeads(jnp.asarray(kq), jnp.asarray(ov)))
    task = icl.FunctionTask(icl.Linear(d**-0.5), icl.Gaussian(d), n + 1, noise=0.1**0.5)
    risks = icl.compare(task, predictors, [n], KEY, batch=512, batches=4, excess=True).risks
    for name, expected in (("one", loss - 0.1), ("two", infimum - 0.1)):
        within(risks[name].mean[0], risks[name].error[0], expected, 4 + 0.05 * expected / risks[name].error[0])


def test_gradients_reach_the_noise_and_the_prior():
    for function in (theory.ridge_excess, theory.gd_excess, theory.ols_excess, theory.debiased_gd_excess):
        of_noise = partial(lambda function, sigma2: function(d=4, n=9, sigma2=sigma2, psi2=0.7), function)
        ahead, behind = of_noise(0.5 + 1e-5), of_noise(0.5 - 1e-5)
        np.testing.assert_allclose(jax.grad(of_noise)(0.5), (ahead - behind) / 2e-5, rtol=1e-6)
    even = jnp.eye(3)  # all of whose eigenvalues are equal: of the eigenvectors there is no derivative
    for function in (
        lambda covariance: theory.ridge_excess_spectral(covariance, n=9, sigma2=0.5, psi2=0.7),
        lambda covariance: layer_theory.lsa_minimum(covariance, n=9, sigma2=0.5, psi2=0.7),
        lambda covariance: layer_theory.mean_path_bias(jnp.full(4, 0.1), covariance, n=9, sigma2=0.5, psi2=0.7),
    ):
        ahead, behind = function((1 + 1e-5) * even), function((1 - 1e-5) * even)
        slope = jnp.trace(jax.grad(function)(even))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)

    def spectral(sigma2):
        return theory.ridge_excess_spectral(SKEWED, n=9, sigma2=sigma2, psi2=0.7)

    ahead, behind = spectral(0.5 + 1e-5), spectral(0.5 - 1e-5)
    np.testing.assert_allclose(jax.grad(spectral)(0.5), (ahead - behind) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("module", [theory, layer_theory])
def test_numbers_are_named(module):
    """Dimensions, lengths and variances are all numbers: a slip among them would be another true statement."""
    functions = [f for name, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
    public = [f for f in functions if not f.__name__.startswith(("_", "check"))]
    assert len(public) > 5
    for function in public:
        for name, parameter in inspect.signature(function).parameters.items():
            number = name in ("d", "n", "m", "nonzero", "tasks", "rate", "sigma2", "psi2", "penalty", "step")
            assert number == (parameter.kind is inspect.Parameter.KEYWORD_ONLY) or name == "start", (function, name)


def test_errors_name_the_argument():
    singular = jnp.diag(jnp.array([1.0, 0.0]))
    for call, message in (
        (lambda: theory.averaging_excess(d=0, n=3), "d must be at least 1"),
        (lambda: theory.ols_excess(d=3, n=-1), "n must be at least 0"),
        (lambda: theory.ridge_excess(d=3, n=3, sigma2=-0.1), "sigma2 holds -0.1"),
        (lambda: theory.ridge_excess(d=3, n=3, sigma2=0.1, psi2=-1.0), "psi2 holds -1.0"),
        (lambda: theory.ridge_excess(d=3, n=3), "penalty .* holds 0.0: need numbers above 0"),
        (lambda: theory.ridge_excess(d=3, n=3, sigma2=0.1, penalty=-1.0), "penalty .* holds -1.0"),
        (lambda: theory.sparse_averaging_excess(d=3, nonzero=4, n=1), "nonzero is 4 of d 3"),
        (lambda: theory.debiased_gd_excess(d=3, n=0), "n must be at least 1"),
        (lambda: theory.gd_step(d=3, n=4, sigma2=0.1, psi2=0.0), "psi2 holds 0.0"),
        (lambda: theory.ridge_excess_spectral(jnp.ones(3), n=3, sigma2=0.1), r"covariance has shape \(3,\)"),
        (lambda: layer_theory.lsa_optimum(jnp.array([[1.0, 2.0], [0.0, 1.0]]), n=3), "covariance is not symmetric"),
        (lambda: layer_theory.lsa_optimum(-jnp.eye(2), n=3), "need eigenvalues from 0 on"),
        (lambda: layer_theory.lsa_optimum(0 * singular, n=3), "trace of covariance holds 0.0"),
        (lambda: layer_theory.linear_icl_risk(jnp.eye(3), singular, m=3), r"gamma has shape \(3, 3\): need \(2, 2\)"),
        (lambda: layer_theory.softmax_icl_loss(jnp.ones(2), jnp.ones(3), d=3, n=4), "omega and mu are"),
        (lambda: layer_theory.halving_rates(rate=0.1, tasks=1), "tasks must be at least 2"),
        (
            lambda: layer_theory.effective_dimension(rate=-1.0, tasks=10, covariance=singular, n=3),
            "rate must be positive",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert layer_theory.lsa_optimum(singular, n=3).shape == (2, 2)  # which is defined also for a singular covariance
