"""Windows are enumerated as the sums say, and every claim is judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import priors
from experiments.priors import CLAIMS
from jaxattn import icl
from jaxattn.claims import report


def test_enumeration_sums_over_all_sources():
    x = icl.WindowRecall(2, 5, 3).sample(jax.random.key(0), 1).x[0]
    key, query = np.asarray(x[:5, :2], np.float64), np.asarray(x[5:, :2], np.float64)
    grid = np.array([0.1, 0.4, 0.8])
    shares, weights = priors.enumerated(jnp.asarray(query), jnp.asarray(key), 0.5, jnp.asarray(grid))
    evidence = []
    for g in grid:
        prior = (1 - g) ** np.arange(4, -1, -1)
        joint = prior / prior.sum() * np.exp(-2 * np.square(query[:, None] - key).sum(-1))
        evidence.append(joint.sum(-1).prod())
    np.testing.assert_allclose(shares, evidence / np.sum(evidence), rtol=1e-4)
    np.testing.assert_allclose(weights[-1], joint / joint.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6)


def test_a_known_slope_is_the_best_answer_for_its_window():
    x = icl.WindowRecall(2, 5, 3).sample(jax.random.key(0), 1).x[0]
    g = jnp.array([0.3])
    _, weights = priors.enumerated(x[5:, :2], x[:5, :2], 0.5, g)
    read = priors.answers(x[5:, :2], x[:5, :2], x[:5, 2], 0.5, -jnp.log1p(-g[0]))
    np.testing.assert_allclose(read, weights[0] @ x[:5, 2], atol=1e-5)


@pytest.mark.slow
def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("priors")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
