"""Training paths are measured as the closed forms say, and every claim is judged."""

import jax
import numpy as np
import pytest

from experiments import dynamics
from experiments.dynamics import CLAIMS
from jaxattn import icl
from jaxattn.claims import report
from jaxattn.icl import TopicDocuments


def test_values_that_are_fitted_to_long_documents_are_those_of_the_closed_form():
    task = TopicDocuments(3, 4, 2000, present=1)
    (same, different), closed = dynamics.fitted_values(jax.random.key(0), task, 400), icl.topic_values(3, 4)
    # Noise of frequencies, 1 / length of the variance or less, is taken off the slope.
    assert same - different == pytest.approx(float(closed.same - closed.different), rel=0.005)


def test_attention_of_pairs_is_a_mean_over_places():
    """Uniform attention gives 1 / length to every pair that occurs."""
    task = TopicDocuments(2, 2, 8, present=1)
    layer = dynamics.heads({"values": np.zeros((4, 5), np.float32)}, 4)
    pairs = dynamics.attention_of_pairs(layer, task.sample(jax.random.key(0), 64), 4)
    np.testing.assert_allclose(pairs[pairs > 0], 1 / 8, rtol=1e-5)
    assert (pairs[:2, :2] > 0).all()


def test_the_margin_does_not_see_what_the_loss_does_not():
    values = np.array([[3.0, 1], [1, 4]])
    groups = np.arange(2)
    assert dynamics.margin(values, groups) == dynamics.margin(values + np.array([[7.0, -2]]), groups) == 2


@pytest.mark.slow
def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("dynamics")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert result.numbers["smallest score of a distinct token"] > 0
