"""`attend`, the one call for everything that weighs keys: it checks its arguments, picks an implementation and explains
the choice.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend import fused
from jaxattn.core.attend.call import Given, hide, prepare
from jaxattn.core.attend.check import check
from jaxattn.core.attend.dense import dense, marked, weigh
from jaxattn.core.attend.maps import Dropout, Map, Need
from jaxattn.core.attend.mask import Mask
from jaxattn.core.attend.measure import LinearMeasure, Measure
from jaxattn.core.attend.normalize import Normalize, Softmax, Streaming
from jaxattn.core.attend.rows import rows
from jaxattn.core.attend.schedule import COPIED_BYTES, FEW_QUERIES
from jaxattn.core.attend.score import Dot
from jaxattn.core.attend.slots import Slots
from jaxattn.core.attend.tiled import apart_of, tiled
from jaxattn.core.checks import check_array
from jaxattn.core.matmul import accumulator
from jaxattn.core.mesh import Axes, spread, under_auto_axes

Implementation = Literal["auto", "dense", "rows", "tiled", "fused"]
IMPLEMENTATIONS = ("dense", "rows", "tiled", "fused")

# Up to this many bytes of scores the dense implementation is about as fast as the tiled one (see `benchmarks`).
DENSE_BYTES = 2**22
# Or where they take no more than this share of what key and value take, and no tile can be skipped.
DENSE_SHARE = 8


def attend(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s kv v"],
    *,
    score: Any = Dot(),
    bias: Any = None,
    mask: Mask | Bool[Array, "..."] | Callable | None = None,
    normalize: Normalize = Softmax(),
    score_maps: Sequence[Map] = (),
    weight_maps: Sequence[Map] = (),
    measures: Mapping[str, Measure] = MappingProxyType({}),
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | Int[Array, "*b s k"] | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
    block: int | tuple[int, int] | None = None,
    implementation: Implementation = "auto",
) -> Any:
    """Reads the values under the weights that each query gives to the keys.

    For each head

        out_i = Σ_j w_ij v_j,    w = weight_maps(normalize(score_maps(score(q, k) + bias) where mask))

    The defaults are softmax attention with scale H**-0.5 (Vaswani et al., 2017).

    The slots take parts. The first lines of `jaxattn.core.attend.score`, `bias`, `maps`, `mask`, `normalize` and
    `measure` say which parts exist and what a new part must offer. All arrays in parts get gradients.

    Position −1 marks an empty slot. A key at −1 is never seen, a query at −1 has the row zero, and the arrays may hold
    anything there. A row with no visible key gives out = 0 and lse = −inf. With a null logit, its lse is that logit.

    A query, key or value with an infinite or undefined number makes every row NaN that sees it. No other row changes,
    neither forward nor in a gradient, so hidden keys may hold anything, and so may queries whose result is not used.
    Three cases are exceptions:

    - Where maps let rows read each other (a `halo`, or the whole matrix), only empty slots may hold such numbers.
    - In "fused", only keys beyond `Lengths` may hold them.
    - With a single query (T = 1) the keys that the query sees are not checked, since a check would read a cache twice.
      An infinite number in such a key then goes through the arithmetic of the row, and an array that several rows
      share, such as a bias, may get a gradient from it.

    Args:
        query: [..., T, N, H], with any number of batch axes, also none.
        key: [..., S, K, H], where K divides N: query head n reads key head n // (N / K).
        value: [..., S, Kv, V], where Kv divides N: query head n reads value head n // (N / Kv).
        score: How well a query matches a key.
        bias: The numbers that are added to the scores: a part, an array that broadcasts to [..., N, T, S], or a
            function bias(query, key) of positions, called on arrays [..., 1, T, 1] and [..., 1, 1, S].
        mask: The keys that a query sees: a part, an array of booleans that broadcasts to [..., N, T, S], or a function
            mask(query, key) of positions, called like that of `bias`.
        normalize: How scores become weights.
        score_maps: Changes of the scores, applied in order.
        weight_maps: Changes of the weights, applied in order.
        measures: Measures of the weights by name, taken in the same pass.
        query_positions: Integers [..., T], by default 0..T−1.
        key_positions: Integers [..., S], by default 0..S−1. Positions that differ by key head are [..., S, K], with all
            batch axes.
        dropout: Dropout of weights, which acts last.
        return_lse: Also return the log of each row's total weight.
        block: The tile size of "tiled", an int or (queries, keys), and the number of queries at a time of "rows". The
            default fits the call.
        implementation: "dense" holds all T x S weights. "rows" holds a block of complete rows at a time. "tiled" holds
            a tile at a time and skips tiles in which the mask hides everything. "rows" and "tiled" need memory linear
            in T + S and recompute for gradients. "fused" is a library's kernel. "auto" takes the fastest that serves
            the call (see `explain`). A named implementation is never replaced by another. "tiled" has first derivatives
            in reverse mode only: for `jax.jvp` and gradients of gradients name "rows" or "dense".

    Returns:
        out [..., T, N, V] in value's dtype. With `return_lse` or `measures`, the pair (out, extras): extras["lse"]
            [..., T, N] is the log of each row's total weight, differentiable, and extras[name] the result of each
            measure. Scores and statistics are float32 (float64 for float64 inputs).

    Raises:
        TypeError or ValueError: An array has the wrong shape or holds integers, positions have the wrong shape, an axis
            is empty, or the implementation is unknown. The message names the argument.
        NotImplementedError: The named implementation cannot serve a part.
    """
    slots: Any = (score, bias, score_maps, mask, normalize, weight_maps, dropout, measures)
    call = Given(query, key, value, Slots(*slots), query_positions, key_positions).in_parts()
    for argument in ("query", "key", "value"):
        check_array(argument, getattr(call, argument))

    def called(call: Given) -> Any:
        name, _ = _choose(call, block, implementation, return_lse)
        tile = (block, block) if isinstance(block, int | np.integer) else block
        kernel = fused.plan(call, return_lse) if name == "fused" else None
        given = traceable(call)
        if name == "fused" and implementation == "auto":  # programs for other platforms have none of its kernels
            other, _ = _choose(call, block, implementation, return_lse, kernels=False)
            platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
            branches = {platform: (name, kernel), "default": (other, None)}
            return jax.lax.platform_dependent(
                given,
                **{
                    each: lambda given, name=name, kernel=kernel: _attend(
                        given, block=tile, implementation=name, kernel=kernel
                    )[0]
                    for each, (name, kernel) in branches.items()
                },
            )
        out, lse, measured = _attend(given, block=tile, implementation=name, kernel=kernel)
        extras = ({"lse": lse} if return_lse else {}) | measured
        return (out, extras) if return_lse or measures else out

    def axes() -> Any:
        *batch, length, heads, _ = spread(query)
        out = Axes((*batch, length, heads, None))
        by_row = Axes((*batch, length, heads))
        extras = {name: by_row if each.over == "rows" else Axes(batch) for name, each in measures.items()}
        extras |= {"lse": by_row} if return_lse else {}
        return (out, extras) if return_lse or measures else out

    if isinstance(measures, Mapping):  # a read-only mapping is no pytree
        call = call._replace(slots=dataclasses.replace(call.slots, measures=dict(measures)))
    return under_auto_axes(called, call, axes)


def attention_weights(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    *,
    score: Any = Dot(),
    bias: Any = None,
    mask: Mask | Bool[Array, "..."] | Callable | None = None,
    normalize: Normalize = Softmax(),
    score_maps: Sequence[Map] = (),
    weight_maps: Sequence[Map] = (),
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | Int[Array, "*b s k"] | None = None,
) -> tuple[Float[Array, "*b n t s"], Float[Array, "*b n t s"]]:
    """Returns the weights and the scores of the same call to `attend`, for looking at.

    The memory is T x S per head: for long inputs see `RowsOf`. Arguments and errors are those of `attend`.

    Returns:
        A pair (weights, scores), each [..., N, T, S]. Hidden scores are −inf.
    """
    slots: Any = (score, bias, score_maps, mask, normalize, weight_maps)
    call = Given(query, key, key, Slots(*slots), query_positions, key_positions).in_parts()
    for argument in ("query", "key"):
        check_array(argument, getattr(call, argument))

    def called(call: Given) -> Any:
        check(call)
        return _weights(call)

    def axes() -> Any:
        *batch, length, heads, _ = spread(query)
        return Axes((*batch, heads, length, None))

    return under_auto_axes(called, call, axes)


def explain(query: Any, key: Any, value: Any, **options: Any) -> str:
    """Prints which implementation `attend` would use for these arguments, and why not the others.

    Args:
        query: As in `attend`. Arrays may be `jax.ShapeDtypeStruct`s, since only shapes and dtypes are looked at.
        key: As in `attend`.
        value: As in `attend`.
        **options: Any other arguments of `attend`.

    Returns:
        The name of the implementation.

    Raises:
        TypeError: An option is not an argument of `attend`. The other errors are those of `attend`.
    """
    return_lse = options.pop("return_lse", False)
    block, implementation = options.pop("block", None), options.pop("implementation", "auto")
    positions = [options.pop(name, None) for name in ("query_positions", "key_positions")]
    if unknown := set(options) - {field.name for field in dataclasses.fields(Slots)}:
        raise TypeError(f"explain got unknown arguments {sorted(unknown)}: need those of attend")
    given = Given(query, key, value, Slots(**options), *positions).in_parts()
    name, reasons = _choose(given, block, implementation, return_lse)
    if not reasons["tiled"].startswith("cannot"):
        reasons["tiled"] += f"; {_tiles_of(given, block)}"
    print("\n".join(f"{'->' if other == name else '  '} {other}: {reason}" for other, reason in reasons.items()))
    return name


def _tiles_of(given: Given, block: Any) -> str:
    """Whether heads and batch entries have their own tiles in "tiled", in words."""
    words = []
    slots = dataclasses.replace(given.slots, measures=dict(given.slots.measures))
    size: Any = (block, block) if isinstance(block, int | np.integer) else block
    jax.eval_shape(lambda given: words.append(apart_of(prepare(given), size)[1]), given._replace(slots=slots))
    return words[0]


def check_block(block: Any) -> None:
    """Raises TypeError or ValueError for a block that is no size."""
    if block is None:
        return
    sizes = block if isinstance(block, tuple) else (block, block)
    whole = [isinstance(size, int | np.integer) and not isinstance(size, bool) for size in sizes]
    if len(sizes) != 2 or not all(whole):
        raise TypeError(f"block must be an int or a tuple of two, (queries, keys), got {block!r}")
    if min(sizes) < 1:
        raise ValueError(f"block must be at least 1, got {block}")


def traceable(given: Given) -> Given:
    """Returns the same call as a pytree, with NumPy leaves in the dtypes that JAX has now.

    An int64 table may else be taken for one under x64, or for none.
    """
    given = given._replace(slots=dataclasses.replace(given.slots, measures=dict(given.slots.measures)))
    return jax.tree.map(lambda x: x.astype(jnp.result_type(x)) if isinstance(x, np.ndarray) else x, given)


@jax.jit
def _weights(given: Given):
    view, tile = marked(*weigh(*hide(prepare(given))))
    return view.weights, jnp.where(tile.visible, view.scores, -jnp.inf)


@partial(jax.jit, static_argnames=("block", "implementation", "kernel"))
def _attend(given: Given, *, block, implementation, kernel):
    if implementation == "fused":
        return fused.fused(given, kernel), None, {}
    call = prepare(given)
    if implementation == "dense":
        out, lse, measured = dense(call)
    elif implementation == "rows":
        out, lse, measured = rows(call, None if block is None else block[0])
    else:
        out, lse, measured = tiled(call, block)
    return in_form(given, out, lse, measured)


def in_form(given: Given, out: Array, lse: Array, measured: dict[str, Any]) -> tuple[Array, Array, dict[str, Any]]:
    """Returns the results of an implementation in the dtypes and the layout of those of `attend`."""
    batch = given.query.ndim - 3
    by_row = {name for name, measure in given.slots.measures.items() if measure.over == "rows"}
    measured = {
        name: jax.tree.map(lambda x: x.swapaxes(batch, batch + 1), result) if name in by_row else result
        for name, result in measured.items()
    }
    return out.astype(given.value.dtype), lse.astype(accumulator(given.query, given.key, given.value)), measured


def needs_of(given: Given) -> dict[Need, list[str]]:
    """Which parts need complete rows, and which the whole matrix."""
    needs: dict[Need, list[str]] = {"tile": [], "rows": [], "matrix": []}
    slots = given.slots
    if not isinstance(slots.normalize, Streaming):
        needs["rows"].append(f"normalize={type(slots.normalize).__name__}")
    for each in slots.score_maps:
        needs[each.scores_need].append(f"score_maps={each.kind}")
    for each in slots.weight_maps:
        needs[each.weights_need].append(f"weight_maps={each.kind}")
    for measure in slots.measures.values():
        if isinstance(measure, LinearMeasure):
            continue
        needs["rows"].append(f"measures={type(measure).__name__}")
    return needs


def _choose(
    given: Given, block: Any, implementation: str, return_lse: bool, kernels: bool = True
) -> tuple[str, dict[str, str]]:
    """Returns the implementation to use, and for each one why (not). Raises what `attend` raises.

    Args:
        given: The call.
        block: As of `attend`.
        implementation: As of `attend`.
        return_lse: As of `attend`.
        kernels: Whether there are kernels of libraries.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        choices = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation {implementation!r} is unknown: need 'auto', {choices}")
    check_block(block)
    check(given)
    query, key = given.query, given.key
    size = accumulator(query, key).itemsize * query.size // query.shape[-1] * key.shape[-3]
    held = f"the {query.shape[-3]} x {key.shape[-3]} scores of all heads take {size / 2**20:,.4g} MiB"
    limit, small = f"{DENSE_BYTES / 2**20:,.4g} MiB", size <= DENSE_BYTES
    # A few queries that see all keys: their scores are small beside the keys, and no tile can be skipped.
    held_anyway = key.size * key.dtype.itemsize + given.value.size * given.value.dtype.itemsize
    sees_all = given.slots.mask is None and given.key_positions is None
    few = not small and sees_all and DENSE_SHARE * size <= held_anyway
    # A few queries that see some keys, as in decoding: zeros for what they must not see would be a copy of all keys.
    decoding = query.shape[-3] <= FEW_QUERIES and not sees_all and held_anyway > COPIED_BYTES
    decoding &= jax.default_backend() == "cpu"
    needs = needs_of(given)
    by_rows, by_matrix = (" and ".join(needs[need]) for need in ("rows", "matrix"))
    kernel = fused.plan(given, return_lse) if kernels else "another platform"
    refusals: dict[str, str | None] = {"dense": None, "rows": None, "tiled": None}
    refusals["fused"] = kernel if isinstance(kernel, str) else None
    if by_matrix:
        refusals["rows"] = refusals["tiled"] = f"{by_matrix}: it needs all queries and keys at once"
    elif by_rows:
        refusals["tiled"] = f"{by_rows}: it needs whole rows, not a few keys at a time"
    if implementation != "auto" and (refusal := refusals[implementation]):
        raise NotImplementedError(f"implementation {implementation!r} cannot serve {refusal}")
    if implementation != "auto":
        why = {other: "named in the call" if other == implementation else "another was named" for other in refusals}
        return implementation, why
    if refusals["fused"] is None:
        name = "fused"
    elif refusals["rows"] or ((few or small) and (refusals["tiled"] or not decoding)):
        name = "dense"
    else:
        name = "rows" if refusals["tiled"] else "tiled"
    why = {
        "dense": f"{held}, {'at most' if small else 'more than'} {limit}{', but little beside key and value' * few}",
        "rows": "serves this call in linear memory, in plain JAX; chosen above the limit where tiled cannot serve",
        "tiled": f"serves this call in linear memory; chosen above {limit}, and for few queries with many keys",
        "fused": "serves this call with a library's kernel",
    }
    return name, {other: f"cannot serve {refusals[other]}" if refusals[other] else why[other] for other in why}
