"""Tokens before the present window as a memory: where their keys stand for a rotary position."""

import jax.numpy as jnp

from jaxattn.cache.key_position import KeyPosition
from jaxattn.core.checks import check_static_int
from jaxattn.core.part import part


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
        start = held.max((1, 2), keepdims=True) // self.window * self.window
        return jnp.where(positions < 0, -1, jnp.maximum(positions - start, 0))
