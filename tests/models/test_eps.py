"""The eps of every norm can be said, in the spec of the mixer or of the norm."""

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxattn import models, nn
from jaxattn.core.memory import MLPMemory

NORMS = (nn.RMSNorm, nn.LayerNorm)
STILL = models.Spec(nn.NeuralMemory, heads=2, hidden=(), inner_batch=4, convolution=0, eps=0.5)
SPECS = [
    models.Spec(nn.LinearAttention, heads=2, normalize=False),
    models.Spec(nn.RetNet, heads=2),
    models.Spec(nn.GLA, heads=2),
    models.Spec(nn.HGRN2, heads=2),
    models.Spec(nn.DeltaNet, heads=2, decay="channel"),
    models.Spec(nn.Mamba2, heads=2, state=3),
    models.Spec(nn.RWKV7, heads=2),
    models.Spec(nn.NeuralMemory, heads=2, hidden=()),
    models.Spec(nn.TTT, heads=2),
    models.Spec(nn.S6, norm=True),
    models.Spec(nn.hymba_heads, heads=2, state=3),
    models.Spec(nn.memory_as_gate, heads=2, memory=STILL, window=32, persistent=4),
    models.Spec(nn.MemoryAsContext, heads=2, memory=STILL, segment=32, persistent=4),
]


def norms(module):
    return [each for _, each in nnx.iter_graph(module) if isinstance(each, NORMS)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.target.__name__)
def test_the_eps_of_a_spec_is_that_of_all_norms_of_the_mixer(spec):
    made = norms(nn.as_mixer(spec.replace(eps=0.5), features=8, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert made
    assert {norm.eps for norm in made} == {0.5}


def test_every_norm_of_a_model_has_the_eps_of_its_spec():
    attention = models.Spec(nn.MultiHeadAttention, heads=2, qk_norm=models.Spec(nn.RMSNorm, eps=0.25))
    around = models.Spec(nn.RMSNorm, eps=0.5)
    config = models.TransformerConfig(
        vocabulary=5, width=8, layers=[models.pre_norm(attention, norm=around)], norm=around
    )
    said = sorted(norm.eps for norm in norms(models.Transformer(config, rngs=nnx.Rngs(0))))
    assert said == [0.25, 0.25, 0.5, 0.5, 0.5]
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
        lambda: nn.LayerNorm(8, eps=0.0),
        lambda: nn.MultiHeadAttention(8, 2, qk_norm=models.Spec(nn.RMSNorm, eps=-1.0), rngs=nnx.Rngs(0)),
        lambda: nn.RWKV7(8, 2, eps=0.0, rngs=nnx.Rngs(0)),
    ],
)
def test_an_eps_of_nothing_is_refused(make):
    with pytest.raises(ValueError, match="eps must be positive, got"):
        make()
