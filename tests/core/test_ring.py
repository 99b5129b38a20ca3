"""Attention over a sequence in shards is attention on one device: values, lse, measures and every gradient.

Arrays are cut over simulated devices. What they are held to is the NumPy oracle of `slots.py` and `oracle.py`, or
`attend` on one device.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import BATCH_IDS, MASKS
from collectives import collectives
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from slots import DIRECTIONS, SLOTS, answer, directions, draw, places, slopes

from jaxattn import Bias, Causal, Documents, Dropout, Explicit, Lengths, Mass, Sigmoid, Sinks, Softmax, Window, attend
from jaxattn.core.attend import (
    Convolution,
    Entmax15,
    Entropy,
    MeanPosition,
    MixHeads,
    Received,
    RowsOf,
    Sparsemax,
    Temporal,
    TopWeights,
    gathered,
    ring,
    split_keys,
    striped,
    unstriped,
    unzigzag,
    zigzag,
)
from jaxattn.core.attend.ring import Given, Plan, Way, _hops_needed
from jaxattn.core.attend.schedule import Block, Kinds, schedule

SHARD = P(None, "context")
FACTOR = 100  # roundings of the largest number: sums of some dozen terms, in another order


def mesh_of(devices: int, data: int = 1):
    return jax.make_mesh((data, devices), ("data", "context"), axis_types=(AxisType.Auto,) * 2)


def padded(x, axis, length, fill=0):
    widths = [(0, length - x.shape[axis] if i == axis % x.ndim else 0) for i in range(x.ndim)]
    return np.pad(x, widths, constant_values=fill)


def assert_close(found, expected, err_msg="", dtype=np.float64):
    expected = np.asarray(expected, np.float64)
    size = max(1, np.abs(expected).max(where=np.isfinite(expected), initial=0))
    bound = FACTOR * float(ml_dtypes.finfo(dtype).eps) * size
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=bound, err_msg=err_msg)


# Every slot, by the oracle.


@partial(jax.jit, static_argnames=("name", "devices"))
def over_devices(arrays, positions, *, name, devices):
    slot, where = SLOTS[name], places(True)
    sharded = {x: arrays[x] for x in ("query", "key", "value")}
    parts = {x: arrays[x] for x in slot.arrays}

    @partial(
        jax.shard_map,
        mesh=mesh_of(devices),
        in_specs=(SHARD, P(), P("context"), P("context")),
        out_specs=SHARD,
    )
    def run(sharded, parts, query_positions, key_positions):
        out, extras = ring(
            **sharded,
            axis_name="context",
            mask=where.mask,
            query_positions=query_positions,
            key_positions=key_positions,
            return_lse=True,
            block=(2, 1),
            **slot.parts(sharded | parts),
        )
        return out, extras["lse"]

    (out, lse), pull = jax.vjp(lambda sharded, parts: run(sharded, parts, *positions), sharded, parts)
    d_sharded, d_parts = pull((arrays["d_out"], arrays["d_lse"]))
    return {"out": out, "lse": lse} | d_sharded | d_parts


STREAMING = [name for name, slot in SLOTS.items() if slot.tiles]


RARELY = (" by ", " of ", ", two", ", both", "Relu", "Elu1, normalised", "LinearWeights, normalised")


def often(i: int, name: str, devices: int) -> bool:
    """One number of devices for each kind of slot; the rest is among the slow tests."""
    return devices == (4, 8)[i % 2] and not any(words in name for words in RARELY)


# Every slot with many devices and with few; each number of devices with every second slot.
OF_SLOTS = [
    pytest.param(name, devices, marks=() if often(i, name, devices) else pytest.mark.slow)
    for i, name in enumerate(STREAMING)
    for devices in ((1, 2)[i // 2 % 2], (4, 8)[i % 2])
]


@pytest.mark.parametrize(("name", "devices"), OF_SLOTS)
def test_every_slot_over_devices_is_the_oracle(name, devices):
    """At scattered positions, with empty slots, of which some devices hold no others; grouped heads; empty rows."""
    slot, where = SLOTS[name], places(True)
    arrays = draw(slot, where)
    out, lse = answer(slot, where, arrays)
    expected = slopes(slot, where, arrays)
    length = 16
    given = {x: padded(array, 1, length) if x in ("query", "key", "value", "d_out", "d_lse") else array
             for x, array in arrays.items()}  # fmt: skip
    positions = tuple(padded(x, -1, length, fill=-1) for x in (where.query, where.key))
    with jax.enable_x64(True):
        results = over_devices(given, positions, name=name, devices=devices)
    assert_close(results["out"][:, : out.shape[1]], out, "out")
    assert_close(results["lse"][:, : lse.shape[1]], lse, "lse")
    assert not np.any(results["out"][:, out.shape[1] :])
    for x, along in expected.items():
        gradient = np.asarray(results[x])
        if x in ("query", "key", "value"):
            gradient = gradient[:, : arrays[x].shape[1]]
        found = (directions(arrays, x) * gradient).reshape(DIRECTIONS, -1).sum(-1)
        np.testing.assert_allclose(found, along, rtol=0, atol=1e-8 * max(1, np.abs(gradient).max()), err_msg=x)


# Masks.


B, T, N, K, KV, H, V = 2, 16, 4, 2, 1, 4, 3
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(B, T, heads, width)) for heads, width in ((N, H), (K, H), (KV, V)))
D_OUT, D_LSE = RNG.normal(size=(B, T, N, V)), RNG.normal(size=(B, T, N))


# Those that hold tables, and so read more than the two positions.
TABLES = ("batch documents", "explicit by head", "streaming by document", "lengths", "graph", "ancestors", "blocks")


@pytest.mark.parametrize("names", [TABLES, pytest.param(tuple(MASKS), marks=pytest.mark.slow)], ids=["tables", "all"])
def test_masks_over_devices_are_their_predicates(names):
    """At the default positions, on four devices, in one program; the predicates are in plain Python."""
    masks = {name: MASKS[name] for name in names}

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(4), in_specs=SHARD, out_specs=SHARD)
    def run(query, key, value):
        options = {"return_lse": True, "block": 4}
        return {name: ring(query, key, value, "context", mask=mask, **options) for name, (mask, _) in masks.items()}

    with jax.enable_x64(True):
        results = run(QUERY, KEY, VALUE)
    for name, (_, predicate) in masks.items():
        visible = oracle.pairs(predicate, np.arange(T), np.arange(T), (B,), N)
        expected, _ = oracle.attention(QUERY, KEY, VALUE, visible, D_OUT, D_LSE)
        out, extras = results[name]
        assert_close(out, expected.out, name)
        assert_close(extras["lse"], expected.lse, name)


# Everything at once, in any order, over any number of devices.


class Weights(NamedTuple):
    """Cotangents of out, lse and the mass of three groups."""

    out: Any
    lse: Any
    mass: Any


class Learned(NamedTuple):
    query: Any
    key: Any
    value: Any
    null: Any
    table: Any


LEARNED = Learned(QUERY, KEY, VALUE, RNG.normal(size=N), RNG.normal(size=(N, T, T)))
WEIGHTS = Weights(D_OUT, D_LSE, RNG.normal(size=(B, T, N, 3)))
BY_BATCH = P("data", "context")
SPECS = Learned(BY_BATCH, BY_BATCH, BY_BATCH, P(), P())


def loss(function, learned, weights, mask, **options):
    """A null logit, a learned bias of pairs, dropout and measures; returns the loss, and what it is made of."""
    out, extras = function(
        learned.query,
        learned.key,
        learned.value,
        mask=mask,
        normalize=Softmax(learned.null),
        bias=Bias(learned.table),
        dropout=Dropout(0.25, jax.random.key(3), shared=True),
        measures={"mass": Mass(np.arange(T) % 3, 3), "place": MeanPosition()},
        return_lse=True,
        **options,
    )
    results = Weights(out, extras["lse"], extras["mass"])
    return sum(jax.tree.leaves(jax.tree.map(lambda x, w: (x * w).sum(), results, weights))), (results, extras["place"])


@partial(jax.jit, static_argnames=("devices", "function", "batch"))
def over(learned, weights, positions, mask, ids, *, devices, function=ring, batch=2):
    """The loss over devices, with its gradients. `mask` gets the ids of the batch entries that a device holds."""

    @partial(
        jax.shard_map,
        mesh=mesh_of(devices, batch),
        in_specs=(SPECS, BY_BATCH, P("data", "context"), P(), P("data")),
        out_specs=(P(), BY_BATCH),
    )
    def run(learned, weights, positions, mask, ids):
        mask = mask if ids is None else Documents(ids) & mask
        places = {} if positions is None else {"query_positions": positions, "key_positions": positions}
        total, results = loss(partial(function, axis_name="context"), learned, weights, mask, **places)
        return jax.lax.psum(total, ("data", "context")), results

    return jax.value_and_grad(lambda learned: run(learned, weights, positions, mask, ids), has_aux=True)(learned)


@jax.jit
def on_one(learned, weights, positions, mask, ids):
    mask = mask if ids is None else Documents(ids) & mask
    places = {} if positions is None else {"query_positions": positions, "key_positions": positions}
    function = partial(attend, implementation="dense")
    return jax.value_and_grad(lambda learned: loss(function, learned, weights, mask, **places), has_aux=True)(learned)


def assert_equal(found, expected):
    for path, x in jax.tree_util.tree_leaves_with_path(expected):
        y = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        assert_close(y, x, jax.tree_util.keystr(path))


def drawn(seed: int, kind: str, devices: int, empty: float = 0.0):
    """Positions [B, T] in an order, another one for each row; some slots are empty."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(T) if kind == "scattered" else np.arange(T) for _ in range(B)]).astype(np.int32)
    if kind in ("zigzag", "striped"):
        rows = np.asarray({"zigzag": zigzag, "striped": striped}[kind](jnp.asarray(rows), devices, 1))
    return np.where(rng.random((B, T)) < empty, -1, rows).astype(np.int32)


@pytest.mark.slow  # for four devices see the next law
@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped", "scattered"])
def test_documents_in_any_order_over_any_number_of_devices(devices, kind):
    with jax.enable_x64(True):
        given = LEARNED, WEIGHTS, drawn(devices, kind, devices, 0.1), Causal(), BATCH_IDS
        found = over(*given, devices=devices, batch=1 if devices == 8 else 2)
        assert_equal(found, on_one(*given))
    assert np.abs(found[1].table).max() > 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(["contiguous", "zigzag", "striped", "scattered"]),
    empty=st.sampled_from([0.0, 0.2, 0.9]),
    ids=st.lists(st.integers(-1, 3), min_size=T, max_size=T),
)
def test_drawn_orders_documents_and_empty_slots(seed, kind, empty, ids):
    """Four devices, two halves of a batch: also documents in pieces, and shards in which no slot is filled."""
    ids = np.stack([np.asarray(ids), np.sort(ids)])
    with jax.enable_x64(True):
        given = LEARNED, WEIGHTS, drawn(seed, kind, 4, empty), Causal(), ids
        assert_equal(over(*given, devices=4), on_one(*given))


@pytest.mark.parametrize(
    ("mask", "function"),
    [
        pytest.param(Window(3, 2), ring, id="window both ways"),
        pytest.param(Window(3), ring, id="window", marks=pytest.mark.slow),
        pytest.param(~Causal() & ~Window(0, 8), ring, id="far ahead", marks=pytest.mark.slow),
        pytest.param(None, ring, id="none"),
        pytest.param(Causal(), gathered, id="causal, gathered"),
        pytest.param(Explicit(RNG.random((N, T, T)) < 0.2), ring, id="table", marks=pytest.mark.slow),
        pytest.param(Causal(), ring, id="causal", marks=pytest.mark.slow),
        pytest.param(None, gathered, id="none, gathered", marks=pytest.mark.slow),
    ],
)
def test_default_positions_are_those_of_contiguous_shards(mask, function):
    """And their number of steps is known when the program is made."""
    with jax.enable_x64(True):
        given = LEARNED, WEIGHTS, None, mask, None
        assert_equal(over(*given, devices=4, function=function), on_one(*given))


@pytest.mark.slow
@pytest.mark.parametrize("function", [ring, gathered, split_keys])
def test_key_heads_may_stand_apart_and_keys_be_more_than_queries(function):
    """24 keys for 16 queries, at other positions for each key head; out, lse, a measure and gradients."""
    rng = np.random.default_rng(6)
    key, value = (rng.normal(size=(B, 24, K, width)) for width in (H, V))
    places = np.stack([rng.permutation(24) for _ in range(B * K)], -1).reshape(24, B, K).swapaxes(0, 1)
    places[0, 3, 1] = -1
    options = {"mask": Window(9), "measures": {"place": MeanPosition()}, "return_lse": True}

    def total(function, query, key, value, places):
        out, extras = function(query, key, value, key_positions=places, **options)
        seen = jnp.where(jnp.isfinite(extras["lse"]), extras["lse"], 0)
        return jnp.sin(out).sum() + jnp.sin(seen).sum() + jnp.sin(extras["place"]).sum()

    def over_all(*arrays):
        found = total(partial(function, axis_name="context"), *arrays)
        return found if function is split_keys else jax.lax.psum(found, "context")

    specs = (P() if function is split_keys else SHARD, SHARD, SHARD, SHARD)
    sharded = jax.shard_map(over_all, mesh=mesh_of(4), in_specs=specs, out_specs=P())
    with jax.enable_x64(True):
        found, expected = (
            jax.jit(jax.value_and_grad(f, (0, 1, 2)))(QUERY, key, value, places)
            for f in (sharded, partial(total, partial(attend, implementation="dense")))
        )
        assert_equal(found, expected)


def test_dropout_by_head_is_the_same_on_any_number_of_devices():
    """Also in NumPy: a weight is dropped or divided by 1 − rate, as one device has it."""
    options = {"dropout": Dropout(0.5, jax.random.key(1)), "mask": Causal()}
    alone = attend(QUERY, KEY, VALUE, implementation="dense", **options)
    for devices in (2, 8):
        run = jax.jit(
            jax.shard_map(
                partial(ring, axis_name="context", **options), mesh=mesh_of(devices), in_specs=SHARD, out_specs=SHARD
            )
        )
        assert_close(run(*(x.astype(np.float32) for x in (QUERY, KEY, VALUE))), alone, dtype=np.float32)
    assert np.abs(alone - attend(QUERY, KEY, VALUE, mask=Causal())).max() > 0.1


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_float32_and_bfloat16_are_summed_in_float32(dtype):
    """64 keys over 8 devices: the rounding does not grow with the number of devices."""
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(1, 64, heads, 8)).astype(dtype) for heads in (2, 1, 1)]
    weight = rng.normal(size=(1, 64, 2, 8)).astype(dtype)

    def total(function, *arrays):
        out = function(*arrays, mask=Causal())
        assert out.dtype == arrays[2].dtype
        return (out.astype(np.float64 if out.dtype == np.float64 else np.float32) * weight).sum()

    def sharded(*arrays):
        run = partial(ring, axis_name="context")
        specs = {"mesh": mesh_of(8), "in_specs": SHARD, "out_specs": SHARD}
        return total(lambda *xs, mask: jax.shard_map(partial(run, mask=mask), **specs)(*xs), *arrays)

    found = jax.jit(jax.grad(sharded, (0, 1, 2)))(*arrays)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x.astype(np.float64)) for x in arrays]
        expected = jax.grad(partial(total, partial(attend, implementation="dense")), (0, 1, 2))(*wide)
    assert {x.dtype for x in found} == {np.dtype(dtype)}
    eps = float(ml_dtypes.finfo(dtype).eps)
    for x, y in zip(found, expected, strict=True):
        # bfloat16: out and its cotangent are rounded once, and the gradient once.
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=0, atol=(100, 2)[dtype != np.float32] * eps * np.abs(y).max()
        )


def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others():
    """A key that other devices see, a query, and empty slots that hold NaN; values and gradients as on one device."""
    query, key, value = (x.copy() for x in (QUERY, KEY, VALUE))
    positions = np.arange(T, dtype=np.int32)
    positions[[3, 12]] = -1
    key[0, 5, 1], query[1, 2, 0, 0], value[:, 12] = np.nan, np.inf, np.nan
    key[1, 3] = np.nan

    def results(function, arrays):
        def total(*arrays):
            out, extras = function(*arrays)
            rows = np.ones((B, T, 1)) * (positions >= 0)[:, None]
            return jnp.where(jnp.isfinite(out), out * D_OUT, 0).sum() + jnp.where(
                jnp.isfinite(extras["lse"]), rows * extras["lse"], 0
            ).sum(), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)

    def sharded(*arrays):
        def run(query, key, value, places):
            options = {"mask": Causal(), "return_lse": True, "query_positions": places, "key_positions": places}
            return ring(query, key, value, "context", **options)

        specs = (SHARD, SHARD, SHARD, P("context"))
        return jax.shard_map(run, mesh=mesh_of(4), in_specs=specs, out_specs=SHARD)(*arrays, positions)

    def alone(*arrays):
        options = {"mask": Causal(), "return_lse": True, "implementation": "dense"}
        return attend(*arrays, query_positions=positions, key_positions=positions, **options)

    with jax.enable_x64(True):
        found, expected = (results(function, (query, key, value)) for function in (sharded, alone))
    assert_equal(found, expected)
    out = np.isnan(np.asarray(found[0][1])).all(-1)
    assert out[0, [5, 6, 11, 15], 3].all()
    assert not out[0, :5].any()
    assert out.sum() == 2 * 10 + 1  # of two heads the rows from 5 on, less an empty one, and the row of a query


# Splitting keys.


@pytest.mark.parametrize("length", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("normalize", [Softmax, pytest.param(Sigmoid, marks=pytest.mark.slow)])
def test_keys_split_over_devices_are_one_call(length, normalize):
    """A cache over eight devices, of which one has only empty slots, with NaN in them; all gradients."""
    places = np.where(np.arange(T) // 2 == 3, -1, np.arange(T)[::-1]).astype(np.int32)
    value = np.where((places >= 0)[:, None, None], VALUE, np.nan)
    arrays = QUERY[:, :length], KEY, value, LEARNED.null
    at = np.arange(T - 1, T + length - 1, dtype=np.int32)
    weight = D_OUT[:, :length], D_LSE[:, :length]

    def total(function, query, key, value, number, places):
        options = {"mask": Causal() & ~Sinks(1), "query_positions": at, "key_positions": places, "return_lse": True}
        out, extras = function(query, key, value, normalize=normalize(number), **options)
        return (out * weight[0]).sum() + (extras["lse"] * weight[1]).sum()

    specs = (P(), SHARD, SHARD, P(), P("context"))
    split = jax.shard_map(
        partial(total, partial(split_keys, axis_name="context")), mesh=mesh_of(8), in_specs=specs, out_specs=P()
    )
    alone = partial(total, partial(attend, implementation="dense"))
    with jax.enable_x64(True):
        found, expected = (jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(*arrays, places) for f in (split, alone))
    assert_equal(found, expected)


# Gathering serves the rest.


def test_gathered_serves_whole_rows_and_the_whole_matrix():
    """Maps that look along rows, to queries of other devices, and at all queries; measures of all kinds."""
    kernel = jnp.asarray(RNG.normal(size=(N, 3, 3)))
    measures = {"r": Received(), "e": Entropy(), "t": TopWeights(2), "rows": RowsOf(jnp.asarray([1, 14]))}
    calls = {
        "rows": {"normalize": Entmax15(), "measures": measures},
        "halo": {"score_maps": (Convolution(kernel),), "measures": measures},
        "matrix": {"score_maps": (Temporal(),), "measures": measures},
    }
    own = {"r": P(), "e": SHARD, "t": SHARD, "rows": P(), "lse": SHARD}

    def run(query, key, value):
        return {
            name: gathered(query, key, value, "context", mask=Causal(), return_lse=True, **call)
            for name, call in calls.items()
        }

    specs = {"mesh": mesh_of(4), "in_specs": SHARD, "out_specs": dict.fromkeys(calls, (SHARD, own))}
    with jax.enable_x64(True):
        found = jax.jit(jax.shard_map(run, **specs))(QUERY, KEY, VALUE)
        for name, call in calls.items():
            options = {"mask": Causal(), "return_lse": True, "implementation": "dense"}
            assert_equal(found[name], attend(QUERY, KEY, VALUE, **options, **call))


# What is sent, held and computed.


@pytest.mark.parametrize(("window", "hops"), [(1, 1), (2, 2), (9, 2), (10, 3), (17, 3), (None, 8)])
def test_a_window_stops_after_the_steps_it_needs_and_sends_key_heads(window, hops):
    """Shards of 8 tokens: a window of W keys needs ⌈(W − 1) / 8⌉ + 1. Forward K heads travel, in their dtype."""
    arrays = [jax.ShapeDtypeStruct((B, 64, heads, 4), jnp.bfloat16) for heads in (8, 2, 1)]
    mask = Causal() if window is None else Window(window - 1)
    specs = {"mesh": mesh_of(8), "in_specs": SHARD, "out_specs": SHARD}
    function = jax.shard_map(partial(ring, axis_name="context", mask=mask), **specs)
    found = collectives(function, *arrays)
    assert {(each.name, each.times) for each in found} == {("ppermute", hops)}
    keys, values, positions, flags = 2 * B * 8 * 2 * 4, 2 * B * 8 * 1 * 4, 4 * 8, B * 8 * 8
    assert sorted(each.size for each in found) == sorted((keys, values, positions, flags))

    total = jax.grad(lambda *arrays: function(*arrays).astype(jnp.float32).sum(), (0, 1, 2))
    found = collectives(total, *arrays)
    assert {each.name for each in found} == {"ppermute"}
    # Keys go round again, with their gradients, which are brought home by one more step unless they are there.
    assert {each.times for each in found} == ({8} if hops == 8 else {hops, 1})


def test_a_window_both_ways_begins_ahead():
    """Shards of 8 tokens and keys up to 8 on either side: one step back, and then three, of 8."""
    arrays = [jax.ShapeDtypeStruct((B, 64, heads, 4), jnp.float32) for heads in (2, 2, 2)]
    specs = {"mesh": mesh_of(8), "in_specs": SHARD, "out_specs": SHARD}
    function = jax.shard_map(partial(ring, axis_name="context", mask=Window(8, 8)), **specs)
    assert {each.times for each in collectives(function, *arrays)} == {1, 3}


@pytest.mark.parametrize("function", [ring, split_keys])
def test_no_device_waits_in_a_branch_that_others_do_not_take(function):
    """Parts with branches of their own, and tables that all devices share: their gradients are added up outside."""

    def total(query, key, value, table, places):
        options = {
            "bias": Bias(table),
            "mask": Documents(places) & Causal(),
            "dropout": Dropout(0.1, jax.random.key(0)),
        }
        out = function(query, key, value, "context", **options)
        return jax.lax.pmean(out.sum(), "context")

    first = P() if function is split_keys else SHARD
    run = jax.shard_map(total, mesh=mesh_of(4), in_specs=(first, SHARD, SHARD, P(), P()), out_specs=P())
    found = collectives(jax.grad(run, (0, 1, 2, 3)), QUERY, KEY, VALUE, LEARNED.table, np.arange(T))
    assert found
    assert not [each for each in found if each.in_branch]


def test_steps_are_found_by_positions_where_they_are_not_known():
    """The largest number over devices, the same on each."""

    def hops(mask, positions):
        plan = Plan(Block(2, 2, 2), Kinds(True, True, False), True, None, None)

        def run(positions):
            given = Given(mask, positions[None, :, None], positions[None, None], None, None)
            return _hops_needed(plan, Way("context", True, None), given)

        return int(jax.jit(jax.shard_map(run, mesh=mesh_of(8), in_specs=P("context"), out_specs=P()))(positions))

    at = np.arange(32, dtype=np.int32)
    assert [hops(Window(left), at) for left in (0, 1, 4, 5, 31)] == [1, 2, 2, 3, 8]
    assert hops(Causal(), at) == 8
    assert hops(Causal(), np.asarray(zigzag(jnp.asarray(at), 8, 0))) == 8
    assert hops(Documents(at // 4) & Causal(), at) == 1
    assert hops(Documents(at // 7) & Causal(), at) == 3
    assert hops(None, np.full(32, -1, np.int32)) == 0


@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_memory_of_a_device_does_not_grow_with_the_number_of_devices(known):
    """64 tokens on each of 2 or 8 devices, forward and backward: temporary memory is the same."""

    def temporary(devices):
        length = 64 * devices
        arrays = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (4, 2, 2)]

        def run(query, key, value, places):
            options = {} if known else {"query_positions": places, "key_positions": places}
            return ring(query, key, value, "context", mask=Causal(), block=16, **options)

        specs = {"in_specs": (SHARD, SHARD, SHARD, P("context")), "out_specs": SHARD}
        function = jax.shard_map(run, mesh=mesh_of(devices), **specs)
        gradient = jax.grad(lambda *xs: function(*xs).sum(), (0, 1, 2))
        places = jax.ShapeDtypeStruct((length,), jnp.int32)
        return jax.jit(gradient).lower(*arrays, places).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(2), temporary(8)
    shard = 4 * 64 * 8 * 2
    assert many < few + shard


def visits(order, devices, length, block, mask):
    """The number of tiles that each device computes."""
    at = np.asarray(order).reshape(devices, -1)

    def of(query, key):
        tiles = query.reshape(1, -1, 1, block), key.reshape(1, 1, -1, block)
        return int(schedule(mask, *tiles)[0].count.sum())

    return np.array([sum(of(query, key) for key in at) for query in at])


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_zigzag_gives_all_devices_the_same_causal_work(devices):
    """Tiles of 8 in shards of 64. In contiguous shards the last device has up to 2 devices − 1 times the first's."""
    at = np.arange(64 * devices, dtype=np.int32)
    work = visits(zigzag(jnp.asarray(at), devices, 0), devices, len(at), 8, Causal())
    assert work.max() == work.min()
    contiguous = visits(at, devices, len(at), 8, Causal())
    assert contiguous.sum() == work.sum()
    assert contiguous.max() > 1.5 * contiguous.mean() - 8


def test_zigzag_and_striped_by_hand_and_back():
    at = jnp.arange(16)
    assert zigzag(at, 4, 0).tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert striped(at, 4, 0).tolist() == [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    x = jnp.arange(2 * 24 * 3).reshape(2, 24, 3)
    for shards in (1, 2, 3, 4, 6, 12):
        for there, back in ((zigzag, unzigzag), (striped, unstriped)):
            for axis in (1, -2):
                assert (back(there(x, shards, axis), shards, axis) == x).all()
                assert (there(x, shards, axis)[1, :, 2] == there(x[1, :, 2], shards, 0)).all()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: zigzag(jnp.zeros((2, 12)), 4, 1), "axis 1 has length 12: need a multiple of 8"),
        (lambda: striped(jnp.zeros((2, 12)), 5, -1), "axis 1 has length 12: need a multiple of 5"),
        (lambda: unzigzag(jnp.zeros(8), 0, 0), "shards is 0: need at least 1"),
        (lambda: unstriped(jnp.zeros(8), 2, 1), r"axis is 1 but the array has shape \(8,\): need one of its 1 axes"),
    ],
)
def test_lengths_that_do_not_divide_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run()


# More than one axis, and other ways to run on devices.


def test_an_axis_may_be_several():
    mesh = jax.make_mesh((2, 4), ("outer", "inner"), axis_types=(AxisType.Auto,) * 2)
    spec = P(None, ("outer", "inner"))
    run = partial(ring, axis_name=("outer", "inner"), mask=Causal())
    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(QUERY, KEY, VALUE)
    assert_close(found, attend(QUERY, KEY, VALUE, mask=Causal()), dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("function", [ring, gathered, split_keys])
def test_devices_without_an_account_of_what_differs(function):
    """`check_vma=False`: the same gradients, also those of what is shared."""
    specs = (P() if function is split_keys else SHARD, SHARD, SHARD, P())

    def total(function, query, key, value, null):
        out, extras = function(
            query, key, value, normalize=Softmax(null), mask=Causal() & Lengths(LENGTHS_OF), return_lse=True
        )
        return jnp.sin(out).sum() + extras["lse"].sum()

    LENGTHS_OF = jnp.asarray([16, 9])

    def over_all(*arrays):
        found = total(partial(function, axis_name="context"), *arrays)
        return found if function is split_keys else jax.lax.psum(found, "context")

    sharded = jax.shard_map(over_all, mesh=mesh_of(4), in_specs=specs, out_specs=P(), check_vma=False)
    arrays = (QUERY, KEY, VALUE, LEARNED.null)
    with jax.enable_x64(True):
        found, expected = (
            jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(*arrays) for f in (sharded, partial(total, attend))
        )
        assert_equal(found, expected)


# Refusals.


def call(function=ring, specs=(SHARD, SHARD, SHARD), more=None, **options):
    def run(query, key, value, more):
        return function(query, key, value, "context", **({} if more is None else {"mask": Documents(more)}), **options)

    run = jax.shard_map(run, mesh=mesh_of(4), in_specs=(*specs, P(None, "context")), out_specs=SHARD)
    return jax.eval_shape(run, QUERY, KEY, VALUE, more)


REPLICATED = "differs between the devices of axis 'context': parts hold the tables of the whole sequence"


@pytest.mark.parametrize(
    ("run", "exception", "message"),
    [
        (
            lambda: call(normalize=Sparsemax()),
            NotImplementedError,
            "ring cannot serve normalize=Sparsemax: .* gathered",
        ),
        (
            lambda: call(score_maps=(Temporal(),)),
            NotImplementedError,
            "ring cannot serve score_maps=Temporal: .* gathered",
        ),
        (
            lambda: call(split_keys, measures={"e": Entropy()}),
            NotImplementedError,
            "split_keys cannot .* measures=Entropy",
        ),
        (lambda: call(weight_maps=(MixHeads(np.eye(N)),)), NotImplementedError, "weight_maps=MixHeads"),
        (lambda: call(more=BATCH_IDS), ValueError, f"mask.ids {REPLICATED}"),
        (lambda: call(gathered, more=BATCH_IDS), ValueError, f"mask.ids {REPLICATED}"),
        (lambda: call(mask=np.ones((4, 4), bool)), ValueError, r"mask has shape \(4, 4\): need .* \(2, 4, 16, 16\)"),
        (
            lambda: call(split_keys, bias=np.ones((4, 4))),
            ValueError,
            r"bias has shape \(4, 4\): need .* \(2, 4, 4, 16\)",
        ),
        (lambda: call(masks=Causal()), TypeError, r"ring got unknown arguments \['masks'\]"),
        (lambda: call(block=0), ValueError, "block must be at least 1, got 0"),
        (lambda: call(mask="causal"), TypeError, "mask must be a Mask"),
        (lambda: call(measures=[Entropy()]), TypeError, "measures must be a dict"),
        (lambda: ring(QUERY, KEY, VALUE, "context"), NameError, "context"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_would(run, exception, message):
    with pytest.raises(exception, match=message):
        run()


def test_a_sharded_bias_is_refused():
    def run(query, key, value, table):
        return ring(query, key, value, "context", bias=table)

    run = jax.shard_map(run, mesh=mesh_of(4), in_specs=(SHARD, SHARD, SHARD, P("context")), out_specs=SHARD)
    with pytest.raises(ValueError, match=rf"bias.array {REPLICATED}"):
        jax.eval_shape(run, QUERY, KEY, VALUE, LEARNED.table[0])


@pytest.mark.parametrize("function", [ring, split_keys])
def test_forward_mode_names_the_remedy(function):
    first = P() if function is split_keys else SHARD
    run = partial(function, axis_name="context")
    run = jax.shard_map(run, mesh=mesh_of(4), in_specs=(first, SHARD, SHARD), out_specs=first)
    with pytest.raises(NotImplementedError, match=f"{function.__name__} has first derivatives .* gathered"):
        jax.jit(lambda x: jax.jvp(lambda x: run(x, KEY, VALUE), (x,), (x,))).lower(QUERY)
