"""Edits of values: additions, factors and replacements, at all tokens or at some.

Arrays broadcast against the value of the site, [B, T, ...]: [D] changes every token, and [B, T, D] each its own. Edits
that depend on where a token stands find it by its position, so that they are the same in one full pass and token by
token.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.maps import Need
from jaxattn.core.part import part
from jaxattn.nn.tap import Edit
from jaxattn.nn.tokens import Tokens


@part
class Add(Edit):
    """value + vector.

    Attributes:
        vector: The vector, which broadcasts against the value.
    """

    vector: Float[Array, "..."] | float

    scores_need: ClassVar[Need] = "tile"

    def __call__(self, value, where):
        return value + jnp.asarray(self.vector).astype(value.dtype)


@part
class Scale(Edit):
    """value · factor; a factor of 1 is the identity.

    Attributes:
        factor: The factor, which broadcasts against the value. [N, 1] with zeros at the site z switches heads off.
    """

    factor: Float[Array, "..."] | float

    scores_need: ClassVar[Need] = "tile"
    weights_need: ClassVar[Need] = "tile"

    def __call__(self, value, where):
        return value * jnp.asarray(self.factor).astype(value.dtype)


@part
class Put(Edit):
    """The vector in place of the value where `on`, by default everywhere; both broadcast against the value.

    Attributes:
        vector: The vector.
        on: Where the vector stands; None for everywhere.
    """

    vector: Float[Array, "..."]
    on: Bool[Array, "..."] | None = None

    scores_need: ClassVar[Need] = "tile"

    def __call__(self, value, where):
        on = True if self.on is None else jnp.asarray(self.on)
        return jnp.where(on, jnp.asarray(self.vector).astype(value.dtype), value)


@part
class Patch(Edit):
    """The value of a token at position positions[p] becomes values[..., p, ...]; other tokens keep theirs.

    Attributes:
        positions: [P], each at most once.
        values: [P, ...] or [B, P, ...], as recorded by `TokensAt(positions)`.
    """

    positions: Int[Array, " p"]
    values: Float[Array, "..."]

    of_tokens: ClassVar[bool] = True

    def __call__(self, value, where):
        here = _here(where, self.positions)  # [1 or B, T, P]
        values = jnp.asarray(self.values, value.dtype)
        values = values.reshape((1,) * (value.ndim - values.ndim) + values.shape)
        index = jnp.broadcast_to(here.argmax(-1), (*value.shape[:1], *here.shape[1:2]))
        index = index.reshape(*index.shape, *(1,) * (value.ndim - 2))
        found = jnp.take_along_axis(jnp.broadcast_to(values, (*value.shape[:1], *values.shape[1:])), index, 1)
        return jnp.where(here.any(-1).reshape(*here.shape[:2], *(1,) * (value.ndim - 2)), found, value)


@part
class OnlyAt(Edit):
    """The edit, at tokens that stand at these positions only.

    Attributes:
        edit: The edit.
        positions: [P].
    """

    edit: Any
    positions: Int[Array, " p"]

    of_tokens: ClassVar[bool] = True

    def __call__(self, value, where):
        here = _here(where, self.positions).any(-1)
        here = here.reshape(*here.shape, *(1,) * (value.ndim - 2))
        return jnp.where(here, self.edit(value, where), value)


def _here(where: Tokens, positions: Int[Array, " p"]) -> Bool[Array, "#b t p"]:
    """Returns which tokens stand at which of these positions."""
    return (where.positions[..., None] == jnp.asarray(positions)) & (where.positions >= 0)[..., None]
