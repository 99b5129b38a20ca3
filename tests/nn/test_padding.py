"""Padding may hold anything: it reaches no output and no gradient of a mixer, of its parameters or of other tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import B, D, N, T, X, build, call

from jaxattn import Documents, models, nn

SPECS = {
    "attention": models.Spec(nn.MultiHeadAttention, heads=N, convolution=2),
    "mamba2": models.Spec(nn.Mamba2, heads=N, state=4),
    "gated deltanet": models.Spec(nn.DeltaNet, heads=N, decay="head", convolution=2),
    "titans": models.Spec(nn.NeuralMemory, heads=N, hidden=(), inner_batch=4),
    "hymba": models.Spec(nn.hymba_heads, heads=N, state=3),
}
LEFT, RIGHT = np.arange(T) < 3, np.arange(T) >= 8


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", SPECS)
def test_padding_reaches_nothing(name, packed):
    """At the left of one row and the right of the other: by positions, and as a document of −1."""
    graph, params, rest = nnx.split(build(SPECS[name]), nnx.Param, ...)
    padding = np.stack([LEFT, RIGHT])
    if packed:
        ids = jnp.asarray(np.where(padding, -1, np.arange(T) >= 5))
        options = {"mask": Documents(ids)}
    else:
        counted = np.cumsum(~padding, -1) - 1
        options = {"positions": jnp.asarray(np.where(padding, -1, counted))}

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y, _, _ = call(nnx.merge(graph, params, rest), x, **options)
            y = jnp.where(padding[..., None], 0, y)
            return jnp.sin(y).sum(), y

        slopes, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, slopes

    assert X.shape == (B, T, D)
    y, (d_params, d_x) = run(params, X)
    y2, (d_params2, d_x2) = run(params, jnp.where(padding[..., None], jnp.nan, X))
    np.testing.assert_array_equal(y2, y)
    np.testing.assert_array_equal(jnp.where(padding[..., None], 0, d_x2), jnp.where(padding[..., None], 0, d_x))
    for a, b in zip(jax.tree.leaves(d_params2), jax.tree.leaves(d_params), strict=True):
        np.testing.assert_array_equal(a, b)
