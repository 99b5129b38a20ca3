"""Queries and keys in one picture: moved and scaled so that a query is near the keys that it attends to."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class JointPoints(NamedTuple):
    """Queries and keys of one head in one space.

    Attributes:
        queries: [n, H], c q.
        keys: [m, H], k / c + the shift: attention over them is the same.
        scale: c.
    """

    queries: np.ndarray
    keys: np.ndarray
    scale: float


def joint_points(query: Float[Any, "n h"], key: Float[Any, "m h"], scale: float | None = None) -> JointPoints:
    """Returns queries and keys whose distances tell how much is attended; attention stays the same (Yeh et al., 2023).

        q ← c q,   k ← k / c − mean(k / c) + mean(c q)

    The products q · k stay what they are by the first, and a vector that is added to all keys changes each row of
    scores by a constant, which softmax does not see. The paper chooses c by a weighted correlation of products and
    distances; the default here is the closed form

        c = (rms(k̃) / rms(q̃))^½,   q̃ and k̃ without their means

    for which Σ_ij ‖c q̃_i − k̃_j / c‖² is least. `distance_correlation` says how well it does.

    Args:
        query: [n, H], of one head, of any texts; rotated ones if positions shall count.
        key: [m, H], of the key head that these read.
        scale: c, above 0.

    Raises:
        ValueError: The shapes do not fit, `scale` is not above 0, or all queries or all keys are the same.
    """
    q, k = np.asarray(query, np.float64), np.asarray(key, np.float64)
    if q.ndim != 2 or k.ndim != 2 or q.shape[1] != k.shape[1]:
        raise ValueError(f"query has shape {q.shape} and key {k.shape}: need [n, H] and [m, H], of one head")
    if scale is None:
        spread_q, spread_k = (np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()) for x in (q, k))
        if not (spread_q > 0 and spread_k > 0):
            raise ValueError("all queries or all keys are the same: need a scale=, as none follows from them")
        scale = float(np.sqrt(spread_k / spread_q))
    if not scale > 0:
        raise ValueError(f"scale is {scale}: need a number above 0")
    q, k = scale * q, k / scale
    return JointPoints(q, k - k.mean(0) + q.mean(0), scale)


def distance_correlation(query: Float[Any, "n h"], key: Float[Any, "m h"]) -> float:
    """Returns the correlation of q · k and ‖q − k‖ over all pairs: near −1 where what is near is attended to.

    Args:
        query: [n, H].
        key: [m, H], such as those of `joint_points`, of which the products are those of the given keys and a constant
            in each row. So both are taken without the mean of their row.
    """
    q, k = np.asarray(query, np.float64), np.asarray(key, np.float64)
    products = q @ k.T
    apart = np.sqrt(np.maximum((q**2).sum(1)[:, None] + (k**2).sum(1) - 2 * products, 0))
    products, apart = (x - x.mean(1, keepdims=True) for x in (products, apart))
    return float((products * apart).sum() / np.sqrt((products**2).sum() * (apart**2).sum()))
