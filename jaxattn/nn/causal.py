"""What mixers have in common that attend causally among their own tokens by a function of their own."""

import abc
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.cache import Store
from jaxattn.core.attend.mask import Causal, anded
from jaxattn.core.checks import check_array
from jaxattn.nn.attention import MultiHeadAttention
from jaxattn.nn.mixer import Mixer
from jaxattn.nn.tap import Tap
from jaxattn.nn.tokens import Tokens


class CausalMixer(Mixer):
    """The base class of causal mixers with the projections of an attention, and a function of their own between.

    Attributes:
        attention: The attention whose projections and store they are.
        called: The name of the mechanism in errors.
    """

    sites: ClassVar = ("q", "q_rotated", "k", "v", "k_rotated", "z", "attn_out")
    keys_from = "self"
    called: ClassVar[str]
    attention: MultiHeadAttention

    @abc.abstractmethod
    def attend(
        self,
        x: Float[Array, "b t d"],
        query: Float[Array, "b t n h"],
        key: Float[Array, "b s k h"],
        value: Float[Array, "b s k h"],
        at: Int[Array, "#b t"] | None,
        places: Int[Array, "#b s g"] | None,
    ) -> Float[Array, "b t n h"]:
        """Returns what heads read.

        Args:
            x: The inputs.
            query: The queries as they meet the keys.
            key: The keys, of x or of the state.
            value: The values likewise.
            at: The positions of the queries; None for 0, 1, ...
            places: Those of the keys, for all key heads or one each; None for 0, 1, ...
        """

    def __call__(
        self,
        x: Float[Array, "b t d"],
        tokens: Tokens | None = None,
        tap: Tap | None = None,
        state: Store | None = None,
        context: None = None,
    ) -> tuple[Float[Array, "b t d"], Store | None]:
        """Runs over x.

        Args:
            x: [B, T, D].
            tokens: What stands where; their mask may say that they are causal, and nothing more.
            tap: Edits and records.
            state: A state from `init_state` or an earlier call.
            context: None.

        Returns:
            A pair (y, state).

        Raises:
            ValueError: There is a context, or a mask that is not `Causal()`, or the input has another width.
        """
        check_array("x", x)
        own = self.attention
        if x.ndim != 3 or x.shape[-1] != own.query.in_features:
            raise ValueError(f"x has shape {x.shape}: need [batch, length, {own.query.in_features}]")
        if context is not None:
            raise ValueError(f"context is given: {self.called} reads the tokens of x alone, need None")
        tokens, tap = self.started(x, tokens, tap, state)
        for term in anded(tokens.mask):
            if not isinstance(term, Causal):
                raise ValueError(f"mask has {type(term).__name__}: {self.called} takes None or Causal()")
        x = tokens.clean(x)
        query = tap("q", own.queries(x))
        query = tap("q_rotated", own.turn(query, tokens.positions))
        key, value = own.keys_and_values(x)
        key, value = tap("k", key), tap("v", value)
        key = tap("k_rotated", own.turn(key, tokens.positions))
        at, places = tokens.known, None if tokens.known is None else tokens.known[..., None]
        if state is not None:
            at = jnp.broadcast_to(tokens.positions, x.shape[:2])
            state = state.append(key, value, at)
            held = state.read(query, at)
            state = state.observe({}, held)
            key, value, places = held.key, held.value, held.positions
        z = self.attend(x, query, key, value, at, places)
        return tap("attn_out", own.merge(tap("z", z), x)), state

    def reached(self, state: Store) -> Int[Array, " b"]:
        """Returns the positions at which the tokens that the state holds end."""
        return self.attention.reached(state)
