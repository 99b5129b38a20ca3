"""Parameters, and the layers of Flax that own some, as this package makes them.

Each says its role to an optimiser (`role`) and the names of its axes to a mesh (`axes`), as metadata of its variable.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array

from jaxattn.core.role import Role
from jaxattn.nn.sharding import Axis


def decayed(x: Any, *axes: Axis) -> nnx.Param:
    """Makes a parameter that is decayed (see `jaxattn.core.role`), with its axes (see `jaxattn.nn.sharding`)."""
    return _parameter(x, "decayed", axes)


def undecayed(x: Any, *axes: Axis) -> nnx.Param:
    """Makes a parameter that is not decayed (see `jaxattn.core.role`), with its axes (see `jaxattn.nn.sharding`)."""
    return _parameter(x, "undecayed", axes)


def _parameter(x: Any, role: Role, axes: tuple[Axis, ...]) -> nnx.Param:
    return nnx.Param(x, role=role, axes=axes or (None,) * x.ndim)


def linear_map(
    inputs: int,
    outputs: int,
    dtype: Any,
    rngs: nnx.Rngs,
    axes: tuple[Axis, ...],
    *,
    use_bias: bool = False,
    role: Role = "hidden",
    start: Callable[..., Array] = nnx.nn.linear.default_kernel_init,
) -> nnx.Linear:
    """Makes the map W x, or W x + b with `use_bias`.

    Args:
        inputs: The channels of x.
        outputs: The channels of the result.
        dtype: The dtype of the computation.
        rngs: Streams for the initial parameters.
        axes: The names of the two axes of W, see `jaxattn.nn.sharding`.
        use_bias: Whether there is b.
        role: The role of W, see `jaxattn.core.role`.
        start: The initializer of W.
    """
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=start,
        kernel_metadata={"role": role, "axes": axes},
        bias_metadata={"role": "undecayed", "axes": axes[1:]},
        rngs=rngs,
    )
