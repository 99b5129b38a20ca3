"""The conversion experiment at its quick size: stages that resume, and numbers that are what they are called."""

import pytest
from rich.console import Console

from experiments import conversion


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("conversion")


def test_numbers_are_those_of_the_table(quick):
    _, result = quick
    bits = {row["model"]: row["bits per byte"] for row in result.tables["Quality on held-out text"]}
    assert all(0 < value < 9 for value in bits.values())
    numbers = result.numbers
    assert numbers["share of quality kept"] == bits["teacher, finetuned"] / bits["matched, finetuned"]
    assert numbers["bits saved by matching first"] == bits["converted, finetuned"] - bits["matched, finetuned"]
    won = (bits["converted"] - bits["matched"]) / (bits["converted"] - bits["teacher"])
    assert numbers["share of the loss won back by matching"] == won
    assert bits["matched"] != bits["converted"] != bits["teacher"]


def test_curves_cover_every_stage(quick):
    _, result = quick
    matching, finetuning = result.figures["Matching"].lines, result.figures["Finetuning"].lines
    assert [step for step, _ in matching["matching"]] == list(range(1, conversion.QUICK.match_steps + 1))
    assert set(finetuning) == {"teacher finetuned", "converted finetuned", "matched finetuned"}
    assert all(0 < loss < 10 for points in (*matching.values(), *finetuning.values()) for _, loss in points)


def test_a_finished_run_is_read_and_not_trained_again(quick):
    folder, result = quick
    assert conversion.run(conversion.QUICK, 0, folder, Console(quiet=True)).numbers == result.numbers


def test_every_claim_judges_a_number_that_is_measured(quick):
    assert {claim.number for claim in conversion.CLAIMS} <= quick[1].numbers.keys()
