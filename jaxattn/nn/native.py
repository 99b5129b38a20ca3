"""A mixer of native sparse attention."""

from typing import Any

from flax import nnx

from jaxattn.cache import Policy
from jaxattn.core.attend.mask import Causal
from jaxattn.core.attend.native import native_sparse_attention
from jaxattn.core.attend.position import Position, Rotary
from jaxattn.core.checks import check_static_int
from jaxattn.nn.attention import MultiHeadAttention
from jaxattn.nn.causal import CausalMixer
from jaxattn.nn.parameter import linear_map
from jaxattn.nn.spec import Spec


class NativeSparseAttention(CausalMixer):
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

    called = "native sparse attention"

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

    def attend(self, x, query, key, value, at, places):
        gates = nnx.sigmoid(self.gates(x)).reshape(*query.shape[:-1], 3)
        positions: Any = {"query_positions": at, "key_positions": None if places is None else places[..., 0]}
        sizes: Any = {"size": self.size, "blocks": self.blocks, "window": self.window}
        return native_sparse_attention(query, key, value, gates, **sizes, **positions)

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
