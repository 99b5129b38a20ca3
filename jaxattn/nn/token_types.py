"""Types of tokens that a layer of attention learns, and by which its store keeps them (Neural Attention Search)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.expiry import (
    GLOBAL,
    WINDOW,
    Expires,
    GatedSoftmax,
    choose_types,
    closed_expiry,
    open_expiry,
    pressed,
    type_gates,
)
from jaxattn.core.checks import check_static_int
from jaxattn.nn.parameter import linear_map
from jaxattn.nn.tokens import Tokens


class TokenTypes(nnx.Module):
    """Owns W_t: each token has a type for each key head, of the largest of its three numbers W_t x (NATS, 2025).

    A token is global, and seen for ever; local, and seen up to the next global one of its key head; or seen by as many
    later tokens as the window has. The first token of a row, or of each of its documents, is global. Give a spec as
    `MultiHeadAttention(types=)`.

    In training, which is a call without a state and not `deterministic`, types are drawn with Gumbel noise and have a
    straight-through gradient. The mask is then one of gates [N, T, T], so memory is quadratic in length. Wherever types
    are not drawn the mask is `Expires`, and a store drops tokens as they expire (`cache.Unexpired`).

    Args:
        features: D, the channels of x.
        key_heads: K, the number of key heads.
        window: The number of later tokens that see a token of type window, at least 0.
        pressure: λ, what is added to the gradient for each global or local token is λ · its lifetime / T.
        detach: Whether types have no gradient in x, as for a model whose other weights are frozen.
        dtype: The dtype of the computation.
        rngs: Streams for the initial parameters, and of the noise, `dropout`.

    Raises:
        TypeError: `window` is not an int.
        ValueError: `window` or `pressure` is negative, or there is no stream for the noise.
    """

    def __init__(
        self,
        features: int,
        key_heads: int,
        *,
        window: int = 16,
        pressure: float = 5e-7,
        detach: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_static_int("TokenTypes", "window", window, 0)
        if not pressure >= 0:
            raise ValueError(f"TokenTypes: pressure must be at least 0, got {pressure}")
        if "dropout" not in rngs and "default" not in rngs:
            raise ValueError(
                "TokenTypes draws types but rngs has no such stream: need nnx.Rngs(0) or nnx.Rngs(dropout=0)"
            )
        self.window, self.pressure, self.detach = window, pressure, detach
        self.types = linear_map(features, 3 * key_heads, dtype, rngs, ("width", ("key_heads", key_heads)))
        self.stream = rngs["dropout"].fork()

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t k 3"]:
        """Returns the numbers of the types of each token and key head."""
        logits = self.types(jax.lax.stop_gradient(x) if self.detach else x)
        return logits.reshape(*logits.shape[:-1], -1, 3).astype(jnp.float32)

    def expiry(self, x: Float[Array, "b t d"], tokens: Tokens) -> Int[Array, "b t k"]:
        """Returns when each token expires, as far as it is known when it comes (`open_expiry`)."""
        types = jnp.where(tokens.places[..., None] == 0, GLOBAL, self.logits(x).argmax(-1))
        return open_expiry(types, tokens.positions[..., None], self.window)

    def draw(self, x: Float[Array, "b t d"], tokens: Tokens) -> Float[Array, "b k t 3"]:
        """Returns drawn types by position, one-hot with their gradient; where no token stands they are windows."""
        positions, length = tokens.positions[..., None], x.shape[1]
        choice = choose_types(by_place(self.logits(x), positions, length, 0.0), self.stream())
        places = jnp.broadcast_to(tokens.places, x.shape[:2])[..., None]
        places = by_place(places, positions, length, -1)[..., None]  # in the row, or in the document
        fixed = jax.nn.one_hot(jnp.where(places == 0, GLOBAL, WINDOW)[..., 0], 3, dtype=choice.dtype)
        return pressed(jnp.where(places > 0, choice, fixed), self.pressure)

    def gates(self, x: Float[Array, "b t d"], tokens: Tokens, heads: int) -> GatedSoftmax:
        """Returns the normaliser of `heads` query heads whose keys are there as drawn types say."""
        choice = self.draw(x, tokens)
        return GatedSoftmax(jnp.repeat(type_gates(choice, self.window), heads // choice.shape[1], 1))


def shown_by(expiry: Int[Array, "b s k"], positions: Int[Array, "#b s g"], size: int, heads: int) -> Expires:
    """Returns the mask of `heads` query heads by which tokens at positions below `size` are seen until they expire."""
    of_places = closed_expiry(by_place(expiry, positions, size, -1))
    return Expires(jnp.repeat(of_places, heads // of_places.shape[1], 1))


def by_place(x: Array, positions: Int[Array, "#b s #k"], size: int, fill: Any) -> Array:
    """Returns x [B, S, K, *c] by position, [B, K, size, *c]: `fill` where no token stands; others are left out."""
    batch, _, heads = x.shape[:3]
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)
    places = jnp.broadcast_to(jnp.where(positions < 0, size, positions), x.shape[:3])
    return jnp.full((batch, heads, size, *x.shape[3:]), fill, x.dtype).at[row, head, places].set(x, mode="drop")
