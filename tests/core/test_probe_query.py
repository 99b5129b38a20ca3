"""The query of a window and the shares of layers, against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import activation_bias, allocate, information_density, probe_query

RNG = np.random.default_rng(0)
T, N, H = 7, 2, 4


def test_the_bias_is_the_mean_square_in_units_of_the_variance():
    """Of the tokens that count: the others hold NaN. A channel that does not change counts for nothing."""
    query = RNG.standard_normal((2, T, N, H)).astype(np.float32)
    query[..., 0] = 3.0
    there = RNG.random((2, T)) < 0.7
    found = activation_bias(jnp.asarray(np.where(there[..., None, None], query, np.nan)), jnp.asarray(there))
    for b in range(2):
        mine = query[b, there[b]].astype(np.float64)
        spread = mine.std(0)
        square = np.where(spread > 0, (mine - mine.mean(0)) ** 2 / np.where(spread > 0, spread, 1) ** 2, 0)
        np.testing.assert_allclose(found[b, there[b]], square.mean((1, 2)), rtol=1e-4)
        assert (found[b, ~there[b]] == -jnp.inf).all()
        assert float(found[b, there[b]].mean()) == pytest.approx(1 - 1 / H, rel=1e-4)


def test_equal_queries_are_their_own_probe_and_equal_weights_give_the_mean():
    query = jnp.asarray(np.repeat(RNG.standard_normal((1, 1, N, H)), T, 1), jnp.float32)
    np.testing.assert_allclose(probe_query(query), query[:, 0], rtol=1e-6)
    query = jnp.asarray(RNG.standard_normal((2, T, N, H)), jnp.float32)
    mean = probe_query(query, weigh=lambda b: jnp.full(b.shape, 1 / T))
    np.testing.assert_allclose(mean, query.mean(1), rtol=1e-5, atol=1e-6)
    assert (probe_query(query[:, :1]) == query[:, 0]).all()


def test_a_token_that_stands_out_has_most_of_the_probe():
    """Among filler tokens the mean hardly turns to it."""
    query = 0.05 * RNG.standard_normal((1, 30, N, H)) + 1
    query[0, 11] = -2
    probe, mean = probe_query(jnp.asarray(query)), query.mean(1)

    def cosine(x):
        x, y = np.ravel(x), query[0, 11].ravel()
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    assert cosine(probe) > 0.99
    assert cosine(mean) < -0.9


def test_density_is_0_for_equal_scores_and_1_for_one():
    scores = jnp.array([[1.0] * 4, [0.0, -jnp.inf, -jnp.inf, -jnp.inf], [0.0, 0.0, -jnp.inf, -jnp.inf]])
    np.testing.assert_allclose(information_density(scores), [0, 1, 0.5], atol=1e-6)
    assert information_density(jnp.zeros((2, 1))).tolist() == [1, 1]


def test_shares_sum_to_the_total_and_follow_the_density():
    for _ in range(50):
        density, total, least = RNG.random(6) * (RNG.random(6) < 0.8), int(RNG.integers(6, 100)), int(RNG.integers(2))
        number = allocate(density, total, least)
        assert number.sum() == total
        assert number.min() >= least
        order = np.argsort(density, kind="stable")
        steps = np.diff(number[order])
        assert (steps[np.diff(density[order]) > 0] >= 0).all()
    assert allocate([0, 0, 0], 6).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="allocate: total must be at least 6, got 5"):
        allocate([1, 2, 3], 5, 2)
    with pytest.raises(ValueError, match="need a list of finite numbers from 0 on"):
        allocate([1, -2], 5)
