"""A part is a pytree that is a pure function: arrays are leaves, everything else chooses what is compiled."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IMPLEMENTATIONS, assert_close
from jaxtyping import Array, Float

from jaxattn import (
    Alibi,
    Bias,
    BlockIndex,
    Blocks,
    Causal,
    Chunked,
    Documents,
    Dot,
    Explicit,
    Lengths,
    Llama3,
    PerHead,
    Prefix,
    Score,
    ScoreBias,
    Sigmoid,
    Sinks,
    Softmax,
    Tile,
    Window,
    Yarn,
    attend,
    part,
)
from jaxattn.core.attend import NTK, Ancestors, Dilated, Graph, LearnedPositions, LongRope
from jaxattn.core.attend.position import rotary
from jaxattn.core.checks import check_positive
from jaxattn.core.linear.feature import ReluFeatures


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@part
class Everything:
    """One field of every kind."""

    array: Float[Array, ""]
    optional: Float[Array, " n"] | None
    number: float | None
    either: Float[Array, ""] | float
    inner: Dot
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    flag: bool = False


def test_array_fields_and_parts_are_leaves_and_plain_fields_are_static():
    whole = Everything(jnp.float32(1), None, 2.0, 3.0, Dot(4.0), ("x",), "b", True)
    assert [float(x) for x in jax.tree.leaves(whole)] == [1, 3, 4]
    doubled = jax.tree.map(lambda x: 2 * x, whole)
    assert (doubled.number, doubled.names, doubled.kind, doubled.flag) == (2.0, ("x",), "b", True)
    assert (doubled.array, doubled.either, doubled.inner.scale) == (2, 6, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.flag = False


@pytest.mark.parametrize(
    ("value", "leaves"),
    [
        (Dot(), 0),
        (Dot(0.5), 1),
        (Softmax(), 0),
        (Softmax(normal(4)), 1),
        (Sigmoid(), 0),
        (Alibi.geometric(4), 1),
        (Bias(normal(1, 3, 3)), 1),
        (Causal(), 0),
        (Window(4, 1), 0),
        (Sinks(2), 0),
        (Documents(np.arange(3)), 1),
        (Documents(np.arange(3), np.arange(4)), 2),
        (Lengths(np.arange(3)), 1),
        (Explicit(np.ones((1, 2, 2), bool)), 1),
        (Causal() & (Window(2) | ~Lengths(np.arange(3))), 1),
        (Prefix(np.arange(3)), 1),
        (Dilated(2), 0),
        (Chunked(2), 0),
        (Graph(np.zeros((1, 3, 2), int)), 1),
        (Ancestors(np.arange(3) - 1), 1),
        (Blocks(BlockIndex(np.ones((1, 2, 2), bool), (4, 4))), 1),
        (PerHead((Causal(), Lengths(np.arange(3)), ~Documents(np.arange(3)))), 2),
        (NTK(2.0), 0),
        (Yarn(2.0, 64), 0),
        (Llama3(2.0, 64), 0),
        (LongRope((1.0, 2.0), 2.0, 64), 0),
        (LearnedPositions(normal(3, 2)), 1),
    ],
    ids=str,
)
def test_the_leaves_of_the_parts_there_are(value, leaves):
    flat, structure = jax.tree.flatten(value)
    assert len(flat) == leaves
    assert jax.tree.structure(jax.tree.unflatten(structure, flat)) == structure
    hash(structure)


def test_structures_are_equal_when_static_fields_are():
    def structure(x):
        return jax.tree.structure(x)

    assert structure(Window(3) & Documents(np.zeros(3))) == structure(Window(3) & Documents(np.ones(5)))
    assert structure(Window(3)) != structure(Window(4))
    assert structure(Documents(np.zeros(3))) != structure(Documents(np.zeros(3), np.zeros(3)))
    assert structure(Softmax()) != structure(Softmax(np.zeros(4)))


def test_parts_of_different_classes_have_different_structures():
    """jax.tree_util.register_dataclass compares fields and not classes, and jit then takes one part for another."""
    alike = (
        Causal() & Sinks(1),
        Causal() | Sinks(1),
        ~Causal(),
        Softmax(),
        Dot(),
        Causal(),
        Sigmoid(),
        Lengths(0),
        Dot(0),
    )
    structures = [jax.tree.structure(x) for x in alike]
    assert [i for i, x in enumerate(structures) for j, y in enumerate(structures) if i < j and x == y] == []


def test_jit_compiles_anew_for_static_fields_and_not_for_arrays():
    x, compiled = normal(6, 2, 4), []

    @jax.jit
    def call(x, bias, mask):
        compiled.append(mask)
        return attend(x, x, x, bias=bias, mask=mask)

    ids = np.array([0, 0, 0, 1, 1, 1])
    outs = [call(x, Alibi(slopes), Window(3) & Documents(ids)) for slopes in (normal(2, seed=1), normal(2, seed=2))]
    outs.append(call(x, Alibi(normal(2, seed=1)), Window(3) & Documents(ids[::-1] // 2)))
    assert len(compiled) == 1
    assert all((outs[0] != other).any() for other in outs[1:])
    call(x, Alibi(normal(2)), Window(2) & Documents(ids))
    assert len(compiled) == 2


@part
class Additive(Score):
    """score = w · tanh(W q + U k)  (Bahdanau et al., 2015), as a user would write it."""

    query_weights: Float[Array, "h d"]
    key_weights: Float[Array, "h d"]
    read: Float[Array, " d"]

    def __call__(self, query, key, tile):
        key = jnp.repeat(key, query.shape[-3] // key.shape[-3], -3)
        mixed = (query @ self.query_weights)[..., :, None, :] + (key @ self.key_weights)[..., None, :, :]
        return jnp.tanh(mixed) @ self.read


@part
class Recency(ScoreBias):
    """bias = rate · (key position) inside an optional period, as a user would write it."""

    rate: Float[Array, " n"]
    period: int = 5

    def __call__(self, tile):
        return self.rate[:, None, None] * (tile.key % self.period)


def test_scores_and_biases_of_users_work_and_learn_in_every_implementation():
    query, key, value = normal(2, 7, 4, 3, seed=1), normal(2, 9, 2, 3, seed=2), normal(2, 9, 1, 4, seed=3)
    parts = Additive(normal(3, 5, seed=4), normal(3, 5, seed=5), normal(5, seed=6)), Recency(normal(4, seed=7))

    @jax.jit
    def both(*arguments):
        def loss(implementation, query, key, value, score, bias):
            options = {"score": score, "bias": bias, "mask": Causal(), "return_lse": True, "block": (3, 4)}
            out, extras = attend(query, key, value, implementation=implementation, **options)
            return (out**2).sum() + jnp.sin(extras["lse"]).sum()

        return tuple(jax.value_and_grad(loss, argnums=range(1, 6))(each, *arguments) for each in IMPLEMENTATIONS)

    dense, *others = both(query, key, value, *parts)
    assert all(np.any(x) for x in jax.tree.leaves(dense))
    for other in others:
        for x, y in zip(*map(jax.tree.leaves, (other, dense)), strict=True):
            # Sums of at most B·N·T·S terms of both signs: √ of that, times the largest.
            assert_close(x, y, np.sqrt(2 * 4 * 7 * 9) * np.abs(y).max())


def test_alibi_slopes_are_the_papers():
    """Press et al., 2022: 1/2, 1/4, .. for 8 heads; 12 heads take the 8 and every other one of the 16 between them."""
    np.testing.assert_array_equal(Alibi.geometric(8).slopes, 2.0 ** -np.arange(1, 9))
    np.testing.assert_array_equal(Alibi.geometric(4).slopes, 2.0 ** -np.arange(2, 9, 2))
    np.testing.assert_array_equal(Alibi.geometric(1).slopes, [2.0**-8])
    expected = [*2.0 ** -np.arange(1, 9), *2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])]
    assert_close(Alibi.geometric(12).slopes, expected, 1, factor=1)


def test_biases_by_hand():
    query, key = np.array([0, 3]).reshape(1, 2, 1), np.array([1, 2, 5]).reshape(1, 1, 3)
    alibi = Alibi(jnp.array([1.0, 0.5]))(Tile(query, key))
    np.testing.assert_array_equal(alibi, [[[-1, -2, -5], [-2, -1, -2]], [[-0.5, -1, -2.5], [-1, -0.5, -1]]])
    table = Bias(jnp.arange(12.0).reshape(1, 4, 3))(Tile(query, key))  # column 5 is outside
    np.testing.assert_array_equal(table, [[[1, 2, 0], [10, 11, 0]]])
    np.testing.assert_array_equal(Bias(jnp.ones((1, 4, 3)))(Tile(query - 1, key))[0, 0], [0, 0, 0])


def test_attention_by_hand():
    """Scores 0 and log 3 under a scale of 1: weights 1/4 and 3/4, lse log 4."""
    query, key = np.array([[[1.0]]], np.float32), np.array([[[0.0]], [[np.log(3)]]], np.float32)
    value = np.array([[[4.0]], [[8.0]]], np.float32)
    for implementation in IMPLEMENTATIONS:
        out, extras = attend(query, key, value, return_lse=True, implementation=implementation)
        assert_close(out, [[[7]]], 8, factor=2)
        assert_close(extras["lse"], [[np.log(4)]], np.log(4), factor=2)
        out, extras = attend(query, key, value, normalize=Sigmoid(), return_lse=True, implementation=implementation)
        assert_close(out, [[[4 / 2 + 8 * 3 / 4]]], 8, factor=2)
        assert_close(extras["lse"], [[np.log(5 / 4)]], 1, factor=2)
        out, extras = attend(
            query, key, value, normalize=Softmax(np.log([4.0])), return_lse=True, implementation=implementation
        )
        assert_close(out, [[[7 / 2]]], 8, factor=2)
        assert_close(extras["lse"], [[np.log(8)]], np.log(8), factor=2)


def test_numbers_of_numpy_are_taken_wherever_those_of_python_are():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    blocks = [attend(x, x, x, implementation="tiled", block=block) for block in (2, np.int64(2), (np.int32(2), 2))]
    np.testing.assert_array_equal(blocks[0], blocks[1])
    np.testing.assert_array_equal(blocks[0], blocks[2])
    assert Window(np.int64(3)).describe() == Window(3).describe()
    assert Prefix(np.int64(3)).describe() == Prefix(3).describe()
    assert ReluFeatures(np.float32(0.5)).offset == 0.5
    np.testing.assert_array_equal(rotary(x, jnp.arange(6), np.float32(100)), rotary(x, jnp.arange(6), 100.0))
    with pytest.raises(TypeError, match="block must be an int or a tuple of two"):
        attend(x, x, x, implementation="tiled", block=True)
    with pytest.raises(TypeError, match="left must be an int, got True"):
        Window(True)


def test_numbers_of_numpy_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"Temperature: temperature must be positive, got -1\.0"):
        check_positive("Temperature", "temperature", np.float32(-1))
    with pytest.raises(ValueError, match=r"base must be positive, got -1\.0"):
        rotary(jnp.ones((1, 2, 1, 4)), jnp.arange(2), np.float32(-1))
