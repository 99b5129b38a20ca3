"""dot_product_attention is that of jax.nn, with its options, and serves Flax's modules as attention_fn."""

import inspect

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxattn

B, T, S, N, K, H = 2, 7, 7, 4, 2, 8
rng = np.random.default_rng(0)
QUERY, KEY, VALUE = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))
MASK = rng.random((B, 1, T, S)) < 0.7
MASK[..., 0] = True
EPS = np.finfo(np.float32).eps

OPTIONS = {
    "nothing": {},
    "bias": {"bias": rng.normal(size=(1, N, T, S)).astype(np.float32)},
    "mask": {"mask": MASK},
    "mask of keys": {"mask": MASK[:, :, :1]},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "causal and masked": {"is_causal": True, "mask": MASK, "bias": rng.normal(size=(B, 1, T, 1)).astype(np.float32)},
    "window": {"local_window_size": 2},
    "left window": {"local_window_size": (3, 1), "is_causal": True},
    "key lengths": {"key_value_seq_lengths": np.array([3, 7])},
    "no grouping": {"is_causal": True},
}


def both(name):
    key, value = (jnp.repeat(x, 2, -2) if name == "no grouping" else x for x in (KEY, VALUE))
    results = []
    for call in (jaxattn.dot_product_attention, jax.nn.dot_product_attention):

        @jax.jit
        def run(*arrays, call=call):
            out, pull = jax.vjp(lambda *arrays: call(*arrays, **OPTIONS[name]), *arrays)
            return out, *pull(jnp.cos(out))

        results.append(run(QUERY, key, value))
    return results


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_that_of_jax_with_its_gradients(name):
    for x, y in zip(*both(name), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=200 * EPS * max(1, np.abs(y).max()))


def test_lengths_of_queries_the_residual_and_one_sequence():
    lengths = np.array([3, 7])
    out, lse = jaxattn.dot_product_attention(QUERY, KEY, VALUE, query_seq_lengths=lengths, return_residual=True)
    expected, residual = jax.nn.dot_product_attention(
        QUERY, KEY, VALUE, query_seq_lengths=lengths, return_residual=True
    )
    there = np.arange(T) < lengths[:, None]
    np.testing.assert_allclose(out[there], expected[there], atol=100 * EPS)
    np.testing.assert_allclose(lse[there], residual[there], atol=100 * EPS)
    np.testing.assert_array_equal(out[~there], 0)
    alone = jaxattn.dot_product_attention(QUERY[0], KEY[0], VALUE[0], query_seq_lengths=lengths[:1], mask=MASK[0])
    assert alone.shape == (T, N, H)


def test_a_row_that_sees_nothing_is_zero():
    mask = np.ones((1, 1, T, S), bool)
    mask[..., 2, :] = False
    out = jaxattn.dot_product_attention(QUERY, KEY, VALUE, mask=mask)
    np.testing.assert_array_equal(out[:, 2], 0)
    assert jnp.abs(jax.nn.dot_product_attention(QUERY, KEY, VALUE, mask=mask)[:, 2]).min() > 0


@pytest.mark.parametrize("shape", [(T, S), (1, S), (N, T, S), (B, 1, 1, S), (B, N, T, S), (1, 1, T, 1)], ids=str)
def test_masks_of_every_shape_of_booleans_or_of_zeros_and_ones(shape):
    mask = np.random.default_rng(1).random(shape) < 0.6
    full = np.broadcast_to(mask, (B, N, T, S))
    expected = jaxattn.dot_product_attention(QUERY, KEY, VALUE, mask=full)
    for dtype in (bool, np.float32, np.int32):
        found = jaxattn.dot_product_attention(QUERY, KEY, VALUE, mask=mask.astype(dtype))
        np.testing.assert_allclose(found, expected, atol=100 * EPS)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"mask": np.ones((B, N, T, S + 1), bool)}, ValueError, r"mask has shape \(2, 4, 7, 8\): need one that broad"),
        ({"mask": np.full((T, S), -1e9)}, ValueError, "mask is float.* an additive mask is a bias"),
        ({"mask": [[True]]}, TypeError, "mask must be an array, got list"),
        ({"bias": np.zeros((3, 1, T, S), np.float32)}, ValueError, r"bias has shape \(3, 1, 7, 7\)"),
        ({"bias": np.zeros((T, S), bool)}, TypeError, "bias has dtype bool: need floating point"),
        ({"local_window_size": (1, 2, 3)}, ValueError, r"local_window_size is \(1, 2, 3\): need one number, or"),
        ({"key_value_seq_lengths": np.zeros((3,), int)}, ValueError, r"key_value_seq_lengths is int64\[3\]: need"),
        ({"query_seq_lengths": np.zeros((2,))}, ValueError, r"query_seq_lengths is float64\[2\]: need integers \[2\]"),
        ({"dropout_rate": 0.5}, ValueError, "dropout_rng is None and dropout_rate is 0.5"),
        ({"qk_attn_weights_einsum": jnp.einsum}, NotImplementedError, "qk_attn_weights_einsum is given"),
        ({"attn_weights_value_einsum": jnp.einsum}, NotImplementedError, "attn_weights_value_einsum is given"),
    ],
    ids=lambda x: "",
)
def test_bad_input_is_named(options, kind, message):
    with pytest.raises(kind, match=message):
        jaxattn.dot_product_attention(QUERY, KEY, VALUE, **options)


# Flax.


def test_it_takes_every_argument_that_flax_passes():
    """Linen drops what is not in the signature: behind **kwargs its dropout would be off without a word."""
    ours = inspect.signature(jaxattn.dot_product_attention).parameters
    for flax_call in (linen.dot_product_attention, nnx.dot_product_attention):
        passed = set(inspect.signature(flax_call).parameters) - {"force_fp32_for_softmax", "einsum_dot_general"}
        assert passed <= set(ours)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_a_module_of_nnx_with_it_is_the_module_without():
    x = jnp.asarray(rng.normal(size=(B, T, 16)), jnp.float32)

    def module(**options):
        return nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0), **options)

    for mask in (None, nnx.make_causal_mask(jnp.ones((B, T))), jnp.asarray(MASK, jnp.float32)):
        plain, ours = module(), module(attention_fn=jaxattn.dot_product_attention)
        np.testing.assert_allclose(ours(x, mask=mask), plain(x, mask=mask), atol=200 * EPS)
        ours(x, mask=mask, sow_weights=True), plain(x, mask=mask, sow_weights=True)
        found, expected = (nnx.pop(each, nnx.Intermediate)["attention_weights"].get_value() for each in (ours, plain))
        np.testing.assert_allclose(found[0], expected[0], atol=100 * EPS)


def test_a_module_of_linen_with_it_is_the_module_without():
    x = jnp.asarray(rng.normal(size=(B, T, 16)), jnp.float32)
    plain = linen.MultiHeadDotProductAttention(num_heads=4)
    ours = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=jaxattn.dot_product_attention)
    params = plain.init(jax.random.key(0), x)
    mask = linen.make_causal_mask(jnp.ones((B, T)))
    for call in ({"mask": mask}, {}, {"mask": mask, "dtype": jnp.bfloat16}):
        dtype = call.pop("dtype", None)
        a, b = (each.clone(dtype=dtype).apply(params, x, **call) for each in (ours, plain))
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=(200 * EPS if dtype is None else 2**-6))
    (_, found), (_, expected) = (
        each.apply(params, x, mask=mask, sow_weights=True, mutable=["intermediates"]) for each in (ours, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=100 * EPS)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_of_flax_modules_is_on_and_shared_if_it_is_to_be(broadcast):
    """By values that tell which pairs were dropped: the identity."""
    eye = jnp.broadcast_to(jnp.eye(64)[:, None], (B, 64, N, 64))
    query = jnp.zeros((B, 64, N, 4))
    options = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.25, "broadcast_dropout": broadcast}
    weights = jaxattn.dot_product_attention(query, jnp.zeros((B, 64, N, 4)), eye, **options)
    kept = np.asarray(weights) > 0
    np.testing.assert_allclose(weights[kept], 1 / 64 / 0.75, rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / (64 * 64 * (1 if broadcast else B * N)))
    same = (kept == kept[:1, :, :1]).all()
    assert same == broadcast
    off = jaxattn.dot_product_attention(query, jnp.zeros((B, 64, N, 4)), eye, deterministic=True, **options)
    assert (off > 0).all()
    x = jnp.ones((B, T, 16))
    module = linen.MultiHeadDotProductAttention(
        num_heads=4, dropout_rate=0.5, broadcast_dropout=broadcast, attention_fn=jaxattn.dot_product_attention
    )
    params = module.init(jax.random.key(0), x, deterministic=True)
    dropped = module.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(2)})
    assert (dropped != module.apply(params, x, deterministic=True)).any()
