"""Attention results form a monoid: weighted means with the log of their total weight.

Tiling, split-K decoding, memory beside local context, shared prefixes and sinks are each one `merge`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.part import part


@part
class Partial:
    """A mean of values under positive weights, `out` [..., T, N, V], and the log of their sum, `lse` [..., T, N].

    `Partial(out, extras["lse"])` of `out, extras = attend(..., return_lse=True)` is the partial result for its keys,
    under a normaliser whose weights sum to one (`Sigmoid` gives a sum: its mean is out · exp(−lse)).
    """

    out: Float[Array, "*b t n v"]
    lse: Float[Array, "*b t n"]


EMPTY = Partial(0.0, -float("inf"))  # type: ignore[arg-type]
"""The result over no keys: `merge(p, EMPTY) == p`. Scalars, which broadcast against any result; the carry of a loop
needs its final shape, `Partial(jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf))`."""


def merge(a: Partial, b: Partial) -> Partial:
    """The result over the keys of both:

        lse = log(exp(lse_a) + exp(lse_b)),   out = (exp(lse_a) out_a + exp(lse_b) out_b) / exp(lse)

    Associative and commutative, with `EMPTY` as unit; where both are empty, out is 0 and lse −inf. Differentiable in
    both fields of both arguments, also where one side is empty. Computed in float32 or better; `out` keeps its dtype.
    Raises TypeError for arguments that are no `Partial`.
    """
    for name, given in (("a", a), ("b", b)):
        if not isinstance(given, Partial):
            raise TypeError(f"{name} must be a Partial(out, lse), got {type(given).__name__}")
    out_dtype = jnp.result_type(a.out, b.out)
    a, b = jax.tree.map(jnp.asarray, (a, b))
    dtype = jnp.promote_types(jnp.result_type(a.lse, b.lse), jnp.float32)
    lse_a, lse_b = a.lse.astype(dtype), b.lse.astype(dtype)
    top = jnp.maximum(lse_a, lse_b)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    seen = total != 0
    safe_total = jnp.where(seen, total, 1)
    # A side without weight may hold anything.
    sides = ((weight_a[..., None], a.out), (weight_b[..., None], b.out))
    out = sum(weight * jnp.where(weight == 0, 0, of_side) for weight, of_side in sides) / safe_total[..., None]
    if a.out.ndim == b.out.ndim == lse_a.ndim == lse_b.ndim == 0:  # EMPTY with EMPTY
        out = out.reshape(())
    return Partial(out.astype(out_dtype), jnp.where(seen, top + jnp.log(safe_total), -jnp.inf))
