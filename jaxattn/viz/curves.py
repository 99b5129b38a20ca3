"""Curves over training steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from jaxattn.viz.figure import COLOURS


def show_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], train: str = "bits_per_byte", label: str = "bits per byte"
) -> Figure:
    """The histories of runs, one colour each: `train` as a thin line, `validation_` + train as a line with dots.

    A history is a list of dicts with `step` and, in some of them, these metrics (`train.Result.history`).
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, history), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        for metric, style in ((train, {"linewidth": 0.8, "alpha": 0.5}), (f"validation_{train}", {"marker": "o"})):
            points = [(line["step"], line[metric]) for line in history if metric in line]
            if points:
                described = f"{name}, validation {points[-1][1]:.3f}" if "marker" in style else None
                axes.plot(*zip(*points, strict=True), color=colour, markersize=4, label=described, **style)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, title="dots: validation; thin: training")
    return figure
