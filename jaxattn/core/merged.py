"""Attention whose projections are merged: W_Kᵀ W_Q into one matrix per head, and W_O W_V into another.

These layers are those of the theory of learning in context. They are `linear_attention` and `attend` on tokens as they
are. Their matrices have all D² entries, where a head of H channels has rank H.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.attend.api import attend, attention_weights
from jaxattn.core.attend.mask import Mask
from jaxattn.core.attend.score import Bilinear
from jaxattn.core.checks import check_positive
from jaxattn.core.linear.api import linear_attention
from jaxattn.core.linear.recurrence import Read
from jaxattn.core.matmul import product
from jaxattn.core.part import part

Scale = Literal["context", "running"] | float


@part
class LinearSelfAttention:
    """z_t ← z_t + W_PV Σ_j z_j (z_jᵀ W_KQ z_t) / scale, over the tokens j that t may see. The last token is the query.

    Von Oswald et al. (2023), Ahn et al. (2023) and Zhang et al. (2024) differ in the matrices, in the sign with which
    the answer is read, and in whether the query is a key (`jaxattn.icl.one_gradient_step` has all three).

    Attributes:
        kq: W_KQ [D, D], key channels by query channels.
        pv: W_PV [D, D], output channels by input channels.
        scale: "context" divides by the number of examples, which are the tokens seen but for the query (1 if there are
            none). A positive number is a constant divisor, for example that of training. With "running" the layer is
            causal, and a token divides by the number of tokens that it sees. The scale is part of the compiled program.
        mask_query: The query is not a key; with "running", no token is its own key.

    Raises:
        TypeError: `scale` is neither a string nor a Python number, for example an array.
        ValueError: The matrices are not square and of one size, or `scale` is anything else.
    """

    kq: Float[Array, "d d"]
    pv: Float[Array, "d d"]
    scale: Scale = "context"
    mask_query: bool = True

    def __post_init__(self):
        shapes = jnp.shape(self.kq), jnp.shape(self.pv)
        if len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1] or shapes[0] != shapes[1]:
            raise ValueError(f"LinearSelfAttention: kq and pv are {shapes[0]} and {shapes[1]}: need [D, D] and [D, D]")
        needed = "need 'context', 'running' or a positive Python number"
        if isinstance(self.scale, str):
            if self.scale not in get_args(get_args(Scale)[0]):
                raise ValueError(f"LinearSelfAttention: scale is {self.scale!r}: {needed}")
        elif isinstance(self.scale, int | float):
            check_positive("LinearSelfAttention", "scale", self.scale)
        else:
            raise TypeError(f"LinearSelfAttention: scale is {self.scale!r}: {needed}")

    def __call__(self, z: Float[Array, "*b t d"], seen: Bool[Array, "*#b t"] | None = None) -> Float[Array, "*b t d"]:
        """Returns the tokens after the layer.

        Args:
            z: The tokens [..., T, D].
            seen: Booleans [..., T], by default True. Tokens that are not seen are not keys.

        Raises:
            ValueError: Tokens have another width, or `seen` does not fit.
        """
        seen = _seen("LinearSelfAttention", z, seen, len(self.kq))
        running, last = self.scale == "running", jnp.arange(z.shape[-2]) == z.shape[-2] - 1
        keys = seen & ~last if self.mask_query and not running else seen
        pairs = (product(z, self.kq.T), jnp.where(keys[..., None], z, 0), product(z, self.pv.T))
        read: Read = ("pre" if self.mask_query else "post") if running else "all"
        sums, _ = linear_attention(*(x[..., None, :] for x in pairs), read=read)
        if running:
            counts = jnp.cumsum(keys, -1) - (keys if self.mask_query else 0)
        else:
            counts = (seen & ~last).sum(-1, keepdims=True)
        scale = jnp.maximum(counts, 1)[..., None] if isinstance(self.scale, str) else self.scale
        return z + (sums[..., 0, :] / scale).astype(z.dtype)


@part
class SoftmaxHeads:
    """out_t = Σ_h Σ_j p_htj OV_h z_j with p_ht = softmax_j(z_jᵀ KQ_h q_t): softmax attention without a scale.

    With scalar outputs and one query, which is not a key, the layer is the regressor of He et al. (2025).

    Attributes:
        kq: KQ [H, D, D'], key channels by query channels.
        ov: OV [H, D] for one output, or [H, M, D] for M.

    Raises:
        ValueError: Shapes do not fit.
    """

    kq: Float[Array, "h d e"]
    ov: Float[Array, "h *m d"]

    def __post_init__(self):
        kq, ov = jnp.shape(self.kq), jnp.shape(self.ov)
        if len(kq) != 3 or len(ov) not in (2, 3) or kq[0] != ov[0] or kq[1] != ov[-1]:
            raise ValueError(f"SoftmaxHeads: kq and ov are {kq} and {ov}: need [H, D, D'] and [H, D] or [H, M, D]")

    def __call__(
        self,
        query: Float[Array, "*b t e"],
        z: Float[Array, "*b s d"],
        seen: Bool[Array, "*#b s"] | None = None,
        *,
        mask: Mask | None = None,
    ) -> Float[Array, "..."]:
        """Returns what the queries read from the tokens, [..., T] or [..., T, M]; 0 where they see none.

        Args:
            query: The queries [..., T, D'].
            z: The tokens [..., S, D].
            seen: Booleans [..., S], by default True. Tokens that are not seen are not keys.
            mask: A mask of `attend`.

        Raises:
            ValueError: Widths or masks do not fit.
        """
        call = self._call(query, z, seen)
        values = product(z, self.ov.reshape(-1, self.ov.shape[-1]).T).reshape(*z.shape[:-1], len(self.ov), -1)
        out = attend(value=values, **call, mask=mask).sum(-2)
        return out.reshape(*out.shape[:-1], *self.ov.shape[1:-1])

    def weights(
        self,
        query: Float[Array, "*b t e"],
        z: Float[Array, "*b s d"],
        seen: Bool[Array, "*#b s"] | None = None,
        *,
        mask: Mask | None = None,
    ) -> Float[Array, "*b h t s"]:
        """Returns p, the weight of every token for every query and head."""
        return attention_weights(**self._call(query, z, seen), mask=mask)[0]

    def _call(self, query: Array, z: Array, seen: Array | None) -> dict:
        seen = _seen("SoftmaxHeads", z, seen, self.kq.shape[1])
        if query.shape[-1] != self.kq.shape[2]:
            raise ValueError(f"SoftmaxHeads: query has {query.shape[-1]} channels: need {self.kq.shape[2]}, as kq has")
        spread = jnp.broadcast_to(query[..., None, :], (*query.shape[:-1], len(self.kq), query.shape[-1]))
        positions = jnp.where(seen, jnp.arange(z.shape[-2]), -1)
        score = Bilinear(self.kq.swapaxes(-1, -2))
        return {"query": spread, "key": z[..., None, :], "score": score, "key_positions": positions}


def _seen(owner: str, z: Array, seen: Array | None, width: int) -> Bool[Array, "*b t"]:
    """Returns the mask, or that of all tokens; raises ValueError unless tokens have this width and the mask fits."""
    if z.ndim < 2 or z.shape[-1] != width:
        raise ValueError(f"{owner}: z has shape {z.shape}: need [..., T, {width}]")
    if seen is None:
        return jnp.ones(z.shape[-2], bool)
    if seen.shape[-1:] != z.shape[-2:-1] or seen.dtype != bool:
        raise ValueError(f"{owner}: seen is {seen.dtype}{list(seen.shape)}: need bool [..., {z.shape[-2]}]")
    return seen
