"""The protocol of token mixers: attention, recurrences, memories, and mixers made of mixers."""

from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.nn.sharding import on_any_mesh
from jaxattn.nn.tap import Tap
from jaxattn.nn.tokens import Tokens


class Mixer(nnx.Module):
    """The base class of token mixers, which move information between tokens.

        mixer(x, tokens, tap, state=None, context=None) -> (y, state)          x, y [B, T, D]
        mixer.init_state(batch, capacity) -> state

    A new mixer says which `sites` it has, begins its call with `started`, and calls `x = tap("site", x)` at each.

    Attributes:
        sites: The sites where its values can be changed and recorded, in the order in which the mixer comes to them.
        recorded_only: The sites that take no edits.
        keys_from: The source of its keys, as of `MultiHeadAttention`: its own x ("self"), the layer before ("layer"),
            the `context` ("context"), or "none".
        echo: Whether it takes the queries of the layer before as well as its keys.
        absorb: Whether it reads the context itself, in every call, and no state of it keeps anything of the context.
    """

    sites: ClassVar[tuple[str, ...]] = ("attn_out",)
    recorded_only: ClassVar[tuple[str, ...]] = ()
    keys_from: str = "none"
    echo: bool = False
    absorb: bool = False

    @property
    def reads_trees(self) -> bool:
        """Whether tokens may be the nodes of a tree, as of `Tokens.parents`. A recurrence reads none."""
        return False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in vars(cls):
            cls.__call__ = on_any_mesh(cls.__call__)  # type: ignore[method-assign]

    def __call__(
        self,
        x: Float[Array, "b t d"],
        tokens: Tokens | None = None,
        tap: Tap | None = None,
        state: Any = None,
        context: Any = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Mixes the tokens of x.

        Args:
            x: [B, T, D].
            tokens: What stands where; by default 0..T−1, and with a state the places after the last that it holds.
            tap: Edits and records.
            state: The memory of earlier tokens, from `init_state` or an earlier call; None for a sequence that begins
                here.
            context: Another sequence, for mixers that read one.

        Returns:
            A pair (y, state): y [B, T, D], and the state after these tokens.
        """
        raise NotImplementedError

    def init_state(self, batch: int, capacity: int, store: Any = None) -> Any:
        """Returns the state before any token, for sequences of up to `capacity` tokens.

        Args:
            batch: B.
            capacity: The number of positions; all tokens stand below it.
            store: A `cache.Policy`, which says how attention keeps and reads earlier tokens.
        """
        raise NotImplementedError

    def reached(self, state: Any) -> Int[Array, " b"]:
        """Returns the position after the last token that the state holds."""
        raise NotImplementedError

    def started(self, x: Any, tokens: Tokens | None, tap: Tap | None, state: Any) -> tuple[Tokens, Tap]:
        """Returns the tokens and the tap of a call, with defaults in place of None.

        Raises:
            ValueError: There are more or fewer tokens than in x, an edit or record at a site that this mixer does not
                have, or an edit where it only records; or tokens are nodes of a tree that it cannot read.
        """
        if tokens is None:
            tokens = Tokens.of(x, after=None if state is None else self.reached(state))
        elif x.ndim > 1 and tokens.length != x.shape[1]:
            raise ValueError(
                f"tokens are {tokens.length}, but x has shape {x.shape}: need as many tokens, {x.shape[1]}"
            )
        if tokens.parents is not None and not self.reads_trees:
            raise ValueError(f"parents is given, but {type(self).__name__} reads no trees: need plain attention")
        tap = Tap() if tap is None else tap
        tap.check(self, self.sites)
        for site in self.recorded_only:
            if site in tap.edits:
                raise ValueError(f"edits has the site {site!r}, which {type(self).__name__} can only record")
        return tokens, tap.at(tokens)
