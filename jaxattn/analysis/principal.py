"""Principal axes: what varies most among vectors, to score along them or to draw them in a plane."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class PrincipalAxes(NamedTuple):
    """The axes along which vectors, such as activations, vary most.

    Attributes:
        mean: [D].
        axes: [K, D], of length 1, that of the largest variance first. Their signs are those in which the entry of the
            largest size is positive.
        variance: [K], the variance along each, over n − 1.
        share: [K], that of all variance.
    """

    mean: Float[Array, " d"]
    axes: Float[Array, "k d"]
    variance: Float[Array, " k"]
    share: Float[Array, " k"]

    def coordinates(self, values: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Returns the coordinates of vectors along the axes, without the mean."""
        return (jnp.asarray(values) - self.mean) @ self.axes.T


def principal_axes(values: Float[Any, "n d"], count: int | None = None) -> PrincipalAxes:
    """Returns the principal axes of n vectors. To score activations, fit them on other data than those that are scored.

    Args:
        values: [n, D].
        count: K, by default all min(n − 1, D).

    Raises:
        ValueError: There are fewer than 2 vectors, or `count` is out of range.
    """
    values = jnp.asarray(values)
    most = min(len(values) - 1, values.shape[1])
    count = most if count is None else count
    if len(values) < 2 or not 1 <= count <= most:
        raise ValueError(f"count is {count} for {len(values)} vectors of {values.shape[1]}: need 1 to {most}")
    mean = values.mean(0)
    _, size, axes = jnp.linalg.svd(values - mean, full_matrices=False)
    largest = jnp.take_along_axis(axes, jnp.abs(axes).argmax(-1)[:, None], -1)
    variance = jnp.square(size) / (len(values) - 1)
    return PrincipalAxes(
        mean, (axes * jnp.where(largest < 0, -1, 1))[:count], variance[:count], (variance / variance.sum())[:count]
    )
