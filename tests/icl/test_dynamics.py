"""The training path of one layer, against automatic differentiation of attention to single tokens, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import KeyBias
from jaxattn.core.attend import attention_weights
from jaxattn.icl import dynamics
from jaxattn.icl.dynamics import Facts


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def counted(rng, facts, types, most=4):
    """Random facts whose frequencies are counts of tokens, some of them 0."""
    counts = rng.integers(0, most, (facts, types))
    counts[:, 0] += counts.sum(-1) == 0
    return Facts(jnp.asarray(rng.integers(0, 2, facts)), jnp.asarray(rng.integers(0, 3, facts)), jnp.asarray(counts))


def of_tokens(decoder, scores, facts):
    """The loss, with attention to every token of every context."""
    total = 0.0
    for last, following, counts in zip(facts.last, facts.next, np.asarray(facts.frequency), strict=True):
        tokens = np.repeat(np.arange(len(counts)), counts)
        weights = jax.nn.softmax(scores[last, tokens])
        read = weights @ jax.nn.one_hot(tokens, len(counts), dtype=weights.dtype)
        total -= jax.nn.log_softmax(decoder @ (read / jnp.linalg.norm(read)))[following]
    return total / len(facts.last)


def path(language, steps, decoder_rate=1.0, score_rate=1.0):
    """(Y, Z) after so many steps from 0."""
    facts = language.facts
    types = facts.frequency.shape[1]
    zero = jnp.zeros((types, types)), jnp.zeros((int(facts.last.max()) + 1, types))
    step = jax.jit(lambda _, carry: dynamics.scan_snap_step(*carry, facts, decoder_rate, score_rate)[:2])
    return jax.lax.fori_loop(0, steps, step, zero)


@pytest.mark.parametrize(("facts", "types"), [(1, 1), (1, 5), (6, 4)])
def test_gradients_are_those_of_attention_to_every_single_token(facts, types):
    rng = np.random.default_rng(types)
    given = counted(rng, facts, types)
    decoder, scores = jnp.asarray(rng.normal(size=(3, types))), jnp.asarray(rng.normal(size=(2, types)))
    slopes = jax.jit(lambda *both: jax.value_and_grad(of_tokens, (0, 1))(*both, given))
    loss, (to_decoder, to_scores) = slopes(decoder, scores)
    found = dynamics.scan_snap_slopes(decoder, scores, given)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-14)
    np.testing.assert_allclose(found.decoder, to_decoder, rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.scores, to_scores, rtol=0, atol=1e-14)
    by_formula = jax.value_and_grad(dynamics.scan_snap_loss, (0, 1))(decoder, scores, given)
    for ours, other in zip(jax.tree.leaves(by_formula), (loss, to_decoder, to_scores), strict=True):
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-14)


def test_a_context_without_tokens_says_nothing_and_has_no_gradient():
    facts = Facts(jnp.array([0]), jnp.array([1]), jnp.zeros((1, 3)))
    decoder, scores = jnp.ones((2, 3)), jnp.full((1, 3), 700.0)
    found = dynamics.scan_snap_slopes(decoder, scores, facts)
    assert float(found.loss) == pytest.approx(np.log(2))
    assert not found.decoder.any()
    assert not found.scores.any()
    assert all(not x.any() for x in jax.grad(dynamics.scan_snap_loss, (0, 1))(decoder, scores, facts))


def test_weights_of_types_are_attention_with_the_log_of_counts_as_a_bias_at_any_size_of_scores():
    rng = np.random.default_rng(0)
    scores, counts = jnp.asarray(800 * rng.normal(size=6)), jnp.asarray(rng.integers(1, 5, 6), float)
    weights = attention_weights(
        jnp.ones((1, 1, 1)), scores[:, None, None], bias=KeyBias(jnp.log(counts)[None])
    )  # a key of one channel is its own score
    np.testing.assert_allclose(dynamics.type_weights(scores, counts), weights[0][0, 0], rtol=0, atol=1e-13)
    hidden = dynamics.type_weights(jnp.array([0.0, jnp.inf, jnp.nan]), jnp.array([1.0, 0.0, 0.0]))
    np.testing.assert_array_equal(hidden, [1, 0, 0])


def test_gradients_of_scores_sum_to_0_and_a_constant_is_not_seen():
    rng = np.random.default_rng(3)
    facts = counted(rng, 5, 6)
    decoder, scores = jnp.asarray(rng.normal(size=(3, 6))), jnp.asarray(rng.normal(size=(2, 6)))
    found = dynamics.scan_snap_slopes(decoder, scores, facts)
    np.testing.assert_allclose(found.scores.sum(-1), 0, atol=1e-15)
    moved = dynamics.scan_snap_slopes(decoder, scores + 5, facts)
    np.testing.assert_allclose(moved.scores, found.scores, rtol=0, atol=1e-14)


@pytest.mark.parametrize("probabilities", [None, (0.7, 0.2, 0.5)])
def test_scores_of_distinct_types_rise_by_how_often_they_occur_and_those_of_common_types_fall(probabilities):
    language = dynamics.distinct_and_common(2, 2, probabilities, common=4)
    for steps in (2, 30, 300):
        _, scores = path(language, steps)
        for fact, distinct in enumerate(language.distinct):
            own = scores[language.facts.last[fact]]
            assert (own[distinct] > 0).all()
            assert (jnp.diff(own[distinct]) > 0).all()
            assert (own[language.common] < 0).all()


def test_attention_scans_then_snaps_and_a_fast_decoder_snaps_early():
    language = dynamics.distinct_and_common(2, 1)

    def on_common(steps, rate=1.0):
        weights = dynamics.type_weights(path(language, steps, rate)[1][0], language.facts.frequency[0])
        return float(weights[language.common].sum())

    start, early, late = on_common(0), on_common(100), on_common(10_000)
    assert start == pytest.approx(10 / 15.5)
    assert start - early > early - late > 0  # one step in a hundred does more than half
    assert on_common(1000, 30.0) > on_common(1000, 10.0) > on_common(1000, 1.0)


def test_types_that_occur_in_no_context_keep_their_scores_and_one_type_has_nothing_to_choose():
    language = dynamics.distinct_and_common(1, 1, (1.0,), common=0)
    assert language.facts.frequency.shape == (1, 3)
    assert not path(language, 10)[1].any()


def test_facts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"last, next and frequency have shapes \(2,\), \(1,\) and \(1, 3\): need"):
        Facts(jnp.zeros(2, int), jnp.zeros(1, int), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"frequency holds -1\.0: need numbers from 0 on"):
        Facts(jnp.zeros(1, int), jnp.zeros(1, int), -jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"probabilities holds 0\.0: need numbers above 0"):
        dynamics.distinct_and_common(1, 1, [0.0])
    with pytest.raises(ValueError, match="last must be at least 1, got 0"):
        dynamics.distinct_and_common(0, 1)
