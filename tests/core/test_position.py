"""Rotary embedding is a rotation by an angle proportional to the position, so products know only distances."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import assert_close, epsilon

from jaxattn import rotary


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def angles(positions, rotated, base):
    """position · base^(−2 i / R) in float64, [T, R/2]."""
    return np.asarray(positions, np.float64)[:, None] * np.float64(base) ** (-np.arange(0, rotated, 2) / rotated)


def rotated_by_hand(x, positions, base=10000.0, fraction=1.0):
    """Each pair (x_i, x_{i + R/2}) as a complex number times e^{i angle}."""
    x, rotated = np.asarray(x, np.float64), round(fraction * x.shape[-1])
    turned = (x[..., : rotated // 2] + 1j * x[..., rotated // 2 : rotated]) * np.exp(
        1j * angles(positions, rotated, base)
    )[:, None]
    return np.concatenate([turned.real, turned.imag, x[..., rotated:]], -1)


def angle_error(positions, base=10000.0):
    """A float32 frequency exp(−x log base) is off by some log base epsilons, and so is the angle; then one more."""
    return (np.log(base) + 3) * epsilon(np.float32) * np.max(np.abs(positions))


@pytest.mark.parametrize(("base", "fraction"), [(10000.0, 1.0), (100.0, 0.5), (10000.0, 0.0), (500.0, 0.25)])
def test_rotary_is_a_complex_product(base, fraction):
    x, positions = normal(2, 5, 3, 8), np.array([0, 3, 1, 7, -1])
    actual = rotary(x, positions, base, fraction)
    bound = 2 * np.abs(x).max() * (angle_error(positions, base) + 4 * epsilon(np.float32))
    np.testing.assert_allclose(actual, rotated_by_hand(x, positions, base, fraction), rtol=0, atol=bound)
    np.testing.assert_array_equal(actual[..., round(fraction * 8) :], x[..., round(fraction * 8) :])
    np.testing.assert_array_equal(actual[:, 0], x[:, 0])  # position 0 is the identity


def test_a_quarter_turn_by_hand():
    """With base (π/2)^-2 and R = 4 the frequencies are 1 and π/2: position 1 turns the second pair by a right angle."""
    x = jnp.array([[[1.0, 3.0, 2.0, 4.0]]])  # pairs (1, 2) and (3, 4)
    cos, sin = np.cos(1), np.sin(1)
    expected = [[[cos - 2 * sin, -4, sin + 2 * cos, 3]]]
    assert_close(rotary(x, jnp.array([1]), base=(np.pi / 2) ** -2), expected, 4)


def test_products_depend_on_the_distance_only():
    query, key = normal(1, 1, 1, 8, seed=1), normal(1, 1, 1, 8, seed=2)
    places = np.arange(6)
    turned = [rotary(np.repeat(x, 6, 1), places)[0, :, 0] for x in (query, key)]
    products = np.asarray(turned[0]) @ np.asarray(turned[1]).T
    size = np.linalg.norm(query) * np.linalg.norm(key)
    for distance in range(-5, 6):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], rtol=0, atol=size * (2 * angle_error(5) + 16 * epsilon(np.float32)))
    assert np.ptp(products[0]) > 0.1 * size


def test_norms_are_preserved():
    x = normal(7, 2, 8)
    turned = rotary(x, 1000 * np.arange(7))
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=16 * epsilon(np.float32)
    )
    assert np.abs(turned[1:] - x[1:]).max() > 1


def test_angles_are_float32_for_bfloat16_inputs():
    """At position 30 000 a bfloat16 angle would be off by whole turns; the error stays that of the rounded result."""
    x, positions = normal(4, 2, 8).astype(ml_dtypes.bfloat16), np.array([29_999, 30_000, 16_385, 3001])
    actual = rotary(x, positions)
    assert actual.dtype == jnp.bfloat16
    largest = np.abs(x.astype(np.float64)).max()
    bound = 2 * largest * (angle_error(positions) + epsilon(ml_dtypes.bfloat16))
    assert bound < largest / 5
    np.testing.assert_allclose(np.asarray(actual, np.float64), rotated_by_hand(x, positions), rtol=0, atol=bound)


def test_angles_are_float64_for_float64_inputs():
    with jax.enable_x64(True):
        x, positions = normal(3, 1, 8).astype(np.float64), np.array([100_000, 1, 77_777])
        actual = np.asarray(rotary(x, positions))
    bound = 1e5 * (np.log(1e4) + 4) * epsilon(np.float64) * 2 * np.abs(x).max()
    np.testing.assert_allclose(actual, rotated_by_hand(x, positions), rtol=0, atol=bound)


def test_every_sequence_of_a_batch_has_its_positions():
    x, positions = normal(2, 3, 2, 4), np.array([[0, 1, 2], [5, -1, 9]])
    expected = [rotary(one, places) for one, places in zip(x, positions, strict=True)]
    np.testing.assert_allclose(rotary(x, positions), expected, rtol=0, atol=4 * epsilon(np.float32) * np.abs(x).max())


@pytest.mark.parametrize(
    ("width", "positions", "fraction", "message"),
    [
        (5, [0, 1], 1.0, "fraction 1.0 of head dim 5 is 5 channels: need an even number <= 5"),
        (8, [0, 1], 0.3, "fraction 0.3 of head dim 8 is 2.4 channels: need an even number <= 8"),
        (8, [0, 1], 0.375, "fraction 0.375 of head dim 8 is 3 channels"),
        (8, [0, 1], 1.5, "fraction 1.5 of head dim 8 is 12 channels: need an even number <= 8"),
        (8, [0, 1], -0.25, "fraction -0.25"),
        (8, [0, 1, 2], 1.0, r"positions has shape \(3,\) but x has \(2, 1, 8\): need \[..., T\] = \[..., 2\]"),
        (8, [[0, 1]], 1.0, r"positions has shape \(1, 2\) but x has \(2, 1, 8\)"),
        (8, 0, 1.0, r"positions has shape \(\) but x has \(2, 1, 8\)"),
    ],
)
def test_what_rotary_refuses(width, positions, fraction, message):
    with pytest.raises(ValueError, match=message):
        rotary(np.zeros((2, 1, width), np.float32), np.array(positions), fraction=fraction)


def test_rotary_refuses_batches_that_do_not_fit_and_arrays_of_another_kind():
    with pytest.raises(ValueError, match=r"positions has shape \(3, 2\) but x has \(4, 2, 1, 8\)"):
        rotary(np.zeros((4, 2, 1, 8), np.float32), np.zeros((3, 2), int))
    with pytest.raises(TypeError, match=r"x must be floating point .* got int32\[2, 1, 8\]"):
        rotary(np.zeros((2, 1, 8), np.int32), np.arange(2))
    with pytest.raises(TypeError, match=r"x must be floating point .* got float32\[2, 8\]"):
        rotary(np.zeros((2, 8), np.float32), np.arange(2))


def test_positions_are_whole_numbers():
    with pytest.raises(TypeError, match="positions must be integers, got float32"):
        rotary(np.zeros((2, 1, 8), np.float32), np.zeros(2, np.float32))
