"""Training that computes values again in the backward pass: the same gradients, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import models, nn

LAYER = models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=2, dropout=0.1))
TOKENS = np.random.default_rng(0).integers(16, size=(2, 64))
SITES = ["attn_out", "mlp_out"]


def gradient(remat):
    config = models.TransformerConfig(vocabulary=16, width=32, length=64, layers=[LAYER] * 4, remat=remat)
    graph, params, rest = nnx.split(models.Transformer(config, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def loss(params):
        logits, *_ = nnx.merge(graph, params, jax.tree.map(jnp.asarray, rest))(jnp.asarray(TOKENS))
        return jnp.square(logits).mean()

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    return compiled(params), compiled.memory_analysis().temp_size_in_bytes


def test_gradients_are_the_same_and_take_less_memory():
    (kept, most), (of_sites, some), (full, least), (cheap, less) = map(gradient, ("none", SITES, "full", "cheap"))
    for others in (of_sites, full, cheap):
        for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(others), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(one).max())
    assert max(some, least) < most / 3
    assert max(some, least) < less < most


@pytest.mark.parametrize("remat", ["cheap", "dots", ["attn_out"], "full"])
def test_memory_is_linear_in_length(remat):
    """What the loop over tiles of attention makes inside is never kept: that would be all pairs of tokens."""
    lengths = 1024, 4096
    layers = [models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=2), models.Spec(nn.FeedForward, hidden=32))] * 2
    config = models.TransformerConfig(vocabulary=16, width=32, layers=layers, remat=remat)
    graph, params, rest = nnx.split(models.Transformer(config, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def taken(length):
        def loss(params, tokens):
            return nnx.merge(graph, params, rest)(tokens)[0].mean()

        compiled = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((1, length), int)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = map(taken, lengths)
    assert many < 1.25 * few * lengths[1] / lengths[0]


@pytest.mark.slow
def test_results_of_products_can_be_kept():
    (kept, most), (dots, some) = gradient("none"), gradient("dots")
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(dots), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(one).max())
    assert some < most


def test_a_site_that_no_layer_has_is_named():
    with pytest.raises(ValueError, match="remat is 'all': need 'cheap', 'none', 'dots', 'full'"):
        models.TransformerConfig(remat="all")
    config = models.TransformerConfig(layers=[LAYER], remat=["attn_out", "weights"])
    with pytest.raises(ValueError, match=r"remat names \['weights'\], which no layer has"):
        models.Transformer(config, rngs=nnx.Rngs(0))
