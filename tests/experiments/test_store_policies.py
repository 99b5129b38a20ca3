"""Policies of stores are measured at equal budgets, on texts of one length, with needles where they should be."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from experiments import stores
from experiments.inside_smollm2 import loaded
from experiments.stores import CLAIMS, QUICK, Config
from jaxattn.cache import Policy
from jaxattn.claims import report


def test_every_policy_of_a_budget_reads_as_many_slots():
    for by_part in stores.policies(Config(), 1024).values():
        for part, policy in by_part.items():
            read = policy.slots if policy.select is None else policy.select.pages * policy.select.size
            assert read == 1024 // part
            assert isinstance(policy, Policy)


def test_needles_lie_at_their_depths_and_questions_at_the_end():
    got, config = loaded(QUICK), dataclasses.replace(QUICK, length=512, depths=(0.0, 0.5, 1.0))
    rows, question, answer = stores.needles(got, config, np.random.default_rng(0))
    assert rows.shape == (3, 512)
    text = [bytes(row.astype(np.uint8)).decode("latin-1") for row in rows]
    needle = len("\nThe code of the vault is 00000.\n")
    rest = 512 - needle - question - answer
    for each, depth in zip(text, config.depths, strict=True):
        assert each[: 512 - answer].endswith("The code of the vault is")
        assert each.index("\nThe code of the vault is") == round(depth * rest)
        assert each[each.index("vault is ") + 8 :][:answer] == each[-answer:]


def test_what_does_not_fit_is_refused(tmp_path):
    for changes, message in (
        ({"length": 100}, "length is 100: need a multiple of page times part"),
        ({"policies": ("Qest",)}, "policies holds 'Qest': did you mean 'Quest'"),
    ):
        with pytest.raises(ValueError, match=message):
            stores.run(dataclasses.replace(QUICK, **changes), 0, tmp_path, Console(quiet=True))


def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("stores")[1]
    assert {claim.number for claim in CLAIMS} == result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert [row["policy"] for row in result.tables["Policies"]] == ["all", "2 bits", "Quest, 1/4"]
