"""Importance of tokens in linear models and by counting, and agreement with marks against pairs of coders."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import analysis, nn, trace
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm

rng = np.random.default_rng(0)


def rows(*shape):
    x = rng.gamma(0.4, size=shape)
    return x / x.sum(-1, keepdims=True)


def test_attention_is_added_over_heads_and_over_reading_or_coding_tokens():
    weights = rows(3, 2, 4, 6, 6)
    found = analysis.attention_importance(weights, 4)
    assert len(found) == 6
    np.testing.assert_allclose(found["reading, first"], weights[0, :, :, :4, :4].sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["coding, last"], weights[2, :, :, 4:, :4].sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["coding, all"], weights[..., 4:, :4].sum((0, 2, 3)), rtol=1e-5)
    with pytest.raises(ValueError, match="prompt is 7: need 1 to 6"):
        analysis.attention_importance(weights, 7)


class Linear(nnx.Module):
    """Logits that are linear in the embedding of all tokens, which are one-hot vectors."""

    sites = ("embed",)

    def __init__(self):
        self.table = nnx.Param(jax.random.normal(jax.random.key(0), (5, 7)))

    def __call__(self, tokens, edits=None, record=(), **options):
        x = jax.nn.one_hot(tokens, 7)
        if edits:
            x = edits["embed"](x, None)
        return jnp.einsum("btc,vc->bv", x, self.table[...]), None, {"embed": x} if record else {}


def test_of_a_linear_model_input_times_gradient_is_what_removal_costs():
    model, tokens = Linear(), rng.integers(0, 7, (2, 4))

    def metric(logits):
        return logits[:, 3]

    at = analysis.input_gradients(model, tokens, metric)
    table = np.asarray(model.table[...])
    np.testing.assert_allclose(at.times_input(), table[3][tokens], rtol=1e-5)  # 0 in place of a token loses this
    np.testing.assert_allclose(at.saliency(), np.linalg.norm(table[3]), rtol=1e-5)
    np.testing.assert_allclose(at.saliency(order=1), abs(table[3]).sum(), rtol=1e-5)


def test_gradients_of_what_a_decoder_says():
    """Against a loss of the answer that is written anew, and the chain rule through a factor of one embedding."""
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=2))
    model = Transformer(TransformerConfig(9, 6, 8, [layer]), rngs=nnx.Rngs(0))
    model.eval()
    tokens = rng.integers(0, 9, (2, 6))
    found = analysis.gradient_importance(model, tokens, 4)
    embed = model(tokens, record=("embed",))[2]["embed"]

    def said(x, some):
        log_p = jax.nn.log_softmax(model(tokens, edits={"embed": trace.Put(x)})[0])
        return sum(log_p[b, t - 1, tokens[b, t]] for b in range(2) for t in some)

    for name, some in (("reading", range(1, 4)), ("coding", range(4, 6))):
        gradient = jax.jit(jax.grad(said), static_argnums=1)(embed, some)[:, :4]
        np.testing.assert_allclose(found[f"saliency, {name}"], jnp.linalg.norm(gradient, axis=-1), rtol=1e-4)
        expected = (gradient * embed[:, :4]).sum(-1)
        np.testing.assert_allclose(found[f"input x gradient, {name}"], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found["saliency, reading"][:, 3], 0)  # the last token of the prompt foretells none
    with pytest.raises(ValueError, match="prompt is 6: need 1 to 5"):
        analysis.gradient_importance(model, tokens, 6)


def test_shapley_values_are_means_over_all_orders():
    n = 4
    table = rng.normal(size=2**n)

    def F(sets):
        return table[sets @ (1 << np.arange(n))]

    expected = np.zeros(n)
    for order in itertools.permutations(range(n)):
        there = np.zeros(n, bool)
        for player in order:
            before = F(there)
            there[player] = True
            expected[player] += (F(there) - before) / math.factorial(n)
    found = analysis.shapley(F, n)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.sum() == pytest.approx(table[-1] - table[0])
    drawn = analysis.shapley(F, n, orders=4000, rng=np.random.default_rng(1))
    assert drawn.sum() == pytest.approx(table[-1] - table[0])
    assert abs(drawn - expected).max() < 5 * np.ptp(table) / 4000**0.5
    additive = analysis.shapley(lambda sets: sets @ np.arange(3.0), 3, orders=1, rng=rng)
    np.testing.assert_allclose(additive, [0, 1, 2])
    assert analysis.shapley(lambda sets: sets[:, 0] * 2.0, 1) == [2]
    with pytest.raises(ValueError, match="need at most 16, or orders="):
        analysis.shapley(F, 17)
    with pytest.raises(ValueError, match="orders is given without rng"):
        analysis.shapley(F, 4, orders=3)


def test_the_most_important_tokens_are_held_against_marks():
    importance = np.array([[0.1, 0.9, 0.5, 0.5], [1, 2, 3, 4.0]])
    marked = np.array([[0, 1, 0, 1], [0, 0, 0, 0]], bool)
    found = analysis.top_overlap(importance, marked, 2)
    assert (found.precision[0], found.recall[0], found.f1[0]) == (0.5, 0.5, 0.5)  # of equal ones the first
    assert np.isnan([x[1] for x in found]).all()
    assert analysis.top_overlap(importance, marked, 3).recall[0] == 1
    assert np.isnan(analysis.top_overlap([np.nan, 1], [True, False], 1).f1)
    with pytest.raises(ValueError, match="k is 5: need 1 to 4"):
        analysis.top_overlap(importance, marked, 5)
    with pytest.raises(ValueError, match=r"importance has shape \(2, 4\) and marked \(4,\)"):
        analysis.top_overlap(importance, marked[0], 1)


def alpha_by_pairs(table):
    """Disagreeing pairs within units, over disagreeing pairs among all values of units with two values or more."""
    units = [column[~np.isnan(column)] for column in table.T]
    units = [unit for unit in units if len(unit) > 1]
    values = np.concatenate(units)
    observed = sum((u[:, None] != u).sum() / (len(u) - 1) for u in units) / len(values)
    expected = (values[:, None] != values).sum() / len(values) / (len(values) - 1)
    return 1 - observed / expected


def test_alpha_is_1_for_equal_codings_and_0_for_independent_ones():
    table = rng.integers(0, 3, (4, 30)).astype(float)
    table[rng.random(table.shape) < 0.2] = np.nan
    assert analysis.krippendorff_alpha(table) == pytest.approx(alpha_by_pairs(table))
    same = np.tile(rng.integers(0, 2, 20), (3, 1))
    assert analysis.krippendorff_alpha(same) == pytest.approx(1)
    # Of 3 coders and 4000 units of two values the deviation is about 1 / √(3 · 4000) ≈ 0.009.
    assert abs(analysis.krippendorff_alpha(rng.integers(0, 2, (3, 4000)))) < 0.04
    assert np.isnan(analysis.krippendorff_alpha(np.ones((2, 5))))
    assert np.isnan(analysis.krippendorff_alpha([[1, np.nan], [np.nan, 2]]))
