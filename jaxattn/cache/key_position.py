"""Where the keys of a store stand for a rotary position: where they were read, or somewhere else."""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxattn.core.checks import check_range
from jaxattn.core.part import part


class KeyPosition(abc.ABC):
    """The base class of policies that say at which places keys and queries are turned.

    Masks and biases keep the positions of the tokens. Only the rotary position of the attention uses these places.

    Attributes:
        at_write: Whether a key is turned once, when it is written. Otherwise all keys that are read are turned anew for
            each call, which costs time in proportion to the slots.
    """

    at_write: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, held: Int[Array, "b s g"], positions: Int[Array, "b t g"]) -> Int[Array, "b t g"]:
        """Returns the place of each of `positions`, given the positions of all keys that are read (−1: empty)."""


@part
class Absolute(KeyPosition):
    """Each token stands where it was read."""

    at_write = True

    def __call__(self, held, positions):
        return positions


@part
class Rank(KeyPosition):
    """A token stands at the number of keys before it that are read: positions within the cache (Xiao et al., 2024).

    The distance of two tokens is never larger than the number of slots, however long the text is. As long as nothing is
    evicted, a token stands where it was read.
    """

    def __call__(self, held, positions):
        def of_head(held: Int[Array, " s"], positions: Int[Array, " t"]) -> Int[Array, " t"]:
            in_order = jnp.sort(jnp.where(held < 0, np.iinfo(np.int32).max, held))
            return jnp.searchsorted(in_order, positions, side="left")

        places = jax.vmap(jax.vmap(of_head, -1, -1))(held, positions).astype(jnp.int32)
        return jnp.where(positions < 0, -1, places)


@part
class Memory(KeyPosition):
    """The last `local` tokens stand one after the other, and all older ones together before them, at place 0.

    This is the memory of the Focused Transformer (Tworkowski et al., 2023): old keys are turned as if they stood at the
    first place of the local context, so no distance is larger than `local` − 1. Tokens that come together count from
    the last of them.

    Attributes:
        local: The number of last positions that keep their distances, at least 1.

    Raises:
        ValueError: `local` is known and below 1.
    """

    local: Int[Array, ""] | int

    def __post_init__(self):
        check_range("Memory: local", self.local, lambda x: x >= 1, "at least 1")

    def __call__(self, held, positions):
        first = held.max(1, keepdims=True) - self.local + 1
        return jnp.where(positions < 0, -1, jnp.maximum(positions - first, 0))
