"""What a part is: a frozen dataclass that is a pytree and a pure function.

Every score, bias, mask and normaliser is one. Array fields are leaves, so they are learned, differentiated, vmapped,
sharded and checkpointed like any other array; plain fields are static, so they choose what is compiled.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num

_PLAIN = (int, float, bool, str, type(None), ...)
_CONTAINERS = (typing.Union, types.UnionType, tuple, typing.Literal)

T = TypeVar("T")


def _is_static(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Callable or origin is Callable:
        return True
    if origin is typing.Literal:
        return True
    if origin in _CONTAINERS:
        return all(_is_static(argument) for argument in typing.get_args(hint))
    return any(hint is plain for plain in _PLAIN)


@typing.dataclass_transform(frozen_default=True)
def part(cls: type[T]) -> type[T]:
    """Makes `cls` a part: a frozen dataclass registered with JAX as a pytree.

    A field annotated with plain Python types (`int`, `float`, `bool`, `str`, `None`, tuples and unions of them) or as
    a `Callable` is static: it is hashed into the compiled program. Every other field (arrays, other parts) is a leaf or
    a subtree. A `__post_init__` runs when a user makes a part, and not when JAX rebuilds one from its leaves.

        @part
        class Scaled:
            scale: Float[Array, ""]      # a leaf: differentiable
            power: int = 1               # static
            def __call__(self, x): return self.scale * x**self.power
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    static = [name for name in names if _is_static(hints[name])]
    leaves = [name for name in names if name not in static]

    # Not register_dataclass: to it, structures of two classes with the same fields are equal, so a compiled program
    # for `a & b` could be taken for `a | b` (JAX 0.10 to 0.12).
    def children(value):
        return tuple(getattr(value, name) for name in leaves), tuple(getattr(value, name) for name in static)

    def children_with_keys(value):
        data, meta = children(value)
        return tuple((jax.tree_util.GetAttrKey(name), x) for name, x in zip(leaves, data, strict=True)), meta

    def rebuild(meta, data):
        # Without __init__: JAX also builds parts whose leaves are placeholders, which no check would let through.
        new = object.__new__(cls)
        for name, x in zip((*leaves, *static), (*data, *meta), strict=True):
            object.__setattr__(new, name, x)
        return new

    jax.tree_util.register_pytree_with_keys(cls, children_with_keys, rebuild, children)
    return cls


def check_fields(slot: str, value: Any) -> None:
    """Raises TypeError if a field of a part (or of a part inside it) is not what its annotation says.

    An array in a static field is refused too: it would be a constant of the compiled program, without a gradient.
    """
    if not dataclasses.is_dataclass(value):
        return
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        given, name = getattr(value, field.name), f"{slot}: {type(value).__name__}.{field.name}"
        is_array = hasattr(given, "shape") and hasattr(given, "dtype")
        allowed = typing.get_args(hints[field.name]) or (hints[field.name],)
        kinds = [hint for hint in allowed if hasattr(hint, "dims")]
        got = f"{given.dtype}[{','.join(map(str, given.shape))}]" if is_array else repr(given)
        inner = typing.get_args(hints[field.name])[0] if typing.get_origin(hints[field.name]) is tuple else None
        for each, hint in [(x, inner) for x in given] if inner else [(given, hints[field.name])]:
            if isinstance(hint, type) and getattr(hint, "__abstractmethods__", None) and not isinstance(each, hint):
                raise TypeError(f"{name} must be a {hint.__name__}, got {each!r}")
            if inner:
                check_fields(slot, each)
        if dataclasses.is_dataclass(given):
            check_fields(slot, given)
        elif isinstance(given, np.ndarray | jax.Array) and _is_static(hints[field.name]):
            raise TypeError(f"{name} is static, so an array would get no gradient: need a Python value, got {got}")
        elif kinds:
            wanted = " or ".join(f"{kind.__name__.split('[')[0]}[Array, '{kind.dim_str.strip()}']" for kind in kinds)
            if is_array and not isinstance(given, jax.ShapeDtypeStruct):
                right = any(isinstance(jnp.asarray(given), kind) for kind in kinds)
            else:
                plain = [hint for hint in allowed if hint in _PLAIN] + [int] * (float in allowed)
                right = is_array or isinstance(given, tuple(plain))
            if not right:
                raise TypeError(f"{name} must be {wanted}, got {got}")


MOST = 2**30  # so that the sum of two of these, or of one and a position, fits an int32


def check_int(name: str, value: Any) -> None:
    """Raises TypeError for what is not an int, of Python or of NumPy; a bool is none."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_static_int(owner: str, name: str, value: Any, least: int) -> None:
    """Raises unless `value` is an int from `least` to `MOST`; for the `__post_init__` of parts."""
    check_int(f"{owner}: {name}", value)
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")
    if value > MOST:
        raise ValueError(f"{owner}: {name} must be at most 2**30, got {value}")


def check_positive(owner: str, name: str, value: Any) -> None:
    """Raises ValueError for a Python number that is not positive, TypeError for what is neither number nor array.

    Arrays and None are not looked at.
    """
    if isinstance(value, int | float | np.number) and not value > 0:
        raise ValueError(f"{owner}: {name} must be positive, got {value}")
    if value is not None and not isinstance(value, int | float) and not hasattr(value, "dtype"):
        raise TypeError(f"{owner}: {name} must be a number or an array, got {value!r}")


def check_all_positive(owner: str, name: str, value: Any) -> None:
    """As `check_positive`, and raises ValueError for arrays whose numbers are known and not all positive."""
    if not isinstance(value, np.number):
        check_positive(owner, name, value)
    check_range(f"{owner}: {name}", value, lambda x: x > 0, "above 0")


@jax.custom_jvp
def ratio(x: Array, total: Array) -> Array:
    """x / total, and 0 where total is 0, or so small that its reciprocal is out of range (`in_range`). NaN stays NaN.

    Its derivative, dx / total − (x / total) (d total / total), stays in range for the least of totals, where the usual
    one, with total squared in it, is NaN. Second derivatives hold 1 / total²: in float32 they need totals above 1e−19.
    """
    some = in_range(total)
    return jnp.where(some, x / jnp.where(some, total, 1), 0)


def in_range(total: Array) -> Bool[Array, "..."]:
    """Whether 1 / total, and sums of some millions of it, are finite: above 2e−31 in float32. True for NaN, which is
    thus not taken for 0."""
    return ~(jnp.abs(total) <= 2**24 * jnp.finfo(total.dtype).tiny)


@ratio.defjvp
def _ratio_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x, total), (dx, d_total) = primals, tangents
    result = ratio(x, total)
    return result, ratio(dx, total) - result * ratio(d_total, total)


def mesh_axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which some leaf differs between devices, inside `jax.shard_map`; else none."""
    return frozenset[str]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """The same arrays, typed as differing over these mesh axes, as a loop's carry and a cotangent have to be."""

    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def vary_like(tree: Any, like: Any) -> Any:
    """`vary` over the axes over which `like` differs."""
    return vary(tree, mesh_axes(like))


def largest(
    x: Array, visible: Bool[Array, "*#b #n t s"] | None, k: int
) -> tuple[Bool[Array, "*b n t s"], Int[Array, "*b n t k"]]:
    """Which of the visible entries of each row are its k largest (ties: the first), and all their indices in order."""
    shown = jnp.broadcast_to(True if visible is None else visible, x.shape)
    ranked = jnp.where(shown, jax.lax.stop_gradient(x), -jnp.inf)
    _, index = jax.lax.top_k(ranked, min(k, x.shape[-1]))
    chosen = jnp.put_along_axis(jnp.zeros(x.shape, bool), index, True, axis=-1, inplace=False)
    return chosen & shown, index


def count_ids(owner: str, ids: Any, size: int | None) -> int:
    """`size`, or if it is None one more than the largest of the ids, for the `__post_init__` of parts.

    Raises ValueError if the ids are traced, and so unknown, or if the size is not at least 1.
    """
    if size is None:
        if isinstance(ids, jax.core.Tracer):
            raise ValueError(f"{owner}: groups is traced, so their number is not known: need size=")
        size = int(np.max(np.asarray(ids), initial=0)) + 1
    check_static_int(owner, "size", size, 1)
    return size


def per_head(name: str, value: Any, block: Array) -> Array:
    """A number, or one per head [N], shaped to broadcast against a block [..., N, T, S], in its dtype.

    Raises ValueError for any other shape.
    """
    heads = block.shape[-3]
    if jnp.shape(value) not in ((), (heads,)):
        raise ValueError(f"{name} has shape {jnp.shape(value)}: need one per head, ({heads},)")
    value = jnp.asarray(value, block.dtype)
    return value[:, None, None] if value.ndim else value


def positions_fit(positions: tuple[int, ...], batch: tuple[int, ...], length: int) -> bool:
    """Whether positions of this shape are [..., length] with batch axes that broadcast to `batch`."""
    pairs = zip(positions[-2::-1], batch[::-1], strict=False)
    return len(positions) <= len(batch) + 1 and positions[-1:] == (length,) and all(a in (1, b) for a, b in pairs)


def check_segments(segment_ids: Any, shape: tuple[int, ...]) -> None:
    """Raises unless these are integers that broadcast to `shape`, [..., T], and do not decrease along T where known."""
    if not hasattr(segment_ids, "shape"):
        raise TypeError(f"segment_ids must be an array, got {type(segment_ids).__name__}")
    if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {jnp.result_type(segment_ids)}")
    if not positions_fit(tuple(segment_ids.shape), tuple(shape[:-1]), shape[-1]):
        raise ValueError(f"segment_ids has shape {segment_ids.shape}: need [..., {shape[-1]}] that fits {shape}")
    if isinstance(segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(segment_ids)
    if (ids[..., 1:] < ids[..., :-1]).any():
        raise ValueError("segment_ids decreases along the tokens: need segments one after the other")


def check_array(name: str, x: Any) -> None:
    """Raises TypeError for what holds no numbers: lists, strings, and shapes without an array."""
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(f"{name} is a ShapeDtypeStruct, which holds no numbers: need an array, or jax.eval_shape")
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")


def as_ids(x: Any) -> Int[Array, "..."]:
    """Integers in at least 32 bits, in which a comparison with a size does not wrap as it may in 8: 258 is 2 there."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.int32))


def check_floating(name: str, x: Any) -> None:
    """Raises TypeError for what is no array of floating-point numbers."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}: need floating point")


def check_tokens(name: str, x: Any) -> None:
    """Raises unless these are floating point, [..., length, heads, channels]."""
    check_floating(name, x)
    if len(x.shape) < 3 or 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}: need [..., length, heads, channels], none of them empty")


def check_range(name: str, x: Any, allowed: Callable[[np.ndarray], np.ndarray], wanted: str) -> None:
    """Raises ValueError where the numbers are known and not all allowed."""
    if x is None or isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    numbers = np.asarray(x)
    if not (fine := allowed(numbers)).all():
        raise ValueError(f"{name} holds {numbers[~fine].ravel()[0]}: need numbers {wanted}")


def check_probability(name: str, x: Any) -> None:
    """Raises ValueError where the numbers are known and not all from 0 to 1."""
    check_range(name, x, lambda p: (p >= 0) & (p <= 1), "from 0 to 1")


def on_shared_axis(size: int, positions: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
    """The positions along an axis of a table. An axis of size 1 is shared by all of them: 0, or −1 if all are empty."""
    return jnp.minimum(positions, 0).max(axis, keepdims=True) if size == 1 else positions


def check_entries(owner: str, name: str, table: Any, *positions: Any) -> None:
    """Raises ValueError for a table of one entry in a call of several positions along one of its axes.

    An entry is what one token is (its document, its neighbours). One for all tokens could mean that they share it, or
    that the others are outside the table.
    """
    most = max(max(places.shape[-2:]) for places in positions)
    if table.shape[-1] == 1 and most > 1:
        raise ValueError(f"{owner}: {name} has 1 entry but the call has {most} positions: need one for each")


def take_pairs(table: Array, query: Int[Array, "..."], key: Int[Array, "..."], grid: int, fill: Any) -> Array:
    """out[..., n, g] = table[..., n, query, key], or `fill` outside the table [..., 1 or N, P, R]."""
    rows, columns = table.shape[-2:]
    inside = (query >= 0) & (query < rows) & (key >= 0) & (key < columns)
    index = jnp.where(inside, query * columns + key, -1)
    return take(jnp.reshape(table, (*table.shape[:-2], rows * columns)), index, grid, fill)


def take(table: Num[Array, "*b n p"] | Bool[Array, "*b n p"], index: Int[Array, "..."], grid: int, fill: Any) -> Array:
    """Looks positions up in a table: out[..., n, g] = table[..., n, index[..., n, g]], `fill` outside the table.

    `index` is [..., 1 or n, *g] where g are its last `grid` axes; batch and head axes broadcast against the table's.
    """
    shape = index.shape[len(index.shape) - grid :]
    flat = index.reshape(*index.shape[: index.ndim - grid], -1)
    rank = max(table.ndim, flat.ndim)
    table, flat = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (table, flat))
    inside = (flat >= 0) & (flat < table.shape[-1])
    found = jnp.take_along_axis(table, jnp.where(inside, flat, 0), axis=-1)
    found = jnp.where(inside, found, jnp.asarray(fill, found.dtype))
    return found.reshape(*found.shape[:-1], *shape)


def inexact_leaves(tree: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """The floating-point leaves of a pytree (those with gradients), and the function that puts such leaves back."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def rebuild(new: list[Array]) -> Any:
        replacements = iter(new)
        pairs = zip(leaves, inexact, strict=True)
        return jax.tree.unflatten(structure, [next(replacements) if is_inexact else leaf for leaf, is_inexact in pairs])

    return [jnp.asarray(leaf) for leaf, is_inexact in zip(leaves, inexact, strict=True) if is_inexact], rebuild


def cotangent(tree: Any, leaves: list[Array]) -> Any:
    """The cotangent of a pytree from those of its `inexact_leaves`; the other leaves get JAX's float0 zeros."""
    given = iter(leaves)

    def of(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.inexact):
            return next(given).astype(dtype)
        return np.zeros(jnp.shape(leaf), jax.dtypes.float0)

    return jax.tree.map(of, tree)
