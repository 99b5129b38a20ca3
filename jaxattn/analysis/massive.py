"""Channels of queries and keys that are far larger than the others, and runs in which they are cleared."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.attend.position import rotary_channels
from jaxattn.core.checks import check_static_int
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.nn.tap import Edit, Layers, Reducer
from jaxattn.trace import run
from jaxattn.trace.patching import as_inputs


@part
class SquareSums(Reducer):
    """Σ of the squares of a value over the tokens of the batch that are no padding, [...]."""

    def __call__(self, value, where):
        seen = where.seen(value.shape[0]).reshape(*value.shape[:2], *(1,) * (value.ndim - 2))
        return jnp.where(seen, jnp.square(value.astype(jnp.promote_types(value.dtype, jnp.float32))), 0).sum((0, 1))


def channel_norms(
    model: Any, inputs: Any, sites: Sequence[str] = ("q_rotated", "k_rotated", "v"), **options: Any
) -> dict[str, Float[Array, "layers heads h"]]:
    """Returns M_nd = √(Σ_t x_tnd²) of each channel of each head, over all tokens that are no padding (2025).

    Jin et al. find that some channels of queries and keys are massive, and none of values. Rotation mixes the two
    channels of a pair, so look at `pair_norms` too: they are the same before and after it. Without rotary positions a
    change of basis of W_Q and W_K moves such channels anywhere.

    Args:
        model: The model.
        inputs: Its inputs: tokens, or a tuple of inputs.
        sites: Sites with heads. q and k are those before rotation.
        options: Other arguments of the model. Padding has position −1 in `positions`.

    Returns:
        Site -> [L, N, H], with key heads at k and v.

    Raises:
        ValueError: Layers have a site in different shapes, or not all of them.
    """
    inputs = as_inputs("inputs", inputs, options, ("record",))
    _, records = run(model, *inputs, record={site: (site, SquareSums()) for site in sites}, **options)
    for site in sites:
        if isinstance(records[site], list):
            raise ValueError(f"the layers have {site!r} in different shapes, or not all of them: need the same in all")
    return {site: jnp.sqrt(records[site]) for site in sites}


def pair_norms(norms: Float[Array, "*b h"], *, fraction: float = 1.0) -> Float[Array, "*b pairs"]:
    """Returns √(M_p² + M_{p + R/2}²), the norms of rotary pairs, the fastest first; rotation leaves them as they are.

    Args:
        norms: As of `channel_norms`.
        fraction: The fraction of the channels that is rotated, as of `Rotary`. The others are left out.
    """
    squares = jnp.square(norms[..., : rotary_channels(norms.shape[-1], fraction)])
    return jnp.sqrt(squares.reshape(*squares.shape[:-1], 2, -1).sum(-2))


def concentration(norms: Float[Array, "*b h"]) -> Float[Array, "*b"]:
    """Returns max_d M_d / mean_d M_d of each head: 1 for channels of one size, H where one has all; 0 for zeros."""
    return ratio(norms.max(-1), norms.mean(-1))


def massive_channels(norms: Float[Array, "*b h"], times: float = 5.0) -> Bool[Array, "*b h"]:
    """Returns which channels are more than `times` the mean of their head: M > λ mean_d M.

    Args:
        norms: As of `channel_norms`.
        times: λ; the paper's is 5, as we remember it.
    """
    return norms > times * norms.mean(-1, keepdims=True)


def extreme_channels(norms: Float[Array, "*b h"], count: int, *, smallest: bool = False) -> Bool[Array, "*b h"]:
    """Returns the channels of each head with the largest norms, or the smallest, as a control; ties by their number.

    Args:
        norms: As of `channel_norms`.
        count: How many of each head, from 0 to H.
        smallest: Whether to take the smallest.
    """
    check_static_int("extreme_channels", "count", count, 0)
    if count > norms.shape[-1]:
        raise ValueError(f"count is {count}: need at most {norms.shape[-1]}, the channels of a head")
    order = jnp.argsort(norms if smallest else -norms, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True) < count


@part
class ClearChannels(Edit):
    """Puts one value in place of some channels of each head: their mean over tokens and those channels, or 0.

    The value replaces what single tokens say in these channels, so that they tell tokens apart no more. A mean is over
    the tokens of the call that are no padding, for each example and head; with a fixed `value` one pass and decoding
    token by token do the same.

    Attributes:
        channels: [N, H], which channels, with the heads of the site.
        value: The value; None for the mean.
    """

    channels: Bool[Array, "n h"]
    value: Float[Array, "..."] | float | None = None

    of_tokens = True

    def __call__(self, value, where):
        on = jnp.asarray(self.channels)
        if self.value is not None:
            return jnp.where(on, jnp.asarray(self.value).astype(value.dtype), value)
        seen = where.seen(value.shape[0])[..., None, None] & on
        mean = jnp.where(seen, value, 0).sum((1, 3), keepdims=True) / jnp.maximum(seen.sum((1, 3), keepdims=True), 1)
        return jnp.where(on, mean.astype(value.dtype), value)


def without_channels(
    channels: dict[str, Bool[Array, "layers heads h"]], value: float | None = None
) -> dict[str, Layers]:
    """Returns the edits that clear some channels in all layers.

    Args:
        channels: Site, such as q_rotated and k_rotated -> which channels, [L, heads of the site, H].
        value: As of `ClearChannels`.
    """
    return {site: Layers(_cleared(jnp.asarray(on), value)) for site, on in channels.items()}


def _cleared(on: Array, value: float | None) -> ClearChannels:
    return ClearChannels(on, None if value is None else jnp.full(len(on), value))
