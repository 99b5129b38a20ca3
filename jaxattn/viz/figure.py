"""The common parts of all pictures: colours, panels of (query, key) pairs, and writing to files."""

import math
import os
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#2f5d8a", "#c8553d", "#4f8a4b", "#8a5fa8", "#b8862b", "#4a8f98")
STYLES = ("-", "--", ":", "-.")  # after the last colour the first comes again, in the next style
WEIGHTS = "Blues"
# Of signed numbers, the same shade for the same size: less than nothing is red, more is blue.
SIGNED = LinearSegmentedColormap.from_list("signed", ["#8f2d1a", COLOURS[1], "#f4f3ee", COLOURS[0], "#16324f"])
MOST_COLUMNS = 4
SHOWN = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def visible(token: str) -> str:
    """Returns a token as it can be read: with a sign for each space, end of line and other letter without a shape."""
    return "".join(
        SHOWN.get(letter) or (letter if letter.isprintable() else f"\\{ord(letter):02x}") for letter in token
    )


def panels(count: int, ratio: float = 1.0, beside: float = 0.0, columns: int | None = None) -> tuple[Figure, list[Any]]:
    """Makes a figure of `count` panels for (query, key) pairs: one is large, more are a grid.

    Only the panels at the left and at the bottom name their axes.

    Args:
        count: The number of panels.
        ratio: keys / queries.
        beside: Width left over, for a colour bar.
        columns: The number of columns of the grid.
    """
    columns = min(math.ceil(math.sqrt(count)), MOST_COLUMNS) if columns is None else columns
    rows = -(-count // columns)
    size = 3.6 if count == 1 else 2.2
    figure = Figure(figsize=(size * columns + beside, size / ratio * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= count:
            axes.set_axis_off()
            continue
        whole_ticks(axes)
        if number + columns >= count:
            axes.set_xlabel("key position")
        if number % columns == 0:
            axes.set_ylabel("query position")
    return figure, list(grid.flat)[:count]


def whole_ticks(axes: Any, both: bool = True) -> None:
    """Removes ticks between whole numbers, which positions are, on the x axis or on both."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if both:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


# What says when or by which version a file was written, by format.
UNDATED: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the figure atomically and without a date, so equal figures are equal files. Returns the path.

    Args:
        figure: The figure.
        path: A file whose name ends with .png, .svg or .pdf, in that format.

    Raises:
        ValueError: The name ends in another way.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in UNDATED:
        raise ValueError(f"path is {str(path)!r}: need a name that ends with .png, .svg or .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with rc_context({"svg.hashsalt": "jaxattn"}):  # or names inside the file are random
        figure.savefig(temporary, format=kind, dpi=110, metadata=UNDATED[kind])
    os.replace(temporary, path)
    return path


def legend_above(figure: Figure, *, columns: int, **options: Any) -> None:
    """Puts the legend of a figure above it, in as many columns as fit into its width, and at most `columns`."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for number in range(columns, 0, -1):
        legend = figure.legend(frameon=False, loc="outside upper center", ncols=number, **options)
        if number == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()
