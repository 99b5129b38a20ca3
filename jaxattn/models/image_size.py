"""Models of images at another size than that of their learned positions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from jaxattn import nn
from jaxattn.models.transformer import Transformer
from jaxattn.nn.parameter import decayed


def with_image_size(model: Transformer, height: int, width: int) -> Transformer:
    """Returns the model for images of another size, with its learned positions interpolated.

    The position of a new patch is a bicubic mix (Keys, 1981, with a = −3/4) of those of the 4 by 4 old patches around
    its centre, and that of the class token stays. DINOv2 (Oquab et al., 2024) is published with positions for images of
    518 by 518 pixels, and reads smaller ones so.

    Args:
        model: The model, which stays as it is.
        height: The new height of images, in pixels.
        width: The new width of images, in pixels.

    Raises:
        ValueError: The model has no learned positions of patches of images of one size, or patches do not fill the new
            one.
    """
    embed, positions = model.embed, model.positions
    if not (isinstance(embed, nn.PatchEmbedding) and embed.size and isinstance(positions, nn.PositionEmbedding)):
        raise ValueError(
            f"model has embed {model.config.embed} and positions {model.config.positions}: need a PatchEmbedding with "
            "a size, and a PositionEmbedding"
        )
    (high, wide), (old_height, old_width) = embed.patch, embed.size
    if min(height, width) < 1 or height % high or width % wide:
        raise ValueError(f"images are {height} by {width}: need multiples of the patch, {high} by {wide}")
    begin, patches = 0 if embed.class_token is None else 1, (old_height // high) * (old_width // wide)
    if positions.length != begin + patches or positions.offset:
        raise ValueError(
            f"model has {positions.length} positions: need {begin + patches}, one for each patch and the class token"
        )
    first, others = jnp.split(positions.table[...], [begin])
    grid = others.reshape(old_height // high, old_width // wide, -1)
    rows, columns = _cubic(old_height // high, height // high), _cubic(old_width // wide, width // wide)
    grid = jnp.einsum("yi,xj,ijd->yxd", rows, columns, grid).astype(grid.dtype)
    table = jnp.concatenate([first, grid.reshape(-1, grid.shape[-1])])

    new = nnx.clone(model)
    size = (height, width)
    new.config = dataclasses.replace(model.config, length=len(table), embed=model.config.embed.replace(size=size))
    new.embed.size, new.positions.length, new.positions.table = size, len(table), decayed(table, None, "width")
    return new


def _cubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the share that each of `old` points has in each of `new` ones, whose centres are spread over the same
    line; beyond the ends stand copies of the first and the last.
    """
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    shares = np.zeros((new, old))
    for tap in range(-1, 3):
        at = np.floor(centre) + tap
        x = abs(centre - at)
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        np.add.at(shares, (np.arange(new), np.clip(at, 0, old - 1).astype(int)), np.where(x <= 1, near, far))
    return shares
