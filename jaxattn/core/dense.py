"""The definition: all scores at once. Serves every part, in memory batch x N x T x S; the oracle of the others."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.call import Call
from jaxattn.core.mask import visible
from jaxattn.core.score import biased_scores, grouped_matmul


def scores(call: Call) -> tuple[Float[Array, "*b n t s"], Bool[Array, "*b n t s"]]:
    """score(q, k) + bias, and which of them are visible."""
    query, key = call.query.swapaxes(-2, -3), call.key.swapaxes(-2, -3)
    scores = biased_scores(call.score, call.bias, query, key, call.query_positions, call.key_positions)
    return scores, jnp.broadcast_to(visible(call.mask, call.query_positions, call.key_positions), scores.shape)


def dense(call: Call) -> tuple[Float[Array, "*b t n v"], Float[Array, "*b t n"]]:
    """out = Σ_j w_j v_j with w = normalize(scores, visible); and lse."""
    weights, lse = call.normalize.weights(*scores(call))
    if call.dropout is not None:
        weights = weights * call.dropout(call.query_positions, call.key_positions).astype(weights.dtype)
    out = grouped_matmul(weights, call.value.swapaxes(-2, -3).astype(weights.dtype))
    return out.swapaxes(-2, -3), lse.swapaxes(-1, -2)
