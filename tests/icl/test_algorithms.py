"""Tasks with an algorithm are what they say, against loops in Python, and their predictors are always right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl
from jaxattn.train import drawn as source

FORMATS = ("direct", "scratchpad", "interleaved", "mnemonic")
ADDITION = icl.ModularAddition(7, share=0.3)
SORTING = icl.Sorting(letters=4, string=6)
PAIRS = {
    "addition": (ADDITION, icl.AddModulo(7)),
    "addition, held out": (dataclasses.replace(ADDITION, held_out=True), icl.AddModulo(7)),
    "addition mod 2": (icl.ModularAddition(2), icl.AddModulo(2)),
    **{name: (icl.BitParity(name, 1, 6, 9 if name == "mnemonic" else 0), icl.ParityRule(name)) for name in FORMATS},
    "one bit": (icl.BitParity("scratchpad", 1, 1), icl.ParityRule("scratchpad")),
    "as many anchors as bits": (icl.BitParity("mnemonic", 5, 5, 5), icl.ParityRule("mnemonic")),
    "histogram": (icl.Histogram(4, 9), icl.Tally()),
    "whole histogram": (icl.Histogram(4, 9, causal=False), icl.Tally(causal=False)),
    "one letter": (icl.Histogram(1, 5), icl.Tally()),
    "sorting": (SORTING, icl.CountingSort(4, 6)),
    "sorting one letter": (icl.Sorting(3, 1), icl.CountingSort(3, 1)),
    "brackets": (icl.Dyck(3, 4, 30), icl.BracketMatching(3)),
    "brackets of one kind": (icl.Dyck(1, 1, 8), icl.BracketMatching(1)),
    "shallow brackets": (icl.Dyck(5, 1, 9), icl.BracketMatching(5)),
}


SAMPLE = jax.jit(lambda task, key, batch: task.sample(key, batch), static_argnums=2)


def drawn(task, batch=300, seed=0):
    return jax.tree.map(np.asarray, SAMPLE(task, jax.random.key(seed), batch))


def right(prompt, answers):
    return (np.asarray(answers) == prompt.y)[prompt.weights > 0]


@pytest.mark.parametrize("name", PAIRS)
def test_a_task_has_its_shape_and_its_algorithm_is_always_right(name):
    task, predictor = PAIRS[name]
    prompt = drawn(task)
    for each in (prompt.x, prompt.y, prompt.weights, prompt.clean):
        assert each.shape == (300, task.length)
    assert prompt.x.min() >= 0
    assert max(prompt.x.max(), prompt.y.max()) < task.vocabulary
    assert (prompt.weights.sum(-1) >= (0 if "brackets" in name else 1)).all()
    assert right(prompt, predictor(prompt.x, np.zeros_like(prompt.y))).all()
    assert source(task).length == task.length


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "whole histogram"])
def test_algorithms_do_not_look_ahead(name):
    """Tokens after a place where an answer counts may be anything."""
    task, predictor = PAIRS[name]
    prompt = drawn(task, 40)
    other = drawn(task, 40, seed=1)
    answers = jax.jit(predictor)
    for place in range(task.length):
        x = np.where(np.arange(task.length) <= place, prompt.x, other.x)
        counts = prompt.weights[:, place] > 0
        assert (np.asarray(answers(x, prompt.y))[counts, place] == prompt.y[counts, place]).all()


# Modular addition.


def test_the_two_sides_of_the_split_are_all_pairs_once():
    held_out = dataclasses.replace(ADDITION, held_out=True)
    train, test = ADDITION.pairs(), held_out.pairs()
    assert len(train) == round(0.3 * 49)
    assert sorted(map(tuple, np.concatenate([train, test]))) == [(a, b) for a in range(7) for b in range(7)]
    np.testing.assert_array_equal(train, icl.ModularAddition(7, share=0.3).pairs())
    assert not np.array_equal(train, icl.ModularAddition(7, share=0.3, seed=1).pairs())
    every = ADDITION.every()
    np.testing.assert_array_equal(every.x[:, :2], train)
    np.testing.assert_array_equal(every.y[:, 2], [(a + b) % 7 for a, b in train])


def test_prompts_are_drawn_from_one_side_evenly():
    prompt = drawn(ADDITION, 6000)
    counts = np.zeros((7, 7))
    np.add.at(counts, (prompt.x[:, 0], prompt.x[:, 1]), 1)
    train = ADDITION.pairs()
    share = counts[train[:, 0], train[:, 1]] / 6000
    assert counts.sum() == 6000 == counts[train[:, 0], train[:, 1]].sum()
    chance = 1 / len(train)
    assert (abs(share - chance) < 4 * (chance * (1 - chance) / 6000) ** 0.5).all()
    assert (prompt.x[:, 2] == 7).all()


# Parity.


def written(name, bits, marks):
    """(tokens, answers where they count) of a format, by a loop."""
    sums = [sum(bits[: i + 1]) % 2 for i in range(len(bits))]
    pairs = [each for pair in zip(marks, bits, strict=True) for each in pair]
    match name:
        case "direct":
            x, asked = [2, *bits, 3], {len(bits) + 1: sums[-1]}
        case "scratchpad":
            x = [2, *bits, 3, *sums[:-1]]
            asked = {len(bits) + 1 + i: p for i, p in enumerate(sums)}
        case "interleaved":
            x = [2, *[each for pair in zip(bits, sums, strict=True) for each in pair][:-1]]
            asked = {1 + 2 * i: p for i, p in enumerate(sums)}
        case _:
            x = [2, *pairs, 3, *[each for pair in zip(marks, sums, strict=True) for each in pair][:-1]]
            asked = {2 * len(bits) + 2 + 2 * i: p for i, p in enumerate(sums)}
    return x, asked


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_are_written_as_they_are_defined(name):
    task = PAIRS[name][0]
    prompt = drawn(task)
    seen = set()
    for x, y, weights, count in zip(prompt.x, prompt.y, prompt.weights, prompt.hidden, strict=True):
        seen.add(int(count))
        if name == "mnemonic":
            pairs = x[1 : 2 * count + 1].reshape(-1, 2)
            marks, bits = pairs.T.tolist()
            assert len(set(marks)) == count
            assert 5 <= min(marks) <= max(marks) < task.vocabulary
        else:
            bits = x[1 : 2 * count : 2].tolist() if name == "interleaved" else x[1 : count + 1].tolist()
            marks = [0] * count
        assert set(bits) <= {0, 1}
        expected, asked = written(name, bits, marks)
        assert x.tolist() == expected + [4] * (task.length - len(expected))
        assert np.flatnonzero(weights).tolist() == list(asked)
        assert y[weights > 0].tolist() == list(asked.values())
    assert seen == set(range(1, 7))
    assert task.with_bits(4).length == len(written(name, [0] * 4, [5, 6, 7, 8])[0])


def test_bits_are_fair():
    bits = drawn(icl.BitParity("direct", 8, 8), 4000).x[:, 1:9]
    assert abs(bits.mean() - 0.5) < 4 * 0.5 / 32000**0.5


# Sorting, brackets.


def test_a_string_is_sorted_after_its_mark():
    prompt = drawn(SORTING)
    for x, y in zip(prompt.x, prompt.y, strict=True):
        assert y[6:].tolist() == sorted(x[:6].tolist())
        assert x[6] == 4
        assert x[7:].tolist() == y[6:-1].tolist()


def test_a_histogram_counts():
    for causal in (True, False):
        prompt = drawn(icl.Histogram(4, 9, causal))
        assert (prompt.x[:, 0] == 4).all()
        assert not prompt.weights[:, 0].any()
        for x, y in zip(prompt.x, prompt.y, strict=True):
            for place in range(1, 10):
                assert y[place] == list(x[1 : place + 1] if causal else x[1:]).count(x[place])


def test_brackets_match_and_stay_within_their_depth():
    kinds, most = 3, 2
    prompt = drawn(icl.Dyck(kinds, most, 40))
    deepest, moves = 0, []
    for x, y, weights, depths in zip(prompt.x, prompt.y, prompt.weights, prompt.hidden, strict=True):
        assert x.tolist() == [2 * kinds, *y[:-1].tolist()]
        stack = []
        for token, counts, depth in zip(y, weights, depths, strict=True):
            assert depth == len(stack)
            assert counts == (token >= kinds)
            if 0 < len(stack) < most:
                moves.append(token < kinds)
            if token < kinds:
                stack.append(token)
            else:
                assert token - kinds == stack.pop()
            deepest = max(deepest, len(stack))
    assert deepest == most
    assert abs(np.mean(moves) - 0.5) < 4 * 0.5 / len(moves) ** 0.5
    opened = prompt.y[prompt.y < kinds]
    share = np.bincount(opened) / len(opened)
    assert (abs(share - 1 / 3) < 4 * (2 / 9 / len(opened)) ** 0.5).all()


# Reading one's own answers.


@pytest.mark.parametrize("name", [*FORMATS, "sorting", "histogram"])
def test_who_is_always_right_stays_right_when_reading_its_own_answers(name):
    task, predictor = PAIRS[name]
    prompt = drawn(task, 50)
    assert right(prompt, icl.answered_freely(predictor, prompt)).all()


@pytest.mark.parametrize("name", ["scratchpad", "interleaved", "mnemonic"])
def test_one_wrong_step_turns_all_that_follow(name):
    """Who says 1 − p at the first step is wrong at this step alone if shown p, and at all if not."""
    task, rule = PAIRS[name]
    prompt = drawn(task.with_bits(5), 50)
    first = int(np.flatnonzero(prompt.weights[0])[0])

    def wrong(x, y):
        said = rule(x, y)
        return said.at[:, first].set(1 - said[:, first])

    assert right(prompt, wrong(prompt.x, prompt.y)).mean() == pytest.approx(4 / 5)
    assert right(prompt, icl.answered_freely(wrong, prompt)).mean() == 0


def test_answers_that_are_not_read_again_change_nothing():
    """In associative recall a value does not stand after its query, nor in a prompt of one place after anything."""
    task = icl.AssociativeRecall(pairs=3, length=16, keys=5, values=4)
    prompt = drawn(task, 20)
    np.testing.assert_array_equal(
        icl.answered_freely(icl.Lookup(), prompt), np.asarray(icl.Lookup()(prompt.x, prompt.y))
    )


def test_errors_name_the_argument():
    for call, message in (
        (lambda: icl.ModularAddition(1), "modulus must be at least 2, got 1"),
        (lambda: icl.ModularAddition(5, share=0.0), "share is 0.0 of 25 pairs"),
        (lambda: icl.ModularAddition(5, share=1.0), "share is 1.0 of 25 pairs"),
        (lambda: icl.BitParity("scratch", 1, 2), "format is 'scratch': need one of direct, scratchpad"),
        (lambda: icl.BitParity("direct", 0, 2), "shortest must be at least 1"),
        (lambda: icl.BitParity("direct", 3, 2), "longest must be at least 3, got 2"),
        (lambda: icl.BitParity("mnemonic", 1, 6, 5), "anchors must be at least 6, got 5"),
        (lambda: icl.BitParity("direct", 1, 6, 5), "anchors is 5 in the format 'direct': need 0"),
        (lambda: icl.Histogram(0, 3), "letters must be at least 1"),
        (lambda: icl.Sorting(3, 0), "string must be at least 1"),
        (lambda: icl.Dyck(2, 0, 5), "depth must be at least 1"),
        (lambda: icl.Dyck(2, 2, 1), "length must be at least 2"),
        (
            lambda: icl.answered_freely(icl.Lookup(), icl.Prompt(*(jnp.zeros((2, 3)),) * 4)),
            "need tokens, integers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="modulus must be an int"):
        icl.ModularAddition(5.0)
