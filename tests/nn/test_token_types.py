"""Types of tokens (Neural Attention Search): parallel, token by token and in pieces are one mask, which learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from multi_head import randomise

from jaxattn import Causal, Documents, Explicit, Softmax, nn
from jaxattn.cache import HeavyHitters, Policy, Unexpired
from jaxattn.core.attend import GLOBAL, LOCAL, WINDOW, choose_types, lifetime_pressure
from jaxattn.models import Spec, Transformer, TransformerConfig, from_plain, generate, pre_norm, to_plain
from jaxattn.nn import MultiHeadAttention, Tap, Tokens, TokenTypes

B, T, D, N, K, W = 2, 20, 16, 4, 2, 2
EPS = float(np.finfo(np.float32).eps)
X = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
PADDING = {
    "none": np.tile(np.arange(T), (B, 1)),
    "left and gaps": np.stack([np.where(np.arange(T) < 5, -1, np.arange(T) - 5),
                               np.where(np.arange(T) % 6 == 3, -1, np.cumsum(np.arange(T) % 6 != 3) - 1)]),
}  # fmt: skip
CUTS = {"one by one": [1] * T, "at once": [T], "pieces": [7, 1, 5, 1, 1, 5]}


def build(types=None, **options):
    types = Spec(TokenTypes, window=W) if types is None else types
    return randomise(MultiHeadAttention(D, N, key_heads=K, mask=Causal(), types=types, **options, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def module():
    module = build()
    module.eval()
    return module


def plain(module):
    """The same attention without types."""
    same = MultiHeadAttention(D, N, key_heads=K, mask=Causal(), rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "out"):
        getattr(same, name).kernel[...] = getattr(module, name).kernel[...]
    return same


def types_of(module):
    """[B, T, K], in float64: the largest of three numbers."""
    logits = X.astype(np.float64) @ np.asarray(module.types.types.kernel[...], np.float64)
    return logits.reshape(B, T, K, 3).argmax(-1)


def kept(kinds, positions):
    """[T, T]: what each token reads of a list from which tokens go as they expire; the first of a row is global."""
    seen, held = np.zeros((len(kinds), len(kinds)), bool), {}
    for t, (kind, position) in enumerate(zip(kinds, positions, strict=True)):
        if position < 0:
            continue
        held = {j: each for j, each in held.items() if each != WINDOW or position - positions[j] <= W}
        held[t] = GLOBAL if position == 0 else kind
        seen[t, list(held)] = True
        if held[t] == GLOBAL:  # which still saw the local tokens before it
            held = {j: each for j, each in held.items() if each != LOCAL}
    return seen


@nnx.jit
def step(module, x, positions, store):
    tap = Tap(record=("read",))
    y, store = module(x, Tokens.of(x, positions=positions), tap, store)
    return y, store, tap.records["read"]


def decoded(module, policy, positions, cut):
    """(y, what each token read of its store: True for [B, T, K, place]); empty slots begin as NaN."""
    store = module.init_state(B, T, policy)
    store = dataclasses.replace(store, held=jax.tree.map(lambda x: x + np.nan, store.held))
    pieces, reads, first = [], np.zeros((B, T, K, T), bool), 0
    for size in cut:
        piece = slice(first, first + size)
        y, store, read = step(module, jnp.asarray(X[:, piece]), jnp.asarray(positions[:, piece]), store)
        pieces.append(y)
        read = np.broadcast_to(read, (*read.shape[:2], K))
        for b, t, k in np.ndindex(B, size, K):
            reads[b, first + t, k, read[b, read[b, :, k] >= 0, k]] = True
        first += size
    return np.concatenate(pieces, 1), reads


@pytest.mark.parametrize("padding", PADDING)
def test_parallel_and_decoded_are_attention_under_the_mask_of_what_has_not_expired(module, padding):
    """However the tokens come. Token by token the store holds exactly what the mask shows."""
    positions, kinds = PADDING[padding], types_of(module)
    there, by_token = positions >= 0, np.zeros((B, K, T, T), bool)
    by_place = by_token.copy()
    for b, k in np.ndindex(B, K):
        by_token[b, k] = kept(kinds[b, :, k], positions[b])
        at = positions[b, there[b]]
        by_place[np.ix_([b], [k], at, at)] = by_token[b, k][np.ix_(there[b], there[b])]
    mask, causal = Explicit(jnp.asarray(by_place.repeat(N // K, 1))), np.tri(T, dtype=bool)
    expected, _ = plain(module)(jnp.asarray(X), Tokens.of(X, positions=jnp.asarray(positions), mask=mask))
    dense, _ = plain(module)(jnp.asarray(X), Tokens.of(X, positions=jnp.asarray(positions)))
    assert (causal & ~by_place).any((2, 3)).all()  # something expires in every head
    assert abs(np.asarray(dense - expected))[there].max() > 0.01
    tolerance = 300 * EPS * abs(np.asarray(expected)).max()
    parallel, _ = nnx.jit(lambda m, x, p: m(x, Tokens.of(x, positions=p)))(
        module, jnp.asarray(X), jnp.asarray(positions)
    )
    np.testing.assert_allclose(parallel[there], expected[there], rtol=0, atol=tolerance)
    for name, cut in CUTS.items():
        y, reads = decoded(module, None, positions, cut)
        np.testing.assert_allclose(y[there], expected[there], rtol=0, atol=tolerance)
        for b, t in zip(*np.nonzero(there & (name == "one by one")), strict=True):
            np.testing.assert_array_equal(reads[b, t], by_place[b, :, positions[b, t]])


def test_documents_of_a_row_have_the_types_that_they_have_alone(module):
    """In use, and in training, where the first token of each is global; padding may stand behind."""
    ids = np.array([0] * 8 + [1] * 10 + [-1] * 2)
    x, tokens = jnp.asarray(X), Tokens.of(X, mask=Documents(jnp.asarray(ids)))
    call = nnx.jit(lambda module, x, tokens: module(x, tokens)[0])
    y = call(module, x, tokens)
    for first, last in ((0, 8), (8, 18)):
        alone = call(module, x[:, first:last], None)
        np.testing.assert_allclose(y[:, first:last], alone, rtol=0, atol=300 * EPS * abs(np.asarray(alone)).max())
    choice = build().types.draw(x, tokens)
    assert (choice[:, :, [0, 8], GLOBAL] == 1).all()
    assert (choice[:, :, 18:, WINDOW] == 1).all()


def test_with_too_few_slots_the_oldest_goes_and_the_step_reads_what_is_left(module):
    """Replay: a dense pass under the mask of what was read."""
    y, reads = decoded(module, Policy(Unexpired(), 4), PADDING["none"], [1] * T)
    shown = np.stack([[kept(types_of(module)[b, :, k], np.arange(T)) for k in range(K)] for b in range(B)])
    assert (reads.swapaxes(1, 2) <= shown).all()
    assert reads.sum(-1).max() == 4 < shown.sum(-1).max()
    assert reads[..., 0].all()
    mask = Explicit(jnp.asarray(reads.swapaxes(1, 2).repeat(N // K, 1)))
    expected, _ = plain(module)(jnp.asarray(X), Tokens.of(X, mask=mask))
    np.testing.assert_allclose(y, expected, rtol=0, atol=300 * EPS * abs(np.asarray(expected)).max())


def test_training_attends_under_the_types_that_it_draws_and_presses_on_their_lifetimes():
    """The gradient with pressure less that without is λ times that of the lifetimes, and `detach` keeps it from x."""
    strong, positions = 0.3, jnp.asarray(PADDING["left and gaps"])
    x, there = jnp.asarray(X), PADDING["left and gaps"] >= 0
    goal = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, D)) * there[..., None], jnp.float32)

    @nnx.jit
    def slopes(module, x):
        def loss(module, x):
            return (goal * module(x, Tokens.of(x, positions=positions))[0]).sum()

        return nnx.grad(loss, argnums=(0, 1))(module, x)

    @nnx.jit
    def drawn(module, x):
        def lifetimes(module, x):
            return lifetime_pressure(module.types.draw(x, Tokens.of(x, positions=positions))).sum()

        choice = nnx.clone(module).types.draw(x, Tokens.of(x, positions=positions))
        return choice, nnx.grad(lifetimes, argnums=(0, 1))(module, x)

    found, of_x = {}, {}
    for name, pressure, detach in (("free", 0.0, False), ("pressed", strong, False), ("detached", strong, True)):
        module = build(Spec(TokenTypes, window=W, pressure=pressure, detach=detach))
        grads, of_x[name] = slopes(module, x)
        found[name] = grads["types"]["types"]["kernel"][...]
    choice, (grads, of_lifetimes) = drawn(build(Spec(TokenTypes, window=W, pressure=0.0)), x)
    expected = strong * grads["types"]["types"]["kernel"][...]
    assert abs(expected).max() > 0.01
    scale = abs(found["pressed"]).max() * 1000 * EPS
    np.testing.assert_allclose(found["pressed"] - found["free"], expected, rtol=0, atol=scale)
    np.testing.assert_allclose(found["detached"], found["pressed"], rtol=0, atol=scale)
    np.testing.assert_allclose(of_x["pressed"] - of_x["free"], strong * of_lifetimes, rtol=0, atol=scale)
    assert abs(of_x["detached"] - of_x["pressed"]).max() > 0.01

    module, kinds = build(), np.asarray(choice.argmax(-1))  # of the first call of the same stream
    y, _ = module(x, Tokens.of(x, positions=positions))
    mask = np.stack([[kept(kinds[b, k], np.arange(T)) for k in range(K)] for b in range(B)])
    mask = Explicit(jnp.asarray(mask.repeat(N // K, 1)))
    expected, _ = plain(module)(x, Tokens.of(x, positions=positions, mask=mask))
    np.testing.assert_allclose(y[there], expected[there], rtol=0, atol=300 * EPS * abs(np.asarray(expected)).max())
    forced = np.asarray(choice_at_ends(module))
    assert (forced.argmax(-1) == GLOBAL).all()


def choice_at_ends(module):
    logits = module.types.logits(jnp.asarray(X)).swapaxes(1, 2)
    return choose_types(logits, jax.random.key(3))[:, :, [0, -1]]


def test_a_model_with_types_decodes_as_it_reads_and_a_config_can_say_it():
    layers = [pre_norm(Spec(nn.MultiHeadAttention, heads=N, key_heads=K, types=Spec(TokenTypes, window=W)))] * 2
    config = from_plain(to_plain(TransformerConfig(11, T, D, layers)))
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 11, (B, T)))
    call = nnx.jit(lambda model, tokens, state: model(tokens, state=state)[:2])
    assert abs(call(model, tokens, None)[0] - call(model, tokens, None)[0]).max() > 1e-3  # types are drawn anew
    model.eval()
    (whole, _), state = call(model, tokens, None), model.init_state(B, T)
    pieces = []
    for first, last in ((0, 9), *((t, t + 1) for t in range(9, T))):
        logits, state = call(model, tokens[:, first:last], state)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=0, atol=1000 * EPS * abs(whole).max())
    text = generate(model, tokens[:, :9], max_new_tokens=1, temperature=0.0).tokens
    np.testing.assert_array_equal(text[:, 0], whole[:, 8].argmax(-1))


def test_gradients_through_decoding_are_those_of_the_parallel_form():
    """In float64, of inputs and of every parameter but the types, which have none where they are not drawn."""
    with jax.enable_x64(True):
        module = build(dtype=jnp.float64)
        module.eval()
        graph, arrays, rest = nnx.split(module, nnx.Param, ...)
        arrays = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        x, goal = (jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, D))) for seed in (0, 7))

        def decoded_loss(arrays, x):
            prompt, store = nnx.merge(graph, arrays, rest)(x[:, :8], state=module.init_state(B, T))

            def one(store, x):
                y, store = nnx.merge(graph, arrays, rest)(x[:, None], state=store)
                return store, y[:, 0]

            _, after = jax.lax.scan(one, store, jnp.moveaxis(x[:, 8:], 1, 0))
            return (goal * jnp.concatenate([prompt, jnp.moveaxis(after, 0, 1)], 1)).sum()

        def parallel_loss(arrays, x):
            return (goal * nnx.merge(graph, arrays, rest)(x)[0]).sum()

        found, expected = (jax.jit(jax.grad(f, (0, 1)))(arrays, x) for f in (decoded_loss, parallel_loss))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11 * max(abs(np.asarray(other)).max(), 1))
        assert (found[0]["types"]["types"]["kernel"][...] == 0).all()


def test_what_does_not_go_with_types_is_refused(module):
    x = jnp.asarray(X)
    with pytest.raises(ValueError, match=r"store keeps tokens by HeavyHitters, but types say .* need Policy"):
        module.init_state(B, T, Policy(HeavyHitters(1, 2), 8))
    untyped = plain(module)
    with pytest.raises(ValueError, match=r"facts lacks \['expires'\], by which Unexpired keeps tokens"):
        untyped(x, state=untyped.init_state(B, T, Policy(Unexpired(), 8)))
    with pytest.raises(ValueError, match=r"positions reaches 20, but types are told apart below 20"):
        module(x, Tokens.of(x, positions=jnp.arange(1, T + 1)))
    beyond = nnx.jit(lambda m, p: m(x, Tokens.of(x, positions=p))[0])(module, PADDING["none"] + np.array([[0], [1]]))
    assert np.isfinite(beyond[0]).all()
    assert np.isnan(beyond[1]).all()
    with pytest.raises(ValueError, match="another layer takes the keys, but not when they expire"):
        module(x, give={})
    with pytest.raises(ValueError, match=r"need Softmax\(\) without a null logit"):
        build(normalize=Softmax(null_logit=jnp.zeros(N)))
    with pytest.raises(ValueError, match="need keys of x alone"):
        build(crossbatch=(1,))
    with pytest.raises(ValueError, match="pressure must be at least 0"):
        build(Spec(TokenTypes, pressure=-1.0))
    with pytest.raises(ValueError, match="window must be at least 0"):
        build(Spec(TokenTypes, window=-1))
