"""QK and OV: products of what the model multiplies one after the other, and norms, singular values and eigenvalues of
products that are never formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import nn
from jaxattn.analysis import Factored, composition, copying, ov, qk
from jaxattn.core.attend.position import Rotary, Yarn
from jaxattn.core.attend.score import NegativeDistance
from jaxattn.models import Branch, Layer, Spec, Transformer, TransformerConfig

V, L, N, K, D, T = 11, 2, 4, 2, 24, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def made(norm, **options):
    attention = Spec(nn.MultiHeadAttention, heads=N, key_heads=K, head_dim=10, use_bias=True, **options)
    return noised(TransformerConfig(V, T, D, [Layer([Branch(attention, Spec(norm))])] * L, dtype="float64"))


def noised(config):
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


def several():
    """Layers with LayerScale and some channels rotated, and with scaled rotary positions and a norm behind."""
    half, scaled = Rotary(10000.0, fraction=0.4), Rotary(100.0, scaling=Yarn(4.0, 16))
    first, second = (
        Spec(nn.MultiHeadAttention, heads=N, key_heads=K, head_dim=10, use_bias=True, position=position)
        for position in (half, scaled)
    )
    norm = Spec(nn.LayerNorm)
    layers = [Layer([Branch(first, norm, scale=0.5)]), Layer([Branch(second, norm, norm_after=norm)])]
    return noised(TransformerConfig(V, T, D, layers, dtype="float64"))


def shared():
    """Two layers with one set of parameters."""
    layer = Layer([Branch(Spec(nn.MultiHeadAttention, heads=N, key_heads=K, head_dim=10, use_bias=True), scale=0.5)])
    return noised(TransformerConfig(V, T, D, [layer] * L, shared=True, dtype="float64"))


MODELS = {
    "rms": lambda: made(nn.RMSNorm),
    "layer norm": lambda: made(nn.LayerNorm),
    "several": several,
    "shared": shared,
}


@pytest.mark.parametrize("kind", MODELS)
def test_scores_and_writes_are_those_of_the_matrices(kind):
    """With the biases, from the stream divided by its scale. A norm behind attention divides by a scale of its own, so
    that of what it writes only the direction is known."""
    model = MODELS[kind]()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (1, T)))
    record = ("resid_pre", "mixer_norm_scale", "scores", "weights", "attn_out")
    seen = jax.tree.map(lambda x: np.asarray(x)[:, 0], model(tokens, record=record)[2])
    x = np.concatenate([seen["resid_pre"] / seen["mixer_norm_scale"], np.ones((L, T, 1))], -1)
    for i, j in ((3, 3), (5, 2), (2, 5)):
        form = qk(model, offset=i - j, biases=True).array
        expected = np.einsum("ld,lnde,le->ln", x[:, i], form, x[:, j]) / np.sqrt(10)
        np.testing.assert_allclose(seen["scores"][:, :, i, j], np.where(i < j, -np.inf, expected), **CLOSE)
    written = np.einsum("lnts,lsd,lnde->lte", seen["weights"], x, ov(model, biases=True).array)[..., :-1]
    for layer in range(L):
        run, place = (model.runs[layer], 0) if len(model.runs) > 1 else (model.runs[0], layer)
        (branch,) = run.branches
        bias, out = np.asarray(branch.module.out.bias[...][0 if kind == "shared" else place]), seen["attn_out"][layer]
        if branch.scale is not None:
            bias = bias * branch.scale[...][0 if kind == "shared" else place]
        found = written[layer] + bias
        if branch.norm_after is not None:
            found = written[layer] + (bias - bias.mean()) * branch.norm_after.scale[...][0]
            out = out - branch.norm_after.bias[...][0]
            found, out = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (found, out))
        np.testing.assert_allclose(found, out, **CLOSE)


def test_keys_behind_the_query_have_the_score_of_their_distance():
    """qk at −Δ is the score of an encoder, which rotates the other way round."""
    model = made(nn.RMSNorm)
    query, key = (np.asarray(getattr(model.runs[0].branches[0].module, name).kernel[...]) for name in ("query", "key"))
    gain = np.asarray(model.runs[0].branches[0].norm.scale[...])[..., None]
    angle = 3 * 10000.0 ** (-np.arange(5) / 5)
    cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
    turn = np.block([[cos, sin], [-sin, cos]])
    q, k = (x.reshape(L, D, -1, 10) for x in (gain * query, gain * key))
    k = np.repeat(k, N // K, 2)
    for offset, matrix in ((3, turn), (-3, turn.T)):
        expected = np.einsum("ldnh,hg,leng->lnde", q, matrix, k)
        np.testing.assert_allclose(qk(model, offset=offset).array, expected, **CLOSE)


@pytest.mark.parametrize(
    ("function", "options", "error"),
    [
        (qk, {"qk_norm": Spec(nn.RMSNorm)}, "norms its queries and keys"),
        (qk, {"convolution": 3}, "has a convolution"),
        (qk, {"score": NegativeDistance()}, "a score other than Dot"),
        (ov, {"gate": True}, "has a gate"),
    ],
)
def test_heads_that_are_no_matrix_are_refused(function, options, error):
    model = made(nn.RMSNorm, **options)
    with pytest.raises(ValueError, match=error):
        function(model)
    other = qk if function is ov else ov
    assert "convolution" in options or other(model).array.shape == (L, N, D, D)


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


def test_a_narrow_embedding_with_a_norm_is_read_as_tokens_write_it():
    attention = Spec(nn.MultiHeadAttention, heads=N, key_heads=K, head_dim=10)
    layers, norm = [Layer([Branch(attention)])] * L, Spec(nn.LayerNorm)
    options = {"embed_width": 14, "embed_norm": norm, "head": Spec(nn.Head, tied=False), "dtype": "float64"}
    model = noised(TransformerConfig(V, T, D, layers, **options))
    written = model(jnp.arange(V)[:, None], record=("embed",))[2]["embed"][:, 0]
    expected, unembed = np.zeros((L, N)), model.norm.scale[...][:, None] * model.head.map.kernel[...]
    for place in np.ndindex(L, N):
        values = np.linalg.eigvals(np.asarray(written @ ov(model).array[place] @ unembed))
        expected[place] = values.real.sum() / np.abs(values).sum()
    np.testing.assert_allclose(copying(model), expected, rtol=1e-6)


def test_models_without_such_heads_are_refused():
    layer = Layer([Branch(Spec(nn.FeedForward, hidden=8), Spec(nn.RMSNorm))])
    with pytest.raises(ValueError, match="need one in every layer"):
        ov(Transformer(TransformerConfig(V, T, D, [layer]), rngs=nnx.Rngs(0)))


def test_maps_without_a_bias_have_one_of_zero():
    """Of several layers, as keys in Whisper: the further row and column of QK, and of OV, are 0."""
    attention = Spec(nn.MultiHeadAttention, heads=N, key_heads=K, head_dim=10)
    model = noised(TransformerConfig(V, T, D, [Layer([Branch(attention, Spec(nn.RMSNorm))])] * L, dtype="float64"))
    for function in (qk, ov):
        wide = np.asarray(function(model, biases=True).array)
        assert wide.shape == (L, N, D + 1, D + 1)
        np.testing.assert_allclose(wide[..., :-1, :-1], function(model).array, **CLOSE)
        assert abs(wide[..., -1, :]).max() == abs(wide[..., -1]).max() == 0
