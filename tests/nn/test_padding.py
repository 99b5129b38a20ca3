"""Padding may hold anything: it reaches no output and no gradient of a mixer, of its parameters or of other tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import B, D, N, T, X, build, call

from jaxattn import Documents, models, nn
from jaxattn.cache import Recent
from jaxattn.nn import Tokens

SPECS = {
    "attention": models.Spec(nn.MultiHeadAttention, heads=N, convolution=2),
    "latent attention": models.Spec(nn.LatentAttention, heads=N, rank=5, query_rank=6),
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


def test_tokens_that_do_not_fit_are_refused():
    """As many tokens as x has, and a table of who sees whom with a row for each of them, or one for all."""
    module, x = nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0)), jnp.ones((2, 5, 8))
    with pytest.raises(ValueError, match=r"tokens are 4, but x has shape \(2, 5, 8\): need as many tokens, 5"):
        module(x, Tokens.of(x[:, :4]))
    with pytest.raises(ValueError, match=r"mask has shape \(4, 4\) for 5 tokens: need 5 rows of queries, or 1"):
        Tokens.of(x, mask=np.ones((4, 4), bool))
    for shape in ((5, 5), (1, 5), (5,), (2, 1, 1, 5), (9, 9)):
        Tokens.of(x, mask=np.ones(shape, bool))
    with pytest.raises(TypeError, match=r"store must be a policy such as Policy\(Recent\(4\), slots=64\), got Recent"):
        module.init_state(2, 8, Recent(2))
