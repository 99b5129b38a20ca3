"""State-space mechanisms: Mamba's selective scan and Mamba-2's state-space duality."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.core.linear.gate import inverse_softplus, softplus_decay
from jaxattn.nn.mechanisms import Projections, ShortConvolution, head_dim_of, step_bias
from jaxattn.nn.norm import RMSNorm
from jaxattn.nn.parameter import linear_map, undecayed
from jaxattn.nn.recurrent import LinearInputs, Mechanism


class S6(Mechanism):
    """The selective scan of Mamba (Gu & Dao, 2023): E channels, each a memory of K numbers that decays by itself.

        h_c ← e^{−Δ_c a_c} ⊙ h_c + Δ_c s_c B,   y_c = C · h_c + D_c s_c,   out = W_o (y ⊙ silu(W_z x))

    with s = silu(conv(W_s x) + b_s), and Δ = softplus(W_Δ Δ_r + b), B and C from s. The numbers a start as 1, ..., K in
    every channel.

    Args:
        features: D, the channels of x and y.
        inner: E, 2 D if not given.
        state: K, the numbers of each channel.
        rank: The rank of Δ, D / 16 if not given.
        convolution: The width of the short convolution.
        norm: Whether Δ_r, B and C are RMS-normed (Hymba).
        eps: The eps of these norms.
        project: Whether there is W_o; without, the output has E channels.
        use_bias: Whether W_s, W_z and W_o have biases.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        features: int,
        *,
        inner: int | None = None,
        state: int = 16,
        rank: int | None = None,
        convolution: int = 4,
        norm: bool = False,
        eps: float = 1e-6,
        project: bool = True,
        use_bias: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        inner = 2 * features if inner is None else inner
        rank = -(-features // 16) if rank is None else rank
        for name, size in (("inner", inner), ("state", state), ("rank", rank)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.in_features = features
        self.signal, self.gate = (
            linear_map(features, inner, dtype, rngs, ("width", "hidden"), use_bias=use_bias) for _ in range(2)
        )
        self.convolution = ShortConvolution(inner, convolution, use_bias=True, rngs=rngs)
        sizes = {"step": rank, "key": state, "query": state}
        self.selection = nnx.Dict(
            {name: linear_map(inner, size, dtype, rngs, ("hidden", None)) for name, size in sizes.items()}
        )
        norms = {name: RMSNorm(size, eps=eps, dtype=dtype) for name, size in sizes.items()} if norm else {}
        self.norms = nnx.Dict(norms)
        self.step = linear_map(rank, inner, None, rngs, (None, "hidden"))
        self.step_bias = undecayed(step_bias(rngs, inner), "hidden")
        self.a_log = undecayed(jnp.tile(jnp.log(jnp.arange(1.0, state + 1)), (inner, 1)), "hidden", None)
        self.skip = undecayed(jnp.ones(inner), "hidden")
        back = ("hidden", "width")
        self.out = linear_map(inner, features, dtype, rngs, back, use_bias=use_bias) if project else None

    def inputs(self, x, positions, past):
        signal = self.convolution("signal", self.signal(x), past)
        selected = {name: each(signal) for name, each in self.selection.items()}
        selected |= {name: norm(selected[name]) for name, norm in self.norms.items()}
        step = self.step(selected["step"]) + self.step_bias[...]
        log_decay = softplus_decay(self.a_log[...], step[..., None])
        value = (jax.nn.softplus(step).astype(signal.dtype) * signal)[..., None]
        query, key = (selected[name][..., None, :] for name in ("query", "key"))
        rest = self.skip[...].astype(signal.dtype) * signal, self.gate(x)
        return LinearInputs(query, key, value, log_decay, form="step"), rest

    def output(self, read, rest):
        skip, gate = rest
        y = (read[..., 0] + skip) * nnx.silu(gate)
        return y if self.out is None else self.out(y)


class Mamba2(Mechanism):
    """State-space duality (Dao & Gu, 2024): key B, query C shared by all heads, value Δ x, log decay −e^a Δ per head.

    The step is Δ = softplus(W x + b). The signal x, B and C come after one short convolution with a bias. There is a
    skip D x, and an RMS norm of (y ⊙ silu(z)) over all heads.

    Args:
        features: The width of the model.
        heads: The number of heads.
        state: K, the channels of keys and queries.
        expand: heads × V over the width of the model.
        convolution: The width of the short convolution.
        mimetic: Whether the mechanism starts as causal linear attention (`mimetic_initialization`).
        eps: The eps of the RMS norm.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `heads` is no divisor of `expand` times `features`, or a size is below 1.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        state: int = 64,
        expand: int = 2,
        convolution: int = 4,
        mimetic: bool = False,
        eps: float = 1e-5,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        inner = expand * features
        value_dim = head_dim_of(inner, heads)
        self.in_features = features
        sizes = {"value": (heads, value_dim), "key": (1, state), "query": (1, state)}
        self.project = Projections(features, sizes, convolution, dtype, rngs, use_bias=True)
        self.step = linear_map(features, heads, None, rngs, ("width", "heads"))
        self.step_bias = undecayed(step_bias(rngs, heads), "heads")
        self.a_log = undecayed(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)), "heads")
        self.skip = undecayed(jnp.ones(heads), "heads")
        self.gate = linear_map(features, inner, dtype, rngs, ("width", ("heads", heads)))
        self.out = linear_map(inner, features, dtype, rngs, (("heads", heads), "width"))
        self.norm = RMSNorm(inner, eps=eps, dtype=dtype)
        if mimetic:
            mimetic_initialization(self)

    def inputs(self, x, positions, past):
        value, key, query = self.project(x, past)
        step = self.step(x) + self.step_bias[...]
        log_decay = softplus_decay(self.a_log[...], step)
        skip = self.skip[...][:, None] * value
        return LinearInputs(query, key, value * jax.nn.softplus(step)[..., None], log_decay), (skip, self.gate(x))

    def output(self, read, rest):
        skip, gate = rest
        return self.out(self.norm((read + skip).reshape(gate.shape) * nnx.silu(gate)))


def mimetic_initialization(mechanism: Mamba2, decay: float = 1e-3, step: float = 1.0) -> None:
    """Makes a state-space mechanism start near causal linear attention of its input with itself, in place.

    Afterwards e^a = `decay` (almost nothing is forgotten), Δ = `step` for every input, and W_C = W_B, so that equal
    inputs attend to each other. The convolutions of B and C stay apart: with equal ones copying was learned far more
    slowly. Copying and recall are then learned in fewer steps (Mimetic initialization helps state space models learn to
    recall, 2024). Use this start in some of the layers.

    Args:
        mechanism: The mechanism, which is changed.
        decay: e^a.
        step: Δ.
    """
    mechanism.a_log[...] = jnp.full_like(mechanism.a_log[...], jnp.log(decay))
    mechanism.step.kernel[...] = jnp.zeros_like(mechanism.step.kernel[...])
    mechanism.step_bias[...] = jnp.full_like(mechanism.step_bias[...], inverse_softplus(step))
    linear = mechanism.project.linear
    linear["query"].kernel[...] = linear["key"].kernel[...]
