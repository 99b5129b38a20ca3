"""Attention results form a monoid: weighted means with the log of their total weight.

Tiling, split-K decoding, memory beside local context, shared prefixes and sinks are each one `merge`. `merge_axis`
merges the results of many key sets along an array axis, and `psum_merge` over the devices of a mesh axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.checks import check_int
from jaxattn.core.part import part


@part
class Partial:
    """A mean of values under positive weights, and the log of the sum of the weights.

        out, extras = attend(..., return_lse=True)
        Partial(out, extras["lse"])

    is the partial result for the keys of the call, under a normaliser whose weights sum to one. `Sigmoid` gives a sum
    instead: its mean is out · exp(−lse).

    Attributes:
        out: [..., T, N, V].
        lse: [..., T, N].
    """

    out: Float[Array, "*b t n v"]
    lse: Float[Array, "*b t n"]


EMPTY = Partial(0.0, -float("inf"))  # type: ignore[arg-type]
"""The result over no keys: `merge(p, EMPTY) == p`. Scalars, which broadcast against any result; the carry of a loop
needs its final shape, `Partial(jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf))`."""


def merge(a: Partial, b: Partial) -> Partial:
    """Returns the result over the keys of both partial results:

        lse = log(exp(lse_a) + exp(lse_b)),   out = (exp(lse_a) out_a + exp(lse_b) out_b) / exp(lse)

    The operation is associative and commutative, with `EMPTY` as unit. Where both are empty, out is 0 and lse −inf. It
    is differentiable in both fields of both arguments, also where one side is empty. Sums are computed in float32 or
    better; `out` keeps its dtype.

    Args:
        a: The first partial result.
        b: The second partial result.

    Raises:
        TypeError: An argument is not a `Partial`.
    """
    _check_partial("a", a)
    _check_partial("b", b)
    merged = _merged((a, b), lambda x: x, lambda x: x)
    if max(jnp.ndim(x) for x in (a.out, b.out, a.lse, b.lse)) == 0:  # EMPTY with EMPTY
        return Partial(merged.out.reshape(()), merged.lse)
    return merged


def merge_axis(partials: Partial, axis: int) -> Partial:
    """Merges all entries along an axis of `lse`, as if they were merged one after the other:

        lse = log Σ_i exp(lse_i),   out = Σ_i exp(lse_i) out_i / exp(lse)

    Split-K decoding is `vmap` of `attend` over parts of the keys, and this function over the axis of parts. Entries
    without weight (lse −inf) count for nothing and may hold anything in `out`. Where all entries are without weight,
    out is 0 and lse −inf. The result is differentiable in both fields. Sums are computed in float32 or better; `out`
    keeps its dtype.

    Args:
        partials: The partial results.
        axis: An axis of `lse` [..., T, N], counted from its front or, if negative, from its end. `out` has the same
            axis before its last.

    Raises:
        TypeError: `partials` is not a `Partial`, or `axis` is not an int.
        ValueError: `lse` has no such axis.
    """
    _check_partial("partials", partials)
    rank = jnp.ndim(partials.lse)
    check_int("axis", axis)
    if not -rank <= axis < rank:
        raise ValueError(f"axis is {axis} but lse has shape {jnp.shape(partials.lse)}: need one of its {rank} axes")
    in_front = jax.tree.map(lambda x: jnp.moveaxis(x, axis % rank, 0), partials)
    return _merged((in_front,), lambda x: x.max(0), lambda x: x.sum(0))


def psum_merge(partial: Partial, axis_name: str | tuple[str, ...]) -> Partial:
    """Returns the result over the keys of all devices along a mesh axis, the same on each; inside `jax.shard_map`.

    This function is `merge_axis` for partial results that stand on different devices. Keys and values stay where they
    are, and a mean and a number per query travel (tree attention, context parallelism). Devices without keys give lse
    −inf, and may hold anything in `out`. The result is differentiable in both fields, on every device.

    Args:
        partial: The partial result on this device.
        axis_name: The name of a mesh axis, or of several. Where no such axis is bound, JAX raises its own error.

    Raises:
        TypeError: `partial` is not a `Partial`.
    """
    _check_partial("partial", partial)
    return _merged((partial,), lambda x: jax.lax.pmax(x, axis_name), lambda x: jax.lax.psum(x, axis_name))


def with_log_mass(partial: Partial, log_mass: Float[Array, "*#b t n"] | float) -> Partial:
    """Returns the same mean with the total weight exp(log_mass): lse is replaced by log_mass.

    A merge then weighs the part by something other than the keys' own scores: a landmark's score for its block
    (landmark attention, Mohtashami and Jaggi, 2023), or an estimate. The gradient goes to log_mass, and none to the
    former lse. Where the partial result is empty it has no mean, and stays empty. −inf takes all weight away.

    Args:
        partial: The partial result.
        log_mass: An array that broadcasts to lse [..., T, N].

    Raises:
        TypeError: `partial` is not a `Partial`.
        ValueError: `log_mass` has another shape.
    """
    return _replace_lse(partial, log_mass, lambda lse, log_mass: log_mass)


def add_log_mass(partial: Partial, log_mass: Float[Array, "*#b t n"] | float) -> Partial:
    """Returns the same mean with exp(log_mass) times the weight: lse + log_mass, as if it were added to every score.

    log m lets every key count m times, as a key that stands for m others does. −inf takes all weight away. An empty
    partial result stays empty. The result is differentiable in both arguments.

    Args:
        partial: The partial result.
        log_mass: An array that broadcasts to lse [..., T, N].

    Raises:
        TypeError: `partial` is not a `Partial`.
        ValueError: `log_mass` has another shape.
    """
    return _replace_lse(partial, log_mass, lambda lse, log_mass: lse + log_mass)


def _merged(sides: tuple[Partial, ...], largest: Callable[[Array], Array], total: Callable[[Array], Array]) -> Partial:
    """Merges the sides, and the entries that `largest` and `total` reduce over."""
    out_dtype = jnp.result_type(*(side.out for side in sides))
    dtype = jnp.promote_types(jnp.result_type(*(side.lse for side in sides)), jnp.float32)
    each = [(jnp.asarray(side.lse).astype(dtype), jnp.asarray(side.out)) for side in sides]
    # The reference cancels out. It is held constant before it is reduced: the largest over devices has no derivative.
    top = largest(functools.reduce(jnp.maximum, [jax.lax.stop_gradient(lse) for lse, _ in each]))
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = [jnp.exp(lse - top) for lse, _ in each]
    mass = total(functools.reduce(jnp.add, weights))
    # A side without weight may hold anything.
    parts = [w[..., None] * jnp.where(w[..., None] == 0, 0, out) for w, (_, out) in zip(weights, each, strict=True)]
    seen = mass != 0
    mass = jnp.where(seen, mass, 1)
    out = total(functools.reduce(jnp.add, parts)) / mass[..., None]
    return Partial(out.astype(out_dtype), jnp.where(seen, top + jnp.log(mass), -jnp.inf))


def _replace_lse(partial: Partial, log_mass: Any, of: Callable[[Array, Array], Array]) -> Partial:
    _check_partial("partial", partial)
    lse = jnp.asarray(partial.lse)
    try:
        fits = np.broadcast_shapes(jnp.shape(log_mass), lse.shape) == lse.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"log_mass has shape {jnp.shape(log_mass)}: need one that broadcasts to lse, {lse.shape}")
    dtype = jnp.promote_types(jnp.result_type(lse, log_mass), jnp.float32)
    empty = jnp.isneginf(lse)
    new = of(jnp.where(empty, 0, lse).astype(dtype), jnp.asarray(log_mass, dtype))
    return Partial(partial.out, jnp.where(empty, -jnp.inf, new))


def _check_partial(name: str, given: Any) -> None:
    if not isinstance(given, Partial):
        raise TypeError(f"{name} must be a Partial(out, lse), got {type(given).__name__}")
