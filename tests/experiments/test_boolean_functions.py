"""Boolean functions: accuracy is that of the learners, and a quick run measures what its claims are about."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from experiments import boolean_functions
from experiments.boolean_functions import CLAIMS, CONJUNCTION, QUICK, SETTINGS, accuracy
from jaxattn import icl

QUIET = Console(quiet=True)


def test_parities_are_learned_at_the_rate_at_which_inputs_span_the_space():
    """The optimal learner is right with probability 1/2 + 1/2 E 2^(rank − d), within 4 standard errors of it."""
    task, learners = SETTINGS["parity"]
    prompts = 2048
    measured = accuracy(task, {"GF(2)": learners["GF(2)"]}, prompts, 0)["GF(2)"]
    for examples in (0, 6, 10, 12, 24):
        expected = icl.parity_accuracy(examples, 10)
        assert abs(measured[examples] - expected) <= 4 * np.sqrt(expected * (1 - expected) / prompts) + 1e-6


@pytest.mark.parametrize("name", SETTINGS)
def test_accuracy_is_measured_wherever_answers_count(name):
    """And who says nothing is right half of the time."""
    task, _ = SETTINGS[name]
    measured = accuracy(task, {"zero": icl.Zero()}, 256, 0)["zero"]
    np.testing.assert_array_equal(measured, np.where(np.arange(task.length) < task.first, np.nan, 0.5))


def test_a_copied_label_is_that_of_the_nearest_by_cosine():
    task, learners = SETTINGS["copied label"]
    measured = accuracy(task, {"nearest": learners["nearest by cosine"]}, 256, 0)["nearest"]
    assert (measured[task.first :] == 1).all()


def test_the_optimal_learner_of_conjunctions_is_not_behind_the_nearest_neighbour():
    """Within 4 standard errors of a difference of two accuracies, at any number of examples; ahead of it at the end."""
    prompts = 512
    measured = accuracy(CONJUNCTION, SETTINGS["conjunction"].learners, prompts, 0)
    error = np.sqrt(2 * 0.25 / prompts)
    assert (measured["Bayes"] >= measured["nearest neighbour"] - 4 * error).all()
    assert measured["Bayes"][-5:].mean() > measured["nearest neighbour"][-5:].mean()


def test_the_quick_run_measures_what_it_trains(quick_run):
    _, result = quick_run("boolean_functions")
    # The largest of 9 gaps to the optimum is below 0 by chance alone: 4 standard errors of one accuracy are ample.
    assert result.numbers["conjunction: softmax: largest gap to Bayes after 16 or more"] > -4 * 0.5 / QUICK.prompts**0.5
    assert result.numbers["parity: softmax: accuracy at the end"] is None
    assert {claim.number for claim in CLAIMS} <= set(result.numbers)
    learners = {row["learner"] for row in result.tables["Accuracy"]}
    assert learners == {"softmax", "(Bayes)", "(nearest neighbour)"}


def test_runs_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="runs holds 'parity: softmaxx': did you mean 'parity: softmax'"):
        boolean_functions.run(dataclasses.replace(QUICK, runs=("parity: softmaxx",)), 0, tmp_path, QUIET)
    with pytest.raises(ValueError, match="prompts is 300"):
        boolean_functions.run(dataclasses.replace(QUICK, prompts=300), 0, tmp_path, QUIET)
