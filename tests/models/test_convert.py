"""A decoder whose attention became linear: the same parameters, features fitted to its maps, and what it decodes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn import Alibi, Causal, Documents, Sigmoid, Window, nn
from jaxattn.models import (
    Spec,
    Transformer,
    TransformerConfig,
    from_plain,
    linearize,
    matching_loss,
    pre_norm,
    to_plain,
)
from jaxattn.train import language_loss

B, T, V, D = 2, 12, 11, 16
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, V)
IDS = jnp.array([[0] * 5 + [1] * 7, [0] * 10 + [-1] * 2])
BATCH = {"tokens": TOKENS, "documents": IDS, "targets": TOKENS, "weights": (IDS >= 0).astype(jnp.float32)}
FULL = Spec(nn.MultiHeadAttention, heads=4, key_heads=2, qk_norm=Spec(nn.RMSNorm), gate=True)
NEAR = Spec(nn.MultiHeadAttention, heads=4, mask=Window(3))


def decoder(*mixers):
    """With queries and keys of a few units, so that attention is not flat."""
    model = Transformer(
        TransformerConfig(V, 32, D, [pre_norm(mixer, Spec(nn.FeedForward, hidden=8)) for mixer in mixers]),
        rngs=nnx.Rngs(0),
    )
    for run in model.runs:
        run.mixers[0].query.kernel[...] *= 4
    return model


def assert_close(actual, expected):
    """Within 1000 float32 roundings of the largest: some layers of products and norms."""
    atol = 1000 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_conversion_keeps_every_parameter_and_all_that_is_no_causal_attention():
    model = decoder(FULL, FULL, NEAR)
    converted = linearize(model)
    kinds = [layer.branches[0].module.target for layer in converted.config.layers]
    assert kinds == [nn.Linearized, nn.Linearized, nn.MultiHeadAttention]
    assert from_plain(to_plain(converted.config)) == converted.config
    before = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    after = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(converted, nnx.Param))}
    wrapped = ("mechanism", "attention")
    kept = {tuple(x for x in path if x not in wrapped): y for path, y in after.items() if "feature_map" not in path}
    assert kept.keys() == before.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(kept[path], leaf)


def test_a_linearised_layer_reads_by_its_features():
    """softmax(q Wq) · softmax(k Wk) and the same of the negatives, after rotation, over their sum."""
    model = linearize(decoder(FULL))
    layer = nn.as_mixer(
        Spec(nn.Linearized, attention=FULL.replace(mask=Causal())), features=D, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    nnx.update(layer, jax.tree.map(lambda x: x[0], nnx.state(model.runs[0].mixers[0])))
    m, x = layer.mechanism, jax.random.normal(jax.random.key(1), (B, T, D))
    q = m.attention.turn(m.attention.queries(x), jnp.arange(T))
    k, v = m.attention.keys_and_values(x)
    k, v = (jnp.repeat(y, 2, 2) for y in (m.attention.turn(k, jnp.arange(T)), v))

    def features(y):
        parts = [np.exp(np.asarray(sign * y, np.float64)) for sign in (1, -1)]
        return np.concatenate([part / part.sum(-1, keepdims=True) for part in parts], -1)

    kernel = np.einsum("btnf,bsnf->bnts", features(q), features(k)) * np.tri(T)
    z = np.einsum("bnts,bsnv->btnv", kernel / kernel.sum(-1, keepdims=True), v).reshape(B, T, D)
    gate = np.asarray(m.attention.gate(x), np.float64)
    assert_close(layer(x)[0], z / (1 + np.exp(-gate)) @ np.asarray(m.attention.out.kernel[...], np.float64))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_matching_is_the_cross_entropy_of_the_attention_maps_and_training_lowers_it():
    model = decoder(FULL, NEAR, FULL)
    params, loss_fn = matching_loss(linearize(model), model)
    assert all("feature_map" in path for path, _ in nnx.to_flat_state(params))
    total, sums = loss_fn(params, BATCH, None)
    assert sums["weight"] == (IDS >= 0).sum() == 22

    _, _, records = model(TOKENS, mask=Documents(IDS), record=("embed", "resid"))
    there = (IDS >= 0)[:, None, :, None]
    shown = np.asarray(np.tri(T, dtype=bool) & (IDS[:, None, :, None] == IDS[:, None, None]) & there)
    rows = np.broadcast_to(there[..., 0], (B, 4, T))
    divergences = []
    for run, x in ((model.runs[0], records["embed"]), (model.runs[2], records["resid"][1])):
        attention = nn.as_mixer(FULL, features=D, dtype=jnp.float32, rngs=nnx.Rngs(0))
        nnx.update(attention, jax.tree.map(lambda leaf: leaf[0], nnx.state(run.mixers[0])))
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * run.branches[0].norm.scale[0]
        q, k = attention.queries(x), jnp.repeat(attention.keys_and_values(x)[0], 2, 2)
        q, k = (np.asarray(attention.turn(y, jnp.arange(T)), np.float64) for y in (q, k))
        scores = np.einsum("btnh,bsnh->bnts", q, k) / (D / 4) ** 0.5
        phi, psi = (np.concatenate([softmax(x), softmax(-x)], -1) for x in (q, k))
        kernel = np.where(shown, np.einsum("btnf,bsnf->bnts", phi, psi), 0)[rows]
        teacher = softmax(np.where(shown, scores, -np.inf)[rows])
        divergences.append(-(teacher * np.log(kernel / kernel.sum(-1, keepdims=True) + 1e-300)).sum(-1).mean())
    assert_close(total / 22, np.mean(divergences))

    optimizer = optax.adam(0.05)

    @jax.jit
    def step(params, state):
        loss, slopes = jax.value_and_grad(lambda p: loss_fn(p, BATCH, None)[0])(params)
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for _ in range(30):
        params, state, loss = step(params, state)
    assert loss < 0.95 * total


def test_the_converted_decoder_trains_and_decodes():
    student = linearize(decoder(FULL), kind="exp")
    params, loss_fn = language_loss(student)
    slopes = jax.jit(jax.grad(lambda p: loss_fn(p, BATCH, None)[0]))(params)
    for path, leaf in nnx.to_flat_state(slopes):
        assert np.isfinite(leaf[...]).all(), path
        assert (leaf[...] != 0).any(), path
    whole, _, _ = student(TOKENS)
    first, state, _ = student(TOKENS[:, :7], state=student.init_state(B, 100))
    rest, _, _ = student(TOKENS[:, 7:], state=state)
    assert_close(jnp.concatenate([first, rest], 1), whole)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="nothing to linearise"):
        linearize(decoder(NEAR))
    with pytest.raises(ValueError, match="attention has normalize=Sigmoid"):
        linearize(decoder(Spec(nn.MultiHeadAttention, heads=4, normalize=Sigmoid())))
    with pytest.raises(ValueError, match="attention has mask=None"):
        nn.as_mixer(
            Spec(nn.Linearized, attention=Spec(nn.MultiHeadAttention, heads=4, mask=None)),
            features=D,
            dtype=None,
            rngs=nnx.Rngs(0),
        )
    with pytest.raises(ValueError, match="attention has bias=Alibi"):
        linearize(decoder(Spec(nn.MultiHeadAttention, heads=4, bias=Spec(Alibi.geometric))))
