"""Simultaneous translation: what is written when, against the rule by hand and against offline translation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import nn
from jaxattn.models import (
    Branch,
    EDAtt,
    EncoderDecoder,
    Layer,
    Spec,
    TransformerConfig,
    WaitK,
    average_lagging,
    first_crossing,
    generate,
    pre_norm,
    simultaneous,
)

V, S, M, B, CHUNK = 9, 12, 6, 3, 4
ATTENTION, BLOCK = Spec(nn.MultiHeadAttention, heads=2), Spec(nn.FeedForward, hidden=16)
CROSS = Branch(Spec(nn.MultiHeadAttention, heads=2, position=None, keys_from="context"), name="cross")
ENCODER = TransformerConfig(V, S, 16, [pre_norm(ATTENTION, BLOCK)], causal=False, head=None)
DECODER = TransformerConfig(V, 16, 16, [Layer([Branch(ATTENTION), CROSS, Branch(BLOCK)])] * 2)
SOURCE = np.random.default_rng(1).integers(0, V, (B, S))
OPTIONS = {"chunk": CHUNK, "max_new_tokens": M, "ahead": 4}


@pytest.fixture(scope="module")
def model():
    both = EncoderDecoder(ENCODER, DECODER, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda x: x + 0.5 * rng.standard_normal(x.shape).astype(np.float32), nnx.state(both, nnx.Param)
    )
    nnx.update(both, noisy)
    return both


def context_of(model, frames):
    positions = np.where(np.arange(S) < frames, np.arange(S), -1)[None].repeat(B, 0)
    return model.encode(SOURCE, positions=jnp.asarray(positions))[0]


def offline(model, frames, end_token=None):
    options = {"max_new_tokens": M, "temperature": 0.0, "end_token": end_token, "context": context_of(model, frames)}
    return np.asarray(generate(model.decoder, np.zeros((B, 1), int), **options).tokens)


@pytest.fixture(scope="module")
def masses(model):
    """{frames: (tokens, A summed over the last 2 of frames but the last)}, from one full pass over the offline text."""
    found = {}
    for frames in (CHUNK, 2 * CHUNK):
        text = offline(model, frames)
        whole = np.concatenate([np.zeros((B, 1), int), text[:, :-1]], 1)
        _, _, records = model.decoder(
            jnp.asarray(whole), context=context_of(model, frames), record={"w": ("cross.weights", nn.Whole())}
        )
        weights = np.asarray(records["w"])[-1].mean(1)  # [B, M, S], row j predicts token j
        np.testing.assert_allclose(weights[:, :, frames:], 0)
        found[frames] = text, weights[:, :, frames - 3 : frames - 1].sum(-1)
    return found


def test_the_first_crossing_is_found_by_counting():
    rng = np.random.default_rng(0)
    mass = rng.random((20, 5))
    mass[0] = 0.5  # a tie crosses
    for alpha in (0.0, 0.5, 0.9, 2.0):
        expected = [next((j for j, x in enumerate(row) if x >= alpha), 5) for row in mass]
        np.testing.assert_array_equal(first_crossing(jnp.asarray(mass), alpha), expected)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_what_is_written_after_the_first_chunk_is_what_stands_before_the_first_crossing(model, masses, quantile):
    """In each row by itself; a larger α writes no less."""
    text, mass = masses[CHUNK]
    alpha = float(np.quantile(mass, quantile)) + 1e-6
    got = simultaneous(model, SOURCE, [0], EDAtt(alpha), **OPTIONS)
    for b in range(B):
        count = next((j for j, x in enumerate(mass[b]) if x >= alpha), M)
        early = np.asarray(got.read[b]) == CHUNK
        assert early.sum() == count
        np.testing.assert_array_equal(got.tokens[b, :count], text[b, :count])
    np.testing.assert_array_equal(got.lengths, [M] * B)


def test_the_limits_are_offline_translation_of_the_whole_and_of_the_first_chunk(model):
    never = simultaneous(model, SOURCE, [0], EDAtt(0.0), **OPTIONS)
    np.testing.assert_array_equal(never.tokens, offline(model, S))
    np.testing.assert_array_equal(never.read, np.full((B, M), S))
    always = simultaneous(model, SOURCE, [0], EDAtt(1.1), **OPTIONS)
    np.testing.assert_array_equal(always.tokens, offline(model, CHUNK))
    np.testing.assert_array_equal(always.read, np.full((B, M), CHUNK))


def test_uniform_attention_puts_the_share_of_the_frames_on_the_newest(model):
    """2 of 4 after the first chunk: just above, everything is written, and at it nothing before the mass is 2 of 8."""
    even = nnx.merge(*nnx.split(model))
    for mixer in even.decoder.runs[0].mixers:
        if mixer.keys_from == "context":
            mixer.query.kernel[...] = jnp.zeros_like(mixer.query.kernel[...])
    for alpha, first in ((0.501, CHUNK), (0.499, 2 * CHUNK), (0.251, 2 * CHUNK), (0.249, 3 * CHUNK)):
        assert (simultaneous(even, SOURCE, [0], EDAtt(alpha), **OPTIONS).read == first).all()


def test_an_end_is_written_only_after_the_whole_source_also_where_rows_end_earlier(model):
    end = int(offline(model, CHUNK)[0, 1])
    lengths = np.array([S, CHUNK, 2 * CHUNK])
    got = simultaneous(model, SOURCE, [0], EDAtt(1.1), lengths=lengths, end_token=end, **OPTIONS)
    for b in range(B):
        row = np.asarray(got.tokens[b])[: int(got.lengths[b])]
        assert (row[:-1] != end).all()
        if row[-1] == end:
            assert got.read[b, len(row) - 1] == lengths[b]
        else:
            assert len(row) == M
    np.testing.assert_array_equal(got.tokens[1], offline(model, CHUNK, end)[1])  # all of this row was there at once


def test_wait_k_writes_one_token_for_each_chunk_behind_the_first_k(model):
    got = simultaneous(model, SOURCE, [0], WaitK(2), chunk=2, max_new_tokens=M, ahead=4)
    np.testing.assert_array_equal(got.read, np.minimum(2 * (2 + np.arange(M)), S)[None].repeat(B, 0))
    np.testing.assert_array_equal(got.tokens[:, 0], offline(model, 4)[:, 0])


def test_the_lag_of_wait_k_is_k_and_that_of_offline_translation_the_source():
    x = np.arange(8)
    read = np.stack([np.minimum(3 + x, 8), np.full(8, 8), np.where(x < 4, 2 * x + 2, -1)])
    np.testing.assert_allclose(average_lagging(read, np.array([8, 8, 4]), np.array([8, 8, 8])), [3, 8, 2])


def test_calls_that_make_no_sense_are_refused(model):
    for policy, options, error, message in (
        (0.1, {}, TypeError, "policy must be a WritePolicy such as EDAtt"),
        (EDAtt(0.1), {"chunk": 0}, ValueError, "chunk is 0: need at least 1"),
        (EDAtt(0.1), {"ahead": 16}, ValueError, "max_new_tokens is 6 and ahead 16: need at most 16 together"),
        (EDAtt(0.1), {"lengths": [1, 2]}, ValueError, r"lengths are \[1, 2\]: need tokens \[P\], and 3 numbers"),
    ):
        with pytest.raises(error, match=message):
            simultaneous(model, SOURCE, [0], policy, **(OPTIONS | options))
    with pytest.raises(ValueError, match="EDAtt: frames must be at least 1, got 0"):
        EDAtt(0.1, frames=0)
    with pytest.raises(ValueError, match="EDAtt: alpha holds nan"):
        EDAtt(float("nan"))
