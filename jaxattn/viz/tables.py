"""Tables of numbers with names on both sides: scores of heads, effects of patching, and the logit lens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from jaxattn.viz.figure import SIGNED, WEIGHTS, visible

MOST_VALUES = 64  # numbers are printed into the cells up to here
MOST_LETTERS = 12  # of a token
MOST_LABELS = 40  # labels of an axis: of more, evenly spaced ones are shown


def show_grid(
    scores: ArrayLike, title: str = "", layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> Figure:
    """Draws a score of every head: layers down, heads across, with the numbers where there are at most 64.

    Scores with both signs are drawn around 0: less than nothing is red, more is blue.

    Args:
        scores: [L, N].
        title: The name of the score.
        layers: The numbers [L] of the layers, where these are some of them.
        heads: The numbers [N] of the heads.

    Raises:
        ValueError: Scores have another rank, or there are not as many names as rows or columns.
    """
    values = _matrix("scores", scores)
    rows = _names(len(values), layers)
    columns = _names(values.shape[1], heads)
    few = values.size <= MOST_VALUES
    figure, axes = _table(values, rows, columns, title, cell=0.42 if few else 0.26, values=few)
    axes.set(xlabel="head", ylabel="layer")
    return figure


def show_patching(
    effects: ArrayLike, tokens: Sequence[str], title: str = "effect of patching", rows: Sequence[str] | None = None
) -> Figure:
    """Draws the effect of patching each position of each layer, around 0: less than nothing is red, more is blue.

    Args:
        effects: [L, T].
        tokens: [T], the labels of the positions.
        title: The name of the effect.
        rows: The names [L] of the layers; by default their numbers.

    Raises:
        ValueError: Effects have another rank, or there are not as many names as rows or columns.
    """
    values = _matrix("effects", effects)
    names = _names(len(values), rows)
    labels = [f"{place} {visible(token)[:MOST_LETTERS]}" for place, token in enumerate(tokens)]
    figure, axes = _table(values, names, labels, title, cell=0.26, signed=True, upright=True)
    axes.set(xlabel="position", ylabel="layer")
    return figure


def show_lens(
    tokens: Sequence[Sequence[str]],
    probabilities: ArrayLike,
    read: Sequence[str],
    title: str = "logit lens",
    rows: Sequence[str] | None = None,
) -> Figure:
    """Draws the logit lens: the likeliest token after each layer at each position, darker where it is likelier.

    Args:
        tokens: [L, T], the likeliest tokens. Those of a decoder at position t are for position t + 1.
        probabilities: [L, T], theirs, in 0..1.
        read: [T], the tokens of the text.
        title: The title.
        rows: The names [L] of the layers; by default their numbers.

    Raises:
        ValueError: Probabilities have another rank, or there are not as many tokens or names as numbers.
    """
    values = _matrix("probabilities", probabilities)
    if {len(row) for row in tokens} != {values.shape[1]} or len(tokens) != len(values):
        raise ValueError(f"tokens has rows of {[len(row) for row in tokens]}: need {values.shape}, as probabilities")
    names = _names(len(values), rows)
    texts = np.array([[visible(token)[:MOST_LETTERS] for token in row] for row in tokens], object)
    labels = [f"{place} {visible(token)[:MOST_LETTERS]}" for place, token in enumerate(read)]
    figure, axes = _table(values, names, labels, title, cell=0.85, height=0.26, values=texts, top=1.0, upright=True)
    axes.set(xlabel="token that was read", ylabel="layer")
    return figure


def _matrix(name: str, values: ArrayLike) -> np.ndarray:
    matrix = np.asarray(values, np.float32)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} has shape {matrix.shape}: need two axes, with at least one entry each")
    return matrix


def _names(count: int, given: Sequence[Any] | None) -> list[str]:
    return [str(name) for name in (range(count) if given is None else given)]


def _table(
    matrix: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    cell: float,
    height: float | None = None,
    values: Any = False,
    signed: bool = False,
    top: float | None = None,
    upright: bool = False,
) -> tuple[Figure, Any]:
    """Draws cells of `cell` by `height` inches, with a colour bar.

    Args:
        matrix: [R, C]; what is not finite stays grey.
        rows: [R] names.
        columns: [C] names.
        title: The title.
        cell: The width of a cell, in inches.
        height: Its height; by default the same.
        values: What stands in the cells: texts [R, C], or True for the numbers, or False for nothing.
        signed: Whether colours go both ways from 0 although no number is negative.
        top: The number of the darkest colour; by default the largest.
        upright: Whether names of columns are turned.
    """
    for axis, names, count in (("rows", rows, matrix.shape[0]), ("columns", columns, matrix.shape[1])):
        if len(names) != count:
            raise ValueError(f"there are {len(names)} names for {count} {axis}: need as many")
    height = cell if height is None else height
    beside, above = 1.2 + 0.07 * max(map(len, rows)), 1.0 + (0.07 * max(map(len, columns)) if upright else 0)
    size = (max(cell * matrix.shape[1], 1.2) + beside, max(height * matrix.shape[0], 0.8) + above)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    finite = matrix[np.isfinite(matrix)]
    signed = signed or bool((finite < 0).any())
    largest = float(np.abs(finite).max(initial=0)) or 1.0 if top is None else top
    image = axes.imshow(
        np.ma.masked_invalid(matrix),
        cmap=SIGNED if signed else WEIGHTS,
        vmin=-largest if signed else 0,
        vmax=largest,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_facecolor("#bbbbbb")
    for ticks, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        every = -(-len(names) // MOST_LABELS)
        ticks.set_ticks(range(0, len(names), every), names[::every], fontsize=7)
    axes.tick_params(length=0, pad=2)
    if upright:
        axes.tick_params(axis="x", labelrotation=90)
    if values is not False:
        for (i, j), number in np.ndenumerate(matrix):
            text = f"{number:.2f}" if values is True else values[i, j]
            red, green, blue, _ = image.cmap(image.norm(number))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            axes.text(
                j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black", clip_on=True
            )
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    axes.set_title(title, fontsize=10)
    return figure, axes
