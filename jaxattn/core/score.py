"""Scores: how well a query matches a key.

A score is a part called on a tile, `score(query [..., N, T, H], key [..., K, S, H]) -> [..., N, T, S]`, heads first,
in float32 or better. Query head n belongs to key head n // (N / K).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.parts import part


def accumulator(*arrays: Array) -> jnp.dtype:
    """The dtype of scores and statistics: float32, or float64 if an argument is."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _precision(*arrays: Array) -> jax.lax.Precision | None:
    """float32 means float32 on every device, unless the user asked otherwise (`jax.default_matmul_precision`)."""
    asked = jax.config.jax_default_matmul_precision is not None  # type: ignore[attr-defined]
    reduced = jnp.result_type(*arrays).itemsize < 4
    return None if asked or reduced else jax.lax.Precision.HIGHEST


def grouped_matmul(rows: Float[Array, "*b n t x"], columns: Float[Array, "*b k x s"]) -> Float[Array, "*b n t s"]:
    """rows @ columns, where row head n reads column head n // (N / K), which is never repeated; float32 or better."""
    *batch, heads, length, width = rows.shape
    groups = columns.shape[-3]
    product = jnp.matmul(
        rows.reshape(*batch, groups, heads // groups * length, width),
        columns,
        precision=_precision(rows, columns),
        preferred_element_type=accumulator(rows, columns),
    )
    return product.reshape(*batch, heads, length, columns.shape[-1])


def grouped_matmul_transpose(
    rows: Float[Array, "*b n t x"], products: Float[Array, "*b n t s"], groups: int
) -> Float[Array, "*b k x s"]:
    """The transpose of `grouped_matmul` in its columns: out_k = Σ_{n of k} rows_nᵀ @ products_n."""
    *batch, heads, length, width = rows.shape
    rows = rows.reshape(*batch, groups, heads // groups * length, width)
    products = products.reshape(*batch, groups, heads // groups * length, products.shape[-1])
    return jnp.matmul(
        rows.swapaxes(-1, -2),
        products,
        precision=_precision(rows, products),
        preferred_element_type=accumulator(rows, products),
    )


def biased_scores(
    score: Any, bias: Any, query: Array, key: Array, query_positions: Array, key_positions: Array
) -> Array:
    """score(q, k) + bias(positions) of a tile, heads first, in the accumulator's dtype whatever the parts hold."""
    dtype = accumulator(query, key)
    scores = score(query, key).astype(dtype)
    return scores if bias is None else scores + bias(query_positions, key_positions).astype(dtype)


@part
class Dot:
    """score = scale * q·k. `scale` is H**-0.5 unless given; an array scale is learned.

    Scaled dot-product attention (Vaswani et al., 2017). Raises ValueError if query and key head dims differ.
    """

    scale: Float[Array, ""] | float | None = None

    def __call__(self, query: Float[Array, "*b n t h"], key: Float[Array, "*b k s h"]) -> Float[Array, "*b n t s"]:
        if query.shape[-1] != key.shape[-1]:
            raise ValueError(
                f"query has head dim {query.shape[-1]} but key has {key.shape[-1]}: Dot needs them to be equal"
            )
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return grouped_matmul(query, key.swapaxes(-1, -2)) * scale
