"""Priors over Boolean functions {−1, 1}^d → {−1, 1}, from conjunctions to parities (Bhattamishra et al., 2024).

A set of literals is a vector w in {−1, 0, 1}^d. The literal of coordinate j says x_j = w_j, and where w_j is 0 the
coordinate has no literal. Coordinates that are not visible are in no function. A probability that is known and not from
0 to 1 raises ValueError.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxattn.core.checks import check_probability, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.function import Finite, check_count, choose
from jaxattn.icl.task import Function, happens
from jaxattn.icl.teaching import Plantable, Teachable

MOST_FUNCTIONS = 2**20  # one number each for every example of a prompt


def _signs(true: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.where(true, 1.0, -1.0)


def _literals(
    key: PRNGKeyArray, shape: tuple[int, ...], visible: Int[Array, ""] | int, probability: Any, monotone: bool
) -> Float[Array, "*t d"]:
    """Draws each visible coordinate with the given probability, as it is (monotone) or with a random sign."""
    for_places, for_signs = jax.random.split(key)
    inside = happens(for_places, probability, shape)
    inside &= jnp.arange(shape[-1]) < visible
    return jnp.where(inside, 1.0 if monotone else jax.random.rademacher(for_signs, shape, float), 0.0)


def _all(w: Float[Array, "*t d"], x: Float[Array, "n d"]) -> Bool[Array, "n ..."]:
    """Returns whether every literal holds; true for no literals."""
    return x @ w.T >= jnp.abs(w).sum(-1)


def _any(w: Float[Array, "*t d"], x: Float[Array, "n d"]) -> Bool[Array, "n ..."]:
    """Returns whether some literal holds; false for no literals."""
    return x @ w.T > -jnp.abs(w).sum(-1)


def _check_size(owner: str, dim: int, count: int) -> None:
    if count > MOST_FUNCTIONS:
        raise ValueError(f"{owner}: dim is {dim}, for {count} functions: need one with at most 2**20 for their table")


def _stacked(owner: str, dim: int, count: int, rows: Iterable) -> Float[Array, "f d"]:
    """Stacks the rows of a table. Raises ValueError, before any row is made, if they are too many."""
    _check_size(owner, dim, count)
    return jnp.asarray(np.array(list(rows)), float)


def _literal_table(
    owner: str, dim: int, probability: Any, monotone: bool
) -> tuple[Float[Array, "f d"], Float[Array, " f"]]:
    """Returns every set of literals, and its log-probability."""
    values = (0, 1) if monotone else (-1, 0, 1)
    w = _stacked(owner, dim, len(values) ** dim, itertools.product(values, repeat=dim))
    inside = jnp.abs(w).sum(-1)
    of_places = jax.scipy.special.xlogy(inside, probability) + jax.scipy.special.xlog1py(dim - inside, -probability)
    return w, of_places - (0 if monotone else inside * jnp.log(2))


def _products(
    owner: str, dim: int, *tables: tuple[Array, Float[Array, " f"]]
) -> tuple[list[Array], Float[Array, " p"]]:
    """Returns every choice of one row from each table: the rows and the sums of their log-probabilities."""
    sizes = tuple(len(log_prior) for _, log_prior in tables)
    count = math.prod(sizes)
    _check_size(owner, dim, count)
    chosen = list(zip(tables, jnp.unravel_index(jnp.arange(count), sizes), strict=True))
    total = jnp.stack([log_prior[i] for (_, log_prior), i in chosen]).sum(0)
    return [rows[i] for (rows, _), i in chosen], total


def _uniform(values: Iterable[float]) -> tuple[Float[Array, " f"], Float[Array, " f"]]:
    """Returns a table of equally likely numbers."""
    values = jnp.asarray(list(values))
    return values, jnp.full(len(values), -math.log(len(values)))


def _subset_table(owner: str, name: str, dim: int, size: int) -> tuple[Float[Array, "f d"], Float[Array, " f"]]:
    """Returns every set of `size` coordinates, and its log-probability."""
    check_count(f"{owner}: {name}", size, dim)
    count = math.comb(dim, size)
    subsets = itertools.combinations(range(dim), size)
    rows = (np.isin(np.arange(dim), subset) for subset in subsets)
    return _stacked(owner, dim, count, rows), jnp.full(count, -math.log(count))


def _table_of_terms(
    owner: str, dim: int, terms: int, probability: Any, monotone: bool
) -> tuple[tuple[Float[Array, "f t d"], Int[Array, " f"]], Float[Array, " f"]]:
    """Returns every sequence of so many sets of literals with each of them chosen, and its log-probability."""
    each = _literal_table(owner, dim, probability, monotone)
    (*rows, chosen), log_prior = _products(owner, dim, *[each] * terms, _uniform(range(terms)))
    return (jnp.stack(rows, 1), chosen), log_prior


@part
class Conjunction(Plantable, Teachable, Finite):
    """A conjunction: 1 where every literal of w holds. Without literals it is always 1.

    Planted examples satisfy it. Its lesson is two positive examples, in which the coordinates outside w are all −1 and
    then all 1, and k negative ones, each with one literal of w flipped: k + 2 examples that leave one conjunction. If
    it is monotone (no literal negated) the first positive example is enough: k + 1.

    Attributes:
        probability: The probability that a coordinate is in w.
        monotone: Whether no literal is negated.
    """

    signs: ClassVar[bool] = True
    probability: Float[Array, ""] | float = 0.3
    monotone: bool = False

    def __post_init__(self):
        check_probability("Conjunction: probability", self.probability)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        return _literals(key, (dim,), visible, self.probability, self.monotone)

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return _signs(_all(f, x))

    def pattern(self, f: Float[Array, " d"]) -> Float[Array, " d"]:
        return f

    def lesson(self, f: Float[Array, " d"]) -> tuple[Float[Array, "m d"], Bool[Array, " m"]]:
        low, high = jnp.where(f != 0, f, -1), jnp.where(f != 0, f, 1)
        flipped = jnp.where(jnp.eye(len(f), dtype=bool), -low, low)
        rows = jnp.concatenate([jnp.stack([low, high]), flipped])
        return rows, jnp.concatenate([jnp.array([True, not self.monotone]), f != 0])

    def table(self, dim: int) -> tuple[Float[Array, "f d"], Float[Array, " f"]]:
        return _literal_table("Conjunction", dim, self.probability, self.monotone)


@part
class Disjunction(Plantable, Finite):
    """A disjunction: 1 where some literal of w holds. Without literals it is never 1.

    Planted examples falsify it.

    Attributes:
        probability: The probability that a coordinate is in w.
    """

    signs: ClassVar[bool] = True
    probability: Float[Array, ""] | float = 0.3

    def __post_init__(self):
        check_probability("Disjunction: probability", self.probability)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        return _literals(key, (dim,), visible, self.probability, False)

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return _signs(_any(f, x))

    def pattern(self, f: Float[Array, " d"]) -> Float[Array, " d"]:
        return -f

    def table(self, dim: int) -> tuple[Float[Array, "f d"], Float[Array, " f"]]:
        return _literal_table("Disjunction", dim, self.probability, False)


@part
class SparseDisjunction(Plantable, Finite):
    """A disjunction of a few random coordinates: 1 where one of them is 1. Planted examples falsify it.

    Attributes:
        literals: The number of coordinates, at least 1.
    """

    signs: ClassVar[bool] = True
    literals: int = 4

    def __post_init__(self):
        check_static_int("SparseDisjunction", "literals", self.literals, 1)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        return choose("SparseDisjunction: literals", key, dim, visible, self.literals).astype(float)

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return _signs(_any(f, x))

    def pattern(self, f: Float[Array, " d"]) -> Float[Array, " d"]:
        return -f

    def table(self, dim: int) -> tuple[Float[Array, "f d"], Float[Array, " f"]]:
        return _subset_table("SparseDisjunction", "literals", dim, self.literals)


@part
class DNF(Plantable, Teachable, Finite):
    """A disjunction of a few conjunctions: 1 where some term is true.

    Its parameters are the terms [terms, d] and the term that planted examples of this prompt satisfy. The lesson of a
    monotone DNF has for each term the example in which the coordinates of the term alone are 1, and then that example
    with one of them dropped after the other.

    Attributes:
        terms: The number of terms, at least 1.
        probability: The probability that a coordinate is in a term.
        monotone: Whether no literal is negated.

    Raises:
        ValueError: The lesson of a DNF that is not monotone is asked for.
    """

    signs: ClassVar[bool] = True
    terms: int = 3
    probability: Float[Array, ""] | float = 0.2
    monotone: bool = False

    def __post_init__(self):
        check_static_int("DNF", "terms", self.terms, 1)
        check_probability("DNF: probability", self.probability)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> tuple[Array, Array]:
        for_terms, for_choice = jax.random.split(key)
        terms = _literals(for_terms, (self.terms, dim), visible, self.probability, self.monotone)
        return terms, jax.random.randint(for_choice, (), 0, self.terms)

    def __call__(self, f: tuple[Array, Array], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return _signs(_all(f[0], x).any(-1))

    def pattern(self, f: tuple[Array, Array]) -> Float[Array, " d"]:
        terms, chosen = f
        return terms[chosen]

    def lesson(self, f: tuple[Array, Array]) -> tuple[Float[Array, "m d"], Bool[Array, " m"]]:
        if not self.monotone:
            raise ValueError("DNF: monotone is False: need monotone terms, others have no lesson")
        terms, _ = f
        dim = terms.shape[1]
        holds = 2 * terms - 1
        dropped = jnp.where(jnp.eye(dim, dtype=bool), -1, holds[:, None])
        rows = jnp.concatenate([holds[:, None], dropped], 1)
        belongs = jnp.concatenate([jnp.ones((self.terms, 1), bool), terms != 0], 1)
        return rows.reshape(-1, dim), belongs.reshape(-1)

    def table(self, dim: int) -> tuple[tuple[Array, Array], Float[Array, " f"]]:
        return _table_of_terms("DNF", dim, self.terms, self.probability, self.monotone)


@part
class CNF(Plantable, Finite):
    """A conjunction of a few disjunctions: 1 where all clauses are true.

    Its parameters are the clauses [clauses, d] and the clause that planted examples of this prompt falsify.

    Attributes:
        clauses: The number of clauses, at least 1.
        probability: The probability that a coordinate is in a clause.
    """

    signs: ClassVar[bool] = True
    clauses: int = 3
    probability: Float[Array, ""] | float = 0.2

    def __post_init__(self):
        check_static_int("CNF", "clauses", self.clauses, 1)
        check_probability("CNF: probability", self.probability)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> tuple[Array, Array]:
        return DNF(self.clauses, self.probability).draw(key, dim, visible)

    def __call__(self, f: tuple[Array, Array], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return _signs(_any(f[0], x).all(-1))

    def pattern(self, f: tuple[Array, Array]) -> Float[Array, " d"]:
        clauses, chosen = f
        return -clauses[chosen]

    def table(self, dim: int) -> tuple[tuple[Array, Array], Float[Array, " f"]]:
        return _table_of_terms("CNF", dim, self.clauses, self.probability, False)


@part
class Majority(Finite):
    """The majority of a random subset of coordinates: 1 where most of them are 1; −1 on a tie.

    Attributes:
        probability: The probability that a coordinate is in the subset.
    """

    signs: ClassVar[bool] = True
    probability: Float[Array, ""] | float = 0.3

    def __post_init__(self):
        check_probability("Majority: probability", self.probability)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        return _literals(key, (dim,), visible, self.probability, True)

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return _signs(x @ f > 0.5)

    def table(self, dim: int) -> tuple[Float[Array, "f d"], Float[Array, " f"]]:
        return _literal_table("Majority", dim, self.probability, True)


@part
class IntegerHalfspace(Finite):
    """A halfspace, sign(w·x − 1/2), with the weights uniform integers from −most to most.

    Attributes:
        most: The largest weight, at least 1.
    """

    signs: ClassVar[bool] = True
    most: int = 3

    def __post_init__(self):
        check_static_int("IntegerHalfspace", "most", self.most, 1)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        w = jax.random.randint(key, (dim,), -self.most, self.most + 1)
        return jnp.where(jnp.arange(dim) < visible, w, 0).astype(float)

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return _signs(x @ f > 0.5)

    def table(self, dim: int) -> tuple[Float[Array, "f d"], Float[Array, " f"]]:
        values = range(-self.most, self.most + 1)
        count = len(values) ** dim
        w = _stacked("IntegerHalfspace", dim, count, itertools.product(values, repeat=dim))
        return w, jnp.full(count, -math.log(count))


@part
class SparseThreshold(Finite):
    """A threshold, sign(w·x − t), with w as in a `Conjunction` and t uniform in {−5/2, −3/2, −1/2, 1/2, 3/2, 5/2}.

    Attributes:
        probability: The probability that a coordinate is in w.
    """

    signs: ClassVar[bool] = True
    probability: Float[Array, ""] | float = 0.3

    def __post_init__(self):
        check_probability("SparseThreshold: probability", self.probability)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> tuple[Array, Array]:
        for_weights, for_threshold = jax.random.split(key)
        threshold = jax.random.randint(for_threshold, (), -3, 3) + 0.5
        return _literals(for_weights, (dim,), visible, self.probability, False), threshold

    def __call__(self, f: tuple[Array, Array], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        w, threshold = f
        return _signs(x @ w > threshold)

    def table(self, dim: int) -> tuple[tuple[Array, Array], Float[Array, " f"]]:
        weights = _literal_table("SparseThreshold", dim, self.probability, False)
        (w, threshold), log_prior = _products("SparseThreshold", dim, weights, _uniform(np.arange(-3, 3) + 0.5))
        return (w, threshold), log_prior


def _odd(subset: Float[Array, " d"], x: Float[Array, "n d"]) -> Bool[Array, " n"]:
    return (x > 0).astype(x.dtype) @ subset % 2 == 1


@part
class Parity(Finite):
    """A parity: 1 where an odd number of the coordinates of a subset are 1, every subset being as likely."""

    signs: ClassVar[bool] = True

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        return _literals(key, (dim,), visible, 0.5, True)

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return _signs(_odd(f, x))

    def table(self, dim: int) -> tuple[Float[Array, "f d"], Float[Array, " f"]]:
        return _literal_table("Parity", dim, 0.5, True)


@part
class SparseParity(Finite):
    """A parity of a few random coordinates: 1 where an odd number of them are 1.

    Attributes:
        relevant: The number of coordinates, at least 1.
    """

    signs: ClassVar[bool] = True
    relevant: int = 2

    def __post_init__(self):
        check_static_int("SparseParity", "relevant", self.relevant, 1)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        return choose("SparseParity: relevant", key, dim, visible, self.relevant).astype(float)

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return _signs(_odd(f, x))

    def table(self, dim: int) -> tuple[Float[Array, "f d"], Float[Array, " f"]]:
        return _subset_table("SparseParity", "relevant", dim, self.relevant)


@part
class NearestNeighbour(Function):
    """The label of the earlier input with the largest cosine, the first of several.

    The first `start` labels are random. Equal inputs have equal labels from the beginning. A task's `first` should be
    `start`, as the labels before are noise. The parameters are the random key of those labels.

    Attributes:
        start: The number of random labels, at least 1.
    """

    signs: ClassVar[bool] = True
    start: int

    def __post_init__(self):
        check_static_int("NearestNeighbour", "start", self.start, 1)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> PRNGKeyArray:
        return key

    def __call__(self, f: PRNGKeyArray, x: Float[Array, "n d"]) -> Float[Array, " n"]:
        index = jnp.arange(len(x))
        first_equal = (x[:, None] == x).all(-1).argmax(-1)
        cosine = x @ x.T / jnp.maximum(jnp.linalg.norm(x, axis=-1), jnp.finfo(x.dtype).tiny)
        nearest = jnp.where(index < index[:, None], cosine, -jnp.inf).argmax(-1)
        source = jnp.where(index < self.start, first_equal, nearest)

        def step(labels: Array, i: Array) -> tuple[Array, None]:
            return labels.at[i].set(labels[source[i]]), None

        labels, _ = jax.lax.scan(step, _signs(jax.random.bernoulli(f, shape=(len(x),))), index)
        return labels
