"""Softmax attention read as linear attention: the same projections, and learned features in place of exp(q·k/√H)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.api import attention_weights
from jaxattn.core.attend.mask import Causal, Documents, visible
from jaxattn.core.attend.normalize import Softmax
from jaxattn.core.attend.score import Dot
from jaxattn.core.linear.api import append_one, divide
from jaxattn.core.linear.feature import distillation_loss
from jaxattn.core.numeric import ratio
from jaxattn.nn.attention import MultiHeadAttention
from jaxattn.nn.learned import HedgehogMap
from jaxattn.nn.recurrent import LinearInputs, Mechanism, Past
from jaxattn.nn.spec import Spec, built


class Linearized(Mechanism):
    """out = Σ_{j <= t} (φ(q_t)·ψ(k_j)) v_j / Σ_{j <= t} φ(q_t)·ψ(k_j), with q, k, v and W_o of an attention.

    The features are those of Hedgehog (Zhang et al., 2024), and the attention may be trained already. Its rotary
    positions, convolutions, norms, gate and grouped keys stay.

    Args:
        features: D, the channels of x and y.
        attention: The attention, or a spec of one.
        kind: The kind of the features, see `HedgehogFeatures`.
        dtype: The dtype of the computation, if `attention` is a spec.
        rngs: Streams for the initial parameters, if `attention` is a spec.

    Raises:
        ValueError: The attention is not causal softmax attention of scaled dot products.
    """

    def __init__(
        self,
        features: int,
        attention: Spec | MultiHeadAttention,
        *,
        kind: Literal["softmax", "exp"] = "softmax",
        dtype: Any = None,
        rngs: nnx.Rngs | None = None,
    ):
        given: MultiHeadAttention = built(attention, features=features, dtype=dtype, rngs=rngs)
        plain: dict[str, Any] = {"score": Dot(), "bias": None, "mask": Causal(), "normalize": Softmax()}
        plain |= {"score_maps": (), "weight_maps": ()}
        for name, wanted in plain.items():
            if (own := getattr(given, name)) != wanted:
                raise ValueError(f"attention has {name}={own}: features stand for causal softmax attention only")
        self.attention, self.in_features = given, given.query.in_features
        sizes = given.heads, given.head_dim
        self.feature_map = HedgehogMap(*sizes, key_heads=given.key_heads, kind=kind)

    def inputs(self, x, positions, past):
        query, (key, value) = self.attention.queries(x, past), self.attention.keys_and_values(x, past)
        query, key = self.feature_map()(*(self.attention.turn(y, positions) for y in (query, key)))
        return LinearInputs(query, key, append_one(value)), x

    def output(self, read, rest):
        return self.attention.merge(divide(read), rest)

    def divergence(self, x: Float[Array, "b t d"], ids: Int[Array, "b t"]) -> Float[Array, ""]:
        """Returns the mean over rows of −Σ_j P_j log A_j.

        P are the softmax weights of `attention`, and A those of the features. No gradient goes to P. Memory is T² per
        head.

        Args:
            x: [B, T, D].
            ids: [B, T], the document of each token, −1 for padding.
        """
        past = Past({}, ids >= 0, ids)
        query, (key, _) = self.attention.queries(x, past), self.attention.keys_and_values(x, past)
        query, key = (self.attention.turn(y, jnp.arange(x.shape[1])) for y in (query, key))
        mask = Causal() & Documents(ids)
        teacher, _ = attention_weights(query, key, mask=mask)
        phi, psi = self.feature_map()(query, key)
        psi = jnp.repeat(psi, phi.shape[-2] // psi.shape[-2], -2)
        place = jnp.arange(query.shape[1])
        shown = visible(mask, place[None, :, None], place[None, None, :])
        kernel = jnp.where(shown, jnp.einsum("btnf,bsnf->bnts", phi, psi, precision="highest"), 0)
        return distillation_loss(jax.lax.stop_gradient(teacher), ratio(kernel, kernel.sum(-1, keepdims=True)))
