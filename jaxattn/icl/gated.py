"""Copying the token before, or nothing: a task on which it can be proved where attention must rest."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxattn.core.checks import check_probability, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.prompt import Prompt
from jaxattn.icl.task import happens


@part
class GatedCopy:
    """Tokens with a content c_t ~ N(0, I) and a flag f_t: the answer is c_(t − 1) where the flag is set, and else 0.

    Tokens are vectors (c_t, f_t, whether it is the start token). Without a token that may be read for nothing, weights
    that sum to 1 cannot answer 0 for every content; with a start token they can, by resting on it, if its value is 0.
    The first position does not count. Flags are in `hidden`, [B, T].

    Attributes:
        dim: Channels of the content, at least 1.
        length: T, at least 2.
        probability: How often the flag is set.
        start: Whether the first token is a start token, with content and flag 0.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below its least value, or `probability` is not from 0 to 1.
    """

    dim: int
    length: int
    probability: Float[Array, ""] | float = 0.3
    start: bool = True

    def __post_init__(self):
        check_static_int("GatedCopy", "dim", self.dim, 1)
        check_static_int("GatedCopy", "length", self.length, 2)
        check_probability("GatedCopy: probability", self.probability)

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return self.dim + 2

    def with_length(self, length: int) -> "GatedCopy":
        """Returns the same task with prompts of another length."""
        return dataclasses.replace(self, length=length)

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        for_content, for_flags = jax.random.split(key)
        content = jax.random.normal(for_content, (batch, self.length, self.dim))
        flags = happens(for_flags, self.probability, (batch, self.length))
        first = jnp.arange(self.length) == 0
        at_start = first & self.start
        content, flags = jnp.where(at_start[:, None], 0, content), flags & ~at_start
        before = jnp.pad(content[:, :-1], ((0, 0), (1, 0), (0, 0)))
        answers = jnp.where(flags[..., None], before, 0)
        marks = jnp.stack([flags.astype(float), jnp.broadcast_to(at_start, flags.shape).astype(float)], -1)
        weights = jnp.broadcast_to((~first).astype(float), flags.shape)
        return Prompt(jnp.concatenate([content, marks], -1), answers, weights, answers, flags)
