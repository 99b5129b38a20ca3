"""Beam search finds what a search of all texts finds, where the beams are enough for it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import EPS, PLAIN, VOCABULARY, decoder, shared, tokens

from jaxattn.cache import Policy, Recent
from jaxattn.models import Transformer, TransformerConfig, beam_search, generate

V, DEPTH, END = 3, 3, 2
PROMPTS, LENGTHS = np.array([[0, 1, 2, 1], [2, 0, 0, 0], [1, 1, 0, 0]]), np.array([4, 1, 3])


@pytest.fixture(scope="module")
def small():
    model = Transformer(TransformerConfig(V, 8, 16, (PLAIN, PLAIN)), rngs=nnx.Rngs(3))
    rng = np.random.default_rng(0)
    nnx.update(
        model,
        jax.tree.map(lambda x: x + 0.4 * rng.standard_normal(x.shape).astype(np.float32), nnx.state(model, nnx.Param)),
    )
    return model


def by_all_texts(model, prompt, penalty, end):
    """{text: log p / length^α} of every continuation, from full passes over the whole of each, in float64."""
    texts = np.array(list(itertools.product(range(V), repeat=DEPTH)))
    whole = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], 1)
    logits = np.asarray(nnx.jit(lambda m, x: m(x)[0])(model, jnp.asarray(whole)), np.float64)[:, len(prompt) - 1 : -1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scores = {}
    for text, each in zip(texts.tolist(), logp, strict=True):
        length = text.index(end) + 1 if end in text else DEPTH
        scores[tuple(text[:length])] = sum(each[i, text[i]] for i in range(length)) / length**penalty
    return scores


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_enough_beams_find_all_texts_in_order(small, end, penalty):
    """Also texts that end early, which compete with longer ones; beams that are too many hold none."""
    beams = V**DEPTH
    options = {"max_new_tokens": DEPTH, "length_penalty": penalty, "end_token": end}
    found = beam_search(small, PROMPTS, LENGTHS, beams=beams, **options)
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        expected = by_all_texts(small, prompt[:length], penalty, end)
        count = len(expected)
        texts = [tuple(x[x >= 0].tolist()) for x in np.asarray(found.tokens[b])]
        assert set(texts[:count]) == set(expected)
        assert texts[count:] == [()] * (beams - count)
        np.testing.assert_array_equal(found.lengths[b], [len(x) for x in texts])
        tolerance = 200 * EPS * max(1, max(map(abs, expected.values())))
        np.testing.assert_allclose(found.scores[b, :count], [expected[x] for x in texts[:count]], atol=tolerance)
        np.testing.assert_allclose(found.scores[b, :count], sorted(expected.values(), reverse=True), atol=tolerance)


def test_two_beams_are_those_of_a_search_by_hand(small):
    """The best two of all continuations of the best two, by full passes; not the two best of all texts."""
    found = beam_search(small, PROMPTS, LENGTHS, beams=2, max_new_tokens=DEPTH)
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        held = {(): 0.0}
        for _ in range(DEPTH):
            more = {}
            for text, score in held.items():
                logits = np.asarray(small(jnp.array([[*prompt[:length], *text]]))[0][0, -1], np.float64)
                logp = logits - np.log(np.exp(logits).sum())
                more |= {(*text, v): score + logp[v] for v in range(V)}
            held = dict(sorted(more.items(), key=lambda pair: -pair[1])[:2])
        assert [tuple(x) for x in np.asarray(found.tokens[b]).tolist()] == list(held)


@pytest.mark.parametrize("policy", [None, Policy(Recent(1), 4)], ids=["all", "evicting"])
def test_one_beam_is_greedy(policy):
    prompts, lengths = tokens(length=5), np.array([5, 1, 3])
    options = {"max_new_tokens": 6, "end_token": 4, "store": policy}
    plain = generate(shared(), prompts, lengths, temperature=0.0, **options)
    found = beam_search(shared(), prompts, lengths, beams=1, length_penalty=0.7, **options)
    np.testing.assert_array_equal(found.tokens[:, 0], plain.tokens)
    np.testing.assert_array_equal(found.lengths[:, 0], plain.lengths)


def test_searches_that_make_no_sense_are_refused(small):
    for options, error, message in (
        ({"beams": 0}, ValueError, "beams is 0: need at least 1"),
        ({"beams": 2.0}, TypeError, r"beams must be an int, got 2\.0"),
        ({"length_penalty": float("nan")}, ValueError, "length_penalty must be a finite number, got nan"),
        ({"length_penalty": "long"}, TypeError, "length_penalty must be a finite number, got 'long'"),
        ({"end_token": VOCABULARY}, ValueError, "end_token is 11: need one from 0 to 2"),
        ({"max_new_tokens": 9}, ValueError, "max_new_tokens is 9 after a prompt of 4"),
    ):
        with pytest.raises(error, match=message):
            beam_search(small, PROMPTS, LENGTHS, **({"beams": 2, "max_new_tokens": 2} | options))


def test_a_model_without_finite_parameters_finds_nothing():
    broken = decoder((PLAIN,))
    broken.norm.scale[...] = broken.norm.scale[...].at[0].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="no token can be drawn after"):
        beam_search(broken, tokens(length=4), beams=2, max_new_tokens=2)
