"""A map from what each head of a layer writes to the vocabulary, trained to say what the model says."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.analysis.factors import ov, unembedding
from jaxattn.core.part import part
from jaxattn.trace import run
from jaxattn.trace.reducers import TokensAt


@part
class HeadLens:
    """Σ_n (head_n M_n + c_n), the lens of one layer; head n alone is read as its term (Sakarvadia et al., 2023).

    The maps are trained together, through their sum, so what a single head says is not unique: a penalty towards the
    unembedding (`head_lens_loss`) chooses.

    Attributes:
        weight: M, [N, D, V].
        bias: c, [N, V].
    """

    weight: Float[Array, "n d v"]
    bias: Float[Array, "n v"]

    @classmethod
    def of(cls, model: Any) -> "HeadLens":
        """Returns the lens at its beginning: the unembedding, with the gain of the last norm and no bias."""
        unembed = unembedding(model)
        heads = ov(model).right.shape[1]
        return cls(jnp.tile(unembed, (heads, 1, 1)), jnp.zeros((heads, unembed.shape[1])))

    def __call__(self, heads: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Returns the logits of each head; their sum over heads is the lens."""
        return jnp.einsum("bnd,ndv->bnv", heads, self.weight) + self.bias


def last_heads(
    model: Any, tokens: Int[Array, "b t"], layer: int, **options: Any
) -> tuple[Float[Array, "b n d"], Float[Array, "b v"]]:
    """Returns what each head of a layer writes at the last token, and the log-probabilities of the model there.

    Args:
        model: As of `ov`.
        tokens: [B, T].
        layer: The layer.
        options: Other arguments of the model, without `positions`.
    """
    last = jnp.asarray([tokens.shape[1] - 1])
    record = {"z": ("z", TokensAt(last))}
    logits, seen = run(model, jnp.asarray(tokens), record=record, logits_at=last, **options)
    written = jnp.einsum("bnh,nhd->bnd", seen["z"][layer][:, 0], ov(model).right[layer], precision="highest")
    return written, jax.nn.log_softmax(logits[:, 0])


def head_lens_loss(
    lens: HeadLens,
    heads: Float[Array, "b n d"],
    target: Float[Array, "b v"],
    *,
    unembed: Float[Array, "d v"] | None = None,
    penalty: float = 0.0,
) -> Float[Array, ""]:
    """Returns the mean KL(model ‖ softmax of the lens) in nats, plus penalty / 2 · Σ_n ‖M_n − W_U‖².

    Args:
        lens: The lens, in which it is trained.
        heads: As `last_heads` returns them.
        target: Log-probabilities of the model.
        unembed: W_U, for the penalty.
        penalty: At least 0; above it needs `unembed`.
    """
    found = jax.nn.log_softmax(lens(heads).sum(1))
    loss = (jnp.exp(target) * (target - found)).sum(-1).mean()
    if unembed is None:
        return loss
    return loss + penalty / 2 * jnp.square(lens.weight - unembed).sum()
