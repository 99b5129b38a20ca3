"""Small decoders for the tests of `jaxattn.models`, with weights that make every part of them matter."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import Alibi, Causal, Sigmoid, Sinks, Window, nn
from jaxattn.models import Spec, Transformer, TransformerConfig, hymba, pre_norm
from jaxattn.nn import NullSoftmax

VOCABULARY, CONTEXT, WIDTH, HEADS = 11, 12, 16, 4
EPS = float(np.finfo(np.float32).eps)

ATTENTION, FEED = Spec(nn.MultiHeadAttention, heads=HEADS), Spec(nn.FeedForward, hidden=16)
PLAIN = pre_norm(ATTENTION, FEED)
STREAMING = pre_norm(
    Spec(
        nn.MultiHeadAttention,
        heads=HEADS,
        key_heads=2,
        head_dim=6,
        mask=Causal() & (Window(3) | Sinks(1)),
        normalize=Spec(NullSoftmax),
        qk_norm=Spec(nn.RMSNorm),
        gate=True,
        dropout=0.5,
    ),
    FEED,
)
SIGMOID = pre_norm(
    Spec(nn.MultiHeadAttention, heads=HEADS, position=None, bias=Spec(Alibi.geometric), normalize=Sigmoid()),
    Spec(nn.FeedForward, hidden=16, activation="gelu_tanh", gated=False),
)
MIXED = (PLAIN, PLAIN, STREAMING, SIGMOID)
HYMBA = tuple(hymba(7, 2, window=3, meta_tokens=2)[:3])  # a layer of each kind: far, near, and of shared keys
FACTOR = 20 * len(MIXED)  # epsilons: a handful of roundings in each of four steps of each layer


def decoder(layers=MIXED, seed=0, **options) -> Transformer:
    """A decoder in evaluation mode whose every parameter got noise: no gain or null logit is left at 0 or 1."""
    config = TransformerConfig(VOCABULARY, CONTEXT, WIDTH, layers, **options)
    model = Transformer(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def noisy(leaf):
        return jnp.asarray(np.asarray(leaf) + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32))

    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    model.eval()
    return model


@cache
def shared(layers=MIXED) -> Transformer:
    """The same decoder for every test that does not change it."""
    return decoder(layers)


def tokens(batch=3, length=CONTEXT, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


@partial(nnx.jit, static_argnames="record")
def run(model, tokens, record=(), **options):
    """(logits, state, records), compiled."""
    return model(tokens, record=record, **options)


def assert_close(actual, expected, factor=FACTOR):
    """|actual − expected| ≤ factor · ε · max |expected|, normwise."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = abs(actual - expected).max() / (factor * EPS * abs(expected).max())
    assert error <= 1, f"largest error is {error:.3g} times the tolerance"  # also fails for NaN
