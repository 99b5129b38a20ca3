"""Maps: changes of the scores before they are masked and normalised, and of the weights before they read values.

A map is a part called on a block of either, `map(x [..., N, T, S], tile)`. It returns the changed block. The `Tile`
says where the block stands and which of its pairs are visible.

`scores_need` and `weights_need` say how much a map must see in the slot `score_maps` or `weight_maps`, by default
"rows":

    "tile"    any block at all. As a weight map it then must commute with a factor per row, map(c·w) = c·map(w), since
              tiles are mapped before their rows are normalised.
    "rows"    all keys of a query; also of the `halo` queries before it.
    "matrix"  all queries at once: only the dense implementation can serve it.

`heads_apart` promises that each head of the result depends on the same head of the block alone. The default is False.
Where heads see different keys, they are computed one by one only with this promise. Arrays by head or by batch entry
then have to say so in their annotation, by the names `heads` and `*batch` (see `cut`).
"""

import abc
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from jaxattn.core import noise
from jaxattn.core.attend.bias import log_gaussian
from jaxattn.core.attend.tile import Tile
from jaxattn.core.checks import check_entries, check_positive, check_static_int, count_ids
from jaxattn.core.noise import Seed
from jaxattn.core.numeric import largest, per_head, ratio
from jaxattn.core.part import part
from jaxattn.core.table import take

Need = Literal["tile", "rows", "matrix"]
Block = Float[Array, "*b n t s"]
Queries = Int[Array, "*b 1 t 1"]


class Map(abc.ABC):
    """The base class of parts for score_maps and weight_maps; the head of this file says what they must offer.

    Attributes:
        scores_need: How much the map must see of the scores.
        weights_need: How much the map must see of the weights.
        heads_apart: Whether each head of the result depends on the same head of the block alone.
    """

    scores_need: ClassVar[Need] = "rows"
    weights_need: ClassVar[Need] = "rows"
    heads_apart: ClassVar[bool] = False

    @property
    def halo(self) -> int:
        """The number of queries before a row that the map reads."""
        return 0

    @property
    def kind(self) -> str:
        """The name of the map in errors and explanations."""
        return type(self).__name__

    @abc.abstractmethod
    def __call__(self, x: Block, tile: Tile) -> Block:
        """Returns the changed block."""


# Maps of scores.


@part
class SoftCap(Map):
    """Caps scores at ±cap: s → cap · tanh(s / cap)  (Gemma 2, 2024).

    The map acts after scale and bias and before the mask. cap = ∞ is the identity.

    Attributes:
        cap: The bound, a positive number.

    Raises:
        ValueError: `cap` is not positive.
    """

    cap: float

    scores_need: ClassVar[Need] = "tile"
    heads_apart: ClassVar[bool] = True

    def __post_init__(self):
        check_positive("SoftCap", "cap", self.cap)

    def __call__(self, x, tile):
        return x if math.isinf(self.cap) else self.cap * jnp.tanh(x / self.cap)


@part
class Temperature(Map):
    """Divides by a temperature: s → s / τ. τ = 1 is the identity.

    Attributes:
        temperature: τ > 0, one number or one per head [N]. An array is learned.

    Raises:
        ValueError: `temperature` is a number that is not positive.
    """

    temperature: Float[Array, ""] | Float[Array, " heads"] | float

    scores_need: ClassVar[Need] = "tile"
    heads_apart: ClassVar[bool] = True

    def __post_init__(self):
        check_positive("Temperature", "temperature", self.temperature)

    def __call__(self, x, tile):
        return x / per_head("temperature", self.temperature, x)


@part
class Temporal(Map):
    """Discounts keys that earlier queries attended to: s_ti → s_ti − log Σ_{j<t} exp(s_ji)  (Paulus et al., 2018).

    Softmax then gives weights ∝ exp(s_ti) / Σ_{j<t} exp(s_ji), and exp(s_1i) for the first query that sees key i.
    "Earlier" means before it in the array. Hidden pairs and empty slots count for nothing. Adding a constant to all
    scores of a key changes only the first query that sees it.
    """

    scores_need: ClassVar[Need] = "matrix"
    weights_need: ClassVar[Need] = "matrix"

    def __call__(self, x, tile):
        shown = tile.shown(x.shape)
        seen_before = jnp.cumsum(shown, -2) - shown > 0
        # A finite stand-in for −∞, below every score by more than any float can tell: cumulative sums keep no NaN.
        low = jax.lax.stop_gradient(x.min((-2, -1), keepdims=True) - 1e4)
        totals = jax.lax.cumlogsumexp(jnp.where(shown, x, low), axis=x.ndim - 2)
        before = jnp.concatenate([jnp.zeros_like(totals[..., :1, :]), totals[..., :-1, :]], -2)
        return x - jnp.where(seen_before, before, 0)


# Maps of scores or of weights.


@part
class MixHeads(Map):
    """Lets heads read each other: x_n → Σ_m weight[n, m] · x_m  (talking heads, Shazeer et al., 2020).

    A permutation permutes the heads of the scores or weights, not those of the values.

    Attributes:
        weight: [N, N]. The identity matrix is the identity.

    Raises:
        ValueError: `weight` has another shape.
    """

    weight: Float[Array, "heads heads"]

    scores_need: ClassVar[Need] = "tile"

    def __call__(self, x, tile):
        heads = x.shape[-3]
        if jnp.shape(self.weight) != (heads, heads):
            raise ValueError(f"MixHeads: weight has shape {jnp.shape(self.weight)}: need ({heads}, {heads})")
        if tile.visible is not None:
            x = jnp.where(tile.visible, x, 0)
        weight = jnp.asarray(self.weight, x.dtype)
        return jnp.einsum("nm,...mts->...nts", weight, x, precision=jax.lax.Precision.HIGHEST)


@part
class Convolution(Map):
    """Convolves over queries and keys: x_nij → Σ_a Σ_b kernel[n, a, b] · x_{n, i − (A−1) + a, j + b − ⌊B/2⌋}.

    This map is the key-query convolution of multi-token attention. Row i reads the A − 1 rows before it, and B/2 keys
    on either side, so a key can match a conjunction of queries. Neighbours are those in the arrays, and hidden pairs
    count as 0. Causal and document masks stay leak-free, since hidden pairs are 0 before the convolution and hidden
    after it.

    Attributes:
        kernel: [N or 1, A, B] with B odd. A kernel with 1 in the last row's centre and 0 elsewhere is the identity.

    Raises:
        ValueError: B is even, or the heads do not fit.
    """

    kernel: Float[Array, "heads a b"]

    @property
    def halo(self):
        return self.kernel.shape[-2] - 1

    def __call__(self, x, tile):
        kernel = jnp.asarray(self.kernel, x.dtype)
        heads, rows, columns = kernel.shape
        if columns % 2 == 0 or heads not in (1, x.shape[-3]):
            raise ValueError(
                f"Convolution: kernel has shape {kernel.shape}: need (1 or {x.shape[-3]} heads, rows, an odd number)"
            )
        shown = tile.shown(x.shape)
        length, keys = x.shape[-2:]
        pad = [(0, 0)] * (x.ndim - 2) + [(rows - 1, 0), (columns // 2, columns // 2)]
        padded = jnp.pad(jnp.where(shown, x, 0), pad)
        total = sum(
            kernel[:, a, b, None, None] * padded[..., a : a + length, b : b + keys]
            for a in range(rows)
            for b in range(columns)
        )
        return jnp.where(shown, total, 0)


# Maps of weights. Those that take some away give it to the rest of the row, whose total stays what it was.


def kept_weights(weights: Block, kept: Bool[Array, "*b n t s"]) -> Block:
    """Keeps some weights, scaled so that each row's total stays as before; a row that keeps none is zeros."""
    left = jnp.where(kept, weights, 0)
    return left * ratio(weights.sum(-1, keepdims=True), left.sum(-1, keepdims=True))


@part
class TopKWeights(Map):
    """Keeps the k largest weights of each row (ties: the first keys) and scales them to the row's former total.

    Attributes:
        k: The number of weights to keep, at least 1.

    Raises:
        TypeError: `k` is not an int.
        ValueError: `k` is below 1.
    """

    k: int

    def __post_init__(self):
        check_static_int("TopKWeights", "k", self.k, 1)

    def __call__(self, x, tile):
        return kept_weights(x, largest(x, tile.visible, self.k)[0])


@part
class DropTopK(Map):
    """Drops ⌊rate · m⌋ of the m = min(k, visible keys) largest weights of each row at random, and scales the others.

    This map is the stochastic top-k masking of ACMIL (Zhang et al., 2024). After softmax it equals masking those scores
    with −∞. The choice is a function of key, head and positions. Leave the map out when evaluating.

    Attributes:
        k: The number of largest weights to choose from, at least 1.
        rate: The share of them to drop, 0 ≤ rate < 1.
        key: The random key.

    Raises:
        TypeError: `k` is not an int, or `rate` is not a number.
        ValueError: `k` is below 1, or `rate` is not at least 0 and below 1.
    """

    k: int
    rate: float
    key: Seed

    def __post_init__(self):
        check_static_int("DropTopK", "k", self.k, 1)
        check_rate("DropTopK", self.rate)

    def __call__(self, x, tile):
        top, index = largest(x, tile.visible, self.k)
        coins = noise.uniform(noise.seeds(self.key, x.shape[:-2]), tile.query, tile.key)
        # Those that are not among the largest get a coin above all others: they are never dropped.
        coins = jnp.take_along_axis(jnp.where(top, coins, 2), index, axis=-1)
        rank = jnp.argsort(jnp.argsort(coins, axis=-1), axis=-1)
        # ⌊rate · m⌋ of the decimal that was written: 0.6 · 5 is 3, though the product of floats is below it.
        counts = np.floor(self.rate * np.arange(index.shape[-1] + 1) + 1e-9).astype(np.int32)
        count = jnp.asarray(counts)[top.sum(-1, keepdims=True)]
        dropped = jnp.put_along_axis(jnp.zeros(x.shape, bool), index, rank < count, axis=-1, inplace=False)
        return kept_weights(x, ~dropped)


@part
class Reallocate(Map):
    """Gives each group of keys a new mass: w_ij → w_ij · m'_g / m_g for key j in group g, where m_g = Σ_{j in g} w_ij.

    Proportions inside a group stay. The map equals adding log(m'_g / m_g) to the scores of the group (log-bias lemma).
    A group without weight in a row has nothing to scale and stays 0.

    Attributes:
        groups: Integers [..., P], a table over key positions of ids 0 .. G−1. Keys with a negative id, or outside the
            table, keep their weights.
        masses: The new masses: an array [..., N or 1, P or 1, G], or with fewer axes, that is a table over query
            positions (queries outside it keep their weights). A part that is called on the old masses, m [..., N, T, G]
            → m', may stand here too.
        size: G, by default as many as there are masses or ids.
    """

    groups: Int[Array, "*batch positions"]
    masses: Num[Array, "*batch heads queries groups"] | Num[Array, "queries groups"] | Num[Array, " groups"] | Any
    size: int | None = None

    def __post_init__(self):
        counted = self.size is None and len(getattr(self.masses, "shape", ())) > 0
        by_masses = self.masses.shape[-1] if counted else self.size
        object.__setattr__(self, "size", count_ids("Reallocate", self.groups, by_masses))

    def __call__(self, x, tile):
        groups = jnp.asarray(self.groups)[..., None, :]
        check_entries("Reallocate", "groups", groups, tile.key)
        ids = take(groups, tile.key, 2, fill=-1)
        member = (ids[..., None] == jnp.arange(self.size)).astype(x.dtype)  # [..., 1 or N, 1, S, G]
        old = jnp.matmul(x, member[..., 0, :, :], precision=jax.lax.Precision.HIGHEST)
        new = self.masses(old) if callable(self.masses) else self._at(tile.query, old)
        factor = jnp.where(old <= 0, 1, ratio(new, old)).astype(x.dtype)
        by_key = jnp.matmul(factor, member[..., 0, :, :].swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST)
        return x * jnp.where(ids >= 0, by_key, 1)

    def _at(self, query: Queries, old: Array) -> Array:
        """Returns the table of masses at the query positions; outside the table the old masses."""
        table = jnp.asarray(self.masses, old.dtype)
        table = table.reshape((1,) * (old.ndim - table.ndim) + table.shape)
        if table.shape[-2] == 1:
            return jnp.broadcast_to(table, old.shape)
        inside = (query >= 0) & (query < table.shape[-2])
        index = jnp.where(inside, query, 0).reshape((1,) * (old.ndim - query.ndim) + query.shape)
        return jnp.where(inside, jnp.take_along_axis(table, index, -2), old)


@part
class GaussianWindow(Map):
    """Multiplies weights by a Gaussian, w_ij → w_ij · exp(−(j − c_i)² / (2 σ²)), not renormalised (Luong et al., 2015).

    This map is the local attention of the paper. As σ → ∞ it is the identity. For a bias, see `LogGaussian`.

    Attributes:
        centres: [..., N or 1, P], where each query position looks, in key positions. Centres are real numbers, so they
            are learned through the window.
        sigma: The width σ > 0, a number or an array.

    Raises:
        ValueError: `sigma` is a number that is not positive.
    """

    centres: Float[Array, "*batch heads positions"]
    sigma: Float[Array, ""] | float

    weights_need: ClassVar[Need] = "tile"
    heads_apart: ClassVar[bool] = True

    def __post_init__(self):
        check_positive("GaussianWindow", "sigma", self.sigma)

    def __call__(self, x, tile):
        return x * jnp.exp(log_gaussian(self.centres, self.sigma, tile)).astype(x.dtype)


@part
class Seeded(Map):
    """Dropout with its seeds drawn, as `Dropout.draw` makes it.

    Attributes:
        rate: The probability that a weight is dropped.
        seeds: [..., N, 1, 1], one seed per batch entry and head.
    """

    rate: float
    seeds: UInt32[Array, "*batch heads 1 1"]

    weights_need: ClassVar[Need] = "tile"
    heads_apart: ClassVar[bool] = True

    def __call__(self, x, tile):
        keep = noise.bits(self.seeds, tile.query, tile.key) >= jnp.uint32(min(int(self.rate * 2**32), 2**32 - 1))
        return jnp.where(keep, x / (1 - self.rate), 0)


@part
class Dropout:
    """Drops weights at random: w_ij → w_ij · keep_ij / (1 − rate), keep_ij independent with probability 1 − rate.

    Each keep_ij is a function of the key, the batch entry, the head and the two positions alone. So every
    implementation and every block size drops the same weights, and nothing is stored for the backward pass.

    Attributes:
        rate: The probability that a weight is dropped, 0 ≤ rate < 1.
        key: The random key.
        shared: All batch entries and heads drop the same pairs.

    Raises:
        TypeError: `rate` is not a number.
        ValueError: `rate` is not at least 0 and below 1.
    """

    rate: float
    key: Seed
    shared: bool = False

    def __post_init__(self):
        check_rate("Dropout", self.rate)

    def draw(self, batch: tuple[int, ...], heads: int) -> Seeded:
        """Returns the same dropout with one seed per batch entry and head."""
        seeds = noise.seeds(self.key, () if self.shared else (*batch, heads))
        return Seeded(self.rate, jnp.broadcast_to(seeds, (*batch, heads, 1, 1)))


def check_rate(owner: str, rate: float) -> None:
    """Raises TypeError for a rate that is not a number, and ValueError unless 0 ≤ rate < 1."""
    if not isinstance(rate, int | float | np.number):
        raise TypeError(f"{owner}: rate must be a number, got {rate!r}")
    if not 0 <= rate < 1:
        raise ValueError(f"{owner}: rate must be at least 0 and below 1, got {rate}")
