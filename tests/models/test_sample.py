"""sample draws from the softmax of logits / temperature, restricted to the likely tokens that were asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models import sample

N = 20_000
PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])  # in no order: tokens 1, 3, 2, 0 from the likeliest on
draw = jax.jit(sample)


def drawn(probabilities, seed=0, **options):
    """The frequencies of N draws."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (N, len(probabilities)))
    tokens = np.asarray(draw(logits, jax.random.key(seed), **options))
    assert tokens.shape == (N,)
    assert tokens.dtype == np.int32
    return np.bincount(tokens, minlength=len(probabilities)) / N


def assert_frequencies(measured, expected):
    """Each count is binomial: within 5 standard errors, and never where the probability is 0."""
    expected = np.asarray(expected, np.float64)
    assert (abs(measured - expected) <= 5 * np.sqrt(expected * (1 - expected) / N)).all(), (measured, expected)


def support(**options):
    """The tokens that occur; one of probability 0.1 stays away from all draws with probability 0.9^N < 10^-900."""
    return {int(token) for token in np.flatnonzero(drawn(PROBABILITIES, **options))}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax_of_the_tempered_logits(temperature):
    tempered = PROBABILITIES ** (1 / temperature)
    assert_frequencies(drawn(PROBABILITIES, temperature=temperature), tempered / tempered.sum())


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_k_largest(top_k, expected):
    assert support(top_k=top_k) == expected


# Sums from the likeliest on: 0.4, 0.7, 0.9, 1.
@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-6, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 2, 3}),
        (0.91, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, expected):
    assert support(top_p=top_p) == expected


def test_top_p_counts_what_top_k_left():
    # Of tokens 1, 3, 2 the renormalised sums are 4/9, 7/9, 1: 0.75 needs two of them, but three of all four.
    assert support(top_p=0.75) == {1, 2, 3}
    assert support(top_p=0.75, top_k=3) == {1, 3}


def test_top_p_counts_tempered_probabilities():
    # At temperature 1/2 the probabilities are 16/30, 9/30, 4/30, 1/30.
    assert support(top_p=0.5) == {1, 3}
    assert support(top_p=0.5, temperature=0.5) == {1}


def test_what_is_left_keeps_its_proportions():
    assert_frequencies(drawn(PROBABILITIES, top_k=3), np.array([0, 4, 2, 3]) / 9)
    assert_frequencies(drawn(PROBABILITIES, top_p=0.6), np.array([0, 4, 0, 3]) / 7)


def test_ties_stay_or_go_together():
    tied = np.array([0.3, 0.1, 0.3, 0.3])
    assert_frequencies(drawn(tied, top_k=1), [1 / 3, 0, 1 / 3, 1 / 3])
    assert_frequencies(drawn(tied, top_p=0.5), [1 / 3, 0, 1 / 3, 1 / 3])
    assert_frequencies(drawn(tied, temperature=0.0), [1, 0, 0, 0])  # the first of the largest


def logits(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1e-37}, {"top_k": 1}, {"top_p": 1e-6}], ids=str
)
def test_greedy_is_the_largest_logit(options):
    x = 100 * logits(2, 5, 7)
    np.testing.assert_array_equal(draw(x, jax.random.key(0), **options), x.argmax(-1))


def test_the_key_decides():
    x = np.zeros((100, 7), np.float32)
    one, same, other = (np.asarray(draw(x, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()  # all 100 uniform draws of 7 agree with probability 7^-100
    assert len(set(one.tolist())) > 1  # and rows are drawn independently


def test_changing_a_setting_does_not_recompile():
    compiled = jax.jit(lambda *arguments: sample(*arguments))  # of its own: the cache of a function is shared
    for temperature, top_k, top_p in ((0.0, 1, 0.1), (0.7, 3, 0.9), (2.0, 7, 1.0)):
        compiled(logits(4, 7), jax.random.key(top_k), temperature, top_k, top_p)
    assert compiled._cache_size() == 1


def test_bfloat16_logits_are_drawn_from_in_float32():
    x = jnp.asarray(logits(3, 7), jnp.bfloat16)
    np.testing.assert_array_equal(draw(x, jax.random.key(0)), draw(x.astype(jnp.float32), jax.random.key(0)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_there_is_no_token_where_logits_are_nan_or_leave_none(temperature):
    """−1, and the other rows draw as they would."""
    logits = jnp.array([[0.0, jnp.nan, 1.0], [-jnp.inf, -jnp.inf, -jnp.inf], [-jnp.inf, 0.0, -jnp.inf]])
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}):
        np.testing.assert_array_equal(draw(logits, jax.random.key(0), temperature, **settings), [-1, -1, 1])
    likely = draw(jnp.array([0.0, jnp.inf]), jax.random.key(0), temperature)
    assert likely == (1 if temperature == 0 else -1)  # inf − inf is no number to draw by


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, r"temperature holds -1\.0: need numbers from 0 on"),
        ({"top_k": 0}, ValueError, "top_k holds 0: need numbers from 1 on"),
        ({"top_k": 2.5}, TypeError, r"top_k must be an int, got 2\.5"),
        ({"top_p": 1.5}, ValueError, r"top_p holds 1\.5: need numbers above 0, and at most 1"),
    ],
)
def test_known_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        sample(jnp.zeros(4), jax.random.key(0), **settings)
