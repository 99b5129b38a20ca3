"""Masks in the call: causality, empty slots, order. (What each mask shows is in test_schedule.py.)"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IMPLEMENTATIONS, MASKS, assert_close, evaluate

from jaxattn import Alibi, Bias, Causal, Documents, Dot, Mask, Sigmoid, Softmax, attend, part

LENGTH = 12


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def a_call(seed=0):
    return (
        normal(2, LENGTH, 4, 4, seed=seed),
        normal(2, LENGTH, 2, 4, seed=seed + 1),
        normal(2, LENGTH, 1, 3, seed=seed + 2),
    )


PARTS = Dot(np.float32(0.6)), Alibi(np.array([0.1, 0.2, 0.3, 0.4], np.float32)), Softmax(normal(4, seed=9))
COTANGENTS = normal(2, LENGTH, 4, 3, seed=20), normal(2, LENGTH, 4, seed=21)


@pytest.mark.parametrize("name", ["causal", "window", "streaming"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_future_does_not_change_the_past(name, implementation):
    query, key, value = a_call()
    other = a_call(seed=30)
    run = partial(evaluate, implementation=implementation, block=4)
    (out, lse), _ = run((query, key, value), PARTS, MASKS[name][0], (None, None), COTANGENTS)
    for now in (0, 4, 7):
        changed = tuple(
            np.concatenate([x[:, : now + 1], y[:, now + 1 :]], 1) for x, y in zip((key, value), other[1:], strict=True)
        )
        (out2, lse2), _ = run((query, *changed), PARTS, MASKS[name][0], (None, None), COTANGENTS)
        np.testing.assert_array_equal(out[:, : now + 1], out2[:, : now + 1])
        np.testing.assert_array_equal(lse[:, : now + 1], lse2[:, : now + 1])
        assert (out[:, now + 1 :] != out2[:, now + 1 :]).any((0, 2, 3)).all()
        past = tuple(x * (np.arange(LENGTH) <= now).reshape(1, -1, *[1] * (x.ndim - 2)) for x in COTANGENTS)
        _, gradients = run((query, key, value), PARTS, MASKS[name][0], (None, None), past)
        assert not any(np.any(gradient[:, now + 1 :]) for gradient in gradients[:3])
        assert all(np.all(gradient[:, now] != 0) for gradient in gradients[1:3])


TABLE = Bias(normal(4, 20, 20, seed=10))


@pytest.mark.parametrize("name", ["streaming", "explicit by batch"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_order_is_only_in_the_positions(name, implementation):
    """Permuting keys with their positions changes nothing; permuting queries with theirs permutes the rows."""
    parts, (query, key, value) = (Dot(), TABLE, Softmax()), a_call()
    place, rng = np.arange(LENGTH, dtype=np.int32), np.random.default_rng(5)
    run = partial(evaluate, implementation=implementation, block=4)
    before = run((query, key, value), parts, MASKS[name][0], (place, place), COTANGENTS)
    rows, columns = rng.permutation(LENGTH), rng.permutation(LENGTH)
    after = run(
        (query[:, rows], key[:, columns], value[:, columns]),
        parts,
        MASKS[name][0],
        (place[rows], place[columns]),
        tuple(x[:, rows] for x in COTANGENTS),
    )
    (out, lse), (d_query, d_key, d_value, _, d_bias, _) = before
    moved = (out[:, rows], lse[:, rows]), (d_query[:, rows], d_key[:, columns], d_value[:, columns], d_bias.array)
    (out, lse), (d_query, d_key, d_value, _, d_bias, _) = after
    for x, y in zip(jax.tree.leaves(moved), (out, lse, d_query, d_key, d_value, d_bias.array), strict=True):
        # Only the order of sums of at most 24 terms, none above 8 times the largest, has changed.
        assert_close(y, x, 8 * np.abs(x).max(where=np.isfinite(x), initial=0))


@pytest.mark.parametrize("normalize", [Softmax(normal(4, seed=9)), Sigmoid()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_empty_slots_hold_is_ignored(normalize, implementation):
    arrays = a_call()
    places = np.arange(LENGTH, dtype=np.int32), np.arange(LENGTH, dtype=np.int32)
    empty = np.array([1, 8, 9, 10, 11]), np.array([0, 1, 2, 3, 6])
    for place, slots in zip(places, empty, strict=True):
        place[slots] = -1
    run = partial(evaluate, implementation=implementation, block=4)
    rest = (Dot(np.float32(0.6)), TABLE, normalize), Causal(), places
    before = run(arrays, *rest, COTANGENTS)
    garbage = tuple(x.copy() for x in arrays)
    for x, slots in zip(garbage, (empty[0], empty[1], empty[1]), strict=True):
        x[:, slots] = np.nan
    after = run(garbage, *rest, COTANGENTS)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.isnan(x).any()
        np.testing.assert_array_equal(x, y)
    (out, lse), (d_query, d_key, d_value, *_) = after
    assert not np.any(out[:, empty[0]])
    assert np.isneginf(lse[:, empty[0]]).all()
    assert not np.any(d_query[:, empty[0]])
    assert not np.any(d_key[:, empty[1]])
    assert not np.any(d_value[:, empty[1]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32])
def test_positions_of_any_integer_dtype_are_the_same_positions(dtype):
    """Distances are negative and tables long, also where the dtype of the positions has room for neither."""
    query, key, value = a_call()
    place = np.arange(LENGTH, dtype=np.int32)
    options = {"mask": MASKS["window"][0], "bias": Bias(normal(1, 20, 200, seed=10))}

    def out(place):
        return attend(query, key, value, query_positions=place, key_positions=place, **options)

    np.testing.assert_array_equal(out(place.astype(dtype)), out(place))


@part
class Every(Mask):
    """A mask as a user would write one: keys at a distance divisible by `step`."""

    step: int

    def __call__(self, query, key):
        return (query - key) % self.step == 0


def test_a_mask_needs_nothing_but_its_call():
    query, key, value = a_call()
    table = (np.arange(LENGTH)[:, None] - np.arange(LENGTH)) % 3 == 0

    @jax.jit
    def both(query, key, value):
        def run(mask, implementation):
            def call(*x):
                out, extras = attend(*x, mask=mask, return_lse=True, block=4, implementation=implementation)
                return out, extras["lse"]

            results, pull = jax.vjp(call, query, key, value)
            return results, pull(COTANGENTS)

        return run(Every(3), "tiled"), run(Documents(jnp.arange(LENGTH) % 3), "dense")

    for x, y in zip(*map(jax.tree.leaves, both(query, key, value)), strict=True):
        assert_close(x, y, 8 * np.abs(y).max())
    np.testing.assert_array_equal((Every(3) & ~Every(1))(np.arange(4)[:, None], np.arange(4)), np.zeros((4, 4), bool))
    np.testing.assert_array_equal(Every(3)(np.arange(LENGTH)[:, None], np.arange(LENGTH)), table)
