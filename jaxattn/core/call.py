"""One attention call: as the user gave it, and as the implementations get it."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.mask import Mask


class Given(NamedTuple):
    """The arguments of a call to `attend` that mean something, in the order of its slots, as the user gave them."""

    query: Any
    key: Any
    value: Any
    score: Any
    bias: Any
    score_maps: Any
    mask: Any
    normalize: Any
    weight_maps: Any
    measures: Any
    dropout: Any
    query_positions: Any
    key_positions: Any


@dataclasses.dataclass(frozen=True)
class Call:
    """What every implementation is given: a checked call, with positions that broadcast over tiles.

    Positions are NumPy arrays when they are the default 0..length−1, so that masks can be read at trace time.

    `dropout` is a weight map of its own, after the others, so that measures can look before it.
    """

    query: Float[Array, "*b t n h"]
    key: Float[Array, "*b s k h"]
    value: Float[Array, "*b s kv v"]
    score: Any
    bias: Any
    score_maps: tuple
    mask: Mask | None
    normalize: Any
    weight_maps: tuple
    measures: dict[str, Any]
    dropout: Any
    query_positions: Int[Array, "*b 1 t 1"]
    key_positions: Int[Array, "*b #n 1 s"]


def prepare(given: Given) -> Call:
    """Default positions filled in, the contents of empty slots zeroed (they may be anything), dropout seeds drawn."""
    query, key, value = given.query, given.key, given.value
    *batch, length, heads, _ = query.shape
    query_positions, key_positions = given.query_positions, given.key_positions
    if query_positions is None:
        query_positions = np.arange(length, dtype=np.int32)
    else:
        query = jnp.where((query_positions >= 0)[..., None, None], query, 0)
    if key_positions is None:
        key_positions = np.arange(key.shape[-3], dtype=np.int32)
    else:
        by_head = key_positions.ndim == len(batch) + 2
        shown = (key_positions >= 0)[..., None] if by_head else (key_positions >= 0)[..., None, None]
        key, value = jnp.where(shown, key, 0), jnp.where(shown, value, 0)
        if by_head:
            key_positions = jnp.repeat(key_positions, heads // key.shape[-2], -1).swapaxes(-1, -2)[..., None, :]
    if key_positions.ndim < len(batch) + 2:
        key_positions = key_positions[..., None, None, :]
    slots = ("score", "bias", "score_maps", "mask", "normalize", "weight_maps", "measures")
    return Call(
        query=query,
        key=key,
        value=value,
        dropout=None if given.dropout is None else given.dropout.draw(tuple(batch), heads),
        query_positions=query_positions.astype(np.int32)[..., None, :, None],
        key_positions=key_positions.astype(np.int32),
        **{slot: getattr(given, slot) for slot in slots},
    )
