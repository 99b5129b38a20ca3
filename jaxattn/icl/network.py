"""A predictor that trains a small network on the examples of each prompt."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.core.checks import check_all_positive, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.predict import Predictor, check_single, shown


@part
class NetworkByAdam(Predictor):
    """ŷ = v·relu(U x + b) + c after `steps` steps of Adam on the mean square error of the examples, from fresh weights.

    The predictor is the baseline of Garg et al. (2022) for functions that are networks. Weights start uniform within
    ± 1 / √(inputs of the layer), the same for every prompt. The answer is 0 without examples.

    Attributes:
        hidden: The number of hidden units, at least 1.
        rate: The learning rate, positive.
        steps: The number of steps, at least 1.
        seed: The seed of the first weights.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1, or `rate` is not positive.
    """

    hidden: int = 100
    rate: Float[Array, ""] | float = 5e-3
    steps: int = 100
    seed: int = 0

    def __post_init__(self):
        check_static_int("NetworkByAdam", "hidden", self.hidden, 1)
        check_static_int("NetworkByAdam", "steps", self.steps, 1)
        check_all_positive("NetworkByAdam", "rate", self.rate)

    def start(self, dim: int) -> dict[str, Array]:
        """Returns the weights before training."""
        shapes = {"u": (dim, self.hidden), "b": (self.hidden,), "v": (self.hidden,), "c": ()}
        widths = {"u": dim, "b": dim, "v": self.hidden, "c": self.hidden}
        keys = jax.random.split(jax.random.key(self.seed), len(shapes))
        drawn = zip(shapes.items(), keys, strict=True)
        return {name: jax.random.uniform(key, s, minval=-1, maxval=1) / widths[name] ** 0.5 for (name, s), key in drawn}

    def trained(self, x: Float[Array, "n d"], y: Float[Array, " n"], seen: Bool[Array, " n"]) -> dict[str, Array]:
        """Returns the weights after training on the examples that are seen."""
        x, y = shown(x, y, seen)

        def error(weights: dict[str, Array]) -> Array:
            return jnp.where(seen, (network(weights, x) - y) ** 2, 0).sum() / jnp.maximum(seen.sum(), 1)

        def step(state: tuple, count: Array) -> tuple[tuple, None]:
            # Adam with the usual constants (Kingma and Ba, 2015).
            weights, mean, square = state
            gradient = jax.grad(error)(weights)
            mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradient)
            square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g**2, square, gradient)
            rate = self.rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
            return (
                jax.tree.map(lambda w, m, s: w - rate * m / (_root(s) + 1e-8), weights, mean, square),
                mean,
                square,
            ), None

        start = self.start(x.shape[1])
        zeros = jax.tree.map(jnp.zeros_like, start)
        (weights, _, _), _ = jax.lax.scan(step, (start, zeros, zeros), jnp.arange(1, self.steps + 1))
        return weights

    def answer(self, x, y, seen, query):
        check_single("NetworkByAdam", y)
        return jnp.where(seen.any(), network(self.trained(x, y, seen), query), 0)


def _root(s: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns √s, with the slope 0 at 0: the weights of a unit that is off stay as they are."""
    positive = s > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, s, 1)), 0)


def network(weights: dict[str, Array], x: Float[Array, "*n d"]) -> Float[Array, "*n"]:
    """Returns v·relu(U x + b) + c."""
    return jax.nn.relu(x @ weights["u"] + weights["b"]) @ weights["v"] + weights["c"]
