"""Biases: what is added to a score because of where the query and the key stand.

A bias is a part called on the positions of a tile, `bias(query [..., 1, T, 1], key [..., 1, 1, S])`, and returns
something that broadcasts to [..., N, T, S]. A bias never hides a key: that is a mask's work.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.parts import part, take_pairs


@part
class Bias:
    """bias = array[..., n, query position, key position]; 0 at positions outside the array.

    `array` is [..., N or 1, P, R]: a table over positions, learned if you differentiate with respect to it.
    """

    array: Float[Array, "*batch heads query_positions key_positions"]

    def __call__(self, query: Int[Array, "*b 1 t 1"], key: Int[Array, "*b 1 1 s"]) -> Float[Array, "*b n t s"]:
        return take_pairs(self.array, query, key, grid=2, fill=0)


@part
class Alibi:
    """bias = −slope_n · |query position − key position|  (Press et al., 2022)."""

    slopes: Float[Array, " heads"]

    @classmethod
    def geometric(cls, heads: int) -> "Alibi":
        """The paper's slopes: 2^(−8 n / N) for n = 1..N when N is a power of two.

        Otherwise those of the largest power of two below N, followed by every other slope of twice that many heads.
        """
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
        finer = [2 ** (-8 * (n + 1) / (2 * power)) for n in range(0, 2 * power, 2)]
        return cls(jnp.asarray((slopes + finer)[:heads], jnp.float32))

    def __call__(self, query: Int[Array, "*b 1 t 1"], key: Int[Array, "*b 1 1 s"]) -> Float[Array, "*b n t s"]:
        return -self.slopes[:, None, None] * jnp.abs(query - key)
