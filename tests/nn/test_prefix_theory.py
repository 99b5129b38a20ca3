"""What a prefix can change: it takes a share of every row and adds its value, and leaves the rest in proportion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import Causal, attend, nn
from jaxattn.core.attend import attention_weights

D, N, T = 12, 3, 5


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("prefixes", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_a_prefix_mixes_its_values_with_what_was_read_before(x64, prefixes, scale):
    """out = (1 − α) a V + Σ α_p v_p, with a share α of each row that is the prefix's own."""
    rng = np.random.default_rng(prefixes)
    query, key, value = (jnp.asarray(rng.normal(size=(T, N, 4))) for _ in range(3))
    own_key, own_value = (
        scale * jnp.asarray(rng.normal(size=(prefixes, N, 4))),
        jnp.asarray(rng.normal(size=(prefixes, N, 4))),
    )
    keys, values = jnp.concatenate([own_key, key]), jnp.concatenate([own_value, value])
    places = jnp.concatenate([jnp.zeros(prefixes, int), jnp.arange(T)])  # every query sees the prefix
    given = {"mask": Causal(), "key_positions": places}
    weights = attention_weights(query, keys, **given)[0]
    plain = attention_weights(query, key, mask=Causal())[0]
    share = weights[..., :prefixes].sum(-1, keepdims=True)
    np.testing.assert_allclose(weights[..., prefixes:], (1 - share) * plain, rtol=0, atol=1e-14)
    read = jnp.einsum("ntp,pnv->tnv", weights[..., :prefixes], own_value)
    expected = (1 - share).transpose(1, 0, 2) * attend(query, key, value, mask=Causal()) + read
    np.testing.assert_allclose(attend(query, keys, values, **given), expected, rtol=0, atol=1e-13)


def weights_of(mixer, x):
    tap = nn.Tap(record=("weights",))
    mixer(x, tap=tap)
    return np.asarray(tap.records["weights"], np.float64)


@pytest.mark.parametrize("size", [0.0, 1.0, 100.0])
def test_no_prefix_of_a_layer_changes_the_proportions_of_its_attention(size):
    """Logs of weights on the tokens, without and with a prefix, differ by one number per query and head."""
    layer = nn.MultiHeadAttention(D, N, position=None, rngs=nnx.Rngs(0))
    prefixed = nn.Prefixed(layer, D, 4, rngs=nnx.Rngs(1))
    prefixed.prefix[...] = size * prefixed.prefix[...]
    x = jax.random.normal(jax.random.key(0), (2, T, D))
    plain, changed = (weights_of(mixer, x) for mixer in (layer, prefixed))
    changed = changed[..., 4:, 4:]
    kept = changed.sum(-1, keepdims=True)
    shares = np.where(kept > 1e-30, changed / np.where(kept > 1e-30, kept, 1), plain)
    np.testing.assert_allclose(shares, plain, rtol=1e-4, atol=1e-6)
