"""Attention by the rules of sharding, around the devices of an axis `context` of a mesh that has other axes too."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jaxattn import Causal, RelativeBias, attend
from jaxattn.core.attend.slots import Slots
from jaxattn.nn.parameter import linear_map
from jaxattn.nn.sharding import attend_in_shards, sharding_rules

B, T, N, K, H = 2, 16, 4, 2, 4


def test_relative_biases_go_around_a_mesh_of_several_axes():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, T, heads, H)) for heads in (N, K, K))
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    table = rng.normal(size=(N, 6))

    def slots(table):
        one_way, both_ways = RelativeBias(table, 8), RelativeBias(table, 6, bidirectional=True)
        return Slots(mask=Causal(), bias=one_way + both_ways)

    def slope(call):
        return jax.jit(jax.grad(lambda table: (call(query, key, value, slots(table)) ** 2).sum()))(table)

    with jax.enable_x64():
        expected = slope(lambda *arrays: attend(*arrays[:3], **vars(arrays[3])))
        with jax.set_mesh(mesh), sharding_rules():
            found = slope(attend_in_shards)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_a_map_is_spread_as_it_is_told():
    """`nnx.Linear` takes out_sharding, and so do the maps of this package, which are its subclass."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Explicit,))
    made = linear_map(4, 6, None, nnx.Rngs(0), ("width", "hidden"))
    x = jnp.ones((2, 3, 4))
    with jax.set_mesh(mesh):
        told = jax.jit(lambda x: made(x, out_sharding=PartitionSpec(None, None, "tensor")))(x)
    assert told.sharding.spec == PartitionSpec(None, None, "tensor")
    np.testing.assert_allclose(told, made(x), rtol=1e-6)
