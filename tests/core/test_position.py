"""Rotary embedding is a rotation by an angle proportional to the position, so products know only distances."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import assert_close, epsilon

from jaxattn import Llama3, Yarn, rotary, sinusoidal
from jaxattn.core.attend import NTK, Interpolate, LearnedPositions, LongRope, rotary_2d


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


BATCH_BASES = np.array([[10.0, 100.0, 1e3], [1e4, 500.0, 20.0]], np.float32)


@pytest.mark.parametrize("scaling", [None, NTK(4.0), Yarn(8.0, 100)], ids=str)
@pytest.mark.parametrize(
    "base", [BATCH_BASES, BATCH_BASES[0], BATCH_BASES[:, :1], np.float32(30.0)], ids=["both", "head", "batch", "one"]
)
def test_several_bases_are_a_loop_over_bases(base, scaling):
    x, positions = normal(2, 5, 3, 8), np.array([0, 3, 1, 7, 40])
    expected = np.zeros_like(x)
    for b, n in np.ndindex(2, 3):
        one = float(np.broadcast_to(base, (2, 3))[b, n])
        expected[b, :, n] = rotary(x[b, :, n : n + 1], positions, one, scaling=scaling)[:, 0]
    bound = 4 * np.abs(x).max() * (angle_error(40) + 4 * epsilon(np.float32))
    for run in (rotary, jax.jit(rotary)):
        np.testing.assert_allclose(run(x, positions, base, scaling=scaling), expected, rtol=0, atol=bound)


def test_bases_can_be_mapped_and_differentiated():
    x, positions = normal(5, 1, 4), np.arange(5)
    bases = np.array([10.0, 300.0], np.float32)
    mapped = jax.vmap(lambda base: rotary(x, positions, base))(bases)
    each = np.stack([rotary(x, positions, float(base)) for base in bases])
    np.testing.assert_allclose(mapped, each, rtol=0, atol=4 * np.abs(x).max() * angle_error(4))
    assert np.isfinite(jax.grad(lambda base: rotary(x, positions, base)[3, 0, 1])(jnp.float32(10.0)))


def frequencies(scaling, base, rotated):
    """Those of each scaling in float64, one pair at a time."""
    plain = [base ** (-2 * i / rotated) for i in range(rotated // 2)]
    match scaling:
        case Interpolate(factor):
            return [f / factor for f in plain]
        case NTK(factor):
            base *= factor ** (rotated / (rotated - 2))
            return [base ** (-2 * i / rotated) for i in range(rotated // 2)]
        case Llama3(factor, length, low, high):
            wavelengths = [2 * math.pi / f for f in plain]  # told apart by wavelength, as in the models' code
            scaled = []
            for f, wavelength in zip(plain, wavelengths, strict=True):
                if wavelength < length / high:
                    scaled.append(f)
                elif wavelength > length / low:
                    scaled.append(f / factor)
                else:
                    smooth = (length / wavelength - low) / (high - low)
                    scaled.append((1 - smooth) * f / factor + smooth * f)
            return scaled
        case LongRope(divisors):
            return [1 / (divisor * base ** (2 * i / rotated)) for i, divisor in enumerate(divisors)]
        case Yarn(factor, length, beta_fast, beta_slow, truncate):

            def pair_with(rotations):  # solves length · base^(−2 i / R) = 2π · rotations for i
                return rotated / 2 * math.log(length / (2 * math.pi * rotations), base)

            low, high = pair_with(beta_fast), pair_with(beta_slow)
            low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
            low, high = max(low, 0), min(high, rotated - 1)
            ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(rotated // 2)]
            return [f * (1 - r + r / factor) for f, r in zip(plain, ramp, strict=True)]


SCALINGS = (
    Interpolate(4),
    NTK(8.0),
    Yarn(4.0, 64),
    Yarn(16, 1000, beta_fast=20, beta_slow=2.5),
    Yarn(2.0, 300),
    Yarn(16, 1000, beta_fast=20, beta_slow=2.5, truncate=False),
    Llama3(8.0, 64),
    Llama3(32, 300, low=2.0, high=9.5),
    LongRope((1.0, 1.05, 1.5, 2.0, 4.0, 7.25, 16.0, 64.0), 16.0, 4096),
)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_scalings_are_rotations_at_their_frequencies(scaling):
    x, positions, base = normal(6, 2, 20), np.array([0, 1, 7, 100, 63, -1]), 1000.0
    angle = positions[:, None] * np.array(frequencies(scaling, base, 16))
    turned = (x[..., :8] + 1j * x[..., 8:16].astype(np.float64)) * np.exp(1j * angle)[:, None]
    expected = np.concatenate([turned.real, turned.imag, x[..., 16:]], -1)
    actual = rotary(x, positions, base, fraction=0.8, scaling=scaling)
    bound = 2 * np.abs(x).max() * (2 * angle_error(positions, base) + 4 * epsilon(np.float32))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
    assert np.abs(actual - rotary(x, positions, base, fraction=0.8)).max() > 0.1


@pytest.mark.parametrize("scaling", [Interpolate(1.0), NTK(1), Yarn(1.0, 64), Llama3(1, 64)], ids=str)
def test_a_factor_of_one_is_the_identity(scaling):
    x, positions = normal(6, 2, 8), np.arange(6) * 10
    np.testing.assert_allclose(
        rotary(x, positions, scaling=scaling), rotary(x, positions), rtol=0, atol=np.abs(x).max() * angle_error(50)
    )
    assert scaling.attention_scale == 1


def test_interpolation_reads_a_position_times_the_factor_as_the_position():
    x, positions = normal(6, 2, 8), np.arange(6)
    actual, bound = rotary(x, 3 * positions, scaling=Interpolate(3.0)), 4 * np.abs(x).max() * angle_error(5)
    np.testing.assert_allclose(actual, rotary(x, positions), rtol=0, atol=bound)


def turn_of(scaling, channels, base=10000.0):
    """The frequency of each pair of channels: the angle at position 1."""
    x = jnp.concatenate([jnp.ones(channels // 2), jnp.zeros(channels // 2)])[None, None]
    turned = np.asarray(rotary(x, jnp.array([1]), base, scaling=scaling))[0, 0]
    return np.arctan2(turned[channels // 2 :], turned[: channels // 2])


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_the_factor():
    plain, scaled = turn_of(None, 16), turn_of(NTK(5.0), 16)
    error = 32 * epsilon(np.float32)
    np.testing.assert_allclose(scaled[0], plain[0], rtol=error)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 5, rtol=error)
    ratio = np.log(plain / scaled)  # i · log factor / (R/2 − 1): evenly spread
    np.testing.assert_allclose(np.diff(ratio), np.log(5) / 7, rtol=0, atol=2 * error)
    np.testing.assert_allclose(turn_of(NTK(5.0), 2), turn_of(None, 2))  # one pair: the highest


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    """By rotations over the original length: more than beta_fast, fewer than beta_slow, and a ramp between."""
    length, factor, channels = 4096, 8.0, 64
    plain, scaled = turn_of(None, channels), turn_of(Yarn(factor, length), channels)
    rotations, ratio = length * plain / (2 * np.pi), scaled / plain
    fast, slow = rotations > 48, rotations < 0.6  # beyond the pairs at the ends, which are rounded outward
    assert fast.sum() > 5 < slow.sum()
    np.testing.assert_allclose(ratio[fast], 1, rtol=32 * epsilon(np.float32))
    np.testing.assert_allclose(ratio[slow], 1 / factor, rtol=32 * epsilon(np.float32))
    assert (np.diff(ratio) <= 32 * epsilon(np.float32)).all()
    assert ((ratio < 0.99) & (ratio > 1.01 / factor)).sum() > 3
    assert Yarn(factor, length).attention_scale == 0.1 * math.log(8) + 1


def test_the_scales_of_attention_are_those_of_the_published_models():
    """Of DeepSeek-V2 and V3 and of Phi-3, from the numbers in their configs."""
    assert Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0).attention_scale == 1
    lite = Yarn(40.0, 4096, mscale=0.5, mscale_all_dim=0.25).attention_scale
    assert lite == pytest.approx((1 + 0.05 * math.log(40)) / (1 + 0.025 * math.log(40)), rel=1e-15)
    assert Yarn(40.0, 4096, mscale=0.707).attention_scale == pytest.approx(1 + 0.0707 * 3.688879454, rel=1e-9)  # ln 40
    assert LongRope((1.0,), 32.0, 4096).attention_scale == pytest.approx(math.sqrt(17 / 12), rel=1e-15)  # 5 of 12 bits
    assert LongRope((1.0,), 1.0, 4096).attention_scale == 1
    assert Llama3(8.0, 8192).attention_scale == 1


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: Interpolate(0.5), ValueError, "Interpolate: factor must be at least 1 and finite, got 0.5"),
        (lambda: NTK(math.inf), ValueError, "NTK: factor must be at least 1 and finite, got inf"),
        (lambda: Yarn(math.nan, 10), ValueError, "Yarn: factor must be at least 1"),
        (lambda: NTK("2"), TypeError, "NTK: factor must be a number, got '2'"),
        (lambda: Interpolate(jnp.float32(2)), TypeError, "Interpolate: factor must be a number, got Array"),
        (lambda: Yarn(2.0, 0), ValueError, "Yarn: original_length must be at least 1, got 0"),
        (lambda: Yarn(2.0, 1e3), TypeError, "Yarn: original_length must be an int, got 1000.0"),
        (lambda: Yarn(2.0, 64, 1.0, 1.0), ValueError, "beta_fast must be above beta_slow and both positive, got 1.0"),
        (lambda: rotary(normal(2, 1, 8), np.arange(2), 1.0, scaling=Yarn(2.0, 64)), ValueError, "base must be above 1"),
        (lambda: Yarn(2.0, 64, mscale=-1.0), ValueError, r"Yarn: mscale must be at least 0 and finite, got -1\.0"),
        (lambda: Llama3(0.5, 64), ValueError, "Llama3: factor must be at least 1"),
        (lambda: Llama3(2.0, 0), ValueError, "Llama3: original_length must be at least 1, got 0"),
        (lambda: Llama3(2.0, 64, 4.0, 1.0), ValueError, "high must be above low and both positive, got 1.0, 4.0"),
        (lambda: LongRope((1.0, 0.0), 2.0, 64), ValueError, r"divisors must be positive and finite, got 0\.0"),
        (lambda: LongRope((1.0,), 2.0, 1), ValueError, "LongRope: original_length must be at least 2, got 1"),
        (
            lambda: rotary(normal(2, 1, 8), np.arange(2), scaling=LongRope((1.0, 2.0, 3.0), 2.0, 64)),
            ValueError,
            "LongRope: divisors has 3 numbers but 8 channels are rotated: need 4",
        ),
        (lambda: rotary(normal(2, 1, 8), np.arange(2), 0.0), ValueError, "base must be positive, got 0.0"),
        (lambda: rotary(normal(2, 1, 8), np.arange(2), scaling=4.0), TypeError, "scaling must be Interpolate, NTK"),
        (
            lambda: rotary(normal(2, 3, 8), np.arange(2), np.ones(2)),
            ValueError,
            r"base has shape \(2,\) but x has \(2, 3, 8\): need one that broadcasts to \[..., N\]",
        ),
        (
            lambda: rotary_2d(normal(2, 3, 6), np.arange(2), np.arange(2)),
            ValueError,
            "x has head dim 6: rotary_2d needs a multiple of 4",
        ),
        (lambda: rotary_2d(normal(2, 3, 8), np.arange(3), np.arange(2)), ValueError, r"rows has shape \(3,\) but x"),
        (lambda: rotary_2d(normal(2, 3, 8), np.arange(2), np.arange(3)), ValueError, r"columns has shape \(3,\)"),
        (lambda: rotary_2d(normal(2, 3, 8), np.arange(2), np.ones(2)), TypeError, "columns must be integers"),
        (lambda: sinusoidal(np.arange(3), 5), ValueError, "sinusoidal: width must be even, got 5"),
        (lambda: sinusoidal(np.arange(3), 0), ValueError, "sinusoidal: width must be at least 2, got 0"),
        (lambda: sinusoidal(np.arange(3), 4, -1.0), ValueError, "base must be positive, got -1.0"),
        (lambda: sinusoidal(np.ones(3), 4), TypeError, "positions must be integers, got float"),
        (lambda: LearnedPositions(normal(3, 4))(np.ones(3)), TypeError, "positions must be integers, got float"),
    ],
)
def test_what_is_refused(make, exception, message):
    with pytest.raises(exception, match=message):
        make()


def test_rotary_2d_is_a_complex_product_of_each_half():
    x, rows, columns = normal(2, 6, 3, 8), np.array([0, 0, 1, 1, 2, 2]), np.array([0, 4, 0, 4, 0, 4])
    expected = np.concatenate(
        [rotated_by_hand(x[..., :4], rows, 100.0), rotated_by_hand(x[..., 4:], columns, 100.0)], -1
    )
    bound = 2 * np.abs(x).max() * (angle_error(4, 100.0) + 4 * epsilon(np.float32))
    np.testing.assert_allclose(rotary_2d(x, rows, columns, 100.0), expected, rtol=0, atol=bound)


def test_2d_products_depend_on_the_row_and_column_distances_only():
    query, key = normal(1, 1, 8, seed=1), normal(1, 1, 8, seed=2)
    rows, columns = (x.ravel() for x in np.mgrid[:3, :4])
    turned = [np.asarray(rotary_2d(np.repeat(x, 12, 0), rows, columns))[:, 0] for x in (query, key)]
    products = turned[0] @ turned[1].T
    size = np.linalg.norm(query) * np.linalg.norm(key)
    apart = {}
    for t, s in np.ndindex(12, 12):
        apart.setdefault((rows[t] - rows[s], columns[t] - columns[s]), []).append(products[t, s])
    assert len(apart) == 5 * 7
    bound = size * (2 * angle_error(3) + 16 * epsilon(np.float32))
    assert max(np.ptp(same) for same in apart.values()) <= bound
    assert abs(apart[0, 1][0] - apart[1, 0][0]) > 10 * bound


def test_sinusoidal_is_the_papers_formula():
    """Vaswani et al., 2017: sines in the even channels, cosines in the odd ones."""
    positions = np.array([[0, 1, 5], [-1, 200, 3]])
    actual = sinusoidal(positions, 6, base=100.0)
    for b, t in np.ndindex(2, 3):
        p = positions[b, t]
        expected = [f(p * 100.0 ** (-2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
        bound = angle_error(200, 100.0) + 2 * epsilon(np.float32)
        np.testing.assert_allclose(actual[b, t], expected if p >= 0 else np.zeros(6), rtol=0, atol=bound)


def test_sinusoidal_products_depend_on_the_distance_only():
    waves = np.asarray(sinusoidal(np.arange(9), 8))
    for distance in range(-8, 9):
        along = np.diagonal(waves @ waves.T, distance)
        np.testing.assert_allclose(along, along[0], rtol=0, atol=8 * (angle_error(8) + 4 * epsilon(np.float32)))


def test_learned_positions_are_rows_of_the_table_and_nothing_outside():
    table, positions = normal(5, 3), np.array([[4, 0, -1], [5, 2, 2]])
    learned = LearnedPositions(jnp.asarray(table))
    expected = [[table[4], table[0], np.zeros(3)], [np.zeros(3), table[2], table[2]]]
    np.testing.assert_array_equal(learned(positions), expected)
    gradient = jax.grad(lambda part: part(positions).sum())(learned).table
    np.testing.assert_array_equal(gradient, np.array([1, 0, 2, 0, 1.0])[:, None] * np.ones(3))
    poisoned = LearnedPositions(jnp.full((5, 3), jnp.nan))
    np.testing.assert_array_equal(poisoned(np.array([-1, 7])), np.zeros((2, 3)))
