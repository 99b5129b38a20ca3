"""What every implementation is given: one attention call, checked, with positions that broadcast over tiles."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from jaxattn.core.mask import Mask


@dataclasses.dataclass(frozen=True)
class Call:
    """Positions are NumPy arrays when they are the default 0..length−1, so that masks can be read at trace time.

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
