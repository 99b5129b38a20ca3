"""Copying: the strings are what they say, and both starts are trained on the same ones."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from experiments import copying
from experiments.copying import CLAIMS, QUICK, Config
from jaxattn import nn
from jaxattn.claims import report
from jaxattn.train import next_token_loss


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("copying")[1]


@pytest.fixture(scope="module")
def batch():
    return copying.task(dataclasses.replace(Config(), length=5, letters=9)).draw(jax.random.key(0), 200)


def test_the_string_comes_twice_and_only_the_second_is_asked_for(batch):
    tokens, targets, weights = (np.asarray(batch[name]) for name in ("tokens", "targets", "weights"))
    assert tokens.shape == targets.shape == weights.shape == (200, 10)
    string = tokens[:, :5]
    assert set(np.unique(string)) == set(range(9))
    assert (tokens[:, 5] == 9).all()
    np.testing.assert_array_equal(tokens[:, 6:], string[:, :-1])
    np.testing.assert_array_equal(targets[:, 5:], string)
    np.testing.assert_array_equal(weights, [[0] * 5 + [1] * 5] * 200)


def test_who_reads_five_tokens_back_scores_one(batch):
    for back, score in ((5, 1.0), (0, 0.0)):
        guess = np.roll(np.asarray(batch["tokens"]), back, axis=1)
        _, sums = next_token_loss(jax.nn.one_hot(guess, 10), batch)
        # Beside the mark, which is never right, what was just read is right by chance: 1 in 9.
        chance = 0 if score else 4 / 5 / 9
        deviation = (chance * (1 - chance) / float(sums["weight"])) ** 0.5
        assert abs(float(sums["correct"] / sums["weight"]) - score - chance) <= 4 * deviation


def test_the_starts_differ_in_what_the_paper_sets():
    """Of two models of one seed: the decay, the step size, and the queries, which are the keys."""
    layers = [
        nn.as_mixer(copying.mixer(QUICK, start), features=16, dtype=None, rngs=nnx.Rngs(0)).mechanism
        for start in ("default", "mimetic")
    ]
    states = [nnx.to_flat_state(nnx.state(layer, nnx.Param)) for layer in layers]
    differ = {"/".join(map(str, path)) for (path, a), (_, b) in zip(*states, strict=True) if (a[...] != b[...]).any()}
    assert differ == {
        "a_log",
        "step/kernel",
        "step_bias",
        "project/linear/query/kernel",
    }


def test_both_starts_are_measured_on_strings_and_learn_them(quick):
    """Well above chance, which is 1 in 8."""
    lines = quick.figures["Accuracy of copying"].lines
    assert list(lines) == ["default", "mimetic"]
    for start, points in lines.items():
        assert [step for step, _ in points] == [25, 50, 75, 100]
        assert quick.numbers[f"copying, {start}: accuracy"] == points[-1][1] > 0.3
    assert quick.numbers["copying: accuracy gained"] == lines["mimetic"][-1][1] - lines["default"][-1][1]


def test_its_claims_can_be_judged(quick):
    assert {claim.number for claim in CLAIMS} <= quick.numbers.keys()
    assert {claim.number for claim, values, _ in report.judged(CLAIMS, [quick]) if values[0] is None} == {
        "recall: mean accuracy gained"
    }


def test_a_task_that_there_is_not_is_named(tmp_path):
    with pytest.raises(ValueError, match="tasks holds 'sorting': there are copying, recall"):
        copying.run(dataclasses.replace(QUICK, tasks=("sorting",)), 0, tmp_path, Console(quiet=True))
