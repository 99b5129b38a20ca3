"""A small decoder reads a frozen one: a closed gate is no gate, nothing frozen learns, no token sees a later one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ATTENTION, CONTEXT, FEED, PLAIN, VOCABULARY, WIDTH, assert_close, shared, tokens

from jaxattn import Causal, Documents, nn
from jaxattn.core.attend.position import Rotary
from jaxattn.models import (
    Branch,
    FrozenReader,
    Layer,
    Spec,
    Transformer,
    TransformerConfig,
    fold_norms,
    from_plain,
    generate,
    to_plain,
)
from jaxattn.train import language_loss

CROSS = Spec(nn.MultiHeadAttention, heads=2, keys_from="context", context_features=WIDTH, position=None, mask=Causal())
GATE = Spec(nn.AdapterGate)
LAYER = Layer([Branch(ATTENTION), Branch(CROSS, gate=GATE, name="cross"), Branch(FEED)])
CONFIG = TransformerConfig(VOCABULARY, CONTEXT, 8, [LAYER] * 2)
TOKENS = jnp.asarray(tokens())


def made(config=CONFIG, noise=0.3):
    model = FrozenReader(shared((PLAIN,)), config, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: x + noise * rng.standard_normal(x.shape).astype(np.float32), params))
    model.eval()
    return model


@pytest.fixture(scope="module")
def model():
    return made()


@nnx.jit
def logits_of(model, tokens):
    return model(tokens)[0]


def test_a_gate_is_the_equation_and_starts_as_said():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 5, 8))
    gate = nn.AdapterGate(8, 6, start=-2.0, rngs=nnx.Rngs(0))
    assert_close(gate(jnp.asarray(x), jnp.asarray(y)), y / (1 + np.exp(2.0)))
    nnx.update(gate, jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), nnx.state(gate)))
    up, down, w, b = (
        np.asarray(p[...], np.float64)
        for p in (gate.adapter.up.kernel, gate.adapter.down.kernel, gate.gate.kernel, gate.gate.bias)
    )
    gelu = np.vectorize(lambda v: v * (1 + float(jax.scipy.special.erf(v / np.sqrt(2)))) / 2)
    a = y + gelu(y @ up) @ down
    assert_close(gate(jnp.asarray(x), jnp.asarray(y)), a / (1 + np.exp(-(np.concatenate([x, a], -1) @ w + b))))


def test_a_closed_gate_leaves_the_small_model_as_it_is(model):
    """To the bit, with b = −∞: the branches add exact zeros."""
    closed = nnx.clone(model)
    plain = Transformer(TransformerConfig(VOCABULARY, CONTEXT, 8, [PLAIN] * 2), rngs=nnx.Rngs(0))
    branches = closed.reader.runs[0].branches
    bias = branches[1].gate.gate.bias
    bias[...] = jnp.full_like(bias[...], -jnp.inf)
    for name in ("embed", "norm", "head"):
        nnx.update(getattr(plain, name), nnx.state(getattr(closed.reader, name)))
    for to, of in zip(plain.runs[0].branches, (branches[0], branches[2]), strict=True):
        nnx.update(to, nnx.state(of))
    plain.eval()
    np.testing.assert_array_equal(logits_of(closed, TOKENS), logits_of(plain, TOKENS))
    assert abs(logits_of(model, TOKENS) - logits_of(plain, TOKENS)).max() > 1e-2


def test_nothing_frozen_is_a_parameter_or_has_a_gradient(model):
    params, _ = language_loss(model)
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(
        x.size for x in jax.tree.leaves(nnx.state(model.reader, nnx.Param))
    )
    graph, state = nnx.split(model)

    def loss(state):
        return nnx.merge(graph, state)(TOKENS)[0].sum()

    grads = jax.jit(jax.grad(loss, allow_int=True))(state)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(grads["_leaves"]) if x.dtype == jnp.float32)
    of_cross = jax.tree.leaves(grads["reader"]["runs"][0]["branches"][1])
    assert all(abs(np.asarray(x)).max() > 0 for x in of_cross if x.dtype == jnp.float32)


def test_no_token_sees_a_later_one_nor_another_document(model):
    """And constant vectors are read alike by all queries."""
    before = logits_of(model, TOKENS)
    later = logits_of(model, TOKENS.at[:, 7:].set((TOKENS[:, 7:] + 1) % VOCABULARY))
    np.testing.assert_array_equal(later[:, :7], before[:, :7])
    assert abs(later - before)[:, 7:].max() > 1e-2
    packed = model(TOKENS, mask=Documents(jnp.arange(CONTEXT) // 6))[0]
    assert_close(packed[:, :6], before[:, :6])
    read = nn.Context(jnp.broadcast_to(jnp.arange(1.0, WIDTH + 1), (3, CONTEXT, WIDTH)))
    z = model.reader(TOKENS, context=read, record=("cross.z",))[2]["cross.z"]
    assert_close(z, jnp.broadcast_to(z[:, :, :1], z.shape))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"absorb": True}, {"position": Rotary()}], ids=["keys", "absorbed", "turned"])
def test_decoding_is_one_pass_also_with_ragged_prompts(options):
    layer = Layer([Branch(ATTENTION), Branch(CROSS.replace(**options), gate=GATE, name="cross"), Branch(FEED)])
    model = made(TransformerConfig(VOCABULARY, CONTEXT, 8, [layer] * 2))
    whole, state, pieces = logits_of(model, TOKENS), model.init_state(3, CONTEXT), []
    for piece in (TOKENS[:, :4], *(TOKENS[:, t : t + 1] for t in range(4, CONTEXT))):
        logits, state, _ = model(piece, state=state)
        pieces.append(logits)
    assert_close(jnp.concatenate(pieces, 1), whole)
    lengths = np.array([5, 2, 3])
    new = np.asarray(generate(model, TOKENS[:, :5], lengths, max_new_tokens=4, temperature=0.0).tokens)
    for b, length in enumerate(lengths):
        text = list(np.asarray(TOKENS[b, :length]))
        for token in new[b]:
            assert token == int(model(jnp.asarray([text]))[0][0, -1].argmax())
            text.append(token)


def test_what_makes_no_sense_is_refused():
    large = shared((PLAIN,))
    for frozen, config, error, message in (
        (3, CONFIG, TypeError, "frozen is int: need a Transformer"),
        (
            large,
            TransformerConfig(VOCABULARY + 1, 9, 8, [LAYER]),
            ValueError,
            "frozen has a vocabulary of 11 and config",
        ),
        (large, TransformerConfig(VOCABULARY, 9, 8, [PLAIN]), ValueError, "config has no cross-attention"),
        (large, TransformerConfig(VOCABULARY, 9, 8, [LAYER], causal=False), ValueError, "config is not causal"),
        (
            large,
            TransformerConfig(
                VOCABULARY, 9, 8, [Layer([Branch(ATTENTION), Branch(CROSS.replace(mask=None), name="c")])]
            ),
            ValueError,
            "cross-attention that sees vectors of later tokens",
        ),
    ):
        with pytest.raises(error, match=message):
            FrozenReader(frozen, config, rngs=nnx.Rngs(0))
    assert from_plain(to_plain(CONFIG)) == CONFIG
    gated = Transformer(
        TransformerConfig(VOCABULARY, 9, 8, [Layer([Branch(ATTENTION, gate=GATE), Branch(FEED)])]), rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="has the gate AdapterGate, which reads the norm too: need gate=None"):
        fold_norms(gated)
