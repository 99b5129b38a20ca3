"""The shared fixtures: what their tasks ask, and that a fixture is trained once."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import fixtures
from experiments.fixtures import FIXTURES, SMALL, Facts, KeyValues, trained


def test_every_fixture_has_a_small_one_and_a_model_for_its_task():
    assert list(FIXTURES) == list(SMALL)
    for fixture in (*FIXTURES.values(), *SMALL.values()):
        task = fixture.task.build()
        prompt = jax.eval_shape(lambda key, task=task: task.sample(key, 3), jax.random.key(0))
        if "vocabulary" not in fixture.model.arguments:  # a model of images
            model = nnx.eval_shape(lambda fixture=fixture: fixture.model.build(seed=0))
            assert prompt.x.shape == (3, *model.config.embed.arguments["size"], 3)
            continue
        assert prompt.x.shape == (3, fixture.model.arguments["length"])
        vocabulary = getattr(task, "vocabulary", fixture.task.arguments.get("letters", 0) + 1)
        assert fixture.model.arguments["vocabulary"] == vocabulary


@pytest.mark.parametrize("absent", [0.0, 0.5, 1.0])
def test_answers_follow_their_keys_in_the_row_or_are_known_by_heart(absent):
    task = KeyValues(pairs=3, length=48, keys=5, values=9, letters=4, width=2, absent=absent)
    prompt = jax.tree.map(np.asarray, task.sample(jax.random.key(0), 50))
    assert prompt.x.max() < task.vocabulary
    found = []
    for tokens, targets, counts, where in zip(prompt.x, prompt.y, prompt.weights, prompt.hidden, strict=True):
        assert counts.sum() == 3 * 2
        for question, begins in zip(range(task.start, 48, 3), where, strict=True):
            asked, answer = tokens[question], targets[question : question + 2]
            assert counts[question : question + 3].tolist() == [1, 1, 0]
            assert 4 <= asked < 9
            before = np.flatnonzero(tokens[: task.start] == asked)
            assert before.tolist() == ([] if begins < 0 else [begins])
            expected = task.by_heart[asked - 4] if begins < 0 else tokens[begins + 1 : begins + 3]
            np.testing.assert_array_equal(answer, expected)
            found.append(begins < 0)
    assert abs(np.mean(found) - absent) < 4 * 0.5 / 150**0.5


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="pairs is 3 for 2 keys"):
        KeyValues(pairs=3, length=48, keys=2, values=9, letters=4)
    with pytest.raises(ValueError, match="2 slots of hay"):
        KeyValues(pairs=3, length=20, keys=3, values=9, letters=4)


def test_an_object_is_a_function_of_subject_and_relation():
    task = Facts(subjects=5, relations=2, length=4, letters=3)
    prompt = jax.tree.map(np.asarray, task.sample(jax.random.key(0), 100))
    subject, relation, place = prompt.hidden.T
    np.testing.assert_array_equal(prompt.x[np.arange(100), place], 3 + subject)
    np.testing.assert_array_equal(prompt.x[:, -1], 3 + 5 + relation)
    np.testing.assert_array_equal(prompt.y[:, -1], task.table[relation, subject])
    assert (prompt.weights == [0, 0, 0, 1]).all()
    assert (np.sort(task.table) == 10 + np.arange(5)).all()
    assert prompt.x.max() < task.vocabulary
    assert (place < 3).all()


@pytest.mark.slow
def test_a_fixture_is_trained_once_and_fewer_steps_are_its_beginning(tmp_path, capsys):
    fixtures.main(["FIX-FACT", "--small", "--folder", str(tmp_path)])
    assert "FIX-FACT, seed 0" in capsys.readouterr().out
    first = trained("FIX-FACT", small=True, folder=tmp_path)
    again = trained("FIX-FACT", small=True, folder=tmp_path)
    assert again.learning == first.learning
    early = trained("FIX-FACT", steps=5, small=True, folder=tmp_path)
    assert early.learning[-1][0] == 5
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="did you mean 'FIX-FACT'"):
        trained("FIX-FAKT", small=True, folder=tmp_path)
