"""The two matrices of a head, read from its weights: where it looks (QK), and what it writes (OV).

Both are products of a tall and a wide map, of rank H or less, and stay factored: a matrix over the vocabulary is never
formed. (Elhage et al., 2021.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from jaxattn import nn
from jaxattn.core.attend.score import Dot
from jaxattn.core.part import part
from jaxattn.nn.spec import part_of


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
        positions: The part that turns queries and keys, or None, by layer.
        attentions: The attention of every run of layers, for what else it does.
    """

    def __init__(self, model: Any, *, gains: bool = True, biases: bool = False):
        layers: list[tuple[Array, ...]] = []
        self.positions: list[Any] = []
        self.attentions: list[nn.MultiHeadAttention] = []
        for run, count in zip(model.runs, model.lengths, strict=True):
            branches = [branch for branch in run.branches if isinstance(branch.module, nn.MultiHeadAttention)]
            if len(branches) != 1 or branches[0].module.keys_from != "self" or branches[0].module.out is None:
                raise ValueError("model has a layer without one attention of its own keys: need one in every layer")
            layers.append(_maps(branches[0], count, gains, biases))
            self.positions += [branches[0].module.position] * count
            self.attentions.append(branches[0].module)
        shapes = {tuple(x.shape[1:] for x in maps) for maps in layers}
        if len(shapes) != 1:
            raise ValueError(f"the layers have maps of different shapes, {sorted(shapes)}: need the same in all")
        self.query, self.key, self.value, self.out = (jnp.concatenate(maps) for maps in zip(*layers, strict=True))

    def refuse(self, what: str, why: str, has: Callable[[nn.MultiHeadAttention], bool]) -> None:
        """Raises ValueError if there is an attention that has what makes `what` no matrix."""
        if any(map(has, self.attentions)):
            raise ValueError(f"the attention of the model {why}: need attention without, whose {what} is a matrix")


def _normed(norm: Any, kernel: Array) -> Array:
    """Returns the kernel [..., D, C] with the norm before it folded in, but for its scale and its bias."""
    if not isinstance(norm, nn.RMSNorm | nn.LayerNorm):
        return kernel
    if norm.scale is not None:
        kernel = _gain(norm)[..., None] * kernel
    return kernel - kernel.mean(-2, keepdims=True) if isinstance(norm, nn.LayerNorm) else kernel


def _gain(norm: Any) -> Array:
    return norm.scale[...] + (norm.offset if isinstance(norm, nn.RMSNorm) else 0.0)


def _maps(branch: Any, count: int, gains: bool, biases: bool) -> tuple[Array, ...]:
    """Returns (query, key, value, out) of one run of layers, each by layer and head."""
    module, norm = branch.module, branch.norm if gains else None
    if branch.gate is not None:
        raise ValueError(f"a branch has the gate {type(branch.gate).__name__}: what its heads write is no product")
    heads, key_heads, width = module.heads, module.key_heads, module.head_dim

    def by_layer(x: Array) -> Array:  # layers that share their parameters have an axis of 1
        return jnp.broadcast_to(x, (count, *x.shape[1:]))

    def into(map_: Any, own: int) -> Array:
        kernel = map_.kernel[...]  # [l, D, own * H]
        bias = jnp.zeros((len(kernel), kernel.shape[-1]), kernel.dtype) if map_.bias is None else map_.bias[...]
        if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            bias = bias + jnp.einsum("ld,ldh->lh", norm.bias[...], kernel)
        kernel = _normed(norm, kernel)
        kernel = jnp.concatenate([kernel, bias[:, None]], 1) if biases else kernel
        kernel = by_layer(kernel)
        return jnp.repeat(kernel.reshape(count, -1, own, width).swapaxes(1, 2), heads // own, 1)

    out = module.out.kernel[...]  # [l, N * H, D]
    if gains and isinstance(branch.norm_after, nn.RMSNorm | nn.LayerNorm):
        out = out - out.mean(-1, keepdims=True) if isinstance(branch.norm_after, nn.LayerNorm) else out
        out = out if branch.norm_after.scale is None else out * _gain(branch.norm_after)[:, None]
    if branch.scale is not None:
        out = out * branch.scale[...][:, None]
    out = by_layer(out).reshape(count, heads, width, -1)
    if biases:  # the last column is the 1 of what it is applied to, which the head does not write
        out = jnp.concatenate([out, jnp.zeros((*out.shape[:-1], 1), out.dtype)], -1)
    return into(module.query, heads), into(module.key, key_heads), into(module.value, key_heads), out


def qk(model: Any, *, offset: int = 0, gains: bool = True, biases: bool = False) -> Factored:
    """Returns W_Q R(Δ) W_Kᵀ of every head, [L, N, D, D]: the score of x_i and x_j is x_i QK x_jᵀ times the scale.

    Scores are meant before their bias, maps and mask. R is that of each layer, with the factor that some scalings of
    rotary positions have.

    Args:
        model: A `Transformer` whose layers have attention of the same sizes.
        offset: Δ = i − j, how many tokens the key stands before the query. There is no one QK under rotary positions:
            0 is what content alone says. Negative for keys behind the query.
        gains: Whether the gain of the norm before (and the centring of LayerNorm) is part of the maps, so that they
            apply to x divided by its scale.
        biases: Whether x has a further entry 1, the last, by which biases are applied, [D + 1, D + 1].

    Raises:
        ValueError: A layer has no attention of its own keys, layers differ in sizes, or scores are not bilinear in the
            stream: queries and keys are normed or convolved, or the score is no dot product.
    """
    weights = Weights(model, gains=gains, biases=biases)
    if gains:
        why = "norms its queries and keys (gains=False gives the maps without any norm)"
        weights.refuse("QK", why, lambda module: module.query_norm is not None)
    weights.refuse("QK", "has a convolution", lambda module: bool(module.convolution))
    weights.refuse("QK", "has a score other than Dot", lambda module: not isinstance(part_of(module.score), Dot))

    def turned(maps: Array, at: int) -> Array:
        """Returns the maps [L, N, D, H] of tokens at one position."""
        by_layer = zip(weights.positions, maps.swapaxes(1, 2), strict=True)  # each [D, N, H]
        places = jnp.full(maps.shape[2], at)
        return jnp.stack([x if position is None else position(x, places) for position, x in by_layer]).swapaxes(1, 2)

    first = max(-offset, 0)  # where the key stands; -1 would be padding
    return Factored(turned(weights.query, first + offset), turned(weights.key, first).swapaxes(-1, -2))


def ov(model: Any, *, gains: bool = True, biases: bool = False) -> Factored:
    """Returns W_V W_O of every head, [L, N, D, D]: what it writes of a token x that it reads in full is x OV.

    LayerScale is part of W_O.

    Args:
        model: As of `qk`.
        gains: As of `qk`; also the gain of a norm behind attention, so that what is written is x OV over its scale.
        biases: As of `qk`.

    Raises:
        ValueError: A layer has no attention of its own keys, layers differ in sizes, or values are convolved, or what
            heads read is gated.
    """
    weights = Weights(model, gains=gains, biases=biases)
    weights.refuse("OV", "has a convolution", lambda module: bool(module.convolution))
    weights.refuse("OV", "has a gate", lambda module: module.gate is not None)
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

    A head that raises the logits of the tokens that it reads is near 1 (Elhage et al., 2021). A head that writes
    nothing has NaN. W_E is what tokens put into the stream where no positions are added, norms and maps of the
    embedding included. The gain of the last norm is part of W_U, and the vocabulary by vocabulary matrix is never
    formed.

    Args:
        model: As of `qk`, with a table of tokens and a head.

    Raises:
        ValueError: As of `ov`, or the model has no table of tokens or no head.
    """
    values = (ov(model) @ (unembedding(model) @ token_table(model))).eigenvalues()
    with np.errstate(invalid="ignore"):  # NaN for a head that writes nothing
        return values.real.sum(-1) / np.abs(values).sum(-1)


def token_table(model: Any) -> Float[Array, "v d"]:
    """Returns what every token puts into the stream where no positions are added, norms and maps of it included.

    Raises:
        ValueError: The model has no table of tokens.
    """
    if not isinstance(model.embed, nn.TokenEmbedding):
        raise ValueError("model has no table of tokens: need TokenEmbedding")
    written = model.embed(jnp.arange(len(model.embed.table[...]))[None])[0]
    for more in (model.embed_norm, model.embed_map):
        written = written if more is None else more(written)
    return written


def unembedding(model: Any) -> Float[Array, "d v"]:
    """Returns W_U, the map from the stream over its last scale to the logits: the gain of the last norm is in it.

    Raises:
        ValueError: The model has no head.
    """
    if not isinstance(model.head, nn.Head):
        raise ValueError("model has no head: need one that gives logits of tokens")
    return _normed(model.norm, model.embed.table[...].T if model.head.map is None else model.head.map.kernel[...])
