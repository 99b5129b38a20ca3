"""Learned tokens before every sequence: persistent memory of one mixer, or the meta tokens of a whole model.

These tokens run through attention and recurrences alike, so decoding starts from the state after them. In a packed row
every document has them before it, in a row that is made longer for them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.mask import Causal, Documents, Mask
from jaxattn.nn.mixer import Mixer
from jaxattn.nn.packing import in_order, layout
from jaxattn.nn.parameter import undecayed
from jaxattn.nn.recurrent import as_mixer
from jaxattn.nn.tokens import Tokens


class Lengthened(NamedTuple):
    """x behind its prefix.

    Attributes:
        x: [B, S, D], both together.
        tokens: What stands where in the longer row.
        strip: A function that takes results of the longer row back to the row of x.
    """

    x: Float[Array, "b s d"]
    tokens: Tokens
    strip: Callable[[Array], Array]


def with_prefix(prefix: Float[Array, "n d"], x: Float[Array, "b t d"], tokens: Tokens, documents: int) -> Lengthened:
    """Puts x behind the prefix, which has the positions 0 to n − 1; positions of tokens are counted from n.

    Args:
        prefix: [n, D].
        x: [B, T, D].
        tokens: What stands where in x.
        documents: The number of documents that may be packed in a row; a row of more is NaN.

    Raises:
        ValueError: The mask is other than `Causal()` and `Documents(ids)`, or positions are given to packed rows.
    """
    batch, length, _ = x.shape
    prefix = prefix.astype(x.dtype)
    count = len(prefix)
    segments = tokens.segments(batch)
    if segments is None:
        before = jnp.broadcast_to(jnp.arange(count), (batch, count))
        after = jnp.broadcast_to(after_prefix(tokens.positions, count), (batch, length))
        x = jnp.concatenate([jnp.broadcast_to(prefix, (batch, *prefix.shape)), x], 1)
        positions = None if tokens.in_order else jnp.concatenate([before, after], 1)
        longer = Tokens.of(x, positions=positions, mask=tokens.mask)
        fixed = (jnp.arange(count + length) < count)[None]
        return Lengthened(x, dataclasses.replace(longer, fixed=fixed, bias=tokens.bias), lambda y: y[:, count:])
    if not tokens.in_order:
        raise ValueError("positions are given for packed rows behind a prefix: need None, they are counted by the row")
    rows = layout(segments >= 0, in_order(segments), documents=documents, prefix=count)
    is_prefix = rows.filled & (rows.within < count)
    x = jnp.where(is_prefix[..., None], prefix[jnp.minimum(rows.within, count - 1)], rows.put(x))
    ids = jnp.where(rows.filled, rows.ids, -1)
    positions = jnp.where(rows.filled, jnp.arange(ids.shape[1]), -1)
    mask: Mask = Causal() & Documents(ids) if tokens.is_causal else Documents(ids)
    longer = Tokens.of(x, positions=positions, mask=mask)
    return Lengthened(x, dataclasses.replace(longer, fixed=is_prefix, bias=tokens.bias), rows.take)


def after_prefix(positions: Int[Array, "*b t"], count: int) -> Int[Array, "*b t"]:
    """Returns positions counted from the first of the prefix, from those of the first token; padding (−1) stays."""
    return jnp.where(positions >= 0, positions + count, -1)


def behind_prefix(tokens: Tokens, batch: int, count: int) -> Tokens:
    """Returns the tokens that continue a state which holds the prefix.

    Raises:
        ValueError: There are documents together with the state, or a mask other than `Causal()`, since it would be read
            at places that count the prefix.
    """
    if tokens.segments(batch) is not None:
        raise ValueError("mask has documents and a state is given: need one or the other behind a prefix")
    return tokens.moved(after_prefix(tokens.positions, count))


class Prefixed(Mixer):
    """y = mixer([P; x]) without the rows of P: a mixer with learned tokens before every sequence (persistent memory).

    The sites are those of the mixer, and cover the longer row, P first. Edits leave P as it is.

    Args:
        mixer: Any mixer, mechanism or spec of one. For attention with a window take
            `Window(w) | Causal() & Sinks(tokens)`, or the prefix goes out of sight.
        features: D, the channels of x.
        tokens: n, the number of tokens of P, at least 1. They start N(0, 1), as they are not normed.
        documents: The number of documents that may be packed in a row.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `tokens` is below 1.
    """

    def __init__(self, mixer: Any, features: int, tokens: int, *, documents: int = 8, rngs: nnx.Rngs):
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.mixer, self.documents = as_mixer(mixer, features=features, rngs=rngs), documents
        self.prefix = undecayed(jax.random.normal(rngs.params(), (tokens, features)), None, "width")

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites of the mixer."""
        return self.mixer.sites

    @property
    def recorded_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """The sites of the mixer that take no edits."""
        return self.mixer.recorded_only

    def __call__(self, x, tokens=None, tap=None, state=None, context=None):
        """Returns (y, state) as the mixer; see `with_prefix` for positions and masks."""
        if context is not None:
            raise ValueError("context is given: a mixer with persistent tokens sees only its own")
        prefix = self.prefix[...]
        tokens, tap = self.started(x, tokens, tap, state)
        if state is not None:
            return self.mixer(x, behind_prefix(tokens, len(x), len(prefix)), tap, state)
        longer = with_prefix(prefix, x, tokens, self.documents)
        y, _ = self.mixer(longer.x, longer.tokens, tap)
        return longer.strip(y), None

    def reached(self, state: Any) -> Int[Array, " b"]:
        """Returns the position after the last token, not counting the prefix."""
        return self.mixer.reached(state) - len(self.prefix)

    def init_state(self, batch: int, capacity: int, store: Any = None) -> Any:
        """Returns the state after the prefix."""
        prefix = self.prefix[...]
        x = jnp.broadcast_to(prefix, (batch, *prefix.shape))
        return self.mixer(x, state=self.mixer.init_state(batch, capacity + len(prefix), store))[1]
