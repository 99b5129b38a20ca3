"""Experiments on single attention layers: how they start, what their quick runs measure, and that they go on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import gradient_descent, predictors, softmax_causes, softmax_regression
from jaxattn import icl
from jaxattn.icl import readout

EPS = float(np.finfo(np.float32).eps)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def prompt():
    return icl.FunctionTask(icl.Linear(), icl.Gaussian(3), 6).sample(jax.random.key(0), 4)


def test_a_structured_start_reads_labels_by_a_positive_matrix_and_nothing_else(prompt):
    layer = gradient_descent.start(jax.random.key(1), 3, structured=True)
    gamma = readout.effective_gamma(layer.layers[0])
    assert (jnp.linalg.eigvalsh(gamma) > 0).all()
    expected = icl.Preconditioned(gamma)(prompt.x, prompt.y)
    np.testing.assert_allclose(layer(prompt.x, prompt.y), expected, rtol=0, atol=50 * EPS * abs(expected).max())
    free = gradient_descent.start(jax.random.key(1), 3, structured=False).layers[0]
    assert (free.kq != 0).all()
    assert (free.pv != 0).all()


def test_tuned_steps_are_steps_of_gradient_descent(prompt):
    layers = gradient_descent.steps({"steps": jnp.array([0.3, 0.3])}, 3)
    expected = icl.GradientDescent(0.3, 2)(prompt.x, prompt.y)
    np.testing.assert_allclose(layers(prompt.x, prompt.y), expected, rtol=0, atol=50 * EPS * abs(expected).max())


def test_covariances_have_the_eigenvalues_1_over_k_in_any_basis():
    covariance = gradient_descent.rotated(jax.random.key(0), 4)
    np.testing.assert_allclose(jnp.linalg.eigvalsh(covariance)[::-1], [1, 1 / 2, 1 / 3, 1 / 4], rtol=20 * EPS)
    assert abs(covariance - jnp.diag(jnp.diag(covariance))).max() > 0.05


def test_the_quick_run_of_linear_layers_measures_what_it_says(quick_run):
    """No layer is better than the best: a risk is below the minimum by chance alone."""
    _, result = quick_run("gradient_descent")
    rows = result.tables["One layer"]
    assert [row["training"] for row in rows] == ["isotropic", "anisotropic"]
    assert all(row["risk"] > row["minimum"] - 4 * row["standard error"] for row in rows)
    assert all(row["best of rank one"] > row["minimum"] for row in rows)
    assert result.numbers["one tuned step over its closed form"] > 1 - 4 * result.tables["Layers"][0]["standard error"]
    assert result.numbers["free starts at the best of rank one"] is None
    assert {claim.number for claim in gradient_descent.CLAIMS} <= set(result.numbers)


def test_the_quick_run_of_softmax_heads_measures_what_it_says(quick_run):
    quick = softmax_regression.QUICK
    _, result = quick_run("softmax_regression")
    risks = {row["predictor"]: row["risk"] for row in result.tables["One task"]}
    assert risks["ridge"] < risks["one step of gradient descent"] < risks["debiased"] < 1 + quick.noise2
    assert risks["1 heads"] > risks["ridge"]
    assert {claim.number for claim in softmax_regression.CLAIMS} <= set(result.numbers)
    lines = result.figures["Risk by length"].lines
    assert all([x for x, _ in line] == list(quick.lengths) for line in lines.values())


def test_the_quick_run_of_the_causes_measures_every_draw(quick_run):
    _, result = quick_run("softmax_causes")
    assert {claim.number for claim in softmax_causes.CLAIMS} <= set(result.numbers)
    assert [len(result.tables[name]) for name in ("Two heads", "Four heads")] == [softmax_causes.QUICK.draws] * 2
    assert result.numbers["four heads, small start: least share of OV on the label"] <= 1
    assert result.numbers["two tasks: excess of 3 heads over 4"] is None  # not at the quick size


def test_predictors_that_are_trained_together_learn_as_they_would_alone(tmp_path):
    """Gradients and moments do not mix: equal starts on unequal prompts end apart, and both below their start."""
    task, config = icl.FunctionTask(icl.Linear(), icl.Gaussian(2), 6), softmax_causes.QUICK.layer
    one = icl.debiased_gradient_step(2, 0.1, 0.1)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), one)
    given = config.optimizer, 20, 64, tmp_path, QUIET
    ended, line = predictors.train(task, both, lambda x: x, "both", 0, {}, *given, draws=2)
    assert ended.heads.kq.shape == both.heads.kq.shape
    assert (ended.heads.kq[0] != ended.heads.kq[1]).any()
    assert line[-1][1] < predictors.risk(task, one, 4096, 0)[0]
    beside = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), one)
    other, _ = predictors.train(task, beside, lambda x: x, "beside", 0, {}, *given, draws=2)
    np.testing.assert_allclose(other.heads.kq[0], ended.heads.kq[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(other.heads.ov[0], ended.heads.ov[0], rtol=1e-4, atol=1e-6)


def test_a_finished_training_is_not_run_again_and_another_one_is_refused(tmp_path):
    config = dataclasses.replace(gradient_descent.QUICK, steps=10)
    task = icl.FunctionTask(icl.Linear(), icl.Gaussian(2), 4)
    begun = gradient_descent.start(jax.random.key(0), 2, structured=True)

    def trained(config):
        return gradient_descent.fitted(config, task, begun, lambda layer: layer, "one", 0, tmp_path, QUIET)

    (first, line), (again, same) = trained(config), trained(config)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert line == same
    with pytest.raises(ValueError, match=r"gradient_descent\.noise"):
        trained(dataclasses.replace(config, noise=0.1))


def test_sizes_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps is 15: need a multiple of 10"):
        gradient_descent.run(dataclasses.replace(gradient_descent.QUICK, steps=15), 0, tmp_path, QUIET)
    for experiment, changes, words in (
        (gradient_descent, {"prompts": 100}, "prompts is 100: need a multiple of 4096"),
        (gradient_descent, {"depths": (0,)}, r"depths is \(0,\): need numbers from 1 on"),
        (softmax_regression, {"heads": ()}, r"heads is \(\)"),
        (softmax_regression, {"dim": 1}, "dim is 1: need at least 2"),
        (softmax_regression, {"prompts": 4097}, "prompts is 4097: need a multiple of 4096"),
    ):
        with pytest.raises(ValueError, match=words):
            experiment.run(dataclasses.replace(experiment.QUICK, **changes), 0, tmp_path, QUIET)
    assert not list(tmp_path.iterdir()), "nothing is trained before"
