"""Numbers that stay in range: quotients by totals that may be 0, the largest of a row, one number per head."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.custom_jvp
def ratio(x: Array, total: Array) -> Array:
    """Returns x / total, and 0 where total is 0, or so small that its reciprocal is out of range (`in_range`).

    NaN stays NaN. The derivative, dx / total − (x / total) (d total / total), stays in range for the smallest totals,
    where the usual one, with total squared in it, is NaN. Second derivatives hold 1 / total²: in float32 they need
    totals above 1e−19.
    """
    some = in_range(total)
    return jnp.where(some, x / jnp.where(some, total, 1), 0)


def in_range(total: Array) -> Bool[Array, "..."]:
    """Returns whether 1 / total, and sums of some millions of it, are finite: above 2e−31 in float32.

    NaN counts as in range, so that it is not taken for 0.
    """
    return ~(jnp.abs(total) <= 2**24 * jnp.finfo(total.dtype).tiny)


@ratio.defjvp
def _ratio_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x, total), (dx, d_total) = primals, tangents
    result = ratio(x, total)
    return result, ratio(dx, total) - result * ratio(d_total, total)


def largest(
    x: Array, visible: Bool[Array, "*#b #n t s"] | None, k: int
) -> tuple[Bool[Array, "*b n t s"], Int[Array, "*b n t k"]]:
    """Returns which visible entries of each row are its k largest (ties: the first), and the k indices in order."""
    shown = jnp.broadcast_to(True if visible is None else visible, x.shape)
    ranked = jnp.where(shown, jax.lax.stop_gradient(x), -jnp.inf)
    _, index = jax.lax.top_k(ranked, min(k, x.shape[-1]))
    chosen = jnp.put_along_axis(jnp.zeros(x.shape, bool), index, True, axis=-1, inplace=False)
    return chosen & shown, index


def per_head(name: str, value: Any, block: Array) -> Array:
    """Returns a number, or one per head [N], shaped to broadcast against a block [..., N, T, S], in its dtype.

    Raises:
        ValueError: The value has any other shape.
    """
    heads = block.shape[-3]
    if jnp.shape(value) not in ((), (heads,)):
        raise ValueError(f"{name} has shape {jnp.shape(value)}: need one per head, ({heads},)")
    value = jnp.asarray(value, block.dtype)
    return value[:, None, None] if value.ndim else value
