"""Storages: what is read is what was written, or as near as the number of bits allows, whoever shares the memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.cache import Everything, HeavyHitters, Paged, Policy, Quantised, Quest, Recent, empty

B, C, K, H = 2, 48, 2, 8
RNG = np.random.default_rng(0)
KEY, VALUE = (jnp.asarray(RNG.standard_normal((B, C, K, H)) * RNG.uniform(0.1, 9, H), jnp.float32) for _ in range(2))


@jax.jit
def call(store, key, value, positions, mass):
    store = store.append(key, value, positions)
    seen = store.read(jnp.ones((len(key), key.shape[1], K, H)))
    mass = mass[:, : seen.positions.shape[1]]
    return store.observe({"mass": mass} if store.measures() else {}, seen)


def filled(policy, pieces, length=C, padding=0, dtype=jnp.float32):
    """The store after tokens came in these pieces; row 1 is shorter by `padding`."""
    store, first = empty(B, C, (K, H), (K, H), dtype, policy), 0
    mass = jnp.asarray(np.random.default_rng(5).random((B, 2 * C, K)))
    for size in pieces:
        at = np.arange(first, min(first + size, length))
        positions = np.stack([at, np.where(at < length - padding, at, -1)])
        store = call(store, KEY[:, at], VALUE[:, at], jnp.asarray(positions), mass)
        first += size
    return store


def ranges(x, axis):
    return x.max(axis, keepdims=True) - x.min(axis, keepdims=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("pieces", [[C], [1] * C, [13, 1, 20, 1, 1, 12]], ids=["at once", "one by one", "pieces"])
def test_a_quantised_token_is_within_half_a_step_and_a_recent_one_exact(bits, pieces):
    """Groups are formed here by reshaping, once for all tokens; they are those of the store however tokens came."""
    store, group, recent = filled(Policy(storage=Quantised(bits, 8, 16)), pieces), 8, 16
    levels = 2**bits - 1
    step = np.repeat(ranges(np.asarray(KEY).reshape(B, C // group, group, K, H), 2)[:, :, 0], group, 1) / levels
    error = abs(np.asarray(store.key, np.float64) - np.asarray(KEY))
    assert (error[:, : C - recent] <= step[:, : C - recent] * (0.5 + 1e-3)).all()
    assert error[:, : C - recent].max() > 0.2 * step.max()  # rounding there is
    of_value = ranges(np.asarray(VALUE), -1) / levels
    error_value = abs(np.asarray(store.value, np.float64) - np.asarray(VALUE))
    assert (error_value[:, : C - recent] <= of_value[:, : C - recent] * (0.5 + 1e-3)).all()
    assert not error[:, C - recent :].any()
    assert not error_value[:, C - recent :].any()


def test_codes_do_not_depend_on_the_pieces_in_which_tokens_come():
    at_once, *others = (
        filled(Policy(storage=Quantised(4, 8, 8)), pieces, padding=5) for pieces in ([C], [1] * C, [11, 1, 30, 6])
    )
    for other in others:
        seen = np.asarray(at_once.positions[..., 0]) >= 0
        for name in ("key", "value"):
            np.testing.assert_array_equal(
                np.asarray(getattr(at_once, name))[seen], np.asarray(getattr(other, name))[seen]
            )


def test_a_constant_group_is_exact_and_an_outlier_channel_harms_itself_alone():
    store = empty(1, 16, (1, 4), (1, 4), jnp.float32, Policy(storage=Quantised(2, 8, 8)))
    key = jnp.asarray(RNG.standard_normal((1, 16, 1, 4)), jnp.float32).at[..., 0].set(0.1).at[..., 1].mul(1e4)
    value = jnp.full((1, 16, 1, 4), -3.7)
    store = store.append(key, value, jnp.arange(16)[None])
    store = store.observe({}, store.read(jnp.ones((1, 16, 1, 4))))
    np.testing.assert_array_equal(store.key[..., 0], key[..., 0])
    np.testing.assert_array_equal(store.value, value)
    assert abs(store.key - key)[..., 2:].max() < ranges(np.asarray(key[..., 2:]), 1).max()


def test_four_bits_take_less_than_a_sixth_of_float32():
    stores = [jax.eval_shape(lambda p=p: empty(1, 8192, (2, 64), (2, 64), jnp.float32, p)) for p in
              (Policy(), Policy(storage=Quantised(4)))]  # fmt: skip
    whole, quantised = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(s.held)) for s in stores)
    assert whole == 2 * 8192 * 2 * 64 * 4
    assert quantised <= whole / 6


RETAIN = {
    "all": Policy(),
    "recent": Policy(Recent(2), 16),
    "heavy": Policy(HeavyHitters(1, 4), 16),
    "heavy, by head, pages": Policy(HeavyHitters(1, 4), 24, Quest(2, 8), budget=jnp.array([9, 20])),
}


@pytest.mark.parametrize("name", RETAIN)
@pytest.mark.parametrize("pieces", [[C], [20, *[1] * (C - 20)]], ids=["at once", "then one by one"])
def test_a_paged_store_holds_what_a_dense_one_holds(name, pieces):
    dense, paged = (
        filled(dataclasses.replace(RETAIN[name], **options), pieces, padding=7)
        for options in ({}, {"storage": Paged(8)})
    )
    np.testing.assert_array_equal(dense.positions, paged.positions)
    there = np.broadcast_to(np.asarray(dense.positions) >= 0, (B, dense.positions.shape[1], K))
    np.testing.assert_array_equal(np.asarray(dense.key)[there], np.asarray(paged.key)[there])
    np.testing.assert_array_equal(np.asarray(dense.value)[there], np.asarray(paged.value)[there])
    query = jnp.asarray(RNG.standard_normal((B, 1, 2 * K, H)), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, dense.read(query).positions, paged.read(query).positions)


def test_a_row_has_no_more_pages_than_its_tokens_need():
    store = filled(Policy(storage=Paged(8)), [3, *[1] * 18], length=21, padding=9)
    assert np.asarray((store.held["table"] >= 0).sum(-1)).tolist() == [3, 2]  # ceil(21 / 8) and ceil(12 / 8)
    assert np.asarray(store.storage.owners(store.held)).max() == 1


def test_where_the_pages_lie_does_not_matter():
    store = filled(Policy(storage=Paged(8)), [30], length=30)
    order = RNG.permutation(len(store.held["key"]))
    table = store.held["table"]
    moved = {name: store.held[name][order] for name in ("key", "value")}
    moved["table"] = jnp.where(table < 0, -1, jnp.asarray(np.argsort(order), jnp.int32)[table])
    other = dataclasses.replace(store, held=moved)
    np.testing.assert_array_equal(store.key[:, :30], other.key[:, :30])


@pytest.mark.parametrize("retain", [Everything(), Recent(1)], ids=["all", "recent"])
def test_rows_that_share_pages_are_as_rows_of_their_own(retain):
    """Of one prompt are made three rows, which go on by different tokens; pages that nobody wrote to stay shared."""
    policies = [Policy(retain, C if not retain.evicts else 24, storage=s) for s in (Paged(8, 12), Policy().storage)]
    paged, dense = (filled(policy, [19], length=19) for policy in policies)
    rows = jnp.array([1, 0, 1])
    paged, dense = (
        dataclasses.replace(s, held=s.storage.reordered(s.held, rows), positions=s.positions[rows], last=s.last[rows])
        for s in (paged, dense)
    )
    assert len(paged.held["key"]) == 12
    for t in range(19, 24):
        key, value = (jnp.asarray(RNG.standard_normal((3, 1, K, H)), jnp.float32) for _ in range(2))
        positions = jnp.array([[t], [t], [t if t < 21 else -1]])
        paged, dense = (call(s, key, value, positions, jnp.zeros((3, 2 * C, K))) for s in (paged, dense))
    there = np.asarray(dense.positions[..., 0]) >= 0
    for name in ("key", "value"):
        np.testing.assert_array_equal(np.asarray(getattr(dense, name))[there], np.asarray(getattr(paged, name))[there])
    owners = np.asarray(paged.storage.owners(paged.held))
    assert (owners == 2).sum() == 2  # the first two pages of rows 0 and 2
    assert (owners > 0).sum() == 2 + 2 + 3  # those, their own third pages, and the three of the row in between


def test_a_token_without_a_page_is_nan_and_others_are_not():
    store = filled(Policy(storage=Paged(8, 3)), [14, 1, 1, 1], length=17)
    nan = np.isnan(np.asarray(store.key)).any((2, 3))
    there = np.asarray(store.positions[..., 0]) >= 0
    assert (nan & there).any()
    assert (nan & there).sum(-1).min() == 0 or (~nan & there).any()
    lost = np.asarray(store.held["table"] >= 0).sum()
    assert lost == 3


@pytest.mark.parametrize(
    ("storage", "slots", "message"),
    [
        (Paged(7), C, "slots is 48: need a multiple of the page size of Paged, 7"),
        (Quantised(4, 32, 32), C, "slots is 48: need a multiple of the group of Quantised, 32"),
    ],
)
def test_slots_that_do_not_fit_the_storage_are_refused(storage, slots, message):
    with pytest.raises(ValueError, match=message):
        empty(1, slots, (K, H), (K, H), jnp.float32, Policy(slots=slots, storage=storage))


def test_storages_out_of_range_are_refused():
    for make, message in (
        (lambda: Quantised(3), "bits is 3: need 2, 4, 8 or 16"),
        (lambda: Quantised(4, 64, 32), "recent is 32 and group 64: need at least as many"),
        (lambda: Paged(0), "Paged: size must be at least 1, got 0"),
        (lambda: empty(1, 64, (1, 3), (1, 3), jnp.float32, Policy(storage=Quantised(2, 8, 8))), "multiples of 4"),
        (lambda: empty(1, 64, (1, 12), (1, 12), jnp.float32, Policy(storage=Quantised(4, 8, 8))), "values have 12"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
