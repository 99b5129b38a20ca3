"""Pictures: what is drawn is what was given, and equal figures are equal files."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Causal, Documents, PerHead, Sinks, Window, viz


def panels_of(figure):
    return [axes for part in figure.subfigs for axes in part.axes if axes.get_title()]


def image(axes):
    return np.asarray(axes.get_images()[0].get_array())


def test_a_mask_is_drawn_as_its_definition():
    axes = viz.show_mask(Causal() & (Window(2) | Sinks(1)), 6, 7).axes[0]
    expected = [[key <= query and (key >= query - 2 or key < 1) for key in range(7)] for query in range(6)]
    np.testing.assert_array_equal(image(axes), expected)


def test_a_mask_over_data_is_drawn_for_the_first_batch_entry():
    axes = viz.show_mask(Documents(jnp.array([[0, 0, 1, 1], [0, 1, 2, 3]])), 4).axes[0]
    np.testing.assert_array_equal(image(axes), np.kron(np.eye(2), np.ones((2, 2))))


def test_a_mask_that_differs_by_head_has_a_panel_for_each():
    masks = (Causal(), Window(1), Sinks(2), Window(0), Causal())
    figure = viz.show_mask(PerHead(masks), 6, title="five heads")
    shown = [axes for axes in figure.axes if axes.get_images()]
    assert len(shown) == 5
    for number, (mask, axes) in enumerate(zip(masks, shown, strict=True)):
        np.testing.assert_array_equal(image(axes), mask.to_array(6)[0])
        assert axes.get_title() == f"head {number}: {mask.density(6):.0%}"
    assert figure.get_suptitle() == "five heads"
    assert len([axes for axes in viz.show_mask(PerHead((Causal(), Causal())), 6).axes if axes.get_images()]) == 1


def test_a_mask_of_no_size_raises():
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        viz.show_mask(Causal(), 0, 4)


def test_every_head_has_its_panel_caption_and_weights():
    weights = np.random.default_rng(0).uniform(size=(2, 3, 4, 4))
    captions = np.array([[f"{layer}.{head}" for head in range(3)] for layer in range(2)])
    figure = viz.show_heads({"a": weights, "b": weights[:1]}, {"a": captions}, list("abcd"))
    panels = panels_of(figure)
    assert len(panels) == 2 * 3 + 3
    for axes, expected in zip(panels, [*weights.reshape(6, 4, 4), *weights[0]], strict=True):
        np.testing.assert_allclose(image(axes), expected, rtol=1e-6)
    assert [axes.get_xlabel() for axes in panels[:6]] == captions.ravel().tolist()
    assert not panels[0].get_xticklabels()


def test_one_model_of_few_tokens_has_them_on_its_axes():
    panels = panels_of(viz.show_heads({"a": np.ones((1, 2, 4, 4))}, tokens=list("abcd")))
    for axes in panels:
        assert [label.get_text() for label in axes.get_xticklabels()] == list("abcd")


def test_weights_of_the_wrong_rank_raise():
    with pytest.raises(ValueError, match=r"\[L, N, T, S\], got \[\(4, 4\)\]"):
        viz.show_heads({"a": np.ones((4, 4))})


def test_curves_show_the_points_of_the_log():
    history = [{"step": 1, "bits_per_byte": 8.0}, {"step": 2, "bits_per_byte": 4.0, "validation_bits_per_byte": 5.0}]
    lines = viz.show_curves({"run": history}).axes[0].get_lines()
    assert [line.get_xydata().tolist() for line in lines] == [[[1, 8], [2, 4]], [[2, 5]]]


def test_equal_figures_are_equal_files(tmp_path):
    files = [viz.save(viz.show_mask(Causal(), 8), tmp_path / "deep" / name) for name in ("a.png", "b.png")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.png", "b.png"]
