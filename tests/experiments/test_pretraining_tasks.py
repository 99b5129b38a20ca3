"""Pretraining by one task a step: the descent is the one of the theory, and the quick run measures every claim."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import pretraining_tasks
from experiments.pretraining_tasks import CLAIMS, QUICK, descend, setting
from jaxattn.icl import layer_theory

CONFIG = dataclasses.replace(QUICK, dim=3, context=6, noise=0.5)
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("pretraining_tasks")[1]


def test_one_step_from_0_is_the_product_of_the_query_and_the_moment():
    task, _ = setting(CONFIG)
    key, rate = jax.random.key(3), 0.1
    prompts = task.sample(jax.random.fold_in(key, 0), 4)
    x, y = np.asarray(prompts.x, np.float64), np.asarray(prompts.y, np.float64)
    moment = (x[:, :-1] * y[:, :-1, None]).mean(1)
    expected = rate * y[:, -1, None, None] * x[:, -1, :, None] * moment[:, None]
    got = descend(key, task, jnp.array([rate]), 4)
    np.testing.assert_allclose(got, expected, rtol=0, atol=20 * EPS * abs(expected).max())


def test_the_mean_path_is_that_of_the_theory():
    """E Γ_t − Γ* is multiplied by 1 − g λ_i c_j at each task, entry by entry for a diagonal covariance."""
    task, covariance = setting(CONFIG)
    given = {"n": CONFIG.context, "sigma2": CONFIG.noise**2}
    rates, runs = jnp.array([0.05, 0.05, 0.02]), 20000
    gammas = np.asarray(descend(jax.random.key(0), task, rates, runs), np.float64)
    curvature = np.diag(covariance)[:, None] * np.diag(layer_theory.moment_matrix(covariance, **given))
    best = np.asarray(layer_theory.lsa_optimum(covariance, **given))
    expected = best - np.prod([1 - rate * curvature for rate in np.asarray(rates)], axis=0) * best
    error = gammas.std(0) / np.sqrt(runs)
    assert (abs(gammas.mean(0) - expected) < 4.5 * error).all()  # 9 entries at once


def test_the_quick_run_measures_what_claims_are_about_and_exact_ones_hold(quick):
    assert all(quick.numbers[claim.number] is not None for claim in CLAIMS)
    assert quick.numbers["least (excess - bias) / standard error"] > -4  # standard errors
    assert quick.numbers["largest distance of formula and simulation"] < 4
    rows = quick.tables["Excess risk over the noise by the number of examples"]
    assert all(row["best layer there"] <= row["trained"] * (1 + 100 * EPS) for row in rows)
    assert all(row["best layer there"] <= row["best at the length of training"] * (1 + 100 * EPS) for row in rows)
    (at,) = [row for row in rows if row["examples"] == QUICK.context]
    np.testing.assert_allclose(at["best at the length of training"], at["best layer there"], rtol=100 * EPS)


def test_a_descent_that_diverges_confirms_nothing(tmp_path):
    """At 80 times the rate 300 tasks are past all numbers, though 2 of them, measured first, are not."""
    config = dataclasses.replace(QUICK, tasks=(2, 4, 300), rate=12.0, runs=4, prompts=512, lengths=(10, 30))
    with np.errstate(all="ignore"):
        result = pretraining_tasks.run(config, 0, tmp_path, Console(quiet=True))
    for claim in CLAIMS[:3]:
        assert not np.isfinite(result.numbers[claim.number]), claim.number


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (100,)}, "tasks is"),
        ({"tasks": (200, 100)}, "tasks is"),
        ({"lengths": (5, 7)}, "lengths is"),
        ({"runs": 1}, "runs is 1: need 2 or more"),
        ({"prompts": 300}, "prompts is 300: need a multiple of 256"),
        ({"noise": 0.0}, r"noise is 0\.0: need a positive number"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretraining_tasks.run(dataclasses.replace(QUICK, **changes), 0, tmp_path, Console(quiet=True))
