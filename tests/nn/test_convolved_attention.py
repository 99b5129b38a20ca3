"""Attention on convolved queries, keys and values, or on smeared keys: what they are, and where they stop."""

import jax
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


@pytest.fixture(scope="module")
def smeared():
    return randomise(MultiHeadAttention(D, 4, key_heads=2, mask=Causal(), smear=True, rngs=nnx.Rngs(0)))


def test_smeared_keys_are_mixed_with_those_of_the_token_before(smeared):
    """k_t = s W x_t + (1 − s) W x_{t−1} in each head, in float64, from 0 before the first; q and v are as they were."""
    x = inputs()
    share = 1 / (1 + np.exp(-np.asarray(smeared.convolution["key"].logit[...], np.float64)))
    assert share.shape == (2,)
    plain = {name: np.asarray(getattr(smeared, name)(x)) for name in ("query", "key", "value")}
    key = plain["key"].astype(np.float64).reshape(B, T, 2, 4)
    expected = np.zeros((B, T, 2, 4))
    for t in range(T):
        for head, s in enumerate(share):
            expected[:, t, head] = s * key[:, t, head] + (1 - s) * (key[:, t - 1, head] if t else 0)
    _, records = run(smeared, x, record=("q", "k", "v", "k_rotated", "z"))
    assert_close(records["k"], expected)
    assert_close(records["k_rotated"], rotary(records["k"], jnp.arange(T)))
    assert_close(records["q"], plain["query"].reshape(B, T, 4, 4))
    assert_close(records["v"], plain["value"].reshape(B, T, 2, 4))


def test_keys_that_are_not_smeared_are_those_of_plain_attention():
    """At s = 1 it is the module without, and with s = 0 a key is the one before."""
    x, plain = inputs(), MultiHeadAttention(D, 4, mask=Causal(), rngs=nnx.Rngs(0))
    module = MultiHeadAttention(D, 4, mask=Causal(), smear=True, rngs=nnx.Rngs(0))
    assert (module.convolution["key"].weight == 0.5).all()
    module.convolution["key"].logit[...] = jnp.full(4, 100.0)
    assert_close(run(module, x)[0], run(plain, x)[0])
    module.convolution["key"].logit[...] = jnp.full(4, -200.0)
    _, records = run(module, x, record=("k",))
    assert_close(records["k"][:, 1:], plain.key(x).reshape(B, T, 4, 4)[:, :-1])
    assert (records["k"][:, 0] == 0).all()


def test_one_layer_of_keys_of_the_token_before_continues_what_it_has_seen():
    """Queries of the current token meet keys of the token before and read the token there: an induction head."""
    vocabulary = 8
    module = MultiHeadAttention(
        vocabulary, 1, head_dim=vocabulary, position=None, mask=Causal(), smear=True, rngs=nnx.Rngs(0)
    )
    for name, scale in (("query", 200.0), ("key", 1.0), ("value", 1.0), ("out", 1.0)):
        getattr(module, name).kernel[...] = scale * jnp.eye(vocabulary)
    module.convolution["key"].logit[...] = jnp.full(1, -200.0)
    tokens = np.tile([7, 3, 0, 5, 2, 1, 6, 4], 2)
    y, _ = run(module, jax.nn.one_hot(tokens, vocabulary)[None])
    np.testing.assert_array_equal(np.asarray(y[0, 8:-1]).argmax(-1), tokens[9:])


def test_packed_documents_are_smeared_apart(smeared):
    x, ids = inputs(), jnp.array([[0, 0, 0, 1, 1, 1, 1]] * B)
    y, _ = run(smeared, x, Documents(ids))
    parts = [np.asarray(run(smeared, x[:, :3])[0]), np.asarray(call(smeared, x[:, 3:], positions=jnp.arange(3, T))[0])]
    assert_close(y, np.concatenate(parts, 1))


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
    with pytest.raises(ValueError, match="smear is True and convolution 3: need one of them"):
        MultiHeadAttention(D, 4, convolution=3, smear=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="smear is True but keys_from is 'context': need keys of x"):
        MultiHeadAttention(D, 4, keys_from="context", position=None, smear=True, rngs=nnx.Rngs(0))
