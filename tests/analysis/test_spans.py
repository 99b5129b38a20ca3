"""Spans of heads (MoA): influence is what finite removal does, and rules under a budget are the best of all choices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Causal
from jaxattn.analysis import choose_rules, elastic_rules, elastic_spans, removal_influence, span_influence
from jaxattn.cache import Policy
from jaxattn.core.attend import Documents, attention_weights

B, T, N, K, H, V = 2, 11, 4, 2, 3, 5


def arrays(dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, V), (B, T, N, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def softmax(scores):
    mass = np.exp(scores - scores.max())
    return mass / mass.sum()


def test_influence_is_what_a_linear_loss_gains_when_a_key_is_removed():
    """In float64, by a softmax without the key; and rows of influence times what is left sum to 0."""
    rng = np.random.default_rng(1)
    scores, value, slope = (rng.standard_normal(shape) for shape in ((4, 6), (6, V), (4, V)))
    weights = np.stack([softmax(row) for row in scores])
    with jax.enable_x64(True):
        found = np.asarray(removal_influence(jnp.asarray(weights), jnp.asarray(slope @ value.T)))
        alone = removal_influence(jnp.eye(3), jnp.asarray(rng.standard_normal((3, 3))))
    for i, j in np.ndindex(4, 6):
        left = np.delete(np.arange(6), j)
        gain = slope[i] @ (softmax(scores[i, left]) @ value[left] - weights[i] @ value)
        np.testing.assert_allclose(found[i, j], gain, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose((found * (1 - weights)).sum(-1), 0, atol=1e-13)
    np.testing.assert_array_equal(alone, 0)


@pytest.mark.parametrize("mask", [None, "documents"])
def test_influence_of_spans_is_the_sum_over_the_pairs_that_they_hide(mask):
    """Grouped heads; all pairs by a loop, and no weights are held: the pass is one of rows."""
    sinks, spans = 2, [0, 1, 3, 6, T]
    ids = np.array([0] * 4 + [1] * 7)
    shown = np.tri(T, dtype=bool) & (ids[:, None] == ids if mask else True)
    mask = None if mask is None else Causal() & Documents(jnp.asarray(ids))
    with jax.enable_x64(True):
        query, key, value, slope = arrays()
        options = {"mask": mask, "sinks": sinks}
        found = {
            name: np.asarray(
                span_influence(query, key, value, slope, jnp.asarray(spans), implementation=name, **options)
            )
            for name in ("dense", "rows")
        }
        weights = np.asarray(attention_weights(query, key, mask=Causal() if mask is None else mask)[0])
    value, slope = np.asarray(value), np.asarray(slope)
    expected = np.zeros((B, N, len(spans)))
    for b, n, i in np.ndindex(B, N, T):
        of_weights, row = value[b, :, n // (N // K)] @ slope[b, i, n], weights[b, n, i]
        mean = (of_weights * row).sum()
        for j in np.flatnonzero(shown[i] & (np.arange(T) >= sinks)):
            gain = 0 if row[j] == 1 else abs(row[j] * (of_weights[j] - mean) / (1 - row[j]))
            expected[b, n] += gain * (i - j >= np.maximum(spans, 1))
    for name, each in found.items():
        np.testing.assert_allclose(each, expected, rtol=1e-9, atol=1e-12, err_msg=name)
    assert (expected[..., -1] == 0).all()  # the whole length hides nothing
    with pytest.raises(ValueError, match=r"cotangent has shape \(2, 11, 2, 5\): need \(2, 11, 4, 5\)"):
        span_influence(query, key, value, jnp.asarray(value), [1])


@pytest.mark.parametrize("seed", range(6))
def test_rules_under_a_budget_are_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    heads, rules, layer = 5, 4, np.array([0, 0, 0, 7, 7])
    loss, cost = rng.random((heads, rules)), rng.random((2, heads, rules))
    budget = np.array([0.5, 0.55])
    for distinct in (None, 1, 2):
        best = np.inf
        for choice in itertools.product(range(rules), repeat=heads):
            at = np.arange(heads), np.array(choice)
            few = distinct is None or all(len(set(at[1][layer == each])) <= distinct for each in (0, 7))
            if few and (cost[:, *at].mean(-1) <= budget).all():
                best = min(best, loss[at].sum())
        limits = {} if distinct is None else {"layer": layer, "distinct": distinct}
        if best == np.inf:
            with pytest.raises(ValueError, match="no choice of rules stays within it"):
                choose_rules(loss, cost, budget, **limits)
            continue
        chosen = choose_rules(loss, cost, budget, **limits)
        np.testing.assert_allclose(loss[np.arange(heads), chosen].sum(), best, rtol=1e-6)
        assert (cost[:, np.arange(heads), chosen].mean(-1) <= budget + 1e-6).all()


def test_a_search_ends_in_a_policy_that_is_full_attention_where_the_budget_allows():
    lengths = (16, 32)
    rules = elastic_rules((-8, 0, 8), (0, 0.5, 1), lengths)
    np.testing.assert_array_equal(rules, [[8, 0], [0, 0.5], [8, 0.5], [-8, 1], [0, 1]])
    cost = np.stack([np.tile((rules[:, 0] + rules[:, 1] * n) / n, (3, 1)) for n in lengths])
    loss = np.random.default_rng(0).random((3, 1)) * (1 - cost[1])
    spans = elastic_spans(rules, choose_rules(loss, cost, np.array([1.0, 1.0])))
    np.testing.assert_array_equal(spans.beta, 1)
    tight = choose_rules(loss[:, :], cost[0], np.array(0.6))
    assert cost[0][np.arange(3), tight].mean() <= 0.6 + 1e-9
    assert isinstance(Policy(spans, 20).retain, type(spans))
    with pytest.raises(ValueError, match=r"need \[heads, rules\]"):
        choose_rules(loss, cost[:, :2], np.array([1.0, 1.0]))
    with pytest.raises(ValueError, match="not finite"):
        choose_rules(loss * np.nan, cost[0], np.array(1.0))
    with pytest.raises(ValueError, match="need both, or none"):
        choose_rules(loss, cost[0], np.array(1.0), distinct=2)
