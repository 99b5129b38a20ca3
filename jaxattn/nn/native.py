"""A mixer of native sparse attention."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.cache import Policy, Store
from jaxattn.core.attend.mask import Causal, anded
from jaxattn.core.attend.native import native_sparse_attention
from jaxattn.core.attend.position import Position, Rotary
from jaxattn.core.checks import check_array, check_static_int
from jaxattn.nn.attention import MultiHeadAttention
from jaxattn.nn.mixer import Mixer
from jaxattn.nn.parameter import linear_map
from jaxattn.nn.spec import Spec
from jaxattn.nn.tap import Tap
from jaxattn.nn.tokens import Tokens


class NativeSparseAttention(Mixer):
    """y = W_o concat_n(z_n),  z = native_sparse_attention(q, k, v, σ(W_g x))  (Yuan et al., 2025).

    The branches share keys and values, and blocks are compressed by their means, as in the open implementations; the
    docstring of `native_sparse_attention` says how the paper differs. The mixer is causal. In decoding a token chooses
    among all that the state holds.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of query heads.
        key_heads: K, a divisor of N; by default N.
        head_dim: H, by default D / N.
        position: As of `MultiHeadAttention`.
        qk_norm: As of `MultiHeadAttention`.
        size: The number of keys per block.
        blocks: The number of blocks that are chosen.
        window: The number of tokens of the window.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        TypeError or ValueError: A size is out of range, as of `MultiHeadAttention` and `native_sparse_attention`.
    """

    sites: ClassVar = ("q", "q_rotated", "k", "v", "k_rotated", "z", "attn_out")
    keys_from = "self"

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        key_heads: int | None = None,
        head_dim: int | None = None,
        position: Position | None = Rotary(),
        qk_norm: Spec | None = None,
        size: int = 64,
        blocks: int = 16,
        window: int = 512,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        for name, number in (("size", size), ("blocks", blocks), ("window", window)):
            check_static_int("NativeSparseAttention", name, number, 1)
        self.size, self.blocks, self.window = size, blocks, window
        options: dict[str, Any] = {"position": position, "qk_norm": qk_norm, "dtype": dtype, "rngs": rngs}
        self.attention = MultiHeadAttention(
            features, heads, key_heads=key_heads, head_dim=head_dim, mask=Causal(), **options
        )
        self.gates = linear_map(features, 3 * heads, dtype, rngs, ("width", ("heads", heads)))

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
            raise ValueError("context is given: native sparse attention reads the tokens of x alone, need None")
        tokens, tap = self.started(x, tokens, tap, state)
        for term in anded(tokens.mask):
            if not isinstance(term, Causal):
                raise ValueError(f"mask has {type(term).__name__}: native sparse attention takes None or Causal()")
        x = tokens.clean(x)
        query = tap("q", own.queries(x))
        query = tap("q_rotated", own.turn(query, tokens.positions))
        key, value = own.keys_and_values(x)
        key, value = tap("k", key), tap("v", value)
        key = tap("k_rotated", own.turn(key, tokens.positions))
        gates = nnx.sigmoid(self.gates(x)).reshape(*query.shape[:-1], 3)
        at = places = tokens.known
        if state is not None:
            at = jnp.broadcast_to(tokens.positions, x.shape[:2])
            state = state.append(key, value, at)
            held = state.read(query)
            state = state.observe({}, held)
            key, value, places = held.key, held.value, held.positions[..., 0]
        positions: Any = {"query_positions": at, "key_positions": places}
        sizes: Any = {"size": self.size, "blocks": self.blocks, "window": self.window}
        z = native_sparse_attention(query, key, value, gates, **sizes, **positions)
        return tap("attn_out", own.merge(tap("z", z), x)), state

    def reached(self, state: Store) -> Int[Array, " b"]:
        """Returns the positions at which the tokens that the state holds end."""
        return self.attention.reached(state)

    def init_state(self, batch: int, capacity: int, store: Policy | None = None) -> Any:
        """Makes a store of all tokens at positions below `capacity`.

        Args:
            batch: B.
            capacity: The number of positions.
            store: None, or a policy that keeps and reads all tokens, such as `Policy()`.

        Raises:
            ValueError: The policy evicts or selects tokens, or turns keys when they are read.
        """
        store = Policy() if store is None else store
        if store.retain.evicts or store.select is not None or not store.key_position.at_write:
            raise ValueError(
                f"store is {store}: native sparse attention chooses among all tokens, need one that keeps and reads "
                "all, such as Policy()"
            )
        return self.attention.init_state(batch, capacity, store)
