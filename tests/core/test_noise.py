"""Counter-based noise: uniform, independent, a function of key, batch entry, head and positions; and what it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxattn import Causal, Softmax, attend
from jaxattn.core import noise
from jaxattn.core.attend import DropTopK, Gumbel, OneHotSample, score_function

P = np.arange(300, dtype=np.int32)
SEEDS = noise.seeds(jax.random.key(0), (2, 3))


def test_uniform_numbers_are_uniform_and_never_0_or_1():
    drawn = np.asarray(noise.uniform(SEEDS, P[:, None], P))
    assert 0 < drawn.min() < 1e-5
    assert 1 - 1e-5 < drawn.max() < 1
    assert stats.kstest(drawn.reshape(-1), "uniform").pvalue > 1e-3


def test_gumbel_noise_is_gumbel_and_finite():
    drawn = np.asarray(noise.gumbel(SEEDS, P[:, None], P))
    assert np.isfinite(drawn).all()
    assert stats.kstest(drawn.reshape(-1), "gumbel_r").pvalue > 1e-3


def test_noise_differs_by_key_batch_entry_head_and_position_and_by_nothing_else():
    drawn = np.asarray(noise.bits(SEEDS, P[:, None], P))
    assert len(np.unique(drawn)) > 0.99 * drawn.size
    np.testing.assert_array_equal(noise.bits(SEEDS, P[7:9, None], P[20:30]), drawn[..., 7:9, 20:30])
    assert (np.asarray(noise.bits(noise.seeds(jax.random.key(1), (2, 3)), P[:, None], P)) == drawn).mean() < 0.001


# Draws. Rows that are all alike, so that each is one more sample.

QUERIES, KEYS = 4000, 6
SCORES = np.array([0.3, -1.0, 1.5, 0.0, 0.7, -0.4], np.float32)
PROBABILITY = np.exp(SCORES, dtype=np.float64) / np.exp(SCORES, dtype=np.float64).sum()
VALUE = np.array([1.0, -2.0, 0.5, 3.0, -1.0, 2.0], np.float32)


def read(normalize, scores=SCORES, **options):
    """Attention of 4000 equal queries over 6 keys with these scores."""
    query = jnp.ones((QUERIES, 1, 1))
    key, value = jnp.asarray(scores)[:, None, None], jnp.asarray(VALUE)[:, None, None]
    return attend(query, key, value, normalize=normalize, return_lse=True, **options)


def test_a_sample_is_drawn_with_its_probability():
    out, extras = read(OneHotSample(jax.random.key(2)))
    counts = np.array([(np.asarray(out) == value).sum() for value in VALUE])
    assert stats.chisquare(counts, QUERIES * PROBABILITY).pvalue > 1e-3
    chosen = (np.asarray(out) == VALUE).argmax(-1)[:, 0]
    np.testing.assert_allclose(extras["lse"][:, 0], np.log(PROBABILITY)[chosen], rtol=0, atol=1e-5)


def test_the_mean_of_samples_is_soft_attention():
    out, _ = read(OneHotSample(jax.random.key(3)))
    mean = PROBABILITY @ VALUE
    error = np.sqrt((PROBABILITY @ VALUE**2 - mean**2) / QUERIES)
    assert abs(out.mean() - mean) < 4 * error


def reward(out):
    return jnp.sin(2 * out) + out**2


@pytest.mark.parametrize("baseline", [0.0, 2.0])
def test_the_score_function_estimates_the_exact_gradient(baseline):
    """∇ Σ_j p_j f(v_j) by enumeration, against the mean of 4000 estimates, within 4 standard errors per key."""
    exact = PROBABILITY * (reward(VALUE) - PROBABILITY @ np.asarray(reward(VALUE)))

    def surrogate(scores, weights):
        out, extras = read(OneHotSample(jax.random.key(4)), scores)
        return (weights * score_function(reward(out[:, 0, 0]), extras["lse"][:, 0], baseline)).sum()

    estimate = jax.grad(surrogate)(jnp.asarray(SCORES), jnp.ones(QUERIES)) / QUERIES
    each = jax.jacobian(lambda w: jax.grad(surrogate)(jnp.asarray(SCORES), w))(jnp.ones(QUERIES))  # [keys, samples]
    error = np.asarray(each).std(-1) / np.sqrt(QUERIES)
    assert (np.abs(estimate - exact) < 4 * error).all()


def test_a_straight_through_sample_has_the_gradient_of_soft_attention():
    def total(normalize):
        return lambda scores: (jnp.arange(QUERIES)[:, None, None] * read(normalize, scores)[0]).mean()

    hard, soft = (
        read(OneHotSample(jax.random.key(5), straight_through=True))[0],
        read(OneHotSample(jax.random.key(5)))[0],
    )
    np.testing.assert_allclose(hard, soft, rtol=0, atol=1e-6)
    gradient = jax.grad(total(OneHotSample(jax.random.key(5), straight_through=True)))(jnp.asarray(SCORES))
    np.testing.assert_allclose(gradient, jax.grad(total(Softmax()))(jnp.asarray(SCORES)), rtol=1e-4)


def test_a_cold_relaxed_sample_is_the_sample():
    hard = read(OneHotSample(jax.random.key(6)))[0]
    cold = read(Gumbel(jax.random.key(6), 1e-4))[0]
    assert (np.abs(cold - hard) < 1e-3).mean() > 0.99
    soft = read(Gumbel(jax.random.key(6), 1.0))[0]
    assert (np.abs(soft - hard) < 1e-3).mean() < 0.1


def test_a_new_key_is_a_new_sample():
    a, b = (read(OneHotSample(jax.random.key(seed)))[0] for seed in (7, 8))
    assert abs(float((a == b).mean()) - (PROBABILITY**2).sum()) < 4 * np.sqrt(0.25 / QUERIES)


@pytest.mark.parametrize(("k", "rate", "dropped"), [(4, 0.5, 2), (4, 0.6, 2), (5, 0.6, 3), (9, 0.5, 3), (1, 0.9, 0)])
def test_dropping_among_the_largest_drops_as_many_as_it_says_and_keeps_the_total(k, rate, dropped):
    """k or all 6, whichever is less; which ones is uniform over the largest."""
    value = jnp.eye(KEYS)[:, None]
    query, key = jnp.ones((QUERIES, 1, 1)), jnp.asarray(SCORES)[:, None, None]
    weights = attend(query, key, value, weight_maps=(DropTopK(k, rate, jax.random.key(9)),))[:, 0]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=1e-5)
    gone = np.asarray(weights) == 0
    assert (gone.sum(-1) == dropped).all()
    largest = np.argsort(-SCORES)[:k]
    assert gone[:, np.setdiff1d(np.arange(KEYS), largest)].sum() == 0
    if dropped:
        share = dropped / min(k, KEYS)
        assert (np.abs(gone.mean(0)[largest] - share) < 5 * np.sqrt(share * (1 - share) / QUERIES)).all()


def test_samples_go_with_positions():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(9, 2, 4)).astype(np.float32) for _ in range(3))
    order, place = rng.permutation(9), np.arange(9, dtype=np.int32)
    for normalize in (OneHotSample(jax.random.key(0)), Gumbel(jax.random.key(0), 0.5)):
        out = attend(query, key, value, mask=Causal(), normalize=normalize)
        moved = attend(
            query, key[order], value[order], mask=Causal(), normalize=normalize, key_positions=jnp.asarray(place[order])
        )
        np.testing.assert_allclose(moved, out, rtol=0, atol=1e-5)
