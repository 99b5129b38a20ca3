"""Linear attention over a sequence in shards, one on each device: the maps of the shards are combined.

The tokens of a shard are an affine map of the state, S ↦ through S + add, so the state that a shard starts from is the
maps of all shards before it, combined, at the state before the first. Combining is associative: ⌈log₂ n⌉ rounds do for
n devices. Then all devices compute their tokens at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.linear.api import Form, LinearState, linear_attention, state_map
from jaxattn.core.linear.recurrence import Delta, Erase, Read, StateMap, combine
from jaxattn.core.shards import Axis, from_last, passed_on, vary_arrays


def sharded_linear_attention(
    query: Float[Array, "*b t n k"],
    key: Float[Array, "*b t m k"],
    value: Float[Array, "*b t m v"],
    axis_name: Axis,
    *,
    log_decay: Float[Array, "..."] | None = None,
    erase: Delta | Erase | None = None,
    bonus: Float[Array, "n k"] | None = None,
    read: Read = "post",
    state: LinearState | None = None,
    segment_ids: Int[Array, "*b t"] | None = None,
    form: Form = "auto",
    chunk: int | None = None,
) -> tuple[Float[Array, "*b t n v"], LinearState]:
    """Computes `linear_attention` of a sequence in contiguous shards, inside `jax.shard_map`.

        @partial(jax.shard_map, mesh=mesh, in_specs=P(None, "context"), out_specs=(P(None, "context"), P()))
        def memory(query, key, value):  # [B, T, ...] in shards along T
            return sharded_linear_attention(query, key, value, "context")

    Outputs, last state and all gradients are those of the whole sequence, but for rounding. Each device computes its
    tokens twice: once their effect on the state, and then their outputs. What is sent is states: with erasures also a
    matrix [K, K] per head.

    Args:
        query: This device's tokens [..., T, N, K].
        key: [..., T, M, K].
        value: [..., T, M, V].
        axis_name: The mesh axis along which the length is cut, or several.
        log_decay: As in `linear_attention`, of this device's tokens where it is by token.
        erase: Likewise.
        bonus: As in `linear_attention`.
        read: As in `linear_attention`.
        state: The state before the first token of the whole sequence, the same on all devices.
        segment_ids: Those of this device's tokens.
        form: As in `linear_attention`.
        chunk: As in `linear_attention`.

    Returns:
        A pair (out, last state): the outputs of this device's tokens, and the state after the last token of the whole
            sequence, the same on all devices.

    Raises:
        TypeError or ValueError: As `linear_attention`.
    """
    arrays = query, key, value, log_decay, erase, bonus, segment_ids
    arrays = vary_arrays(arrays, jax.lax.axis_index(axis_name))
    query, key, value, log_decay, erase, bonus, segment_ids = arrays
    by_token: dict[str, Any] = {"log_decay": log_decay, "erase": erase, "segment_ids": segment_ids}
    options: dict[str, Any] = {"bonus": bonus, "read": read, "form": form, "chunk": chunk}

    def from_state(state: LinearState | None) -> tuple[Array, LinearState]:
        return linear_attention(query, key, value, state=state, **by_token, **options)

    like = jax.eval_shape(from_state, state)[1]  # which also checks the call
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like) if state is None else state
    segment = start.segment
    if segment_ids is not None:
        ids = jnp.broadcast_to(segment_ids, key.shape[:-2]).astype(jnp.int32)
        first = ids[..., 0] if state is None else segment
        segment = jnp.where(jax.lax.axis_index(axis_name) == 0, first, passed_on(ids[..., -1], axis_name))
    own = state_map(key, value, **by_token, before=None if segment_ids is None else segment, chunk=chunk)
    entering = _before(own, start.memory, axis_name)
    if read == "all":
        last = LinearState(from_last(own(entering), axis_name), start.segment)
        nothing = jnp.zeros_like(key), jnp.zeros_like(value)
        out, _ = linear_attention(query, *nothing, state=last, read="pre", form=form, chunk=chunk)
        return out, last
    out, last = from_state(LinearState(entering.astype(start.memory.dtype), segment))
    return out, from_last(last, axis_name)


def _before(own: StateMap, start: Float[Array, "*b m k v"], axis_name: Axis) -> Float[Array, "*b m k v"]:
    """Returns the state before this shard, from the maps of all shards and the state before the first."""
    device, size = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    one = 1 if own.is_diagonal else jnp.eye(own.through.shape[-1])
    nothing = StateMap(jnp.broadcast_to(one, own.through.shape).astype(own.through.dtype), jnp.zeros_like(own.add))

    def chosen(condition: Array, a: StateMap, b: StateMap) -> StateMap:
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)

    # The first device has the map of what comes before the sequence: whatever there was, it leaves `start`.
    constant = StateMap(jnp.zeros_like(own.through), start.astype(own.add.dtype))
    found = chosen(device == 0, constant, passed_on(own, axis_name))
    for digit in range((size - 1).bit_length()):
        earlier = chosen(device >= 2**digit, passed_on(found, axis_name, 2**digit), nothing)
        if not own.is_diagonal:  # a state that is forgotten altogether may be anything
            forgets = (found.through == 0).all((-1, -2), keepdims=True)
            earlier = earlier._replace(add=jnp.where(forgets, 0, earlier.add))
        found = combine(earlier, found)
    return found.add
