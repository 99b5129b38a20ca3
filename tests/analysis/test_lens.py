"""Lenses and direct attribution: what the stream says in the vocabulary, and sums that close."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn import nn
from jaxattn.analysis import TunedLens, direct_attribution, lens, lens_loss
from jaxattn.models import Branch, Layer, Spec, Transformer, TransformerConfig, pre_norm

V, L, N, D, B, T = 11, 3, 4, 24, 2, 7
ATTENTION = Spec(nn.MultiHeadAttention, heads=N, key_heads=2, head_dim=10, use_bias=True)
FEED = Spec(nn.FeedForward, hidden=18, use_bias=True)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def made(layer, norm=nn.RMSNorm, **head):
    return noised(TransformerConfig(V, T, D, [layer] * L, dtype="float64", norm=Spec(norm), head=Spec(nn.Head, **head)))


def noised(config):
    model = Transformer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def noisy(x):
        dtype = np.float64 if config.dtype == "float64" else np.float32
        return jnp.asarray(np.asarray(x, dtype) + 0.3 * rng.standard_normal(x.shape).astype(dtype))

    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    model.eval()
    return model


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (B, T)))


def difference(logits):
    return (logits[:, -1, 3] - logits[:, -1, 5]).sum() + logits[0, 2, 1]


def test_the_lens_is_the_norm_and_the_head():
    model = made(pre_norm(ATTENTION, FEED), use_bias=True)
    found = lens(model, tokens(), lambda logits: logits)
    logits, _, seen = model(tokens(), record=("resid_pre",))
    assert found.shape == (L + 1, B, T, V)
    np.testing.assert_allclose(found[-1], logits, rtol=1e-10)
    x = np.asarray(seen["resid_pre"])
    root = np.sqrt((x**2).mean(-1, keepdims=True) + model.norm.eps)
    expected = (x / root * model.norm.scale[...]) @ model.head.map.kernel[...] + model.head.bias[...]
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-9, atol=1e-12)


def test_a_tuned_lens_begins_as_the_lens_and_learns():
    model = made(pre_norm(ATTENTION, FEED))
    tuned = TunedLens.zero(L, D)
    plain = lens_loss(tuned, model, tokens())
    target = jax.nn.log_softmax(model(tokens())[0])
    expected = (jnp.exp(target) * (target - lens(model, tokens())[:-1])).sum(-1).mean((1, 2))
    np.testing.assert_allclose(plain, expected, rtol=1e-9)
    adam = optax.adam(3e-3)

    @jax.jit
    def step(carry, _):
        tuned, state = carry
        update, state = adam.update(jax.grad(lambda t: lens_loss(t, model, tokens()).sum())(tuned), state)
        return (optax.apply_updates(tuned, update), state), None

    (tuned, _), _ = jax.lax.scan(step, (tuned, adam.init(tuned)), length=60)
    assert (lens_loss(tuned, model, tokens()) < 0.8 * plain).all()
    best = lens(model, tokens(), lambda x: jax.lax.top_k(x, 2), tuned=tuned)
    assert best[0].shape == best[1].shape == (L + 1, B, T, 2)


@pytest.mark.parametrize(
    ("norm", "layer"),
    [
        (nn.RMSNorm, pre_norm(ATTENTION, FEED)),
        (
            nn.LayerNorm,
            Layer([Branch(each, Spec(nn.LayerNorm), scale=0.3) for each in (ATTENTION, FEED)], parallel=True),
        ),
        (nn.RMSNorm, Layer([Branch(ATTENTION, Spec(nn.RMSNorm))])),
    ],
)
def test_parts_add_up_to_the_metric(norm, layer):
    model = made(layer, norm, use_bias=True)
    found = direct_attribution(model, tokens(), difference, sources=True)
    np.testing.assert_allclose(found.total(), difference(model(tokens())[0]), rtol=1e-10)
    np.testing.assert_allclose(found.sources.sum(-1), jnp.moveaxis(found.heads, -1, 2).sum(-1), rtol=1e-8, atol=1e-12)
    assert found.heads.shape == (L, B, T, N)
    assert found.mlp.shape == found.attention_bias.shape == (L, B, T)


def test_the_part_of_a_head_is_what_the_metric_loses_without_it():
    """In the last layer, where nothing else reads it, with the scale of the last norm as it was."""
    model = made(Layer([Branch(ATTENTION, Spec(nn.RMSNorm))]))
    from jaxattn import trace

    kept = model(tokens(), record=("final_norm_scale",))[2]["final_norm_scale"]
    found = direct_attribution(model, tokens(), difference)
    for head in range(N):
        edits = {"z": {L - 1: trace.Scale(1 - jnp.eye(N)[head][:, None])}, "final_norm_scale": trace.Put(kept)}
        lost = difference(model(tokens())[0]) - difference(model(tokens(), edits=edits)[0])
        np.testing.assert_allclose(found.heads[-1, ..., head].sum(), lost, rtol=1e-9)


def test_padding_has_no_part():
    model = made(pre_norm(ATTENTION, FEED))
    places = jnp.stack([jnp.arange(T) - 2, jnp.arange(T)]).clip(-1)
    found = direct_attribution(model, tokens(), difference, positions=places, sources=True)
    np.testing.assert_allclose(found.total(), difference(model(tokens(), positions=places)[0]), rtol=1e-10)
    assert abs(found.sources[:, 0, :, :2]).max() == 0


@pytest.mark.parametrize(
    ("dtype", "layers", "rounding"), [pytest.param("float32", 30, 1e-5, marks=pytest.mark.slow), ("bfloat16", L, 2e-2)]
)
def test_parts_add_up_to_rounding(dtype, layers, rounding):
    """Beside the largest part: 2^-9 for every number of bfloat16, and 2^-24 for every sum of float32."""
    with jax.enable_x64(False):
        model = noised(TransformerConfig(V, T, D, [pre_norm(ATTENTION, FEED)] * layers, dtype=dtype))
        found = direct_attribution(model, tokens(), difference, sources=True)
        assert {x.dtype for x in found} == {jnp.dtype("float32")}
        largest = max(abs(x).sum() for x in (found.embed, found.heads, found.mlp))
        assert abs(found.total() - difference(model(tokens())[0])) < rounding * largest
        by_source, by_head = found.sources.sum(-1), jnp.moveaxis(found.heads, -1, 2).sum(-1)
        np.testing.assert_allclose(by_source, by_head, atol=rounding * abs(by_head).max())
        if dtype == "float32":
            return
        gated = Spec(nn.MultiHeadAttention, heads=N, gate=True)
        model = noised(TransformerConfig(V, T, D, [pre_norm(gated, FEED)] * L, dtype=dtype))
        with pytest.raises(ValueError, match="without a gate"):
            direct_attribution(model, tokens(), difference)


@pytest.mark.slow
def test_under_jit_the_parts_are_the_same():
    model = made(pre_norm(ATTENTION, FEED))
    inside = jax.jit(lambda x: direct_attribution(model, x, difference))(tokens())
    np.testing.assert_allclose(inside.heads, direct_attribution(model, tokens(), difference).heads, rtol=1e-10)


@pytest.mark.slow
def test_what_is_no_sum_is_refused():
    with pytest.raises(ValueError, match=r"metric has the shape \(2,\): need one number"):
        direct_attribution(made(pre_norm(ATTENTION, FEED)), tokens(), lambda logits: logits[:, -1, 3])
    with pytest.raises(ValueError, match="the metric is nan: need logits that are numbers"):
        direct_attribution(made(pre_norm(ATTENTION, FEED)), tokens().at[0, 0].set(V), difference)
    with pytest.raises(ValueError, match="no site 'z'"):
        direct_attribution(made(Layer([Branch(FEED)])), tokens(), difference)
    own = noised(TransformerConfig(V, T, D, [pre_norm(ATTENTION, FEED)], meta_tokens=2))
    with pytest.raises(ValueError, match="tokens of its own"):
        direct_attribution(own, tokens(), difference)
    capped = made(pre_norm(ATTENTION, FEED), cap=2.0)
    with pytest.raises(ValueError, match="linear in the logits"):
        direct_attribution(capped, tokens(), difference)
    with pytest.raises(ValueError, match="the parts add up to"):
        direct_attribution(made(pre_norm(ATTENTION, FEED)), tokens(), lambda x: jnp.square(x).sum())
    behind = Layer([Branch(each, Spec(nn.RMSNorm), norm_after=Spec(nn.RMSNorm)) for each in (ATTENTION, FEED)])
    with pytest.raises(ValueError, match="without a norm behind attention"):
        direct_attribution(made(behind), tokens(), difference)
