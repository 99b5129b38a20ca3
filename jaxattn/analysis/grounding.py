"""Where in an image the tokens of a text point, from attention alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.checks import check_static_int


class Grounding(NamedTuple):
    """What selected tokens of a text read of an image.

    Attributes:
        map: [B, M], the mean weight of each visual token, over the kept heads and the selected tokens.
        heads: [B, k, 2], the (layer, head) of the kept heads, the one with the most weight on the image first.
    """

    map: Array
    heads: Int[Array, "b k 2"]


def ground(
    weights: Float[Array, "layers b n t s"], text: Bool[Array, "b t"], image: Int[Array, " m"], *, top: int
) -> Grounding:
    """Returns a map over an image from the heads that read it most (TAG; Xu et al., 2024).

        s_h = Σ_{t selected} Σ_{j in image} A^h_tj,   map = mean over the k heads with the largest s, and over t

    The steps are confirmed by a summary of the paper; the sums and means are from memory.

    Args:
        weights: [L, B, N, T, S], recorded attention weights.
        text: [B, T], the selected tokens, such as the quoted words, or where the answer repeats them.
        image: [M], the places of the visual tokens among the keys.
        top: k, 1 to L N.

    Raises:
        TypeError: `top` is not an int.
        ValueError: `top` is out of range.
    """
    layers, _, heads = weights.shape[:3]
    check_static_int("ground", "top", top, 1)
    if top > layers * heads:
        raise ValueError(f"top is {top}: need at most {layers * heads}, the number of heads")
    text = jnp.asarray(text)
    on_image = jnp.asarray(weights)[..., jnp.asarray(image)]
    read = jnp.where(text[:, None, :, None], on_image, 0).sum(-2)  # [L, B, N, M]
    by_head = jnp.moveaxis(read, 0, 1).reshape(read.shape[1], layers * heads, -1)
    _, best = jax.lax.top_k(by_head.sum(-1), top)
    kept = jnp.take_along_axis(by_head, best[..., None], 1).mean(1)
    return Grounding(kept / text.sum(1, keepdims=True), jnp.stack(jnp.divmod(best, heads), -1))


def to_patches(visual: Float[Array, "*b m"], resampler: Float[Array, "*#b n m p"]) -> Float[Array, "*b p"]:
    """Returns the map over P patches from one over the M visual tokens that a resampler made of them.

        patch_p = Σ_m visual_m Ā_mp,   Ā the mean over the heads of the resampler's cross-attention

    Rows of weights sum to 1, so the sum of the map stays what it is.

    Args:
        visual: [..., M].
        resampler: [..., N, M, P], its weights.
    """
    return jnp.einsum("...m,...mp->...p", visual, jnp.asarray(resampler).mean(-3), precision="highest")


class Region(NamedTuple):
    """A region of an image.

    Attributes:
        centre: (y, x), its centre of mass by the map, in patches.
        inside: [H, W], the patches of the region.
    """

    centre: tuple[float, float]
    inside: Bool[np.ndarray, "h w"]


def largest_region(grid: Float[Any, "h w"], threshold: float = 0.5) -> Region:
    """Returns the largest connected region of a map above a share of its largest number; of equal ones the heavier.

    Patches are connected by their sides. NaN as the centre where the map has no positive number.

    Args:
        grid: [H, W].
        threshold: The share, above 0 and at most 1.

    Raises:
        ValueError: `threshold` is out of range.
    """
    from scipy.ndimage import center_of_mass, label

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}: need a share above 0, at most 1")
    values = np.asarray(grid, np.float64)
    if not np.nanmax(values, initial=0) > 0:
        return Region((float("nan"), float("nan")), np.zeros(values.shape, bool))
    numbers, count = label(values >= threshold * np.nanmax(values))
    size = lambda n: ((numbers == n).sum(), values[numbers == n].sum())  # noqa: E731
    inside = numbers == max(range(1, count + 1), key=size)
    y, x = center_of_mass(np.where(inside, values, 0))
    return Region((float(y), float(x)), inside)
