"""The protocol of token mixers: attention, recurrences, memories, and mixers made of mixers."""

from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.nn.tap import Tap
from jaxattn.nn.tokens import Tokens


class Mixer(nnx.Module):
    """What moves information between tokens.

        mixer(x, tokens, tap, state=None, context=None) -> (y, state)          x, y [B, T, D]
        mixer.init_state(batch, capacity) -> state

    A new mixer says which `sites` it has, begins its call with `started`, and calls `x = tap("site", x)` at each.

    Attributes:
        sites: Where its values can be changed and recorded, in the order in which it comes to them.
        recorded_only: Those of them that take no edits.
        keys_from: Whose keys it attends to, as of `MultiHeadAttention`: those of its own x ("self"), of the layer
            before ("layer"), of the `context` ("context"), or "none".
    """

    sites: ClassVar[tuple[str, ...]] = ("attn_out",)
    recorded_only: ClassVar[tuple[str, ...]] = ()
    keys_from: str = "none"

    def __call__(
        self,
        x: Float[Array, "b t d"],
        tokens: Tokens | None = None,
        tap: Tap | None = None,
        state: Any = None,
        context: Any = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """(y, the state after these tokens).

        Args:
            x: [B, T, D].
            tokens: What stands where; by default 0..T−1, and with a state the places after the last that it holds.
            tap: Edits and records.
            state: What earlier tokens left, from `init_state` or an earlier call; None for a sequence that begins here.
            context: Another sequence, for mixers that read one.
        """
        raise NotImplementedError

    def init_state(self, batch: int, capacity: int, store: Any = None) -> Any:
        """The state before any token, for sequences of up to `capacity` tokens.

        Args:
            batch: B.
            capacity: Positions below it.
            store: A `cache.Policy`: how attention keeps and reads earlier tokens.
        """
        raise NotImplementedError

    def reached(self, state: Any) -> Int[Array, " b"]:
        """The position after the last token that the state holds."""
        raise NotImplementedError

    def started(self, x: Any, tokens: Tokens | None, tap: Tap | None, state: Any) -> tuple[Tokens, Tap]:
        """The tokens and the tap of a call, with what stands for None.

        Raises:
            ValueError: For edits and records at sites that this mixer does not have, and edits where it only records.
        """
        if tokens is None:
            tokens = Tokens.of(x, after=None if state is None else self.reached(state))
        tap = Tap() if tap is None else tap
        tap.check(self, self.sites)
        for site in self.recorded_only:
            if site in tap.edits:
                raise ValueError(f"edits has the site {site!r}, which {type(self).__name__} can only record")
        return tokens, tap.at(tokens)
