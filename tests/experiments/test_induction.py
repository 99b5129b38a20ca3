"""Times at which heads form are found, the circuit written by hand passes as a head, and every claim is judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import induction
from experiments.induction import CLAIMS, QUICK
from jaxattn import analysis, icl
from jaxattn.claims import report


def test_halfway_is_between_measurements_on_a_line():
    steps = np.array([10, 20, 30, 40])
    assert induction.halfway(steps, np.array([0.0, 0.2, 0.8, 1.0])) == pytest.approx(25)
    assert induction.halfway(steps, np.array([0.0, 0.0, -1.0, -1.0])) == pytest.approx(25)
    assert induction.halfway(steps, np.array([0.0, 1.0, 0.4, 2.0])) == pytest.approx(20)


def test_what_does_not_change_has_no_middle():
    assert np.isnan(induction.halfway(np.array([10, 20, 30]), np.array([0.5, 0.9, 0.5])))


def test_all_tokens_of_a_batch_count_and_those_that_were_seen_are_known():
    batch = induction.drawn(induction.blocks(QUICK), "").draw(jax.random.key(0), 5)
    assert (batch["weights"] == 1).all()
    tokens = np.asarray(batch["tokens"])
    seen = [[tokens[b, i] in tokens[b, :i] for i in range(tokens.shape[1])] for b in range(5)]
    np.testing.assert_array_equal(batch["known"], seen)


def test_a_circuit_written_by_hand_is_a_perfect_induction_head():
    """Its second layer has a prefix score of 1 on copies, looks at lag 1 alone, and is at no distance from CMR."""
    task = induction.blocks(QUICK, QUICK.probe)
    tokens = task.sample(jax.random.key(0), 4).x[:, : 2 * QUICK.probe + 1]
    circuit = icl.induction_head(QUICK.letters + 1, QUICK.length)
    weights = np.asarray(circuit.weights(tokens)[1])[:, 0]
    period = QUICK.probe
    second = np.arange(period + 1, 2 * period + 1)
    assert weights[:, second, second - period + 1].min() > 0.99
    curve = np.array([weights[:, second[1:-1], second[1:-1] - period + lag].mean() for lag in (-1, 0, 1)])
    crp = analysis.cmr_crp(jax.random.key(0), 1.0, 1.0, 0.0, lags=1, runs=10)
    assert float(analysis.cmr_distance(jnp.asarray(curve), crp)) < 1e-3


def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("induction")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert [row["predictor"] for row in result.tables["Chains"]][:3] == ["uniform", "frequencies", "Bayes"]
    assert len(result.tables["Heads"]) == 4
