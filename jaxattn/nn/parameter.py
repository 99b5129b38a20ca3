"""Parameters, and the layers of Flax that own some, as this package makes them: each says its role to an optimiser."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxattn.core.role import Role
from jaxattn.nn.tap import Tap


def decayed(x: Any) -> nnx.Param:
    """A parameter that is decayed: see `jaxattn.core.role`."""
    return nnx.Param(x, role="decayed")


def undecayed(x: Any) -> nnx.Param:
    """A parameter that is not decayed: see `jaxattn.core.role`."""
    return nnx.Param(x, role="undecayed")


def linear_map(
    inputs: int,
    outputs: int,
    dtype: Any,
    rngs: nnx.Rngs,
    *,
    use_bias: bool = False,
    role: Role = "hidden",
    start: Callable[..., Array] = nnx.nn.linear.default_kernel_init,
) -> nnx.Linear:
    """W x, or W x + b with `use_bias`. role: that of W. start: its initializer."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=start,
        kernel_metadata={"role": role},
        bias_metadata={"role": "undecayed"},
        rngs=rngs,
    )


def rms_norm(channels: int, eps: float, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """g ⊙ x / √(mean(x²) + eps) over the last axis. Raises ValueError unless eps is positive."""
    scale = {"role": "undecayed"}
    return nnx.RMSNorm(channels, epsilon=_positive(eps), dtype=dtype, scale_metadata=scale, rngs=rngs)


def layer_norm(channels: int, eps: float, dtype: Any, rngs: nnx.Rngs, *, learned: bool = True) -> nnx.LayerNorm:
    """g ⊙ (x − mean) / √(var + eps) + b over the last axis, without g and b unless `learned`. Raises as `rms_norm`."""
    return nnx.LayerNorm(
        channels,
        epsilon=_positive(eps),
        use_scale=learned,
        use_bias=learned,
        dtype=dtype,
        scale_metadata={"role": "undecayed"},
        bias_metadata={"role": "undecayed"},
        rngs=rngs,
    )


def _positive(eps: float) -> float:
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    return eps


def normed(norm: nnx.RMSNorm, x: Array, tap: Tap, site: str) -> Array:
    """norm(x), with √(mean(x²) + eps), by which it divides, at a site."""
    if not tap.wants(site):
        return norm(x)
    square = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    scale = tap(site, jnp.sqrt(square.mean(-1, keepdims=True) + norm.epsilon))
    dtype = x.dtype if norm.dtype is None else norm.dtype
    gain: Any = norm.scale
    return (x / scale * gain[...]).astype(dtype)
