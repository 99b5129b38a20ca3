"""Reducers: the part of the value of a site that is kept, where all of it would be too much.

At scores and weights measures take their place.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.checks import check_range
from jaxattn.core.part import part
from jaxattn.nn.tap import Reducer


def check_places(name: str, positions: Any) -> None:
    """Raises ValueError where a position is known and negative, at which no token stands."""
    check_range(name, positions, lambda p: p >= 0, "from 0 on, where the last of T tokens stands at T - 1")


@part
class TokensAt(Reducer):
    """The value [B, P, ...] of the tokens at these positions; 0 where no token stands there.

    Attributes:
        positions: [P].

    Raises:
        ValueError: A position is known and negative.
    """

    positions: Int[Array, " p"]

    def __post_init__(self):
        check_places("TokensAt: positions", self.positions)

    def __call__(self, value, where):
        return where.only(value, jnp.asarray(self.positions)[None], 0)


@part
class MeanOfTokens(Reducer):
    """The mean of the value over all tokens of the batch that are no padding."""

    def __call__(self, value, where):
        seen = where.seen(value.shape[0]).reshape(*value.shape[:2], *(1,) * (value.ndim - 2))
        return jnp.where(seen, value, 0).sum((0, 1)) / jnp.maximum(seen.sum(), 1)


@part
class Along(Reducer):
    """value · direction over the last axis.

    Attributes:
        direction: [D], or [..., D] for as many as broadcast against the value.
    """

    direction: Float[Array, "*#b d"]

    def __call__(self, value, where):
        return (value * jnp.asarray(self.direction)).sum(-1)
