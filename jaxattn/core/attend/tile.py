"""Where a block of scores or weights stands: the argument that every slot of `attend` gets besides its own values."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Tile(NamedTuple):
    """The positions of a block of queries and keys, and which of its pairs are visible.

    Attributes:
        query: Positions of the queries, [..., 1, T, 1]; −1 for an empty slot.
        key: Positions of the keys, [..., 1 or N, 1, S]; −1 for an empty slot.
        visible: True where the mask shows the pair, broadcasts to [..., N, T, S]; None where it shows all of them.
    """

    query: Int[Array, "*#b 1 t 1"]
    key: Int[Array, "*#b #n 1 s"]
    visible: Any = None  # Bool[Array, "*#b #n t s"] | None

    def shown(self, shape: tuple[int, ...]) -> Bool[Array, "*b n t s"]:
        """Returns `visible` for every pair of a block of this shape, [..., N, T, S]."""
        return jnp.broadcast_to(True if self.visible is None else self.visible, shape)
