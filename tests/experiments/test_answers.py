"""Where answers come from: a quick run."""

import dataclasses

import pytest
from rich.console import Console

from experiments import answers
from experiments.answers import CLAIMS, QUICK
from jaxattn.claims import report


def test_rows_have_to_be_split_in_halves(tmp_path):
    with pytest.raises(ValueError, match="rows is 5: need an even number"):
        answers.run(dataclasses.replace(QUICK, rows=5), 0, tmp_path, Console(quiet=True))


def test_a_quick_run_judges_every_claim(quick_run):
    quick = quick_run("answers")[1]
    assert {claim.number for claim in CLAIMS} <= quick.numbers.keys()
    report.judged(CLAIMS, [quick])
    assert all(point[1] >= 1 for point in quick.figures["Rank of the object by depth"].lines["FIX-FACT"])
