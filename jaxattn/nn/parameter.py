"""The layers of Flax that own parameters, as this package makes them."""

from typing import Any

from flax import nnx


def linear_map(inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs, *, use_bias: bool = False) -> nnx.Linear:
    """W x, or W x + b with `use_bias`."""
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, rngs=rngs)


def rms_norm(channels: int, eps: float, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """g ⊙ x / √(mean(x²) + eps) over the last axis. Raises ValueError unless eps is positive."""
    return nnx.RMSNorm(channels, epsilon=_positive(eps), dtype=dtype, rngs=rngs)


def layer_norm(channels: int, eps: float, dtype: Any, rngs: nnx.Rngs, *, learned: bool = True) -> nnx.LayerNorm:
    """g ⊙ (x − mean) / √(var + eps) + b over the last axis, without g and b unless `learned`. Raises as `rms_norm`."""
    return nnx.LayerNorm(channels, epsilon=_positive(eps), use_scale=learned, use_bias=learned, dtype=dtype, rngs=rngs)


def _positive(eps: float) -> float:
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    return eps
