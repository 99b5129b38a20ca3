"""Projections moved from keys and values to queries and results, so that attention reads what they would project."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.matmul import accumulator, precision


def absorb_q(query: Float[Array, "*b t n h"], weight: Float[Array, "c k h"]) -> Float[Array, "*b t n c"]:
    """Returns q̃_n = W_k q_n: since q_n · (W_kᵀ x) = q̃_n · x, attention can read the inputs x of a key projection.

        attend(absorb_q(query, weight), x, x, score=Dot(H**-0.5), ...)        with x [..., S, 1, C]

    has the scores of `attend(query, key, ...)` with key_k = W_kᵀ x for every key head k. The scale is that of the keys,
    H^−½ and not C^−½. A bias b of the keys adds q_n · b to all scores of a row, which softmax does not see. A rotation
    of the keys stands between the two, and cannot be moved (EL-attention, Yan et al., 2021; multi-head latent attention
    of DeepSeek-V2, 2024).

    Args:
        query: [..., T, N, H].
        weight: [C, K, H], the maps from C channels to the keys; head n reads that of key head n // (N / K).

    Raises:
        ValueError: The shapes do not fit.
    """
    return _by_head("query", query, weight, "...tkgh,ckh->...tkgc", 2)


def expand_v(read: Float[Array, "*b t n c"], weight: Float[Array, "c k h"]) -> Float[Array, "*b t n h"]:
    """Returns z_n = W_vᵀ c_n: what heads read of the inputs x of a value projection becomes what they read of values.

    With c_n = Σ_s p_ns x_s the result is Σ_s p_ns (W_vᵀ x_s). A bias of the values is added where the weights of each
    row sum to 1. The other half of `absorb_q`.

    Args:
        read: [..., T, N, C].
        weight: [C, K, H], the maps from C channels to the values; head n reads that of value head n // (N / K).

    Raises:
        ValueError: The shapes do not fit.
    """
    return _by_head("read", read, weight, "...tkgc,ckh->...tkgh", 0)


def _by_head(name: str, x: Array, weight: Array, equation: str, axis: int) -> Array:
    """Returns the product of x [..., N, X] with the weight of each head, summed over X, which is that axis of it."""
    need = "[C, K, H] with C" if axis == 0 else "[C, K, H] with H"
    if weight.ndim != 3 or x.ndim < 2 or x.shape[-1] != weight.shape[axis] or x.shape[-2] % weight.shape[1]:
        raise ValueError(
            f"weight has shape {weight.shape} but {name} has {x.shape}: need {need} = {x.shape[-1]} and K a divisor of "
            f"its {x.shape[-2] if x.ndim > 1 else 0} heads"
        )
    grouped = x.reshape(*x.shape[:-2], weight.shape[1], -1, x.shape[-1])
    made = jnp.einsum(
        equation, grouped, weight, precision=precision(x, weight), preferred_element_type=accumulator(x, weight)
    )
    return made.reshape(*x.shape[:-1], made.shape[-1]).astype(x.dtype)
