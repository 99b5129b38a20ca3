"""Routing attention: tokens attend within clusters of a k-means over queries and keys (Roy et al., 2021)."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.api import attend
from jaxattn.core.attend.choose import in_order, places_of, seen_by
from jaxattn.core.attend.mask import Causal, Documents, Window
from jaxattn.core.attend.score import Dot, Score
from jaxattn.core.checks import check_static_int
from jaxattn.core.matmul import accumulator, product
from jaxattn.core.part import part

Membership = Literal["balanced", "nearest"]


@part
class Clusters:
    """The centroids of a running spherical k-means, and the sums that they are made of.

    Attributes:
        centroids: μ [N, C, H].
        counts: The running number of tokens of each cluster, [N, C].
        sums: The running sum of its tokens, [N, C, H].
    """

    centroids: Float[Array, "n c h"]
    counts: Float[Array, "n c"]
    sums: Float[Array, "n c h"]

    @classmethod
    def of(cls, centroids: Float[Array, "n c h"]) -> "Clusters":
        """Clusters that begin with these centroids, as of one token each."""
        return cls(centroids, jnp.ones(centroids.shape[:-1]), jnp.asarray(centroids))


def layer_normed(x: Float[Array, "*b h"], eps: float = 1e-6) -> Float[Array, "*b h"]:
    """Returns x without its mean, over its standard deviation, along the last axis; in float32 or better."""
    x = x.astype(accumulator(x))
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def kmeans_step(
    x: Float[Array, "*b t n h"],
    clusters: Clusters,
    decay: float = 0.999,
    there: Bool[Array, "*#b t"] | None = None,
    eps: float = 1e-5,
) -> tuple[Clusters, Float[Array, ""]]:
    """One step of a running spherical k-means per head: the nearest centroid is that of the largest dot product.

        counts ← decay · counts + (1 − decay) · |tokens of the cluster|,   sums likewise
        μ = sums / (Σ counts · (counts + ε) / (Σ counts + C ε))

    With decay 0 and ε → 0 the step is one of Lloyd's on these tokens. A cluster without tokens then goes to 0; a decay
    near 1 keeps it.

    Args:
        x: Tokens [..., T, N, H], as `layer_normed` makes them.
        clusters: The clusters before.
        decay: From 0 to 1.
        there: Booleans [..., T], which tokens count; by default all.
        eps: ε, by which counts are smoothed.

    Returns:
        The clusters after, without a gradient, and the commitment loss: the mean of |x − μ|² over the tokens and heads,
        with μ the nearest centroid before the step, held constant. Its gradient draws tokens to their centroids.
    """
    old = jax.lax.stop_gradient(clusters.centroids)
    there = jnp.ones(x.shape[:-2], bool) if there is None else jnp.broadcast_to(there, x.shape[:-2])
    x = jnp.where(there[..., None, None], x, 0)
    near = jax.nn.one_hot(_nearest(x, old), old.shape[-2], axis=-1) * there[..., None, :, None]  # [..., N, T, C]
    flat = near.reshape(-1, *near.shape[-3:])
    tokens = jnp.moveaxis(jax.lax.stop_gradient(x), -2, -3).reshape(-1, near.shape[-3], x.shape[-3], x.shape[-1])
    sums = decay * clusters.sums + (1 - decay) * product(flat.swapaxes(-1, -2), tokens).sum(0)
    counts = decay * clusters.counts + (1 - decay) * flat.sum((0, 2))
    total = counts.sum(-1, keepdims=True)
    smoothed = total * (counts + eps) / (total + counts.shape[-1] * eps)
    centroids = sums / jnp.where(smoothed > 0, smoothed, 1)[..., None]
    distance = jnp.square(jnp.moveaxis(x, -2, -3) - product(near, old)).sum(-1)
    loss = jnp.where(there[..., None, :], distance, 0).sum() / jnp.maximum(there.sum() * old.shape[0], 1)
    return jax.lax.stop_gradient(Clusters(centroids, counts, sums)), loss


def balanced_members(affinity: Float[Array, "*b t"], width: int) -> Int[Array, "*b w"]:
    """Returns the `width` tokens of the largest affinity in ascending order, −1 for an affinity of −∞ or NaN.

    Args:
        affinity: How near each token is to a centroid, [..., T].
        width: The number of members, at least 1; no more than T are returned.
    """
    ranked = jnp.where(jnp.isnan(affinity), -jnp.inf, jax.lax.stop_gradient(affinity))
    best, chosen = jax.lax.top_k(ranked, min(width, affinity.shape[-1]))
    return jnp.sort(jnp.where(best > -jnp.inf, chosen, -1), axis=-1)


def routing_attention(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s kv v"],
    centroids: Float[Array, "n c h"],
    width: int,
    *,
    membership: Membership = "balanced",
    causal: bool = True,
    score: Score = Dot(),
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | None = None,
) -> Float[Array, "*b t n v"]:
    """Attends within clusters: q̂ and k̂ are the layer-normed queries and keys, and their nearness to μ_c is x̂ · μ_c.

    - "balanced": each cluster takes the `width` queries and the `width` keys that are nearest, and these attend to each
      other. A token in several clusters gets the mean of what it reads, and one in none gets 0. Which tokens a cluster
      takes depends on all tokens, so outputs depend on later ones through the choice, also with `causal`.
    - "nearest": a query reads the last `width` keys of its nearest cluster, up to itself. No later token has a say.

    With one cluster and `width` ≥ T both are attention of q̂ and k̂. Tokens are masked by position, where the published
    code masks by rank within a cluster, which lets a query see later keys where it does not share them. The published
    code also adds 0.01 to the number by which it divides, and does not scale scores: `score=Dot(1.0)`. The cost is
    C · width² pairs per head for "balanced", and T · width for "nearest" beside a sort.

    Args:
        query: [..., T, N, H].
        key: [..., S, K, H], where K divides N.
        value: [..., S, Kv, V].
        centroids: μ [N, C, H], those of `kmeans_step`. They have no gradient.
        width: The number of members of a cluster, at least 1.
        membership: "balanced" or "nearest".
        causal: Whether a token sees none after it; "nearest" is always causal.
        score: How well q̂ matches k̂.
        query_positions: As in `attend`; positions differ but for empty slots, which are −1.
        key_positions: As in `attend`, [..., S].

    Raises:
        TypeError or ValueError: `width` is too small, `membership` is unknown, or an array does not fit.
    """
    check_static_int("routing_attention", "width", width, 1)
    if membership not in get_args(Membership):
        raise ValueError(f"membership is {membership!r}: need 'balanced' or 'nearest'")
    if membership == "nearest" and not causal:
        raise ValueError("causal is False: membership 'nearest' reads the last keys of a cluster, need causal=True")
    at = seen_by(query, key, query_positions, key_positions)
    heads = query.shape[-2]
    if centroids.ndim != 3 or (centroids.shape[0], centroids.shape[2]) != (heads, query.shape[-1]):
        raise ValueError(f"centroids has shape {centroids.shape}: need [N, C, H] = [{heads}, C, {query.shape[-1]}]")
    centroids = jax.lax.stop_gradient(centroids)
    (key, of_key), (value, _) = (in_order(x, key_positions) for x in (key, value))
    last, places = (jnp.broadcast_to(x, y.shape[:-2]) for x, y in zip(places_of(at, of_key), (query, key), strict=True))
    query = jnp.where((last >= 0)[..., None, None], query, 0)
    key, value = (jnp.repeat(x, heads // x.shape[-2], -2) for x in (key, value))
    query, key, value = (jnp.moveaxis(x, -2, -3) for x in (layer_normed(query), layer_normed(key), value))
    last, places = (x[..., None, :] for x in (last, places))  # of heads, which are an axis of the batch from here on
    arrays = query, key, value, last, places, centroids, width, score
    out = _balanced(*arrays, causal) if membership == "balanced" else _of_nearest(*arrays)
    return jnp.moveaxis(out, -3, -2).astype(value.dtype)


def _balanced(
    query: Array,
    key: Array,
    value: Array,
    last: Array,
    places: Array,
    centroids: Array,
    width: int,
    score: Score,
    causal: bool,
) -> Array:
    """Returns the means over the clusters that take a query, [..., N, T, V]."""

    def members(x: Array, there: Array) -> tuple[Array, Array]:
        nearness = product(centroids, x.swapaxes(-1, -2))  # [..., N, C, T]
        chosen = balanced_members(jnp.where(there[..., None, :] >= 0, nearness, -jnp.inf), width)
        taken = jnp.broadcast_to(there, x.shape[:-1])[..., None, :]
        return chosen, jnp.where(chosen < 0, -1, jnp.take_along_axis(taken, chosen, -1))

    def taken(x: Array, chosen: Array) -> Array:
        return jnp.take_along_axis(x[..., None, :, :], jnp.maximum(chosen, 0)[..., None], -2)[..., None, :]

    queries, at = members(query, last)
    keys, stand = members(key, places)
    arrays = taken(query, queries), taken(key, keys), taken(value, keys)
    options: Any = {"query_positions": at, "key_positions": stand, "mask": Causal() if causal else None}
    read = attend(*arrays, score=score, **options)[..., 0, :].astype(accumulator(value))  # [..., N, C, w, V]

    @jax.vmap
    def sums(chosen: Array, read: Array) -> Array:
        slots = jnp.where(chosen < 0, query.shape[-2], chosen).reshape(-1)
        counted = jnp.concatenate([read, jnp.ones_like(read[..., :1])], -1).reshape(-1, read.shape[-1] + 1)
        return jnp.zeros((query.shape[-2], counted.shape[-1]), read.dtype).at[slots].add(counted, mode="drop")

    flat = sums(*(x.reshape(-1, *x.shape[query.ndim - 2 :]) for x in (queries, read)))
    total = flat.reshape(*query.shape[:-1], -1)
    return total[..., :-1] / jnp.maximum(total[..., -1:], 1)


def _of_nearest(
    query: Array,
    key: Array,
    value: Array,
    last: Array,
    places: Array,
    centroids: Array,
    width: int,
    score: Score,
) -> Array:
    """Returns what queries read of the last keys of their cluster, [..., N, T, V].

    Keys are put in the order of clusters, and of places within each. A query stands at the last of those it may see.
    """
    count, length = centroids.shape[-2], key.shape[-2]
    of_key = jnp.where(places < 0, count, product(key, centroids.swapaxes(-1, -2)).argmax(-1))
    code = of_key * length + jnp.arange(length)
    order = jnp.argsort(code, axis=-1)
    code = jnp.take_along_axis(code, order, -1)
    key, value = (jnp.take_along_axis(x, order[..., None], -2) for x in (key, value))
    of_query = product(query, centroids.swapaxes(-1, -2)).argmax(-1)
    rank = jnp.vectorize(lambda keys, own: jnp.searchsorted(keys, own, side="right"), signature="(s),(t)->(t)")
    at = rank(code, of_query * length + jnp.maximum(last, 0)) - 1
    found = jnp.take_along_axis(code, jnp.maximum(at, 0), -1) // length == of_query
    at = jnp.where(found & (at >= 0) & (last >= 0), at, -1)
    ids = jnp.where(code // length == count, -1, code // length)
    mask = Causal() & Window(width - 1) & Documents(ids)
    arrays = (x[..., None, :] for x in (query, key, value))
    return attend(*arrays, score=score, mask=mask, query_positions=at)[..., 0, :]


def _nearest(x: Float[Array, "*b t n h"], centroids: Float[Array, "n c h"]) -> Int[Array, "*b n t"]:
    return product(jnp.moveaxis(x, -2, -3), centroids.swapaxes(-1, -2)).argmax(-1)
