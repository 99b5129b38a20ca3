"""Maps: what is done to the scores before they are masked and normalised, and to the weights before they read values.

A map is a part called on a block of either, `map(x [..., N, T, S], tile)`, and returns the block changed. The `Tile`
says where the block stands and which of its pairs are visible.

`scores_need` and `weights_need` say how much a map must see in the slot `score_maps` or `weight_maps`; "rows" unless
it says otherwise:

    "tile"    any block at all. As a weight map it then must commute with a factor per row, map(c·w) = c·map(w), since
              tiles are mapped before their rows are normalised.
    "rows"    all keys of a query; also of the `halo` queries before it.
    "matrix"  all queries at once: only the dense implementation can serve it.

`heads_apart` promises that each head of the result depends on that head of the block alone. Only with this promise,
False unless given, are heads computed one by one where they see different keys. Arrays by head or by batch entry then
have to say so in their annotation, by the names `heads` and `*batch` (see `cut`).
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
    """What a part must offer to stand in the slots score_maps and weight_maps; see the head of this file."""

    scores_need: ClassVar[Need] = "rows"
    weights_need: ClassVar[Need] = "rows"
    heads_apart: ClassVar[bool] = False

    @property
    def halo(self) -> int:
        """How many queries before a row the map reads."""
        return 0

    @property
    def kind(self) -> str:
        """What errors and explanations call it."""
        return type(self).__name__

    @abc.abstractmethod
    def __call__(self, x: Block, tile: Tile) -> Block:
        """The block, mapped."""


# Maps of scores.


@part
class SoftCap(Map):
    """s -> cap · tanh(s / cap): scores stay within ±cap (Gemma 2, 2024). cap = ∞ is the identity.

    It acts after scale and bias and before the mask. Raises ValueError for a cap that is not positive.
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
    """s -> s / τ, with τ > 0 one number or one per head [N]; learned if it is an array. τ = 1 is the identity.

    Raises ValueError for a number that is not positive.
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
    """s_ti -> s_ti − log Σ_{j<t} exp(s_ji): discounts keys that earlier queries attended to (Paulus et al., 2018).

    Softmax then gives weights ∝ exp(s_ti) / Σ_{j<t} exp(s_ji), and exp(s_1i) for the first query that sees key i.
    Earlier means before it in the array; hidden pairs and empty slots count for nothing. Adding a constant to all
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
    """x_n -> Σ_m weight[n, m] · x_m: heads read each other (talking heads, Shazeer et al., 2020).

    `weight` [N, N]; the identity matrix is the identity. A permutation permutes the heads of the scores or weights,
    not those of the values.
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
    """x_nij -> Σ_a Σ_b kernel[n, a, b] · x_{n, i − (A−1) + a, j + b − ⌊B/2⌋}, hidden pairs counting as 0.

    The key-query convolution of multi-token attention (row i reads the A − 1 rows before it, and B/2 keys on either
    side): a key can match a conjunction of queries. `kernel` [N or 1, A, B], B odd; 1 in the last row's centre and 0
    elsewhere is the identity. Neighbours are those in the arrays. Causal and document masks stay leak-free, since
    what they hide is 0 before the convolution and hidden after it.
    Raises ValueError for an even B, or heads that do not fit.
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


def _keep(weights: Block, kept: Bool[Array, "*b n t s"]) -> Block:
    """The kept weights, scaled so that each row's total stays what it was; nothing kept gives zeros."""
    left = jnp.where(kept, weights, 0)
    return left * ratio(weights.sum(-1, keepdims=True), left.sum(-1, keepdims=True))


@part
class TopKWeights(Map):
    """Keeps the k largest weights of each row (ties: the first keys) and scales them to the row's former total."""

    k: int

    def __post_init__(self):
        check_static_int("TopKWeights", "k", self.k, 1)

    def __call__(self, x, tile):
        return _keep(x, largest(x, tile.visible, self.k)[0])


@part
class DropTopK(Map):
    """Drops ⌊rate · m⌋ of the m = min(k, visible keys) largest weights of each row at random, and scales the rest.

    Stochastic top-k masking of ACMIL (Zhang et al., 2024): after softmax it equals masking those scores with −∞.
    The choice is a function of key, head and positions. Leave it out when evaluating.
    Raises ValueError unless 0 <= rate < 1 and k >= 1.
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
        return _keep(x, ~dropped)


@part
class Reallocate(Map):
    """w_ij -> w_ij · m'_g / m_g for key j in group g, where m_g = Σ_{j in g} w_ij: each group's mass becomes m'_g.

    Proportions inside a group stay. Equal to adding log(m'_g / m_g) to the scores of the group (log-bias lemma).
    `groups` [..., P] is a table over key positions of ids 0 .. G−1; keys with a negative id, or outside the table,
    keep their weights. `masses` gives the new masses: an array [..., N or 1, P or 1, G], a table over query positions
    (queries outside it keep their weights), or with fewer axes; or a part that is called on the old ones, m [..., N, T,
    G] -> m'. `size` is G, by default as many as there are masses or ids.
    A group without weight in a row has nothing to scale and stays 0.
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
        """The table of masses at the query positions; outside it the old ones."""
        table = jnp.asarray(self.masses, old.dtype)
        table = table.reshape((1,) * (old.ndim - table.ndim) + table.shape)
        if table.shape[-2] == 1:
            return jnp.broadcast_to(table, old.shape)
        inside = (query >= 0) & (query < table.shape[-2])
        index = jnp.where(inside, query, 0).reshape((1,) * (old.ndim - query.ndim) + query.shape)
        return jnp.where(inside, jnp.take_along_axis(table, index, -2), old)


@part
class GaussianWindow(Map):
    """w_ij -> w_ij · exp(−(j − c_i)² / (2 σ²)), not renormalised: the local attention of Luong et al. (2015).

    `centres` [..., N or 1, P]: where each query position looks, in key positions, real-valued, so that it is learned
    through the window. `sigma` > 0 is a number or an array. As σ -> ∞ the identity. As a bias, see `LogGaussian`.
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
    """Dropout with its seeds drawn: one per batch entry and head, [..., N, 1, 1]. What `Dropout.draw` makes."""

    rate: float
    seeds: UInt32[Array, "*batch heads 1 1"]

    weights_need: ClassVar[Need] = "tile"
    heads_apart: ClassVar[bool] = True

    def __call__(self, x, tile):
        keep = noise.bits(self.seeds, tile.query, tile.key) >= jnp.uint32(min(int(self.rate * 2**32), 2**32 - 1))
        return jnp.where(keep, x / (1 - self.rate), 0)


@part
class Dropout:
    """weight_ij -> weight_ij · keep_ij / (1 − rate), keep_ij independent with probability 1 − rate.

    Each keep_ij is a function of the key, the batch entry, the head and the two positions alone, so every
    implementation and every block size drops the same weights, and nothing is stored for the backward pass.
    With `shared`, all batch entries and heads drop the same pairs. Raises ValueError unless 0 <= rate < 1.
    """

    rate: float
    key: Seed
    shared: bool = False

    def __post_init__(self):
        check_rate("Dropout", self.rate)

    def draw(self, batch: tuple[int, ...], heads: int) -> Seeded:
        """The same dropout with one seed per batch entry and head."""
        seeds = noise.seeds(self.key, () if self.shared else (*batch, heads))
        return Seeded(self.rate, jnp.broadcast_to(seeds, (*batch, heads, 1, 1)))


def check_rate(owner: str, rate: float) -> None:
    """Raises TypeError unless it is a number and ValueError unless 0 <= rate < 1."""
    if not isinstance(rate, int | float | np.number):
        raise TypeError(f"{owner}: rate must be a number, got {rate!r}")
    if not 0 <= rate < 1:
        raise ValueError(f"{owner}: rate must be at least 0 and below 1, got {rate}")
