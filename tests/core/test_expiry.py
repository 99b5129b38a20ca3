"""Tokens that expire (Neural Attention Search): mask, gates and an online cache are one thing, and types learn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxattn import Causal, attend
from jaxattn.core.attend import (
    GLOBAL,
    LOCAL,
    WINDOW,
    Expires,
    GatedSoftmax,
    choose_types,
    lifetime_pressure,
    pressed,
    token_expiry,
    type_gates,
)

B, T, N, H, W = 2, 9, 2, 4, 2


def kept_online(types, window):
    """[T, T]: what each token reads of a cache that drops tokens as their end becomes known."""
    seen, cache = np.zeros((len(types), len(types)), bool), {}
    for t, kind in enumerate(types):
        cache[t] = kind
        seen[t, list(cache)] = True
        if kind == GLOBAL:  # which still saw the local tokens before it
            cache = {j: each for j, each in cache.items() if each != LOCAL}
        cache = {j: each for j, each in cache.items() if each != WINDOW or t - j < window}
    return seen


@pytest.mark.parametrize("length", range(1, 9))
def test_gates_are_the_interval_and_the_online_cache_for_all_strings_of_types(length):
    types = np.array(list(itertools.product((GLOBAL, LOCAL, WINDOW), repeat=length)))
    last = token_expiry(jnp.asarray(types), W)
    places = jnp.arange(length)
    shown = Expires(last)(places[:, None], places[None])  # one string per head
    gates = type_gates(jax.nn.one_hot(types, 3), W)
    np.testing.assert_array_equal(gates, shown)
    some = np.random.default_rng(0).choice(len(types), min(200, len(types)), replace=False)
    for each in some:
        np.testing.assert_array_equal(shown[each], kept_online(types[each], W))


def test_gates_of_one_type_are_masks_that_are_known():
    """All global: causal. All windows: a window. All local without a global one inside: causal."""
    past = np.tri(T)
    for kind, expected in ((GLOBAL, past), (LOCAL, past), (WINDOW, past - np.tri(T, k=-W - 1))):
        types = np.full(T, kind)
        np.testing.assert_array_equal(type_gates(jax.nn.one_hot(types, 3), W), expected)
        types[0] = GLOBAL
        expected = np.where(np.arange(T) == 0, past, expected)
        np.testing.assert_array_equal(type_gates(jax.nn.one_hot(types, 3), W), expected)


def arrays(dtype):
    rng = np.random.default_rng(1)
    query, key, value, cotangent = (jnp.asarray(rng.standard_normal((B, T, N, H)), dtype) for _ in range(4))
    choice = jax.nn.one_hot(rng.integers(0, 3, (B, N, T)), 3, dtype=dtype).at[..., 0, :].set(jnp.eye(3)[GLOBAL])
    return query, key, value, cotangent, choice


def test_attention_of_hard_gates_is_that_of_the_mask_and_its_gradient_in_the_gates_is_the_formula():
    """Also for pairs that are not seen, in float64: p̃ (dP − δ)."""
    with jax.enable_x64(True):
        query, key, value, cotangent, choice = arrays(jnp.float64)
        gates = type_gates(choice, W)

        def read(query, key, value, gates):
            return attend(query, key, value, mask=Causal(), normalize=GatedSoftmax(gates))

        out, pull = jax.vjp(read, query, key, value, gates)
        mask = Expires(token_expiry(choice.argmax(-1), W))
        masked, pull_masked = jax.vjp(lambda *x: attend(*x, mask=mask), query, key, value)
        np.testing.assert_allclose(out, masked, rtol=1e-12, atol=1e-13)
        *slopes, of_gates = pull(cotangent)
        for found, expected in zip(slopes, pull_masked(cotangent), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        q, k, v, d = (np.asarray(x).swapaxes(1, 2) for x in (query, key, value, cotangent))
        scores, hard = q @ k.swapaxes(-1, -2) / 2, np.asarray(gates)
        mass = np.where(hard > 0, np.exp(scores), 0).sum(-1, keepdims=True)
        p, slope = np.where(hard > 0, np.exp(scores), 0) / mass, d @ v.swapaxes(-1, -2)
        expected = np.minimum(np.exp(scores) / mass, 1) * (slope - (p * slope).sum(-1, keepdims=True))
        np.testing.assert_allclose(of_gates, np.where(np.tri(T), expected, 0), rtol=1e-9, atol=1e-11)
        assert abs(np.where((hard == 0) & (np.tri(T) > 0), of_gates, 0)).max() > 0.01


def test_a_hidden_score_of_any_size_makes_no_gradient_infinite_and_rows_without_gates_are_empty():
    value = jnp.ones((1, 3, 1, 2))
    gates = jnp.ones((1, 1, 3, 3)).at[..., 1].set(0).at[:, :, 2].set(0)

    def read(query, gates):
        key = jnp.array([1.0, 500.0, 1.0])[None, :, None, None]
        options = {"normalize": GatedSoftmax(gates), "return_lse": True}
        out, extras = attend(query, key, value.at[:, 1].set(-3.0), **options)
        return jnp.sin(out).sum() + jnp.where(jnp.isfinite(extras["lse"]), extras["lse"], 0).sum(), (out, extras["lse"])

    slopes, (out, lse) = jax.grad(read, (0, 1), has_aux=True)(jnp.ones((1, 3, 1, 1)), gates)
    assert all(np.isfinite(x).all() for x in slopes)
    assert (out[0, 2] == 0).all()
    assert lse[0, 2, 0] == -np.inf
    assert abs(slopes[1]).max() > 0.1


def test_gradients_of_gates_are_differences():
    """At choices between the types, where the gates are smooth."""
    with jax.enable_x64(True):
        choice = jax.nn.softmax(jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, 3))), -1)
        check_grads(lambda x: type_gates(x, 1), (choice,), 2)
        scores = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, 2, 3)))

        def read(scores, choice):
            options = {"mask": Causal(), "normalize": GatedSoftmax(type_gates(choice, 1)), "return_lse": True}
            out, extras = attend(scores, scores, scores, **options)
            return out, extras["lse"]

        check_grads(read, (scores, choice[None]), 1)


def test_a_choice_is_hard_with_the_gradient_of_a_soft_one():
    logits = jnp.asarray(np.random.default_rng(4).standard_normal((4, 2000, 3)), jnp.float32)
    key, weigh = jax.random.key(0), jnp.asarray(np.random.default_rng(5).standard_normal(logits.shape), jnp.float32)
    chosen, pull = jax.vjp(lambda x: choose_types(x, key, temperature=0.7), logits)
    assert set(np.unique(chosen)) == {0.0, 1.0}
    assert (chosen[:, [0, -1]].argmax(-1) == GLOBAL).all()
    soft = jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / 0.7, -1)
    expected = soft * (weigh - (soft * weigh).sum(-1, keepdims=True)) / 0.7
    (slope,) = pull(weigh)
    np.testing.assert_allclose(slope[:, 1:-1], expected[:, 1:-1], rtol=1e-4, atol=1e-5)
    assert (slope[:, [0, -1]] == 0).all()
    # Each type is drawn with its probability: four standard errors of means over 8000 tokens.
    share = jax.nn.softmax(logits, -1)
    error = 4 * np.sqrt((share * (1 - share)).mean((0, 1)) / share[..., 0].size)
    assert (abs(chosen.mean((0, 1)) - share.mean((0, 1))) < error + 2 / 2000).all()
    tested = choose_types(logits)
    np.testing.assert_array_equal(tested[:, 1:].argmax(-1), logits[:, 1:].argmax(-1))
    assert (tested[:, 0].argmax(-1) == GLOBAL).all()


def test_pressure_is_the_lifetime_of_what_was_chosen():
    """By a loop; its gradient is in the chosen entries alone, each the lifetime over the length."""
    types = np.random.default_rng(6).integers(0, 3, (5, T))
    choice = jax.nn.one_hot(types, 3)
    slopes = jax.grad(lambda x: lifetime_pressure(x).sum())(choice)
    expected = np.zeros((5, T, 3))
    for row, j in np.ndindex(5, T):
        following = next((m for m in range(j + 1, T) if types[row, m] == GLOBAL), T - 1)
        lifetime = {GLOBAL: T - j, LOCAL: following - j, WINDOW: 0}[types[row, j]]
        expected[row, j, types[row, j]] = lifetime / T
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)
    np.testing.assert_allclose(lifetime_pressure(choice), expected.sum((1, 2)), rtol=1e-6)


def test_errors_name_what_is_wrong():
    for call, error, message in (
        (lambda: token_expiry(jnp.zeros(3, int), -1), ValueError, "window must be at least 0, got -1"),
        (lambda: type_gates(jnp.ones((3, 3)), 1.5), TypeError, "window"),
        (lambda: type_gates(jnp.ones((3, 2)), 1), ValueError, r"choice has shape \(3, 2\): need \[..., T, 3\]"),
        (lambda: choose_types(jnp.ones((3, 2))), ValueError, r"logits has shape \(3, 2\): need \[..., T, 3\]"),
        (lambda: choose_types(jnp.ones((3, 3)), temperature=0), ValueError, "temperature must be positive, got 0"),
        (lambda: lifetime_pressure(jnp.ones(3)), ValueError, r"choice has shape \(3,\)"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_pressure_is_a_term_of_the_loss_that_only_the_backward_pass_sees():
    choice = jax.nn.one_hot(np.random.default_rng(4).integers(0, 3, (2, T)), 3)
    weights = jnp.asarray(np.random.default_rng(5).standard_normal(choice.shape), jnp.float32)

    def loss(choice, press):
        return (weights * press(choice)).sum()

    value, slope = jax.value_and_grad(loss)(choice, lambda x: pressed(x, 0.25))
    whole = jax.grad(lambda choice: loss(choice, lambda x: x) + 0.25 * lifetime_pressure(choice).sum())(choice)
    assert value == loss(choice, lambda x: x)
    np.testing.assert_allclose(slope, whole, rtol=1e-6)
