"""Contexts of other rows of a batch as a memory: how attention learns to find its own context among others."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.api import attend
from jaxattn.core.attend.measure import Mass
from jaxattn.core.attend.score import Dot
from jaxattn.core.numeric import ratio


class Contexts(NamedTuple):
    """The contexts that the rows of a batch see, one after the other.

    Attributes:
        key: [B, C·S, K, H].
        value: [B, C·S, Kv, V].
        positions: [B, C·S]: the place in the contexts, c·S + s, or −1 where there is no such row or token.
    """

    key: Float[Array, "b cs k h"]
    value: Float[Array, "b cs kv v"]
    positions: Int[Array, "b cs"]


def crossbatch_kv(
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s kv v"],
    offsets: Sequence[int],
    *,
    positions: Int[Array, "#b s"] | None = None,
    wrap: bool = False,
) -> Contexts:
    """Returns for row b the keys and values of the rows b − o, for every offset o (Focused Transformer, 2023).

        memory = crossbatch_kv(key, value, offsets)
        out, extras = attend(query, memory.key, memory.value, key_positions=memory.positions, return_lse=True)

    is a partial result, which `merge` joins to that of the row itself: one softmax over both. Gradients reach the rows
    that are seen. Where the rows of a batch are windows of texts in their order, offset 1 is the window before, and
    larger ones are earlier windows or other texts, which the model learns to tell apart. A row must never see the
    future of its own text: without `wrap` it sees only rows before itself.

    Args:
        key: [B, S, K, H].
        value: [B, S, Kv, V].
        offsets: The offsets, at least one. With `wrap` any integers; else from 0 on, where 0 is the row itself.
        positions: [B or 1, S]; tokens at −1 are padding, which is not seen. None for no padding.
        wrap: Whether rows are counted modulo B, as for contexts of an earlier step; else rows before the first do not
            exist.

    Raises:
        ValueError: There is no offset, or one is negative without `wrap`.
        TypeError: An offset is not an int.
    """
    offsets = tuple(offsets)
    for offset in offsets:
        if not isinstance(offset, int) or isinstance(offset, bool):
            raise TypeError(f"offsets must be ints such as (1, 2), got {offsets!r}")
    if not offsets or (min(offsets) < 0 and not wrap):
        raise ValueError(f"offsets is {offsets}: need at least one, from 0 on unless wrap=True")
    batch, length = key.shape[:2]
    rows = jnp.arange(batch)[:, None] - jnp.array(offsets)  # [B, C]
    there = jnp.broadcast_to(jnp.array(True) if positions is None else positions >= 0, (batch, length))
    seen = there[rows % batch] & (wrap | (rows >= 0))[..., None]
    places = jnp.where(seen.reshape(batch, -1), jnp.arange(len(offsets) * length), -1)
    key, value = (x[rows % batch].reshape(batch, -1, *x.shape[2:]) for x in (key, value))
    return Contexts(key, value, places)


def distraction(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    offsets: Sequence[int],
    *,
    score: Any = Dot(),
    positions: Int[Array, "#b s"] | None = None,
    wrap: bool = False,
) -> Float[Array, "b t n"]:
    """Returns the share of the first context in the weight on all contexts, r_d (Focused Transformer, 2023).

        r_d = Σ_j w_1j / Σ_{i ≤ d} Σ_j w_ij

    With the offset of a row's own earlier context first, it is 1 / d for attention that takes all contexts for its own,
    and 1 for attention that is not distracted. Rows without contexts have 0.

    Args:
        query: [B, T, N, H], as queries meet keys.
        key: [B, S, K, H], as keys of a memory meet queries.
        offsets: As of `crossbatch_kv`, the own context first.
        score: The part that says how well a query matches a key.
        positions: As of `crossbatch_kv`.
        wrap: As of `crossbatch_kv`.

    Raises:
        ValueError: As of `crossbatch_kv`.
        TypeError: As of `crossbatch_kv`.
    """
    memory = crossbatch_kv(key, key[..., :1], offsets, positions=positions, wrap=wrap)
    of_context = jnp.repeat(jnp.arange(len(tuple(offsets))), key.shape[1])
    measures = {"mass": Mass(of_context, len(tuple(offsets)))}
    options = {"key_positions": memory.positions, "score": score, "measures": measures}
    _, found = attend(query, memory.key, memory.value, **options)
    return ratio(found["mass"][..., 0], found["mass"].sum(-1))
