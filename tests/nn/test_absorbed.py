"""Cross-attention that reads the context itself (EL-attention) is cross-attention; a model keeps the context once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import call
from multi_head import randomise

from jaxattn import Documents, models, nn
from jaxattn.core.attend.position import Rotary
from jaxattn.models import Branch, EncoderDecoder, Layer, Spec, TransformerConfig, generate, pre_norm, replace_mixers
from jaxattn.nn import Context, MultiHeadAttention, NullSoftmax, Tokens

B, S, T, D, C, N, V, L = 2, 7, 5, 16, 12, 4, 11, 3
EPS = float(np.finfo(np.float32).eps)
OPTIONS = {"key_heads": 2, "keys_from": "context", "context_features": C, "position": None, "use_bias": True}


def test_it_is_cross_attention_with_biases_and_gradients():
    """In float64, for grouped heads, with padding that holds NaN, and with a row that sees nothing of its context."""
    rng = np.random.default_rng(1)
    x, of_context = rng.standard_normal((B, T, D)), rng.standard_normal((B, S, C))
    positions = np.array([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, -1, -1]])
    of_context[positions < 0] = np.nan
    documents = Documents(jnp.array([0, 0, 1, 1, 2]), jnp.array([0, 0, 1, 1, 1, 1, 1]))  # nothing to see for the last
    with jax.enable_x64(True):
        found = []
        for absorb in (False, True):
            module = randomise(MultiHeadAttention(D, N, **OPTIONS, absorb=absorb, dtype=jnp.float64, rngs=nnx.Rngs(0)))
            nnx.update(module, jax.tree.map(lambda x: x.astype(np.float64), nnx.state(module, nnx.Param)))
            graph, params, rest = nnx.split(module, nnx.Param, ...)

            def loss(params, x, c, graph=graph, rest=rest):
                context = Context(c, Tokens.of(c, positions=jnp.asarray(positions)))
                y, _, records = call(
                    nnx.merge(graph, params, rest), x, mask=documents, context=context, record=("z", "weights")
                )
                return jnp.sin(y).sum(), (y, records)

            arrays = jnp.asarray(x), jnp.asarray(of_context)
            found.append(jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, *arrays))
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-11)
        (_, (_, records)), slopes = found[1]
        np.testing.assert_array_equal(records["z"][:, -1], 0)
        assert (np.asarray(slopes[2])[positions < 0] == 0).all()


CROSS = Spec(MultiHeadAttention, heads=N, position=None, keys_from="context", use_bias=True)
ATTENTION, FEED = Spec(MultiHeadAttention, heads=N), Spec(nn.FeedForward, hidden=12)
ENCODER = TransformerConfig(V, S, D, [pre_norm(ATTENTION, FEED)], causal=False, head=None)
DECODER = TransformerConfig(V, T, D, [Layer([Branch(ATTENTION), Branch(CROSS, name="cross"), Branch(FEED)])] * L)


def test_rows_of_a_state_that_keeps_the_context_take_it_along():
    """Beams reorder the rows: each row goes on with its own context, padding of the context included."""
    both = randomise(EncoderDecoder(ENCODER, DECODER, rngs=nnx.Rngs(0)), scale=0.3)
    converted = replace_mixers(both.decoder, reads_itself)
    inputs = np.random.default_rng(1).integers(0, V, (B, S))
    positions = jnp.asarray(np.where(np.arange(S) < np.array([[4], [S]]), np.arange(S), -1))
    context, _ = both.encode(inputs, positions=positions)
    prompts, rows = np.array([[1, 2], [1, 2]]), jnp.array([1, 1, 0])
    found = []
    for model in (both.decoder, converted):
        state = model(jnp.asarray(prompts), state=model.init_state(B, T), context=context)[1]
        straight = model(jnp.asarray(prompts[:, :1]), state=state)[0]
        moved = model(jnp.asarray(prompts[rows, :1]), state=models.reordered(state, rows))[0]
        np.testing.assert_allclose(moved, straight[rows], rtol=0, atol=100 * EPS * abs(straight).max())
        assert abs(straight[0] - straight[1]).max() > 0.01  # the contexts matter
        found.append(models.beam_search(model, prompts, beams=3, max_new_tokens=2, context=context))
        back = models.rolled_back(state, jnp.array([1, 1]))
        again = model(jnp.asarray(prompts[:, 1:]), state=back)[0]
        whole = model(jnp.asarray(prompts), context=context)[0][:, 1:]
        np.testing.assert_allclose(again, whole, rtol=0, atol=100 * EPS * abs(whole).max())
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)


def reads_itself(layer, mixer):
    return mixer.replace(absorb=True) if mixer.arguments.get("keys_from") == "context" else mixer


def test_a_trained_decoder_keeps_the_context_once_and_says_the_same():
    both = randomise(EncoderDecoder(ENCODER, DECODER, rngs=nnx.Rngs(0)), scale=0.1)
    tokens, inputs = (np.random.default_rng(seed).integers(0, V, (B, length)) for seed, length in ((0, T), (1, S)))
    converted = replace_mixers(both.decoder, reads_itself)
    positions = jnp.asarray(np.where(np.arange(S) < np.array([[4], [S]]), np.arange(S), -1))
    context, _ = both.encode(inputs, positions=positions)
    sizes, found = [], []
    for model in (both.decoder, converted):
        graph, arrays = nnx.split(model)

        @jax.jit
        def run(arrays, tokens, state, context, graph=graph):
            return nnx.merge(graph, arrays)(tokens, state=state, context=context)[:2]

        before = model.init_state(B, T)
        logits, state = run(arrays, tokens[:, :2], before, context)
        pieces = [logits]
        for t in range(2, T):
            logits, state = run(arrays, tokens[:, t : t + 1], state, None)
            pieces.append(logits)
        found += [run(arrays, tokens, None, context)[0], jnp.concatenate(pieces, 1)]
        size, held = (sum(x.nbytes for x in jax.tree.leaves(each)) for each in (before, state))
        sizes.append(held - size - context.tokens.positions.nbytes * (1 if model is converted else L))
    for logits in found[1:]:
        np.testing.assert_allclose(logits, found[0], rtol=0, atol=500 * EPS * abs(found[0]).max())
    assert sizes == [2 * L * B * S * D * 4, B * S * D * 4]
    said = [generate(each, tokens[:, :2], max_new_tokens=3, temperature=0, context=context).tokens
            for each in (both.decoder, converted)]  # fmt: skip
    np.testing.assert_array_equal(*said)
    config = converted.config
    assert models.from_plain(models.to_plain(config)) == config


def test_what_stands_between_a_projection_and_attention_is_refused():
    for options, message in (
        ({"keys_from": "self"}, "absorb is True but keys_from is 'self': need keys_from='context', or absorb=False"),
        ({"qk_norm": Spec(nn.RMSNorm)}, "absorb is True but keys have the norm"),
        ({"score": Spec(nn.BilinearScore)}, "absorb is True but score is"),
        ({"normalize": Spec(NullSoftmax)}, "absorb is True and there are biases of key and value: need Softmax"),
        ({"dropout": 0.1, "use_bias": ["value"]}, "absorb is True and there are biases of value: need Softmax"),
    ):
        given = OPTIONS | {"context_features": None} | options
        with pytest.raises(ValueError, match=message):
            MultiHeadAttention(D, N, **given, absorb=True, rngs=nnx.Rngs(0))
    MultiHeadAttention(D, N, **OPTIONS | {"use_bias": ["query"]}, dropout=0.1, absorb=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"position is Rotary.* for keys of another sequence"):
        MultiHeadAttention(D, N, keys_from="context", position=Rotary(), absorb=True, rngs=nnx.Rngs(0))
    layer = Layer([Branch(CROSS, name="a"), Branch(CROSS.replace(absorb=True), name="b")])
    with pytest.raises(ValueError, match="some layers of cross-attention have absorb=True, and others keep keys"):
        models.Transformer(TransformerConfig(V, T, D, [layer]), rngs=nnx.Rngs(0))
