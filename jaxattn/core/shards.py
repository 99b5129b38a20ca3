"""What the devices of a mesh axis pass to each other, where a sequence is cut over them; inside `jax.shard_map`.

A shard is the part of a sequence that one device holds. The shards of an axis lie side by side, in the order of its
devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn.core.mesh import mesh_axes, vary

Axis = str | tuple[str, ...]
"""The name of a mesh axis, or of several that are one, the first of them outermost."""


def passed_on(tree: Any, axis_name: Axis, by: int = 1) -> Any:
    """Returns what the device `by` places before this one holds, around the ring of all devices of an axis."""
    size = jax.lax.axis_size(axis_name)
    if by % size == 0:
        return tree
    ring = [(device, (device + by) % size) for device in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, ring), tree)


def positions_of(length: int, axis_name: Axis) -> Array:
    """Returns the positions of this shard of `length` tokens where shards lie one after the other."""
    return jax.lax.axis_index(axis_name) * length + jnp.arange(length, dtype=jnp.int32)


def from_last(tree: Any, axis_name: Axis) -> Any:
    """Returns what the last device of an axis holds, on every device."""
    last = jax.lax.axis_index(axis_name) == jax.lax.axis_size(axis_name) - 1
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(last, x, jnp.zeros_like(x)), axis_name), tree)


def vary_arrays(tree: Any, like: Any) -> Any:
    """Types the arrays of a pytree as differing over all mesh axes over which an array in it or in `like` differs.

    Where that is done before a loop or a branch, the gradients of what all devices share are added up once, after it.
    """

    def is_array(x: Any) -> bool:
        return isinstance(x, jax.Array | np.ndarray)

    axes = mesh_axes([x for x in jax.tree.leaves((tree, like)) if is_array(x)])
    return jax.tree.map(lambda x: vary(jnp.asarray(x), axes) if is_array(x) else x, tree)
