"""nn.FeedForward against float64 NumPy."""

import math

import numpy as np
import pytest
from flax import nnx
from multi_head import assert_close, linear, randomise

from jaxattn.nn import FeedForward


def gelu(x):
    """The tanh form of Hendrycks and Gimpel (2016), which is what JAX computes by default."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {  # f, a bound of its slope
    "silu": (lambda x: x / (1 + np.exp(-x)), 1.1),
    "gelu": (lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))), 1.13),
    "gelu_tanh": (gelu, 1.13),
    "relu": (lambda x: np.maximum(x, 0), 1),
    "relu_squared": (lambda x: np.maximum(x, 0) ** 2, None),
}


@pytest.mark.parametrize(("gated", "use_bias"), [(False, False), (True, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_oracle(activation, gated, use_bias):
    module = randomise(FeedForward(16, 24, activation=activation, gated=gated, use_bias=use_bias, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((2, 3, 16)).astype(np.float32)
    f, slope = ACTIVATIONS[activation]
    wide = x.astype(np.float64)
    up, up_size = linear(module.up, wide, abs(x))
    before, size = linear(module.gate, wide, abs(x)) if gated else (up, up_size)
    hidden, hidden_size = f(before), size * (2 * abs(before) if slope is None else slope)
    if gated:
        hidden, hidden_size = hidden * up, hidden_size * abs(up) + abs(hidden) * up_size
    expected, magnitude = linear(module.down, hidden, hidden_size)
    assert_close(nnx.jit(lambda module, x: module(x))(module, x), expected, magnitude)


@pytest.mark.parametrize("width", [16, 96, 128])
def test_the_default_widths_give_both_kinds_about_the_same_number_of_parameters(width):
    def parameters(gated):
        module = nnx.eval_shape(lambda: FeedForward(width, gated=gated, rngs=nnx.Rngs(0)))
        return sum(np.prod(leaf.shape) for _, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)))

    assert parameters(False) == 8 * width**2
    # The gated one rounds its hidden width up to a multiple of 16: at most 15 more channels in each of three matrices.
    assert 0 <= parameters(True) - 8 * width**2 <= 3 * 16 * width


@pytest.mark.parametrize("hidden", [0, -1])
def test_no_width_is_refused(hidden):
    with pytest.raises(ValueError, match=f"hidden must be at least 1, got {hidden}"):
        FeedForward(16, hidden, rngs=nnx.Rngs(0))


def test_an_unknown_activation_is_refused():
    with pytest.raises(
        ValueError, match="activation is 'swish': need one of silu, gelu, gelu_tanh, relu, relu_squared"
    ):
        FeedForward(16, 24, activation="swish", rngs=nnx.Rngs(0))
