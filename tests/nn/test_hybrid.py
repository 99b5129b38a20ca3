"""Mixers made of mixers, learned tokens before a sequence, and the wirings of Titans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import B, D, N, T, X, alone, assert_close, build, call, run, start

from jaxattn import Causal, Documents, Explicit, Sinks, Window, memory_scan, models, nn
from jaxattn.cache import Policy, Recent
from jaxattn.core.attend.position import rotary

MEMORY = models.Spec(nn.NeuralMemory, heads=N, hidden=(6,), inner_batch=2, documents=2)
STILL = models.Spec(nn.NeuralMemory, heads=N, hidden=(6,), inner_batch=2, documents=2, convolution=0)
NEAR = Causal() & (Window(2) | Sinks(2))
SPECS = {
    "hymba": models.Spec(nn.hymba_heads, heads=N, key_heads=1, mask=NEAR, state=3),
    "memory as gate": models.Spec(nn.memory_as_gate, heads=N, window=3, persistent=2, memory=MEMORY),
    "memory as layer": models.Spec(nn.memory_as_layer, heads=N, window=3, persistent=0, memory=MEMORY),
    "memory as context": models.Spec(nn.MemoryAsContext, heads=N, segment=4, persistent=2, memory=STILL),
    "no persistent tokens": models.Spec(nn.MemoryAsContext, heads=N, segment=2, persistent=0, memory=STILL),
}


@pytest.mark.parametrize("name", SPECS)
def test_decoding_is_the_whole_pass_at_a_state_of_fixed_size(name):
    mixer = build(SPECS[name])
    whole = jnp.stack(alone(mixer, *X))
    lengths, places = jnp.array([4, 6]), jnp.arange(6)
    state = start(mixer, B, 100)
    longer = jax.eval_shape(lambda: mixer.init_state(B, 1000))
    assert [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in jax.tree.leaves(longer)]
    there = places < lengths[:, None]
    prompt = jnp.where(there[..., None], X[:, :6], jnp.nan)  # padding may hold anything
    y, after, _ = run(mixer, prompt, positions=jnp.where(there, places, -1), state=state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert_close(y[0, :4], whole[0, :4])
    assert_close(y[1], whole[1, :6])
    state = after
    for step in range(4):
        places = lengths + step
        token = jnp.take_along_axis(X, places[:, None, None], 1)
        y, state, _ = run(mixer, token, positions=places[:, None], state=state)
        assert_close(y[:, 0], whole[jnp.arange(B), places])
    _, idle, _ = run(mixer, token * jnp.nan, positions=jnp.full((B, 1), -1), state=state)
    jax.tree.map(np.testing.assert_array_equal, idle, state)


@pytest.mark.parametrize("name", SPECS)
def test_packed_documents_are_separate_runs_and_the_future_is_not_seen(name):
    mixer = build(SPECS[name])
    ids = jnp.array([[-1] + [3] * 3 + [5] * 7, [0] * 11])
    y, _, _ = run(mixer, X.at[0, 0].set(jnp.nan), mask=Documents(ids))  # padding may hold anything
    assert_close(y[0, 1:], jnp.concatenate(alone(mixer, X[0, 1:4], X[0, 4:])))
    whole = jnp.stack(alone(mixer, *X))
    assert_close(y[1], whole[1])
    changed = jnp.stack(alone(mixer, *X.at[:, 6:].multiply(-2)))
    np.testing.assert_array_equal(changed[:, :6], whole[:, :6])
    assert (changed[:, 6:] != whole[:, 6:]).any()


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_has_a_gradient(name):
    mixer = build(SPECS[name])
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    slopes = jax.jit(jax.grad(lambda p: jnp.sin(nnx.merge(graph, p, rest)(X)[0]).sum()))(params)
    for path, leaf in jax.tree.leaves_with_path(slopes):
        assert np.isfinite(leaf).all(), path
        assert (np.abs(leaf) > 0).any(), path


def test_a_branch_without_gain_leaves_the_other():
    """Hymba with one gain at zero is half of the other branch, normed and projected."""
    mixer = build(models.Spec(nn.hymba_heads, heads=N, state=3))
    attention, s6 = mixer.mixers
    norms = [np.asarray(norm.scale[...]) for norm in mixer.norms]
    for kept, branch in enumerate((attention, s6)):
        for i, norm in enumerate(mixer.norms):
            norm.scale[...] = norms[i] if i == kept else jnp.zeros(2 * D)
        alone = np.asarray(branch(X)[0], np.float64)
        normed = alone / np.sqrt((alone**2).mean(-1, keepdims=True) + 1e-6) * norms[kept]
        projected = normed / 2 @ np.asarray(mixer.out.kernel[...], np.float64)
        assert_close(mixer(X)[0], projected + np.asarray(mixer.out.bias[...], np.float64))


def test_memory_as_gate_is_attention_times_a_sigmoid_of_the_memory():
    mixer = build(models.Spec(nn.memory_as_gate, heads=N, window=3, persistent=0, memory=MEMORY))
    attention, memory = (each(X)[0] for each in mixer.mixers)
    y, m = (np.asarray(norm(x), np.float64) for norm, x in zip(mixer.norms, (attention, memory), strict=True))
    assert_close(mixer(X)[0], y / (1 + np.exp(-m)))


def test_memory_as_layer_is_attention_over_what_the_memory_says_of_both():
    """Behind two persistent tokens, written out."""
    mixer = build(models.Spec(nn.memory_as_layer, heads=N, window=3, persistent=2, memory=MEMORY))
    tokens = jnp.concatenate([jnp.broadcast_to(mixer.prefix[...], (B, 2, D)), X], 1)
    recurrent, attention = mixer.mixer.mixers
    m = recurrent(tokens)[0]
    q, k, v = (f(m).reshape(B, T + 2, N, -1) for f in (attention.query, attention.key, attention.value))
    q, k, v = (np.asarray(x, np.float64) for x in (*(rotary(x, jnp.arange(T + 2), 1e4) for x in (q, k)), v))
    i, j = np.indices((T + 2, T + 2))
    shown = (j <= i) & ((j >= i - 2) | (j < 2))
    weights = np.where(shown, np.exp(np.einsum("btnh,bsnh->bnts", q, k) / (D // N) ** 0.5), 0)
    z = np.einsum("bnts,bsnv->btnv", weights / weights.sum(-1, keepdims=True), v).reshape(B, T + 2, D)
    assert_close(mixer(X)[0], (z @ np.asarray(attention.out.kernel[...], np.float64))[:, 2:])


def test_memory_as_context_is_its_definition():
    """The second segment by hand: what the memory recalls after the first, attention, and what it then learns."""
    mixer = build(SPECS["memory as context"])
    size, count = 4, 2
    whole = jnp.stack(alone(mixer, *X))
    learned, per_token = None, mixer.memory
    persistent = jnp.broadcast_to(mixer.persistent[...], (B, count, D))
    for first in (0, size):
        x = X[:, first : first + size]
        inputs, rest = per_token.inputs(x, jnp.zeros((B, size), int), nn.Past({}, jnp.ones((B, size), bool), None))
        recalled, _ = memory_scan(
            inputs.memory, *inputs[1:4], rate=0.0, log_momentum=-jnp.inf, state=learned, inner_batch=2
        )
        h = per_token.output(recalled, rest)
        y = []
        for i in range(size):  # token by token: P, h_1, x_1, ..., h_i, x_i
            pairs = jnp.stack([h, x], 2)[:, : i + 1].reshape(B, 2 * (i + 1), D)
            y.append(mixer.attention(jnp.concatenate([persistent, pairs], 1))[0][:, -1])
        y = jnp.stack(y, 1)
        inputs, rest = per_token.inputs(y, jnp.zeros((B, size), int), nn.Past({}, jnp.ones((B, size), bool), None))
        read, learned = memory_scan(
            *inputs[:4],
            rate=inputs.rate,
            log_decay=inputs.log_decay,
            log_momentum=inputs.log_momentum,
            state=learned,
            inner_batch=2,
        )
        m = per_token.output(read, rest)
        norm, gate_norm = mixer.norms
        assert_close(whole[:, first : first + size], norm(y) * nnx.sigmoid(gate_norm(m)))


def test_a_row_with_too_many_documents_is_nan_and_no_other():
    mixer = build(SPECS["memory as gate"])
    ids = jnp.array([[0] * 3 + [1] * 4 + [2] * 4, [0] * 5 + [1] * 6])
    y, _, _ = run(mixer, X, mask=Documents(ids))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


def test_errors_name_what_is_wrong():
    rngs = nnx.Rngs(0)
    attention = nn.MultiHeadAttention(D, N, rngs=rngs)
    for make, message in (
        (lambda: nn.Parallel(D, [attention], rngs=rngs), "mixers holds 1: need at least 2"),
        (lambda: nn.Parallel(D, [attention] * 2, fuse="sum", rngs=rngs), "fuse is 'sum': need one of mean, gate"),
        (lambda: nn.Chain([]), "mixers is empty"),
        (lambda: nn.Prefixed(attention, D, 0, rngs=rngs), "tokens must be at least 1, got 0"),
        (
            lambda: nn.as_mixer(
                models.Spec(nn.MemoryAsContext, heads=N, memory=MEMORY, segment=32, persistent=4),
                features=D,
                dtype=None,
                rngs=rngs,
            ),
            "need convolution=0",
        ),
        (
            lambda: nn.as_mixer(
                models.Spec(nn.MemoryAsContext, heads=N, segment=3, memory=STILL, persistent=4),
                features=D,
                dtype=None,
                rngs=rngs,
            ),
            "segment is 3",
        ),
        (
            lambda: nn.as_mixer(
                models.Spec(nn.memory_as_gate, heads=N, window=0, persistent=4, memory=MEMORY),
                features=D,
                dtype=None,
                rngs=rngs,
            ),
            "need window >= 1",
        ),
        (
            lambda: nn.as_mixer(models.Spec(nn.hymba_heads, heads=3), features=D, dtype=None, rngs=rngs),
            "heads is 3: need a divisor of 32",
        ),
        (lambda: call(nn.Chain([attention]), X, context=X), "context is given"),
        (lambda: nn.S6(D, state=0, rngs=rngs), "state must be at least 1, got 0"),
        (lambda: nn.GatedConvolution(D, expand=0, rngs=rngs), "expand must be at least 1, got 0"),
        (lambda: nn.Latte(D, N, causal=False, window=3, rngs=rngs), "need a window of at least 1, and a causal mixer"),
        (
            lambda: nn.MultiHeadAttention(D, N, keys_from="layer", rngs=rngs)(X),
            "context must be the KeyValue of another",
        ),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            make()
    prefixed = nn.Prefixed(attention, D, 2, rngs=rngs)
    with pytest.raises(ValueError, match="positions are given for packed rows behind a prefix"):
        call(prefixed, X, positions=jnp.arange(T), mask=Documents(jnp.zeros((B, T), int)))


FULL = {
    "hymba without a window": models.Spec(nn.hymba_heads, heads=N, key_heads=1, state=3),
    "prefixed": None,
}


@pytest.mark.parametrize("name", [*FULL, *SPECS])
def test_past_the_capacity_a_mixer_is_nan_or_goes_on_rightly(name):
    """NaN where an attention keeps all of its keys; right where it has a window, or a memory of fixed size."""
    if name == "prefixed":
        attention = nn.MultiHeadAttention(D, N, mask=Causal(), rngs=nnx.Rngs(0))
        mixer = nn.Prefixed(attention, D, 2, rngs=nnx.Rngs(1))
    else:
        mixer = build((FULL | SPECS)[name])
    whole, state = jnp.stack(alone(mixer, *X)), start(mixer, B, 5)
    for token in range(7):
        y, state, _ = run(mixer, X[:, token : token + 1], state=state)
        if name in SPECS or token < 5:
            assert_close(y[:, 0], whole[:, token])
        else:
            assert np.isnan(y).all()


def test_a_mask_and_a_state_behind_a_prefix_are_refused():
    """It would be read at places that count the prefix."""
    prefixed = nn.Prefixed(nn.MultiHeadAttention(D, N, mask=Causal(), rngs=nnx.Rngs(0)), D, 2, rngs=nnx.Rngs(1))
    for mask in (Window(2), Explicit(np.tri(T, dtype=bool))):
        with pytest.raises(ValueError, match="a recurrence or convolution takes None"):
            call(prefixed, X, mask=mask, state=prefixed.init_state(B, T))
    with pytest.raises(ValueError, match="mask has documents and a state is given: need one or the other behind"):
        call(prefixed, X, mask=Documents(jnp.zeros(T, int)), state=prefixed.init_state(B, T))


def test_a_prefix_before_packed_rows_leaves_attention_in_both_directions():
    """One document is the same row, also where attention is not causal."""
    prefixed = nn.Prefixed(nn.MultiHeadAttention(D, N, position=None, rngs=nnx.Rngs(0)), D, 2, rngs=nnx.Rngs(1))
    assert_close(call(prefixed, X, mask=Documents(jnp.zeros(T, int)))[0], call(prefixed, X)[0])


def test_a_ring_with_sinks_is_refused_under_documents():
    """Its sinks are those of the row, and the mask means those of each document."""
    attention = nn.MultiHeadAttention(D, N, mask=Sinks(1) | Window(1), rngs=nnx.Rngs(0))
    documents = Documents(jnp.array([0] * 5 + [1] * 6))
    with pytest.raises(ValueError, match=r"mask has documents, .* keeps tokens by their place in the row \(Recent\)"):
        call(attention, X[:, :1], mask=documents, state=attention.init_state(B, T))
    bare = nn.MultiHeadAttention(D, N, rngs=nnx.Rngs(0))  # no mask of its own that could be meant within documents
    y, _, _ = call(bare, X[:, :1], mask=documents, state=bare.init_state(B, T, Policy(Recent(1), 4)))
    assert_close(y, call(bare, X[:, :1])[0])
    state, whole = attention.init_state(B, T, Policy()), call(attention, X, mask=documents)[0]
    for token in range(T):
        y, state, _ = call(attention, X[:, token : token + 1], mask=documents, state=state)
        assert_close(y[:, 0], whole[:, token])
