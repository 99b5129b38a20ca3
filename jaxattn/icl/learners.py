"""Learners that know no prior: nearest neighbours, greedy trees, and the majority of the labels."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.checks import check_static_int
from jaxattn.core.part import part
from jaxattn.icl.predict import Predictor, check_single


@part
class KNearestNeighbours(Predictor):
    """Answers the mean answer of the k nearest examples, of all where they are fewer; 0 without any.

    Of several examples that are as near, the first is taken.

    Attributes:
        k: The number of examples, at least 1.
        metric: "euclidean" for the Euclidean distance, or "cosine".
    """

    k: int = 3
    metric: Literal["euclidean", "cosine"] = "euclidean"

    def __post_init__(self):
        check_static_int("KNearestNeighbours", "k", self.k, 1)
        if self.metric not in ("euclidean", "cosine"):
            raise ValueError(f"KNearestNeighbours: metric is {self.metric!r}: need 'euclidean' or 'cosine'")

    def answer(self, x, y, seen, query):
        if self.metric == "euclidean":
            closeness = -((x - query) ** 2).sum(-1)
        else:
            closeness = x @ query / jnp.maximum(jnp.linalg.norm(x, axis=-1), jnp.finfo(x.dtype).tiny)
        _, nearest = jax.lax.top_k(jnp.where(seen, closeness, -jnp.inf), min(self.k, len(x)))
        return _mean(y[nearest], seen[nearest])


def _mean(y: Float[Array, "n ..."], counts: Bool[Array, " n"]) -> Float[Array, "..."]:
    """Returns the mean of the answers that count; 0 if none does."""
    return jnp.where(counts.reshape(-1, *(1,) * (y.ndim - 1)), y, 0).sum(0) / jnp.maximum(counts.sum(), 1)


@part
class MajorityLabel(Predictor):
    """Answers the sign of the sum of the labels ±1, whatever x is: 0 on a tie."""

    def answer(self, x, y, seen, query):
        check_single("MajorityLabel", y)
        return jnp.sign(jnp.where(seen, y, 0).sum())


@part
class GreedyTree(Predictor):
    """A regression tree grown greedily to the given depth by squared error, as CART does (Breiman et al., 1984).

    A node is split in two at the coordinate and the threshold, midway between two examples, that leave the least Σ (y −
    mean of its side)². Of several such splits the one with the fewest examples below it is taken, then the first
    coordinate. A node of equal inputs is not split. The answer is the mean of the leaf that the query comes to, 0
    without examples. Other branches do not matter to it, so only the nodes on its way are grown.

    Attributes:
        depth: The depth, at least 0. Depth 1 is a decision stump.
        threshold: The threshold of every split, if it is known (0 for a `DecisionTree`).
    """

    depth: int
    threshold: Float[Array, ""] | float | None = None

    def __post_init__(self):
        check_static_int("GreedyTree", "depth", self.depth, 0)

    def answer(self, x, y, seen, query):
        check_single("GreedyTree", y)
        here = seen
        for _ in range(self.depth):
            split = _best_split(x, y, here) if self.threshold is None else _best_at(self.threshold, x, y, here)
            coordinate, threshold = split
            here = here & ((x[:, coordinate] > threshold) == (query[coordinate] > threshold))
        return _mean(y, here)


def _explained(left: Array, left_sum: Array, count: Array, total: Array) -> Array:
    """Returns Σ y² less the squared error of two sides, each with its own mean; −inf where a side is empty."""
    right, right_sum = count - left, total - left_sum
    explained = left_sum**2 / jnp.maximum(left, 1) + right_sum**2 / jnp.maximum(right, 1)
    return jnp.where((left > 0) & (right > 0), explained, -jnp.inf)


def _best_split(x: Float[Array, "n d"], y: Float[Array, " n"], here: Bool[Array, " n"]) -> tuple[Array, Array]:
    """Returns the coordinate and threshold of the best split of the examples that are here; inf if none is."""
    # Those that are here first, in order: places among all examples would depend on those that are not.
    order = jnp.where(here[:, None], x, jnp.inf).argsort(0)
    value, member = jnp.take_along_axis(x, order, 0), here[order]
    shown = jnp.where(here, y, 0)
    above = jnp.concatenate([jnp.where(member, value, jnp.inf)[1:], jnp.full((1, x.shape[1]), jnp.inf)])
    explained = _explained(member.cumsum(0), shown[order].cumsum(0), here.sum(), shown.sum())
    explained = jnp.where(member & (value < above), explained, -jnp.inf)
    place, coordinate = jnp.unravel_index(explained.argmax(), x.shape)
    low, high = value[place, coordinate], above[place, coordinate]
    middle = low + (high - low) / 2
    threshold = jnp.where(middle < high, middle, low)  # of two neighbouring floats, the middle is one of them
    return coordinate, jnp.where(explained.max() > -jnp.inf, threshold, jnp.inf)


def _best_at(
    threshold: Array | float, x: Float[Array, "n d"], y: Float[Array, " n"], here: Bool[Array, " n"]
) -> tuple[Array, Array]:
    """Returns the best coordinate to split at a given threshold; a threshold of inf if all leave a side empty."""
    left = here[:, None] & (x <= threshold)
    shown = jnp.where(here, y, 0)
    left_sum = jnp.where(left, shown[:, None], 0).sum(0)
    explained = _explained(left.sum(0), left_sum, here.sum(), shown.sum())
    return explained.argmax(), jnp.where(explained.max() > -jnp.inf, threshold, jnp.inf)
