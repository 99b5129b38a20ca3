"""The recurrent mechanisms of the literature, as the inputs of their memory and the output made of its reads.

D is the width of the model, N heads of K key and V value channels. Wrap a mechanism in `Recurrent` for a mixer.
`convolution` is the width of a short convolution of the projections, 0 for none.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.core.attend.position import rotary
from jaxattn.core.linear.api import append_one, divide
from jaxattn.core.linear.feature import Elu1Features, Features
from jaxattn.core.linear.gate import (
    bounded_decay,
    inverse_softplus,
    lower_bounded_decay,
    retention,
    running_softmax,
    softplus_decay,
)
from jaxattn.core.linear.recurrence import Delta, Erase
from jaxattn.core.numeric import ratio
from jaxattn.nn.feed_forward import FeedForward
from jaxattn.nn.norm import LayerNorm, RMSNorm
from jaxattn.nn.parameter import Axis, decayed, linear_map, undecayed
from jaxattn.nn.recurrent import LinearInputs, Mechanism, Passed, Past
from jaxattn.nn.spec import Spec, built, owned, part_of

Gate = Literal["silu", "sigmoid"]


class ShortConvolution(nnx.Module):
    """y_t = silu(Σ_{i < width} w_i ⊙ x_{t−i} + b), one filter per channel, so that a memory sees neighbouring tokens.

    Weights and biases start uniform in ±width^(−1/2).

    Args:
        channels: The number of channels of x.
        width: The number of tokens that a filter spans, at least 1.
        use_bias: Whether there is b.
        silu: Whether SiLU is applied; False for the sum itself.
        axis: The name of the axis of channels, for sharding.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `width` is below 1.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        use_bias: bool = False,
        silu: bool = True,
        axis: Axis = "hidden",
        rngs: nnx.Rngs,
    ):
        if width < 1:
            raise ValueError(f"convolution must be at least 1 token wide, got {width}")
        bound = width**-0.5

        def uniform(*shape: int) -> Array:
            return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)

        self.silu = silu
        self.weight = decayed(uniform(width, channels), None, axis)
        self.bias = undecayed(uniform(channels), axis) if use_bias else None

    def __call__(self, name: str, x: Float[Array, "b t c"], past: Past) -> Float[Array, "b t c"]:
        weight = self.weight[...].astype(x.dtype)

        def convolved(lags: list[Array]) -> Array:
            return sum((w * lag for w, lag in zip(weight, lags, strict=True)), jnp.zeros((), x.dtype))

        y = past.lags(name, x, len(weight), convolved)
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return nnx.silu(y) if self.silu else y


class SmearedKeys(nnx.Module):
    """k_t = s k_t + (1 − s) k_{t−1} with s = σ(a) of each head, a learned: a key has the token before in it.

    So one layer can match a query with what stood before a key, as an induction head does (Olsson et al., 2022). Before
    the first token there is 0. It starts with s = 1/2, a = 0.

    Args:
        heads: The number of heads.
        head_dim: The channels per head.
    """

    def __init__(self, heads: int, head_dim: int):
        self.head_dim = head_dim
        self.logit = undecayed(jnp.zeros(heads), "key_heads")

    @property
    def weight(self) -> Float[Array, "2 c"]:
        """The weights of a token and of the one before, per channel."""
        share = jnp.repeat(nnx.sigmoid(self.logit[...]), self.head_dim)
        return jnp.stack([share, 1 - share])

    def __call__(self, name: str, x: Float[Array, "b t c"], past: Past) -> Float[Array, "b t c"]:
        now, before = self.weight.astype(x.dtype)
        return past.lags(name, x, 2, lambda lags: now * lags[0] + before * lags[1])


class Projections(nnx.Module):
    """q, k, v = heads of W x, each after a short convolution.

    Args:
        features: D, the channels of x.
        sizes: The name of each projection -> (heads, channels per head).
        convolution: The width of the short convolution, 0 for none.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.
        silu: Whether SiLU comes last; if not given, only after a convolution.
        use_bias: Whether the convolutions have a bias.

    Raises:
        ValueError: A projection has no heads or no channels.
    """

    def __init__(
        self,
        features: int,
        sizes: dict[str, tuple[int, int]],
        convolution: int,
        dtype: Any,
        rngs: nnx.Rngs,
        *,
        silu: bool | None = None,
        use_bias: bool = False,
    ):
        for name, size in sizes.items():
            if min(size) < 1:
                raise ValueError(f"{name} has {size[0]} heads of {size[1]} channels: need at least 1 of each")
        self.sizes = tuple(sizes.items())
        self.silu = convolution > 0 if silu is None else silu
        self.linear = nnx.Dict(
            {name: linear_map(features, n * h, dtype, rngs, ("width", ("heads", n))) for name, (n, h) in sizes.items()}
        )
        options: dict[str, Any] = {"use_bias": use_bias, "silu": False, "rngs": rngs}
        self.convolution = nnx.Dict(
            {name: ShortConvolution(n * h, convolution, axis=("heads", n), **options) for name, (n, h) in sizes.items()}
            if convolution
            else {}
        )

    def __call__(self, x: Float[Array, "b t d"], past: Past) -> list[Float[Array, "b t n h"]]:
        projected = []
        for name, (heads, channels) in self.sizes:
            y = self.linear[name](x)
            y = self.convolution[name](name, y, past) if self.convolution else y
            y = nnx.silu(y) if self.silu else y
            projected.append(y.reshape(*y.shape[:-1], heads, channels))
        return projected


class HeadOutput(nnx.Module):
    """y = W_o (norm(z) ⊙ gate(W_g x)): RMS norm of each head, a gate or none, and the output projection.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        value_dim: V, the channels that a head reads.
        norm: Whether there is the norm.
        gate: The function of the gate, "silu" or "sigmoid"; None for no gate.
        gate_rank: The rank of W₂ W₁ x + b in place of W_g x; None for W_g.
        eps: The eps of the norm.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `gate` is unknown, or `gate_rank` is below 1.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        value_dim: int,
        *,
        norm: bool = True,
        gate: Gate | None = None,
        gate_rank: int | None = None,
        eps: float = 1e-6,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if gate not in (None, "silu", "sigmoid"):
            raise ValueError(f"gate is {gate!r}: need 'silu', 'sigmoid' or None")
        self.kind = gate
        self.norm = RMSNorm(value_dim, eps=eps, dtype=dtype) if norm else None
        gates: nnx.Linear | LowRank | None = None
        by_head = ("heads", heads)
        if gate is not None and gate_rank is not None:
            gates = LowRank(features, gate_rank, heads * value_dim, axis=by_head, rngs=rngs)
        elif gate is not None:
            gates = linear_map(features, heads * value_dim, dtype, rngs, ("width", by_head))
        self.gate = gates
        self.out = linear_map(heads * value_dim, features, dtype, rngs, (by_head, "width"))

    def __call__(self, z: Float[Array, "b t n v"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        z = z if self.norm is None else self.norm(z)
        z = z.reshape(*z.shape[:-2], -1)
        if self.gate is not None:
            z = z * (nnx.silu if self.kind == "silu" else nnx.sigmoid)(self.gate(x))
        return self.out(z)


class LinearAttention(Mechanism):
    """out = Σ_{j <= t} φ(q_t)·ψ(k_j) v_j, divided by Σ_{j <= t} φ(q_t)·ψ(k_j) if `normalize`.

    The maps φ and ψ are those of `feature_map`. The mechanism is that of Katharopoulos et al. (2020) with elu + 1, and
    Performer, Hedgehog, BASED, FAST and log-normal attention with their maps.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        feature_map: A part, a module that returns one, or a `Spec` of what makes either from heads and head_dim.
        key_dim: K, the channels before the map, D / N if not given (BASED takes 16).
        normalize: Whether sums are divided. Without, each head is RMS-normed with `eps` instead.
        rotary_base: The base of a rotary embedding of q and k before the map, None for none.
        convolution: The width of the short convolution, 0 for none.
        gate: The gate of the output, None for none.
        eps: The eps of the RMS norm.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `heads` is no divisor of `features`, or `gate` is unknown.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        feature_map: Spec | Features | nnx.Module = Elu1Features(),
        key_dim: int | None = None,
        normalize: bool = True,
        rotary_base: float | None = None,
        convolution: int = 0,
        gate: Gate | None = None,
        eps: float = 1e-6,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        value_dim = head_dim_of(features, heads)
        key_dim = value_dim if key_dim is None else key_dim
        self.in_features, self.normalize, self.rotary_base = features, normalize, rotary_base
        feature_map = built(feature_map, heads=heads, head_dim=key_dim, dtype=dtype, rngs=rngs)
        self.feature_map = owned(feature_map)
        sizes = {"query": (heads, key_dim), "key": (heads, key_dim), "value": (heads, value_dim)}
        self.project = Projections(features, sizes, convolution, dtype, rngs)
        options: dict[str, Any] = {"gate": gate, "eps": eps, "dtype": dtype, "rngs": rngs}
        self.out = HeadOutput(features, heads, value_dim, norm=not normalize, **options)

    def inputs(self, x, positions, past):
        query, key, value = self.project(x, past)
        if self.rotary_base is not None:
            query, key = (rotary(y, positions, self.rotary_base) for y in (query, key))
        phi, psi = part_of(self.feature_map)(query, key)
        return LinearInputs(phi, psi, append_one(value) if self.normalize else value), x

    def output(self, read, rest):
        return self.out(divide(read) if self.normalize else read, rest)


class RetNet(Mechanism):
    """Retention (Sun et al., 2023): decay 1 − 2^(−5−n) of head n, rotary q and k, q / √K, RMS norm per head, SiLU gate.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads; K is D / N.
        value_dim: V, 2 K if not given.
        rotary_base: The base of the rotation.
        angles: "rotary" for frequencies base^(−2 i / K), i < K / 2, or "torchscale" for those of the authors' code,
            base^(−i / (K / 2 − 1)), which end at 1 / base. The norm of that code has no gains.
        convolution: The width of the short convolution, 0 for none.
        eps: The eps of the RMS norm.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `heads` is no divisor of `features`, or `angles` is unknown.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        value_dim: int | None = None,
        rotary_base: float = 10000.0,
        angles: Literal["rotary", "torchscale"] = "rotary",
        convolution: int = 0,
        eps: float = 1e-6,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if angles not in ("rotary", "torchscale"):
            raise ValueError(f"angles is {angles!r}: need 'rotary' or 'torchscale'")
        key_dim = head_dim_of(features, heads)
        if angles == "torchscale" and key_dim > 2:  # the same frequencies, to another base; one pair has frequency 1
            rotary_base = rotary_base ** (key_dim / (key_dim - 2))
        value_dim = 2 * key_dim if value_dim is None else value_dim
        self.in_features, self.heads, self.rotary_base = features, heads, rotary_base
        sizes = {"query": (heads, key_dim), "key": (heads, key_dim), "value": (heads, value_dim)}
        self.project = Projections(features, sizes, convolution, dtype, rngs)
        self.out = HeadOutput(features, heads, value_dim, gate="silu", eps=eps, dtype=dtype, rngs=rngs)

    def inputs(self, x, positions, past):
        query, key, value = self.project(x, past)
        query, key = (rotary(y, positions, self.rotary_base) for y in (query, key))
        return LinearInputs(query * query.shape[-1] ** -0.5, key, value, retention(self.heads)), x

    def output(self, read, rest):
        return self.out(read, rest)


class GLA(Mechanism):
    """Gated linear attention (Yang et al., 2023), with the log decay log σ(W₂ W₁ x + b) / 16 per channel.

    Queries are divided by √K. The reads are RMS-normed per head and have a SiLU gate. K is half of V = D / N.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        rank: The rank of the network of the decay.
        convolution: The width of the short convolution, 0 for none.
        eps: The eps of the RMS norm.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `heads` is no divisor of `features`, or `rank` is below 1.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        rank: int = 16,
        convolution: int = 0,
        eps: float = 1e-5,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        value_dim = head_dim_of(features, heads)
        key_dim = max(value_dim // 2, 1)
        self.in_features = features
        sizes = {"query": (heads, key_dim), "key": (heads, key_dim), "value": (heads, value_dim)}
        self.project = Projections(features, sizes, convolution, dtype, rngs)
        self.decay = LowRank(features, rank, heads * key_dim, axis=("heads", heads), rngs=rngs)
        self.out = HeadOutput(features, heads, value_dim, gate="silu", eps=eps, dtype=dtype, rngs=rngs)

    def inputs(self, x, positions, past):
        query, key, value = self.project(x, past)
        log_decay = jax.nn.log_sigmoid(self.decay(x)).reshape(key.shape) / 16
        return LinearInputs(query * query.shape[-1] ** -0.5, key, value, log_decay), x

    def output(self, read, rest):
        return self.out(read, rest)


class HGRN2(Mechanism):
    """HGRN-2 (Qin et al., 2024): forget gate f = γ + (1 − γ) σ(W x) per channel, key 1 − f, query silu(W x).

    The reads of all heads are RMS-normed as one vector of D channels. A convolution comes without SiLU.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        lower_bound: γ in [0, 1), larger in higher layers in the paper.
        convolution: The width of the short convolution, 0 for none.
        eps: The eps of the RMS norm.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `heads` is no divisor of `features`, or `lower_bound` is outside [0, 1).
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        lower_bound: float = 0.0,
        convolution: int = 0,
        eps: float = 1e-5,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound must be at least 0 and below 1, got {lower_bound}")
        channels = head_dim_of(features, heads)
        self.in_features, self.lower_bound = features, lower_bound
        sizes = dict.fromkeys(("query", "forget", "value"), (heads, channels))
        self.project = Projections(features, sizes, convolution, dtype, rngs, silu=False)
        self.norm = RMSNorm(features, eps=eps, dtype=dtype)
        self.out = linear_map(features, features, dtype, rngs, (("heads", heads), "width"))

    def inputs(self, x, positions, past):
        query, forget, value = self.project(x, past)
        log_decay = lower_bounded_decay(forget.astype(jnp.float32), self.lower_bound)
        return LinearInputs(nnx.silu(query), -jnp.expm1(log_decay).astype(value.dtype), value, log_decay), None

    def output(self, read, rest):
        return self.out(self.norm(read.reshape(*read.shape[:-2], -1)))


class DeltaNet(Mechanism):
    """The delta rule: q, k, v after convolution and SiLU, q and k of length 1, q / √K, β = σ(W x); RMS norm per head.

    The argument `decay` chooses among three mechanisms:

        none      DeltaNet (Yang et al., 2024)
        head      Gated DeltaNet (Yang et al., 2024): log decay −e^a softplus(W x + b) per head; SiLU gate
        channel   Kimi delta attention (Kimi Linear, 2025): that per channel, W of low rank; gate σ(W₂ W₁ x + b)

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        decay: "none", "head" or "channel".
        key_dim: K, D / N if not given.
        value_dim: V, D / N if not given.
        convolution: The width of the short convolution, 0 for SiLU of the projections alone.
        negative: Whether β goes up to 2, which allows the memory to turn a key around.
        rank: The rank of Kimi's decay and gate, V if not given.
        eps: The eps of the RMS norm.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `heads` is no divisor of `features` where K or V is not given, a size is below 1, or `decay` is
            unknown.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        decay: Literal["none", "head", "channel"] = "none",
        key_dim: int | None = None,
        value_dim: int | None = None,
        convolution: int = 4,
        negative: bool = False,
        rank: int | None = None,
        eps: float = 1e-5,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if decay not in ("none", "head", "channel"):
            raise ValueError(f"decay is {decay!r}: need 'none', 'head' or 'channel'")
        key_dim = head_dim_of(features, heads) if key_dim is None else key_dim
        value_dim = head_dim_of(features, heads) if value_dim is None else value_dim
        rank = value_dim if rank is None else rank
        self.in_features, self.kind, self.negative = features, decay, negative
        sizes = {"query": (heads, key_dim), "key": (heads, key_dim), "value": (heads, value_dim)}
        self.project = Projections(features, sizes, convolution, dtype, rngs, silu=True)
        self.beta = linear_map(features, heads, None, rngs, ("width", "heads"))
        step: nnx.Linear | LowRank | None = None
        if decay == "head":
            step = linear_map(features, heads, None, rngs, ("width", "heads"))
        elif decay == "channel":
            step = LowRank(features, rank, heads * key_dim, axis=("heads", heads), bias=False, rngs=rngs)
        self.step = step
        if decay != "none":
            self.step_bias = undecayed(step_bias(rngs, heads if decay == "head" else heads * key_dim), ("heads", heads))
            self.a_log = undecayed(
                jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)), "heads"
            )
        gate: dict[str, Gate | None] = {"none": None, "head": "silu", "channel": "sigmoid"}
        options: dict[str, Any] = {"gate_rank": rank if decay == "channel" else None, "eps": eps, "dtype": dtype}
        self.out = HeadOutput(features, heads, value_dim, gate=gate[decay], rngs=rngs, **options)

    def inputs(self, x, positions, past):
        query, key, value = self.project(x, past)
        beta = nnx.sigmoid(self.beta(x)) * (2 if self.negative else 1)
        log_decay = None
        if self.step is not None:
            step = (self.step(x) + self.step_bias[...]).reshape(*beta.shape, -1)
            log_decay = softplus_decay(self.a_log[...][:, None], step)
            log_decay = log_decay[..., 0] if self.kind == "head" else log_decay
        return LinearInputs(unit(query) * query.shape[-1] ** -0.5, unit(key), value, log_decay, Delta(beta)), x

    def output(self, read, rest):
        return self.out(read, rest)


class RWKV7(Mechanism):
    """RWKV-7 time mixing (Peng et al., 2025), each of its inputs a learned mix of the token and the one before.

        S_t = diag(w) S_{t−1} − (κ ⊙ a)(κᵀ S_{t−1}) + k̃ vᵀ,   y = W_o ((norm(S_tᵀ r) + (r · (ρ ⊙ k̃)) v) ⊙ gate)

    with κ = k ⊙ ξ at length 1, k̃ = k ⊙ (1 + (a − 1) ⊙ α), layer norm per head with its own gains, and of low rank

        log w = −e^{−1/2} σ(W₂ tanh(W₁ ·) + b),   a = σ(W₂ W₁ · + b),   gate = W₂ σ(W₁ ·)

    With keys_from="layer" the value is v + (v₁ − v) ⊙ σ(W₂ W₁ · + b), where v₁ is that of the layer before whose
    keys_from is "self": the first one in the paper. Other than there, the mixes, w and a start the same in all channels
    and layers.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        rank: The rank of the networks of low rank.
        rate_rank: The rank of that of a, `rank` if not given.
        value_rank: The rank of that of v, `rank` if not given.
        gate_rank: The rank of that of the gate, `rank` if not given.
        keys_from: "self", or "layer" for values that are mixed with those of an earlier layer.
        eps: The eps of the layer norm.
        unit_eps: The number added to the square of the length of κ.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `heads` is no divisor of `features`, a rank is below 1, or `keys_from` is unknown.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        rank: int = 16,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        keys_from: Literal["self", "layer"] = "self",
        eps: float = 64e-5,
        unit_eps: float = 1e-6,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if keys_from not in ("self", "layer"):
            raise ValueError(f"keys_from is {keys_from!r}: need 'self' or 'layer'")
        channels = head_dim_of(features, heads)
        self.in_features, self.heads, self.keys_from, self.unit_eps = features, heads, keys_from, unit_eps
        names = ("receptance", "key", "value", "decay", "rate", "gate")
        by_head = ("heads", heads)
        self.mix = nnx.Dict({name: undecayed(jnp.full(features, 0.5)) for name in names})
        self.linear = nnx.Dict(
            {name: linear_map(features, features, dtype, rngs, ("width", by_head)) for name in names[:3]}
        )

        def low_rank(size: int | None, **options: Any) -> LowRank:
            return LowRank(features, rank if size is None else size, features, axis=by_head, **options, rngs=rngs)

        self.low_rank = nnx.Dict(
            decay=low_rank(rank, inner=jnp.tanh),
            rate=low_rank(rate_rank),
            gate=low_rank(gate_rank, inner=nnx.sigmoid, bias=False),
        )
        if keys_from == "layer":
            self.low_rank["value"] = low_rank(value_rank)
        self.removed = undecayed(jnp.full(features, 0.85), by_head)
        self.replaced = undecayed(jnp.ones(features), by_head)
        self.bonus = undecayed(jnp.zeros((heads, channels)), "heads", None)
        self.norm = LayerNorm(channels, eps=eps, learned=False, dtype=dtype)
        self.scale = undecayed(jnp.ones((heads, channels)), "heads", None)
        self.shift = undecayed(jnp.zeros((heads, channels)), "heads", None)
        self.out = linear_map(features, features, dtype, rngs, (by_head, "width"))

    def inputs(self, x, positions, past):
        now, before = past.lags("x", x, 2)
        mixed = {name: now + (before - now) * mix[...].astype(x.dtype) for name, mix in self.mix.items()}
        receptance, key, value = (self.linear[name](mixed[name]) for name in ("receptance", "key", "value"))
        past.given = value
        if past.layer is not None:
            if past.layer.shape != value.shape:
                raise ValueError(f"context has shape {past.layer.shape}: need values of the same heads, {value.shape}")
            value = value + (past.layer - value) * nnx.sigmoid(self.low_rank["value"](mixed["value"]))
        rate = nnx.sigmoid(self.low_rank["rate"](mixed["rate"]))
        log_decay = bounded_decay(self.low_rank["decay"](mixed["decay"]), -(2.718281828459045**-0.5))
        removed = key * self.removed[...]
        key = key * (1 + (rate - 1) * self.replaced[...])
        receptance, key, value, rate, log_decay, removed = (
            y.reshape(*y.shape[:-1], self.heads, -1) for y in (receptance, key, value, rate, log_decay, removed)
        )
        removed = unit(removed, self.unit_eps)
        bonus = (receptance * self.bonus[...] * key).sum(-1, keepdims=True) * value
        gate = self.low_rank["gate"](mixed["gate"])
        erase = Erase(-removed, removed * rate)
        return LinearInputs(receptance, key, value, log_decay, erase), (bonus, gate)

    def output(self, read, rest):
        bonus, gate = rest
        y = self.norm(read) * self.scale[...] + self.shift[...] + bonus
        return self.out(y.reshape(gate.shape) * gate)


class ChannelMix(Mechanism):
    """y = W₂ max(W₁ (x_t + μ ⊙ (x_{t−1} − x_t)), 0)²: the feed-forward block of RWKV-7 (Peng et al., 2025).

    The block reads the token and the one before in learned shares μ, so it has a state, as a mixer has.

    Args:
        features: D, the channels of x and y.
        hidden: F, the hidden units, 4 D if not given.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `hidden` is below 1.
    """

    def __init__(self, features: int, hidden: int | None = None, *, dtype: Any = None, rngs: nnx.Rngs):
        self.in_features = features
        self.mix = undecayed(jnp.full(features, 0.5))
        self.block = FeedForward(features, hidden, activation="relu_squared", gated=False, dtype=dtype, rngs=rngs)

    def inputs(self, x, positions, past):
        now, before = past.lags("x", x, 2)
        y = self.block(now + (before - now) * self.mix[...].astype(x.dtype))
        return Passed(y[..., None, :]), None

    def output(self, read, rest):
        return read[..., 0, :]


class Latte(Mechanism):
    """Latent attention (Dolga et al., 2024): p(s | t) = Σ_l p(l | t) p(s | l), with two softmaxes.

    The first, p(l | t), is over the latents of a token. The second, p(s | l), is over the tokens of a latent: those so
    far if `causal`, and otherwise all of them. Without `causal` the mixer has no state, takes no packed rows and reads
    the whole sequence (an encoder).

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads.
        latents: L, the number of latents per head.
        causal: Whether a token reads only those up to itself.
        window: One more latent, whose p(s | t) is softmax attention over the last `window` tokens with rotary positions
            (Latte Macchiato); None for none.
        rotary_base: The base of the rotary positions of the window.
        convolution: The width of the short convolution, 0 for none.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `heads` is no divisor of `features`, `latents` is below 1, or `window` is below 1 or comes without
            `causal`.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        latents: int = 16,
        causal: bool = True,
        window: int | None = None,
        rotary_base: float = 10000.0,
        convolution: int = 0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        value_dim = head_dim_of(features, heads)
        if window is not None and (window < 1 or not causal):
            raise ValueError(f"window is {window} and causal {causal}: need a window of at least 1, and a causal mixer")
        self.in_features, self.causal, self.window, self.rotary_base = features, causal, window, rotary_base
        query = latents if window is None else latents + 1
        sizes = {"query": (heads, query), "key": (heads, latents), "value": (heads, value_dim)}
        self.project = Projections(features, sizes, convolution, dtype, rngs)
        sizes = dict.fromkeys(("query", "key"), (heads, value_dim))
        self.local = None if window is None else Projections(features, sizes, 0, dtype, rngs)
        self.out = HeadOutput(features, heads, value_dim, norm=False, dtype=dtype, rngs=rngs)

    def inputs(self, x, positions, past):
        query, scores, value = self.project(x, past)
        mixture = nnx.softmax(query.astype(jnp.float32))
        scores = jnp.where(past.seen[..., None, None], scores.astype(jnp.float32), -jnp.inf)
        if not self.causal:
            weights = jnp.exp(scores - _finite(jax.lax.stop_gradient(scores.max(1, keepdims=True))))
            key = ratio(weights, weights.sum(1, keepdims=True))
            return LinearInputs(mixture, key, value, read="all"), (x, None)
        key, log_decay, after = running_softmax(scores, past.held.get("total"), past.starts)
        past.kept["total"] = after
        if self.local is None or self.window is None:
            return LinearInputs(mixture, key, value, log_decay), (x, None)
        near, at = self.local(x, past)
        near, at = (rotary(y, positions, self.rotary_base) for y in (near, at))
        local = mixture[..., -1:].astype(value.dtype) * past.attend_near("local", near, at, value, self.window)
        return LinearInputs(mixture[..., :-1], key, value, log_decay), (x, local)

    def output(self, read, rest):
        x, local = rest
        return self.out(read if local is None else read + local, x)


class GatedConvolution(Mechanism):
    """y = W_o (silu(conv(W_1 x + b_1)) ⊙ (W_2 x + b_2)) + b_o: a mixer of the last `width` tokens alone.

    The mechanism is the cheap layer of BASED (Arora et al., 2024). The convolution has no bias.

    Args:
        features: D, the channels of x and y.
        width: The number of tokens that the convolution spans.
        expand: The channels in between over D; the paper's is 2.
        use_bias: Whether there are b_1, b_2 and b_o.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `expand` or `width` is below 1.
    """

    def __init__(
        self,
        features: int,
        *,
        width: int = 3,
        expand: int = 2,
        use_bias: bool = True,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if expand < 1:
            raise ValueError(f"expand must be at least 1, got {expand}")
        self.in_features, inner = features, expand * features
        self.up, self.gate = (
            linear_map(features, inner, dtype, rngs, ("width", "hidden"), use_bias=use_bias) for _ in range(2)
        )
        self.convolution = ShortConvolution(inner, width, rngs=rngs)
        self.out = linear_map(inner, features, dtype, rngs, ("hidden", "width"), use_bias=use_bias)

    def inputs(self, x, positions, past):
        return Passed(self.convolution("up", self.up(x), past)[..., None, :]), self.gate(x)

    def output(self, read, rest):
        return self.out(read[..., 0, :] * rest)


class LowRank(nnx.Module):
    """W₂ f(W₁ x) + b in float32, with W₁ to `rank` channels.

    Args:
        features: D, the channels of x.
        rank: The channels in between.
        outputs: The channels of the result.
        inner: f, the identity if not given.
        bias: Whether there is b.
        axis: The name of the axis of outputs, for sharding.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `rank` is below 1.
    """

    def __init__(
        self,
        features: int,
        rank: int,
        outputs: int,
        *,
        inner: Callable[[Array], Array] | None = None,
        bias: bool = True,
        axis: Axis = None,
        rngs: nnx.Rngs,
    ):
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.inner = inner
        self.down = linear_map(features, rank, None, rngs, ("width", None))
        self.up = linear_map(rank, outputs, None, rngs, (None, axis), use_bias=bias)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t o"]:
        y = self.down(x)
        return self.up(y if self.inner is None else self.inner(y))


def head_dim_of(features: int, heads: int) -> int:
    """Returns D / N.

    Raises:
        ValueError: `heads` is below 1 or no divisor of `features`.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    if features % heads:
        raise ValueError(f"features {features} is no multiple of heads {heads}: choose another")
    return features // heads


def unit(x: Float[Array, "*b h"], eps: float = 1e-6) -> Float[Array, "*b h"]:
    """Returns x / √(|x|² + eps), with a derivative at 0."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + eps)


def step_bias(rngs: nnx.Rngs, size: int) -> Float[Array, " n"]:
    """Returns the bias for which softplus starts log-uniform between 0.001 and 0.1, as in Mamba (Gu & Dao, 2023)."""
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    return inverse_softplus(jnp.exp(jax.random.uniform(rngs.params(), (size,), minval=low, maxval=high)))


def _finite(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return jnp.where(jnp.isfinite(x), x, 0)
