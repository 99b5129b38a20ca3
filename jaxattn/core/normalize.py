"""Normalisers: how scores become weights.

A normaliser is a part with `weights(scores [..., N, T, S], visible) -> (weights, lse)`: the definition, on whole rows.
`lse` [..., N, T] is the log of a row's total weight before normalisation. A row that sees no key has weights 0 and
lse −inf.

One that can be computed a few keys at a time (a *streaming* normaliser) also has

    reference(scores)              a number per row that keeps weights in range (the maximum so far); it cancels out
    weight(scores, reference)      the weight of each key before normalisation, elementwise and differentiable;
                                   a hidden key has score −inf and must get weight 0 and gradient 0
    finish(numerator, total, reference) -> (out, lse)

with numerator = Σ weight·value [..., N, T, V] and total = Σ weight [..., N, T]. Weights under two references differ by
the factor exp(reference − reference'). `finish` is ordinary JAX and may ignore how `reference` depends on the scores.
"""

import abc

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.parts import part

Scores = Float[Array, "*b n t s"]
Rows = Float[Array, "*b n t"]


class Normalize(abc.ABC):
    """What a part must offer to stand in the normalize slot."""

    @abc.abstractmethod
    def weights(self, scores: Scores, visible: Bool[Array, "*b n t s"]) -> tuple[Scores, Rows]:
        """(weights, lse) of whole rows: the definition."""


class Streaming(Normalize):
    """A normaliser that needs a few keys at a time; see the head of this file."""

    @abc.abstractmethod
    def reference(self, scores: Scores) -> Rows:
        """A number per row that keeps weights in range."""

    @abc.abstractmethod
    def weight(self, scores: Scores, reference: Rows) -> Scores:
        """The weight of each key before normalisation."""

    @abc.abstractmethod
    def finish(self, numerator: Float[Array, "*b n t v"], total: Rows, reference: Rows) -> tuple[Array, Rows]:
        """(out, lse) from the sums over keys."""


def safe_log(x: Array) -> Array:
    """log x for x > 0 and −inf for x = 0, with gradient 0 there."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


@part
class Softmax(Streaming):
    """weight_j = exp(s_j) / (exp(b) + Σ_i exp(s_i)), lse = log(exp(b) + Σ_i exp(s_i)).

    b is the head's `null_logit` [N], the score of a key whose value is zero: a learned sink that lets a head attend
    to nothing. Without it (b = −∞) this is softmax; b = 0 is softmax-off-by-one. With it, out = σ(lse₀ − b) · out₀
    where out₀, lse₀ are those of plain softmax. A row that sees no key has lse = −inf, null logit or not.
    """

    null_logit: Float[Array, " heads"] | None = None

    def weights(self, scores, visible):
        heads = scores.shape[-3]
        if self.null_logit is not None and jnp.shape(self.null_logit) != (heads,):
            raise ValueError(f"null_logit has shape {jnp.shape(self.null_logit)}: need one per head, ({heads},)")
        scores = jnp.where(visible, scores, -jnp.inf)
        null = None if self.null_logit is None else jnp.asarray(self.null_logit, scores.dtype)[:, None]
        top = scores.max(-1) if null is None else jnp.maximum(scores.max(-1), null)
        top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
        weights = jnp.exp(scores - top[..., None])
        seen = visible.any(-1)
        total = weights.sum(-1) + (0 if null is None else jnp.where(seen, jnp.exp(null - top), 0))
        lse = jnp.where(seen, top + safe_log(total), -jnp.inf)
        return weights / jnp.where(total > 0, total, 1)[..., None], lse

    def reference(self, scores):
        return scores.max(-1)

    def weight(self, scores, reference):
        return jnp.exp(scores - reference[..., None])

    def finish(self, numerator, total, reference):
        seen = total > 0
        out = numerator / jnp.where(seen, total, 1)[..., None]
        lse = reference + jnp.log(jnp.where(seen, total, 1))
        if self.null_logit is not None:
            null = jnp.asarray(self.null_logit, lse.dtype)[:, None]
            out = out * jax.nn.sigmoid(lse - null)[..., None]
            lse = jnp.logaddexp(lse, null)
        return out, jnp.where(seen, lse, -jnp.inf)


@part
class Sigmoid(Streaming):
    """weight_j = σ(s_j + bias), each key on its own, no normalisation over keys; lse = log Σ_j σ(s_j + bias).

    Changing one key leaves the weights of the others as they are, so no sink can form (the attention-sink study of
    Gu et al., 2024). The scale of `out` grows with the number S of visible keys: a bias of −log S lets the weights of
    a row start with a sum near 1.
    """

    bias: float = 0.0

    def weights(self, scores, visible):
        weights = jnp.where(visible, jax.nn.sigmoid(scores + self.bias), 0)
        return weights, safe_log(weights.sum(-1))

    def reference(self, scores):
        return jnp.zeros_like(scores[..., 0])

    def weight(self, scores, reference):
        return jax.nn.sigmoid(scores + self.bias)

    def finish(self, numerator, total, reference):
        return numerator, safe_log(total)
