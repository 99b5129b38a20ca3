"""Rollout against products of rows, flows against all cuts of the graph, and effects of tokens against other runs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from jaxattn import Causal, analysis, nn
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm

EPS = float(np.finfo(np.float32).eps)


def random_weights(rng, layers, batch, heads, tokens, causal=False):
    weights = rng.gamma(0.3, size=(layers, batch, heads, tokens, tokens))
    weights = np.tril(weights) if causal else weights
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def mixed(weights, residual=0.5):
    """Â in float64."""
    return residual * np.eye(weights.shape[-1]) + (1 - residual) * weights.astype(np.float64).mean(2)


def least_cut(layers, source, sink):
    """The least capacity of all cuts between a token of the last layer and an input, by trying every set of nodes."""
    depth, tokens = len(layers), layers.shape[-1]
    between = [(layer, token) for layer in range(depth + 1) for token in range(tokens)]
    free = [node for node in between if node not in ((depth, source), (0, sink))]
    free = [node for node in free if 0 < node[0] < depth]  # others of the first and last layer cannot help to cut
    best = np.inf
    for chosen in itertools.product((False, True), repeat=len(free)):
        side = {(depth, source), *(node for node, here in zip(free, chosen, strict=True) if here)}
        # Nodes of the last layer but the source have no way in; inputs but the sink have no way out.
        side |= {(0, token) for token in range(tokens) if token != sink}
        cut = sum(
            layers[layer - 1, i, j]
            for layer, i in side
            if layer > 0
            for j in range(tokens)
            if (layer - 1, j) not in side
        )
        best = min(best, cut)
    return best


def test_rollout_is_the_product_of_layers_row_by_row():
    weights = random_weights(np.random.default_rng(0), 4, 2, 3, 6)
    found, layers = np.asarray(analysis.rollout(weights)), mixed(weights)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=10 * EPS)
    for depth in range(1, 5):
        for b, i in np.ndindex(2, 6):
            row = np.eye(6)[i]
            for layer in reversed(layers[:depth, b]):  # from the top down, one row at a time
                row = row @ layer
            np.testing.assert_allclose(found[depth - 1, b, i], row, rtol=0, atol=20 * EPS)


def test_of_one_layer_rollout_and_flow_are_the_layer():
    weights = random_weights(np.random.default_rng(1), 1, 2, 2, 5)
    np.testing.assert_allclose(analysis.rollout(weights)[0], mixed(weights)[0], rtol=0, atol=4 * EPS)
    np.testing.assert_allclose(analysis.max_flow(weights), mixed(weights)[0], rtol=0, atol=1e-7)
    same = np.broadcast_to(np.eye(5, dtype=np.float32), (3, 1, 2, 5, 5))
    np.testing.assert_array_equal(analysis.rollout(same), same[:, :, 0])
    np.testing.assert_array_equal(analysis.max_flow(same)[0], np.eye(5))


@pytest.mark.parametrize(("layers", "tokens"), [(2, 4), (3, 3), (2, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_flows_are_the_least_cuts(layers, tokens, causal):
    weights = random_weights(np.random.default_rng(layers), layers, 1, 2, tokens, causal)
    graph = mixed(weights, 0.25)[:, 0]
    cuts = np.array([[least_cut(graph, i, j) for j in range(tokens)] for i in range(tokens)])
    best = max((min(graph[1, 0, k], graph[0, k, 0]) for k in range(tokens)), default=0)
    assert layers > 2 or cuts[0, 0] >= best - EPS  # a single path carries its narrowest edge
    assert (cuts <= 1 + 10 * EPS).all()
    found = analysis.max_flow(weights, residual=0.25)[0]
    np.testing.assert_allclose(found, cuts / cuts.sum(-1, keepdims=True), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(analysis.max_flow(weights, [tokens - 1], 0.25)[0], found[-1:])


def test_rows_without_weight_read_themselves_and_rows_of_other_sums_are_normalised():
    weights = random_weights(np.random.default_rng(3), 2, 1, 2, 4)
    weights[..., 3, :] = weights[..., 3] = 0  # padding, which no token sees
    weights[:, :, :, :3] *= 0.2
    reached = np.asarray(analysis.rollout(weights, 0.5))
    np.testing.assert_array_equal(reached[..., 3, :], np.broadcast_to(np.eye(4)[3], (2, 1, 4)))
    np.testing.assert_array_equal(reached[..., :3, 3], 0)
    first = 0.5 * np.eye(4)[:3] + 0.5 * weights.astype(np.float64).mean(2)[0, 0, :3]
    np.testing.assert_allclose(reached[0, 0, :3], first / first.sum(-1, keepdims=True), rtol=0, atol=4 * EPS)
    broken = weights.copy()
    broken[0, 0, 0, 0, 0] = np.nan
    assert np.isnan(analysis.rollout(broken)[:, 0, 0]).all()
    with pytest.raises(ValueError, match="entries that are not finite"):
        analysis.max_flow(broken)


def test_the_share_of_the_stream_may_be_measured():
    rng = np.random.default_rng(4)
    stream, written = rng.normal(size=(2, 2, 1, 3, 5)).astype(np.float32)
    share = np.asarray(analysis.residual_share(stream, written))
    sizes = [np.linalg.norm(x.astype(np.float64), axis=-1) for x in (stream, written)]
    np.testing.assert_allclose(share, sizes[0] / sum(sizes), rtol=10 * EPS)
    weights = random_weights(rng, 2, 1, 2, 3)
    layers = share[..., None] * np.eye(3) + (1 - share[..., None]) * weights.mean(2)
    np.testing.assert_allclose(analysis.rollout(weights, share)[1, 0], layers[1, 0] @ layers[0, 0], atol=10 * EPS)
    np.testing.assert_array_equal(analysis.residual_mixing(weights, 1.0)[0, 0], np.eye(3))


def test_what_is_no_graph_is_refused():
    weights = random_weights(np.random.default_rng(5), 1, 1, 1, 3)
    with pytest.raises(ValueError, match=r"weights has shape \(1, 1, 1, 3, 2\): need \[layers, batch, heads"):
        analysis.rollout(weights[..., :2])
    with pytest.raises(ValueError, match=r"residual holds 1\.5: need numbers from 0 to 1"):
        analysis.rollout(weights, 1.5)
    with pytest.raises(ValueError, match=r"queries is \[3\]: need positions from 0 to 2"):
        analysis.max_flow(weights, [3])


@pytest.fixture(scope="module")
def model():
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=4, key_heads=2, mask=Causal()))
    model = Transformer(TransformerConfig(11, 8, 16, [layer] * 2), rngs=nnx.Rngs(0))
    model.eval()
    return model


def last(logits):
    return logits[:, -1, 3]


def test_effects_of_tokens_are_differences_of_runs(model):
    tokens = np.random.default_rng(6).integers(0, 11, (2, 6))
    plain = np.asarray(last(model(tokens)[0]))
    blank = np.asarray(analysis.token_effects(model, tokens, last, blank=7, chunk=4))
    out = np.asarray(analysis.token_effects(model, tokens, last))
    for b, t in np.ndindex(2, 5):
        other = tokens[b : b + 1].copy()
        other[0, t] = 7
        assert blank[b, t] == pytest.approx(plain[b] - float(last(model(other)[0])[0]), abs=1e-5)
        kept = np.delete(tokens[b : b + 1], t, 1)
        places = np.delete(np.arange(6), t)[None]
        without = last(model(jnp.asarray(kept), positions=jnp.asarray(places))[0])
        assert out[b, t] == pytest.approx(plain[b] - float(without[0]), abs=1e-5)
    tokens[1, 2] = 7
    assert analysis.token_effects(model, tokens, last, blank=7)[1, 2] == pytest.approx(0, abs=1e-6)


def test_groups_are_removed_together_and_padding_changes_nothing(model):
    tokens = np.random.default_rng(7).integers(0, 11, (2, 6))
    groups = np.array([[0, 0, 1, -1, -1, -1], [1, 1, 1, -1, -1, -1]])
    effects = np.asarray(analysis.token_effects(model, tokens, last, groups=groups))
    assert effects.shape == (2, 2)
    assert effects[1, 0] == 0
    plain = last(model(tokens)[0])
    shorter = last(model(jnp.asarray(tokens[1:, 3:]), positions=jnp.arange(3, 6)[None])[0])
    assert effects[1, 1] == pytest.approx(float(plain[1] - shorter[0]), abs=1e-5)
    padded = np.where(np.arange(6) == 1, -1, np.arange(6))[None]
    of_padding = analysis.token_effects(model, tokens, last, positions=jnp.asarray(padded))[:, 1]
    np.testing.assert_allclose(of_padding, 0, atol=1e-6)
    with pytest.raises(ValueError, match=r"groups has shape \(6,\): need that of the tokens, \(2, 6\)"):
        analysis.token_effects(model, tokens, last, groups=np.arange(6))
    with pytest.raises(ValueError, match=r"metric has shape \(\): need one number for each of 2 texts"):
        analysis.token_effects(model, tokens, lambda logits: last(logits).sum())


def test_rank_correlation_is_that_of_scipy_with_ties():
    rng = np.random.default_rng(8)
    x, y = rng.integers(0, 4, (2, 3, 12)).astype(np.float32)
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(analysis.rank_correlation(x, y), expected, atol=20 * EPS)
    assert jnp.isnan(analysis.rank_correlation(jnp.ones(4), jnp.arange(4.0)))
    assert jnp.isnan(analysis.rank_correlation(jnp.array([1.0, jnp.nan]), jnp.arange(2.0)))
    assert jax.jit(analysis.rank_correlation)(jnp.arange(5.0), -jnp.arange(5.0)) == pytest.approx(-1)
