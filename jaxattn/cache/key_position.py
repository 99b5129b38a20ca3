"""Where the keys of a store stand for a rotary position: where they were read, or somewhere else."""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxattn.core.attend.parallel import READER, piece_places
from jaxattn.core.checks import check_range, check_static_int
from jaxattn.core.part import part
from jaxattn.core.table import take


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

    The local context slides with the newest token, so no distance is larger than `local` − 1. In `MemoryAtStart` it
    begins anew with every window, as in the training of the Focused Transformer. Tokens that come together count from
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
        return _counted_from(held.max(1, keepdims=True) - self.local + 1, positions)


@part
class MemoryAtStart(KeyPosition):
    """The tokens of the present window stand at 0, 1, ..., and all earlier ones at 0 (LongLLaMA, 2023).

        model.init_state(batch, capacity, Policy(key_position=MemoryAtStart(2048)))

    Windows begin at the multiples of their size, and the present one is that of the newest token. So an attention that
    was trained with `crossbatch` meets a memory of any length at the places that it knows. A call of several tokens
    should not go beyond the end of a window: its tokens before the newest window would stand at 0 too.

    Attributes:
        window: The tokens of a window, at least 1: the length of a row in training.

    Raises:
        TypeError: `window` is not an int.
        ValueError: `window` is below 1.
    """

    window: int

    def __post_init__(self):
        check_static_int("MemoryAtStart", "window", self.window, 1)

    def __call__(self, held, positions):
        return _counted_from(held.max((1, 2), keepdims=True) // self.window * self.window, positions)


@part
class AtPieces(KeyPosition):
    """Each piece of a parallel context begins behind the shared prefix, and readers behind the longest piece (2025).

        mask = Causal() & Pieces(ids)
        model(tokens, mask=mask, state=model.init_state(batch, capacity, Policy(key_position=AtPieces(ids))))

    Tokens of different pieces stand at the same places, as if each piece had been read by itself. Positions beyond the
    table go on behind the last reader.

    Attributes:
        ids: Integers [P] or [B, P], by position, as of `core.attend.Pieces`.
    """

    ids: Int[Array, "*b positions"]

    def __call__(self, held, positions):
        ids = jnp.asarray(self.ids)
        # One more token is a reader: where it stands, the tokens beyond the table begin.
        places = piece_places(jnp.concatenate([ids, jnp.full_like(ids[..., :1], READER)], -1))
        at = jnp.broadcast_to(jnp.minimum(positions, ids.shape[-1]), positions.shape).reshape(len(positions), -1)
        found = take(places, at, 1, fill=-1).reshape(positions.shape)
        return found + jnp.maximum(positions - ids.shape[-1], 0)


def _counted_from(first: Int[Array, "b 1 g"], positions: Int[Array, "b t g"]) -> Int[Array, "b t g"]:
    """Returns places counted from `first`, 0 for earlier tokens; −1 for empty slots."""
    return jnp.where(positions < 0, -1, jnp.maximum(positions - first, 0))
