"""Distributions of the inputs of a prompt, and of the one input that is asked about."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxattn.core.checks import check_static_int
from jaxattn.core.numeric import ratio
from jaxattn.core.part import part
from jaxattn.icl.task import Function, Inputs, Query


@part
class Gaussian(Inputs):
    """x ~ N(mean, Σ), independent.

    Attributes:
        dim: d.
        covariance: Σ [d, d], by default the identity. A singular one is legal: x stays in its range.
        mean: [d], by default 0.

    Raises:
        ValueError: `mean` or `covariance` has another shape, or `covariance` (where its numbers are known) is not
            symmetric with eigenvalues from 0 on.
    """

    dim: int
    covariance: Float[Array, "d d"] | None = None
    mean: Float[Array, " d"] | float = 0.0

    def __post_init__(self):
        check_static_int("Gaussian", "dim", self.dim, 1)
        if self.covariance is not None:
            check_covariance("Gaussian", self.covariance, self.dim)
        _check_vector("Gaussian: mean", self.mean, self.dim)

    def draw(self, key: PRNGKeyArray, length: int, function: Function, f: Any) -> Float[Array, "n d"]:
        z = jax.random.normal(key, (length, self.dim))
        return self.mean + (z if self.covariance is None else z @ root(self.covariance).astype(z.dtype))


def _check_vector(name: str, vector: Any, dim: int) -> None:
    """Raises ValueError unless this is a number or a vector of so many."""
    if jnp.shape(vector) not in ((), (dim,)):
        raise ValueError(f"{name} has shape {jnp.shape(vector)}: need ({dim},)")


@jax.custom_jvp
def root(covariance: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Returns Σ^½, the symmetric root of a covariance, which may be singular and have eigenvalues that are equal.

    Its derivative solves R dR + dR R = dΣ: dR_ij = dΣ_ij / (√λ_i + √λ_j) in the eigenbasis, and 0 where both are 0.
    """
    values, vectors = jnp.linalg.eigh(covariance)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T


@root.defjvp
def _(primals, tangents):
    (covariance,), (change,) = primals, tangents
    values, vectors = jnp.linalg.eigh(covariance)
    roots = jnp.sqrt(jnp.maximum(values, 0))
    inside = vectors.T @ ((change + change.T) / 2) @ vectors
    return (vectors * roots) @ vectors.T, vectors @ ratio(inside, roots[:, None] + roots) @ vectors.T


def check_covariance(owner: str, covariance: Any, dim: int | None = None) -> None:
    """Raises ValueError unless this is a covariance [dim, dim], or without `dim` one of any dimension.

    Numbers that are traced are not checked.
    """
    if dim is None:
        dim = jnp.shape(covariance)[0] if jnp.ndim(covariance) else 0
    check_dimension(owner, covariance, dim)
    if isinstance(covariance, jax.core.Tracer):
        return
    # In NumPy: under a transformation JAX would make a tracer of known numbers too.
    matrix = np.asarray(covariance, jnp.result_type(covariance, float))
    size, tolerance = np.abs(matrix).max(), dim * np.finfo(matrix.dtype).eps
    if not np.abs(matrix - matrix.T).max() <= tolerance * size:
        raise ValueError(f"{owner}: covariance is not symmetric")
    least = float(np.linalg.eigvalsh(matrix)[0])
    if least < -tolerance * size:
        raise ValueError(f"{owner}: covariance has the eigenvalue {least:.3g}: need eigenvalues from 0 on")


def check_dimension(owner: str, covariance: Any, dim: int) -> None:
    """Raises ValueError unless this is [dim, dim]."""
    if jnp.shape(covariance) != (dim, dim):
        raise ValueError(f"{owner}: covariance has shape {jnp.shape(covariance)}: need ({dim}, {dim})")


@part
class Skewed(Inputs):
    """x = c Q diag(1, 1/2, ..., 1/d) z with z ~ N(0, I) and Q a random rotation per prompt; c makes tr Cov x = d.

    The distribution is the skewed covariance of Garg et al. (2022).

    Attributes:
        dim: d.
    """

    dim: int

    def __post_init__(self):
        check_static_int("Skewed", "dim", self.dim, 1)

    def draw(self, key: PRNGKeyArray, length: int, function: Function, f: Any) -> Float[Array, "n d"]:
        for_basis, for_inputs = jax.random.split(key)
        scales = 1 / jnp.arange(1.0, self.dim + 1)
        scales = scales * jnp.sqrt(self.dim / (scales**2).sum())
        basis = jax.random.orthogonal(for_basis, self.dim)
        return (jax.random.normal(for_inputs, (length, self.dim)) * scales) @ basis.T


@part
class Subspace(Inputs):
    """x ~ N(0, (d / k) P), P the projection on a random subspace of k dimensions per prompt (Garg et al., 2022).

    Attributes:
        dim: d.
        dimensions: k, at most d.

    Raises:
        ValueError: `dimensions` is more than `dim`.
    """

    dim: int
    dimensions: int

    def __post_init__(self):
        check_static_int("Subspace", "dim", self.dim, 1)
        check_static_int("Subspace", "dimensions", self.dimensions, 1)
        if self.dimensions > self.dim:
            raise ValueError(f"Subspace: dimensions is {self.dimensions} of dim {self.dim}: need at most as many")

    def draw(self, key: PRNGKeyArray, length: int, function: Function, f: Any) -> Float[Array, "n d"]:
        for_basis, for_inputs = jax.random.split(key)
        basis = jax.random.orthogonal(for_basis, self.dim)[: self.dimensions]
        z = jax.random.normal(for_inputs, (length, self.dimensions))
        return jnp.sqrt(self.dim / self.dimensions) * z @ basis


@part
class Orthant(Inputs):
    """x = |z| ⊙ s with z ~ N(0, I) and one random sign per coordinate s for the whole prompt (Garg et al., 2022).

    Attributes:
        dim: d.
    """

    dim: int

    def __post_init__(self):
        check_static_int("Orthant", "dim", self.dim, 1)

    def draw(self, key: PRNGKeyArray, length: int, function: Function, f: Any) -> Float[Array, "n d"]:
        for_signs, for_inputs = jax.random.split(key)
        signs = jax.random.rademacher(for_signs, (self.dim,))
        return jnp.abs(jax.random.normal(for_inputs, (length, self.dim))) * signs


@part
class Scaled(Inputs):
    """x = scale · x' + shift with x' of other inputs.

    Attributes:
        inputs: The other inputs.
        scale: A number.
        shift: A number or [d].

    Raises:
        ValueError: `shift` has another shape.
    """

    inputs: Inputs
    scale: Float[Array, ""] | float = 1.0
    shift: Float[Array, " d"] | float = 0.0

    def __post_init__(self):
        _check_vector("Scaled: shift", self.shift, self.dim)

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.inputs.dim

    def draw(self, key: PRNGKeyArray, length: int, function: Function, f: Any) -> Float[Array, "n d"]:
        return self.scale * self.inputs.draw(key, length, function, f) + self.shift


@part
class Fresh(Query):
    """A query from N(0, I), whatever the context is drawn from."""

    def draw(self, key: PRNGKeyArray, x: Float[Array, "n d"], shown: Bool[Array, " d"]) -> Float[Array, " d"]:
        return jnp.where(shown, jax.random.normal(key, x.shape[-1:], x.dtype), 0)


@part
class Seen(Query):
    """A query that is one of the inputs of the context (N(0, I) if it has none): without noise its answer is known."""

    def draw(self, key: PRNGKeyArray, x: Float[Array, "n d"], shown: Bool[Array, " d"]) -> Float[Array, " d"]:
        return Fresh().draw(key, x, shown) if not len(x) else x[jax.random.randint(key, (), 0, len(x))]


@part
class Orthogonal(Query):
    """A query from N(0, I), projected on the orthogonal complement of the context and rescaled to the length it had.

    Once the context spans the coordinates that are shown, the query is 0 (Garg et al., 2022, without this last rule).
    """

    def draw(self, key: PRNGKeyArray, x: Float[Array, "n d"], shown: Bool[Array, " d"]) -> Float[Array, " d"]:
        z = Fresh().draw(key, x, shown)
        _, values, basis = jnp.linalg.svd(x, full_matrices=False)
        spans = values > max(x.shape) * jnp.finfo(x.dtype).eps * values.max(initial=0)
        rest = z - jnp.where(spans, basis @ z, 0) @ basis
        rest = rest - jnp.where(spans, basis @ rest, 0) @ basis  # once more, for what rounding left
        length = jnp.linalg.norm(rest)
        is_there = length > 1e-3 * jnp.linalg.norm(z)
        return jnp.where(is_there, rest * jnp.linalg.norm(z) / jnp.where(is_there, length, 1), 0)
