"""Memories that are trained while they read: every token is a step of gradient descent on a small network.

The network, the loss of a token and the link from accumulated gradients to weights are parts (`inner.py`). A sequence
is a scan over inner batches (`inner_batch.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.checks import check_range, check_segments, check_static_int, check_tokens
from jaxattn.core.matmul import accumulator, product
from jaxattn.core.memory.inner import Identity, InnerLoss, Link, Memory, SquaredError
from jaxattn.core.memory.inner_batch import Batch, FastRead, Weights, learn
from jaxattn.core.mesh import Axes, spread, under_auto_axes, vary_like
from jaxattn.core.part import check_fields

PerToken = Float[Array, "..."] | float


class MemoryState(NamedTuple):
    """The state of a memory after some tokens, in float32 or better. It continues the sequence wherever it was cut.

    `start`, `dual` and `momentum` each have one array [..., N, in, out] per fast weight.

    Attributes:
        start: The weights (under a link, its argument) at which the gradients of the inner batch under way are taken.
        dual: The weights after the last token, `start` plus what this inner batch has learned so far.
        momentum: The momentum after the last token. None for a memory without.
        seen: [...], the number of tokens of the inner batch under way.
        segment: [...], the segment of the last token (0 where segments were not given).
    """

    start: Weights
    dual: Weights
    momentum: Weights | None
    seen: Int[Array, "..."]
    segment: Int[Array, "..."]


def memory_scan(
    memory: Memory,
    query: Float[Array, "*b t n k"],
    key: Float[Array, "*b t n k"],
    value: Float[Array, "*b t n v"],
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
    """Trains a network per head on k_t ↦ v_t at every token, and then asks it for q_t:

        u_t = ∂ℓ(M(k_t), v_t) / ∂W  at  W = link(A_c)          A_c: A before the first token of t's inner batch
        S_t = e^{log_momentum_t} S_{t−1} − rate_t u_t          without momentum S_t = −rate_t u_t
        A_t = e^{log_decay_t} A_{t−1} + S_t
        out_t = M(q_t)  at  W = link(A_t)

    Titans (Behrouz et al., 2025), Miras: Moneta, Yaad and Memora (2025), and TTT (Sun et al., 2024) are such memories.
    The memory of the backward pass is the inputs and one state per inner batch.

    Args:
        memory: The network M and its first A_0, which outer training learns: `MatrixMemory`, `MLPMemory`. S_0 = 0.
        query: [..., T, N, K], in general of norm 1. No scale is applied.
        key: [..., T, N, K], likewise.
        value: [..., T, N, V].
        rate: θ ≥ 0, the step size: a number, or an array that broadcasts to [..., T, N], like the next three. For a
            matrix and `SquaredError()` steps are stable whatever the tokens while θ ‖k‖² · inner_batch is at most 1,
            and with momentum on one key that repeats up to 1 − η. A network has no such bound: where steps are too long
            for it, it diverges until the output is not finite.
        log_decay: log(1 − α) ≤ 0, −inf to forget everything: the retention of Titans and Miras. None keeps all.
        log_momentum: log η ≤ 0, −inf for none at that token. None keeps no S.
        row_rate: r ≥ 0, another factor on the change of the inner batch so far when token t reads it: out_t is read at
            A_c + r_t (A_t − A_c). The weights that the last token of an inner batch leaves have the same factor. It is
            the factor by row of TTT's step sizes, η_ij = r_i θ_j.
        loss: `SquaredError` (‖e‖², without ½), `Huber`, `LpError` or `DotProduct`.
        link: `Identity`, `SoftmaxLink`, `LqMirror`, `LqScale`, `SoftThreshold` or `SigmoidLink`.
        inner_batch: The number of tokens whose gradients are taken at the same weights. **It is part of the model, not
            a setting for speed**: another number is another function, so train, evaluate and decode with the same one.
            1 is the sequential rule; 16 to 64 turn most of the work into matrix products.
        read: How out_t gets to M at A_t. "dual" makes no token's weights (`Identity` only). "materialize" makes the
            weights of every token, in inner_batch times the memory, for any link. The two are equal but for rounding;
            "auto" takes the first that can serve. "start" is another model: out_t reads A_c, so no token of its own
            inner batch.
        state: The state after earlier tokens. A sequence may be split anywhere, also inside an inner batch.
        segment_ids: Integers [..., T], not decreasing. A token that starts a new segment finds A_0. Segments must start
            where an inner batch does. A row (an entry of the batch axes) where one does not is NaN throughout, its
            state too.
        lengths: Integers [...], the number of tokens that each row has, from 0 to T. The memory sees no tokens after
            them and takes no place in an inner batch for them, and their outputs mean nothing. None: all. Not together
            with segment_ids.

    Returns:
        A pair (out, last state). `out` [..., T, N, V] is computed in float32, or float64 if any argument is, and has
            value's dtype.

    Raises:
        TypeError: An argument has another type.
        ValueError: Shapes do not fit, gates are out of range or segments out of place (where they are known: not under
            `jit`), the state has another shape, or read="dual" comes with a link.
    """
    given = _Given(
        memory, loss, link, query, key, value, rate, log_decay, log_momentum, row_rate, state, segment_ids, lengths
    )
    _check(given, inner_batch, read)
    if read == "auto":
        read = "dual" if link.is_identity else "materialize"

    def axes() -> Any:
        *batch, length, heads, _ = spread(query)
        each: Any = Axes((*batch, heads))
        rows: Any = Axes(batch)
        return Axes((*batch, length, heads, None)), MemoryState(each, each, each, rows, rows)

    return under_auto_axes(lambda given: _memory(given, int(inner_batch), read), given, axes)


def memory_read(
    memory: Memory,
    query: Float[Array, "*b t n k"],
    *,
    link: Link = Identity(),
    state: MemoryState | None = None,
) -> Float[Array, "*b t n v"]:
    """Returns M(q_t) at W = link(A) for the A that the last token left, and learns nothing: out [..., T, N, V].

    The errors are those of `memory_scan`.

    Args:
        memory: The network M and its first A_0.
        query: [..., T, N, K].
        link: The link.
        state: The state after the last token. None reads where the memory starts.
    """
    _check_kinds(("memory", memory, Memory), ("link", link, Link))
    check_tokens("query", query)
    _check_memory(memory, query, None)
    batch = query.shape[:-3]
    if state is not None:
        _check_state(state, memory, batch, None)
    dual = memory.fast_weights if state is None else state.dual
    dtype = accumulator(query, *dual)
    weights = [link(jnp.broadcast_to(w, (*batch, *w.shape[-3:])).astype(dtype)) for w in dual]
    out = memory(lambda i, x: product(x, weights[i]), query.astype(dtype).swapaxes(-2, -3))
    return out.swapaxes(-2, -3).astype(query.dtype)


class _Given(NamedTuple):
    """The parts and arrays of a call, as the caller gave them."""

    memory: Memory
    loss: InnerLoss
    link: Link
    query: Array
    key: Array
    value: Array
    rate: PerToken
    log_decay: PerToken | None
    log_momentum: PerToken | None
    row_rate: PerToken | None
    state: MemoryState | None
    segment_ids: Array | None
    lengths: Array | None


# Compiled as one program, also for callers that do not: op by op, a call is some hundred small programs.


@partial(jax.jit, static_argnums=(1, 2))
def _memory(given: _Given, inner_batch: int, read: FastRead) -> tuple[Array, MemoryState]:
    memory, loss, link, query, key, value = given[:6]
    batch, length, heads = query.shape[:-3], *query.shape[-3:-1]
    dtype = _dtype(given)
    initial = tuple(jnp.broadcast_to(w, (*batch, *w.shape)).astype(dtype) for w in memory.fast_weights)
    state = given.state or MemoryState(
        initial,
        initial,
        None if given.log_momentum is None else jax.tree.map(jnp.zeros_like, initial),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, jnp.int32),
    )
    seen, segment, starts, misplaced = state.seen, state.segment, None, None
    there = length if given.lengths is None else jnp.broadcast_to(given.lengths, batch)
    present = jnp.arange(length) < jnp.asarray(there)[..., None]
    if given.segment_ids is not None:
        starts, seen, misplaced = _starts(given, batch, length, inner_batch)
        segment = jnp.broadcast_to(given.segment_ids, (*batch, length))[..., -1].astype(jnp.int32)

    # A single token is an inner batch of one slot wherever in its batch it stands.
    size = 1 if length == 1 else inner_batch
    place = _Places(None if given.state is None else seen, length, size)
    slots = 1 << (size - 1).bit_length()

    def cut(x: Array) -> Array:
        x = place.into(x)
        x = x.reshape(*x.shape[:-3], -1, size, *x.shape[-2:])
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, slots - size), (0, 0), (0, 0)])
        return jnp.moveaxis(x.swapaxes(-3, -2), -4, 0)

    def per_token(x: PerToken) -> Array:
        of_all = jnp.broadcast_to(x, (*batch, length, heads)).astype(dtype)
        return cut(jnp.where(present[..., None], of_all, 0)[..., None])

    # Selected, since a rate of 0 would not keep what is not a number out.
    query, key, value = (jnp.where(present[..., None, None], x, 0) for x in (query, key, value))
    tokens = cut(query), cut(key), cut(value)
    rate, log_decay = per_token(given.rate), per_token(0.0 if given.log_decay is None else given.log_decay)
    token = cut(jnp.broadcast_to(present, (*batch, length)).astype(dtype)[..., None, None])
    resets = None if starts is None else cut(starts[..., None, None].astype(dtype))[..., :1, :] > 0
    ends_at = (jnp.arange(token.shape[0]) + 1).reshape(-1, *(1,) * len(batch)) * inner_batch
    completes = (ends_at <= seen + there)[..., None, None, None]
    log_momentum, row_rate = (None if x is None else per_token(x) for x in (given.log_momentum, given.row_rate))
    batches = Batch(*tokens, rate, log_decay, log_momentum, row_rate, token, resets, completes)

    body = partial(learn, memory, loss, link, initial, read, dtype, size)
    carry = jax.tree.map(lambda x: x.astype(dtype), (state.start, state.dual, state.momentum))
    carry = vary_like(carry, batches)
    carry, out = jax.lax.scan(jax.checkpoint(body), carry, batches)
    out = jnp.moveaxis(out, 0, -4)[..., :size, :].swapaxes(-3, -2)
    out = place.out_of(out.reshape(*out.shape[:-4], -1, *out.shape[-2:]))
    if misplaced is not None:
        wrong = misplaced[..., None, None, None]
        out, carry = jax.tree.map(lambda x: jnp.where(wrong, jnp.nan, x), (out, carry))
    seen = ((seen + there) % inner_batch).astype(jnp.int32)
    return out.astype(value.dtype), MemoryState(carry[0], carry[1], carry[2], seen, segment)


def _dtype(given: _Given) -> jnp.dtype:
    arrays = (given[3:10], given.memory.fast_weights, given.state and given.state[:3])
    return accumulator(*(x for x in jax.tree.leaves(arrays) if hasattr(x, "dtype")))


def _starts(given: _Given, batch: tuple, length: int, inner_batch: int) -> tuple[Any, Any, Any]:
    """Returns where segments start and how many tokens the inner batch under way has.

    The triple holds where a segment starts [..., T], the tokens of the inner batch under way [...], and whether a
    segment starts within one [...]. A segment that starts with the first token ends the batch under way. The arrays are
    NumPy arrays if all is known.
    """
    state, ids = given.state, given.segment_ids
    known = not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((ids, state and state[3:])))
    xp: Any = np if known else jnp
    ids = xp.broadcast_to(xp.asarray(ids), (*batch, length))
    before = ids[..., :1] if state is None else xp.asarray(state.segment)[..., None]
    starts = ids != xp.concatenate([before, ids[..., :-1]], -1).astype(ids.dtype)
    seen = xp.zeros(batch, np.int32) if state is None else xp.asarray(state.seen)
    seen = xp.where(starts[..., 0], 0, seen)
    slot = (seen[..., None] + np.arange(length)) % inner_batch
    return starts, seen, (starts & (slot != 0)).any(-1)


class _Places(NamedTuple):
    """Where tokens stand in the whole inner batches of `size` that hold them.

    `offset` [...] counts the slots before the first token; None stands for 0.
    """

    offset: Array | None
    length: int
    size: int

    def into(self, x: Float[Array, "*b t n x"]) -> Float[Array, "*b slots n x"]:
        if self.offset is None or self.size == 1:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, -self.length % self.size), (0, 0), (0, 0)])
        slots = -(-(self.length + self.size - 1) // self.size) * self.size
        index = jnp.arange(slots) - self.offset[..., None]
        there = ((index >= 0) & (index < self.length))[..., None, None]
        moved = jnp.take_along_axis(x, jnp.clip(index, 0, self.length - 1)[..., None, None], -3)
        return jnp.where(there, moved, 0)

    def out_of(self, x: Float[Array, "*b slots n x"]) -> Float[Array, "*b t n x"]:
        if self.offset is None or self.size == 1:
            return x[..., : self.length, :, :]
        index = self.offset[..., None] + jnp.arange(self.length)
        return jnp.take_along_axis(x, index[..., None, None], -3)


def _check(given: _Given, inner_batch: int, read: FastRead) -> None:
    """Raises for every call that could not mean anything, before any of it is traced."""
    memory, loss, link, query, key, value, *_, state, segment_ids, lengths = given
    _check_kinds(("memory", memory, Memory), ("loss", loss, InnerLoss), ("link", link, Link))
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tokens(name, x)
        if x.shape[:-1] != query.shape[:-1]:
            raise ValueError(f"{name} has batch, length and heads {x.shape[:-1]} but query has {query.shape[:-1]}")
    *batch, length, _, _ = query.shape
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query has {query.shape[-1]} channels but key has {key.shape[-1]}: need the same")
    check_static_int("memory_scan", "inner_batch", inner_batch, 1)
    if read not in get_args(FastRead):
        raise ValueError(f"read is {read!r}: need one of {', '.join(get_args(FastRead))}")
    if read == "dual" and not link.is_identity:
        raise ValueError(
            f"read='dual' needs the link Identity, got {type(link).__name__}: read='materialize' serves it"
        )
    _check_memory(memory, key, value)
    _check_gate("rate", given.rate, query.shape[:-1], lambda x: x >= 0, "at least 0")
    _check_gate("row_rate", given.row_rate, query.shape[:-1], lambda x: x >= 0, "at least 0")
    for name, gate in (("log_decay", given.log_decay), ("log_momentum", given.log_momentum)):
        _check_gate(name, gate, query.shape[:-1], lambda x: x <= 0, "at most 0: the log of a factor")
    if state is not None:
        _check_state(state, memory, tuple(batch), given.log_momentum is not None)
        wanted = f"below {inner_batch}: it comes from another inner_batch"
        check_range("state: seen", state.seen, lambda x: (x >= 0) & (x < inner_batch), wanted)
    if segment_ids is not None:
        check_segments(segment_ids, (*batch, length))
        _, _, misplaced = _starts(given, tuple(batch), length, inner_batch)
        if not isinstance(misplaced, jax.core.Tracer) and misplaced.any():
            raise ValueError(
                f"segment_ids has a segment that starts inside an inner batch of {inner_batch} tokens: need starts at "
                f"multiples of {inner_batch}, so pad what is shorter"
            )

    if lengths is not None:
        if segment_ids is not None:
            raise ValueError("lengths and segment_ids are both given: need one or the other")
        if not jnp.issubdtype(jnp.result_type(lengths), jnp.integer) or tuple(np.shape(lengths)) != tuple(batch):
            came = f"{jnp.result_type(lengths)}{np.shape(lengths)}"
            raise ValueError(f"lengths must be integers of shape {tuple(batch)}, got {came}")
        if not isinstance(lengths, jax.core.Tracer) and not all(0 <= x <= length for x in np.ravel(lengths)):
            raise ValueError(f"lengths must be from 0 to {length}, got {np.asarray(lengths).tolist()}")


def _check_kinds(*given: tuple[str, Any, type]) -> None:
    for name, of, kind in given:
        if not isinstance(of, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {of!r}")
        check_fields(name, of)


def _check_memory(memory: Memory, key: Array, value: Array | None) -> None:
    """Runs the network on shapes alone; without a value any width of its output is right."""
    heads, name = key.shape[-2], type(memory).__name__
    used: list[int] = []

    def linear(i: int, x: Array) -> Array:
        weight = memory.fast_weights[i]
        used.append(i)
        if len(weight.shape) != 3 or weight.shape[0] != heads or weight.shape[1] != x.shape[-1]:
            wanted = f"need [{heads}, {x.shape[-1]}, out]"
            raise ValueError(f"{name}: fast weight {i} has shape {weight.shape}: {wanted} for what comes to it")
        return jnp.zeros((*x.shape[:-1], weight.shape[-1]), x.dtype)

    given = jax.ShapeDtypeStruct((heads, 1, key.shape[-1]), accumulator(key))
    found = jax.eval_shape(lambda x: memory(linear, x), given).shape
    if sorted(used) != list(range(len(memory.fast_weights))):
        raise ValueError(f"{name} uses fast weights {used}: need each of {len(memory.fast_weights)} exactly once")
    if value is not None and found[-1] != value.shape[-1]:
        raise ValueError(f"{name} returns {found[-1]} channels but value has {value.shape[-1]}: need the same")


def _check_gate(name: str, x: Any, shape: tuple, allowed: Callable[[Any], Any], wanted: str) -> None:
    if x is None and name != "rate":
        return
    if not isinstance(x, int | float | np.number) and not (
        hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating)
    ):
        raise TypeError(f"{name} must be a number or a floating-point array, got {x!r}")
    given = np.shape(x)
    if len(given) > len(shape) or any(a not in (1, b) for a, b in zip(given[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} has shape {given}: need one that broadcasts to {shape}")
    check_range(name, x, allowed, wanted)


def _check_state(state: Any, memory: Memory, batch: tuple, has_momentum: bool | None) -> None:
    """Raises for a state that does not fit. has_momentum: whether it must hold momentum; None if it may."""
    if not isinstance(state, MemoryState):
        raise TypeError(f"state must be a MemoryState, got {type(state).__name__}")
    if has_momentum is not None and (state.momentum is not None) != has_momentum:
        holds = "a" if state.momentum is not None else "no"
        raise ValueError(f"state holds {holds} momentum: need log_momentum if and only if it does")
    shapes = [(*batch, *w.shape) for w in memory.fast_weights]
    for name, weights in zip(state._fields[:3], state[:3], strict=True):
        if weights is None:
            continue
        found = [tuple(x.shape) for x in weights]
        if found != shapes:
            raise ValueError(f"state has {name} of shapes {found}: need {shapes}")
        for x in weights:
            if x.dtype not in (jnp.float32, jnp.float64):
                raise TypeError(f"state has dtype {x.dtype}: a memory is kept in float32 or float64")
    for name, x in (("seen", state.seen), ("segment", state.segment)):
        if not hasattr(x, "shape") or not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"state has {name} {x!r}: need an array of integers")
        if tuple(x.shape) != batch:
            raise ValueError(f"state has {name} of shape {x.shape}: need {batch}")
