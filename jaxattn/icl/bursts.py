"""Sequences of items and their labels, in bursts: is a new item's label read off the context or known by heart?"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxattn.core.checks import check_probability, check_range, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.prompt import Prompt
from jaxattn.icl.task import happens


@part
class ItemLabels:
    """x₁ l₁ ... x_N l_N x_q: items of Gaussian classes, each with the vector of its label; which label has x_q?

    An item of class k = 0, 1, ... is (μ_k + ε η) / √(1 + ε²), η ~ N(0, I / D), and its label is k mod L. A sequence is
    bursty with probability `bursty`: N / B classes, each B times, in random order, and the query is of one of them.
    Otherwise all N + 1 classes are drawn on their own. Class k comes with probability ∝ (k + 1)^−exponent, also again.
    Of the bursty sequences, a share `novel` has fresh classes with random labels (Reddy, 2024).

    A prompt's x is [batch, 2N + 1, P + D]. A token is its position, one of P = 2 N_max + 1 in one-hot form, and then
    its content. The first position is random, so that no fixed place has a meaning. y holds the label of the query,
    from 0 to L − 1, at the last token, which alone counts. `hidden` is the class (−1 if novel) and the label of each
    item, [batch, N + 1] both.

    Attributes:
        means: μ [K, D], the class means; N(0, I / D) in the paper (`ItemLabels.draw`).
        labels: [L, D], the label vectors.
        items: N, the number of items before the query.
        most: N_max, from which the number of positions comes; by default N.
        burst: B, how often each class of a bursty sequence occurs, a divisor of N.
        bursty: The probability of a bursty sequence.
        novel: The share of bursty sequences with novel classes.
        noise: ε, how far items are from their class.
        exponent: How skewed the frequencies of the classes are.
        shift: Class k has label k + shift mod L in these sequences.
        absent: Whether the class of the query is kept out of the context.
        label_noise: The probability that the label shown with an item is replaced by a uniform one of the L (also the
            same again), each on its own. Neither the answer nor `hidden` changes.

    Raises:
        ValueError: `burst` does not divide N, sizes or probabilities are out of range, or the lengths of vectors
            differ.
    """

    means: Float[Array, "k d"]
    labels: Float[Array, "l d"]
    items: int
    most: int | None = None
    burst: int = 1
    bursty: Float[Array, ""] | float = 1.0
    novel: Float[Array, ""] | float = 0.0
    noise: Float[Array, ""] | float = 0.1
    exponent: Float[Array, ""] | float = 0.0
    shift: Int[Array, ""] | int = 0
    absent: bool = False
    label_noise: Float[Array, ""] | float = 0.0

    def __post_init__(self):
        if self.means.ndim != 2 or self.labels.ndim != 2 or self.means.shape[1] != self.labels.shape[1]:
            shapes = f"means has shape {self.means.shape} and labels {self.labels.shape}"
            raise ValueError(f"ItemLabels: {shapes}: need [K, D] and [L, D]")
        check_static_int("ItemLabels", "items", self.items, 1)
        check_static_int("ItemLabels", "burst", self.burst, 1)
        if self.items % self.burst:
            raise ValueError(f"ItemLabels: burst is {self.burst} for {self.items} items: need a divisor of it")
        if self.most is not None:
            check_static_int("ItemLabels", "most", self.most, self.items)
        for name in ("bursty", "novel", "label_noise"):
            check_probability(f"ItemLabels: {name}", getattr(self, name))
        check_range("ItemLabels: noise", self.noise, lambda x: x >= 0, "from 0 on")
        if self.absent and len(self.means) < 2:
            raise ValueError("ItemLabels: means holds one class: need two or more where the query's is absent")

    @classmethod
    def draw(cls, key: PRNGKeyArray, classes: int, labels: int, dim: int, **options: Any) -> "ItemLabels":
        """Draws a task with random class means and label vectors.

        Args:
            key: The random key.
            classes: K.
            labels: L.
            dim: D.
            **options: The other fields.
        """
        for_means, for_labels = jax.random.split(key)
        means, vectors = (jax.random.normal(k, (n, dim)) for k, n in ((for_means, classes), (for_labels, labels)))
        return cls(means / dim**0.5, vectors / dim**0.5, **options)

    def in_context(self) -> "ItemLabels":
        """Returns the test of learning in context (IC): bursts of novel classes."""
        return dataclasses.replace(self, bursty=1.0, novel=1.0, shift=0, absent=False)

    def relabelled(self) -> "ItemLabels":
        """Returns the test of whether the context overrules the weights (IC2): known classes, labels shifted by one."""
        return dataclasses.replace(self, bursty=1.0, novel=0.0, shift=1, absent=False)

    def in_weights(self) -> "ItemLabels":
        """Returns the test of learning in weights (IW): known classes; that of the query is not in the context."""
        return dataclasses.replace(self, novel=0.0, shift=0, absent=True)

    @property
    def length(self) -> int:
        return 2 * self.items + 1

    @property
    def positions(self) -> int:
        """P, the number of positions; the content of a token comes after them."""
        return 2 * (self.items if self.most is None else self.most) + 1

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        x, classes, labels = jax.vmap(self._one)(jax.random.split(key, batch))
        last = jnp.arange(self.length) == self.length - 1
        y = jnp.where(last, labels[:, -1:], 0)
        return Prompt(x, y, jnp.broadcast_to(last.astype(float), y.shape), y, (classes, labels))

    def _one(self, key: PRNGKeyArray) -> tuple[Float[Array, "t p"], Int[Array, " n"], Int[Array, " n"]]:
        keys = jax.random.split(key, 10)
        count, dim = self.items + 1, self.means.shape[1]
        bursty = happens(keys[0], self.bursty)
        novel = bursty & happens(keys[1], self.novel)
        # Each item takes one of N + 1 classes: its own, or that of its burst.
        bursts = jax.random.permutation(keys[2], jnp.arange(self.items) // self.burst)
        of_query = bursts[jax.random.randint(keys[3], (), 0, self.items)]
        takes = jnp.where(bursty, jnp.append(bursts, of_query), jnp.arange(count))
        if self.absent:
            takes = takes.at[-1].set(self.items)
        classes = self._classes(keys[4], count)
        fresh = jax.random.normal(keys[5], (count, dim)) / dim**0.5
        means = jnp.where(novel, fresh, jnp.asarray(self.means)[classes])
        known = (classes + self.shift) % len(self.labels)
        labels = jnp.where(novel, jax.random.randint(keys[6], (count,), 0, len(self.labels)), known)
        off = self.noise * jax.random.normal(keys[7], (count, dim)) / dim**0.5
        items = (means[takes] + off) / jnp.sqrt(1 + self.noise**2)
        for_whether, for_which = jax.random.split(keys[9])
        wrong = happens(for_whether, self.label_noise, (count,))
        said = jnp.where(wrong, jax.random.randint(for_which, (count,), 0, len(self.labels)), labels[takes])
        content = jnp.stack([items, jnp.asarray(self.labels)[said]], 1).reshape(2 * count, dim)[:-1]
        start = jax.random.randint(keys[8], (), 0, self.positions - self.length + 1)
        places = jax.nn.one_hot(start + jnp.arange(self.length), self.positions)
        return jnp.concatenate([places, content], -1), jnp.where(novel, -1, classes)[takes], labels[takes]

    def _classes(self, key: PRNGKeyArray, count: int) -> Int[Array, " n"]:
        """Draws classes by their frequency; if the class of the last one must be absent, the others exclude it."""
        ranks = jnp.arange(1, len(self.means) + 1)
        log_chances = -self.exponent * jnp.log(ranks)
        if self.absent:
            for_query, for_context = jax.random.split(key)
            query = jax.random.categorical(for_query, log_chances)
            left = jnp.where(ranks - 1 == query, -jnp.inf, log_chances)
            return jnp.append(jax.random.categorical(for_context, left, shape=(count - 1,)), query)
        # One uniform number each, not one for every class as a categorical draw takes: this is the sampler of training.
        below = jnp.exp(log_chances).cumsum()
        drawn = jnp.searchsorted(below, below[-1] * jax.random.uniform(key, (count,)), side="right")
        return jnp.minimum(drawn, len(self.means) - 1)


def _at_last(answers: Int[Array, " b"], x: Float[Array, "b t p"]) -> Int[Array, "b t"]:
    """Returns the answer at the last token, and 0 before it."""
    return jnp.zeros(x.shape[:2], answers.dtype).at[:, -1].set(answers)


def _nearest(x: Float[Array, "*b d"], points: Float[Array, "*b n d"]) -> Int[Array, "*b"]:
    return ((points - x[..., None, :]) ** 2).sum(-1).argmin(-1)


@part
class NearestItem:
    """Answers the label of the context's item that is nearest to the query: the best answer in context."""

    task: ItemLabels

    def __call__(self, x: Float[Array, "b t p"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        content = x[..., self.task.positions :]
        nearest = _nearest(content[:, -1], content[:, :-1:2])
        vectors = jnp.take_along_axis(content[:, 1::2], nearest[:, None, None], 1)[:, 0]
        return _at_last(_nearest(vectors, self.task.labels), x)


@part
class ClassTable:
    """Answers the label of the class whose mean is nearest to the query, whatever the context: the best by heart."""

    task: ItemLabels

    def __call__(self, x: Float[Array, "b t p"], y: Int[Array, "b t"]) -> Int[Array, "b t"]:
        query = x[:, -1, self.task.positions :]
        means = self.task.means / jnp.sqrt(1 + self.task.noise**2)
        return _at_last(_nearest(query, means) % len(self.task.labels), x)
