"""Tasks: a function is drawn from a prior, inputs from a distribution, and the function's values are the answers.

Task = prior over functions × distribution of inputs × noise. Each is a part, so for a new task write only the part that
differs. Their arrays (covariances, noise levels, scales) are leaves that can be vmapped over without recompiling.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxattn.core.checks import check_range, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.prompt import Prompt


def happens(key: PRNGKeyArray, probability: Any, shape: tuple[int, ...] = ()) -> Bool[Array, "*s"]:
    """Draws booleans that are true with a probability, which may be the integers 0 and 1 and a NumPy number too."""
    return jax.random.bernoulli(key, jnp.asarray(probability, float), shape)


class Function(abc.ABC):
    """A prior over functions of x in R^d.

    Attributes:
        signs: Whether values are −1 and 1. Noise then flips them with the given probability.
    """

    signs: ClassVar[bool] = False

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, dim: int, visible: Int[Array, ""] | int) -> Any:
        """Draws the parameters of one function of `dim` coordinates, those from `visible` on being 0 in every input."""

    @abc.abstractmethod
    def __call__(self, f: Any, x: Float[Array, "n d"]) -> Float[Array, "n ..."]:
        """Returns the values of the function with parameters f at the inputs of one prompt."""


class Inputs(abc.ABC):
    """A distribution of the inputs of one prompt, in R^dim; they may depend on its function."""

    dim: int

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, length: int, function: Function, f: Any) -> Float[Array, "n d"]:
        """Draws the inputs of one prompt of the function with parameters f."""


class Query(abc.ABC):
    """The distribution of the last input of a prompt, when it is not drawn as the others are."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, x: Float[Array, "n d"], shown: Bool[Array, " d"]) -> Float[Array, " d"]:
        """Draws an input after the inputs x: 0 in the coordinates that are not shown, as x is."""


@part
class FunctionTask:
    """Prompts (x_i, f(x_i) + noise), i = 1..length, with a fresh function each.

    Attributes:
        function: The prior f is drawn from.
        inputs: The distribution of x.
        length: N, the number of examples in a prompt.
        noise: The standard deviation of Gaussian noise on the answers; for functions with values ±1 the probability
            from 0 to 1/2 that an answer is flipped.
        query: The distribution of the last input, if not `inputs`; then only the last answer counts.
        first: Answers count from this index on, counted from 0.
        visible: Coordinates of x from this one on are 0 (a curriculum over dimensions); all are visible if not given.
        points: Answers from this one on do not count (a curriculum over lengths); all count if not given.

    Raises:
        ValueError: `length` is below 1, `first` is outside the prompt, noise is out of range where it is known, an
            integer `visible` is outside 1 to dim, or an integer `points` is past the length or such that no answer
            counts.
    """

    function: Function
    inputs: Inputs
    length: int
    noise: Float[Array, ""] | float = 0.0
    query: Query | None = None
    first: int = 0
    visible: Int[Array, ""] | int | None = None
    points: Int[Array, ""] | int | None = None

    def __post_init__(self):
        check_static_int("FunctionTask", "length", self.length, 1)
        check_static_int("FunctionTask", "first", self.first, 0)
        if self.first >= self.length:
            raise ValueError(f"FunctionTask: first is {self.first} but length is {self.length}: need an index below it")
        most = 0.5 if self.function.signs else float("inf")
        check_range("FunctionTask: noise", self.noise, lambda x: (x >= 0) & (x <= most), f"from 0 to {most:g}")
        for name, low, high in (("visible", 1, self.inputs.dim), ("points", self.fewest_points, self.length)):
            given = getattr(self, name)
            if isinstance(given, int | np.integer) and not low <= given <= high:
                raise ValueError(f"FunctionTask: {name} is {given}: need a number from {low} to {high}")

    @property
    def fewest_points(self) -> int:
        """The least `points` with which an answer counts: one past the first, or with a query, the last."""
        return self.first + 1 if self.query is None else self.length

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        """Draws a batch of prompts; `hidden` holds the parameters of their functions."""
        return jax.vmap(self._one)(jax.random.split(key, batch))

    def with_length(self, length: int) -> "FunctionTask":
        """Returns the same task with prompts of another length, all of whose `points` count."""
        return dataclasses.replace(self, length=length, points=None)

    def _one(self, key: PRNGKeyArray) -> Prompt:
        for_function, for_inputs, for_query, for_noise = jax.random.split(key, 4)
        dim = self.inputs.dim
        visible = dim if self.visible is None else self.visible
        f = self.function.draw(for_function, dim, visible)
        x = self.inputs.draw(for_inputs, self.length, self.function, f)
        shown = jnp.arange(dim) < visible
        x = jnp.where(shown, x, 0)
        index = jnp.arange(self.length)
        weights = jnp.where(index >= self.first, 1.0, 0.0)
        if self.query is not None:
            x = x.at[-1].set(self.query.draw(for_query, x[:-1], shown))
            weights = jnp.where(index == self.length - 1, weights, 0)
        if self.points is not None:
            weights = jnp.where(index < self.points, weights, 0)
        clean = self.function(f, x)
        if self.function.signs:
            y = jnp.where(happens(for_noise, self.noise, clean.shape), -clean, clean)
        else:
            y = clean + self.noise * jax.random.normal(for_noise, clean.shape, clean.dtype)
        return Prompt(x, y, weights, clean, f)


@part
class Curriculum:
    """A task that grows with training: more coordinates and more examples in stages (Garg et al., 2022).

    At step s its inputs have min(d, d₀ + ⌊s / every⌋ · Δd) coordinates that are not 0, and its first
    min(N, n₀ + ⌊s / every⌋ · Δn) answers count.

    Attributes:
        task: The task that it grows to.
        every: The number of steps from one stage to the next.
        dims: (d₀, Δd), with d₀ from 1 to d; the whole dimension from the start if not given.
        points: (n₀, Δn); the whole length from the start if not given. Of the first n₀, up to N, one must count: more
            than the task's `first`, and all of them if it has a query.

    Raises:
        ValueError: The start of `dims` or `points` is out of range.
    """

    task: FunctionTask
    every: int
    dims: tuple[int, int] | None = None
    points: tuple[int, int] | None = None

    def __post_init__(self):
        check_static_int("Curriculum", "every", self.every, 1)
        for name, low, high in (
            ("dims", 1, self.task.inputs.dim),
            ("points", self.task.fewest_points, self.task.length),
        ):
            if (given := getattr(self, name)) is not None and not (low <= given[0] <= high and given[1] >= 0):
                wanted = f"a start from {low} to {high} and steps from 0 on"
                raise ValueError(f"Curriculum: {name} is {given}: need {wanted}")

    def at(self, step: Int[Array, ""] | int) -> FunctionTask:
        """Returns the task at a step, which may be traced."""

        def grown(stage: tuple[int, int] | None, most: int) -> Array | None:
            stages = jnp.minimum(step // self.every, most)  # bounded first: a step may be the largest integer
            return None if stage is None else jnp.minimum(most, stage[0] + stages * stage[1])

        dims, points = grown(self.dims, self.task.inputs.dim), grown(self.points, self.task.length)
        return dataclasses.replace(self.task, visible=dims, points=points)
