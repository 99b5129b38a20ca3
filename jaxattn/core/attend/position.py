"""Position embeddings: functions of (x, positions)."""

import abc
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.checks import check_static_int, positions_fit
from jaxattn.core.matmul import accumulator
from jaxattn.core.part import part

Base = Float[Array, "*#b #n"] | float


class RotaryScaling(abc.ABC):
    """The base class of other frequencies of a rotary embedding, for sequences longer than those of training.

    With `factor` 1 each scaling is the identity, but for `LongRope`, whose frequencies are listed.

    Raises:
        TypeError: The factor is not a number.
        ValueError: The factor is below 1 or not finite.
    """

    @abc.abstractmethod
    def __call__(self, base: Any, channels: int, dtype: Any) -> Float[Array, "*#b #t #n r"]:
        """Returns the R/2 frequencies of R = `channels` rotated channels, in the last axis."""

    @property
    @abc.abstractmethod
    def attention_scale(self) -> float:
        """The factor for the rotated channels of query and key, which `rotary` leaves to the caller."""


def rotary_frequencies(base: Any, channels: int, dtype: Any) -> Float[Array, "*#b #t #n r"]:
    """Returns base^(−2 i / R),  i = 0 .. R/2 − 1: radians per position of each pair of channels."""
    return base ** (-jnp.arange(0, channels, 2, dtype=dtype) / max(channels, 1))


def _check_factor(owner: str, factor: Any) -> None:
    if not isinstance(factor, int | float | np.number) or isinstance(factor, bool):
        raise TypeError(f"{owner}: factor must be a number, got {factor!r}")
    if not 1 <= factor < math.inf:
        raise ValueError(f"{owner}: factor must be at least 1 and finite, got {factor}")


@part
class Interpolate(RotaryScaling):
    """position -> position / factor: longer sequences fall between the trained positions (Chen et al., 2023).

    Attributes:
        factor: At least 1, the divisor of positions.
    """

    factor: float
    attention_scale = 1.0

    def __post_init__(self):
        _check_factor("Interpolate", self.factor)

    def __call__(self, base, channels, dtype):
        return rotary_frequencies(base, channels, dtype) / self.factor


@part
class NTK(RotaryScaling):
    """base -> base · factor^(R / (R − 2)) for R rotated channels ("NTK-aware", described by Peng et al., 2023).

    The highest frequency, 1, stays; the lowest is divided by `factor`; those between are spread evenly in their logs.
    With R = 2 there is one frequency, the highest, and nothing changes.

    Attributes:
        factor: At least 1, the divisor of the lowest frequency.
    """

    factor: float
    attention_scale = 1.0

    def __post_init__(self):
        _check_factor("NTK", self.factor)

    def __call__(self, base, channels, dtype):
        stretch = self.factor ** (channels / (channels - 2)) if channels > 2 else 1.0
        return rotary_frequencies(base * stretch, channels, dtype)


@part
class Yarn(RotaryScaling):
    """frequency_i -> (1 − ramp_i) · frequency_i + ramp_i · frequency_i / factor  (YaRN, Peng et al., 2023).

    Over `original_length` L, the length of training, pair i makes L · frequency_i / 2π rotations. Pairs that make more
    than `beta_fast` keep their frequency, those that make fewer than `beta_slow` are interpolated, and between them
    ramp_i goes from 0 to 1. The ramp is linear in the index i, between

        low = max(⌊index(beta_fast)⌋, 0),   high = min(⌈index(beta_slow)⌉, R − 1),
        index(r) = R ln(L / 2π r) / (2 ln base)

    as in the authors' code and the models published with it; in the text of the paper the ramp is linear in the
    rotations.

    The paper also sharpens attention: query and key are each multiplied by

        attention_scale = m(mscale) / m(mscale_all_dim),   m(μ) = 0.1 μ ln(factor) + 1

    which is the paper's 0.1 ln(factor) + 1 unless given. `rotary` does not. Multiply the rotated channels of both, or,
    where all are rotated, give `score=Dot(H**-0.5 * yarn.attention_scale**2)`. DeepSeek-V2 and V3 (2024) say both
    numbers, and besides multiply all scores by m(mscale_all_dim)²: that is the scale of the score, H^−½ m².

    Attributes:
        factor: At least 1, the divisor of the interpolated frequencies.
        original_length: L, an int of at least 1.
        beta_fast: The rotations above which a frequency is kept.
        beta_slow: The rotations below which a frequency is interpolated.
        truncate: Whether the ends are rounded to whole indices; False as in the models gpt-oss (2025).
        mscale: μ of the numerator, at least 0.
        mscale_all_dim: μ of the denominator, at least 0.

    Raises:
        TypeError: `factor` is not a number, or `original_length` is not an int.
        ValueError: `factor` is below 1 or not finite, beta_fast > beta_slow > 0 does not hold, `original_length` is not
            positive, a μ is negative or not finite, or a base that is a number is not above 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        _check_factor("Yarn", self.factor)
        check_static_int("Yarn", "original_length", self.original_length, 1)
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"Yarn: beta_fast must be above beta_slow and both positive, got {self.beta_fast}, {self.beta_slow}"
            )
        for name in ("mscale", "mscale_all_dim"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Yarn: {name} must be at least 0 and finite, got {getattr(self, name)}")

    @property
    def attention_scale(self) -> float:
        above, below = (0.1 * mscale * math.log(self.factor) + 1 for mscale in (self.mscale, self.mscale_all_dim))
        return above / below

    def __call__(self, base, channels, dtype):
        # In float64 where the base is a number: rounded to float32, an index near a whole number has another floor.
        xp: Any = np if isinstance(base, int | float | np.number) else jnp
        if xp is np and base <= 1:
            raise ValueError(f"base must be above 1 for Yarn, got {base}")

        def index(rotations):
            return channels * math.log(self.original_length / (2 * math.pi * rotations)) / (2 * xp.log(base))

        low, high = index(self.beta_fast), index(self.beta_slow)
        low, high = (xp.floor(low), xp.ceil(high)) if self.truncate else (low, high)
        low, high = xp.maximum(low, 0), xp.minimum(high, channels - 1)
        ramp = jnp.clip((jnp.arange(channels // 2, dtype=dtype) - low) / xp.maximum(high - low, 1e-3), 0, 1)
        kept = rotary_frequencies(base, channels, dtype)
        return ((1 - ramp) * kept + ramp * (kept / self.factor)).astype(dtype)


@part
class Llama3(RotaryScaling):
    """frequency_i -> (1 − s_i) · frequency_i / factor + s_i · frequency_i  (Llama 3.1, Dubey et al., 2024), with

        s_i = (L · frequency_i / 2π − low) / (high − low), between 0 and 1

    Over `original_length` L, the length of training, pair i makes L · frequency_i / 2π rotations. Pairs that make more
    than `high` keep their frequency, those that make fewer than `low` are interpolated.

    Attributes:
        factor: At least 1, the divisor of the interpolated frequencies.
        original_length: L, an int of at least 1.
        low: The rotations below which a frequency is interpolated.
        high: The rotations above which a frequency is kept.

    Raises:
        TypeError: `factor` is not a number, or `original_length` is not an int.
        ValueError: `factor` is below 1 or not finite, high > low > 0 does not hold, or `original_length` is not
            positive.
    """

    factor: float
    original_length: int
    low: float = 1.0
    high: float = 4.0
    attention_scale = 1.0

    def __post_init__(self):
        _check_factor("Llama3", self.factor)
        check_static_int("Llama3", "original_length", self.original_length, 1)
        if not self.high > self.low > 0:
            raise ValueError(f"Llama3: high must be above low and both positive, got {self.high}, {self.low}")

    def __call__(self, base, channels, dtype):
        kept = rotary_frequencies(base, channels, dtype)
        rotations = self.original_length * kept / (2 * math.pi)
        keeps = jnp.clip((rotations - self.low) / (self.high - self.low), 0, 1)
        return ((1 - keeps) * (kept / self.factor) + keeps * kept).astype(dtype)


@part
class LongRope(RotaryScaling):
    """frequency_i -> frequency_i / divisors_i, one divisor per pair of channels (LongRoPE, Ding et al., 2024).

    The divisors were searched for each model. Models come with two lists: give the short one for sequences up to
    `original_length`, the length of training, and the long one beyond. Query and key are each multiplied by
    `attention_scale` = √(1 + ln(factor) / ln(original_length)), with both lists.

    Attributes:
        divisors: [R/2], positive and finite.
        factor: At least 1, the longest length over `original_length`.
        original_length: The length of training, an int of at least 2.

    Raises:
        TypeError: `factor` is not a number, or `original_length` is not an int.
        ValueError: `factor` is below 1 or not finite, a divisor is not positive and finite, there are not as many as
            the pairs that are rotated, or `original_length` is below 2.
    """

    divisors: tuple[float, ...]
    factor: float
    original_length: int

    def __post_init__(self):
        _check_factor("LongRope", self.factor)
        check_static_int("LongRope", "original_length", self.original_length, 2)
        if bad := [each for each in self.divisors if not 0 < each < math.inf]:
            raise ValueError(f"LongRope: divisors must be positive and finite, got {bad[0]}")

    @property
    def attention_scale(self) -> float:
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def __call__(self, base, channels, dtype):
        if len(self.divisors) != channels // 2:
            raise ValueError(
                f"LongRope: divisors has {len(self.divisors)} numbers but {channels} channels are rotated: "
                f"need {channels // 2}"
            )
        return rotary_frequencies(base, channels, dtype) / jnp.array(self.divisors, dtype)


def rotary_channels(width: int, fraction: float) -> int:
    """Returns R = fraction · width, the number of channels that are rotated.

    Raises:
        ValueError: R is not an even whole number from 0 to `width`.
    """
    rotated = round(fraction * width)
    if not 0 <= fraction <= 1 or rotated % 2 or abs(rotated - fraction * width) > 1e-6:
        raise ValueError(
            f"fraction {fraction} of head dim {width} is {fraction * width:g} channels: need an even number <= {width}"
        )
    return rotated


def rotary(
    x: Float[Array, "*b t n h"],
    positions: Int[Array, "*#b t"],
    base: Base = 10000.0,
    fraction: float = 1.0,
    scaling: RotaryScaling | None = None,
) -> Float[Array, "*b t n h"]:
    """Applies a rotary position embedding (Su et al., 2021) to the first R = fraction · H channels.

    The other channels pass through. Channels i and i + R/2 form a pair that is rotated by the angle  position ·
    base^(−2 i / R),  i = 0 .. R/2 − 1. So the product of a rotated query and a rotated key depends on their distance
    only. Angles are float32 (float64 for float64 x) whatever the dtype of x, which the result keeps.

    Args:
        x: [..., T, N, H], floating point.
        positions: [..., T], ints. They broadcast over heads and batch.
        base: A number or an array that broadcasts to [..., N]: a base per head, per batch entry, or both.
        fraction: R / H, from 0 to 1.
        scaling: A change of the frequencies for sequences longer than those of training: `Interpolate`, `NTK`, `Yarn`,
            `Llama3` or `LongRope`.

    Raises:
        TypeError: x is not floating point [..., T, N, H], positions are not integers, or `scaling` is another thing.
        ValueError: R is not an even whole number between 0 and H, positions or base do not fit x, or the base is not
            positive (an array is not looked into).
    """
    return _rotate(x, positions, base, fraction, scaling, "positions")


class Position(abc.ABC):
    """The base class of parts that tell queries and keys where they stand, other than by the bias or the mask."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*b t n h"], positions: Int[Array, "*#b t"]) -> Float[Array, "*b t n h"]:
        """Returns queries or keys as they meet each other, from those of these positions."""

    def check(self, head_dim: int) -> None:  # noqa: B027, most work with any
        """Raises ValueError for a head dim that it cannot work with."""


@part
class Rotary(Position):
    """The embedding `rotary` with these settings, with the rotated channels times `scaling.attention_scale`.

    Attributes:
        base: The base of the angles.
        fraction: The fraction of the channels that is rotated.
        scaling: The way in which positions beyond those of training are read: `Yarn`, `Llama3` or another.
    """

    base: float = 10000.0
    fraction: float = 1.0
    scaling: RotaryScaling | None = None

    def check(self, head_dim):
        rotary_channels(head_dim, self.fraction)

    def __call__(self, x, positions):
        x = rotary(x, positions, self.base, self.fraction, self.scaling)
        if self.scaling is None or self.scaling.attention_scale == 1:
            return x
        rotated = jnp.arange(x.shape[-1]) < rotary_channels(x.shape[-1], self.fraction)
        return x * jnp.where(rotated, self.scaling.attention_scale, 1).astype(x.dtype)


def rotary_2d(
    x: Float[Array, "*b t n h"],
    rows: Int[Array, "*#b t"],
    columns: Int[Array, "*#b t"],
    base: Base = 10000.0,
) -> Float[Array, "*b t n h"]:
    """Applies a rotary embedding for images: the first half of the channels turns by the row, the second by the column.

    Each half is `rotary` of H/2 channels, so the product of a rotated query and a rotated key depends only on how many
    rows and how many columns they are apart (Heo et al., 2024, call it axial). Patch t of an image that is W patches
    wide has row t // W and column t % W.

    Args:
        x: [..., T, N, H], as of `rotary`; H is a multiple of 4.
        rows: [..., T], the row of each patch.
        columns: [..., T], the column of each patch.
        base: As of `rotary`.

    Raises:
        TypeError: As of `rotary`.
        ValueError: As of `rotary`, or H is no multiple of 4.
    """
    if x.ndim and x.shape[-1] % 4:
        raise ValueError(f"x has head dim {x.shape[-1]}: rotary_2d needs a multiple of 4")
    by_row, by_column = jnp.split(jnp.asarray(x), 2, axis=-1)
    halves = _rotate(by_row, rows, base, 1.0, None, "rows"), _rotate(by_column, columns, base, 1.0, None, "columns")
    return jnp.concatenate(halves, axis=-1)


def _rotate(x: Any, positions: Any, base: Any, fraction: float, scaling: Any, name: str) -> Array:
    """`rotary`, where errors call the positions `name`."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 3:
        raise TypeError(f"x must be floating point [..., length, heads, head dim], got {x.dtype}{list(x.shape)}")
    *batch, length, heads, width = x.shape
    rotated = rotary_channels(width, fraction)
    positions = _integers(positions, name)
    if not positions_fit(positions.shape, tuple(batch), length):
        raise ValueError(f"{name} has shape {positions.shape} but x has {x.shape}: need [..., T] = [..., {length}]")
    dtype = accumulator(x)
    if isinstance(base, int | float | np.number):
        if not base > 0:
            raise ValueError(f"base must be positive, got {base}")
    else:
        base = jnp.asarray(base, dtype)
        if not _broadcasts(base.shape, (*batch, heads)):
            raise ValueError(f"base has shape {base.shape} but x has {x.shape}: need one that broadcasts to [..., N]")
        base = base[..., None, :, None] if base.ndim else base
    if scaling is None:
        frequency = rotary_frequencies(base, rotated, dtype)
    elif isinstance(scaling, RotaryScaling):
        frequency = scaling(base, rotated, dtype)
    else:
        kinds = "Interpolate, NTK, Yarn, Llama3, LongRope"
        raise TypeError(f"scaling must be {kinds} or None, got {type(scaling).__name__}")
    angle = positions.astype(dtype)[..., None, None] * frequency  # [..., T, 1 or N, R/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = x[..., : rotated // 2], x[..., rotated // 2 : rotated], x[..., rotated:]
    first, second = first.astype(dtype), second.astype(dtype)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def sinusoidal(positions: Int[Array, "*b t"], width: int, base: float = 10000.0) -> Float[Array, "*b t d"]:
    """Returns absolute position embeddings, to be added to the input of the first layer (Vaswani et al., 2017).

        out[2 i] = sin(position · base^(−2 i / D)),   out[2 i + 1] = cos(position · base^(−2 i / D))

    The result is float32. A negative position (an empty slot) gives zeros.

    Args:
        positions: [..., T], ints.
        width: D, even and positive.
        base: Positive.

    Raises:
        TypeError: Positions are not integers, or `width` is not an int.
        ValueError: `width` is not even and positive, or `base` is not positive.
    """
    check_static_int("sinusoidal", "width", width, 2)
    if width % 2:
        raise ValueError(f"sinusoidal: width must be even, got {width}")
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    places = _integers(positions)
    angle = places[..., None] * rotary_frequencies(base, width, jnp.float32)
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*places.shape, width)
    return jnp.where((places >= 0)[..., None], waves, 0)


@part
class LearnedPositions:
    """out = table[position]: a learned absolute position embedding, to be added to the input (Gehring et al., 2017).

    Positions outside the table, also the −1 of an empty slot, give zeros and no gradient, never NaN.

    Attributes:
        table: [P, D].
    """

    table: Float[Array, "positions width"]

    def __call__(self, positions: Int[Array, "*b t"]) -> Float[Array, "*b t d"]:
        """Returns the rows of the table at these positions.

        Raises:
            TypeError: Positions are not integers.
        """
        places, table = _integers(positions), jnp.asarray(self.table)
        inside = (places >= 0) & (places < table.shape[0])
        return jnp.where(inside[..., None], table[jnp.where(inside, places, 0)], 0)


def _integers(positions: Any, name: str = "positions") -> Array:
    if positions is None or not jnp.issubdtype(jnp.asarray(positions).dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {None if positions is None else jnp.asarray(positions).dtype}")
    return jnp.asarray(positions)
