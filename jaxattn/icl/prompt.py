"""A prompt, which holds questions, their answers and which of them count, and the two ways to show it to a model."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


class Prompt(NamedTuple):
    """A batch of B prompts of N examples each.

    Attributes:
        x: [B, N, d], inputs, or token ids [B, N].
        y: Answers [B, N] or [B, N, m], with label noise; the next tokens [B, N] where x are tokens.
        weights: [B, N], 1 where an answer counts, else 0.
        clean: The answers without noise.
        hidden: Anything else that was drawn (the function's parameters, ...): for oracles only.
    """

    x: Num[Array, "b n *d"]
    y: Num[Array, "b n *m"]
    weights: Float[Array, "b n"]
    clean: Num[Array, "b n *m"]
    hidden: Any = ()

    def tokens(self) -> dict[str, Array]:
        """Returns a prompt of tokens as the losses of language models take it."""
        return {"tokens": self.x, "targets": self.y, "weights": self.weights}


def numbers(x: Num[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns x as an array, integers as numbers of the default type."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float)


def interleave(x: Float[Array, "b n d"], y: Float[Array, "b n *m"]) -> Float[Array, "b t d"]:
    """Returns x₁, (y₁, 0, ..., 0), x₂, (y₂, 0, ..., 0), ...: [B, 2N, d], for causal models.

    The answer to x_i is read at its token, of index 2i from 0 (`at_inputs`), which sees all examples before it
    (Garg et al., 2022).

    Raises:
        ValueError: y has more channels than x.
    """
    x, labels = numbers(x), jnp.asarray(y).reshape(*y.shape[:2], -1)
    if labels.shape[-1] > x.shape[-1]:
        raise ValueError(f"y has {labels.shape[-1]} channels but x has {x.shape[-1]}: need at most as many")
    labels = jnp.pad(labels, ((0, 0), (0, 0), (0, x.shape[-1] - labels.shape[-1]))).astype(x.dtype)
    return jnp.stack([x, labels], 2).reshape(x.shape[0], -1, x.shape[-1])


def at_inputs(outputs: Num[Array, "b t *m"]) -> Num[Array, "b n *m"]:
    """Returns the outputs of a model at the inputs of an interleaved prompt: [B, 2N, ...] → [B, N, ...]."""
    return outputs[:, ::2]


def stack(x: Float[Array, "... n d"], y: Float[Array, "..."]) -> Float[Array, "... n e"]:
    """Returns the rows (x_i, y_i), the last label, which is asked for, being 0: the matrix E, [..., N, d + m].

    E holds N − 1 examples and a query, for layers that see all of them at once (von Oswald et al., 2023).
    """
    x = numbers(x)
    labels = jnp.asarray(y).reshape(*x.shape[:-1], -1).astype(x.dtype)
    return jnp.concatenate([x, labels.at[..., -1, :].set(0)], -1)
