"""Facts in pieces: what a question reads of one piece is what the plain model reads, and groups are the pieces."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import parallel_context
from experiments.inside_smollm2 import loaded, nll
from experiments.parallel_context import CLAIMS, PLACES, QUICK
from jaxattn.claims import report
from jaxattn.core.attend import READER, SHARED, KeepGroups


@pytest.fixture(scope="module")
def got():
    return loaded(QUICK)


@pytest.fixture(scope="module")
def given(got):
    return parallel_context.facts(got, QUICK, np.random.default_rng(1))


def test_questions_repeat_facts_up_to_their_codes(given):
    text = [bytes(line.astype(np.uint8)).decode() for line in given.lines]
    for row in given.questions:
        question = bytes(row.astype(np.uint8)).decode()
        assert f"{question}.\n" in text
        assert question[-given.answer :].strip().isdigit()


def test_pieces_are_whole_facts_behind_the_prefix(given):
    tokens, ids = parallel_context.ids_of(given, 2, True)
    assert (ids[: len(given.prefix)] == SHARED).all()
    assert (ids[len(tokens) :] == READER).all()
    first = sum(map(len, given.lines[:2]))
    np.testing.assert_array_equal(
        ids[len(given.prefix) : len(tokens)], np.arange(len(tokens) - len(given.prefix)) >= first
    )


def test_one_piece_is_one_text_and_all_groups_kept_are_no_change(got, given):
    """The loss is that of one pass over the context and the question."""
    tokens, ids = map(jnp.asarray, parallel_context.ids_of(given, 1, False))
    questions, answer = jnp.asarray(given.questions), given.answer
    whole = [jnp.concatenate([tokens, question])[None] for question in questions]
    expected = np.mean([nll(got.model(text)[0], text)[0, -answer:] for text in whole])
    for apart in (True, False):
        state = parallel_context.encoded(got.model, tokens, ids, apart=apart)
        loss, right, entropy = parallel_context.asked(got.model, state, questions, answer, {})
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        keep = {"weights": KeepGroups(ids, 1, size=4)}
        kept = parallel_context.asked(got.model, state, questions, answer, keep)
        np.testing.assert_allclose(kept, (loss, right, entropy), rtol=1e-4)


def test_what_does_not_fit_is_refused(got):
    for changes, message in (
        ({"facts": 6}, r"facts is 6 for pieces \(1, 4\) and asked 2: need a multiple of all pieces"),
        ({"facts": 64}, "facts is 64: need at most"),
    ):
        with pytest.raises(ValueError, match=message):
            parallel_context.facts(got, dataclasses.replace(QUICK, **changes), np.random.default_rng(0))


def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("parallel_context")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert PLACES in [row["way"] for row in result.tables["Ways of reading"]]
