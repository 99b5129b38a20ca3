"""The tiled implementation needs memory linear in length, by XLA's own account of the compiled program."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxattn import Causal, attend
from jaxattn.core.attend.schedule import READ_BYTES

HEADS, WIDTH = 8, 64


@functools.cache
def temporaries(length: int) -> int:
    """Bytes of temporaries of a forward and backward pass, causal, float32; compiled, not run."""
    x = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.float32)

    def loss(query, key, value):
        out, extras = attend(query, key, value, mask=Causal(), return_lse=True, implementation="tiled")
        return out.sum() + extras["lse"].sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_forward_and_backward_at_length_8192_take_less_than_300_mib():
    assert 0 < temporaries(8192) < 300 * 2**20  # the scores of all heads would take 2048 MiB


def test_memory_is_linear_in_length():
    assert temporaries(8192) < 2.5 * temporaries(4096)


@pytest.mark.parametrize("slots", [False, True], ids=["whole", "slots"])
@pytest.mark.parametrize("mask", [None, Causal()], ids=["full", "causal"])
def test_decoding_holds_no_copy_of_the_cache(mask, slots):
    """No more than a tile of keys and one of values, however long the cache, also where slots may be empty."""
    query, cache = (jax.ShapeDtypeStruct((2, length, HEADS, WIDTH), jnp.float32) for length in (1, 16384))
    last, held = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (2, 16384)))

    def call(q, k, v, last, held):
        return attend(q, k, v, mask=mask, query_positions=last, key_positions=held if slots else None)

    memory = jax.jit(call).lower(query, cache, cache, last, held).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.25 * READ_BYTES < cache.size * 4 / 7
