"""A mixer of landmark attention."""

from typing import Any

from flax import nnx

from jaxattn.cache import Landmarks, Policy
from jaxattn.core.attend.landmark import landmark_attention
from jaxattn.core.attend.mask import Causal
from jaxattn.core.attend.position import Position, Rotary
from jaxattn.core.checks import check_static_int
from jaxattn.nn.attention import MultiHeadAttention
from jaxattn.nn.causal import CausalMixer
from jaxattn.nn.spec import Spec


class LandmarkAttention(CausalMixer):
    """y = W_o concat_n(z_n),  z = landmark_attention(q, k, v, size, pages)  (Mohtashami & Jaggi, 2023).

    Every `size`-th token is a landmark: put one token of the vocabulary there, and leave it out of the loss. The mixer
    is causal. In decoding a token scores the landmarks that the state holds, and reads the pages of the best ones and
    its own, which are those that one pass over all tokens reads. The state keeps all tokens. Keys stand where they were
    read, not in the few places of the paper.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of query heads.
        size: The number of tokens per block with its landmark, at least 2.
        pages: The number of earlier blocks that a head reads, at least 1; None for all.
        key_heads: K, a divisor of N; by default N.
        head_dim: H, by default D / N.
        position: As of `MultiHeadAttention`.
        qk_norm: As of `MultiHeadAttention`.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        TypeError or ValueError: A size is out of range, as of `MultiHeadAttention` and `landmark_attention`.
    """

    called = "landmark attention"

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        size: int = 64,
        pages: int | None = None,
        key_heads: int | None = None,
        head_dim: int | None = None,
        position: Position | None = Rotary(),
        qk_norm: Spec | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_static_int("LandmarkAttention", "size", size, 2)
        if pages is not None:
            check_static_int("LandmarkAttention", "pages", pages, 1)
        self.size, self.pages = size, pages
        options: dict[str, Any] = {"position": position, "qk_norm": qk_norm, "dtype": dtype, "rngs": rngs}
        self.attention = MultiHeadAttention(
            features, heads, key_heads=key_heads, head_dim=head_dim, mask=Causal(), **options
        )

    def attend(self, x, query, key, value, at, places):
        if places is None or places.shape[-1] == 1:
            places = None if places is None else places[..., 0]
            positions: Any = {"query_positions": at, "key_positions": places}
            return landmark_attention(query, key, value, self.size, pages=self.pages, **positions)
        # Key heads have read other blocks, so each is a call of its own.
        by_head = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1]).swapaxes(1, 2)
        key, value = (x.swapaxes(1, 2)[..., None, :] for x in (key, value))
        positions = {"query_positions": at[:, None], "key_positions": places.swapaxes(1, 2)}
        z = landmark_attention(by_head, key, value, self.size, pages=self.pages, **positions)
        return z.swapaxes(1, 2).reshape(query.shape)

    def init_state(self, batch: int, capacity: int, store: Policy | None = None) -> Any:
        """Makes a store of all tokens at positions below `capacity`, or up to the end of the last block.

        Args:
            batch: B.
            capacity: The number of positions.
            store: None, or a policy that keeps all tokens and reads all, or enough of them by `Landmarks`.

        Raises:
            ValueError: The policy evicts, turns keys when they are read, or does not read what the heads choose.
        """
        enough = None if self.pages is None else 1 + self.pages * self.attention.heads // self.attention.key_heads
        if store is None:
            store = Policy() if enough is None else Policy(select=Landmarks(enough, self.size))
        select = store.select
        reads = select is None or (
            isinstance(select, Landmarks) and select.size == self.size and enough is not None and select.pages >= enough
        )
        if store.retain.evicts or not reads or not store.key_position.at_write:
            wanted = "" if enough is None else f", or Policy(select=Landmarks({enough}, {self.size}))"
            raise ValueError(
                f"store is {store}: the heads choose blocks among all tokens, need one that keeps all and reads what "
                f"they choose, such as Policy(){wanted}"
            )
        return self.attention.init_state(batch, -(-capacity // self.size) * self.size, store)
