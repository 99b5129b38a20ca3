"""Training on tasks: what is drawn, what it is resumed with, and that a trained predictor reaches its closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from jaxattn import icl
from jaxattn.train import TrainConfig, drawn, fit, ordered_batches, prompt_loss
from jaxattn.train.data import TRAINING, drawn_batch

D, N = 3, 6
TASK = icl.FunctionTask(icl.Linear(), icl.Gaussian(D), N, noise=0.5)
GROWING = icl.Curriculum(TASK, every=10, dims=(1, 1), points=(2, 2))


def trained(folder, task=TASK, steps=200, **options):
    """Ridge regression with a learned penalty, from a penalty far off."""
    config = TrainConfig(steps=steps, batch_size=64, eval_every=100, log_every=50, save_every=100, eval_batches=2)
    return fit(
        loss_fn=prompt_loss(lambda params, x, y: icl.Ridge(jnp.exp(params["log"]))(x, y), icl.square),
        params={"log": jnp.array(3.0)},
        optimizer=optax.adam(0.05),
        train_data=drawn(task),
        validation_data=drawn(task),
        config=dataclasses.replace(config, **options),
        run_config={},
        folder=folder,
        console=Console(quiet=True),
    )


def test_the_loss_is_the_weighted_sum_over_answers():
    prompt = dataclasses.replace(TASK, first=2).sample(jax.random.key(0), 4)
    total, sums = prompt_loss(lambda shift, x, y: y + shift, icl.square)(2.0, prompt, None)
    assert sums["weight"] == 4 * (N - 2)
    np.testing.assert_allclose(total, 4 * sums["weight"], rtol=1e-6)


def test_the_loss_after_given_lengths_alone():
    prompt = TASK.sample(jax.random.key(0), 4)
    after = prompt_loss(lambda params, x, y: icl.Ridge(params).after(x, y, [0, 5]), icl.square, lengths=[0, 5])
    total, sums = after(0.5, prompt, None)
    each = icl.square(icl.Ridge(0.5)(prompt.x, prompt.y), prompt.y)[:, [0, 5]]
    assert sums["weight"] == 8
    np.testing.assert_allclose(total, each.sum(), rtol=1e-4)


def test_the_penalty_that_is_learned_is_that_of_bayes(tmp_path):
    """The minimum over the penalty of the risk of ridge regression is at σ² / ψ² = 0.25."""
    learned = float(jnp.exp(trained(tmp_path / "run", steps=400).params["log"]))
    assert 0.15 < learned < 0.4  # the risk is flat there: 0.1 % above its minimum at both ends


def test_a_folder_holds_a_run_on_one_task(tmp_path):
    first = trained(tmp_path / "run", steps=100)
    np.testing.assert_array_equal(trained(tmp_path / "run", steps=100).params["log"], first.params["log"])
    with pytest.raises(ValueError, match=r"corpus\.train"):
        trained(tmp_path / "run", task=dataclasses.replace(TASK, noise=0.1), steps=100)


def test_a_curriculum_is_drawn_at_its_step_and_validated_at_its_end():
    source = drawn(GROWING)
    for step, dims, points in ((0, 1, 2), (9, 1, 2), (10, 2, 4), (25, 3, 6), (1000, 3, 6)):
        prompt = drawn_batch(source, 4, 0, TRAINING, step)
        assert (prompt.x != 0).any((0, 1)).sum() == dims
        assert prompt.weights.sum() == 4 * points
    (last,) = ordered_batches(source, 4, 1)
    assert (last.x != 0).all()
    assert last.weights.all()


def test_a_curriculum_trains_in_the_same_loop(tmp_path):
    result = trained(tmp_path / "run", task=GROWING, steps=100)
    assert result.complete
    assert result.history[-1]["validation_loss"] > 0.25  # the variance of the noise


def test_a_digest_says_what_is_drawn():
    digests = [
        drawn(task).digest
        for task in (
            TASK,
            GROWING,
            dataclasses.replace(TASK, noise=0.25),
            dataclasses.replace(TASK, length=N + 1),
            dataclasses.replace(TASK, function=icl.SparseLinear(2)),
            dataclasses.replace(TASK, inputs=icl.Gaussian(D, covariance=jnp.eye(D))),
            dataclasses.replace(GROWING, every=5),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert drawn(dataclasses.replace(TASK)).digest == digests[0]


def test_what_is_no_task_is_refused():
    with pytest.raises(TypeError, match="need one with sample"):
        drawn(icl.Linear())


def test_what_has_no_content_to_resume_by_is_refused():
    """A plain object is a leaf, which would be told from others by its address."""

    class Plain:
        length = N

        def sample(self, key, batch):
            return TASK.sample(key, batch)

    with pytest.raises(TypeError, match="need a registered pytree"):
        drawn(Plain())
