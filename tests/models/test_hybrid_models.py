"""Whole models of mixed layers: meta tokens, keys shared across layers, caches of a window, and layer patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import HYMBA

from jaxattn import Causal, Documents, Sinks, Window, nn
from jaxattn.models import (
    Spec,
    Transformer,
    TransformerConfig,
    based,
    from_plain,
    generate,
    hymba,
    pattern,
    pre_norm,
    to_plain,
)
from jaxattn.train import language_loss

B, T, V = 2, 9, 11
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, V)
FEED = Spec(nn.FeedForward, hidden=16)
MEMORY = Spec(nn.NeuralMemory, heads=2, hidden=(), inner_batch=2, convolution=0)
LAYERS = {
    "based": based(3, 2, window=4, key_dim=4),
    "hymba": list(HYMBA),
    "memory as context": [pre_norm(Spec(nn.MemoryAsContext, heads=2, segment=4, persistent=1, memory=MEMORY), FEED)],
    "memory as gate": [pre_norm(Spec(nn.memory_as_gate, heads=2, window=4, persistent=1, memory=MEMORY), FEED)],
}


def build(layers, meta_tokens=0, seed=0):
    config = TransformerConfig(V, 32, 16, layers, meta_tokens=meta_tokens)
    assert from_plain(to_plain(config)) == config
    return Transformer(config, rngs=nnx.Rngs(seed))


@nnx.jit(static_argnames="record")
def run(model, tokens, positions=None, mask=None, state=None, record=()):
    return model(tokens, positions=positions, mask=mask, state=state, record=record)


def assert_close(actual, expected):
    """Within 1000 float32 roundings of the largest: some layers of products and norms."""
    atol = 1000 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", LAYERS)
def test_models_decode_what_they_compute_and_pack_documents(name):
    """With meta tokens for Hymba: the state begins after them, and every document has its own."""
    model = build(LAYERS[name], 2 if name == "hymba" else 0)
    whole, _, _ = run(model, TOKENS)
    state = model.init_state(B, T)
    first, state, _ = run(model, TOKENS[:, :5], state=state)
    rest = []
    for t in range(5, T):
        logits, state, _ = run(model, TOKENS[:, t : t + 1], state=state)
        rest.append(logits)
    assert_close(jnp.concatenate([first, *rest], 1), whole)
    ids = jnp.array([[0] * 4 + [1] * 5] * B)
    packed, _, _ = run(model, TOKENS, mask=Documents(ids))
    assert_close(packed, jnp.concatenate([whole[:, :4], run(model, TOKENS[:, 4:])[0]], 1))


def test_generation_begins_after_the_meta_tokens():
    model = build(LAYERS["hymba"], 2)
    lengths = jnp.array([4, 2])
    generated = generate(model, TOKENS[:, :4], lengths, max_new_tokens=3, temperature=0)
    for row in range(B):
        tokens = list(TOKENS[row, : lengths[row]])
        for _ in range(3):
            tokens.append(int(run(model, jnp.array([tokens]))[0][0, -1].argmax()))
        assert list(generated.tokens[row]) == tokens[-3:]


def test_hymba_trains_on_packed_rows():
    model = build(LAYERS["hymba"], 2)
    params, loss_fn = language_loss(model)
    batch = {"tokens": TOKENS, "targets": TOKENS, "weights": jnp.ones((B, T)), "documents": jnp.zeros((B, T), int)}
    slopes = jax.jit(jax.grad(lambda p: loss_fn(p, batch, None)[0]))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert (slopes["meta"][...] != 0).all()


def test_meta_tokens_are_tokens_in_front():
    """A model whose meta tokens are the embeddings of some tokens is the model without, run on those tokens first."""
    layers = [
        pre_norm(Spec(nn.MultiHeadAttention, heads=2), FEED),
        pre_norm(Spec(nn.hymba_heads, heads=2, state=3), FEED),
    ]
    plain, model = build(layers), build(layers, 3)
    front = jnp.array([4, 0, 7])
    graph, params, rest = nnx.split(plain, nnx.Param, ...)
    model.meta[...] = plain.embed(front[None])[0]
    nnx.update(model, params)
    longer = jnp.concatenate([jnp.broadcast_to(front, (B, 3)), TOKENS], 1)
    assert_close(run(model, TOKENS)[0], run(nnx.merge(graph, params, rest), longer)[0][:, 3:])


def test_shared_keys_are_those_of_the_layer_before():
    """The second layer as attention with the projections of the first, on what the first was given."""
    own, shares = (
        Spec(nn.MultiHeadAttention, heads=2, key_heads=1, mask=Causal()),
        Spec(nn.MultiHeadAttention, heads=2, key_heads=1, mask=Causal(), keys_from="layer"),
    )
    model = build([pre_norm(own, FEED), pre_norm(shares, FEED)])
    _, _, records = run(model, TOKENS, record=("resid", "attn_out", "q"))
    first, second = (jax.tree.map(lambda x: x[0], nnx.state(run)) for run in model.runs)
    producer = nn.as_mixer(own, features=16, dtype=jnp.float32, rngs=nnx.Rngs(0))
    nnx.update(producer, first["branches"][0]["module"])
    consumer = nn.as_mixer(shares, features=16, dtype=jnp.float32, rngs=nnx.Rngs(0))
    nnx.update(consumer, second["branches"][0]["module"])

    def normed(x, scale):
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale

    embedded = model.embed(TOKENS)
    given = {}
    producer(normed(embedded, first["branches"][0]["norm"]["scale"][...]), give=given)
    y, _ = consumer(normed(records["resid"][0], second["branches"][0]["norm"]["scale"][...]), context=given["keys"])
    assert_close(y, records["attn_out"][1])
    assert "key" not in second["branches"][0]["module"]
    assert jax.tree.leaves(model.init_state(B, T)[1]) == []
    assert [x is None for x in run(model, TOKENS, record=("k",))[2]["k"]] == [False, True]


def test_a_window_keeps_no_more_keys_than_it_shows():
    near = Causal() & (Window(2) | Sinks(1))
    for mask, slots in ((near, 4), (Window(4), 5), (Window(2) | Causal() & Sinks(1), 4), (Causal(), 30)):
        state = nn.as_mixer(
            Spec(nn.MultiHeadAttention, heads=2, mask=mask), features=16, dtype=jnp.float32, rngs=nnx.Rngs(0)
        ).init_state(B, 30)
        assert state.positions.shape == (B, slots, 1)


def test_patterns_are_layers_in_their_order():
    assert [layer.branches[0].module.target.__name__[0] for layer in based(6)] == list("GLMGGG")
    said = [layer.branches[0].module.arguments for layer in hymba(9, window=8, meta_tokens=4)]
    kinds = [(each["mask"] == Causal(), each.get("keys_from", "self")) for each in said]
    far, near, shares = (True, "self"), (False, "self"), (False, "layer")
    assert kinds == [far, near, shares, near, far, near, shares, near, far]
    assert pattern("ab", {"a": Spec(nn.MultiHeadAttention, heads=4), "b": Spec(nn.LinearAttention, heads=4)})[
        1
    ] == pre_norm(Spec(nn.LinearAttention, heads=4))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"letters holds \['x'\]: need some of \['a'\]"):
        pattern("ax", {"a": Spec(nn.MultiHeadAttention, heads=4)})
    with pytest.raises(ValueError, match=r"layers\[0\] shares the keys of the layer before it, which has none"):
        build([pre_norm(Spec(nn.MultiHeadAttention, heads=4, keys_from="layer"))])
    layers = [Spec(nn.LinearAttention, heads=4), Spec(nn.MultiHeadAttention, heads=4, keys_from="layer")]
    with pytest.raises(ValueError, match=r"layers\[1\] shares the keys"):
        build(list(map(pre_norm, layers)))
    with pytest.raises(ValueError, match="meta_tokens must be at least 0, got -1"):
        TransformerConfig(meta_tokens=-1)
    with pytest.raises(ValueError, match="mask is Window"):
        build([pre_norm(Spec(nn.MultiHeadAttention, heads=2), FEED)], 2)(TOKENS, mask=Window(3))


def test_runs_of_different_specs_read_the_same_keys():
    readers = [Spec(nn.MultiHeadAttention, heads=2, keys_from="layer", mask=mask) for mask in (Causal(), Window(2))]
    model = build([pre_norm(mixer, FEED) for mixer in (Spec(nn.MultiHeadAttention, heads=2), *readers)])
    whole = run(model, TOKENS, record=("attn_out",))[2]["attn_out"]
    assert whole.shape[0] == 3
    state, pieces = model.init_state(B, T), []
    for t in range(T):
        _, state, records = run(model, TOKENS[:, t : t + 1], state=state, record=("attn_out",))
        pieces.append(records["attn_out"])
    assert_close(jnp.concatenate(pieces, 2), whole)
