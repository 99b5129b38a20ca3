"""generate under edits, records, processors and several runs is what repeated full passes do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import HEADS, PLAIN, VOCABULARY, WIDTH, assert_close, decoder, tokens

from jaxattn import Entropy, KeyBias, part
from jaxattn.cache import HeavyHitters, Policy, Recent
from jaxattn.models import Combine, Contrast, MinimumLength, Processor, RepetitionPenalty, generate
from jaxattn.trace import Add, Layers, OnlyAt, Scale

B, P, NEW, L = 2, 5, 4, 2
PROMPTS, LENGTHS = tokens(B, P), np.array([5, 3])
RNG = np.random.default_rng(3)
EDITS = {
    "z": {1: Add(jnp.asarray(RNG.standard_normal((HEADS, WIDTH // HEADS)), jnp.float32))},
    "scores": Layers(KeyBias(jnp.asarray(3 * RNG.standard_normal((L, HEADS, P + NEW)), jnp.float32))),
    "resid": OnlyAt(Scale(0.3), jnp.array([2, 6])),
}
RECORD = {"entropy": ("weights", Entropy()), "z": "z"}


@pytest.fixture(scope="module")
def model():
    return decoder((PLAIN, PLAIN))


@pytest.fixture(scope="module")
def full(model):
    """edits -> (logits, records) of rows of P + NEW tokens, one program per structure."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, rows, edits: nnx.merge(graph, state)(rows, edits=edits, record=RECORD)[::2])
    return lambda rows, edits: compiled(state, rows, edits)


def by_full_passes(choose):
    """Rows that grow by choose(rows, place of the last token of each) [B]."""
    rows = np.zeros((B, P + NEW), int)
    for row, length in enumerate(LENGTHS):
        rows[row, :length] = PROMPTS[row, :length]
    for step in range(NEW):
        last = LENGTHS + step - 1
        rows[np.arange(B), last + 1] = np.asarray(choose(rows, last))
    return rows


def at(logits, last):
    return np.asarray(logits)[np.arange(B), last]


def new(rows):
    return np.stack([rows[row, length : length + NEW] for row, length in enumerate(LENGTHS)])


def test_edits_act_on_prompts_and_on_new_tokens(model, full):
    rows = by_full_passes(lambda rows, last: at(full(rows, EDITS)[0], last).argmax(-1))
    options = {"max_new_tokens": NEW, "temperature": 0.0}
    made = generate(model, PROMPTS, LENGTHS, edits=EDITS, record=RECORD, **options)
    np.testing.assert_array_equal(made.tokens, new(rows))
    assert (np.asarray(generate(model, PROMPTS, LENGTHS, **options).tokens) != new(rows)).any()
    _, records = full(rows, EDITS)
    for row, length in enumerate(LENGTHS):
        for step in range(NEW):
            assert_close(made.records["z"][step, :, row, 0], records["z"][:, row, length + step], 2000)
            assert_close(made.records["entropy"][step, :, row, 0], records["entropy"][:, row, length + step], 2000)
        assert_close(made.prompt_records["z"][:, row, :length], records["z"][:, row, :length], 2000)


def test_processors_see_the_tokens_so_far_in_order(model, full):
    theta, least, end = 3.0, 7, 4

    def choose(rows, last):
        logits = at(full(rows, {})[0], last).copy()
        for row in range(B):
            for token in set(rows[row, : last[row] + 1]):
                logits[row, token] *= 1 / theta if logits[row, token] > 0 else theta
            if last[row] + 1 < least:
                logits[row, end] = -np.inf
        return logits.argmax(-1)

    processors = (RepetitionPenalty(theta), MinimumLength(end, least))
    made = generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=0.0, processors=processors)
    np.testing.assert_array_equal(made.tokens, new(by_full_passes(choose)))


def test_runs_advance_by_the_same_token(model, full):
    alpha, beta = 0.7, 0.05

    def choose(rows, last):
        first, second = (jax.nn.log_softmax(at(full(rows, edits)[0], last)) for edits in ({}, EDITS))
        likely = np.exp(first) >= beta * np.exp(first).max(-1, keepdims=True)
        return np.where(likely, (1 + alpha) * first - alpha * second, -np.inf).argmax(-1)

    options = {"max_new_tokens": NEW, "temperature": 0.0, "edits": [{}, EDITS]}
    made = generate(model, PROMPTS, LENGTHS, combine=Contrast(alpha, beta), **options)
    np.testing.assert_array_equal(made.tokens, new(by_full_passes(choose)))
    # Without a contrast the second run does not matter.
    plain = generate(model, PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=0.0)
    alone = generate(model, PROMPTS, LENGTHS, combine=Contrast(0.0, 0.0), **options)
    np.testing.assert_array_equal(alone.tokens, plain.tokens)


def test_parts_of_users_serve(model):
    @part
    class Only(Processor):
        token: int

        def __call__(self, logits, tokens):
            return jnp.where(jnp.arange(VOCABULARY) == self.token, 0.0, -jnp.inf) + 0 * logits

    @part
    class Last(Combine):
        def __call__(self, logits):
            return logits[-1]

    options = {"max_new_tokens": NEW, "temperature": 0.0}
    assert (np.asarray(generate(model, PROMPTS, processors=(Only(3),), **options).tokens) == 3).all()
    by_last = generate(model, PROMPTS, edits=[{}, {}, EDITS], combine=Last(), **options)
    np.testing.assert_array_equal(by_last.tokens, generate(model, PROMPTS, edits=EDITS, **options).tokens)


def test_stores_are_threaded_and_a_token_that_a_run_never_says_is_no_contrast(model):
    options = {"max_new_tokens": NEW, "temperature": 0.0}
    plain = generate(model, PROMPTS, LENGTHS, **options).tokens
    roomy = generate(model, PROMPTS, LENGTHS, store=Policy(HeavyHitters(1, 2), P + NEW), **options)
    np.testing.assert_array_equal(roomy.tokens, plain)
    small = generate(model, PROMPTS, LENGTHS, store=Policy(Recent(0), 2), record={"read": "read"}, **options)
    assert small.records["read"].shape == (NEW, L, B, 2, 1)
    never = {"logits": Add(jnp.full(VOCABULARY, 0.0).at[3].set(-jnp.inf))}
    alone = generate(model, PROMPTS, LENGTHS, edits=[{}, never], combine=Contrast(0.0, 0.0), **options)
    np.testing.assert_array_equal(alone.tokens, plain)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"edits": []}, ValueError, "edits is an empty list of runs"),
        ({"edits": [{}, {}]}, ValueError, "edits has 2 runs but combine is None"),
        ({"combine": Contrast()}, ValueError, "combine is Contrast.* for 1 runs: need a Combine, and a list of two"),
        ({"edits": [{}] * 3, "combine": Contrast()}, ValueError, "Contrast: 3 runs are given: need 2"),
        ({"processors": (lambda x, t: x,)}, TypeError, "processors must be a tuple of parts"),
        ({"record": ("residual",)}, ValueError, "record names the unknown site 'residual'"),
        ({"edits": {"residual": Add(1.0)}}, ValueError, "edits names the unknown site 'residual'"),
    ],
)
def test_what_means_nothing_is_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        generate(model, PROMPTS, max_new_tokens=NEW, temperature=0.0, **options)
