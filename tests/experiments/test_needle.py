"""Needles: the task is what it says, one that knows the rule finds all, and the numbers are those of the table."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import needle

CONFIG = dataclasses.replace(needle.Config(), needles=3, length=20, keys=5, values=4, letters=6)


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("needle")[1]


def test_every_needle_is_asked_for_once_and_its_value_is_the_target():
    for times in (1, 2):
        drawn = needle.task(CONFIG, times).draw(jax.random.key(0), 200)
        batch = {name: np.asarray(array) for name, array in drawn.items()}
        assert batch["tokens"].shape == (200, 20 * times)
        for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"], strict=True):
            assert np.flatnonzero(weights).tolist() == list(range(20 * times - 3, 20 * times))
            places = np.flatnonzero(tokens[:-3] < 5)
            pairs = dict(zip(tokens[places].tolist(), tokens[places + 1].tolist(), strict=True))
            assert len(pairs) == 3
            assert all(5 <= value < 9 for value in pairs.values())
            assert sorted(tokens[-3:]) == sorted(pairs)
            assert [pairs[token] for token in tokens[-3:]] == targets[-3:].tolist()
            hay = np.delete(tokens[:-3], np.concatenate([places, places + 1]))
            assert ((hay >= 9) & (hay < 15)).all()


def test_needles_lie_anywhere():
    tokens = np.asarray(needle.task(CONFIG).draw(jax.random.key(1), 4000)["tokens"])
    share = (tokens[:, :16:2] < 5).mean(0)  # 3 needles in 8 slots
    assert abs(share - 3 / 8).max() < 5 * (3 / 8 * 5 / 8 / 4000) ** 0.5


def test_numbers_are_those_of_the_table(quick):
    (row,) = quick.tables["Needles found"]
    for times in needle.TIMES:
        assert (
            quick.numbers[f"memory as context: accuracy at {times} times the length"]
            == row[f"accuracy at {times} times the length"]
        )
    assert {claim.number for claim in needle.CLAIMS} <= quick.numbers.keys()
    assert quick.numbers["memory as gate: accuracy gained over the window"] is None


def test_needles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needles is 6 for 5 keys"):
        needle.task(dataclasses.replace(CONFIG, needles=6))
    with pytest.raises(ValueError, match="mixers holds 'hay': there are"):
        needle.run(dataclasses.replace(needle.QUICK, mixers=("hay",)), 0, None, Console(quiet=True))
