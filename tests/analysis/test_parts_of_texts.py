"""Attention to segments and spans, maps of images, joint pictures, roles of heads, and replacements of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from jaxattn import Causal, Window, analysis, attend, models, nn, trace
from jaxattn.core.attend import attention_weights
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm

rng = np.random.default_rng(0)


def rows(*shape):
    x = rng.gamma(0.4, size=shape)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


def test_concentration_is_0_for_equal_weights_and_1_for_one_key():
    segment = np.array([False, True, True, True, True, False])
    equal, one = np.array([0.2, 0.1, 0.1, 0.1, 0.1, 0.4]), np.array([0.2, 0, 0.4, 0, 0, 0.4])
    found = analysis.segment_focus(np.stack([equal, one]), segment)
    np.testing.assert_allclose(found.mass, [0.4, 0.4], rtol=1e-6)
    np.testing.assert_allclose(found.concentration, [0, 1], atol=1e-6)
    scaled = analysis.segment_focus(np.where(segment, one, 7 * one), segment)
    np.testing.assert_allclose(scaled.concentration, 1, atol=1e-6)
    p = np.array([0.5, 0.3, 0.15, 0.05])
    some = analysis.segment_focus(np.array([0.0, *p / 2, 0.5]), segment)
    assert some.concentration == pytest.approx(1 + (p * np.log(p)).sum() / np.log(4), abs=1e-6)
    without = analysis.segment_focus(np.array([0.0, *p / 2, 0.5]), segment, without=1)
    assert without.mass == pytest.approx(0.25)
    q = p[1:] / p[1:].sum()
    assert without.concentration == pytest.approx(1 + (q * np.log(q)).sum() / np.log(3), abs=1e-6)
    nothing = analysis.segment_focus(np.eye(3), np.array([True, False, False]))
    assert np.isnan(nothing.concentration).all()  # one key, or no weight


@pytest.fixture(scope="module")
def model():
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=4, key_heads=2, mask=Causal()))
    model = Transformer(TransformerConfig(11, 8, 16, [layer] * 2), rngs=nnx.Rngs(0))
    noisy = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    model.eval()
    return model


def test_measures_are_those_of_the_weights_also_with_padding(model):
    tokens, places = rng.integers(0, 11, (2, 8)), np.stack([np.arange(8), [*range(5), -1, -1, -1]])
    segment = np.array([0, 0, 1, 1, 1, 0, 0, 0], bool)
    record = {
        "focus": ("weights", analysis.Focus(segment)),
        "far": ("weights", analysis.FarMass(jnp.array([0, 2, 9]))),
        "weights": "weights",
    }
    _, seen = trace.run(model, tokens, record=record, positions=places)
    w = np.asarray(seen["weights"])  # [L, B, N, T, S]
    mass, narrow = (np.moveaxis(np.asarray(x), -1, 2) for x in seen["focus"])
    np.testing.assert_allclose(mass, w[..., segment].sum(-1), atol=1e-6)
    seen_by = np.tril(np.ones((8, 8), bool)) & segment
    expected = analysis.segment_focus(w, seen_by).concentration
    np.testing.assert_allclose(narrow[:, 0], expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(narrow[:, 1, :, :5], expected[:, 1, :, :5], atol=1e-5)
    assert (mass[:, 1, :, 5:] == 0).all()
    apart = abs(np.arange(8)[:, None] - np.arange(8))
    far = np.stack([(w * (apart > d)).sum(-1) for d in (0, 2, 9)], -1)
    np.testing.assert_allclose(np.moveaxis(np.asarray(seen["far"]), 3, 2), far, atol=1e-6)


def test_attention_of_a_response_is_a_mean_per_key_without_the_first():
    weights = rows(2, 2, 3, 5, 5)
    span, queries = np.array([[0, 0, 1, 1, 0]], bool), np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], bool)
    found = analysis.span_attention(weights, span, queries)
    layers = []
    for layer in weights.astype(float):
        a = layer[0].mean(0)
        a[:, 0] = 0
        layers.append(a / a.sum(-1, keepdims=True))
    assert found[0] == pytest.approx(np.mean(layers, 0)[3:, 2:4].mean(), rel=1e-5)
    assert np.isnan(found[1])
    uniform = np.full((1, 1, 2, 5, 5), 0.2)
    assert analysis.span_attention(uniform, span, queries[:1])[0] == pytest.approx(1 / 4)
    assert analysis.span_attention(uniform, span, queries[:1], first=0)[0] == pytest.approx(1 / 5)
    assert np.isnan(analysis.span_attention(uniform, np.zeros((1, 5), bool), queries[:1]))
    only_first = np.zeros((1, 1, 1, 5, 5))
    only_first[..., 0] = 1
    assert np.isnan(analysis.span_attention(only_first, span, queries[:1]))


def test_one_perfect_head_points_at_the_target():
    """Among eleven random heads, whatever their order; its neighbour in the picture has part of its weight."""
    image, text = np.arange(2, 18), np.zeros((1, 20), bool)
    text[0, 18:] = True
    weights = 0.2 * rows(3, 1, 4, 20, 20)
    weights[1, 0, 2, 18:] *= 0.1
    weights[1, 0, 2, 18:, 2 + 9] += 0.6
    weights[1, 0, 2, 18:, 2 + 10] += 0.35
    found = analysis.ground(weights, text, image, top=1)
    assert found.heads.tolist() == [[[1, 2]]]
    assert found.map.shape == (1, 16)
    assert (found.map.argmax(), found.map.sum() <= 1) == (9, True)
    moved = analysis.ground(weights[::-1, :, ::-1], text, image, top=1)
    np.testing.assert_allclose(moved.map, found.map, rtol=1e-6)
    np.testing.assert_allclose(found.map[0], weights[1, 0, 2, 18:, 2:18].mean(0), rtol=1e-5)
    region = analysis.largest_region(np.asarray(found.map).reshape(4, 4), 0.5)
    np.testing.assert_array_equal(np.argwhere(region.inside), [[2, 1], [2, 2]])
    assert region.centre[0] == 2
    assert 1 < region.centre[1] < 1.5
    with pytest.raises(ValueError, match="top is 13: need at most 12"):
        analysis.ground(weights, text, image, top=13)


def test_regions_are_connected_by_sides_and_maps_of_nothing_have_none():
    grid = np.zeros((4, 5))
    grid[0, 0], grid[1, 1], grid[1, 2], grid[3, 4] = 1, 0.8, 0.8, 0.4
    region = analysis.largest_region(grid)
    np.testing.assert_array_equal(np.argwhere(region.inside), [[1, 1], [1, 2]])
    assert region.centre == pytest.approx((1, 1.5))
    assert analysis.largest_region(grid, 0.9).centre == (0, 0)
    nothing = analysis.largest_region(np.zeros((2, 2)))
    assert np.isnan(nothing.centre).all()
    assert not nothing.inside.any()
    with pytest.raises(ValueError, match="threshold is 0: need a share"):
        analysis.largest_region(grid, 0)


def test_a_resampler_keeps_the_mass_of_a_map():
    visual, cross = rows(2, 3) * 0.7, rows(2, 4, 3, 9)
    found = analysis.to_patches(visual, cross)
    np.testing.assert_allclose(found.sum(-1), 0.7, rtol=1e-5)
    np.testing.assert_allclose(found[1], visual[1] @ cross[1].mean(0), rtol=1e-5)


def test_joint_points_have_the_attention_of_queries_and_keys():
    q, k = rng.normal(size=(30, 6)) * 3 + 1, rng.normal(size=(40, 6)) * 0.2 - 4
    points = analysis.joint_points(q, k)
    np.testing.assert_allclose(softmax(points.queries @ points.keys.T, -1), softmax(q @ k.T, -1), atol=1e-12)
    np.testing.assert_allclose(points.queries.mean(0), points.keys.mean(0))
    before = analysis.distance_correlation(q, k)
    after = analysis.distance_correlation(points.queries, points.keys)
    assert after < min(before, -0.5)

    def apart(c):
        x, y = (q - q.mean(0)) * c, (k - k.mean(0)) / c
        return ((x[:, None] - y) ** 2).sum()

    assert all(apart(points.scale) < apart(points.scale * factor) for factor in (0.99, 1.01))
    assert analysis.joint_points(q, k, 2.0).scale == 2
    with pytest.raises(ValueError, match="all queries or all keys are the same"):
        analysis.joint_points(np.ones((3, 6)), k)
    with pytest.raises(ValueError, match=r"need \[n, H\] and \[m, H\]"):
        analysis.joint_points(q[:, :4], k)
    with pytest.raises(ValueError, match="scale is 0: need a number above 0"):
        analysis.joint_points(q, k, 0)


def test_kinds_of_patterns_are_apart_on_their_two_largest_axes():
    """Noisy heads on the diagonal, one to the side, uniform ones, and columns: nearest centroids tell 95 % and more."""
    tokens, each = 12, 25
    kinds = [
        np.eye(tokens),
        np.eye(tokens, k=-1),
        np.full((tokens, tokens), 1 / tokens),
        np.eye(tokens)[:1].repeat(tokens, 0),
    ]
    maps = np.concatenate([[0.7 * kind + 0.3 * rows(tokens, tokens) for _ in range(each)] for kind in kinds])
    kind = np.arange(4).repeat(each)
    flat = maps.reshape(len(maps), -1)
    places = np.asarray(analysis.principal_axes(flat, 2).coordinates(flat))
    centres = np.stack([places[kind == number].mean(0) for number in range(4)])
    nearest = np.linalg.norm(places[:, None] - centres, axis=-1).argmin(1)
    assert (nearest == kind).mean() > 0.95


def test_a_head_that_reads_what_matters_has_score_1_and_special_tokens_do_not_count():
    weights, saliency = rows(2, 2, 3, 5, 5), rng.gamma(1, size=(2, 5)).astype(np.float32)
    weights[1, :, 0] = (saliency / saliency.sum(1, keepdims=True))[:, None]
    weights[0, 0, 0] = 0
    found = np.asarray(analysis.semantic_scores(weights, saliency))
    np.testing.assert_allclose(found[1, :, 0], 1, rtol=1e-5)
    assert ((found >= 0) & (found <= 1 + 1e-6)).all()
    assert found[0, 0, 0] == 0
    received = weights[0, 1, 2].sum(0)
    cosine = received @ saliency[1] / np.linalg.norm(received) / np.linalg.norm(saliency[1])
    assert found[0, 1, 2] == pytest.approx(cosine, rel=1e-5)
    np.testing.assert_array_equal(analysis.confidence(weights), weights.max((-2, -1)))
    counted = np.array([[0, 1, 1, 1, 0]] * 2, bool)
    np.testing.assert_array_equal(analysis.confidence(weights, counted), weights[..., 1:4, 1:4].max((-2, -1)))
    assert analysis.confidence(weights[..., :2, :], counted).shape == (2, 2, 3)


def test_implied_weights_are_those_of_softmax_and_read_any_value():
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 3, 4)), jnp.float32) for _ in range(3))
    found = analysis.implied_weights(lambda value: attend(q, k, value, mask=Causal()), v.shape)
    np.testing.assert_allclose(found, attention_weights(q, k, mask=Causal())[0], atol=1e-6)

    def kernel(value):  # features that may be negative
        return jnp.einsum("btnh,bsnh,bsnv->btnv", q, k, value)

    signed = analysis.implied_weights(kernel, v.shape)
    assert signed.min() < 0
    np.testing.assert_allclose(jnp.einsum("bnts,bsnv->btnv", signed, v), kernel(v), rtol=1e-4, atol=1e-4)


def test_errors_are_none_without_replaced_layers_and_those_of_the_whole_at_the_end(model):
    near = models.replace_mixers(model, lambda layer, mixer: mixer.replace(mask=Causal() & Window(1)))
    tokens = rng.integers(0, 11, (2, 8))
    places = np.stack([np.arange(8), [*range(5), -1, -1, -1]])

    def metric(logits):
        return logits[:, 4].sum()

    found = analysis.accumulated_error(model, near, tokens, metric, positions=places)
    assert found.stream[0] == 0
    whole, approximate = (m(tokens, record=("resid",), positions=places) for m in (model, near))
    x, y = (np.asarray(each[2]["resid"][-1], float)[places >= 0] for each in (whole, approximate))
    assert found.stream[2] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-4)
    np.testing.assert_allclose(found.metric[jnp.array([0, 2])], [metric(m[0]) for m in (whole, approximate)], rtol=1e-5)
    assert 0 < found.stream[1] != found.stream[2]
    same = analysis.accumulated_error(model, model, tokens, metric)
    np.testing.assert_allclose(same.stream, 0, atol=1e-6)
