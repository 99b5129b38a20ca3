"""A cache slot holds the last token written to its position, and every other slot stays as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.cache import Cache, append, empty

CAPACITY = 6
POSITIONS = {
    "in order": [[0, 1, 2], [0, 1, 2], [0, 1, 2]],
    "ragged, padded on the right": [[3, 4, 5], [1, 2, -1], [0, -1, -1]],
    "ragged, padded on the left": [[3, 4, 5], [-1, 1, 2], [-1, -1, 0]],
    "any order": [[5, 0, 3], [2, 1, 0], [4, -1, 1]],
    "beyond the capacity": [[4, 5, 6], [5, 6, 7], [6, 7, 1000]],
    "nothing": [[-1, -1, -1]] * 3,
}
jitted = jax.jit(append)


def tokens(seed, length=3, batch=3):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((batch, length, *heads)).astype(np.float32) for heads in ((2, 4), (1, 5)))


def filled():
    """A cache in which every slot of every row differs, some of them empty."""
    rng = np.random.default_rng(9)
    key, value = tokens(8, CAPACITY)
    positions = np.where(rng.random((3, CAPACITY)) < 0.5, np.arange(CAPACITY), -1)
    return Cache(*map(jnp.asarray, (key, value, positions.astype(np.int32))))


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("write", [append, jitted], ids=["eager", "jit"])
def test_each_token_goes_to_the_slot_of_its_position_and_nothing_else_changes(positions, write):
    """Of those beyond the capacity, which are refused where they are known."""
    cache, (key, value) = filled(), tokens(1)
    if write is append and np.max(positions) >= CAPACITY:
        with pytest.raises(ValueError, match=r"positions reaches 1000 but the state has capacity 6: need at most 5"):
            append(cache, jnp.asarray(key), jnp.asarray(value), jnp.asarray(positions))
        return
    expected = [np.array(x) for x in (cache.key, cache.value, cache.positions)]
    for b in range(3):
        for t, position in enumerate(positions[b]):
            if 0 <= position < CAPACITY:
                expected[0][b, position], expected[1][b, position] = key[b, t], value[b, t]
                expected[2][b, position] = position
    written = write(cache, jnp.asarray(key), jnp.asarray(value), jnp.asarray(positions))
    for got, want in zip((written.key, written.value, written.positions), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_permuting_the_batch_permutes_the_cache():
    cache, (key, value) = filled(), tokens(1)
    positions, order = np.array(POSITIONS["any order"]), np.array([2, 0, 1])
    straight = jitted(cache, key, value, positions)
    permuted = jitted(jax.tree.map(lambda x: x[order], cache), key[order], value[order], positions[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), straight, permuted)


def test_a_cache_keeps_its_dtype_and_its_shapes():
    cache = empty(3, CAPACITY, (2, 4), (1, 5), jnp.bfloat16)
    key, value = tokens(1)
    written = jitted(cache, key, value, np.array(POSITIONS["in order"]))
    describe = [[(x.shape, x.dtype) for x in jax.tree.leaves(c)] for c in (cache, written)]
    assert describe[0] == describe[1]
    assert describe[0] == [((3, 6, 2, 4), jnp.bfloat16), ((3, 6, 1, 5), jnp.bfloat16), ((3, 6), jnp.int32)]
    assert (cache.positions == -1).all()


def test_a_cache_is_a_pytree_that_loops_carry():
    def one_token(cache, token):
        position, key, value = token
        return append(cache, key[:, None], value[:, None], jnp.full((3, 1), position)), None

    key, value = tokens(1)
    stream = jnp.arange(3), key.swapaxes(0, 1), value.swapaxes(0, 1)
    looped, _ = jax.jit(lambda cache: jax.lax.scan(one_token, cache, stream))(filled())
    jax.tree.map(np.testing.assert_array_equal, looped, jitted(filled(), key, value, np.array(POSITIONS["in order"])))


@pytest.mark.parametrize("lengths", [(1,) * 9, (4, 1, 4), (9,), (2, 7)], ids=str)
def test_a_ring_holds_the_pinned_and_the_last_tokens(lengths):
    """Two pinned and a ring of four, whatever the calls in which nine tokens come; the second row is two shorter."""
    cache = empty(2, CAPACITY, (2, 4), (1, 5), jnp.float32)
    key, value = (x[:2] for x in tokens(1, 9))
    first = 0
    for length in lengths:
        at = np.arange(first, first + length)
        positions = np.stack([at, np.where(at < 7, at, -1)])
        cache = append(cache, key[:, at], value[:, at], positions, pinned=2)
        first += length
    for row, held in enumerate(([0, 1, 5, 6, 7, 8], [0, 1, 3, 4, 5, 6])):
        assert sorted(np.asarray(cache.positions[row])) == held
        for slot, position in enumerate(np.asarray(cache.positions[row])):
            np.testing.assert_array_equal(cache.key[row, slot], key[row, position])
            np.testing.assert_array_equal(cache.value[row, slot], value[row, position])


@pytest.mark.parametrize(("batch", "capacity"), [(0, 4), (2, 0)])
def test_an_empty_cache_needs_a_size(batch, capacity):
    with pytest.raises(ValueError, match=f"batch and capacity must be at least 1, got {batch} and {capacity}"):
        empty(batch, capacity, (1, 2), (1, 2), jnp.float32)


def test_more_tokens_than_slots_are_refused():
    cache = empty(1, 3, (1, 2), (1, 2), jnp.float32)
    with pytest.raises(ValueError, match="key has 5 tokens but the cache has capacity 3"):
        append(cache, jnp.zeros((1, 5, 1, 2)), jnp.zeros((1, 5, 1, 2)), jnp.arange(5)[None])
