"""Owners of learned parts: each is `attend` with the same arrays, starts as it says, and trains in a module."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixers import call
from multi_head import assert_close, randomise

from jaxattn import Causal, Dot, RelativeBias, Softmax, Temperature, Tile, attend
from jaxattn.core.attend import Additive, Bilinear, Convolution, MixHeads, Neural
from jaxattn.nn import (
    AdditiveScore,
    BilinearScore,
    HeadMixing,
    KeyQueryConvolution,
    LearnedTemperature,
    MultiHeadAttention,
    NeuralScore,
    NullSoftmax,
    RelativePositionBias,
)

D, T, B, N, H = 16, 7, 2, 4, 4
# name: (slot, owner, the part from the owner's arrays in their order in the class)
OWNERS = {
    "bilinear": ("score", lambda rngs: BilinearScore(H), lambda o: Bilinear(o.weight[...])),
    "bilinear by head": ("score", lambda rngs: BilinearScore(H, N), lambda o: Bilinear(o.weight[...])),
    "additive": (
        "score",
        lambda rngs: AdditiveScore(H, 6, rngs=rngs),
        lambda o: Additive(o.pair_weight[...][:H], o.pair_weight[...][H:], o.vector[...]),
    ),
    "neural": (
        "score",
        lambda rngs: NeuralScore(H, 6, rngs=rngs),
        lambda o: Neural(o.w1[...], o.b1[...], o.w2[...]),
    ),
    "neural, two hidden layers": (
        "score",
        lambda rngs: NeuralScore(H, 6, 3, rngs=rngs),
        lambda o: Neural(o.w1[...], o.b1[...], o.w2[...], o.b2[...], o.w3[...]),
    ),
    "relative bias": (
        "bias",
        lambda rngs: RelativePositionBias(N, 4, 5),
        lambda o: RelativeBias(o.table[...], max_distance=5),
    ),
    "temperature": (
        "score_maps",
        lambda rngs: LearnedTemperature(N),
        lambda o: Temperature(jnp.exp(o.log_temperature[...])),
    ),
    "talking heads, scores": ("score_maps", lambda rngs: HeadMixing(N), lambda o: MixHeads(o.weight[...])),
    "talking heads, weights": ("weight_maps", lambda rngs: HeadMixing(N), lambda o: MixHeads(o.weight[...])),
    "convolution of scores": (
        "score_maps",
        lambda rngs: KeyQueryConvolution(N, 2, 3),
        lambda o: Convolution(o.kernel[...]),
    ),
    "convolution of weights": (
        "weight_maps",
        lambda rngs: KeyQueryConvolution(N, 2, 3),
        lambda o: Convolution(o.kernel[...]),
    ),
    "null logit": ("normalize", lambda rngs: NullSoftmax(N), lambda o: Softmax(o.null_logit[...])),
}


@partial(nnx.jit, static_argnames="record")
def run(module, x, record=()):
    return call(module, x, record=record)


def inputs(seed=5):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, D)), jnp.float32)


def build(name, seed=0):
    slot, owner, _ = OWNERS[name]
    rngs = nnx.Rngs(seed)
    owner = owner(rngs)
    given = {slot: (owner,) if slot.endswith("maps") else owner}
    return MultiHeadAttention(D, N, position=None, mask=Causal(), **given, rngs=rngs), owner


@pytest.mark.parametrize("name", OWNERS)
def test_it_is_attend_with_the_same_arrays(name):
    slot, _, make = OWNERS[name]
    module, owner = build(name)
    randomise(module)
    _, _, seen = run(module, inputs(), record=("q", "k", "v", "z"))
    part = make(owner)
    given = {slot: (part,) if slot.endswith("maps") else part}
    assert_close(seen["z"], attend(seen["q"], seen["k"], seen["v"], mask=Causal(), **given))
    plain = attend(seen["q"], seen["k"], seen["v"], mask=Causal())
    assert np.abs(np.asarray(seen["z"] - plain)).max() > 1e-2


@pytest.mark.parametrize("name", OWNERS)
def test_every_parameter_is_trained_through_a_module(name):
    module, _ = build(name)
    randomise(module)
    gradient = nnx.jit(nnx.grad(lambda module, x: (module(x)[0] ** 2).sum()))(module, inputs())
    assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradient))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    of = jax.jit(jax.grad(lambda params, x: (nnx.merge(graph, params, rest)(x)[0] ** 2).sum()))
    jax.tree.map(assert_close, nnx.to_pure_dict(of(params, inputs())), nnx.to_pure_dict(gradient))


PLAIN = ["bilinear", "bilinear by head", "relative bias", "temperature", *(name for name in OWNERS if " of " in name)]
PLAIN += [name for name in OWNERS if "talking" in name]


@pytest.mark.parametrize("name", PLAIN)
def test_it_starts_as_ordinary_attention(name):
    _, _, seen = run(build(name)[0], inputs(), record=("q", "k", "v", "z"))
    assert_close(seen["z"], attend(seen["q"], seen["k"], seen["v"], mask=Causal()))


@pytest.mark.parametrize(
    ("kind", "sizes"), [(AdditiveScore, (H, 64)), (NeuralScore, (H, 64)), (NeuralScore, (H, 64, 32))], ids=str
)
def test_learned_scores_start_about_as_far_apart_as_dot_products(kind, sizes):
    """For queries and keys of unit variance a dot product has standard deviation 1 along a row."""
    owner = kind(*sizes, rngs=nnx.Rngs(0))()
    query, key = (jax.random.normal(k, (1, 200, H)) for k in jax.random.split(jax.random.key(1)))
    tile = Tile(*(jnp.arange(200)[axis] for axis in (np.s_[None, :, None], np.s_[None, None])))
    spreads = [np.asarray(score(query, key, tile)).std(-1).mean() for score in (owner, Dot())]
    assert 1 / 4 < spreads[0] / spreads[1] < 2


def test_a_null_logit_starts_as_softmax_off_by_one():
    _, _, seen = run(build("null logit")[0], inputs(), record=("q", "k", "v", "z"))
    plain, extras = attend(seen["q"], seen["k"], seen["v"], mask=Causal(), return_lse=True)
    assert_close(seen["z"], plain * jax.nn.sigmoid(extras["lse"])[..., None])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda rngs: BilinearScore(H, 0), "BilinearScore: heads must be at least 1, got 0"),
        (lambda rngs: AdditiveScore(0, 6, rngs=rngs), "AdditiveScore: head_dim must be at least 1, got 0"),
        (lambda rngs: NeuralScore(H, 6, 0, rngs=rngs), "NeuralScore: second must be at least 1, got 0"),
        (lambda rngs: RelativePositionBias(N, -2), "RelativePositionBias: buckets must be at least 1, got -2"),
        (lambda rngs: LearnedTemperature(0), "LearnedTemperature: heads must be at least 1, got 0"),
        (lambda rngs: HeadMixing(0), "HeadMixing: heads must be at least 1, got 0"),
        (lambda rngs: KeyQueryConvolution(N, 0, 3), "KeyQueryConvolution: queries must be at least 1, got 0"),
        (lambda rngs: KeyQueryConvolution(N, 2, 4), "KeyQueryConvolution: keys is 4: need an odd number"),
        (lambda rngs: NullSoftmax(0), "NullSoftmax: heads must be at least 1, got 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))
