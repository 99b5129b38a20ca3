"""The eigenvalues of XᵀX for a matrix X of independent N(0, 1) numbers: exact means of functions of them."""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.checks import check_static_int


def eigenvalue_mean(
    dim: int, count: int, function: Callable[[Float[Array, " m"]], Float[Array, " m"]]
) -> Float[Array, ""]:
    """Returns E Σ_k f(λ_k) over the `dim` eigenvalues of XᵀX, X [count, dim] with independent N(0, 1) entries.

    The result is exact but for quadrature: an integral over the density of eigenvalues. It is differentiable in
    whatever the function depends on.

    Args:
        dim: The number of columns, at least 1.
        count: The number of rows, at least 0.
        function: f, called on an array of eigenvalues, and on 0 where count < dim. It must be smooth on scales of λ of
            about 1e−5 and larger.

    Raises:
        TypeError: `dim` or `count` is not an int.
        ValueError: `dim` is below 1, `count` is negative, or both are above about 300, where the method leaves the
            range of float64.
    """
    check_static_int("eigenvalue_mean", "dim", dim, 1)
    check_static_int("eigenvalue_mean", "count", count, 0)
    if count == 0:
        return dim * function(jnp.zeros(1))[0]
    nodes, weights = _density(min(dim, count), max(dim, count))
    mean = jnp.asarray(weights) @ function(jnp.asarray(nodes))
    return mean + (dim - count) * function(jnp.zeros(1))[0] if count < dim else mean


# Besides 100 for every 50 dimensions. The rule converges exponentially: at 1 / (λ + 1e−4) it is 1e−10 off.
NODES = 400


@functools.lru_cache(maxsize=256)
def _density(dim: int, count: int) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Returns nodes λ_m and weights with E Σ_k f(λ_k) = Σ_m weight_m f(λ_m), for dim ≤ count.

    The eigenvalues have the joint density ∝ Π_k w(λ_k) Π_{j<k} |λ_j − λ_k|, w(λ) = λ^((count − dim − 1) / 2) e^(−λ/2).
    By de Bruijn (1955) the integral of Π_k (1 + t f(λ_k)) against it is ∝ the Pfaffian of

        A_jk(t) = ∫∫ sgn(y − x) g_j(x) g_k(y) (1 + t f(x)) (1 + t f(y)) dx dy,

    with g_j / w a basis of the polynomials of degree below dim (here one that makes the g orthonormal in √λ). Its
    derivative at t = 0, ½ tr(A⁻¹ A'), is ∫ f(x) ρ(x) dx with ρ(x) = Σ_jk (A⁻¹)_kj g_j(x) E_k(x) and
    E_k(x) = ∫ sgn(y − x) g_k(y) dy. For odd dim, A has one more row ∫ g_j, and ρ a term with E = 1.
    """
    # In the singular values u = √λ all is smooth, w(λ) dλ = 2 u^(count − dim) e^(−u²/2) du, also at 0. They are outside
    # √count ± (√dim + 9) with a probability below 2 e^(−81/2) (Davidson and Szarek, 2001).
    around, half = np.sqrt(count), np.sqrt(dim) + 9
    first, last = max(around - half, 0), around + half
    places, rule, integrals = _rule(NODES + 100 * (dim // 50))
    u, rule = first + (places + 1) * (last - first) / 2, rule * (last - first) / 2
    g = _laguerre_functions(u**2, count - dim - 0.5, dim) * np.sqrt(2 * u)[:, None]
    before = (last - first) / 2 * integrals @ g
    whole = rule @ g
    beyond = whole - 2 * before
    pairs = (rule[:, None] * g).T @ beyond
    if dim % 2:
        pairs = np.block([[pairs, whole[:, None]], [-whole, np.zeros(1)]])
        g, beyond = np.pad(g, ((0, 0), (0, 1))), np.pad(beyond, ((0, 0), (0, 1)), constant_values=1.0)
    inverse = np.linalg.inv((pairs - pairs.T) / 2)
    weights = rule * np.einsum("mj,kj,mk->m", g, inverse, beyond)
    if not abs(weights @ u**2 - dim * count) <= 1e-9 * dim * count:  # E tr XᵀX
        raise ValueError(f"eigenvalue_mean: dim and count are {dim} and {count}: too large for this method in float64")
    return u**2, weights


def _laguerre_functions(x: Float[np.ndarray, " m"], alpha: float, count: int) -> Float[np.ndarray, "m c"]:
    """Returns x^(α/2) e^(−x/2) times the first polynomials orthonormal under x^α e^(−x), at every x by itself."""
    last, this = np.zeros_like(x), np.exp((alpha * np.log(x) - x - math.lgamma(alpha + 1)) / 2)
    functions = [this]
    for k in range(count - 1):
        last, this = this, (2 * k + 1 + alpha - x) * this - np.sqrt(k * (k + alpha)) * last
        this = this / np.sqrt((k + 1) * (k + 1 + alpha))
        functions.append(this)
    return np.column_stack(functions)


@functools.lru_cache(maxsize=8)
def _rule(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns Gauss-Legendre places t and weights, and B with Σ_j B_ij f(t_j) = ∫_{−1}^{t_i} f.

    B is exact for polynomials of degree below `count`: f = Σ_k c_k P_k with c_k = (2k + 1) / 2 Σ_j weight_j P_k(t_j)
    f(t_j), and ∫ P_k = (P_{k+1} − P_{k−1}) / (2k + 1).
    """
    places, rule = np.polynomial.legendre.leggauss(count)
    values = np.polynomial.legendre.legvander(places, count)
    integrals = np.column_stack([places + 1, (values[:, 2:] - values[:, :-2]) / (2 * np.arange(1, count) + 1)])
    return places, rule, integrals @ ((2 * np.arange(count) + 1)[:, None] / 2 * values[:, :count].T * rule)
