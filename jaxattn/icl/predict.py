"""A predictor is an algorithm that answers each question of a prompt from the examples before it.

A predictor is called as `predictor(x [B, N, d], y [B, N]) -> ŷ [B, N]`. ŷ_i may depend on the pairs before i and on x_i
alone (`leaks` measures whether it does). A trained model is a predictor by its layout. A closed form is one by its
answer from some examples.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jaxattn.icl.prompt import at_inputs, interleave, numbers


class Predictor(abc.ABC):
    """An algorithm that answers one question from a set of examples."""

    @abc.abstractmethod
    def answer(
        self, x: Float[Array, "n d"], y: Float[Array, "n ..."], seen: Bool[Array, " n"], query: Float[Array, " d"]
    ) -> Float[Array, "*m"]:
        """Returns the answer to `query` from the examples (x_i, y_i) that are seen; others may hold anything finite."""

    def __call__(self, x: Float[Array, "b n d"], y: Float[Array, "b n *m"]) -> Float[Array, "b n *m"]:
        """Returns the answer to every x_i from the examples before it."""
        return self.after(x, y, range(x.shape[1]))

    def after(
        self, x: Float[Array, "b n d"], y: Float[Array, "b n *m"], lengths: Sequence[int]
    ) -> Float[Array, "b l *m"]:
        """Returns the answers after some numbers of examples: `self(x, y)[:, lengths]` at their share of the cost.

        Integers and numbers of 16 bits are computed with as float32 or better.

        Args:
            x: Inputs [B, N, d].
            y: Answers [B, N] or [B, N, m].
            lengths: Numbers of examples, from 0 to N − 1: no question comes after the last example.

        Raises:
            ValueError: A length is below 0 or is N or more, or x and y are not of the same examples.
        """
        x, y = numbers(x), numbers(y)
        if x.ndim != 3 or y.shape[:2] != x.shape[:2]:
            raise ValueError(f"x has shape {x.shape} and y {y.shape}: need [B, N, d] and [B, N] or [B, N, m]")
        if not all(0 <= length < x.shape[1] for length in lengths):
            raise ValueError(f"lengths is {list(lengths)}: need numbers from 0 to {x.shape[1] - 1}, one below the x")
        if not x.shape[1]:
            return y
        x, y = (each.astype(jnp.promote_types(each.dtype, jnp.float32)) for each in (x, y))
        last = jnp.asarray(lengths, int)
        seen = jnp.arange(x.shape[1]) < last[:, None]
        return jax.vmap(lambda x, y: jax.vmap(lambda seen, i: self.answer(x, y, seen, x[i]))(seen, last))(x, y)


def shown(x: Array, y: Array, seen: Bool[Array, " n"]) -> tuple[Array, Array]:
    """Returns the examples, with zeros for those that are not seen: they drop out of XᵀX and Xᵀy."""
    return jnp.where(seen[:, None], x, 0), jnp.where(seen.reshape(-1, *(1,) * (y.ndim - 1)), y, 0)


def check_single(owner: str, y: Array) -> None:
    """Raises ValueError for answers of several channels."""
    if y.ndim > 1:
        raise ValueError(f"{owner}: the answers have shape {y.shape[1:]}: need numbers")


def interleaved(
    model: Callable[[Float[Array, "b t d"]], Num[Array, "b t *m"]], context: int | None = None
) -> Callable[..., Num[Array, "b n *m"]]:
    """Makes a predictor of a causal model of interleaved prompts: its output at x_i is its answer.

    Args:
        model: The model.
        context: The largest number of tokens that the model takes, two for each example, or None.

    Returns:
        The predictor. On longer prompts it raises ValueError.
    """

    def predict(x: Float[Array, "b n d"], y: Float[Array, "b n *m"]) -> Num[Array, "b n *m"]:
        if context is not None and 2 * x.shape[1] > context:
            raise ValueError(
                f"x has {x.shape[1]} examples, {2 * x.shape[1]} tokens: the model is made for at most {context}"
            )
        said = at_inputs(model(interleave(x, y)))
        return said.reshape(y.shape) if said.size == y.size else said

    return predict


def leaks(predictor: Callable[..., Any], x: Num[Array, "b n *d"], y: Num[Array, "b n *m"]) -> float:
    """Returns the largest change of any answer ŷ_i when y_i and everything after it changes: 0 for a predictor.

    Every i is tried with every change: the other rows, in reverse and shifted; x_i again and again, which ties with the
    question; and of numbers that are no integers, the signs flipped, and numbers so large that their fourth powers are
    the largest there are.
    """
    index = jnp.arange(x.shape[1])

    def changed(i: Array) -> tuple[Array, Array]:
        """The prompt as it is, and after each change."""
        asked = jnp.broadcast_to(x[:, i][:, None], x.shape)
        changes = [(x, y), (x[:, ::-1] + 1, -y[:, ::-1] - 1), (asked, y[:, ::-1])]
        if jnp.issubdtype(x.dtype, jnp.inexact):
            changes += [(-x, -y), (jnp.finfo(x.dtype).max ** 0.25 * jnp.sign(x[:, ::-1]), y + 1)]
        of_x, of_y = (jnp.stack(each) for each in zip(*changes, strict=True))
        after_x = (index > i).reshape(-1, *(1,) * (x.ndim - 2))
        after_y = (index >= i).reshape(-1, *(1,) * (y.ndim - 2))
        return jnp.where(after_x, of_x, x), jnp.where(after_y, of_y, y)

    def change(i: Array) -> Array:
        # All by one compiled program, so that they are rounded alike.
        answers = jax.lax.map(lambda prompt: predictor(*prompt)[:, i], changed(i))
        return jnp.abs(answers[1:] - answers[0]).max()

    return float(jax.lax.map(change, index).max())
