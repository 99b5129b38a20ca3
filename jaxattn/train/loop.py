"""The training loop: from where the output folder stands to the last step, with a log, evaluations and checkpoints.

The folder of a run holds `config.json`, the log `metrics.jsonl`, one JSON object per line, `checkpoints/`, and if asked
for `best/`, the checkpoint whose evaluation was the best.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from rich.console import Console

from jaxattn.core.checks import check_int
from jaxattn.nn.sharding import RULES, Rules, shardings
from jaxattn.train.checkpoint import Checkpoints, check_config, check_same, is_full_disk
from jaxattn.train.data import TRAINING, Drawn, check_seed, drawn_batch
from jaxattn.train.log import Display, Log
from jaxattn.train.losses import bits_per_byte
from jaxattn.train.optimizer import OptimizerConfig, decay_start, evaluation_params, make_optimizer
from jaxattn.train.processes import (
    Share,
    by_first,
    failing_together,
    is_first,
    pass_on_interruption,
    stop_is_due,
)
from jaxattn.train.sources import batches, check_source, described, ordered_batches
from jaxattn.train.step import (
    LossFunction,
    Params,
    State,
    Step,
    init_state,
    is_function,
    make_evaluation,
    make_step,
    on_mesh,
    on_one_device,
    on_pmap,
    repeated,
)
from jaxattn.train.tokenizer import Tokenizer

# Fields that a resumed run may change, by their dotted names in the run's config: they do not alter what is learned
# (but that `pmap` draws other random numbers on each device).
FREE_FIELDS = tuple(
    f"train.{name}"
    for name in (
        "eval_every",
        "eval_batches",
        "log_every",
        "save_every",
        "keep",
        "devices",
        "mesh",
        "keep_best",
        "patience",
        "best_metric",
        "best_is",
    )
)


Hooks = Callable[..., Any] | Sequence[Callable[..., Any]]


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, on how much at a time, and how often to look.

    Attributes:
        steps: Optimiser steps in the whole run.
        batch_size: Windows per step, over all devices and micro-batches.
        accumulate: Micro-batches that a step is worked off in, to save memory.
        eval_every: Steps between evaluations on the validation data; the last step is always evaluated.
        eval_batches: Batches per evaluation, spread evenly over the validation data; null for all of it.
        keep_best: Whether the checkpoint of the best evaluation is kept too, in the folder `best` of the run.
        patience: The run ends after this many evaluations in a row without a new best one; null for never.
        best_metric: The metric of evaluations that says which is the best: `loss`, or any other that they have.
        best_is: Whether the smallest or the largest is the best.
        save_every: Steps between checkpoints; the last step is always saved.
        keep: Newest checkpoints that are kept.
        log_every: Steps between lines in the log; the last step always has one.
        seed: Seed of the order of the data and of the random numbers inside the steps.
        devices: one device; mesh for all devices by sharding; pmap for all devices by jax.pmap.
        mesh: With mesh, the axes over which state and batch are spread, each with its number of devices: some of data,
            fsdp, tensor and context, as `nn.RULES` names them, whose product is the number of devices. Null puts all
            devices on data.
    """

    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    eval_every: int = 100
    eval_batches: int | None = 16
    keep_best: bool = False
    patience: int | None = None
    best_metric: str = "loss"
    best_is: Literal["smallest", "largest"] = "smallest"
    save_every: int = 100
    keep: int = 3
    log_every: int = 10
    seed: int = 0
    devices: Literal["one", "mesh", "pmap"] = "one"
    mesh: dict[str, int] | None = None


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        folder: The output folder.
        params: The parameters after `step` steps: of a schedule-free optimiser those that it averages.
        step: The number of steps done.
        complete: Whether these are all steps of the run, or its patience came to an end; False after an interruption.
        metrics: The latest value of every metric in the log.
        history: The log, a dict per line: `step`, then the metrics of this step.
    """

    folder: Path
    params: Params
    step: int
    complete: bool
    metrics: dict[str, float]
    history: list[dict[str, Any]]

    @property
    def tokens_per_second(self) -> float:
        """Training speed in tokens per second: the median over the log, without compiling, evaluating or saving."""
        speeds = [line["tokens_per_second"] for line in self.history if line.get("tokens_per_second")]
        return statistics.median(speeds) if speeds else math.nan


@failing_together()
def fit(
    *,
    loss_fn: LossFunction,
    params: Params,
    optimizer: optax.GradientTransformation | OptimizerConfig,
    train_data: Any,
    validation_data: Any = None,
    config: TrainConfig,
    run_config: Mapping[str, Any],
    folder: str | Path,
    on_step: Hooks = (),
    on_log: Hooks = (),
    on_eval: Hooks = (),
    extend: bool = False,
    tokenizer: Tokenizer | None = None,
    rules: Rules = RULES,
    console: Console | None = None,
) -> Result:
    """Trains from `params`, or from the newest checkpoint in `folder`, to the last step.

    You can kill a run. The same call continues it, and it ends with the same parameters, bit for bit where the device
    computes the same bits twice, and the same log but for speeds. Ctrl-C saves and returns early; a second one stops at
    once.

    A line of the log has the metrics of one step: `loss`, `grad_norm`, the mean per token of each sum of `loss_fn`, and
    `tokens_per_second` since the last stop (null where only steps that compile were run). It also has `bits_per_byte`
    where the sums have `nll` and `bytes`. Evaluations add the same with `validation_` before the name.

    A run may be given more `steps` than it had, also when it is complete, if the learning rate of the steps that it has
    done does not depend on their number: with the schedule constant, or stable before it falls. It ends with the
    parameters of a run that had them from the start.

    Where `jax.distributed.initialize` has joined many processes, each of them makes this same call, with the same
    arguments, and `devices` is mesh. Each reads its own rows of a batch; process 0 writes what is not arrays, shows
    progress and calls `on_log`. SIGTERM and Ctrl-C in one process stop all after the same step. A run that lost a
    process can go on with fewer.

    The tokens of a row, by which speed is measured, are the `length` of the source, or else what its `tokens` hold, or
    its `weights`. A row without them is one.

    Args:
        loss_fn: loss_fn(params, batch, key), as `make_step` takes it.
        params: The first parameters, or a function without arguments that makes them: on a mesh no device then ever
            holds an array that is spread.
        optimizer: The optimiser: an `OptimizerConfig`, which becomes part of the config of the run, or any of optax.
        train_data: A source of records: `Windows`, anything with a length and records by index, a dict of arrays with
            rows, a pipeline of grain, anything that can be iterated over (`jaxattn.train.sources` says what resumes
            how), or `Drawn`. Steps on drawn batches run as one compiled loop from each stop (for the log, an
            evaluation, a checkpoint) to the next, on one device.
        validation_data: The data of evaluations, likewise, which have to be readable again and again; None for none.
        config: The config of the training.
        run_config: The values that a resumed run must share with its checkpoints, beside `config` (but for
            `FREE_FIELDS`) and the data. JSON can hold them. Put everything in it that determines the model and the
            optimiser.
        folder: The output folder.
        on_step: A function, or several: on_step(step, state, metrics), after each step. `step` is the number of steps
            done. Metrics are arrays on the device, not yet waited for, those of a line of the log and `weight`. The
            memory of the state is used again by the next step: copy what is to be kept. Drawn batches are then worked
            off step by step.
        on_log: on_log(line), for each new line of the log: a dict with `step` and numbers.
            `train.csv_log` and `train.tensorboard_log` make such functions.
        on_eval: on_eval(step, params, metrics), after each evaluation, with its metrics without `validation_` before
            their names, as numbers, and the parameters that it was of.
        extend: Whether an optimiser that is no `OptimizerConfig` allows more steps: whether its schedule does not
            depend on their number.
        tokenizer: The tokenizer of the tokens, which is saved in the folder: the command line and `Tokenizer.of_run`
            read it there. None for bytes, and for what is no text.
        rules: The rules by which state and batch are spread over a mesh.
        console: The console for progress.

    Raises:
        ValueError: The config makes no sense, or the folder holds another run or other files. Nothing is changed then.
            Or the data end before the last step: the run is saved as it is, and the error names the step.
        TypeError: The data are no source, or the loss function returns neither a scalar nor (total, sums).
        FloatingPointError: Loss, gradient or parameters are not finite. Nothing that is not finite is saved, and the
            error names the step and the last good checkpoint.
        OSError: The disk is full.
        RuntimeError: Another process of the run was lost, or failed.
        Exception: Whatever a hook raises. Checkpoints that were saved are intact.
    """
    console = (console or Console()) if is_first() else Console(quiet=True)
    folder = Path(folder).absolute()
    step_hooks, log_hooks, eval_hooks = (
        _hooks(*each) for each in (("on_step", on_step), ("on_log", on_log), ("on_eval", on_eval))
    )
    _check(config, train_data, validation_data, rules)
    mesh = _mesh(config)
    record = _record(run_config, config, train_data, validation_data, optimizer, tokenizer)
    transformation = make_optimizer(optimizer, config.steps) if isinstance(optimizer, OptimizerConfig) else optimizer
    if mesh is not None:  # raises where the mesh does not fit the parameters
        shardings(jax.eval_shape(params) if is_function(params) else params, mesh, rules)
    check_same(record, () if is_function(params) else params)

    def begin() -> None:
        _claim(folder, record, lambda steps: None if extend else _forbids_more_steps(optimizer, folder, steps))
        if tokenizer is not None:
            tokenizer.save(folder)

    by_first(begin)
    share = None if mesh is None or jax.process_count() == 1 else Share(mesh, rules, _count(config, rules)[0])
    evaluation = _on_devices(config.devices, mesh, rules, lambda axis: make_evaluation(loss_fn, axis_name=axis))
    mine = None if share is None else share.of(config.batch_size)
    iterator = None if isinstance(train_data, Drawn) else batches(train_data, config.batch_size, config.seed, mine)
    state = init_state(params, transformation, jax.random.key(config.seed), mesh, rules)

    with Checkpoints(folder / "checkpoints", config.keep) as checkpoints, _interruptions() as interrupted:
        restored = checkpoints.restore_latest(state, record, (*FREE_FIELDS, "train.steps"))
        if restored is not None:
            state = restored.state
        first = int(state.step)
        log = Log(folder / "metrics.jsonl", first, is_first())
        out_of_patience = _out_of_patience(log, config)
        if first >= config.steps or out_of_patience:
            why = ", out of patience" if out_of_patience else ""
            console.print(f"the run in {folder} is complete: step {first} of {config.steps}{why}", soft_wrap=True)
            return _result(folder, state, config, log)
        if restored is not None:
            if iterator is not None:
                iterator.set_state(restored.iterator)
            console.print(f"resuming the run in {folder} after step {first} of {config.steps}", soft_wrap=True)

        drawn = isinstance(train_data, Drawn)
        stride = _stride(config, first) if drawn and not step_hooks else 1
        train_step = _train_step(loss_fn, transformation, config, train_data, stride, mesh, rules)
        with Display(console, first, config.steps) as display:
            pending: dict[int, Any] = {}
            tokens_per_row = 0
            started = time.perf_counter()
            for step in range(first + stride, config.steps + 1, stride):
                batch = None if iterator is None else next(iterator, None)
                if iterator is not None and batch is None:
                    _finite(jax.device_get(pending), checkpoints, None)
                    if step - 1 not in (0, *checkpoints.steps()):
                        _check_finite(state, step - 1, checkpoints)
                        checkpoints.save(state, iterator.get_state(), record)
                    raise ValueError(
                        f"train_data ended after step {step - 1} of {config.steps}, with less than the "
                        f"{config.batch_size} rows of a batch left: need data that repeat, or fewer steps; "
                        f"{checkpoints.describe_latest()}"
                    )
                tokens_per_row = tokens_per_row or _tokens_per_row(train_data, batch)
                state, pending[step] = train_step(state, batch if share is None else share.whole(batch))
                for hook in step_hooks:
                    metrics = pending[step]
                    hook(step, state, {name: value[0] for name, value in metrics.items()} if drawn else metrics)

                last = step == config.steps
                stop = stop_is_due(step, interrupted.is_set())
                logs = last or step % config.log_every == 0
                evaluates = validation_data is not None and (last or step % config.eval_every == 0)
                saves = last or stop or step % config.save_every == 0
                compiled = step == first + stride
                if not (logs or evaluates or saves or compiled):
                    continue

                metrics = _finite(jax.device_get(pending), checkpoints, batch)
                seconds = time.perf_counter() - started
                speed = None if compiled else len(pending) * stride * config.batch_size * tokens_per_row / seconds
                display.update(step, metrics["loss"], speed)
                line: dict[str, Any] = {"step": step}
                if logs:
                    line |= {**_readable(metrics), "tokens_per_second": speed}
                if evaluates:
                    batches_in_order = ordered_batches(
                        validation_data,
                        config.batch_size,
                        config.eval_batches,
                        _count(config, rules)[0],
                        None if share is None else share.of,
                    )
                    if share is not None:
                        batches_in_order = map(share.whole, batches_in_order)
                    state, validation = _evaluate(evaluation, state, batches_in_order)
                    line |= {f"validation_{name}": value for name, value in validation.items()}
                if logs or evaluates:
                    _write(log, line, checkpoints)
                    display.line(line)
                    for hook in log_hooks if is_first() else ():
                        hook(dict(line))
                if evaluates:
                    for hook in eval_hooks:
                        hook(step, evaluation_params(state.opt_state, state.params), dict(validation))
                    out_of_patience = _out_of_patience(log, config)
                    if config.keep_best and _since_best(log, config) == 0:
                        _check_finite(state, step, checkpoints)
                        with Checkpoints(folder / "best", 1) as best:
                            best.replace(state, record)
                if saves or out_of_patience:
                    _check_finite(state, step, checkpoints)
                    checkpoints.save(state, None if iterator is None else iterator.get_state(), record)
                if out_of_patience and not last:
                    console.print(f"stopped after step {step} of {config.steps}, out of patience", soft_wrap=True)
                    break
                if stop and not last:
                    console.print(
                        f"stopped after step {step} of {config.steps} and saved: run the same again with the output "
                        f"folder {folder} to resume",
                        soft_wrap=True,
                    )
                    break
                pending = {}
                started = time.perf_counter()
        return _result(folder, state, config, log)


def _result(folder: Path, state: State, config: TrainConfig, log: Log) -> Result:
    latest = {name: value for line in log.lines for name, value in line.items() if value is not None}
    step = int(state.step)
    complete = step >= config.steps or _out_of_patience(log, config)
    return Result(folder, evaluation_params(state.opt_state, state.params), step, complete, latest, log.lines)


def _hooks(name: str, given: Hooks) -> Sequence[Callable[..., Any]]:
    hooks = given if isinstance(given, list | tuple) else (given,)
    for hook in hooks:
        if not callable(hook):
            raise TypeError(f"{name} is a {type(hook).__name__}: need a function, or a list of several")
    return hooks


def _since_best(log: Log, config: TrainConfig) -> int:
    """Returns the number of evaluations after the best one, the first of equals."""
    name = f"validation_{config.best_metric}"
    lines = [line for line in log.lines if "validation_loss" in line]
    if any(name not in line for line in lines):
        there = ", ".join(each.removeprefix("validation_") for each in lines[-1] if each.startswith("validation_"))
        raise ValueError(f"best_metric is {config.best_metric!r}, which evaluations do not have: need one of {there}")
    sign = 1 if config.best_is == "smallest" else -1
    values = np.nan_to_num([sign * line[name] for line in lines], nan=np.inf)
    return len(values) - 1 - int(np.argmin(values)) if len(values) else 0


def _out_of_patience(log: Log, config: TrainConfig) -> bool:
    return config.patience is not None and _since_best(log, config) >= config.patience


def _forbids_more_steps(optimizer: Any, folder: Path, steps: int) -> str | None:
    """Returns why a run of so many steps can have no other number of them, or None if it can."""
    if not isinstance(optimizer, OptimizerConfig):
        return "the schedule of an optimiser may depend on it: give an OptimizerConfig, or extend=True if it does not"
    saved = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    begin = decay_start(optimizer, steps)
    if optimizer.schedule == "constant" or (optimizer.schedule == "stable" and max(saved, default=0) <= begin):
        return None
    if optimizer.schedule == "stable":
        return (
            f"optimizer.schedule is 'stable', whose learning rate fell from step {begin} on: remove the checkpoints "
            "after it, if there is one before"
        )
    return (
        f"optimizer.schedule is {optimizer.schedule!r}, whose learning rate depends on it: need 'constant', or "
        "'stable' before it falls. To go on from here train in another folder, from these parameters"
    )


def _stride(config: TrainConfig, first: int) -> int:
    """Returns how many steps can run together without passing a stop: it divides all stops and the last step."""
    return math.gcd(config.steps, config.log_every, config.eval_every, config.save_every, first)


def _train_step(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    data: Any,
    stride: int,
    mesh: Mesh | None,
    rules: Rules,
) -> Step:
    def make(axis_name: str | None) -> Step:
        step = make_step(loss_fn, optimizer, accumulate=config.accumulate, axis_name=axis_name)
        if not isinstance(data, Drawn):
            return step
        return repeated(
            step, stride, lambda number: drawn_batch(data, config.batch_size, config.seed, TRAINING, number)
        )

    return _on_devices(config.devices, mesh, rules, make)


def _record(
    run_config: Mapping[str, Any],
    config: TrainConfig,
    train: Any,
    validation: Any,
    optimizer: Any,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    own: dict[str, Any] = {
        "train": json.loads(json.dumps(dataclasses.asdict(config), default=_plain)),
        "corpus": {
            "length": _length(train),
            "train": described(train),
            "validation": None if validation is None else described(validation),
        },
    }
    if not (isinstance(train, Drawn) or getattr(train, "of_text", False)):
        own["corpus"]["bytes"] = False
    if isinstance(optimizer, OptimizerConfig):
        own["optimizer"] = json.loads(json.dumps(dataclasses.asdict(optimizer), default=_plain))
    if tokenizer is not None and tokenizer.record is not None:
        own["tokenizer"] = tokenizer.record
    try:
        given = json.loads(json.dumps(run_config, default=_plain))
    except TypeError as error:
        raise TypeError(f"run_config is not JSON: {error}: need dicts, lists, strings, numbers, bools, None") from None
    for name, value in own.items():
        if given.get(name, value) != value:
            raise ValueError(f"run_config has its own {name!r}: need a name other than {', '.join(map(repr, own))}")
    return {**given, **own}


def _plain(x: Any) -> Any:
    """Returns a number of NumPy as one of Python, which JSON can hold."""
    if isinstance(x, np.generic):
        return x.item()
    raise TypeError(f"Object of type {type(x).__name__} is not JSON serializable")


def _check(config: TrainConfig, train: Any, validation: Any, rules: Rules) -> None:
    for name, source in (("train_data", train), ("validation_data", validation)):
        if source is not None or name == "train_data":
            check_source(name, source)
    numbers = ("steps", "batch_size", "accumulate", "eval_every", "eval_batches", "save_every", "keep", "log_every")
    for name in (*numbers, "patience"):
        value = getattr(config, name)
        if name not in ("eval_batches", "patience") or value is not None:
            check_int(name, value)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: need at least 1")
    check_seed(config.seed)
    if config.best_is not in ("smallest", "largest"):
        raise ValueError(f"best_is is {config.best_is!r}: need 'smallest' or 'largest'")
    if validation is None and (config.patience is not None or config.keep_best):
        name = "keep_best" if config.patience is None else "patience"
        raise ValueError(f"{name} is {getattr(config, name)} without validation_data: need data to evaluate on")
    if config.devices not in ("one", "mesh", "pmap"):
        raise ValueError(f"devices is {config.devices!r}: need 'one', 'mesh' or 'pmap'")
    if jax.process_count() > 1 and isinstance(train, Drawn):
        raise ValueError(f"train_data is drawn inside the step on one device, not in {jax.process_count()} processes")
    if jax.process_count() > 1 and config.devices != "mesh":
        raise ValueError(f"devices is {config.devices!r} in {jax.process_count()} processes: need 'mesh'")
    if isinstance(train, Drawn) and config.devices != "one":
        raise ValueError(f"devices is {config.devices!r} but batches are drawn inside the step: need 'one'")
    if isinstance(validation, Drawn) and config.eval_batches is None:
        raise ValueError("eval_batches is None but validation batches are drawn without end: need a number")
    _check_mesh(config, rules)
    devices, along = _count(config, rules)
    if config.batch_size % (devices * config.accumulate):
        where = f" along {' and '.join(map(repr, along))}" if along else ""
        raise ValueError(
            f"batch_size is {config.batch_size} for {devices} device(s){where} and {config.accumulate} "
            f"micro-batch(es): need a multiple of {devices * config.accumulate}"
        )
    pieces = math.prod(_sizes(config).get(axis, 1) for axis in _axes(rules, "length"))
    if config.devices == "mesh" and (length := getattr(train, "length", pieces)) % pieces:
        along = tuple(axis for axis in _axes(rules, "length") if axis in _sizes(config))
        raise ValueError(
            f"train_data has rows of length {length} for {pieces} device(s) along {' and '.join(map(repr, along))}: "
            f"need a multiple of {pieces}"
        )


def _check_mesh(config: TrainConfig, rules: Rules) -> None:
    if config.mesh is None:
        return
    if config.devices != "mesh":
        raise ValueError(f"mesh is {config.mesh} but devices is {config.devices!r}: need devices 'mesh'")
    known = sorted({axis for name in rules for axis in _axes(rules, name)})
    for name, size in config.mesh.items():
        if name not in known:
            raise ValueError(f"mesh has the axis {name!r}, over which nothing is spread: need some of {known}")
        check_int(f"mesh[{name!r}]", size)
    devices, product = len(jax.devices()), math.prod(config.mesh.values())
    if min(config.mesh.values(), default=0) < 1 or product != devices:
        raise ValueError(
            f"mesh is {config.mesh}, of {product} device(s), but there are {devices}: need sizes from 1 on whose "
            f"product is {devices}"
        )


def _axes(rules: Rules, name: str) -> tuple[str, ...]:
    """Returns the axes of a mesh over which an axis of arrays is spread."""
    axes = rules.get(name)
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _sizes(config: TrainConfig) -> Mapping[str, int]:
    return {"data": len(jax.devices())} if config.mesh is None else config.mesh


def _mesh(config: TrainConfig) -> Mesh | None:
    if config.devices != "mesh":
        return None
    sizes = _sizes(config)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _count(config: TrainConfig, rules: Rules) -> tuple[int, tuple[str, ...]]:
    """Returns the number of devices that share the rows of a batch, and the axes of the mesh along which they do."""
    if config.devices != "mesh":
        return 1 if config.devices == "one" else len(jax.devices()), ()
    sizes = _sizes(config)
    along = tuple(axis for axis in _axes(rules, "batch") if axis in sizes)
    return math.prod(sizes[axis] for axis in along), along


def _claim(folder: Path, record: Mapping[str, Any], forbids: Callable[[int], str | None]) -> None:
    """Makes the folder this run's, unless it holds another run or other files, or the run can have no more steps."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r} is a file: need a new or empty folder")
    file, temporary = folder / "config.json", folder / "config.json.tmp"
    contents = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    others = [name for name in contents if name not in (file.name, temporary.name)]
    if others and not file.exists():
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ValueError(f"folder {str(folder)!r} holds files but no run ({names}): need a new or empty folder")
    if others:
        try:
            saved = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}): restore it, or use another output folder") from None
        check_config(saved, record, f"the run in folder {str(folder)!r}", (*FREE_FIELDS, "train.steps"))
        before, now = saved["train"]["steps"], record["train"]["steps"]
        if before != now and (why := forbids(before)):
            raise ValueError(f"steps was {before} in the run in folder {str(folder)!r}, now {now}, and {why}")
    folder.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(file)


def _on_devices(devices: str, mesh: Mesh | None, rules: Rules, make: Callable[[str | None], Step]) -> Step:
    if mesh is not None:
        return on_mesh(make(None), mesh, rules)
    if devices == "pmap":
        return on_pmap(make("devices"), "devices")
    return on_one_device(make(None))


def _evaluate(evaluation: Step, state: State, validation: Iterator[Any]) -> tuple[State, dict[str, float]]:
    sums: dict[str, float] = {}
    for batch in validation:
        state, of_batch = evaluation(state, batch)
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in of_batch.items()}
    if not sums:
        raise ValueError("validation_data has no full batch: need at least batch_size rows, or none at all")
    weight = sums.pop("weight")
    means = {name: value / weight if weight else math.nan for name, value in sums.items()}
    return state, _readable({**means, "weight": weight})


def _readable(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics as the log has them."""
    values = {name: float(value) for name, value in metrics.items() if name != "weight"}
    return values | {"bits_per_byte": bits_per_byte(values)} if {"nll", "bytes"} <= values.keys() else values


def _length(source: Any) -> int | None:
    """Returns the number of tokens of a row, if the source says it."""
    length = getattr(source, "length", None)
    return int(length) if isinstance(length, int | np.integer) else None


def _tokens_per_row(source: Any, batch: Any) -> int:
    """Returns how many tokens a row has."""
    if (length := _length(source)) is not None:
        return length
    columns = batch if isinstance(batch, Mapping) else {}
    shape = next((np.shape(columns[name]) for name in ("tokens", "weights") if name in columns), (1,))
    return math.prod(shape[1:])


def _finite(pending: Mapping[int, Mapping[str, Any]], checkpoints: Checkpoints, batch: Any) -> Mapping[str, Any]:
    """Returns the metrics of the last of the pending steps, when loss and gradient of all of them are finite.

    Metrics are those of the step they are filed under, or of several steps up to it. The batch is the last one.
    """
    metrics: Mapping[str, Any] = {}
    for last, metrics in pending.items():
        for name, words in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            values = np.atleast_1d(metrics[name])
            for step, value in enumerate(values, last + 1 - len(values)):
                if not np.isfinite(value):
                    seen = _tokens_of(batch) if step == max(pending) and np.isnan(value) else ""
                    raise FloatingPointError(
                        f"{words} is {value} at step {step}: {checkpoints.describe_latest()}{seen}"
                    )
    return {name: np.atleast_1d(values)[-1] for name, values in metrics.items()}


def _tokens_of(batch: Any) -> str:
    """Returns words that say between what the tokens of a batch are: one outside the vocabulary makes a loss NaN."""
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
    if tokens is None or not np.issubdtype(tokens.dtype, np.integer):
        return ""
    return f"; the tokens of this step are from {np.min(tokens)} to {np.max(tokens)}"


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def _check_finite(state: State, step: int, checkpoints: Checkpoints) -> None:
    if not _all_finite((state.params, state.opt_state)):
        raise FloatingPointError(
            f"a parameter or the optimiser's state is not finite after step {step}: {checkpoints.describe_latest()}"
        )


def _write(log: Log, line: dict[str, Any], checkpoints: Checkpoints) -> None:
    try:
        log.append(line)
    except OSError as error:
        if not is_full_disk(error):
            raise
        message = f"the disk is full: step {line['step']} was not logged in {log.file}; {checkpoints.describe_latest()}"
        raise OSError(errno.ENOSPC, message) from error


@contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets; from then on Ctrl-C does the same as before."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield requested
        return
    previous = signal.getsignal(signal.SIGINT)

    def request(*_: object) -> None:
        requested.set()
        signal.signal(signal.SIGINT, previous)
        pass_on_interruption()

    signal.signal(signal.SIGINT, request)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)
