"""Products of matrices in float32 or better, for heads that share keys, laid out as the backends like them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def accumulator(*arrays: Array) -> jnp.dtype:
    """Returns the dtype of scores and statistics: float32, or float64 if an argument is."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def precision(*arrays: Array) -> jax.lax.Precision | None:
    """Returns the precision of products that makes float32 mean float32 on every device.

    Another precision that the user asked for (`jax.default_matmul_precision`) is kept.
    """
    asked = jax.config.jax_default_matmul_precision is not None  # type: ignore[attr-defined]
    reduced = jnp.result_type(*arrays).itemsize < 4
    return None if asked or reduced else jax.lax.Precision.HIGHEST


def matmul(a: Float[Array, "..."], b: Float[Array, "..."], axes: tuple[int, int] = (-1, -2)) -> Array:
    """Multiplies two batches of matrices over one axis of each, a's other axis first; float32 or better."""
    batch = tuple(range(a.ndim - 2))
    return jax.lax.dot_general(
        a,
        b,
        (((a.ndim + axes[0],), (b.ndim + axes[1],)), (batch, batch)),
        precision=precision(a, b),
        preferred_element_type=accumulator(a, b),
    )


def product(a: Float[Array, "*#b t x"], b: Float[Array, "*#b x s"]) -> Float[Array, "*b t s"]:
    """Multiplies matrices in batches that broadcast, a b; float32 or better."""
    return jnp.matmul(a, b, precision=precision(a, b), preferred_element_type=accumulator(a, b))


def not_finite(x: Float[Array, "*b h"]) -> Bool[Array, "*b"]:
    """Returns whether a vector has an infinite or undefined number.

    The mean of such a vector is not finite either, and it is found several times faster than by looking at each number.
    """
    halves = jnp.full((x.shape[-1], 1), 0.5 / x.shape[-1], x.dtype)  # so that rounding cannot make the mean overflow
    return ~jnp.isfinite(product(x, halves)[..., 0])


def one_batch_axis(x: Float[Array, "... t x"]) -> Float[Array, "... t x"]:
    """Removes leading axes of size 1 from x, but for one.

    XLA knows how to turn a product around (aᵀ bᵀ = (b a)ᵀ) only with one batch axis. Larger axes are not merged,
    because they may be sharded.
    """
    batch = x.shape[:-2]
    return x.reshape(-1, *x.shape[-2:]) if sum(n > 1 for n in batch) <= 1 else x


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(rows: Float[Array, "*b t x"], columns: Float[Array, "..."], axis: int) -> Float[Array, "*b t s"]:
    return matmul(rows, columns, (-1, axis))


@_product.defjvp
def _product_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The usual rule for a product.

    Transposed, its second term is d_columns = rowsᵀ · d_out with rowsᵀ made first: a CPU is slow at a product whose
    left operand it has to transpose on the way.
    """
    (rows, columns), (d_rows, d_columns) = primals, tangents
    transposed = jax.lax.optimization_barrier(rows.swapaxes(-1, -2))
    d_out = matmul(d_rows, columns, (-1, axis)) + matmul(transposed, d_columns, (-2, axis))
    return _product(rows, columns, axis), d_out


# Up to so many rows, over all groups, a product on a CPU takes no longer than reading the columns.
FEW_ROWS = 16
# Columns that were gathered for each group are copied once more by `_product_of_few`, since XLA joins gathering with
# what comes after it. With 8 MiB of keys and of values, reading pages took 9.5 ms of a step in place of 4.6; columns
# that lay in memory as they were took 2.3 in place of 1.7 (two CPU cores, AMD EPYC).
GATHERED_BYTES = 2**23


def _product_of_few(rows: Float[Array, "*b k r x"], columns: Float[Array, "*b k s c"], axis: int) -> Array:
    """Computes `_product` for a query or two, as in decoding, which has to read every column once.

    One product of the rows of all groups with the columns of all groups is made, of which each group keeps its own
    part. So columns are read as they lie in memory, [S, K H]. With one product per group XLA would copy them first.
    """
    *batch, groups, count, _ = rows.shape
    own = jnp.eye(groups, dtype=bool)[:, None, :, None]
    flat = columns.swapaxes(-2, -3).reshape(*batch, columns.shape[-2], -1)
    if axis == -1:
        spread = jnp.where(own, rows.swapaxes(-1, -2)[..., None, :], 0)
        products = matmul(flat, spread.reshape(*batch, flat.shape[-1], groups * count))
        # Without the barrier XLA turns the product around, and then transposes the columns.
        products = jax.lax.optimization_barrier(products).reshape(*batch, -1, groups, count)
        return jnp.moveaxis(products, -3, -1)
    across = jax.lax.optimization_barrier(rows.reshape(*batch, groups * count, -1).swapaxes(-1, -2))
    products = matmul(across, flat, (-2, -2)).reshape(*batch, groups, count, groups, -1)
    return jnp.where(own, products, 0).sum(-2)


def grouped_matmul(
    rows: Float[Array, "*b n t x"],
    columns: Float[Array, "*b k x s"] | Float[Array, "*b k s x"],
    axis: int = -2,
    gathered: bool = False,
) -> Float[Array, "*b n t s"]:
    """Returns rows @ columns in float32 or better, where row head n reads column head n // (N / K), never repeated.

    Args:
        rows: [..., N, T, X].
        columns: [..., K, X, S] or [..., K, S, X].
        axis: −2 or −1, the axis X of the columns, which is summed over.
        gathered: Whether the groups may have been gathered from different places. The result is the same.
    """
    *batch, heads, length, width = rows.shape
    groups, size = columns.shape[-3], columns.shape[-3 - axis]
    rows = rows.reshape(*batch, groups, heads // groups * length, width)
    few = groups > 1 and groups * rows.shape[-2] <= FEW_ROWS < columns.shape[-2]
    if few and jax.default_backend() == "cpu" and not (gathered and columns.nbytes <= GATHERED_BYTES):
        return _product_of_few(rows, columns, axis).reshape(*batch, heads, length, size)
    return _product(one_batch_axis(rows), one_batch_axis(columns), axis).reshape(*batch, heads, length, size)
