"""Slow pairs of a model by hand, shares of answers, and a quick run."""

import jax.numpy as jnp
import numpy as np

from experiments import inside_smollm2
from experiments.massive import CLAIMS, QUICK, less, share_lost, slow_scores
from jaxattn import analysis, trace
from jaxattn.claims import report


def test_scores_of_slow_pairs_are_those_of_each_head():
    model = inside_smollm2.loaded(inside_smollm2.Config(weights="random")).model
    tokens = (jnp.arange(14) * 7 % 50)[None]
    found = slow_scores(model, tokens, 2, others=False)
    seen = trace.run(model, tokens, record=("q_rotated", "k_rotated"))[1]
    for layer, head in ((0, 1), (2, 3)):
        each = analysis.pair_correlations(
            seen["q_rotated"][layer, 0, :, head], seen["k_rotated"][layer, 0, :, head // 2], distance=2
        )
        np.testing.assert_allclose(found[layer, head], each[2:].mean(), rtol=1e-4)


def test_what_was_never_right_cannot_be_lost():
    assert share_lost(0.5, 0.125) == 0.75
    assert share_lost(0.0, 0.0) is None
    assert less(None, 0.2) is None
    assert less(0.5, 0.25) == 0.25


def test_a_quick_run_judges_every_claim(quick_run):
    quick = quick_run("massive")[1]
    assert {claim.number for claim in CLAIMS} <= quick.numbers.keys()
    report.judged(CLAIMS, [quick])
    assert len(quick.tables["Answers with channels cleared"]) == 2 * len(QUICK.cleared)
