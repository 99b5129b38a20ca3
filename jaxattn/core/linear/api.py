"""Linear attention: one decayed associative memory of fixed size, read by every token.

A mechanism is a choice of queries, keys, values, decays and erasures (`feature.py`, `gate.py`). A normaliser is one
more column of ones in the values. The forms in which the memory is computed are in `recurrence.py`.
"""

import functools
import math
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.checks import check_floating, check_range, check_segments, check_tokens
from jaxattn.core.linear.decay import CLOSED
from jaxattn.core.linear.recurrence import CHUNK, Delta, Erase, Read, StateMap, Tokens, chunks, steps, tree, whole_map
from jaxattn.core.matmul import accumulator, not_finite, product
from jaxattn.core.mesh import Axes, spread, under_auto_axes, vary_like
from jaxattn.core.numeric import ratio

Form = Literal["auto", "parallel", "chunk", "step", "associative"]


class LinearState(NamedTuple):
    """The content of a memory after some tokens.

    Attributes:
        memory: S [..., M, K, V] for M state heads, in float32 or better.
        segment: [...], the segment of the last token (0 where segments were not given).
    """

    memory: Float[Array, "... m k v"]
    segment: Int[Array, "..."]


def linear_attention(
    query: Float[Array, "*b t n k"],
    key: Float[Array, "*b t m k"],
    value: Float[Array, "*b t m v"],
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
    """Reads one associative memory per head that decays, is corrected, written and read at every token:

        S_t = diag(e^{g_t}) S_{t−1} + erase_t(S_{t−1}) + k_t v_tᵀ
        out_t = S_tᵀ q_t + ((bonus ⊙ k_t) · q_t) v_t

    Key, value, log_decay and erase each have M state heads or a divisor of M. The query has N heads, a multiple or a
    divisor of M, and head n reads memory n // (N / M).

    With `segment_ids` a token that holds an infinite or undefined number makes the outputs NaN that read it: its own,
    those of later tokens of its segment, and the last state if that has read it. No other output changes, neither
    forward nor in a gradient. Without segments the same holds for queries only. Keys, values and gates are not checked
    then, since a check would cost a tenth of the time. One that is not finite may reach earlier tokens of its chunk
    (not in "step"), and in gradients any token. `segment_ids` of zeros keep it apart then, too.

    Args:
        query: [..., T, N, K]. No scale is applied.
        key: [..., T, M, K].
        value: [..., T, M, V]. For attention normalised by Σ_j φ(q)·ψ(k_j), append a last column of ones (`append_one`)
            and divide by it at the end (`divide`).
        log_decay: g ≤ 0, −inf to forget everything: [M] (per head), [..., T, M] (and token), or [..., T, M, K] (and
            channel). None does not forget.
        erase: `Delta(beta)` or `Erase(read, write)`. None only adds.
        bonus: [N, K], or anything that broadcasts against the queries.
        read: "post" reads the state after the token's write. "pre" reads it before the token's decay and write
            (out_t = S_{t−1}ᵀ q_t, the RWKV-6 order, with `bonus` for the token itself). "all" reads the state after the
            last token, so every token sees all tokens.
        state: The state after earlier tokens. None is empty.
        segment_ids: Integers [..., T], not decreasing. A token that starts a new segment finds the memory empty.
        form: "parallel" (one chunk: quadratic in T), "chunk" (a scan over chunks; linear), "associative" (a parallel
            tree over chunks; holds all their states) or "step" (a scan over tokens). All are equal but for rounding.
            "auto" takes "step" for one token and "chunk" otherwise.
        chunk: The number of tokens per chunk, a power of two, by default `CHUNK`. It changes speed, never results.

    Returns:
        A pair (out, last state). `out` [..., T, N, V] is computed in float32, or float64 if any argument is, and has
            value's dtype.

    Raises:
        TypeError: An argument has another type.
        ValueError: Shapes do not fit, gates are out of range (where they are known: not under `jit`), segments
            decrease, the state has another shape or dtype, or the chunk is not a power of two.
    """
    given = _Given(query, key, value, log_decay, erase, bonus, state, segment_ids)
    _check(given, read, form, chunk)
    length = query.shape[-3]
    if form == "auto":
        form = "step" if length == 1 else "chunk"
    if form == "parallel":
        chunk = 1 << (length - 1).bit_length()

    def axes() -> Any:
        *batch, length, heads, _ = spread(query)
        memory: Any = Axes((*batch, spread(key)[-2]))
        rows: Any = Axes(batch)
        return Axes((*batch, length, heads, None)), LinearState(memory, rows)

    return under_auto_axes(lambda given: _attention(given, read, form, int(chunk or CHUNK)), given, axes)


def linear_step(
    query: Float[Array, "*b n k"],
    key: Float[Array, "*b m k"],
    value: Float[Array, "*b m v"],
    *,
    state: LinearState | None = None,
    log_decay: Float[Array, "..."] | None = None,
    erase: Delta | Erase | None = None,
    bonus: Float[Array, "n k"] | None = None,
    read: Literal["post", "pre"] = "post",
) -> tuple[Float[Array, "*b n v"], LinearState]:
    """Computes one token of `linear_attention`, without the time axis: the cost of decoding, whatever came before.

    Arguments and errors are those of `linear_attention`.

    Returns:
        A pair (out, state), `out` [..., N, V].

    Raises:
        ValueError: `read` is "all", which one token does not have.
    """
    if read not in ("post", "pre"):
        raise ValueError(f"read is {read!r}: need one of post, pre")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not hasattr(x, "shape") or len(x.shape) < 2:
            raise ValueError(f"{name} has shape {np.shape(x)}: need [..., heads, channels]")

    def timed(x: Any, axis: int) -> Any:
        """With a time axis; what has no place for one is left for the checks to name."""
        return jnp.expand_dims(x, axis) if hasattr(x, "shape") and len(x.shape) >= -1 - axis else x

    if isinstance(erase, Delta):
        erase = Delta(timed(erase.beta, -2))
    elif isinstance(erase, Erase):
        erase = Erase(timed(erase.read, -3), timed(erase.write, -3))
    if log_decay is not None and jnp.ndim(log_decay) > 1:
        log_decay = timed(log_decay, -2 if jnp.ndim(log_decay) < key.ndim else -3)
    out, state = linear_attention(
        *(jnp.expand_dims(x, -3) for x in (query, key, value)),
        log_decay=log_decay,
        erase=erase,
        bonus=bonus,
        read=read,
        state=state,
        form="step",
    )
    return out[..., 0, :, :], state


def mixing_matrix(
    query: Float[Array, "*b t n k"],
    key: Float[Array, "*b t m k"],
    *,
    log_decay: Float[Array, "..."] | None = None,
    erase: Delta | Erase | None = None,
    bonus: Float[Array, "n k"] | None = None,
    read: Read = "post",
    segment_ids: Int[Array, "*b t"] | None = None,
) -> Float[Array, "*b n t t"]:
    """Returns A [..., N, T, T] with out_i = Σ_j A_ij v_j: `linear_attention` of any values, as a dense matrix.

    The matrix is for looking, for distillation and for tests; its memory is T². A row over its sum is the weights of a
    normalised read. Arguments are those of `linear_attention`.
    """
    length = key.shape[-3]
    eye = jnp.broadcast_to(jnp.eye(length, dtype=accumulator(query, key))[:, None], (*key.shape[:-2], 1, length))
    options: dict[str, Any] = {"log_decay": log_decay, "erase": erase, "bonus": bonus}
    options |= {"read": read, "segment_ids": segment_ids}
    out, _ = linear_attention(query, key, eye, **options, form="parallel")
    return jnp.moveaxis(out, -2, -3)


def state_map(
    key: Float[Array, "*b t m k"],
    value: Float[Array, "*b t m v"],
    *,
    log_decay: Float[Array, "..."] | None = None,
    erase: Delta | Erase | None = None,
    segment_ids: Int[Array, "*b t"] | None = None,
    before: Int[Array, "*b"] | None = None,
    chunk: int | None = None,
) -> StateMap:
    """Returns the effect of these tokens on any state, S ↦ through S + add.

    `through` is [..., M, K], and [..., M, K, K] with erasures. It is 0 where a segment starts.

    Args:
        key: [..., T, M, K].
        value: [..., T, M, V].
        log_decay: As in `linear_attention`.
        erase: As in `linear_attention`.
        segment_ids: As in `linear_attention`.
        before: [...], the segment of the token before these. By default it is that of the first.
        chunk: As in `linear_attention`.
    """
    given = _Given(key, key, value, log_decay, erase, segment_ids=segment_ids)
    if before is not None:
        dtype = accumulator(*(x for x in jax.tree.leaves((key, value, log_decay, erase)) if hasattr(x, "dtype")))
        nothing = jnp.zeros((*key.shape[:-3], _states(given), key.shape[-1], value.shape[-1]), dtype)
        given = given._replace(state=LinearState(nothing, jnp.asarray(before)))
    _check(given, "post", "chunk", chunk)

    def axes() -> Any:
        *batch, _, heads, _ = spread(key)
        return Axes((*batch, heads))

    return under_auto_axes(lambda given: _state_map(given, int(chunk or CHUNK)), given, axes)


def append_one(value: Float[Array, "*b v"]) -> Float[Array, "*b v+1"]:
    """Appends a last column of ones to value. Its read is the sum of the weights, by which `divide` divides."""
    return jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)


def divide(read: Float[Array, "*b v+1"]) -> Float[Array, "*b v"]:
    """Divides a read by its last column: Σ_j w_j v_j / Σ_j w_j of values with `append_one`; zeros where it is zero."""
    return ratio(read[..., :-1], read[..., -1:])


class _Given(NamedTuple):
    """The arrays of a call, as the caller gave them."""

    query: Array
    key: Array
    value: Array
    log_decay: Array | None = None
    erase: Delta | Erase | None = None
    bonus: Array | None = None
    state: LinearState | None = None
    segment_ids: Array | None = None


# Compiled as one program each, also for callers that do not: op by op, a call is some hundred small programs.


@partial(jax.jit, static_argnums=(1, 2, 3))
def _attention(given: _Given, read: Read, form: Form, chunk: int) -> tuple[Array, LinearState]:
    given, wrong = _hide(given, read)
    tokens, memory, segment, heads = _prepare(given, read)
    if form == "step":
        memory, out = steps(tokens, memory, read)
    else:
        memory, out = (tree if form == "associative" else chunks)(tokens, memory, read, chunk)
    if read == "all":
        out = product(tokens.query.astype(memory.dtype)[..., None, :], memory[..., None, :, :, :])[..., 0, :]
    if heads > memory.shape[-3]:
        out = jnp.moveaxis(out, 0, -2)
    out = out.reshape(*given.query.shape[:-2], heads, given.value.shape[-1])
    memory = memory.reshape(*segment.shape, *memory.shape[-3:])
    if wrong is not None:
        out = jnp.where(wrong.out[..., None], jnp.nan, out)
    if wrong is not None and wrong.memory is not None:
        memory = jnp.where(wrong.memory[..., None, None], jnp.nan, memory)
    return out.astype(given.value.dtype), LinearState(memory, segment)


class _Wrong(NamedTuple):
    """The outputs [..., T, N] and the last memory [..., M] that a number has reached which is not finite."""

    out: Array
    memory: Array | None


def _hide(given: _Given, read: Read) -> tuple[_Given, _Wrong | None]:
    """Puts zeros in place of numbers that are not finite; returns the call and which outputs and memories they reach.

    A number reaches its own segment, from its token on.

    Of a call without segments only the queries are checked: to check all takes a tenth of the time of all else.
    """
    query, key, value, log_decay, erase, bonus, state, _ = given
    if (starts := _starts(given)) is None:
        wrong_query = not_finite(query)
        heads = max(_states(given), query.shape[-2])
        given = given._replace(query=jnp.where(wrong_query[..., None], 0, query))
        return given, _Wrong(_repeat(wrong_query[..., None], heads)[..., 0], None)
    open_gates = None if log_decay is None else jnp.maximum(log_decay, CLOSED)  # a gate that is closed is finite
    vectors = {"key": key, "value": value}
    if isinstance(erase, Delta):
        vectors["beta"] = erase.beta[..., None]
    elif isinstance(erase, Erase):
        vectors |= {"read": erase.read, "write": erase.write}
    if open_gates is not None and open_gates.ndim > 1:
        vectors["log_decay"] = open_gates if open_gates.ndim == key.ndim else open_gates[..., None]
    wrong = {name: not_finite(x) for name, x in vectors.items()}

    def clean(name: str, x: Array) -> Array:
        return jnp.where(wrong[name].reshape(wrong[name].shape + (1,) * (x.ndim - wrong[name].ndim)), 0, x)

    wrong_query = not_finite(query)
    given = given._replace(query=jnp.where(wrong_query[..., None], 0, query), key=clean("key", key))
    given = given._replace(value=clean("value", value))
    if log_decay is not None and "log_decay" in wrong:
        given = given._replace(log_decay=clean("log_decay", log_decay))
    if isinstance(erase, Delta):
        given = given._replace(erase=Delta(clean("beta", erase.beta)))
    elif isinstance(erase, Erase):
        given = given._replace(erase=Erase(clean("read", erase.read), clean("write", erase.write)))

    states = math.lcm(*(x.shape[-1] for x in wrong.values()), 1 if log_decay is None else _heads(log_decay, key))
    heads = max(states, query.shape[-2])
    by_state = {name: _repeat(x[..., None], states)[..., 0] for name, x in wrong.items()}
    of_token = functools.reduce(jnp.logical_or, by_state.values())
    place = jnp.arange(key.shape[-3])[:, None]
    last = jax.lax.cummax(jnp.where(of_token, place, -2), axis=of_token.ndim - 2)
    start = jax.lax.cummax(jnp.where(starts[..., None], place, -1), axis=starts.ndim - 1)
    earlier = jnp.full_like(last[..., :1, :], -2)
    if state is not None:
        lost = ~jnp.isfinite(state.memory).all((-1, -2))
        given = given._replace(state=state._replace(memory=jnp.where(lost[..., None, None], 0, state.memory)))
        earlier = jnp.where(lost[..., None, :], -1, earlier)
        last = jnp.maximum(last, earlier)
    after, before = last >= start, jnp.concatenate([earlier, last[..., :-1, :]], -2) >= start
    reached = after if read == "post" else before
    if bonus is not None:  # which is of the token's own key and value
        reached = reached | by_state["key"] | by_state["value"]
    reached, wrong_query = (_repeat(x[..., None], heads)[..., 0] for x in (reached, wrong_query))
    return given, _Wrong(reached | wrong_query, after[..., -1, :])


def _states(given: _Given) -> int:
    """Returns the number of memories M."""
    sizes = [x.shape[-2] for x in jax.tree.leaves((given.key, given.value))]
    if isinstance(given.erase, Delta):
        sizes.append(given.erase.beta.shape[-1])
    elif isinstance(given.erase, Erase):
        sizes.append(given.erase.read.shape[-2])
    return math.lcm(*sizes, 1 if given.log_decay is None else _heads(given.log_decay, given.key))


def _heads(log_decay: Array, key: Array) -> int:
    return log_decay.shape[-2] if log_decay.ndim == key.ndim else log_decay.shape[-1]


def _starts(given: _Given) -> Array | None:
    """Returns which tokens start a segment, [..., T]; None without segments."""
    if given.segment_ids is None:
        return None
    ids = jnp.broadcast_to(given.segment_ids, given.key.shape[:-2])
    before = ids[..., :1] if given.state is None else given.state.segment[..., None]
    return ids != jnp.concatenate([before, ids[..., :-1]], -1).astype(ids.dtype)


@partial(jax.jit, static_argnums=1)
def _state_map(given: _Given, chunk: int) -> StateMap:
    wrong = None
    if given.segment_ids is not None:  # others are not checked, see `_hide`
        given, wrong = _hide(given, "post")
    tokens, *_ = _prepare(given, "post")
    whole = whole_map(tokens, chunk)
    batch, states = given.key.shape[:-3], whole.add.shape[-3:]
    through = states[:-1] if whole.is_diagonal else (*states[:-1], states[-2])
    add = whole.add.reshape(*batch, *states)
    if wrong is not None and wrong.memory is not None:
        add = jnp.where(wrong.memory[..., None, None], jnp.nan, add)
    return StateMap(whole.through.reshape(*batch, *through), add)


def _prepare(given: _Given, read: Read) -> tuple[Tokens, Array, Array, int]:
    """Returns (tokens, memory, last segment, heads of the output), heads sorted into states and the queries of each."""
    query, key, value, log_decay, erase, bonus, state, segment_ids = given
    batch, length, channels = key.shape[:-3], key.shape[-3], key.shape[-1]
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (*batch, length, *log_decay.shape))
    if log_decay is not None and log_decay.ndim < key.ndim:
        log_decay = log_decay[..., None]
    if isinstance(erase, Delta):
        erase = Delta(erase.beta[..., None])
    dtype = accumulator(*jax.tree.leaves((query, key, value, log_decay, erase, bonus, state and state.memory)))
    states = math.lcm(*(x.shape[-2] for x in jax.tree.leaves((key, value, log_decay, erase))))
    heads = max(states, query.shape[-2])
    if bonus is not None:
        bonus = (_repeat(query, heads).astype(dtype) * bonus * _repeat(key, heads)).sum(-1, keepdims=True)

    segment = jnp.zeros(batch, jnp.int32) if state is None else state.segment
    if segment_ids is not None and (starts := _starts(given)) is not None:
        starts = starts[..., None, None]
        segment = jnp.broadcast_to(segment_ids, (*batch, length))[..., -1].astype(jnp.int32)
        log_decay = jnp.where(starts, -jnp.inf, 0.0 if log_decay is None else log_decay).astype(dtype)
        if read == "pre":
            query = jnp.where(starts, 0, query)
        if isinstance(erase, Erase):
            erase = Erase(jnp.where(starts, 0, erase.read), erase.write)

    # A batch of one is none: axes of size 1 have XLA copy what only changes places with them.
    batch = () if math.prod(batch) == 1 else batch

    def per_state(x: Array) -> Array:
        x = x.reshape(*batch, *x.shape[-3:])
        return x if x.shape[-2] == 1 else _repeat(x, states)

    def per_query(x: Array) -> Array:
        if x.shape[-2] < heads or heads == states:
            return per_state(x)
        return jnp.moveaxis(x.reshape(*batch, length, states, heads // states, x.shape[-1]), -2, 0)

    key, value, log_decay, erase = jax.tree.map(per_state, (key, value, log_decay, erase))
    query, bonus = jax.tree.map(per_query, (query, bonus))
    shape = (*batch, states, channels, value.shape[-1])
    memory = jnp.zeros(shape, dtype) if state is None else state.memory.reshape(shape).astype(dtype)
    tokens = Tokens(query, key, value, log_decay, erase, bonus)
    return tokens, vary_like(memory, tokens), segment, heads


def _check(given: _Given, read: Read, form: Form, chunk: int | None) -> None:
    """Raises for every call that could not mean anything, before any of it is traced."""
    query, key, value, log_decay, erase, bonus, state, segment_ids = given
    arrays = {"query": query, "key": key, "value": value}
    if isinstance(erase, Delta):
        gates = {"log_decay": log_decay, "erase: Delta.beta": erase.beta}
    elif isinstance(erase, Erase):
        gates = {"log_decay": log_decay, "erase: Erase.read": erase.read, "erase: Erase.write": erase.write}
    elif erase is None:
        gates = {"log_decay": log_decay}
    else:
        raise TypeError(f"erase must be Delta(beta), Erase(read, write) or None, got {type(erase).__name__}")
    for name, x in (gates | {"bonus": bonus}).items():
        if x is not None or name not in ("log_decay", "bonus"):
            check_floating(name, x)
    for name, x in arrays.items():
        check_tokens(name, x)
        if x.shape[:-2] != query.shape[:-2]:
            raise ValueError(f"{name} has batch and length {x.shape[:-2]} but query has {query.shape[:-2]}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query has {query.shape[-1]} channels but key has {key.shape[-1]}: need the same")
    lead, channels = key.shape[:-2], key.shape[-1]
    heads = {"key": key.shape[-2], "value": value.shape[-2]}
    for name, x in gates.items():
        if x is None:
            continue
        per_head, per_channel = len(x.shape) == len(lead) + 1, len(x.shape) == len(lead) + 2
        if name == "log_decay" and len(x.shape) == 1:
            heads[name] = x.shape[0]
        elif per_head and x.shape[:-1] == lead and not name.startswith("erase: Erase"):
            heads[name] = x.shape[-1]
        elif per_channel and (*x.shape[:-2], x.shape[-1]) == (*lead, channels) and name != "erase: Delta.beta":
            heads[name] = x.shape[-2]
        else:
            by_head, by_channel = ", ".join(map(str, (*lead, "M"))), ", ".join(map(str, (*lead, "M", channels)))
            wanted = f"[M], [{by_head}] or [{by_channel}]" if name == "log_decay" else f"[{by_channel}]"
            wanted = f"[{by_head}]" if name == "erase: Delta.beta" else wanted
            raise ValueError(f"{name} has shape {x.shape}: need {wanted} for M state heads")
    states = math.lcm(*heads.values())
    if max(heads.values()) != states or (query.shape[-2] % states and states % query.shape[-2]):
        raise ValueError(f"heads do not divide: query has {query.shape[-2]}, and {heads}")
    if bonus is not None:
        shape = (*lead, max(query.shape[-2], states), channels)
        if len(bonus.shape) > len(shape) or any(
            a not in (1, b) for a, b in zip(bonus.shape[::-1], shape[::-1], strict=False)
        ):
            raise ValueError(f"bonus has shape {bonus.shape}: need one that broadcasts to {shape}")
    check_range("log_decay", log_decay, lambda x: x <= 0, "at most 0: the log of a decay factor")
    if isinstance(erase, Delta):
        check_range("erase: Delta.beta", erase.beta, lambda x: x >= 0, "at least 0")
    for name, choice, choices in (("read", read, get_args(Read)), ("form", form, get_args(Form))):
        if choice not in choices:
            raise ValueError(f"{name} is {choice!r}: need one of {', '.join(choices)}")
    if read == "all" and (segment_ids is not None or bonus is not None):
        raise ValueError("read='all' is the state after the last token: it takes no segment_ids and no bonus")
    if chunk is not None and (
        not isinstance(chunk, int | np.integer) or isinstance(chunk, bool) or chunk < 1 or chunk & (chunk - 1)
    ):
        raise ValueError(f"chunk is {chunk!r}: need a power of two, such as {CHUNK}")
    if segment_ids is not None:
        check_segments(segment_ids, lead)
    if state is not None:
        shape = (*lead[:-1], states, channels, value.shape[-1])
        if not isinstance(state, LinearState):
            raise TypeError(f"state must be a LinearState, got {type(state).__name__}")
        for name, x in zip(state._fields, state, strict=True):
            if not hasattr(x, "shape") or not hasattr(x, "dtype"):
                raise TypeError(f"state has {name} of type {type(x).__name__}: need an array")
        if state.memory.shape != shape or state.segment.shape != lead[:-1]:
            came = f"memory {state.memory.shape} and segment {state.segment.shape}"
            raise ValueError(f"state has {came}: need {shape} and {lead[:-1]}")
        if state.memory.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(f"state has dtype {state.memory.dtype}: a memory is kept in float32 or float64")
        if not jnp.issubdtype(state.segment.dtype, jnp.integer):
            raise TypeError(f"state has a segment of dtype {state.segment.dtype}: need integers")


def _repeat(x: Array, heads: int) -> Array:
    return x if x.shape[-2] == heads else jnp.repeat(x, heads // x.shape[-2], axis=-2)
