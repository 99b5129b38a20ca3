"""Parameters, and the layers of Flax that own some, as this package makes them: each says its role to an optimiser."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array

from jaxattn.core.role import Role


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
