"""Projections of heads on few directions: all of them change nothing, none is the mean, a planted one is enough."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from jaxattn.analysis import head_subspaces, label_logits, projected
from jaxattn.trace import run

TOKENS = jax.random.randint(jax.random.key(1), (5, 6), 0, 64)


def test_all_directions_change_nothing_and_none_is_the_mean():
    model = planted.random(layers=2, heads=4)
    seen = run(model, TOKENS, record=("q", "k"))[1]
    values = {site: x.reshape(2, 30, *x.shape[3:]) for site, x in seen.items()}
    full, none = (projected({site: head_subspaces(x, rank) for site, x in values.items()}) for rank in (8, 0))
    same = run(model, TOKENS, record=("q",), edits=full)
    np.testing.assert_allclose(same[1]["q"], seen["q"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(same[0], model(TOKENS)[0], rtol=1e-3, atol=1e-3)
    flat = run(model, TOKENS, record=("q", "k"), edits=none)[1]
    for site in ("q", "k"):
        expected = np.broadcast_to(np.asarray(values[site][0]).mean(0), flat[site].shape[1:])
        np.testing.assert_allclose(flat[site][0], expected, rtol=1e-4, atol=1e-5)


def test_directions_are_those_of_the_largest_variance_and_groups_take_out_what_is_shared():
    """One direction differs within groups, another, larger, between them."""
    rng = np.random.default_rng(0)
    within, between = np.linalg.qr(rng.standard_normal((8, 8)))[0][:2]
    values = 5 * rng.standard_normal((10, 1, 1)) * between + rng.standard_normal((10, 4, 1)) * within
    values = jnp.asarray(values.reshape(1, 40, 1, 8) + 3.0, jnp.float32)
    mean, plain = head_subspaces(values, 1)
    np.testing.assert_allclose(mean[0, 0], values.mean((0, 1, 2)), rtol=1e-5)
    assert abs(plain[0, 0, 0] @ between) > 0.99
    _, centred = head_subspaces(values, 1, groups=4)
    assert abs(centred[0, 0, 0] @ within) > 0.999
    _, axes = head_subspaces(values, 8)
    np.testing.assert_allclose(axes[0, 0] @ axes[0, 0].T, np.eye(8), atol=1e-5)
    with pytest.raises(ValueError, match="rank is 9: need 0 to 8"):
        head_subspaces(values, 9)
    with pytest.raises(ValueError, match="groups is 3 for 40 examples"):
        head_subspaces(values, 1, groups=3)


def test_a_common_shift_of_labels_is_no_answer():
    logits = jax.random.normal(jax.random.key(0), (3, 10))
    found = label_logits(logits, jnp.array([1, 4, 7]))
    np.testing.assert_allclose(found.sum(-1), 0, atol=1e-5)
    shifted = label_logits(logits + 2.5, jnp.array([1, 4, 7]))
    np.testing.assert_allclose(found, shifted, atol=1e-5)
    np.testing.assert_allclose(found[:, 0] - found[:, 2], logits[:, 1] - logits[:, 7], rtol=1e-4, atol=1e-6)
