"""Complete rows, a block of queries at a time: memory linear in length for everything that looks along a row.

This implementation serves parts that need all keys of a query but not all queries at once: sorting normalisers, maps
and measures. Each block is the dense definition, recomputed for gradients, in plain JAX. So forward mode, Hessians and
any order of differentiation work too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.attend.call import Call, hide
from jaxattn.core.attend.dense import read, weigh
from jaxattn.core.attend.measure import View
from jaxattn.core.attend.tile import Tile
from jaxattn.core.mesh import vary_like

# A block of queries has at most so many rows, and scores, over all heads and batch entries, of at most so many bytes.
# Of 16 to 512 rows, 64 to 128 were fastest at T = 2048 and within a third of it at 8192 (8 heads, two CPU cores).
ROWS, ROW_BYTES = 128, 2**24


def rows(call: Call, size: int | None) -> tuple[Float[Array, "*b t n v"], Float[Array, "*b t n"], dict[str, Any]]:
    """Returns (out, lse, measured), `size` queries at a time (by default as fit `ROWS` and `ROW_BYTES`)."""
    call, wrong = hide(call)
    *batch, length, heads, _ = call.query.shape
    if size is None:
        size = min(ROWS, max(8, ROW_BYTES // (4 * int(np.prod(batch)) * heads * call.key.shape[-3])))
    size = min(size, length)
    halo = sum(each.halo for each in call.slots.maps)
    count = -(-length // size)

    def padded(x: Any, axis: int, fill: int) -> Array:
        return jnp.pad(x, [(halo, count * size - length) if i == x.ndim + axis else (0, 0) for i in range(x.ndim)],
                       constant_values=fill)  # fmt: skip

    query, positions = padded(call.query, -3, 0), padded(call.query_positions, -2, -1)
    wrong_queries = None if wrong.queries is None else padded(wrong.queries, -1, 0)

    @jax.checkpoint
    def block(start: Array) -> tuple:
        sub = dataclasses.replace(
            call,
            query=jax.lax.dynamic_slice_in_dim(query, start, size + halo, query.ndim - 3),
            query_positions=jax.lax.dynamic_slice_in_dim(positions, start, size + halo, positions.ndim - 2),
        )
        of_block = None
        if wrong_queries is not None:  # then there is no halo
            of_block = jax.lax.dynamic_slice_in_dim(wrong_queries, start, size, wrong_queries.ndim - 1)
        view, tile, wrong_rows = weigh(sub, wrong._replace(queries=of_block))
        view = View(view.weights[..., halo:, :], view.scores[..., halo:, :], view.lse[..., halo:])
        tile = Tile(tile.query[..., halo:, :], tile.key, tile.visible[..., halo:, :])
        return read(sub, view, tile, wrong_rows)

    summed = [name for name, measure in call.slots.measures.items() if measure.over == "sum"]

    def step(totals: Any, start: Array) -> tuple:
        out, lse, measured = block(start)
        totals = jax.tree.map(jnp.add, totals, {name: measured.pop(name) for name in summed})
        return totals, (out, lse, measured)

    shapes = jax.eval_shape(block, jnp.int32(0))[2]
    totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), {name: shapes[name] for name in summed})
    totals = vary_like(totals, vars(call))
    stacked: Any
    totals, stacked = jax.lax.scan(step, totals, size * jnp.arange(count))
    out, lse, measured = stacked

    def joined(x: Array, axis: int) -> Array:
        """[blocks, ..., size, ...] to [..., T, ...], where `axis` counts from the front, without the block axis."""
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, length, axis=axis)

    out, lse = joined(out, len(batch)), joined(lse, len(batch))
    return out, lse, totals | jax.tree.map(lambda x: joined(x, len(batch) + 1), measured)
