"""Retrieval heads: a planted one copies all of a needle, and uniform attention none of it."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from jaxattn.analysis import attention_influence, copy_hits, retrieval_scores, uniform_heads
from jaxattn.trace import run

# Hay of distinct tokens, the needle 1 2 3 behind a 9, and 9 again, behind which its values come once more.
TEXT = jnp.asarray([[5, 6, 7, 8, 9, 1, 2, 3, 10, 11, 9, 1, 2, 3], [5, 9, 1, 2, 3, 6, 7, 8, 10, 11, 9, 1, 2, 3]])
SPAN = jnp.asarray([np.isin(np.arange(14), [5, 6, 7]), np.isin(np.arange(14), [2, 3, 4])])
ANSWER = jnp.broadcast_to(jnp.arange(14) >= 11, (2, 14))


def test_a_planted_head_copies_every_token_of_the_needle():
    found = retrieval_scores(planted.planted(), TEXT, SPAN, ANSWER)
    assert found[1, 0] == 1  # induction: it looks at what is emitted next
    # The duplicate-token head looks at 9, 1, 2 while 1, 2, 3 are emitted; the others at places outside the needle.
    np.testing.assert_array_equal(found.at[1, 0].set(0), np.zeros((2, 4)))
    one = retrieval_scores(planted.planted(), TEXT, SPAN.at[0, 7].set(False), ANSWER)
    assert one[1, 0] == 1  # two of two, and three of three
    more = retrieval_scores(planted.planted(), TEXT, SPAN.at[0, 8].set(True), ANSWER)
    assert more[1, 0] == pytest.approx((3 / 4 + 1) / 2)
    assert retrieval_scores(planted.planted(), TEXT, SPAN, ANSWER, counts=jnp.array([True, False]))[1, 0] == 1
    assert np.isnan(retrieval_scores(planted.planted(), TEXT, SPAN, ANSWER, counts=jnp.zeros(2, bool))).all()


def test_scores_are_those_of_a_loop_over_rows_of_weights():
    model = planted.random(layers=2, heads=4, vocabulary=5)  # few tokens, so that some are hit by chance
    tokens = jax.random.randint(jax.random.key(0), (6, 12), 0, 5)
    span = jax.random.bernoulli(jax.random.key(1), 0.5, (6, 12)).at[:, 0].set(True)
    answer = jnp.broadcast_to(jnp.arange(12) >= 6, (6, 12))
    w = np.asarray(model(tokens, record=("weights",))[2]["weights"])  # [L, B, N, T, S]
    expected = np.zeros((2, 4))
    for layer, head in np.ndindex(2, 4):
        for row in range(6):
            hit = set()
            for i in range(5, 11):
                j = int(w[layer, row, head, i].argmax())
                if span[row, j] and tokens[row, j] == tokens[row, i + 1]:
                    hit.add(j)
            expected[layer, head] += len(hit) / float(span[row].sum()) / 6
    assert expected.max() > 0
    np.testing.assert_allclose(retrieval_scores(model, tokens, span, answer), expected, rtol=1e-5)


def test_a_row_that_sees_nothing_or_ties_is_no_copy():
    """Of equal weights the first key counts, so uniform attention never looks at a needle further on."""
    tokens, span = jnp.array([3, 4, 5]), jnp.array([False, True, True])
    hits = copy_hits(jnp.array([[-1], [0], [1]]), tokens, jnp.array([4, 3, 4]), span)
    np.testing.assert_array_equal(hits[:, 0], [False, False, True])
    zeros = planted.planted()
    kernel = zeros.runs[0].branches[0].module.query.kernel
    kernel[...] = 0 * kernel[...]
    np.testing.assert_array_equal(retrieval_scores(zeros, TEXT[:1], SPAN[:1], ANSWER[:1]), np.zeros((2, 4)))


def test_masked_heads_read_the_mean_of_the_values_so_far():
    model, tokens = planted.random(layers=2, heads=4), jnp.arange(9)[None]
    on = jnp.zeros((2, 4), bool).at[1, 2].set(True).at[0, 1].set(True)
    _, seen = run(model, tokens, record=("weights", "z", "v"), edits=uniform_heads(on, 9))
    _, plain = run(model, tokens, record=("weights",))
    equal = np.tril(np.ones((9, 9))) / np.arange(1, 10)[:, None]
    for layer, head in np.ndindex(2, 4):
        if on[layer, head]:
            np.testing.assert_allclose(seen["weights"][layer, 0, head], equal, atol=1e-6)
            mean = np.cumsum(np.asarray(seen["v"][layer, 0, :, head // 2]), 0) / np.arange(1, 10)[:, None]
            np.testing.assert_allclose(seen["z"][layer, 0, :, head], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen["weights"][0, 0, 0], plain["weights"][0, 0, 0])


def test_influence_is_relative_and_texts_without_repeats_have_none():
    np.testing.assert_allclose(attention_influence(jnp.array([2.0, 1.0]), jnp.array([3.0, 1.0])), [0.5, 0])
    base, other = jnp.array([0.7]), jnp.array([0.9])
    np.testing.assert_allclose(attention_influence(base / 3, other / 3), attention_influence(base, other), rtol=1e-6)
    assert np.isnan(attention_influence(jnp.zeros(1), jnp.ones(1))).all()
    model = planted.planted()
    on = jnp.zeros((2, 4), bool).at[1, 0].set(True)

    def losses(tokens, edits):
        logits = model(tokens, edits=edits)[0][:, :-1]
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[..., 0]
        return each[:, 8:].mean(-1)

    again = jnp.tile(jnp.arange(8), 2)[None]
    edits = uniform_heads(on, 16)
    found = attention_influence(losses(again, {}), losses(again, edits))
    assert found[0] > 0.5
    nothing = uniform_heads(jnp.zeros((2, 4), bool), 16)
    np.testing.assert_allclose(attention_influence(losses(again, {}), losses(again, nothing)), [0], atol=1e-6)


def test_texts_without_a_needle_are_refused():
    with pytest.raises(ValueError, match="span has a row without any token"):
        retrieval_scores(planted.planted(), TEXT, SPAN.at[1].set(False), ANSWER)
    with pytest.raises(ValueError, match="positions is given"):
        retrieval_scores(planted.planted(), TEXT, SPAN, ANSWER, positions=jnp.arange(14))
