"""Memories that are trained while they read, over a sequence in shards, one on each device."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.memory.api import MemoryState, PerToken, memory_scan
from jaxattn.core.memory.inner import Identity, InnerLoss, Link, Memory, SquaredError
from jaxattn.core.memory.inner_batch import FastRead
from jaxattn.core.shards import Axis, from_last, passed_on, vary_arrays


def sharded_memory_scan(
    memory: Memory,
    query: Float[Array, "*b t n k"],
    key: Float[Array, "*b t n k"],
    value: Float[Array, "*b t n v"],
    axis_name: Axis,
    *,
    rate: PerToken,
    log_decay: PerToken | None = None,
    log_momentum: PerToken | None = None,
    row_rate: PerToken | None = None,
    loss: InnerLoss = SquaredError(),
    link: Link = Identity(),
    inner_batch: int = 16,
    read: FastRead = "auto",
    state: MemoryState | None = None,
    segment_ids: Int[Array, "*b t"] | None = None,
    lengths: Int[Array, "*b"] | None = None,
) -> tuple[Float[Array, "*b t n v"], MemoryState]:
    """Computes `memory_scan` of a sequence in contiguous shards, inside `jax.shard_map`.

    A step of gradient descent is no affine map of the state, so the shards learn one after the other: each device waits
    for the state that the one before it leaves. Then all read at once. The time is that of one device, plus that of a
    shard, and the memory of a device is that of its shard, and one state per device. Outputs, last state and all
    gradients are those of the whole sequence, wherever it is cut, also inside an inner batch.

    Args:
        memory: As in `memory_scan`.
        query: This device's tokens [..., T, N, K].
        key: [..., T, N, K].
        value: [..., T, N, V].
        axis_name: The mesh axis along which the length is cut, or several.
        rate: As in `memory_scan`, of this device's tokens where it is by token; so are the next three.
        log_decay: See above.
        log_momentum: See above.
        row_rate: See above.
        loss: As in `memory_scan`.
        link: As in `memory_scan`.
        inner_batch: As in `memory_scan`.
        read: As in `memory_scan`.
        state: The state before the first token of the whole sequence, the same on all devices.
        segment_ids: Those of this device's tokens. Where a segment starts inside an inner batch, the row is NaN from
            that shard on.
        lengths: The number of tokens of each row of the whole sequence, the same on all devices.

    Returns:
        A pair (out, last state): the outputs of this device's tokens, and the state after the last token of the whole
            sequence, the same on all devices.

    Raises:
        TypeError or ValueError: As `memory_scan`.
    """
    device, size = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    if lengths is not None:
        lengths = jnp.clip(jnp.asarray(lengths, jnp.int32) - device * query.shape[-3], 0, query.shape[-3])
    gates = rate, log_decay, log_momentum, row_rate
    # Also what all devices share differs from here on, so that its gradients are added up once, and not by one device
    # while it learns and the others wait.
    given = vary_arrays((memory, query, key, value, gates, loss, link, segment_ids, lengths), device)

    def learn(state: MemoryState | None) -> tuple[Array, MemoryState]:
        memory, query, key, value, (rate, log_decay, log_momentum, row_rate), loss, link, segment_ids, lengths = given
        return memory_scan(
            memory,
            query,
            key,
            value,
            rate=rate,
            log_decay=log_decay,
            log_momentum=log_momentum,
            row_rate=row_rate,
            loss=loss,
            link=link,
            inner_batch=inner_batch,
            read=read,
            state=state,
            segment_ids=segment_ids,
            lengths=lengths,
        )

    like = jax.eval_shape(learn, state)[1]
    start = vary_arrays(_start(given[0], like, given[7]) if state is None else state, (device, given))

    @jax.checkpoint
    def turn(number: Any, carry: tuple[MemoryState, MemoryState]) -> tuple[MemoryState, MemoryState]:
        """One device learns, and what it leaves goes to the next. Devices take part in sending whoever's turn it is."""
        state, found = carry
        now = number == device
        found = jax.tree.map(lambda x, y: jnp.where(now, x, y), state, found)
        left = jax.lax.cond(now, lambda state: vary_arrays(learn(state)[1], start), lambda state: state, state)
        return passed_on(left, axis_name), found

    _, entering = jax.lax.fori_loop(0, size, turn, (start, start))
    out, last = learn(entering)
    return out, from_last(last, axis_name)


def _start(memory: Memory, like: MemoryState, segment_ids: Array | None) -> MemoryState:
    """Returns the state before the first token, in these shapes and dtypes."""
    pairs = zip(memory.fast_weights, like.start, strict=True)
    weights = tuple(jnp.broadcast_to(w, x.shape).astype(x.dtype) for w, x in pairs)
    momentum = None if like.momentum is None else jax.tree.map(jnp.zeros_like, weights)
    nothing = jnp.zeros(like.seen.shape, like.seen.dtype)
    segment = nothing if segment_ids is None else jnp.broadcast_to(segment_ids[..., 0], nothing.shape)
    return MemoryState(weights, weights, momentum, nothing, segment.astype(like.segment.dtype))
