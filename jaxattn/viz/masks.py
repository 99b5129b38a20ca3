"""A picture of any mask."""

from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from jaxattn.core.attend.mask import Mask
from jaxattn.viz.figure import COLOURS, panels

VISIBLE = ListedColormap(["#f2f2ee", COLOURS[0]])


def show_mask(mask: Mask, queries: int, keys: int | None = None, title: str | None = None) -> Figure:
    """Draws which keys (columns) each query (row) may see, at positions 0..T−1 and 0..S−1.

    A mask that differs between heads gets a panel for each; one that differs between batch entries is drawn for the
    first.

    Args:
        mask: The mask.
        queries: T, at least 1.
        keys: S, by default T.
        title: The title.

    Raises:
        ValueError: A size is below 1.
    """
    keys = queries if keys is None else keys
    if min(queries, keys) < 1:
        raise ValueError(f"queries and keys must be at least 1, got {queries} and {keys}")
    shown = np.asarray(mask.to_array(queries, keys))
    heads = shown.reshape(-1, *shown.shape[-3:])[0]
    if (heads == heads[:1]).all():
        heads = heads[:1]
    figure, grid = panels(len(heads), keys / queries)
    for head, axes in enumerate(grid):
        axes.imshow(heads[head], cmap=VISIBLE, vmin=0, vmax=1, interpolation="nearest")
        _between_cells(axes, queries, keys)
        described = f"{heads[head].mean():.0%} of pairs visible"
        if len(heads) > 1:
            axes.set_title(f"head {head}: {heads[head].mean():.0%}", fontsize=8)
        else:
            axes.set_title(title or described, fontsize=10)
    if title and len(heads) > 1:
        figure.suptitle(title, fontsize=10)
    return figure


def _between_cells(axes: Any, queries: int, keys: int) -> None:
    """Draws white lines between the pairs, where they are few enough to see."""
    if max(queries, keys) <= 64:
        axes.set_xticks(np.arange(-0.5, keys), minor=True)
        axes.set_yticks(np.arange(-0.5, queries), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
