"""The position-wise feed-forward block."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.nn.parameter import linear_map

Kind = Literal["gelu", "swiglu"]


class FeedForward(nnx.Module):
    """gelu: W₂ gelu(W₁ x);  swiglu: W₂ (silu(W_g x) ⊙ W₁ x)  (Shazeer, 2020). x [..., D] -> [..., D].

    Raises ValueError for another kind and for a hidden width below 1.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        kind: Kind = "swiglu",
        use_bias: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if kind not in get_args(Kind):
            raise ValueError(f"kind {kind!r} is unknown: need one of {get_args(Kind)}")
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return linear_map(inputs, outputs, dtype, rngs, use_bias=use_bias)

        self.up = linear(features, hidden)
        self.gate = linear(features, hidden) if kind == "swiglu" else None
        self.down = linear(hidden, features)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        hidden = jax.nn.gelu(self.up(x)) if self.gate is None else jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(jnp.asarray(hidden))
