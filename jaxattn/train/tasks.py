"""Training on tasks: prompts drawn inside the step, and the loss of the answers to them.

A task is anything with `sample(key, batch) -> prompt` and a `length`, a curriculum anything with `at(step) -> task` and
the `task` that it ends at; a prompt has questions `x`, answers `y` and `weights`, which say what counts. `jaxattn.icl`
has them.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxattn.train.data import Drawn
from jaxattn.train.step import LossFunction


def drawn(task: Any) -> Drawn:
    """Fresh prompts of a task, or of a curriculum, as `fit` takes them; validation prompts are of the curriculum's end.

    The numbers of the task are part of the digest by which a run is resumed, so it must be a pytree of arrays and
    numbers, as parts are. Raises TypeError for what is neither a task nor a curriculum, and for any other leaf.
    """
    if not hasattr(task, "at") and not hasattr(task, "sample"):
        raise TypeError(f"task is {task!r}: need one with sample(key, batch), or a curriculum with at(step)")
    leaves, structure = jax.tree.flatten(task)
    content = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray | np.number | np.bool_ | int | float | complex):
            raise TypeError(f"task holds {leaf!r}: need a registered pytree (such as a part) of arrays and numbers")
        content.update(np.asarray(leaf).tobytes())
    digest = f"{type(task).__name__} {content.hexdigest()[:16]}"
    if hasattr(task, "at"):
        grow = task.at
        return Drawn(lambda key, rows, step: grow(step).sample(key, rows), task.task.length, digest, curriculum=True)
    return Drawn(lambda key, rows: task.sample(key, rows), task.length, digest)


def prompt_loss(
    answer: Callable[[Any, Any, Any], jax.Array],
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    lengths: Sequence[int] | None = None,
) -> LossFunction:
    """Σ weight · loss(ŷ, y) over the answers to a batch of prompts, as `fit` and `make_step` take it.

    answer(params, x [B, N, ...], y [B, N, ...]) -> ŷ [B, N, ...]; with `lengths` only those after so many examples are
    asked for, ŷ [B, len(lengths), ...]. loss(ŷ, y) -> [B, N], such as `icl.square`.
    """
    asked = slice(None) if lengths is None else np.asarray(lengths)

    def loss_fn(params: Any, prompt: Any, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        weights = prompt.weights[:, asked]
        each = loss(answer(params, prompt.x, prompt.y), prompt.y[:, asked])
        return (weights * each).sum(), {"weight": weights.sum()}

    return loss_fn
