"""nn.FeedForward against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from multi_head import assert_close, linear, randomise

from jaxattn.models import FeedForward as Spec
from jaxattn.nn import FeedForward


def gelu(x):
    """The tanh form of Hendrycks and Gimpel (2016), which is what JAX computes by default."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_it_is_the_oracle(kind, use_bias):
    module = randomise(FeedForward(16, 24, kind=kind, use_bias=use_bias, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((2, 3, 16)).astype(np.float32)
    up, up_size = linear(module.up, x.astype(np.float64), abs(x))
    if kind == "gelu":
        hidden, hidden_size = gelu(up), 2 * up_size  # |gelu'| < 2
    else:
        g, g_size = linear(module.gate, x.astype(np.float64), abs(x))
        hidden = g / (1 + np.exp(-g)) * up
        hidden_size = 2 * g_size * abs(up) + abs(g) * up_size  # |silu'| < 2, |silu(g)| <= |g|
    expected, _ = linear(module.down, hidden, hidden_size)
    _, magnitude = linear(module.down, hidden, hidden_size)
    assert_close(nnx.jit(lambda module, x: module(x))(module, x), expected, magnitude)


@pytest.mark.parametrize("width", [16, 96, 128])
def test_the_default_widths_give_both_kinds_about_the_same_number_of_parameters(width):
    def parameters(kind):
        module = nnx.eval_shape(lambda: Spec(kind=kind).build(width, jnp.float32, nnx.Rngs(0)))
        return sum(np.prod(leaf.shape) for _, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)))

    assert parameters("gelu") == 8 * width**2
    # swiglu rounds its hidden width up to a multiple of 16: at most 15 more channels in each of three matrices.
    assert 0 <= parameters("swiglu") - 8 * width**2 <= 3 * 16 * width


def test_a_given_width_is_kept():
    assert Spec(hidden=40).build(16, jnp.float32, nnx.Rngs(0)).up.kernel.shape == (16, 40)


@pytest.mark.parametrize("hidden", [0, -1])
def test_no_width_is_refused(hidden):
    with pytest.raises(ValueError, match=f"hidden must be at least 1, got {hidden}"):
        Spec(hidden=hidden).build(16, jnp.float32, nnx.Rngs(0))


def test_an_unknown_kind_is_refused():
    message = r"kind 'relu' is unknown: need one of \('gelu', 'swiglu'\)"
    with pytest.raises(ValueError, match=message):
        FeedForward(16, 24, kind="relu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        Spec(kind="relu").build(16, jnp.float32, nnx.Rngs(0))
