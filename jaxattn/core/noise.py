"""Randomness without state: bits that are a function of a key, the batch entry, the head and two positions alone.

Every implementation and every block size therefore draws the same bits, and nothing is stored for a backward pass.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

Seed = Key[Array, ""] | UInt32[Array, "2"]


def _scramble(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The 32-bit finaliser of MurmurHash3 (Appleby, 2011): every input bit flips every output bit half of the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def seeds(key: Array, heads: tuple[int, ...]) -> UInt32[Array, "*b n 1 1"]:
    """Draws one seed per batch entry and head, for `bits`; `heads` = (*batch, N)."""
    return jax.random.bits(key, (*heads, 1, 1), jnp.uint32)


def bits(
    seeds: UInt32[Array, "*b n 1 1"], query: Int[Array, "*#b #n t 1"], key: Int[Array, "*#b #n 1 s"]
) -> UInt32[Array, "*b n t s"]:
    """Returns 32 random bits for every pair of positions."""
    golden = jnp.uint32(0x9E3779B9)  # 2^32 / golden ratio: neighbouring positions land far apart
    row = _scramble(seeds + jnp.asarray(query).astype(jnp.uint32) * golden)
    return _scramble(row ^ _scramble(jnp.asarray(key).astype(jnp.uint32) * golden + jnp.uint32(1)))


def uniform(seeds: UInt32[Array, "*b n 1 1"], query: Array, key: Array) -> Float[Array, "*b n t s"]:
    """Returns numbers strictly between 0 and 1, multiples of 2^−24: the finest that float32 keeps apart from 1."""
    return ((bits(seeds, query, key) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def gumbel(seeds: UInt32[Array, "*b n 1 1"], query: Array, key: Array) -> Float[Array, "*b n t s"]:
    """Returns Gumbel noise −log(−log u): argmax_j(s_j + g_j) is a draw from softmax(s)  (Gumbel, 1954)."""
    return -jnp.log(-jnp.log(uniform(seeds, query, key)))
