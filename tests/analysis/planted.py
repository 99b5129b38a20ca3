"""A decoder whose heads were written by hand, one of each kind, and a decoder of random weights."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import nn
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm

V, T = 16, 34  # tokens, and positions
TOKEN, PLACE, BEFORE = slice(0, V), slice(V, V + T), slice(V + T, 2 * V + T)
D, H, N = 2 * V + T, V + T, 4
SHARP = 40.0
KINDS = [["previous token", "duplicate token", "sink", "current token"], ["induction", "", "", ""]]


def maps() -> dict[str, np.ndarray]:
    """The maps of two layers of four heads, [L, D, N, H], and of the output [L, N, H, D].

    The stream has three parts: which token it is, where it stands, and, from layer 0 on, which token stood before.
    """
    q, k, v, o = np.zeros((4, 2, N, D, H))
    eye_v, eye_t = np.eye(V), np.eye(T)
    q[0, 0, PLACE, :T], k[0, 0, PLACE, :T] = np.eye(T, k=-1), eye_t  # position i asks for i - 1
    v[0, 0, TOKEN, :V] = eye_v
    o[0, 0, BEFORE, :V] = eye_v.T
    q[0, 1, TOKEN, :V], k[0, 1, TOKEN, :V] = eye_v, eye_v  # the same token
    q[0, 1, PLACE, V:], k[0, 1, PLACE, V:] = -2 * eye_t, eye_t  # but not this one
    q[0, 2, PLACE, 0], k[0, 2, PLACE.start, 0] = 1, 1  # all ask for position 0
    q[0, 3, PLACE, :T], k[0, 3, PLACE, :T] = eye_t, eye_t
    q[1, 0, TOKEN, :V], k[1, 0, BEFORE, :V] = eye_v, eye_v
    v[1, 0, TOKEN, :V] = eye_v
    o[1, 0, TOKEN, :V] = 10 * eye_v
    q *= SHARP * H**0.5
    return {"query": q, "key": k, "value": v, "out": o.swapaxes(-1, -2)}


def config(**options) -> TransformerConfig:
    attention = Spec(nn.MultiHeadAttention, heads=N, head_dim=H, position=None)
    return TransformerConfig(
        V, T, D, [pre_norm(attention, None, None)] * 2, positions=Spec(nn.PositionEmbedding), norm=None, **options
    )


def planted() -> Transformer:
    """A decoder that reads what followed the token at hand before, by the circuit of two layers."""
    model = Transformer(config(), rngs=nnx.Rngs(0))
    module = model.runs[0].branches[0].module
    for name, array in maps().items():
        kernel = getattr(module, name).kernel
        array = array.reshape(2, N * H, D) if name == "out" else array.swapaxes(1, 2).reshape(2, D, N * H)
        assert kernel[...].shape == array.shape
        kernel[...] = jnp.asarray(array, jnp.float32)
    model.embed.table[...] = jnp.eye(V, D)
    model.positions.table[...] = jnp.eye(T, D, V)
    model.eval()
    return model


def random(layers=4, heads=8, seed=0, vocabulary=64) -> Transformer:
    """A decoder that has learned nothing, with weights of some size."""
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=heads, key_heads=heads // 2), Spec(nn.FeedForward, hidden=32))
    model = Transformer(TransformerConfig(vocabulary, 80, 32, [layer] * layers), rngs=nnx.Rngs(seed))
    noisy = lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed + x.size), x.shape)  # noqa: E731
    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    model.eval()
    return model
