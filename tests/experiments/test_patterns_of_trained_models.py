"""What the experiments on patterns of attention measure, and their quick runs."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from experiments import important_tokens, vit_heads
from jaxattn.claims import report


def judged(module, quick):
    assert {claim.number for claim in module.CLAIMS} <= quick.numbers.keys()
    report.judged(module.CLAIMS, [quick])
    assert all(value is None or np.isfinite(value) for value in quick.numbers.values())


def test_configs_that_make_no_sense_are_named(tmp_path):
    config = dataclasses.replace(important_tokens.QUICK, texts=99)
    with pytest.raises(ValueError, match="texts is 99: need 1 to 9"):
        important_tokens.run(config, 0, tmp_path, Console(quiet=True))
    with pytest.raises(ValueError, match="need 'photograph' and 'grey' among them"):
        vit_heads.run(vit_heads.Config(images=("photograph",)), 0, tmp_path, Console(quiet=True))


def test_a_quick_run_on_important_tokens(quick_run):
    quick = quick_run("important_tokens")[1]
    judged(important_tokens, quick)
    assert len(quick.tables["Agreement with blank-out by text (Spearman)"]) == 2


def test_a_quick_run_on_heads_of_a_vision_model(quick_run):
    quick = quick_run("vit_heads")[1]
    judged(vit_heads, quick)
    assert len(quick.tables["By layer, on the photograph"]) == 4
