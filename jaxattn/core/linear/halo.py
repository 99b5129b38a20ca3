"""The tokens before a shard, which convolutions and token shifts read; see `jaxattn.core.shards`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxattn.core.checks import check_int
from jaxattn.core.shards import Axis, passed_on


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
