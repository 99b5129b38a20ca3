"""The eps of every norm can be said: in a spec for those of a mixer, in the config for those around it."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxattn import MLPMemory, models, nn

NORMS = (nnx.RMSNorm, nnx.LayerNorm)
STILL = models.NeuralMemory(heads=2, hidden=(), inner_batch=4, convolution=0, eps=0.5)
SPECS = [
    models.Attention(heads=2, qk_norm=True),
    models.LinearAttention(heads=2, normalize=False),
    models.RetNet(heads=2),
    models.GLA(heads=2),
    models.HGRN2(heads=2),
    models.DeltaNet(heads=2, decay="channel"),
    models.Mamba2(heads=2, state=3),
    models.RWKV7(heads=2),
    models.NeuralMemory(heads=2, hidden=()),
    models.TTT(heads=2),
    models.S6(norm=True),
    models.Hymba(heads=2, state=3),
    models.Titans("gate", heads=2, memory=STILL),
    models.Titans("context", heads=2, memory=STILL),
]


def norms(module):
    return [each for _, each in nnx.iter_graph(module) if isinstance(each, NORMS)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_the_eps_of_a_spec_is_that_of_all_norms_of_the_mixer(spec):
    made = norms(dataclasses.replace(spec, eps=0.5).build(8, jnp.float32, nnx.Rngs(0)))
    assert made
    assert {norm.epsilon for norm in made} == {0.5}


def test_the_eps_of_a_config_is_that_of_the_norms_around_the_mixers():
    layer = models.Layer(models.Attention(heads=2, qk_norm=True, eps=0.25))
    config = models.DecoderConfig(vocabulary=5, width=8, layers=[layer], eps=0.5)
    folded = models.FoldedDecoder(config, segment=2, rngs=nnx.Rngs(0))
    for decoder in (models.Decoder(config, rngs=nnx.Rngs(0)), folded):
        said = sorted(norm.epsilon for norm in norms(decoder))
        assert said[:3] == [0.25, 0.25, 0.5]
        assert set(said[2:]) == {0.5}
    assert models.from_plain(models.to_plain(config)) == config


def test_the_eps_of_the_norm_inside_a_memory_is_part_of_it():
    weights = (jnp.ones((1, 2, 2)),)
    x = jnp.array([[[1.0, 3.0]]])
    memory = MLPMemory(weights, normalize=True, eps=3.0)
    y = memory(lambda _, x: x, x)
    assert y.tolist() == [[[-0.5, 0.5]]]  # (1 − 2) / √(1 + 3)
    with pytest.raises(ValueError, match=r"MLPMemory: eps must be positive, got 0\.0"):
        MLPMemory(weights, normalize=True, eps=0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.DecoderConfig(eps=0.0),
        lambda: nn.MultiHeadAttention(8, 2, qk_norm=True, eps=-1.0, rngs=nnx.Rngs(0)),
        lambda: nn.RWKV7(8, 2, eps=0.0, rngs=nnx.Rngs(0)),
    ],
)
def test_an_eps_of_nothing_is_refused(make):
    with pytest.raises(ValueError, match="eps must be positive, got"):
        make()
