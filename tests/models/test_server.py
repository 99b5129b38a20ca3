"""Requests that share the rows of a server get what each would get alone, whenever they come and go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONTEXT, HYMBA, PLAIN, VOCABULARY, decoder, shared

from jaxattn import nn
from jaxattn.cache import HeavyHitters, Paged, Policy, Quantised
from jaxattn.models import Server, Spec, generate, pre_norm
from jaxattn.models import server as module

LENGTHS, NEW = np.array([5, 1, 3, 4, 2, 5, 4]), (6, 7, 1, 5, 7, 1, 3)  # more requests than rows, of all lengths
PROMPTS = np.random.default_rng(0).integers(0, VOCABULARY, (len(LENGTHS), max(LENGTHS)))
GREEDY = {"temperature": 0.0}


def served(server, options):
    """The results by number; a request comes every second step."""
    results, waiting, steps = {}, list(zip(PROMPTS, LENGTHS, NEW, options, strict=True)), 0
    while True:
        if waiting and steps % 2 == 0:
            prompt, length, new, given = waiting.pop(0)
            server.submit(prompt[:length], max_new_tokens=new, **given)
        busy = server.step()
        results |= server.results()
        steps += 1
        if not busy and not waiting:
            return results


@pytest.mark.parametrize(
    ("layers", "policy", "meta"),
    [
        (None, None, 0),
        (None, Policy(HeavyHitters(1, 2), 5), 0),
        (None, Policy(storage=Paged(2)), 0),
        (None, Policy(storage=Quantised(8, 2, 2)), 0),
        (HYMBA, None, 2),
    ],
    ids=["attention", "heavy hitters", "pool", "bits", "hymba"],
)
def test_each_request_gets_what_generate_gives_it_alone(layers, policy, meta):
    """With rings of windows, recurrences, evictions by head and meta tokens; and with end tokens, which come early."""
    model = shared() if layers is None else decoder(layers, meta_tokens=meta)
    alone = np.asarray(generate(model, PROMPTS, LENGTHS, max_new_tokens=7, temperature=0.0, store=policy).tokens)
    server, ends = Server(model, slots=3, store=policy), [None, *alone[1:4, 2].tolist(), None, None, alone[6, 0].item()]
    results = served(server, [GREEDY | {"end_token": end} for end in ends])
    assert sorted(results) == list(range(len(LENGTHS)))
    for number, (row, new, end) in enumerate(zip(alone, NEW, ends, strict=True)):
        stop = [*np.flatnonzero(row[:new] == end) + 1, new][0]
        np.testing.assert_array_equal(results[number].tokens, row[:stop])
        assert results[number].reason == ("end" if end in row[:new].tolist() else "length")
    assert {results[number].reason for number in results} == {"end", "length"}


def test_a_row_that_joins_brings_no_pool_for_the_others():
    server = Server(shared((PLAIN,)), slots=3, capacity=8, store=Policy(storage=Paged(2, 9)))
    server.submit(PROMPTS[0][:3], max_new_tokens=3, **GREEDY)
    assert server.step()
    row, all_rows = (
        state[0][0].held for state in (server._empty(), server._state)
    )  # each layer has its own, [1, pages, ..]
    assert (row["key"].shape[1], all_rows["key"].shape[1]) == (4, 9)
    assert (np.asarray(all_rows["table"][0]) >= 0).sum(-1).tolist() == [2, 0, 0]  # four tokens of the request


def test_rows_that_were_left_hold_nothing():
    server = Server(shared((PLAIN,)), slots=2)
    server.submit(PROMPTS[0], max_new_tokens=2, **GREEDY)
    server.submit(PROMPTS[1], max_new_tokens=5, **GREEDY)
    assert server.step()
    assert sorted(server.results()) == [0]
    assert server.results() == {}
    positions = np.asarray(server._state[0][0].positions[0, :, :, 0])
    assert (positions[0] == -1).all()
    assert positions[1].max() == 5


def test_drawn_tokens_are_those_of_generate_under_the_same_key_whatever_the_others_ask_for():
    model, length = shared((PLAIN,)), 5
    asked = [{"temperature": 1.0}, {"temperature": 2.0, "top_k": 3}, {"temperature": 0.0}, {"top_p": 0.6}]
    server = Server(model, slots=4)
    for number, options in enumerate(asked):
        server.submit(PROMPTS[number], max_new_tokens=6, key=jax.random.key(number), **options)
    while server.step():
        pass
    results = server.results()
    for number, options in enumerate(asked):
        given = {"top_k": VOCABULARY, "top_p": 1.0, "temperature": 1.0} | options  # one program
        alone = generate(
            model, PROMPTS[number : number + 1, :length], max_new_tokens=6, key=jax.random.key(number), **given
        )
        np.testing.assert_array_equal(results[number].tokens, alone.tokens[0])


def test_requests_come_and_go_without_a_compilation():
    server = Server(shared((PLAIN,)), slots=2)
    options = [{"temperature": 0.5, "key": jax.random.key(1)}, GREEDY, GREEDY | {"top_k": 2}] * 2 + [GREEDY]
    served(server, options)
    programs = [f._cache_size() for f in (module._advanced, module._admitted, module._freed, module._empty)]
    served(server, options[::-1])
    assert [f._cache_size() for f in (module._advanced, module._admitted, module._freed, module._empty)] == programs


def test_a_request_that_does_not_fit_is_refused_and_others_go_on():
    server = Server(shared((PLAIN,)), slots=1, capacity=8)
    server.submit(PROMPTS[0], max_new_tokens=3, **GREEDY)
    for prompt, options, message in (
        (PROMPTS[0], {"max_new_tokens": 4}, "prompt has 5 tokens and max_new_tokens is 4: need at most 8 together"),
        (PROMPTS[0], {"max_new_tokens": 1, "temperature": 1.0}, "key is None: need a random key"),
        (PROMPTS[:2], {"max_new_tokens": 1}, r"prompt has shape \(2, 5\): need tokens \[length\]"),
        ([1, 99], {"max_new_tokens": 1}, "prompts has tokens from 1 to 99: need 0 to 10"),
    ):
        with pytest.raises(ValueError, match=message):
            server.submit(prompt, **(GREEDY | options))
    while server.step():
        pass
    assert len(server.results()[0].tokens) == 3


def test_a_request_without_a_token_to_draw_fails_alone():
    """Token 7 has an embedding that is not a number, so that rows that read it have no logits."""
    model = decoder((PLAIN,), head=Spec(nn.Head, tied=False))
    model.embed.table[...] = model.embed.table[...].at[7].set(jnp.nan)
    server = Server(model, slots=2)
    server.submit([7, 1], max_new_tokens=4, **GREEDY)
    server.submit([1, 2], max_new_tokens=3, end_token=7, **GREEDY)
    while server.step():
        pass
    results = server.results()
    assert results[0].reason == "failed"
    assert len(results[0].tokens) == 0
    assert results[1].reason in ("end", "length")


def test_a_server_that_cannot_be_is_refused():
    cross = (pre_norm(Spec(nn.MultiHeadAttention, heads=2, keys_from="context", position=None)),)
    for make, error, message in (
        (lambda: Server(shared((PLAIN,)), slots=0), ValueError, "slots is 0: need at least 1"),
        (lambda: Server(shared((PLAIN,)), slots=2.0), TypeError, r"slots must be an int, got 2\.0"),
        (lambda: Server(shared((PLAIN,)), capacity=CONTEXT + 1), ValueError, "capacity is 13: need at least 1, and at"),
        (lambda: Server(decoder(cross)), ValueError, "model reads a context: need a decoder"),
        (lambda: Server(decoder((PLAIN,), causal=False)), ValueError, "model is not causal: need a decoder"),
    ):
        with pytest.raises(error, match=message):
            make()
