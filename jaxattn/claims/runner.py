"""Runs an experiment: seed by seed, each finished seed kept, so that running it again goes on where it was.

The folder of a run holds `config.json`, `claims.json` with the criteria as they were before anything was measured,
`seeds/N.json` for each finished seed, and what `report.py` makes of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from jaxattn import models
from jaxattn.claims import report
from jaxattn.claims.experiment import Experiment, nearest
from jaxattn.train import check_config


def run(experiment: Experiment, config: Any, *, seeds: int, folder: Path, command: str, console: Console) -> Path:
    """Run seeds 0 .. seeds−1, but those already there, and write the report; returns the folder.

    Raises ValueError, before anything is changed, for fewer than one seed, and for a folder that holds a run of another
    experiment or config.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: need at least 1")
    record: dict[str, Any] = {"experiment": experiment.name, "config": dataclasses.asdict(config)}
    if experiment.file:
        record["file"] = experiment.file
    if (folder / "config.json").exists():
        check_config(json.loads((folder / "config.json").read_text()), record, f"the run in {folder}")
    report.write(folder / "config.json", json.dumps(record, indent=2) + "\n")
    if not (folder / report.CRITERIA).exists() and not report.read_seeds(folder):
        report.write_claims(folder, experiment.claims)
    for claim, _, verdict, criterion in report.held_to(report.written_claims(folder), experiment.claims, []):
        if verdict == report.CHANGED:
            console.print(f"{experiment.name}: {verdict}: {claim.says} {criterion}", soft_wrap=True, style="bold red")
    for seed in range(seeds):
        file = folder / "seeds" / f"{seed}.json"
        if file.exists():
            console.print(f"{experiment.name}: seed {seed} is done", soft_wrap=True)
            continue
        console.rule(f"{experiment.name}: seed {seed} of {seeds}")
        clock = file.with_suffix(".seconds")  # what earlier runs of this seed took, that were interrupted
        before, started = float(clock.read_text()) if clock.exists() else 0.0, time.perf_counter()
        try:
            result = experiment.run(config, seed, folder / "seeds" / str(seed), console)
        finally:
            seconds = before + time.perf_counter() - started
            report.write(clock, f"{seconds}\n")
        made = {"command": command, "seconds": seconds, **environment(experiment)}
        report.write(file, json.dumps(plain(report.from_result(result) | {"made": made}), indent=1))
        clock.unlink()
    report.write_report(folder, experiment)
    return folder


def environment(experiment: Experiment) -> dict[str, Any]:
    """What the numbers may depend on beside the config: versions, machine, and the code of the experiment itself."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "jaxattn")},
        "cores": os.cpu_count(),
        "device": f"{jax.devices()[0].device_kind}, backend {jax.default_backend()}, {platform.machine()}",
        "code": hashlib.sha256(inspect.getsource(sys.modules[experiment.run.__module__]).encode()).hexdigest()[:12],
    }


def plain(x: Any) -> Any:
    """What JSON can hold of a result: arrays and their scalars as numbers, what is not finite as null."""
    x = x.tolist() if hasattr(x, "tolist") else x
    if isinstance(x, dict):
        return {str(name): plain(each) for name, each in x.items()}
    if isinstance(x, list | tuple):
        return [plain(each) for each in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def place(root: Path, experiment: Experiment, config: Any) -> Path:
    """Where the results of a config go: NAME at full size, NAME-quick, and else NAME with a digest of the config."""
    if config == experiment.default:
        return root / experiment.name
    if config == experiment.quick:
        return root / f"{experiment.name}-quick"
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return root / f"{experiment.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def changed(config: Any, changes: Sequence[str]) -> Any:
    """The config with each `field=value` of `changes` in place; values are YAML, fields of nested configs have dots.

    Raises ValueError naming the field that does not exist and the nearest one that does, or the value of a wrong type.
    """
    known = dict(_fields(config))
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change} has no '=': need field=value")
        if name not in known:
            raise ValueError(f"--set {change}: there is no field {name!r}{nearest(name, known)}")
        models.register_specs()
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", type=type(config), default=config)
        try:
            config = parser.instantiate(parser.parse_args([f"--config.{name}={text}"])).config
        except ArgumentError:
            hint = "; names with ': ' need quotes" if ": " in text else ""
            raise ValueError(f"--set {change}: {name} must be {known[name]}, got {text!r}{hint}") from None
    return config


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted name of every field that is not itself a config, and its type in words."""
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, each.type.__name__ if isinstance(each.type, type) else str(each.type)
