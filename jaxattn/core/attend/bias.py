"""Biases: numbers that are added to a score because of where the query and the key stand.

A bias is a part called on a `Tile`, `bias(tile)`. It returns numbers that broadcast to [..., N, T, S]. A bias never
hides a key: hiding is a mask's work.

A bias with a large table may also define `accumulate`, which adds the gradient of one tile to that of the table.
Without it the gradient of each tile is made at the full size of the table first, which takes time in proportion to the
table.

Tables know two kinds of tile. On a *run*, both positions go up by one, and an entry or a distance is found by slicing.
Slicing is fast, and training and prefill have only runs. Anywhere else entries are looked up pair by pair.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.tile import Tile
from jaxattn.core.checks import MOST, check_positive, check_static_int
from jaxattn.core.part import part
from jaxattn.core.table import on_shared_axis, take, take_pairs

Queries = Int[Array, "*b 1 t 1"]
Keys = Int[Array, "*b #n 1 s"]
Values = Float[Array, "*b n t s"]


class ScoreBias(abc.ABC):
    """The base class of parts for the bias slot; the head of this file says what they must offer.

    Attributes:
        accumulates: Whether the class defines `accumulate`.
    """

    accumulates: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, tile: Tile) -> Values:
        """Returns the numbers to add to the scores of the tile; they broadcast to [..., N, T, S]."""

    def accumulate(self, d_bias: Values, tile: Tile) -> Any:
        """Adds the gradient of one tile to a part that holds the gradient so far; needed where `accumulates` is True.

        Args:
            d_bias: The gradient of the numbers that the call returned for the tile.
            tile: The tile.

        Returns:
            This part with the sums.

        Raises:
            NotImplementedError: The class has no `accumulate`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no accumulate")

    def __add__(self, other: "ScoreBias") -> "SumOfBiases":
        return SumOfBiases(self, other)


@part
class SumOfBiases(ScoreBias):
    """What two biases add together; what `a + b` makes.

    Attributes:
        first: One of them.
        second: The other.
    """

    first: ScoreBias
    second: ScoreBias

    def __call__(self, tile: Tile) -> Values:
        return self.first(tile) + self.second(tile)


def _run(positions: Any, axis: int) -> tuple[Any, Any]:
    """(first position, whether all of them go up by one from it along the axis, in every batch entry alike)."""
    first = positions.reshape(-1)[0]
    step = np.arange(positions.shape[axis]).reshape((-1, *(1,) * (-1 - axis)))
    return first, (positions == first + step).all() & (first >= 0)


@part
class Bias(ScoreBias):
    """Adds array[..., n, query position, key position], and 0 at positions outside the array.

    The bias is learned if you differentiate with respect to the array. Its gradient is summed a tile at a time into an
    array of the same size.

    Attributes:
        array: A table over positions, [..., N, P, R] or with fewer axes, [P, R], [R], []. Axes of size 1 are shared by
            all positions, heads or batch entries.
    """

    array: Float[Array, "*batch heads p r"] | Float[Array, "p r"] | Float[Array, " r"] | Float[Array, ""]

    accumulates: ClassVar[bool] = True

    def _table(self) -> Float[Array, "*batch heads p r"]:
        array = jnp.asarray(self.array)
        return array.reshape((1,) * (3 - array.ndim) + array.shape)

    def _places(self, query: Queries, key: Keys) -> tuple[Any, Any, Bool[Array, ""], tuple[int, int]]:
        """Positions (0 on shared axes), whether they are a run inside the table, and the size of the tile in it."""
        rows, columns = self._table().shape[-2:]
        query, key = on_shared_axis(rows, query, -2), on_shared_axis(columns, key, -1)
        (row, run), (column, run2) = _run(query, -2), _run(key, -1)
        size = query.shape[-2], key.shape[-1]
        inside = (row + size[0] <= rows) & (column + size[1] <= columns)
        return query, key, run & run2 & inside, size

    def __call__(self, tile: Tile) -> Values:
        table = self._table()
        query, key, run, size = self._places(tile.query, tile.key)
        shape = jax.eval_shape(lambda: take_pairs(table, query, key, 2, 0)).shape
        if size[0] > table.shape[-2] or size[1] > table.shape[-1]:
            return take_pairs(table, query, key, grid=2, fill=0)

        def sliced() -> Array:
            start = [jnp.int32(0)] * (table.ndim - 2) + [query.reshape(-1)[0], key.reshape(-1)[0]]
            return jnp.broadcast_to(jax.lax.dynamic_slice(table, start, (*table.shape[:-2], *size)), shape)

        return jax.lax.cond(run, sliced, lambda: take_pairs(table, query, key, grid=2, fill=0))

    def accumulate(self, d_bias: Values, tile: Tile) -> "Bias":
        total = self._table()
        query, key, run, size = self._places(tile.query, tile.key)
        # Batch and head axes that the table shares are summed first.
        lead = (*(1,) * (d_bias.ndim - total.ndim), *total.shape[:-2])
        shared = tuple(i for i, n in enumerate(lead) if n == 1)
        d_bias = jnp.broadcast_to(d_bias, (*np.broadcast_shapes(d_bias.shape[:-2], lead), *d_bias.shape[-2:]))
        d_bias = d_bias.astype(total.dtype)

        def sliced() -> Array:
            tile = d_bias.sum(shared, keepdims=True).reshape(*total.shape[:-2], *d_bias.shape[-2:])
            start = [jnp.int32(0)] * (total.ndim - 2) + [query.reshape(-1)[0], key.reshape(-1)[0]]
            old = jax.lax.dynamic_slice(total, start, (*total.shape[:-2], *size))
            return jax.lax.dynamic_update_slice(total, old + tile, start)

        def scattered() -> Array:
            _, pull = jax.vjp(lambda table: take_pairs(table, query, key, grid=2, fill=0), total)
            return total + pull(d_bias)[0]

        fits = size[0] <= total.shape[-2] and size[1] <= total.shape[-1]
        new = jax.lax.cond(run, sliced, scattered) if fits else scattered()
        return Bias(new.reshape(jnp.shape(self.array)))


@part
class BiasFunction(ScoreBias):
    """Adds function(query position, key position): the part that a plain function in the bias slot becomes.

    Arrays that the function closes over are constants: for a gradient write a part. Define the function once, because
    another function is another program.

    Attributes:
        function: The function, called on arrays of positions [..., 1, T, 1] and [..., 1, 1, S]. It returns numbers that
            broadcast against both.
    """

    function: Callable[..., Any]

    def __call__(self, tile: Tile) -> Values:
        return self.function(tile.query, tile.key)


def as_bias(bias: Any) -> Any:
    """Makes a part of an array, `Bias(array)`, or of a function, `BiasFunction(function)`; a part stays as it is."""
    if bias is None or isinstance(bias, type) or dataclasses.is_dataclass(bias):
        return bias
    if hasattr(bias, "shape") and hasattr(bias, "dtype"):
        return Bias(bias)
    return BiasFunction(bias) if callable(bias) else bias


@part
class KeyBias(ScoreBias):
    """Adds array[..., n, key position] whatever the query, and 0 outside the array: how much a key matters.

    A key bias is a prior over keys (bird's-eye importance, key embeddings). A bias of log m has the effect of m copies
    of a key.

    Attributes:
        array: [..., N or 1, R], or R = 1 for one number that all keys share.
    """

    array: Float[Array, "*batch heads key_positions"]

    def __call__(self, tile: Tile) -> Values:
        array = jnp.asarray(self.array)
        return take(array, on_shared_axis(array.shape[-1], tile.key, -1), 2, fill=0)


@part
class Alibi(ScoreBias):
    """Adds −slope_n · |query position − key position|  (ALiBi, Press et al., 2022).

    Attributes:
        slopes: [N], one slope per head.
    """

    slopes: Float[Array, " heads"]

    @classmethod
    def geometric(cls, heads: int) -> "Alibi":
        """The slopes of the paper: 2^(−8 n / N) for n = 1..N when N is a power of two.

        For other N the slopes are those of the largest power of two below N, followed by every other slope of twice
        that many heads.

        Args:
            heads: The number of heads N, at least 1.

        Raises:
            TypeError: `heads` is not an int.
            ValueError: `heads` is below 1.
        """
        check_static_int("Alibi", "heads", heads, 1)
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
        finer = [2 ** (-8 * (n + 1) / (2 * power)) for n in range(0, 2 * power, 2)]
        return cls(jnp.asarray((slopes + finer)[:heads], jnp.float32))

    def __call__(self, tile: Tile) -> Values:
        return -self.slopes[:, None, None] * jnp.abs(tile.query - tile.key)


@part
class RelativeBias(ScoreBias):
    """Adds table[n, bucket(query position − key position)], with buckets of growing size (T5, Raffel et al., 2020).

    In the causal form (the default) the first ⌊B/2⌋ buckets are the distances 0 .. ⌊B/2⌋ − 1. The other buckets grow
    geometrically up to `max_distance`, and all distances beyond it share the last. Keys after the query share bucket 0.

    Attributes:
        table: [N or 1, B], one number per head and bucket.
        max_distance: The distance beyond which all keys share the last bucket.
        bidirectional: Each direction gets half of the buckets: the first half for keys at or before the query.

    Raises:
        ValueError: The table has fewer than 2 buckets (4 in two directions), an odd number of them for two directions,
            or `max_distance` leaves none for the distances that grow.
    """

    table: Float[Array, "heads buckets"]
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self):
        check_static_int("RelativeBias", "max_distance", self.max_distance, 1)

    def _first_distances(self) -> np.ndarray:
        """Returns the least distance of every bucket of one direction."""
        buckets = jnp.shape(self.table)[-1] // (2 if self.bidirectional else 1)
        exact = buckets // 2
        uneven = self.bidirectional and jnp.shape(self.table)[-1] % 2
        if buckets < 2 or uneven or self.max_distance <= exact:
            raise ValueError(
                f"RelativeBias: table has {jnp.shape(self.table)[-1]} buckets and max_distance is {self.max_distance}: "
                "need at least 2 buckets per direction, as many in both, and a distance above half of them"
            )
        steps = np.arange(buckets - exact) / (buckets - exact)
        # Distances that are whole numbers in exact arithmetic must not be rounded up past themselves.
        grown = np.ceil(exact * (self.max_distance / exact) ** steps - 1e-9)
        return np.concatenate([np.arange(exact), grown]).astype(np.int32)

    def bucket(self, distance: Int[Array, "..."]) -> Int[Array, "..."]:
        """Returns the bucket of a distance, query position − key position."""
        first = self._first_distances()
        distance = jnp.asarray(distance)

        def last_reached(distance: Array) -> Array:
            # Counted, since `jnp.searchsorted` fails in a `jax.shard_map` over some of the axes of a mesh.
            return (distance[..., None] >= first).sum(-1, dtype=jnp.int32) - 1

        if not self.bidirectional:
            return last_reached(jnp.maximum(distance, 0))
        return jnp.where(distance < 0, len(first), 0) + last_reached(jnp.abs(distance))

    def __call__(self, tile: Tile) -> Values:
        table = jnp.asarray(self.table)
        query, key = tile.query, tile.key
        (row, run), (column, run2) = _run(query, -2), _run(key, -1)
        rows, columns = query.shape[-2], key.shape[-1]
        batch = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        shape = (*np.broadcast_shapes(batch, table.shape[:1]), rows, columns)

        def by_distance() -> Array:
            # Entry (i, j) of the tile is entry j − i + rows − 1 of a vector over its distances. Rows of one length cut
            # from copies of a vector that is longer by one start one entry earlier each: a copy, where a lookup per
            # pair would be many times slower, most of all its gradient.
            # Sums of positions near 2³¹ would not fit; so far apart all distances share a bucket.
            distance = jnp.clip(row - column, -MOST, MOST) + rows - 1 - jnp.arange(rows + columns - 1)
            vector = table[:, self.bucket(distance)]
            size = rows + columns - 1
            copies = jnp.broadcast_to(jnp.pad(vector, [(0, 0), (0, 1)])[:, None], (len(table), rows, size + 1))
            skewed = copies.reshape(len(table), -1)[:, : rows * size].reshape(-1, rows, size)
            return jnp.broadcast_to(skewed[..., rows - 1 :], shape)

        def by_pair() -> Array:
            return jnp.broadcast_to(take(table, self.bucket(query - key), 2, fill=0), shape)

        return jax.lax.cond(run & run2, by_distance, by_pair)


def log_gaussian(centres: Array, sigma: Any, tile: Tile) -> Values:
    """Returns −(key − centres[query])² / (2 σ²), and 0 where the query is outside the table.

    A table with one centre shares it among all queries.
    """
    place = on_shared_axis(jnp.shape(centres)[-1], tile.query, -2)
    inside = (place >= 0) & (place < jnp.shape(centres)[-1])
    centre = take(jnp.asarray(centres), place, 2, fill=0)
    return jnp.where(inside, -jnp.square((tile.key - centre) / sigma) / 2, 0)


@part
class LogGaussian(ScoreBias):
    """Adds −(j − c_i)² / (2 σ²): weights fall off around a predicted centre (local attention, Luong et al., 2015).

    As σ → ∞ the bias goes to 0. Under softmax the bias equals multiplying the weights by the Gaussian and normalising
    the row again. For the paper's form, which is not normalised, see `GaussianWindow`.

    Attributes:
        centres: [..., N or 1, P], where each query position looks, in key positions. Centres are real numbers, so they
            are learned.
        sigma: The width σ > 0, a number or an array.

    Raises:
        ValueError: `sigma` is a number that is not positive.
    """

    centres: Float[Array, "*batch heads positions"]
    sigma: Float[Array, ""] | float

    def __post_init__(self):
        check_positive("LogGaussian", "sigma", self.sigma)

    def __call__(self, tile: Tile) -> Values:
        return log_gaussian(self.centres, self.sigma, tile)
