"""Owners of learned parts: modules that hold the arrays of a part and return the part when called without arguments.

Owners stand in the slots of `MultiHeadAttention` wherever a part may. Each class says where its arrays start; most
start as ordinary attention. An owner of your own is as short as these. All raise ValueError for sizes below 1.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.cache.forecast import Convolutions
from jaxattn.core.attend.bias import RelativeBias
from jaxattn.core.attend.maps import Convolution, MixHeads, Temperature
from jaxattn.core.attend.normalize import Softmax
from jaxattn.core.attend.score import Additive, Bilinear, Neural
from jaxattn.core.linear.feature import HedgehogFeatures, HedgehogKind
from jaxattn.core.linear.random_feature import RandomFeatures, RandomKind, orthogonal_gaussian
from jaxattn.nn.parameter import decayed, undecayed

lecun, he = jax.nn.initializers.lecun_normal(), jax.nn.initializers.he_normal()


def _check_sizes(owner: nnx.Module, **sizes: int | None) -> None:
    """Raises ValueError for a size below 1; None is a size that was not given."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{type(owner).__name__}: {name} must be at least 1, got {size}")


class BilinearScore(nnx.Module):
    """Owns the weight of `Bilinear`, qᵀ W k: one for all heads, or one for each of `heads`.

    The weight starts as W = I/√H, which is scaled dot product.

    Args:
        head_dim: H, the channels per head.
        heads: The number of heads that have a weight of their own; None for one weight that all share.
    """

    def __init__(self, head_dim: int, heads: int | None = None):
        _check_sizes(self, head_dim=head_dim, heads=heads)
        weight = head_dim**-0.5 * jnp.eye(head_dim)
        self.weight = (
            decayed(weight, "head_dim", None)
            if heads is None
            else decayed(jnp.tile(weight, (heads, 1, 1)), "heads", "head_dim", None)
        )

    def __call__(self) -> Bilinear:
        return Bilinear(self.weight[...])


class AdditiveScore(nnx.Module):
    """Owns the weights of `Additive`, vᵀ tanh(A q + B k), with A and B [H, hidden] for all heads.

    The variance of A and B is 1 / (2 H) and that of v 1 / hidden: queries and keys of unit variance start with scores
    of order 1, as those of scaled dot product are.

    Args:
        head_dim: H, the channels per head.
        hidden: The number of hidden units.
        rngs: Streams for the initial parameters.
    """

    def __init__(self, head_dim: int, hidden: int, *, rngs: nnx.Rngs):
        _check_sizes(self, head_dim=head_dim, hidden=hidden)
        self.pair_weight = decayed(lecun(rngs.params(), (2 * head_dim, hidden)))
        self.vector = decayed(lecun(rngs.params(), (hidden, 1))[:, 0])

    def __call__(self) -> Additive:
        query_weight, key_weight = jnp.split(self.pair_weight[...], 2)
        return Additive(query_weight, key_weight, self.vector[...])


class NeuralScore(nnx.Module):
    """Owns the network of `Neural` on the pair [q; k], shared by all heads: 2 H -> hidden -> 1.

    Biases start at 0 and weights at variance 1 / (2 H), then 2 / (inputs of the layer), which relu halves again (He et
    al., 2015). The network has no scale besides, so scores start at order 1.

    Args:
        head_dim: H, the channels per head.
        hidden: The number of hidden units.
        second: The units of a second hidden layer, 2 H -> hidden -> second -> 1; the paper's is hidden / 2. None for
            one hidden layer.
        rngs: Streams for the initial parameters.
    """

    def __init__(self, head_dim: int, hidden: int, second: int | None = None, *, rngs: nnx.Rngs):
        _check_sizes(self, head_dim=head_dim, hidden=hidden, second=second)
        self.w1, self.b1 = decayed(lecun(rngs.params(), (2 * head_dim, hidden))), undecayed(jnp.zeros(hidden))
        if second is None:
            self.w2, self.b2, self.w3 = decayed(he(rngs.params(), (hidden, 1))[:, 0]), None, None
        else:
            self.w2, self.b2 = decayed(he(rngs.params(), (hidden, second))), undecayed(jnp.zeros(second))
            self.w3 = decayed(he(rngs.params(), (second, 1))[:, 0])

    def __call__(self) -> Neural:
        if self.b2 is None or self.w3 is None:
            return Neural(self.w1[...], self.b1[...], self.w2[...])
        return Neural(self.w1[...], self.b1[...], self.w2[...], self.b2[...], self.w3[...])


class RelativePositionBias(nnx.Module):
    """Owns the table [N, buckets] of `RelativeBias`; the default sizes are those of T5 (Raffel et al., 2020).

    The table starts at 0, no bias. Give the attention `position=None` where this bias is to be all it knows of
    positions.

    Args:
        heads: N, the number of heads.
        buckets: The number of buckets.
        max_distance: The distance beyond which all keys share the last bucket.
        bidirectional: Whether each direction gets half of the buckets.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128, bidirectional: bool = False):
        _check_sizes(self, heads=heads, buckets=buckets, max_distance=max_distance)
        self.table = undecayed(jnp.zeros((heads, buckets)), "heads", None)
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def __call__(self) -> RelativeBias:
        return RelativeBias(self.table[...], self.max_distance, self.bidirectional)


class LearnedTemperature(nnx.Module):
    """Owns log τ per head [N] and makes the score map `Temperature(τ)`, so τ stays positive; τ starts at 1.

    Args:
        heads: N, the number of heads.
    """

    def __init__(self, heads: int):
        _check_sizes(self, heads=heads)
        self.log_temperature = undecayed(jnp.zeros(heads), "heads")

    def __call__(self) -> Temperature:
        return Temperature(jnp.exp(self.log_temperature[...]))


class HeadMixing(nnx.Module):
    """Owns the matrix [N, N] of `MixHeads`, for scores or for weights (talking heads, Shazeer et al., 2020).

    The matrix starts as the identity, as in multi-token attention (2025).

    Args:
        heads: N, the number of heads.
    """

    def __init__(self, heads: int):
        _check_sizes(self, heads=heads)
        self.weight = undecayed(jnp.eye(heads), "heads", None)

    def __call__(self) -> MixHeads:
        return MixHeads(self.weight[...])


class KeyQueryConvolution(nnx.Module):
    """Owns a kernel per head, [N, queries, keys], of `Convolution`, for scores or for weights.

    The kernel starts as the identity: 1 at the current query in the centre of the keys, and 0 elsewhere (multi-token
    attention, 2025; its language models use 6 queries and 11 keys).

    Args:
        heads: N, the number of heads.
        queries: The number of queries that the kernel spans.
        keys: The number of keys that the kernel spans, odd.

    Raises:
        ValueError: A size is below 1, or `keys` is even.
    """

    def __init__(self, heads: int, queries: int, keys: int):
        _check_sizes(self, heads=heads, queries=queries, keys=keys)
        if keys % 2 == 0:
            raise ValueError(f"KeyQueryConvolution: keys is {keys}: need an odd number, so that there is a centre")
        self.kernel = undecayed(jnp.zeros((heads, queries, keys)).at[:, -1, keys // 2].set(1), "heads", None, None)

    def __call__(self) -> Convolution:
        return Convolution(self.kernel[...])


class HedgehogMap(nnx.Module):
    """Owns the weights of `HedgehogFeatures`, a matrix and a bias per head for queries and for keys.

    The map starts at W = I and b = 0. It is made by (heads, head_dim, rngs), as `LinearAttention` makes its feature
    map.

    Args:
        heads: The number of query heads.
        head_dim: H, the channels per head.
        rngs: Not used, since the start is not random.
        key_heads: K, the number of key heads; as many as query heads unless given.
        kind: The kind of the features, see `HedgehogFeatures`.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        rngs: nnx.Rngs | None = None,
        *,
        key_heads: int | None = None,
        kind: HedgehogKind = "softmax",
    ):
        _check_sizes(self, heads=heads, head_dim=head_dim, key_heads=key_heads)
        self.kind: HedgehogKind = kind
        start = HedgehogFeatures.identity(heads, head_dim, key_heads, kind)
        self.query_weight = undecayed(start.query_weight, "heads", "head_dim", None)
        self.key_weight = undecayed(start.key_weight, "key_heads", "head_dim", None)
        self.query_bias = undecayed(start.query_bias, "heads", None)
        self.key_bias = undecayed(start.key_bias, "key_heads", None)

    def __call__(self) -> HedgehogFeatures:
        weights = self.query_weight[...], self.key_weight[...]
        return HedgehogFeatures(*weights, self.query_bias[...], self.key_bias[...], self.kind, self.kind == "exp")


class RandomFeatureMap(nnx.Module):
    """Owns the projection of `RandomFeatures`, which is drawn and not trained (Choromanski et al., 2021).

    The directions are drawn in orthogonal blocks. `redraw(key)` draws them anew.

    Args:
        heads: The number of heads, at least 1; all of them share the projection.
        head_dim: H, the channels per head.
        rngs: Streams for the initial parameters.
        directions: m, the number of directions; H log H if not given.
        kind: The kind of the features, see `RandomFeatures`.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        rngs: nnx.Rngs,
        *,
        directions: int | None = None,
        kind: RandomKind = "positive",
    ):
        directions = max(int(head_dim * math.log(head_dim)), 1) if directions is None else directions
        _check_sizes(self, heads=heads, head_dim=head_dim, directions=directions)
        self.kind: RandomKind = kind
        self.projection = nnx.Variable(orthogonal_gaussian(rngs.params(), directions, head_dim))

    def redraw(self, key: jax.Array) -> None:
        """Draws another projection of the same size, in place."""
        directions, head_dim = self.projection.shape
        self.projection[...] = orthogonal_gaussian(key, directions, head_dim)

    def __call__(self) -> RandomFeatures:
        return RandomFeatures(self.projection[...], self.kind, normalized=True)


class NullSoftmax(nnx.Module):
    """Owns one null logit per head, initially 0, and makes `Softmax(null_logit)` when called: a learned sink.

    Args:
        heads: N, the number of heads.
    """

    def __init__(self, heads: int):
        _check_sizes(self, heads=heads)
        self.null_logit = undecayed(jnp.zeros(heads), "heads")

    def __call__(self) -> Softmax:
        return Softmax(self.null_logit[...])


class AttentionForecast(nnx.Module):
    """Owns the arrays of `cache.Convolutions`, and returns it (AttentionPredictor, Yang et al., 2025).

    With the sizes of the paper there are 4 832 parameters. Fit them with `models.fit_forecast`.

    Args:
        first: The channels of the first convolution, at least 1.
        second: The channels of the second one, at least 1.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, first: int = 16, second: int = 32, *, rngs: nnx.Rngs):
        _check_sizes(self, first=first, second=second)
        self.first = decayed(he(rngs.params(), (3, 3, 1, first)))
        self.first_bias = undecayed(jnp.zeros(first))
        self.second = decayed(he(rngs.params(), (3, 3, first, second)))
        self.second_bias = undecayed(jnp.zeros(second))
        self.weight = decayed(lecun(rngs.params(), (second, 1))[:, 0])

    def __call__(self) -> Convolutions:
        """Returns the forecast with the present arrays."""
        arrays = (self.first, self.first_bias, self.second, self.second_bias, self.weight)
        return Convolutions(*(each[...] for each in arrays))
