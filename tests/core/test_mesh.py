"""Calls on arrays that are spread over a mesh, of Auto and of Explicit axes: the numbers of one device."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn import Causal, RelativeBias, Softmax, attend, linear_attention, memory_scan
from jaxattn.core.attend.api import attention_weights
from jaxattn.core.attend.measure import MeanPosition
from jaxattn.core.linear import Delta
from jaxattn.core.memory import MLPMemory

B, T, N, K, H = 4, 16, 4, 2, 8
MESH = {"data": 2, "tensor": 2, "context": 2}
SPECS = {
    "batch": ("data", None, None),
    "heads": (None, None, "tensor"),
    "length": (None, "context", None),
    "all": ("data", "context", "tensor"),
}


def drawn(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


ARRAYS = {"query": drawn(B, T, N, H), "key": drawn(B, T, K, H), "value": drawn(B, T, K, H + 1)[..., :H]}
GATES = {"log_decay": -np.abs(drawn(B, T, K)), "beta": 1 / (1 + np.exp(drawn(B, T, K)))}
LEARNED = {"table": drawn(N, 6), "first": 0.1 * drawn(N, H, H)}


def attended(given, learned, implementation):
    query, key, value = given["query"], given["key"], given["value"]
    options = {
        "mask": Causal(),
        "bias": RelativeBias(learned["table"], 8),
        "normalize": Softmax(learned["table"][:, 0]),
    }
    of_first = MeanPosition()
    out, extras = attend(
        query, key, value, **options, measures={"first": of_first}, return_lse=True, implementation=implementation
    )
    if implementation != "dense":
        return out, extras
    return out, extras, attention_weights(query, key, **options)[0]


def linear(given, learned, form):
    options = {"log_decay": given["log_decay"], "erase": Delta(given["beta"])}
    key = given["key"] / jnp.linalg.norm(given["key"], axis=-1, keepdims=True)
    return linear_attention(given["query"], key, given["value"], **options, form=form, chunk=4)


def learning(given, learned):
    key = given["query"] / jnp.linalg.norm(given["query"], axis=-1, keepdims=True)
    return memory_scan(MLPMemory((learned["first"],)), key, key, jnp.tanh(given["query"]), rate=0.1, inner_batch=4)


CALLS = {
    **{f"attend {name}": partial(attended, implementation=name) for name in ("dense", "rows", "tiled")},
    **{f"linear {form}": partial(linear, form=form) for form in ("parallel", "chunk", "associative", "step")},
    "memory": learning,
}


def with_slopes(call):
    def total(given, learned):
        results = call(given, learned)
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(results) if x.dtype == jnp.float64), results

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


@pytest.fixture(scope="module", autouse=True)
def x64():
    with jax.enable_x64():
        yield


def mesh_of(kind):
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(kind,) * len(MESH))


def placed(kind, spec):
    mesh = mesh_of(kind)
    given = {name: jax.device_put(x, NamedSharding(mesh, P(*spec))) for name, x in {**ARRAYS, **GATES}.items()}
    learned = {name: jax.device_put(x, NamedSharding(mesh, P())) for name, x in LEARNED.items()}
    return given, learned


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


@KINDS
@pytest.mark.parametrize("spec", [pytest.param(x, marks=() if x == "all" else pytest.mark.slow) for x in SPECS])
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_those_of_one_device(name, spec, kind):
    function = with_slopes(CALLS[name])
    alone = function({**ARRAYS, **GATES}, LEARNED)
    spread = function(*placed(kind, SPECS[spec]))
    for ours, theirs in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@KINDS
@pytest.mark.parametrize("name", CALLS)
def test_spread_over_batch_and_heads_devices_exchange_nothing(name, kind):
    program = jax.jit(CALLS[name]).lower(*placed(kind, ("data", None, "tensor"))).compile().as_text()
    found = re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", program)
    assert not found


def test_results_of_calls_outside_of_jit_are_spread_as_queries_are():
    given, learned = placed(AxisType.Explicit, SPECS["all"])
    out, extras = attended(given, learned, "tiled")
    assert jax.typeof(out).sharding.spec == P("data", "context", "tensor", None)
    assert jax.typeof(extras["lse"]).sharding.spec == P("data", "context", "tensor")
    alone, _ = attended({**ARRAYS, **GATES}, LEARNED, "tiled")
    np.testing.assert_allclose(out, alone, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="query has head dim 8 but key has 4"):
        attend(given["query"], given["key"][..., :4], given["value"])
