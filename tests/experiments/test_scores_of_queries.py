"""Scores with the right parameters answer their task, and every claim is judged."""

import jax
import jax.numpy as jnp
import pytest

from experiments import scores
from experiments.scores import CLAIMS, KEYS, NORMALISERS
from jaxattn import Dot
from jaxattn.claims import report
from jaxattn.core.attend import Bilinear, Location, NegativeDistance

TURN = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (KEYS, KEYS)))[0]


@pytest.mark.parametrize(
    ("task", "score", "most"),
    [
        ("alike", Dot(60.0), 0.02),
        ("mapped", Bilinear(60 * TURN.T), 0.02),
        ("lengths", NegativeDistance(60.0), 0.1),
        ("place", Location(60 * jnp.eye(KEYS)), 1e-4),
    ],
)
def test_a_score_with_the_right_parameters_finds_the_source(task, score, most):
    batch = scores.draw(jax.random.key(1), 512, task=task, noise=0.1, turn=TURN)
    assert float(scores.squares(score, NORMALISERS["softmax"], batch).mean()) < most
    other = {"mapped": Dot(60.0), "place": Dot(60.0), "lengths": Dot(60.0)}.get(task)
    if other is not None:
        assert float(scores.squares(other, NORMALISERS["softmax"], batch).mean()) > 2 * most


@pytest.mark.slow
def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("scores")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
