"""Small models whose every part matters, for the tests of `jaxattn.trace`: in float64, where only rounding is left."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import nn
from jaxattn.models import Branch, Layer, Spec, Transformer, TransformerConfig, pre_norm

V, L, N, K, D, T, B = 11, 3, 4, 2, 24, 7, 2
ATTENTION = Spec(nn.MultiHeadAttention, heads=N, key_heads=K, head_dim=10, use_bias=True)
FEED = Spec(nn.FeedForward, hidden=18)
LAYERNORM = Spec(nn.LayerNorm)
KINDS = {
    "sequential": pre_norm(ATTENTION, FEED),
    "attention only": Layer([Branch(ATTENTION, Spec(nn.RMSNorm))]),
    "parallel": Layer([Branch(ATTENTION, LAYERNORM), Branch(FEED, LAYERNORM)], parallel=True),
    "sandwich": Layer([Branch(each, Spec(nn.RMSNorm), norm_after=Spec(nn.RMSNorm)) for each in (ATTENTION, FEED)]),
}


@cache
def model(kind="sequential"):
    """A decoder of three equal layers in float64; every parameter got noise."""
    with jax.enable_x64(True):
        config = TransformerConfig(V, T, D, [KINDS[kind]] * L, dtype="float64")
        made = Transformer(config, rngs=nnx.Rngs(0))
        rng = np.random.default_rng(0)

        def noisy(x):
            return jnp.asarray(np.asarray(x, np.float64) + 0.3 * rng.standard_normal(x.shape))

        nnx.update(made, jax.tree.map(noisy, nnx.state(made, nnx.Param)))
        made.eval()
        return made


def prompts(seed=0):
    """A pair of batches of tokens which differ in some places."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, V, (B, T))
    source = np.where(rng.random((B, T)) < 0.5, rng.integers(0, V, (B, T)), base)
    return jnp.asarray(base), jnp.asarray(source)


def last(logits):
    """The mean over examples of a difference of two logits at the last token."""
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()
