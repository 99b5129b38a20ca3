"""A picture of any mask."""

import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from jaxattn.core.mask import Mask
from jaxattn.viz.figure import COLOURS


def show_mask(mask: Mask, queries: int, keys: int | None = None, title: str | None = None) -> Figure:
    """Which keys (columns) each query (row) may see, at positions 0..T−1 and 0..S−1; S = T unless given.

    Masks that differ between batch entries or heads are drawn for the first. Raises ValueError for a size below 1.
    """
    keys = queries if keys is None else keys
    if min(queries, keys) < 1:
        raise ValueError(f"queries and keys must be at least 1, got {queries} and {keys}")
    shown = np.asarray(mask(jnp.arange(queries)[:, None], jnp.arange(keys)[None, :]))
    shown = np.broadcast_to(shown, np.broadcast_shapes(shown.shape, (queries, keys)))
    shown = shown.reshape(-1, queries, keys)[0]
    figure = Figure(figsize=(3.6, 3.6 * queries / keys + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shown, cmap=ListedColormap(["#f2f2ee", COLOURS[0]]), vmin=0, vmax=1, interpolation="nearest")
    if max(queries, keys) <= 64:
        axes.set_xticks(np.arange(-0.5, keys), minor=True)
        axes.set_yticks(np.arange(-0.5, queries), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    axes.set_title(title or f"{shown.mean():.0%} of pairs visible", fontsize=10)
    return figure
