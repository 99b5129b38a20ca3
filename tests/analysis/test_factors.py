"""QK and OV: products of what the model multiplies one after the other, and norms, singular values and eigenvalues of
products that are never formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import nn
from jaxattn.analysis import Factored, composition, copying, ov, qk
from jaxattn.models import Branch, Layer, Spec, Transformer, TransformerConfig

V, L, N, K, D, T = 11, 2, 4, 2, 24, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def made(norm, **options):
    attention = Spec(nn.MultiHeadAttention, heads=N, key_heads=K, head_dim=10, use_bias=True, **options)
    config = TransformerConfig(V, T, D, [Layer([Branch(attention, Spec(norm))])] * L, dtype="float64")
    model = Transformer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def noisy(x):
        return jnp.asarray(np.asarray(x, np.float64) + 0.3 * rng.standard_normal(x.shape))

    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    model.eval()
    return model


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_a_factored_matrix_is_the_product():
    a, b = Factored(drawn(3, 9, 4), drawn(3, 4, 7, seed=1)), Factored(drawn(3, 7, 2, seed=2), drawn(3, 2, 9, seed=3))
    whole = a.left @ a.right
    np.testing.assert_allclose(a.array, whole, **CLOSE)
    np.testing.assert_allclose(a.T.array, whole.swapaxes(1, 2), **CLOSE)
    np.testing.assert_allclose((a @ b).array, whole @ b.left @ b.right, **CLOSE)
    np.testing.assert_allclose((a @ drawn(7, 5)).array, whole @ drawn(7, 5), **CLOSE)
    np.testing.assert_allclose((drawn(5, 9) @ a).array, drawn(5, 9) @ whole, **CLOSE)
    np.testing.assert_allclose(a.norm(), np.linalg.norm(whole, axis=(1, 2)), **CLOSE)
    u, s, v = a.svd()
    np.testing.assert_allclose((u * s[:, None]) @ v, whole, **CLOSE)
    np.testing.assert_allclose(s, np.linalg.svd(whole)[1][:, :4], **CLOSE)
    np.testing.assert_allclose(u.swapaxes(1, 2) @ u, np.tile(np.eye(4), (3, 1, 1)), **CLOSE)
    large = np.sort(np.abs(np.linalg.eigvals((a @ b).array)))[:, -2:]
    np.testing.assert_allclose(np.sort(np.abs((a @ b).eigenvalues()))[:, -2:], large, **CLOSE)


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_scores_are_the_bilinear_form(norm):
    """With the biases: the recorded scores of the first layer, from the stream divided by its scale."""
    model = made(norm)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (1, T)))
    seen = model(tokens, record=("resid_pre", "mixer_norm_scale", "scores"))[2]
    x = (seen["resid_pre"] / seen["mixer_norm_scale"])[:, 0]  # [L, T, D]
    x = jnp.concatenate([x, jnp.ones((L, T, 1))], -1)
    for i, j in ((3, 3), (5, 2)):
        form = qk(model, offset=i - j, biases=True).array
        expected = jnp.einsum("ld,lnde,le->ln", x[:, i], form, x[:, j]) / np.sqrt(10)
        np.testing.assert_allclose(seen["scores"][:, 0, :, i, j], expected, **CLOSE)


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_what_heads_write_is_ov_of_what_they_read(norm):
    model = made(norm)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (1, T)))
    seen = model(tokens, record=("resid_pre", "mixer_norm_scale", "weights", "attn_out"))[2]
    x = (seen["resid_pre"] / seen["mixer_norm_scale"])[:, 0]
    x = jnp.concatenate([x, jnp.ones((L, T, 1))], -1)
    written = jnp.einsum("lnts,lsd,lnde->lte", seen["weights"][:, 0], x, ov(model, biases=True).array)[..., :-1]
    bias = model.runs[0].branches[0].module.out.bias[...]
    np.testing.assert_allclose(written + bias[:, None], seen["attn_out"][:, 0], **CLOSE)


def test_composition_is_that_of_the_products():
    model = made(nn.RMSNorm)
    writes, looks = ov(model), qk(model)
    for second in (looks, looks.T, writes):
        found = composition(writes, second)
        a, b = np.asarray(writes.array), np.asarray(second.array)
        products = np.einsum("lnde,mkef->lnmkdf", a, b)
        norms = np.linalg.norm(a, axis=(-1, -2))[:, :, None, None] * np.linalg.norm(b, axis=(-1, -2))
        np.testing.assert_allclose(found, np.linalg.norm(products, axis=(-1, -2)) / norms, **CLOSE)


def test_random_matrices_compose_by_the_root_of_the_width():
    """The mean over 40 pairs of rank 16 at width 64 is 1/8 to 2 %: each pair varies by about 1/16 of it."""
    a, b = (Factored(drawn(40, 64, 16, seed=s), drawn(40, 16, 64, seed=s + 1)) for s in (0, 2))
    np.testing.assert_allclose(np.mean(composition(a, b)), 1 / 8, rtol=0.02)


def test_a_head_that_copies_scores_1():
    """W_V W_O = ±W_Wᵀ makes the vocabulary map ±E W Wᵀ Eᵀ, whose eigenvalues have one sign; the real model is dense."""
    model = made(nn.RMSNorm)
    expected = np.zeros((L, N))
    table, gain = np.asarray(model.embed.table[...]), np.asarray(model.norm.scale[...])
    unembed = gain[:, None] * (table.T if model.head.map is None else np.asarray(model.head.map.kernel[...]))
    for place in np.ndindex(L, N):
        values = np.linalg.eigvals(table @ np.asarray(ov(model).array)[place] @ unembed)
        expected[place] = values.real.sum() / np.abs(values).sum()
    np.testing.assert_allclose(copying(model), expected, rtol=1e-6)
    assert (np.abs(expected) < 1).all()


def test_models_without_such_heads_are_refused():
    layer = Layer([Branch(Spec(nn.FeedForward, hidden=8), Spec(nn.RMSNorm))])
    with pytest.raises(ValueError, match="need one in every layer"):
        ov(Transformer(TransformerConfig(V, T, D, [layer]), rngs=nnx.Rngs(0)))
