"""nn.MultiHeadAttention is a function of its parameters to every transformation of NNX, JAX and Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from multi_head import assert_close, randomise

from jaxattn import Alibi, Causal, Dot, SoftCap, nn
from jaxattn.nn import BilinearScore, HeadMixing, MultiHeadAttention, NeuralScore, NullSoftmax

D, T = 16, 5
OPTIONS = {"key_heads": 2, "qk_norm": nn.Spec(nn.RMSNorm), "gate": True, "mask": Causal()}


def build(seed=0):
    slots = {"score": BilinearScore(D // 4), "bias": Alibi.geometric(4), "normalize": NullSoftmax(4)}
    maps = {"score_maps": (SoftCap(5.0), HeadMixing(4)), "weight_maps": (HeadMixing(4),)}
    return randomise(MultiHeadAttention(D, 4, **OPTIONS, **slots, **maps, rngs=nnx.Rngs(seed)), seed)


def loss(module, x):
    return (module(x)[0] ** 2).sum()


@pytest.fixture(scope="module")
def case():
    module, x = build(), np.random.default_rng(1).standard_normal((2, T, D)).astype(np.float32)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def of(params, x):
        return loss(nnx.merge(graph, params, rest), x)

    return module, x, params, of, jax.jit(jax.grad(of))(params, x)


def assert_trees_close(actual, expected):
    jax.tree.map(assert_close, nnx.to_pure_dict(actual), nnx.to_pure_dict(expected))


def test_jit_is_eager(case):
    module, x, *_ = case
    assert_close(nnx.jit(lambda module, x: module(x)[0])(module, x), module(x)[0])


def test_merging_what_was_split_is_the_identity(case):
    module, x, *_ = case
    run = nnx.jit(lambda module, x: module(x)[0])
    np.testing.assert_array_equal(run(nnx.merge(*nnx.split(module)), x), run(module, x))


def test_the_gradients_of_nnx_and_of_jax_over_the_merged_module_are_equal(case):
    module, x, _, _, gradient = case
    assert_trees_close(nnx.jit(nnx.grad(loss))(module, x), gradient)
    assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradient))


def test_the_gradient_is_the_slope(case):
    """Central differences along a random direction u: (f(p + hu) − f(p − hu)) / 2h = ∇f·u + O(h²) + O(ε f / h)."""
    _, x, params, of, gradient = case
    rng, h = np.random.default_rng(3), 2.0**-7
    u = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
    f = jax.jit(lambda s: of(jax.tree.map(lambda p, u: p + s * u, params, u), x))
    slope, expected = (
        (f(h) - f(-h)) / (2 * h),
        sum(jax.tree.leaves(jax.tree.map(lambda g, u: (g * u).sum(), gradient, u))),
    )
    third = abs(f(2 * h) - 2 * f(h) + 2 * f(-h) - f(-2 * h)) / (2 * h**3)  # |f'''|, for the h² term
    rounding = 100 * np.finfo(np.float32).eps * abs(f(0.0)) / h
    assert abs(slope - expected) <= third * h**2 / 3 + rounding
    assert abs(expected) > 10 * (third * h**2 / 3 + rounding)


def test_a_checkpointed_module_has_the_same_gradient(case):
    _, x, params, of, gradient = case
    assert_trees_close(jax.jit(jax.grad(jax.checkpoint(of)))(params, x), gradient)


def test_a_module_may_be_a_constant_of_a_loop(case):
    module, x, *_ = case
    looped = jax.jit(lambda x: jax.lax.scan(lambda x, _: (module(x)[0], None), x, length=3)[0])(x)
    step = nnx.jit(lambda module, x: module(x)[0])
    assert_close(looped, step(module, step(module, step(module, x))), factor=3 * 20)


def test_vmap_over_parameter_sets_is_a_loop(case):
    _, x, params, of, _ = case
    other = nnx.state(build(1), nnx.Param)
    both = jax.jit(jax.vmap(of, in_axes=(0, None)))(jax.tree.map(lambda *p: jnp.stack(p), params, other), x)
    assert_close(both, [of(params, x), of(other, x)])


def test_scan_over_stacked_layers_is_a_loop(case):
    _, x, *_ = case

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return MultiHeadAttention(D, 4, **OPTIONS, score=NeuralScore(D // 4, 8, rngs=rngs), rngs=rngs)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def scanned(module, x):
        return x + module(x)[0]

    stack = create(nnx.Rngs(0))
    graph, arrays = nnx.split(stack)
    expected = x
    for i in range(3):
        layer = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], arrays))
        expected = expected + nnx.jit(lambda module, x: module(x)[0])(layer, expected)
    assert_close(scanned(stack, x), expected, factor=3 * 20)


def test_linen_code_uses_the_module_through_the_bridge(case):
    """Parameters arrive in Linen's boxes of metadata, since each says its role; they work in them and out of them."""
    from flax import linen

    _, x, *_ = case

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return nnx.bridge.to_linen(MultiHeadAttention, D, 4, **OPTIONS, name="attention")(x)[0]

    model = Model()
    boxed = model.init(jax.random.key(0), x)
    variables = linen.meta.unbox(boxed)
    module = MultiHeadAttention(D, 4, **OPTIONS, rngs=nnx.Rngs(7))
    given = variables["params"]["attention"]
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    for name in given:
        for leaf in given[name]:
            getattr(getattr(module, name), leaf)[...] = given[name][leaf]
    expected = nnx.jit(lambda module, x: module(x)[0])(module, x)
    assert_close(jax.jit(model.apply)(variables, x), expected)
    assert_close(jax.jit(model.apply)(boxed, x), expected)
    gradient = jax.jit(jax.grad(lambda v: (model.apply(v, x) ** 2).sum()))(variables)
    assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradient))


def test_the_arrays_of_a_part_given_as_an_argument_belong_to_the_module():
    """A learned score scale is a leaf of the module's state: splitting, moving and merging carries it along."""
    options = {"score": Dot(scale=jnp.float32(2.0)), "bias": Alibi.geometric(4)}
    module = MultiHeadAttention(D, 4, **options, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.split(module)[1])
    assert [leaf for leaf in leaves if leaf.shape == ()] == [2.0]
    assert sum(np.array_equal(leaf, Alibi.geometric(4).slopes) for leaf in leaves) == 1
