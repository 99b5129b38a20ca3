"""Layers with weights written by hand are the algorithms, in float64, and Fourier forms are what least squares says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl

EPSILON = np.finfo(np.float64).eps


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


SAMPLE = jax.jit(lambda task, key, batch: task.sample(key, batch), static_argnums=2)


def drawn(task, batch=200):
    return jax.tree.map(np.asarray, SAMPLE(task, jax.random.key(0), batch))


# Circuits. Scores are 0 or 50: what leaks to other places is T e^−50, far below rounding.


@pytest.mark.parametrize(("modulus", "frequencies"), [(11, (1, 4)), (59, (3, 8, 20)), (8, (1, 4)), (2, (1,))])
def test_two_heads_add_by_turning_angles(modulus, frequencies):
    circuit = icl.adding_circuit(modulus, frequencies)
    prompt = icl.ModularAddition(modulus, share=0.5).every()
    a, b = np.asarray(prompt.hidden).T
    said, exact = circuit(prompt.x)[:, 2], icl.fourier_logits(modulus, frequencies)[a, b]
    assert abs(said - exact).max() < 20 * EPSILON * len(frequencies)
    np.testing.assert_array_equal(exact.argmax(-1), prompt.y[:, 2])
    weights = circuit.weights(prompt.x)
    np.testing.assert_allclose(weights[:, 0, 2], np.eye(3)[[0] * len(a)], atol=1e-20)
    np.testing.assert_allclose(weights[:, 1, 2], np.eye(3)[[1] * len(a)], atol=1e-20)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("letters", "string"), [(4, 9), (1, 6), (30, 40), (3, 1)])
def test_one_head_counts_copies(letters, string, causal):
    prompt = drawn(icl.Histogram(letters, string, causal))
    said = icl.counting_circuit(letters, string + 1, causal=causal)(prompt.x)
    # 1 / w − 1 with w = 1 / (c + 1): a relative error of a few roundings in w is c + 1 times as large.
    assert abs(said - prompt.y).max() < 8 * EPSILON * (prompt.y.max() + 1)


def test_a_weak_score_counts_other_letters_too():
    """w = e^β / ((c + 1) e^β + others), so the answer is c + others · e^−β."""
    tokens, beta = jnp.array([3, 0, 1, 0, 2]), 1.5
    said = icl.counting_circuit(3, 5, beta)(tokens)
    np.testing.assert_allclose(said[1:], np.array([1, 1, 2, 1]) + np.array([0, 1, 1, 3]) * np.exp(-beta), rtol=1e-12)


@pytest.mark.parametrize(("letters", "string"), [(4, 6), (1, 3), (9, 2), (20, 30), (5, 1)])
def test_one_head_sorts(letters, string):
    prompt = drawn(icl.Sorting(letters, string))
    said = icl.sorting_circuit(letters, string)(prompt.x)
    np.testing.assert_array_equal(said[:, string:], prompt.y[:, string:])


@pytest.mark.parametrize(("kinds", "depth"), [(1, 1), (3, 5)])
def test_uniform_attention_measures_depth(kinds, depth):
    prompt = drawn(icl.Dyck(kinds, depth, 30))
    circuit = icl.depth_circuit(kinds, 30)
    # The sum of 30 numbers of size 1 / 30, times 30.
    assert abs(circuit(prompt.x) - prompt.hidden).max() < 30 * EPSILON
    np.testing.assert_allclose(circuit.weights(prompt.x)[0, 0], np.tri(30) / np.arange(1, 31)[:, None], rtol=1e-14)


@pytest.mark.parametrize("bits", [1, 2, 12])
def test_offsets_0_and_minus_1_take_parities_at_any_length(bits):
    prompt = drawn(icl.BitParity("interleaved", bits, bits))
    circuit = icl.parity_circuit(2 * bits)
    assert (abs(circuit(prompt.x) - prompt.y) * prompt.weights).max() < 8 * EPSILON

    @jax.jit
    def says(x, y):
        return jnp.round(circuit(x)).astype(jnp.int32)

    assert (icl.answered_freely(says, prompt) == prompt.y)[prompt.weights > 0].all()


def test_a_token_outside_the_vocabulary_is_nan_and_too_many_tokens_are_named():
    circuit = icl.counting_circuit(3, 4)
    for token in (-1, 4, 100):
        assert np.isnan(circuit(jnp.array([3, 0, token, 0]))[2:]).all()
    with pytest.raises(ValueError, match="tokens has 5 positions: need at most 4"):
        circuit(jnp.zeros(5, int))


def test_a_circuit_has_gradients():
    """The slope of the count in the score is that of c + others · e^−β."""
    tokens = jnp.array([3, 0, 1, 0, 2])
    slope = jax.grad(lambda beta: icl.counting_circuit(3, 5, beta)(tokens)[4])(1.5)
    np.testing.assert_allclose(slope, -3 * np.exp(-1.5), rtol=1e-10)


# Fourier forms.


@pytest.mark.parametrize("modulus", [3, 5, 31])
def test_all_frequencies_are_a_one_hot_answer(modulus):
    logits = icl.fourier_logits(modulus, range(1, modulus // 2 + 1))
    number = np.arange(modulus)
    answer = np.eye(modulus)[(number[:, None] + number) % modulus]
    np.testing.assert_allclose(logits, (modulus * answer - 1) / 2, atol=20 * modulus * EPSILON)


def test_a_frequency_that_shares_a_divisor_leaves_ties():
    logits = icl.fourier_logits(6, (2,))
    np.testing.assert_allclose(logits[..., :3], logits[..., 3:], atol=1e-14)


@pytest.mark.parametrize("modulus", [2, 7, 8])
def test_shares_of_logits_are_those_of_least_squares(modulus):
    rng = np.random.default_rng(modulus)
    logits = rng.normal(size=(modulus,) * 3) + 3 * np.asarray(icl.fourier_logits(modulus, (1,)))
    shares = icl.trigonometric_shares(jnp.asarray(logits) + rng.normal(size=(modulus, modulus, 1)))
    logits = logits - logits.mean(-1, keepdims=True)
    a, b, c = np.meshgrid(*[np.arange(modulus)] * 3, indexing="ij")
    for k, share in enumerate(shares, 1):
        wave = np.cos(2 * np.pi * k * (a + b - c) / modulus).ravel()
        coefficient = np.linalg.lstsq(wave[:, None], logits.ravel(), rcond=None)[0]
        assert share == pytest.approx((coefficient**2 * (wave**2).sum() / (logits**2).sum()).item(), rel=1e-10)
    assert shares.sum() <= 1 + 1e-12


def test_the_trigonometric_form_has_all_of_its_own_logits():
    shares = icl.trigonometric_shares(icl.fourier_logits(13, (2, 5, 5)))
    np.testing.assert_allclose(shares, np.array([0, 1, 0, 0, 4, 0]) / 5, atol=1e-12)
    assert (icl.trigonometric_shares(jnp.ones((5, 5, 5))) == 0).all()


@pytest.mark.parametrize("size", [2, 3, 9, 12])
def test_shares_of_a_table_are_those_of_projections_on_waves(size):
    table = np.random.default_rng(size).normal(size=(size, 4)) + 2.0
    shares = icl.fourier_shares(jnp.asarray(table))
    centred = table - table.mean(0)
    angle = 2 * np.pi * np.outer(np.arange(1, size // 2 + 1), np.arange(size)) / size
    for share, phase in zip(shares, angle, strict=True):
        waves = np.linalg.svd(np.stack([np.cos(phase), np.sin(phase)], 1), full_matrices=False)
        basis = waves[0][:, waves[1] > 1e-8]
        assert share == pytest.approx(((basis.T @ centred) ** 2).sum() / (centred**2).sum(), rel=1e-10)
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    assert (icl.fourier_shares(jnp.ones((size, 3))) == 0).all()


def test_errors_name_the_argument():
    for call, message in (
        (lambda: icl.fourier_logits(7, ()), r"frequencies is \(\): need some from 1 to 3"),
        (lambda: icl.fourier_logits(7, (4,)), r"frequencies is \(4,\): need some from 1 to 3"),
        (lambda: icl.adding_circuit(7, (0,)), "frequencies must be at least 1, got 0"),
        (lambda: icl.trigonometric_shares(jnp.ones((3, 3))), r"logits has shape \(3, 3\): need \[p, p, p\]"),
        (lambda: icl.fourier_shares(jnp.ones((1, 3))), r"table has shape \(1, 3\)"),
        (lambda: icl.counting_circuit(0, 3), "letters must be at least 1"),
        (lambda: icl.sorting_circuit(3, 0), "string must be at least 1"),
        (lambda: icl.depth_circuit(0, 3), "kinds must be at least 1"),
        (lambda: icl.parity_circuit(0), "length must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
