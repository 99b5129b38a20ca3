"""Landmark attention: a token at the end of each block stands for the block (Mohtashami & Jaggi, 2023)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.api import attend, attention_weights
from jaxattn.core.attend.blocks import cut
from jaxattn.core.attend.mask import Causal, Chunked, MaskFunction
from jaxattn.core.attend.partial import Partial, merge, merge_axis, with_log_mass
