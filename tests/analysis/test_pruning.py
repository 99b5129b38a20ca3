"""Importance of heads and pruning: identities of the gate, heads that write nothing, and loops over weights."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from flax import nnx

from jaxattn import models, nn
from jaxattn.analysis import (
    head_importance,
    head_slopes,
    one_head_left,
    pruning_curve,
    pruning_order,
    without_heads,
)
from jaxattn.trace import Add, Layers, Scale, run

B, T, L, N = 3, 7, 2, 4
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 64)
PLACES = jnp.asarray([[*range(T)], [*range(T)], [-1, -1, *range(T - 2)]])


def loss(logits):
    """The loss of the last token of each row, whatever stands before it."""
    return -jax.nn.log_softmax(logits[:, -1])[:, 3]


@pytest.fixture(scope="module")
def model():
    return planted.random(layers=L, heads=N)


def with_out(model, change):
    """A copy whose maps W_O [L, N, H, D], and W_V [L, K, ...], were changed."""
    graph, state = nnx.split(model)
    other = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    module = other.runs[0].branches[0].module
    out = module.out.kernel[...]
    module.out.kernel[...] = change(out.reshape(L, N, -1, out.shape[-1])).reshape(out.shape)
    return other


def test_a_slope_is_the_product_of_what_a_head_reads_and_the_gradient_there(model):
    found = head_slopes(model, TOKENS, loss, positions=PLACES)
    z = run(model, TOKENS, record=("z",), positions=PLACES)[1]["z"]  # [L, B, T, N, H]
    gradient = jax.grad(lambda x: loss(model(TOKENS, edits={"z": Layers(Add(x))}, positions=PLACES)[0]).sum())(
        jnp.zeros_like(z)
    )
    np.testing.assert_allclose(found, (z * gradient).sum((2, 4)), rtol=1e-4, atol=1e-6)
    alone = head_slopes(model, TOKENS[2:, 2:], loss)  # padding counts for nothing, examples do not see each other
    np.testing.assert_allclose(found[:, 2:], alone, rtol=1e-4, atol=1e-6)


def test_importance_is_the_mean_of_absolute_values_by_layer(model):
    slopes = np.asarray(head_slopes(model, TOKENS, loss), np.float64)
    plain = head_importance(model, TOKENS, loss, normalise=False)
    np.testing.assert_allclose(plain, abs(slopes).mean(1), rtol=1e-5)
    assert (plain > abs(slopes.mean(1)) * 1.01).any()  # signs differ between examples
    normed = head_importance(model, TOKENS, loss)
    np.testing.assert_allclose((normed**2).sum(-1), np.ones(L), rtol=1e-5)


def test_a_head_that_writes_nothing_scores_zero_and_scales_do_not_matter(model):
    silent = with_out(model, lambda out: out.at[1, 2].set(0).at[0].set(0))
    found = head_importance(silent, TOKENS, loss)
    assert found[1, 2] == 0
    assert (found[0] == 0).all()
    assert (found[1, jnp.array([0, 1, 3])] > 0).all()
    larger = with_out(model, lambda out: out / 4)
    values = larger.runs[0].branches[0].module.value.kernel
    values[...] = 4 * values[...]
    np.testing.assert_allclose(head_importance(larger, TOKENS, loss), head_importance(model, TOKENS, loss), rtol=1e-4)


def test_slopes_of_a_layer_add_up_to_that_of_a_common_gain(model):
    def of_gain(gain):
        return loss(model(TOKENS, edits={"attn_out": Layers(Scale(gain[:, None, None, None]))})[0]).sum()

    expected = jax.grad(of_gain)(jnp.ones(L))
    np.testing.assert_allclose(head_slopes(model, TOKENS, loss).sum((1, 2)), expected, rtol=1e-4, atol=1e-6)


def test_removing_heads_is_to_have_no_output_map_for_them(model):
    order = np.array([5, 0, 7, 2, 1, 3, 4, 6])
    found = pruning_curve(model, TOKENS, loss, np.stack([order, np.arange(8)]), [0, 1, 3, 8], chunk=3)
    for row, each in zip(found, (order, np.arange(8)), strict=True):
        for value, count in zip(row, (0, 1, 3, 8), strict=True):
            off = np.isin(np.arange(8), each[:count]).reshape(L, N, 1, 1)
            expected = loss(with_out(model, lambda out, off=off: jnp.where(off, 0, out))(TOKENS)[0]).mean()
            np.testing.assert_allclose(value, expected, rtol=1e-5)
    left = one_head_left(model, TOKENS, loss, chunk=4)
    off = np.zeros((L, N), bool)
    off[1] = [True, False, True, True]
    np.testing.assert_allclose(left[1, 1], loss(model(TOKENS, edits=without_heads(off))[0]).mean(), rtol=1e-5)


def test_in_a_planted_circuit_the_two_heads_of_it_matter_and_the_others_can_go():
    """The slope of a saturated softmax does not see layer 0; removal does: the curve is flat up to its end."""
    circuit = planted.planted()
    tokens = jnp.tile(jax.random.permutation(jax.random.key(0), 16)[None, :12], (1, 2))
    target = jnp.roll(tokens, -1, 1)

    def copied(logits):
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1)[..., 0]
        return each[:, 13:-1].mean(-1)

    scores = head_importance(circuit, tokens, copied, normalise=False)
    assert np.unravel_index(np.argmax(scores), scores.shape) == (1, 0)
    alone = np.array([[float(copied(circuit(tokens, edits=without_heads(off))[0])[0]) for off in row] for row in
                      np.eye(8, dtype=bool).reshape(2, 4, 2, 4)])  # fmt: skip
    needed = np.zeros((2, 4), bool)
    needed[0, 0] = needed[1, 0] = True
    assert (alone[needed] > 1).all()
    assert (alone[~needed] < 0.01).all()
    curve = pruning_curve(circuit, tokens, copied, pruning_order(alone), [0, 6, 7, 8], chunk=4)
    assert (curve[:2] < 0.01).all()
    assert (curve[2:] > 1).all()


def test_what_cannot_be_ordered_or_removed_is_refused(model):
    np.testing.assert_array_equal(pruning_order([[1.0, 0.0], [0.0, 2.0]]), [1, 2, 0, 3])
    with pytest.raises(ValueError, match="scores holds NaN"):
        pruning_order([[np.nan, 1.0]])
    with pytest.raises(ValueError, match="each of the numbers 0 to 7 once"):
        pruning_curve(model, TOKENS, loss, np.zeros(8, int), [1])
    with pytest.raises(ValueError, match=r"counts is \[9\]: need numbers from 0 to 8"):
        pruning_curve(model, TOKENS, loss, np.arange(8), [9])
    with pytest.raises(ValueError, match=r"loss returns shape \(\): need one number per example, \(3,\)"):
        head_slopes(model, TOKENS, lambda logits: loss(logits).mean())
    layers = [models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=n)) for n in (2, 4)]
    mixed = models.Transformer(models.TransformerConfig(64, 16, 16, layers), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="different numbers of heads"):
        head_slopes(mixed, TOKENS, loss)
