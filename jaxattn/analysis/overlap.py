"""Where a classifier looks, held against where the thing is: maps of gradients, and how far two maps overlap."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.numeric import ratio
from jaxattn.trace import Add, run
from jaxattn.trace.patching import as_inputs
from jaxattn.trace.sweep import compiled, unchanged


def soft_iou(a: Float[Array, "*#b h w"], b: Float[Array, "*#b h w"]) -> Float[Array, "*b"]:
    """Returns the overlap of two maps, each divided by its sum (Serianni et al., 2025):

        Σ a b / Σ ((a + b) / 2)²

    It is 0 for maps without a common place and 1 for equal ones. Uniform sets of equal size s that share o places have
    2 o / (s + o), which is not the o / (2 s − o) of sets. A map that is 0 everywhere overlaps with nothing: 0.

    Args:
        a: [..., H, W], at least 0.
        b: [..., H, W], such as a mask that was resized to the grid of the map; leading axes broadcast.
    """
    a, b = (ratio(x, x.sum((-2, -1), keepdims=True)) for x in (jnp.asarray(a), jnp.asarray(b)))
    return ratio((a * b).sum((-2, -1)), (((a + b) / 2) ** 2).sum((-2, -1)))


@unchanged()
def grad_cam(
    model: Any,
    inputs: Any,
    metric: Callable[[Any], Array],
    *,
    layer: int,
    site: str = "resid_pre",
    own: int = 1,
    **options: Any,
) -> Float[Array, "b h w"]:
    """Returns the map of where channels that raise a metric are large (Grad-CAM; Selvaraju et al., 2017):

        relu(Σ_c g_c x_pc),   g_c = mean over patches p of ∂ metric / ∂ x_pc

    Attention IoU (2025) compares such maps, not weights of attention.

    Args:
        model: A model of images, of square grids of patches.
        inputs: Its inputs, or a tuple of them.
        metric: From the output to one number per image, [B], such as the logit of the label.
        layer: The layer; negative numbers count from the last. What the last layer writes reaches a class token no
            more, so that `resid` of the last layer has no gradient at patches.
        site: A site of the stream.
        own: The number of first tokens that are no patches.
        options: Other arguments of the model.

    Raises:
        ValueError: There is no such layer, the tokens are no square of patches, or the metric is not one number per
            image.
    """
    inputs = as_inputs("inputs", inputs, options)
    output, seen = run(model, *inputs, record=(site,), **options)
    layers = len(seen[site])
    if not -layers <= layer < layers:
        raise ValueError(f"layer is {layer}: need one of {layers}")
    x, at = seen[site][layer], layer % layers
    side = round((x.shape[1] - own) ** 0.5)
    if side**2 != x.shape[1] - own or not side:
        raise ValueError(f"there are {x.shape[1]} tokens, {own} of them no patches: need a square of patches")
    if jnp.shape(value := metric(output)) != x.shape[:1]:
        raise ValueError(f"metric has shape {jnp.shape(value)}: need one number for each of {len(x)} images")

    def total(added: Array) -> Array:
        return metric(model(*inputs, edits={site: {at: Add(added)}}, **options)[0]).sum()

    gradient = compiled(jax.grad(total), jnp.zeros_like(x))[:, own:].mean(1, keepdims=True)
    return jax.nn.relu((gradient * x[:, own:]).sum(-1)).reshape(-1, side, side)
