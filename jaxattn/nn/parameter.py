"""Parameters, and the layers of Flax that own some, as this package makes them.

Each says its role to an optimiser (`role`) and the names of its axes to a mesh (`axes`), as metadata of its variable.
"""

from collections.abc import Callable
from typing import Any

import jax
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


class Linear(nnx.Linear):
    """W x + b of x [..., C], as one product of all rows.

    With several axes of rows XLA sums the gradient of W over each of them, which takes longer on a CPU. On a mesh the
    axes stay as they are, since two that are spread over devices do not make one.
    """

    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        """Returns W x + b, spread over a mesh as `out_sharding` says, if it is given."""
        if out_sharding is not None:
            return super().__call__(inputs, out_sharding=out_sharding)
        return over_rows(super().__call__, inputs)


def over_rows(function: Callable[[Array], Array], x: Array) -> Array:
    """Returns function(x) of x [..., C], called with all rows in one axis unless there is a mesh."""
    if x.ndim < 3 or not jax.sharding.get_abstract_mesh().empty:
        return function(x)
    rows = function(x.reshape(-1, x.shape[-1]))
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


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
    return Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=start,
        kernel_metadata={"role": role, "axes": axes},
        bias_metadata={"role": "undecayed", "axes": axes[1:]},
        rngs=rngs,
    )
