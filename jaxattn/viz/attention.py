"""Pictures of attention weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from jaxattn.viz.figure import WEIGHTS, visible

MOST_TICKS = 48  # token labels are legible up to here


def show_heads(
    weights: Mapping[str, ArrayLike],
    captions: Mapping[str, ArrayLike] | None = None,
    tokens: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> Figure:
    """Draws the weights of every head of one or more models: a grid per model, layers down, heads across.

    All panels share one colour scale, the square root of the weight, so that small weights show.

    Args:
        weights: Weights [L, N, T, S] by the name of the model.
        captions: Texts [L, N] below the panels, by the name of the model.
        tokens: Labels [S] of the axes where they are legible (one model, few tokens).
        layers: The numbers [L] of the layers, where the weights are of some of them.

    Raises:
        ValueError: Weights have another rank, or there are not as many numbers as layers.
    """
    models = {name: np.asarray(of_model, np.float32) for name, of_model in weights.items()}
    if not models or any(of_model.ndim != 4 for of_model in models.values()):
        raise ValueError(f"weights must be [L, N, T, S], got {[of_model.shape for of_model in models.values()]}")
    texts = {name: np.asarray(caption) for name, caption in (captions or {}).items()}
    rows = max(of_model.shape[0] for of_model in models.values())
    numbers = range(rows) if layers is None else layers
    if len(numbers) != rows:
        raise ValueError(f"layers has {len(numbers)} numbers: need {rows}, one for each layer of the weights")
    labels = [visible(token) for token in tokens]
    heads = [of_model.shape[1] for of_model in models.values()]
    labelled = 0 < len(tokens) <= MOST_TICKS and len(models) == 1
    size = 2.6 if labelled else 1.25
    figure = Figure(figsize=(size * sum(heads) + 0.3 * len(heads) + 0.9, (size + 0.25) * rows + 0.5))
    figure.set_layout_engine("constrained", h_pad=0.02)
    scale = PowerNorm(0.5, vmin=0, vmax=max(float(of_model.max()) for of_model in models.values()))
    columns: Any = figure.subfigures(1, len(models) + 1, width_ratios=[*heads, 0.8 / size], wspace=0.02)
    *parts, legend = columns
    image: Any = None
    for part, (name, of_model) in zip(parts, models.items(), strict=True):
        part.suptitle(name, fontsize=10)
        grid = part.subplots(rows, of_model.shape[1], squeeze=False)
        for (layer, head), axes in np.ndenumerate(grid):
            axes.set_xticks([])
            axes.set_yticks([])
            if layer >= len(of_model):
                axes.set_axis_off()
                continue
            image = axes.imshow(of_model[layer, head], cmap=WEIGHTS, norm=scale, interpolation="nearest")
            axes.set_title(f"layer {numbers[layer]} head {head}", fontsize=6.5, pad=2)
            if name in texts:
                axes.set_xlabel(str(texts[name][layer, head]), fontsize=6.5, labelpad=2)
            if labelled:
                axes.set_xticks(range(len(labels)), labels, fontsize=4.5, family="monospace")
                axes.set_yticks(range(len(labels)), labels, fontsize=4.5, family="monospace")
                axes.tick_params(length=0, pad=1)
    bar = legend.colorbar(image, cax=legend.add_axes((0.1, 0.2, 0.2, 0.6)))
    bar.set_label("weight", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure
