"""speculate draws what generate draws, in fewer calls of the model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import CONTEXT, EPS, PLAIN, VOCABULARY, decoder, shared, tokens

from jaxattn.cache import HeavyHitters, Paged, Policy, Quantised, Quest, Recent
from jaxattn.models import Drafter, PromptLookup, Transformer, TransformerConfig, generate, hymba, speculate
from jaxattn.models.speculate import _speculate, verdict

PROMPTS, LENGTHS, NEW = tokens(length=CONTEXT + 1), np.array([5, 1, 3]), 6
SMALL = Policy(Recent(1), 3)


def test_the_tokens_of_a_round_are_distributed_as_those_of_the_model():
    """By all drafts, all verdicts and all draws: P(y_1 .. y_3) = p(y_1) p(y_2 | y_1) p(y_3 | y_1 y_2), in closed form.

    A round emits 1 to 3 tokens, and what is missing behind a rejection is drawn from the model anew.
    """
    V, k = 3, 2
    rng = np.random.default_rng(0)
    prefixes = [x for n in range(k + 1) for x in itertools.product(range(V), repeat=n)]
    p, q = ({x: rng.dirichlet(np.full(V, 0.6)) for x in prefixes} for _ in range(2))
    q[()][0], p[()][2] = 0.0, 0.0  # a token that is never drafted, and one that is never accepted
    p[1,] = q[1,].copy()  # drafts that are always accepted
    for each in (p, q):
        for x in prefixes:
            each[x] = each[x] / each[x].sum()
    drafts = list(itertools.product(range(V), repeat=k))
    accept, rest = verdict(
        jnp.array([[p[x[:i]] for i in range(k + 1)] for x in drafts]),
        jnp.array([[q[x[:i]] for i in range(k)] for x in drafts]),
        jnp.array(drafts),
    )
    emitted = dict.fromkeys(itertools.product(range(V), repeat=k + 1), 0.0)
    for x, a, r in zip(drafts, np.asarray(accept, float), np.asarray(rest, float), strict=True):
        drafted = np.prod([q[x[:i]][x[i]] for i in range(k)])
        for kept in range(k + 1):
            here = drafted * np.prod(a[:kept]) * (1 - a[kept] if kept < k else 1)
            for y in emitted:
                if y[:kept] == x[:kept]:
                    later = np.prod([p[y[:i]][y[i]] for i in range(kept + 1, k + 1)])
                    emitted[y] += here * r[kept][y[kept]] * later
    for y, got in emitted.items():
        assert abs(got - np.prod([p[y[:i]][y[i]] for i in range(k + 1)])) < 20 * EPS


def test_a_missing_draft_is_never_accepted_and_a_certain_one_as_often_as_it_is_drawn():
    p = jnp.array([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
    accept, rest = verdict(p, jax.nn.one_hot(jnp.array([1, -1]), 3), jnp.array([1, -1]))
    np.testing.assert_allclose(accept, [0.5, 0.0])
    np.testing.assert_allclose(rest, [[0.4, 0.0, 0.6], p[1], p[2]], rtol=2 * EPS)


DRAFTERS = {
    "lookup": (PromptLookup(), None),
    "itself": (shared, None),
    "another model": (lambda: decoder((PLAIN,), seed=3), None),
    "itself, sinks and recent": (None, SMALL),
    "itself, heavy hitters": (None, Policy(HeavyHitters(1, 2), 4)),
    "itself, pages": (None, Policy(select=Quest(1, 1))),
}


@pytest.fixture(scope="module")
def plain():
    return generate(shared(), PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=0.0)


@pytest.mark.parametrize("name", DRAFTERS)
def test_whatever_drafts_the_greedy_text_is_that_of_generate(plain, name):
    draft, store = DRAFTERS[name]
    draft = draft if draft is None or isinstance(draft, Drafter) else draft()
    new = speculate(shared(), draft, PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=0.0, ahead=3, draft_store=store)
    np.testing.assert_array_equal(new.tokens, plain.tokens)
    np.testing.assert_array_equal(new.lengths, plain.lengths)
    assert -(-NEW // 4) <= new.calls <= NEW
    assert (np.asarray(new.accepted) >= NEW - int(new.calls)).all()  # one token of each call is no draft
    if name == "itself":
        assert new.calls == 2
        np.testing.assert_array_equal(new.accepted, [4, 4, 4])  # 3 and one of its own, then 1 and one


@pytest.mark.parametrize("end_token", range(0, VOCABULARY, 3))
def test_a_row_ends_behind_its_end_token(end_token):
    options = {"max_new_tokens": NEW, "temperature": 0.0, "end_token": end_token}
    plain = generate(shared(), PROMPTS, LENGTHS, **options)
    new = speculate(shared(), shared(), PROMPTS, LENGTHS, ahead=3, **options)
    np.testing.assert_array_equal(new.tokens, plain.tokens)
    np.testing.assert_array_equal(new.lengths, plain.lengths)


@pytest.mark.parametrize("draft", [PromptLookup(2), None], ids=["lookup", "itself"])
def test_a_recurrent_model_reads_again_what_was_accepted(draft):
    """Two calls a round. Hymba has meta tokens, windows and Mamba heads."""
    model = decoder(tuple(hymba(7, 2, window=3, meta_tokens=2)), meta_tokens=2)
    options = {"max_new_tokens": NEW, "temperature": 0.0}
    new = speculate(model, draft, PROMPTS, LENGTHS, ahead=3, draft_store=None if draft else Policy(), **options)
    np.testing.assert_array_equal(new.tokens, generate(model, PROMPTS, LENGTHS, **options).tokens)
    if draft is None:
        assert new.calls == 4


def test_pages_of_a_pool_are_as_good_as_rows(plain):
    store = Policy(storage=Paged(7))
    new = speculate(shared(), PromptLookup(), PROMPTS[:, :8], LENGTHS, max_new_tokens=NEW, temperature=0.0, store=store)
    np.testing.assert_array_equal(new.tokens, plain.tokens)


def test_one_guess_and_more_guesses_than_tokens(plain):
    for ahead, calls in ((1, 3), (9, 1)):
        new = speculate(shared(), shared(), PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=0.0, ahead=ahead)
        np.testing.assert_array_equal(new.tokens, plain.tokens)
        assert new.calls == calls


def test_drawn_tokens_have_the_frequencies_of_the_model():
    """Of pairs of tokens, in 4000 rows, against the exact probabilities, with top_k and an unlike draft."""
    model, rows = shared((PLAIN,)), 4000
    prompt = np.full((rows, 2), 3)
    options = {"max_new_tokens": 2, "temperature": 1.7, "top_k": 3, "key": jax.random.key(4)}
    firsts = model(jnp.full((VOCABULARY, 3), 3).at[:, 2].set(jnp.arange(VOCABULARY)))[0]

    def kept(logits):
        logits = np.asarray(logits, np.float64) / 1.7
        logits = np.where(logits >= np.sort(logits)[-3], logits, -np.inf)
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    first = kept(firsts[0, 1])
    exact = np.stack([first[v] * kept(firsts[v, 2]) for v in range(VOCABULARY)])
    for draft in (decoder((PLAIN,), seed=3), PromptLookup()):
        new = np.asarray(speculate(model, draft, prompt, ahead=2, **options).tokens)
        seen = np.zeros((VOCABULARY, VOCABULARY))
        np.add.at(seen, (new[:, 0], new[:, 1]), 1 / rows)
        assert (seen[exact == 0] == 0).all()
        # Pearson's statistic over 9 pairs: above 30 with probability 2e-4.
        assert rows * ((seen - exact)[exact > 0] ** 2 / exact[exact > 0]).sum() < 30


def test_lookup_goes_on_as_the_text_did():
    def guesses(text, longest, count):
        sequence = jnp.full((1, 16), -1).at[0, : len(text)].set(jnp.array(text))
        found = PromptLookup(longest)((), sequence, jnp.array([len(text)]), None, count, None, None)[0]
        return found[0].tolist()

    assert guesses([1, 2, 3, 7, 2, 3], 2, 3) == [7, 2, 3]
    assert guesses([1, 2, 3, 7, 2, 3, 9, 3], 1, 2) == [9, 3]  # the newest place
    assert guesses([5, 2, 3, 7, 4, 3, 9, 2, 3], 2, 2) == [7, 4]  # two agreeing tokens go before one that is newer
    assert guesses([4, 5, 4, 5], 3, 5) == [4, 5, 4, 5, 4]  # a period goes on
    assert guesses([6, 6], 3, 3) == [6, 6, 6]
    assert guesses([1, 2, 3], 3, 2) == [-1, -1]
    assert guesses([1], 3, 2) == [-1, -1]


def test_another_temperature_or_text_is_not_another_program():
    def draw(**options):
        return speculate(shared((PLAIN,)), PromptLookup(), PROMPTS, LENGTHS, max_new_tokens=3, **options)

    draw(temperature=0.0)
    compiled = _speculate._cache_size()
    draw(temperature=0.7, key=jax.random.key(0), end_token=3)
    assert _speculate._cache_size() == compiled


@pytest.mark.parametrize(
    ("draft", "options", "error", "message"),
    [
        (None, {}, ValueError, "draft is None and draft_store too: need a drafter"),
        (PromptLookup(), {"draft_store": SMALL}, ValueError, "draft_store is given, but draft is PromptLookup"),
        (PromptLookup(), {"store": SMALL}, ValueError, "store has Recent, under which several tokens at once"),
        (PromptLookup(), {"store": Policy(select=Quest(1, 1))}, ValueError, "store has Quest, under which"),
        (PromptLookup(), {"store": Policy(storage=Quantised(8, 4, 4))}, ValueError, "store has Quantised, under which"),
        (PromptLookup(), {"ahead": 0}, ValueError, "ahead is 0: need at least 1"),
        (PromptLookup(), {"ahead": 2.0}, TypeError, r"ahead must be an int, got 2\.0"),
        (PromptLookup(), {"temperature": 1.0}, ValueError, "key is None: need a random key"),
        ("lookup", {}, TypeError, "draft must be a Transformer, a Drafter such as PromptLookup"),
    ],
)
def test_calls_that_make_no_sense_are_refused(draft, options, error, message):
    options = {"max_new_tokens": 2, "temperature": 0.0} | options
    with pytest.raises(error, match=message):
        speculate(shared(), draft, PROMPTS, LENGTHS, **options)


def test_a_draft_of_another_vocabulary_or_of_too_short_a_length_is_refused():
    for sizes, message in (
        ((VOCABULARY + 1, CONTEXT), "draft has a vocabulary of 12 and model one of 11: need the same tokens"),
        ((VOCABULARY, 6), "max_new_tokens is 6 after a prompt of 5: need 1 to 1"),
    ):
        draft = Transformer(TransformerConfig(*sizes, 16, (PLAIN,)), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=message):
            speculate(shared(), draft, PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=0.0)


def test_a_model_without_finite_parameters_draws_no_token():
    broken = decoder((PLAIN,))
    broken.norm.scale[...] = broken.norm.scale[...].at[0].set(jnp.nan)
    for draft in (PromptLookup(), broken):
        with pytest.raises(FloatingPointError, match="no token can be drawn after 0 new tokens of prompt 0"):
            speculate(broken, draft, PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=0.0)
