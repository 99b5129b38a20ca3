"""Sequences cut over the devices of a mesh axis: orders of tokens, and what devices pass to each other.

All functions but those of orders are called inside `jax.shard_map`. A shard is the part of a sequence that one device
holds; the shards of an axis lie side by side, in the order of its devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxattn.core.checks import check_int
from jaxattn.core.mesh import mesh_axes, vary

Axis = str | tuple[str, ...]
"""The name of a mesh axis, or of several that are one, the first of them outermost."""


# Orders. Under a causal mask the last tokens have the most keys to read, so contiguous shards have unequal work.


def zigzag(x: Shaped[Array, "..."], shards: int, axis: int) -> Shaped[Array, "..."]:
    """Orders tokens so that each of n shards has two chunks of 2n, chunk d and chunk 2n − 1 − d: equal causal work.

    16 tokens in 4 shards stand as 0 1 14 15, 2 3 12 13, 4 5 10 11, 6 7 8 9. Positions, labels and everything else that
    belongs to a token have to be ordered with it, labels after they were shifted. Masks, biases and rotary angles need
    nothing, because they go by positions. `unzigzag` is the inverse.

    Args:
        x: An array.
        shards: The number of shards n.
        axis: The axis of tokens, whose length must be a multiple of 2n.

    Raises:
        TypeError: `shards` or `axis` is not an int.
        ValueError: The array has no such axis, or its length is no such multiple.
    """
    chunks = _cut(x, 2 * _checked(shards), axis)
    order = [each for d in range(shards) for each in (d, 2 * shards - 1 - d)]
    return jnp.take(chunks, jnp.asarray(order), axis % x.ndim).reshape(x.shape)


def unzigzag(x: Shaped[Array, "..."], shards: int, axis: int) -> Shaped[Array, "..."]:
    """Undoes `zigzag`; arguments and errors are the same."""
    chunks = _cut(x, 2 * _checked(shards), axis)
    order = [2 * d if d < shards else 2 * (2 * shards - 1 - d) + 1 for d in range(2 * shards)]
    return jnp.take(chunks, jnp.asarray(order), axis % x.ndim).reshape(x.shape)


def striped(x: Shaped[Array, "..."], shards: int, axis: int) -> Shaped[Array, "..."]:
    """Orders tokens so that shard d of n has tokens d, d + n, d + 2n, ...: equal work also for packed documents.

    The notes of `zigzag` hold here too. `unstriped` is the inverse. Striped attention is from Brandon et al. (2023).

    Args:
        x: An array.
        shards: The number of shards n.
        axis: The axis of tokens, whose length must be a multiple of n.

    Raises:
        TypeError: `shards` or `axis` is not an int.
        ValueError: The array has no such axis, or its length is no such multiple.
    """
    _cut(x, _checked(shards), axis)
    return _cut(x, x.shape[axis] // shards, axis).swapaxes(axis % x.ndim, axis % x.ndim + 1).reshape(x.shape)


def unstriped(x: Shaped[Array, "..."], shards: int, axis: int) -> Shaped[Array, "..."]:
    """Undoes `striped`; arguments and errors are the same."""
    return _cut(x, _checked(shards), axis).swapaxes(axis % x.ndim, axis % x.ndim + 1).reshape(x.shape)


def _checked(shards: int) -> int:
    check_int("shards", shards)
    if shards < 1:
        raise ValueError(f"shards is {shards}: need at least 1")
    return shards


def _cut(x: Array, pieces: int, axis: int) -> Array:
    """Cuts an axis into (pieces, tokens of a piece)."""
    check_int("axis", axis)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis} but the array has shape {x.shape}: need one of its {x.ndim} axes")
    axis, length = axis % x.ndim, x.shape[axis]
    if length % pieces:
        raise ValueError(f"axis {axis} has length {length}: need a multiple of {pieces}")
    return x.reshape(*x.shape[:axis], pieces, length // pieces, *x.shape[axis + 1 :])


# Exchange.


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


def halo(x: Shaped[Array, "..."], count: int, axis_name: Axis, axis: int) -> Shaped[Array, "..."]:
    """Returns the `count` entries along an axis before this shard, zeros before the first: what a convolution reads.

    A causal convolution of width w over a sequence in shards is that of `concatenate([halo(x, w − 1, ...), x])`, less
    its first w − 1 outputs; a token shift is the case w = 2. Where a shard is shorter than `count`, the entries come
    from several shards.

    Args:
        x: The shard.
        count: The number of entries, at least 0.
        axis_name: The mesh axis, over which the sequence is cut into contiguous shards.
        axis: The axis of tokens.

    Raises:
        TypeError: `count` or `axis` is not an int.
        ValueError: `count` is negative.
    """
    check_int("count", count)
    check_int("axis", axis)
    if count < 0:
        raise ValueError(f"count is {count}: need at least 0")
    length, size = x.shape[axis], jax.lax.axis_size(axis_name)
    device, pieces = jax.lax.axis_index(axis_name), []
    for back in range(1, -(-count // length) + 1):
        part = jax.lax.slice_in_dim(x, max(0, back * length - count), length, axis=axis)
        part = passed_on(part, axis_name, back) if back < size else jnp.zeros_like(part)
        pieces.append(jnp.where(device >= back, part, 0))
    if not pieces:
        return jax.lax.slice_in_dim(x, 0, 0, axis=axis)
    return jnp.concatenate(pieces[::-1], axis)


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
