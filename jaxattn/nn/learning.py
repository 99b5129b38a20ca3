"""Recurrent mechanisms whose memory is trained while it reads: Titans, the Miras family and TTT."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.core.attend.position import rotary, rotary_channels
from jaxattn.core.checks import check_static_int
from jaxattn.core.memory.inner import Identity, InnerLoss, Link, MLPMemory, SquaredError
from jaxattn.nn.mechanisms import Gate, HeadOutput, Projections, ShortConvolution, head_dim_of, unit
from jaxattn.nn.norm import LayerNorm
from jaxattn.nn.parameter import decayed, linear_map, undecayed
from jaxattn.nn.recurrent import LearningInputs, Mechanism

lecun = jax.nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)


class NeuralMemory(Mechanism):
    """A network per head that learns k_t ↦ v_t as it reads, and is asked for q_t (Titans, Behrouz et al., 2025).

    The rate is θ = max_rate σ(W x + b), the forgetting α = σ(W x + b) from about 0.02 and, with `momentum`, the
    momentum η = σ(W x + b), all per head and token. Queries, keys and values come after a convolution and SiLU, and
    queries and keys then get length 1. The reads are RMS-normed and gated.

    In Miras (2025), Yaad is `loss=Huber(1.0)`, Moneta `loss=LpError(3.0)` with `link=LqMirror(4.0)`, Memora
    `link=SoftmaxLink()`, all without momentum and with `normalize` and `residual`.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        hidden: The widths of the network between K and V, () for a matrix.
        loss: The loss that the network learns by.
        link: The link from accumulated gradients to weights, see `memory_scan`.
        momentum: Whether there is η.
        normalize: Whether the network norms its result, see `MLPMemory`.
        residual: Whether the network adds its input to its result, see `MLPMemory`.
        max_rate: The largest rate, above 0. Where steps are too long, most easily on tokens that repeat, a memory
            diverges until what is read is not finite: then lower the rate, or set `normalize`. See `rate` of
            `memory_scan` for the bound that a matrix has.
        inner_batch: The tokens of an inner batch. The number is **part of the model**, as in `memory_scan`.
        documents: The most documents that are packed in a row.
        convolution: The width of a short convolution of q, k and v, 0 for none.
        gate: The gate of the output, "silu" or "sigmoid"; None for none.
        eps: The eps of the RMS norm.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        TypeError: A size is not an int.
        ValueError: `heads` is no divisor of `features`, a size is below 1, `max_rate` is not positive, or `gate` is
            unknown.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        hidden: tuple[int, ...] = (64,),
        loss: InnerLoss = SquaredError(),
        link: Link = Identity(),
        momentum: bool = True,
        normalize: bool = False,
        residual: bool = False,
        max_rate: float = 0.1,
        inner_batch: int = 16,
        documents: int = 8,
        convolution: int = 4,
        gate: Gate | None = "silu",
        eps: float = 1e-6,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        channels = head_dim_of(features, heads)
        if not max_rate > 0:
            raise ValueError(f"max_rate must be positive, got {max_rate}")
        check_static_int("NeuralMemory", "inner_batch", inner_batch, 1)
        for width in hidden:
            check_static_int("NeuralMemory", "hidden", width, 1)
        self.in_features, self.max_rate, self.momentum = features, max_rate, momentum
        self.normalize, self.residual = normalize, residual
        self.inner_batch, self.documents = inner_batch, documents
        self.loss, self.link = nnx.static(loss), nnx.static(link)
        sizes = dict.fromkeys(("query", "key", "value"), (heads, channels))
        self.project = Projections(features, sizes, convolution, dtype, rngs, silu=True)
        self.rate, self.forget = (
            linear_map(features, heads, None, rngs, ("width", "heads"), use_bias=True) for _ in range(2)
        )
        self.carry = linear_map(features, heads, None, rngs, ("width", "heads"), use_bias=True) if momentum else None
        self.weights = nnx.List(
            [decayed(x, "heads", None, None) for x in _layers(rngs, heads, (channels, *hidden, channels))]
        )
        self.out = HeadOutput(features, heads, channels, gate=gate, eps=eps, dtype=dtype, rngs=rngs)

    def inputs(self, x, positions, past):
        query, key, value = self.project(x, past)
        weights = tuple(w[...] for w in self.weights)
        memory = MLPMemory(weights, activation="silu", normalize=self.normalize, residual=self.residual)
        rate = self.max_rate * nnx.sigmoid(self.rate(x))
        log_decay = -nnx.softplus(self.forget(x) - 4)  # log(1 − σ(·)), hardly anything at the start
        log_momentum = None if self.carry is None else jax.nn.log_sigmoid(self.carry(x))
        given = LearningInputs(memory, unit(query), unit(key), value, rate, log_decay, log_momentum)
        given = given._replace(loss=self.loss, link=self.link)
        return given._replace(inner_batch=self.inner_batch, documents=self.documents), x

    def output(self, read, rest):
        return self.out(read, rest)


class TTT(Mechanism):
    """Test-time training (Sun et al., 2024): M(x) = x + LN(x W + b), or two layers with GELU if `deep`; ½ ‖M(k) − v‖².

        y = W_o (norm(read) ⊙ gelu(W_g x))        norm: layer norm of what all heads read, as one vector

    The queries and keys are convolutions of one projection, each with a bias, and v has none. Without `convolution` q
    and k have projections of their own. Queries and keys are rotated to their place in the inner batch.

    A step size is the product of two numbers: max(1 / (i + 1) + learned_i, 0) of the token i of an inner batch that
    reads, and base_rate / K σ(W x + b) of the token that writes. The memory has no forgetting and no momentum. Other
    than in the paper, W starts with variance 1 / inputs.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        deep: Whether M has two layers.
        base_rate: The base rate, above 0; 1 if not given, and 0.1 if `deep`.
        inner_batch: The tokens of an inner batch.
        documents: The most documents that are packed in a row.
        convolution: The width of the convolutions, 0 for none.
        rotary_base: The base of the rotation; None for no rotation.
        eps: The eps of both norms.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        TypeError: `inner_batch` is not an int.
        ValueError: `heads` is no divisor of `features`, `inner_batch` is below 1, `base_rate` is not positive, or the
            channels of a head are odd in number and rotated.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        deep: bool = False,
        base_rate: float | None = None,
        inner_batch: int = 16,
        documents: int = 8,
        convolution: int = 4,
        rotary_base: float | None = 10000.0,
        eps: float = 1e-6,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        channels = head_dim_of(features, heads)
        self.in_features, self.heads, self.rotary_base, self.eps = features, heads, rotary_base, eps
        self.base_rate = (0.1 if deep else 1.0) if base_rate is None else base_rate
        if not self.base_rate > 0:
            raise ValueError(f"base_rate must be positive, got {base_rate}")
        check_static_int("TTT", "inner_batch", inner_batch, 1)
        if rotary_base is not None:
            rotary_channels(channels, 1.0)
        self.inner_batch, self.documents = inner_batch, documents
        names = ("shared", "value") if convolution else ("query", "key", "value")
        self.linear = nnx.Dict(
            {name: linear_map(features, features, dtype, rngs, ("width", ("heads", heads))) for name in names}
        )
        options: dict[str, Any] = {"use_bias": True, "silu": False, "rngs": rngs}
        self.convolution = nnx.Dict(
            {
                name: ShortConvolution(features, convolution, axis=("heads", heads), **options)
                for name in ("query", "key")
            }
            if convolution
            else {}
        )
        self.rate = linear_map(features, heads, None, rngs, ("width", "heads"), use_bias=True)
        self.rows = undecayed(jnp.zeros(inner_batch))
        layers = _layers(rngs, heads, (channels, 4 * channels, channels) if deep else (channels, channels))
        self.weights = nnx.List([decayed(x, "heads", None, None) for x in layers])
        self.biases = nnx.List([undecayed(jnp.zeros((heads, 1, x.shape[-1])), "heads", None, None) for x in layers])
        self.gain = undecayed(jnp.ones((heads, channels)), "heads", None)
        self.shift = undecayed(jnp.zeros((heads, channels)), "heads", None)
        self.norm = LayerNorm(features, eps=eps, dtype=dtype)
        inner = ("heads", heads)
        self.gate = linear_map(features, features, dtype, rngs, ("width", inner))
        self.out = linear_map(features, features, dtype, rngs, (inner, "width"))

    def inputs(self, x, positions, past):
        value = self.linear["value"](x)
        if self.convolution:
            shared = self.linear["shared"](x)
            query, key = (self.convolution[name](name, shared, past) for name in ("query", "key"))
        else:
            query, key = (self.linear[name](x) for name in ("query", "key"))
        query, key, value = (y.reshape(*y.shape[:-1], self.heads, -1) for y in (query, key, value))
        row = positions % self.inner_batch
        if self.rotary_base is not None:
            query, key = (rotary(y, row, self.rotary_base) for y in (query, key))
        weights = tuple(jnp.concatenate([w[...], b[...]], 1) for w, b in zip(self.weights, self.biases, strict=True))
        options: dict[str, Any] = {"normalize": True, "residual": True, "bias": True, "eps": self.eps}
        memory = MLPMemory(weights, self.gain[...], self.shift[...], **options)
        rate = self.base_rate / key.shape[-1] * nnx.sigmoid(self.rate(x))
        rows = jnp.maximum(1 / (1 + jnp.arange(self.inner_batch)) + self.rows[...], 0)[row]
        row_rate = jnp.broadcast_to(rows[..., None], rate.shape)
        given = LearningInputs(memory, query, key, value, rate, row_rate=row_rate, loss=SquaredError(0.5))
        return given._replace(inner_batch=self.inner_batch, documents=self.documents), x

    def output(self, read, rest):
        return self.out(self.norm(read.reshape(rest.shape)) * nnx.gelu(self.gate(rest)))


def _layers(rngs: nnx.Rngs, heads: int, widths: tuple[int, ...]) -> list[Float[Array, "n i o"]]:
    """Returns the start of a network: Gaussian weights of variance 1 / inputs."""
    return [lecun(rngs.params(), (heads, a, b)) for a, b in itertools.pairwise(widths)]
