"""Orders of the tokens of a sequence that is cut over devices, as permutations of arrays.

Under a causal mask the last tokens have the most keys to read, so contiguous shards have unequal work.
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxattn.core.checks import check_int


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
