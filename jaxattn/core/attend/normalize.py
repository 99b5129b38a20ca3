"""Normalisers: how scores become weights.

A normaliser is a part with `weights(scores [..., N, T, S], tile) -> (weights, lse)` on whole rows. `lse` [..., N, T]
is the log of a row's total weight before normalisation. A row that sees no key has weights 0, and its lse is the log of
the mass that the normaliser has without keys: that of a null logit, else −inf. `tile.visible` has the shape of the
scores.

A normaliser that can be computed a few keys at a time (a *streaming* normaliser) is defined by

    reference(scores)              a number per row that keeps weights in range (the maximum so far); it cancels out
    weight(scores, reference)      the weight of each key before normalisation, elementwise and differentiable;
                                   hidden keys arrive with score −inf: return weight 0 for them, with a zero gradient
    finish(numerator, total, reference) -> (out, lse)

with numerator = Σ weight·value [..., N, T, V] and total = Σ weight [..., N, T]. Weights under two references differ by
the factor exp(reference − reference'). `finish` is ordinary JAX and may ignore how `reference` depends on the scores.
"""

import abc

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core import noise
from jaxattn.core.attend.tile import Tile
from jaxattn.core.checks import check_positive, check_static_int
from jaxattn.core.mesh import vary_like
from jaxattn.core.noise import Seed
from jaxattn.core.numeric import in_range, largest, per_head, ratio
from jaxattn.core.part import part

Scores = Float[Array, "*b n t s"]
Rows = Float[Array, "*b n t"]
PerHead = Float[Array, ""] | Float[Array, " heads"] | float


class Normalize(abc.ABC):
    """The base class of parts for the normalize slot."""

    @abc.abstractmethod
    def weights(self, scores: Scores, tile: Tile) -> tuple[Scores, Rows]:
        """Returns (weights, lse) of whole rows: the definition."""


class Streaming(Normalize):
    """A normaliser that needs a few keys at a time; the head of this file says what it must offer."""

    @abc.abstractmethod
    def reference(self, scores: Scores) -> Rows:
        """Returns a number per row that keeps weights in range."""

    @abc.abstractmethod
    def weight(self, scores: Scores, reference: Rows) -> Scores:
        """Returns the weight of each key before normalisation."""

    @abc.abstractmethod
    def finish(self, numerator: Float[Array, "*b n t v"], total: Rows, reference: Rows) -> tuple[Array, Rows]:
        """Returns (out, lse) from the sums over keys."""

    def weights(self, scores, tile):
        """Takes all keys at once. The weights are the results of reading the identity matrix."""
        scores = jnp.where(tile.visible, scores, -jnp.inf)
        reference = jax.lax.stop_gradient(self.reference(scores))
        reference = jnp.where(jnp.isneginf(reference), 0, reference)
        weights = self.weight(scores, reference)
        return self.finish(weights, weights.sum(-1), reference)


def safe_log(x: Array) -> Array:
    """Returns log x for x > 0; −inf with gradient 0 for x = 0, or for an x whose reciprocal is out of range."""
    some = in_range(x)
    return jnp.where(some, jnp.log(jnp.where(some, x, 1)), -jnp.inf)


@part
class Softmax(Streaming):
    """Softmax weights, with a null logit b if given: weight_j = exp(s_j / τ) / (exp(b) + Σ_i exp(s_i / τ)).

        lse = log(exp(b) + Σ_i exp(s_i / τ))

    Without a null logit (b = −∞) the weights are softmax; b = 0 is softmax-off-by-one. With a null logit, out = σ(lse₀
    − b) · out₀, where out₀ and lse₀ are those of plain softmax. A row that sees no key has out 0 and lse b. So the
    result over all keys is the `merge` of the results over parts of them, if one part has the null logit.

    Attributes:
        null_logit: b [N], one per head, the score of a key whose value is zero: a learned sink that lets a head attend
            to nothing.
        temperature: τ > 0, one number or one per head [N], by default 1. It does not divide b.

    Raises:
        ValueError: `temperature` is a number that is not positive, or `null_logit` has another shape.
    """

    null_logit: Float[Array, " heads"] | None = None
    temperature: Float[Array, ""] | Float[Array, " heads"] | float | None = None

    def __post_init__(self):
        check_positive("Softmax", "temperature", self.temperature)

    def _tempered(self, scores: Scores) -> Scores:
        if self.temperature is None:
            return scores
        hidden = jnp.isneginf(scores)  # kept out of the division, whose gradient would be 0 · ∞
        divided = jnp.where(hidden, 0, scores) / per_head("temperature", self.temperature, scores)
        return jnp.where(hidden, -jnp.inf, divided)

    def reference(self, scores):
        return self._tempered(scores).max(-1)

    def weight(self, scores, reference):
        return jnp.exp(self._tempered(scores) - reference[..., None])

    def finish(self, numerator, total, reference):
        seen = total != 0
        out = numerator / jnp.where(seen, total, 1)[..., None]
        lse = reference + jnp.log(jnp.where(seen, total, 1))
        if self.null_logit is not None:
            if jnp.shape(self.null_logit) != (total.shape[-2],):
                raise ValueError(
                    f"null_logit has shape {jnp.shape(self.null_logit)}: need one per head, ({total.shape[-2]},)"
                )
            null = jnp.asarray(self.null_logit, lse.dtype)[:, None]
            out = out * jax.nn.sigmoid(lse - null)[..., None]
            return out, jnp.where(seen, jnp.logaddexp(lse, null), null)
        return out, jnp.where(seen, lse, -jnp.inf)


class Elementwise(Streaming):
    """A normaliser in which each key's weight depends on its own score alone.

    Changing a key leaves the weights of the others as they are. lse = log Σ_j weight_j. Normalised weights that cannot
    be 0 are taken relative to the largest of the row, so that no score is too low for them.

    Attributes:
        normalized: A row is divided by its total; rows whose total is 0 stay 0. Otherwise the scale of `out` grows with
            the number of visible keys.
    """

    normalized: bool

    def reference(self, scores):
        return jnp.zeros_like(scores[..., 0])

    def finish(self, numerator, total, reference):
        if self.normalized:
            numerator = ratio(numerator, total[..., None])
        return numerator, reference + safe_log(total)


@part
class Sigmoid(Elementwise):
    """Sigmoid weights: weight_j = σ(s_j + bias), lse = log Σ_j σ(s_j + bias).

    No sink can form where rows are not normalised (the attention-sink study of Gu et al., 2024). A bias of −log S lets
    the weights of a row start with a sum near 1. Where all s_j + bias are very negative, normalised sigmoid is softmax.

    Attributes:
        bias: One number or one per head [N], by default 0.
        normalized: Whether rows are divided by their totals.
    """

    bias: Float[Array, ""] | Float[Array, " heads"] | float | None = None
    normalized: bool = False

    def _biased(self, scores: Scores) -> Scores:
        return scores if self.bias is None else scores + per_head("bias", self.bias, scores)

    def reference(self, scores):
        return jax.nn.log_sigmoid(self._biased(scores)).max(-1) if self.normalized else super().reference(scores)

    def weight(self, scores, reference):
        if self.normalized:
            return jnp.exp(jax.nn.log_sigmoid(self._biased(scores)) - reference[..., None])
        return jax.nn.sigmoid(self._biased(scores))


@part
class Relu(Elementwise):
    """Rectified scores: weight_j = max(s_j, 0), of which many are exactly 0.

    Attributes:
        normalized: Whether rows are divided by their totals.
    """

    normalized: bool = False

    def weight(self, scores, reference):
        return jax.nn.relu(scores)


@part
class ReluSquared(Elementwise):
    """Squared rectified scores: weight_j = max(s_j, 0)².

    Attributes:
        normalized: Whether rows are divided by their totals.
    """

    normalized: bool = False

    def weight(self, scores, reference):
        return jnp.square(jax.nn.relu(scores))


@part
class Elu1(Elementwise):
    """weight_j = elu(s_j) + 1, which is s_j + 1 for s_j > 0 and exp(s_j) below: positive, with a gradient everywhere.

    Attributes:
        normalized: Whether rows are divided by their totals.
    """

    normalized: bool = False

    def reference(self, scores):
        return _log_elu1(scores).max(-1) if self.normalized else super().reference(scores)

    def weight(self, scores, reference):
        if self.normalized:
            return jnp.exp(_log_elu1(scores) - reference[..., None])
        # Not exp(min(s, 0)), whose derivative at 0 is one half of what it should be.
        return jnp.where(scores > 0, scores + 1, jnp.exp(jnp.where(scores > 0, 0, scores)))


def _log_elu1(scores: Scores) -> Scores:
    return jnp.where(scores > 0, jnp.log1p(jnp.where(scores > 0, scores, 0)), scores)


@part
class LinearWeights(Streaming):
    """The scores as weights: weight_j = s_j, which may be negative, and lse = log |Σ_j s_j|  (Gu et al., 2024).

    Normalised, weight_j = s_j / max(|Σ_i s_i|, 1), the linear kernel of the paper. Without masks or normalisation
    out = (Σ_j v_j k_jᵀ) q: linear attention.

    Attributes:
        normalized: Whether rows are divided as above.
    """

    normalized: bool = False

    def reference(self, scores):
        return jnp.zeros_like(scores[..., 0])

    def weight(self, scores, reference):
        return jnp.where(jnp.isneginf(scores), 0, scores)

    def finish(self, numerator, total, reference):
        if self.normalized:
            numerator = numerator / jnp.maximum(jnp.abs(total), 1)[..., None]
        return numerator, safe_log(jnp.abs(total))


# Normalisers of whole rows.


def _total_one(visible: Bool[Array, "*b n t s"], dtype: jnp.dtype) -> Rows:
    """Returns the lse of weights that sum to one by construction: 0, and −inf where nothing is visible."""
    return jnp.where(visible.any(-1), jnp.zeros((), dtype), -jnp.inf)


def _support(scores: Scores, visible: Bool[Array, "*b n t s"], power: int) -> tuple[Scores, Bool[Array, "*b n t s"]]:
    """Returns (x, x > τ) for x = scores less their row's maximum and the τ with Σ_j max(x_j − τ, 0)^power = 1.

    Newton's method starts from τ = −1, where the maximum alone contributes 1. The sum is convex and falls in τ, so the
    steps only ever go up, to the root. It takes some ten steps, each a pass over the row, where sorting the row would
    take far longer.
    """
    shown = jnp.where(visible, scores, -jnp.inf)
    top = jax.lax.stop_gradient(shown.max(-1, keepdims=True))
    x = jnp.where(visible, scores - jnp.where(jnp.isneginf(top), 0, top), 0)
    fixed = jax.lax.stop_gradient(jnp.where(visible, x, -jnp.inf))

    def step(state: tuple) -> tuple:
        threshold, _, count = state
        over = jnp.maximum(fixed - threshold, 0)
        excess = (over**power).sum(-1, keepdims=True) - 1
        slope = (power * over ** (power - 1) * (over > 0)).sum(-1, keepdims=True)
        new = jnp.maximum(threshold, threshold + excess / jnp.where(slope > 0, slope, 1))
        return new, (new > threshold).any(), count + 1

    start = vary_like((jnp.where(jnp.isneginf(top), 0, -jnp.ones_like(top)), jnp.array(True), jnp.int32(0)), fixed)
    # Rounding might let the last steps creep by an epsilon each.
    threshold, _, _ = jax.lax.while_loop(lambda state: state[1] & (state[2] < 100), step, start)
    return x, visible & ~(fixed <= threshold)  # a row with a NaN stays NaN


@part
class Sparsemax(Normalize):
    """The point of the simplex nearest to the scores, argmin_p |p − s|²  (Martins and Astudillo, 2016).

        p_j = max(s_j − τ, 0)  with  Σ p = 1

    The weights are sparse and piecewise linear in s. A lead of 1 over all other keys gives one-hot weights. lse is 0.
    """

    def weights(self, scores, tile):
        visible = tile.visible
        x, inside = _support(scores, visible, 1)
        count = jnp.maximum(inside.sum(-1, keepdims=True), 1)
        threshold = (jnp.where(inside, x, 0).sum(-1, keepdims=True) - 1) / count
        return jnp.where(inside, jnp.maximum(x - threshold, 0), 0), _total_one(visible, scores.dtype)


@part
class Entmax15(Normalize):
    """The 1.5-entmax, p = argmax_p p·s + Σ_j (p_j − p_j^1.5) / 0.75  (Peters et al., 2019).

        p_j = max(s_j / 2 − τ, 0)²  with  Σ p = 1

    The weights lie between sparsemax and softmax: sparse like the first and smooth like the second. lse is 0.
    """

    def weights(self, scores, tile):
        visible = tile.visible
        x, inside = _support(scores / 2, visible, 2)
        # On the support the threshold is an explicit function of the scores, so its derivatives of any order are right.
        count = jnp.maximum(inside.sum(-1, keepdims=True), 1).astype(scores.dtype)
        mean = jnp.where(inside, x, 0).sum(-1, keepdims=True) / count
        spread = jnp.where(inside, jnp.square(x - mean), 0).sum(-1, keepdims=True)
        threshold = mean - jnp.sqrt(jnp.maximum((1 - spread) / count, jnp.finfo(scores.dtype).tiny))
        return jnp.where(inside, jnp.square(jnp.maximum(x - threshold, 0)), 0), _total_one(visible, scores.dtype)


@part
class TopK(Normalize):
    """Softmax over the k largest visible scores of each row (ties: the first keys); lse is over those.

    With k ≥ the number of keys the weights are softmax, with k = 1 one-hot. No gradient flows through the choice.

    Attributes:
        k: The number of keys, at least 1.

    Raises:
        TypeError: `k` is not an int.
        ValueError: `k` is below 1.
    """

    k: int

    def __post_init__(self):
        check_static_int("TopK", "k", self.k, 1)

    def weights(self, scores, tile):
        return Softmax().weights(scores, tile._replace(visible=largest(scores, tile.visible, self.k)[0]))


@part
class OneHotSample(Normalize):
    """One visible key per row, drawn with probability p = softmax(s): weight 1 for it and 0 for the others.

    lse = log p of the drawn key, the log of the total of the weights p_j · [j is drawn] before normalisation. So

        score-function gradient   ∇ E f(out) = E f(out) ∇ lse: add (reward − baseline) · lse to the objective, reward
                                  held constant (`score_function`; REINFORCE, Williams, 1992). The weights themselves
                                  carry no gradient.
        straight_through          the weights have the values of the sample and the gradient of p (biased).

    E out = softmax attention. The draw is a function of `key`, head and positions (Gumbel-max), so every implementation
    draws the same key.

    Attributes:
        key: The random key. Use a new one for every step.
        straight_through: Whether the weights have the gradient of p.
    """

    key: Seed
    straight_through: bool = False

    def weights(self, scores, tile):
        visible = tile.visible
        p, lse = Softmax().weights(scores, tile)
        noisy = scores + noise.gumbel(noise.seeds(self.key, scores.shape[:-2]), tile.query, tile.key)
        drawn = jnp.where(visible, noisy, -jnp.inf).argmax(-1, keepdims=True)
        sample = visible & (jnp.arange(scores.shape[-1]) == drawn)
        log_p = jnp.where(sample, scores, 0).sum(-1) - jnp.where(jnp.isneginf(lse), 0, lse)
        weights = sample.astype(scores.dtype)
        if self.straight_through:
            weights = p + jax.lax.stop_gradient(weights - p)
        return weights, jnp.where(visible.any(-1), log_p, -jnp.inf)


@part
class Gumbel(Normalize):
    """A relaxed sample, softmax((s + g) / τ) with Gumbel noise g, one-hot as τ → 0.

    The method is that of Jang et al. (2017) and Maddison et al. (2017). The largest weight is that of the key which
    `OneHotSample` draws with the same `key`, whatever τ > 0. lse is that of the noisy scores over τ.

    Attributes:
        key: The random key.
        temperature: τ > 0, one number or one per head [N].

    Raises:
        ValueError: `temperature` is a number that is not positive.
    """

    key: Seed
    temperature: Float[Array, ""] | Float[Array, " heads"] | float = 1.0

    def __post_init__(self):
        check_positive("Gumbel", "temperature", self.temperature)

    def weights(self, scores, tile):
        seeds = noise.seeds(self.key, scores.shape[:-2])
        noisy = scores + noise.gumbel(seeds, tile.query, tile.key).astype(scores.dtype)
        return Softmax(temperature=self.temperature).weights(noisy, tile)


def score_function(
    reward: Float[Array, "..."], log_probability: Float[Array, "..."], baseline: Float[Array, "..."] | float = 0.0
) -> Float[Array, "..."]:
    """Returns (reward − baseline) · log_probability, with no gradient through reward and baseline.

    Its gradient in the parameters of the distribution is an unbiased estimate of the gradient of E reward (REINFORCE,
    Williams, 1992).

    Args:
        reward: The reward of each draw.
        log_probability: The log probability of each draw: with `OneHotSample`, the `lse` that `attend` returns. Rows
            that saw nothing (−inf) give 0.
        baseline: A number that is subtracted from the reward. One that does not depend on the draw changes the variance
            only.
    """
    seen = ~jnp.isneginf(log_probability)
    advantage = jax.lax.stop_gradient(reward - baseline)
    return jnp.where(seen, advantage * jnp.where(seen, log_probability, 0), 0)
