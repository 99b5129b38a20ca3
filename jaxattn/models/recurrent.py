"""Specs of recurrent mixers: the arguments of the mechanisms of `jaxattn.nn`, as frozen data."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import nnx

from jaxattn import nn
from jaxattn.core.feature import Elu1Features, Features
from jaxattn.core.inner import Identity, InnerLoss, Link, SquaredError
from jaxattn.models.config import Mixer


def _build(mechanism: Any, spec: Any, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
    options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return nn.Recurrent(mechanism(features, dtype=dtype, rngs=rngs, **options))


@dataclass(frozen=True)
class LinearAttention(Mixer):
    """Attention by features; see `nn.LinearAttention`. feature_map: a part without arrays, or what makes a module from
    (heads, head_dim, rngs), such as `nn.HedgehogMap`."""

    heads: int = 4
    feature_map: Features | Any = Elu1Features()
    key_dim: int | None = None
    normalize: bool = True
    rotary_base: float | None = None
    convolution: int = 0
    gate: Literal["silu", "sigmoid"] | None = None

    def __post_init__(self):
        if isinstance(self.feature_map, Features) and jax.tree.leaves(self.feature_map):
            raise ValueError("feature_map of a spec holds no arrays: give what makes a module, such as nn.HedgehogMap")

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.LinearAttention, self, features, dtype, rngs)


@dataclass(frozen=True)
class RetNet(Mixer):
    """Retention; see `nn.RetNet`."""

    heads: int = 4
    value_dim: int | None = None
    rotary_base: float = 10000.0

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.RetNet, self, features, dtype, rngs)


@dataclass(frozen=True)
class GLA(Mixer):
    """Gated linear attention; see `nn.GLA`."""

    heads: int = 4
    rank: int = 16

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.GLA, self, features, dtype, rngs)


@dataclass(frozen=True)
class HGRN2(Mixer):
    """HGRN-2; see `nn.HGRN2`."""

    heads: int = 4
    lower_bound: float = 0.0

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.HGRN2, self, features, dtype, rngs)


@dataclass(frozen=True)
class DeltaNet(Mixer):
    """DeltaNet, and with decay="head" Gated DeltaNet, with "channel" Kimi delta attention; see `nn.DeltaNet`."""

    heads: int = 4
    decay: Literal["none", "head", "channel"] = "none"
    key_dim: int | None = None
    value_dim: int | None = None
    convolution: int = 4
    negative: bool = False
    rank: int = 16

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.DeltaNet, self, features, dtype, rngs)


@dataclass(frozen=True)
class Mamba2(Mixer):
    """State-space duality; see `nn.Mamba2`."""

    heads: int = 4
    state: int = 64
    expand: int = 2
    convolution: int = 4
    mimetic: bool = False

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.Mamba2, self, features, dtype, rngs)


@dataclass(frozen=True)
class RWKV7(Mixer):
    """RWKV-7 time mixing; see `nn.RWKV7`."""

    heads: int = 4
    rank: int = 16

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.RWKV7, self, features, dtype, rngs)


@dataclass(frozen=True)
class Latte(Mixer):
    """Latent attention; see `nn.Latte`."""

    heads: int = 4
    latents: int = 16

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.Latte, self, features, dtype, rngs)


@dataclass(frozen=True)
class NeuralMemory(Mixer):
    """A memory that is trained while it reads, of Titans and of Miras; see `nn.NeuralMemory`."""

    heads: int = 4
    hidden: tuple[int, ...] = (64,)
    loss: InnerLoss = SquaredError()
    link: Link = Identity()
    momentum: bool = True
    normalize: bool = False
    residual: bool = False
    max_rate: float = 0.1
    inner_batch: int = 16
    documents: int = 8
    convolution: int = 4
    gate: Literal["silu", "sigmoid"] | None = "silu"

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))  # hashable, also when it came as a list
        if any(hasattr(leaf, "shape") for leaf in jax.tree.leaves((self.loss, self.link))):
            raise ValueError("loss and link of a spec hold no arrays: need plain numbers")

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.NeuralMemory, self, features, dtype, rngs)


@dataclass(frozen=True)
class TTT(Mixer):
    """Test-time training, linear or deep; see `nn.TTT`."""

    heads: int = 4
    deep: bool = False
    base_rate: float | None = None
    inner_batch: int = 16
    documents: int = 8
    convolution: int = 4

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return _build(nn.TTT, self, features, dtype, rngs)
