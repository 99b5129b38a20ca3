"""Attention results form a monoid: weighted means with the log of their total weight.

Tiling, split-K decoding, memory beside local context, shared prefixes and sinks are each one `merge`. Results of many
key sets are merged along an array axis by `merge_axis`, and over the devices of a mesh axis by `psum_merge`.
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
    _check_partial("a", a)
    _check_partial("b", b)
    merged = _merged((a, b), lambda x: x, lambda x: x)
    if max(jnp.ndim(x) for x in (a.out, b.out, a.lse, b.lse)) == 0:  # EMPTY with EMPTY
        return Partial(merged.out.reshape(()), merged.lse)
    return merged


def merge_axis(partials: Partial, axis: int) -> Partial:
    """The result over the keys of all entries along an axis of `lse`, as if they were merged one after the other:

        lse = log Σ_i exp(lse_i),   out = Σ_i exp(lse_i) out_i / exp(lse)

    `axis` is an axis of `lse` [..., T, N], counted from its front or, if negative, from its end; `out` has the same one
    before its last. Split-K decoding is `vmap` of `attend` over parts of the keys, and this over the axis of parts.
    Entries without weight (lse −inf) count for nothing and may hold anything in `out`; where all are, out is 0 and lse
    −inf. Differentiable in both fields. Computed in float32 or better; `out` keeps its dtype.
    Raises TypeError for what is no `Partial` or an axis that is not an int, ValueError for an axis that `lse` has not.
    """
    _check_partial("partials", partials)
    rank = jnp.ndim(partials.lse)
    check_int("axis", axis)
    if not -rank <= axis < rank:
        raise ValueError(f"axis is {axis} but lse has shape {jnp.shape(partials.lse)}: need one of its {rank} axes")
    in_front = jax.tree.map(lambda x: jnp.moveaxis(x, axis % rank, 0), partials)
    return _merged((in_front,), lambda x: x.max(0), lambda x: x.sum(0))


def psum_merge(partial: Partial, axis_name: str | tuple[str, ...]) -> Partial:
    """The result over the keys of all devices along a mesh axis, the same on each; inside `jax.shard_map`.

    `merge_axis` for partials that stand on different devices: keys and values stay where they are, and a mean and a
    number per query travel (tree attention, context parallelism). Devices without keys give lse −inf, and may hold
    anything in `out`. Differentiable in both fields, on every device. `axis_name` names one mesh axis or several.
    Raises TypeError for what is no `Partial`; JAX's own error where no such axis is bound.
    """
    _check_partial("partial", partial)
    return _merged((partial,), lambda x: jax.lax.pmax(x, axis_name), lambda x: jax.lax.psum(x, axis_name))


def with_log_mass(partial: Partial, log_mass: Float[Array, "*#b t n"] | float) -> Partial:
    """The same mean with the total weight exp(log_mass): lse is replaced by log_mass.

    So that something other than the keys' own scores says how much a part counts in a merge: a landmark's score for
    its block (landmark attention, Mohtashami and Jaggi, 2023), or an estimate. The gradient goes to log_mass, and none
    to the lse that was. Where the partial is empty it has no mean, and stays empty. −inf takes all weight away.
    `log_mass` broadcasts to lse [..., T, N]. Raises TypeError for what is no `Partial`, ValueError for other shapes.
    """
    return _replace_lse(partial, log_mass, lambda lse, log_mass: log_mass)


def add_log_mass(partial: Partial, log_mass: Float[Array, "*#b t n"] | float) -> Partial:
    """The same mean with exp(log_mass) times the weight: lse + log_mass, as if that were added to every score.

    log m lets every key count m times, as a key that stands for m others does, and −inf takes all weight away. An
    empty partial stays empty. `log_mass` broadcasts to lse [..., T, N]. Differentiable in both arguments.
    Raises TypeError for what is no `Partial`, ValueError for other shapes.
    """
    return _replace_lse(partial, log_mass, lambda lse, log_mass: lse + log_mass)


def _merged(sides: tuple[Partial, ...], largest: Callable[[Array], Array], total: Callable[[Array], Array]) -> Partial:
    """Over the sides, and over what `largest` and `total` reduce over."""
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
