"""Attention on convolved queries, keys and values: what the convolution is, and where it stops."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import call
from multi_head import assert_close, randomise

from jaxattn import Causal, Documents, Window, attend, rotary
from jaxattn.nn import MultiHeadAttention

D, T, B = 16, 7, 2


@pytest.fixture(scope="module")
def module():
    return randomise(MultiHeadAttention(D, 4, key_heads=2, mask=Causal(), convolution=3, rngs=nnx.Rngs(0)))


def inputs():
    return np.random.default_rng(5).standard_normal((B, T, D)).astype(np.float32)


@nnx.jit(static_argnames="record")
def run(module, x, mask=None, record=()):
    y, _, records = call(module, x, mask=mask, record=record)
    return y, records


def test_it_is_attention_of_what_the_convolution_makes(module):
    """v_t = silu(w₀ ⊙ W x_t + w₁ ⊙ W x_{t−1} + w₂ ⊙ W x_{t−2}), and so q and k, which are then rotated."""
    x = inputs()
    before, expected = np.pad(x, ((0, 0), (2, 0), (0, 0))), {}
    for name in ("query", "key", "value"):
        taps, linear = np.asarray(module.convolution[name].weight[...]), getattr(module, name)
        y = sum(tap * np.asarray(linear(before[:, 2 - lag : 2 - lag + T])) for lag, tap in enumerate(taps))
        expected[name] = (y / (1 + np.exp(-y))).reshape(B, T, -1, 4)
    _, records = run(module, x, record=("q", "k", "v", "z"))
    for site, name in (("q", "query"), ("k", "key"), ("v", "value")):
        assert_close(records[site], expected[name])
    query, key = (rotary(expected[name], jnp.arange(T)) for name in ("query", "key"))
    assert_close(records["z"], attend(query, key, expected["value"], mask=Causal()))


def test_packed_documents_are_convolved_apart(module):
    x, ids = inputs(), jnp.array([[0, 0, 0, 1, 1, 1, 1]] * B)
    y, _ = run(module, x, Documents(ids))
    parts = [np.asarray(run(module, x[:, :3])[0]), np.asarray(call(module, x[:, 3:], positions=jnp.arange(3, T))[0])]
    assert_close(y, np.concatenate(parts, 1))


def test_what_a_convolution_cannot_tell_is_refused(module):
    x = jnp.zeros((B, T, D))
    with pytest.raises(ValueError, match="mask is Window: a recurrence or convolution takes None"):
        call(module, x, mask=Window(2))
    with pytest.raises(ValueError, match="mask has documents and a state is given"):
        call(module, x, mask=Documents(jnp.zeros(T, int)), state=module.init_state(B, T))
    with pytest.raises(ValueError, match="a convolution sees only tokens of one sequence"):
        call(MultiHeadAttention(D, 4, position=None, convolution=2, rngs=nnx.Rngs(0)), x, context=x)
    with pytest.raises(ValueError, match="convolution must be at least 1 token wide, got -1"):
        MultiHeadAttention(D, 4, convolution=-1, rngs=nnx.Rngs(0))
