"""Folded norms and centred writes: log-probabilities stay, in float64, and what cannot stay is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import GEMMA2, GPT2, LLAMA, NEOX, QWEN3
from published_more import BERT, WHISPER

from jaxattn import models, nn
from jaxattn.models import Branch, Layer, Spec, TransformerConfig
from jaxattn.models.pretrained import FAMILIES, assign
from jaxattn.models.pretrained.folder import build

NORMAL = Spec(nn.LayerNorm)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def trained(family):
    """The family with random weights, no gain or bias of which is neutral."""
    model = build(family.config, "float64")
    assign(model, family.weights(0), FAMILIES[family.config["model_type"]].table(family.config))
    return model


def scattered(config):
    """A model of a config with random parameters of size 1 around the first ones."""
    model = models.Transformer(dataclasses.replace(config, dtype="float64"), rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0).standard_normal
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(x + 0.3 * draw(x.shape), jnp.float64), params))
    return model


def with_layer_scale():
    """Cross-attention, token types, meta tokens, gates, LayerScale, and a head with factor and bias."""
    attention = Spec(nn.MultiHeadAttention, heads=4, key_heads=1, gate=True, use_bias=True)
    cross = Spec(nn.MultiHeadAttention, heads=2, keys_from="context", position=None, use_bias=("query", "out"))
    block = Spec(nn.FeedForward, use_bias=True)
    layers = [
        Layer(
            [
                Branch(attention, NORMAL, scale=0.1),
                Branch(cross, NORMAL, name="cross"),
                Branch(block, NORMAL, scale=2.0),
            ]
        ),
        Layer([Branch(attention, NORMAL), Branch(block, NORMAL)], parallel=True),
    ]
    head = Spec(nn.Head, scale=0.5, use_bias=True)
    return scattered(
        TransformerConfig(11, 16, 16, layers, embed=Spec(nn.TokenEmbedding, types=2, scale=3.0), norm=NORMAL, head=head)
    )


def with_shared_layers():
    """Layers with one set of parameters."""
    attention = Spec(nn.MultiHeadAttention, heads=4, key_heads=1, use_bias=True)
    block = Spec(nn.FeedForward, use_bias=True)
    layer = Layer([Branch(attention, NORMAL, scale=0.5), Branch(block, NORMAL)])
    options = {"shared": True, "norm": NORMAL, "head": Spec(nn.Head)}
    return scattered(TransformerConfig(11, 16, 16, [layer] * 2, **options))


IDS = np.random.default_rng(1).integers(0, 11, (2, 6))
CONTEXT = np.random.default_rng(2).standard_normal((2, 3, 16))


def run(model):
    """(log-probabilities, logits and the stream after every layer)."""
    options = {"context": CONTEXT} if model.crosses else {}
    graph, state = nnx.split(model)
    logits, _, records = jax.jit(lambda state: nnx.merge(graph, state)(IDS, record=("resid",), **options))(state)
    return jax.nn.log_softmax(logits), (logits, *records["resid"])


MODELS = {
    "GPT-2": lambda: trained(GPT2),  # tied head without bias, learned positions
    "GPT-NeoX": lambda: trained(NEOX),  # parallel branches
    "Llama": lambda: trained(LLAMA),  # RMSNorm
    "Qwen 3": lambda: trained(QWEN3.changed(tie_word_embeddings=True)),  # norms of heads stay
    "layer scale": with_layer_scale,
    "shared layers": with_shared_layers,
}


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_stay(name):
    model = MODELS[name]()
    before = jax.tree.map(np.asarray, nnx.state(model))
    expected, _ = run(model)
    folded = models.fold_norms(model)
    for branch in (branch for run in folded.runs for branch in run.branches):
        np.testing.assert_array_equal(branch.norm.scale, np.ones(branch.norm.scale.shape))
        assert not np.any(getattr(branch.norm, "bias", None))
    np.testing.assert_allclose(run(folded)[0], expected, rtol=0, atol=1e-10)
    assert models.from_plain(models.to_plain(folded.config)) == folded.config
    assert jax.tree.structure(nnx.state(models.Transformer(folded.config, rngs=nnx.Rngs(0)))) == jax.tree.structure(
        nnx.state(folded)
    )
    if name in ("Llama", "Qwen 3"):
        with pytest.raises(
            ValueError, match=r"layers\[0\]\.branches\[0\] reads the stream through RMSNorm, which sees"
        ):
            models.centre_writes(model)
    else:
        found, written = run(models.centre_writes(folded))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
        for x in written:
            assert abs(x.mean(-1)).max() < 1e-12 * abs(x).max()
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_would_change_the_model_is_refused():
    def config(branch=None, **more):
        branch = Branch(Spec(nn.FeedForward, use_bias=True), NORMAL) if branch is None else branch
        return models.Transformer(
            TransformerConfig(11, 16, 16, [Layer([branch])], **{"norm": NORMAL} | more), rngs=nnx.Rngs(0)
        )

    def refused(match, model, *functions):
        for each in functions:
            with pytest.raises(ValueError, match=match):
                each(model)

    fold, centre = models.fold_norms, models.centre_writes
    refused(r"layers\[0\]\.branches\[0\] has norm_after=RMSNorm, which writes", trained(GEMMA2), fold)
    refused(r"head is Pooler: need nn\.Head", trained(BERT), fold, centre)
    block = Spec(nn.FeedForward, use_bias=True)
    refused(r"branches\[0\] has norm_sum=LayerNorm", config(Branch(block, None, norm_sum=NORMAL)), fold)
    refused(r"reads the stream through NoneType", config(Branch(block, None)), centre)
    refused(r"branches\[0\] has norm_after=LayerNorm", config(Branch(block, NORMAL, norm_after=NORMAL)), fold, centre)
    refused(r"branches\[0\] is Recurrent: need", config(Branch(Spec(nn.GLA, heads=2), NORMAL)), fold, centre)
    refused("logits are capped at 3.0", config(head=Spec(nn.Head, cap=3.0)), centre)
    refused("the final norm reads the stream through RMSNorm", config(norm=Spec(nn.RMSNorm)), centre)
    refused("embed_norm is LayerNorm, which writes", config(embed_norm=NORMAL), centre)
    refused("positions is SinusoidalEmbedding", config(positions=Spec(nn.SinusoidalEmbedding)), centre)
    whisper = trained(WHISPER).decoder
    refused(r"branches\[0\] has a norm with a bias, but its map key has none to take it over", whisper, fold)
    with pytest.raises(TypeError, match="model is EncoderDecoder: need a Transformer"):
        fold(trained(WHISPER))
