"""attend: the one call for everything that weighs keys. Checks it, picks an implementation, explains the choice."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.call import Call
from jaxattn.core.dense import dense, scores
from jaxattn.core.maps import Dropout
from jaxattn.core.mask import Mask
from jaxattn.core.normalize import Normalize, Softmax, Streaming
from jaxattn.core.parts import check_fields, positions_fit
from jaxattn.core.score import Dot, accumulator
from jaxattn.core.tiled import tiled

Implementation = Literal["auto", "dense", "tiled"]

# Up to this many bytes of scores the dense implementation is about as fast as the tiled one (see `benchmarks`).
DENSE_BYTES = 2**22


def attend(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s kv v"],
    *,
    score: Any = Dot(),
    bias: Any = None,
    mask: Mask | None = None,
    normalize: Normalize = Softmax(),
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
    block: int | tuple[int, int] | None = None,
    implementation: Implementation = "auto",
) -> Any:
    """out_i = Σ_j w_ij v_j,  w = normalize(score(q, k) + bias where mask),  per head.

    The defaults are softmax attention with scale H**-0.5 (Vaswani et al., 2017). N is a multiple of K and of Kv: query
    head n reads key head n // (N / K) and value head n // (N / Kv). Any number of batch axes, also none.

    score(query, key), bias(query_positions, key_positions) and mask(query_positions, key_positions) are parts; see
    `jaxattn.core.score`, `bias`, `mask`, `normalize` for the ones there are and what a new one must offer. All their
    arrays get gradients. `dropout` acts on the weights after normalisation.

    query_positions [..., T] and key_positions [..., S] are ints, by default 0..T−1 and 0..S−1. Position −1 marks an
    empty slot: as a key it is never seen, as a query its row is zero, and whatever the arrays hold there is ignored.

    Scores and statistics are float32 (float64 for float64 inputs); `out` [..., T, N, V] has value's dtype. With
    `return_lse` the result is (out, {"lse": lse}), lse [..., T, N] the log of each row's total weight, differentiable.
    A row with no visible key gives out = 0 and lse = −inf.

    implementation: "dense" holds all T x S weights; "tiled" needs memory linear in T + S, skips tiles in which the
    mask hides everything and recomputes the rest for gradients; "auto" chooses (see `explain`). Name "dense" for
    forward-mode and second derivatives, which "tiled" does not have. `block` is the tile size of "tiled", an int or
    (queries, keys); by default it fits the mask.

    Raises TypeError or ValueError, naming the argument, for shapes that do not fit, integer arrays, positions of the
    wrong shape, empty axes and unknown implementations; NotImplementedError if the named implementation cannot serve a
    part.
    """
    arguments = (query, key, value, score, bias, mask, normalize, query_positions, key_positions, dropout)
    name, _ = _choose(arguments, block, implementation)
    block = (block, block) if isinstance(block, int) else block
    out, lse = _attend(*arguments, block=block, implementation=name)
    return (out, {"lse": lse}) if return_lse else out


def attention_weights(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    *,
    score: Any = Dot(),
    bias: Any = None,
    mask: Mask | None = None,
    normalize: Normalize = Softmax(),
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | None = None,
) -> tuple[Float[Array, "*b n t s"], Float[Array, "*b n t s"]]:
    """(weights, scores) [..., N, T, S] of the same call to `attend`, for looking at; hidden scores are −inf.

    Memory is T x S per head. Arguments and errors are those of `attend`.
    """
    arguments = (query, key, key, score, bias, mask, normalize, query_positions, key_positions, None)
    _check(*arguments)
    return _weights(*arguments)


def explain(query: Any, key: Any, value: Any, **options: Any) -> str:
    """Prints which implementation `attend` with these arguments would use and why not the others; returns its name.

    Takes what `attend` takes; arrays may be `jax.ShapeDtypeStruct`s, since only shapes and dtypes are looked at.
    """
    options.pop("return_lse", None)
    block, implementation = options.pop("block", None), options.pop("implementation", "auto")
    defaults = {"score": Dot(), "bias": None, "mask": None, "normalize": Softmax()}
    defaults |= {"query_positions": None, "key_positions": None, "dropout": None}
    if unknown := set(options) - set(defaults):
        raise TypeError(f"explain got unknown arguments {sorted(unknown)}: need those of attend")
    name, reasons = _choose((query, key, value, *(defaults | options).values()), block, implementation)
    print("\n".join(f"{'->' if other == name else '  '} {other}: {reason}" for other, reason in reasons.items()))
    return name


@jax.jit
def _weights(*arguments):
    call = _call(*arguments)
    all_scores, visible = scores(call)
    return call.normalize.weights(all_scores, visible)[0], jnp.where(visible, all_scores, -jnp.inf)


@partial(jax.jit, static_argnames=("block", "implementation"))
def _attend(
    query, key, value, score, bias, mask, normalize, query_positions, key_positions, dropout, *, block, implementation
):
    call = _call(query, key, value, score, bias, mask, normalize, query_positions, key_positions, dropout)
    out, lse = dense(call) if implementation == "dense" else tiled(call, block)
    return out.astype(value.dtype), lse.astype(accumulator(query, key, value))


def _call(query, key, value, score, bias, mask, normalize, query_positions, key_positions, dropout) -> Call:
    """Default positions filled in, the contents of empty slots zeroed (they may be anything), dropout seeds drawn."""
    *batch, length, heads, _ = query.shape
    if query_positions is None:
        query_positions = np.arange(length, dtype=np.int32)
    else:
        query = jnp.where((query_positions >= 0)[..., None, None], query, 0)
    if key_positions is None:
        key_positions = np.arange(key.shape[-3], dtype=np.int32)
    else:
        shown = (key_positions >= 0)[..., None, None]
        key, value = jnp.where(shown, key, 0), jnp.where(shown, value, 0)
    return Call(
        query,
        key,
        value,
        score,
        bias,
        mask,
        normalize,
        None if dropout is None else dropout.draw(tuple(batch), heads),
        query_positions.astype(np.int32)[..., None, :, None],
        key_positions.astype(np.int32)[..., None, None, :],
    )


def _choose(arguments: tuple, block: Any, implementation: str) -> tuple[str, dict[str, str]]:
    """The implementation to use, and for each one why (not). Raises what `attend` raises."""
    query, key, _, _, _, _, normalize, *_ = arguments
    if implementation not in ("auto", "dense", "tiled"):
        raise ValueError(f"implementation {implementation!r} is unknown: need 'auto', 'dense' or 'tiled'")
    if block is not None:
        sizes = block if isinstance(block, tuple) else (block, block)
        if len(sizes) != 2 or not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
            raise TypeError(f"block must be an int or a tuple of two, (queries, keys), got {block!r}")
        if min(sizes) < 1:
            raise ValueError(f"block must be at least 1, got {block}")
    _check(*arguments)
    size = accumulator(query, key).itemsize * query.size // query.shape[-1] * key.shape[-3]
    held = f"the {query.shape[-3]} x {key.shape[-3]} scores of all heads take {size / 2**20:,.4g} MiB"
    refusal = None if isinstance(normalize, Streaming) else _whole_rows(normalize)
    if implementation != "auto":
        if implementation == "tiled" and refusal:
            raise NotImplementedError(f"implementation 'tiled' cannot serve {refusal}")
        name = implementation
    else:
        name = "dense" if refusal or size <= DENSE_BYTES else "tiled"
    limit = f"{DENSE_BYTES / 2**20:,.4g} MiB"
    why = {
        "dense": f"{held}, {'at most' if size <= DENSE_BYTES else 'more than'} {limit}",
        "tiled": f"cannot serve {refusal}" if refusal else f"serves this call in linear memory; chosen above {limit}",
    }
    if implementation != "auto":
        why = {other: "named in the call" if other == name else "another was named" for other in why}
    return name, why


def _whole_rows(normalize: Any) -> str:
    return f"normalize={type(normalize).__name__}: it needs whole rows, not a few keys at a time"


def _check(query, key, value, score, bias, mask, normalize, query_positions, key_positions, dropout) -> None:
    """Raises for every call that could not mean anything, before any of it is traced."""
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {x.dtype}: need floating point")
        if len(x.shape) < 3:
            raise ValueError(f"{name} has shape {x.shape}: need [..., length, heads, head dim]")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}: no axis may be empty")
    *batch, length, heads, _ = query.shape
    for name, x in (("key", key), ("value", value)):
        if list(x.shape[:-3]) != batch:
            raise ValueError(f"{name} has batch axes {x.shape[:-3]} but query has {tuple(batch)}: need the same")
        if heads % x.shape[-2]:
            raise ValueError(f"{name} has {x.shape[-2]} heads but query has {heads}: need a divisor of {heads}")
    keys = key.shape[-3]
    if value.shape[-3] != keys:
        raise ValueError(f"value has length {value.shape[-3]} but key has {keys}: need the same")
    for name, x, size in (("query_positions", query_positions, length), ("key_positions", key_positions, keys)):
        if x is None:
            continue
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} must be an integer array, got {getattr(x, 'dtype', type(x).__name__)}")
        if not positions_fit(tuple(x.shape), tuple(batch), size):
            raise ValueError(f"{name} has shape {x.shape}: need [..., {size}] with batch axes that fit {tuple(batch)}")
    for slot, part in (("score", score), ("bias", bias), ("mask", mask), ("normalize", normalize)):
        check_fields(slot, part)
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask such as Causal() or Explicit(array), got {type(mask).__name__}")
    if not isinstance(normalize, Normalize):
        raise TypeError(f"normalize must be a normaliser such as Softmax(), got {type(normalize).__name__}")
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be Dropout(rate, key), got {type(dropout).__name__}")
    if not callable(score) or not (bias is None or callable(bias)):
        raise TypeError("score and bias must be parts such as Dot() and Bias(array)")
    rows = jax.ShapeDtypeStruct((*batch, heads, length, keys), accumulator(query, key))

    def slots(query, key, value, score, bias, mask, query_positions, key_positions):
        call = _call(query, key, value, score, bias, mask, normalize, query_positions, key_positions, None)
        positions = call.query_positions, call.key_positions
        scores = score(query.swapaxes(-2, -3), key.swapaxes(-2, -3))
        if scores.shape == rows.shape:
            normalize.weights(scores, jnp.ones(rows.shape, bool))
        return scores, bias and bias(*positions), mask and mask(*positions)

    shapes = jax.eval_shape(slots, query, key, value, score, bias, mask, query_positions, key_positions)
    if shapes[0].shape != rows.shape:
        raise ValueError(f"score gives shape {shapes[0].shape}: need [..., N, T, S] = {rows.shape}")
    for slot, given in (("bias", shapes[1]), ("mask", shapes[2])):
        if given is not None:
            try:
                broadcasts = np.broadcast_shapes(given.shape, rows.shape) == rows.shape
            except ValueError:
                broadcasts = False
            if not broadcasts:
                raise ValueError(f"{slot} gives shape {given.shape}: need one that broadcasts to {rows.shape}")
