"""Axes of activations and effects between groups, against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.analysis import axis_scores, cohens_d, principal_axes


def test_scores_along_principal_axes_are_uncorrelated_with_the_variances_as_said():
    values = np.random.default_rng(0).standard_normal((50, 4)) @ np.random.default_rng(1).standard_normal((4, 6))
    with jax.enable_x64(True):
        found = principal_axes(jnp.asarray(values), 4)
        scores = np.asarray(found.coordinates(values))
    found = jax.tree.map(np.asarray, found)
    np.testing.assert_allclose(np.cov(scores.T), np.diag(found.variance), atol=1e-10)
    eigenvalues = np.linalg.eigvalsh(np.cov(values.T))[::-1]
    np.testing.assert_allclose(found.variance, eigenvalues[:4], rtol=1e-9)
    np.testing.assert_allclose(found.share, eigenvalues[:4] / eigenvalues.sum(), rtol=1e-9)
    assert (found.axes[np.arange(4), abs(found.axes).argmax(1)] > 0).all()
    with pytest.raises(ValueError, match="count is 7 for 50 vectors of 6: need 1 to 6"):
        principal_axes(jnp.asarray(values), 7)


def test_scores_of_sentences_are_means_over_their_tokens_and_linear():
    x = np.random.default_rng(2).standard_normal((3, 5, 4)).astype(np.float32)
    axis, seen = np.array([1.0, -2, 0, 0.5], np.float32), np.ones((3, 5), bool)
    seen[1, 3:] = False
    seen[2] = False
    found = axis_scores(jnp.asarray(x), jnp.asarray(axis), jnp.asarray(seen))
    np.testing.assert_allclose(found[:2], [(x[0] @ axis).mean(), (x[1, :3] @ axis).mean()], rtol=1e-5)
    assert np.isnan(found[2])
    twice = axis_scores(2 * jnp.asarray(x), jnp.asarray(axis))
    np.testing.assert_allclose(twice, 2 * axis_scores(jnp.asarray(x), jnp.asarray(axis)), rtol=1e-6)


def test_the_effect_is_the_difference_over_the_pooled_deviation():
    """Groups 1, 2, 3 and 4, 6, 8, 10: deviations 1 and √(20/3), pooled variance (2 + 20) / 5."""
    low, high = jnp.array([1.0, 2, 3]), jnp.array([4.0, 6, 8, 10])
    found = cohens_d(high, low)
    d = 5 / (22 / 5) ** 0.5
    np.testing.assert_allclose(found.d, d, rtol=1e-6)
    np.testing.assert_allclose(found.half_width, 1.96 * (7 / 12 + d**2 / 14) ** 0.5, rtol=1e-6)
    other = cohens_d(low, high)
    np.testing.assert_allclose([other.d, other.half_width], [-found.d, found.half_width], rtol=1e-6)
    assert np.isnan(cohens_d(jnp.ones(3), jnp.ones(2)).d)
    with pytest.raises(ValueError, match="3 and 1 scores"):
        cohens_d(jnp.ones(3), jnp.ones(1))
