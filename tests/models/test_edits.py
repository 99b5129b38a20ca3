"""Edits: what is changed at a site is what the layers after it see. And decoders of vectors, and of mixers alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import CONTEXT, FACTOR, MIXED, PLAIN, VOCABULARY, WIDTH, assert_close, decoder, run, shared, tokens

from jaxattn.models import Decoder, DecoderConfig, FoldedDecoder, Layer
from jaxattn.nn import EDITED, Add, Put

L = len(MIXED)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("site", EDITED)
def test_an_edit_of_strength_0_is_the_identity(site):
    model = shared()
    edited, *_ = run(model, tokens(), edits={site: Add(jnp.zeros((L, WIDTH)))})
    np.testing.assert_array_equal(edited, run(model, tokens())[0])


@pytest.mark.parametrize("site", EDITED)
@pytest.mark.parametrize("layer", range(L))
def test_what_is_added_at_a_site_is_added_to_the_residual_stream_of_its_layer(site, layer):
    """Each site's value is added to x once, so the record of the layer's end is what it was, plus the vector, when the
    feed-forward block sees none of it: at `attn_out` it does."""
    model, vector = shared(), drawn(CONTEXT, WIDTH)
    edit = Add(jnp.zeros((L, CONTEXT, WIDTH)).at[layer].set(vector))
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
    put = Put(jnp.broadcast_to(vector, (L, WIDTH)), (jnp.arange(L) == L - 1)[:, None])
    logits, *_ = run(model, tokens(), edits={"resid": put})
    assert_close(logits, jnp.broadcast_to(model.embed.attend(model.final_norm(vector)), logits.shape), 50)


def test_a_sweep_over_edits_is_a_loop_and_a_new_strength_does_not_compile_anew():
    model, strengths = shared(), jnp.array([-1.0, 0.0, 2.0])
    vectors, given = drawn(L, WIDTH), tokens(batch=1)
    traced = []

    @jax.jit
    def logits(strength):
        traced.append(strength)
        return model(given, edits={"attn_out": Add(strength * vectors)})[0]

    each = jnp.stack([logits(strength) for strength in strengths])
    assert len(traced) == 1
    assert_close(jax.vmap(logits)(strengths), each, FACTOR)


def test_gradients_reach_the_vector_of_every_layer():
    model, given = shared(), tokens(batch=1)
    gradient = jax.grad(lambda edit: (model(given, edits={"resid": edit})[0] ** 2).sum())(Add(jnp.zeros((L, WIDTH))))
    assert (jnp.abs(gradient.vector).max(-1) > 1e-3).all()


def test_a_site_that_takes_no_edits_is_refused():
    with pytest.raises(ValueError, match=r"edits names \['weights'\]"):
        run(shared(), tokens(), edits={"weights": Add(jnp.zeros((L, WIDTH)))})


@pytest.mark.parametrize("vector", [jnp.zeros(WIDTH), jnp.zeros((L + 1, WIDTH)), jnp.zeros(())])
def test_an_edit_has_a_vector_for_every_layer(vector):
    with pytest.raises(ValueError, match=r"edits\['resid'\] has a leaf .*: need a part of arrays, 4 layers first"):
        shared()(tokens(), edits={"resid": Add(vector)})


def test_a_function_is_no_edit():
    with pytest.raises(ValueError, match=r"edits\['resid'\] has a leaf"):
        shared()(tokens(), edits={"resid": lambda x: x})


def test_a_layer_without_feed_forward_is_its_mixer_alone():
    model = decoder([dataclasses.replace(PLAIN, feed_forward=None)])
    logits, _, records = run(model, tokens(), record=("embed", "attn_out", "mlp_out", "resid"))
    assert not records["mlp_out"].any()
    stream = records["embed"] + records["attn_out"][0]
    assert_close(records["resid"][0], stream, 2)
    assert_close(logits, model.embed.attend(model.final_norm(stream)), FACTOR)
    assert not [path for path, _ in nnx.to_flat_state(nnx.state(model)) if "feed_forward" in str(path)]


@pytest.fixture(scope="module")
def of_vectors():
    config = DecoderConfig(VOCABULARY, CONTEXT, WIDTH, [PLAIN] * 2, tied=False, inputs=3)
    return Decoder(config, rngs=nnx.Rngs(0))


def test_vectors_are_read_in_by_a_linear_map(of_vectors):
    """Rows of the identity as inputs are tokens: the model with the kernel as its embedding says the same."""
    ids = tokens() % 3
    by_vector = of_vectors(jnp.eye(3)[ids])[0]
    of_tokens = Decoder(dataclasses.replace(of_vectors.config, inputs=0, vocabulary=3), rngs=nnx.Rngs(0))
    of_tokens.runs, of_tokens.final_norm, of_tokens.head = of_vectors.runs, of_vectors.final_norm, of_vectors.head
    of_tokens.embed.embedding[...] = of_vectors.embed.kernel[...] + of_vectors.embed.bias[...]
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
    with pytest.raises(TypeError, match=r"tokens must be vectors \[batch, length, 3\]"):
        of_vectors(bad)


def test_vectors_have_no_embedding_to_tie():
    with pytest.raises(ValueError, match="tied is True but inputs is 3"):
        DecoderConfig(inputs=3)
    with pytest.raises(ValueError, match="inputs must be at least 0, got -1"):
        DecoderConfig(inputs=-1)
    with pytest.raises(ValueError, match="config reads vectors"):
        FoldedDecoder(DecoderConfig(inputs=3, tied=False, layers=[Layer()]), segment=4, rngs=nnx.Rngs(0))
