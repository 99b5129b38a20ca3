"""The tokens of one call of a layer: places in the row, documents, padding and the mask of the caller."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.bias import ScoreBias
from jaxattn.core.attend.mask import (
    Causal,
    Documents,
    Explicit,
    Mask,
    Within,
    anded,
    as_mask,
    documents_of,
    places_in_documents,
)
from jaxattn.core.checks import positions_fit
from jaxattn.core.part import part
from jaxattn.core.table import take


@part
class Tokens:
    """The tokens of one call, as all layers of a model see them, made once by `Tokens.of`.

    Attributes:
        positions: [1 or B, T], the place of each token in its row; −1 is padding, which is as if it were not there.
        documents: [1 or B, T], the document of each token of packed rows; −1 is padding. None where nothing is packed.
        mask: The mask of the caller, and-ed with that of each layer, or None.
        padded: Whether there may be padding by position, or is by document before the end of a row. Where ids are not
            known when the program is made, those of −1 must not stand inside a document; convolutions that reach over
            them are NaN.
        in_order: Whether positions are known to be 0..T−1, so that masks can be read when the program is made.
        fixed: [1 or B, P], by position, which tokens edits leave alone: those of a learned prefix. None for none.
        bias: The bias that all layers of attention add to their scores besides their own, or None.
        parents: [1 or B, T] where the tokens are nodes of a tree of drafts: the node before each, a smaller number, or
            −1 for a root. A node sees what stands before the tree, itself and its ancestors. None for a plain text.
    """

    positions: Int[Array, "#b t"]
    documents: Int[Array, "#b t"] | None = None
    mask: Mask | None = None
    padded: bool = True
    in_order: bool = False
    fixed: Bool[Array, "#b p"] | None = None
    bias: ScoreBias | None = None
    parents: Int[Array, "#b t"] | None = None

    @classmethod
    def of(
        cls,
        x: Any,
        *,
        positions: Int[Array, "#b t"] | None = None,
        mask: Any = None,
        after: Int[Array, " b"] | None = None,
    ) -> "Tokens":
        """Returns the tokens of x [B, T, ...].

        Args:
            x: The input of the layer or the model; only its shape is looked at.
            positions: [B, T] or [T]; by default 0..T−1, or those that follow `after`.
            mask: A mask, or an array or function that stands for one. `Documents(ids)` says which tokens of packed rows
                belong together.
            after: The positions [B] at which the tokens that a state holds end. None without a state.

        Raises:
            ValueError: The positions do not fit x, or a table of booleans has fewer rows than there are tokens.
            TypeError: The positions are not integers.
        """
        batch, length = x.shape[:2]
        in_order = positions is None and after is None
        padded = positions is not None and _may_be_padded(positions)
        if positions is None:
            start = 0 if after is None else after[:, None]
            positions = start + jnp.arange(length, dtype=jnp.int32)
        elif not hasattr(positions, "dtype") or not jnp.issubdtype(positions.dtype, jnp.integer):
            raise TypeError(f"positions must be an integer array, got {getattr(positions, 'dtype', type(positions))}")
        elif not positions_fit(tuple(positions.shape), (batch,), length):
            raise ValueError(f"positions has shape {positions.shape}: need ({batch}, {length}) or ({length},)")
        positions = jnp.asarray(positions).reshape(-1, length)
        mask = as_mask(mask)
        for term in anded(mask) if in_order else ():
            shape = jnp.shape(term.array) if isinstance(term, Explicit) else ()
            if len(shape) > 1 and 1 < shape[-2] < length:
                raise ValueError(f"mask has shape {shape} for {length} tokens: need {length} rows of queries, or 1")
        ids, documents = documents_of(mask), None
        if ids is not None:
            padded = padded or _has_gaps(ids)
            ids = jnp.asarray(ids)
            documents = take(ids.reshape(-1, ids.shape[-1]), positions, grid=1, fill=-1)
        return cls(positions, documents, mask, padded, in_order)

    @property
    def is_causal(self) -> bool:
        """Whether the mask says that no token sees a later one."""
        return any(isinstance(term, Causal) for term in anded(self.mask))

    @property
    def length(self) -> int:
        """T."""
        return self.positions.shape[-1]

    @property
    def known(self) -> Int[Array, "#b t"] | None:
        """The positions, or None where they are known to be 0..T−1, the form that suits `attend` best."""
        return None if self.in_order else self.positions

    @property
    def places(self) -> Int[Array, "#b t"]:
        """The place of each token in its document, or in the row where nothing is packed; −1 for padding."""
        ids = documents_of(self.mask)
        if ids is None:
            return self.positions
        places = jnp.asarray(places_in_documents(ids))
        found = take(places.reshape(-1, places.shape[-1]), self.positions, grid=1, fill=-1)
        return jnp.where(self.seen(len(found)), found, -1)

    def seen(self, batch: int) -> Bool[Array, "b t"]:
        """Returns which tokens are there, and no padding."""
        there = self.positions >= 0 if self.documents is None else (self.positions >= 0) & (self.documents >= 0)
        return jnp.broadcast_to(there, (batch, self.length))

    def clean(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns x with zeros for padding, which may hold anything and must not reach a gradient."""
        if not self.padded and self.documents is None:
            return x
        return jnp.where(self.seen(x.shape[0])[..., None], x, 0)

    def shows(self, own: Mask | None) -> Mask | None:
        """Returns the mask that a layer with this mask of its own applies.

        In packed rows the layer's own mask is meant within each document.
        """
        if self.mask is None:
            return own
        if own is None:
            return self.mask
        ids = documents_of(self.mask)
        if ids is not None and not own.is_relative:
            own = Within(own, places_in_documents(ids))
        return own & self.mask

    def segments(self, batch: int) -> Int[Array, "b t"] | None:
        """Returns the document of each token, for a layer in which tokens follow each other.

        The result is None where nothing is packed. Padding goes with the token before it.

        Raises:
            ValueError: The mask says more than that the row is causal and which documents it has.
        """
        for term in anded(self.mask):
            known = isinstance(term, Documents) and term.key_ids is None and jnp.shape(term.ids)[-1] == self.length
            if not known and not isinstance(term, Causal):
                raise ValueError(
                    f"mask is {type(term).__name__}: a recurrence or convolution takes None, Causal() or "
                    "Documents(ids) with one id per token"
                )
        if self.documents is None:
            return None
        documents = jnp.broadcast_to(self.documents, (batch, self.length))
        last = jax.lax.cummax(jnp.where(self.seen(batch), jnp.arange(self.length), -1), axis=1)
        return jnp.where(last >= 0, jnp.take_along_axis(documents, jnp.maximum(last, 0), 1), -1)

    def only(self, x: Array, positions: Int[Array, "#b p"], missing: Any) -> Array:
        """Returns the entries of x [B, T, ...] of the tokens at these positions, [B, P, ...].

        Args:
            x: [B, T, ...], one entry for each of these tokens.
            positions: [1 or B, P].
            missing: What stands where no token has the position.
        """
        here = (positions[:, :, None] == self.positions[:, None]) & (self.positions >= 0)[:, None]
        here = jnp.broadcast_to(here, (len(x), *here.shape[1:]))  # [B, P, T]
        index = here.argmax(-1).reshape(*here.shape[:2], *(1,) * (x.ndim - 2))
        return jnp.where(here.any(-1).reshape(index.shape), jnp.take_along_axis(x, index, 1), missing)

    def moved(self, positions: Int[Array, "#b t"]) -> "Tokens":
        """Returns the same tokens at other positions."""
        return dataclasses.replace(self, positions=positions, in_order=False, fixed=None)


def _may_be_padded(positions: Int[Array, "#b t"]) -> bool:
    """Returns whether some positions are −1, or where they are not known, may be."""
    return isinstance(positions, jax.core.Tracer) or bool((np.asarray(positions) < 0).any())


def _has_gaps(ids: Int[Array, "*b p"]) -> bool:
    """Returns whether some ids are known to be −1 before others that are not."""
    if isinstance(ids, jax.core.Tracer):
        return False
    there = np.asarray(ids) >= 0
    return bool((~there[..., :-1] & there[..., 1:]).any())


def may_change(fixed: Bool[Array, "#b p"] | None, positions: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Returns whether edits may change the tokens at these positions.

    Args:
        fixed: As in `Tokens`.
        positions: [1 or B, T], or the positions of a tile.
    """
    if fixed is None:
        return jnp.ones((), bool)
    positions = jnp.asarray(positions)
    positions = positions[None] if positions.ndim == 3 else positions  # a tile of rows that share their positions
    found = take(jnp.asarray(fixed), positions.reshape(len(positions), -1), 1, False)
    return ~found.reshape(-1, *positions.shape[1:])
