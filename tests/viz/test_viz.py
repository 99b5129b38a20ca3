"""Pictures: what is drawn is what was given, and equal figures are equal files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Alibi, Bias, Causal, Documents, PerHead, Sinks, SoftCap, Softmax, Window, viz
from jaxattn.core.attend import NTK, MixHeads, OneHotSample, TopKWeights


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


def test_a_bias_is_drawn_at_all_pairs_on_one_scale():
    table = jnp.arange(12.0).reshape(1, 3, 4) - 5
    axes = viz.show_scores(Bias(table), 3, 4).axes[0]
    np.testing.assert_array_equal(image(axes), table[0])
    assert axes.get_images()[0].get_clim() == (-6, 6)
    figure = viz.show_scores(Alibi(jnp.array([1.0, 0.5])), 3)
    heads = [axes for axes in figure.axes if axes.get_title()]
    assert len(heads) == 2
    for slope, axes in zip((1, 0.5), heads, strict=True):
        np.testing.assert_array_equal(image(axes), -slope * abs(np.arange(3)[:, None] - np.arange(3)))
        assert axes.get_images()[0].get_clim() == (-2, 2)


def test_a_normaliser_is_drawn_as_the_weights_of_rows():
    for part in (Softmax(), OneHotSample(jax.random.key(0))):
        lines = viz.show_scores(part, 3, 5).axes[0].get_lines()[:3]
        weights = np.array([line.get_ydata() for line in lines])
        assert weights.shape == (3, 5)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
        if isinstance(part, Softmax):  # the scores are 2, 1, .., −2 times 1/2, 1, 2
            ratios = np.log(weights[:, 0] / weights[:, 1])
            np.testing.assert_allclose(ratios, [0.5, 1, 2], rtol=1e-5)


def test_a_map_is_drawn_before_and_after():
    before, after, against, *_ = viz.show_scores(SoftCap(2.0), 6, 5).axes
    np.testing.assert_allclose(image(after), 2 * np.tanh(image(before) / 2), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        against.get_lines()[0].get_xydata(), np.stack([image(x).ravel() for x in (before, after)], -1)
    )
    before, after, *_ = viz.show_scores(TopKWeights(1), 6, 5, on="weights").axes
    np.testing.assert_allclose(image(before).sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(image(after).max(-1), 1, rtol=1e-6)
    assert viz.show_scores(MixHeads(jnp.eye(2)), 4, heads=2).get_suptitle() == "MixHeads"


def test_a_rotary_scaling_is_drawn_by_distance():
    axes = viz.show_scores(NTK(4.0), 9, title="scaled").axes[0]
    unscaled, scaled = (line.get_ydata() for line in axes.get_lines())
    assert unscaled[0] == scaled[0] == 1
    assert len(scaled) == 9
    frequencies = 10_000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(unscaled[3], np.cos(3 * frequencies).mean(), rtol=1e-5)
    assert (scaled[1:4] > unscaled[1:4]).all()
    assert axes.get_title() == "scaled"


def test_what_show_scores_refuses():
    with pytest.raises(ValueError, match="queries, keys and heads must be at least 1, got 0, 4 and 1"):
        viz.show_scores(Softmax(), 0, 4)
    for part, name in ((Causal(), "Causal"), (3.0, "float")):
        with pytest.raises(TypeError, match=f"need a bias, map, normaliser or rotary scaling, got {name}"):
            viz.show_scores(part, 4)


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


def test_some_layers_keep_their_numbers_and_tokens_are_visible():
    panels = panels_of(viz.show_heads({"a": np.ones((2, 1, 2, 2))}, tokens=[" a", "\n"], layers=[3, 9]))
    assert [axes.get_title() for axes in panels] == ["layer 3 head 0", "layer 9 head 0"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["␣a", "⏎"]
    with pytest.raises(ValueError, match="layers has 1 numbers: need 2"):
        viz.show_heads({"a": np.ones((2, 1, 2, 2))}, layers=[3])


def test_a_score_of_few_heads_is_printed_and_signs_have_colours_of_their_own():
    scores = np.arange(6.0).reshape(2, 3) - 1
    axes = viz.show_grid(scores, "a score", layers=[4, 7]).axes[0]
    np.testing.assert_array_equal(image(axes), scores)
    assert axes.get_images()[0].get_clim() == (-4, 4)
    assert [text.get_text() for text in axes.texts] == ["-1.00", "0.00", "1.00", "2.00", "3.00", "4.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "7"]
    assert axes.get_title() == "a score"
    many = viz.show_grid(np.ones((9, 8))).axes[0]
    assert not many.texts
    assert many.get_images()[0].get_clim() == (0, 1)


def test_scores_that_are_not_finite_are_no_number():
    axes = viz.show_grid(np.array([[np.nan, 2.0], [-np.inf, 1.0]])).axes[0]
    assert axes.get_images()[0].get_array().mask.tolist() == [[True, False], [True, False]]
    assert axes.get_images()[0].get_clim() == (0, 2)


def test_effects_of_patching_have_the_tokens_below():
    effects = np.array([[0.0, 2.0, 0.5], [0.0, 1.0, 0.0]])
    axes = viz.show_patching(effects, ["<s>", " a", "b"]).axes[0]
    np.testing.assert_array_equal(image(axes), effects)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0 <s>", "1 ␣a", "2 b"]
    assert axes.get_images()[0].get_clim() == (-2, 2)  # around 0 although none is below
    with pytest.raises(ValueError, match="2 names for 3 columns"):
        viz.show_patching(effects, ["a", "b"])
    long = viz.show_patching(np.ones((2, 100)), ["x"] * 100).axes[0]
    assert len(long.get_xticks()) <= 40


def test_a_lens_has_a_token_in_each_cell():
    probabilities = np.array([[0.1, 0.9], [0.2, 0.8]])
    axes = viz.show_lens([[" a", "b"], ["c", "\n"]], probabilities, ["x", " y"], rows=["embed", "0"]).axes[0]
    np.testing.assert_allclose(image(axes), probabilities)
    assert [text.get_text() for text in axes.texts] == ["␣a", "b", "c", "⏎"]
    assert axes.get_images()[0].get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embed", "0"]
    with pytest.raises(ValueError, match=r"rows of \[2\]: need \(2, 2\)"):
        viz.show_lens([["a", "b"]], probabilities, ["x", "y"])


def test_what_is_no_table_is_refused():
    for show in (viz.show_grid, lambda x: viz.show_patching(x, ["a"]), lambda x: viz.show_lens([["a"]], x, ["a"])):
        with pytest.raises(ValueError, match=r"has shape \(2,\): need two axes"):
            show(np.ones(2))
    with pytest.raises(ValueError, match=r"scores\['a'\] has shape \(2,\): need \[layers, heads\]"):
        viz.show_by_layer({"a": np.ones(2)})


def test_scores_by_layer_are_dots_and_the_line_of_their_means():
    scores = np.array([[1.0, 3.0], [4.0, 0.0], [5.0, 5.0]])
    dots, line = viz.show_by_layer({"a": scores}).axes[0].get_lines()
    assert dots.get_xydata().tolist() == [[0, 1], [0, 3], [1, 4], [1, 0], [2, 5], [2, 5]]
    assert line.get_xydata().tolist() == [[0, 2], [1, 2], [2, 5]]


def test_lags_have_bars_of_two_standard_errors():
    axes = viz.show_lags({"a": ([0.5, 0.25], [0.125, 0.0])}).axes[0]
    assert axes.get_lines()[0].get_xydata().tolist() == [[0, 0.5], [1, 0.25]]
    bars = [segment.tolist() for segment in axes.collections[0].get_segments()]
    assert bars == [[[0, 0.25], [0, 0.75]], [[1, 0.25], [1, 0.25]]]


def test_curves_of_what_is_not_bytes_are_losses():
    """Bits per byte are of runs on text; beside others, only the loss is common to both."""
    text, drawn = [{"step": 1, "loss": 3.0, "bits_per_byte": 4.0}], [{"step": 1, "loss": 2.0, "validation_loss": 1.0}]
    for runs, label, heights in (
        ({"text": text}, "bits per byte", [4.0]),
        ({"drawn": drawn}, "loss", [2.0, 1.0]),
        ({"text": text, "drawn": drawn}, "loss", [3.0, 2.0, 1.0]),
    ):
        axes = viz.show_curves(runs).axes[0]
        assert axes.get_ylabel() == label
        assert [float(line.get_ydata()[0]) for line in axes.get_lines()] == heights


def test_curves_show_the_points_of_the_log():
    history = [{"step": 1, "bits_per_byte": 8.0}, {"step": 2, "bits_per_byte": 4.0, "validation_bits_per_byte": 5.0}]
    lines = viz.show_curves({"run": history}).axes[0].get_lines()
    assert [line.get_xydata().tolist() for line in lines] == [[[1, 8], [2, 4]], [[2, 5]]]


def test_risks_are_lines_in_bands_of_two_standard_errors():
    axes = viz.show_risks([0, 5, 10], {"a": ([3, 2, 1], [0.5, 0.25, 0]), "b": ([1, 1, 1], [0, 0, 0])}).axes[0]
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [
        [[0, 3], [5, 2], [10, 1]],
        [[0, 1], [5, 1], [10, 1]],
    ]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(0.0, 2.0), (0.0, 4.0), (5.0, 1.5), (5.0, 2.5)} <= set(map(tuple, band.tolist()))
    assert axes.get_yscale() == "linear"
    assert viz.show_risks([1], {"a": ([1], [0])}, log=True).axes[0].get_yscale() == "log"


@pytest.mark.parametrize("log", [False, True])
def test_a_predictor_that_diverges_leaves_the_others_readable(log):
    tame, lost, wild = ([4.0, 1.0], [0, 0]), ([np.inf, 2.0], [np.inf, 0]), ([1.0, 1e30], [0, 1e30])
    axes = viz.show_risks([1, 2], {"tame": tame, "lost": lost, "wild": wild}, log=log).axes[0]
    bottom, top = axes.get_ylim()
    assert bottom < 1
    assert top == (400 if log else 12)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["tame", "lost (not finite at 1)", "wild"]
    nowhere = ([np.nan, np.nan], [np.nan, np.nan])
    lines = {"none": nowhere, "no other": nowhere, "tame": tame, "wild": wild}
    assert viz.show_risks([1, 2], lines, log=log).axes[0].get_ylim()[1] == (400 if log else 12)
    viz.show_risks([1], {"none": ([np.nan], [np.nan])}, log=log)


def test_equal_figures_are_equal_files(tmp_path):
    scores = np.array([[1.0, -2.0], [0.5, 0.0]])
    for draw in (
        lambda: viz.show_mask(Causal(), 8),
        lambda: viz.show_grid(scores),
        lambda: viz.show_patching(scores, ["a", "b"]),
        lambda: viz.show_lens([["a", "b"]] * 2, abs(scores) / 2, ["x", "y"]),
        lambda: viz.show_by_layer({"a": scores}),
        lambda: viz.show_lags({"a": tuple(scores)}),
    ):
        for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
            files = [viz.save(draw(), tmp_path / "deep" / f"{name}.{kind}") for name in "ab"]
            assert files[0].read_bytes() == files[1].read_bytes()
            assert files[0].read_bytes().startswith(start)
    with pytest.raises(ValueError, match=r"ends with \.png, \.svg or \.pdf"):
        viz.save(viz.show_mask(Causal(), 8), tmp_path / "a.jpg")
    assert not list((tmp_path / "deep").glob("*.tmp"))
