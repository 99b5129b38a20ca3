"""attend is an ordinary function of arrays and parts: every JAX transformation takes it, in each implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH_IDS, assert_close, by_implementation
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxattn import Alibi, Causal, Documents, Dot, Softmax, attend

T, HEADS, WIDTH = 16, 4, 4
IMPLEMENTATION = by_implementation("tiled")  # which has a gradient of its own


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


QUERY, KEY, VALUE = normal(2, T, HEADS, WIDTH, seed=1), normal(2, T, 2, WIDTH, seed=2), normal(2, T, 1, WIDTH, seed=3)
LEARNED = Dot(np.float32(0.6)), Alibi(np.array([0.1, 0.2, 0.3, 0.4], np.float32)), Softmax(normal(HEADS, seed=4))
IDS = np.asarray(BATCH_IDS)
ARGUMENTS = QUERY, KEY, VALUE, LEARNED
OPTIMIZED = {"xla_backend_optimization_level": 3}


def loss(implementation, query, key, value, learned, ids):
    """A number per batch entry that depends on out and lse everywhere. Some rows see nothing."""
    score, bias, normalize = learned
    options = {"score": score, "bias": bias, "normalize": normalize, "mask": Causal() & Documents(ids)}
    out, extras = attend(query, key, value, return_lse=True, block=4, implementation=implementation, **options)
    lse = jnp.where(jnp.isneginf(extras["lse"]), 0, extras["lse"])
    return (out**2).sum((-1, -2, -3)) + jnp.sin(lse).sum((-1, -2))


@partial(jax.jit, static_argnames="implementation")
def reference(implementation):
    """The loss of the whole batch and its gradients."""
    return jax.value_and_grad(lambda *x: loss(implementation, *x, IDS).sum(), argnums=(0, 1, 2, 3))(*ARGUMENTS)


def assert_same(actual, expected):
    """Only the order of sums differs, of at most 2·T·N summands each of the size of the largest result or smaller."""
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert_close(x, y, np.sqrt(2 * T * HEADS) * np.abs(y).max())


@IMPLEMENTATION
def test_vmap_is_the_batch_axis(implementation):
    @jax.jit
    def mapped(*x):
        return jax.value_and_grad(
            lambda query, key, value, learned: jax.vmap(partial(loss, implementation), (0, 0, 0, None, 0))(
                query, key, value, learned, IDS
            ).sum(),
            argnums=(0, 1, 2, 3),
        )(*x)

    assert_same(mapped(*ARGUMENTS), reference(implementation))


@IMPLEMENTATION
def test_vmap_over_the_leaves_of_parts_is_a_loop(implementation):
    stack = jax.tree.map(lambda x: np.stack([x, 2 * x, -x]), LEARNED)
    gradient = jax.jit(jax.grad(lambda learned: loss(implementation, QUERY, KEY, VALUE, learned, IDS).sum()))
    mapped = jax.jit(jax.vmap(gradient))(stack)
    loop = [gradient(jax.tree.map(lambda x, i=i: x[i], stack)) for i in range(3)]
    assert_same(mapped, jax.tree.map(lambda *x: np.stack(x), *loop))


@IMPLEMENTATION
def test_checkpoint_and_scan(implementation):
    """Three rematerialised layers in a scan are three layers one after the other."""
    weights = 1 + 0.1 * normal(3, WIDTH, seed=5)

    def layer(x, weight):
        out = attend(x * weight, x[..., :2, :], x[..., 1:2, :], mask=Causal(), block=4, implementation=implementation)
        return x + out, None

    @jax.jit
    def both(x, weights):
        def scanned(x, weights):
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2)

        def unrolled(x, weights):
            for weight in weights:
                x, _ = layer(x, weight)
            return jnp.sum(x**2)

        return tuple(jax.value_and_grad(form, argnums=(0, 1))(x, weights) for form in (scanned, unrolled))

    assert_same(*both(QUERY, weights))


@jax.jit
def forward_and_reverse(tangent):
    """The derivative of Σ loss along a tangent: by jvp through dense, and as gradient · tangent."""

    def total(*x):
        return loss("dense", *x, IDS).sum()

    _, forward = jax.jvp(total, ARGUMENTS, tangent)
    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(*ARGUMENTS)
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), gradients, tangent)
    sizes = jax.tree.map(lambda x, y: jnp.sum(abs(x * y)), gradients, tangent)
    return forward, jax.tree.reduce(jnp.add, products), jax.tree.reduce(jnp.add, sizes)


def test_forward_mode_goes_through_dense():
    tangent = jax.tree.map(lambda x: normal(*np.shape(x), seed=8) if np.ndim(x) else np.float32(0.3), ARGUMENTS)
    forward, reverse, size = forward_and_reverse(tangent)
    assert_close(forward, reverse, float(size))


@partial(jax.jit, static_argnames="implementation")
def curvature(tangent, implementation):
    """Forward over reverse, reverse over forward and linearize, of Σ loss along a tangent."""

    def total(*x):
        return loss(implementation, *x, IDS).sum()

    gradient = jax.grad(total, argnums=(0, 1, 2, 3))
    _, product = jax.jvp(gradient, ARGUMENTS, tangent)
    slope, push = jax.linearize(total, *ARGUMENTS)
    other = jax.grad(lambda *x: jax.jvp(total, x, tangent)[1], argnums=(0, 1, 2, 3))(*ARGUMENTS)
    return product, other, push(*tangent), slope


def test_hessian_vector_products_and_linearize_go_through_rows():
    """Both orders of differentiation agree, and rows is dense; the sums are those of the gradients."""
    tangent = jax.tree.map(lambda x: normal(*np.shape(x), seed=8) if np.ndim(x) else np.float32(0.3), ARGUMENTS)
    product, other, slope, _ = rows = curvature(tangent, "rows")
    assert_same(product, other)
    assert_same(rows, curvature(tangent, "dense"))
    assert_same(slope, forward_and_reverse(tangent)[1])


def test_what_tiled_cannot_differentiate_names_what_can():
    """However it is compiled. Forward over reverse it can."""

    def call(query):
        return loss("tiled", query, KEY, VALUE, LEARNED, IDS).sum()

    ways = {
        "jvp": lambda: jax.jvp(call, (QUERY,), (QUERY,)),
        "jvp of jit": lambda: jax.jvp(jax.jit(call), (QUERY,), (QUERY,)),
        "jit of jvp": lambda: jax.jit(lambda x: jax.jvp(call, (x,), (x,)))(QUERY),
        "vmap of jvp": lambda: jax.vmap(lambda x: jax.jvp(call, (x,), (x,)))(jnp.stack([QUERY, QUERY])),
        "jacobian forward": lambda: jax.jacfwd(call)(QUERY),
        "gradient of a gradient": lambda: jax.grad(lambda x: (jax.grad(call)(x) ** 2).sum())(QUERY),
        "the same under jit": lambda: jax.jit(jax.grad(lambda x: (jax.grad(call)(x) ** 2).sum()))(QUERY),
    }
    for run in ways.values():
        with pytest.raises(NotImplementedError, match=r"implementation='rows'.* or 'dense'"):
            run()
    # XLA's program without optimisation holds NaN: the one that users run does not.
    along = jax.jit(lambda x: jax.jvp(jax.grad(call), (x,), (x,))[1], compiler_options=OPTIMIZED)(QUERY)
    _, expected = jax.jvp(jax.grad(lambda x: loss("rows", x, KEY, VALUE, LEARNED, IDS).sum()), (QUERY,), (QUERY,))
    np.testing.assert_allclose(along, expected, atol=1e-4 * np.abs(expected).max())


@IMPLEMENTATION
def test_shard_map_over_the_batch(implementation):
    """Each device has one batch entry; the gradients of the shared parts are summed over the devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    shards = P("data"), P("data"), P("data"), P()

    def on_a_device(query, key, value, learned, ids):
        def total(*x):
            return jax.lax.psum(loss(implementation, *x, ids).sum(), "data")

        return jax.value_and_grad(total, argnums=(0, 1, 2, 3))(query, key, value, learned)

    sharded = jax.shard_map(on_a_device, mesh=mesh, in_specs=(*shards, P("data")), out_specs=(P(), shards))
    assert_same(jax.jit(sharded)(*ARGUMENTS, IDS), reference(implementation))


@IMPLEMENTATION
def test_pmap_over_the_batch(implementation):
    def on_a_device(query, key, value, learned, ids):
        def total(*x):
            return loss(implementation, *x, ids).sum()

        value, (*d_arrays, d_learned) = jax.value_and_grad(total, argnums=(0, 1, 2, 3))(query, key, value, learned)
        return *jax.lax.psum((value, d_learned), "data"), d_arrays

    mapped = jax.pmap(on_a_device, axis_name="data", in_axes=(0, 0, 0, None, 0), devices=jax.devices()[:2])
    total, d_learned, d_arrays = mapped(*(x[:, None] for x in ARGUMENTS[:3]), LEARNED, IDS[:, None])
    total, d_learned = jax.tree.map(lambda x: x[0], (total, d_learned))
    assert_same((total, (*(x[:, 0] for x in d_arrays), d_learned)), reference(implementation))


@IMPLEMENTATION
def test_automatic_sharding_over_the_batch(implementation):
    """jit with sharded inputs, the way models are trained on several devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    by_batch = jax.sharding.NamedSharding(mesh, P("data"))
    query, key, value = (jax.device_put(x, by_batch) for x in ARGUMENTS[:3])
    gradient = jax.jit(jax.value_and_grad(lambda *x: loss(implementation, *x, IDS).sum(), argnums=(0, 1, 2, 3)))
    results = gradient(query, key, value, LEARNED)
    assert_same(results, reference(implementation))
