"""A decoder that folds its past into the next segment: what is carried, what is seen, and how far gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import Causal, Documents, Window, nn
from jaxattn.models import FoldedDecoder, Spec, TransformerConfig, generate, pre_norm
from jaxattn.train import language_loss

B, T, V, D, W = 2, 11, 13, 16, 4
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, V)
CONFIG = TransformerConfig(
    V, 64, D, [pre_norm(Spec(nn.MultiHeadAttention, heads=2), Spec(nn.FeedForward, hidden=16))] * 2
)
KINDS = {"fold": {}, "queries": {"condense": "queries", "carry": 3}}


def build(kind, **options):
    return FoldedDecoder(CONFIG, segment=W, rngs=nnx.Rngs(0), **KINDS[kind] | options)


@nnx.jit
def run(model, tokens, positions=None, mask=None, state=None):
    return model(tokens, positions=positions, mask=mask, state=state)[:2]


def assert_close(actual, expected):
    """Within 1000 float32 roundings of the largest: some layers of products and norms."""
    atol = 1000 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_is_the_whole_pass_at_constant_memory(kind):
    """Rows of different lengths, so that their segments begin at different steps."""
    model = build(kind)
    whole, _ = run(model, TOKENS)
    lengths, places = jnp.array([5, 3]), jnp.arange(5)
    state = model.init_state(B, 100)
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert shapes == [x.shape for x in jax.tree.leaves(model.init_state(B, 1000))]
    logits, state = run(model, TOKENS[:, :5], positions=jnp.where(places < lengths[:, None], places, -1), state=state)
    assert_close(logits[0], whole[0, :5])
    assert_close(logits[1, :3], whole[1, :3])
    for step in range(6):
        token = TOKENS[jnp.arange(B), lengths + step][:, None]
        logits, state = run(model, token, positions=(lengths + step)[:, None], state=state)
        assert_close(logits[:, 0], whole[jnp.arange(B), lengths + step])
    assert shapes == [x.shape for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_begin_anew_and_the_future_is_not_seen(kind):
    model = build(kind)
    ids = jnp.array([[0] * 6 + [1] * 5, [-1] + [3] * 10])
    packed, _ = run(model, TOKENS, mask=Documents(ids))
    whole, _ = run(model, TOKENS)
    assert_close(packed[0, :6], whole[0, :6])
    assert_close(packed[:1, 6:], run(model, TOKENS[:1, 6:])[0])
    assert_close(packed[1:, 1:], run(model, TOKENS[1:, 1:])[0])
    changed, _ = run(model, TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % V))
    np.testing.assert_array_equal(changed[:, :5], whole[:, :5])
    assert (changed[:, -1] != whole[:, -1]).any(axis=-1).all()  # two segments later it is still felt


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_outside_the_vocabulary_gives_nan_from_there_on(kind):
    model = build(kind)
    found = run(model, TOKENS.at[0, 5].set(-1))[0]
    assert np.isnan(found[0, 5:]).all()
    padded = run(model, TOKENS.at[0, 8:].set(-100), jnp.where(jnp.arange(T) < 8, jnp.arange(T), -1)[None])[0]
    assert_close(padded[:, :8], run(model, TOKENS)[0][:, :8])


def test_layers_that_change_nothing_carry_the_segment_itself():
    model = build("fold")
    for run_of_layers in model.decoder.runs:
        for last in (run_of_layers.mixers[0].out, run_of_layers.branches[1].module.down):
            last.kernel[...] = jnp.zeros_like(last.kernel[...])
    x = model.decoder.embed(TOKENS[:, :W])
    carry, tops = model._segment(model._start(B), x, jnp.ones((B, W), bool))
    np.testing.assert_array_equal(carry, x)
    np.testing.assert_array_equal(tops, x)


def test_gradients_stop_where_they_should():
    """With bptt = 1 they are those of segments that each begin from a constant carry; with more they are not."""
    cotangent = jax.random.normal(jax.random.key(1), (B, 8, V))
    slopes = {}
    for bptt in (1, 2):
        graph, params, rest = nnx.split(build("fold", bptt=bptt), nnx.Param, ...)

        def total(params, graph=graph, rest=rest):
            return (nnx.merge(graph, params, rest)(TOKENS[:, :8])[0] * cotangent).sum()

        slopes[bptt] = jax.jit(jax.grad(total))(params)

    def apart(params):
        model = nnx.merge(graph, params, rest)
        x = model.decoder.embed(TOKENS[:, :8])
        carry, first = model._segment(model._start(B), x[:, :W], jnp.ones((B, W), bool))
        _, second = model._segment(jax.lax.stop_gradient(carry), x[:, W:], jnp.ones((B, W), bool))
        tops = model.decoder.norm(jnp.concatenate([first, second], 1))
        return (model.decoder.head(tops, model.decoder.embed) * cotangent).sum()

    expected = jax.jit(jax.grad(apart))(params)
    for leaf, wanted in zip(*map(jax.tree.leaves, (slopes[1], expected)), strict=True):
        assert_close(leaf, wanted)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, slopes.values()), strict=True))


def test_it_trains_and_generates_like_any_decoder():
    model = build("queries")
    params, loss_fn = language_loss(model)
    ids = jnp.zeros((B, T), int)
    batch = {"tokens": TOKENS, "targets": TOKENS, "weights": jnp.ones((B, T)), "documents": ids}
    slopes = jax.jit(jax.grad(lambda p: loss_fn(p, batch, None)[0]))(params)
    for path, leaf in nnx.to_flat_state(slopes):
        assert np.isfinite(leaf[...]).all(), path
        assert (leaf[...] != 0).any(), path
    drawn = generate(model, TOKENS[:1, :6], max_new_tokens=3, temperature=0)
    tokens = list(TOKENS[0, :6])
    for _ in range(3):
        tokens.append(int(run(model, jnp.array([tokens]))[0][0, -1].argmax()))
    assert list(drawn.tokens[0]) == tokens[-3:]


def test_errors_name_what_is_wrong():
    rngs = nnx.Rngs(0)
    for options, message in (
        ({"segment": 0}, "must be at least 1, got 0, 0 and 4"),
        ({"segment": 4, "carry": 3}, "carry is 3: condense='fold' carries as many states as a segment has, 4"),
        ({"segment": 4, "condense": "mean"}, "condense is 'mean': need one of fold, queries"),
    ):
        with pytest.raises(ValueError, match=message):
            FoldedDecoder(CONFIG, rngs=rngs, **options)
    for mixer in (Spec(nn.LinearAttention, heads=2), Spec(nn.MultiHeadAttention, heads=2, mask=Window(3))):
        with pytest.raises(ValueError, match=r"config.layers\[0\] is no causal attention"):
            FoldedDecoder(TransformerConfig(V, 8, D, [pre_norm(mixer)]), segment=4, rngs=rngs)
    model = build("fold")
    with pytest.raises(ValueError, match="records nothing"):
        model(TOKENS, record=("resid",))
    with pytest.raises(ValueError, match="mask has documents and a state is given"):
        model(TOKENS, mask=Causal() & Documents(jnp.zeros((B, T), int)), state=model.init_state(B, T))


def test_tokens_that_are_no_array_of_integers_are_named():
    model = build("fold")
    for bad, message in (
        ([[1, 2]], "tokens must be an array, got list"),
        (jax.ShapeDtypeStruct((1, 2), int), "tokens is a ShapeDtypeStruct"),
        (jnp.zeros((1, 2)), r"tokens must be integers \[batch, length\], not empty, got float32\(1, 2\)"),
        (jnp.zeros((1, 0), int), r"tokens must be integers \[batch, length\], not empty, got int32\(1, 0\)"),
    ):
        with pytest.raises(TypeError, match=message):
            model(bad)
