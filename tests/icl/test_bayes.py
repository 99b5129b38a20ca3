"""Optimal learners: Bayes by enumeration against brute force and published figures, parities against their rank law."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import attend, icl

EPS = float(np.finfo(np.float32).eps)
CONJUNCTIONS = icl.FunctionTask(icl.Conjunction(), icl.Planted(icl.Signs(6), 0.3), 25)
PARITIES = icl.FunctionTask(icl.Parity(), icl.Signs(5), 9)

ANSWER = jax.jit(lambda predictor, x, y: predictor(x, y))


def mistakes(task, predictors, lengths, batch=100, batches=10):
    return icl.compare(task, predictors, lengths, jax.random.key(0), batch=batch, batches=batches, loss=icl.mistakes)


def test_bayes_is_the_posterior_mean_over_the_functions_one_by_one():
    """With planted inputs and flipped labels: p(w) Π p(x_i | w) p(y_i | w, x_i) p(x | w), in plain Python."""
    task = icl.FunctionTask(icl.Conjunction(0.4), icl.Planted(icl.Signs(3), 0.25), 6, noise=0.1)
    prompt = jax.jit(task.sample, static_argnums=1)(jax.random.key(1), 5)
    answers = np.asarray(ANSWER(icl.BayesFinite.of(task), prompt.x, prompt.y))
    for b, n in itertools.product(range(5), range(6)):
        total = mean = 0.0
        for w in itertools.product((-1, 0, 1), repeat=3):
            size = sum(each != 0 for each in w)
            posterior = 0.6 ** (3 - size) * 0.2**size
            for i in range(n + 1):
                x, y = np.asarray(prompt.x[b, i]), float(prompt.y[b, i])
                holds = all(x[j] == w[j] for j in range(3) if w[j])
                posterior *= 0.75 / 8 + 0.25 * holds / 2 ** (3 - size)
                value = 1 if holds else -1
                if i < n:
                    posterior *= 0.9 if y == value else 0.1
            total, mean = total + posterior, mean + posterior * value
        # 27 exponentials of sums of 14 logarithms of size up to 10.
        assert answers[b, n] == pytest.approx(mean / total, abs=140 * EPS)


def test_bayes_of_conjunctions_has_its_known_accuracy_and_beats_a_neighbour():
    """n = 6: .564 .696 .926 .990 .996 after 0, 2, 8, 16, 20 examples; the nearest neighbour has .826 after 8."""
    learners = {"Bayes": icl.BayesFinite.of(CONJUNCTIONS), "neighbour": icl.KNearestNeighbours(1)}
    table = mistakes(CONJUNCTIONS, learners, (0, 2, 8, 16, 20))
    bayes, neighbour = table.risks["Bayes"], table.risks["neighbour"]
    for mean, error, known in zip(bayes.mean, bayes.error, (0.564, 0.696, 0.926, 0.990, 0.996), strict=True):
        # The figures have three digits and come from a simulation of their own, no better than this one.
        assert abs(1 - mean - known) < 4 * 2**0.5 * error + 0.0005
    assert abs(1 - neighbour.mean[2] - 0.826) < 4 * 2**0.5 * neighbour.error[2] + 0.0005
    assert (neighbour.mean - bayes.mean > 4 * (neighbour.error + bayes.error))[2:].all()


def test_a_query_that_is_not_planted_tells_nothing_of_the_function():
    """p(w) p(x_1 | w) p(y_1 | w, x_1), without p(x_2 | w), in plain Python."""
    task = icl.FunctionTask(icl.Conjunction(0.4), icl.Planted(icl.Signs(3), 0.25), 2, query=icl.Fresh())
    x = np.array([[1.0, 1.0, -1.0], [-1.0, 1.0, 1.0]])
    total = mean = 0.0
    for w in itertools.product((-1, 0, 1), repeat=3):
        size = sum(each != 0 for each in w)
        first, second = (all(row[j] == w[j] for j in range(3) if w[j]) for row in x)
        posterior = 0.6 ** (3 - size) * 0.2**size * (0.75 / 8 + 0.25 * first / 2 ** (3 - size)) * first
        total, mean = total + posterior, mean + posterior * (1 if second else -1)
    answers = ANSWER(icl.BayesFinite.of(task), jnp.asarray(x)[None], jnp.ones((1, 2)))
    assert answers[0, 1] == pytest.approx(mean / total, abs=140 * EPS)


def test_bayes_that_does_not_know_of_planting_is_worse():
    knowing = icl.BayesFinite.of(CONJUNCTIONS)
    table = mistakes(CONJUNCTIONS, {"knows": knowing, "not": dataclasses.replace(knowing, planted=None)}, (0,))
    knows, ignorant = table.risks["knows"], table.risks["not"]
    assert ignorant.mean[0] - knows.mean[0] > 4 * (ignorant.error[0] + knows.error[0])


def test_bayes_of_sparse_parity_has_its_known_accuracy():
    """(10, 2): .555 .601 .728 .874 .954 .989 .999 after 0, 2, 4, 6, 8, 10, 14 examples."""
    task = icl.FunctionTask(icl.SparseParity(2), icl.Signs(10), 16)
    bayes = mistakes(task, {"Bayes": icl.BayesFinite.of(task)}, (0, 2, 4, 6, 8, 10, 14), batch=200).risks["Bayes"]
    for mean, error, known in zip(
        bayes.mean, bayes.error, (0.555, 0.601, 0.728, 0.874, 0.954, 0.989, 0.999), strict=True
    ):
        assert abs(1 - mean - known) < 4 * 2**0.5 * error + 0.0005


@pytest.mark.parametrize(
    "function",
    [
        icl.Disjunction(0.5),
        icl.SparseDisjunction(2),
        icl.Majority(0.5),
        icl.SparseThreshold(0.5),
        icl.IntegerHalfspace(1),
        icl.DNF(2, 0.4, monotone=True),
    ],
)
def test_bayes_is_right_about_its_own_mistakes(function):
    """The probability of a mistake that it states, (1 − |E f(x)|) / 2, is how often it is wrong."""
    task = icl.FunctionTask(function, icl.Signs(4), 7, noise=0.1)
    learner = icl.BayesFinite.of(task)

    @jax.jit
    def stated_and_made(key):
        prompt = task.sample(key, 4000)
        answers = learner(prompt.x, prompt.y)
        return (1 - jnp.abs(answers)) / 2, icl.mistakes(answers, prompt.clean)

    stated, made = (np.asarray(each, float) for each in stated_and_made(jax.random.key(2)))
    difference = stated - made
    assert (np.abs(difference.mean(0)) < 4 * difference.std(0) / 4000**0.5).all()
    assert made[:, -1].mean() < made[:, 0].mean()


def test_a_pool_of_linear_functions_is_softmax_attention_over_them():
    """log p(y | X, w) = w·Xᵀy / σ² − ½ wᵀXᵀX w / σ² + const: the query is Xᵀy / σ², the keys and values are the w."""
    weights, noise = jax.random.normal(jax.random.key(0), (7, 3)), 0.5
    task = icl.FunctionTask(icl.Pool(weights), icl.Gaussian(3), 6, noise=noise)
    prompt = jax.jit(task.sample, static_argnums=1)(jax.random.key(1), 4)
    answers = ANSWER(icl.BayesFinite.of(task), prompt.x, prompt.y)
    for b, n in itertools.product(range(4), range(6)):
        x, y = prompt.x[b, :n], prompt.y[b, :n]
        # w·query − ½ |X w|²/σ² as one dot product: two more channels carry the quadratic part.
        quadratic = -0.5 * ((weights @ x.T) ** 2).sum(-1) / noise**2
        query = jnp.append(x.T @ y / noise**2, 1.0)[None, None] * 4**0.5  # attend divides by the root of 4 channels
        keys = jnp.concatenate([weights, quadratic[:, None]], -1)[:, None]
        posterior_mean = attend(query, keys, weights[:, None])[0, 0]
        np.testing.assert_allclose(answers[b, n], prompt.x[b, n] @ posterior_mean, rtol=1e-4, atol=1e-4)


def test_of_a_pool_bayes_is_better_than_ridge_and_elsewhere_worse():
    """d = 8, 16 examples, σ² = 1/4, 4 tasks: excess .000 against .264; on fresh tasks 8.8 against .26 to .31."""
    pool = icl.Pool(jax.random.normal(jax.random.key(0), (4, 8)))
    task = icl.FunctionTask(pool, icl.Gaussian(8), 17, noise=0.5)
    learners = {"pool": icl.BayesFinite.of(task), "ridge": icl.Ridge(0.25)}
    fresh = dataclasses.replace(task, function=icl.Linear())
    for where, better, worse in ((task, "pool", "ridge"), (fresh, "ridge", "pool")):
        risks = icl.compare(where, learners, (16,), jax.random.key(1), batch=200, batches=2, excess=True).risks
        assert risks[worse].mean[0] - risks[better].mean[0] > 4 * (risks[worse].error[0] + risks[better].error[0])
        assert abs(risks["ridge"].mean[0] - 0.264) < 4 * risks["ridge"].error[0] + 0.0005


def test_with_no_function_left_bayes_does_not_know():
    learner = icl.BayesFinite(icl.Majority(), *icl.Majority().table(2))
    x = jnp.array([[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    assert ANSWER(learner, x, jnp.array([[1.0, -1.0, 1.0]]))[0, 2] == 0


def test_parities_are_known_where_all_parities_that_are_left_agree():
    """Against Bayes over all 2^5 of them, whose answer is then ±1, and else 0: half of what is left says either."""
    prompt = jax.jit(PARITIES.sample, static_argnums=1)(jax.random.key(3), 40)
    known = np.asarray(ANSWER(icl.GF2Parity(), prompt.x, prompt.y))
    bayes = np.asarray(ANSWER(icl.BayesFinite.of(PARITIES), prompt.x, prompt.y))
    np.testing.assert_allclose(known, bayes, atol=32 * EPS)
    assert {-1, 0, 1} == set(known.ravel())


def test_the_accuracy_on_parities_is_that_of_the_rank_law():
    """n = 10: .5020, .5303, .6104, .8053, .9413, .9923 after 2, 6, 8, 10, 12, 15 examples; and simulated, n = 5."""
    figures = {2: 0.5020, 6: 0.5303, 8: 0.6104, 10: 0.8053, 12: 0.9413, 15: 0.9923}
    for examples, figure in figures.items():
        assert icl.parity_accuracy(examples, 10) == pytest.approx(figure, abs=0.00005)
    lengths = (0, 2, 4, 6, 8)
    risk = mistakes(PARITIES, {"parity": icl.GF2Parity()}, lengths, batch=500).risks["parity"]
    for examples, mean, error in zip(lengths, risk.mean, risk.error, strict=True):
        assert abs(mean - (1 - icl.parity_accuracy(examples, 5))) < 4 * error + EPS


def test_a_span_holds_as_many_vectors_as_its_rank_says():
    """E 2^{rank − n} over all 2^{mn} matrices of bits, ranks by counting sums of rows: m = 0 .. 4, n = 3."""
    vectors = list(range(8))
    for examples in range(5):
        inside = []
        for rows in itertools.product(vectors, repeat=examples):
            span = {0}
            for row in rows:
                span |= {each ^ row for each in span}
            inside.append(len(span) / 8)
        assert icl.parity_accuracy(examples, 3) == pytest.approx(0.5 + 0.5 * np.mean(inside))


def test_after_a_lesson_the_conjunction_is_known():
    """Planted examples told Bayes about it; after k + 2 examples of a lesson it is known to who looks for it."""
    taught = dataclasses.replace(CONJUNCTIONS, inputs=icl.Teaching(icl.Planted(icl.Signs(6), 0.4)), length=9)
    learner = icl.BayesFinite(icl.Conjunction(), *icl.Conjunction().table(6))
    risk = mistakes(taught, {"Bayes": learner}, (8,), batch=50, batches=2).risks["Bayes"]
    assert risk.mean[0] == 0


@pytest.mark.parametrize(
    ("task", "predictor"),
    [
        (dataclasses.replace(CONJUNCTIONS, length=5), icl.BayesFinite.of(CONJUNCTIONS)),
        (PARITIES, icl.GF2Parity()),
    ],
)
def test_optimal_learners_look_at_the_past_alone(task, predictor):
    prompt = jax.jit(task.sample, static_argnums=1)(jax.random.key(0), 3)
    assert icl.leaks(predictor, prompt.x, prompt.y) == 0


def test_what_cannot_be_is_refused():
    table = icl.Parity().table(3)
    for make, error, words in (
        (
            lambda: icl.BayesFinite(icl.Linear(), jnp.ones((2, 3)), jnp.zeros(2)),
            ValueError,
            "noise holds 0.0: need numbers above",
        ),
        (
            lambda: icl.BayesFinite(icl.Parity(), *table, 0.0, icl.Planted(icl.Signs(3))),
            TypeError,
            "Parity has no pattern",
        ),
        (
            lambda: icl.BayesFinite.of(dataclasses.replace(PARITIES, function=icl.LinearSign())),
            TypeError,
            "has no table",
        ),
        (
            lambda: icl.BayesFinite.of(dataclasses.replace(CONJUNCTIONS, inputs=icl.Teaching(icl.Signs(6)))),
            ValueError,
            "inputs is Teaching: need inputs with a likelihood",
        ),
        (
            lambda: icl.BayesFinite.of(dataclasses.replace(CONJUNCTIONS, inputs=icl.Scaled(CONJUNCTIONS.inputs, 2.0))),
            ValueError,
            "inputs is Scaled: need inputs with a likelihood",
        ),
        (
            lambda: icl.BayesFinite.of(
                dataclasses.replace(CONJUNCTIONS, inputs=icl.Scaled(icl.Scaled(CONJUNCTIONS.inputs, 2.0), 0.5))
            ),
            ValueError,
            "inputs is Scaled: need inputs with a likelihood",
        ),
        (
            lambda: icl.BayesFinite.of(dataclasses.replace(CONJUNCTIONS, inputs=icl.Planted(icl.Gaussian(6)))),
            ValueError,
            "planted has the inputs Gaussian: need Signs",
        ),
        (
            lambda: icl.BayesFinite.of(dataclasses.replace(CONJUNCTIONS, visible=3)),
            ValueError,
            "visible is 3: need a task that shows all coordinates",
        ),
        (
            lambda: icl.BayesFinite.of(icl.FunctionTask(icl.Pool(jnp.ones((2, 3))), icl.Gaussian(4), 5, 0.5)),
            ValueError,
            r"weights has shape \(2, 3\): need \[M, 4\]",
        ),
        (lambda: icl.parity_accuracy(-1, 3), ValueError, "examples must be at least 0, got -1"),
    ):
        with pytest.raises(error, match=words):
            make()
