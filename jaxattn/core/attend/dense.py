"""The definition of attention: all scores at once.

This implementation serves every part, in memory batch x N x T x S. The others are tested against it.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.attend.call import Call, Wrong, hide, repeated
from jaxattn.core.attend.maps import Seeded
from jaxattn.core.attend.measure import View
from jaxattn.core.attend.score import mapped_scores
from jaxattn.core.attend.tile import Tile
from jaxattn.core.matmul import grouped_matmul, product

Rows = Bool[Array, "*b n t"]


def weigh(call: Call, wrong: Wrong) -> tuple[View, Tile, Rows | None]:
    """Applies score, bias, score maps, mask, normaliser and weight maps, in this order, but not dropout.

    Returns:
        A triple (view, tile, rows). `rows` says which rows are wrong; in the tile they see nothing.
    """
    query, key = call.query.swapaxes(-2, -3), call.key.swapaxes(-2, -3)
    slots, tile = call.slots, call.tile
    shown: Any = tile.visible
    rows, seen = wrong.queries, wrong.of_keys.seen
    if rows is not None:
        sees, sees_wrong = shown.any(-1), jnp.zeros_like(rows)
        if seen is not None and slots.mask is None:  # a query that is there sees every key that is
            there = tile.key[..., 0, :] >= 0
            sees_wrong = sees & (repeated(seen, rows.shape[-2]) & there).any(-1)[..., None]
        elif seen is not None:
            sees, sees_wrong = _seen(shown, seen, rows.shape[-2])
        rows = (rows & sees) | sees_wrong
        tile = tile._replace(visible=shown & ~rows[..., None])
    scores = mapped_scores(slots.score, slots.bias, slots.score_maps, query, key, tile)
    tile = tile._replace(visible=jnp.broadcast_to(tile.visible, scores.shape))
    weights, lse = slots.normalize.weights(scores, tile)
    for weight_map in slots.weight_maps:
        weights = weight_map(weights, tile)
    return View(weights, scores, lse), tile, rows


def _seen(shown: Bool[Array, "*#b #n t s"], keys: Bool[Array, "*b g s"], heads: int) -> tuple[Array, Rows]:
    """Returns the rows [..., 1 or N, T] that see any key, and those that see one of these keys.

    The second come from a product with columns of zeros and ones, which is faster than looking at every pair of every
    head. Heads that see different keys get the first from it too, by a column of ones. Heads that see the same do not:
    a column beside those of heads would make devices exchange them where heads are spread over a mesh.
    """
    if shown.shape[-3] == 1:
        counts = product(shown.astype(jnp.float32), keys[..., None, :, :].swapaxes(-1, -2).astype(jnp.float32))
        return shown.any(-1), repeated(counts[..., 0, :, :].swapaxes(-1, -2) > 0, heads)  # counts: [..., 1, T, G]
    columns = repeated(keys, heads)[..., None, :]
    columns = jnp.concatenate([jnp.ones_like(columns), columns], -2).swapaxes(-1, -2)
    counts = product(shown.astype(jnp.float32), columns.astype(jnp.float32))  # [..., N, T, 2]
    return counts[..., 0] > 0, counts[..., 1] > 0


def marked(view: View, tile: Tile, rows: Rows | None) -> tuple[View, Tile]:
    """Puts NaN in the wrong rows of the view, and restores in the tile the pairs that they see."""
    tile = tile._replace(query=jnp.asarray(tile.query), key=jnp.asarray(tile.key))
    if rows is None:
        return view, tile
    weights, scores = (jnp.where(rows[..., None], jnp.nan, x) for x in (view.weights, view.scores))
    return View(weights, scores, jnp.where(rows, jnp.nan, view.lse)), tile._replace(
        visible=tile.visible | rows[..., None]
    )


def read(
    call: Call, view: View, tile: Tile, rows: Rows | None
) -> tuple[Float[Array, "*b t n v"], Float[Array, "*b t n"], dict[str, Any]]:
    """Returns (out, lse, measured) of the rows in view."""
    told = marked(view, tile, rows)
    measured = {name: measure(*told) for name, measure in call.slots.measures.items()}
    weights = view.weights
    if isinstance(call.slots.dropout, Seeded):
        weights = call.slots.dropout(weights, tile)
    values = call.value.swapaxes(-2, -3).astype(weights.dtype)
    out = grouped_matmul(weights, values, gathered=tile.key.shape[-3] > 1)
    out = out if rows is None else jnp.where(rows[..., None], jnp.nan, out)
    return out.swapaxes(-2, -3), told[0].lse.swapaxes(-1, -2), measured


def dense(call: Call) -> tuple[Float[Array, "*b t n v"], Float[Array, "*b t n"], dict[str, Any]]:
    """Returns out = Σ_j w_j v_j with the weights of `weigh`, the lse, and what is measured, rows as [..., N, T, *c]."""
    call, wrong = hide(call)
    return read(call, *weigh(call, wrong))
