"""Hooks for `fit`: what else is done with the lines of the log.

A hook is any function: `fit(on_log=print)`. Those made here keep up with runs that stop and go on.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


def csv_log(file: str | Path) -> Callable[[Line], None]:
    """Returns a hook for `on_log` that writes the lines as a table, comma-separated, with a column for each name.

    A name that a line does not have is an empty field. A resumed run goes on with the table of its earlier part: rows
    from its first line on are replaced.

    Args:
        file: The file. Its folder is made when it is not there.
    """
    file = Path(file)
    rows: list[dict[str, Any]] = []
    names: list[str] = []

    def write(line: Line) -> None:
        first = not rows
        if first and file.exists():
            with file.open(newline="") as stream:
                rows.extend(row for row in csv.DictReader(stream) if int(row["step"]) < line["step"])
        rows.append(dict(line))
        known = list(dict.fromkeys(name for row in (rows if first else rows[-1:]) for name in (*names, *row)))
        if first or known != names:  # a new column changes every row
            names[:] = known
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f"{file.name}.tmp")
            with temporary.open("w", newline="") as stream:
                table = csv.DictWriter(stream, names)
                table.writeheader()
                table.writerows(rows)
            temporary.replace(file)
            return
        with file.open("a", newline="") as stream:
            csv.DictWriter(stream, names).writerow(rows[-1])

    return write


def tensorboard_log(folder: str | Path, writer: Any = None) -> Callable[[Line], None]:
    """Returns a hook for `on_log` that writes the numbers of each line for TensorBoard: `validation_loss` as
    `validation/loss`, and `loss` as `train/loss`.

    A resumed run writes over what its earlier part had written from there on.

    Args:
        folder: The folder that TensorBoard is to show.
        writer: What writes, with `add_scalar(name, value, step)` and `flush()`; by default a `SummaryWriter` of the
            package tensorboardX in the folder, made at the first line.

    Raises:
        ModuleNotFoundError: There is no writer, and tensorboardX is not installed.
    """
    if writer is None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            needed = "install jaxattn[tensorboard], or give a writer"
            message = f"tensorboard_log needs tensorboardX, which is not installed: {needed}"
            raise ModuleNotFoundError(message, name=error.name) from None

    def write(line: Line) -> None:
        nonlocal writer
        if writer is None:
            writer = SummaryWriter(str(folder), purge_step=line["step"])
        for name, value in line.items():
            if name != "step" and value is not None:
                group, short = ("validation", name[11:]) if name.startswith("validation_") else ("train", name)
                writer.add_scalar(f"{group}/{short}", value, line["step"])
        writer.flush()

    return write
