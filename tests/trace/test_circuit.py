"""Edges: their scores add up to the gradient of the writer, and circuits of all and of no edges are the two runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from looked_at import ATTENTION, FEED, LAYERNORM, D, K, L, N, T, V, last, model, prompts

from jaxattn import nn, trace
from jaxattn.models import Branch, Layer, Spec, Transformer, TransformerConfig, pre_norm

CLOSE = {"rtol": 1e-8, "atol": 1e-11}
KINDS = ["sequential", "parallel", "sandwich"]
SOME = [kind if kind == "sequential" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def full(value, writers=1 + L * N + L):
    shapes = ((L, N), (L, K), (L, K), (L,), ())
    return trace.Circuit(*(jnp.full((writers, *shape), value) for shape in shapes))


def total(scores):
    """The sum over all readers, by writer."""
    return sum(x.reshape(len(x), -1).sum(1) for x in jax.tree.leaves(scores))


@pytest.mark.parametrize("kind", SOME)
def test_the_edges_of_a_writer_add_up_to_its_gradient(kind):
    made = model(kind)
    base, source = prompts()
    scores = trace.edge_attribution(made, base, source, last)
    whole = trace.attribution(made, base, source, last, ("embed", "z", "mlp_out"))
    expected = [whole["embed"].sum()[None], whole["z"].sum((1, 2)).reshape(-1), whole["mlp_out"].sum((1, 2))]
    np.testing.assert_allclose(total(scores), np.concatenate(expected), **CLOSE)
    # A head reads what is before its layer only, a block also the heads of its own layer if it stands behind them.
    heads = np.abs(scores.query[1 : 1 + L * N]).reshape(L, N, L, N).sum((1, 3)) > 0
    np.testing.assert_array_equal(heads, np.triu(np.ones((L, L), bool), 1))
    blocks = np.abs(scores.mlp[1 : 1 + L * N]).reshape(L, N, L).sum(1) > 0
    np.testing.assert_array_equal(blocks, np.triu(np.ones((L, L), bool), 1 if kind == "parallel" else 0))
    assert scores.names()[:3] == ["embed", "0.0", "0.1"]
    assert len(scores.names()) == len(scores.output)


def test_models_in_bfloat16_have_edges():
    """To the rounding of numbers, 2^-9 each, of the same model in float32."""
    with jax.enable_x64(False):
        layers, (base, source) = [pre_norm(ATTENTION, FEED)] * 2, prompts()
        small, wide = (
            Transformer(TransformerConfig(V, T, D, layers, dtype=dtype), rngs=nnx.Rngs(0))
            for dtype in ("bfloat16", "float32")
        )
        found, expected = (trace.edge_attribution(made, base, source, last) for made in (small, wide))
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=0.03 * abs(theirs).max())
        for count, tokens in ((found.count, base), (0, source)):
            logits = trace.with_edges(small, base, source, trace.largest(found, count))
            np.testing.assert_allclose(logits, small(tokens)[0], atol=0.03 * abs(logits).max())


def test_a_model_of_attention_alone_has_edges_of_embedding_and_heads():
    made = Transformer(TransformerConfig(V, T, D, [Layer([Branch(ATTENTION)])] * 2, dtype="float64"), rngs=nnx.Rngs(0))
    base, source = prompts()
    scores = trace.edge_attribution(made, base, source, last)
    whole = trace.attribution(made, base, source, last, ("embed", "z"))
    expected = [whole["embed"].sum()[None], whole["z"].sum((1, 2)).reshape(-1), jnp.zeros(2)]
    np.testing.assert_allclose(total(scores), np.concatenate(expected), **CLOSE)
    assert scores.count == (N + 2 * K) + N * (N + 2 * K) + (1 + 2 * N) + (N + 2 * K)
    for count, tokens in ((scores.count, base), (0, source)):
        logits = trace.with_edges(made, base, source, trace.largest(scores, count))
        np.testing.assert_allclose(logits, made(tokens)[0], **CLOSE)


def test_along_the_path_of_embeddings_the_edges_of_the_embedding_are_complete():
    base, source = prompts()
    scores = trace.edge_attribution(model(), base, source, last, steps=32)
    gap = last(model()(source)[0]) - last(model()(base)[0])
    np.testing.assert_allclose(total(scores)[0], gap, rtol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_all_edges_are_the_base_and_none_the_source(kind):
    made = model(kind)
    base, source = prompts()
    for value, tokens in ((True, base), (False, source)):
        logits = trace.with_edges(made, base, source, full(value))
        np.testing.assert_allclose(logits, made(tokens)[0], **CLOSE)


def test_the_edge_of_a_head_to_the_output_is_its_direct_path():
    """Without one edge to the output the logits move as the frozen path says, but that the norm is not frozen: so both
    are computed with the last stream."""
    made = model()
    base, source = prompts()
    kept = full(True)
    kept = trace.Circuit(kept.query, kept.key, kept.value, kept.mlp, kept.output.at[1 + N + 2].set(False))
    logits = trace.with_edges(made, base, source, kept)
    z, other = (made(x, record=("z",))[2]["z"] for x in (base, source))
    out = made.runs[0].branches[0].module.out.kernel[...].reshape(L, N, -1, D)[1, 2]
    change = (other - z)[1, :, :, 2] @ out
    expected = made(base, edits={"resid": {L - 1: trace.Add(change)}})[0]
    np.testing.assert_allclose(logits, expected, **CLOSE)


def test_the_edge_of_a_head_to_a_key_is_its_path():
    """The same with keys: as `path` from head 2 of layer 0 to key head 1 of layer 1."""
    made = model()
    base, source = prompts()
    kept = full(True)
    key = kept.key.at[1 + 2, 1, 1].set(False)
    logits = trace.with_edges(made, base, source, trace.Circuit(kept.query, key, kept.value, kept.mlp, kept.output))
    receivers = {"k": jnp.zeros((L, K), bool).at[1, 1].set(True)}
    expected = trace.path(made, base, source, lambda x: x, trace.heads(made), receivers).metric[0, 2]
    np.testing.assert_allclose(logits, expected, **CLOSE)


def test_circuits_of_growing_size():
    made = model()
    base, source = prompts()
    scores = trace.edge_attribution(made, base, source, last, steps=4)
    found = trace.faithfulness(made, base, source, last, scores, [0, 20, scores.count], key=jax.random.key(0))
    np.testing.assert_allclose(found.kept[jnp.array([0, 2])], [0, 1], **CLOSE)
    np.testing.assert_allclose(found.random[jnp.array([0, 2])], [0, 1], **CLOSE)
    top = trace.largest(scores, 20)
    assert top.count == 20
    flat = jnp.abs(jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(scores)]))
    on = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(top)])
    assert flat[on].min() >= flat[~on].max()
    alone = (last(trace.with_edges(made, base, source, top)) - last(made(source)[0])) / (
        last(made(base)[0]) - last(made(source)[0])
    )
    np.testing.assert_allclose(found.kept[1], alone, **CLOSE)


def test_bad_input_says_what_is_wrong():
    base, source = prompts()
    with pytest.raises(ValueError, match="the same number of tokens"):
        trace.edge_attribution(model(), base, source[:, :5], last)
    with pytest.raises(ValueError, match="steps is 0"):
        trace.edge_attribution(model(), base, source, last, steps=0)


@pytest.mark.parametrize(
    ("layer", "error"),
    [
        (Layer([Branch(FEED), Branch(ATTENTION)]), "2 branches"),
        (Layer([Branch(FEED, name="first"), Branch(ATTENTION), Branch(FEED)]), "3 branches"),
        (Layer([Branch(each, None, norm_sum=LAYERNORM) for each in (ATTENTION, FEED)]), "norm_sum"),
        (pre_norm(Spec(nn.MultiHeadAttention, heads=N, gate=True), FEED), "without a gate"),
        (pre_norm(Spec(nn.GLA, heads=N), FEED), "does not write its z alone"),
    ],
)
def test_layers_whose_writers_do_not_add_up_are_refused(layer, error):
    """A block before attention is no reader of its heads, a gate reads the stream beside q, k and v, and a norm of the
    sum makes the stream no sum: circuits of all edges were not the base there."""
    made = Transformer(TransformerConfig(V, T, D, [pre_norm(ATTENTION, FEED), layer]), rngs=nnx.Rngs(0))
    base, source = prompts()
    with pytest.raises(ValueError, match=rf"layers\[1\].*{error}"):
        trace.with_edges(made, base, source, full(True))
    with pytest.raises(ValueError, match=rf"layers\[1\].*{error}"):
        trace.edge_attribution(made, base, source, last)
