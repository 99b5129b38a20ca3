"""A part is a frozen dataclass that is a pytree and a pure function.

Every score, bias, mask and normaliser is a part. Array fields are leaves, so they are learned, differentiated, vmapped,
sharded and checkpointed like any other array. Plain fields are static: changing one recompiles.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

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

        @part
        class Scaled:
            scale: Float[Array, ""]      # a leaf: differentiable
            power: int = 1               # static
            def __call__(self, x): return self.scale * x**self.power

    A field annotated with plain Python types (`int`, `float`, `bool`, `str`, `None`, tuples and unions of them) or as a
    `Callable` is static: it is hashed into the compiled program. Every other field (arrays, other parts) is a leaf or a
    subtree. A `__post_init__` runs when a user makes a part, and not when JAX rebuilds one from its leaves.
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

    An array in a static field is refused too, because it would be a constant of the compiled program, without a
    gradient.
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


def inexact_leaves(tree: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """Returns the floating-point leaves of a pytree, which have gradients, and a function that puts them back."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def rebuild(new: list[Array]) -> Any:
        replacements = iter(new)
        pairs = zip(leaves, inexact, strict=True)
        return jax.tree.unflatten(structure, [next(replacements) if is_inexact else leaf for leaf, is_inexact in pairs])

    return [jnp.asarray(leaf) for leaf, is_inexact in zip(leaves, inexact, strict=True) if is_inexact], rebuild


def cotangent(tree: Any, leaves: list[Array]) -> Any:
    """Returns the cotangent of a pytree from those of its `inexact_leaves`; the other leaves get JAX's float0 zeros."""
    given = iter(leaves)

    def of(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.inexact):
            return next(given).astype(dtype)
        return np.zeros(jnp.shape(leaf), jax.dtypes.float0)

    return jax.tree.map(of, tree)
