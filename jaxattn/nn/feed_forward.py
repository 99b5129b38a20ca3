"""The position-wise feed-forward block."""

from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.nn.parameter import linear_map
from jaxattn.nn.sharding import on_any_mesh
from jaxattn.nn.tap import Tap

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]


class FeedForward(nnx.Module):
    """W₂ (f(W_g x) ⊙ W₁ x) if gated (Shazeer, 2020), else W₂ f(W₁ x).

    Args:
        features: D, the channels of x and of the result.
        hidden: F, the hidden units. The default is 4 D, and for gated ones 8/3 D, rounded up to a multiple of 16, so
            that both have about as many parameters.
        activation: f. "gelu" is x Φ(x), and "gelu_tanh" its approximation by tanh, as in GPT-2; "relu_squared" is
            max(x, 0)² (So et al., 2021).
        gated: Whether there is W_g.
        use_bias: Whether the maps have biases.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `activation` is unknown, or `hidden` is below 1.
    """

    sites: ClassVar[tuple[str, ...]] = ("mlp_pre", "mlp_post")

    def __init__(
        self,
        features: int,
        hidden: int | None = None,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        use_bias: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if activation not in get_args(Activation):
            raise ValueError(f"activation is {activation!r}: need one of {', '.join(get_args(Activation))}")
        if hidden is None:
            hidden = -(-8 * features // 48) * 16 if gated else 4 * features
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")

        def linear(inputs: int, outputs: int, *axes: str) -> nnx.Linear:
            return linear_map(inputs, outputs, dtype, rngs, axes, use_bias=use_bias)

        self.activation: Activation = activation
        self.up = linear(features, hidden, "width", "hidden")
        self.gate = linear(features, hidden, "width", "hidden") if gated else None
        self.down = linear(hidden, features, "hidden", "width")

    @on_any_mesh
    def __call__(self, x: Float[Array, "*b d"], tap: Tap | None = None) -> Float[Array, "*b d"]:
        """Returns the result for x [..., D].

        Args:
            x: [..., D].
            tap: Edits and records at two sites: `mlp_pre`, the input of f, and `mlp_post`, the input of W₂.
        """
        tap = Tap() if tap is None else tap
        before = tap("mlp_pre", self.up(x) if self.gate is None else self.gate(x))
        hidden = activated(before, self.activation)
        return self.down(tap("mlp_post", hidden if self.gate is None else hidden * self.up(x)))


def activated(x: Float[Array, "*b d"], activation: Activation) -> Float[Array, "*b d"]:
    """Returns the nonlinearity of that name, of x."""
    if activation == "silu":
        return jax.nn.silu(x)
    if activation == "relu":
        return jax.nn.relu(x)
    if activation == "relu_squared":
        return jnp.square(jax.nn.relu(x))
    return jnp.asarray(jax.nn.gelu(x, approximate=activation == "gelu_tanh"))
