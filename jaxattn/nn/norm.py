"""Norms over the channels of each token, with a site for the root that they divide by."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.nn.parameter import undecayed
from jaxattn.nn.spec import Spec
from jaxattn.nn.tap import Tap


class RMSNorm(nnx.Module):
    """(offset + g) ⊙ x / √(mean(x²) + eps) over the channels, with learned gains g (Zhang & Sennrich, 2019).

    Args:
        features: D, the channels.
        eps: eps, above 0.
        offset: The number added to the gains: 0 for gains that start at 1, or 1 for gains that start at 0 (Gemma,
            2024).
        dtype: The dtype of the result; by default that of x, float32 at least. Means are float32 or better.

    Raises:
        ValueError: `eps` is not positive.
    """

    def __init__(self, features: int, *, eps: float = 1e-6, offset: float = 0.0, dtype: Any = None):
        self.eps, self.offset, self.dtype = _positive(eps), offset, dtype
        self.scale = undecayed(jnp.full(features, 1.0 - offset))

    def __call__(self, x: Float[Array, "*b d"], tap: Tap | None = None, site: str = "") -> Float[Array, "*b d"]:
        """Returns the normed x.

        Args:
            x: [..., D].
            tap: Edits and records.
            site: The site of `tap` at which the √ can be recorded and changed.
        """
        wide = _wide(x)
        gain: Any = self.scale[...] + self.offset
        return _cast(wide * (1 / _root(wide, self.eps, tap, site)) * gain, x, self.dtype)


class LayerNorm(nnx.Module):
    """g ⊙ (x − mean(x)) / √(var(x) + eps) + b over the channels, with learned g and b (Ba et al., 2016).

    Args:
        features: D, the channels.
        eps: eps, above 0.
        learned: Whether there are g and b.
        use_bias: Whether there is b, if they are learned.
        dtype: The dtype of the result; by default that of x, float32 at least. Means are float32 or better.

    Raises:
        ValueError: `eps` is not positive.
    """

    def __init__(
        self, features: int, *, eps: float = 1e-5, learned: bool = True, use_bias: bool = True, dtype: Any = None
    ):
        self.eps, self.dtype = _positive(eps), dtype
        self.scale = undecayed(jnp.ones(features)) if learned else None
        self.bias = undecayed(jnp.zeros(features)) if learned and use_bias else None

    def __call__(self, x: Float[Array, "*b d"], tap: Tap | None = None, site: str = "") -> Float[Array, "*b d"]:
        """Returns the normed x.

        Args:
            x: [..., D].
            tap: Edits and records.
            site: The site of `tap` at which the √ can be recorded and changed.
        """
        wide = _wide(x)
        centred = wide - wide.mean(-1, keepdims=True)
        y: Any = centred * (1 / _root(centred, self.eps, tap, site))
        y = y if self.scale is None else y * self.scale[...]
        return _cast(y if self.bias is None else y + self.bias[...], x, self.dtype)


class AcrossHeads(nnx.Module):
    """A norm of all heads of a token together, over N·H channels, such as that of queries and keys in OLMo 2 (2025).

    Args:
        features: H, the channels of a head.
        heads: N, the number of heads.
        norm: The norm.
        dtype: The dtype of the result.
        rngs: Streams for the initial parameters.
    """

    def __init__(self, features: int, heads: int, *, norm: Spec = Spec(RMSNorm), dtype: Any = None, rngs: nnx.Rngs):
        self.norm = norm.build(features=features * heads, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b n h"]) -> Float[Array, "*b n h"]:
        """Returns the normed x [..., N, H]."""
        return self.norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _root(x: Array, eps: float, tap: Tap | None, site: str) -> Array:
    """Returns √(mean(x²) + eps), at the site."""
    root = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return root if tap is None else tap(site, root)


def _cast(y: Array, x: Array, dtype: Any) -> Array:
    return y.astype(jnp.promote_types(x.dtype, jnp.float32) if dtype is None else dtype)


def _positive(eps: float) -> float:
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    return eps
