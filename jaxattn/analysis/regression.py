"""How much of attention is explained by simple things: least squares on fixed patterns, and on other maps."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Regression(NamedTuple):
    """A fit y ≈ b + x · c by least squares.

    Attributes:
        coefficients: c, [F].
        intercept: b.
        r2: 1 − Σ residual² / Σ (y − mean y)²; NaN for a y that is the same everywhere.
        adjusted: r2 less what as many random features would reach, 1 − (1 − r2) (n − 1) / (n − F − 1); NaN where there
            are not more than F + 1 examples.
        residual: [n], what is not explained.
    """

    coefficients: np.ndarray
    intercept: float
    r2: float
    adjusted: float
    residual: np.ndarray


def regress(y: Float[Any, " n"], features: Float[Any, "n f"]) -> Regression:
    """Returns the fit of numbers by features with the least sum of squares; of several, the one of least norm.

    Args:
        y: [n].
        features: [n, F].

    Raises:
        ValueError: There are not as many numbers as rows of features, or none.
    """
    y, x = np.asarray(y, np.float64), np.asarray(features, np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
        raise ValueError(f"y has shape {y.shape} and features {x.shape}: need [n] and [n, F]")
    if not (np.isfinite(y).all() and np.isfinite(x).all()):
        nothing = np.full(x.shape[1], np.nan)
        return Regression(nothing, np.nan, np.nan, np.nan, np.full(len(y), np.nan))
    mean_x, mean_y = x.mean(0), y.mean()
    coefficients = np.linalg.lstsq(x - mean_x, y - mean_y, rcond=None)[0]
    residual = y - mean_y - (x - mean_x) @ coefficients
    spread, free = ((y - mean_y) ** 2).sum(), len(y) - x.shape[1] - 1
    r2 = 1 - (residual**2).sum() / spread if np.ptp(y) > 0 else np.nan
    adjusted = 1 - (1 - r2) * (len(y) - 1) / free if free > 0 else np.nan
    return Regression(coefficients, float(mean_y - mean_x @ coefficients), float(r2), float(adjusted), residual)


def trivial_features(tokens: int) -> Float[np.ndarray, "pairs 4"]:
    """Returns what a head could do by position alone, for all pairs j ≤ i: `regress` attention on it.

    The features are [j = 0], [j = i], [j = i − 1] and (i − j) / T. Gao et al. (2023) call attention trivial as far as
    such features explain it; their exact list is not known here.

    Args:
        tokens: T, at least 1.

    Returns:
        [T (T + 1) / 2, 4], in the order of `numpy.tril_indices`.
    """
    i, j = np.tril_indices(tokens)
    return np.stack([j == 0, j == i, j == i - 1, (i - j) / tokens], -1).astype(np.float64)


def lower_rows(weights: Float[Any, "*b t t"]) -> Float[np.ndarray, "*b pairs"]:
    """Returns the weights of the pairs j ≤ i, divided by their sum in each row, in the order of `numpy.tril_indices`.

    Of a causal head these are the weights themselves. Rows without weight stay 0.

    Args:
        weights: [..., T, T].
    """
    lower = np.tril(np.asarray(weights, np.float64))
    total = lower.sum(-1, keepdims=True)
    lower = lower / np.where(total == 0, 1, total)
    i, j = np.tril_indices(lower.shape[-1])
    return lower[..., i, j]


def trivial_share(weights: Float[Any, "*b t t"]) -> Float[np.ndarray, "*b"]:
    """Returns the R² of attention regressed on `trivial_features`: how much of it position alone explains.

    Args:
        weights: [..., T, T], of which the pairs j ≤ i count, as `lower_rows` has them.

    Returns:
        [...], at most 1; NaN where all weights are the same.
    """
    rows = lower_rows(weights)
    features = trivial_features(np.shape(weights)[-1])
    flat = rows.reshape(-1, rows.shape[-1])
    return np.array([regress(row, features).r2 for row in flat]).reshape(rows.shape[:-1])
