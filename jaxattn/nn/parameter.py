"""Parameters, and the layers of Flax that own some, as this package makes them: each says its role to an optimiser."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array

from jaxattn.core.role import Role


def decayed(x: Any) -> nnx.Param:
    """Makes a parameter that is decayed: see `jaxattn.core.role`."""
    return nnx.Param(x, role="decayed")


def undecayed(x: Any) -> nnx.Param:
    """Makes a parameter that is not decayed: see `jaxattn.core.role`."""
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
    """Makes the map W x, or W x + b with `use_bias`.

    Args:
        inputs: The channels of x.
        outputs: The channels of the result.
        dtype: The dtype of the computation.
        rngs: Streams for the initial parameters.
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
        kernel_metadata={"role": role},
        bias_metadata={"role": "undecayed"},
        rngs=rngs,
    )
