"""Gates of residual branches: how much of what a branch found is added to the stream."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.nn.feed_forward import FeedForward
from jaxattn.nn.parameter import linear_map


class AdapterGate(nnx.Module):
    """g ⊙ a,  a = y + W₂ gelu(W₁ y),  g = σ(W_g [x; a] + b): an adapter of a result, and a gate (LLM Modules, 2025).

    x is what the branch reads, and y its result. W₂ starts at 0, so that a starts as y, and W_g at 0, so that g starts
    at σ(start): near 0, and a branch that is put into a trained model changes little at first. With b = −∞ the branch
    adds exactly nothing.

    Args:
        features: D, the channels of x and y.
        hidden: The hidden units of the adapter; by default D / 2, at least 1.
        start: The start of b.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `hidden` is below 1.
    """

    def __init__(
        self, features: int, hidden: int | None = None, *, start: float = -4.0, dtype: Any = None, rngs: nnx.Rngs
    ):
        hidden = max(features // 2, 1) if hidden is None else hidden
        self.adapter = FeedForward(features, hidden, activation="gelu", gated=False, dtype=dtype, rngs=rngs)
        self.adapter.down.kernel[...] = jnp.zeros_like(self.adapter.down.kernel[...])
        zeros = nnx.initializers.zeros_init()
        gate: Any = linear_map(2 * features, features, dtype, rngs, (None, "width"), use_bias=True, start=zeros)
        gate.bias[...] = jnp.full_like(gate.bias[...], start)
        self.gate = gate

    def __call__(self, x: Float[Array, "*b d"], y: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        adapted = y + self.adapter(y)
        return nnx.sigmoid(self.gate(jnp.concatenate([x, adapted], -1))) * adapted
