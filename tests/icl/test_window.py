"""Attention as a posterior: the identities, and the window that is inferred, against sums over all that is hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxattn import Dot, KeyBias, attend
from jaxattn.core.attend import NegativeDistance, OneHotSample, attention_weights
from jaxattn.icl import WindowRecall, infer_window


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_weights_are_the_posterior_of_a_mixture_of_gaussians_with_the_log_prior_as_bias(x64):
    rng = np.random.default_rng(0)
    query, key, prior = rng.normal(size=(5, 3)), rng.normal(size=(4, 3)), rng.dirichlet(np.ones(4))
    variance = 0.7
    joint = prior * stats.multivariate_normal(cov=variance * np.eye(3)).pdf(query[:, None] - key)
    posterior = joint / joint.sum(-1, keepdims=True)
    tokens = [jnp.asarray(x)[:, None] for x in (query, key)]
    by_distance = attention_weights(
        *tokens, score=NegativeDistance(0.5 / variance), bias=KeyBias(jnp.log(jnp.asarray(prior))[None])
    )
    np.testing.assert_allclose(by_distance[0][0], posterior, rtol=0, atol=1e-14)
    norms = np.square(key).sum(-1) / (2 * variance)
    by_dot = attention_weights(*tokens, score=Dot(1 / variance), bias=KeyBias(jnp.asarray(np.log(prior) - norms)[None]))
    np.testing.assert_allclose(by_dot[0][0], posterior, rtol=0, atol=1e-14)
    tilted = np.exp(norms) / np.exp(norms).sum()  # the prior that dot products alone stand for
    joint = tilted * stats.multivariate_normal(cov=variance * np.eye(3)).pdf(query[:, None] - key)
    plain = attention_weights(*tokens, score=Dot(1 / variance))[0][0]
    np.testing.assert_allclose(plain, joint / joint.sum(-1, keepdims=True), rtol=0, atol=1e-14)


def test_a_prior_of_0_is_a_mask():
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(4, 1, 3)), jnp.float32) for _ in range(2))
    seen = jnp.array([True, False, True, True])
    masked = attention_weights(query, key, mask=seen)[0]
    never = attention_weights(query, key, bias=KeyBias(jnp.where(seen, 0.0, -1e30)[None]))[0]
    np.testing.assert_allclose(masked, never, atol=1e-7)


def test_attention_is_the_gradient_of_the_log_evidence(x64):
    rng = np.random.default_rng(2)
    query, key = (jnp.asarray(rng.normal(size=(6, 2, 4))) for _ in range(2))
    evidence = lambda query: attend(query, key, key, score=Dot(1.0), return_lse=True)[1]["lse"].sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(evidence)(query), attend(query, key, key, score=Dot(1.0)), rtol=0, atol=1e-14)


def test_softmax_has_the_largest_expected_score_plus_entropy_which_is_the_log_evidence(x64):
    rng = np.random.default_rng(3)
    query, key = (jnp.asarray(rng.normal(size=(5, 1, 3))) for _ in range(2))
    weights, _ = attention_weights(query, key, score=Dot(1.0))
    lse = attend(query, key, key, score=Dot(1.0), return_lse=True)[1]["lse"]
    scores = np.einsum("tnh,snh->nts", query, key)

    def bound(p):
        return (p * scores).sum(-1) - special.xlogy(p, p).sum(-1)

    np.testing.assert_allclose(bound(np.asarray(weights))[0], lse[:, 0], atol=1e-14)
    others = rng.dirichlet(np.ones(5), (200, 1, 5))
    assert (bound(others) < bound(np.asarray(weights)) + 1e-12).all()


def test_hard_attention_converges_to_soft_attention_with_the_root_of_samples():
    rng = np.random.default_rng(4)
    query, key, value = (jnp.asarray(rng.normal(size=(3, 1, 4)), jnp.float32) for _ in range(3))
    soft = attend(query, key, value)
    draw = jax.jit(jax.vmap(lambda seed: attend(query, key, value, normalize=OneHotSample(seed))))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4096)))
    spread = drawn.std(0)
    assert (abs(drawn.mean(0) - soft) <= 5 * spread / 64 + 1e-6).all()
    weights = attention_weights(query, key)[0][0]
    variance = weights @ np.square(value[:, 0]) - np.square(soft[:, 0])
    np.testing.assert_allclose(spread[:, 0] ** 2, variance, rtol=0.2, atol=0.02)


# Windows.


def test_sources_are_as_far_back_as_their_distribution_says():
    task = WindowRecall(2, 12, 4000, shortest=5.0, longest=5.0)
    prompt = task.sample(jax.random.key(0), 4)
    np.testing.assert_allclose(prompt.hidden.probability, 0.2, rtol=1e-6)
    expected = 0.2 * 0.8 ** np.arange(12)
    expected /= expected.sum()
    counts = np.bincount(np.asarray(prompt.hidden.distance).ravel() - 1, minlength=12)
    assert (abs(counts / 16000 - expected) <= 5 * np.sqrt(expected / 16000)).all()


def test_queries_are_noisy_copies_of_their_sources_and_ask_for_their_values():
    task = WindowRecall(3, 6, 500, noise=0.1, shortest=1.0, longest=8.0)
    prompt = task.sample(jax.random.key(1), 3)
    assert prompt.x.shape == (3, task.length, 4)
    for b in range(3):
        source = 6 - prompt.hidden.distance[b]
        np.testing.assert_array_equal(prompt.y[b, 6:], prompt.x[b, source, 3])
        apart = np.asarray(prompt.x[b, 6:, :3] - prompt.x[b, source, :3])
        assert abs(apart.std() - 0.1) < 5 * 0.1 / (2 * apart.size) ** 0.5
    assert not prompt.x[:, 6:, 3].any()
    np.testing.assert_array_equal(prompt.weights[0], np.arange(task.length) >= 6)
    at_once = WindowRecall(1, 3, 5, shortest=1.0, longest=1.0).sample(jax.random.key(2), 2)
    assert (at_once.hidden.distance == 1).all()  # a window of 1: always the last key


def test_where_sources_are_plain_the_posterior_is_that_of_their_distances(x64):
    """Beta is conjugate to geometric distances."""
    prompt = WindowRecall(8, 40, 6, noise=1e-3).sample(jax.random.key(3), 1)
    found = infer_window(prompt.x[0, 40:, :8], prompt.x[0, :40, :8], 1e-3, prior=(2.0, 3.0))
    assert float(found.a) == 8
    assert float(found.b) == pytest.approx(3 + float((prompt.hidden.distance - 1).sum()), abs=1e-9)
    assert float(found.mean) == pytest.approx(float(found.a / (found.a + found.b)))
    draws = stats.beta(float(found.a), float(found.b)).expect(lambda g: -np.log1p(-g))
    assert float(found.slope) == pytest.approx(draws, rel=1e-6)


def test_a_round_is_that_of_a_loop_over_queries_and_keys(x64):
    rng = np.random.default_rng(5)
    query, key, noise = rng.normal(size=(3, 2)), rng.normal(size=(4, 2)), 0.8
    a, b = 1.5, 2.5
    for _ in range(3):
        slope = special.digamma(a + b) - special.digamma(b)
        total = 0.0
        for q in query:
            weights = [np.exp(-np.square(q - k).sum() / (2 * noise**2) - slope * (4 - s)) for s, k in enumerate(key)]
            total += sum(w * (4 - s - 1) for s, w in enumerate(weights)) / sum(weights)
        a, b = 1.5 + 3, 2.5 + total
    found = infer_window(jnp.asarray(query), jnp.asarray(key), noise, prior=(1.5, 2.5), iterations=3)
    np.testing.assert_allclose([found.a, found.b], [a, b], rtol=1e-12)
    start = infer_window(jnp.asarray(query), jnp.asarray(key), noise, prior=(1.5, 2.5), iterations=0)
    assert [float(x) for x in start] == [1.5, 2.5]


def test_one_query_and_one_key_leave_no_choice(x64):
    found = infer_window(jnp.ones((1, 1)), jnp.zeros((1, 1)), 1.0)
    assert [float(x) for x in found] == [2, 1]


def test_what_is_no_window_is_refused():
    for given, match in (
        ({"keys": 0}, "keys must be at least 1, got 0"),
        ({"noise": 0.0}, "noise must be positive, got 0.0"),
        ({"shortest": 0.5}, r"shortest holds 0\.5: need numbers from 1 on"),
        ({"shortest": 9.0, "longest": 3.0}, r"longest holds 3\.0: need numbers from shortest, 9\.0, on"),
    ):
        with pytest.raises(ValueError, match=match):
            WindowRecall(**{"dim": 2, "keys": 8, "queries": 2} | given)
    with pytest.raises(ValueError, match="noise must be positive, got 0"):
        infer_window(jnp.ones((1, 1)), jnp.ones((1, 1)), 0.0)
