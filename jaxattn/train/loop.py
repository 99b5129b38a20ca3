"""The training loop: from where the output folder stands to the last step, with a log, evaluations and checkpoints.

The folder of a run holds `config.json`, the log `metrics.jsonl`, one JSON object per line, and `checkpoints/`.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jaxattn.core.checks import check_int
from jaxattn.train.checkpoint import Checkpoints, check_config, is_full_disk
from jaxattn.train.data import TRAINING, Drawn, check_seed, drawn_batch
from jaxattn.train.log import Display, Log
from jaxattn.train.losses import bits_per_byte
from jaxattn.train.sources import batches, check_source, described, ordered_batches
from jaxattn.train.step import (
    LossFunction,
    Params,
    State,
    Step,
    data_mesh,
    init_state,
    make_evaluation,
    make_step,
    on_mesh,
    on_one_device,
    on_pmap,
    repeated,
)

# Fields that a resumed run may change, by their dotted names in the run's config: they do not alter what is learned
# (but that `pmap` draws other random numbers on each device).
FREE_FIELDS = tuple(
    f"train.{name}" for name in ("eval_every", "eval_batches", "log_every", "save_every", "keep", "devices")
)


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, on how much at a time, and how often to look.

    Attributes:
        steps: Optimiser steps in the whole run.
        batch_size: Windows per step, over all devices and micro-batches.
        accumulate: Micro-batches that a step is worked off in, to save memory.
        eval_every: Steps between evaluations on the validation data; the last step is always evaluated.
        eval_batches: Batches per evaluation, spread evenly over the validation data; null for all of it.
        save_every: Steps between checkpoints; the last step is always saved.
        keep: Newest checkpoints that are kept.
        log_every: Steps between lines in the log; the last step always has one.
        seed: Seed of the order of the data and of the random numbers inside the steps.
        devices: one device; mesh for all devices by sharding; pmap for all devices by jax.pmap.
    """

    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    eval_every: int = 100
    eval_batches: int | None = 16
    save_every: int = 100
    keep: int = 3
    log_every: int = 10
    seed: int = 0
    devices: Literal["one", "mesh", "pmap"] = "one"


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        folder: The output folder.
        params: The parameters after `step` steps.
        step: The number of steps done.
        complete: Whether these are all steps of the run; False after an interruption.
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


def fit(
    *,
    loss_fn: LossFunction,
    params: Params,
    optimizer: optax.GradientTransformation,
    train_data: Any,
    validation_data: Any,
    config: TrainConfig,
    run_config: Mapping[str, Any],
    folder: str | Path,
    console: Console | None = None,
) -> Result:
    """Trains from `params`, or from the newest checkpoint in `folder`, to the last step.

    You can kill a run. The same call continues it, and it ends with the same parameters, bit for bit where the device
    computes the same bits twice, and the same log but for speeds. Ctrl-C saves and returns early; a second one stops at
    once.

    A line of the log has the metrics of one step: `loss`, `grad_norm`, the mean per token of each sum of `loss_fn`, and
    `tokens_per_second` since the last stop (null where only steps that compile were run). It also has `bits_per_byte`
    where the sums have `nll` and `bytes`. Evaluations add the same with `validation_` before the name.

    The tokens of a row, by which speed is measured, are the `length` of the source, or else what its `tokens` hold, or
    its `weights`. A row without them is one.

    Args:
        loss_fn: loss_fn(params, batch, key), as `make_step` takes it.
        params: The first parameters.
        optimizer: The optimiser.
        train_data: A source of records: `Windows`, anything with a length and records by index, a dict of arrays with
            rows, a pipeline of grain, anything that can be iterated over (`jaxattn.train.sources` says what resumes
            how), or `Drawn`. Steps on drawn batches run as one compiled loop from each stop (for the log, an
            evaluation, a checkpoint) to the next, on one device.
        validation_data: The data of evaluations, likewise; it has to be readable again and again.
        config: The config of the training.
        run_config: The values that a resumed run must share with its checkpoints, beside `config` (but for
            `FREE_FIELDS`) and the data. JSON can hold them. Put everything in it that determines the model and the
            optimiser.
        folder: The output folder.
        console: The console for progress.

    Raises:
        ValueError: The config makes no sense, or the folder holds another run or other files. Nothing is changed then.
            Or the data end before the last step: the run is saved as it is, and the error names the step.
        TypeError: The data are no source, or the loss function returns neither a scalar nor (total, sums).
        FloatingPointError: Loss, gradient or parameters are not finite. Nothing that is not finite is saved, and the
            error names the step and the last good checkpoint.
        OSError: The disk is full.
    """
    console = console or Console()
    folder = Path(folder).absolute()
    _check(config, train_data, validation_data)
    record = _record(run_config, config, train_data, validation_data)
    _claim(folder, record)
    evaluation = _on_devices(config.devices, lambda axis: make_evaluation(loss_fn, axis_name=axis))
    iterator = None if isinstance(train_data, Drawn) else batches(train_data, config.batch_size, config.seed)
    state = init_state(params, optimizer, jax.random.key(config.seed))

    with Checkpoints(folder / "checkpoints", config.keep) as checkpoints, _interruptions() as interrupted:
        restored = checkpoints.restore_latest(state, record, FREE_FIELDS)
        if restored is not None:
            state = restored.state
            if iterator is not None:
                iterator.set_state(restored.iterator)
        first = int(state.step)
        log = Log(folder / "metrics.jsonl", first)
        if first >= config.steps:
            console.print(f"the run in {folder} is complete: step {first} of {config.steps}", soft_wrap=True)
            return _result(folder, state, config, log)
        if restored is not None:
            console.print(f"resuming the run in {folder} after step {first} of {config.steps}", soft_wrap=True)

        stride = _stride(config, first) if isinstance(train_data, Drawn) else 1
        train_step = _train_step(loss_fn, optimizer, config, train_data, stride)
        with Display(console, first, config.steps) as display:
            pending: dict[int, Any] = {}
            tokens_per_row = 0
            started = time.perf_counter()
            for step in range(first + stride, config.steps + 1, stride):
                batch = None if iterator is None else next(iterator, None)
                if iterator is not None and batch is None:
                    _finite(jax.device_get(pending), checkpoints)
                    if step - 1 not in (0, *checkpoints.steps()):
                        _check_finite(state, step - 1, checkpoints)
                        checkpoints.save(state, iterator.get_state(), record)
                    raise ValueError(
                        f"train_data ended after step {step - 1} of {config.steps}, with less than the "
                        f"{config.batch_size} rows of a batch left: need data that repeat, or fewer steps; "
                        f"{checkpoints.describe_latest()}"
                    )
                tokens_per_row = tokens_per_row or _tokens_per_row(train_data, batch)
                state, pending[step] = train_step(state, batch)

                last = step == config.steps
                stop = interrupted.is_set()
                logs = last or step % config.log_every == 0
                evaluates = last or step % config.eval_every == 0
                saves = last or stop or step % config.save_every == 0
                compiled = step == first + stride
                if not (logs or evaluates or saves or compiled):
                    continue

                metrics = _finite(jax.device_get(pending), checkpoints)
                seconds = time.perf_counter() - started
                speed = None if compiled else len(pending) * stride * config.batch_size * tokens_per_row / seconds
                display.update(step, metrics["loss"], speed)
                line: dict[str, Any] = {"step": step}
                if logs:
                    line |= {**_readable(metrics), "tokens_per_second": speed}
                if evaluates:
                    batches_in_order = ordered_batches(
                        validation_data, config.batch_size, config.eval_batches, _count(config)
                    )
                    state, validation = _evaluate(evaluation, state, batches_in_order)
                    line |= {f"validation_{name}": value for name, value in validation.items()}
                if logs or evaluates:
                    _write(log, line, checkpoints)
                    display.line(line)
                if saves:
                    _check_finite(state, step, checkpoints)
                    checkpoints.save(state, None if iterator is None else iterator.get_state(), record)
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
    return Result(folder, state.params, step, step >= config.steps, latest, log.lines)


def _stride(config: TrainConfig, first: int) -> int:
    """Returns how many steps can run together without passing a stop: it divides all stops and the last step."""
    return math.gcd(config.steps, config.log_every, config.eval_every, config.save_every, first)


def _train_step(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    data: Any,
    stride: int,
) -> Step:
    def make(axis_name: str | None) -> Step:
        step = make_step(loss_fn, optimizer, accumulate=config.accumulate, axis_name=axis_name)
        if not isinstance(data, Drawn):
            return step
        return repeated(
            step, stride, lambda number: drawn_batch(data, config.batch_size, config.seed, TRAINING, number)
        )

    return _on_devices(config.devices, make)


def _record(run_config: Mapping[str, Any], config: TrainConfig, train: Any, validation: Any) -> dict[str, Any]:
    own = {
        "train": json.loads(json.dumps(dataclasses.asdict(config), default=_plain)),
        "corpus": {
            "length": getattr(train, "length", None),
            "train": described(train),
            "validation": None if validation is None else described(validation),
        },
    }
    try:
        given = json.loads(json.dumps(run_config, default=_plain))
    except TypeError as error:
        raise TypeError(f"run_config is not JSON: {error}: need dicts, lists, strings, numbers, bools, None") from None
    for name, value in own.items():
        if given.get(name, value) != value:
            raise ValueError(f"run_config has its own {name!r}: need a name other than 'train' and 'corpus'")
    return {**given, **own}


def _plain(x: Any) -> Any:
    """Returns a number of NumPy as one of Python, which JSON can hold."""
    if isinstance(x, np.generic):
        return x.item()
    raise TypeError(f"Object of type {type(x).__name__} is not JSON serializable")


def _check(config: TrainConfig, train: Any, validation: Any) -> None:
    for name, source in (("train_data", train), ("validation_data", validation)):
        if source is not None or name == "train_data":
            check_source(name, source)
    for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_batches", "save_every", "keep", "log_every"):
        value = getattr(config, name)
        if name != "eval_batches" or value is not None:
            check_int(name, value)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: need at least 1")
    check_seed(config.seed)
    if config.devices not in ("one", "mesh", "pmap"):
        raise ValueError(f"devices is {config.devices!r}: need 'one', 'mesh' or 'pmap'")
    if isinstance(train, Drawn) and config.devices != "one":
        raise ValueError(f"devices is {config.devices!r} but batches are drawn inside the step: need 'one'")
    if isinstance(validation, Drawn) and config.eval_batches is None:
        raise ValueError("eval_batches is None but validation batches are drawn without end: need a number")
    devices = _count(config)
    if config.batch_size % (devices * config.accumulate):
        raise ValueError(
            f"batch_size is {config.batch_size} for {devices} device(s) and {config.accumulate} micro-batch(es): "
            f"need a multiple of {devices * config.accumulate}"
        )


def _count(config: TrainConfig) -> int:
    """Returns the number of devices that share the rows of a batch."""
    return 1 if config.devices == "one" else len(jax.devices())


def _claim(folder: Path, record: Mapping[str, Any]) -> None:
    """Makes the folder this run's, unless it holds another run or other files."""
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
        check_config(saved, record, f"the run in folder {str(folder)!r}", FREE_FIELDS)
    folder.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(file)


def _on_devices(devices: str, make: Callable[[str | None], Step]) -> Step:
    if devices == "mesh":
        return on_mesh(make(None), data_mesh())
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


def _tokens_per_row(source: Any, batch: Any) -> int:
    """Returns how many tokens a row has."""
    if hasattr(source, "length"):
        return int(source.length)
    columns = batch if isinstance(batch, Mapping) else {}
    shape = next((np.shape(columns[name]) for name in ("tokens", "weights") if name in columns), (1,))
    return math.prod(shape[1:])


def _finite(pending: Mapping[int, Mapping[str, Any]], checkpoints: Checkpoints) -> Mapping[str, Any]:
    """Returns the metrics of the last of the pending steps, when loss and gradient of all of them are finite.

    Metrics are those of the step they are filed under, or of several steps up to it.
    """
    metrics: Mapping[str, Any] = {}
    for last, metrics in pending.items():
        for name, words in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            values = np.atleast_1d(metrics[name])
            for step, value in enumerate(values, last + 1 - len(values)):
                if not np.isfinite(value):
                    raise FloatingPointError(f"{words} is {value} at step {step}: {checkpoints.describe_latest()}")
    return {name: np.atleast_1d(values)[-1] for name, values in metrics.items()}


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

    signal.signal(signal.SIGINT, request)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)
