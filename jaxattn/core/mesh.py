"""Arrays that differ between the devices of a mesh, as `jax.shard_map` types them."""

from typing import Any

import jax
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
