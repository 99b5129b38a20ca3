"""How much of each token reaches a later layer through attention, by products of weights and by maximum flow.

Layers are seen as a graph: token i of layer l reads token j of the layer below with the weight

    Â_l = normalised by rows (r I + (1 − r) Ā_l),   Ā_l the mean over heads

where r is the share that the residual stream has in the sum of stream and attention, ½ in the paper (Abnar and Zuidema,
2020). A row without any weight, as of padding, reads itself.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.checks import check_probability
from jaxattn.core.numeric import ratio

CAPACITY = 2**29  # the capacity of a weight of 1: flows are whole numbers of 32 bits, and rows of capacities sum to it


def residual_mixing(
    weights: Float[Array, "layers b n t t"], residual: Float[Array, "..."] | float = 0.5
) -> Float[Array, "layers b t t"]:
    """Returns Â_l, how tokens read those of the layer below through attention and the residual stream: rows sum to 1.

    Args:
        weights: [L, B, N, T, T], recorded attention weights.
        residual: r, the share of the stream, 0 to 1: one number, or an array that broadcasts against [L, B, T], such as
            `residual_share`.

    Raises:
        ValueError: The weights have another shape, or `residual` is out of range.
    """
    if jnp.ndim(weights) != 5 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights has shape {jnp.shape(weights)}: need [layers, batch, heads, tokens, tokens]")
    check_probability("residual", residual)
    share = jnp.asarray(residual, weights.dtype)[..., None]
    own = jnp.eye(weights.shape[-1], dtype=weights.dtype)
    mean = weights.mean(2)
    total = mean.sum(-1, keepdims=True)
    mixed = jnp.where(total > 0, share * own + (1 - share) * mean, own)
    mixed = jnp.where(jnp.isnan(total), jnp.nan, mixed)
    return ratio(mixed, mixed.sum(-1, keepdims=True))


def residual_share(
    stream: Float[Array, "layers b t d"], written: Float[Array, "layers b t d"]
) -> Float[Array, "layers b t"]:
    """Returns ‖x‖ / (‖x‖ + ‖y‖), for `residual`: how much of the sum x + y is the stream, by norms.

    Args:
        stream: x, the record of `resid_pre`.
        written: y, the record of `attn_out`.
    """
    x, y = (jnp.linalg.norm(each, axis=-1) for each in (stream, written))
    return ratio(x, x + y)


def rollout(
    weights: Float[Array, "layers b n t t"], residual: Float[Array, "..."] | float = 0.5
) -> Float[Array, "layers b t t"]:
    """Returns R_l = Â_l R_{l−1} with R_0 = I: how much of each input token is in each token behind layer l.

    Entry [l, b, i, j] is of token i behind layer l and the input at j. Rows sum to 1. In a causal model everything
    drifts to the first token as l grows.

    Args:
        weights: As of `residual_mixing`.
        residual: As of `residual_mixing`.

    Raises:
        ValueError: The weights have another shape, or `residual` is out of range.
    """
    mixed = residual_mixing(weights, residual)

    def step(reached: Array, layer: Array) -> tuple[Array, Array]:
        reached = jnp.matmul(layer, reached, precision=jax.lax.Precision.HIGHEST)
        return reached, reached

    own = jnp.broadcast_to(jnp.eye(mixed.shape[-1], dtype=mixed.dtype), mixed.shape[1:])
    return jax.lax.scan(step, own, mixed)[1]


def max_flow(
    weights: Float[Any, "layers b n t t"],
    queries: Sequence[int] | None = None,
    residual: Any = 0.5,
) -> Float[np.ndarray, "b q t"]:
    """Returns the maximum flow from tokens behind the last layer to each input token, rows divided by their sums.

    An edge from token i of layer l to token j of the layer below carries at most Â_l[i, j]. Each pair of a token and an
    input is a problem of its own, so that rows of flows do not sum to 1 before they are divided. The cost grows with
    L T⁴: for texts up to about 32 tokens, or a few `queries`.

    Args:
        weights: As of `residual_mixing`: those of the layers up to the one that is asked about.
        queries: The Q positions of tokens behind the last layer; all T by default.
        residual: As of `residual_mixing`.

    Returns:
        [B, Q, T], with an error of about 10⁻⁸ per edge, since capacities are whole numbers.

    Raises:
        ValueError: The weights have another shape or are not finite, a query is no position, or `residual` is out of
            range.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    mixed = np.asarray(residual_mixing(jnp.asarray(weights), residual), np.float64)
    layers, batch, tokens, _ = mixed.shape
    asked = range(tokens) if queries is None else queries
    if any(not 0 <= query < tokens for query in asked):
        raise ValueError(f"queries is {list(asked)}: need positions from 0 to {tokens - 1}")
    if not np.isfinite(mixed).all():
        raise ValueError("weights has entries that are not finite: need weights of attention")
    # Token i of layer l is node l T + i; inputs are layer 0.
    above = np.arange(layers * tokens).reshape(layers, tokens, 1) + tokens
    rows, columns = np.broadcast_arrays(above, above.swapaxes(1, 2) - tokens)
    nodes = (layers + 1) * tokens
    flows = np.zeros((batch, len(asked), tokens))
    for b in range(batch):
        capacity = np.rint(mixed[:, b] * CAPACITY).astype(np.int32)
        graph = coo_array((capacity.ravel(), (rows.ravel(), columns.ravel())), (nodes, nodes)).tocsr()
        graph.eliminate_zeros()
        for q, query in enumerate(asked):
            for token in range(tokens):
                flows[b, q, token] = maximum_flow(graph, layers * tokens + query, token).flow_value
    return flows / flows.sum(-1, keepdims=True)
