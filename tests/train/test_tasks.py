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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_answer_of_weight_0_is_not_read(bad):
    prompt = TASK.sample(jax.random.key(0), 4)
    counted = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.6, (4, N)))
    prompt = prompt._replace(weights=jnp.asarray(counted, float))

    def total(shift, prompt, spoiled):
        def answer(shift, x, y):
            return jnp.where(spoiled & ~counted, bad, shift * x.sum(-1))

        return prompt_loss(answer, icl.square)(shift, prompt, None)[0]

    value = jax.value_and_grad(total)
    expected = value(2.0, prompt, False)
    spoiled = value(2.0, prompt._replace(y=jnp.where(counted, prompt.y, bad)), True)
    np.testing.assert_array_equal(spoiled, expected)
    exact = (counted * (2 * np.asarray(prompt.x, float).sum(-1) - np.asarray(prompt.y, float)) ** 2).sum()
    np.testing.assert_allclose(expected[0], exact, rtol=4 * N * 4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("target", [-1, -5, 3])
def test_a_token_that_counts_and_is_none_makes_the_loss_of_answers_nan(target):
    """Of a loss that is not ours: it counts −1 from the end."""
    loss = prompt_loss(lambda params, x, y: params, optax.softmax_cross_entropy_with_integer_labels)
    prompt = icl.MarkovChain(3, 5).sample(jax.random.key(0), 2)
    prompt = prompt._replace(y=prompt.y.at[0, 1].set(target))
    logits = jax.random.normal(jax.random.key(1), (2, 5, 3))
    assert np.isnan(loss(logits, prompt, None)[0])
    hidden = prompt._replace(weights=prompt.weights.at[0, 1].set(0))
    total, gradient = jax.value_and_grad(lambda logits: loss(logits, hidden, None)[0])(logits)
    assert np.isfinite(total)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0, 1], 0)


def test_weights_below_0_are_refused_or_make_the_loss_nan():
    prompt = TASK.sample(jax.random.key(0), 4)
    prompt = prompt._replace(weights=prompt.weights.at[1, 1].set(-1.0))
    loss = prompt_loss(lambda params, x, y: y, icl.square)
    with pytest.raises(ValueError, match=r"weights holds -1\.0: need numbers from 0 on"):
        loss(None, prompt, None)
    assert np.isnan(jax.jit(lambda prompt: loss(None, prompt, None))(prompt)[0])


def test_lengths_that_no_prompt_has_are_refused():
    with pytest.raises(ValueError, match="lengths must be at least 0, got -1"):
        prompt_loss(lambda params, x, y: y, icl.square, [-1])
    with pytest.raises(ValueError, match="lengths holds 6: need at most 5"):
        prompt_loss(lambda params, x, y: y, icl.square, [6])(None, TASK.sample(jax.random.key(0), 2), None)


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
