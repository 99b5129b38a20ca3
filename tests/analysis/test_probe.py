"""Probes and the likeness of representations, against normal equations, gradients and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.analysis import auroc, cka, fit_logistic, fit_ridge, hsic, selectivity


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_ridge_solves_the_normal_equations():
    x, y = drawn(40, 5), drawn(40, 3, seed=1)
    probe = fit_ridge(x, y, penalty=2.0)
    wide = np.concatenate([x, np.ones((40, 1))], 1)
    penalty = np.diag([2.0] * 5 + [0.0])
    expected = np.linalg.solve(wide.T @ wide + penalty, wide.T @ y)
    np.testing.assert_allclose(probe.weight, expected[:-1], rtol=1e-9)
    np.testing.assert_allclose(probe.bias, expected[-1], rtol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_gradient_of_a_logistic_probe_is_zero(classes):
    x, labels = drawn(60, 5), jnp.asarray(np.random.default_rng(2).integers(0, classes, 60))
    probe = fit_logistic(x, labels, penalty=0.3)
    p = jax.nn.softmax(probe(x)) - jax.nn.one_hot(labels, classes)
    np.testing.assert_allclose(x.T @ p + 0.3 * probe.weight, 0, atol=1e-7)
    np.testing.assert_allclose(p.sum(0), 0, atol=1e-7)


def test_in_float32_the_probe_is_that_of_float64():
    """Biases that grow together change nothing, so that second derivatives are singular."""
    for classes, n in ((2, 8), (3, 30)):
        x, labels = drawn(n, 3), np.arange(n) % classes
        exact = fit_logistic(x, labels, penalty=0.5)
        with jax.enable_x64(False):
            probe = fit_logistic(jnp.asarray(x, jnp.float32), labels, penalty=0.5)
        np.testing.assert_allclose(probe.weight, exact.weight, atol=1e-3)
        np.testing.assert_allclose(probe.bias, exact.bias, atol=1e-3)


def test_separable_classes_keep_finite_weights():
    x = np.concatenate([drawn(20, 2) + 30, drawn(20, 2) - 30])
    labels = jnp.repeat(jnp.arange(2), 20)
    probe = fit_logistic(x, labels, penalty=1e-3)
    assert jnp.isfinite(probe.weight).all()
    assert (probe(x).argmax(-1) == labels).all()


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 50) / 2, rng.random(50) < 0.4  # with ties
    high, low = scores[labels][:, None], scores[~labels]
    expected = (high > low).mean() + (high == low).mean() / 2
    np.testing.assert_allclose(auroc(jnp.asarray(scores), jnp.asarray(labels)), expected, rtol=1e-12)
    np.testing.assert_allclose(auroc(-jnp.asarray(scores), jnp.asarray(labels)), 1 - expected, rtol=1e-12)
    assert np.isnan(auroc(jnp.asarray(scores), jnp.ones(50, bool)))


def test_auroc_of_many_examples_and_of_none():
    """32 bits do not hold 10^10 pairs. Uniform scores that are moved by d win with the chance 1 − (1 − d)²/2."""
    with jax.enable_x64(False):
        n = 100_000
        scores = (np.arange(n, dtype=np.float32) + 0.5) / n
        scores, labels = np.concatenate([scores, scores + np.float32(0.25)]), np.arange(2 * n) >= n
        np.testing.assert_allclose(auroc(jnp.asarray(scores), jnp.asarray(labels)), 1 - 0.75**2 / 2, rtol=1e-5)
        for some, which in (
            (np.ones(3), np.zeros(3)),
            (np.arange(3.0), np.ones(3)),
            (np.array([1, np.nan]), np.eye(2)[0]),
        ):
            assert np.isnan(auroc(jnp.asarray(some), jnp.asarray(which)))


def test_cka_sees_no_mean():
    """In float32, where numbers of 1000 leave 4 digits of the differences, whose products are 1e-6 of what is added."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 5))
    y = x @ rng.standard_normal((5, 6)) + rng.standard_normal((40, 6))
    for unbiased in (True, False):
        expected = cka(jnp.asarray(x), jnp.asarray(y), unbiased=unbiased)
        with jax.enable_x64(False):
            moved = (jnp.asarray(z + 1000, jnp.float32) for z in (x, y))
            np.testing.assert_allclose(cka(*moved, unbiased=unbiased), expected, rtol=1e-3)


def test_a_probe_that_learns_by_heart_is_not_selective():
    """One-hot types with types that come again: the labels of types are learnt by heart, random ones as well."""
    types = np.random.default_rng(0).integers(0, 12, 240)
    x, held_out = jnp.eye(12)[types], jnp.arange(240) >= 160
    labels = jnp.asarray(types % 3)
    found = selectivity(x, labels, jnp.asarray(types), held_out, key=jax.random.key(1), penalty=1e-3)
    assert found.accuracy == found.control == 1
    assert found.chance < 0.6
    # A direction that says the class, and nothing of the type: the control is at chance.
    x = jnp.eye(3)[types % 3] + 0.01 * drawn(240, 3)
    found = selectivity(x, labels, jnp.asarray(types), held_out, key=jax.random.key(1), penalty=1e-3)
    assert found.accuracy == 1
    assert found.control < 0.75


def test_cka_sees_no_rotation_and_no_size():
    x, y = drawn(30, 6), drawn(30, 4, seed=1)
    q, _ = np.linalg.qr(drawn(6, 6, seed=2))
    for unbiased in (True, False):
        np.testing.assert_allclose(cka(x, 3 * x @ q, unbiased=unbiased), 1, rtol=1e-10)
        np.testing.assert_allclose(cka(x, y, unbiased=unbiased), cka(y, x, unbiased=unbiased), rtol=1e-10)
        assert cka(x, x @ drawn(6, 6, seed=3), unbiased=unbiased) < 0.99
    centred = x - x.mean(0), y - y.mean(0)

    def gram(a, b):
        return np.square(a.T @ b).sum()

    expected = gram(*centred) / np.sqrt(gram(centred[0], centred[0]) * gram(centred[1], centred[1]))
    np.testing.assert_allclose(cka(x, y, unbiased=False), expected, rtol=1e-10)


def test_the_unbiased_estimate_is_zero_on_average():
    """Over 400 independent pairs, within four standard errors; the biased one is far above."""
    draws = [(drawn(12, 5, seed=2 * s), drawn(12, 4, seed=2 * s + 1)) for s in range(400)]
    values = np.array([hsic(x @ x.T, y @ y.T) for x, y in draws])
    assert abs(values.mean()) < 4 * values.std() / 20
    biased = np.array([hsic(x @ x.T, y @ y.T, unbiased=False) for x, y in draws[:50]])
    assert biased.mean() > 10 * biased.std() / np.sqrt(50)


def test_the_unbiased_estimate_is_the_mean_over_quadruples():
    """h of four different examples (Gretton et al., 2005), averaged over all of them."""
    import itertools

    x, y = drawn(6, 3), drawn(6, 2, seed=1)
    k, m = x @ x.T, y @ y.T
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    np.testing.assert_allclose(hsic(k, m), np.mean(terms), rtol=1e-10)


def test_bad_input_says_what_is_wrong():
    with pytest.raises(ValueError, match="penalty is 0"):
        fit_logistic(drawn(4, 2), jnp.array([0, 1, 0, 1]), penalty=0)
    with pytest.raises(ValueError, match="x has 3 examples and y 3"):
        cka(drawn(3, 2), drawn(3, 2))
    with pytest.raises(ValueError, match="labels has numbers from 0 to 2: need some from 0 to 1"):
        fit_logistic(jnp.ones((3, 2)), jnp.arange(3), 2)
