"""generate does, in one compiled loop, what repeated passes over the whole sequence do."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONTEXT, EPS, FACTOR, PLAIN, VOCABULARY, decoder, run, shared, tokens

from jaxattn.models import generate
from jaxattn.models.generate import _generate

PROMPTS, LENGTHS, NEW = tokens(length=CONTEXT + 1), np.array([5, 1, 3]), 6  # padded beyond the context


@pytest.fixture(scope="module")
def model():
    return shared()


@pytest.fixture(scope="module")
def naive(model):
    """Greedy continuations of the three prompts, each by itself, by full passes; later tokens cannot matter."""
    continuations = []
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        sequence = np.zeros((1, CONTEXT), int)
        sequence[0, :length] = prompt[:length]
        for place in range(length, length + NEW):
            logits = np.asarray(run(model, sequence)[0])[0, place - 1]
            second, first = np.sort(logits)[-2:]
            assert first - second > 2 * FACTOR * EPS * abs(logits).max()  # no tie, within rounding
            sequence[0, place] = logits.argmax()
        continuations.append(sequence[0, length : length + NEW])
    return np.array(continuations)


def greedy(model, **options):
    given = {"lengths": LENGTHS, "max_new_tokens": NEW, "temperature": 0.0} | options
    generation = generate(model, PROMPTS, **given)
    return np.asarray(generation.tokens), np.asarray(generation.lengths)


def test_greedy_is_the_argmax_of_repeated_full_passes_over_each_prompt_alone(model, naive):
    new, lengths = greedy(model)
    np.testing.assert_array_equal(new, naive)
    np.testing.assert_array_equal(lengths, [NEW] * 3)
    assert len({tuple(row) for row in naive}) == 3  # the prompts matter


def test_what_stands_behind_a_prompt_does_not_matter(model, naive):
    other = np.where(np.arange(CONTEXT + 1) < LENGTHS[:, None], PROMPTS, -1)
    generation = generate(model, other, LENGTHS, max_new_tokens=NEW, temperature=0.0)
    np.testing.assert_array_equal(generation.tokens, naive)


def test_lengths_default_to_the_whole_prompt():
    model, prompts = shared((PLAIN,)), PROMPTS[:, :5]
    full = generate(model, prompts, np.array([5, 5, 5]), max_new_tokens=NEW, temperature=0.0)
    compiled = _generate._cache_size()
    np.testing.assert_array_equal(generate(model, prompts, max_new_tokens=NEW, temperature=0.0).tokens, full.tokens)
    assert _generate._cache_size() == compiled


@pytest.mark.parametrize("end_token", range(VOCABULARY))
def test_each_sequence_stops_behind_its_end_token(model, naive, end_token):
    new, lengths = greedy(model, end_token=end_token)
    for row, length, full in zip(new, lengths, naive, strict=True):
        ends = np.flatnonzero(full == end_token)
        stop = ends[0] + 1 if len(ends) else NEW
        assert length == stop
        np.testing.assert_array_equal(row, [*full[:stop], *[-1] * (NEW - stop)])


def test_the_end_tokens_above_cover_early_late_and_no_stops(naive):
    stops = [np.flatnonzero(row == end)[:1].tolist() for end in range(VOCABULARY) for row in naive]
    assert [] in stops
    assert sum(stop not in ([], [NEW - 1]) for stop in stops) >= 3


def test_the_loop_ends_when_every_sequence_has(monkeypatch):
    """Sampling is rigged to give the same token always, and counts how often it is called."""
    calls, model, prompts = [], shared((PLAIN,)), PROMPTS[:, :4]

    def rigged(logits, key, *settings):
        jax.debug.callback(lambda: calls.append(None))
        return jnp.full(logits.shape[:-1], 3, jnp.int32)

    monkeypatch.setattr(importlib.import_module("jaxattn.models.generate"), "sample", rigged)
    for end_token, expected in ((3, 1), (4, 7)):
        calls.clear()
        generation = generate(model, prompts, max_new_tokens=7, temperature=0.0, end_token=end_token)
        generation.tokens.block_until_ready()
        jax.effects_barrier()
        assert len(calls) == expected
        np.testing.assert_array_equal(generation.lengths, [expected] * 3)


def test_dropout_is_off_and_the_mode_of_the_model_stays(model, naive):
    model.train()
    try:
        new, _ = greedy(model)
        assert not model.runs[1].mixers[0].deterministic
    finally:
        model.eval()
    np.testing.assert_array_equal(new, naive)


def test_a_setting_changes_without_a_compilation(model):
    def draw(seed, temperature, top_k, top_p, end_token):
        key = jax.random.key(seed)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "end_token": end_token}
        return generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, key=key, **settings)

    draw(0, 0.7, 2, 0.5, None)
    compiled = _generate._cache_size()
    for settings in (
        (1, 1.3, 5, 0.9, 4),
        (2, 1, 3, 1, 0),
        (3, 0, 1, 0.1, None),
        (4, np.float32(2), np.int32(4), 0.3, 1),
    ):
        draw(*settings)
    assert _generate._cache_size() == compiled


def test_a_changed_parameter_is_used_without_a_compilation(model, naive):
    greedy(model)
    compiled = _generate._cache_size()
    other = decoder(seed=1)
    assert (greedy(other)[0] != naive).any()
    np.testing.assert_array_equal(greedy(model)[0], naive)
    assert _generate._cache_size() == compiled


def test_the_same_key_gives_the_same_tokens_and_every_step_and_row_draws_anew(model):
    """So hot that every token is as likely as any other: 6 equal ones in a row have probability 11⁻⁵."""

    def draw(seed):
        settings = {"temperature": 1e6, "top_k": VOCABULARY, "top_p": 1.0}
        key = jax.random.key(seed)
        return np.asarray(generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, key=key, **settings).tokens)

    one = draw(0)
    np.testing.assert_array_equal(draw(0), one)
    assert (draw(1) != one).any()
    assert all(len(set(row)) > 1 for row in one.tolist())
    assert len({tuple(row) for row in one.tolist()}) == 3
    assert ((one >= 0) & (one < VOCABULARY)).all()


def test_top_k_1_is_greedy(model, naive):
    settings = {"temperature": 1.5, "top_k": 1, "top_p": 1.0}
    generation = generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, key=jax.random.key(0), **settings)
    np.testing.assert_array_equal(generation.tokens, naive)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (np.zeros((1, 13), int), {}, "prompts has 13 tokens: no room for new ones in the model's length of 12"),
        (np.zeros((1, 5), int), {"max_new_tokens": 8}, "max_new_tokens is 8 after a prompt of 5: need 1 to 7"),
        (np.zeros((1, 5), int), {"max_new_tokens": 0}, "max_new_tokens is 0 after a prompt of 5: need 1 to 7"),
        (np.zeros((1, 0), int), {}, r"prompts must be integers \[batch, length\], not empty, got int32\(1, 0\)"),
        (np.zeros((0, 3), int), {}, "prompts must be integers"),
        (np.zeros(3, int), {}, r"prompts must be integers .* got int32\(3,\)"),
        (np.zeros((1, 3)), {}, "prompts must be integers .* got float32"),
        (np.array([[0, 3, 11]]), {}, "prompts has tokens from 0 to 11: need 0 to 10"),
        (np.array([[7, -1, 3]]), {}, "prompts has tokens from -1 to 7: need 0 to 10"),
        (np.zeros((2, 3), int), {"lengths": np.array([3, 4])}, r"lengths must be 2 numbers from 1 to 3, got \[3, 4\]"),
        (np.zeros((2, 3), int), {"lengths": np.array([3, 0])}, r"lengths must be 2 numbers from 1 to 3, got \[3, 0\]"),
        (np.zeros((2, 3), int), {"lengths": np.array([3])}, r"lengths must be 2 numbers from 1 to 3, got \[3\]"),
        (
            np.zeros((2, 3), int),
            {"lengths": np.array([2.0, 3.0])},
            r"lengths must be 2 numbers from 1 to 3, got \[2\.0",
        ),
        (np.zeros((1, 3), int), {"temperature": -1.0}, r"need temperature >= 0, .* got -1\.0, None and None"),
        (np.zeros((1, 3), int), {"temperature": float("nan")}, "need temperature >= 0, .* got nan, None and None"),
        (np.zeros((1, 3), int), {"top_k": 0}, r"need .* top_k >= 1 .* got 1\.0, 0 and None"),
        (np.zeros((1, 3), int), {"top_p": 0.0}, r"need .* 0 < top_p <= 1, got 1\.0, None and 0\.0"),
        (np.zeros((1, 3), int), {"top_p": 1.5}, r"need .* 0 < top_p <= 1, got 1\.0, None and 1\.5"),
        (np.zeros((1, 3), int), {"end_token": 11}, "end_token is 11: need one from 0 to 10, or None"),
        (np.zeros((1, 3), int), {"end_token": -1}, "end_token is -1: need one from 0 to 10, or None"),
        ([[1, 2], [3]], {}, "prompts is ragged, or holds what is no integer: need integers"),
        ([["a", "b"]], {}, "prompts is ragged, or holds what is no integer: need integers"),
        ([[1.5, 2]], {}, "prompts must be integers .* got float32"),
        (np.zeros((1, 3), int), {"key": None}, "key is None: need a random key unless temperature is 0"),
    ],
)
def test_calls_that_make_no_sense_are_refused(model, prompts, options, message):
    options = {"max_new_tokens": 2, "temperature": 1.0, "key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **options)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("To be", {}, "prompts is text, 'To be': need integers"),
        (b"To be", {}, "prompts is text, b'To be': need integers"),
        ([[1, 2]], {"max_new_tokens": 2.5}, r"max_new_tokens must be an int, got 2\.5"),
        ([[1, 2]], {"max_new_tokens": 2.0}, r"max_new_tokens must be an int, got 2\.0"),
        ([[1, 2]], {"max_new_tokens": True}, "max_new_tokens must be an int, got True"),
        ([[1, 2]], {"key": 0}, r"key must be a random key such as jax\.random\.key\(0\), got 0"),
        ([[1, 2]], {"key": jnp.zeros(3)}, r"key must be a random key such as jax\.random\.key\(0\)"),
        ([[1, 2]], {"top_k": 2.5}, r"top_k must be an int, got 2\.5"),
        ([[1, 2]], {"end_token": 2.0}, r"end_token must be an int, got 2\.0"),
    ],
)
def test_what_is_of_another_type_is_named(model, prompts, options, message):
    options = {"max_new_tokens": 2, "key": jax.random.key(0)} | options
    with pytest.raises(TypeError, match=message):
        generate(model, prompts, **options)


def test_integers_of_numpy_lists_and_raw_keys_are_taken(model):
    settings = {"max_new_tokens": np.int64(NEW), "end_token": np.int32(VOCABULARY - 1), "top_k": np.int64(1)}
    new = generate(model, PROMPTS.tolist(), LENGTHS.tolist(), key=jax.random.PRNGKey(0), **settings)
    np.testing.assert_array_equal(new.tokens, greedy(model, end_token=VOCABULARY - 1)[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_without_finite_parameters_generates_no_token(temperature):
    broken = decoder((PLAIN,))
    broken.norm.scale[...] = broken.norm.scale[...].at[0].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="no token can be drawn after 0 new tokens of prompt 0: the logits"):
        generate(broken, PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=temperature, key=jax.random.key(0))
