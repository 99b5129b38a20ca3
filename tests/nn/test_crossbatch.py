"""Other rows of a batch as a memory (Focused Transformer): one softmax, no leak, and decoding that is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import call
from multi_head import randomise

from jaxattn import Causal, Documents, SoftCap, nn
from jaxattn.cache import MemoryAtStart, Policy
from jaxattn.core.attend import crossbatch_kv, distraction
from jaxattn.models import Spec, Transformer, TransformerConfig, from_plain, pre_norm, replace_mixers, to_plain
from jaxattn.nn import MultiHeadAttention, NullSoftmax

B, T, D, N, K = 4, 5, 16, 4, 2
EPS = float(np.finfo(np.float32).eps)
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)


def made(**options):
    module = MultiHeadAttention(D, N, key_heads=K, mask=Causal(), **options, rngs=nnx.Rngs(0))
    return randomise(module)


def close(actual, expected, factor=300):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=factor * EPS * abs(expected).max())


@pytest.mark.parametrize("wrap", [False, True])
def test_rows_see_the_rows_before_them(wrap):
    """By a loop; padding and rows that do not exist have the position −1."""
    rng, offsets = np.random.default_rng(1), (2, 0, 1)
    key, value = rng.standard_normal((B, 3, K, 2)), rng.standard_normal((B, 3, 1, 4))
    positions = np.array([[0, 1, 2], [-1, 0, 1], [0, -1, -1], [0, 1, 2]])
    memory = crossbatch_kv(jnp.asarray(key), jnp.asarray(value), offsets, positions=jnp.asarray(positions), wrap=wrap)
    for b in range(B):
        for c, offset in enumerate(offsets):
            row, piece = b - offset, slice(3 * c, 3 * c + 3)
            if row < 0 and not wrap:
                assert (memory.positions[b, piece] == -1).all()
                continue
            np.testing.assert_array_equal(memory.key[b, piece], key[row].astype(np.float32))
            np.testing.assert_array_equal(memory.value[b, piece], value[row].astype(np.float32))
            expected = np.where(positions[row] < 0, -1, np.arange(3 * c, 3 * c + 3))
            np.testing.assert_array_equal(memory.positions[b, piece], expected)


def test_memory_and_row_are_one_softmax_with_gradients_into_other_rows():
    """In float64, by a softmax over the keys of both, side by side, of each query; no row sees a later one."""
    with jax.enable_x64(True):
        options = {"normalize": Spec(NullSoftmax), "score_maps": (SoftCap(5.0),), "dtype": jnp.float64}
        module = made(crossbatch=(1, 2), **options)
        nnx.update(module, jax.tree.map(lambda x: x.astype(np.float64), nnx.state(module, nnx.Param)))
        x = jnp.asarray(X, jnp.float64)
        y = module(x)[0]
        query, (key, value) = module.queries(x), module.keys_and_values(x)
        at = jnp.arange(T)
        turned = module.turn(query, at), module.turn(key, at)
        z = np.zeros((B, T, N, D // N))
        null = np.asarray(module.normalize.null_logit[...])
        for b, t, n in np.ndindex(B, T, N):
            rows = [b - o for o in (1, 2) if b - o >= 0]
            keys = np.concatenate([turned[1][b, : t + 1, n // 2], *(key[row, :, n // 2] for row in rows)])
            values = np.concatenate([value[b, : t + 1, n // 2], *(value[row, :, n // 2] for row in rows)])
            scores = 5 * np.tanh(keys @ np.asarray(turned[0][b, t, n]) / 2 / 5)
            z[b, t, n] = np.exp(scores) @ values / (np.exp(scores).sum() + np.exp(null[n]))
        np.testing.assert_allclose(y, module.merge(jnp.asarray(z), x), rtol=1e-11, atol=1e-12)
        slopes = jax.jacobian(lambda x: module(x)[0].sum((1, 2)))(x)
        seen = np.asarray(abs(slopes).sum((2, 3)) > 0)
        np.testing.assert_array_equal(seen, [[b - o in range(3) for o in range(B)] for b in range(B)])


def test_evaluation_and_states_see_no_other_row():
    module, plain = made(crossbatch=(1,)), made()
    expected, _ = plain(X)
    assert abs(module(X)[0] - expected)[1:].max() > 1e-2
    close(module(X)[0][0], expected[0])  # the first row has none before it
    close(call(module, X, state=module.init_state(B, T))[0], expected)
    module.eval()
    np.testing.assert_array_equal(module(X)[0], expected)


@pytest.mark.parametrize("cut", [[1] * T, [3, 2]], ids=str)
def test_windows_of_a_text_side_by_side_in_a_batch_are_the_text_read_with_a_memory(cut):
    """Rows in their order, each of which sees all before it, against decoding of one long row."""
    module = made(crossbatch=tuple(range(1, B)))
    expected, _ = module(X)
    state, pieces = module.init_state(1, B * T, Policy(key_position=MemoryAtStart(T))), []
    step = nnx.jit(lambda module, x, state: call(module, x, state=state)[:2])
    for row in X:
        first = 0
        for size in cut:
            y, state = step(module, row[None, first : first + size], state)
            pieces.append(y)
            first += size
    close(jnp.concatenate(pieces, 1)[0], expected.reshape(B * T, D))


def test_distraction_is_the_share_of_the_own_context():
    """By the weights of all contexts; even attention has 1 / d, and without contexts it is 0."""
    rng, offsets = np.random.default_rng(2), (1, 2, 3)
    query, key = rng.standard_normal((B, T, N, 4)), rng.standard_normal((B, T, K, 4))
    found = np.asarray(distraction(jnp.asarray(query), jnp.asarray(key), offsets))
    for b, t, n in np.ndindex(B, T, N):
        rows = [b - o for o in offsets if b - o >= 0]
        mass = [np.exp(key[row, :, n // 2] @ query[b, t, n] / 2).sum() for row in rows]
        np.testing.assert_allclose(found[b, t, n], mass[0] / sum(mass) if rows else 0, rtol=1e-4)
    even = distraction(jnp.zeros((B, T, N, 4)), jnp.asarray(key), offsets, wrap=True)
    np.testing.assert_allclose(even, 1 / 3, rtol=1e-6)


def test_a_trained_decoder_gets_a_memory_in_some_layers():
    layers = [pre_norm(Spec(MultiHeadAttention, heads=N), Spec(nn.FeedForward, hidden=8))] * 3
    model = Transformer(TransformerConfig(11, 16, D, layers), rngs=nnx.Rngs(0))
    focused = replace_mixers(model, lambda layer, mixer: mixer.replace(crossbatch=(1, 2)) if layer == 1 else mixer)
    assert from_plain(to_plain(focused.config)) == focused.config
    tokens = np.random.default_rng(3).integers(0, 11, (B, T))
    before, after = (each(tokens, record=("resid",))[2]["resid"] for each in (model, focused))
    np.testing.assert_array_equal(after[0], before[0])
    assert abs(after[1] - before[1])[1:].max() > 1e-3
    focused.eval()
    close(focused(tokens)[0], model(tokens)[0])


def test_errors_name_what_is_wrong():
    key = jnp.ones((B, T, K, 4))
    for offsets, error, message in (
        ((), ValueError, r"offsets is \(\): need at least one"),
        ((-1,), ValueError, r"offsets is \(-1,\): need at least one, from 0 on unless wrap=True"),
        ((1.0,), TypeError, "offsets must be ints"),
    ):
        with pytest.raises(error, match=message):
            crossbatch_kv(key, key, offsets)
    for options in ({"crossbatch": (0,)}, {"crossbatch": (1,), "dropout": 0.1}, {"crossbatch": (1,), "convolution": 2}):
        with pytest.raises(ValueError, match=r"crossbatch is .*: need offsets from 1 on, keys_from='self', Softmax"):
            made(**options)
    with pytest.raises(ValueError, match="mask has documents, but with crossbatch the rows of a batch are texts"):
        call(made(crossbatch=(1,)), X, mask=Documents(jnp.zeros(T, int)))
    with pytest.raises(ValueError, match="MemoryAtStart: window must be at least 1, got 0"):
        MemoryAtStart(0)
