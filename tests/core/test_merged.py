"""Merged layers are their formulas in NumPy, with masks, in every scale, and their derivatives are differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxattn import Causal
from jaxattn.core.merged import LinearSelfAttention, SoftmaxHeads


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def drawn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def linear_layer(z, kq, pv, scale, mask_query, seen):
    """The layer with the matrix of its pairs, of one sequence."""
    length = len(z)
    index = np.arange(length)
    if scale == "running":
        allowed = index[None] < index[:, None] if mask_query else index[None] <= index[:, None]
        pairs = allowed & seen
        divisor = np.maximum(pairs.sum(1), 1)[:, None]
    else:
        pairs = np.broadcast_to(seen & ((index < length - 1) | (not mask_query)), (length, length))
        divisor = max(seen[:-1].sum(), 1) if scale == "context" else scale
    scores = np.where(pairs, z @ kq.T @ z.T, 0)
    return z + scores @ z @ pv.T / divisor


@pytest.mark.parametrize("mask_query", [True, False])
@pytest.mark.parametrize("scale", ["context", "running", 7.0])
def test_the_linear_layer_is_its_sum_over_pairs(scale, mask_query):
    z, kq, pv = drawn(2, 9, 4), drawn(4, 4), drawn(4, 4, seed=1)
    layer = LinearSelfAttention(jnp.asarray(kq), jnp.asarray(pv), scale, mask_query)
    everything, some = np.ones(9, bool), np.arange(9) % 3 != 1
    for seen in (everything, some):
        expected = [linear_layer(each, kq, pv, scale, mask_query, seen) for each in z]
        # Sums of 9 · 4 products, of magnitudes up to a few hundred.
        np.testing.assert_allclose(layer(jnp.asarray(z), jnp.asarray(seen)), expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(layer(jnp.asarray(z)), layer(jnp.asarray(z), jnp.asarray(everything)))


def test_tokens_that_are_not_seen_may_hold_anything_and_masks_may_differ_by_sequence():
    z, layer = (
        jnp.asarray(drawn(2, 6, 3)),
        LinearSelfAttention(jnp.asarray(drawn(3, 3)), jnp.asarray(drawn(3, 3, seed=1))),
    )
    seen = jnp.arange(6) < jnp.array([[4], [2]])
    seen = seen.at[:, -1].set(True)
    other = jnp.where(seen[..., None], z, 99.0)
    last = layer(z, seen)[:, -1]
    np.testing.assert_array_equal(last, layer(other, seen)[:, -1])
    np.testing.assert_allclose(last[0], layer(z[0, jnp.array([0, 1, 2, 3, 5])])[-1], rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(layer)(z, seen)[:, -1], last, rtol=1e-12)


def test_running_is_causal():
    z = jnp.asarray(drawn(8, 3))
    layer = LinearSelfAttention(jnp.asarray(drawn(3, 3)), jnp.asarray(drawn(3, 3, seed=1)), "running", False)
    np.testing.assert_allclose(layer(z.at[5:].add(1))[:5], layer(z)[:5], rtol=1e-12)


@pytest.mark.parametrize("outputs", [(), (2,)])
def test_softmax_heads_are_their_sum_over_heads_and_tokens(outputs):
    query, z, kq, ov = drawn(2, 3, 4), drawn(2, 7, 5), drawn(3, 5, 4), drawn(3, *outputs, 5)
    heads = SoftmaxHeads(jnp.asarray(kq), jnp.asarray(ov))
    seen = np.array([[1, 1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0, 0]], bool)
    scores = np.where(seen[:, None, None], np.einsum("bsd,hde,bte->bhts", z, kq, query), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,hmd,bsd->btm", weights, ov.reshape(3, -1, 5), z).reshape(2, 3, *outputs)
    given = jnp.asarray(query), jnp.asarray(z), jnp.asarray(seen)
    np.testing.assert_allclose(heads(*given), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(heads.weights(*given), weights, rtol=1e-10, atol=1e-12)
    assert (heads(*given[:2], jnp.zeros((2, 7), bool)) == 0).all()


def test_softmax_heads_take_masks_and_do_not_mind_the_order_of_heads_and_tokens():
    z, kq, ov = jnp.asarray(drawn(6, 4)), jnp.asarray(drawn(3, 4, 4)), jnp.asarray(drawn(3, 4))
    heads = SoftmaxHeads(kq, ov)
    causal = heads(z, z, mask=Causal())
    one_by_one = [heads(z[t : t + 1], z[: t + 1])[0] for t in range(6)]
    np.testing.assert_allclose(causal, jnp.stack(one_by_one), rtol=1e-10, atol=1e-12)
    order, tokens = jnp.array([2, 0, 1]), jnp.array([3, 5, 1, 0, 2, 4])
    np.testing.assert_allclose(SoftmaxHeads(kq[order], ov[order])(z, z[tokens]), heads(z, z), rtol=1e-10, atol=1e-12)


def test_without_scores_every_head_averages():
    z, ov = jnp.asarray(drawn(6, 4)), jnp.asarray(drawn(3, 4))
    heads = SoftmaxHeads(jnp.zeros((3, 4, 4)), ov)
    np.testing.assert_allclose(heads(z[:1], z)[0], (ov @ z.mean(0)).sum(), rtol=1e-12)


def test_derivatives_are_differences():
    z, query = jnp.asarray(drawn(5, 3)), jnp.asarray(drawn(1, 3))
    kq, pv, heads_kq, ov = (
        0.5 * jnp.asarray(x) for x in (drawn(3, 3), drawn(3, 3, seed=1), drawn(2, 3, 3), drawn(2, 3))
    )
    check_grads(lambda kq, pv, z: LinearSelfAttention(kq, pv)(z), (kq, pv, z), order=1, modes=("rev",))
    check_grads(lambda kq, ov, z: SoftmaxHeads(kq, ov)(query, z), (heads_kq, ov, z), order=1, modes=("rev",))


def test_errors_name_the_argument():
    square, wide = jnp.ones((3, 3)), jnp.ones((3, 4))
    layer, heads = LinearSelfAttention(square, square), SoftmaxHeads(jnp.ones((2, 3, 3)), jnp.ones((2, 3)))
    for call, message in (
        (lambda: LinearSelfAttention(square, wide), r"kq and pv are \(3, 3\) and \(3, 4\)"),
        (lambda: LinearSelfAttention(square, square, "length"), "scale is 'length': need 'context', 'running' or"),
        (lambda: LinearSelfAttention(square, square, -1.0), "scale must be positive, got -1"),
        (lambda: layer(jnp.ones((5, 4))), r"z has shape \(5, 4\): need \[..., T, 3\]"),
        (lambda: layer(jnp.ones((5, 3)), jnp.ones(4, bool)), r"seen is bool\[4\]: need bool \[..., 5\]"),
        (lambda: SoftmaxHeads(jnp.ones((2, 3, 3)), jnp.ones((3, 3))), "need \\[H, D, D'\\] and \\[H, D\\]"),
        (lambda: heads(jnp.ones((1, 4)), jnp.ones((5, 3))), "query has 4 channels: need 3"),
        (lambda: heads(jnp.ones((1, 3)), jnp.ones((5, 2))), r"z has shape \(5, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for scale in (np.float32(100), jnp.array(100.0), None):
        with pytest.raises(TypeError, match=r"scale is .*: need 'context', 'running' or a positive Python number"):
            LinearSelfAttention(square, square, scale)
