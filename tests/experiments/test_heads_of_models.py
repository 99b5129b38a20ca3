"""Texts with a code in them, correlations that may be unknown, and a quick run."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from experiments import heads
from experiments.heads import CLAIMS, HAY, QUICK, correlation, needles
from jaxattn.claims import report


def test_codes_are_hidden_at_every_depth_and_given_as_the_answer():
    config = dataclasses.replace(QUICK, hay=3, depths=4, digits=3)
    texts = needles(lambda text: np.frombuffer(text.encode(), np.uint8), 0, config, np.random.default_rng(0))
    assert texts.tokens.shape == (8, texts.answer.size)
    begins = []
    for tokens, needle, depth in zip(texts.tokens, texts.needle, texts.depth, strict=True):
        code = tokens[needle]
        np.testing.assert_array_equal(tokens[texts.answer], code)
        assert len(set(code)) == 3
        assert bytes(code.tolist()).isdigit()
        text = bytes(tokens[1:].tolist()).decode()
        assert text.endswith(f"is {bytes(code.tolist()).decode()}")
        assert text.startswith("".join(HAY[:depth]))
        begins.append(int(needle.argmax()))
    assert begins == sorted(begins)
    assert len(set(begins)) == 4
    with pytest.raises(ValueError, match="no token for each digit"):
        needles(lambda text: [*text, 0], 0, config, np.random.default_rng(0))


def test_a_correlation_without_spread_is_not_known():
    assert correlation([[1, 2], [3, 4]], [[2, 4], [6, 8]]) == pytest.approx(1)
    assert correlation([1, 1], [1, 2]) is None
    assert correlation([np.nan, 1], [1, 2]) is None


def test_shares_that_claims_are_about_have_to_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"need 0\.0 and 0\.2"):
        heads.run(dataclasses.replace(QUICK, pruned=(0.0,)), 0, tmp_path, Console(quiet=True))


def test_a_quick_run_judges_every_claim(quick_run):
    quick = quick_run("heads")[1]
    assert {claim.number for claim in CLAIMS} <= quick.numbers.keys()
    report.judged(CLAIMS, [quick])
    assert len(quick.tables["Heads of SmolLM2"]) == 12
    assert quick.numbers["FIX-IND: loss"] > 0
