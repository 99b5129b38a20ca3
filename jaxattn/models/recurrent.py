"""Specs of recurrent mixers: the arguments of the mechanisms of `jaxattn.nn`, as frozen data."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
from flax import nnx

from jaxattn import nn
from jaxattn.core.linear.feature import Elu1Features, Features
from jaxattn.core.memory.inner import Identity, InnerLoss, Link, SquaredError
from jaxattn.models.config import Mixer


class _Spec(Mixer):
    """Fields are the arguments of the `mechanism`."""

    mechanism: ClassVar[Any]

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module."""
        return nn.Recurrent(self.build_mechanism(features, dtype, rngs))

    def build_mechanism(self, features: int, dtype: Any, rngs: nnx.Rngs) -> Any:
        """What the module is made of."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return type(self).mechanism(features, dtype=dtype, rngs=rngs, **options)


def _holds_arrays(parts: Any) -> bool:
    return any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(parts))


@dataclass(frozen=True)
class LinearAttention(_Spec):
    """Attention by features; see `nn.LinearAttention`. feature_map: a part without arrays, or what makes a module from
    (heads, head_dim, rngs), such as `nn.HedgehogMap`."""

    mechanism = nn.LinearAttention

    heads: int = 4
    feature_map: Features | Any = Elu1Features()
    key_dim: int | None = None
    normalize: bool = True
    rotary_base: float | None = None
    convolution: int = 0
    gate: Literal["silu", "sigmoid"] | None = None
    eps: float = 1e-6

    def __post_init__(self):
        if isinstance(self.feature_map, Features) and _holds_arrays(self.feature_map):
            raise ValueError("feature_map of a spec holds no arrays: give what makes a module, such as nn.HedgehogMap")


@dataclass(frozen=True)
class RetNet(_Spec):
    """Retention; see `nn.RetNet`."""

    mechanism = nn.RetNet

    heads: int = 4
    value_dim: int | None = None
    rotary_base: float = 10000.0
    convolution: int = 0
    eps: float = 1e-6
    angles: Literal["rotary", "torchscale"] = "rotary"


@dataclass(frozen=True)
class GLA(_Spec):
    """Gated linear attention; see `nn.GLA`."""

    mechanism = nn.GLA

    heads: int = 4
    rank: int = 16
    convolution: int = 0
    eps: float = 1e-5


@dataclass(frozen=True)
class HGRN2(_Spec):
    """HGRN-2; see `nn.HGRN2`."""

    mechanism = nn.HGRN2

    heads: int = 4
    lower_bound: float = 0.0
    convolution: int = 0
    eps: float = 1e-5


@dataclass(frozen=True)
class DeltaNet(_Spec):
    """DeltaNet, and with decay="head" Gated DeltaNet, with "channel" Kimi delta attention; see `nn.DeltaNet`."""

    mechanism = nn.DeltaNet

    heads: int = 4
    decay: Literal["none", "head", "channel"] = "none"
    key_dim: int | None = None
    value_dim: int | None = None
    convolution: int = 4
    negative: bool = False
    rank: int | None = None
    eps: float = 1e-5


@dataclass(frozen=True)
class Mamba2(_Spec):
    """State-space duality; see `nn.Mamba2`."""

    mechanism = nn.Mamba2

    heads: int = 4
    state: int = 64
    expand: int = 2
    convolution: int = 4
    mimetic: bool = False
    eps: float = 1e-5


@dataclass(frozen=True)
class RWKV7(_Spec):
    """RWKV-7 time mixing; see `nn.RWKV7`."""

    mechanism = nn.RWKV7

    heads: int = 4
    rank: int = 16
    eps: float = 64e-5


@dataclass(frozen=True)
class Latte(_Spec):
    """Latent attention; see `nn.Latte`."""

    mechanism = nn.Latte

    heads: int = 4
    latents: int = 16
    causal: bool = True
    window: int | None = None
    rotary_base: float = 10000.0
    convolution: int = 0


@dataclass(frozen=True)
class NeuralMemory(_Spec):
    """A memory that is trained while it reads, of Titans and of Miras; see `nn.NeuralMemory`."""

    mechanism = nn.NeuralMemory

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
    eps: float = 1e-6

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))  # hashable, also when it came as a list
        if _holds_arrays((self.loss, self.link)):
            raise ValueError("loss and link of a spec hold no arrays: need plain numbers")


@dataclass(frozen=True)
class TTT(_Spec):
    """Test-time training, linear or deep; see `nn.TTT`."""

    mechanism = nn.TTT

    heads: int = 4
    deep: bool = False
    base_rate: float | None = None
    inner_batch: int = 16
    documents: int = 8
    convolution: int = 4
    rotary_base: float | None = 10000.0
    eps: float = 1e-6


@dataclass(frozen=True)
class S6(_Spec):
    """Mamba's selective scan; see `nn.S6`."""

    mechanism = nn.S6

    inner: int | None = None
    state: int = 16
    rank: int | None = None
    convolution: int = 4
    norm: bool = False
    eps: float = 1e-6


@dataclass(frozen=True)
class GatedConvolution(_Spec):
    """A convolution over a few tokens; see `nn.GatedConvolution`."""

    mechanism = nn.GatedConvolution

    width: int = 3
    expand: int = 2
    use_bias: bool = True
