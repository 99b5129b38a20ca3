"""Arrays spread over the devices of a mesh, as the types of JAX say: by `jax.shard_map`, or by Explicit axes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def mesh_axes(tree: Any) -> frozenset[str]:
    """Returns the mesh axes over which some leaf differs between devices, inside `jax.shard_map`; else none."""
    return frozenset[str]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Returns the same arrays, typed as differing over these mesh axes, as a loop's carry and a cotangent must be."""

    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def vary_like(tree: Any, like: Any) -> Any:
    """Applies `vary` over the axes over which `like` differs."""
    return vary(tree, mesh_axes(like))


def spread(x: Any) -> "Axes":
    """Returns the Explicit mesh axes over which each axis of an array is spread: names, tuples of names, or None."""
    sharding = jax.typeof(x).sharding
    explicit = {
        name
        for name, kind in zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }

    def kept(entry: Any) -> Any:
        names = tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name in explicit)
        return names[0] if len(names) == 1 else names or None

    spec = tuple(map(kept, sharding.spec))
    return Axes(spec + (None,) * (x.ndim - len(spec)))


def explicit_mesh(tree: Any) -> Any:
    """Returns the mesh with Explicit axes by which an array of the tree is typed, or None."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types:
            return jax.typeof(leaf).sharding.mesh
    return None


def under_auto_axes(function: Callable[[Any], Any], given: Any, out: Callable[[], Any]) -> Any:
    """Returns function(given). If Explicit mesh axes type `given`, the function runs under Auto axes.

    Args:
        function: A function of one pytree, without other arrays that are typed so.
        given: The pytree.
        out: Makes the `Axes` of the results, in a pytree that is a prefix of theirs. Called only where there are
            Explicit axes.
    """
    mesh = explicit_mesh(given)
    if mesh is None:
        return function(given)
    with in_context(given):
        return auto_axes(function, mesh, out())(given)


@contextmanager
def in_context(tree: Any) -> Iterator[None]:
    """Enters the mesh of an array of the tree, if there is no mesh yet and nothing is traced."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    if traced or not jax.sharding.get_abstract_mesh().empty or explicit_mesh(leaves) is None:
        yield
        return
    first: Any = next(x for x in leaves if explicit_mesh(x) is not None)
    with jax.set_mesh(first.sharding.mesh):
        yield


def auto_axes(function: Callable[..., Any], mesh: Any, spread: Any) -> Callable[..., Any]:
    """Returns the function as it runs under Auto axes, with results that are spread over the mesh as the `Axes` say.

    Args:
        function: The function.
        mesh: The mesh, where there is none in the context.
        spread: The `Axes` of the results, in a pytree that is a prefix of theirs.
    """
    context = jax.sharding.get_abstract_mesh()
    mesh = mesh if context.empty else context
    specs = jax.tree.map(
        lambda axes: NamedSharding(mesh, PartitionSpec(*axes)), spread, is_leaf=lambda x: isinstance(x, Axes)
    )
    return jax.sharding.auto_axes(function, out_sharding=specs)


class Axes(tuple):
    """The mesh axes of one result, as `spread` says them."""
