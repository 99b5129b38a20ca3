"""Inputs of Boolean functions: uniform signs, examples that are planted, and sequences that teach the function."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxattn.core.checks import check_probability, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.task import Function, Inputs, happens


class Plantable(Function):
    """A prior over functions, each of which has a pattern that decides its value."""

    @abc.abstractmethod
    def pattern(self, f: Any) -> Float[Array, " d"]:
        """Returns the signs that an input takes over to be planted; 0 where it keeps its own."""


class Teachable(Function):
    """A prior over functions that can be taught: few examples leave only one of them.

    Of a `DNF` this holds if no term contains another. Where one does, the examples that should show each of its
    coordinates to matter are positive through the smaller term, and several functions may be left.
    """

    @abc.abstractmethod
    def lesson(self, f: Any) -> tuple[Float[Array, "m d"], Bool[Array, " m"]]:
        """Returns inputs in the order in which they teach f, and which of these rows belong to the lesson."""


@part
class Signs(Inputs):
    """x uniform in {−1, 1}^d."""

    dim: int

    def __post_init__(self):
        check_static_int("Signs", "dim", self.dim, 1)

    def draw(self, key: PRNGKeyArray, length: int, function: Function, f: Any) -> Float[Array, "n d"]:
        return jax.random.rademacher(key, (length, self.dim), float)


@part
class Planted(Inputs):
    """Other inputs, each of which is made to follow the function's pattern with the given probability.

    Without planted inputs, conjunctions of many literals would hardly ever be true (Bhattamishra et al., 2024, which
    has 0.3, and 0.35 for terms of a DNF).

    Attributes:
        inputs: The other inputs.
        probability: The probability that an input is planted.

    Raises:
        TypeError: Inputs are drawn for a function without a pattern.
    """

    inputs: Inputs
    probability: Float[Array, ""] | float = 0.3

    def __post_init__(self):
        check_probability("Planted: probability", self.probability)

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.inputs.dim

    def draw(self, key: PRNGKeyArray, length: int, function: Function, f: Any) -> Float[Array, "n d"]:
        if not isinstance(function, Plantable):
            raise TypeError(f"Planted: {type(function).__name__} has no pattern: need a Plantable function")
        for_inputs, for_choice = jax.random.split(key)
        pattern = function.pattern(f)
        planted = happens(for_choice, self.probability, (length, 1)) & (pattern != 0)
        return jnp.where(planted, pattern, self.inputs.draw(for_inputs, length, function, f))

    def log_likelihood(self, x: Float[Array, "n d"], pattern: Float[Array, " d"]) -> Float[Array, " n"]:
        """Returns log p(x | f) + d log 2 if the other inputs are `Signs`: planted examples tell of their function.

        p(x | f) = (1 − p) 2^{−d} + p [x follows the pattern] 2^{−(d − k)} for a pattern of k signs.
        """
        follows = (x @ pattern) == jnp.abs(pattern).sum()
        return jnp.log((1 - self.probability) + self.probability * follows * 2.0 ** jnp.abs(pattern).sum())


@part
class Teaching(Inputs):
    """The lesson of the function, and after it other inputs; a lesson longer than the prompt is cut.

    The paper plants positive examples among the others with probability 0.4: `Teaching(Planted(Signs(d), 0.4))`
    (Bhattamishra et al., 2024).

    Attributes:
        inputs: The other inputs.

    Raises:
        TypeError: Inputs are drawn for a function without a lesson.
    """

    inputs: Inputs

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.inputs.dim

    def draw(self, key: PRNGKeyArray, length: int, function: Function, f: Any) -> Float[Array, "n d"]:
        if not isinstance(function, Teachable):
            raise TypeError(f"Teaching: {type(function).__name__} has no lesson: need a Teachable function")
        rows, belongs = function.lesson(f)
        lesson = rows[jnp.argsort(~belongs, stable=True)]
        lesson = jnp.pad(lesson, ((0, length), (0, 0)))[:length]
        taught = jnp.arange(length)[:, None] < belongs.sum()
        return jnp.where(taught, lesson, self.inputs.draw(key, length, function, f))
