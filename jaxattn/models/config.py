"""Configs: what a model is made of, as frozen data that compares, prints and goes into YAML.

A layer is a mixer and a feed-forward block. Each spec has `build(features, dtype, rngs) -> module`, so a new mixer is
a new spec; the decoder knows none of them. Parts (masks, normalisers) stand in specs as they are.
"""

import abc
import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from flax import nnx

from jaxattn import nn
from jaxattn.core.attend.bias import ScoreBias
from jaxattn.core.attend.maps import Map
from jaxattn.core.attend.mask import Causal, Mask
from jaxattn.core.attend.normalize import Normalize, Softmax
from jaxattn.core.attend.position import RotaryScaling
from jaxattn.core.attend.score import Dot, Score
from jaxattn.models.spec import Spec, built


class Mixer(abc.ABC):
    """The spec of what moves information between tokens."""

    @property
    def keys(self) -> Literal["own", "shared", "none"]:
        """Whether it has keys and values, and whether they are its own or those of the layer before it, which has its
        own or shares them too."""
        return "none"

    @abc.abstractmethod
    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> Any:
        """The module, with the mixer protocol of `jaxattn.nn`; raises ValueError for sizes that do not divide."""


@dataclass(frozen=True)
class Attention(Mixer):
    """Multi-head attention as a layer's mixer; see `nn.MultiHeadAttention`.

    Attributes:
        heads: Number of query heads N.
        key_heads: Number of key and value heads K, a divisor of N; N if not given.
        head_dim: Channels per head H; width / N if not given.
        mask: Which keys a query may see.
        score: How well a query matches a key. In this and the next slots stands a part without arrays, or a `Spec` of
            what makes one that is learned or needs the sizes, such as `Spec(nn.NeuralScore, hidden=64)`.
        bias: What is added to a score because of where both stand, such as `Spec(Alibi.geometric)`.
        score_maps: What is done to the scores, one map after the other.
        normalize: How scores become weights, such as `Spec(nn.NullSoftmax)`.
        weight_maps: What is done to the weights, one map after the other.
        rotary_base: Base of the rotary position embedding; none for no rotation.
        rotary_fraction: Fraction of the channels that is rotated.
        rotary_scaling: How positions beyond those of training are read (Yarn, Llama3 or another).
        qk_norm: RMS norm of queries and keys, before rotation.
        gate: Multiply what heads read by a sigmoid gate of the input.
        own_keys: Project keys and values; if not, those of the layer before it are read.
        dropout: Dropout rate of the attention weights.
        convolution: Tokens that a short convolution of queries, keys and values sees; 0 for none.
        eps: Of the norms of queries and keys.
    """

    heads: int = 4
    key_heads: int | None = None
    head_dim: int | None = None
    mask: Mask | None = Causal()
    score: Spec | Score = Dot()
    bias: Spec | ScoreBias | None = None
    score_maps: tuple[Spec | Map, ...] = ()
    normalize: Spec | Normalize = Softmax()
    weight_maps: tuple[Spec | Map, ...] = ()
    rotary_base: float | None = 10000.0
    rotary_fraction: float = 1.0
    rotary_scaling: RotaryScaling | None = None
    qk_norm: bool = False
    gate: bool = False
    own_keys: bool = True
    dropout: float = 0.0
    convolution: int = 0
    eps: float = 1e-6

    def __post_init__(self):
        for name in ("score_maps", "weight_maps"):
            if not isinstance(getattr(self, name), list | tuple):
                raise TypeError(f"{name} must be a tuple such as (SoftCap(50.0),), got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))  # hashable, also when it came as a list
        for name in ("mask", "score", "bias", "score_maps", "normalize", "weight_maps"):
            if any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(getattr(self, name))):
                raise ValueError(
                    f"{name} of a config holds an array: need a part without, or a Spec of what makes one; a mask with "
                    "arrays is given when the model is called"
                )

    @property
    def keys(self):
        return "own" if self.own_keys else "shared"

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.MultiHeadAttention:
        """The module; raises ValueError for sizes that do not divide."""
        key_heads = self.heads if self.key_heads is None else self.key_heads
        head_dim = features // self.heads if self.head_dim is None else self.head_dim
        sizes = {"features": features, "heads": self.heads, "key_heads": key_heads, "head_dim": head_dim}

        def made(slot: Any) -> Any:
            return built(slot, **sizes, dtype=dtype, rngs=rngs)

        return nn.MultiHeadAttention(
            features,
            self.heads,
            key_heads=self.key_heads,
            head_dim=self.head_dim,
            rotary_base=self.rotary_base,
            rotary_fraction=self.rotary_fraction,
            rotary_scaling=self.rotary_scaling,
            qk_norm=self.qk_norm,
            eps=self.eps,
            gate=self.gate,
            own_keys=self.own_keys,
            dropout=self.dropout,
            convolution=self.convolution,
            score=made(self.score),
            bias=made(self.bias),
            mask=self.mask,
            normalize=made(self.normalize),
            score_maps=tuple(map(made, self.score_maps)),
            weight_maps=tuple(map(made, self.weight_maps)),
            dtype=dtype,
            rngs=rngs,
        )


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward block; see `nn.FeedForward`.

    Attributes:
        hidden: Hidden width; 4 times the model's width for gelu and 8/3 of it for swiglu (rounded up to a
            multiple of 16) if not given, which makes their parameter counts equal.
        kind: The nonlinearity.
    """

    hidden: int | None = None
    kind: Literal["gelu", "swiglu"] = "swiglu"

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.FeedForward:
        """The module."""
        default = 4 * features if self.kind == "gelu" else -(-8 * features // 48) * 16
        hidden = default if self.hidden is None else self.hidden
        return nn.FeedForward(features, hidden, kind=self.kind, dtype=dtype, rngs=rngs)


@dataclass(frozen=True)
class Layer:
    """One layer: x + mixer(norm(x)), then x + feed_forward(norm(x)).

    Attributes:
        mixer: What moves information between tokens.
        feed_forward: What transforms each token; None for a layer that is its mixer alone.
    """

    mixer: Mixer = Attention()
    feed_forward: FeedForward | None = FeedForward()


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only model: of tokens, or of vectors (`inputs`), from which it says `vocabulary` numbers.

    Attributes:
        vocabulary: Number of token ids, and of outputs at each position; bytes and their specials by default.
        context: Number of positions it is trained for and may generate to.
        width: Width D of the residual stream.
        layers: One spec per layer; equal neighbours are compiled once and scanned.
        meta_tokens: Learned tokens before every sequence (Hymba), through all layers; positions of tokens count from
            their number, and `Sinks(meta_tokens)` keeps them in sight of a window.
        tied: Use the token embedding as the output projection.
        inputs: Channels of the vectors that are read in by a linear map, where they are not tokens; 0 for tokens.
        dtype: Of the computation; parameters, norms and the residual stream are float32.
        eps: Of the norms before mixers, feed-forward blocks and the output; a mixer's own is in its spec.
    """

    vocabulary: int = 258
    context: int = 256
    width: int = 128
    layers: list[Layer] = field(default_factory=lambda: [Layer()] * 4)
    meta_tokens: int = 0
    tied: bool = True
    inputs: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    eps: float = 1e-6

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))  # hashable, also when it came as a list
        for name in ("vocabulary", "context", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("meta_tokens", "inputs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        if self.inputs and self.tied:
            raise ValueError(f"tied is True but inputs is {self.inputs}: need tied=False where there are no tokens")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}: need 'float32' or 'bfloat16'")
        if not self.layers:
            raise ValueError("layers is empty: need at least one Layer")
        kinds = ["none", *(layer.mixer.keys for layer in self.layers)]
        for number, (before, kind) in enumerate(itertools.pairwise(kinds)):
            if kind == "shared" and before == "none":
                raise ValueError(f"layers[{number}] shares the keys of the layer before it, which has none")
