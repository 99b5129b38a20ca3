"""Priors over real functions: linear ones, sparse, from a pool, networks, trees, and mixtures of them."""

import abc
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxattn.core.checks import check_static_int
from jaxattn.core.part import part
from jaxattn.icl.inputs import check_covariance, check_dimension, root
from jaxattn.icl.task import Function
from jaxattn.icl.teaching import Plantable


class Finite(Function):
    """A prior over finitely many functions."""

    @abc.abstractmethod
    def table(self, dim: int) -> tuple[Any, Float[Array, " f"]]:
        """Returns the parameters of every function of `dim` coordinates, stacked, and the log of its probability."""


def check_count(what: str, count: int, dim: int) -> None:
    """Raises ValueError for more coordinates than the inputs have."""
    if count > dim:
        raise ValueError(f"{what} is {count} of dim {dim}: need at most as many")


def choose(what: str, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int, count: int) -> Bool[Array, " d"]:
    """Draws random coordinates among the visible ones, or all of those if they are fewer; raises as `check_count`."""
    check_count(what, count, dim)
    order = jnp.where(jnp.arange(dim) < visible, jax.random.uniform(key, (dim,)), jnp.inf).argsort()
    return jnp.zeros(dim, bool).at[order[:count]].set(True) & (jnp.arange(dim) < visible)


@part
class Linear(Function):
    """f(x) = w·x with w ~ N(0, scale² C).

    Attributes:
        scale: The standard deviation of weights.
        covariance: C [d, d], by default the identity.

    Raises:
        ValueError: `covariance` is not a covariance (where its numbers are known), or a function of another dimension
            is drawn.
    """

    scale: Float[Array, ""] | float = 1.0
    covariance: Float[Array, "d d"] | None = None

    def __post_init__(self):
        if self.covariance is not None:
            check_covariance("Linear", self.covariance)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        w = self.scale * jax.random.normal(key, (dim,))
        if self.covariance is None:
            return w
        check_dimension("Linear", self.covariance, dim)
        return root(self.covariance).astype(w.dtype) @ w

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return x @ f


@part
class SparseLinear(Function):
    """f(x) = w·x with w ~ N(0, I) but for all except `nonzero` random coordinates, which are 0 (Garg et al., 2022).

    Attributes:
        nonzero: The number of coordinates, at least 1. They are chosen among the visible ones; all of those where they
            are fewer.
    """

    nonzero: int = 3

    def __post_init__(self):
        check_static_int("SparseLinear", "nonzero", self.nonzero, 1)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        for_weights, for_places = jax.random.split(key)
        chosen = choose("SparseLinear: nonzero", for_places, dim, visible, self.nonzero)
        return jnp.where(chosen, jax.random.normal(for_weights, (dim,)), 0)

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return x @ f


@part
class Pool(Finite):
    """f(x) = w·x with w one of the rows of a finite pool, each as likely (Raventós et al., 2023).

    Attributes:
        weights: The pool [M, d].
    """

    weights: Float[Array, "m d"]

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        self._check(dim)
        return jnp.asarray(self.weights)[jax.random.randint(key, (), 0, len(self.weights))]

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return x @ f

    def table(self, dim: int) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
        self._check(dim)
        return self.weights, jnp.full(len(self.weights), -math.log(len(self.weights)))

    def _check(self, dim: int) -> None:
        shape = jnp.shape(self.weights)
        if len(shape) != 2 or shape[1] != dim:
            raise ValueError(f"Pool: weights has shape {shape}: need [M, {dim}]")


@part
class BlockwiseLinear(Function):
    """f(x) in R^M, f_m(x) = w_m·x_{S_m} on the m-th of M blocks of d / M coordinates, w ~ N(0, scale² I).

    The function is M tasks at once, each of which sees its own part of the input.

    Attributes:
        tasks: M, a divisor of d.
        scale: The standard deviation of weights.
    """

    tasks: int
    scale: Float[Array, ""] | float = 1.0

    def __post_init__(self):
        check_static_int("BlockwiseLinear", "tasks", self.tasks, 1)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        if dim % self.tasks:
            raise ValueError(f"BlockwiseLinear: tasks is {self.tasks} for dim {dim}: need a divisor of it")
        return self.scale * jax.random.normal(key, (dim,))

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, "n m"]:
        return (x * f).reshape(len(x), self.tasks, -1).sum(-1)


@part
class ReluNetwork(Function):
    """f(x) = √(2/h) Σ_j v_j relu(u_j·x) with h hidden units, all weights N(0, 1) (Garg et al., 2022).

    Attributes:
        hidden: h, at least 1.
    """

    hidden: int = 100

    def __post_init__(self):
        check_static_int("ReluNetwork", "hidden", self.hidden, 1)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> tuple[Array, Array]:
        one, two = jax.random.split(key)
        return jax.random.normal(one, (dim, self.hidden)), jax.random.normal(two, (self.hidden,))

    def __call__(self, f: tuple[Array, Array], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        u, v = f
        return jnp.sqrt(2 / self.hidden) * jax.nn.relu(x @ u) @ v


@part
class DecisionTree(Function):
    """f(x) = the N(0, 1) value of the leaf that x comes to: at each node the sign of one random coordinate decides.

    The tree is a complete binary one, with 2^depth leaves (Garg et al., 2022).

    Attributes:
        depth: The depth, at least 0.
    """

    depth: int = 4

    def __post_init__(self):
        check_static_int("DecisionTree", "depth", self.depth, 0)

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> tuple[Array, Array]:
        for_coordinates, for_values = jax.random.split(key)
        coordinates = jax.random.randint(for_coordinates, (2**self.depth - 1,), 0, dim)
        return coordinates, jax.random.normal(for_values, (2**self.depth,))

    def __call__(self, f: tuple[Array, Array], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        coordinates, values = f
        node = jnp.zeros(len(x), int)  # in heap order: the children of node j are 2j + 1 and 2j + 2
        for _ in range(self.depth):
            at = jnp.take_along_axis(x, coordinates[node][:, None], 1)[:, 0]
            node = 2 * node + 1 + (at > 0)
        return values[node - (2**self.depth - 1)]


@part
class Quadratic(Function):
    """f(x) = Σ_j w_j x_j² / √3 with w ~ N(0, I): of the same variance as a linear function (Garg et al., 2022)."""

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        return jax.random.normal(key, (dim,))

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return x**2 @ f / jnp.sqrt(3)


@part
class LinearSign(Function):
    """f(x) = sign(w·x), w ~ N(0, I): linear classification; 1 where w·x is 0."""

    signs: ClassVar[bool] = True

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Float[Array, " d"]:
        return jax.random.normal(key, (dim,))

    def __call__(self, f: Float[Array, " d"], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        return jnp.where(x @ f >= 0, 1.0, -1.0)


@part
class Logistic(Function):
    """y = 1 with probability σ(scale · w·x), else −1, with w ~ N(0, I): logistic classification.

    The draw of each label is part of the function: f holds the uniform numbers that decide, from one key.

    Attributes:
        scale: The factor of w·x.
    """

    signs: ClassVar[bool] = True
    scale: Float[Array, ""] | float = 1.0

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> tuple[Array, PRNGKeyArray]:
        for_weights, for_labels = jax.random.split(key)
        return jax.random.normal(for_weights, (dim,)), for_labels

    def __call__(self, f: tuple[Array, PRNGKeyArray], x: Float[Array, "n d"]) -> Float[Array, " n"]:
        w, key = f
        return jnp.where(jax.random.uniform(key, (len(x),)) < jax.nn.sigmoid(self.scale * (x @ w)), 1.0, -1.0)


@part
class ScaledValues(Function):
    """scale · f(x) with f of another prior.

    Attributes:
        function: The other prior.
        scale: The factor.
    """

    function: Function
    scale: Float[Array, ""] | float = 1.0

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Any:
        return self.function.draw(key, dim, visible)

    def __call__(self, f: Any, x: Float[Array, "n d"]) -> Float[Array, "n ..."]:
        return self.scale * self.function(f, x)


@part
class OneOf(Plantable):
    """A mixture: each prompt's function is drawn from one of several priors, with the given probabilities.

    Its parameters are (index of the prior, parameters drawn from each). Planted examples follow the pattern of the
    function that was drawn.

    Attributes:
        functions: The priors.
        probabilities: One number per prior.

    Raises:
        TypeError: The pattern of functions without one is asked for.
        ValueError: `functions` is empty, `probabilities` are not as many or do not sum to 1, or values ±1 are mixed
            with real ones or numbers with vectors.
    """

    functions: tuple[Function, ...]
    probabilities: tuple[float, ...] | None = None

    def __post_init__(self):
        if not self.functions:
            raise ValueError("OneOf: functions is empty: need at least one")
        if len({function.signs for function in self.functions}) > 1:
            raise ValueError("OneOf: functions mixes values of -1 and 1 with real ones: need one kind")
        given = self.probabilities
        if given is not None and (len(given) != len(self.functions) or min(given) < 0 or abs(sum(given) - 1) > 1e-6):
            raise ValueError(f"OneOf: probabilities is {given}: need {len(self.functions)} numbers that sum to 1")

    @property
    def signs(self) -> bool:  # type: ignore[override]
        return self.functions[0].signs

    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> tuple[Array, tuple]:
        for_index, *keys = jax.random.split(key, 1 + len(self.functions))
        given = None if self.probabilities is None else jnp.array(self.probabilities)
        index = jax.random.choice(for_index, len(self.functions), p=given)
        return index, tuple(each.draw(key, dim, visible) for each, key in zip(self.functions, keys, strict=True))

    def __call__(self, f: tuple[Array, tuple], x: Float[Array, "n d"]) -> Float[Array, "n ..."]:
        index, parameters = f
        values = [each(p, x) for each, p in zip(self.functions, parameters, strict=True)]
        if len({each.shape for each in values}) > 1:
            raise ValueError(f"OneOf: functions has values of shapes {[each.shape[1:] for each in values]}: need one")
        return jnp.stack(values)[index]

    def pattern(self, f: tuple[Array, tuple]) -> Float[Array, " d"]:
        index, parameters = f
        patterns = []
        for each, p in zip(self.functions, parameters, strict=True):
            if not isinstance(each, Plantable):
                raise TypeError(f"OneOf: {type(each).__name__} has no pattern: need Plantable functions")
            patterns.append(each.pattern(p))
        return jnp.stack(patterns)[index]
