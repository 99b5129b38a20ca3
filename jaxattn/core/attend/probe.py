"""One query for a window of tokens, and how much of a budget each layer gets (ActQKV, 2025)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxattn.core.checks import check_static_int
from jaxattn.core.matmul import accumulator
from jaxattn.core.numeric import ratio


def activation_bias(query: Float[Array, "*b t n h"], there: Bool[Array, "*b t"] | None = None) -> Float[Array, "*b t"]:
    """Returns how far each query of a window stands out, with mean q̄ and variance σ² of each channel in the window:

        b_i = mean over heads and channels of (q_i − q̄)² / σ²

    Channels that are equal in the whole window count as 0. The mean of b over the window is the share of the other
    channels. The paper's measure is not known here in detail: this one is reconstructed.

    Args:
        query: [..., T, N, H]. Queries that a rotation has turned should be turned back first, since the mean of other
            turns means little.
        there: [..., T], which tokens count; the others get −∞. By default all.
    """
    there = jnp.ones(query.shape[:-2], bool) if there is None else there
    here = there[..., None, None]
    x = jnp.where(here, query, 0).astype(accumulator(query))
    count = jnp.maximum(here.sum(-3, keepdims=True), 1)
    away = jnp.where(here, x - x.sum(-3, keepdims=True) / count, 0)
    square = away**2
    bias = ratio(square, square.sum(-3, keepdims=True) / count).mean((-2, -1))
    return jnp.where(there, bias, -jnp.inf)


def probe_query(
    query: Float[Array, "*b t n h"],
    there: Bool[Array, "*b t"] | None = None,
    weigh: Callable[[Float[Array, "*b t"]], Float[Array, "*b t"]] = jax.nn.softmax,
) -> Float[Array, "*b n h"]:
    """Returns one query for a window of tokens, Σ_i w_i q_i with w = weigh(b) and b the `activation_bias`.

    Equal queries give that query. `lambda b: jnp.isfinite(b) / jnp.isfinite(b).sum(-1, keepdims=True)` gives the mean.

    Args:
        query: [..., T, N, H].
        there: [..., T], which tokens count, at least one. By default all.
        weigh: A function of the bias [..., T] whose results sum to 1, and are 0 where the bias is −∞.
    """
    weights = weigh(activation_bias(query, there)).astype(accumulator(query))[..., None, None]
    return (weights * jnp.where(weights == 0, 0, query)).sum(-3).astype(query.dtype)


def information_density(scores: Float[Array, "*b p"]) -> Float[Array, "*b"]:
    """Returns 1 − H(p) / log P, with p the softmax of P scores and H its entropy: 0 for equal ones, 1 for a single one.

    A score of −∞ is that of a block that is not there, and still counts in P. With one block the density is 1.
    """
    if scores.shape[-1] == 1:
        return jnp.ones(scores.shape[:-1], accumulator(scores))
    log = jax.nn.log_softmax(scores.astype(accumulator(scores)))
    entropy = -jnp.where(log == -jnp.inf, 0, jnp.exp(log) * jnp.where(log == -jnp.inf, 0, log)).sum(-1)
    return 1 - entropy / np.log(scores.shape[-1])


def allocate(density: Float[ArrayLike, " layers"], total: int, least: int = 0) -> Int[np.ndarray, " layers"]:
    """Returns how many pages each layer gets: `least`, and a part of the rest in proportion to its density.

    The numbers sum to `total`, and a layer with a larger density never gets fewer. What is left after rounding down
    goes to the largest remainders. Where all densities are 0 the shares are equal.

    Args:
        density: [L], known numbers from 0 on.
        total: The sum, at least L · least.
        least: At least 0.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range.
    """
    check_static_int("allocate", "least", least, 0)
    given = np.asarray(density, np.float64)
    if given.ndim != 1 or not len(given) or not (np.isfinite(given).all() and (given >= 0).all()):
        raise ValueError(f"density is {density}: need a list of finite numbers from 0 on")
    check_static_int("allocate", "total", total, len(given) * least)
    shares = given / given.sum() if given.any() else np.full(len(given), 1 / len(given))
    quota = shares * (total - len(given) * least)
    number = np.floor(quota).astype(int)
    rest = total - len(given) * least - number.sum()
    first = np.lexsort((np.arange(len(given)), -given, number - quota))[:rest]
    number[first] += 1
    return number + least
