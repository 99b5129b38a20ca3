"""Feature maps: kernels of a query and a key that are products of a function of each, the parts of linear attention.

A feature map is a part with `phi, psi = features(query, key)`, where φ_i · ψ_j is the weight of pair (i, j) before
normalisation. So Σ_j (φ_i · ψ_j) v_j = φ_iᵀ (Σ_j ψ_j v_jᵀ) needs no pair: the keys are summed once, into [F, V].
The features of a token depend on that token alone, never on others, so causal and streamed computations stay so.
"""

import abc
import itertools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.checks import check_positive, check_static_int
from jaxattn.core.matmul import accumulator, product
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part

Query = Float[Array, "*b t n h"]
Key = Float[Array, "*b s k h"]
QueryFeatures = Float[Array, "*b t n f"]
KeyFeatures = Float[Array, "*b s k f"]
Number = Float[Array, ""] | float


class Features(abc.ABC):
    """The base class of feature maps.

    Query head n meets the keys of head n // (N / K). Features are float32, or float64 for float64 inputs. They cost
    O(T N F) memory, and the state that sums the keys is [F, V] per head.

    Maps with exponentials have a switch `normalized`. It divides φ of a query by a number of its own, the same for all
    keys. Where weights are divided by their total, this number cancels. Use the switch then: no query can overflow.
    Without it φ · ψ is the kernel as written. A factor per key would change the weights, so ψ has none.

    Raises:
        TypeError: Inputs are not floating point [..., length, heads, head dim].
        ValueError: Head dims differ or do not fit the arrays of the map.
    """

    @abc.abstractmethod
    def __call__(self, query: Query, key: Key) -> tuple[QueryFeatures, KeyFeatures]:
        """Returns (φ, ψ), the features of every query and of every key."""

    @abc.abstractmethod
    def size(self, head_dim: int) -> int:
        """Returns F, the number of features for heads of so many channels."""


def checked(owner: str, query: Any, key: Any) -> tuple[Query, Key]:
    """Returns both as arrays of the accumulator's dtype.

    Raises:
        TypeError: Inputs are not floating point [..., length, heads, head dim].
        ValueError: Head dims differ.
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    for name, x in (("query", query), ("key", key)):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 3:
            raise TypeError(
                f"{name} must be floating point [..., length, heads, head dim], got {x.dtype}{list(x.shape)}"
            )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query has head dim {query.shape[-1]} but key has {key.shape[-1]}: {owner} needs them to be equal"
        )
    dtype = accumulator(query, key)
    return query.astype(dtype), key.astype(dtype)


def check_kind(owner: str, kind: Any, kinds: Any) -> None:
    if kind not in get_args(kinds):
        raise ValueError(f"{owner}: kind must be one of {', '.join(map(repr, get_args(kinds)))}, got {kind!r}")


def root_of_scale(scale: Any, x: Array) -> Array:
    """Returns √scale, the factor of both sides; scale is H**-0.5 unless given."""
    return jnp.sqrt(jnp.asarray(x.shape[-1] ** -0.5 if scale is None else scale, x.dtype))


# Elementwise maps: F = H.


@part
class IdentityFeatures(Features):
    """φ = scale · q,  ψ = k: the kernel is scale · q·k, of either sign. F = H.

    This map is linear attention without a feature map (Schmidhuber, 1992; Sun et al., 2023). Read it without a
    normaliser, because its weights may sum to zero.

    Attributes:
        scale: The factor, by default H**-0.5.
    """

    scale: Number | None = None

    def __call__(self, query, key):
        query, key = checked("IdentityFeatures", query, key)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return query * jnp.asarray(scale, query.dtype), key

    def size(self, head_dim):
        return head_dim


@part
class Elu1Features(Features):
    """φ = elu(q) + 1,  ψ = elu(k) + 1: x + 1 for x > 0 and exp(x) below, positive. F = H  (Katharopoulos et al., 2020).

    Weights never get sharp: the map is linear where it is large.
    """

    def __call__(self, query, key):
        query, key = checked("Elu1Features", query, key)
        return _elu1(query), _elu1(key)

    def size(self, head_dim):
        return head_dim


def _elu1(x: Array) -> Array:
    # Not exp(min(x, 0)), whose derivative at 0 is one half of what it should be.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


@part
class ReluFeatures(Features):
    """φ = max(q, 0) + offset,  ψ = max(k, 0) + offset. F = H.

    Attributes:
        offset: At least 0. With 0 many features are exactly 0, and a query may see no key at all. Any offset > 0 keeps
            every weight positive.

    Raises:
        TypeError: `offset` is not a number.
        ValueError: `offset` is negative.
    """

    offset: float = 0.0

    def __post_init__(self):
        if not isinstance(self.offset, int | float | np.number) or isinstance(self.offset, bool):
            raise TypeError(f"ReluFeatures: offset must be a number, got {self.offset!r}")
        if not self.offset >= 0:
            raise ValueError(f"ReluFeatures: offset must be at least 0, got {self.offset}")

    def __call__(self, query, key):
        query, key = checked("ReluFeatures", query, key)
        return jax.nn.relu(query) + self.offset, jax.nn.relu(key) + self.offset

    def size(self, head_dim):
        return head_dim


@part
class LogNormalFeatures(Features):
    """φ = exp(α q),  ψ = exp(β k), elementwise: linear log-normal attention (Nahshan et al., 2024). F = H.

    The kernel is Σ_d exp(α q_d + β k_d). With α, β from `moment_match` the logs of the weights vary as those of softmax
    attention do.

    In float32 e^88 is the largest number. So β k must stay below 88 − log S for S keys that are summed, and without
    `normalized` so must max_d(α q_d + β k_d). With `normalized`, φ = softmax(α q) over the features, whatever q is.

    Attributes:
        alpha: α, one number or one per query head [N].
        beta: β, one number or one per key head [K].
        normalized: Whether φ of a query is divided by its sum.

    Raises:
        ValueError: `alpha` or `beta` has another shape.
    """

    alpha: Number | Float[Array, " heads"]
    beta: Number | Float[Array, " key_heads"]
    normalized: bool = False

    def __call__(self, query, key):
        query, key = checked("LogNormalFeatures", query, key)
        powers = []
        for name, x in (("alpha", query), ("beta", key)):
            factor = getattr(self, name)
            if jnp.shape(factor) not in ((), x.shape[-2:-1]):
                raise ValueError(
                    f"LogNormalFeatures: {name} has shape {jnp.shape(factor)}: need one number or one per head, "
                    f"({x.shape[-2]},)"
                )
            powers.append(x * jnp.asarray(factor, x.dtype)[..., None])
        return _exp(powers[0], self.normalized), jnp.exp(powers[1])

    def size(self, head_dim):
        return head_dim


def _exp(exponents: Array, normalized: bool) -> Array:
    """Returns exp, or exp divided by its sum over the features."""
    return jax.nn.softmax(exponents) if normalized else jnp.exp(exponents)


def moment_match(
    query_std: Float[Array, "..."] | float,
    key_std: Float[Array, "..."] | float,
    a: float = 0.14855178,
    b: float = -0.35487039,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns (α, β) of `LogNormalFeatures` for which weights are as concentrated as in softmax (Nahshan et al., 2024).

        α = σ̃ / σ_q,   β = σ̃ / σ_k,   σ̃² = (σ_q² σ_k² − b) / (2 a)

    For Gaussian q, k with standard deviations σ_q, σ_k, Var log P = σ_q² σ_k² for the weights of softmax(q·k / √H) and
    about a (α² σ_q² + β² σ_k²) + b for those of exp(α q)·exp(β k). At H = 64 and T = 512 the two variances are within
    30 % for σ_q σ_k from 0.4 to 1.7. Smaller heads vary more (1.5 times as much at H = 16): fit your own.

    No gradient flows through. The σ of a whole sequence tells early tokens of late ones: for causal use, keep the
    numbers fixed or let them follow training.

    Args:
        query_std: σ_q, a number or an array that is taken elementwise, such as one σ per head. An array's σ of 0 gives
            0, since a constant has nothing to scale.
        key_std: σ_k, likewise.
        a: The slope of the authors' fit.
        b: The offset of the authors' fit. With a positive b, σ_q² σ_k² ≤ b asks for less variance than the fit can
            give; then α = β = 0, equal weights.

    Raises:
        ValueError: σ or `a` is a number that is not positive.
    """
    for name, value in (("query_std", query_std), ("key_std", key_std), ("a", a)):
        check_positive("moment_match", name, value)
    dtype = accumulator(jnp.asarray(query_std), jnp.asarray(key_std))
    query_std, key_std = (jax.lax.stop_gradient(jnp.asarray(x, dtype)) for x in (query_std, key_std))
    both = jnp.sqrt(jnp.maximum((jnp.square(query_std * key_std) - b) / (2 * a), 0))
    return ratio(both, query_std), ratio(both, key_std)


# Estimates and expansions of exp(scale · q·k).


@part
class TaylorFeatures(Features):
    """φ · ψ = Σ_{l ≤ p} (scale · q·k)^l / l!: the Taylor polynomial of exp, of degree p = `degree`.

    Degree 2 is BASED (Arora et al., 2024) and, on standardised inputs, FAST (Gerami et al., 2024). x = √scale · q has
    one feature per product of at most p channels, Π_d x_d^{n_d} / √(n_d!): for p = 2

        φ = [1, x, x_a² / √2 and x_a x_b (b < a)],   F = C(H + p, p) = 1 + H + H (H + 1) / 2

    and ψ likewise. For p → ∞ the weights are softmax.

    The polynomial follows exp for |s| = |scale · q·k| up to about 1, within |s|^{p+1} e^{|s|} / (p + 1)!. Below −1 it
    does not. Degree 1 gives negative weights. Degree 2 is least at s = −1, with 1/2, and *rises* again, so a key that
    matches badly enough weighs much. Even degrees are positive everywhere, odd ones are not.

    Attributes:
        degree: p, at least 1.
        scale: By default H**-0.5, so each side has the H**-0.25 of BASED.

    Raises:
        TypeError: `degree` is not an int.
        ValueError: `degree` is below 1, or `scale` is not positive.
    """

    degree: int = 2
    scale: Number | None = None

    def __post_init__(self):
        check_static_int("TaylorFeatures", "degree", self.degree, 1)
        check_positive("TaylorFeatures", "scale", self.scale)

    def __call__(self, query, key):
        query, key = checked("TaylorFeatures", query, key)
        root = root_of_scale(self.scale, query)
        return self._monomials(query * root), self._monomials(key * root)

    def _monomials(self, x: Float[Array, "... h"]) -> Float[Array, "... f"]:
        width = x.shape[-1]
        products = jnp.ones_like(x[..., :1])
        levels = [products]
        for level in range(1, self.degree + 1):
            # In the order of `combinations_with_replacement`: those whose channels are all a or later come last.
            later = [math.comb(width - a + level - 2, level - 1) for a in range(width)]
            blocks = [x[..., a : a + 1] * products[..., -count:] for a, count in enumerate(later)]
            products = jnp.concatenate(blocks, -1)
            factorials = [
                math.prod(math.factorial(len(list(same))) for _, same in itertools.groupby(channels))
                for channels in itertools.combinations_with_replacement(range(width), level)
            ]
            levels.append(products * jnp.asarray(np.array(factorials) ** -0.5, x.dtype))
        return jnp.concatenate(levels, -1)

    def size(self, head_dim):
        return math.comb(head_dim + self.degree, self.degree)


HedgehogKind = Literal["softmax", "exp"]


@part
class HedgehogFeatures(Features):
    """Hedgehog (Zhang et al., 2024): a learned matrix per head, z = q W + b, then by `kind`

        softmax   φ = [softmax(z), softmax(−z)], over the features of each half: in (0, 1)
        exp       φ = [exp(z), exp(−z)]

    and ψ with matrices of its own; F = 2D. Start from `identity`, where D = H and the kernel of exp is
    2 Σ_d cosh(q_d + k_d), and fit the weights of softmax attention by `distillation_loss`. Apply the map after rotary
    embedding. Softmax features are at most 1, so W must grow for weights to get sharp: no weight decay.

    In float32 exp needs |z| below 88 − log S for keys, and without `normalized` the sum of both sides' |z| below that.

    Attributes:
        query_weight: W of the queries, [N, H, D].
        key_weight: W of the keys, [K, H, D].
        query_bias: b of the queries, [N, D] or None.
        key_bias: b of the keys, [K, D] or None.
        kind: "softmax" or "exp".
        normalized: Whether φ of a query is divided by a number of its own, see `Features`.

    Raises:
        ValueError: Arrays do not fit the heads, or `kind` is another.
    """

    query_weight: Float[Array, "heads h d"]
    key_weight: Float[Array, "key_heads h d"]
    query_bias: Float[Array, "heads d"] | None = None
    key_bias: Float[Array, "key_heads d"] | None = None
    kind: HedgehogKind = "softmax"
    normalized: bool = False

    def __post_init__(self):
        check_kind("HedgehogFeatures", self.kind, HedgehogKind)

    @staticmethod
    def identity(
        heads: int,
        head_dim: int,
        key_heads: int | None = None,
        kind: HedgehogKind = "softmax",
        normalized: bool = False,
    ) -> "HedgehogFeatures":
        """The map with W = I and b = 0 for N query heads and K key heads, by default K = N."""
        key_heads = heads if key_heads is None else key_heads
        weights, biases = (
            [jnp.broadcast_to(x, (n, *x.shape)) for n in (heads, key_heads)]
            for x in (jnp.eye(head_dim), jnp.zeros(head_dim))
        )
        return HedgehogFeatures(weights[0], weights[1], biases[0], biases[1], kind, normalized)

    def __call__(self, query, key):
        query, key = checked("HedgehogFeatures", query, key)
        queries = self._linear("query", query, "D")
        keys = self._linear("key", key, queries.shape[-1])
        if self.kind == "softmax":
            return tuple(jnp.concatenate([jax.nn.softmax(z), jax.nn.softmax(-z)], -1) for z in (queries, keys))
        queries, keys = (jnp.concatenate([z, -z], -1) for z in (queries, keys))
        return _exp(queries, self.normalized), jnp.exp(keys)

    def _linear(self, side: str, x: Float[Array, "*b t n h"], wanted: Any) -> Float[Array, "*b t n d"]:
        weight, bias = getattr(self, f"{side}_weight"), getattr(self, f"{side}_bias")
        (heads, width), shape = x.shape[-2:], jnp.shape(weight)
        if len(shape) != 3 or shape[:2] != (heads, width) or wanted not in ("D", shape[-1]):
            raise ValueError(
                f"HedgehogFeatures: {side}_weight has shape {shape} but {side} has {heads} heads of dim {width}: need "
                f"[{heads}, {width}, {wanted}]"
            )
        if bias is not None and jnp.shape(bias) != (heads, shape[-1]):
            raise ValueError(
                f"HedgehogFeatures: {side}_bias has shape {jnp.shape(bias)} but {side}_weight {shape}: need "
                f"({heads}, {shape[-1]})"
            )
        z = product(x.swapaxes(-2, -3), jnp.asarray(weight, x.dtype)).swapaxes(-2, -3)
        return z if bias is None else z + jnp.asarray(bias, x.dtype)

    def size(self, head_dim):
        return 2 * jnp.shape(self.query_weight)[-1]


# What the authors' code clamps features at.
LEAST_WEIGHT = 1e-12


def distillation_loss(
    teacher_weights: Float[Array, "*b n t s"], student_weights: Float[Array, "*b n t s"]
) -> Float[Array, ""]:
    """Returns the mean over rows of −Σ_j P_j log max(A_j, 1e−12): how far weights A are from a teacher's P, in nats.

    The loss trains `HedgehogFeatures`, or any weights, towards softmax attention (Zhang et al., 2024). It is at least
    the entropy of P (less S · 1e−12), and equal to it if and only if A = P. It is finite for A = 0, where it has no
    gradient, and computed in float32 or better.

    Args:
        teacher_weights: P [..., N, T, S]. Rows sum to 1. Rows in which P is 0, which see no key, do not count.
        student_weights: A, likewise.

    Raises:
        ValueError: Shapes differ.
    """
    if jnp.shape(teacher_weights) != jnp.shape(student_weights):
        raise ValueError(
            f"teacher_weights has shape {jnp.shape(teacher_weights)} but student_weights {jnp.shape(student_weights)}: "
            "need them to be equal"
        )
    dtype = accumulator(jnp.asarray(teacher_weights), jnp.asarray(student_weights))
    teacher, student = jnp.asarray(teacher_weights, dtype), jnp.asarray(student_weights, dtype)
    seen = (teacher > 0).any(-1)
    student = jnp.where(teacher > 0, student, 1)  # so that what the teacher does not see may be anything
    loss = -(teacher * jnp.log(jnp.maximum(student, LEAST_WEIGHT))).sum(-1)
    return jnp.where(seen, loss, 0).sum() / jnp.maximum(seen.sum(), 1)


# Maps of the inputs of another map.


@part
class StandardizedFeatures(Features):
    """Applies `then` to (x − mean x) / √(var x + ε) for x = q and x = k, mean and variance over a token's H channels.

    FAST (Gerami et al., 2024) is `StandardizedFeatures(TaylorFeatures(2, scale=1.0))`. But for ε, nothing changes if
    all queries or all keys are scaled by a positive number or shifted by one. |x̂|² is H, so q̂·k̂ is within ±H: a
    polynomial of odd degree needs a scale of 1 / H.

    Attributes:
        then: The map.
        epsilon: ε > 0, which keeps a token with equal channels at 0 with finite gradients.

    Raises:
        ValueError: `epsilon` is not positive.
    """

    then: Features
    epsilon: float = 1e-6

    def __post_init__(self):
        _check_map("StandardizedFeatures", self.then, self.epsilon)

    def __call__(self, query, key):
        both = checked("StandardizedFeatures", query, key)
        centred = (x - x.mean(-1, keepdims=True) for x in both)
        return self.then(*(x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) for x in centred))

    def size(self, head_dim):
        return self.then.size(head_dim)


@part
class UnitFeatures(Features):
    """Applies `then` to x / √(|x|² + ε) for x = q and x = k: queries and keys of length 1. F is that of `then`.

    By default `then` has scale 1 and the kernel is the cosine of the angle between q and k, of either sign.
    `UnitFeatures(TaylorFeatures(2, scale=1.0))` is positive, with every score where the polynomial follows exp.

    Attributes:
        then: The map.
        epsilon: ε > 0, by which a zero vector stays 0 and has finite gradients.

    Raises:
        ValueError: `epsilon` is not positive.
    """

    then: Features = IdentityFeatures(1.0)
    epsilon: float = 1e-6

    def __post_init__(self):
        _check_map("UnitFeatures", self.then, self.epsilon)

    def __call__(self, query, key):
        both = checked("UnitFeatures", query, key)
        return self.then(*(x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + self.epsilon) for x in both))

    def size(self, head_dim):
        return self.then.size(head_dim)


def _check_map(owner: str, then: Any, epsilon: Any) -> None:
    if not isinstance(then, Features):
        raise TypeError(f"{owner}: then must be a feature map, got {then!r}")
    check_positive(owner, "epsilon", epsilon)
