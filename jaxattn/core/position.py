"""Position embeddings: functions of (x, positions)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.parts import positions_fit
from jaxattn.core.score import accumulator


def rotary_channels(width: int, fraction: float) -> int:
    """R = fraction · width, the channels that are rotated. Raises ValueError unless it is even, whole and <= width."""
    rotated = round(fraction * width)
    if not 0 <= fraction <= 1 or rotated % 2 or abs(rotated - fraction * width) > 1e-6:
        raise ValueError(
            f"fraction {fraction} of head dim {width} is {fraction * width:g} channels: need an even number <= {width}"
        )
    return rotated


def rotary(
    x: Float[Array, "*b t n h"],
    positions: Int[Array, "*#b t"],
    base: float = 10000.0,
    fraction: float = 1.0,
) -> Float[Array, "*b t n h"]:
    """Rotary position embedding (Su et al., 2021) of the first R = fraction · H channels; the others pass through.

    Channels i and i + R/2 form a pair that is rotated by the angle  position · base^(−2 i / R),  i = 0 .. R/2 − 1.
    So the product of a rotated query and a rotated key depends on their distance only. Angles are float32 (float64 for
    float64 x) whatever the dtype of x, which the result keeps. `positions` [..., T] broadcasts over heads and batch.

    Raises ValueError if R is not an even whole number between 0 and H or positions do not fit x, TypeError for an x
    that is not floating point [..., T, N, H].
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 3:
        raise TypeError(f"x must be floating point [..., length, heads, head dim], got {x.dtype}{list(x.shape)}")
    *batch, length, _, width = x.shape
    rotated = rotary_channels(width, fraction)
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers, got {positions.dtype}")
    if not positions_fit(positions.shape, tuple(batch), length):
        raise ValueError(f"positions has shape {positions.shape} but x has {x.shape}: need [..., T] = [..., {length}]")
    dtype = accumulator(x)
    frequency = base ** (-jnp.arange(0, rotated, 2, dtype=dtype) / max(rotated, 1))
    angle = positions.astype(dtype)[..., None, None] * frequency  # [..., T, 1, R/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = x[..., : rotated // 2], x[..., rotated // 2 : rotated], x[..., rotated:]
    first, second = first.astype(dtype), second.astype(dtype)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
