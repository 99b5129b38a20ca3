"""Edits: what is changed at a site is what the layers after it see. And decoders of vectors, and of mixers alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import (
    ATTENTION,
    CONTEXT,
    FACTOR,
    MIXED,
    PLAIN,
    VOCABULARY,
    WIDTH,
    assert_close,
    decoder,
    run,
    shared,
    tokens,
)

from jaxattn import Causal, nn
from jaxattn.models import FoldedDecoder, Layer, Spec, Transformer, TransformerConfig, pre_norm
from jaxattn.trace import Add, Layers, OnlyAt, Patch, Put, Scale

L = len(MIXED)
ADDED = ("attn_out", "mlp_out", "resid")


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("site", ADDED)
def test_an_edit_of_strength_0_is_the_identity(site):
    model = shared()
    edited, *_ = run(model, tokens(), edits={site: Layers(Add(jnp.zeros((L, WIDTH))))})
    np.testing.assert_array_equal(edited, run(model, tokens())[0])


@pytest.mark.parametrize("site", ADDED)
@pytest.mark.parametrize("layer", range(L))
def test_what_is_added_at_a_site_is_added_to_the_residual_stream_of_its_layer(site, layer):
    """Each site's value is added to x once, so the record of the layer's end is what it was, plus the vector, when the
    feed-forward block sees none of it: at `attn_out` it does."""
    model, vector = shared(), drawn(CONTEXT, WIDTH)
    edit = Layers(Add(jnp.zeros((L, CONTEXT, WIDTH)).at[layer].set(vector)))
    before, after = (
        run(model, tokens(), record=("resid", "attn_out"), **options)[2] for options in ({}, {"edits": {site: edit}})
    )
    np.testing.assert_array_equal(after["resid"][:layer], before["resid"][:layer])
    if site == "attn_out":
        assert_close(after[site][layer], before[site][layer] + vector, 1)
    else:
        assert_close(after["resid"][layer], before["resid"][layer] + vector, 2)
    assert abs(after["resid"][-1] - before["resid"][-1]).max() > 1e-3


def test_replacing_the_stream_after_the_last_layer_replaces_the_logits():
    model, vector = shared(), drawn(WIDTH)
    for edit in ({L - 1: Put(vector)}, Layers(Put(jnp.tile(vector, (L, 1))), jnp.arange(L) == L - 1)):
        logits = nnx.jit(lambda model, edit: model(tokens(), edits={"resid": edit})[0])(model, edit)
        assert_close(logits, jnp.broadcast_to(model.head(model.norm(vector), model.embed), logits.shape), 50)


def test_a_sweep_over_edits_is_a_loop_and_a_new_strength_does_not_compile_anew():
    model, strengths = shared(), jnp.array([-1.0, 0.0, 2.0])
    vectors, given = drawn(L, WIDTH), tokens(batch=1)
    traced = []

    @jax.jit
    def logits(strength):
        traced.append(strength)
        return model(given, edits={"attn_out": Layers(Add(strength * vectors))})[0]

    each = jnp.stack([logits(strength) for strength in strengths])
    assert len(traced) == 1
    assert_close(jax.vmap(logits)(strengths), each, FACTOR)


def test_gradients_reach_the_vector_of_every_layer():
    model, given = shared(), tokens(batch=1)
    edit = Layers(Add(jnp.zeros((L, WIDTH))))
    gradient = jax.jit(jax.grad(lambda edit: (model(given, edits={"resid": edit})[0] ** 2).sum()))(edit)
    assert (jnp.abs(gradient.edit.vector).max(-1) > 1e-3).all()


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ({"residual": Add(1.0)}, ValueError, "edits names the unknown site 'residual': need one of"),
        ({"lse": Add(1.0)}, ValueError, "edits has the site 'lse', which no layer has"),
        ({"resid": jnp.zeros(3)}, TypeError, r"edits\['resid'\] must be an Edit, got ArrayImpl"),
        ({"resid": Causal()}, TypeError, r"edits\['resid'\] must be an Edit, got Causal"),
        ({"weights": Causal()}, TypeError, r"edits\['weights'\] must be a weight map or an Edit, got Causal"),
        ({"scores": jnp.zeros(3)}, TypeError, r"edits\['scores'\] must be a mask, a bias, a score map or an Edit"),
        ({"scores": OnlyAt(Patch(jnp.arange(2), jnp.ones((2, 1))))}, TypeError, "got OnlyAt, which acts on tokens"),
        (
            {"scores": lambda x, where: x},
            TypeError,
            r"edits\['scores'\] must be a mask, a bias, a score map or an Edit",
        ),
        ({"resid": {L: Add(1.0)}}, ValueError, r"edits\['resid'\] has the layer 4: need one from 0 to 3"),
        ({"logits": {0: Add(1.0)}}, ValueError, r"edits\['logits'\] is by layer, but a model has 'logits' once"),
        ({"resid": Layers(Add(jnp.zeros((L + 1, WIDTH))))}, ValueError, r"a leaf of shape \(5, 16\): need 4 layers"),
        (
            {"resid": Add(jnp.zeros((2, 1, 1, WIDTH)))},
            ValueError,
            r"edit Add makes \(2, 3, 12, 16\) of a value of shape",
        ),
    ],
)
def test_edits_that_mean_nothing_are_refused(edits, error, message):
    with pytest.raises(error, match=message):
        shared()(tokens(), edits=edits)


def test_an_edit_of_a_layer_that_lacks_the_site_is_refused():
    model = decoder((PLAIN, pre_norm(Spec(nn.LinearAttention, heads=4), None)))
    with pytest.raises(ValueError, match="edits has the site 'scores', which layer 1 does not have: need one of"):
        model(tokens(), edits={"scores": {1: Causal()}})
    with pytest.raises(ValueError, match="edits has the site 'weights', which layer 1 does not have"):
        model(tokens(), edits={"weights": {1: Scale(0.0)}})


def test_a_layer_without_feed_forward_is_its_mixer_alone():
    model = decoder([pre_norm(ATTENTION, None)])
    logits, _, records = run(model, tokens(), record=("embed", "attn_out", "resid"))
    assert "mlp_out" not in model.sites
    stream = records["embed"] + records["attn_out"][0]
    assert_close(records["resid"][0], stream, 2)
    assert_close(logits, model.head(model.norm(stream), model.embed), FACTOR)
    assert not [path for path, _ in nnx.to_flat_state(nnx.state(model)) if "up" in path]


@pytest.fixture(scope="module")
def of_vectors():
    config = TransformerConfig(
        VOCABULARY, CONTEXT, WIDTH, [PLAIN] * 2, embed=Spec(nn.VectorEmbedding, inputs=3), head=Spec(nn.Head)
    )
    return Transformer(config, rngs=nnx.Rngs(0))


def test_vectors_are_read_in_by_a_linear_map(of_vectors):
    """Rows of the identity as inputs are tokens: the model with the kernel as its embedding says the same."""
    ids = tokens() % 3
    by_vector = of_vectors(jnp.eye(3)[ids])[0]
    of_tokens = Transformer(
        dataclasses.replace(of_vectors.config, embed=Spec(nn.TokenEmbedding), vocabulary=3), rngs=nnx.Rngs(0)
    )
    of_tokens.runs, of_tokens.norm, of_tokens.head = of_vectors.runs, of_vectors.norm, of_vectors.head
    of_tokens.embed.table[...] = of_vectors.embed.map.kernel[...] + of_vectors.embed.map.bias[...]
    assert_close(by_vector, of_tokens(ids)[0], FACTOR)


def test_vectors_are_decoded_step_by_step(of_vectors):
    x = drawn(2, CONTEXT, 3)
    state, said = of_vectors.init_state(2, CONTEXT), []
    for t in range(CONTEXT):
        logits, state, _ = of_vectors(x[:, t : t + 1], state=state)
        said.append(logits)
    assert_close(jnp.concatenate(said, 1), of_vectors(x)[0], FACTOR)


@pytest.mark.parametrize("bad", [np.zeros((2, 4), int), np.zeros((2, 4, 2), np.float32), np.zeros((2, 4, 3), int)])
def test_a_model_of_vectors_takes_nothing_else(of_vectors, bad):
    with pytest.raises(TypeError, match=r"inputs must be vectors \[batch, length, 3\]"):
        of_vectors(bad)


def test_vectors_have_no_embedding_to_tie():
    for inputs, message in ((3, "need tied=False without token ids"), (0, "inputs must be at least 1, got 0")):
        with pytest.raises(ValueError, match=message):
            Transformer(TransformerConfig(embed=Spec(nn.VectorEmbedding, inputs=inputs)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="config must be of a causal model of tokens"):
        FoldedDecoder(
            TransformerConfig(layers=[Layer()], embed=Spec(nn.VectorEmbedding, inputs=3), head=Spec(nn.Head)),
            segment=4,
            rngs=nnx.Rngs(0),
        )


def test_logits_of_some_tokens_are_those_of_all():
    """By position, of rows that are padded on the left and on the right; NaN where no token stands."""
    model, row = shared(), tokens(2)
    places = jnp.stack([jnp.arange(CONTEXT) - 3, jnp.where(jnp.arange(CONTEXT) < 9, jnp.arange(CONTEXT), -1)]).clip(-1)
    whole, _, seen = run(model, row, positions=places, record=("final_norm",))
    wanted = jnp.array([[8, 0, 11], [8, 0, 5]])
    found, _, some = run(model, row, positions=places, record=("final_norm", "resid"), logits_at=wanted)
    for b, p in np.ndindex(2, 3):
        slot = np.flatnonzero(np.asarray(places[b]) == int(wanted[b, p]))
        if len(slot):
            np.testing.assert_allclose(found[b, p], whole[b, slot[0]], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(some["final_norm"][b, p], seen["final_norm"][b, slot[0]], rtol=1e-5, atol=1e-5)
        else:
            assert (b, p) == (0, 2)
            assert np.isnan(found[b, p]).all()
    assert some["resid"].shape[2] == CONTEXT
    same = run(model, row, logits_at=jnp.array([CONTEXT - 1]))[0]
    np.testing.assert_allclose(same[:, 0], run(model, row)[0][:, -1], rtol=1e-5, atol=1e-5)
    here = Patch(jnp.array([8]), jnp.ones((1, WIDTH)))
    edited = run(model, row, positions=places, edits={"final_norm": here}, logits_at=wanted)[0]
    expected = run(model, row, positions=places, edits={"final_norm": here})[0]
    np.testing.assert_allclose(edited[1, :1], expected[1, 8:9], rtol=1e-5, atol=1e-5)
    for given in (jnp.array([1.0]), jnp.zeros((3, 1), int), jnp.zeros((1, 1, 1), int)):
        with pytest.raises(ValueError, match="logits_at has shape"):
            model(row, logits_at=given)
