"""What every implementation is given: one attention call, checked, with positions that broadcast over tiles."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from jaxattn.core.maps import Seeded
from jaxattn.core.mask import Mask


@dataclasses.dataclass(frozen=True)
class Call:
    """Positions are NumPy arrays when they are the default 0..length−1, so that masks can be read at trace time."""

    query: Float[Array, "*b t n h"]
    key: Float[Array, "*b s k h"]
    value: Float[Array, "*b s kv v"]
    score: Any
    bias: Any
    mask: Mask | None
    normalize: Any
    dropout: Seeded | None
    query_positions: Int[Array, "*b 1 t 1"]
    key_positions: Int[Array, "*b 1 1 s"]
