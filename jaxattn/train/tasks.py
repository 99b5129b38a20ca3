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

    Raises TypeError for what is neither.
    """
    leaves, structure = jax.tree.flatten(task)
    content = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        content.update(np.asarray(leaf).tobytes())
    digest = f"{type(task).__name__} {content.hexdigest()[:16]}"
    if hasattr(task, "at"):
        grow = task.at
        return Drawn(lambda key, rows, step: grow(step).sample(key, rows), task.task.length, digest, curriculum=True)
    if not hasattr(task, "sample"):
        raise TypeError(f"task is {task!r}: need one with sample(key, batch), or a curriculum with at(step)")
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
