"""Steps on meshes of any axes: the numbers of one device, and no device holds more than its part."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from jaxattn import models, nn
from jaxattn.train import batch_shardings, init_state, language_loss, make_step, on_mesh, on_one_device

ROWS, LENGTH, VOCABULARY, WIDTH = 8, 16, 24, 32
LAYER = models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=8, key_heads=2, qk_norm=models.Spec(nn.RMSNorm)))
OTHER = models.pre_norm(models.Spec(nn.DeltaNet, heads=8, decay="head"))
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},  # more than there are key heads
    "context": {"context": 8},
    "all": {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
    "two": {"data": 2, "tensor": 4},
}
OPTIMIZER, DESCENT = optax.adam(1e-2), optax.sgd(0.1, momentum=0.9)


def model(layers=(LAYER, OTHER), **changes):
    config = {"vocabulary": VOCABULARY, "width": WIDTH, "length": LENGTH, "layers": list(layers)} | changes
    return models.Transformer(models.TransformerConfig(**config), rngs=nnx.Rngs(0))


def batch(rows=ROWS):
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCABULARY, size=(rows, LENGTH + 1))
    weights = rng.integers(2, size=(rows, LENGTH)).astype(np.float32)
    documents = np.sort(rng.integers(3, size=(rows, LENGTH)), 1).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "documents": documents}


def mesh_of(sizes, kind=AxisType.Auto):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def in_float64(built):
    nnx.update(built, jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(built, nnx.Param)))
    return built


def after_steps(wrap, built, optimizer=DESCENT):
    params, loss_fn = language_loss(in_float64(built))
    step = wrap(make_step(loss_fn, optimizer))
    state = init_state(params, optimizer, jax.random.key(0))
    for _ in range(2):
        state, metrics = step(state, batch())
    return state, metrics


@pytest.fixture(scope="module", autouse=True)
def x64():
    with jax.enable_x64():
        yield


@pytest.fixture(scope="module")
def alone():
    with jax.enable_x64():
        return after_steps(on_one_device, model(dtype="float64"))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, AxisType.Auto, marks=() if name == "all" else SLOW) for name in MESHES]
    + [pytest.param("fsdp", AxisType.Explicit, marks=SLOW)],
)
def test_two_steps_on_a_mesh_are_those_on_one_device(name, kind, alone):
    state, metrics = after_steps(lambda step: on_mesh(step, mesh_of(MESHES[name], kind)), model(dtype="float64"))
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[0].params), strict=True):
        # The loss is in float32: gradients, all below 1, are known to some 1e-6, of which a step makes a tenth.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-7)
    for key, value in alone[1].items():
        np.testing.assert_allclose(metrics[key], value, rtol=8 * np.finfo(np.float32).eps)  # sums are float32


@pytest.mark.parametrize("name", [pytest.param("fsdp", marks=SLOW), pytest.param("all", marks=SLOW), "two"])
def test_no_device_holds_more_than_its_part(name):
    sizes = MESHES[name]
    state, _ = after_steps(lambda step: on_mesh(step, mesh_of(sizes)), model(), OPTIMIZER)
    spread = {axis: sizes.get(axis, 1) for axis in ("fsdp", "tensor")}
    for tree in (state.params, optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")):
        for path, param in nnx.to_flat_state(tree):
            (shard, *_) = param.get_value().addressable_shards
            names = [axis[0] if isinstance(axis, tuple) else axis for axis in param.get_metadata()["axes"]]
            parts = spread["fsdp"] if "width" in names else 1
            parts *= spread["tensor"] if {"heads", "hidden", "vocabulary"} & set(names) else 1
            parts *= spread["tensor"] if "key_heads" in names and spread["tensor"] <= 2 else 1
            assert shard.data.size * parts == param.size, (path, names)


@pytest.mark.parametrize("given", ["arrays", "a function"])
def test_the_first_state_is_spread_and_is_that_of_one_device(given):
    def make():
        return nnx.state(model([LAYER]), nnx.Param)

    mesh, key = mesh_of(MESHES["all"]), jax.random.key(0)
    expected = init_state(make(), OPTIMIZER, key)
    state = init_state(make() if given == "arrays" else make, OPTIMIZER, key, mesh)
    wanted = nn.shardings(expected, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for ours, theirs, sharding in zip(*map(jax.tree.leaves, (state, expected, wanted)), strict=True):
        assert ours.sharding.is_equivalent_to(sharding, ours.ndim)
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            # What is drawn is computed by another program.
            np.testing.assert_allclose(ours, theirs, rtol=4 * np.finfo(np.float32).eps)


def sent(sizes, differentiated):
    """(collective, axes of its first result, whether it stands in the loop over layers) of the compiled loss."""
    mesh, rows = mesh_of(sizes), batch()
    params, loss_fn = language_loss(model([LAYER] * 2))
    spread = nn.shardings(params, mesh), batch_shardings(rows, mesh)

    def loss(params, rows):
        with nn.sharding_rules(nn.RULES):
            return loss_fn(params, rows, None)[0]

    called, out = (jax.grad(loss), spread[0]) if differentiated else (loss, None)
    with jax.set_mesh(mesh):
        compiled = jax.jit(called, in_shardings=spread, out_shardings=out).lower(params, rows).compile()
    found = []
    for line in compiled.as_text().splitlines():
        kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
        if match := re.search(rf"= \(?[a-z0-9]+\[([0-9,]*)\].* ({kinds})(-start)?\(", line):
            found.append((match[2], sorted(map(int, filter(None, match[1].split(",")))), "while/body" in line))
    return found


@pytest.mark.slow
def test_devices_send_no_more_than_each_kind_of_parallelism_needs():
    """Gradients of rows, weights, or two sums per layer each way (Shoeybi et al., 2019), and nothing else."""
    matrices = [[WIDTH, WIDTH], [8, WIDTH], [8, WIDTH], [WIDTH, WIDTH], *[[WIDTH, 96]] * 3]  # q, k, v, out; 3 of F = 96
    table = [VOCABULARY, WIDTH]
    assert [kind for kind, *_ in sent(MESHES["data"], False)] == ["all-reduce"]
    assert {kind for kind, *_ in sent(MESHES["data"], True)} == {"all-reduce"}
    for differentiated, times in ((False, 1), (True, 2)):
        found = sent(MESHES["fsdp"], differentiated)
        assert {kind for kind, *_ in found} == {"all-gather", "all-reduce"}
        gathered = sorted(size for kind, size, _ in found if kind == "all-gather")
        assert gathered == sorted(matrices * times + [table])
        found = sent({"tensor": 2}, differentiated)
        assert {kind for kind, *_ in found} == {"all-reduce"}
        assert sum(in_loop for *_, in_loop in found) == 2 * times
