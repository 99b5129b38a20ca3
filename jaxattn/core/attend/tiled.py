"""Attention a tile at a time: memory linear in length, empty tiles skipped, gradients by recomputation.

For each query tile the tiles of keys in its row of the `Schedule` are visited, and three numbers per query are carried:
the reference r (for softmax the maximum score so far), total = Σ_j w(s_j, r) and numerator = Σ_j w(s_j, r) v_j. The
normaliser's `finish` turns them into out and lse. So the backward pass of this file is the derivative of two plain
sums, at fixed r, whatever the normaliser:

    ds_j = ∂w(s_j, r)/∂s · (d_numerator·v_j + d_total),    dv_j = Σ_i w(s_ij, r_i) d_numerator_i

and ds is pulled back through score, bias and maps by `jax.vjp` on the tile, which reaches every array they hold. Weight
maps that act on tiles change the weights in the numerator, and not those in the total.

Layouts are chosen for matrix products on a CPU, which are slow where the left operand has to be transposed. Keys and
values are laid out heads first, once or a tile at a time. Their gradients are summed up as [H, S] and [V, S], because
d_valueᵀ = d_numeratorᵀ · weights leaves the large operand, the weights, as it is.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.call import Call, Guard, WrongKeys, guard_of, repeated, without, wrong_keys
from jaxattn.core.attend.cut import by_entries, by_heads, refusal
from jaxattn.core.attend.mask import visible
from jaxattn.core.attend.schedule import (
    FEW_QUERIES,
    TOGETHER,
    Apart,
    Block,
    Kinds,
    Schedule,
    blocks_for,
    choose_block,
    fit,
    schedule,
)
from jaxattn.core.attend.score import mapped_scores
from jaxattn.core.attend.tile import Tile
from jaxattn.core.first_order import not_reversed, reverse_only
from jaxattn.core.matmul import accumulator, grouped_matmul, matmul, one_batch_axis
from jaxattn.core.mesh import mesh_axes, vary, vary_like
from jaxattn.core.part import cotangent, inexact_leaves

OVER_KEYS = "sums over keys"
"""The name that `jax.checkpoint` knows results and sums of all queries by: without them it runs the loop again."""

FIRST_ORDER = (
    "implementation 'tiled' has first derivatives in reverse mode only: for jax.jvp, and for gradients of gradients, "
    "name implementation='rows', whose memory is linear in length too, or 'dense'"
)


class Sums(NamedTuple):
    """The sums that are carried over tiles of keys, per query; see the head of this file."""

    numerator: Float[Array, "*b n t v"]
    total: Float[Array, "*b n t"]
    reference: Float[Array, "*b n t"]


class Gradients(NamedTuple):
    """Gradients so far, in float32 or better: those of keys and values as `_columns` lays them out."""

    key: Float[Array, "*b k h s"]
    value: Float[Array, "*b kv v s"]
    leaves: list[Array]  # of score, score maps, normaliser and weight maps
    bias_leaves: list[Array]


class Learned(NamedTuple):
    """The arguments that the custom gradient differentiates. Lengths are whole numbers of tiles."""

    query: Float[Array, "*b t n h"]
    key: Float[Array, "*b s k h"] | Float[Array, "*b k s h"]  # see `Plan.heads_first`
    value: Float[Array, "*b s kv v"] | Float[Array, "*b kv s v"]
    parts: Any  # (score, bias, score_maps, normalize, weight_maps)


class Given(NamedTuple):
    """The arguments without a gradient.

    `wrong` is None where wrong keys are found a tile at a time, see `Plan.heads_first`.
    """

    mask: Any
    query_positions: Int[Array, "*b 1 t 1"]
    key_positions: Int[Array, "*b #n 1 s"]
    active: Schedule
    wrong: WrongKeys | None


class Plan(NamedTuple):
    """The static arguments.

    Attributes:
        block: The tile size.
        kinds: The kinds of tiles.
        heads_first: Keys and values were laid out heads first before the loops, and wrong keys were found then.
            Otherwise both are done a tile at a time, which is faster where each tile is visited a few times only.
        guard: How wrong queries and keys are found.
        dtype: The dtype of out.
    """

    block: Block
    kinds: Kinds
    heads_first: bool
    guard: Guard
    dtype: Any  # of out


class Keys(NamedTuple):
    """A tile of keys, heads first, at an offset into all of them.

    `poison` is NaN for the keys that make a row wrong if it sees them (see `WrongKeys`), 0 for others. The total of
    such a row is then NaN, and so are all of its results.
    """

    key: Float[Array, "*b k bk h"]
    value: Float[Array, "*b kv bk v"]
    positions: Int[Array, "*b #n 1 bk"]
    poison: Float[Array, "*b n 1 bk"] | None
    start: Int[Array, ""]
    masked: bool


def _slice(x: Array, start: Any, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim + axis)


def _put(x: Array, part: Array, start: Any, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, x.ndim + axis)


def _add(x: Array, part: Array, start: Any) -> Array:
    """Adds in place: x[..., start : start + part.shape[-1]] += part."""
    old = _slice(x, start, part.shape[-1], -1)
    return _put(x, old + part.reshape(old.shape).astype(x.dtype), start, -1)


def _pad(x: Any, axis: int, length: int, fill: int = 0) -> Any:
    """Fills x up to a length along an axis (negative)."""
    if x.shape[axis] == length:
        return x
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    widths = [(0, length - n if i == x.ndim + axis else 0) for i, n in enumerate(x.shape)]
    return xp.pad(x, widths, constant_values=fill)


def _queries(plan: Plan, learned: Learned, given: Given, row: Any) -> tuple[Array, Array]:
    """Returns a tile of queries [*b, n, bq, h] and their positions [*b, 1, bq, 1]."""
    size = plan.block.queries
    query = _slice(learned.query, row * size, size, -3).swapaxes(-2, -3)
    return query, _slice(given.query_positions, row * size, size, -2)


def _keys(plan: Plan, learned: Learned, given: Given, granule: Any, masked: bool) -> Keys:
    """Returns the tile of keys that starts at a granule."""
    start, size = granule * plan.block.granule, plan.block.keys
    positions = _slice(given.key_positions, start, size, -1)
    seen = None if given.wrong is None or given.wrong.seen is None else _slice(given.wrong.seen, start, size, -1)
    if plan.heads_first:
        key, value = (_slice(x, start, size, -2) for x in (learned.key, learned.value))
    else:
        key, value = (_slice(x, start, size, -3) for x in (learned.key, learned.value))
        # Query positions are read only where there is a single query.
        wrong = wrong_keys(plan.guard, key, value, given.mask, given.query_positions, positions)
        key, value, seen = without(key, wrong.keys), without(value, wrong.values), wrong.seen
        key, value = key.swapaxes(-2, -3), value.swapaxes(-2, -3)
    poison = None
    if seen is not None:
        poison = jnp.where(repeated(seen, plan.guard.heads), jnp.nan, jnp.zeros((), accumulator(learned.query, key)))
        poison = poison[..., None, :]
    return Keys(key, value, positions, poison, start, masked)


def _tile(mask: Any, query_positions: Array, keys: Keys) -> Tile:
    """Returns the tile of these queries and keys.

    A branch that is always taken makes XLA hold the mask of the tile. Otherwise XLA would put the mask into every loop
    over scores that reads it, and evaluate it anew for every head.
    """
    positions = query_positions, keys.positions
    if not keys.masked:
        return Tile(*positions)

    def hidden(*positions: Array) -> Array:
        shown = visible(mask, *positions)
        return vary_like(jnp.zeros(shown.shape, bool), shown)

    return Tile(*positions, jax.lax.cond(keys.start >= 0, partial(visible, mask), hidden, *positions))


def _over_keys(plan: Plan, learned: Learned, given: Given, row: Any, visit: Any, carry: Any) -> Any:
    """Computes carry = visit(keys, carry) over the tiles of keys of one query tile: first the full ones, unmasked."""
    starts, full, count = given.active.starts[row], given.active.full[row], given.active.count[row]

    def visit_at(t: Any, masked: bool, carry: Any) -> Any:
        return visit(_keys(plan, learned, given, starts[t], masked), carry)

    if plan.kinds.single:
        return visit_at(0, plan.kinds.partial, carry)
    if plan.kinds.full:
        carry = jax.lax.fori_loop(0, full, lambda t, c: visit_at(t, False, c), carry)
    if plan.kinds.partial:
        carry = jax.lax.fori_loop(full, count, lambda t, c: visit_at(t, True, c), carry)
    return carry


def _sums(plan: Plan, learned: Learned, given: Given, row: Any, before: Sums | None = None) -> Sums:
    """Returns the three numbers of one query tile, over these keys and those of the sums `before`."""
    score, bias, score_maps, normalize, weight_maps = learned.parts
    query, query_positions = _queries(plan, learned, given, row)

    def visit(keys: Keys, sums: Sums | None) -> Sums:
        tile = _tile(given.mask, query_positions, keys)
        scores = mapped_scores(score, bias, score_maps, query, keys.key, tile)
        if keys.poison is not None:
            scores = scores + keys.poison
        if keys.masked:
            scores = jnp.where(tile.visible, scores, -jnp.inf)
        reference = normalize.reference(scores)
        if sums is not None:
            reference = jnp.maximum(sums.reference, reference)
        finite = jnp.where(jnp.isneginf(reference), 0, reference)
        weights = normalize.weight(scores, finite)
        total = weights.sum(-1)
        for weight_map in weight_maps:
            weights = weight_map(weights, tile)
        numerator = grouped_matmul(weights, keys.value.astype(weights.dtype))
        if sums is None:
            return Sums(numerator, total, reference)
        shrink = jnp.exp(sums.reference - finite)
        return Sums(sums.numerator * shrink[..., None] + numerator, sums.total * shrink + total, reference)

    if before is None and not plan.kinds.single:
        before = no_sums(learned, query.shape[:-1], mesh_axes((learned, given)))
    return _over_keys(plan, learned, given, row, visit, before)


def no_sums(learned: Learned, rows: tuple[int, ...], axes: frozenset[str]) -> Sums:
    """Returns the sums of rows [*b, n, t] over no keys."""
    dtype = accumulator(learned.query, learned.key, learned.value)
    numerator = jnp.zeros((*rows, learned.value.shape[-1]), dtype)
    return vary(Sums(numerator, jnp.zeros(rows, dtype), jnp.full(rows, -jnp.inf, dtype)), axes)


def referred(sums: Sums) -> Sums:
    """Returns sums over all keys, with the reference 0 for rows that see none."""
    return sums._replace(reference=jnp.where(jnp.isneginf(sums.reference), 0, sums.reference))


def _sums_of(sums: Sums, row: Any, size: int) -> Sums:
    """Returns the sums of a query tile."""
    return Sums(_slice(sums.numerator, row * size, size, -2), *(_slice(x, row * size, size, -1) for x in sums[1:]))


def add_keys(plan: Plan, learned: Learned, given: Given, sums: Sums) -> Sums:
    """Adds these keys to the sums [*b, n, t, v] and [*b, n, t] of all queries over other keys."""
    size = plan.block.queries

    def one_query_tile(row: Any, sums: Sums) -> Sums:
        new = _sums(plan, learned, given, row, _sums_of(sums, row, size))
        axes = -2, -1, -1
        return Sums(*(_put(x, part, row * size, axis) for x, part, axis in zip(sums, new, axes, strict=True)))

    return jax.lax.fori_loop(0, learned.query.shape[-3] // size, one_query_tile, sums)


def _forward(plan: Plan, learned: Learned, given: Given, keep: bool) -> tuple[Array, Array, Sums | None]:
    """Returns out [*b, t, n, v], lse [*b, n, t] and, if `keep`, the sums of all queries, laid out likewise."""
    *batch, length, heads, _ = learned.query.shape
    dtype = accumulator(learned.query, learned.key, learned.value)
    wide = (*batch, length, heads, learned.value.shape[-1])
    out, rows = jnp.zeros(wide, plan.dtype), jnp.zeros((*batch, heads, length), dtype)
    carry = (out, rows, Sums(jnp.zeros(wide, dtype), rows, rows) if keep else None)

    def one_query_tile(row: Any, carry: Any) -> Any:
        out, lse, kept = carry
        sums = referred(_sums(plan, learned, given, row))
        start = row * plan.block.queries
        out_row, lse_row = learned.parts[3].finish(*sums)
        if kept is not None:
            kept = Sums(
                _put(kept.numerator, sums.numerator.swapaxes(-2, -3), start, -3),
                *(_put(x, x_row, start, -1) for x, x_row in zip(kept[1:], sums[1:], strict=True)),
            )
        return _put(out, out_row.swapaxes(-2, -3), start, -3), _put(lse, lse_row, start, -1), kept

    count = length // plan.block.queries
    return jax.lax.fori_loop(0, count, one_query_tile, vary(carry, mesh_axes((learned, given))))


def without_wrong_keys(learned: Learned, given: Given) -> Learned:
    """Puts zeros in place of wrong keys and values. Doing so earlier would also cost in the gradient."""
    if given.wrong is None or given.wrong.keys is None or given.wrong.values is None:
        return learned
    key, value = given.wrong.keys.swapaxes(-1, -2), given.wrong.values.swapaxes(-1, -2)
    return learned._replace(key=without(learned.key, key), value=without(learned.value, value))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, learned: Learned, given: Given) -> tuple[Array, Array]:
    return _forward(plan, without_wrong_keys(learned, given), given, keep=False)[:2]


def _attention_forward(plan: Plan, learned: Learned, given: Given) -> tuple[tuple[Array, Array], Any]:
    learned = without_wrong_keys(learned, given)
    out, lse, sums = checkpoint_name(_forward(plan, learned, given, keep=True), OVER_KEYS)
    return (out, lse), (learned, given, sums)


class _Parts(NamedTuple):
    """The floating-point leaves of the parts of a call, and how the parts are made of them."""

    leaves: list[Array]
    rebuild: Any
    bias: Any
    bias_leaves: list[Array]
    rebuild_bias: Any

    @classmethod
    def of(cls, learned: Learned) -> "_Parts":
        score, bias, *others = learned.parts
        return cls(*inexact_leaves((score, *others)), bias, *inexact_leaves(bias))


def without_wrong_rows(sums: Sums) -> tuple[Sums, Array]:
    """Returns sums that are finite, and which rows are wrong.

    Weights of those rows under a reference above all scores are 0, and so is what comes of their cotangents.
    """
    wrong = jnp.isnan(sums.total)
    above = jnp.finfo(sums.total.dtype).max / 4
    return Sums(
        jnp.where(wrong[..., None], 0, sums.numerator),
        jnp.where(wrong, 1, sums.total),
        jnp.where(wrong, above, sums.reference),
    ), wrong


def _through_keys(
    plan: Plan,
    learned: Learned,
    given: Given,
    row: Any,
    d_sums: Sums,
    d_query: Array | None,
    gradients: Gradients,
) -> tuple[Array, Gradients]:
    """Adds what one query tile gives to the gradients, its own and those of these keys and of the parts.

    Args:
        plan: The plan.
        learned: The learned arguments.
        given: The others.
        row: The tile.
        d_sums: The cotangents of its numerator and total, and its reference.
        d_query: Its gradient so far, None for none.
        gradients: The other gradients so far.
    """
    leaves, rebuild, bias, bias_leaves, rebuild_bias = _Parts.of(learned)
    groups, dtype = learned.value.shape[-3 if plan.heads_first else -2], d_sums.total.dtype
    d_numerator, d_total, reference = d_sums
    query, query_positions = _queries(plan, learned, given, row)
    query = jnp.where(jnp.isfinite(query), query, 0)
    *batch, heads, rows, width = d_numerator.shape
    d_numerator_by_group = d_numerator.reshape(*batch, groups, heads // groups * rows, width)
    # Transposed here and not where it is read, which is in the loop over keys.
    transposed = d_numerator_by_group.swapaxes(-1, -2)

    def visit(keys: Keys, carry: Any) -> Any:
        d_query, d_key, d_value, d_leaves, d_bias_leaves = carry
        tile = _tile(given.mask, query_positions, keys)

        def weights_of(query, key, bias_tile, leaves):
            """The weights of the tile, and what weight maps make of them."""
            score, score_maps, normalize, weight_maps = rebuild(leaves)
            scores = mapped_scores(score, bias_tile, score_maps, query, key, tile)
            scores = jnp.where(tile.visible, scores, -jnp.inf) if keys.masked else scores
            weights = normalize.weight(scores, reference)
            if not weight_maps:
                return weights, None
            mapped = weights
            for weight_map in weight_maps:
                mapped = weight_map(mapped, tile)
            return weights, mapped

        bias_tile: Any = None
        pull_bias: Any = None
        if bias is not None:
            bias_tile, pull_bias = jax.vjp(lambda leaves: rebuild_bias(leaves)(tile), bias_leaves)
        (weights, mapped), pull = jax.vjp(weights_of, query, keys.key, bias_tile, leaves)
        d_mapped = matmul(d_numerator_by_group, keys.value.astype(dtype), (-1, -1))
        d_mapped = d_mapped.reshape(weights.shape).astype(weights.dtype)
        every = jnp.broadcast_to(d_total[..., None], weights.shape).astype(weights.dtype)
        d_weights = (d_mapped + every, None) if mapped is None else (every, d_mapped)
        d_query_here, d_key_here, d_bias, d_leaves_here = pull(d_weights)
        kept = weights if mapped is None else mapped
        d_value_here = matmul(transposed, kept.reshape(*transposed.shape[:-2], -1, kept.shape[-1]))
        if bias is not None and bias.accumulates:
            total = rebuild_bias(d_bias_leaves).accumulate(d_bias, tile)
            d_bias_leaves = inexact_leaves(total)[0]
        elif bias is not None:
            d_bias_leaves = jax.tree.map(jnp.add, d_bias_leaves, pull_bias(d_bias)[0])
        return (
            d_query_here if d_query is None else d_query + d_query_here,
            _add(d_key, one_batch_axis(d_key_here).swapaxes(-1, -2), keys.start),
            _add(d_value, d_value_here, keys.start),
            jax.tree.map(jnp.add, d_leaves, d_leaves_here),
            d_bias_leaves,
        )

    if d_query is None and not plan.kinds.single:
        d_query = vary(jnp.zeros(query.shape, dtype), mesh_axes((learned, given)))
    d_query, *after = _over_keys(plan, learned, given, row, visit, (d_query, *gradients))
    return d_query, Gradients(*after)


def pull_keys(
    plan: Plan, learned: Learned, given: Given, d_sums: Sums, d_query: Array, gradients: Gradients
) -> tuple[Array, Gradients]:
    """Adds what all queries give to the gradients [*b, n, t, h], and of these keys and of the parts.

    The derivative of `add_keys`; the arguments are those of `_through_keys`.
    """
    size = plan.block.queries

    def one_query_tile(row: Any, carry: tuple[Array, Gradients]) -> tuple[Array, Gradients]:
        d_query, gradients = carry
        part = _slice(d_query, row * size, size, -2)
        part, gradients = _through_keys(plan, learned, given, row, _sums_of(d_sums, row, size), part, gradients)
        return _put(d_query, part, row * size, -2), gradients

    return jax.lax.fori_loop(0, learned.query.shape[-3] // size, one_query_tile, (d_query, gradients))


def _heads_and_keys(plan: Plan) -> tuple[int, int]:
    """Returns the axes of heads and of keys, of keys and values."""
    return (-3, -2) if plan.heads_first else (-2, -3)


def no_gradients(plan: Plan, learned: Learned) -> Gradients:
    """Returns zeros."""
    dtype = accumulator(learned.query, learned.key, learned.value)

    def zeros(leaves):
        return [jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]

    def columns(x: Array) -> Array:
        """Zeros [*b, k, h, s]. Rows of a length that is a power of two would share a few sets of the cache."""
        heads, keys = (x.shape[axis] for axis in _heads_and_keys(plan))
        return jnp.zeros((*x.shape[:-3], heads, x.shape[-1], keys + 16), dtype)

    parts = _Parts.of(learned)
    return Gradients(columns(learned.key), columns(learned.value), zeros(parts.leaves), zeros(parts.bias_leaves))


def gradient_of(plan: Plan, learned: Learned, d_query: Array, gradients: Gradients) -> Learned:
    """Returns the gradients in the form of the learned arguments."""

    def like(x: Array, total: Array) -> Array:
        total = total[..., : x.shape[_heads_and_keys(plan)[1]]]
        total = total.swapaxes(-1, -2) if plan.heads_first else jnp.moveaxis(total, -1, -3)
        return total.astype(x.dtype)

    score, bias, *others = learned.parts
    d_score, *d_others = cotangent((score, *others), gradients.leaves)
    return Learned(
        d_query,
        like(learned.key, gradients.key),
        like(learned.value, gradients.value),
        (d_score, cotangent(bias, gradients.bias_leaves), *d_others),
    )


def _attention_backward(plan: Plan, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Learned, None]:
    learned, given, all_sums = residuals
    d_out, d_lse = cotangents
    leaves, rebuild, *_ = _Parts.of(learned)
    size, dtype = plan.block.queries, all_sums.total.dtype

    def one_query_tile(row: Any, carry: Any) -> Any:
        d_all_queries, gradients = carry
        start = row * size
        sums = Sums(
            _slice(all_sums.numerator, start, size, -3).swapaxes(-2, -3),
            *(_slice(x, start, size, -1) for x in all_sums[1:]),
        )
        sums, _ = without_wrong_rows(sums)
        d_out_row = _slice(d_out, start, size, -3).swapaxes(-2, -3).astype(dtype)
        (out_row, _), pull = jax.vjp(lambda leaves, *sums: rebuild(leaves)[2].finish(*sums), leaves, *sums)
        d_more, d_numerator, d_total, _ = pull((d_out_row.astype(out_row.dtype), _slice(d_lse, start, size, -1)))
        gradients = gradients._replace(leaves=jax.tree.map(jnp.add, gradients.leaves, d_more))
        d_sums = Sums(d_numerator, d_total, sums.reference)
        d_query, gradients = _through_keys(plan, learned, given, row, d_sums, None, gradients)
        return _put(d_all_queries, d_query.swapaxes(-2, -3), start, -3), gradients

    carry = jnp.zeros(learned.query.shape, learned.query.dtype), no_gradients(plan, learned)
    count = learned.query.shape[-3] // size
    carry = jax.lax.fori_loop(0, count, one_query_tile, vary(carry, mesh_axes((learned, given, cotangents))))
    if not plan.kinds.single:  # how often its loops run is known to the program alone: they have no reverse mode
        carry = not_reversed(carry, FIRST_ORDER)
    return gradient_of(plan, learned, *carry), None


_attention.defvjp(_attention_forward, _attention_backward)


# Up to so many visits per key it is faster to lay keys out heads first at each visit; two CPU cores, T = 8192.
FEW_VISITS = 4

Results = tuple[Float[Array, "*b t n v"], Float[Array, "*b t n"], dict[str, Any]]


def tiled(call: Call, block: tuple[int, int] | None) -> Results:
    """Returns (out, lse, measured) of a call whose parts work on tiles.

    Heads that see different keys are computed one key head after the other.

    Args:
        call: The call.
        block: The tile size (queries, keys), by default one that fits the call.
    """
    lengths = call.query.shape[-3], call.key.shape[-3]
    apart = apart_of(call, block)[0]

    def index_of(block: Block) -> tuple[Schedule, Kinds]:
        places, batch = in_tiles(call.query_positions, call.key_positions, block), call.query.shape[:-3]
        return schedule(call.slots.mask, *places, block.keys // block.granule, apart, batch)

    if block is None:
        grain = None if call.slots.mask is None else call.slots.mask.grain
        bytes_per_key = call.key.size // lengths[1] * call.key.dtype.itemsize
        blocks = blocks_for(lengths[0], bytes_per_key, grain, apart.groups * apart.members > 1)
        chosen = choose_block(lambda block: index_of(block)[0], lengths, blocks)
    else:
        chosen = fit(Block(*block, block[1]), lengths)
    active, kinds = index_of(chosen)
    last = active.starts.max() if isinstance(active.starts, np.ndarray) else -(-lengths[1] // chosen.granule) - 1
    keys = max(lengths[1], int(last) * chosen.granule + chosen.keys)
    count = active.count
    pieces = math.prod(apart.pieces)
    visits = int(count.sum()) / pieces * chosen.keys / keys if isinstance(count, np.ndarray) else count.shape[-1]
    attention = partial(_attention_of, chosen, kinds, keys, visits > FEW_VISITS)
    active = jax.tree.map(jnp.asarray, active)

    batch, levels = call.query.ndim - 3, [size for size in apart[1:] if size > 1]

    def stacked(call: Call, active: Schedule, depth: int) -> Results:
        """Of the groups of heads, and in these of their members, along axes in front."""
        if depth == len(levels):
            return with_measures(lambda call: attention(call, active), call)
        return by_heads(call, levels[depth]).each(partial(stacked, depth=depth + 1), active)

    def of_entry(call: Call, active: Schedule) -> Results:
        def joined(x: Array, axis: int) -> Array:
            """With the heads of all pieces at the axis, which counts without those in front."""
            x = jnp.moveaxis(x.reshape(-1, *x.shape[len(levels) :]), 0, axis)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        out, lse, measured = stacked(call, active, 0)
        if not levels:
            return out, lse, measured
        return joined(out, batch + 1), joined(lse, batch + 1), jax.tree.map(lambda x: joined(x, batch), measured)

    if apart.entries == 1:
        return of_entry(call, active)
    sizes = call.query.shape[:-3]
    return jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[1 + batch :]), by_entries(call).each(of_entry, active))


def in_tiles(query_positions: Any, key_positions: Any, block: Block) -> tuple[Any, Any]:
    """Returns positions [*b, 1, t, 1] and [*b, #n, 1, s] in tiles, with empty slots at the end.

    Those of queries are [*b, 1, qb, 1, bq], and those of keys [*b, #n, 1, g, granule].
    """

    def cut(x: Any, size: int) -> Any:
        x = _pad(x, -1, -(-x.shape[-1] // size) * size, fill=-1)
        return x.reshape(*x.shape[:-1], -1, size)

    query = cut(query_positions[..., 0], block.queries)
    return query[..., None, :], cut(key_positions, block.granule)


def apart_of(call: Call, block: tuple[int, int] | None) -> tuple[Apart, str]:
    """Returns how the call is cut, and the same in words.

    Heads and entries are cut where they see different keys. On a CPU entries are cut too where the scores of all of
    them, in one tile, do not stay in the cache.
    """
    ways, words = _apart_by_mask(call, block)
    if ways != TOGETHER or not _leave_the_cache(call, block):
        return ways, words
    entries = ways._replace(entries=math.prod(call.query.shape[:-3]))
    return entries, f"{words}, one batch entry after the other, so that they stay in the cache"


# Up to so many bytes of scores in one tile it is as fast to compute all batch entries at once; two CPU cores with 1 MiB
# of cache each and 32 in common. At 64 MiB entries one after the other took 0.6 of the time.
CACHE_BYTES = 2**23


def _leave_the_cache(call: Call, block: tuple[int, int] | None) -> bool:
    """Returns whether batch entries are faster one after the other."""
    *batch, length, heads, width = call.query.shape
    entries, lengths = math.prod(batch), (length, call.key.shape[-3])
    if entries == 1 or length <= FEW_QUERIES or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    tile = fit(Block(*block, block[1]) if block is not None else blocks_for(length, 1)[0], lengths)
    size = accumulator(call.query, call.key, call.value).itemsize
    if entries * heads * tile.queries * tile.keys * size <= CACHE_BYTES:
        return False
    # The gradient of what entries share is summed over them: it should be no larger than that of their queries.
    leaves, stacked, _ = by_entries(call)
    shared = [x for x, is_stacked in zip(leaves, stacked, strict=True) if not is_stacked]
    learned = sum(np.size(x) for x in inexact_leaves(shared)[0])
    return learned <= length * heads * width and refusal(call, by_entries) is None


def _apart_by_mask(call: Call, block: tuple[int, int] | None) -> tuple[Apart, str]:
    """Returns how the mask cuts the call, judged by its bounds for whole tiles, and the same in words."""
    query, key = call.query, call.key
    lengths = query.shape[-3], key.shape[-3]
    if call.slots.mask is None:
        return TOGETHER, "all heads share their tiles"
    if lengths[0] <= FEW_QUERIES and jax.default_backend() == "cpu" and block is None:
        return TOGETHER, "all heads share their tiles, since few queries are bound by reading keys"
    tile = fit(Block(*block, block[1]) if block is not None else blocks_for(lengths[0], 1)[-1], lengths)
    if lengths[1] <= tile.keys:
        return TOGETHER, "all heads share the one tile of keys"
    places = in_tiles(call.query_positions, call.key_positions, tile)

    def axes(query: Any, key: Any) -> tuple[int, ...]:
        """The batch axes and the number of heads for which the mask differs at these positions."""
        found = jax.eval_shape(lambda mask, *places: mask.bounds(*places)[0], call.slots.mask, query, key).shape
        return np.broadcast_shapes(found, (1, 1, 1))[:-2]

    *batch, heads = np.broadcast_shapes(axes(*places), *(x.shape[:-3] for x in places))
    ways, words = TOGETHER, []
    if heads > 1:
        groups = math.lcm(key.shape[-2], call.value.shape[-2])
        members = query.shape[-2] // groups if axes(places[0], places[1][..., :1, :, :, :])[-1] > 1 else 1
        reason = refusal(call, partial(by_heads, groups=groups * members))
        ways = ways if reason else ways._replace(groups=groups, members=members)
        whose = "head" if members > 1 or groups == query.shape[-2] else "key head"
        words.append(f"all heads share their tiles, since {reason}" if reason else f"each {whose} has its own tiles")
    if math.prod(batch) > 1 and jax.device_count() == 1:
        reason = refusal(call, by_entries)
        ways = ways if reason else ways._replace(entries=math.prod(query.shape[:-3]))
        words.append(f"the batch shares its tiles, since {reason}" if reason else "each batch entry has its own tiles")
    return ways, " and ".join(words) or "all heads share their tiles"


def with_measures(attention: Callable[[Call], tuple[Array, Array]], call: Call) -> Results:
    """Computes a call with linear measures by a function that returns (out, lse) of one without.

    Columns of linear measures are read as more columns of the values. They are read in a pass of their own in two
    cases: where the values are read with dropout, which measures do not see, and for few queries, where more columns
    would take a copy of all values.
    """
    measures: dict[str, Any] = dict(call.slots.measures)
    if not measures:
        return *attention(call), {}
    columns, widths = _columns(call)
    length, width = call.query.shape[-3], call.value.shape[-1]
    plain = dataclasses.replace(call.slots, dropout=None)
    if call.slots.dropout is not None or length <= FEW_QUERIES:
        out, lse = attention(call)
        sums, _ = attention(dataclasses.replace(call, value=columns, slots=plain))
        sums = jnp.where(jnp.isnan(lse)[..., None], jnp.nan, sums)  # a value that is not finite makes all of a row NaN
    else:
        heads = columns.shape[-2] if columns.shape[-2] > 1 else call.value.shape[-2]
        value = jnp.repeat(call.value, heads // call.value.shape[-2], -2)
        columns = jnp.broadcast_to(columns, (*value.shape[:-1], columns.shape[-1]))
        read, lse = attention(dataclasses.replace(call, value=jnp.concatenate([value, columns], -1)))
        out, sums = read[..., :width], read[..., width:]
    parts = jnp.split(sums.swapaxes(-2, -3), np.cumsum(widths)[:-1], -1)
    measured = {name: measure.finish(x) for (name, measure), x in zip(measures.items(), parts, strict=True)}
    return out, lse, measured


def _columns(call: Call) -> tuple[Float[Array, "*b s #n c"], list[int]]:
    """Returns the columns of all measures side by side, heads last as in values, and how many each measure has."""
    dtype = accumulator(call.query, call.key, call.value)
    measures: Any = call.slots.measures.values()
    each = [measure.columns(call.key_positions) for measure in measures]
    *batch, keys, _, _ = call.key.shape
    heads = max(x.shape[-3] for x in each)
    wide = [jnp.broadcast_to(x.astype(dtype), (*batch, heads, keys, x.shape[-1])) for x in each]
    return jnp.concatenate(wide, -1).swapaxes(-2, -3), [x.shape[-1] for x in each]


def operands(
    plan: Plan, keys: int, call: Call, active: Schedule | None, axes: frozenset[str] = frozenset()
) -> tuple[Learned, Given]:
    """Returns the arguments of a call as the loops need them.

    Args:
        plan: The plan.
        keys: The number of slots of keys.
        call: The call, without measures.
        active: The schedule.
        axes: Mesh axes over which the arrays differ even if they do not look like it.
    """
    slots, length = call.slots, call.query.shape[-3]
    queries = -(-length // plan.block.queries) * plan.block.queries
    weight_maps = slots.weight_maps if slots.dropout is None else (*slots.weight_maps, slots.dropout)
    key, value = (_pad(x, -3, keys) for x in (call.key, call.value))
    if plan.heads_first:
        key, value = key.swapaxes(-2, -3), value.swapaxes(-2, -3)
    learned = Learned(
        _pad(call.query, -3, queries),
        key,
        value,
        (slots.score, slots.bias, slots.score_maps, slots.normalize, weight_maps),
    )
    positions = _pad(call.query_positions, -2, queries, fill=-1), _pad(call.key_positions, -1, keys, fill=-1)
    wrong = None
    if plan.heads_first:
        found = wrong_keys(plan.guard, call.key, call.value, slots.mask, call.query_positions, call.key_positions)
        lengths = zip(found, (-1, -2, -2), strict=True)
        wrong = WrongKeys(*(None if x is None else _pad(x, axis, keys) for x, axis in lengths))
    given = Given(slots.mask, *jax.tree.map(jnp.asarray, (*positions, active, wrong)))
    return vary(jax.tree.map(jnp.asarray, learned), mesh_axes((learned, given)) | axes), given


def _attention_of(
    chosen: Block, kinds: Kinds, keys: int, heads_first: bool, call: Call, active: Schedule
) -> tuple[Float[Array, "*b t n v"], Float[Array, "*b t n"]]:
    """Returns (out, lse) of a call whose heads and batch entries share the schedule, over `keys` slots of keys."""
    plan, length = Plan(chosen, kinds, heads_first, guard_of(call), call.value.dtype), call.query.shape[-3]
    learned, given = operands(plan, keys, call, active)
    leaves, rebuild = inexact_leaves(learned)
    learned = rebuild(reverse_only(leaves, FIRST_ORDER))
    out, lse = _attention(plan, learned, given)
    return out[..., :length, :, :], lse.swapaxes(-1, -2)[..., :length, :]
