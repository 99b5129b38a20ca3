"""Models and modules on arrays that are typed by the axes of a mesh: the numbers of one device, spread as inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn import Window, models, nn
from jaxattn.trace import Put, Tap

B, T, WIDTH, VOCABULARY = 4, 8, 16, 8
MESH = {"data": 2, "tensor": 2, "context": 2}
ATTENTION = models.Spec(nn.MultiHeadAttention, heads=4, key_heads=2, mask=Window(5), dropout=0.1)
CONFIG = models.TransformerConfig(
    vocabulary=VOCABULARY, width=WIDTH, length=T,
    layers=[models.pre_norm(ATTENTION), models.pre_norm(models.Spec(nn.Mamba2, heads=4, state=4))],
)  # fmt: skip


def mixer(kind, **arguments):
    return nn.as_mixer(models.Spec(kind, **arguments), features=WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(0))


MODULES = {
    "attention": lambda: nn.MultiHeadAttention(WIDTH, 4, key_heads=2, rngs=nnx.Rngs(0)),
    "recurrence": lambda: mixer(nn.GLA, heads=2),
    "memory": lambda: mixer(nn.NeuralMemory, heads=2, hidden=(4,), inner_batch=4),
    "feed forward": lambda: nn.FeedForward(WIDTH, 32, rngs=nnx.Rngs(0)),
}


def mesh_of(kind):
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(kind,) * len(MESH))


def split(module, mesh=None):
    """A function of parameters and inputs, and the parameters, spread over the mesh if there is one."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    params = params if mesh is None else jax.device_put(params, nn.shardings(params, mesh))
    rest = rest if mesh is None else jax.device_put(rest, NamedSharding(mesh, P()))
    return (lambda params, rest, *x: nnx.merge(graph, params, rest)(*x)), params, rest


def slope(function, params, rest, x):
    def total(params, x):
        result = function(params, rest, x)
        y = result[0] if isinstance(result, tuple) else result
        return jnp.sin(y).sum(), y

    return jax.jit(jax.value_and_grad(total, (0, 1) if x.dtype.kind == "f" else 0, has_aux=True))(params, x)


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


@KINDS
@pytest.mark.parametrize("name", [*MODULES, "model"])
def test_modules_and_models_are_those_of_one_device(name, kind):
    mesh, x = mesh_of(kind), np.random.default_rng(0).normal(size=(B, T, WIDTH)).astype(np.float32)
    make = MODULES.get(name, lambda: models.Transformer(CONFIG, rngs=nnx.Rngs(0)))
    module = make()
    module.eval()
    x = x if name != "model" else np.arange(B * T, dtype=np.int32).reshape(B, T) % VOCABULARY
    alone = slope(*split(module), x)
    placed = jax.device_put(x, NamedSharding(mesh, P("data", "context")))
    spread = slope(*split(module, mesh), placed)
    y = spread[0][1]
    for ours, theirs in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1, np.abs(theirs).max()))
    if kind == AxisType.Explicit:
        assert y.sharding.spec[:2] == ("data", "context")


def test_decoding_on_an_explicit_mesh_is_that_of_one_device():
    model = models.Transformer(CONFIG, rngs=nnx.Rngs(0))
    model.eval()
    prompts = np.arange(B * 4).reshape(B, 4) % VOCABULARY
    expected = models.generate(model, prompts, max_new_tokens=4, temperature=0.0)
    mesh = mesh_of(AxisType.Explicit)
    params = nnx.state(model)
    nnx.update(model, jax.device_put(params, nn.shardings(params, mesh)))
    with jax.set_mesh(mesh):
        found = models.generate(model, prompts, max_new_tokens=4, temperature=0.0)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_dropout_goes_on_from_call_to_call():
    attention = nn.MultiHeadAttention(WIDTH, 4, dropout=0.5, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(B, T, WIDTH)).astype(np.float32)
    one = attention(jnp.asarray(x))[0]
    mesh = mesh_of(AxisType.Explicit)
    again = nn.MultiHeadAttention(WIDTH, 4, dropout=0.5, rngs=nnx.Rngs(0))
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    first, second = again(placed)[0], again(placed)[0]
    np.testing.assert_allclose(first, one, atol=1e-5)
    assert float(jnp.abs(first - second).max()) > 0.01


def test_edits_hold_arrays_and_records_and_keys_that_a_call_leaves_are_spread_as_its_results_and_x_may_be_named():
    first = nn.MultiHeadAttention(WIDTH, 4, key_heads=2, rngs=nnx.Rngs(0))
    second = nn.MultiHeadAttention(WIDTH, 4, key_heads=2, keys_from="layer", rngs=nnx.Rngs(1))

    def total(x):
        tap, give = Tap(edits={"attn_out": Put(jnp.cos(x))}, record=("z",)), {}
        put, _ = first(x=x, tap=tap, give=give)
        z = tap.records["z"].reshape(x.shape)
        y, _ = second(x, context=give["keys"])
        return jnp.sin(z + put + y).sum(), z

    x = np.random.default_rng(0).normal(size=(B, T, WIDTH)).astype(np.float32)
    slope = jax.jit(jax.value_and_grad(total, has_aux=True))
    alone, mesh = slope(x), mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        found = slope(jax.device_put(x, NamedSharding(mesh, P("data", "context"))))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
