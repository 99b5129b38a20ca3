"""What training keeps of a layer for the backward pass, and what it computes again there."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxattn.core.attend.tiled import OVER_KEYS
from jaxattn.nn.tap import KEPT

# Operations whose results take longer to write and read again than to compute anew. Not among them is `lt`, which makes
# the mask of dropout of random numbers: it takes one byte for each, and they would take four.
ELEMENTWISE = """
abs add and ceil clamp cos div eq erf exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic max min mul
ne neg not or pow rem round rsqrt select_n sign sin sqrt square sub tanh xor
"""
MOVES = """
broadcast_in_dim concatenate convert_element_type copy expand_dims iota optimization_barrier pad reshape slice split
squeeze stop_gradient transpose
"""
SUMS = "reduce_and reduce_max reduce_min reduce_or reduce_sum"
CHEAP = frozenset(" ".join([ELEMENTWISE, MOVES, SUMS]).split())


def _all_but_cheap(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in CHEAP


POLICIES: dict[str, Any] = {
    "cheap": _all_but_cheap,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(OVER_KEYS)
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remade(layer: Callable[..., Any], remat: str | Sequence[str]) -> Callable[..., Any]:
    """Returns the body of a scan, of which the backward pass computes again what `TransformerConfig.remat` says."""
    if remat == "none":
        return layer
    policy = POLICIES[remat] if isinstance(remat, str) else jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
