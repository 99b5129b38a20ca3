"""Maps of the weights, between the normaliser and the values. They run on tiles, so they see positions, not rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from jaxattn.core.parts import part


def _scramble(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The 32-bit finaliser of MurmurHash3 (Appleby, 2011): every input bit flips every output bit half of the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@part
class Seeded:
    """Dropout with its seeds drawn: one per batch entry and head, [..., N, 1, 1]. What `Dropout.draw` makes."""

    rate: float
    seeds: UInt32[Array, "*b n 1 1"]

    def __call__(self, query: Int[Array, "*b 1 t 1"], key: Int[Array, "*b 1 1 s"]) -> Float[Array, "*b n t s"]:
        golden = jnp.uint32(0x9E3779B9)  # 2^32 / golden ratio: neighbouring positions land far apart
        row = _scramble(self.seeds + query.astype(jnp.uint32) * golden)
        bits = _scramble(row ^ _scramble(key.astype(jnp.uint32) * golden + jnp.uint32(1)))
        keep = bits >= jnp.uint32(min(int(self.rate * 2**32), 2**32 - 1))
        return keep / (1 - self.rate)


@part
class Dropout:
    """weight_ij -> weight_ij · keep_ij / (1 − rate), keep_ij independent with probability 1 − rate.

    Each keep_ij is a function of the key, the batch entry, the head and the two positions alone, so every
    implementation and every block size drops the same weights, and nothing is stored for the backward pass.
    Raises ValueError unless 0 <= rate < 1.
    """

    rate: float
    key: Key[Array, ""] | UInt32[Array, "2"]

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"Dropout: rate must be at least 0 and below 1, got {self.rate}")

    def draw(self, batch: tuple[int, ...], heads: int) -> Seeded:
        """The same dropout with one seed per batch entry and head."""
        return Seeded(self.rate, jax.random.bits(self.key, (*batch, heads, 1, 1), jnp.uint32))
