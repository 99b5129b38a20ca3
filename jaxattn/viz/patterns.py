"""Pictures of what heads look at: maps of heads or tokens as points, offsets in an image, and arcs between words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from numpy.typing import ArrayLike

from jaxattn.viz.figure import COLOURS, WEIGHTS, visible

MOST_NAMES = 60  # points are named up to here


def show_points(
    points: Mapping[str, ArrayLike], names: Mapping[str, Sequence[str]] | None = None, title: str = ""
) -> Figure:
    """Draws points in two dimensions, a colour for each group: heads on a map by their distances, or queries and keys.

    Args:
        points: [n, 2] by the name of the group.
        names: What is written beside the points of a group, where all groups together have at most 60.
        title: The title.

    Raises:
        ValueError: Points are not in two dimensions, or there are not as many names as points.
    """
    groups = {name: np.asarray(given, np.float64) for name, given in points.items()}
    written = dict(names or {})
    for name, places in groups.items():
        if places.ndim != 2 or places.shape[1] != 2:
            raise ValueError(f"points[{name!r}] has shape {places.shape}: need [n, 2]")
        if name in written and len(written[name]) != len(places):
            raise ValueError(f"names[{name!r}] has {len(written[name])} names: need {len(places)}, one for each point")
    few = sum(map(len, groups.values())) <= MOST_NAMES
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, places) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*places.T, "o", color=colour, markersize=5 if few else 2.5, alpha=0.8, markeredgewidth=0, label=name)
        for place, text in zip(places, written.get(name, ()) if few else (), strict=False):
            axes.annotate(visible(text), place, xytext=(3, 3), textcoords="offset points", fontsize=6.5, color=colour)
    axes.set_aspect("equal", "datalim")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    if len(groups) > 1:
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    return figure


def show_offsets(
    maps: ArrayLike, layers: Sequence[int] | None = None, title: str = "what is read, by offset"
) -> Figure:
    """Draws where the queries of each head look around themselves: a map for each, layers down and heads across.

    The query is in the middle, marked by a cross. All maps share one colour scale, the square root of the weight.

    Args:
        maps: [L, N, 2K − 1, 2K − 1], such as those of `analysis.aligned_map`.
        layers: The numbers [L] of the layers, where these are some of them.
        title: The title.

    Raises:
        ValueError: Maps have another rank or no middle, or there are not as many numbers as layers.
    """
    values = np.asarray(maps, np.float32)
    if values.ndim != 4 or values.shape[-1] != values.shape[-2] or values.shape[-1] % 2 == 0:
        raise ValueError(f"maps has shape {values.shape}: need [layers, heads, 2 K - 1, 2 K - 1]")
    numbers = range(len(values)) if layers is None else layers
    if len(numbers) != len(values):
        raise ValueError(f"layers has {len(numbers)} numbers: need {len(values)}, one for each layer of the maps")
    rows, columns = values.shape[:2]
    figure = Figure(figsize=(1.1 * columns + 0.9, 1.25 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    scale = PowerNorm(0.5, vmin=0, vmax=float(np.nanmax(values, initial=0)) or 1.0)
    middle = values.shape[-1] // 2
    image: Any = None
    for (layer, head), axes in np.ndenumerate(grid):
        image = axes.imshow(values[layer, head], cmap=WEIGHTS, norm=scale, interpolation="nearest")
        axes.plot(middle, middle, "+", color=COLOURS[1], markersize=5, markeredgewidth=0.8)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"layer {numbers[layer]} head {head}", fontsize=6.5, pad=2)
    figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02).ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def show_arcs(
    tokens: Sequence[str],
    weights: ArrayLike,
    heads: Sequence[int] | None = None,
    importance: ArrayLike | None = None,
    *,
    least: float = 0.1,
    title: str = "",
) -> Figure:
    """Draws what words read as arcs above the text, and a tree of the same words as arcs below it.

    An arc above goes from a word to one that it reads, as strong as the weight; arcs below go from each word to its
    head. Arcs that are in both are drawn in another colour. Bars under the words are their importance.

    Args:
        tokens: [T], the words.
        weights: [T, T], those of one head.
        heads: [T], the head of each word in the tree, −1 for none.
        importance: [T], numbers from 0 on, such as saliency.
        least: Weights below it have no arc.
        title: The title, which names layer and head.

    Raises:
        ValueError: The arguments are not of as many words.
    """
    values, count = np.asarray(weights, np.float64), len(tokens)
    if values.shape != (count, count):
        raise ValueError(f"weights has shape {values.shape}: need {(count, count)}, as there are {count} tokens")
    for name, given in (("heads", heads), ("importance", importance)):
        if given is not None and np.shape(given) != (count,):
            raise ValueError(f"{name} has shape {np.shape(given)}: need one for each of {count} tokens")
    figure = Figure(figsize=(max(0.62 * count, 4), 3.6), layout="constrained")
    axes = figure.subplots()
    tree = {} if heads is None else {(i, int(head)) for i, head in enumerate(heads) if head >= 0}

    def arc(i: int, j: int, up: int, colour: str, **style: Any) -> None:
        height = up * (0.25 + 0.45 * abs(i - j))
        corners = [(i, 0.2 * up), (i, height + 0.2 * up), (j, height + 0.2 * up), (j, 0.2 * up)]
        path = Path(corners, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
        axes.add_patch(PathPatch(path, fill=False, edgecolor=colour, **style))

    for i, j in np.argwhere((values >= least) & ~np.eye(count, dtype=bool)):
        both = (i, j) in tree or (j, i) in tree
        arc(i, j, 1, COLOURS[1 if both else 0], alpha=float(np.clip(values[i, j], 0, 1)), linewidth=1.8)
    for i, j in sorted(tree):
        arc(i, j, -1, "#777777", linewidth=0.9)
    if importance is not None:
        sizes = np.asarray(importance, np.float64)
        top = sizes.max(initial=0) or 1.0
        axes.bar(range(count), -0.14 * sizes / top, 0.7, -0.2, color=COLOURS[2], alpha=0.6)
    for place, token in enumerate(tokens):
        axes.text(place, 0, visible(token), ha="center", va="center", fontsize=8, family="monospace")
    reach = 0.6 + 0.45 * max(count - 1, 1) * 0.75
    axes.set(xlim=(-0.7, count - 0.3), ylim=(-reach if tree else -0.6, reach))
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return figure
