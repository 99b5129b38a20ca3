"""nn.MultiHeadAttention is multi-head attention: the float64 oracle of `multi_head`, over its options."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import call
from multi_head import assert_close, multi_head, randomise

from jaxattn import Alibi, Bias, Causal, Explicit, Lengths, Sigmoid, Sinks, Window, Yarn, attend, rotary
from jaxattn.core.attend import NTK, Interpolate
from jaxattn.core.attend.position import Rotary
from jaxattn.models import Spec
from jaxattn.nn import Context, MultiHeadAttention, NullSoftmax, RMSNorm, Tokens

D, T, B = 16, 7, 2


@partial(nnx.jit, static_argnames="record")
def run(module, x, record=(), **options):
    return call(module, x, record=record, **options)


def causal(p, r):
    return r <= p


def window(p, r):
    return r <= p and (r >= p - 2 or r < 1)


def everything(p, r):
    return True


WINDOW = Causal() & (Window(2) | Sinks(1))
RAGGED = [[0, 1, 2, 3, 4, -1, -1], [-1, 2, 3, 4, 7, 8, 9]]
# name: (options of the module, the same said to the oracle, the visible pairs, positions)
CASES = {
    "plain": ({"mask": Causal()}, {"rotary": 1e4}, causal, None),
    "no mask": ({}, {"rotary": 1e4}, everything, None),
    "grouped, wide heads, part rotated, biases": (
        {
            "key_heads": 2,
            "head_dim": 6,
            "position": Rotary(100.0, 2 / 3),
            "use_bias": True,
            "mask": Causal(),
        },
        {"key_heads": 2, "head_dim": 6, "rotary": 100.0, "fraction": 2 / 3},
        causal,
        None,
    ),
    "one key head, qk-norm, gate, null logit": (
        {"key_heads": 1, "qk_norm": Spec(RMSNorm), "gate": True, "mask": WINDOW, "normalize": NullSoftmax(4)},
        {"key_heads": 1, "qk_norm": True, "gate": True, "rotary": 1e4},
        window,
        None,
    ),
    "sigmoid with alibi": (
        {"position": None, "normalize": Sigmoid(), "bias": Alibi.geometric(4), "mask": Causal()},
        {"sigmoid": True, "slopes": [1 / 4, 1 / 16, 1 / 64, 1 / 256]},
        causal,
        None,
    ),
    "positions": ({"mask": Causal()}, {"rotary": 1e4}, causal, RAGGED),
    "tiled": (
        {"key_heads": 2, "qk_norm": Spec(RMSNorm), "mask": WINDOW, "implementation": "tiled"},
        {"key_heads": 2, "qk_norm": True, "rotary": 1e4},
        window,
        RAGGED,
    ),
}


def inputs(*shape, seed=5):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_oracle(name):
    options, said, visible, positions = CASES[name]
    module = randomise(MultiHeadAttention(D, 4, **options, rngs=nnx.Rngs(0)))
    null = {"null_logit": module.normalize.null_logit[...]} if isinstance(module.normalize, NullSoftmax) else {}
    x = inputs(B, T, D)
    said = {"heads": 4, "key_heads": 4, "head_dim": 4} | said | null
    expected, magnitude = multi_head(module, x, visible, positions=positions, **said)
    given = None if positions is None else jnp.asarray(positions)
    y, state, records = run(module, x, positions=given)
    assert_close(y, expected, magnitude)
    assert state is None
    assert records == {}


def test_the_oracle_tells_the_options_apart():
    """Each option moves the oracle by far more than the tolerance, so that the test above can fail."""
    module = randomise(MultiHeadAttention(D, 4, qk_norm=Spec(RMSNorm), gate=True, rngs=nnx.Rngs(0)))
    x, sizes = inputs(B, T, D), {"heads": 4, "key_heads": 4, "head_dim": 4}
    plain, magnitude = multi_head(module, x, causal, **sizes)
    variants = [{"rotary": 1e4}, {"qk_norm": True}, {"gate": True}, {"slopes": [1.0] * 4}, {"sigmoid": True}]
    for variant in [*variants, {"null_logit": [0.0] * 4}, {"positions": RAGGED}]:
        other, _ = multi_head(module, x, causal, **sizes, **variant)
        assert (abs(other - plain) / magnitude).max() > 1e-3, variant


def test_cross_attention_reads_a_context_of_another_width_and_length():
    module = MultiHeadAttention(D, 4, key_heads=2, context_features=10, position=None, use_bias=True, rngs=nnx.Rngs(0))
    x, context = inputs(B, T, D), inputs(B, 5, 10, seed=6)
    sizes = {"heads": 4, "key_heads": 2, "head_dim": 4, "context": context}
    expected, magnitude = multi_head(randomise(module), x, everything, **sizes)
    y, _, records = run(module, x, context=context, record=("q", "k", "weights"))
    assert_close(y, expected, magnitude)
    assert {site: value.shape for site, value in records.items()} == {
        "q": (B, T, 4, 4),
        "k": (B, 5, 2, 4),
        "weights": (B, 4, T, 5),
    }
    expected, magnitude = multi_head(module, x, lambda p, r: r < 3, **sizes)
    assert_close(run(module, x, context=context, mask=Lengths(jnp.array([3, 3])))[0], expected, magnitude)


@pytest.mark.parametrize("scaling", [Interpolate(4.0), NTK(4.0), Yarn(4.0, 8)], ids=str)
def test_scaled_rotary_turns_and_sharpens_queries_and_keys(scaling):
    options = {"key_heads": 2, "mask": Causal(), "position": Rotary(100.0, scaling=scaling)}
    module, places = MultiHeadAttention(D, 4, **options, rngs=nnx.Rngs(0)), 3 * np.arange(T)
    _, _, seen = run(module, inputs(B, T, D), record=("q", "k", "v", "z"), positions=places)
    query, key = (rotary(seen[site], places, 100.0, scaling=scaling) * scaling.attention_scale for site in "qk")
    expected = attend(query, key, seen["v"], mask=Causal())
    assert_close(seen["z"], expected)
    assert np.abs(attend(rotary(seen["q"], places), rotary(seen["k"], places), seen["v"]) - expected).max() > 1e-3


def test_only_rotated_channels_are_sharpened():
    """As in the published models, whose sines and cosines carry the scale."""
    scaling = Yarn(4.0, 8)
    module = MultiHeadAttention(D, 2, position=Rotary(fraction=0.5, scaling=scaling), rngs=nnx.Rngs(0))
    x, places = inputs(B, T, 2, D // 2), np.arange(T)
    turned = rotary(x, places, fraction=0.5, scaling=scaling)
    half = D // 4
    assert_close(module.turn(x, places)[..., :half], turned[..., :half] * scaling.attention_scale)
    np.testing.assert_array_equal(module.turn(x, places)[..., half:], x[..., half:])


def test_interpolated_positions_are_the_trained_ones():
    plain, scaled = (
        MultiHeadAttention(D, 4, mask=Causal(), position=Rotary(scaling=scaling), rngs=nnx.Rngs(0))
        for scaling in (None, Interpolate(4.0))
    )
    x = inputs(B, T, D)
    assert_close(run(scaled, x, positions=4 * np.arange(T))[0], run(plain, x)[0])


def test_the_mask_of_a_call_is_joined_with_the_module_own():
    module, x = randomise(MultiHeadAttention(D, 4, mask=Causal(), rngs=nnx.Rngs(0))), inputs(B, T, D)
    even = Explicit(jnp.broadcast_to(jnp.arange(T) % 2 == 0, (1, T, T)))
    expected, magnitude = multi_head(
        module, x, lambda p, r: r <= p and r % 2 == 0, heads=4, key_heads=4, head_dim=4, rotary=1e4
    )
    assert_close(run(module, x, mask=even)[0], expected, magnitude)


def test_a_row_that_sees_nothing_adds_the_output_bias_alone():
    module, x = randomise(MultiHeadAttention(D, 4, use_bias=True, rngs=nnx.Rngs(0))), inputs(B, T, D)
    y, _, _ = run(module, x, positions=jnp.asarray(RAGGED))
    np.testing.assert_array_equal(y[0, 5:], np.broadcast_to(module.out.bias[...], (2, D)))


def test_dropout_draws_anew_at_every_call_and_is_off_in_evaluation():
    module = MultiHeadAttention(D, 4, dropout=0.5, mask=Causal(), rngs=nnx.Rngs(0))
    plain = MultiHeadAttention(D, 4, mask=Causal(), rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(module, nnx.Param))
    x = inputs(B, T, D)
    draws = [np.asarray(run(module, x)[0]) for _ in range(3)]
    assert not any(np.array_equal(a, b) for a, b in zip(draws, draws[1:] + draws[:1], strict=True))
    module.eval()
    quiet = [np.asarray(run(module, x)[0]) for _ in range(2)]
    np.testing.assert_array_equal(*quiet)
    assert_close(quiet[0], run(plain, x)[0])
    module.train()
    assert not np.array_equal(run(module, x)[0], quiet[0])


def test_parameters_are_float32_and_the_output_has_the_dtype_asked_for():
    module = MultiHeadAttention(D, 4, qk_norm=Spec(RMSNorm), gate=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda x: module(x)[0], jnp.zeros((B, T, D))).dtype == jnp.bfloat16
    assert module.init_state(1, 2).key.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "features 16 is no multiple of heads 3"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 4, "key_heads": 3}, "key_heads is 3 but heads is 4: need a divisor of 4"),
        ({"heads": 4, "key_heads": 8}, "key_heads is 8 but heads is 4: need a divisor of 4"),
        ({"heads": 4, "key_heads": 0}, "key_heads is 0 but heads is 4: need a divisor of 4"),
        ({"heads": 4, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"heads": 4, "head_dim": 3}, r"fraction 1\.0 of head dim 3 is 3 channels: need an even number <= 3"),
        (
            {"heads": 4, "position": Rotary(fraction=0.25)},
            r"fraction 0\.25 of head dim 4 is 1 channels: need an even number <= 4",
        ),
        (
            {"heads": 4, "context_features": 8, "position": Rotary()},
            "for keys of another sequence: need position=None",
        ),
        ({"heads": 4, "keys_from": "it"}, "keys_from is 'it': need one of self, layer, context"),
        ({"heads": 4, "use_bias": ("keys",)}, r"use_bias names \['keys'\]: need True, False, or some of"),
        ({"heads": 4, "dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1\.0"),
        ({"heads": 4, "dropout": -0.1}, r"dropout must be at least 0 and below 1, got -0\.1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(D, **options, rngs=nnx.Rngs(0))


def test_cross_attention_refuses_rotary_positions_and_a_state():
    x = jnp.zeros((B, T, D))
    with pytest.raises(ValueError, match="cross-attention takes no state and no positions"):
        call(MultiHeadAttention(D, 4, rngs=nnx.Rngs(0)), x, context=x)
    module = MultiHeadAttention(D, 4, position=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cross-attention takes no state and no positions"):
        call(module, x, context=x, state=module.init_state(B, T))


def test_cross_attention_with_positions_turns_keys_at_those_of_the_context():
    """A context of some tokens of x, at their positions, is x under the mask that hides the others."""
    rng = np.random.default_rng(4)
    kept, positions = np.array([5, 0, 3, 2]), np.array([0, 2, 3, 7, 11, 12, 20])
    options = {"key_heads": 2, "position": Rotary(100.0)}
    own = randomise(MultiHeadAttention(D, 4, **options, rngs=nnx.Rngs(0)))
    cross = MultiHeadAttention(D, 4, keys_from="context", **options, rngs=nnx.Rngs(1))
    nnx.update(cross, nnx.state(own))
    x = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    shown = jnp.zeros((T, positions.max() + 1), bool)[:, positions].at[:, kept].set(True)
    table = jnp.zeros((positions.max() + 1,) * 2, bool).at[positions[:, None], positions].set(shown)
    expected = call(own, x, positions=positions, mask=Explicit(table))[0]
    read = x[:, kept]
    for shift in (0, 9):
        context = Context(read, Tokens.of(read, positions=jnp.asarray(positions[kept] + shift)))
        actual = call(cross, x, positions=positions + shift, context=context)[0]
        assert_close(actual, expected)
    with pytest.raises(AssertionError):
        assert_close(call(cross, x, positions=positions, context=read)[0], expected)  # the context at 0, 1, 2, 3
    assert MultiHeadAttention(D, 4, keys_from="context", rngs=nnx.Rngs(0)).position is None


def test_inputs_of_another_width_are_refused():
    module = MultiHeadAttention(D, 4, context_features=8, position=None, rngs=nnx.Rngs(0))
    x = jnp.zeros((B, T, D))
    with pytest.raises(ValueError, match=r"x has shape \(2, .*, 8\): need \[batch, length, 16\]"):
        module(x[..., :8])
    with pytest.raises(ValueError, match=r"context has shape \(2, .*, 16\): need \[batch, length, 8\]"):
        module(x)  # a context is needed: x is not one
    with pytest.raises(ValueError, match=r"x has shape .* need \[batch, length, 16\]"):
        call(module, x[0], context=x[..., :8])


def test_dropout_needs_a_random_stream():
    with pytest.raises(ValueError, match=r"dropout is 0\.5 but rngs has no such stream"):
        MultiHeadAttention(D, 4, dropout=0.5, rngs=nnx.Rngs(params=0))


def test_unknown_sites_are_refused():
    with pytest.raises(ValueError, match=r"record names the unknown site 'wieghts': need one of \['embed'"):
        call(MultiHeadAttention(D, 4, rngs=nnx.Rngs(0)), jnp.zeros((B, T, D)), record=("wieghts",))


@pytest.mark.parametrize("shape", [(T, T), (B, 1, T, T), (B, 4, T, T)], ids=str)
def test_arrays_and_functions_stand_in_the_slots_of_mask_and_bias(shape):
    """In the module, and as the mask of the tokens; they are the parts that they become."""
    rng = np.random.default_rng(0)
    shown, added = rng.random(shape) < 0.6, jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x = inputs(B, T, D)

    def build(**slots):
        return MultiHeadAttention(D, 4, position=None, **slots, rngs=nnx.Rngs(0))

    expected = build(mask=Explicit(shown), bias=Bias(added))(x)[0]
    np.testing.assert_array_equal(build(mask=shown, bias=added)(x)[0], expected)
    by_tokens = build(bias=added)(x, Tokens.of(x, mask=shown))[0]
    np.testing.assert_array_equal(by_tokens, expected)
    near = build(mask=lambda query, key: abs(query - key) < 2, bias=lambda query, key: 0.1 * (query - key))(x)[0]
    places = jnp.arange(T)
    apart = places[:, None] - places
    assert_close(near, build(mask=Explicit(abs(apart) < 2), bias=Bias(0.1 * apart))(x)[0])


def test_a_norm_of_queries_and_keys_is_a_spec():
    with pytest.raises(TypeError, match=r"qk_norm must be a spec such as Spec\(nn\.RMSNorm\), or None, got True"):
        MultiHeadAttention(D, 4, qk_norm=True, rngs=nnx.Rngs(0))
