"""Decode = prefill: fed piece by piece through a cache, attention gives what one masked pass over everything gives.

The reference is a pass over the sequences alone: no cache, no padding, no positions. Padding holds NaN, so whoever
reads it shows it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import call
from multi_head import assert_close, randomise

from jaxattn import Alibi, Causal, Sigmoid, Sinks, Window
from jaxattn.models import Spec
from jaxattn.nn import LatentAttention, MultiHeadAttention, NullSoftmax, RMSNorm

D, T = 16, 7
LENGTHS = np.array([7, 5, 3])
LATENT = {"kind": LatentAttention, "rank": 6, "query_rank": 5}
MIXERS = {
    "rotary": lambda: {"mask": Causal()},
    "window and sinks": lambda: {"mask": Causal() & (Window(2) | Sinks(1))},
    "alibi": lambda: {"mask": Causal(), "position": None, "bias": Alibi.geometric(4)},
    "sigmoid": lambda: {"mask": Causal(), "normalize": Sigmoid()},
    "null logit": lambda: {"mask": Causal(), "normalize": NullSoftmax(4)},
    "convolution": lambda: {"mask": Causal(), "key_heads": 2, "convolution": 3},
    "smeared keys": lambda: {"mask": Causal(), "key_heads": 2, "smear": True},
    "grouped, qk-norm, gate": lambda: {
        "mask": Causal(),
        "key_heads": 2,
        "head_dim": 6,
        "qk_norm": Spec(RMSNorm),
        "gate": True,
    },
    "latent": lambda: {**LATENT, "mask": Causal()},
    "latent, naive, window and sinks": lambda: {**LATENT, "mask": Causal() & (Window(2) | Sinks(1)), "form": "naive"},
}
# How the tokens of three sequences of lengths 7, 5 and 3 are laid out, and cut into calls.
LAYOUTS = {"full": None, "right-padded": "right", "left-padded": "left"}
CUTS = {"token by token": [1] * T, "3 then 4": [3, 4]}


@nnx.jit
def run(module, x, **options):
    y, state, _ = call(module, x, **options)
    return y, state


@pytest.fixture(scope="module", params=MIXERS)
def mixer(request):
    options = MIXERS[request.param]()
    module = randomise(options.pop("kind", MultiHeadAttention)(D, 4, **options, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((3, T, D)).astype(np.float32)
    return module, x, np.asarray(run(module, x)[0])


def laid_out(x, padding):
    """(inputs, positions, where token t of sequence b is): the layout of the three sequences."""
    lengths = LENGTHS if padding else np.full(3, T)
    first = T - lengths if padding == "left" else np.zeros(3, int)
    inputs, positions = np.full_like(x, np.nan), np.full((3, T), -1)
    for b, (start, length) in enumerate(zip(first, lengths, strict=True)):
        inputs[b, start : start + length], positions[b, start : start + length] = x[b, :length], np.arange(length)
    return inputs, positions, [(b, np.arange(n), first[b] + np.arange(n)) for b, n in enumerate(lengths)]


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("padding", LAYOUTS.values(), ids=LAYOUTS)
def test_decode_is_prefill(mixer, padding, cut):
    module, x, expected = mixer
    inputs, positions, places = laid_out(x, padding)
    state, pieces, start = module.init_state(3, T), [], 0
    for size in cut:
        piece = slice(start, start + size)
        y, state = run(module, inputs[:, piece], positions=jnp.asarray(positions[:, piece]), state=state)
        pieces.append(np.asarray(y))
        start += size
    y = np.concatenate(pieces, axis=1)
    for b, tokens, slots in places:
        assert_close(y[b, slots], expected[b, tokens])
        assert_holds(state.positions[b, :, 0], len(tokens))


def assert_holds(positions, count):
    """All of the tokens, or the first, which is pinned, and the last of them."""
    slots = len(positions)
    held = [*range(count), *[-1] * (slots - count)] if count <= slots else [0, *range(count - slots + 1, count)]
    np.testing.assert_array_equal(positions if count <= slots else sorted(np.asarray(positions)), held)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_without_a_cache_changes_nothing(mixer, padding):
    module, x, expected = mixer
    inputs, positions, places = laid_out(x, padding)
    y, state = run(module, inputs, positions=jnp.asarray(positions))
    assert state is None
    for b, tokens, slots in places:
        assert_close(np.asarray(y)[b, slots], expected[b, tokens])


def test_a_cache_may_be_larger_than_the_sequence_and_positions_default_to_the_first(mixer):
    module, x, expected = mixer
    y, state = run(module, x, state=module.init_state(3, T + 5))
    assert_close(y, expected)
    for positions in state.positions[..., 0]:
        assert_holds(positions, T)


def test_empty_slots_are_not_seen_where_no_mask_hides_the_future():
    module = randomise(MultiHeadAttention(D, 4, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((3, T, D)).astype(np.float32)
    first, state = run(module, x[:, :3], state=module.init_state(3, T + 2))
    assert_close(first, run(module, x[:, :3])[0])
    rest, _ = run(module, x[:, 3:], positions=jnp.arange(3, T), state=state)
    assert_close(rest, run(module, x)[0][:, 3:])


def test_decoding_runs_inside_a_loop():
    module = randomise(MultiHeadAttention(D, 4, mask=Causal(), rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((3, T, D)).astype(np.float32)
    graph, arrays = nnx.split(module)

    @partial(jax.jit, static_argnums=0)
    def loop(graph, arrays, x):
        def one(state, token):
            position, x = token
            y, state, _ = call(nnx.merge(graph, arrays), x[:, None], positions=position[None], state=state)
            return state, y[:, 0]

        return jax.lax.scan(one, module.init_state(3, T), (jnp.arange(T), x.swapaxes(0, 1)))[1].swapaxes(0, 1)

    assert_close(loop(graph, arrays, x), run(module, x)[0])


def test_decoding_without_positions_goes_on_after_the_last_token():
    module = MultiHeadAttention(16, 4, mask=Causal(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    whole, _ = module(x)
    state, pieces = module.init_state(2, 8), []
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        y, state, _ = call(module, x[:, start:stop], state=state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=40 * np.finfo(np.float32).eps)
    assert state.positions[..., 0].tolist() == [[0, 1, 2, 3, 4, -1, -1, -1]] * 2


# Decoding past the capacity.

CAPACITY = 5


@pytest.mark.parametrize("cut", [[1] * T, [3, 4], [4, 3], [5, 2]], ids=str)
@pytest.mark.parametrize("padding", LAYOUTS.values(), ids=LAYOUTS)
def test_a_token_beyond_the_capacity_is_nan_under_jit_and_the_others_are_right(mixer, padding, cut, request):
    """All of a window goes into a cache of 5 slots, so that it is right for ever: 7 tokens or any number."""
    module, x, expected = mixer
    ring = module.init_state(3, CAPACITY).retain.evicts
    assert ring == ("window and sinks" in request.node.callspec.params["mixer"])
    inputs, positions, places = laid_out(x, padding)
    state, pieces, start = module.init_state(3, CAPACITY), [], 0
    for size in cut:
        piece = slice(start, start + size)
        y, state = run(module, inputs[:, piece], positions=jnp.asarray(positions[:, piece]), state=state)
        pieces.append(np.asarray(y))
        start += size
    y = np.concatenate(pieces, axis=1)
    for b, tokens, slots in places:
        fits = tokens < (T if ring else CAPACITY)
        assert_close(y[b, slots[fits]], expected[b, tokens[fits]])
        assert np.isnan(y[b, slots[~fits]]).all()


@pytest.mark.parametrize("cut", [[1] * T, [4, 3]], ids=str)
def test_a_position_beyond_the_capacity_is_refused_where_it_is_known(cut):
    module = MultiHeadAttention(D, 4, mask=Causal(), rngs=nnx.Rngs(0))
    x = jnp.ones((3, T, D))

    def decode(given):
        state, start = module.init_state(3, CAPACITY), 0
        for size in cut:
            positions = jnp.arange(start, start + size) if given else None
            _, state, _ = call(module, x[:, start : start + size], positions=positions, state=state)
            start += size

    for given in (True, False):
        with pytest.raises(
            ValueError, match=rf"positions reaches {5 if cut[0] == 1 else 6} but the state has capacity 5"
        ):
            decode(given)


def test_a_window_that_does_not_fit_into_the_capacity_is_no_ring():
    """It would forget what it should see: 4 tokens of a window of 6."""
    module = randomise(MultiHeadAttention(D, 4, mask=Window(5), rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((3, T, D)).astype(np.float32)
    state, whole = module.init_state(3, 4), np.asarray(run(module, x)[0])
    for token in range(T):
        y, state = run(module, x[:, token : token + 1], state=state)
        if token < 4:
            assert_close(y[:, 0], whole[:, token])
        else:
            assert np.isnan(y).all()


@pytest.mark.parametrize("left", [2, 4])
def test_records_of_a_ring_stand_at_the_positions_of_keys(left):
    """Also where it has as many slots as positions; beyond the capacity they have no place, and are NaN."""
    module = randomise(MultiHeadAttention(D, 4, mask=Window(left), rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((1, T, D)).astype(np.float32)
    decode = nnx.jit(lambda module, x, state: call(module, x, state=state, record=("weights",)))
    whole = decode(module, x, None)[2]["weights"]
    state = module.init_state(1, 5)
    _, state, records = decode(module, x[:, :3], state)
    assert_close(records["weights"][..., :3], whole[..., :3, :3])
    _, state, records = decode(module, x[:, 3:5], state)
    assert_close(records["weights"], whole[..., 3:5, :5])
    y, state, records = decode(module, x[:, 5:], state)
    assert np.isnan(records["weights"]).all()
    assert_close(y, run(module, x)[0][:, 5:])


def test_without_a_mask_no_token_of_a_call_is_right_that_could_see_a_lost_one():
    module = randomise(MultiHeadAttention(D, 4, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((2, 3, D)).astype(np.float32)
    positions = jnp.array([[0, 1, 2], [3, 4, 5]])
    y, _ = run(module, x, positions=positions, state=module.init_state(2, 5))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
