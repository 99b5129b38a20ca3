"""Function classes: the quick runs measure what they say, and task vectors are what heads add to the stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import decoders, function_classes, task_vectors
from jaxattn import icl, models, nn

EPS = float(np.finfo(np.float32).eps)
QUICK = function_classes.QUICK


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("function_classes")[1]


@pytest.fixture(scope="module")
def model():
    return decoders.build(
        models.Spec(nn.MultiHeadAttention, heads=2), vocabulary=1, length=12, width=8, layers=2, seed=0, inputs=5
    )


def test_every_predictor_is_measured_at_every_length(quick):
    task = function_classes.SETTINGS["linear"].task
    curves = quick.figures["Risk: linear"].lines
    assert set(curves) == {"decoder", "ridge", "least squares", "averaging", "zero"}
    assert all([x for x, _ in points] == list(range(task.length)) for points in curves.values())
    assert quick.numbers["linear: mean risk over ridge"] > 1  # ridge is the Bayes answer
    assert quick.numbers["tree: mean risk over greedy tree"] is None


def test_a_curriculum_has_grown_to_the_whole_task_at_half_of_the_training():
    task = function_classes.SETTINGS["sparse"].task
    lessons = function_classes.lessons("sparse, growing", 8000)
    start, half = lessons.at(0), lessons.at(4000)
    assert (start.visible, start.points) == (4, 8)
    assert (half.visible, half.points) == (task.inputs.dim, task.length)
    assert function_classes.lessons("sparse", 8000) is task


def test_every_shift_is_of_a_class_and_differs_from_its_training():
    for name, (setting, examples, changes) in function_classes.SHIFTS.items():
        task = function_classes.SETTINGS[setting].task
        shifted = dataclasses.replace(task, **changes)
        assert (shifted == task) == name.endswith("none")
        prompts = jax.eval_shape(lambda task=shifted: task.sample(jax.random.key(0), 2))
        assert prompts.x.shape == (2, task.length, task.inputs.dim)
        assert examples < task.length


def test_a_decoder_answers_from_the_past_alone(model):
    prompt = icl.FunctionTask(icl.Linear(), icl.Gaussian(5), 6).sample(jax.random.key(0), 2)
    assert icl.leaks(jax.jit(decoders.predictor(model)), prompt.x, prompt.y) <= 200 * EPS
    with pytest.raises(ValueError, match="x has 7 examples, 14 tokens: the model is made for at most 12"):
        decoders.predictor(model)(jnp.zeros((1, 7, 5)), jnp.zeros((1, 7)))


def test_classes_and_shifts_that_do_not_exist_are_refused(tmp_path):
    for field in ("classes", "shifts"):
        with pytest.raises(ValueError, match=f"{field} holds 'linaer'"):
            function_classes.run(dataclasses.replace(QUICK, **{field: ("linaer",)}), 0, tmp_path, Console(quiet=True))
    with pytest.raises(ValueError, match="prompts is 100"):
        function_classes.run(dataclasses.replace(QUICK, prompts=100), 0, tmp_path, Console(quiet=True))


def test_the_outputs_of_all_heads_are_what_attention_adds(model):
    tokens = jax.random.normal(jax.random.key(1), (3, 7, 5))
    heads, stream = task_vectors.head_outputs(model, tokens)
    *_, records = model(tokens, record=("attn_out", "resid"))
    assert heads.shape == (2, 2, 8)
    expected = records["attn_out"][:, :, -1].mean(1)
    np.testing.assert_allclose(heads.sum(1), expected, rtol=0, atol=20 * EPS * abs(expected).max())
    np.testing.assert_array_equal(stream, records["resid"][:, :, -1].mean(1))


def test_weights_of_0_are_the_model_itself_and_gradients_reach_every_head(model):
    queries, truth = jax.random.normal(jax.random.key(2), (2, 4, 5)), jnp.ones((2, 4))
    heads = jax.random.normal(jax.random.key(3), (2, 2, 2, 8))

    def loss(phi):
        return task_vectors.error(model, queries, truth, task_vectors.vectors(phi, heads)).mean()

    plain = ((model(queries.reshape(8, 1, 5))[0][:, 0, 0] - 1) ** 2).mean()
    value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 2)))
    np.testing.assert_allclose(value, plain, rtol=50 * EPS)
    assert (abs(gradient) > 1e-6).all()


def test_task_vectors_are_measured(quick_run, tmp_path):
    _, result = quick_run("task_vectors")
    assert {claim.number for claim in task_vectors.CLAIMS} <= set(result.numbers)
    (table,) = [rows for title, rows in result.tables.items() if title.startswith("Squared error")]
    assert [row["functions"] for row in table] == ["these", "others"]
    with pytest.raises(ValueError, match="top is 0"):
        task_vectors.run(dataclasses.replace(task_vectors.QUICK, top=0), 0, tmp_path, Console(quiet=True))


def test_the_weights_of_heads_are_learned_by_descent(model):
    heads, queries = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 5))
    config = dataclasses.replace(task_vectors.QUICK, steps=5)
    edit = task_vectors.vectors
    phi, losses = task_vectors.learned(
        config, lambda phi: task_vectors.error(model, queries, jnp.ones((1, 2)), edit(phi, heads)).mean(), (2, 2)
    )
    assert losses[-1][1] < losses[0][1]
    assert jnp.abs(phi).max() > 0
