"""Random features, FAVOR+: an estimate of the softmax kernel that is right on average (Performer)."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.checks import check_positive, check_static_int
from jaxattn.core.linear.feature import Features, Number, check_kind, checked, root_of_scale
from jaxattn.core.matmul import product
from jaxattn.core.part import part

RandomKind = Literal["positive", "hyperbolic", "trigonometric", "relu"]


@part
class RandomFeatures(Features):
    """FAVOR+ (Choromanski et al., 2021): random features whose φ · ψ is exp(scale · q·k) on average over W.

    With the m rows w of `projection` W [m, H] drawn from N(0, I), x = √scale · q and y = √scale · k, φ is, by `kind`,

        positive        e^{−|x|²/2} [e^{w·x}] / √m                        F = m
        hyperbolic      e^{−|x|²/2} [e^{w·x}, e^{−w·x}] / √(2m)           F = 2m
        trigonometric   e^{+|x|²/2} [cos w·x, sin w·x] / √m               F = 2m
        relu            [max(w·x, 0) + 0.001] / √m                        F = m

    and ψ the same of y. Their mean squared errors for independent rows, with SM = exp(x·y):

        positive        SM² e^{|x+y|²} (1 − e^{−|x+y|²}) / m
        hyperbolic      half of that, times 1 − e^{−|x+y|²}
        trigonometric   SM⁻² e^{|x+y|²} (1 − e^{−|x−y|²})² / 2m

    so positive features are good where weights are small, and trigonometric ones, which may be negative, where they are
    large. All errors grow exponentially with the norms: keep |x + y|² to a few units. `relu` is another kernel, the
    arc-cosine one (Cho and Saul, 2009) for the small offset 0, |x| |y| (sin θ + (π − θ) cos θ) / 2π with the angle θ.
    It has no exponential, and `normalized` does nothing.

    The kinds with e^{−|x|²/2} are at most e^{|w|²/2}; a key with |y|² / 2 − max w·y above 87 has ψ = 0 in float32.

    Attributes:
        projection: W [m, H], shared by all heads, queries and keys. Draw it by `orthogonal_gaussian`, with m from H ln
            H. W is an array leaf, so hold it constant in training or redraw it now and then.
        kind: "positive", "hyperbolic", "trigonometric" or "relu".
        scale: By default H**-0.5.
        normalized: Whether φ of a query is divided by a number of its own, see `Features`.

    Raises:
        ValueError: `kind` is another, `projection` is not [m, H] with m ≥ 1, or `scale` is not positive.
    """

    projection: Float[Array, "m h"]
    kind: RandomKind = "positive"
    scale: Number | None = None
    normalized: bool = False

    def __post_init__(self):
        check_kind("RandomFeatures", self.kind, RandomKind)
        check_positive("RandomFeatures", "scale", self.scale)

    def __call__(self, query, key):
        query, key = checked("RandomFeatures", query, key)
        shape, width = jnp.shape(self.projection), query.shape[-1]
        if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
            raise ValueError(
                f"RandomFeatures: projection has shape {shape} but query has head dim {width}: need [m, {width}] with "
                "m >= 1"
            )
        root = root_of_scale(self.scale, query)
        return self._features(query * root, self.normalized), self._features(key * root, False)

    def _features(self, x: Float[Array, "... h"], normalized: bool) -> Float[Array, "... f"]:
        projected = product(x, jnp.asarray(self.projection, x.dtype).T)
        half_square = jnp.square(x).sum(-1, keepdims=True) / 2
        rows = projected.shape[-1]
        if self.kind == "relu":
            # The offset of the authors' code: it keeps the total of a row positive.
            return (jax.nn.relu(projected) + 1e-3) / math.sqrt(rows)
        if self.kind == "trigonometric":
            waves = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], -1) / math.sqrt(rows)
            return waves if normalized else waves * jnp.exp(half_square)
        if self.kind == "hyperbolic":
            projected = jnp.concatenate([projected, -projected], -1)
        if normalized:
            return jax.nn.softmax(projected)
        return jnp.exp(projected - half_square) / math.sqrt(projected.shape[-1])

    def size(self, head_dim):
        return jnp.shape(self.projection)[0] * (2 if self.kind in ("hyperbolic", "trigonometric") else 1)


Scaling = Literal["chi", "sqrt", "none"]


def orthogonal_gaussian(key: Any, count: int, head_dim: int, scaling: Scaling = "chi") -> Float[Array, "m h"]:
    """Draws m = `count` directions [m, H] for `RandomFeatures`, orthogonal in blocks of H (Choromanski et al., 2021).

    Each block of H rows is a uniformly random orthogonal matrix, whose rows get, by `scaling`, the lengths

        chi    those of Gaussian vectors, so that every row by itself is N(0, I) and features stay unbiased
        sqrt   √H each: less variance, slightly biased
        none   no blocks: independent rows of N(0, I)

    Orthogonal rows have a smaller error than independent ones.

    Args:
        key: The random key.
        count: m, at least 1.
        head_dim: H, at least 1.
        scaling: "chi", "sqrt" or "none".

    Raises:
        TypeError: `count` or `head_dim` is not an int.
        ValueError: `count` or `head_dim` is below 1, or `scaling` is another.
    """
    check_static_int("orthogonal_gaussian", "count", count, 1)
    check_static_int("orthogonal_gaussian", "head_dim", head_dim, 1)
    if scaling not in get_args(Scaling):
        raise ValueError(f"orthogonal_gaussian: scaling must be 'chi', 'sqrt' or 'none', got {scaling!r}")
    for_directions, for_lengths = jax.random.split(key)
    gaussian = jax.random.normal(for_lengths, (count, head_dim))
    if scaling == "none":
        return gaussian
    blocks = jax.random.orthogonal(for_directions, head_dim, (-(-count // head_dim),))
    directions = blocks.reshape(-1, head_dim)[:count]
    lengths = jnp.linalg.norm(gaussian, axis=-1, keepdims=True) if scaling == "chi" else math.sqrt(head_dim)
    return directions * lengths


# Learned features.
