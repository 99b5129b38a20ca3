"""Recurrences and convolutions over a sequence in shards are those of the whole sequence, with every gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_linear import CASES, recurrence

from jaxattn import linear_attention, memory_scan
from jaxattn.core.linear import Delta, LinearState, halo, sharded_linear_attention, state_map
from jaxattn.core.memory import MatrixMemory, MLPMemory, SoftmaxLink, sharded_memory_scan

T = 32
SHARD = P("context")


def mesh_of(devices: int):
    return jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,))


def assert_close(found, expected, factor=500):
    """Within some roundings of the largest number: gates that close make and unmake numbers of some size."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), (_, y) in zip(*map(jax.tree_util.tree_leaves_with_path, (found, expected)), strict=True):
        bound = factor * np.finfo(np.float64).eps * max(1, np.abs(y).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


# Linear attention.


def shortened(case: dict) -> tuple[dict, dict]:
    """(arrays by token, the rest) of a case, for the first T tokens."""
    case = dict(case)
    whole = {name: case.pop(name) for name in ("read", "bonus") if name in case}
    if np.ndim(case.get("log_decay")) == 1:
        whole["log_decay"] = case.pop("log_decay")
    return jax.tree.map(lambda x: np.asarray(x)[:T], case), whole


IDS = np.repeat([0, 2, 3, 4], [6, 9, 1, 16])  # a document of one token, and one that starts with a shard
OFTEN = [
    ("per token", 4, "state"),
    ("per channel", 4, "segments"),
    ("delta per channel", 4, "both"),
    ("erase per token", 8, "segments"),
]
EVERY = [(name, devices, "both") for name in CASES for devices in (1, 2, 4, 8)]
EVERY += [("shared keys", 2, "state"), ("grouped values", 4, "nothing")]


@pytest.mark.parametrize(
    ("name", "devices", "more"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY)]
)
def test_linear_attention_over_devices_is_the_recurrence(name, devices, more):
    """Outputs and last state by the definition in NumPy, and every gradient by the steps on one device."""
    rng = np.random.default_rng(1)
    by_token, whole = shortened(CASES[name])
    read, statics = whole.get("read", "post"), {"read": whole.pop("read", "post")}
    memory = None
    with jax.enable_x64(True):
        out, last = linear_attention(**by_token, **whole, **statics, form="step")
        if more in ("state", "both"):
            memory = rng.normal(size=last.memory.shape)
        ids = jnp.asarray(IDS) if more in ("segments", "both") else None
        weights = rng.normal(size=out.shape), rng.normal(size=last.memory.shape)

        def loss(function, arrays, whole, memory, ids, weights):
            state = None if memory is None else LinearState(memory, jnp.int32(0))
            out, last = function(**arrays, **whole, **statics, state=state, segment_ids=ids, chunk=4)
            return (out * weights[0]).sum(), (last.memory * weights[1]).sum(), (out, last)

        def on_one(arrays, whole, memory):
            first, second, results = loss(partial(linear_attention, form="step"), arrays, whole, memory, ids, weights)
            return first + second, results

        @partial(
            jax.shard_map,
            mesh=mesh_of(devices),
            in_specs=(SHARD, P(), P(), SHARD, (SHARD, P())),
            out_specs=(P(), (SHARD, P())),
        )
        def sharded(arrays, whole, memory, ids, weights):
            function = partial(sharded_linear_attention, axis_name="context")
            first, second, results = loss(function, arrays, whole, memory, ids, weights)
            return jax.lax.psum(first, "context") + second, results

        def over(arrays, whole, memory):
            return sharded(arrays, whole, memory, ids, weights)

        which = (0, 1, 2) if memory is not None else (0, 1)
        found, expected = (
            jax.jit(jax.value_and_grad(function, which, has_aux=True))(by_token, whole, memory)
            for function in (over, on_one)
        )
    assert_close(found, expected)
    arguments = {"log_decay": np.zeros((T, 1))} | jax.tree.map(np.asarray, by_token | whole)
    arguments |= {"read": read, "state": memory}
    out, last = recurrence(**arguments, segment_ids=None if ids is None else IDS)
    assert_close(found[0][1][0], out)
    assert_close(found[0][1][1].memory, last)


def test_reading_everything_over_devices_reads_the_last_state():
    by_token, whole = shortened(CASES["delta per token"])
    whole = {name: x for name, x in whole.items() if name != "bonus"}
    run = jax.shard_map(
        lambda arrays: sharded_linear_attention(**arrays, **whole, axis_name="context", read="all"),
        mesh=mesh_of(4),
        in_specs=SHARD,
        out_specs=(SHARD, P()),
    )
    with jax.enable_x64(True):
        assert_close(jax.jit(run)(by_token), linear_attention(**by_token, **whole, read="all"))


@pytest.mark.parametrize("erase", [None, Delta(jnp.ones((T, 2)))], ids=["diagonal", "matrix"])
def test_what_is_not_finite_ends_with_its_document_on_whatever_device(erase):
    """A NaN in a document that starts on one device and ends on the next."""
    rng = np.random.default_rng(2)
    query, key, value = (rng.normal(size=(T, 2, 3)) for _ in range(3))
    value[13, 0, 1] = np.nan
    ids = np.repeat([0, 1, 2], [10, 9, 13])

    def sharded(query, key, value, ids, erase):
        return sharded_linear_attention(query, key, value, "context", erase=erase, segment_ids=ids)

    run = jax.shard_map(sharded, mesh=mesh_of(4), in_specs=SHARD, out_specs=(SHARD, P()))
    with jax.enable_x64(True):
        out, last = jax.jit(run)(query, key, value, ids, erase)
        clean, _ = linear_attention(query, key, np.nan_to_num(value), erase=erase, segment_ids=ids)
    reached = np.isnan(np.asarray(out))
    assert reached[13:19, 0].all()
    assert reached.sum() == 6 * 3
    assert_close(np.where(reached, 0, out), np.where(reached, 0, clean))
    assert np.isfinite(last.memory).all()


@pytest.mark.parametrize("name", ["per channel", "erase per token"])
def test_the_map_of_tokens_with_segments_forgets_where_one_starts(name):
    """Maps of both halves of the tokens, one after the other, are the last state; the second starts a segment."""
    by_token, _ = shortened(CASES[name])
    by_token.pop("query")
    memory = np.random.default_rng(3).normal(size=(2, 4, 3))
    with jax.enable_x64(True):
        first, second = (jax.tree.map(lambda x, at=at: x[at], by_token) for at in (slice(0, 16), slice(16, T)))
        options = [{"before": jnp.int32(0)}, {"before": jnp.int32(2), "segment_ids": jnp.full(16, 3)}]
        maps = [state_map(**x, **more, chunk=4) for x, more in zip((first, second), options, strict=True)]
        _, last = linear_attention(second["key"], **second)
        assert not np.any(maps[1].through)
        assert_close(maps[1](maps[0](memory)), last.memory)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"erase": 3.0}, TypeError, "erase must be Delta"),
        ({"segment_ids": jnp.zeros(5, int)}, ValueError, r"segment_ids has shape \(5,\)"),
        ({"state": LinearState(jnp.zeros((2, 9, 3)), jnp.int32(0))}, ValueError, r"state has memory \(2, 9, 3\)"),
    ],
)
def test_calls_that_mean_nothing_are_refused_as_on_one_device(change, error, message):
    def run(query, key, value):
        return sharded_linear_attention(query, key, value, "context", **change)

    tokens = [jax.ShapeDtypeStruct((T, 2, 3), jnp.float32)] * 3
    with pytest.raises(error, match=message):
        jax.eval_shape(jax.shard_map(run, mesh=mesh_of(4), in_specs=SHARD, out_specs=(SHARD, P())), *tokens)


def test_what_is_sent_are_states():
    """Of 8 devices: one step on, and three to combine, whatever the length; then the last state."""

    def run(query, key, value, beta):
        return sharded_linear_attention(query, key, value, "context", erase=Delta(beta))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 2, 4), (64, 2, 4), (64, 2, 3), (64, 2))]
    run = jax.shard_map(run, mesh=mesh_of(8), in_specs=SHARD, out_specs=(SHARD, P()))
    found = collectives(run, *shapes)
    maps = [(each.times, each.size) for each in found if each.name == "ppermute"]
    assert sorted(maps) == sorted([(1, 4 * 2 * 4 * 4), (1, 4 * 2 * 4 * 3)] * 4)
    assert {each.name for each in found} - {"ppermute"} <= {"psum", "psum_invariant"}


def test_no_device_waits_in_a_branch_that_others_do_not_take():
    """Gradients of what all devices share are added up once, outside of loops: of decays, bonus, memory and rates."""

    def linear(query, key, value, decay, bonus):
        out, _ = sharded_linear_attention(query, key, value, "context", log_decay=-decay * decay, bonus=bonus)
        return jax.lax.psum(out.sum(), "context")

    def memory(query, key, value, decay, bonus):
        options = {"rate": decay * decay, "log_decay": -decay * decay, "inner_batch": 4}
        out, _ = sharded_memory_scan(MatrixMemory(bonus), query, key, value, "context", **options)
        return jax.lax.psum(out.sum(), "context")

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((T, 2, 4), (T, 2, 4), (T, 2, 3))]
    decay, of_linear, of_memory = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2,), (2, 4), (2, 4, 3)))
    for function, own in ((linear, of_linear), (memory, of_memory)):
        specs = (SHARD, SHARD, SHARD, P(), P())
        run = jax.shard_map(function, mesh=mesh_of(4), in_specs=specs, out_specs=P())
        found = collectives(jax.grad(run, range(5)), *shapes, decay, own)
        assert not [each for each in found if each.in_branch]
        assert not [each for each in found if each.name != "ppermute" and each.times > 1]


# Memories that are trained while they read.


MEMORIES = {
    "matrix": (MatrixMemory, lambda rng: (rng.normal(size=(2, 3, 4)),), ("log_momentum",), {}),
    "network": (
        MLPMemory,
        lambda rng: ((rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 5, 4))),),
        ("log_decay",),
        {},
    ),
    "link": (MatrixMemory, lambda rng: (rng.normal(size=(2, 3, 4)),), ("row_rate",), {"link": SoftmaxLink()}),
}
OF_MEMORIES = [
    ("matrix", 4, "state"),
    pytest.param("network", 2, "lengths", marks=pytest.mark.slow),
    *(
        pytest.param(name, devices, more, marks=pytest.mark.slow)
        for name in MEMORIES
        for devices in (1, 4, 8)
        for more in ("segments", "lengths", "nothing")
    ),
]


@pytest.mark.parametrize(("name", "devices", "more"), OF_MEMORIES)
def test_memories_learn_over_devices_as_on_one(name, devices, more):
    """Inner batches of 6 tokens, which shards of 8 cut; with a state in the middle of one; every gradient."""
    rng = np.random.default_rng(4)
    kind, draw, gates, statics = MEMORIES[name]
    arrays = {x: rng.normal(size=(2, T, 2, size)) / 3 for x, size in (("query", 3), ("key", 3), ("value", 4))}
    arrays["rate"] = rng.uniform(0, 0.1, size=(2, T, 2))
    arrays |= {
        gate: -rng.uniform(0, 1, size=(2, T, 2)) if gate[0] == "l" else rng.uniform(size=(2, T, 2)) for gate in gates
    }
    lengths = np.array([29, 10]) if more == "lengths" else None
    ids = np.repeat([0, 1, 2], [6, 18, 8]) if more == "segments" else None
    weights = rng.normal(size=(2, T, 2, 4))

    def loss(function, weights_of_memory, arrays, state, ids, weights):
        options = {"inner_batch": 6, "segment_ids": ids, "lengths": lengths, "state": state, **statics}
        out, last = function(kind(*weights_of_memory), **arrays, **options)
        there = True if lengths is None else weights != 0
        return (
            jnp.where(there, out * weights, 0).sum(),
            sum(x.sum() for x in last.dual),
            (jnp.where(there, out, 0), last),
        )

    if lengths is not None:
        weights = np.where(np.arange(T)[:, None, None] < lengths[:, None, None, None], weights, 0)
    specs = P(None, "context")

    @partial(
        jax.shard_map,
        mesh=mesh_of(devices),
        in_specs=(P(), specs, P(), SHARD, specs),
        out_specs=(P(), (specs, P())),
    )
    def sharded(memory, arrays, state, ids, weights):
        function = partial(sharded_memory_scan, axis_name="context")
        first, second, results = loss(function, memory, arrays, state, ids, weights)
        return jax.lax.psum(first, "context") + second, results

    def on_one(memory, arrays, state, ids, weights):
        first, second, results = loss(memory_scan, memory, arrays, state, ids, weights)
        return first + second, results

    with jax.enable_x64(True):
        memory, state = jax.tree.map(jnp.asarray, draw(rng)), None
        if more == "state":  # after ten tokens
            some = {x: array[:, :10] for x, array in arrays.items()}
            _, state = memory_scan(kind(*memory), **some, inner_batch=6, **statics)
        found, expected = (
            jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(memory, arrays, state, ids, weights)
            for function in (sharded, on_one)
        )
    assert_close(found, expected)


def test_a_memory_holds_one_state_per_device_for_its_gradient():
    """Temporary memory of a shard of 64 tokens grows by states, not by tokens, from 2 devices to 8."""

    def temporary(devices):
        def run(weight, query, key, value):
            out, _ = sharded_memory_scan(MatrixMemory(weight), query, key, value, "context", rate=0.01)
            return out

        run = jax.shard_map(run, mesh=mesh_of(devices), in_specs=(P(), SHARD, SHARD, SHARD), out_specs=SHARD)
        tokens = [jax.ShapeDtypeStruct((64 * devices, 1, 4), jnp.float32)] * 3
        gradient = jax.grad(lambda *xs: run(*xs).sum(), (0, 1, 2, 3))
        compiled = jax.jit(gradient).lower(jax.ShapeDtypeStruct((1, 4, 4), jnp.float32), *tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state = 2 * 4 * 4 * 4  # start and dual
    assert temporary(8) - temporary(2) <= 6 * 4 * state


# Halos.


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("width", [1, 2, 4, 7, 40])
def test_a_convolution_of_shards_with_halos_is_that_of_the_whole(devices, width):
    """Widths up to more than a shard, and than the sequence; the gradient goes to the device it came from."""
    rng = np.random.default_rng(width)
    x, kernel, weight = rng.normal(size=(2, 16, 3)), rng.normal(size=width), rng.normal(size=(2, 16, 3))

    @partial(jax.shard_map, mesh=mesh_of(devices), in_specs=P(None, "context"), out_specs=P(None, "context"))
    def convolved(x):
        longer = jnp.concatenate([halo(x, width - 1, "context", 1), x], 1)
        return sum(kernel[i] * longer[:, i : i + x.shape[1]] for i in range(width))

    with jax.enable_x64(True):
        out, pull = jax.vjp(jax.jit(convolved), jnp.asarray(x))
        (gradient,) = pull(jnp.asarray(weight))
    padded = np.pad(x, [(0, 0), (width - 1, 0), (0, 0)])
    expected = sum(kernel[i] * padded[:, i : i + 16] for i in range(width))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    later = np.pad(weight, [(0, 0), (0, width - 1), (0, 0)])
    backward = sum(kernel[width - 1 - i] * later[:, i : i + 16] for i in range(width))
    np.testing.assert_allclose(gradient, backward, rtol=0, atol=1e-12)


def test_halos_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="count is -1: need at least 0"):
        halo(jnp.zeros(3), -1, "context", 0)
    with pytest.raises(TypeError, match="axis must be an int, got None"):
        halo(jnp.zeros(3), 1, "context", None)
