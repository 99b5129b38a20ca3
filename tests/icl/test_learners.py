"""Learners without a prior: neighbours, greedy trees and majorities, against brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl

TREES = icl.FunctionTask(icl.DecisionTree(2), icl.Gaussian(3), 9)

ANSWER = jax.jit(lambda predictor, x, y: predictor(x, y))


def prompt_of(task, batch, seed=0):
    return jax.jit(task.sample, static_argnums=1)(jax.random.key(seed), batch)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    "task", [icl.FunctionTask(icl.Linear(), icl.Gaussian(3), 8), icl.FunctionTask(icl.Parity(), icl.Signs(4), 8)]
)
def test_neighbours_are_the_nearest_ones_seen(metric, task):
    prompt = jax.tree.map(lambda x: np.asarray(x, float), prompt_of(task, 20)._replace(hidden=()))
    for k in (1, 3):
        answers = np.asarray(ANSWER(icl.KNearestNeighbours(k, metric), jnp.asarray(prompt.x), jnp.asarray(prompt.y)))
        np.testing.assert_array_equal(answers[:, 0], 0)
        for x, y, answer in zip(prompt.x, prompt.y, answers, strict=True):
            for i in range(1, 8):
                if metric == "euclidean":
                    distance = ((x[:i] - x[i]) ** 2).sum(-1)
                else:
                    distance = -(x[:i] @ x[i]) / np.linalg.norm(x[:i], axis=-1)
                nearest = np.argsort(np.round(distance, 9), kind="stable")[: min(i, k)]  # equal ones are equal
                np.testing.assert_allclose(answer[i], y[nearest].mean(), rtol=1e-6, atol=1e-6)


def test_a_cosine_neighbour_knows_the_labels_that_are_made_of_it():
    task = icl.FunctionTask(icl.NearestNeighbour(start=6), icl.Signs(4), 20, first=6)
    prompt = prompt_of(task, 300)
    right = ANSWER(icl.KNearestNeighbours(1, "cosine"), prompt.x, prompt.y) == prompt.y
    assert right[:, 6:].all()
    assert not right[:, :6].all()


def test_neighbours_answer_every_channel():
    x, y = jax.random.normal(jax.random.key(0), (2, 6, 3)), jax.random.normal(jax.random.key(1), (2, 6, 2))
    learner = icl.KNearestNeighbours(2)
    for channel in range(2):
        np.testing.assert_allclose(ANSWER(learner, x, y)[..., channel], ANSWER(learner, x, y[..., channel]), rtol=1e-6)


def test_the_majority_is_the_sign_of_the_sum():
    prompt = prompt_of(icl.FunctionTask(icl.Parity(), icl.Signs(4), 8), 50)
    before = np.cumsum(np.asarray(prompt.y), 1) - np.asarray(prompt.y)
    np.testing.assert_array_equal(ANSWER(icl.MajorityLabel(), prompt.x, prompt.y), np.sign(before))


def grown(x, y, query, depth, threshold):
    """The answers of all trees that are as good at every split: splits that explain as much are ties."""
    if depth == 0:
        return {round(float(np.mean(y)), 9)}
    splits = []
    for j in range(x.shape[1]):
        levels = np.unique(x[:, j])
        for at in (levels[1:] + levels[:-1]) / 2 if threshold is None else [threshold]:
            left = x[:, j] <= at
            if 0 < left.sum() < len(y):
                error = sum(((y[side] - y[side].mean()) ** 2).sum() for side in (left, ~left))
                splits.append((error, left if query[j] <= at else ~left))
    if not splits:
        return grown(x, y, query, 0, threshold)
    least = min(error for error, _ in splits)
    ways = [side for error, side in splits if error <= least + 1e-9]
    return set().union(*(grown(x[side], y[side], query, depth - 1, threshold) for side in ways))


@pytest.mark.parametrize("threshold", [None, 0.0])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_greedy_tree_splits_where_the_least_error_is_left(depth, threshold):
    with jax.enable_x64(True):
        prompt = prompt_of(TREES, 15)
        x = prompt.x.astype(jnp.float64)
        y = jnp.round(4 * prompt.y.astype(jnp.float64)) + jnp.round(x[..., 0])  # several values in a leaf
        answers = np.asarray(ANSWER(icl.GreedyTree(depth, threshold), x, y))
        x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_array_equal(answers[:, 0], 0)
    for b in range(15):
        for i in range(1, 9):
            possible = grown(x[b, :i], y[b, :i], x[b, i], depth, threshold)
            assert min(abs(answers[b, i] - each) for each in possible) < 1e-8


def test_equal_inputs_are_not_split():
    x = jnp.ones((1, 5, 2))
    y = jnp.array([[1.0, 2.0, 6.0, 3.0, 0.0]])
    for learner in (icl.GreedyTree(2), icl.GreedyTree(2, 0.0)):
        np.testing.assert_allclose(ANSWER(learner, x, y)[0], [0, 1, 1.5, 3, 3], rtol=1e-6)


def test_a_tree_that_knows_the_threshold_learns_trees_best():
    """On trees of depth 2 it beats one that does not, and that beats a stump and the mean of all."""
    learners = {
        "known": icl.GreedyTree(2, 0.0),
        "greedy": icl.GreedyTree(2),
        "stump": icl.GreedyTree(1),
        "mean": icl.GreedyTree(0),
    }
    risks = icl.compare(TREES, learners, (40,), jax.random.key(0), batch=200, batches=2).risks
    for better, worse in (("known", "greedy"), ("greedy", "stump"), ("stump", "mean")):
        assert risks[better].mean[0] + 4 * risks[better].error[0] < risks[worse].mean[0]


@pytest.mark.parametrize(
    "predictor",
    [
        icl.KNearestNeighbours(3),
        icl.KNearestNeighbours(3, "cosine"),
        icl.MajorityLabel(),
        icl.GreedyTree(2),
        icl.GreedyTree(2, 0.0),
    ],
)
def test_learners_look_at_the_past_alone(predictor):
    prompt = prompt_of(TREES, 3)
    assert icl.leaks(predictor, prompt.x, prompt.y) == 0


def test_what_cannot_be_is_refused():
    for make, words in (
        (functools.partial(icl.KNearestNeighbours, 0), "k must be at least 1, got 0"),
        (
            functools.partial(icl.KNearestNeighbours, 1, "manhattan"),
            "metric is 'manhattan': need 'euclidean' or 'cosine'",
        ),
        (functools.partial(icl.GreedyTree, -1), "depth must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
