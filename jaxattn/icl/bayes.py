"""Optimal learners: Bayes by weighing every function of a finite prior, and parities by linear algebra over GF(2)."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.checks import check_range, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.function import Finite
from jaxattn.icl.predict import Predictor
from jaxattn.icl.task import Function, FunctionTask
from jaxattn.icl.teaching import Plantable, Planted, Signs, Teaching


def _wraps_planted(inputs: Any) -> bool:
    """Returns whether inputs are made, in one step or several, from others that tell of the function."""
    inner = getattr(inputs, "inputs", None)
    return isinstance(inner, Planted | Teaching) or (inner is not None and _wraps_planted(inner))


@part
class BayesFinite(Predictor):
    """Answers E[f(x) | examples] over F functions: Σ_f softmax_f(log prior + log-likelihood of the examples) f(x).

    The predictor is softmax attention whose keys are functions. With Gaussian noise the log-likelihood is −(y − f(x))²
    / (2σ²): for a pool of linear functions this is the dMMSE predictor of Raventós et al. (2023). With values ±1 it is
    the log of 1 − noise where y is f(x) and of noise where not, and the sign of the answer is the optimal label.
    Planted inputs tell of the function too. If no function is left, the answer is 0.

    Attributes:
        function: The prior that the parameters belong to.
        parameters: The parameters of every function, stacked along a first axis.
        log_prior: [F], log-probabilities up to a constant.
        noise: The standard deviation of the answers, or the probability that a sign is flipped.
        planted: How inputs are planted, if they are.
        query_planted: Whether the input that is asked about is planted like the others, and so tells of the function.

    Raises:
        TypeError: Inputs are planted for functions without a pattern.
        ValueError: Real values come without noise, or inputs are planted among others than `Signs`: the likelihood is
            known only of those.
    """

    function: Function
    parameters: Any
    log_prior: Float[Array, " f"]
    noise: Float[Array, ""] | float = 0.0
    planted: Planted | None = None
    query_planted: bool = True

    def __post_init__(self):
        if not self.function.signs:
            check_range("BayesFinite: noise", self.noise, lambda x: x > 0, "above 0, for functions with real values")
        if self.planted is not None and not isinstance(self.function, Plantable):
            raise TypeError(f"BayesFinite: planted is given but {type(self.function).__name__} has no pattern")
        if self.planted is not None and not isinstance(self.planted.inputs, Signs):
            raise ValueError(f"BayesFinite: planted has the inputs {type(self.planted.inputs).__name__}: need Signs")

    @classmethod
    def of(cls, task: FunctionTask) -> "BayesFinite":
        """The optimal learner of a task with finitely many functions, all of whose coordinates are visible.

        Args:
            task: The task.

        Raises:
            TypeError: The prior is not finite.
            ValueError: Inputs teach their function or are planted among others than `Signs`, `visible` is given, or a
                `Pool` has another dimension.
        """
        if not isinstance(task.function, Finite):
            raise TypeError(f"BayesFinite: {type(task.function).__name__} has no table: need a Finite function")
        if _wraps_planted(task.inputs) or isinstance(task.inputs, Teaching):
            kind = type(task.inputs).__name__
            raise ValueError(f"BayesFinite: inputs is {kind}: need inputs with a likelihood, such as Planted")
        if task.visible is not None:
            raise ValueError(f"BayesFinite: visible is {task.visible}: need a task that shows all coordinates, None")
        parameters, log_prior = task.function.table(task.inputs.dim)
        planted = task.inputs if isinstance(task.inputs, Planted) else None
        return cls(task.function, parameters, log_prior, task.noise, planted, query_planted=task.query is None)

    def answer(self, x, y, seen, query):
        values = jax.vmap(self.function, (0, None))(self.parameters, x)
        if self.function.signs:
            fits = jnp.where(values == y, jnp.log1p(-self.noise), jnp.log(self.noise))
        else:
            fits = -((y - values) ** 2) / (2 * self.noise**2)
        total = self.log_prior + jnp.where(seen, fits, 0).sum(-1)
        if self.planted is not None:
            patterns = jax.vmap(cast(Plantable, self.function).pattern)(self.parameters)
            of_inputs = jax.vmap(self.planted.log_likelihood, (None, 0))
            total += jnp.where(seen, of_inputs(x, patterns), 0).sum(-1)
            if self.query_planted:
                total += of_inputs(query[None], patterns)[:, 0]
        some = total.max() > -jnp.inf
        posterior = jnp.where(some, jax.nn.softmax(jnp.where(some, total, 0)), 0)
        return posterior.astype(values.dtype) @ jax.vmap(self.function, (0, None))(self.parameters, query[None])[:, 0]


@part
class GF2Parity(Predictor):
    """The optimal learner of a `Parity` without noise: its label where x is a sum over GF(2) of inputs seen, else 0.

    Bits are x_j > 0. Elsewhere both labels are as likely, so 0 is the mean of the labels that are left.
    """

    def answer(self, x, y, seen, query):
        dim = x.shape[1]
        rows = jnp.concatenate([x > 0, y[:, None] > 0], 1).astype(jnp.int32) * seen[:, None]

        def add(basis: Array, row: Array) -> tuple[Array, None]:
            """Row j of the reduced basis has its first 1 at j and no 1 where another row has its first, or is 0."""
            rest = _reduced(row, basis)
            lead = (rest[:dim] > 0).argmax()
            cleared = (basis + basis[:, lead, None] * rest) % 2
            return jnp.where((rest[:dim] > 0).any(), cleared.at[lead].set(rest), basis), None

        basis, _ = jax.lax.scan(add, jnp.zeros((dim, dim + 1), jnp.int32), rows)
        rest = _reduced(jnp.append(query > 0, False).astype(jnp.int32), basis)
        return jnp.where((rest[:dim] > 0).any(), 0, 2 * rest[dim] - 1).astype(y.dtype)


def _reduced(row: Array, basis: Array) -> Array:
    """Reduces a row by the basis vectors that have their first 1 where it has a 1."""
    return (row + (row[:-1] * jnp.diagonal(basis)) @ basis) % 2


def parity_accuracy(examples: int, dim: int) -> float:
    """Returns 1/2 + 1/2 E 2^{rank − d}: how often `GF2Parity` is right after m uniform examples, 0 counting half.

    The rank of m random bit vectors goes from r to r + 1 with probability 1 − 2^{r − d}, and stays with 2^{r − d}: the
    probability that the next vector is in their span.

    Args:
        examples: m, at least 0.
        dim: d, at least 1.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below its least value.
    """
    check_static_int("parity_accuracy", "examples", examples, 0)
    check_static_int("parity_accuracy", "dim", dim, 1)
    inside = 2.0 ** (np.arange(dim + 1) - dim)
    ranks = np.eye(1, dim + 1)[0]
    for _ in range(examples):
        ranks = ranks * inside + np.append(0, ranks[:-1] * (1 - inside[:-1]))
    return float(0.5 + 0.5 * ranks @ inside)
