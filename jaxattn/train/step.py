"""One training step as a pure function, and the wrappers that run it: on one device, on a mesh, by pmap.

The loss is a sum over tokens, and so is its gradient. Both are summed over micro-batches and devices first and divided
by the number of tokens last, so every way of cutting a batch gives the gradient of the same mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxattn.nn.sharding import RULES, Rules, made_on, partition_spec, sharding_rules, shardings
from jaxattn.train.optimizer import evaluation_params, loss_scale

Params = Any
Metrics = dict[str, jax.Array]
LossFunction = Callable[..., Any]
"""(params, batch, key) -> (total, sums): sums over the batch's tokens, `weight` (their number) among them. `key` is a
PRNG key in training, and None in evaluation, where nothing is random. Or a scalar, the mean over the batch's rows.

Arrays that such a function closes over, as the parameters of a teacher, are constants of the compiled step. Arrays of a
`jax.tree_util.Partial`, as those of `module_loss` are, are arguments of it: on one device and by pmap it compiles
faster, and holds no copy of them."""


class State(NamedTuple):
    """The state that a run carries from step to step.

    Attributes:
        step: The number of steps done, int32 `[]`.
        params: The parameters.
        opt_state: The optimiser's state.
        key: The run's random key.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array


Step = Callable[[State, Any], tuple[State, Metrics]]


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> State:
    """Returns the state before step 0.

    Arrays are copied: steps give a state's memory away, and the caller keeps its own.

    Args:
        params: The parameters, or a function without arguments that makes them. On a mesh each device then makes its
            own part alone, so that no device ever holds an array that is spread.
        optimizer: The optimiser.
        key: The run's random key.
        mesh: A mesh over which the state is spread, as `on_mesh` keeps it.
        rules: The rules by which it is spread.

    Raises:
        ValueError: As `nn.shardings`.
    """

    def before(params: Params) -> State:
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)

    def make() -> State:
        return before(params())

    if mesh is not None and is_function(params):
        return made_on(make, mesh, rules)
    if mesh is not None:
        spread = shardings(jax.eval_shape(before, params), mesh, rules)
        return jax.jit(before, out_shardings=spread)(jax.tree.map(_put, params, spread.params))
    params = params() if is_function(params) else params
    params, key = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (params, key))
    own = {id(leaf) for leaf in jax.tree.leaves(params)}  # an optimiser may keep the parameters themselves
    opt_state = jax.tree.map(
        lambda leaf: jnp.array(leaf, copy=True) if id(leaf) in own else leaf, optimizer.init(params)
    )
    return State(jnp.zeros((), jnp.int32), params, opt_state, key)


def is_function(params: Any) -> bool:
    """Returns whether these are no parameters, but a function that makes them."""
    return callable(params) and jax.tree_util.all_leaves([params])


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Returns x as it is to be spread. Each process puts its part of what all processes have on its own devices."""
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])


def make_step(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> Step:
    """Makes a pure function step(state, batch) -> (state, metrics) that descends the mean loss over a batch's tokens.

    With totals Lᵢ(θ) and weights wᵢ over the micro-batches (and, given an `axis_name`, the devices) i:

        loss = Σᵢ Lᵢ / Σᵢ wᵢ,    gradient = Σᵢ ∇Lᵢ / Σᵢ wᵢ,    θ ← θ + optimizer(gradient)

    `batch` is a pytree of arrays `[B, ...]`. With an `axis_name` the step sees its device's part of it. The random
    numbers of a step are those of fold_in(state.key, state.step), folded with the device and the micro-batch where
    these are several: a resumed run draws the same numbers as an uninterrupted one. Metrics are float32 scalars:
    `loss`, `grad_norm` (before clipping), and Σ/Σw for every sum but `weight`, which is the number of tokens itself. A
    batch whose weights are all 0 has loss and gradient 0.

    A loss function that returns a scalar m is taken as a mean over rows, all of which weigh the same: Lᵢ = mᵢ · rowsᵢ
    and wᵢ = rowsᵢ. If it is a mean over tokens, and micro-batches or devices have different numbers of them, that is
    not the mean over the tokens of the batch: such a loss has to return (total, sums).

    The optimiser is given the loss as `value`, as `optax.contrib.reduce_on_plateau` needs it. With `loss_scaling` the
    metrics have `loss_scale`, and `skipped`, 1 for a step that changed nothing, whose gradient overflowed.

    Args:
        loss_fn: loss_fn(params, batch, key) -> (total, sums), with the weight among the sums, or a scalar.
        optimizer: The optimiser.
        accumulate: The number of micro-batches that a batch is cut in, at least 1. They are worked off in turn, for
            memory. Micro-batch i holds rows i, i+accumulate, ..., which leaves rows where they are when a mesh shards
            them.
        axis_name: The name of the axis of devices, or None.

    Raises:
        ValueError: `accumulate` is below 1 or, when tracing, does not divide the batch.
        TypeError: When tracing, the loss function returns neither (total, sums) nor a scalar.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}: need at least 1 micro-batch")

    update = optax.with_extra_args_support(optimizer).update

    def scaled_sums_and_gradients(loss_fn: LossFunction, scale: Any, params: Params, batch: Any, key: jax.Array) -> Any:
        def scaled(params: Params) -> Any:
            total, sums = _checked(loss_fn, params, batch, key)
            return total if scale is None else total * scale, {"loss": total, **sums}

        (_, sums), gradients = jax.value_and_grad(scaled, has_aux=True)(params)
        return sums, gradients

    def step(loss_fn: LossFunction, state: State, batch: Any) -> tuple[State, Metrics]:
        scale = loss_scale(state.opt_state)
        sums_and_gradients = partial(scaled_sums_and_gradients, loss_fn, scale)
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if accumulate == 1:
            sums, gradients = sums_and_gradients(state.params, batch, key)
        else:
            micro_batches = _micro_batches(batch, accumulate)
            keys = jax.random.split(key, accumulate)

            def add(accumulated: Any, inputs: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, accumulated, sums_and_gradients(state.params, *inputs)), None

            first = jax.tree.map(lambda array: array[0], (micro_batches, keys))
            zeros = jax.tree.map(
                lambda array: jnp.zeros(array.shape, array.dtype),
                jax.eval_shape(sums_and_gradients, state.params, *first),
            )
            (sums, gradients), _ = jax.lax.scan(add, zeros, (micro_batches, keys))
        if axis_name is not None:
            sums, gradients = jax.lax.psum((sums, gradients), axis_name)
        weight = sums.pop("weight")
        per_token = 1 / jnp.where(weight == 0, 1, weight)
        factor = per_token if scale is None else per_token / scale
        gradients = jax.tree.map(lambda gradient: (gradient * factor).astype(gradient.dtype), gradients)
        metrics = {name: value * per_token for name, value in sums.items()}
        updates, opt_state = update(gradients, state.opt_state, state.params, value=metrics["loss"])
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradients)
        if scale is not None and (following := loss_scale(opt_state)) is not None:
            skipped = following < scale
            norm = jnp.where(skipped, 0, norm)
            metrics |= {"loss_scale": scale, "skipped": skipped.astype(jnp.float32)}
        metrics |= {"grad_norm": norm, "weight": weight}
        return State(state.step + 1, params, opt_state, state.key), metrics

    return Partial(step, as_tree(loss_fn))


def as_tree(function: Callable[..., Any]) -> Partial:
    """Returns a function as a pytree of the arrays that it was given, none but for a `Partial`."""
    return function if isinstance(function, Partial) else Partial(function)


def _checked(loss_fn: LossFunction, params: Params, batch: Any, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the total and the sums of a loss function; raises TypeError if it returns something else."""
    result = loss_fn(params, batch, key)
    if _is_scalar(result):
        rows = jax.tree.leaves(batch)[0].shape[0]
        return result * rows, {"weight": jnp.float32(rows)}
    if isinstance(result, tuple) and len(result) == 2:
        total, sums = result
        if _is_scalar(total) and isinstance(sums, Mapping) and "weight" in sums and all(map(_is_scalar, sums.values())):
            if taken := sorted({"loss", "grad_norm", "loss_scale", "skipped"} & sums.keys()):
                raise ValueError(f"loss_fn returns sums with the names {taken}, which the step has itself: need others")
            return total, dict(sums)
        said = f"({_said(total)}, {_said(sums)})"
    else:
        said = _said(result)
    needed = "(total, sums), a scalar and a dict of scalars, 'weight' being the number of tokens, or one scalar, a mean"
    raise TypeError(f"loss_fn returns {said}: need {needed} over rows")


def _is_scalar(x: Any) -> bool:
    return not isinstance(x, Mapping | tuple | list | str | None) and jnp.shape(x) == ()


def _said(x: Any) -> str:
    """Returns what something is, for a message."""
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{name!r}: {_said(value)}" for name, value in x.items()) + "}"
    return f"an array of shape {x.shape}" if hasattr(x, "shape") else f"a {type(x).__name__}"


def repeated(step: Step, count: int, draw: Callable[[jax.Array], Any]) -> Step:
    """Makes `count` steps one, each on the batch draw(number) of its number; it is given None for a batch.

    The metrics are those of all steps, with a leading axis [count].
    """

    def steps(step: Step, state: State, _: None) -> tuple[State, Metrics]:
        return jax.lax.scan(lambda state, _: step(state, draw(state.step)), state, length=count)

    return Partial(steps, as_tree(step))


def _micro_batches(batch: Any, accumulate: int) -> Any:
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % accumulate:
        raise ValueError(f"accumulate is {accumulate} but a device has {size} rows of the batch: need a divisor of it")
    return jax.tree.map(
        lambda array: array.reshape(size // accumulate, accumulate, *array.shape[1:]).swapaxes(0, 1), batch
    )


def make_evaluation(loss_fn: LossFunction, *, axis_name: str | None = None) -> Step:
    """Makes a pure function evaluation(state, batch) -> (state, sums) that leaves the state alone.

    Nothing in it is random. Parameters are the `evaluation_params` of the state. `sums` are those of `loss_fn`, with
    the total as `loss`, over the whole batch, and with an `axis_name` over all devices. An evaluation has the form of a
    step, so that the functions which run steps on devices run evaluations too.
    """

    def evaluation(loss_fn: LossFunction, state: State, batch: Any) -> tuple[State, Metrics]:
        params = evaluation_params(state.opt_state, state.params)
        total, sums = _checked(loss_fn, params, batch, None)
        sums = {"loss": total, **sums}
        return state, sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return Partial(evaluation, as_tree(loss_fn))


def on_one_device(step: Step) -> Step:
    """Compiles the step for one device. It takes the memory of the state it is given: use the one it returns."""
    given, run = _taken_apart(step)
    return partial(jax.jit(run, donate_argnums=1), given)


def _taken_apart(step: Step) -> tuple[list[Any], Callable[..., Any]]:
    """Returns the arrays of a step, and the step as a function of them, a state and a batch."""
    given, structure = jax.tree.flatten(as_tree(step))
    return given, lambda given, *rest: jax.tree.unflatten(structure, given)(*rest)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the one axis `data` over all devices, or over those given, as `on_mesh` takes it."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def on_mesh(step: Step, mesh: Mesh, rules: Rules = RULES) -> Step:
    """Compiles the step for a mesh, over which state and batch are spread by the rules of `jaxattn.nn.sharding`.

    The axes of the mesh say what is done: `data` spreads the rows of the batch, `fsdp` also the parameters and the
    state of the optimiser, `tensor` heads and hidden units, `context` the tokens of each row. The step computes the
    same numbers as on one device, up to rounding. The compiled step takes the memory of the state it is given.
    In many processes state and batch are global arrays, such as `jax.make_array_from_process_local_data` makes.

    Args:
        step: A step without an `axis_name`: the compiler finds the sums over devices that it needs.
        mesh: The mesh, of any axis types.
        rules: The rules.

    Raises:
        ValueError: The rules spread nothing over an axis of the mesh. When called, an axis of the mesh does not divide
            the batch, its length or a parameter.
    """
    known = {axis for axes in rules.values() for axis in ((axes,) if isinstance(axes, str) else axes or ())}
    if unknown := [name for name in mesh.axis_names if name not in known]:
        raise ValueError(
            f"mesh has the axes {mesh.axis_names}, but no rule spreads anything over {unknown}: need some of "
            f"{sorted(known)}, or rules for them"
        )
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())

    def under_rules(state: State, batch: Any) -> tuple[State, Metrics]:
        with sharding_rules(rules):
            return step(state, batch)

    compiled: dict[Any, Any] = {}

    def step_on_mesh(state: State, batch: Any) -> tuple[State, Metrics]:
        kind = jax.tree.structure((state, batch)), *(jnp.shape(leaf) for leaf in jax.tree.leaves((state, batch)))
        if kind not in compiled:
            spread = shardings(state, mesh, rules), batch_shardings(batch, mesh, rules)
            step = jax.jit(under_rules, in_shardings=spread, out_shardings=(spread[0], whole), donate_argnums=0)
            compiled[kind] = spread, step
        spread, step = compiled[kind]
        with jax.set_mesh(mesh):
            return step(*jax.device_put((state, batch), spread))

    return step_on_mesh


def batch_shardings(batch: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns a pytree like the batch, of arrays [B, T, ...] or [B], with the `NamedSharding` of every array.

    Raises:
        ValueError: An axis of the mesh does not divide the batch or its length.
    """

    def of(path: Any, x: Any) -> NamedSharding:
        axes = ("batch", "length", *(None,) * (len(x.shape) - 2))[: len(x.shape)]
        try:
            return NamedSharding(mesh, partition_spec(axes, x.shape, mesh.shape, rules))
        except ValueError as error:
            raise ValueError(f"batch{jax.tree_util.keystr(path)}: {error}") from None

    return jax.tree_util.tree_map_with_path(of, batch)


def on_pmap(step: Step, axis_name: str, devices: Sequence[jax.Device] | None = None) -> Step:
    """Runs the step by `jax.pmap` on all devices, or on those given, each with its share of the rows of the batch.

    Shapes are those of one device, going in and coming out: rows are handed out here, and the state is kept once on
    each device. The step takes the memory of the state it is given.

    Args:
        step: A step made with this `axis_name`.
        axis_name: The name of the axis.
        devices: The devices, by default all.

    Raises:
        ValueError: The devices do not divide the batch.
    """
    devices = jax.devices() if devices is None else devices
    count, replicated = len(devices), NamedSharding(Mesh(np.array(devices), (axis_name,)), PartitionSpec())
    given, run = _taken_apart(step)
    mapped = jax.pmap(run, axis_name, in_axes=(None, None, 0), out_axes=None, devices=devices, donate_argnums=1)
    given = jax.device_put(given, replicated)

    def step_on_pmap(state: State, batch: Any) -> tuple[State, Metrics]:
        _check_rows(batch, count)
        state = jax.device_put(state, replicated)  # as it comes out, so that the second call finds the first compiled
        return mapped(given, state, jax.tree.map(lambda array: array.reshape(count, -1, *array.shape[1:]), batch))

    return step_on_pmap


def _check_rows(batch: Any, devices: int) -> None:
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % devices:
        raise ValueError(f"batch has {rows} rows but there are {devices} devices: need a multiple of {devices}")
