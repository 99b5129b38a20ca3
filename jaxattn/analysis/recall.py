"""Where heads look in an earlier copy, by lag, held against a model of how people recall lists.

In the contextual maintenance and retrieval model (CMR) each item of a list is bound to a context that drifts. Recalling
an item brings its context back, and with it neighbours: the next item more than the one before. Ji-An et al. (2024)
find the same curve over lags in induction heads. Items are one-hot vectors, and the item before is the context.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxattn.analysis.heads import check_heads, check_unpadded
from jaxattn.core.attend.measure import AtLags
from jaxattn.core.checks import check_array, check_probability, check_static_int
from jaxattn.core.numeric import ratio
from jaxattn.trace import run
from jaxattn.trace.patching import as_inputs

Number = Float[Array, ""] | float


def lag_curve(
    model: Any, tokens: Int[Array, "b t"], period: int, lags: int = 5, **options: Any
) -> Float[Array, "layers n lags"]:
    """Returns the mean weight of each head at lags −`lags` .. `lags` from the earlier copy of the token at hand.

    The last 2 P tokens are a block and its copy. Lag 0 is the same token in the first copy, and lag 1 the one behind
    it, where induction heads look. Of each lag those queries of the second copy count whose key is in the first.

    Args:
        model: The model.
        tokens: [B, T], such as `repeated_tokens`, T ≥ 2 P.
        period: P, above `lags`.
        lags: The largest lag, at least 1.
        options: Other arguments of the model, without `positions`.

    Returns:
        [L, N, 2 lags + 1].

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range, layers have different numbers of heads, or not all have weights, or the
            model has tokens of its own before the sequence.
    """
    check_static_int("lag_curve", "lags", lags, 1)
    check_static_int("lag_curve", "period", period, lags + 1)
    check_unpadded(options)
    tokens = jnp.asarray(tokens)
    if tokens.shape[-1] < 2 * period:
        raise ValueError(f"tokens has {tokens.shape[-1]} of a row: need two copies of the period {period}")
    asked = np.arange(-lags, lags + 1)
    record = {"lags": ("weights", AtLags(tuple(int(period - lag) for lag in asked)))}
    _, records = run(model, *as_inputs("tokens", tokens, options, ("record",)), record=record, **options)
    check_heads(records["lags"], tokens.shape[1])
    key = np.arange(period)[:, None] + asked
    inside = (key >= 0) & (key < period)
    found = jnp.where(inside[:, None], records["lags"][:, :, -period:], 0)
    return found.mean(1).sum(1) / inside.sum(0)


def cmr_matrix(items: int, encoding: Number) -> Float[Array, "n n"]:
    """Returns M = (I − (1 − β) T)⁻¹ T with T_{i,i+1} = 1, how strongly the context at item i evokes item j:

        M_ij = (1 − β)^(j − i − 1)  for j > i, else 0

    Args:
        items: n, at least 1.
        encoding: β, how fast context drifts as items come, 0 to 1. At 1 an item evokes the next one alone.

    Raises:
        TypeError: `items` is not an int.
        ValueError: A number is out of range.
    """
    check_static_int("cmr_matrix", "items", items, 1)
    check_probability("cmr_matrix: encoding", encoding)
    ahead = np.arange(items) - np.arange(items)[:, None] - 1
    kept = jnp.asarray(1 - encoding, float)
    powers = jnp.where(ahead > 0, kept ** np.maximum(ahead, 1), 1.0)
    return jnp.where(ahead >= 0, powers, 0)


def cmr_crp(
    key: PRNGKeyArray,
    encoding: Number,
    retrieval: Number,
    gamma: Number,
    *,
    items: int = 60,
    recalls: int = 6,
    lags: int = 5,
    runs: int = 400,
) -> Float[Array, " lags"]:
    """Returns the shares of transitions at lags −`lags` .. `lags` in simulated recall: the conditional response
    probability (CRP) of CMR.

    The context t begins as that of an item in the middle half of the list. Items are recalled with probability ∝ Mᵀ t,
    also again, until nothing is evoked. Item j moves the context:

        t ← normalised (1 − β_rec) t + β_rec c,   c = normalised (1 − γ) e_j + γ M e_j

    The first transition is that from the first context to the first recall.

    Args:
        key: The random key. The same key draws the same numbers whatever the parameters.
        encoding: β_enc, as of `cmr_matrix`.
        retrieval: β_rec, how far the context goes to that of the item recalled, 0 to 1.
        gamma: γ, how much of the new context is that which the item had, 0 to 1: it brings back what came before.
        items: n, above `lags`.
        recalls: The number of recalls of a run, at least 1.
        lags: The largest lag, at least 1. Transitions further apart do not count.
        runs: The number of runs.

    Returns:
        [2 lags + 1], shares that sum to 1; NaN where no transition is within the lags.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range.
    """
    check_static_int("cmr_crp", "lags", lags, 1)
    for name, count, least in (("items", items, lags + 1), ("recalls", recalls, 1), ("runs", runs, 1)):
        check_static_int("cmr_crp", name, count, least)
    for name, value in (("retrieval", retrieval), ("gamma", gamma)):
        check_probability(f"cmr_crp: {name}", value)
    matrix = cmr_matrix(items, encoding)

    def normalised(t: Array) -> Array:
        return ratio(t, jnp.sqrt((t**2).sum(-1, keepdims=True)))

    def step(carry: Any, drawn: Array) -> tuple[Any, Array]:
        context, last = carry
        below = (context @ matrix).cumsum(-1)
        total = below[:, -1:]
        item = jnp.minimum((below <= drawn[:, None] * total).sum(-1), items - 1)
        some = total[:, 0] > 0
        recalled = jax.nn.one_hot(item, items)
        evoked = normalised((1 - gamma) * recalled + gamma * recalled @ matrix.T)
        moved = normalised((1 - retrieval) * context + retrieval * evoked)
        lag = jnp.where(some, item - last, items)
        counts = (lag[:, None] == jnp.arange(-lags, lags + 1)).sum(0)
        return (jnp.where(some[:, None], moved, 0), item), counts

    for_starts, for_draws = jax.random.split(key)
    first = jax.random.randint(for_starts, (runs,), items // 4, max(items - items // 4, items // 4 + 1))
    drawn = jax.random.uniform(for_draws, (recalls, runs))
    _, counts = jax.lax.scan(step, (jax.nn.one_hot(first, items), first), drawn)
    return counts.sum(0) / counts.sum()


class CMRGrid(NamedTuple):
    """Curves of CMR over a grid of its parameters.

    Attributes:
        parameters: [G, 3]: (β_enc, β_rec, γ).
        curves: [G, lags], of `cmr_crp`.
    """

    parameters: Array
    curves: Array


def cmr_grid(
    key: PRNGKeyArray, encoding: int = 20, retrieval: int = 21, gamma: int = 11, *, chunk: int = 64, **options: Any
) -> CMRGrid:
    """Returns `cmr_crp` on a grid: β_enc = 1/E .. 1 in E steps, β_rec and γ from 0 to 1 in so many.

    Args:
        key: The random key, the same for all.
        encoding: E, at least 1.
        retrieval: At least 1.
        gamma: At least 1.
        chunk: How many are simulated at once.
        options: Of `cmr_crp`.
    """
    for name, count in (("encoding", encoding), ("retrieval", retrieval), ("gamma", gamma), ("chunk", chunk)):
        check_static_int("cmr_grid", name, count, 1)
    axes = jnp.arange(1, encoding + 1) / encoding, jnp.linspace(0, 1, retrieval), jnp.linspace(0, 1, gamma)
    parameters = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    one = jax.jit(lambda all_of_them: jax.lax.map(lambda p: cmr_crp(key, *p, **options), all_of_them, batch_size=chunk))
    return CMRGrid(parameters, one(parameters))


def cmr_distance(curve: Float[Array, "*b lags"], crp: Float[Array, "*c lags"]) -> Float[Array, "*d"]:
    """Returns how far the curve of a head is from one of CMR, whatever the offset and the scale of both:

        mean (h − c)² / var h,   h = curve − min curve,   c = (crp − min crp) · max h / max (crp − min crp)

    Ji-An et al. (2024) call a head with a distance below 0.5 to the nearest curve of a grid CMR-like. A curve that is
    the same at all lags has no distance: NaN, as has a constant crp.

    Args:
        curve: [..., lags], as of `lag_curve`.
        crp: [..., lags], as of `cmr_crp`; leading axes broadcast, so that `cmr_distance(curve, grid.curves).min()` is
            the distance to the nearest.

    Raises:
        ValueError: The curves have different numbers of lags.
    """
    check_array("curve", curve)
    check_array("crp", crp)
    if curve.shape[-1] != crp.shape[-1]:
        raise ValueError(f"curve has {curve.shape[-1]} lags and crp {crp.shape[-1]}: need the same")
    head, model = (x - x.min(-1, keepdims=True) for x in (curve, crp))
    scaled = model * (head.max(-1, keepdims=True) / model.max(-1, keepdims=True))
    return ((head - scaled) ** 2).mean(-1) / head.var(-1)
