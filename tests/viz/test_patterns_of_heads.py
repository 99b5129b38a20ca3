"""Pictures of patterns: what is drawn is what was given."""

import io

import numpy as np
import pytest
from matplotlib.patches import PathPatch

from jaxattn import viz

rng = np.random.default_rng(0)


def drawn(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_points_have_a_colour_for_each_group_and_names_if_there_are_few():
    points = {"queries": rng.normal(size=(5, 2)), "keys": rng.normal(size=(3, 2))}
    figure = viz.show_points(points, {"keys": ["a", " b", "c"]}, "layer 1 head 2")
    lines = figure.axes[0].get_lines()
    for line, given in zip(lines, points.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), given)
    assert lines[0].get_color() != lines[1].get_color()
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "␣b", "c"]
    many = viz.show_points({"all": rng.normal(size=(61, 2))}, {"all": ["x"] * 61})
    assert not many.axes[0].texts
    assert drawn(figure) == drawn(viz.show_points(points, {"keys": ["a", " b", "c"]}, "layer 1 head 2"))
    with pytest.raises(ValueError, match=r"points\['a'\] has shape \(2, 3\): need \[n, 2\]"):
        viz.show_points({"a": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="has 1 names: need 2"):
        viz.show_points({"a": np.zeros((2, 2))}, {"a": ["x"]})


def test_offsets_are_drawn_around_the_query_on_one_scale():
    maps = rng.random((2, 3, 5, 5))
    figure = viz.show_offsets(maps, layers=(4, 9))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [panels[0].get_title(), panels[-1].get_title()] == ["layer 4 head 0", "layer 9 head 2"]
    for panel, given in zip(panels, maps.reshape(6, 5, 5), strict=True):
        np.testing.assert_allclose(panel.get_images()[0].get_array(), given, rtol=1e-6)
        assert panel.get_images()[0].get_clim() == (0, np.float32(maps.max()))
        np.testing.assert_array_equal(panel.get_lines()[0].get_xydata(), [[2, 2]])
    drawn(viz.show_offsets(np.zeros((1, 1, 3, 3))))
    with pytest.raises(ValueError, match="need \\[layers, heads, 2 K - 1, 2 K - 1"):
        viz.show_offsets(np.zeros((1, 1, 4, 4)))
    with pytest.raises(ValueError, match="layers has 1 numbers: need 2"):
        viz.show_offsets(maps, layers=(1,))


def test_arcs_are_those_of_large_weights_and_of_the_tree():
    weights = np.array([[0.5, 0.5, 0], [0.05, 0, 0.95], [0, 0.2, 0.8]])
    figure = viz.show_arcs(["the", "dog", " barks"], weights, [1, 2, -1], [0.1, 0.2, 0.4], title="layer 0 head 1")
    arcs = [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]
    ends = [(tuple(p.get_path().vertices[[0, -1], 0]), p.get_path().vertices[1, 1] > 0) for p in arcs]
    assert ends == [((0, 1), True), ((1, 2), True), ((2, 1), True), ((0, 1), False), ((1, 2), False)]
    assert [round(p.get_alpha(), 2) for p in arcs[:3]] == [0.5, 0.95, 0.2]
    assert [text.get_text() for text in figure.axes[0].texts] == ["the", "dog", "␣barks"]
    drawn(figure)
    drawn(viz.show_arcs(["a"], [[1.0]]))
    with pytest.raises(ValueError, match=r"weights has shape \(3, 3\): need \(2, 2\)"):
        viz.show_arcs(["a", "b"], weights)
    with pytest.raises(ValueError, match=r"heads has shape \(2,\): need one for each of 3 tokens"):
        viz.show_arcs(["a", "b", "c"], weights, [0, 1])
