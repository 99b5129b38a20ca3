"""The choices of a memory that learns while it reads: its network, the loss of a token, and the link to its weights.

A network reaches its fast weights only through a linear map that it is given. So `inner_batch.py` can run one and the
same network on plain weights, on weights of every token, or on weights that were never made.
"""

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.checks import check_positive
from jaxattn.core.numeric import per_head
from jaxattn.core.part import part

Inputs = Float[Array, "*b n t i"]
Outputs = Float[Array, "*b n t o"]
FastLinear = Callable[[int, Inputs], Outputs]
Number = Float[Array, ""] | float


class Memory(abc.ABC):
    """The base class of memories: a network per head, some weights of which change with every token.

    `memory(linear, x [..., N, T, K]) -> [..., N, T, V]` maps every token by itself. `linear(i, x)` is the product of x
    [..., N, T, in] with fast weight i. The network uses every fast weight exactly once, and in no other way. Other
    arrays of the part are slow: they stay as they are along the sequence.
    """

    @property
    @abc.abstractmethod
    def fast_weights(self) -> tuple[Float[Array, "n i o"], ...]:
        """The fast weights that a sequence starts with, [N, in, out] each.

        They are learned like any parameters. With a link they are its argument, see `Link`.
        """

    @abc.abstractmethod
    def __call__(self, linear: FastLinear, x: Float[Array, "*b n t k"]) -> Float[Array, "*b n t v"]:
        """Returns the memory's value for x, with the fast weights that `linear` applies."""


@part
class MatrixMemory(Memory):
    """The linear memory, M(x) = Wᵀ x.

    Attributes:
        weight: The first W, [N, K, V].
    """

    weight: Float[Array, "n k v"]

    @property
    def fast_weights(self):
        return (self.weight,)

    def __call__(self, linear, x):
        return linear(0, x)


@part
class MLPMemory(Memory):
    """M(x) = W_Lᵀ σ(… σ(W_1ᵀ x)), then a layer norm if `normalize`, then + x if `residual`.

    Titans (Behrouz et al., 2025) has two plain layers or more. Miras (2025) has x + LN(W_2ᵀ gelu(W_1ᵀ x)) with 4 K
    hidden units. TTT (Sun et al., 2024) has one layer in TTT-Linear and two in TTT-MLP, x + LN(·), with biases. A layer
    norm makes the output of the network as large as `gain` whatever was learned, so losses stay bounded.

    Attributes:
        weights: Fast, [N, K, hidden], …, [N, hidden, V]: one or more. With `bias` they have one row more, the last:
            the layer's bias is the weight of an input that is always 1, and is fast as well.
        gain: The gain of the layer norm, slow, [N, V]; by default 1.
        shift: The shift of the layer norm, slow, [N, V]; by default 0.
        activation: σ, "gelu" (its tanh form) or "silu".
        normalize: Whether a layer norm follows.
        residual: Whether x is added.
        bias: Whether layers have biases.
        eps: The ε of the layer norm, a positive number.

    Raises:
        TypeError: `weights` is not a tuple of arrays.
        ValueError: `eps` is not positive, `activation` is another, or `gain` or `shift` is given without `normalize`.
    """

    weights: tuple[Array, ...]
    gain: Float[Array, "n v"] | None = None
    shift: Float[Array, "n v"] | None = None
    activation: Literal["gelu", "silu"] = "gelu"
    normalize: bool = False
    residual: bool = False
    bias: bool = False
    eps: float = 1e-6

    def __post_init__(self):
        if not self.eps > 0:
            raise ValueError(f"MLPMemory: eps must be positive, got {self.eps}")
        if not isinstance(self.weights, tuple) or not self.weights:
            raise TypeError(f"MLPMemory: weights must be a tuple of arrays, got {type(self.weights).__name__}")
        if self.activation not in get_args(Literal["gelu", "silu"]):
            raise ValueError(f"MLPMemory: activation must be 'gelu' or 'silu', got {self.activation!r}")
        if not self.normalize and (self.gain is not None or self.shift is not None):
            raise ValueError("MLPMemory: gain and shift belong to the layer norm: need normalize=True")

    @property
    def fast_weights(self):
        return self.weights

    def __call__(self, linear, x):
        y = x
        for layer in range(len(self.weights)):
            if layer:
                y = jax.nn.gelu(y) if self.activation == "gelu" else jax.nn.silu(y)
            if self.bias:
                y = jnp.concatenate([y, jnp.ones_like(y[..., :1])], -1)
            y = linear(layer, y)
        if self.normalize:
            y = y - y.mean(-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
            y = y if self.gain is None else y * self.gain[:, None, :].astype(y.dtype)
            y = y if self.shift is None else y + self.shift[:, None, :].astype(y.dtype)
        return x + y if self.residual else y


class InnerLoss(abc.ABC):
    """The base class of the loss ℓ of a token, which holds M(k) against v, given by its gradient.

    `gradient(prediction, target)`, both [..., N, T, V], is ∂ℓ/∂prediction. A memory needs nothing else of a loss, so a
    gradient that belongs to no loss may be written too. Outer training differentiates the gradient once more, so it
    must be finite with its derivative also where prediction and target are equal. The losses below write e for
    prediction − target.
    """

    @abc.abstractmethod
    def gradient(
        self, prediction: Float[Array, "*b n t v"], target: Float[Array, "*b n t v"]
    ) -> Float[Array, "*b n t v"]:
        """Returns ∂ℓ/∂prediction."""


@part
class SquaredError(InnerLoss):
    """ℓ = scale · ‖e‖², gradient 2 scale · e.

    With a matrix and one token per inner batch, it is the delta rule of strength β = 2 scale θ.

    Attributes:
        scale: The default 1 is Titans', **without ½**; TTT's ½‖e‖² is 0.5.

    Raises:
        ValueError: `scale` is not positive.
    """

    scale: float = 1.0

    def __post_init__(self):
        check_positive("SquaredError", "scale", self.scale)

    def gradient(self, prediction, target):
        return 2 * self.scale * (prediction - target)


@part
class Huber(InnerLoss):
    """ℓ = ½‖e‖² up to ‖e‖ = δ and δ‖e‖ − ½δ² beyond: gradient e, scaled down to length δ. Yaad (Miras, 2025).

    One outlier moves the memory by θ δ ‖k‖ at most. δ = ∞ is `SquaredError(0.5)`.

    Attributes:
        delta: δ > 0, a number or one per head [N].
        by_channel: Every channel has a loss of its own, gradient clip(e, −δ, δ).

    Raises:
        ValueError: `delta` is a number that is not positive.
    """

    delta: Number | Float[Array, " n"] = 1.0
    by_channel: bool = False

    def __post_init__(self):
        check_positive("Huber", "delta", self.delta)

    def gradient(self, prediction, target):
        error = prediction - target
        delta = per_head("Huber: delta", self.delta, error)
        if self.by_channel:
            return jnp.clip(error, -delta, delta)
        squared = jnp.square(error).sum(-1, keepdims=True)
        beyond = squared > jnp.square(delta)
        return error * (jnp.where(beyond, delta, 1) / jnp.sqrt(jnp.where(beyond, squared, 1)))


@part
class LpError(InnerLoss):
    """ℓ = Σ |e|^p, gradient p sign(e) |e|^{p−1}; p = 2 is `SquaredError()`. Moneta (Miras, 2025) takes p = 3.

    Attributes:
        p: At least 1. Above 2 outliers weigh more than in the squared error, below 2 less.
        smooth: A number c that makes the gradient p tanh(c e) (e² + 1e-6)^{(p−1)/2}, which has a finite slope at e = 0
            for p < 2 too. Without it that slope is taken to be 0.

    Raises:
        ValueError: `p` is below 1, or `smooth` is not positive.
    """

    p: float = 3.0
    smooth: float | None = None

    def __post_init__(self):
        if not self.p >= 1:
            raise ValueError(f"LpError: p must be at least 1, got {self.p}")
        check_positive("LpError", "smooth", self.smooth)

    def gradient(self, prediction, target):
        error = prediction - target
        if self.smooth is None:
            return self.p * signed_power(error, self.p - 1)
        return self.p * jnp.tanh(self.smooth * error) * (jnp.square(error) + 1e-6) ** ((self.p - 1) / 2)


@part
class DotProduct(InnerLoss):
    """ℓ = −⟨M(k), v⟩, gradient −v: the write of a memory does not depend on its content.

    For a matrix that starts at 0 this loss gives linear attention with values θ v, whatever the inner batch.
    """

    def gradient(self, prediction, target):
        return -target


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def signed_power(x: Array, power: float) -> Array:
    """Returns sign(x) |x|^power, 0 at 0."""
    return jnp.sign(x) * jnp.abs(jnp.where(x == 0, 1, x)) ** power


@signed_power.defjvp
def _signed_power_jvp(power: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """The slope is power |x|^{power−1}. At x = 0 it is 1 for power 1, and taken to be 0 for powers below it."""
    (x,), (dx,) = primals, tangents
    if power == 0:
        return signed_power(x, power), jnp.zeros_like(x)
    slope = jnp.ones_like(x) if power == 1 else power * jnp.sign(x) * signed_power(x, power - 1)
    return signed_power(x, power), slope * dx


class Link(abc.ABC):
    """The base class of links: `link(A)` is the weights W of a layer, A and W [..., N, in, out].

    Gradients are taken with respect to W and are added up in A, the dual weights, which decay and have momentum. This
    rule is mirror descent: the link is the gradient of the conjugate of the penalty that retention applies. `Identity`
    is plain gradient descent. `fast_weights` of a memory, and a `MemoryState`, hold A.
    """

    is_identity: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, dual: Float[Array, "*b n i o"]) -> Float[Array, "*b n i o"]:
        """Returns the weights."""


@part
class Identity(Link):
    """W = A, gradient descent: Titans, Yaad, TTT, the delta rule."""

    is_identity: ClassVar[bool] = True

    def __call__(self, dual):
        return dual


@part
class SoftmaxLink(Link):
    """W = scale · softmax(A) along `axis`: exponentiated gradient. Memora (Miras, 2025).

    Weights are positive and every slice sums to `scale`. Retention pulls slices towards uniform weights, in the sense
    of Kullback and Leibler. Normalising at each token or only here is the same. A network of positive weights only
    cannot take differences: give it inputs of both signs.

    Attributes:
        axis: −2 (inputs) or −1 (outputs).
        scale: A number or one per head [N].

    Raises:
        ValueError: `axis` is another, or `scale` is a number that is not positive.
    """

    axis: Literal[-2, -1] = -2
    scale: Number | Float[Array, " n"] = 1.0

    def __post_init__(self):
        if self.axis not in (-2, -1):
            raise ValueError(f"SoftmaxLink: axis must be -2 (inputs) or -1 (outputs), got {self.axis!r}")
        check_positive("SoftmaxLink", "scale", self.scale)

    def __call__(self, dual):
        return per_head("SoftmaxLink: scale", self.scale, dual) * jax.nn.softmax(dual, self.axis)


@part
class LqMirror(Link):
    """W = sign(A) |A|^{q−1} / ‖A‖_q^{q−2}: the mirror map of ½‖W‖²_p, 1/p + 1/q = 1. Degree 1; q = 2 is W = A.

    The norm is of the whole matrix of a head. Large entries grow at the expense of small ones. W(0) = 0, where the
    gradient is taken to be 0.

    Attributes:
        q: At least 2; Moneta (Miras, 2025) has 4.

    Raises:
        ValueError: `q` is below 2.
    """

    q: float = 4.0

    def __post_init__(self):
        _check_q("LqMirror", self.q)

    def __call__(self, dual):
        scaled, largest, norm = _scaled(dual, self.q)
        return largest * signed_power(scaled, self.q - 1) / norm ** (self.q - 2)


@part
class LqScale(Link):
    """W = A / ‖A‖_q^{q−2}, the link of Moneta as it is often written; q = 2 is W = A.

    Its degree is 3 − q: for q = 4 twice the A is half the W, and a memory near A = 0 explodes. `LqMirror` is the map
    that its derivation gives. W(0) = 0.

    Attributes:
        q: The order of the norm, at least 2.

    Raises:
        ValueError: `q` is below 2.
    """

    q: float = 4.0

    def __post_init__(self):
        _check_q("LqScale", self.q)

    def __call__(self, dual):
        scaled, largest, norm = _scaled(dual, self.q)
        return largest ** (3 - self.q) * scaled / norm ** (self.q - 2)


@part
class SoftThreshold(Link):
    """W = sign(A) max(|A| − γ, 0): weights with little evidence are exactly 0 (elastic net; Miras, 2025).

    The threshold is applied to the sum of all gradients, not to the last W and one more gradient. So a sum below the
    threshold is not lost.

    Attributes:
        gamma: γ, a number or one per head [N].

    Raises:
        ValueError: `gamma` is a number that is not positive.
    """

    gamma: Number | Float[Array, " n"]

    def __post_init__(self):
        check_positive("SoftThreshold", "gamma", self.gamma)

    def __call__(self, dual):
        gamma = per_head("SoftThreshold: gamma", self.gamma, dual)
        return jnp.sign(dual) * jnp.maximum(jnp.abs(dual) - gamma, 0)


@part
class SigmoidLink(Link):
    """W = σ(A): every weight in (0, 1), by the divergence of two-point distributions (Miras, 2025)."""

    def __call__(self, dual):
        return jax.nn.sigmoid(dual)


def _check_q(owner: str, q: Any) -> None:
    if not q >= 2:
        raise ValueError(f"{owner}: q must be at least 2, got {q}")


def _scaled(dual: Array, q: float) -> tuple[Array, Array, Array]:
    """Returns (a, m, ‖a‖_q) with A = m a and m the largest |A|, or 1: powers of a cannot overflow.

    Maps of a known degree have the right gradient with m held constant.
    """
    largest = jax.lax.stop_gradient(jnp.abs(dual).max((-2, -1), keepdims=True))
    largest = jnp.where(largest == 0, 1, largest)
    scaled = dual / largest
    total = (jnp.abs(scaled) ** q).sum((-2, -1), keepdims=True)
    return scaled, largest, jnp.where(total == 0, 1, total) ** (1 / q)
