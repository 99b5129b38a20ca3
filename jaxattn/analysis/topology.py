"""The shape of attention as a graph: features of thresholded maps, bars of persistent homology, distances to patterns.

After Cherniavskii et al. (2022) and Proskurina et al. (2023), who classify sentences by these features. Each function
takes the map of one head over one text, [T, T], without padding.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

THRESHOLDS = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75)
"""The weights from which on the paper has an edge."""

BORN_BY = (0.25, 0.5, 0.7, 0.75, 0.95)
"""The lengths by which births and deaths of bars are counted."""


def _square(name: str, matrix: ArrayLike) -> np.ndarray:
    values = np.asarray(matrix, np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not len(values):
        raise ValueError(f"{name} has shape {values.shape}: need the square matrix of one head and one text")
    return values


def graph_features(
    weights: Float[Any, "t t"], thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, Float[np.ndarray, " thresholds"]]:
    """Returns features of the graphs that have an edge i → j where w_ij is at least a threshold.

    - `edges`: the number of directed edges, self-loops included;
    - `strong`, `weak`: the numbers of strong and of weak components;
    - `cycles`: b₁ = E − V + b₀, the independent cycles of the graph without directions and self-loops, where b₀ is
      `weak`;
    - `matching`: pairs of a maximal matching of that graph, edges taken in order: at least half of a largest one;
    - `chordal`: 1 if each of its cycles of four tokens or more has a chord, else 0.

    The code of the paper counts self-loops in b₁ and counts simple directed cycles; the mean degree is 2 `edges` / T.

    Args:
        weights: [T, T].
        thresholds: The thresholds.

    Returns:
        Name -> one number for each threshold; NaN where the map has a NaN.

    Raises:
        ValueError: The weights are no square matrix.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    values = _square("weights", weights)
    names = ("edges", "strong", "weak", "cycles", "matching", "chordal")
    if np.isnan(values).any():
        return {name: np.full(len(thresholds), np.nan) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for threshold in thresholds:
        directed = values >= threshold
        graph = csr_array(directed)
        between = (directed | directed.T) & ~np.eye(len(values), dtype=bool)
        weak = connected_components(graph, connection="weak")[0]
        numbers = (
            directed.sum(),
            connected_components(graph, connection="strong")[0],
            weak,
            between.sum() // 2 - len(values) + weak,
            _matching(between),
            is_chordal(between),
        )
        for name, number in zip(names, numbers, strict=True):
            found[name].append(float(number))
    return {name: np.array(numbers) for name, numbers in found.items()}


def _matching(graph: Bool[np.ndarray, "t t"]) -> int:
    """The number of pairs of a maximal matching, edges taken in order."""
    free = np.ones(len(graph), bool)
    for i, j in np.argwhere(np.triu(graph)):
        if free[i] and free[j]:
            free[[i, j]] = False
    return int((~free).sum()) // 2


def is_chordal(graph: Bool[np.ndarray, "t t"]) -> bool:
    """Returns whether every cycle of four nodes or more has a chord (Tarjan and Yannakakis, 1984).

    Nodes are visited by maximum cardinality search, next the one with the most visited neighbours. The graph is chordal
    if the visited neighbours of each node, but for the last of them, are neighbours of that last one.

    Args:
        graph: [T, T], symmetric, without self-loops.
    """
    graph = np.asarray(graph, bool)
    visited: list[int] = []
    count = np.zeros(len(graph))
    for _ in range(len(graph)):
        node = int(count.argmax())
        before = [other for other in visited if graph[node, other]]
        if before and not all(graph[before[-1], other] for other in before[:-1]):
            return False
        visited.append(node)
        count[graph[node]] += 1
        count[visited] = -1
    return True


def graph_distances(weights: Float[Any, "t t"], least: float = 1e-3) -> Float[np.ndarray, "t t"]:
    """Returns how far apart tokens are, 1 − max(w_ij, w_ji), and 0 from themselves; weights below `least` count as 0.

    Args:
        weights: [T, T], in 0..1.
        least: The smallest weight that counts.

    Raises:
        ValueError: The weights are no square matrix.
    """
    values = _square("weights", weights)
    values = np.where(values < least, 0, values)
    return np.where(np.eye(len(values), dtype=bool), 0, 1 - np.maximum(values, values.T))


def bars(distances: Float[Any, "t t"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "m 2"]]:
    """Returns the persistence bars (birth, death) of the Vietoris-Rips complex in dimensions 0 and 1.

    As the radius grows, points at that distance are joined. A bar of dimension 0 is a component, from 0 to the length
    of the edge that joins it to another: the edges of a minimum spanning tree. A bar of dimension 1 is a cycle, from
    the edge that closes it to the triangle that fills it. Bars of no length are left out, and the component that never
    ends. Triangles grow with T³: for up to about 64 points.

    Args:
        distances: [T, T], symmetric, 0 on the diagonal.

    Raises:
        ValueError: The distances are not square, not finite or not symmetric.
    """
    values = _square("distances", distances)
    if not np.isfinite(values).all() or (values != values.T).any():
        raise ValueError("distances is not symmetric or not finite: need a distance for each pair of points")
    points = len(values)
    first, second = np.triu_indices(points, 1)
    order = np.argsort(values[first, second], kind="stable")
    first, second = first[order], second[order]
    lengths = values[first, second]
    number = np.zeros((points, points), int)  # of each edge, from the shortest on
    number[first, second] = number[second, first] = np.arange(len(lengths))
    component = list(range(points))
    joins: list[int] = []
    closes: list[int] = []

    def root(i: int) -> int:
        while component[i] != i:
            component[i] = i = component[component[i]]
        return i

    for edge, (i, j) in enumerate(zip(first, second, strict=True)):
        a, b = root(int(i)), root(int(j))
        (closes if a == b else joins).append(edge)
        component[a] = b
    corners = np.array(list(combinations(range(points), 3)), int).reshape(-1, 3).T
    sides = np.sort(number[corners, np.roll(corners, 1, 0)], 0).T  # [triangles, 3], edges from the shortest on
    # Columns of the boundary, modulo 2, are whole numbers with a bit for each edge; the pivot is the highest bit.
    reduced: dict[int, int] = {}
    cycles = []
    for a, b, c in sides[np.lexsort((sides[:, 0], sides[:, 1], sides[:, 2]))].tolist():
        if len(reduced) == len(closes):
            break
        column = 1 << a | 1 << b | 1 << c
        while column and (pivot := column.bit_length() - 1) in reduced:
            column ^= reduced[pivot]
        if column:
            reduced[pivot] = column
            cycles.append((lengths[pivot], lengths[c]))
    of_components = np.array([(0.0, lengths[edge]) for edge in joins]).reshape(-1, 2)
    of_cycles = np.array(cycles).reshape(-1, 2)
    return of_components[of_components[:, 1] > 0], of_cycles[of_cycles[:, 1] > of_cycles[:, 0]]


def bar_features(bars: Float[Any, "n 2"]) -> dict[str, float]:
    """Returns what the paper takes from a set of bars; where there is no bar all of it is 0.

    - `sum`, `mean`, `deviation` of the lengths, `entropy` of the lengths divided by their sum (nats), and `count`;
    - `birth`, `death` of the longest bar (the first of equal ones);
    - `born by t`, `dead by t`: the numbers of bars that begin, and end, at t or before, for each t of `BORN_BY`.

    Args:
        bars: [n, 2], those of one dimension.
    """
    ends = np.asarray(bars, np.float64).reshape(-1, 2)
    lengths = ends[:, 1] - ends[:, 0]
    share = lengths / lengths.sum() if len(ends) else lengths
    longest = ends[lengths.argmax()] if len(ends) else np.zeros(2)
    return {
        "sum": float(lengths.sum()),
        "mean": float(lengths.mean()) if len(ends) else 0.0,
        "deviation": float(lengths.std()) if len(ends) else 0.0,
        "entropy": float(-(share * np.log(share)).sum()),
        "count": float(len(ends)),
        "birth": float(longest[0]),
        "death": float(longest[1]),
        **{f"born by {t}": float((ends[:, 0] <= t).sum()) for t in BORN_BY},
        **{f"dead by {t}": float((ends[:, 1] <= t).sum()) for t in BORN_BY},
    }


def templates(tokens: int, columns: Mapping[str, Int[Any, " c"]] | None = None) -> dict[str, Float[np.ndarray, "t t"]]:
    """Returns simple patterns that heads are compared with: `self`, `previous`, `next`, `first`, and columns of tokens.

    Args:
        tokens: T.
        columns: Name -> the positions of some tokens, such as all commas, that are read equally by every token.

    Returns:
        Name -> [T, T], rows of which sum to 1, or are 0 where there is nothing to read.
    """
    made = {"self": np.eye(tokens), "previous": np.eye(tokens, k=-1), "next": np.eye(tokens, k=1)}
    for name, places in ({"first": [0]} | dict(columns or {})).items():
        row = np.isin(np.arange(tokens), np.asarray(places, int))
        made[name] = np.tile(row / max(int(row.sum()), 1), (tokens, 1))
    return made


def template_distance(weights: Float[Any, "*b t s"], template: Float[Any, "t s"]) -> Float[np.ndarray, "*b"]:
    """Returns ‖A − M‖ / √(‖A‖² + ‖M‖²) in the norm of Frobenius: 0 if A = M, and 1 if they share no weight.

    NaN where both are 0.

    Args:
        weights: A, [..., T, S].
        template: M, [T, S].
    """
    a, m = np.asarray(weights, np.float64), np.asarray(template, np.float64)
    total = (a**2).sum((-2, -1)) + (m**2).sum()
    with np.errstate(invalid="ignore"):
        return np.sqrt(((a - m) ** 2).sum((-2, -1)) / np.where(total == 0, np.nan, total))
