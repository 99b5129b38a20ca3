"""Names of axes, and the one table of rules that says over which axes of a mesh they are spread.

Every parameter of this package names its axes (metadata `axes` of its `nnx.Param`), and so does every site of a model.
A table of rules maps these names to axes of a mesh:

| axis of the mesh | what it spreads | known as |
|---|---|---|
| `data` | the rows of a batch | data parallelism |
| `fsdp` | the rows of a batch, and every matrix along the width | fully sharded data parallelism |
| `tensor` | heads, hidden units and the vocabulary | tensor parallelism |
| `context` | the tokens of a row | context parallelism |

So the axes that a mesh has say what is done: `jax.make_mesh((2, 4), ("fsdp", "tensor"))` does both. An axis that the
mesh does not have spreads nothing. For your own, change the table: `RULES | {"vocabulary": None}`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxattn.core.attend.api import Implementation, attend, needs_of
from jaxattn.core.attend.call import Given
from jaxattn.core.attend.ring import gathered, ring
from jaxattn.core.attend.slots import Slots
from jaxattn.core.linear.api import linear_attention
from jaxattn.core.linear.sharded import sharded_linear_attention
from jaxattn.core.mesh import Axes, auto_axes, explicit_mesh, in_context, spread

Axis = str | tuple[str, int] | None
"""The name of an axis of an array; (name, count) if it consists of `count` pieces that stay whole on a device, such as
the channels of each head; None for an axis that is never spread."""

Rules = Mapping[str, str | tuple[str, ...] | None]
"""The name of an axis of arrays -> the axis of the mesh over which it is spread, or several, or None."""

RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "heads": "tensor",
    "key_heads": "tensor",
    "head_dim": None,
    "width": "fsdp",
    "hidden": "tensor",
    "vocabulary": "tensor",
    "layers": None,
}
"""The rules for data, fully sharded, tensor and context parallelism, and their mixtures."""

SITE_AXES: dict[str, tuple[Axis, ...]] = {
    **dict.fromkeys(
        ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid", "final_norm"), ("batch", "length", None)
    ),
    **dict.fromkeys(("q", "q_rotated", "z"), ("batch", "length", "heads", None)),
    **dict.fromkeys(("k", "v", "k_rotated"), ("batch", "length", "key_heads", None)),
    "latent": ("batch", "length", None),
    **dict.fromkeys(("mlp_pre", "mlp_post"), ("batch", "length", "hidden")),
    "logits": ("batch", "length", "vocabulary"),
}
"""The axes of the values that a model makes, by site. Activations are not spread along the width."""


def partition_spec(
    axes: tuple[Axis, ...], shape: tuple[int, ...], mesh: Mapping[str, int], rules: Rules = RULES
) -> PartitionSpec:
    """Returns how an array is spread over a mesh.

    Key heads that are fewer than the devices along the axes of their rule are not spread, but stand on each of them. So
    does an axis of one piece.

    Args:
        axes: The names of the axes of the array.
        shape: Its shape.
        mesh: The name of each axis of the mesh -> its number of devices, `mesh.shape`.
        rules: The rules.

    Raises:
        ValueError: There are more or fewer names than axes, the rules do not know a name, or the devices along the
            mesh axes of a rule do not divide the axis of the array.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes are {axes} for an array of shape {shape}: need one name per axis")
    used: set[str] = set()
    spec: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        name, count = axis if isinstance(axis, tuple) else (axis, size)
        chosen = tuple(each for each in _mesh_axes(name, rules) if mesh.get(each, 1) > 1 and each not in used)
        devices = math.prod(mesh[each] for each in chosen)
        if count == 1 or (name == "key_heads" and count < devices):
            chosen, devices = (), 1
        if count % devices:
            raise ValueError(
                f"axis {name!r} of {count} does not divide over the mesh axes {_words(chosen)} of {devices} devices: "
                f"need a multiple of {devices}, another mesh, or rules with {name!r}: None"
            )
        used |= set(chosen)
        spec.append(chosen[0] if len(chosen) == 1 else chosen or None)
    return PartitionSpec(*spec)


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns a pytree like `tree` with the `NamedSharding` of every array.

    Arrays in a `nnx.Variable` that names its `axes` follow the rules, also in optimiser states, which keep variables
    where they have an array per parameter. All other arrays stand whole on every device, and so do arrays with another
    number of axes than their variable names.

    Args:
        tree: A model, its parameters, a training state: arrays or `jax.ShapeDtypeStruct`s.
        mesh: The mesh.
        rules: The rules.

    Raises:
        ValueError: As `partition_spec`; the message names the place in the tree.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def of(path: Any, node: Any) -> Any:
        axes = node.get_metadata().get("axes") if isinstance(node, nnx.Variable) else None

        def of_array(x: Any) -> NamedSharding:
            if axes is None or len(axes) != len(x.shape):
                return whole
            try:
                return NamedSharding(mesh, partition_spec(axes, x.shape, mesh.shape, rules))
            except ValueError as error:
                raise ValueError(f"{jax.tree_util.keystr(path, simple=True, separator='.')}: {error}") from None

        return jax.tree.map(of_array, node)

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def made_on(make: Callable[[], Any], mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns make(), of which each device makes its own part alone: no device holds an array that is spread.

        params = nn.made_on(lambda: nnx.state(models.Transformer(config, rngs=nnx.Rngs(0)), nnx.Param), mesh)

    Args:
        make: A function that makes a pytree, as `shardings` takes it. Under `jax.jit` it draws the same numbers.
        mesh: The mesh.
        rules: The rules.
    """
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh, rules))()


_RULES: ContextVar[Rules | None] = ContextVar("rules", default=None)


@contextmanager
def sharding_rules(rules: Rules = RULES) -> Iterator[None]:
    """Spreads the values that models make by these rules, in programs that are traced inside.

        with jax.set_mesh(mesh), sharding_rules():
            logits = jax.jit(forward)(params, tokens)

    Without rules the compiler chooses a layout from the shardings of parameters and inputs. A step of `train.on_mesh`
    enters its rules itself.

    Args:
        rules: The rules.
    """
    token = _RULES.set(rules)
    try:
        yield
    finally:
        _RULES.reset(token)


def rules_in_force() -> tuple[Any, Rules] | None:
    """Returns the mesh of the context and the rules, or None where there is no mesh or there are no rules."""
    rules, mesh = _RULES.get(), jax.sharding.get_abstract_mesh()
    return None if rules is None or mesh.empty else (mesh, rules)


def constrained(x: jax.Array, axes: tuple[Axis, ...]) -> jax.Array:
    """Returns x, spread over the mesh of the context by the rules in force; x itself where there are none.

    Axes of x that the mesh does not divide, such as the one token of a step of decoding, are not spread. Axes of the
    mesh that are not Auto here (Explicit ones, and those of a `jax.shard_map` around) are left as they are.

    Args:
        x: The array.
        axes: The names of its axes.
    """
    found = rules_in_force()
    if found is None or len(axes) != x.ndim:
        return x
    mesh, rules = found
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}

    def devices(axis: Axis) -> int:
        name = axis[0] if isinstance(axis, tuple) else axis
        return math.prod(auto.get(each, 1) for each in _mesh_axes(name, rules))

    axes = tuple(axis if size % devices(axis) == 0 else None for axis, size in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, auto, rules)) if auto else x


def attend_in_shards(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    slots: Slots,
    *,
    query_positions: Any = None,
    key_positions: Any = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Any:
    """Calls `attend`, around the devices over which the rules in force spread the length, if there are any.

    `ring` serves the call where it can and no other implementation than "tiled" is named, else `gathered`. Where the
    devices do not divide the lengths, as for the one token of a step of decoding, the compiler spreads the call.

    Args:
        query: As in `attend`, [B, T, N, H]; likewise what follows.
        key: [B, S, K, H].
        value: [B, S, K, V].
        slots: The slots of the call.
        query_positions: [T] or [B, T].
        key_positions: [S], [B, S] or [B, S, K].
        return_lse: Whether the lse is returned too.
        implementation: The implementation.
    """
    positions: dict[str, Any] = {"query_positions": query_positions, "key_positions": key_positions}
    axis, devices = _length_axis()
    if devices == 1 or query.shape[1] % devices or key.shape[1] % devices:
        options: dict[str, Any] = {"return_lse": return_lse, "implementation": implementation}
        return attend(query, key, value, **vars(slots), **positions, **options)

    def in_shard(query: Any, key: Any, value: Any, slots: Slots, positions: dict[str, Any]) -> Any:
        if goes_round:
            return ring(query, key, value, axis, **vars(slots), **positions, return_lse=return_lse)
        options: dict[str, Any] = {"return_lse": return_lse, "implementation": implementation}
        return gathered(query, key, value, axis, **vars(slots), **positions, **options)

    def of(x: Any) -> Any:
        """Positions are spread along their length, which is the axis after those of the batch."""
        return None if x is None else PartitionSpec(*(None,) * min(jnp.ndim(x) - 1, 1), axis)

    needs = needs_of(Given(query, key, value, slots, **positions).in_parts())
    goes_round = implementation in ("auto", "tiled") and not (needs["rows"] or needs["matrix"])
    along, whole = PartitionSpec(None, axis), PartitionSpec()
    extras = {name: along if each.over == "rows" else whole for name, each in slots.measures.items()}
    extras |= {"lse": along} if return_lse else {}
    spread = jax.shard_map(
        in_shard,
        in_specs=(along, along, along, whole, {name: of(x) for name, x in positions.items()}),
        out_specs=(along, extras) if extras else along,
        axis_names=set(axis),
    )
    return spread(query, key, value, slots, positions)


def linear_in_shards(query: jax.Array, *, state: Any, segment_ids: Any, **options: Any) -> Any:
    """Calls `linear_attention`, around the devices over which the rules in force spread the length, if there are any.

    Devices then send states to each other, and no tokens.

    Args:
        query: As in `linear_attention`, [B, T, N, K]; likewise what follows.
        state: The state, or None.
        segment_ids: [B, T] or None.
        **options: Other arguments of `linear_attention`.
    """
    axis, devices = _length_axis()
    if devices == 1 or query.shape[1] % devices:
        return linear_attention(query, state=state, segment_ids=segment_ids, **options)
    arrays = {"query": query, "segment_ids": segment_ids}
    arrays |= {name: options.pop(name) for name in ("key", "value", "log_decay", "erase")}
    bonus = options.pop("bonus")
    along, whole = PartitionSpec(None, axis), PartitionSpec()

    def in_shard(arrays: dict[str, Any], bonus: Any, state: Any) -> Any:
        return sharded_linear_attention(axis_name=axis, bonus=bonus, state=state, **arrays, **options)

    specs = jax.tree.map(lambda x: along if jnp.ndim(x) > 1 else whole, arrays)  # a decay of each head has no tokens
    spread = jax.shard_map(in_shard, in_specs=(specs, whole, whole), out_specs=(along, whole), axis_names=set(axis))
    return spread(arrays, bonus, state)


def on_any_mesh(method: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the call of a module work on arrays that are typed by Explicit axes of a mesh, which `jax.make_mesh` makes.

    Inside of such a call the compiler spreads the values. A result [B, T, ...] is spread over rows and tokens as x is.
    A result [B, ...] or [layers, B, ...] is spread over rows as x is. All other results stand whole on every device. A
    call on other arrays is not changed.

    Args:
        method: method(module, x, ...), where x is [B, T, ...]. The records of a `tap` and what it puts into a dict
            `give` are results too.
    """
    signature = inspect.signature(method)
    of_module, of_x, *_ = signature.parameters

    @functools.wraps(method)
    def call(*given: Any, **named: Any) -> Any:
        context = jax.sharding.get_abstract_mesh()
        x: Any = given[1] if len(given) > 1 else named.get(of_x)
        mesh = context if AxisType.Explicit in context.axis_types else explicit_mesh(x)
        if mesh is None:
            return method(*given, **named)
        arguments = dict(signature.bind(*given, **named).arguments)
        own, kept = arguments.pop(of_module), _left_by(arguments)
        tap: Any = arguments.get("tap")
        graph, state = nnx.split(own)
        leaves, structure = jax.tree.flatten((state, arguments, None if tap is None else tap.parts))
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]

        def function(arrays: list[Any]) -> Any:
            given = iter(arrays)
            filled = [next(given) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
            state, arguments, parts = jax.tree.unflatten(structure, filled)
            arguments |= {} if tap is None else {"tap": tap.holding(parts)}
            module, left = nnx.merge(graph, state), _left_by(arguments)
            earlier = [dict(each) for each in left]
            before = jax.tree.leaves(nnx.state(module, nnx.RngCount))
            inside = inspect.BoundArguments(signature, {of_module: module, **arguments})
            result, counts = method(*inside.args, **inside.kwargs), nnx.state(module, nnx.RngCount)
            still = all(a is b for a, b in zip(before, jax.tree.leaves(counts), strict=True))
            new = []
            for each, old in zip(left, earlier, strict=True):
                new.append({name: value for name, value in each.items() if value is not old.get(name)})
                each.clear()
                each.update(old)
            return result, new, None if still else counts

        rows, length, *_ = spread(x)

        def of(result: Any) -> Axes:
            if result.shape[:2] == x.shape[:2]:
                return Axes((rows, length))
            if result.shape[:1] == x.shape[:1]:
                return Axes((rows,))
            return Axes((None, rows)) if result.shape[1:2] == x.shape[:1] else Axes(())

        with in_context(arrays):
            results = jax.eval_shape(auto_axes(function, mesh, Axes()), arrays)
            found, new, counts = auto_axes(function, mesh, jax.tree.map(of, results))(arrays)
        if counts is not None:
            nnx.update(own, counts)
        for each, more in zip(kept, new, strict=True):
            each.update(more)
        return found

    return call


def _left_by(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the dicts among the arguments of a module in which its call leaves values: records, and shared keys."""
    left = getattr(arguments.get("tap"), "records", None), arguments.get("give")
    return [each for each in left if each is not None]


def _length_axis() -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes over which the rules in force spread the length, and the number of devices along them."""
    found = rules_in_force()
    if found is None:
        return (), 1
    mesh, rules = found
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(name for name in _mesh_axes("length", rules) if kinds.get(name) == AxisType.Auto)
    return axes, math.prod(mesh.shape[name] for name in axes)


def _mesh_axes(name: str | None, rules: Rules) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in rules:
        raise ValueError(f"rules do not know the axis {name!r}: need rules for it, such as RULES | {{{name!r}: None}}")
    found = rules[name]
    return (found,) if isinstance(found, str) else tuple(found or ())


def _words(names: tuple[str, ...]) -> str:
    return " and ".join(map(repr, names))
