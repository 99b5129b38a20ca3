"""Divergences of heads and models, the map of what is near, and what fixed patterns explain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance as scipy_distance

from jaxattn import analysis

EPS = float(np.finfo(np.float32).eps)
rng = np.random.default_rng(0)


def rows(*shape):
    x = rng.gamma(0.3, size=shape)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


def test_the_divergence_is_that_of_scipy_symmetric_and_at_most_log_2():
    p, q = rows(6, 9), rows(6, 9)
    expected = [scipy_distance.jensenshannon(a, b) ** 2 for a, b in zip(p.astype(float), q.astype(float), strict=True)]
    np.testing.assert_allclose(analysis.js_divergence(p, q), expected, atol=20 * EPS)
    np.testing.assert_allclose(analysis.js_divergence(q, 3 * p), expected, atol=20 * EPS)
    assert (analysis.js_divergence(p, p) <= EPS).all()
    apart = analysis.js_divergence(jnp.eye(4)[:1], jnp.eye(4))
    np.testing.assert_allclose(apart, np.log(2) * np.array([0, 1, 1, 1]), rtol=EPS)
    assert jnp.isnan(analysis.js_divergence(jnp.zeros(3), jnp.ones(3)))
    assert jnp.isnan(analysis.js_divergence(jnp.array([jnp.nan, 1]), jnp.ones(2)))


def test_the_gradient_of_the_divergence_is_finite_where_keys_are_hidden():
    p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.2, 0.8, 0.0])
    assert jnp.isfinite(jax.grad(analysis.js_divergence)(p, q)).all()


def test_distances_of_heads_are_means_over_common_rows():
    """Two layers of three heads, a padded row, and a head that is another one."""
    weights = rows(2, 2, 3, 4, 4)
    weights[:, 1, :, 3] = 0
    weights[1, :, 2] = weights[0, :, 0]
    found = np.asarray(analysis.head_distances(weights))
    heads = weights.astype(float).transpose(0, 2, 1, 3, 4).reshape(6, 8, 4)
    some = heads[0].sum(-1) > 0
    for a, b in np.ndindex(6, 6):
        pairs = zip(heads[a][some], heads[b][some], strict=True)
        expected = np.mean([scipy_distance.jensenshannon(x, y) ** 2 for x, y in pairs])
        assert found[a, b] == pytest.approx(expected, abs=20 * EPS)
    assert found[0, 5] == pytest.approx(0, abs=2 * EPS)
    weights[0, :, 1] = 0
    assert np.isnan(np.asarray(analysis.head_distances(weights))[1]).all()
    with pytest.raises(ValueError, match=r"need \[layers, batch, heads, queries, keys"):
        analysis.head_distances(weights[0])


def test_points_come_back_from_their_distances():
    points = rng.normal(size=(7, 2)) * [3, 1]
    apart = np.linalg.norm(points[:, None] - points, axis=-1)
    found = analysis.classical_mds(apart)
    np.testing.assert_allclose(np.linalg.norm(found[:, None] - found, axis=-1), apart, atol=1e-12)
    assert (found.max(0) >= -found.min(0)).all()
    np.testing.assert_allclose(analysis.classical_mds(apart, 3)[:, 2], 0, atol=1e-6)
    assert analysis.classical_mds(np.zeros((1, 1)), 1).tolist() == [[0]]
    with pytest.raises(ValueError, match="dimensions is 8: need 1 to 7"):
        analysis.classical_mds(apart, 8)
    with pytest.raises(ValueError, match="need a square of finite numbers"):
        analysis.classical_mds(np.full((2, 2), np.nan))


def test_models_are_compared_by_quarters_of_their_depth():
    ours, theirs = rows(4, 2, 5, 5), rows(6, 3, 5, 5)
    assert (analysis.depth_divergence(ours, ours) <= EPS).all()
    found = analysis.depth_divergence(ours, theirs, 2)
    for part, (a, b) in enumerate(((ours[:2], theirs[:3]), (ours[2:], theirs[3:]))):
        means = [x.astype(float).mean((0, 1)) for x in (a, b)]
        expected = np.mean([scipy_distance.jensenshannon(x, y) ** 2 for x, y in zip(*means, strict=True)])
        assert found[part] == pytest.approx(expected, abs=20 * EPS)
    with pytest.raises(ValueError, match="parts is 5: need 1 to 4"):
        analysis.depth_divergence(ours, theirs, 5)
    with pytest.raises(ValueError, match="need the same text"):
        analysis.depth_divergence(ours, theirs[..., :4, :4])


def test_attention_by_position_alone_is_trivial_and_random_attention_is_not():
    tokens = 12
    features = analysis.trivial_features(tokens)
    assert features.shape == (78, 4)
    made = np.zeros((2, tokens, tokens))
    made[0][np.tril_indices(tokens)] = 0.3 + features @ [0.2, 0.1, 0.4, -0.2]
    made[1] = np.eye(tokens, k=-1)
    fit = analysis.regress(made[0][np.tril_indices(tokens)], features)
    assert fit.r2 == pytest.approx(1)
    np.testing.assert_allclose([*fit.coefficients, fit.intercept], [0.2, 0.1, 0.4, -0.2, 0.3], atol=1e-12)
    assert analysis.trivial_share(made[1]) == pytest.approx(1)
    y = rng.normal(size=500)
    random = analysis.regress(y, rng.normal(size=(500, 20)))
    assert random.r2 > 0
    assert abs(random.adjusted) < 0.1  # of standard deviation √(2 · 20) / 500 ≈ 0.013
    assert np.isnan(analysis.regress(np.ones(5), rng.normal(size=(5, 1))).r2)
    assert np.isnan(analysis.regress([1.0, np.nan], np.ones((2, 1))).r2)
    with pytest.raises(ValueError, match=r"y has shape \(3,\) and features \(2, 1\)"):
        analysis.regress(np.ones(3), np.ones((2, 1)))


def test_what_a_regression_leaves_is_orthogonal_to_the_features():
    """Also where a feature is a multiple of another."""
    x = rng.normal(size=(40, 3))
    x = np.concatenate([x, 2 * x[:, :1]], 1)
    y = rng.normal(size=40)
    fit = analysis.regress(y, x)
    np.testing.assert_allclose(fit.residual @ x, 0, atol=1e-12)
    np.testing.assert_allclose(fit.residual.sum(), 0, atol=1e-12)
    np.testing.assert_allclose(x @ fit.coefficients + fit.intercept + fit.residual, y, atol=1e-12)
    assert fit.r2 == pytest.approx(np.corrcoef(y, y - fit.residual)[0, 1] ** 2)


def test_rows_of_encoders_count_up_to_the_diagonal():
    weights = rows(2, 3, 5, 5)
    weights[0, 0, 2] = 0
    found = analysis.lower_rows(weights)
    assert found.shape == (2, 3, 15)
    back = np.zeros((2, 3, 5, 5))
    i, j = np.tril_indices(5)
    back[..., i, j] = found
    sums = back.sum(-1)
    assert sums[0, 0, 2] == 0
    sums[0, 0, 2] = 1
    np.testing.assert_allclose(sums, 1)
    assert analysis.trivial_share(weights).shape == (2, 3)
    assert np.isnan(analysis.trivial_share(np.ones((1, 1))))
