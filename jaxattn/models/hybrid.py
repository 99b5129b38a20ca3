"""Specs of mixers that are made of mixers: Hymba's parallel heads, and Titans' attention with a memory."""

from dataclasses import dataclass
from typing import Any, Literal

from flax import nnx

from jaxattn import nn
from jaxattn.core.attend.mask import Causal, Mask
from jaxattn.models.config import Mixer
from jaxattn.models.recurrent import NeuralMemory


@dataclass(frozen=True)
class Hymba(Mixer):
    """Attention and state-space heads on the same input, normed and averaged (Hymba, Dong et al., 2024):

        y = W_o (norm(attention(x)) + norm(s6(x))) / 2 + b,  both of them of 2 D channels.

    Attributes:
        heads: Query heads N, of 2 D / N channels each.
        key_heads: Key and value heads, a divisor of N; N if not given.
        mask: Of the attention; the paper's is `Causal() & (Window(w) | Sinks(meta_tokens))` in most layers.
        state: Numbers per channel of the state-space heads.
        convolution: Width of their convolution.
        rotary_base: Base of the rotary positions.
        own_keys: Project keys and values; if not, those of the layer before it are read.
        eps: Of all its norms.
        use_bias: Biases of the projections of both and of W_o, as in the authors' code.
    """

    heads: int = 4
    key_heads: int | None = None
    mask: Mask | None = Causal()
    state: int = 16
    convolution: int = 3
    rotary_base: float | None = 10000.0
    own_keys: bool = True
    eps: float = 1e-6
    use_bias: bool = True

    @property
    def keys(self):
        return "own" if self.own_keys else "shared"

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Parallel:
        """The module; raises ValueError for sizes that do not divide."""
        inner = 2 * features
        if self.heads < 1 or inner % self.heads:
            raise ValueError(f"heads is {self.heads}: need a divisor of {inner}, twice the width")
        attention = nn.MultiHeadAttention(
            features,
            self.heads,
            key_heads=self.key_heads,
            head_dim=inner // self.heads,
            rotary_base=self.rotary_base,
            mask=self.mask,
            own_keys=self.own_keys,
            project=False,
            use_bias=self.use_bias,
            dtype=dtype,
            rngs=rngs,
        )
        sizes: dict[str, Any] = {"inner": inner, "state": self.state, "convolution": self.convolution}
        options: dict[str, Any] = {"use_bias": self.use_bias, "eps": self.eps, "dtype": dtype, "rngs": rngs}
        s6 = nn.S6(features, norm=True, project=False, **sizes, **options)
        return nn.Parallel(features, [attention, nn.Recurrent(s6)], channels=inner, **options)


@dataclass(frozen=True)
class Titans(Mixer):
    """Attention over little and a memory that learns for the rest (Titans, Behrouz et al., 2025).

    Attributes:
        wiring: "context": `nn.MemoryAsContext`; "gate": `nn.memory_as_gate`; "layer": `nn.memory_as_layer`.
        heads: Attention heads.
        window: Tokens that attention reaches, and those of a segment under "context".
        persistent: Learned tokens before every sequence, or before every segment under "context".
        memory: The memory. Under "context" without a convolution, and its inner batch divides the window.
        eps: Of the norms of the wiring, which "layer" has none of; the memory's own is in its spec.
    """

    wiring: Literal["context", "gate", "layer"] = "gate"
    heads: int = 4
    window: int = 32
    persistent: int = 4
    memory: NeuralMemory = NeuralMemory()
    eps: float = 1e-6

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The module; raises ValueError for sizes that do not fit."""
        memory = self.memory.build_mechanism(features, dtype, rngs)
        given: dict[str, Any] = {"persistent": self.persistent, "dtype": dtype, "rngs": rngs}
        if self.wiring == "context":
            return nn.MemoryAsContext(features, self.heads, memory, segment=self.window, eps=self.eps, **given)
        if self.wiring == "gate":
            return nn.memory_as_gate(features, self.heads, memory, window=self.window, eps=self.eps, **given)
        if self.wiring != "layer":
            raise ValueError(f"wiring is {self.wiring!r}: need 'context', 'gate' or 'layer'")
        return nn.memory_as_layer(features, self.heads, memory, window=self.window, **given)
