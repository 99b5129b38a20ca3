"""Items and labels come in the bursts that are asked for, and who knows the context or the classes is right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl

SAMPLE = jax.jit(lambda task, key, batch: task.sample(key, batch), static_argnums=2)
ANSWER = jax.jit(lambda predictor, x, y: predictor(x, y))
TASK = icl.ItemLabels.draw(jax.random.key(0), 64, 16, 31, items=8, most=10, burst=4)
BATCH = 2000


def drawn(task, seed=0):
    return jax.tree.map(np.asarray, SAMPLE(task, jax.random.key(seed), BATCH))


def accuracy(predictor, prompt):
    return float((np.asarray(ANSWER(predictor, prompt.x, prompt.y)) == prompt.y)[:, -1].mean())


def deviation(chance, draws=BATCH):
    return (chance * (1 - chance) / draws) ** 0.5


@pytest.fixture(scope="module")
def train():
    return drawn(dataclasses.replace(TASK, bursty=0.7, novel=0.4))


def test_class_means_and_label_vectors_have_length_one_in_the_mean():
    for vectors in (TASK.means, TASK.labels):
        squares = np.asarray((vectors**2).sum(-1))
        assert abs(squares.mean() - 1) < 4 * (2 / 31 / len(squares)) ** 0.5  # χ² of 31 degrees, over 31
    assert TASK.means.shape == (64, 31)
    assert TASK.labels.shape == (16, 31)


def test_tokens_are_positions_from_a_random_start_and_content(train):
    assert TASK.positions == 21
    assert train.x.shape == (BATCH, 17, 21 + 31)
    places = train.x[..., :21]
    assert (places.sum(-1) == 1).all()
    start = places.argmax(-1)[:, 0]
    np.testing.assert_array_equal(places.argmax(-1), start[:, None] + np.arange(17))
    share = np.bincount(start, minlength=5) / BATCH
    assert len(share) == 5
    assert (np.abs(share - 1 / 5) < 4 * deviation(1 / 5)).all()


def test_every_item_is_followed_by_the_vector_of_its_label_and_the_query_is_asked_for(train):
    classes, labels = train.hidden
    np.testing.assert_array_equal(train.x[:, 1::2, 21:], np.asarray(TASK.labels)[labels[:, :-1]])
    known = classes >= 0
    np.testing.assert_array_equal(labels[known], classes[known] % 16)
    np.testing.assert_array_equal(train.y, np.pad(labels[:, -1:], ((0, 0), (16, 0))))
    np.testing.assert_array_equal(train.weights, np.broadcast_to(np.arange(17) == 16, (BATCH, 17)))


def test_sequences_are_bursty_and_novel_as_often_as_they_should(train):
    """Of 64 classes, 8 on their own are hardly ever in multiples of 4: Σ over pairings of (1/64)^6 is below 1e-8."""
    classes, _ = train.hidden
    novel = (classes[:, 0] == -1).mean()
    assert ((classes == -1).all(-1) | (classes >= 0).all(-1)).all()
    assert abs(novel - 0.7 * 0.4) < 4 * deviation(0.7 * 0.4)
    bursts = [all((row[:8] == each).sum() % 4 == 0 for each in row) and row[8] in row[:8] for row in classes]
    assert abs(np.mean(bursts) - 0.7) < 4 * deviation(0.7)


def test_bursts_are_in_random_order_and_the_query_is_of_any():
    """Two places share a burst with probability 3/7, the query is of that of one with 1/2; else by chance."""
    classes, _ = drawn(TASK).hidden
    for one, other, together in ((0, 1, 3 / 7), (2, 7, 3 / 7), (0, 8, 1 / 2), (7, 8, 1 / 2)):
        expected = together + (1 - together) / 64
        assert abs((classes[:, one] == classes[:, other]).mean() - expected) < 4 * deviation(expected)


def test_items_are_around_their_class():
    """With one class, E x·x' = 1 / (1 + ε²) and E |x|² = 1; with known classes, x √(1 + ε²) − μ has variance ε²."""
    task = dataclasses.replace(TASK, burst=8, noise=0.5)
    items = drawn(task.in_context()).x[:, ::2, 21:]
    for one, other, expected in ((0, 3, 0.8), (2, 8, 0.8), (4, 4, 1.0)):
        products = (items[:, one] * items[:, other]).sum(-1)
        assert abs(products.mean() - expected) < 4 * products.std() / BATCH**0.5
    prompt = drawn(task)
    off = prompt.x[:, ::2, 21:] * 1.25**0.5 - np.asarray(TASK.means)[prompt.hidden[0]]
    squares = (off**2).sum(-1).mean(-1)
    assert abs(squares.mean() - 0.25) < 4 * squares.std() / BATCH**0.5
    assert np.abs(off.mean((0, 1))).max() < 5 * 0.5 / (31 * 9 * BATCH) ** 0.5  # 31 numbers: 5 deviations, not 4


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_classes_come_as_often_as_zipf_says(exponent):
    task = dataclasses.replace(TASK, burst=1, bursty=0.0, exponent=exponent)
    classes, _ = drawn(task).hidden
    chances = np.arange(1, 65.0) ** -exponent
    chances /= chances.sum()
    counts = np.bincount(classes.ravel(), minlength=64)
    # χ² with 63 degrees has variance 2 · 63, and a bit more where classes are rare.
    draws = classes.size
    chi = ((counts - draws * chances) ** 2 / (draws * chances)).sum()
    variance = 2 * 63 + ((1 / chances).sum() - 64**2 - 2 * 64 + 2) / draws
    assert abs(chi - 63) < 4 * variance**0.5


def test_the_context_tells_of_novel_and_relabelled_classes_and_the_weights_of_absent_ones():
    """Nearest item: 1 on IC and IC2. Class table: 1 on IW, 1 / L on IC, 0 on IC2, where every label is another."""
    context, table = icl.NearestItem(TASK), icl.ClassTable(TASK)
    novel, relabelled, absent = drawn(TASK.in_context()), drawn(TASK.relabelled()), drawn(TASK.in_weights())
    assert accuracy(context, novel) == accuracy(context, relabelled) == 1
    assert accuracy(table, absent) == 1
    assert abs(accuracy(table, novel) - 1 / 16) < 4 * deviation(1 / 16)
    assert accuracy(table, relabelled) == 0
    assert accuracy(context, absent) < 0.2
    assert accuracy(context, drawn(TASK)) == accuracy(table, drawn(TASK)) == 1


def test_test_sequences_are_what_their_names_say():
    novel, _ = drawn(TASK.in_context()).hidden
    assert (novel == -1).all()
    known, labels = drawn(TASK.relabelled()).hidden
    np.testing.assert_array_equal(labels, (known + 1) % 16)
    assert (known[:, :-1] == known[:, -1:]).any(-1).all()
    for exponent in (0.0, 1.0):
        classes, labels = drawn(dataclasses.replace(TASK, exponent=exponent).in_weights()).hidden
        assert not (classes[:, :-1] == classes[:, -1:]).any()
        np.testing.assert_array_equal(labels, classes % 16)


def test_labels_of_the_context_are_wrong_as_often_as_they_should_be():
    """A label is replaced with probability p by a uniform one: it is another with p (1 − 1 / L), each as likely."""
    clean, noisy = drawn(TASK), drawn(dataclasses.replace(TASK, label_noise=0.4))
    np.testing.assert_array_equal(noisy.y, clean.y)
    np.testing.assert_array_equal(noisy.hidden, clean.hidden)
    vectors = np.asarray(TASK.labels)
    shown = (noisy.x[:, 1::2, 21:] @ vectors.T - (vectors**2).sum(-1) / 2).argmax(-1)
    off = (shown - noisy.hidden[1][:, :-1]) % 16
    shares = np.bincount(off.ravel(), minlength=16)[1:] / off.size
    assert abs(shares.sum() - 0.4 * 15 / 16) < 4 * deviation(0.4 * 15 / 16, off.size)
    # 15 shares, so that one beyond 4 deviations comes once in a thousand.
    assert (np.abs(shares - 0.4 / 16) < 4 * deviation(0.4 / 16, off.size)).all()


@pytest.mark.parametrize("burst", [1, 4])
def test_a_label_of_the_context_is_right_once_in_how_many_there_are(burst):
    labels = drawn(dataclasses.replace(TASK, burst=burst).in_context()).hidden[1]
    generator = np.random.default_rng(0)
    chances = np.array([1 / len(set(row[:-1])) for row in labels])
    right = np.array([generator.choice(np.unique(row[:-1])) == row[-1] for row in labels])
    assert abs((right - chances).mean()) < 4 * (chances * (1 - chances)).mean() ** 0.5 / BATCH**0.5
    assert chances.min() == 1 / (8 // burst)


@pytest.mark.parametrize("predictor", [icl.NearestItem(TASK), icl.ClassTable(TASK)])
def test_predictors_of_labels_do_not_see_the_answer(predictor):
    prompt = SAMPLE(TASK, jax.random.key(0), 4)
    assert icl.leaks(predictor, prompt.x, prompt.y) == 0


def test_arrays_are_leaves_and_sizes_are_not():
    """A task passes through jit as an argument, and one with other means is no other program."""
    other = icl.ItemLabels.draw(jax.random.key(1), 64, 16, 31, items=8, most=10, burst=4)
    assert jax.tree.structure(other) == jax.tree.structure(TASK)
    assert jax.tree.structure(dataclasses.replace(TASK, burst=2)) != jax.tree.structure(TASK)


def test_probabilities_may_be_integers_and_vectors_those_of_numpy():
    integers = {"bursty": 1, "novel": 1, "noise": 0, "label_noise": 0}
    task = dataclasses.replace(TASK, means=np.asarray(TASK.means), labels=np.asarray(TASK.labels), **integers)
    floats = dataclasses.replace(TASK, **{name: float(value) for name, value in integers.items()})
    np.testing.assert_array_equal(SAMPLE(task, jax.random.key(0), 4).x, SAMPLE(floats, jax.random.key(0), 4).x)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"burst": 3}, "burst is 3 for 8 items: need a divisor of it"),
        ({"most": 7}, "most must be at least 8, got 7"),
        ({"items": 0}, "items must be at least 1, got 0"),
        ({"bursty": 1.5}, r"bursty holds 1\.5: need numbers from 0 to 1"),
        ({"novel": -0.5}, r"novel holds -0\.5: need numbers from 0 to 1"),
        ({"label_noise": 2.0}, r"label_noise holds 2\.0: need numbers from 0 to 1"),
        ({"noise": -1.0}, r"noise holds -1\.0: need numbers from 0 on"),
        ({"labels": jnp.ones((4, 3))}, r"means has shape \(64, 31\) and labels \(4, 3\)"),
        ({"means": jnp.ones((1, 31)), "absent": True}, "means holds one class"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TASK, **changes)
