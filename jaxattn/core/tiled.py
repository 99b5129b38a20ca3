"""Attention a tile at a time: memory linear in length, empty tiles skipped, gradients by recomputation.

For each query tile the key tiles in its row of the `Schedule` are visited, and three numbers per query are carried:
the reference r (for softmax the maximum score so far), total = Σ_j w(s_j, r) and numerator = Σ_j w(s_j, r) v_j. The
normaliser's `finish` turns them into out and lse with ordinary JAX. So the backward pass of this file is the
derivative of two plain sums, at fixed r, whatever the normaliser:

    ds_j = ∂w(s_j, r)/∂s · (d_numerator·v_j + d_total),    dv_j = Σ_i w(s_ij, r_i) d_numerator_i

and ds is pulled back through score, bias and maps by `jax.vjp` on the tile, which reaches every array they hold. Weight
maps that act on tiles change the weights in the numerator, and not those in the total.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.call import Call
from jaxattn.core.mask import visible
from jaxattn.core.parts import cotangent, inexact_leaves
from jaxattn.core.schedule import Schedule, choose_block, schedule
from jaxattn.core.score import accumulator, grouped_matmul, grouped_matmul_transpose, mapped_scores, raw_scores


class Sums(NamedTuple):
    """What is carried over key tiles, per query; see the head of this file."""

    numerator: Float[Array, "*b n t v"]
    total: Float[Array, "*b n t"]
    reference: Float[Array, "*b n t"]


def _swap_heads(sums: Sums) -> Sums:
    """[..., n, bq, v] and [..., n, bq] to [..., bq, n, v] and [..., bq, n], and back: tiles are computed heads first
    but stored as `out` is laid out, so that only tiles, which are in cache, are ever transposed."""
    return Sums(sums.numerator.swapaxes(-2, -3), sums.total.swapaxes(-1, -2), sums.reference.swapaxes(-1, -2))


class Learned(NamedTuple):
    """What the custom gradient differentiates."""

    query: Float[Array, "*b qb bq n h"]
    key: Float[Array, "*b kb bk k h"]
    value: Float[Array, "*b kb bk kv v"]
    parts: Any  # (score, bias, score_maps, normalize, weight_maps)


class Given(NamedTuple):
    """What it does not."""

    mask: Any
    query_positions: Int[Array, "*b 1 qb 1 bq"]
    key_positions: Int[Array, "*b 1 1 kb bk"]
    active: Schedule


def _tiles(x: Any, axis: int, size: int, fill: int = 0) -> Any:
    """Cuts axis `axis` (negative) into tiles, padded with `fill`: [..., L, ...] -> [..., ceil(L / size), size, ...]."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    short = -x.shape[axis] % size
    axis += x.ndim
    if short:
        x = xp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def _tile(x: Array, number: Any, axis: int) -> Array:
    return jax.lax.dynamic_index_in_dim(x, number, x.ndim + axis, keepdims=False)


def _query_tile(row, learned: Learned, given: Given):
    """One tile of queries [*b, n, bq, h] and their positions [*b, 1, bq, 1]."""
    return _tile(learned.query, row, -4).swapaxes(-2, -3), _tile(given.query_positions, row, -3).swapaxes(-1, -2)


def _key_tile(j, learned: Learned, given: Given):
    """One tile of keys [*b, k, bk, h] and values [*b, kv, bk, v], and their positions [*b, 1, 1, bk]."""
    key, value = (_tile(x, j, -4).swapaxes(-2, -3) for x in (learned.key, learned.value))
    return key, value, _tile(given.key_positions, j, -2)


def _axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which some leaf differs between devices, inside `jax.shard_map`; else none."""
    return frozenset[str]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def _vary(tree: Any, axes: frozenset[str]) -> Any:
    """The same arrays, typed as differing over these mesh axes, as a loop's carry and a cotangent have to be."""

    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def vary_like(tree: Any, like: Any) -> Any:
    """`_vary` over the axes over which `like` differs."""
    return _vary(tree, _axes(like))


def _over_tiles(loops: tuple[bool, bool], active: Schedule, row, visit, carry):
    """carry = visit(j, masked, carry) over the key tiles j of one query tile: first the full ones, with no mask."""
    tiles, full, count = active.tiles[row], active.full[row], active.count[row]
    some_full, some_masked = loops
    if some_full:
        carry = jax.lax.fori_loop(0, full, lambda t, c: visit(tiles[t], False, c), carry)
    if some_masked:
        carry = jax.lax.fori_loop(full, count, lambda t, c: visit(tiles[t], True, c), carry)
    return carry


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(loops: tuple[bool, bool], learned: Learned, given: Given) -> Sums:
    """The three numbers of every query, [qb, *b, bq, n, ...]; differentiable but for `reference`."""
    score, bias, score_maps, normalize, weight_maps = learned.parts

    def one_query_tile(row):
        query, query_positions = _query_tile(row, learned, given)

        def visit(j, masked, sums):
            key, value, key_positions = _key_tile(j, learned, given)
            positions = query_positions, key_positions
            shown: Any = visible(given.mask, *positions) if masked else None
            scores = mapped_scores(score, bias, score_maps, query, key, shown, *positions)
            if masked:
                scores = jnp.where(shown, scores, -jnp.inf)
            reference = jnp.maximum(sums.reference, normalize.reference(scores))
            finite = jnp.where(jnp.isneginf(reference), 0, reference)
            shrink = jnp.exp(sums.reference - finite)
            weights = normalize.weight(scores, finite)
            total = sums.total * shrink + weights.sum(-1)
            for weight_map in weight_maps:
                weights = weight_map(weights, shown, *positions)
            read = grouped_matmul(weights, value.astype(weights.dtype))
            return Sums(sums.numerator * shrink[..., None] + read, total, reference)

        rows, dtype = query.shape[:-1], accumulator(learned.query, learned.key, learned.value)
        start = Sums(
            jnp.zeros((*rows, learned.value.shape[-1]), dtype), jnp.zeros(rows, dtype), jnp.full(rows, -jnp.inf, dtype)
        )
        sums = _over_tiles(loops, given.active, row, visit, _vary(start, _axes(learned)))
        return _swap_heads(sums._replace(reference=jnp.where(jnp.isneginf(sums.reference), 0, sums.reference)))

    return jax.lax.map(one_query_tile, jnp.arange(learned.query.shape[-4]))


def _sums_forward(loops, learned, given):
    sums = _sums(loops, learned, given)
    return sums, (learned, given, sums.reference)


def _sums_backward(loops, residuals, cotangents):
    learned, given, reference = residuals
    score, bias, *others = learned.parts
    leaves, rebuild = inexact_leaves((score, *others))
    bias_leaves, rebuild_bias = inexact_leaves(bias)

    def one_query_tile(carry, tile):
        row, *sums = tile
        d_numerator, d_total, reference = _swap_heads(Sums(*sums))
        query, query_positions = _query_tile(row, learned, given)

        def visit(j, masked, carry):
            d_query, d_key, d_value, d_leaves, d_bias_leaves = carry
            key, value, key_positions = _key_tile(j, learned, given)
            positions = query_positions, key_positions
            shown: Any = visible(given.mask, *positions) if masked else None

            def weights_of(query, key, bias_tile, leaves):
                """The weights of the tile, and what weight maps make of them."""
                score, score_maps, normalize, weight_maps = rebuild(leaves)
                scores = raw_scores(score, query, key, *positions)
                scores = scores if bias is None else scores + bias_tile.astype(scores.dtype)
                for score_map in score_maps:
                    scores = score_map(scores, shown, *positions)
                weights = normalize.weight(jnp.where(shown, scores, -jnp.inf) if masked else scores, reference)
                if not weight_maps:
                    return weights, None
                mapped = weights
                for weight_map in weight_maps:
                    mapped = weight_map(mapped, shown, *positions)
                return weights, mapped

            bias_tile: Any = None
            pull_bias: Any = None
            if bias is not None:
                bias_tile, pull_bias = jax.vjp(lambda leaves: rebuild_bias(leaves)(*positions), bias_leaves)
            (weights, mapped), pull = jax.vjp(weights_of, query, key, bias_tile, leaves)
            d_mapped = grouped_matmul(d_numerator, value.astype(d_numerator.dtype).swapaxes(-1, -2))
            every = jnp.broadcast_to(d_total[..., None], weights.shape)
            d_mapped, every = d_mapped.astype(weights.dtype), every.astype(weights.dtype)
            d_weights = (d_mapped + every, None) if mapped is None else (every, d_mapped)
            d_query_j, d_key_j, d_bias, d_leaves_j = pull(d_weights)
            d_value_j = grouped_matmul_transpose(weights if mapped is None else mapped, d_numerator, value.shape[-3])
            if hasattr(bias, "accumulate"):
                total = rebuild_bias(d_bias_leaves).accumulate(d_bias, *positions)
                d_bias_leaves = inexact_leaves(total)[0]
            elif bias is not None:
                d_bias_leaves = jax.tree.map(jnp.add, d_bias_leaves, pull_bias(d_bias)[0])
            return (
                d_query + d_query_j,
                d_key.at[..., j, :, :, :].add(d_key_j.swapaxes(-2, -3).astype(d_key.dtype)),
                d_value.at[..., j, :, :, :].add(d_value_j.swapaxes(-2, -3)),
                jax.tree.map(jnp.add, d_leaves, d_leaves_j),
                d_bias_leaves,
            )

        d_query = _vary(jnp.zeros(query.shape, d_numerator.dtype), _axes(learned))
        d_query, *carry = _over_tiles(loops, given.active, row, visit, (d_query, *carry))
        return tuple(carry), d_query.swapaxes(-2, -3)

    dtype = cotangents.numerator.dtype

    def zeros(leaves):
        return [jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]

    d_arrays = jnp.zeros(learned.key.shape, dtype), jnp.zeros(learned.value.shape, dtype)
    start = *d_arrays, zeros(leaves), zeros(bias_leaves)
    tiles = (jnp.arange(learned.query.shape[-4]), cotangents.numerator, cotangents.total, reference)
    totals, d_query = jax.lax.scan(one_query_tile, _vary(start, _axes(learned)), tiles)
    d_key, d_value, d_leaves, d_bias_leaves = totals
    d_score, *d_others = cotangent((score, *others), d_leaves)
    gradient = Learned(
        jnp.moveaxis(d_query, 0, -4).astype(learned.query.dtype),
        d_key.astype(learned.key.dtype),
        d_value.astype(learned.value.dtype),
        (d_score, cotangent(bias, d_bias_leaves), *d_others),
    )
    return gradient, None


_sums.defvjp(_sums_forward, _sums_backward)


def tiled(
    call: Call, block: tuple[int, int] | None
) -> tuple[Float[Array, "*b t n v"], Float[Array, "*b t n"], dict[str, Any]]:
    """(out, lse, {}) of a call whose parts work on tiles, in tiles of `block` = (queries, keys) or a fitting size."""

    def positions_in_tiles(block: tuple[int, int]) -> tuple[Any, Any]:  # [*b, 1, qb, 1, bq] and [*b, 1, 1, kb, bk]
        query_positions = _tiles(call.query_positions[..., 0], -1, block[0], fill=-1)[..., None, :]
        return query_positions, _tiles(call.key_positions, -1, block[1], fill=-1)

    lengths = call.query.shape[-3], call.key.shape[-3]
    if block is None:
        block = choose_block(lambda size: schedule(call.mask, *positions_in_tiles(size))[0], lengths)
    queries, keys = min(block[0], lengths[0]), min(block[1], lengths[1])
    query_positions, key_positions = positions_in_tiles((queries, keys))
    index, loops = schedule(call.mask, query_positions, key_positions)
    weight_maps = call.weight_maps if call.dropout is None else (*call.weight_maps, call.dropout)
    learned = Learned(
        _tiles(call.query, -3, queries),
        _tiles(call.key, -3, keys),
        _tiles(call.value, -3, keys),
        (call.score, call.bias, call.score_maps, call.normalize, weight_maps),
    )
    given = Given(call.mask, *jax.tree.map(jnp.asarray, (query_positions, key_positions, index)))
    learned = _vary(jax.tree.map(jnp.asarray, learned), _axes((learned, given)))
    out, lse = call.normalize.finish(*_swap_heads(_sums(loops, learned, given)))  # [qb, *b, n, bq, ...]
    *batch, length, heads, _ = call.query.shape
    out = jnp.moveaxis(out.swapaxes(-2, -3), 0, -4).reshape(*batch, -1, heads, out.shape[-1])
    lse = jnp.moveaxis(lse.swapaxes(-1, -2), 0, -3).reshape(*batch, -1, heads)
    return out[..., :length, :, :], lse[..., :length, :], {}
