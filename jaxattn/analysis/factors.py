"""The two matrices of a head, read from its weights: where it looks (QK), and what it writes (OV).

Both are products of a tall and a wide map, of rank H or less, and stay factored: a matrix over the vocabulary is never
formed. (Elhage et al., 2021.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from jaxattn import nn
from jaxattn.core.part import part


@part
class Factored:
    """The matrix left · right, [..., R, C] of rank H or less.

    Attributes:
        left: [..., R, H].
        right: [..., H, C].
    """

    left: Float[Array, "*b r h"]
    right: Float[Array, "*b h c"]

    __array_ufunc__ = None  # so that NumPy leaves `array @ factored` to the method below

    @property
    def T(self) -> "Factored":
        """The transpose."""
        return Factored(self.right.swapaxes(-1, -2), self.left.swapaxes(-1, -2))

    @property
    def array(self) -> Float[Array, "*b r c"]:
        """The matrix itself."""
        return self.left @ self.right

    def __matmul__(self, other: Any) -> "Factored":
        if isinstance(other, Factored):
            return Factored(self.left, self.right @ other.left @ other.right)
        return Factored(self.left, self.right @ other)

    def __rmatmul__(self, other: Array) -> "Factored":
        return Factored(other @ self.left, self.right)

    def __getitem__(self, index: Any) -> "Factored":
        """Returns the factors of some of the matrices, by leading axes."""
        return Factored(self.left[index], self.right[index])

    def norm(self) -> Float[Array, "*b"]:
        """Returns the Frobenius norm, √tr(LᵀL · RRᵀ), from two H x H matrices."""
        grams = (self.left.swapaxes(-1, -2) @ self.left) * (self.right @ self.right.swapaxes(-1, -2))
        return jnp.sqrt(jnp.maximum(grams.sum((-1, -2)), 0))

    def svd(self) -> tuple[Float[Array, "*b r m"], Float[Array, "*b m"], Float[Array, "*b m c"]]:
        """Returns (U, S, Vᵀ) with U diag(S) Vᵀ the matrix, from an SVD of H x H numbers."""
        q_left, r_left = jnp.linalg.qr(self.left)
        q_right, r_right = jnp.linalg.qr(self.right.swapaxes(-1, -2))
        u, s, v = jnp.linalg.svd(r_left @ r_right.swapaxes(-1, -2), full_matrices=False)
        return q_left @ u, s, v @ q_right.swapaxes(-1, -2)

    def eigenvalues(self) -> Complex[np.ndarray, "*b h"]:
        """Returns the eigenvalues that may differ from 0: those of the H x H matrix right · left."""
        return np.linalg.eigvals(np.asarray(self.right @ self.left))


class Weights:
    """The maps of all heads of a model.

    Attributes:
        query: [L, N, D, H].
        key: [L, N, D, H]; heads that share keys have the same.
        value: [L, N, D, H].
        out: [L, N, H, D].
        position: The part that turns queries and keys, or None.
        shared: N / K, how many heads read a key head.
    """

    def __init__(self, model: Any, *, gains: bool = True, biases: bool = False):
        layers, self.position, self.shared = [], None, 1
        for run, count in zip(model.runs, model.lengths, strict=True):
            branches = [branch for branch in run.branches if isinstance(branch.module, nn.MultiHeadAttention)]
            if len(branches) != 1 or branches[0].module.keys_from != "self" or branches[0].module.out is None:
                raise ValueError("model has a layer without one attention of its own keys: need one in every layer")
            made = len(branches[0].module.query.kernel[...])  # 1 where layers share their parameters
            maps = _maps(branches[0], made, gains, biases)
            layers.append(tuple(jnp.broadcast_to(each, (count, *each.shape[1:])) for each in maps))
            self.position = branches[0].module.position
            self.shared = branches[0].module.heads // branches[0].module.key_heads
        shapes = {tuple(x.shape[1:] for x in maps) for maps in layers}
        if len(shapes) != 1:
            raise ValueError(f"the layers have maps of different shapes, {sorted(shapes)}: need the same in all")
        self.query, self.key, self.value, self.out = (jnp.concatenate(maps) for maps in zip(*layers, strict=True))


def _normed(norm: Any, kernel: Array) -> Array:
    """Returns the kernel [..., D, C] with the norm before it folded in, but for its scale and its bias."""
    if not isinstance(norm, nn.RMSNorm | nn.LayerNorm):
        return kernel
    if norm.scale is not None:
        offset = norm.offset if isinstance(norm, nn.RMSNorm) else 0.0
        kernel = (offset + norm.scale[...])[..., None] * kernel
    return kernel - kernel.mean(-2, keepdims=True) if isinstance(norm, nn.LayerNorm) else kernel


def _maps(branch: Any, count: int, gains: bool, biases: bool) -> tuple[Array, ...]:
    """Returns (query, key, value, out) of one run of layers, each by layer and head."""
    module, norm = branch.module, branch.norm if gains else None
    heads, key_heads, width = module.heads, module.key_heads, module.head_dim

    def into(map_: Any, own: int) -> Array:
        kernel = map_.kernel[...]  # [l, D, own * H]
        bias = jnp.zeros((count, kernel.shape[-1]), kernel.dtype) if map_.bias is None else map_.bias[...]
        if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            bias = bias + jnp.einsum("ld,ldh->lh", norm.bias[...], kernel)
        kernel = _normed(norm, kernel)
        kernel = jnp.concatenate([kernel, bias[:, None]], 1) if biases else kernel
        return jnp.repeat(kernel.reshape(count, -1, own, width).swapaxes(1, 2), heads // own, 1)

    out = module.out.kernel[...].reshape(count, heads, width, -1)
    if biases:  # the last column is the 1 of what it is applied to, which the head does not write
        out = jnp.concatenate([out, jnp.zeros((*out.shape[:-1], 1), out.dtype)], -1)
    return into(module.query, heads), into(module.key, key_heads), into(module.value, key_heads), out


def qk(model: Any, *, offset: int = 0, gains: bool = True, biases: bool = False) -> Factored:
    """Returns W_Q R(Δ) W_Kᵀ of every head, [L, N, D, D]: the score of x_i and x_j is x_i QK x_jᵀ times the scale.

    Args:
        model: A `Transformer` whose layers have attention of the same sizes.
        offset: Δ = i − j, how many tokens the key stands before the query. There is no one QK under rotary positions:
            0 is what content alone says.
        gains: Whether the gain of the norm before (and the centring of LayerNorm) is part of the maps, so that they
            apply to x divided by its scale.
        biases: Whether x has a further entry 1, the last, by which biases are applied, [D + 1, D + 1].

    Raises:
        ValueError: A layer has no attention of its own keys, or layers differ in sizes.
    """
    weights = Weights(model, gains=gains, biases=biases)
    query = weights.query
    if weights.position is not None and offset:
        turned = jnp.moveaxis(query.reshape(-1, *query.shape[-2:]), 0, 1)[None]  # [1, D, L N, H]: all at one position
        at = jnp.full((1, turned.shape[1]), offset)
        query = jnp.moveaxis(weights.position(turned, at)[0], 1, 0).reshape(query.shape)
    return Factored(query, weights.key.swapaxes(-1, -2))


def ov(model: Any, *, gains: bool = True, biases: bool = False) -> Factored:
    """Returns W_V W_O of every head, [L, N, D, D]: what it writes of a token x that it reads in full is x OV.

    Args:
        model: As of `qk`.
        gains: As of `qk`.
        biases: As of `qk`.

    Raises:
        ValueError: As of `qk`.
    """
    weights = Weights(model, gains=gains, biases=biases)
    return Factored(weights.value, weights.out)


def composition(first: Factored, second: Factored) -> Float[Array, "..."]:
    """Returns ‖A B‖ / (‖A‖ ‖B‖) for every matrix A of `first` and B of `second`, in Frobenius norms.

    With A = OV of the heads, B = QK is query composition, B = QKᵀ key composition, and B = OV value composition. Two
    matrices of independent normal entries have about D^−½, which is the number to compare with.

    Args:
        first: [*a, R, D], in factors of rank H.
        second: [*b, D, C].
    """
    ours, theirs = first.left.shape[:-2], second.left.shape[:-2]
    a, b = (
        Factored(x.left.reshape(-1, *x.left.shape[-2:]), x.right.reshape(-1, *x.right.shape[-2:]))
        for x in (first, second)
    )
    before = a.left.swapaxes(-1, -2) @ a.left  # [A, H, H]
    after = b.right @ b.right.swapaxes(-1, -2)

    def with_all(given: tuple[Array, Array]) -> Array:
        gram, right = given
        inner = right @ b.left  # [B, H, H]
        return jnp.sqrt(jnp.maximum(jnp.einsum("bij,bjk,bik->b", gram[None] @ inner, after, inner), 0))

    norms = jax.lax.map(with_all, (before, a.right))
    return (norms / (a.norm()[:, None] * b.norm())).reshape(*ours, *theirs)


def copying(model: Any) -> Float[np.ndarray, "layers n"]:
    """Returns Re Σ λ / Σ |λ| over the eigenvalues λ of W_E OV W_U of every head, from −1 to 1.

    A head that raises the logits of the tokens that it reads is near 1 (Elhage et al., 2021). The gain of the last norm
    is part of W_U, and the vocabulary by vocabulary matrix is never formed.

    Args:
        model: As of `qk`, with a table of tokens and a head.

    Raises:
        ValueError: As of `qk`, or the model has no table of tokens or no head.
    """
    if not isinstance(model.embed, nn.TokenEmbedding) or not isinstance(model.head, nn.Head):
        raise ValueError("model has no table of tokens or no head: need TokenEmbedding and Head")
    table = model.embed.table[...]
    unembed = table.T if model.head.map is None else model.head.map.kernel[...]
    unembed = _normed(model.norm, unembed)
    values = (ov(model) @ (unembed @ table)).eigenvalues()
    return values.real.sum(-1) / np.abs(values).sum(-1)
