"""Training on tasks: prompts drawn inside the step, and the loss of the answers to them.

A task is anything with `sample(key, batch) -> prompt` and a `length`. A curriculum is anything with `at(step) -> task`
and the `task` that it ends at. A prompt has questions `x`, answers `y` and `weights`, which say which answers count.
`jaxattn.icl` has tasks, curricula and prompts.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.checks import as_ids, check_range, check_static_int
from jaxattn.train.data import Drawn
from jaxattn.train.step import LossFunction


def drawn(task: Any) -> Drawn:
    """Returns fresh prompts of a task or a curriculum, as `fit` takes them.

    Validation prompts are those of the curriculum's end.

    Args:
        task: A task or a curriculum. Its numbers are part of the digest by which a run is resumed, so it must be a
            pytree of arrays and numbers, as parts are.

    Raises:
        TypeError: `task` is neither a task nor a curriculum, or has any other leaf.
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
    """Makes the loss Σ weight · loss(ŷ, y) over the answers to a batch of prompts, as `fit` and `make_step` take it.

    Of an answer of weight 0 neither ŷ nor y is read, so that they may be NaN or a padding id: the loss sees 0 in place
    of both, and its gradient is 0. Where y are integers and ŷ has one axis more, of logits, a y that counts and is
    outside the vocabulary makes the loss NaN. So does a weight below 0 that is traced.

    Args:
        answer: answer(params, x [B, N, ...], y [B, N, ...]) -> ŷ [B, N, ...].
        loss: loss(ŷ, y) -> [B, N], such as `icl.square`.
        lengths: Numbers of examples after which alone answers are asked for, ŷ [B, len(lengths), ...].

    Raises:
        TypeError: Lengths are not integers.
        ValueError: Lengths are negative or, when called, the prompt has no question after one of them, or a known
            weight is below 0.
    """
    if lengths is not None:
        for length in lengths:
            check_static_int("prompt_loss", "lengths", length, 0)
    asked = slice(None) if lengths is None else np.asarray(lengths, int)

    def loss_fn(params: Any, prompt: Any, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        if lengths is not None and max(lengths, default=0) >= prompt.y.shape[1]:
            raise ValueError(
                f"lengths holds {max(lengths)}: need at most {prompt.y.shape[1] - 1}, one below the examples"
            )
        weights, truth = prompt.weights[:, asked], prompt.y[:, asked]
        check_range("weights", weights, lambda w: w >= 0, "from 0 on")
        counted, weights = weights != 0, jnp.where(weights < 0, jnp.nan, weights)
        # Selects, before and after: 0 times NaN is NaN, in the loss and in its gradient.
        answers = _where(counted, answer(params, prompt.x, prompt.y))
        each = jnp.where(counted, loss(answers, _where(counted, truth)), 0)
        if jnp.issubdtype(truth.dtype, jnp.integer) and answers.ndim == truth.ndim + 1:
            ids = as_ids(truth)
            outside = counted & ((ids < 0) | (ids >= answers.shape[-1]))
            each = jnp.where(outside, jnp.nan, 1) * each
        return (weights * each).sum(), {"weight": weights.sum()}

    return loss_fn


def _where(counted: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x [B, N, ...] where it counts, else 0."""
    return jnp.where(counted.reshape(*counted.shape, *(1,) * (x.ndim - 2)), x, 0)
