"""The estimated weight of keys that are not read, against closed forms and the truth."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import Causal, LocalMass, Moments, attend, attention_weights, bulk_log_mass

EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng(0)
T, N, K, H = 3, 4, 2, 6
QUERY = RNG.standard_normal((2, T, N, H))


def truth(query, key, scale):
    """log Σ_i exp(s_i) in float64: [B, T, N]."""
    scores = scale * np.einsum("btnh,bsnh->btns", query, np.repeat(key, N // K, 2))
    top = scores.max(-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(scores - top).sum(-1))


def estimate(query, key, scale=None, shift=0.0):
    moments = Moments.of(jnp.asarray(key + shift, jnp.float32), jnp.ones(key.shape[:2], bool)[..., None])
    args = jnp.asarray(query, jnp.float32), moments.mean, moments.covariance, moments.count
    return np.asarray(bulk_log_mass(*args, scale=scale))


def test_equal_keys_and_no_keys_are_exact():
    key = np.repeat(RNG.standard_normal((2, 1, K, H)), 9, 1)
    for scale in (None, 0.7):
        expected = truth(QUERY, key, H**-0.5 if scale is None else scale)
        np.testing.assert_allclose(estimate(QUERY, key, scale), expected, rtol=0, atol=20 * EPS * abs(expected).max())
    none = bulk_log_mass(jnp.asarray(QUERY, jnp.float32), jnp.zeros((K, H)), jnp.zeros((K, H, H)), 0)
    assert (none == -jnp.inf).all()


def test_gaussian_keys_have_the_estimated_weight():
    """Its standard error is that of the mean of exp(s), with s of standard deviation σ: about σ_exp / √n."""
    n = 100_000
    mix = RNG.standard_normal((H, H)) / np.sqrt(H)
    key = RNG.standard_normal((2, n, K, H)) @ mix + RNG.standard_normal(H)
    variance = np.einsum("btnh,hi,btni->btn", QUERY, mix.T @ mix, QUERY) / H
    error = np.sqrt(np.exp(variance) - 1) / np.sqrt(n) + variance / np.sqrt(n)
    assert (abs(estimate(QUERY, key) - truth(QUERY, key, H**-0.5)) < 5 * error + 1e-5).all()


def test_a_vector_added_to_all_keys_adds_the_same_to_all_scores():
    key, shift = RNG.standard_normal((2, 50, K, H)), 3 * RNG.standard_normal(H)
    moved = estimate(QUERY, key, shift=shift) - QUERY @ shift * H**-0.5
    np.testing.assert_allclose(moved, estimate(QUERY, key), rtol=0, atol=1e-4)


def test_a_skewed_distribution_errs_by_its_third_cumulant():
    """Scores 0 and 1 with a small share of ones: the third cumulant is positive, and the estimate too small."""
    key = np.zeros((1, 100, 1, 1))
    key[0, :3] = 1
    query = np.full((1, 1, 1, 1), 0.5)
    p = 0.03
    third = p * (1 - p) * (1 - 2 * p) * 0.5**3
    real = np.log(np.exp(0.5 * key).sum())
    found = estimate(query, key, 1.0)[0, 0, 0]
    assert real - found == pytest.approx(third / 6, rel=0.2)


def test_moments_of_parts_add_up_whatever_hidden_keys_hold():
    key = np.asarray(5 + RNG.standard_normal((2, 30, K, H)), np.float32)
    there = RNG.random((2, 30, K)) < 0.6
    there[:, :10, 1] = False  # nothing of one head in the first part
    hidden = jnp.asarray(np.where(there[..., None], key, np.nan))
    parts = [Moments.of(hidden[:, piece], jnp.asarray(there[:, piece])) for piece in (slice(10), slice(10, 30))]
    both, swapped = parts[0] + parts[1], parts[1] + parts[0]
    for b, k in np.ndindex(2, K):
        mine = key[b, there[b, :, k], k].astype(np.float64)
        for found in (both, swapped):
            assert found.count[b, k] == len(mine)
            np.testing.assert_allclose(found.mean[b, k], mine.mean(0), rtol=1e-5)
            np.testing.assert_allclose(found.covariance[b, k], np.cov(mine.T, bias=True), rtol=1e-3, atol=1e-4)
    nothing = Moments.of(hidden[:, :0], jnp.zeros((2, 0, K), bool))
    assert not jnp.isnan((nothing + nothing).covariance).any()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"query has shape \(2, 3, 4, 6\), mean \(3, 6\) and covariance"):
        bulk_log_mass(jnp.asarray(QUERY), jnp.zeros((3, H)), jnp.zeros((3, H, H)), 1)


def test_local_mass_is_the_weight_of_sinks_and_window():
    query, key = (jnp.asarray(RNG.standard_normal((2, 12, N, H)), jnp.float32) for _ in range(2))
    out, extras = attend(query, key, key, mask=Causal(), measures={"local": LocalMass(2, 3)})
    weights = np.asarray(attention_weights(query, key, mask=Causal())[0])
    distance = np.arange(12)[:, None] - np.arange(12)
    local = ((np.arange(12) < 2) | (distance < 3)) & (distance >= 0)
    np.testing.assert_allclose(extras["local"], np.moveaxis((weights * local).sum(-1), 1, 2), rtol=1e-5)
    assert out.shape == query.shape
