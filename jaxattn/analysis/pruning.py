"""Which heads can be spared: the slope of a loss in a gate of each head, and the loss as heads are removed in turn.

The heads of a layer are gated as Σ_h ξ_h z_h W_O,h with ξ = 1. A slope says what a small change does. Where a softmax
is saturated, or heads do the same work, removing heads does something else, so look at the curve too (Michel et al.,
2019).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.numeric import ratio
from jaxattn.nn.tap import Layers
from jaxattn.trace.edits import Scale
from jaxattn.trace.patching import as_inputs
from jaxattn.trace.sweep import compiled, heads, sweep, unchanged

Loss = Callable[[Any], Array]


def without_heads(off: Bool[Array, "layers n"]) -> dict[str, Any]:
    """Returns the edits that remove some heads: their z is 0 at all tokens.

    Args:
        off: [L, N], which heads. It may be traced.
    """
    return {"z": Layers(Scale(jnp.where(jnp.asarray(off), 0.0, 1.0)[..., None]))}


@unchanged()
def head_slopes(model: Any, inputs: Any, loss: Loss, **options: Any) -> Float[Array, "layers b n"]:
    """Returns ∂L(x)/∂ξ_h = ⟨z_h(x), ∂L(x)/∂z_h⟩ for every example x and head h, [L, B, N].

    The sum over the heads of a layer is the slope in one gain for all of its heads.

    Args:
        model: The model, whose layers have as many heads each.
        inputs: Its inputs: tokens, or a tuple of inputs, of B examples which do not see each other.
        loss: From the output to the loss of each example, [B].
        options: Other arguments of the model, such as `positions`.

    Raises:
        ValueError: The layers do not all have the same number of heads, or the loss is not one number per example.
    """
    inputs = as_inputs("inputs", inputs, options)
    shape = _table(model, inputs, options)
    examples = jnp.shape(inputs[0])[0]

    def total(gate: Array) -> Array:
        each = loss(model(*inputs, edits={"z": Layers(Scale(gate[:, :, None, :, None]))}, **options)[0])
        if jnp.shape(each) != (examples,):
            raise ValueError(f"loss returns shape {jnp.shape(each)}: need one number per example, ({examples},)")
        return each.sum()

    return compiled(jax.grad(total), jnp.ones((shape[0], examples, shape[1])))


def head_importance(
    model: Any, inputs: Any, loss: Loss, *, normalise: bool = True, **options: Any
) -> Float[Array, "layers n"]:
    """Returns I_h = mean over examples x of |∂L(x)/∂ξ_h|, divided by √(Σ_h I_h²) of the layer (Michel et al., 2019).

    The absolute value is that of each example, so effects of opposite signs do not cancel. A layer whose heads all have
    0 keeps it.

    Args:
        model: As of `head_slopes`.
        inputs: As of `head_slopes`.
        loss: As of `head_slopes`.
        normalise: Whether scores are divided by their norm in each layer.
        options: As of `head_slopes`.
    """
    found = jnp.abs(head_slopes(model, inputs, loss, **options)).mean(1)
    if not normalise:
        return found
    return ratio(found, jnp.sqrt(jnp.square(found).sum(-1, keepdims=True)))


def pruning_order(scores: Float[Any, "layers n"]) -> Int[np.ndarray, " heads"]:
    """Returns the heads in the order in which they are removed, l · N + n: the least score first, ties by their number.

    Args:
        scores: [L, N].

    Raises:
        ValueError: A score is NaN, which has no place in an order.
    """
    scores = np.asarray(scores, np.float64)
    if np.isnan(scores).any():
        raise ValueError("scores holds NaN: need a number for every head")
    return np.argsort(scores.reshape(-1), kind="stable")


def pruning_curve(
    model: Any,
    inputs: Any,
    loss: Loss,
    order: Int[Any, "*orders heads"],
    counts: Sequence[int],
    *,
    chunk: int = 1,
    **options: Any,
) -> Float[Array, "*orders counts"]:
    """Returns the mean loss without the first c heads of an order, for each c of `counts`. Nothing is trained again.

    Args:
        model: As of `head_slopes`.
        inputs: As of `head_slopes`.
        loss: From the output to the loss of each example, or to one number.
        order: Heads as of `pruning_order`; several with axes in front, such as random ones to compare with.
        counts: How many heads are removed, each from 0 to all.
        chunk: How many runs are computed at once.
        options: As of `head_slopes`.

    Raises:
        ValueError: An order does not have every head once, or a count is out of range.
    """
    inputs = as_inputs("inputs", inputs, options)
    shape = _table(model, inputs, options)
    order, total = np.asarray(order), shape[0] * shape[1]
    if order.shape[-1:] != (total,) or (np.sort(order, -1) != np.arange(total)).any():
        raise ValueError(f"order has shape {order.shape}: need each of the numbers 0 to {total - 1} once")
    numbers = np.asarray(counts)
    if numbers.ndim != 1 or (numbers < 0).any() or (numbers > total).any():
        raise ValueError(f"counts is {numbers.tolist()}: need numbers from 0 to {total}")
    rank = np.argsort(order, -1)  # when each head is removed
    off = (rank[..., None, :] < numbers[:, None]).reshape(-1, *shape)

    def run(off: Array) -> Array:
        return jnp.mean(loss(model(*inputs, edits=without_heads(off), **options)[0]))

    return sweep(run, jnp.asarray(off), chunk=chunk).reshape(*order.shape[:-1], len(numbers))


def one_head_left(model: Any, inputs: Any, loss: Loss, *, chunk: int = 1, **options: Any) -> Float[Array, "layers n"]:
    """Returns the mean loss where all other heads of a layer are removed, for each head that is left (2019).

    Args:
        model: As of `head_slopes`.
        inputs: As of `head_slopes`.
        loss: As of `pruning_curve`.
        chunk: As of `pruning_curve`.
        options: As of `head_slopes`.
    """
    inputs = as_inputs("inputs", inputs, options)
    layers, count = _table(model, inputs, options)
    layer, head = np.divmod(np.arange(layers * count), count)
    off = (np.arange(layers)[:, None] == layer[:, None, None]) & (np.arange(count) != head[:, None, None])

    def run(off: Array) -> Array:
        return jnp.mean(loss(model(*inputs, edits=without_heads(off), **options)[0]))

    return sweep(run, jnp.asarray(off), chunk=chunk).reshape(layers, count)


def _table(model: Any, inputs: Sequence[Any], options: Any) -> tuple[int, int]:
    """Returns (L, N). Raises ValueError where layers have different numbers of heads."""
    grid = heads(model, inputs=inputs, **{name: each for name, each in options.items() if name != "positions"})
    if not np.asarray(grid.there).all():
        raise ValueError("the layers have different numbers of heads, or not all have heads: need the same in all")
    return grid.shape[0], grid.shape[1]
