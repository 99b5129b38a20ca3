"""Pictures of the parts in the other slots: biases, maps, normalisers, and rotary embeddings by distance."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxattn.core.attend.bias import ScoreBias
from jaxattn.core.attend.maps import Map
from jaxattn.core.attend.mask import Mask
from jaxattn.core.attend.normalize import Normalize, Softmax
from jaxattn.core.attend.position import RotaryScaling, rotary_frequencies
from jaxattn.core.attend.tile import Tile
from jaxattn.viz.figure import COLOURS, SIGNED, WEIGHTS, panels, whole_ticks

CHANNELS, BASE = 64, 10000.0


def show_scores(
    part: Any,
    queries: int,
    keys: int | None = None,
    title: str | None = None,
    *,
    heads: int = 1,
    on: Literal["scores", "weights"] = "scores",
) -> Figure:
    """Draws the effect of a part on the scores of T queries and S keys.

    A bias: its values at all pairs, a panel per head where heads differ; blue is more, red is less.

    A rotary scaling: the score of a query and a key that are equal, by their distance up to S − 1: the mean over 64
    channels of cos(distance · frequency), beside that of the unscaled embedding.

    A normaliser: the weights of T rows of S scores that fall evenly from 2 to −2, times 1/2, 1, 2, ..

    A map: an example of scores (`on="weights"`: of their softmax), the result of the map, and the one against the
    other, which is a curve where each number is mapped by itself.

    Args:
        part: The bias, map, normaliser or rotary scaling.
        queries: T, at least 1.
        keys: S, by default T.
        title: The title.
        heads: The number of heads, for maps and normalisers with arrays per head; the first is drawn.
        on: Whether a map is applied to scores or to weights.

    Raises:
        TypeError: The part is a mask (see `show_mask`) or is of none of these kinds.
        ValueError: A size is below 1.
    """
    keys = queries if keys is None else keys
    if min(queries, keys, heads) < 1:
        raise ValueError(f"queries, keys and heads must be at least 1, got {queries}, {keys} and {heads}")
    if isinstance(part, Mask) or not (isinstance(part, Map | Normalize | RotaryScaling | ScoreBias)):
        raise TypeError(f"show_scores: need a bias, map, normaliser or rotary scaling, got {type(part).__name__}")
    query, key = (jnp.arange(size, dtype=jnp.int32) for size in (queries, keys))
    tile = Tile(query[None, :, None], key[None, None, :])
    name = type(part).__name__ if title is None else title
    if isinstance(part, Normalize):
        return _rows(part, tile, heads, name)
    if isinstance(part, Map):
        return _before_and_after(part, tile, heads, on, name)
    if isinstance(part, RotaryScaling):
        return _by_distance(part, keys, name)
    values = np.asarray(part(tile))
    return _by_pair(np.broadcast_to(values, np.broadcast_shapes(values.shape, (1, queries, keys))), name)


def _by_pair(values: np.ndarray, title: str) -> Figure:
    heads = values.reshape(-1, *values.shape[-3:])[0]
    if (heads == heads[:1]).all():
        heads = heads[:1]
    figure, grid = panels(len(heads), heads.shape[-1] / heads.shape[-2], beside=0.5)
    largest = float(np.abs(heads).max()) or 1.0
    for head, axes in enumerate(grid):
        image = axes.imshow(heads[head], cmap=SIGNED, vmin=-largest, vmax=largest, interpolation="nearest")
        if len(heads) > 1:
            axes.set_title(f"head {head}", fontsize=8)
        else:
            axes.set_title(title, fontsize=10)
    _bar(figure, image, grid)
    if len(heads) > 1:
        figure.suptitle(title, fontsize=10)
    return figure


def _rows(part: Normalize, tile: Tile, heads: int, title: str) -> Figure:
    queries, keys = tile.query.shape[1], tile.key.shape[2]
    sharpness = 2.0 ** (np.arange(queries) - 1)
    scores = jnp.asarray(sharpness[:, None] * np.linspace(2, -2, keys), jnp.float32)
    scores = jnp.broadcast_to(scores, (heads, queries, keys))
    weights, _ = part.weights(scores, tile._replace(visible=jnp.ones(scores.shape, bool)))
    figure = Figure(figsize=(3.6, 3.0), layout="constrained")
    axes = figure.subplots()
    for row, colour in zip(range(queries), COLOURS * queries, strict=False):
        axes.plot(weights[0, row], "o-", color=colour, markersize=3, linewidth=1, label=f"scores × {sharpness[row]:g}")
    axes.axhline(0, color="#999999", linewidth=0.6, zorder=0)
    axes.set_xlabel("key, from the best to the worst")
    whole_ticks(axes, both=False)
    axes.set_ylabel("weight")
    axes.legend(frameon=False, fontsize=7)
    axes.set_title(title, fontsize=10)
    _open(axes)
    return figure


def _by_distance(part: RotaryScaling, keys: int, title: str) -> Figure:
    figure = Figure(figsize=(3.6, 3.0), layout="constrained")
    axes = figure.subplots()
    lines = (("unscaled", rotary_frequencies, "#999999"), (title, part, COLOURS[0]))
    for label, frequencies, colour in lines:
        angle = np.arange(keys)[:, None] * np.asarray(frequencies(BASE, CHANNELS, jnp.float32))
        axes.plot(np.cos(angle).mean(-1), color=colour, linewidth=1.2, label=label)
    axes.set_xlabel("distance")
    axes.set_ylabel("score of equal query and key")
    axes.legend(frameon=False, fontsize=7)
    axes.set_title(title, fontsize=10)
    whole_ticks(axes, both=False)
    _open(axes)
    return figure


def _before_and_after(part: Map, tile: Tile, heads: int, on: str, title: str) -> Figure:
    shape = (heads, tile.query.shape[1], tile.key.shape[2])
    before = 2 * jax.random.normal(jax.random.key(0), shape)
    if on == "weights":
        before, _ = Softmax().weights(before, tile._replace(visible=jnp.ones(shape, bool)))
    after = np.asarray(part(before, tile))
    first = [np.asarray(x)[0] for x in (before, after)]
    figure, grid = panels(3, shape[2] / shape[1], beside=0.5, columns=3)
    largest = max(float(np.abs(x).max()) for x in first) or 1.0
    colours = {"cmap": SIGNED, "vmin": -largest} if on == "scores" else {"cmap": WEIGHTS, "vmin": 0}
    for axes, x, label in zip(grid, first, (f"{on} before", f"{on} after"), strict=False):
        image = axes.imshow(x, vmax=largest, interpolation="nearest", **colours)
        axes.set_title(label, fontsize=8)
    _bar(figure, image, grid[:2])
    grid[2].plot(*(x.ravel() for x in first), "o", color=COLOURS[0], markersize=2.5, alpha=0.7, markeredgewidth=0)
    grid[2].axline((0, 0), slope=1, color="#999999", linewidth=0.6, zorder=0)
    grid[2].set_title("after against before", fontsize=8)
    grid[2].set_xlabel("before")
    _open(grid[2])
    figure.suptitle(title, fontsize=10)
    return figure


def _bar(figure: Figure, image: Any, axes: Any) -> None:
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02).ax.tick_params(labelsize=7)


def _open(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
