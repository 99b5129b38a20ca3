"""Documents of topics against their definition, and the value matrix against least squares, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl
from jaxattn.icl import TopicDocuments


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_words_come_from_the_topics_of_a_document_in_their_shares():
    task = TopicDocuments(5, 3, length=4000, present=2)
    prompt = task.sample(jax.random.key(0), 8)
    assert prompt.x.shape == (8, 4000)
    np.testing.assert_allclose(prompt.hidden.sum(-1), 1, rtol=1e-6)
    assert ((prompt.hidden > 0).sum(-1) == 2).all()
    shares = jax.nn.one_hot(prompt.y, 15).mean(1)
    expected = jnp.repeat(prompt.hidden / 3, 3, -1)
    assert (abs(shares - expected) <= 5 * jnp.sqrt(expected / 4000)).all()  # and no word of another topic


def test_chosen_words_are_masked_kept_or_random_as_often_as_said():
    task = TopicDocuments(4, 5, length=1000, chosen=0.2, kept=0.3, random=0.25)
    prompt = task.sample(jax.random.key(1), 200)
    assert (jnp.where(prompt.weights == 0, prompt.x == prompt.y, True)).all()
    chosen = prompt.weights.sum()
    n = float(chosen)
    assert abs(prompt.weights.mean() - 0.2) < 5 * (0.16 / prompt.x.size) ** 0.5
    masked = float(((prompt.x == task.mask) & (prompt.weights == 1)).sum()) / n
    same = float(((prompt.x == prompt.y) & (prompt.weights == 1)).sum()) / n
    assert abs(masked - 0.45) < 5 * (0.25 / n) ** 0.5
    assert abs(same - (0.3 + 0.25 / 20)) < 5 * (0.25 / n) ** 0.5  # a random word may be the same
    assert int(prompt.x.max()) == task.mask == 20


@pytest.mark.parametrize("present", [None, 1])
def test_mixtures_are_shares_and_the_smallest_task_has_one_word(present):
    prompt = TopicDocuments(1, 1, length=6, present=present, chosen=1, kept=1, random=0).sample(jax.random.key(2), 3)
    assert not prompt.x.any()
    assert (prompt.weights == 1).all()
    dirichlet = TopicDocuments(6, 2, length=3, concentration=0.1).sample(jax.random.key(3), 500).hidden
    np.testing.assert_allclose(dirichlet.mean(0), 1 / 6, atol=5 * (5 / 36 / 1.6 / 500) ** 0.5)


@pytest.mark.parametrize(
    ("topics", "words", "present", "rates"),
    [
        (6, 4, 2, {}),
        (3, 1, 1, {"chosen": 0.5, "kept": 0.2, "random": 0.3}),
        (5, 2, 3, {"chosen": 0.3, "random": 0.0}),
        (2, 3, 1, {"chosen": 1.0, "kept": 0.4, "random": 0.6}),
        (1, 4, 1, {}),
    ],
)
def test_the_value_matrix_is_the_least_squares_solution_of_least_norm(x64, topics, words, present, rates):
    """Solved for the frequencies of random documents, each the sum over what may become of a word."""
    rng = np.random.default_rng(0)
    usual = {"chosen": 0.15, "kept": 0.1, "random": 0.1}
    chosen, kept, random = (usual | rates).values()
    count = topics * words
    seen, truth = [], []
    for _ in range(40):
        mixture = np.zeros(topics)
        mixture[rng.permutation(topics)[:present]] = 1 / present
        words_of = np.repeat(mixture / words, words)
        frequencies = np.zeros(count + 1)
        frequencies[:count] = (1 - chosen) * words_of + chosen * kept * words_of + chosen * random / count
        frequencies[count] = chosen * (1 - kept - random)
        seen.append(frequencies)
        truth.append(words_of)
    solved = np.linalg.lstsq(np.array(seen), np.array(truth), rcond=1e-12)[0].T
    found = icl.topic_values(topics, words, **rates)
    np.testing.assert_allclose(found.matrix(topics, words), solved, rtol=0, atol=1e-12)
    assert float(found.same - found.different) * words * (1 - chosen * (1 - kept)) == pytest.approx(1, abs=1e-12)


def test_usual_masks_give_the_signs_of_the_paper(x64):
    found = icl.topic_values(6, 4)
    assert float(found.same) == pytest.approx(0.2736, abs=5e-5)
    assert float(found.different) == pytest.approx(-0.0154, abs=5e-5)


def test_block_statistics_keep_a_token_its_group_and_the_others_apart():
    matrix = jnp.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert [float(x) for x in icl.block_statistic(matrix, jnp.array([0, 0, 1]))] == [5, 3, 6]
    assert [float(x) for x in icl.block_statistic(matrix, jnp.array([0, 1, 2]))] == [5, 0, 5]
    assert [float(x) for x in icl.block_statistic(matrix[:1, :1], jnp.array([7]))] == [1, 0, 0]
    spoiled = icl.block_statistic(matrix.at[0, 1].set(jnp.nan), jnp.array([0, 0, 1]))
    assert bool(jnp.isnan(spoiled.same))
    assert float(spoiled.different) == 6


def test_what_is_no_task_is_refused():
    for error, match in (
        ({"topics": 0}, "topics must be at least 1, got 0"),
        ({"present": 5}, "present is 5 of 4 topics: need at most as many"),
        ({"concentration": 0.0}, "concentration must be positive, got 0.0"),
        ({"chosen": 1.5}, "chosen holds 1.5: need numbers from 0 to 1"),
        ({"kept": 0.6, "random": 0.6}, "kept . random holds 1.2: need numbers from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=match):
            TopicDocuments(**{"topics": 4, "words": 2, "length": 8} | error)
    with pytest.raises(ValueError, match=r"chosen is 1\.0 and kept 0\.0, so no word is left"):
        icl.topic_values(4, 2, chosen=1.0, kept=0.0)
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 3\) and groups \(2,\): need"):
        icl.block_statistic(jnp.ones((2, 3)), jnp.zeros(2, int))
