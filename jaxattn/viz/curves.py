"""Curves over training steps, and over the number of examples in a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxattn.viz.figure import COLOURS, STYLES


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

    Args:
        lengths: Numbers of examples.
        risks: (means, standard errors) by name, each as long as `lengths`: those of `icl.RiskTable.risks`.
        label: The name of the risk.
        log: Whether the risk has a logarithmic axis.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (name, (mean, error)) in enumerate(risks.items()):
        mean, error = np.asarray(mean), np.asarray(error)
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axes.plot(lengths, mean, style, color=colour, marker="o", markersize=3, label=name)
        axes.fill_between(lengths, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="examples in the prompt", ylabel=label, yscale="log" if log else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
