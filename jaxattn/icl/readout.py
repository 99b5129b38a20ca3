"""The computation that attention weights describe: merged matrices of heads, and how near those are to a pattern."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.merged import LinearSelfAttention, SoftmaxHeads
from jaxattn.core.numeric import ratio


def effective_kq(
    query_kernel: Float[Array, "d n h"],
    key_kernel: Float[Array, "e k h"],
    scale: Float[Array, ""] | float | None = None,
) -> Float[Array, "n e d"]:
    """Returns scale · W_K W_Qᵀ per head, as in `SoftmaxHeads.kq`: z_jᵀ KQ z_t is the score of key z_j for query z_t.

    Query head n reads key head n // (N / K).

    Args:
        query_kernel: [inputs, heads, channels].
        key_kernel: [inputs, heads, channels].
        scale: By default H^−½.

    Raises:
        ValueError: Heads do not divide, or numbers of channels differ.
    """
    _, heads, channels = query_kernel.shape
    keys = _for_all("effective_kq", "key_kernel", key_kernel, "query_kernel", heads, channels)
    scale = channels**-0.5 if scale is None else scale
    return scale * jnp.einsum("enh,dnh->ned", keys, query_kernel)


def effective_ov(value_kernel: Float[Array, "d k v"], out_kernel: Float[Array, "n v m"]) -> Float[Array, "n m d"]:
    """Returns W_Oᵀ W_Vᵀ per head, as in `SoftmaxHeads.ov`: OV z_j is what head n writes of a token z_j.

    Args:
        value_kernel: [inputs, heads, channels].
        out_kernel: [heads, channels, outputs].

    Raises:
        ValueError: Heads do not divide, or numbers of channels differ.
    """
    heads, channels, _ = out_kernel.shape
    values = _for_all("effective_ov", "value_kernel", value_kernel, "out_kernel", heads, channels)
    return jnp.einsum("nvm,dnv->nmd", out_kernel, values)


def _for_all(
    owner: str, name: str, kernel: Float[Array, "d k c"], other: str, heads: int, channels: int
) -> Float[Array, "d n c"]:
    """Repeats the kernel of shared heads for all N heads of the other kernel."""
    _, shared, own = kernel.shape
    if heads % shared:
        raise ValueError(f"{owner}: {other} has {heads} heads and {name} {shared}: need a divisor")
    if own != channels:
        raise ValueError(f"{owner}: {other} has {channels} channels and {name} {own}: need the same")
    return jnp.repeat(kernel, heads // shared, 1)


def diagonality(matrix: Float[Array, "*b d d"]) -> Float[Array, "*b"]:
    """Returns Σ_i M_ii² / Σ_ij M_ij², from 0 to 1: the share of the squared norm on the diagonal. 0 for M = 0.

    A matrix of independent entries has about 1 / d.
    """
    diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    return ratio((diagonal**2).sum(-1), (matrix**2).sum((-2, -1)))


def homogeneity(matrix: Float[Array, "*b d d"]) -> Float[Array, "*b"]:
    """Returns the standard deviation of the diagonal over its root mean square: 0 for a multiple of I, 1 for mean 0."""
    diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    return ratio(diagonal.std(-1), jnp.sqrt((diagonal**2).mean(-1)))


def pattern_distance(matrix: Float[Array, "*b r c"], pattern: Float[Array, "*#b r c"]) -> Float[Array, "*b"]:
    """Returns min_c ‖M − c P‖ / ‖M‖ in the Frobenius norm.

    The distance is from 0 (a multiple of P) to 1 (orthogonal to it), and 0 for M = 0.
    """
    best = ratio((matrix * pattern).sum((-2, -1)), (pattern**2).sum((-2, -1)) + jnp.zeros(matrix.shape[:-2]))
    rest = matrix - best[..., None, None] * pattern
    return ratio(jnp.linalg.norm(rest, axis=(-2, -1)), jnp.linalg.norm(matrix, axis=(-2, -1)))


class EffectiveHeads(NamedTuple):
    """The effect of softmax heads on tokens (x, y), if KQ = diag(ω I, 0) and OV = (0, μ) (He et al., 2025).

    Attributes:
        omega: [H], the mean of the diagonal of KQ's block of x.
        mu: [H], the entry of OV for y.
        offdiagonal: [H], the root mean square of the entries of that block off its diagonal.
    """

    omega: Float[Array, " h"]
    mu: Float[Array, " h"]
    offdiagonal: Float[Array, " h"]


def effective_heads(heads: SoftmaxHeads) -> EffectiveHeads:
    """Returns (ω, μ, off-diagonal) of heads with one output, whose tokens are (x, y).

    Raises:
        ValueError: The heads have several outputs, or x has fewer than two coordinates.
    """
    if heads.ov.ndim != 2:
        raise ValueError(f"effective_heads: ov has shape {heads.ov.shape}: need one output, [H, D]")
    block = heads.kq[:, :-1, :-1]
    dim = block.shape[-1]
    if dim < 2:
        raise ValueError(f"effective_heads: kq has shape {heads.kq.shape}: need two coordinates of x and y")
    diagonal = jnp.diagonal(block, axis1=-2, axis2=-1)
    outside = jnp.where(jnp.eye(dim, dtype=bool), 0, block)
    rms = jnp.sqrt((outside**2).sum((-2, -1)) / (dim * (dim - 1)))
    return EffectiveHeads(diagonal.mean(-1), heads.ov[:, -1], rms)


def effective_gamma(layer: LinearSelfAttention) -> Float[Array, "d d"]:
    """Returns Γ = W_PV[y, y] W_KQ[x, x]ᵀ of a layer on tokens (x, y).

    The layer adds xᵀ Γ Σ_j y_j x_j / scale to the label of x. It does nothing else to the label if the rest of W_PV's
    last row and of W_KQ's last row and column is 0. Layers whose answer is minus the label (`LinearLayers.negate`) have
    −Γ here.
    """
    return layer.pv[-1, -1] * layer.kq[:-1, :-1].T
