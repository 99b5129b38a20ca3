"""Where patches of an image look: how far, in which direction, and at which neighbours; and what heads are worth.

The patches of a square image of K x K stand row by row. Functions take weights between patches, [..., P, P] with
P = K², as `patch_weights` cuts them out of recorded ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.analysis.pruning import without_heads
from jaxattn.analysis.similarity import js_divergence
from jaxattn.core.numeric import ratio
from jaxattn.trace import TokensAt, heads, run, sweep
from jaxattn.trace.patching import as_inputs


def patch_weights(weights: Float[Any, "*b t t"], *, own: int = 1, divide: bool = True) -> Float[np.ndarray, "*b p p"]:
    """Returns the weights between patches, without the tokens of the model's own that stand first.

    Args:
        weights: [..., T, T], recorded attention weights of a vision transformer.
        own: The number of first tokens that are no patches, such as 1 for a class token.
        divide: Whether rows are divided by what is left of them, so that they sum to 1 again. Rows that have nothing
            left are 0 in both cases.

    Raises:
        ValueError: What is left is no square of patches.
    """
    left = np.asarray(weights, np.float64)[..., own:, own:]
    _side(left)
    total = left.sum(-1, keepdims=True)
    return left / np.where(total == 0, 1, total) if divide else left


def _side(patches: np.ndarray) -> int:
    """K, for weights [..., K², K²]."""
    side = round(patches.shape[-1] ** 0.5)
    if side**2 != patches.shape[-1] or patches.shape[-2] != patches.shape[-1] or not side:
        raise ValueError(f"weights are between {patches.shape[-2:]} patches: need as many, a square number K²")
    return side


def grid_distances(side: int) -> Float[np.ndarray, "p p"]:
    """Returns how far the patches of a square image are apart, in patches.

    Args:
        side: K. Divide by K − 1 for distances of which the side of the image is 1.
    """
    rows, columns = np.divmod(np.arange(side**2), side)
    return np.hypot(rows[:, None] - rows, columns[:, None] - columns)


def patch_distance(patches: Float[np.ndarray, "*b p p"]) -> Float[np.ndarray, "*b"]:
    """Returns the mean distance of what patches read, in patches: mean_i Σ_j A_ij ‖x_i − x_j‖.

    Args:
        patches: [..., P, P]. With rows of sum 1 uniform attention has the mean distance of all pairs.

    Raises:
        ValueError: There is no square of patches.
    """
    return (patches * grid_distances(_side(patches))).sum(-1).mean(-1)


def aligned_map(patches: Float[np.ndarray, "*b p p"]) -> Float[np.ndarray, "*b lags lags"]:
    """Returns how much is read at each offset in the image, Σ_i A_{i, i + (dy, dx)}, the query in the middle.

    The map of each query is moved so that the query is at [K − 1, K − 1] of a canvas of 2K − 1, and all are added up
    (Walmer et al., 2023). A query at the border cannot look over it: divide by `aligned_map(np.ones((P, P)))`, the
    number of pairs at each offset, to compare offsets.

    Args:
        patches: [..., P, P].

    Raises:
        ValueError: There is no square of patches.
    """
    side = _side(patches)
    canvas = np.zeros((*patches.shape[:-2], 2 * side - 1, 2 * side - 1))
    for query in range(side**2):
        down, right = side - 1 - query // side, side - 1 - query % side
        canvas[..., down : down + side, right : right + side] += patches[..., query, :].reshape(
            *patches.shape[:-2], side, side
        )
    return canvas


def mean_offset(aligned: Float[np.ndarray, "*b lags lags"]) -> Float[np.ndarray, "*b 2"]:
    """Returns the centre of mass (dy, dx) of aligned maps, where the canvas is from −1 to 1 (Walmer et al., 2023).

    A patch is 1 / (K − 1) of it. The norm says how far from itself a query looks on average, and 0 is for heads that
    look to all sides alike. NaN where nothing is read, and for an image of one patch.

    Args:
        aligned: [..., 2K − 1, 2K − 1], of `aligned_map`.
    """
    size = aligned.shape[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        place = (np.arange(size) - size // 2) / (size // 2)
        total = aligned.sum((-2, -1))
        down = (aligned.sum(-1) * place).sum(-1) / total
        return np.stack([down, (aligned.sum(-2) * place).sum(-1) / total], -1)


class RingProfile(NamedTuple):
    """What patches read k steps away, that is where the larger of |dx| and |dy| is k.

    Attributes:
        mass: [..., K], the mean over patches of what they read in the ring.
        mean: [..., K], the mean over patches of the mean weight in the ring, by the patches that the ring has inside
            the image; a patch whose ring is outside does not count.
    """

    mass: np.ndarray
    mean: np.ndarray


def ring_profile(patches: Float[np.ndarray, "*b p p"]) -> RingProfile:
    """Returns how strongly patches attend to neighbours k steps away, k = 0 .. K − 1 (Li et al., 2023).

    The definition is from the idea of the paper; its exact form is not known here. Uniform attention has the same mean
    in every ring. Masses sum to those of the rows: 1, or less than that by what the class token gets if rows were not
    divided.

    Args:
        patches: [..., P, P].

    Raises:
        ValueError: There is no square of patches.
    """
    side = _side(patches)
    rows, columns = np.divmod(np.arange(side**2), side)
    steps = np.maximum(abs(rows[:, None] - rows), abs(columns[:, None] - columns))
    masses, means = [], []
    for ring in range(side):
        inside = steps == ring
        read, count = (patches * inside).sum(-1), inside.sum(-1)
        masses.append(read.mean(-1))
        means.append((read / np.maximum(count, 1)).sum(-1) / (count > 0).sum())
    return RingProfile(np.stack(masses, -1), np.stack(means, -1))


def position_deviation(patches: Float[np.ndarray, "*b p p"]) -> Float[np.ndarray, "*b"]:
    """Returns how much a head depends on where it looks from: the deviation of A_ij over queries i, mean over keys j.

    Args:
        patches: [..., P, P]. 0 for heads whose queries all read alike.
    """
    return patches.std(-2).mean(-1)


class PruningScores(NamedTuple):
    """What a classifier loses without a head, for each image.

    Attributes:
        drop: [L, N, B], by how much the probability of the label falls.
        divergence: [L, N, B], the Jensen-Shannon divergence between the answers with and without it, nats.
        moved: [L, N, B], 1 − cosine of the first token of the last layer with and without it, 0 to 2.
    """

    drop: Array
    divergence: Array
    moved: Array


def pruning_scores(
    model: Any,
    inputs: Any,
    labels: Int[Array, " b"],
    logits_of: Callable[[Any], Array] = lambda output: output,
    *,
    pruned: Bool[Array, "layers n"] | None = None,
    chunk: int = 1,
    **options: Any,
) -> PruningScores:
    """Returns what each head is worth: what a model without it answers (z = 0), beside what it answered.

    The first is an importance of heads in Li et al. (2023) as far as is known here; the list of the paper is not.

    Args:
        model: A classifier whose first token is the class token.
        inputs: Its inputs, or a tuple of them.
        labels: [B], the right classes.
        logits_of: From the output of the model to logits [B, C], such as those of the first token.
        pruned: [L, N], heads that are removed in all runs, so that scores are what is lost beyond them (conditional
            importance). Their own scores are 0.
        chunk: How many heads are removed at once, each in a run of its own.
        options: Other arguments of the model.

    Raises:
        ValueError: There is not one row of logits per input.
    """
    inputs, labels = as_inputs("inputs", inputs, options), jnp.asarray(labels)
    edits: Any = {} if pruned is None else without_heads(pruned)
    record = {"class": ("resid", TokensAt(jnp.zeros(1, int)))}
    output, seen = run(model, *inputs, edits=edits, record=record, **options)
    logits = logits_of(output)
    if logits.ndim != 2 or logits.shape[:1] != labels.shape:
        raise ValueError(f"the logits have shape {logits.shape}: need [{len(labels)}, classes], as many as labels")
    before, state = jax.nn.softmax(logits), seen["class"][-1][:, 0]

    def without(more: Any) -> PruningScores:
        both = {"z": (edits["z"], more["z"])} if edits else more
        output, _, seen = model(*inputs, edits=both, record=record, **options)
        after, moved = jax.nn.softmax(logits_of(output)), seen["class"][-1][:, 0]
        sizes = jnp.linalg.norm(state, axis=-1) * jnp.linalg.norm(moved, axis=-1)
        lost = jnp.take_along_axis(before - after, labels[:, None], 1)[:, 0]
        return PruningScores(lost, js_divergence(before, after), 1 - ratio((state * moved).sum(-1), sizes))

    return sweep(without, heads(model, inputs=inputs, **options), chunk=chunk)
