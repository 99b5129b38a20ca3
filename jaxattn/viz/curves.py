"""Curves over training steps, over the number of examples in a prompt, over layers, and over distances."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from jaxattn.viz.figure import COLOURS, STYLES, legend_above


def show_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], train: str | None = None, label: str | None = None
) -> Figure:
    """Draws the histories of runs, one colour each: `train` as a thin line, `validation_` + train as a line with dots.

    Args:
        runs: Histories by the name of the run. A history is a list of dicts with `step` and, in some of them, these
            metrics (`train.Result.history`).
        train: The metric, by default "bits_per_byte" where every run has it, and else "loss".
        label: The name of the metric.
    """
    if train is None:
        of_bytes = all(any("bits_per_byte" in line for line in history) for history in runs.values())
        train = "bits_per_byte" if of_bytes else "loss"
    label = train.replace("_", " ") if label is None else label
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, history), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        for metric, style in ((train, {"linewidth": 0.8, "alpha": 0.5}), (f"validation_{train}", {"marker": "o"})):
            points = [(line["step"], line[metric]) for line in history if metric in line]
            if points:
                described = f"{name}, validation {points[-1][1]:.3f}" if "marker" in style else None
                axes.plot(*zip(*points, strict=True), color=colour, markersize=4, label=described, **style)
    axes.set(xlabel="step", ylabel=label)
    _plain(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, title="dots: validation; thin: training")
    return figure


def show_risks(
    lengths: Sequence[int], risks: Mapping[str, tuple[Any, Any]], label: str = "risk", log: bool = False
) -> Figure:
    """Draws risk by the number of examples: a line for each mean, in a band of two standard errors to either side.

    Where a predictor diverges its line leaves the picture: the axis ends at 3 times the middle one of the largest risks
    of all lines (at 100 times on a logarithmic axis). The legend says where a risk is not finite.

    Args:
        lengths: Numbers of examples.
        risks: (means, standard errors) by name, each as long as `lengths`: those of `icl.RiskTable.risks`.
        label: The name of the risk.
        log: Whether the risk has a logarithmic axis.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    largest: list[float] = []
    least: list[float] = []
    for number, (name, (mean, error)) in enumerate(risks.items()):
        mean, error = np.asarray(mean, float), np.asarray(error, float)
        finite = np.isfinite(mean)
        lost = [str(length) for length, x in zip(lengths, finite, strict=True) if not x]
        counted = mean[finite & (mean > 0)] if log else mean[finite]
        largest += [counted.max()] if len(counted) else []
        least += [counted.min()] if len(counted) else []
        mean, error = np.where(finite, mean, np.nan), np.where(finite, error, np.nan)
        label_of = f"{name} (not finite at {', '.join(lost)})" if lost else name
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axes.plot(lengths, mean, style, color=colour, marker="o", markersize=3, label=label_of)
        axes.fill_between(lengths, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="examples in the prompt", ylabel=label, yscale="log" if log else "linear")
    top = (100 if log else 3) * statistics.median_low(largest) if largest else 0
    if max(largest, default=0) > top > 0:
        axes.set_ylim(min(least) / 2 if log else min(least) - 0.05 * (top - min(least)), top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)
    axes.legend(frameon=False, fontsize="small")
    return figure


def show_by_layer(scores: Mapping[str, ArrayLike], label: str = "score") -> Figure:
    """Draws a dot for the score of every head, by its layer, and a line through the means of the layers.

    Args:
        scores: [L, N] by name, a colour for each.
        label: The name of the score.

    Raises:
        ValueError: Scores have another rank.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (name, given) in enumerate(scores.items()):
        values = np.asarray(given, np.float32)
        if values.ndim != 2:
            raise ValueError(f"scores[{name!r}] has shape {values.shape}: need [layers, heads]")
        colour, layers = COLOURS[number % len(COLOURS)], np.arange(len(values))
        axes.plot(np.repeat(layers, values.shape[1]), values.ravel(), "o", color=colour, markersize=4, alpha=0.5)
        axes.plot(layers, values.mean(1), color=colour, linewidth=1.5, label=name)
    axes.set(xlabel="layer", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)
    legend_above(figure, columns=4, title="dots: heads; line: mean of the layer")
    return figure


def show_lags(profiles: Mapping[str, tuple[Any, Any]], label: str = "mean weight") -> Figure:
    """Draws what queries give to keys d positions before them, with bars of two standard errors to either side.

    Args:
        profiles: (means, standard errors) by name, each of the lags d = 0, 1, ...
        label: The name of the mean.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (name, (given, error)) in enumerate(profiles.items()):
        mean, error = np.asarray(given, np.float32), np.asarray(error, np.float32)
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axes.errorbar(
            np.arange(len(mean)),
            mean,
            2 * error,
            color=colour,
            linestyle=style,
            marker="o",
            markersize=3,
            linewidth=1,
            capsize=2,
            label=name,
        )
    axes.set(xlabel="lag: query position − key position", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)
    legend_above(figure, columns=4, title="bars: two standard errors")
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
