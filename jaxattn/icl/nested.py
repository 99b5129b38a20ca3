"""Three nested softmaxes in place of a network that learns an induction head, and how abruptly they are learned.

An item and its label are next to each other. One layer must look from a label to its item (logit β), another from the
query to the labels so marked (α), and the last from what was read to an answer (ξ). Each is of use only where those
before it work, so that gradients are nearly 0 at the start (after Reddy, 2024; the form is ours).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.checks import check_positive, check_static_int
from jaxattn.core.part import part


@part
class NestedSoftmaxes:
    """The loss −log r of logits (β, α, ξ), with N items, each class B times, and L labels:

        q = e^β / (e^β + N)                      how much a label token reads of its item
        p = B e^(α q) / (B e^(α q) + 2 N + 1 − B)   how much the query reads of the right labels
        r = e^(ξ p) / (e^(ξ p) + L − 1)             the probability of the right answer

    Where α = 0 the loss does not change with β, and where ξ = 0 with neither of both: a saddle.

    Attributes:
        items: N, at least 1.
        labels: L, at least 2.
        burst: B, from 1 to N.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range.
    """

    items: int
    labels: int
    burst: int = 1

    def __post_init__(self):
        check_static_int("NestedSoftmaxes", "items", self.items, 1)
        check_static_int("NestedSoftmaxes", "labels", self.labels, 2)
        check_static_int("NestedSoftmaxes", "burst", self.burst, 1)
        if self.burst > self.items:
            raise ValueError(f"NestedSoftmaxes: burst is {self.burst} of {self.items} items: need at most as many")

    def shares(self, logits: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
        """Returns (q, p, r) of (β, α, ξ)."""
        beta, alpha, xi = jnp.moveaxis(jnp.asarray(logits, float), -1, 0)
        item = jax.nn.sigmoid(beta - jnp.log(self.items))
        label = jax.nn.sigmoid(alpha * item + jnp.log(self.burst / (2 * self.items + 1 - self.burst)))
        answer = jax.nn.sigmoid(xi * label - jnp.log(self.labels - 1))
        return jnp.stack([item, label, answer], -1)

    def __call__(self, logits: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
        """Returns the loss, in nats."""
        _, label, _ = jnp.moveaxis(self.shares(logits), -1, 0)
        return jax.nn.softplus(jnp.log(self.labels - 1) - jnp.asarray(logits, float)[..., 2] * label)


class Flow(NamedTuple):
    """A path of gradient descent in continuous time.

    Attributes:
        time: [n + 1], from 0.
        logits: [n + 1, 3].
        loss: [n + 1].
    """

    time: Array
    logits: Array
    loss: Array

    def when(self, share: float) -> Float[Array, ""]:
        """Returns the first time at which the loss is at most this share of the first loss.

        It is ∞ if the loss never is, and NaN if the loss became NaN before, as with steps that are too large.
        """
        low = self.loss <= share * self.loss[0]
        never = jnp.where(jnp.isnan(self.loss).any(), jnp.nan, jnp.inf)
        return jnp.where(low.any(), self.time[low.argmax()], never)


def gradient_flow(loss: Any, start: Float[Array, " k"], time: float, steps: int = 10_000) -> Flow:
    """Returns the path dθ/dt = −∇ loss(θ) from a start, by the classical Runge-Kutta method of order 4.

    Args:
        loss: From θ [K] to a number, such as `NestedSoftmaxes`.
        start: θ(0).
        time: The last time, above 0.
        steps: The number of steps, at least 1. The error falls with their fourth power.

    Raises:
        TypeError: `steps` is not an int.
        ValueError: A number is out of range.
    """
    check_static_int("gradient_flow", "steps", steps, 1)
    check_positive("gradient_flow", "time", time)
    size, start = time / steps, jnp.asarray(start, float)

    def down(x: Array) -> Array:
        return -jax.grad(loss)(x)

    def step(x: Array, _: None) -> tuple[Array, Array]:
        first = down(x)
        second = down(x + size / 2 * first)
        third = down(x + size / 2 * second)
        fourth = down(x + size * third)
        x = x + size / 6 * (first + 2 * second + 2 * third + fourth)
        return x, x

    _, path = jax.lax.scan(step, start, length=steps)
    path = jnp.concatenate([start[None], path])
    return Flow(size * jnp.arange(steps + 1), path, jax.vmap(loss)(path))
