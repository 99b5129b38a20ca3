"""Writes a run as `report.md`, `results.json` and figures."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.cases import CASES, HEAD_DIM, HEADS, RECURRENCES
from benchmarks.rows import Row, Rows, slopes
from benchmarks.targets import check


def header() -> dict[str, Any]:
    """What the figures depend on: machine, versions, command."""
    versions = {"Python": platform.python_version()}
    for name in ("jax", "jaxlib", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    model = ""
    if (info := Path("/proc/cpuinfo")).exists():
        model = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), "")
    return {
        "machine": f"{os.cpu_count()} cores, {model or platform.machine()}, backend {jax.default_backend()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}".strip(),
        "sizes": f"{HEADS} heads of {HEAD_DIM}",
    }


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if i < 2 else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *lines)) + "\n"


def _number(x: float | None, digits: str = ".2f") -> str:
    return "" if x is None else format(x, digits)


def _line(row: Row, rows: Rows) -> list[str]:
    mib = [None if size is None else size / 2**20 for size in (row.temporaries, row.resident)]
    return [
        row.case,
        row.contender,
        _number(row.compile_seconds),
        _number(row.median * 1e3, ".1f" if row.median > 0.01 else ".2f"),
        *(_number(rows.ratio(row, peer, row.case)) for peer in ("torch SDPA", "jax.nn")),
        _number(rows.ratio(row, "jaxattn" if row.case in RECURRENCES else row.contender, "causal")),
        _number(rows.ratio(row, "step", row.case)),
        _number(row.floor_seconds * 1e3, ".2f"),
        *(_number(size, ".1f") for size in mib),
    ]


def markdown(rows: Rows, floors: dict[str, float], notes: Sequence[str]) -> str:
    """The whole report."""
    parts = ["# Benchmark\n"]
    parts += [f"- {name}: {text}" for name, text in header().items()]
    parts += ["\nTimes and ratios are medians over rounds, in which all calls of a table take turns.\n"]
    parts += ["## Targets\n"]
    targets = [
        [x.what, "met" if x.measured <= x.limit else "missed", *(_number(n, ".3f") for n in x[1:])] for x in check(rows)
    ]
    parts += [_table(("what", "", "measured", "fastest rounds", "at most"), targets)]
    parts += ["## Floors of this machine\n"]
    units = {"exp": "exponentials", "read": "bytes"}
    rates = [[name, units.get(name, "operations"), _number(rate / 1e9, ".2f")] for name, rate in floors.items()]
    parts += [_table(("what", "unit", "10⁹ per second"), rates)]
    parts += ["## Temporaries against T, float32\n"]
    grown = [[s.case, s.direction, _number(s.bytes_per_token, ".0f"), _number(s.power)] for s in slopes(rows)]
    parts += [_table(("case", "direction", "bytes per token", "power of T"), grown)]
    columns = ["case", "by", "compile s", "ms", "/ torch SDPA", "/ jax.nn", "/ own causal", "/ step"]
    columns += ["floor ms", "temporaries MiB", "peak resident MiB"]
    for setting in dict.fromkeys(row.setting for row in rows.rows):
        parts += [f"## {setting.name}\n"]
        parts += [_table(columns, [_line(row, rows) for row in rows.rows if row.setting == setting])]
    parts += ["## Not measured\n", *(f"- {note}" for note in notes)]
    return "\n".join(parts) + "\n"


def _figure_of_times(rows: Rows, path: Path) -> None:
    """Time over this library's causal call, for each setting with T = S in float32: one panel each."""
    square = [row.setting for row in rows.rows if row.setting.queries == row.setting.keys]
    chosen = [setting for setting in dict.fromkeys(square) if setting.dtype == "float32"]
    figure, axes = plt.subplots(len(chosen), 1, figsize=(9, 2.4 * len(chosen)), squeeze=False, layout="constrained")
    for axis, setting in zip(axes[:, 0], chosen, strict=True):
        here = [row for row in rows.rows if row.setting == setting]
        contenders = list(dict.fromkeys(row.contender for row in here))
        names = [case for case in (*CASES, *RECURRENCES) if any(row.case == case for row in here)]
        for i, contender in enumerate(contenders):
            of = {row.case: row.median * 1e3 for row in here if row.contender == contender}
            places = [names.index(case) + 0.2 * (i - (len(contenders) - 1) / 2) for case in of]
            axis.bar(places, list(of.values()), width=0.2, label=contender)
        axis.set(title=setting.name, ylabel="ms", yscale="log", xticks=range(len(names)), xticklabels=names)
        axis.legend(fontsize="small", ncols=len(contenders))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _figure_of_memory(rows: Rows, path: Path) -> None:
    """Temporaries of forward + backward against T, float32."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows.rows:
        s = row.setting
        if s.backward and s.dtype == "float32" and row.temporaries:
            lines.setdefault((row.contender, row.case), []).append((s.keys, row.temporaries / 2**20))
    for (contender, case), points in lines.items():
        style = "-o" if contender == "jaxattn" else "--x"
        axis.plot(*zip(*points, strict=True), style, label=f"{contender}, {case}")
    axis.set(xscale="log", yscale="log", xlabel="T = S", ylabel="temporaries, MiB", title="forward + backward, float32")
    axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(folder: Path, rows: Rows, floors: dict[str, float], notes: Sequence[str]) -> None:
    """report.md, results.json, times.png and memory.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(rows, floors, notes))
    plain: dict[str, Any] = {"header": header(), "floors": floors, "notes": list(notes)}
    plain["rows"] = [dataclasses.asdict(row) for row in rows.rows]
    plain["targets"] = [target._asdict() for target in check(rows)]
    (folder / "results.json").write_text(json.dumps(plain, indent=1))
    if any(row.setting.queries == row.setting.keys and row.setting.dtype == "float32" for row in rows.rows):
        _figure_of_times(rows, folder / "times.png")
        _figure_of_memory(rows, folder / "memory.png")
