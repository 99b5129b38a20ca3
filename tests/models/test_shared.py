"""Layers with one set of parameters (ALBERT): the model is one whose layers have equal ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import Window, nn, trace
from jaxattn.analysis.factors import Weights
from jaxattn.models import (
    Spec,
    Transformer,
    TransformerConfig,
    centre_writes,
    fold_norms,
    linearize,
    pre_norm,
    replace_mixers,
)
from jaxattn.models.convert import matching_loss

L, B, T = 3, 2, 9
ATTENTION = Spec(nn.MultiHeadAttention, heads=3, head_dim=4)
CONFIG = TransformerConfig(
    vocabulary=19, length=16, width=10, layers=[pre_norm(ATTENTION, Spec(nn.FeedForward, hidden=14))] * L, shared=True
)
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 19)


def apart(model):
    """The model whose layers have parameters of their own, all equal to those of the shared model."""
    other = Transformer(dataclasses.replace(model.config, shared=False), rngs=nnx.Rngs(5))
    shapes = jax.tree.map(lambda x: x.shape, nnx.state(other, nnx.Param))
    state = jax.tree.map(jnp.broadcast_to, nnx.state(model, nnx.Param), shapes, is_leaf=lambda x: hasattr(x, "dtype"))
    nnx.update(other, state)
    return other


@pytest.fixture(scope="module")
def models():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    return model, apart(model)


def test_edits_records_and_gradients(models):
    """Records have a layer axis, edits may address one layer, and the gradient is the sum of those of the layers."""
    gain = jnp.linspace(0.2, 1.8, L * 3).reshape(L, 3, 1)

    def run(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, gain):
            edits = {"z": (trace.Layers(trace.Scale(gain)), {1: trace.Scale(0.5)})}
            logits, _, records = nnx.merge(graph, params, rest)(TOKENS, edits=edits, record=("resid", "weights"))
            return jnp.square(logits).sum(), records

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, gain)

    (shared, (one, of_gain)), (plain, (each, of_gains)) = map(run, models)
    assert shared[1]["resid"].shape == (L, B, T, 10)
    np.testing.assert_allclose(shared[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(of_gain, of_gains, rtol=1e-3, atol=1e-4)
    for name in ("resid", "weights"):
        np.testing.assert_allclose(shared[1][name], plain[1][name], rtol=1e-5, atol=1e-5)
    for summed, apart in zip(jax.tree.leaves(one), jax.tree.leaves(each), strict=True):
        if summed.shape != apart.shape:
            assert (len(summed), len(apart)) == (1, L)
            apart = apart.sum(0, keepdims=True)
        np.testing.assert_allclose(summed, apart, rtol=1e-3, atol=1e-4 * abs(apart).max())


def test_a_state_by_layer(models):
    """Token by token as all at once: each layer keeps keys of its own."""
    model, _ = models
    whole = model(TOKENS)[0]
    state = model.init_state(B, T)
    assert {x.shape[0] for x in jax.tree.leaves(state)} == {L}
    _, state, _ = model(TOKENS[:, :-1], state=state)
    last = model(TOKENS[:, -1:], state=state)[0]
    np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=1e-4, atol=1e-5)


def test_dropout_differs_by_layer():
    """Each layer draws for itself. A token alone in its row is dropped, by head, where z is 0."""
    layer = pre_norm(ATTENTION.replace(dropout=0.5, position=None), None)
    model = Transformer(dataclasses.replace(CONFIG, layers=[layer] * L), rngs=nnx.Rngs(0))
    kept = (model(TOKENS.reshape(-1, 1), record=("z",))[2]["z"] != 0).any(-1)
    assert 0.3 < kept.mean() < 0.7
    assert len({np.asarray(each).tobytes() for each in kept}) == L


def test_other_mixers(models):
    """Where a layer gets another mixer, neighbours that are still equal stay shared, with the same numbers."""
    model, other = models

    def change(layer, mixer):
        return mixer.replace(mask=Window(2)) if layer == 1 else mixer

    shared, plain = (replace_mixers(each, change) for each in (model, other))
    assert [len(run.branches[0].module.query.kernel[...]) for run in shared.runs] == [1, 1, 1]
    np.testing.assert_allclose(shared(TOKENS)[0], plain(TOKENS)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="teacher has shared layers"):
        matching_loss(linearize(model), model)


def test_weights_of_layers_that_share_them(models):
    """Maps of heads have a layer axis, and norms are folded for all layers at once."""
    model, other = models
    for name, x in vars(Weights(other)).items():
        if name in ("query", "key", "value", "out"):
            np.testing.assert_array_equal(getattr(Weights(model), name), x)
    folded = fold_norms(model)
    assert {run.branches[0].module.query.kernel.shape[0] for run in folded.runs} == {1}
    np.testing.assert_allclose(folded(TOKENS)[0], model(TOKENS)[0], rtol=1e-4, atol=1e-5)


def test_a_narrow_embedding():
    """x = W norm(table + positions) + b, of another width than that of the layers, also in the head."""
    config = dataclasses.replace(
        CONFIG,
        embed_width=7,
        embed_norm=Spec(nn.LayerNorm),
        positions=Spec(nn.PositionEmbedding),
        head=Spec(nn.MaskedTokenHead, inner=7),
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    logits, _, records = model(TOKENS, record=("embed", "final_norm"))
    inner = model.embed_norm(model.embed.table[...][TOKENS] + model.positions.table[:T])
    np.testing.assert_allclose(records["embed"], model.embed_map(inner), rtol=1e-5, atol=1e-6)
    assert records["embed"].shape == (B, T, 10)
    assert logits.shape == (B, T, 19)
    with pytest.raises(ValueError, match="embed_width is 7, from which a map writes to the stream"):
        centre_writes(Transformer(dataclasses.replace(config, embed_norm=None, head=Spec(nn.Head)), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"tied to an embedding of 7 channels, but has 10"):
        Transformer(dataclasses.replace(config, head=Spec(nn.Head, tied=True)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="embed_width must be at least 1, got 0"):
        dataclasses.replace(config, embed_width=0)
