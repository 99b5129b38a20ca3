"""What heads can represent is measured as the closed forms say, and every claim is judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import capacity
from experiments.capacity import CLAIMS, QUICK
from jaxattn.claims import report


def test_sums_of_heads_get_better_with_their_number_and_worse_with_the_dimension():
    errors = [capacity.random_heads(np.random.default_rng(0), dim, (1, 16, 64), 20_000) for dim in (2, 8)]
    assert (np.diff(errors) < 0).all()
    assert errors[1][2] > 3 * errors[0][2]


def test_the_best_fit_is_exact_for_one_channel_less_than_keys():
    """What is left is never below zero, as it is measured in float64."""
    scores = jax.random.normal(jax.random.key(0), (2, 3, 3))
    factors = (capacity.fitted(jax.random.key(1), jax.nn.softmax(scores), head_dim=n, steps=600) for n in (1, 2))
    one, two = (capacity.divergence(scores, each) for each in factors)
    assert 0 <= two < 1e-5
    assert one > 1e-3


def test_labels_are_learned_up_to_the_rank_of_what_heads_read():
    left = capacity.labels(np.random.default_rng(0), 2, 4, (0, 6))
    assert left[0] < 1e-12
    assert left[1] > 1e-2


def test_heads_learn():
    lines = capacity.trained_heads(jax.random.key(0), 2, 1, 200, 32)
    assert lines[-1][1] < 0.5 * lines[0][1]
    assert jnp.isfinite(jnp.array(lines)).all()


@pytest.mark.slow
def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("capacity")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert [row["flips"] for row in result.tables["A memory of 64 bits"]] == list(QUICK.flips)
