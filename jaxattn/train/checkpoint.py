"""Checkpoints of a run: its state, its place in the data, its config; written whole or not at all, the last few kept.

A checkpoint is a folder named by its step. It holds the arrays as Orbax writes them (`params` apart from the `rest`,
and parameters to evaluate where these are others, `evaluated`), a JSON record of the config and the data iterator, and
the checksums of all of these files. Orbax writes under a temporary name and renames at the end, so a process that dies
while saving leaves the earlier checkpoints as they were. Of many processes each writes the parts of arrays that it has,
and process 0 all else.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxattn.train.optimizer import evaluation_params
from jaxattn.train.processes import by_first, gathered, is_first
from jaxattn.train.step import Params, State

_CHECKSUMS = "checksums.json"


class Restored(NamedTuple):
    """A run as it was after `state.step` steps.

    Attributes:
        state: The state of the run.
        iterator: The state of its data iterator.
    """

    state: State
    iterator: Any


class Loaded(NamedTuple):
    """A trained model, ready for use.

    Attributes:
        config: The run's config.
        params: The parameters.
        step: The number of steps after which they were saved.
    """

    config: dict[str, Any]
    params: Params
    step: int


class Checkpoints:
    """The checkpoints in a folder, of which the newest `keep` stay. A context manager, which closes Orbax at its end.

    Args:
        folder: The folder.
        keep: The number of checkpoints that stay, at least 1. With 1 no other checkpoint is left should the one be
            damaged.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep is {keep}: need at least 1 checkpoint")
        self.folder = Path(folder).absolute()
        by_first(lambda: _remove_unfinished(self.folder))
        self._manager = _manager(self.folder, keep)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps that have checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def describe_latest(self) -> str:
        """Returns words that name the newest checkpoint, for messages."""
        steps = self.steps()
        return f"the last good checkpoint is step {steps[-1]} in {self.folder}" if steps else "there is no checkpoint"

    def save(self, state: State, iterator: Any, config: Mapping[str, Any]) -> None:
        """Writes a checkpoint, and returns when it is done.

        Args:
            state: The state of the run.
            iterator: The state of the data iterator, which JSON can hold.
            config: The config, which JSON can hold.

        Raises:
            OSError: The disk is full (ENOSPC). Earlier checkpoints are intact, and the error names the newest.
        """
        step = int(state.step)
        arrays = _to_arrays(state)
        params = {name: array for name, array in arrays.items() if _is_parameter(name)}
        rest = {name: array for name, array in arrays.items() if not _is_parameter(name)}
        items = {
            "params": ocp.args.StandardSave(params),
            "rest": ocp.args.StandardSave(rest),
            "record": ocp.args.JsonSave({"config": dict(config), "iterator": iterator}),
        }
        if (evaluated := evaluation_params(state.opt_state, state.params)) is not state.params:
            items["evaluated"] = ocp.args.StandardSave(_to_arrays({"params": evaluated}))
        with _quiet():
            try:
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
                if is_first():
                    _write_checksums(self.folder / str(step))
                return
            except Exception as error:  # Orbax passes on what its storage raises, of several types
                if not is_full_disk(error):
                    raise
        # Outside of `except`, so that the failed writes are forgotten, and not reported one by one.
        if is_first():
            _remove_unfinished(self.folder)
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
        self._manager.reload()
        message = f"the disk is full: the checkpoint of step {step} was not saved; {self.describe_latest()}"
        raise OSError(errno.ENOSPC, message)

    def replace(self, state: State, config: Mapping[str, Any]) -> None:
        """Writes a checkpoint without a place in the data, and removes those of the same and of later steps before.

        Raises:
            OSError: The disk is full.
        """
        for step in self.steps():
            if step >= int(state.step):
                self._manager.delete(step)
        self.save(state, None, config)

    def restore_latest(self, like: State, config: Mapping[str, Any], free: Sequence[str] = ()) -> Restored | None:
        """Returns the newest checkpoint that can be read, or None without checkpoints.

        A damaged checkpoint is passed over with a `UserWarning` that names it and the one used instead. It is moved to
        the folder `damaged` beside `folder`, so that the run can save that step anew.

        Args:
            like: A state with the structure, dtypes and shardings of the result. The checkpoint may have been written
                by a run on other devices.
            config: The config that the checkpoint must have.
            free: Dotted names of fields of the config that may differ.

        Raises:
            ValueError: The checkpoint has another config (the message names each field that differs), its arrays are
                not those of `like`, or no checkpoint can be read. Nothing is changed then.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            where = self.folder / str(step)
            try:
                record, stored = _look(self._manager, where, step, ("params", "rest"))
            except Exception as error:  # whatever a damaged file makes Orbax raise
                damaged[step] = _reason(error)
                continue
            check_config(record["config"], config, f"checkpoint {where}", free)
            _check_arrays(like, stored, where)
            try:
                state = _read(self._manager, step, ("params", "rest"), like)
            except Exception as error:
                damaged[step] = _reason(error)
                continue
            self._set_aside(damaged, step)
            return Restored(state, record["iterator"])
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise ValueError(f"no checkpoint in {self.folder} can be read ({reasons}): use another output folder")
        return None

    def _set_aside(self, damaged: Mapping[int, str], used: int) -> None:
        def move() -> None:
            for step, reason in damaged.items():
                aside = self.folder.with_name("damaged") / str(step)
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(aside)
                warnings.warn(
                    f"the checkpoint of step {step} is damaged ({reason}): step {used} is used instead, "
                    f"and the damaged files are now in {aside}",
                    stacklevel=5,
                )

        by_first(move)
        self._manager.reload()


def load(folder: str | Path, like: Callable[[dict[str, Any]], Params]) -> Loaded:
    """Returns the config, parameters and step of the newest checkpoint that can be read, and changes nothing.

    The optimiser is not needed; of one that is schedule-free the parameters are those that it averages.
    A damaged checkpoint is passed over with a `UserWarning`. The run may have had other devices and processes. Where
    there are many processes now, all have to call it.

    Args:
        folder: The output folder of a run, or its folder of checkpoints.
        like: A function that makes, from the config, a pytree with the structure, shapes and dtypes of the parameters:
            arrays or `jax.ShapeDtypeStruct`s. Those with a sharding are read to it.

    Raises:
        ValueError: The folder has no checkpoint, none can be read, or its parameters are not those of `like`.
    """
    folder = Path(folder).absolute()
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r} does not exist: need a folder of checkpoints")
    damaged: dict[int, str] = {}
    with _manager(folder, None) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                name = "evaluated" if (folder / str(step) / "evaluated").is_dir() else "params"
                record, stored = _look(manager, folder / str(step), step, (name,))
            except Exception as error:  # whatever a damaged file makes Orbax raise
                damaged[step] = _reason(error)
                continue
            wanted = {"params": like(record["config"])}
            _check_arrays(wanted, stored, folder / str(step))
            try:
                tree = _read(manager, step, (name,), wanted)
            except Exception as error:
                damaged[step] = _reason(error)
                continue
            for bad, reason in damaged.items():
                message = f"the checkpoint of step {bad} is damaged ({reason}): step {step} is used instead"
                warnings.warn(message, stacklevel=2)
            return Loaded(record["config"], tree["params"], step)
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items()) or "there is none"
    raise ValueError(f"folder {str(folder)!r} has no checkpoint that can be read ({reasons})")


def check_config(saved: Mapping[str, Any], config: Mapping[str, Any], where: str, free: Sequence[str] = ()) -> None:
    """Raises ValueError naming, with dotted names and both values, the fields in which two configs differ.

    Args:
        saved: The config that was saved.
        config: The config of now.
        where: The name of the thing that `saved` is the config of, for the message.
        free: Fields that may differ, with all that is in them.
    """
    names = [name for name in differing(saved, config) if not f"{name}.".startswith(tuple(f"{each}." for each in free))]
    old, new = flat(saved), flat(config)
    if names:
        fields = "; ".join(f"{name} was {old.get(name, 'absent')}, now {new.get(name, 'absent')}" for name in names)
        raise ValueError(f"{where} is of another config: {fields}. Use that config, or another output folder")


def check_same(config: Mapping[str, Any], params: Any) -> None:
    """Raises ValueError, in all processes of a run, if they have different configs, data or first parameters."""
    if jax.process_count() == 1:
        return
    everyone = [json.loads(text) for text in gathered(json.dumps({"config": config, "params": _digest(params)}))]
    for process, other in enumerate(everyone):
        if names := differing(everyone[0], other):
            one, two = flat(everyone[0]), flat(other)
            fields = "; ".join(
                f"{name.removeprefix('config.')} is {one.get(name, 'absent')} in process 0 and "
                f"{two.get(name, 'absent')} in process {process}"
                for name in names
            )
            raise ValueError(
                f"the processes of the run disagree: {fields}. Start all with one config and the same data"
            )


def _digest(params: Any) -> str:
    """Returns the SHA-256 of the parameters that this process has whole."""
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        if getattr(leaf, "is_fully_addressable", True):
            is_key = hasattr(leaf, "dtype") and _is_key(leaf)
            content.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return content.hexdigest()


def differing(one: Any, other: Any) -> list[str]:
    """Returns the dotted names of the values in which two configs differ."""
    old, new = flat(one), flat(other)
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Maps the dotted name of each value that is not itself a non-empty object or list to its JSON text."""
    if isinstance(config, Mapping | list | tuple) and config:
        items = config.items() if isinstance(config, Mapping) else enumerate(config)
        return {
            k: v for name, value in items for k, v in flat(value, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: json.dumps(config)}


def is_full_disk(error: BaseException) -> bool:
    """Returns whether an error says that no space is left on the disk, also where a library words it its own way."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _manager(folder: Path, keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=keep is not None)
    handlers = {  # named, so that shapes can be looked at before arrays are read
        **{name: ocp.StandardCheckpointHandler() for name in ("params", "rest", "evaluated")},
        "record": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's parallel writes from logging a traceback each, when the first that fails is raised as an error."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        gc.collect()  # asyncio's futures log when they are collected
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def _look(manager: ocp.CheckpointManager, folder: Path, step: int, names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Returns the record of a checkpoint, and the shape and dtype of each of its arrays by name."""
    # Checksums first: they find every changed byte, also in numbers that would still read as numbers.
    by_first(lambda: _verify_checksums(folder))
    record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
    metadata = manager.item_metadata(step)
    return record, {key: array for name in names for key, array in metadata[name].items()}


def _read(manager: ocp.CheckpointManager, step: int, names: Sequence[str], like: Any) -> Any:
    """Returns the arrays of a checkpoint as a tree like another, each on the devices of its like."""
    stored = {name: _as_stored(leaf) for name, leaf in _stored_leaves(like).items()}
    items = {
        item: {name: leaf for name, leaf in stored.items() if _is_parameter(name) == (item != "rest")} for item in names
    }
    args = {item: ocp.args.StandardRestore(leaves) for item, leaves in items.items()}
    restored = manager.restore(step, args=ocp.args.Composite(**args))
    return _from_arrays(like, {key: array for item in names for key, array in restored[item].items()})


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _CHECKSUMS)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _write_checksums(folder: Path) -> None:
    temporary = folder / f"{_CHECKSUMS}.tmp"
    sums = _checksums(folder)
    temporary.write_text(json.dumps(sums, indent=1))
    temporary.rename(folder / _CHECKSUMS)


def _verify_checksums(folder: Path) -> None:
    # They are absent when the process died just after Orbax's own commit: the checkpoint is whole then.
    if not (folder / _CHECKSUMS).exists():
        return
    expected = json.loads((folder / _CHECKSUMS).read_text())
    found = _checksums(folder)
    for name, checksum in expected.items():
        if name not in found:
            raise ValueError(f"file {name} is missing")
        if found[name] != checksum:
            raise ValueError(f"file {name} has changed since it was written")


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _is_parameter(name: str) -> bool:
    return name == "params" or name.startswith("params.")


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
    if len(named) < len(pairs):
        raise ValueError("two arrays of the state have the same dotted name: need names without dots")
    return named


def _stored_leaves(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree by name, but those without elements: these hold nothing, and Orbax refuses them."""
    return {name: leaf for name, leaf in _named_leaves(tree).items() if np.prod(leaf.shape, dtype=int)}


def _to_arrays(tree: Any) -> dict[str, Any]:
    leaves = _stored_leaves(tree)
    return {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}


def _as_stored(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the array that a checkpoint has for a leaf, with the sharding to read it to."""
    found = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    # Never without one: Orbax would take that of the run which wrote it, whose devices may not be here.
    sharding = leaf.sharding if _is_placed(leaf) else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=sharding)


def _is_placed(leaf: Any) -> bool:
    """Returns whether a leaf has to be where it says: whether it is an array that is committed, or a struct with a
    sharding."""
    return leaf.committed if isinstance(leaf, jax.Array) else getattr(leaf, "sharding", None) is not None


def _check_arrays(like: Any, arrays: Mapping[str, Any], where: Path) -> None:
    stored = _stored_leaves(like)
    if missing := sorted(stored.keys() - arrays.keys()):
        raise ValueError(f"checkpoint {where} lacks {', '.join(missing)}: it is of another model or optimiser")
    if unknown := sorted(arrays.keys() - stored.keys()):
        raise ValueError(f"checkpoint {where} also holds {', '.join(unknown)}: it is of another model or optimiser")
    for name, leaf in stored.items():
        array, wanted = arrays[name], _as_stored(leaf)
        if (tuple(array.shape), array.dtype) != (wanted.shape, wanted.dtype):
            found, needed = f"{array.dtype}{list(array.shape)}", f"{wanted.dtype}{list(wanted.shape)}"
            raise ValueError(f"checkpoint {where} holds {name} as {found}: the model or optimiser needs {needed}")


def _from_arrays(like: Any, arrays: Mapping[str, Any]) -> Any:
    def restore(path: Any, leaf: Any) -> jax.Array:
        array = arrays.get(jax.tree_util.keystr(path, simple=True, separator="."))
        if array is None:
            return jnp.zeros(leaf.shape, leaf.dtype)
        array = array if _is_placed(leaf) else jnp.array(np.asarray(array))
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array

    return jax.tree_util.tree_map_with_path(restore, like)
