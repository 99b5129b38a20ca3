"""Reductions: the settings in which one normaliser, head layout, mask or bias equals another."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, by_implementation, epsilon

from jaxattn import Alibi, Bias, Causal, Dot, Explicit, Lengths, Sigmoid, Softmax, Window, attend
from jaxattn.core.attend import Elu1

T, S, HEADS, WIDTH = 5, 9, 4, 4
IMPLEMENTATION = by_implementation("dense")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


QUERY, KEY, VALUE = normal(2, T, HEADS, WIDTH, seed=1), normal(2, S, 2, WIDTH, seed=2), normal(2, S, 2, WIDTH, seed=3)
HOLES = Explicit(jnp.asarray(np.random.default_rng(4).random((HEADS, T, S)) < 0.4).at[:, 1].set(False))
D_OUT, D_LSE = normal(2, T, HEADS, WIDTH, seed=5), normal(2, T, HEADS, seed=6)
NULL = normal(HEADS, seed=7)


def with_gradients(call, *arrays):
    """(out, lse) of a call and their gradients in its arrays."""
    results, pull = jax.vjp(call, *arrays)
    return results, pull((D_OUT.astype(results[0].dtype), D_LSE))


def attention(implementation, **options):
    def call(query, key, value):
        out, extras = attend(query, key, value, return_lse=True, block=4, implementation=implementation, **options)
        return out, extras["lse"]

    return call


def assert_same(pair, summands=S):
    """Two forms of the same sums of at most `summands` terms, which are at most as large as the largest array here."""
    largest = max(np.abs(x).max() for x in (QUERY, KEY, VALUE, D_OUT, D_LSE))
    for x, y in zip(*map(jax.tree.leaves, pair), strict=True):
        assert_close(x, y, largest * max(1, np.abs(y).max(where=np.isfinite(y), initial=0)), factor=2 * summands)


@IMPLEMENTATION
def test_a_null_logit_of_minus_infinity_is_no_null_logit(implementation):
    @jax.jit
    def both(null):
        def form(normalize):
            return with_gradients(attention(implementation, normalize=normalize, mask=HOLES), QUERY, KEY, VALUE)

        return form(Softmax(null)), form(Softmax())

    assert_same(both(jnp.full(HEADS, -jnp.inf)))


@IMPLEMENTATION
def test_a_null_logit_is_a_gate_on_the_log_of_the_total_weight(implementation):
    """out = σ(lse₀ − b) out₀ and lse = log(exp lse₀ + exp b); without a key out 0 and lse b."""

    @jax.jit
    def both(null):
        call = attention(implementation, normalize=Softmax(null), mask=HOLES)
        out, lse = attention(implementation, mask=HOLES)(QUERY, KEY, VALUE)
        gated = jax.nn.sigmoid(lse - null)[..., None] * out, jnp.logaddexp(lse, null)
        return call(QUERY, KEY, VALUE), gated

    assert_same(both(NULL))


@IMPLEMENTATION
def test_a_null_logit_is_a_key_of_that_score_with_value_zero(implementation):
    @jax.jit
    def both(null):
        def with_null(query, key, value, null):
            return attention(implementation, normalize=Softmax(null), mask=HOLES)(query, key, value)

        def with_key(query, key, value, null):
            mask = Explicit(jnp.concatenate([HOLES.array, jnp.ones_like(HOLES.array[..., :1])], -1))
            bias = Bias(jnp.concatenate([jnp.zeros((HEADS, T, S)), null[:, None, None].repeat(T, 1)], -1))
            key, value = (jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (key, value))
            return attention(implementation, mask=mask, bias=bias)(query, key, value)

        return tuple(with_gradients(form, QUERY, KEY, VALUE, null) for form in (with_null, with_key))

    assert_same(both(NULL), 2 * T)


@IMPLEMENTATION
def test_a_null_logit_far_above_all_scores_leaves_nothing(implementation):
    out, lse = attention(implementation, normalize=Softmax(jnp.full(HEADS, 200.0)), mask=HOLES)(QUERY, KEY, VALUE)
    assert not out.any()  # exp(−200) is below the least float32
    assert set(np.unique(lse)) == {200}


@IMPLEMENTATION
def test_sigmoid_of_very_negative_scores_is_softmax_before_it_is_normalised(implementation):
    """σ(s − c) = exp(s − c) (1 − σ(s − c)), so out e^−lse and lse + c are softmax's but for e^(max s − c)."""
    shift = 30.0  # e^(max s − 30) is below a float32 epsilon for scores below 14

    @jax.jit
    def both():
        down = Bias(jnp.full((1, T, S), -shift))
        out, lse = attention(implementation, normalize=Sigmoid(), bias=down, mask=HOLES)(QUERY, KEY, VALUE)
        total = jnp.where(jnp.isneginf(lse), 1, jnp.exp(lse))
        return (out / total[..., None], lse + shift), attention(implementation, mask=HOLES)(QUERY, KEY, VALUE)

    # A score near −30 is rounded to 30 epsilons.
    for x, y in zip(*both(), strict=True):
        assert_close(x, y, np.abs(VALUE).max() * shift, factor=4)


@IMPLEMENTATION
def test_very_large_scores_do_not_overflow(implementation):
    """Scores of ±1000 choose the best key; sigmoid weights are 0 and 1."""
    options = {"score": Dot(1e3), "implementation": implementation, "block": 4, "return_lse": True}
    query, key = np.ones((1, 1, 1), np.float32), np.array([1, -1, 0.5, -1, 1, 0.5], np.float32).reshape(6, 1, 1)
    value = np.arange(6, dtype=np.float32).reshape(6, 1, 1)
    out, extras = attend(query, key, value, **options)
    assert (float(out[0, 0, 0]), float(extras["lse"][0, 0])) == (
        2,
        pytest.approx(1000 + np.log(2), rel=epsilon(np.float32)),
    )
    out, extras = attend(query, key, value, normalize=Sigmoid(), **options)
    assert (float(out[0, 0, 0]), float(extras["lse"][0, 0])) == (11, pytest.approx(np.log(4), rel=epsilon(np.float32)))


@IMPLEMENTATION
def test_shared_heads_are_repeated_heads(implementation):
    @jax.jit
    def both():
        def shared(query, key, value):
            return attention(implementation, mask=HOLES)(query, key, value)

        def repeated(query, key, value):
            return shared(query, jnp.repeat(key, 2, -2), jnp.repeat(value, 2, -2))

        return tuple(with_gradients(form, QUERY, KEY, VALUE) for form in (shared, repeated))

    assert_same(both(), 2 * T)


@IMPLEMENTATION
def test_parts_that_do_nothing(implementation):
    """A window that reaches past both ends, slopes of 0, lengths of S, the default scale written out."""

    @jax.jit
    def both():
        plain = partial(with_gradients, attention(implementation, mask=Causal()))
        mask = Window(S) & Lengths(jnp.array([S, S + 3])) & (Causal() | Window(0))
        idle = attention(implementation, mask=mask, bias=Alibi(jnp.zeros(HEADS)), score=Dot(WIDTH**-0.5))
        return with_gradients(idle, QUERY, KEY, VALUE), plain(QUERY, KEY, VALUE)

    assert_same(both())


@IMPLEMENTATION
def test_no_mask_and_equal_keys_average_the_values(implementation):
    out, lse = attention(implementation)(QUERY, np.zeros_like(KEY), VALUE)
    assert_close(out, np.repeat(VALUE, 2, -2).mean(1, keepdims=True).repeat(T, 1), np.abs(VALUE).max())
    assert_close(lse, np.full(lse.shape, np.log(S)), np.log(S))


@IMPLEMENTATION
def test_a_sigmoid_bias_is_a_constant_added_to_the_scores(implementation):
    constant = Bias(jnp.full((1, T, S), -2.5))
    inside = attention(implementation, mask=HOLES, normalize=Sigmoid(bias=-2.5))
    outside = attention(implementation, mask=HOLES, normalize=Sigmoid(), bias=constant)
    assert_same([with_gradients(call, QUERY, KEY, VALUE) for call in (inside, outside)])
    assert not np.allclose(inside(QUERY, KEY, VALUE)[0], attention(implementation, mask=HOLES)(QUERY, KEY, VALUE)[0])


@IMPLEMENTATION
@pytest.mark.parametrize("normalize", [Sigmoid(-100.0, normalized=True), Elu1(normalized=True)], ids=["σ", "elu + 1"])
def test_normalised_weights_of_very_negative_scores_are_softmax(normalize, implementation):
    """σ(s − 100) and elu(s − 100) + 1 are e^(s − 100), which is 0 in float32, to within e^−90 of themselves."""
    down = Bias(jnp.full((1, T, S), -100.0 if isinstance(normalize, Elu1) else 0.0))
    options = {"mask": HOLES, "bias": down}

    @jax.jit
    def both():
        out, lse = attention(implementation, normalize=normalize, **options)(QUERY, KEY, VALUE)
        shift = 0.0 if isinstance(normalize, Elu1) else -100.0
        plain, plain_lse = attention(implementation, **options)(QUERY, KEY, VALUE)
        gradients = [
            jax.grad(lambda q, n=n: attention(implementation, normalize=n, **options)(q, KEY, VALUE)[0].sum())(QUERY)
            for n in (normalize, Softmax())
        ]
        return (out, lse, gradients[0]), (plain, plain_lse + shift, gradients[1])

    # Scores near −100 are rounded by 100 epsilons, and so are the logs of the weights.
    for x, y in zip(*both(), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=200 * epsilon(np.float32) * max(1, np.abs(VALUE).max()))


@IMPLEMENTATION
def test_elu_has_slope_1_where_all_scores_are_0(implementation):
    """Of queries that are 0, as an output projection or a query that starts at zero makes them."""
    for normalized in (False, True):

        def call(query, normalized=normalized):
            return attention(implementation, normalize=Elu1(normalized))(query, KEY, VALUE)[0]

        slope = jax.jit(jax.grad(lambda query: (call(query) * D_OUT).sum()))(jnp.zeros_like(QUERY))
        key, value = (np.repeat(x, 2, -2).astype(np.float64) for x in (KEY, VALUE))
        # out = Σ_j w(s_j) v_j / (Σ_j w(s_j), or 1), w = 1 and w' = 1 at s = 0.
        centred = (value - value.mean(-3, keepdims=True)) / S if normalized else value
        expected = np.einsum("bsnv,btnv,bsnh->btnh", centred, D_OUT, key) * WIDTH**-0.5
        np.testing.assert_allclose(slope, expected, atol=1e-5 * np.abs(expected).max())


def test_a_null_logit_of_minus_infinity_has_finite_gradients_without_keys():
    null = jnp.array([-np.inf, 0.5, -np.inf, 1.0], jnp.float32)

    def call(null):
        out, lse = attention("dense", normalize=Softmax(null), mask=HOLES)(QUERY, KEY, VALUE)
        return out.sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    assert np.isfinite(jax.grad(call)(null)).all()
