"""What heads can represent: weights that a head size reaches, heads of low rank in place of one, a distributed memory.

Closed forms and constructions, all differentiable but for integers. Angles and directions are those of unit vectors.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.checks import check_static_int


def head_dim_for(weights: Float[Array, "n s"], tolerance: float = 1e-9) -> int:
    """Returns the least head dim whose dot products can be these weights: the rank of log P without the mean of rows.

    A softmax does not see a constant that is added to a row of scores. So of n keys it is n − 1 at most, where
    Bhojanapalli et al. (2020) show that n is enough.

    Args:
        weights: P [N, S], positive, rows that sum to 1. It must be known, not traced.
        tolerance: Singular values below so many times the largest count as 0.

    Raises:
        ValueError: A weight is not positive.
    """
    sizes = np.linalg.svd(np.asarray(_centred_log(weights)), compute_uv=False)
    return int((sizes > tolerance * max(sizes.max(initial=0), 1)).sum())


def maps_for_weights(
    x: Float[Array, "n d"], weights: Float[Array, "n n"], head_dim: int
) -> tuple[Float[Array, "d h"], Float[Array, "d h"]]:
    """Returns the maps (W_q, W_k) by which a head attends to x with these weights (Bhojanapalli et al., 2020):

        softmax(x W_q (x W_k)ᵀ / √head_dim) = P

    They are W_q = √head_dim · X⁺ U S^½ and W_k = X⁺ V S^½ with the largest singular values S of log P without the mean
    of rows. The weights are met if `head_dim` is at least `head_dim_for(weights)`; otherwise scores are the nearest of
    that rank.

    Args:
        x: [N, D], tokens that are linearly independent.
        weights: P [N, N], positive, rows that sum to 1.
        head_dim: At least 1.

    Raises:
        TypeError: `head_dim` is not an int.
        ValueError: `head_dim` is below 1, shapes do not fit, there are more tokens than channels, or a weight that is
            known is not positive.
    """
    check_static_int("maps_for_weights", "head_dim", head_dim, 1)
    count, width = jnp.shape(x)
    if jnp.shape(weights) != (count, count) or count > width:
        raise ValueError(
            f"x has shape {jnp.shape(x)} and weights {jnp.shape(weights)}: need [n, n] weights of n tokens, which have "
            "at least n channels"
        )
    left, sizes, right = jnp.linalg.svd(_centred_log(weights), full_matrices=False)
    kept = min(head_dim, count)
    root = jnp.pad(jnp.sqrt(sizes[:kept]), (0, head_dim - kept))
    left, right = (jnp.pad(side[:, :kept], ((0, 0), (0, head_dim - kept))) for side in (left, right.T))
    inverse = jnp.linalg.pinv(x)
    return head_dim**0.5 * inverse @ (left * root), inverse @ (right * root)


def _centred_log(weights: Array) -> Array:
    weights = jnp.asarray(weights)
    if not isinstance(weights, jax.core.Tracer) and not bool((weights > 0).all()):
        raise ValueError("weights has numbers that are not positive: a softmax gives positive ones alone")
    log = jnp.log(weights)
    return log - log.mean(-1, keepdims=True)


def memorised(heads: int, context: int) -> int:
    """Returns how many labels one layer of attention can learn by heart of queries to one context: H (n − 1) + 1.

    That is the rank of what H heads read of n tokens: the weights of each head sum to 1, so one dimension is common to
    all. With contexts that differ it is the least count (Mahdavi et al., 2024, with n or the head dim, whichever is
    less).

    Args:
        heads: H, at least 1.
        context: n, the tokens of the context, at least 1.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1.
    """
    check_static_int("memorised", "heads", heads, 1)
    check_static_int("memorised", "context", context, 1)
    return heads * (context - 1) + 1


def rank_one_product(
    query: Float[Array, "*b d"],
    key: Float[Array, "*b d"],
    other_query: Float[Array, "*b d"],
    other_key: Float[Array, "*b d"],
) -> Float[Array, "*b"]:
    """Returns E ⟨h(y), h'(y)⟩ of two hard heads of rank 1 over two points and a target, uniform on the sphere:

        1/2 + 2/π² · arcsin(q·q') · arcsin(k·k'),   h(y) = the x_i with the largest (k·x_i)(q·y)

    (Amsel et al., 2024.) All directions are unit vectors [..., d].
    """
    pairs = (query, other_query), (key, other_key)
    of_queries, of_keys = (jnp.arcsin(jnp.clip((a * b).sum(-1), -1, 1)) for a, b in pairs)
    return 0.5 + 2 / jnp.pi**2 * of_queries * of_keys


def rank_one_target(query: Float[Array, "*b 2"], key: Float[Array, "*b 2"]) -> Float[Array, "*b"]:
    """Returns E ⟨h(y), f(y)⟩ of a hard head of rank 1 and the nearer of two points on the circle (Amsel et al., 2024):

        1/2 + sign(π/2 − a) (1/4 − (a'/π)²),   a = ∠(q, k),   a' = π/2 − |π/2 − a|

    Raises:
        ValueError: The directions are not of the plane.
    """
    if query.shape[-1] != 2 or key.shape[-1] != 2:
        raise ValueError(f"query has {query.shape[-1]} coordinates and key {key.shape[-1]}: need 2, the plane")
    angle = jnp.arccos(jnp.clip((query * key).sum(-1), -1, 1))
    folded = jnp.pi / 2 - abs(jnp.pi / 2 - angle)
    return 0.5 + jnp.sign(jnp.pi / 2 - angle) * (0.25 - (folded / jnp.pi) ** 2)


def combination_error(products: Float[Array, "h h"], targets: Float[Array, " h"]) -> Float[Array, ""]:
    """Returns the error of the best weighted sum of heads, 1 − bᵀ C⁺ b, of a target of length 1.

    Args:
        products: C, the mean products of heads with each other, as of `rank_one_product`.
        targets: b, those of heads with the target, as of `rank_one_target`.
    """
    return 1 - targets @ (jnp.linalg.pinv(products, hermitian=True) @ targets)


def log_overlap(bits: int, radius: int) -> Float[np.ndarray, " distances"]:
    """Returns by the distance of two addresses, 0 to n, the log of how many addresses are near both; −∞ for none.

        I(d) = Σ C(n − d, a) C(d, c)  over a + c ≤ r and a + d − c ≤ r

    In Kanerva's sparse distributed memory, whose neurons are everywhere and read and write within a radius, that is the
    weight of a pattern at distance d. It is nearly exponential in 1 − 2 d / n, the cosine: attention with normalised
    queries and keys (Bricken & Pehlevan, 2021).

    Args:
        bits: n, the length of addresses, at least 1.
        radius: r, from 0 to n: addresses within it, the radius included, are near.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is out of range.
    """
    check_static_int("log_overlap", "bits", bits, 1)
    check_static_int("log_overlap", "radius", radius, 0)
    if radius > bits:
        raise ValueError(f"log_overlap: radius is {radius} of {bits} bits: need at most as many")
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, bits + 1)))])

    def log_ways(size: int) -> np.ndarray:
        """The logs of the numbers of ways to choose 0, 1, .. of so many bits."""
        return log_factorial[size] - log_factorial[: size + 1] - log_factorial[size::-1]

    found = np.full(bits + 1, -np.inf)
    for distance in range(min(2 * radius, bits) + 1):
        equal, other = np.arange(bits - distance + 1)[:, None], np.arange(distance + 1)  # changed bits, among these
        near = equal + np.maximum(other, distance - other) <= radius
        logs = (log_ways(bits - distance)[:, None] + log_ways(distance))[near]
        found[distance] = np.logaddexp.reduce(logs)
    return found
