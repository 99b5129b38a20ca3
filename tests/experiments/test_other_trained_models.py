"""What the experiments on a speech model, a cross-encoder and a vision model measure, and their quick runs."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import alignment_heads, attention_distance, cross_encoder
from experiments.trained import RANDOM, loaded
from jaxattn.claims import report


def test_a_head_that_follows_the_sound_has_correlation_one():
    """A head on the diagonal, one that runs backwards, and one that stays; what is not said does not count."""
    weights = np.zeros((1, 2, 3, 6, 20))
    said = np.zeros((2, 6), bool)
    said[0, 1:5], said[1, 2:6] = True, True
    for text in range(2):
        for t in range(6):
            weights[0, text, 0, t, 2 * t] = weights[0, text, 1, t, 11 - 2 * t] = 1
            weights[0, text, 2, t, [3, 4 + t % 2]] = 0.5
    weights[:, :, 0, 0] = 1  # a query that foretells nothing of the text
    weights[..., 12:] = 7  # silence
    scores, centres = alignment_heads.follows(weights, [12, 12], said)
    np.testing.assert_allclose(scores[0, 0], 1)
    np.testing.assert_allclose(scores[0, 1], -1)
    assert (abs(scores[0, 2]) < 0.5).all()
    np.testing.assert_allclose(centres[0, 0, 0, 1:5], [2, 4, 6, 8])
    assert np.isnan(centres[0, :, 0, [0, 5]]).all()


def test_auroc_counts_pairs_and_half_of_ties():
    assert alignment_heads.auroc(np.array([1.0, 3.0]), np.array([1.0, 0.0])) == 3.5 / 4


def test_as_many_others_are_drawn_in_every_layer():
    listed = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]], bool)
    draws = alignment_heads.in_same_layers(listed, 20, np.random.default_rng(0))
    assert draws.shape == (20, 3, 4)
    assert not (draws & listed).any()
    np.testing.assert_array_equal(draws.sum(2), [[0, 2, 1]] * 20)  # one is all that is left of the last layer


def test_a_tone_is_heard_in_one_band_while_it_sounds():
    sound = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    mel = alignment_heads.log_mel(sound)
    assert mel.shape == (1, 3000, 80)
    # 1000 Hz are 15 of the 45.2 mel of 8000 Hz, and there are 81 steps of edges.
    assert abs(int(mel[0, 50].argmax()) + 1 - 15 / (15 + 27 * np.log(8) / np.log(6.4)) * 81) < 1
    assert mel[0, 2000].max() == mel.min() == pytest.approx(mel.max() - 2)  # 8 powers of ten below, over 4


def test_speech_needs_its_program(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="espeak-ng, which makes the speech, is not installed"):
        alignment_heads.spoken("a")


def test_every_pair_of_passages_fits_and_names_its_answer():
    tokenizer = cross_encoder.words()
    query, answer, *passages = cross_encoder.TEXTS[0]
    pair = cross_encoder.pair(tokenizer, query, passages[0], answer)
    assert [pair.strings[place] for place in np.flatnonzero(pair.answer)] == ["1874"]
    assert {pair.strings[place] for place in np.flatnonzero(pair.shared)} == {"the", "stone", "bridge", "was", "opened"}
    assert [pair.classes[0], pair.classes[-1], pair.types[0], pair.types[-1]] == [2, 3, 0, 1]
    assert not cross_encoder.pair(tokenizer, query, passages[1], answer).answer.any()
    with pytest.raises(ValueError, match="answer 'ton' is no whole token"):
        cross_encoder.pair(tokenizer, query, passages[0], "ton")


def test_distances_of_heads_that_read_one_patch():
    """Itself, its neighbour in the next row, and the class token: nothing of that is a distance."""
    weights = np.zeros((1, 1, 3, 10, 10))
    weights[0, 0, 0] = np.eye(10)
    for patch in range(9):
        weights[0, 0, 1, 1 + patch, 1 + (patch + 3) % 9] = 1
    weights[0, 0, 2, :, 0], weights[0, 0, 2, :, 5] = 0.75, 0.25
    distance, to_class = attention_distance.looks(weights)
    far = np.hypot(*np.meshgrid(*[[-1, 0, 1]] * 2)).mean()  # from the middle
    np.testing.assert_allclose(distance[0, 0], [0, (1 + 1 + 2) / 3, far])
    np.testing.assert_allclose(to_class[0, 0], [0, 0, 0.75])


def test_shuffling_moves_whole_patches():
    image = np.arange(6 * 6 * 2).reshape(6, 6, 2)
    moved = attention_distance.shuffled(image, 2, np.random.default_rng(0))
    assert (moved != image).any()
    assert {moved[i : i + 2, j : j + 2].tobytes() for i in (0, 2, 4) for j in (0, 2, 4)} == {
        image[i : i + 2, j : j + 2].tobytes() for i in (0, 2, 4) for j in (0, 2, 4)
    }


def test_a_token_that_is_taken_out_is_as_if_it_were_not_there():
    """Of a model without positions in its table, taking out is the same as a text without the token."""
    model = loaded(RANDOM, cross_encoder.SMALL).model
    model.positions.table[...] = jnp.zeros_like(model.positions.table[...])
    ids = jax.random.randint(jax.random.key(0), (1, 9), 0, 100)
    without = model(ids, positions=jnp.arange(9).at[4].set(-1)[None])[0]
    np.testing.assert_allclose(without, model(jnp.delete(ids, 4, 1))[0], atol=1e-5)


def test_configs_that_make_no_sense_are_named(tmp_path):
    console = Console(quiet=True)
    with pytest.raises(ValueError, match=r"images is .'noise',.: need 'photograph' first"):
        attention_distance.run(attention_distance.Config(images=("noise",)), 0, tmp_path, console)
    with pytest.raises(ValueError, match="sentences is 9: need 1 to 4"):
        alignment_heads.run(dataclasses.replace(alignment_heads.QUICK, sentences=9), 0, tmp_path, console)
    with pytest.raises(ValueError, match="queries is 0: need 1 to 3"):
        cross_encoder.run(dataclasses.replace(cross_encoder.QUICK, queries=0), 0, tmp_path, console)
    with pytest.raises(ValueError, match="name is 'whisper-huge': need one of"):
        loaded("whisper-huge", alignment_heads.SMALL)


def judged(module, quick):
    assert {claim.number for claim in module.CLAIMS} <= quick.numbers.keys()
    report.judged(module.CLAIMS, [quick])
    assert all(value is None or np.isfinite(value) for value in quick.numbers.values())


def test_a_quick_run_of_the_speech_model(quick_run):
    quick = quick_run("alignment_heads")[1]
    judged(alignment_heads, quick)
    rows = quick.tables["Loss of the transcript by ablated heads of cross-attention"]
    assert [row["heads"] for row in rows] == [0, 3, 3, 3, 9, 12]


def test_a_quick_run_of_the_cross_encoder(quick_run):
    quick = quick_run("cross_encoder")[1]
    judged(cross_encoder, quick)
    for points in quick.figures["Who is read"].lines.values():
        assert len(points) == 3
    weights = [[y for _, y in points] for points in quick.figures["Who is read"].lines.values()]
    np.testing.assert_allclose(np.sum(weights, 0), 1, rtol=1e-5)


def test_a_quick_run_of_the_vision_model(quick_run):
    quick = quick_run("attention_distance")[1]
    judged(attention_distance, quick)
    lines = quick.figures["Distance of heads on the photograph"].lines
    far, mean, near, _ = ([y for _, y in points] for points in lines.values())
    assert len(mean) == 4
    assert all(np.diff([near, mean, far], axis=0).flat > 0)
