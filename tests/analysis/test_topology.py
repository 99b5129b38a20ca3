"""Graphs whose features are known, and bars against ranks of boundary matrices."""

import itertools

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree

from jaxattn import analysis
from jaxattn.analysis import topology

rng = np.random.default_rng(0)


def graph(tokens, *edges):
    made = np.zeros((tokens, tokens))
    for i, j in edges:
        made[i, j] = 1
    return made


def of(matrix, name):
    return analysis.graph_features(matrix, [0.5])[name][0]


def test_graphs_have_the_features_that_they_are_known_for():
    tree = graph(5, (1, 0), (2, 0), (3, 1), (4, 1))
    found = analysis.graph_features(tree, [0.5])
    assert found == {"edges": [4], "strong": [5], "weak": [1], "cycles": [0], "matching": [1], "chordal": [1]}
    assert of(tree[::-1, ::-1], "matching") == 2  # edges come in another order; a maximal matching has at least half
    square = graph(4, (0, 1), (1, 2), (2, 3), (3, 0))
    assert [of(square, name) for name in ("strong", "weak", "cycles", "matching", "chordal")] == [1, 1, 1, 2, 0]
    chord = square + graph(4, (0, 2))
    assert (of(chord, "cycles"), of(chord, "chordal")) == (2, 1)
    loops = np.eye(3)
    assert [of(loops, name) for name in ("edges", "weak", "cycles", "matching", "chordal")] == [3, 3, 0, 0, 1]
    assert np.isnan(of(np.full((2, 2), np.nan), "edges"))
    with pytest.raises(ValueError, match="need the square matrix of one head"):
        analysis.graph_features(np.zeros((2, 3)))


def test_more_edges_appear_and_components_join_as_the_threshold_falls():
    weights = rng.dirichlet(np.ones(9) / 3, 9)
    found = analysis.graph_features(weights)
    assert (np.diff(found["edges"]) <= 0).all()
    assert (np.diff(found["weak"]) >= 0).all()
    assert (found["strong"] >= found["weak"]).all()


def has_long_cycle(matrix):
    """Whether some set of four nodes or more is a cycle without a chord: each has two neighbours, all are connected."""
    for size in range(4, len(matrix) + 1):
        for nodes in itertools.combinations(range(len(matrix)), size):
            inside = matrix[np.ix_(nodes, nodes)]
            reached = np.linalg.matrix_power(inside + np.eye(size), size)[0] > 0
            if (inside.sum(0) == 2).all() and reached.all():
                return True
    return False


def test_graphs_are_chordal_if_no_cycle_lacks_a_chord():
    seen = set()
    for share in (0.3, 0.5, 0.7):
        for _ in range(15):
            upper = np.triu(rng.random((6, 6)) < share, 1)
            both = (upper | upper.T).astype(int)
            seen.add(topology.is_chordal(both))
            assert topology.is_chordal(both) != has_long_cycle(both)
    assert seen == {True, False}


def random_distances(points):
    apart = rng.random((points, points)) + 0.1
    return np.triu(apart, 1) + np.triu(apart, 1).T


def betti(distances, radius):
    """(b₀, b₁) of the complex at a radius, by the ranks of its boundary matrices modulo 2."""
    points = len(distances)
    edges = [e for e in itertools.combinations(range(points), 2) if distances[e] <= radius]
    faces = [
        f
        for f in itertools.combinations(range(points), 3)
        if max(distances[a, b] for a, b in itertools.combinations(f, 2)) <= radius
    ]
    first = np.array([[point in edge for edge in edges] for point in range(points)]).reshape(points, len(edges))
    second = np.array([[set(edge) <= set(face) for face in faces] for edge in edges]).reshape(len(edges), len(faces))

    def rank(matrix):
        matrix, at = matrix.astype(bool), 0
        for column in range(matrix.shape[1]):
            below = np.flatnonzero(matrix[at:, column])
            if len(below):
                matrix[[at, at + below[0]]] = matrix[[at + below[0], at]]
                others = np.flatnonzero(matrix[:, column])
                matrix[others[others != at]] ^= matrix[at]
                at += 1
        return at

    return points - rank(first), len(edges) - rank(first) - rank(second)


@pytest.mark.parametrize("points", [1, 2, 4, 7])
def test_bars_count_components_and_cycles_at_every_radius(points):
    apart = random_distances(points)
    components, cycles = analysis.bars(apart)
    for radius in [0, *np.unique(apart), 9]:
        alive = [((b[:, 0] <= radius) & (radius < b[:, 1])).sum() for b in (components, cycles)]
        assert (alive[0] + 1, alive[1]) == betti(apart, radius)
    tree = minimum_spanning_tree(apart).data
    np.testing.assert_allclose(np.sort(components[:, 1]), np.sort(tree))


def test_a_ring_has_one_long_cycle_and_equal_points_no_bar():
    angle = 2 * np.pi * np.arange(12) / 12
    points = np.stack([np.cos(angle), np.sin(angle)], -1)
    apart = np.round(np.linalg.norm(points[:, None] - points, axis=-1), 9)
    components, cycles = analysis.bars(apart)
    np.testing.assert_allclose(components[:, 1], 2 * np.sin(np.pi / 12), atol=1e-8)
    # It closes when neighbours meet, and is filled by triangles with equal sides, 4 apart.
    np.testing.assert_allclose(cycles, [[2 * np.sin(np.pi / 12), 2 * np.sin(np.pi / 3)]], atol=1e-8)
    assert [len(x) for x in analysis.bars(np.zeros((4, 4)))] == [0, 0]
    with pytest.raises(ValueError, match="not symmetric or not finite"):
        analysis.bars([[0, 1], [2, 0]])


def test_features_of_bars_are_those_of_their_lengths():
    found = analysis.bar_features([[0, 0.5], [0.1, 0.8], [0.2, 0.4]])
    lengths = np.array([0.5, 0.7, 0.2])
    assert found["sum"] == pytest.approx(1.4)
    assert found["deviation"] == pytest.approx(lengths.std())
    assert found["entropy"] == pytest.approx(-(lengths / 1.4 * np.log(lengths / 1.4)).sum())
    assert (found["birth"], found["death"], found["count"]) == (0.1, 0.8, 3)
    assert [found[f"dead by {t}"] for t in topology.BORN_BY] == [0, 2, 2, 2, 3]
    assert found["born by 0.25"] == 3
    assert set(analysis.bar_features(np.zeros((0, 2))).values()) == {0}


def test_tokens_are_near_where_one_reads_the_other():
    weights = np.array([[0.5, 0.5, 0], [0, 0.9995, 0.0005], [0.8, 0.2, 0]])
    np.testing.assert_allclose(analysis.graph_distances(weights), [[0, 0.5, 0.2], [0.5, 0, 0.8], [0.2, 0.8, 0]])


def test_distances_to_patterns_are_0_at_the_pattern_and_1_without_common_weight():
    made = analysis.templates(4, {"comma": [1, 2], "none": []})
    assert list(made) == ["self", "previous", "next", "first", "comma", "none"]
    np.testing.assert_allclose(made["comma"], np.tile([0, 0.5, 0.5, 0], (4, 1)))
    heads = np.stack([made["self"], made["previous"], made["next"]])
    found = np.stack([analysis.template_distance(heads, made[name]) for name in ("self", "previous", "next")])
    np.testing.assert_allclose(found, 1 - np.eye(3))
    assert np.isnan(analysis.template_distance(np.zeros((4, 4)), made["none"]))
    assert analysis.template_distance(made["none"], made["self"]) == 1
