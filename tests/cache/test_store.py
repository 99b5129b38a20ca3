"""Stores: what is kept is what the policy says, whatever the calls in which tokens come, and nothing else matters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.cache import (
    Attentive,
    Everything,
    HeavyHitters,
    MeanKeys,
    Memory,
    Policy,
    Quantised,
    Quest,
    Recent,
    SnapKV,
    Spans,
    empty,
)

CAPACITY, HEADS, H = 6, 2, 4
POSITIONS = {
    "in order": [[0, 1, 2], [0, 1, 2], [0, 1, 2]],
    "ragged, padded on the right": [[3, 4, 5], [1, 2, -1], [0, -1, -1]],
    "ragged, padded on the left": [[3, 4, 5], [-1, 1, 2], [-1, -1, 0]],
    "any order": [[5, 0, 3], [2, 1, 0], [4, -1, 1]],
    "beyond the capacity": [[4, 5, 6], [5, 6, 7], [6, 7, 1000]],
    "nothing": [[-1, -1, -1]] * 3,
}


def append(store, key, value, positions):
    """One call of a layer, with queries that look at nothing in particular."""
    store = store.append(jnp.asarray(key), jnp.asarray(value), jnp.asarray(positions))
    query = jnp.ones((len(key), key.shape[1], HEADS, H))
    return store.observe({}, store.read(query))


jitted = jax.jit(append)


def tokens(seed, length=3, batch=3):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((batch, length, *heads)).astype(np.float32) for heads in ((2, 4), (1, 5)))


def start(batch=3, capacity=CAPACITY, policy=None, value=(1, 5), dtype=jnp.float32):
    return empty(batch, capacity, (HEADS, H), value, dtype, policy)


def filled():
    """A store in which every slot of every row differs, some of them empty."""
    rng = np.random.default_rng(9)
    key, value = tokens(8, CAPACITY)
    positions = np.where(rng.random((3, CAPACITY)) < 0.5, np.arange(CAPACITY), -1).astype(np.int32)
    held = {"held": {"key": key, "value": value}, "positions": positions[..., None], "last": positions.max(-1)}
    return dataclasses.replace(start(), **jax.tree.map(jnp.asarray, held))


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("write", [append, jitted], ids=["eager", "jit"])
def test_each_token_goes_to_the_slot_of_its_position_and_nothing_else_changes(positions, write):
    """Of those beyond the capacity, which are refused where they are known."""
    store, (key, value) = filled(), tokens(1)
    if write is append and np.max(positions) >= CAPACITY:
        with pytest.raises(ValueError, match=r"positions reaches 1000 but the state has capacity 6: need at most 5"):
            append(store, key, value, np.array(positions))
        return
    expected = [np.array(x) for x in (store.key, store.value, store.positions[..., 0])]
    for b in range(3):
        for t, position in enumerate(positions[b]):
            if 0 <= position < CAPACITY:
                expected[0][b, position], expected[1][b, position] = key[b, t], value[b, t]
                expected[2][b, position] = position
    written = write(store, key, value, np.array(positions))
    for got, want in zip((written.key, written.value, written.positions[..., 0]), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_permuting_the_batch_permutes_the_store():
    key, value = tokens(1)
    positions, order = np.array(POSITIONS["any order"]), np.array([2, 0, 1])
    straight = jitted(filled(), key, value, positions)
    permuted = jitted(jax.tree.map(lambda x: x[order], filled()), key[order], value[order], positions[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), straight, permuted)


@pytest.mark.parametrize("policy", [Policy(), Policy(Recent(1), 4), Policy(HeavyHitters(1, 2), 8, Quest(2, 2))])
def test_a_store_keeps_its_dtype_and_its_shapes(policy):
    capacity = CAPACITY if policy.slots is None else 20
    store = start(3, capacity, policy, (HEADS, 5), jnp.bfloat16)
    assert (store.positions == -1).all()
    key, value = tokens(1)
    value = np.repeat(value, HEADS, 2)
    measured = {"mass": jnp.ones((3, store.positions.shape[1] + 3, HEADS))}
    new = store.append(jnp.asarray(key), jnp.asarray(value), jnp.asarray(POSITIONS["in order"]))
    seen = new.read(jnp.ones((3, 3, HEADS, H)))
    describe = [
        [(x.shape, x.dtype) for x in jax.tree.leaves(s)]
        for s in (store, new.observe({name: x[:, : seen.key.shape[1]] for name, x in measured.items()}, seen))
    ]
    assert describe[0] == describe[1]
    assert describe[0][0] == ((3, store.positions.shape[1], 2, 4), jnp.bfloat16)


@pytest.mark.parametrize("lengths", [(1,) * 9, (4, 1, 4), (9,), (2, 7)], ids=str)
def test_sinks_and_recent_tokens_are_kept_however_they_come(lengths):
    """Two sinks and four recent ones, whatever the calls in which nine tokens come; the second row is two shorter."""
    store = start(2, 20, Policy(Recent(2), CAPACITY))
    key, value = (x[:2] for x in tokens(1, 9))
    first = 0
    for length in lengths:
        at = np.arange(first, first + length)
        positions = np.stack([at, np.where(at < 7, at, -1)])
        store = append(store, key[:, at], value[:, at], positions)
        first += length
    for row, held in enumerate(([0, 1, 5, 6, 7, 8], [0, 1, 3, 4, 5, 6])):
        assert sorted(np.asarray(store.positions[row, :, 0])) == held
        for slot, position in enumerate(np.asarray(store.positions[row, :, 0])):
            np.testing.assert_array_equal(store.key[row, slot], key[row, position])
            np.testing.assert_array_equal(store.value[row, slot], value[row, position])


def test_tokens_that_join_are_kept_as_tokens_that_were_appended_and_the_others_leave_no_trace():
    """Twice, so that what joined first must not be lost when others stand beside the store."""
    key, value = (x[:2] for x in tokens(1, 8))
    chosen = np.array([[1, 0, 1, 1], [1, 1, 0, 0]], bool)
    for policy in (Policy(), Policy(Recent(1), 5), Policy(storage=Quantised(8, 2, 2))):
        capacity = 8 if policy.slots is None else 20
        joined = appended = start(2, capacity, policy, (HEADS, 4))
        of_value = jnp.asarray(np.repeat(value[..., :4], HEADS, 2))
        for first in (0, 4):
            piece, at = slice(first, first + 4), np.where(chosen, first + np.cumsum(chosen, 1) - 1, first)
            new = jnp.asarray(key[:, piece]), of_value[:, piece]
            joined = joined.beside(*new, jnp.asarray(at)).joined(jnp.asarray(chosen))
            appended = append(appended, *new, np.where(chosen, at, -1))
        assert joined.fresh is None
        jax.tree.map(np.testing.assert_array_equal, joined, appended)
    heavy = start(2, 20, Policy(HeavyHitters(1, 2), 8), (HEADS, 4))
    with pytest.raises(ValueError, match=r"by the attention that they get \(HeavyHitters\)"):
        heavy.beside(*new, jnp.asarray(at)).joined(jnp.asarray(chosen))


@pytest.mark.parametrize("lengths", [(1,) * 9, (5, 1, 3)], ids=str)
def test_heads_with_other_budgets_keep_other_tokens_in_one_program(lengths):
    programs = []
    for budget in ([3, 6], [6, 4]):
        store = start(2, 20, Policy(Recent(1), CAPACITY, budget=jnp.array(budget)), (HEADS, 5))
        key, value = (x[:2] for x in tokens(1, 9))
        value, first = np.repeat(value, HEADS, 2), 0
        for length in lengths:
            at = np.arange(first, first + length)
            store = jitted(store, key[:, at], value[:, at], np.stack([at, at]))
            first += length
        for head, count in enumerate(budget):
            held = [0, *range(10 - count, 9)]
            places = np.asarray(store.positions[0, :, head])
            assert sorted(places[places >= 0]) == held
            for slot in np.flatnonzero(places >= 0):
                np.testing.assert_array_equal(store.key[0, slot, head], key[0, places[slot], head])
        programs.append(jitted._cache_size())
    assert programs[0] == programs[1]


def test_the_token_with_the_least_attention_goes_and_the_older_of_equals():
    store = start(1, 20, Policy(HeavyHitters(0, 1), 3), (HEADS, 5))
    masses = {0: [1.0, 0.1], 1: [0.2, 0.1], 2: [0.5, 3.0], 3: [0.0, 0.0]}
    key, value = (x[:1] for x in tokens(1, 4))
    for t in range(4):
        store = store.append(jnp.asarray(key[:, t : t + 1]), jnp.asarray(np.repeat(value, 2, 2)[:, t : t + 1]),
                             jnp.array([[t]]))  # fmt: skip
        seen = store.read(jnp.ones((1, 1, HEADS, H)))
        got = jnp.where((seen.positions == t) & (t < 3), jnp.asarray(masses[t]), 0.0)
        store = store.observe({"mass": got}, seen)
    assert sorted(np.asarray(store.positions[0, :, 0])) == [0, 2, 3]  # 1 had the least
    assert sorted(np.asarray(store.positions[0, :, 1])) == [1, 2, 3]  # 0 and 1 are equal, 0 is older


def test_quest_reads_the_pages_of_the_largest_bound_and_the_newest():
    """Against the bound by hand, from the keys; pages in which nothing stands are not read."""
    rng = np.random.default_rng(0)
    store = start(2, 24, Policy(select=Quest(3, 4)), (HEADS, 5))
    key, value = (rng.standard_normal((2, 18, HEADS, c)).astype(np.float32) for c in (H, 5))
    store = append(store, key[:, :17], value[:, :17], np.arange(17)[None].repeat(2, 0))
    store = append(store, key[:, 17:], value[:, 17:], np.full((2, 1), 17))
    query = rng.standard_normal((2, 1, 4, H)).astype(np.float32)
    seen = store.read(jnp.asarray(query))
    for b in range(2):
        for k in range(HEADS):
            bounds = {}
            for page in range(5):
                of_page = key[b, 4 * page : min(4 * page + 4, 18), k]
                q = query[b, 0, 2 * k : 2 * k + 2, None]
                bounds[page] = np.maximum(q * of_page.min(0), q * of_page.max(0)).sum(-1).max()
            best = sorted(bounds, key=lambda page: -bounds[page] if page != 4 else -np.inf)[:3]
            places = {p for page in best for p in range(4 * page, min(4 * page + 4, 18))}
            got = np.asarray(seen.positions[b, :, min(k, seen.positions.shape[2] - 1)])
            assert set(got[got >= 0]) == places
            for slot, place in enumerate(got):
                if place >= 0:
                    np.testing.assert_array_equal(seen.key[b, slot, k], key[b, place, k])


@pytest.mark.parametrize(
    ("batch", "capacity", "policy", "message"),
    [
        (0, 4, Policy(), "batch and capacity must be at least 1, got 0 and 4"),
        (2, 0, Policy(), "batch and capacity must be at least 1, got 2 and 0"),
        (1, 8, Policy(slots=4), "slots is 4: need at least 1, and under Everything the capacity, 8"),
        (1, 8, Policy(Recent(4), 4), "Recent never evicts 4 tokens, but there is room for 4: need more"),
        (
            1,
            8,
            Policy(HeavyHitters(2, 3), 6, budget=jnp.array([6, 5])),
            "never evicts 5 tokens, .* room for 5",
        ),
        (1, 8, Policy(Recent(1), 4, budget=jnp.array([3, 3, 3])), r"budget has shape \(3,\): need \(\) or \(2,\)"),
        (1, 8, Policy(budget=jnp.array(3)), "budget is given, but Everything keeps all tokens"),
        (1, 10, Policy(slots=10, select=Quest(2, 4)), "slots is 10: need a multiple of the page size, 4"),
        (1, 8, Policy(Spans(jnp.ones(3)), 8), r"Spans does not give one worth per slot, \[1, 8, 2\]: need arrays"),
        (1, 8, Policy(HeavyHitters(1, 1), 4), "keys have 2 heads and values 1: to evict by head need the same"),
    ],
)
def test_a_store_that_cannot_be_is_refused(batch, capacity, policy, message):
    with pytest.raises(ValueError, match=message):
        start(batch, capacity, policy, (HEADS, 5) if "by head" not in message else (1, 5))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("recent", "store must be a policy such as"),
        (Policy(retain="recent"), "Policy: retain is 'recent': need a Retain"),
        (Policy(select=4), "Policy: select is 4: need a Select or None"),
        (Policy(storage="dense"), "Policy: storage is 'dense': need a Storage"),
    ],
)
def test_what_is_no_policy_is_refused(policy, message):
    with pytest.raises(TypeError, match=message):
        start(policy=policy)


def test_policies_out_of_range_are_refused():
    for make, message in (
        (lambda: Recent(-1), "Recent: sinks holds -1: need numbers at least 0"),
        (lambda: HeavyHitters(0, 0), "HeavyHitters: recent holds 0: need numbers at least 1"),
        (lambda: SnapKV(8, sinks=2, capacity=10), "SnapKV: capacity holds 10: need numbers above sinks . window, 10"),
        (lambda: SnapKV(8, pool=4), "SnapKV: pool is 4: need an odd number"),
        (lambda: Attentive("often"), "Attentive: by is 'often': need 'last' or 'count'"),
        (lambda: Memory(0), "Memory: local holds 0: need numbers at least 1"),
        (lambda: MeanKeys(2, over_heads="mean"), "MeanKeys: over_heads is 'mean': need 'max' or 'sum'"),
        (lambda: Quest(0), "Quest: pages must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert not Everything().measures(jnp.zeros(1), 1)
