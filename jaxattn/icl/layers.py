"""Merged attention layers as predictors: they see the examples as tokens (x_j, y_j), and the question as (x, 0)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.merged import LinearSelfAttention, SoftmaxHeads
from jaxattn.core.part import part
from jaxattn.icl.predict import Predictor, shown


def _tokens(
    x: Float[Array, "n d"], y: Float[Array, "n ..."], seen: Bool[Array, " n"], query: Float[Array, " d"]
) -> tuple[Float[Array, "n e"], Float[Array, " e"]]:
    """Returns the tokens of the examples, zeros for those not seen, and the token of the question."""
    x, y = shown(x, y, seen)
    labels = y.reshape(len(y), -1)
    question = jnp.concatenate([query, jnp.zeros(labels.shape[1], query.dtype)])
    return jnp.concatenate([x, labels.astype(x.dtype)], -1), question


@part
class LinearLayers(Predictor):
    """Answers with the label of the question after layers of linear self-attention, or with minus that.

    Attributes:
        layers: Layers whose matrices are [d + m, d + m] for answers of m channels. Their arrays train as they are.
        negate: Whether the answer is minus the label.
    """

    layers: tuple[LinearSelfAttention, ...]
    negate: bool = False

    def answer(self, x, y, seen, query):
        examples, question = _tokens(x, y, seen, query)
        z, seen = jnp.concatenate([examples, question[None]]), jnp.append(seen, True)
        for layer in self.layers:
            z = layer(z, seen)
        answer = z[-1, query.shape[0] :].reshape(y.shape[1:])
        return -answer if self.negate else answer


@part
class SoftmaxLayer(Predictor):
    """Answers with what softmax heads read from the examples for the question (He et al., 2025); 0 without examples.

    Attributes:
        heads: Heads with `kq` [H, d + m, d + m] and `ov` [H, d + 1], or [H, m, d + m] for answers of m channels.
    """

    heads: SoftmaxHeads

    def answer(self, x, y, seen, query):
        examples, question = _tokens(x, y, seen, query)
        return self.heads(question[None], examples, seen).reshape(y.shape[1:])
