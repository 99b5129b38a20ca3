"""Recall under policies of stores: texts say what they ask for, and budgets are equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import packed_recall
from experiments.packed_recall import CLAIMS, QUICK, Config
from jaxattn.claims import report


def test_a_question_is_the_key_of_a_pair_and_its_target_the_value():
    config = dataclasses.replace(Config(), pairs=5, questions=40)
    batch = packed_recall.task(config, 1.5).draw(jax.random.key(0), 3)
    tokens, targets, weights = (np.asarray(batch[name]) for name in ("tokens", "targets", "weights"))
    key, value, asks = np.split(tokens, [config.key_dim, config.key_dim + config.values], -1)
    np.testing.assert_array_equal(asks[..., 0], [[0] * 5 + [1] * 40] * 3)
    np.testing.assert_array_equal(weights, asks[..., 0])
    np.testing.assert_array_equal(value[:, 5:], 0)
    pair = (key[:, 5:, None] == key[:, None, :5]).all(-1)
    np.testing.assert_array_equal(pair.sum(-1), 1)
    np.testing.assert_array_equal(targets[:, 5:], np.take_along_axis(value[:, :5].argmax(-1), pair.argmax(-1), 1))


def test_a_few_pairs_are_asked_for_often():
    """The share of the pair that is asked for most is 1 / Σ i^-1.5 = 0.568 of 5 pairs, within 5 standard errors."""
    config = dataclasses.replace(Config(), pairs=5, questions=400)
    drawn = packed_recall.task(config, 1.5).draw(jax.random.key(1), 10)["tokens"]
    pair = (drawn[:, 5:, None, : config.key_dim] == drawn[:, None, :5, : config.key_dim]).all(-1)
    most, expected = float(pair.mean(1).max(-1).mean()), 1 / float((jnp.arange(1, 6) ** -1.5).sum())
    assert abs(most - expected) <= 5 * (expected * (1 - expected) / 4000) ** 0.5


def test_every_policy_of_a_budget_has_as_many_slots():
    config = Config()
    for by_part in packed_recall.policies(config).values():
        for part, policy in by_part.items():
            read = policy.slots if policy.select is None else policy.select.pages * policy.select.size
            assert read == (config.pairs + config.questions) // part


def test_what_does_not_fit_is_refused(tmp_path):
    for changes, message in (
        ({"questions": 9}, "a text has 17 tokens: need a multiple of page times part"),
        ({"policies": ("resent",)}, "policies holds 'resent': did you mean 'recent'"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_recall.run(dataclasses.replace(QUICK, **changes), 0, tmp_path, Console(quiet=True))


def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("packed_recall")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert [row["policy"] for row in result.tables["Policies"]] == ["all", "recent", "heavy hitters", "Quest"]
