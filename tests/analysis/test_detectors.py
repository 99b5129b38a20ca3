"""Detectors find heads that were written by hand, and nothing in a model of random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from jaxattn.analysis import DETECTORS, Detector, Found, copies, detect, label_heads
from jaxattn.core.attend import AtKeys


@pytest.fixture(scope="module")
def found():
    return detect(planted.planted(), jax.random.key(0), vocabulary=planted.V - 1, first=planted.V - 1, length=20)


def test_each_planted_head_scores_one_where_it_was_planted(found):
    for layer, names in enumerate(planted.KINDS):
        for head, name in enumerate(names):
            if name:
                assert found[name].score[layer, head] > 1 - 1e-5
    assert found["copying"].score[1, 0] == pytest.approx(1, abs=1e-5)
    assert np.isnan(found["copying"].score[0, 1])  # it writes nothing
    assert label_heads(found) == planted.KINDS


def test_heads_that_look_nowhere_in_particular_are_at_chance(found):
    """Equal weights on 1 + i tokens: the mean of 1 / (1 + i) over the queries of the second copies."""
    given = copies(jax.random.key(0), 8, 20, planted.V - 1, first=planted.V - 1)
    rows = np.asarray(given.again)
    expected = np.broadcast_to(1 / np.arange(1, 22), rows.shape)[rows].mean()
    for name, each in found.items():
        if name != "copying":
            assert each.chance == pytest.approx(expected, rel=1e-5)
            np.testing.assert_allclose(each.score[1, 1:], expected, rtol=1e-5)  # their maps are zeros
            np.testing.assert_allclose(each.over_chance[1, 1:], 0, atol=1e-6)


@pytest.mark.parametrize("first", [None, 63])
def test_nothing_is_found_in_a_model_that_has_learned_nothing(first):
    """None of 32 heads; one that prefers the first token may do so for its content, where it is always the same."""
    seen = detect(planted.random(seed=int(first or 0)), jax.random.key(1), first=first)
    assert label_heads(seen, 0.1 if first is None else 0.4) == [[""] * 8] * 4
    assert abs(np.mean(seen["copying"].score)) < 4 / 32**0.5  # scores of deviation 1 at most


def test_a_head_that_looks_back_a_fixed_number_of_tokens_is_no_induction_head():
    """Of periods 10 to 15 a fixed distance hits those rows alone that have it."""
    given = copies(jax.random.key(2), 300, 20, 16)
    assert set(np.asarray(given.period)) == set(range(10, 16))
    shares = [np.mean(np.asarray(given.period) == period) for period in range(10, 16)]
    assert max(shares) < 0.3


def test_texts_repeat_once_with_a_period_of_each_row():
    given = copies(jax.random.key(0), 6, 21, 16, first=20)
    tokens, period = np.asarray(given.tokens), np.asarray(given.period)
    assert tokens.shape == (6, 22)
    assert (tokens[:, 0] == 20).all()
    again = np.asarray(given.again)
    for row, p in enumerate(period):
        assert 11 <= p <= 15
        block = tokens[row, 1 : 1 + p]
        assert len(set(block)) == p
        np.testing.assert_array_equal(tokens[row, 1 + p :], block[: 21 - p])
        assert again[row].sum() == 21 - p
        marks = np.asarray(given.first_copy(1))[row]
        np.testing.assert_array_equal(marks[2 : 2 + p], block)
        assert (np.delete(marks, np.arange(2, 2 + p)) == -1).all()
    few = copies(jax.random.key(0), 2, 8, 3)  # fewer tokens than places: some come again within a block
    assert few.tokens.max() < 3
    with pytest.raises(ValueError, match="length"):
        copies(jax.random.key(0), 2, 3, 16)


def test_a_detector_of_ones_own():
    mine = {"second": Detector("looks at the second token", lambda given: AtKeys((1,)))}
    mine["ones"] = Detector("is always one", score=lambda model, given: jnp.ones((2, 4)), chance=0.5)
    seen = detect(planted.planted(), jax.random.key(0), mine, length=20)
    assert list(seen) == ["second", "ones"]
    assert seen["second"].score.shape == (2, 4)
    np.testing.assert_array_equal(seen["ones"].over_chance, np.ones((2, 4)))
    assert label_heads(seen) == [["ones"] * 4] * 2
    with pytest.raises(ValueError, match="both a measure and a score, or none"):
        Detector("says nothing")
    with pytest.raises(ValueError, match="positions is given"):
        detect(planted.planted(), jax.random.key(0), positions=jnp.arange(20))


def test_heads_without_a_score_have_no_label():
    seen = {
        "a": Found(np.array([[np.nan, 0.3], [0.9, np.nan]]), 0.1),
        "b": Found(np.array([[0.9, 0.1], [0.9, 0.2]]), 0),
    }
    assert label_heads(seen) == [["b", ""], ["b", ""]]  # the larger one over chance
    assert DETECTORS.keys() >= {"induction", "sink"}
