"""The definition: all scores at once. Serves every part, in memory batch x N x T x S; the oracle of the others."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.call import Call
from jaxattn.core.mask import visible
from jaxattn.core.measure import View
from jaxattn.core.score import grouped_matmul, mapped_scores


def weigh(call: Call) -> View:
    """score, bias, score maps, mask, normaliser and weight maps, in this order; not dropout."""
    query, key = call.query.swapaxes(-2, -3), call.key.swapaxes(-2, -3)
    positions = call.query_positions, call.key_positions
    shown = visible(call.mask, *positions)
    scores = mapped_scores(call.score, call.bias, call.score_maps, query, key, shown, *positions)
    shown = jnp.broadcast_to(shown, scores.shape)
    weights, lse = call.normalize.weights(scores, shown, *(positions if call.normalize.positional else ()))
    for weight_map in call.weight_maps:
        weights = weight_map(weights, shown, *positions)
    return View(weights, scores, shown, lse, *map(jnp.asarray, positions))


def read(call: Call, view: View) -> tuple[Float[Array, "*b t n v"], Float[Array, "*b t n"], dict[str, Any]]:
    """(out, lse, measured) of the rows in view."""
    measured = {name: measure(view) for name, measure in call.measures.items()}
    weights = view.weights
    if call.dropout is not None:
        weights = call.dropout(weights, view.visible, view.query_positions, view.key_positions)
    out = grouped_matmul(weights, call.value.swapaxes(-2, -3).astype(weights.dtype))
    return out.swapaxes(-2, -3), view.lse.swapaxes(-1, -2), measured


def dense(call: Call) -> tuple[Float[Array, "*b t n v"], Float[Array, "*b t n"], dict[str, Any]]:
    """out = Σ_j w_j v_j with the weights of `weigh`; lse; and what is measured, rows as [..., N, T, *c]."""
    return read(call, weigh(call))
