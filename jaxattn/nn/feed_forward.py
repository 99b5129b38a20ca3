"""The position-wise feed-forward block."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.nn.parameter import linear_map
from jaxattn.nn.tap import Tap

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

    def __call__(self, x: Float[Array, "*b d"], tap: Tap | None = None) -> Float[Array, "*b d"]:
        """The sites of `tap` are `mlp_pre`, what the nonlinearity gets, and `mlp_post`, what W₂ gets."""
        tap = Tap() if tap is None else tap
        before = tap("mlp_pre", self.up(x) if self.gate is None else self.gate(x))
        hidden = jax.nn.gelu(before) if self.gate is None else jax.nn.silu(before) * self.up(x)
        return self.down(tap("mlp_post", jnp.asarray(hidden)))
