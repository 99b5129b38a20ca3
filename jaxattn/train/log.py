"""The output of a run as it goes: its log, JSON lines on disk, and its progress, on a terminal or as plain text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Log:
    """The log of a run, one dict a line, in memory (`lines`) and as JSON in `file`.

    Opening it drops lines past `step`, whose steps are run again, and a last line that was cut short. Where it is not
    to be written, it is only read and kept in memory.
    """

    def __init__(self, file: Path, step: int, write: bool = True):
        self.file, self.write = file, write
        self.lines: list[dict[str, Any]] = []
        for text in file.read_text().splitlines() if file.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:  # cut short when the process was killed
                continue
            if line["step"] <= step:
                self.lines.append(line)
        if not write:
            return
        temporary = file.with_name(f"{file.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        temporary.replace(file)

    def append(self, line: dict[str, Any]) -> None:
        if self.write:
            with self.file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        self.lines.append(line)


class Display:
    """A progress bar with loss, speed and time left on a terminal; elsewhere a line of text per line of the log."""

    def __init__(self, console: Console, first: int, steps: int):
        self.console, self.steps = console, steps
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=steps, completed=first, loss=math.nan, speed=math.nan)
        self.left = ""

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, step: int, loss: float, speed: float | None) -> None:
        self.progress.update(self.task, completed=step, loss=loss, speed=speed or math.nan)
        remaining = self.progress.tasks[0].time_remaining
        self.left = "" if remaining is None else f"  {remaining:.0f} s left"

    def line(self, line: Mapping[str, Any]) -> None:
        if self.console.is_terminal and "validation_loss" not in line:
            return
        names = ("loss", "validation_loss", "validation_bits_per_byte")
        values = "".join(f"  {name.replace('_', ' ')} {line[name]:.4f}" for name in names if name in line)
        speed = f"  {line['tokens_per_second']:,.0f} tokens/s" if line.get("tokens_per_second") else ""
        left = "" if self.console.is_terminal else self.left
        self.console.print(f"step {line['step']}/{self.steps}{values}{speed}{left}", highlight=False, soft_wrap=True)
