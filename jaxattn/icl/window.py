"""Attention as the posterior of where a value comes from, and a prior over distances that is inferred per sequence.

A query is a noisy copy of the key of its source, one of the keys before it. What is known of the source beforehand is a
bias: the log of the prior. A geometric prior over distances is the bias of ALiBi, with a slope that is inferred here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxattn.core.attend.api import attend
from jaxattn.core.attend.bias import Alibi
from jaxattn.core.attend.measure import Distance
from jaxattn.core.attend.score import NegativeDistance
from jaxattn.core.checks import check_all_positive, check_range, check_static_int
from jaxattn.core.part import part
from jaxattn.icl.prompt import Prompt


class Sources(NamedTuple):
    """What is hidden in a prompt of `WindowRecall`.

    Attributes:
        probability: [B], g, the reciprocal of the window.
        distance: [B, queries], how far back the source of each query is, from 1, the last key.
    """

    probability: Float[Array, " b"]
    distance: Array


@part
class WindowRecall:
    """Keys with values, then queries: what is the value of the key that a query is a noisy copy of?

    The source of a query is d keys back, P(d) ∝ (1 − g)^(d − 1), with a g of its own in each sequence. Its window
    1 / g, the mean distance where there are many keys, is log-uniform from `shortest` to `longest`. Keys are N(0, I),
    values N(0, 1), and noise is N(0, noise² I). Tokens are vectors (key or query, value or 0): first all keys, then all
    queries, which count. The truth is in `hidden` (`Sources`).

    Attributes:
        dim: Channels of keys.
        keys: The number of keys.
        queries: The number of queries.
        noise: Its standard deviation, positive.
        shortest: The least window, at least 1.
        longest: The largest.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1, `noise` is not positive, or windows are out of order or below 1.
    """

    dim: int
    keys: int
    queries: int
    noise: Float[Array, ""] | float = 0.5
    shortest: Float[Array, ""] | float = 2.0
    longest: Float[Array, ""] | float = 32.0

    def __post_init__(self):
        for name in ("dim", "keys", "queries"):
            check_static_int("WindowRecall", name, getattr(self, name), 1)
        check_all_positive("WindowRecall", "noise", self.noise)
        check_range("WindowRecall: shortest", self.shortest, lambda x: x >= 1, "from 1 on")
        if all(isinstance(x, int | float) for x in (self.shortest, self.longest)):
            least = self.shortest
            check_range("WindowRecall: longest", self.longest, lambda x: x >= least, f"from shortest, {least}, on")

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.keys + self.queries

    def sample(self, key: PRNGKeyArray, batch: int) -> Prompt:
        for_keys, for_values, for_noise, for_window, for_distance = jax.random.split(key, 5)
        keys = jax.random.normal(for_keys, (batch, self.keys, self.dim))
        values = jax.random.normal(for_values, (batch, self.keys))
        low, high = jnp.log(jnp.asarray(self.shortest, float)), jnp.log(jnp.asarray(self.longest, float))
        probability = jnp.exp(-jax.random.uniform(for_window, (batch,)) * (high - low) - low)
        # The inverse of the distribution of d, cut off behind the first key.
        log_miss = jnp.log1p(-probability)[:, None]
        inside = -jnp.expm1(self.keys * log_miss)
        drawn = jax.random.uniform(for_distance, (batch, self.queries))
        failures = jnp.floor(jnp.log1p(-drawn * inside) / log_miss)
        distance = 1 + jnp.clip(failures, 0, self.keys - 1).astype(jnp.int32)
        source = self.keys - distance
        copies = jnp.take_along_axis(keys, source[..., None], 1)
        queries = copies + self.noise * jax.random.normal(for_noise, copies.shape)
        answers = jnp.take_along_axis(values, source, 1)
        x = jnp.concatenate(
            [jnp.concatenate([keys, values[..., None]], -1), jnp.pad(queries, ((0, 0), (0, 0), (0, 1)))], 1
        )
        y = jnp.concatenate([values, answers], 1)
        asked = jnp.broadcast_to((jnp.arange(self.length) >= self.keys).astype(float), y.shape)
        return Prompt(x, y, asked, y, Sources(probability, distance))


class WindowPosterior(NamedTuple):
    """A Beta(a, b) distribution of the probability g by which a source is not farther back.

    Attributes:
        a: Its first parameter.
        b: Its second.
    """

    a: Float[Array, ""]
    b: Float[Array, ""]

    @property
    def slope(self) -> Float[Array, ""]:
        """The slope of the bias of ALiBi that it stands for, −E log(1 − g)."""
        return jax.scipy.special.digamma(self.a + self.b) - jax.scipy.special.digamma(self.b)

    @property
    def mean(self) -> Float[Array, ""]:
        """E g."""
        return self.a / (self.a + self.b)


def infer_window(
    query: Float[Array, "q h"],
    key: Float[Array, "s h"],
    noise: Float[Array, ""] | float,
    *,
    prior: tuple[float, float] = (1.0, 1.0),
    iterations: int = 20,
) -> WindowPosterior:
    """Returns what the queries of a sequence say of how far back their sources are, by variational inference:

        w_i = softmax_s(−|q_i − k_s|² / (2 noise²) − λ d_s),   λ = −E log(1 − g),   d_s = S − s
        g ~ Beta(a₀ + Q, b₀ + Σ_i Σ_s w_is (d_s − 1))

    repeated in turn: attention with the bias of ALiBi, whose slope is that of the posterior of g given how far
    attention looks. That is the geometric prior with its conjugate hyper-prior of Singh & Buckley (2023). P(d)
    is taken as if there were keys without end: S must be large beside the windows.

    Args:
        query: [Q, H], all behind the last key.
        key: [S, H].
        noise: The standard deviation of a query around the key of its source.
        prior: (a₀, b₀), positive; by default g is uniform from 0 to 1.
        iterations: Rounds.

    Raises:
        TypeError: `iterations` is not an int.
        ValueError: `iterations` is below 0, or known numbers are not positive.
    """
    check_static_int("infer_window", "iterations", iterations, 0)
    check_all_positive("infer_window", "noise", noise)
    check_all_positive("infer_window", "prior", jnp.asarray(prior))
    count, score = len(query), NegativeDistance(0.5 / jnp.square(jnp.asarray(noise, query.dtype)))

    def update(_: int, g: WindowPosterior) -> WindowPosterior:
        distance = _distances(query, key, score, g.slope)
        return WindowPosterior(start.a + count, start.b + (distance - 1).sum())

    start = WindowPosterior(*(jnp.asarray(x, query.dtype) for x in prior))
    return jax.lax.fori_loop(0, iterations, update, start)


def _distances(query: Array, key: Array, score: NegativeDistance, slope: Array) -> Float[Array, " q"]:
    """The mean distance to which each query attends, all queries standing behind the last key."""
    behind = jnp.full(len(query), len(key))
    _, extras = attend(
        query[:, None],
        key[:, None],
        key[:, None],
        score=score,
        bias=Alibi(slope[None]),
        query_positions=behind,
        measures={"distance": Distance()},
    )
    return extras["distance"][:, 0]
