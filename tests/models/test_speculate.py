"""speculate draws what generate draws, in fewer calls of the model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ATTENTION, CONTEXT, EPS, FEED, HYMBA, PLAIN, VOCABULARY, decoder, shared, tokens

from jaxattn import nn
from jaxattn.cache import HeavyHitters, Paged, Policy, Quantised, Quest, Recent
from jaxattn.models import (
    Branch,
    Branches,
    Contrast,
    Drafter,
    Layer,
    MinimumLength,
    PromptLookup,
    RepetitionPenalty,
    Spec,
    Transformer,
    TransformerConfig,
    generate,
    hymba,
    speculate,
)
from jaxattn.models.speculate import Draws, ModelDrafter, _speculate, verdict
from jaxattn.trace import Add

PROMPTS, LENGTHS, NEW = tokens(length=CONTEXT + 1), np.array([5, 1, 3]), 6
SMALL = Policy(Recent(1), 3)


def drafts_of(q, prefix, children):
    """(probability, tokens by node in the order of a walk, where each was drawn from) of the guesses behind a prefix.

    Siblings are drawn without replacement; −1 is none, where nothing is left to draw.
    """
    if not children:
        return [(1.0, {})]
    found = []
    for siblings in itertools.product(range(-1, len(q[()])), repeat=children[0]):
        chance, left, here = 1.0, q[prefix].copy(), {}
        for number, token in enumerate(siblings):
            total = left.sum()
            if token < 0 or total == 0:
                chance *= token < 0 and total == 0
                here[(number,)] = (-1, np.zeros_like(left))
                continue
            here[(number,)] = (token, left / total)
            chance *= left[token] / total
            left[token] = 0.0
        if not chance:
            continue
        below = [drafts_of(q, (*prefix, t), children[1:]) if t >= 0 else [(1.0, {})] for t in siblings]
        for each in itertools.product(*below):
            nodes = dict(here)
            for number, (_, more) in enumerate(each):
                nodes |= {(number, *way): node for way, node in more.items()}
            found.append((chance * np.prod([p for p, _ in each]), nodes))
    return found


@pytest.mark.parametrize("children", [(1, 1), (2, 2), pytest.param((3, 1), marks=pytest.mark.slow)], ids=str)
def test_the_tokens_of_a_round_are_distributed_as_those_of_the_model(children):
    """By all drafts, all verdicts and all draws: P(y_1 .. y_3) = p(y_1) p(y_2 | y_1) p(y_3 | y_1 y_2), in closed form.

    A round emits 1 to 3 tokens, and what is missing behind a rejection is drawn from the model anew.
    """
    V, k, tree = 3, 2, Branches.of(children)
    rng = np.random.default_rng(0)
    prefixes = [x for n in range(k + 1) for x in itertools.product(range(V), repeat=n)]
    p, q = ({x: rng.dirichlet(np.full(V, 0.6)) for x in prefixes} for _ in range(2))
    q[()][0], p[()][2] = 0.0, 0.0  # a token that is never drafted, and one that is never accepted
    p[1,] = q[1,].copy()  # drafts that are always accepted
    for each in (p, q):
        for x in prefixes:
            each[x] = each[x] / each[x].sum()
    ways = [()]  # which child, and which of its children, by node
    for parent, place in zip(tree.parents[1:], tree.place[tree.of_node], strict=True):
        ways.append((*ways[parent], int(place)))
    trees = drafts_of(q, (), children)
    assert abs(sum(chance for chance, _ in trees) - 1) < 20 * EPS
    none = (-1, np.zeros(V))
    tokens = np.array([[0] + [nodes.get(way, none)[0] for way in ways[1:]] for _, nodes in trees])
    draft = np.array([[np.zeros(V)] + [nodes.get(way, none)[1] for way in ways[1:]] for _, nodes in trees])
    texts = [[tuple(nodes.get(way[: i + 1], none)[0] for i in range(len(way))) for way in ways] for _, nodes in trees]
    target = np.array([[p.get(text, np.zeros(V)) for text in of_tree] for of_tree in texts])
    accept, rest = verdict(*map(jnp.asarray, (target, draft, tokens)), tree.siblings)
    accept, rest = np.asarray(accept, float), np.asarray(rest, float)
    emitted = dict.fromkeys(itertools.product(range(V), repeat=k + 1), 0.0)
    for number, (chance, _) in enumerate(trees):
        ends = {0: chance}  # the walk down the tree: how likely it comes to each node, and ends there
        for node in range(len(ways)):
            for child in np.flatnonzero(tree.parents == node):
                ends[child] = ends[node] * accept[number, child]
                ends[node] -= ends[child]
        for node, here in ends.items():
            text = texts[number][node]
            for y in emitted:
                if here and y[: len(text)] == text:
                    later = np.prod([p[y[:i]][y[i]] for i in range(len(text) + 1, k + 1)])
                    emitted[y] += here * rest[number, node][y[len(text)]] * later
    for y, got in emitted.items():
        assert abs(got - np.prod([p[y[:i]][y[i]] for i in range(k + 1)])) < 40 * EPS


def test_a_missing_draft_is_never_accepted_and_a_certain_one_as_often_as_it_is_drawn():
    """A chain of two, and two siblings of which the second is as certain, also where it is the first again."""
    p = jnp.array([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
    tokens = jnp.array([0, 1, -1])
    accept, rest = verdict(p, jax.nn.one_hot(tokens, 3), tokens, Branches.of(2).siblings)
    np.testing.assert_allclose(accept, [0.0, 0.5, 0.0])
    np.testing.assert_allclose(rest, [[0.4, 0.0, 0.6], p[1], p[2]], rtol=2 * EPS)
    for second, chance, left in ((0, 0.4, [0, 0, 1.0]), (1, 0.0, [0.4, 0, 0.6]), (-1, 0.0, [0.4, 0, 0.6])):
        tokens = jnp.array([0, 1, second])
        accept, rest = verdict(p, jax.nn.one_hot(tokens, 3), tokens, Branches.of((2,)).siblings)
        np.testing.assert_allclose(accept, [0.0, 0.5, chance], rtol=2 * EPS)
        np.testing.assert_allclose(rest[0], left, atol=2 * EPS)


@pytest.mark.slow
def test_siblings_of_a_model_are_drawn_without_replacement_and_say_from_what():
    """By the logits of the model along each chain; the greedy ones are the largest, and chains alike share nodes."""
    model, tree = shared((PLAIN,)), Branches.of((3, 2))
    graph, arrays = nnx.split(model)
    text = jnp.asarray(np.pad(PROMPTS[:, :2], ((0, 0), (0, 6)), constant_values=-1))
    two = jnp.full(len(text), 2)
    for temperature in (0.0, 1.3):
        drafter = ModelDrafter(graph, arrays, None, 8)
        draws = Draws(jnp.float32(temperature), jnp.int32(VOCABULARY - 1), None)
        state = drafter.start(text, two, 2)
        tokens, probabilities, _ = drafter(state, text, two, two, tree, draws, jax.random.key(3))
        assert tokens.shape == (3, 6, 2)
        np.testing.assert_array_equal(tokens[:, ::2, 0], tokens[:, 1::2, 0])
        chains = jnp.concatenate([jnp.repeat(text[:, None, :2], 6, 1), tokens[..., :1]], 2).reshape(18, 3)
        logits = model(chains)[0][:, 1:].reshape(3, 6, 2, VOCABULARY)
        for b, chain, step in np.ndindex(3, 6, 2):
            same = [c for c in range(6) if tree.by_chain[c, step] < tree.by_chain[chain, step]]
            same = [c for c in same if tree.first_alike[c, step] == tree.first_alike[chain, step]]
            elder = {int(tokens[b, c, step]) for c in same}
            token = int(tokens[b, chain, step])
            assert token not in elder
            left = np.where(np.isin(np.arange(VOCABULARY), list(elder)), -np.inf, logits[b, chain, step])
            if temperature == 0:
                assert token == left.argmax()
                np.testing.assert_array_equal(probabilities[b, chain, step], np.arange(VOCABULARY) == token)
            else:
                drawn = np.asarray(draws.probabilities(logits[b, chain, step])) * (left > -np.inf)
                np.testing.assert_allclose(probabilities[b, chain, step], drawn / drawn.sum(), atol=300 * EPS)


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


@pytest.mark.parametrize("name", ["lookup", pytest.param("another model", marks=pytest.mark.slow)])
def test_a_tree_of_guesses_does_not_change_the_greedy_text(plain, name):
    """And where the second guess is right, the tree needs fewer calls than the chain of its first guesses."""
    draft = PromptLookup() if name == "lookup" else decoder((PLAIN,), seed=3)
    new = speculate(shared(), draft, PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=0.0, ahead=(3, 2, 1))
    np.testing.assert_array_equal(new.tokens, plain.tokens)
    np.testing.assert_array_equal(new.lengths, plain.lengths)
    assert (np.asarray(new.accepted) >= NEW - int(new.calls)).all()
    if name == "another model":
        every = speculate(
            shared(), draft, PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=0.0, ahead=(VOCABULARY, VOCABULARY)
        )
        np.testing.assert_array_equal(every.tokens, plain.tokens)
        assert every.calls == NEW // 3  # all tokens are guessed, two by two


def test_processors_are_those_of_generate():
    """The penalty of each node is that of the text that ends there."""
    options = {"max_new_tokens": NEW, "temperature": 0.0, "end_token": 2}
    options["processors"] = (RepetitionPenalty(3.0), MinimumLength(2, 9))
    want = generate(shared(), PROMPTS, LENGTHS, **options)
    new = speculate(shared(), PromptLookup(), PROMPTS, LENGTHS, ahead=(2, 2), **options)
    np.testing.assert_array_equal(new.tokens, want.tokens)


@pytest.mark.slow
def test_edits_are_those_of_generate_also_of_a_model_that_drafts_for_itself():
    options = {"max_new_tokens": NEW, "temperature": 0.0}
    options["edits"] = {"resid": Add(jnp.asarray(np.random.default_rng(5).standard_normal(16), jnp.float32))}
    want = generate(shared(), PROMPTS, LENGTHS, **options)
    for draft in (PromptLookup(), None):
        store = Policy() if draft is None else None
        new = speculate(shared(), draft, PROMPTS, LENGTHS, ahead=3, draft_store=store, **options)
        np.testing.assert_array_equal(new.tokens, want.tokens)
        assert draft is not None or new.calls == 2


@pytest.mark.slow
@pytest.mark.parametrize("absorb", [False, True])
def test_a_decoder_of_a_context_is_checked_in_one_call(absorb):
    cross = Spec(nn.MultiHeadAttention, heads=2, keys_from="context", position=None, context_features=6, absorb=absorb)
    layer = Layer([Branch(ATTENTION), Branch(cross, name="cross"), Branch(FEED)])
    model, options = decoder((layer,) * 2), {"max_new_tokens": NEW, "temperature": 0.0}
    options["context"] = jnp.asarray(np.random.default_rng(4).standard_normal((3, 5, 6)), jnp.float32)
    want = generate(model, PROMPTS, LENGTHS, **options)
    for draft, ahead in ((model, 3), (PromptLookup(), (2, 1))):
        new = speculate(model, draft, PROMPTS, LENGTHS, ahead=ahead, **options)
        np.testing.assert_array_equal(new.tokens, want.tokens)
        assert draft is not model or new.calls == 2


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
    model = decoder(HYMBA, meta_tokens=2)
    options = {"max_new_tokens": NEW, "temperature": 0.0}
    new = speculate(model, draft, PROMPTS, LENGTHS, ahead=3, draft_store=None if draft else Policy(), **options)
    np.testing.assert_array_equal(new.tokens, generate(model, PROMPTS, LENGTHS, **options).tokens)
    if draft is None:
        assert new.calls == 4


@pytest.mark.parametrize("name", ["lookup", "itself, sinks and recent", "a tree"])
def test_several_runs_are_combined_as_generate_combines_them(plain, name):
    """The runs read the same guesses, each with its own edits and state; those of a tree have none."""
    second = {} if name == "a tree" else {"resid": Add(jnp.linspace(-2, 2, 16))}
    combine = {"edits": [{}, second], "combine": Contrast(0.8, 0.05)}
    options = {"max_new_tokens": NEW, "temperature": 0.0, **combine}
    drafts = {"ahead": 3, "draft_store": SMALL} if "itself" in name else {"ahead": (2, 2) if second == {} else 3}
    new = speculate(shared(), None if "itself" in name else PromptLookup(), PROMPTS, LENGTHS, **drafts, **options)
    expected = generate(shared(), PROMPTS, LENGTHS, **options).tokens
    np.testing.assert_array_equal(new.tokens, expected)
    assert second == {} or (np.asarray(expected) != np.asarray(plain.tokens)).any()


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
    for draft, ahead in ((decoder((PLAIN,), seed=3), 2), (PromptLookup(), 2), (decoder((PLAIN,), seed=3), (3, 2))):
        new = np.asarray(speculate(model, draft, prompt, ahead=ahead, **options).tokens)
        seen = np.zeros((VOCABULARY, VOCABULARY))
        np.add.at(seen, (new[:, 0], new[:, 1]), 1 / rows)
        assert (seen[exact == 0] == 0).all()
        # Pearson's statistic over 9 pairs: above 30 with probability 2e-4.
        assert rows * ((seen - exact)[exact > 0] ** 2 / exact[exact > 0]).sum() < 30


def test_lookup_goes_on_as_the_text_did():
    def guesses(text, longest, count):
        sequence = jnp.full((1, 16), -1).at[0, : len(text)].set(jnp.array(text))
        found = PromptLookup(longest)((), sequence, jnp.array([len(text)]), None, Branches.of(count), None, None)[0]
        return found[0].tolist() if isinstance(count, tuple) else found[0, 0].tolist()

    assert guesses([1, 2, 3, 7, 2, 3], 2, 3) == [7, 2, 3]
    assert guesses([1, 2, 3, 7, 2, 3, 9, 3], 1, 2) == [9, 3]  # the newest place
    assert guesses([5, 2, 3, 7, 4, 3, 9, 2, 3], 2, 2) == [7, 4]  # two agreeing tokens go before one that is newer
    assert guesses([4, 5, 4, 5], 3, 5) == [4, 5, 4, 5, 4]  # a period goes on
    assert guesses([6, 6], 3, 3) == [6, 6, 6]
    assert guesses([1, 2, 3], 3, 2) == [-1, -1]
    assert guesses([1], 3, 2) == [-1, -1]
    # A tree: 3 went on with 9 1 and, before that, with 7 4 and 7 5, but never with a third token.
    text = [3, 7, 5, 3, 7, 4, 3, 9, 1, 3]
    assert guesses(text, 1, (3, 2)) == [[9, 1], [9, -1], [7, 4], [7, 5], [-1, -1], [-1, -1]]


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
        (PromptLookup(), {"ahead": (2, 0)}, ValueError, r"ahead is \(2, 0\): need at least 1"),
        (PromptLookup(), {"ahead": ()}, ValueError, r"ahead is \(\): need at least 1"),
        (PromptLookup(), {"ahead": (2, 1), "edits": {"resid": Add(1.0)}}, ValueError, "a tree, but edits tell tokens"),
        (PromptLookup(), {"edits": [{}, {}]}, ValueError, "edits has 2 runs but combine is None"),
        (PromptLookup(), {"combine": Contrast()}, ValueError, "combine is Contrast.* for 1 runs: need a Combine"),
        (PromptLookup(), {"processors": (3,)}, TypeError, "processors must be a tuple of parts"),
        (PromptLookup(), {"temperature": 1.0}, ValueError, "key is None: need a random key"),
        ("lookup", {}, TypeError, "draft must be a Transformer, a Drafter such as PromptLookup"),
    ],
)
def test_calls_that_make_no_sense_are_refused(draft, options, error, message):
    options = {"max_new_tokens": 2, "temperature": 0.0} | options
    with pytest.raises(error, match=message):
        speculate(shared(), draft, PROMPTS, LENGTHS, **options)


def test_a_draft_of_another_vocabulary_or_of_too_short_a_length_is_refused():
    recurrent = decoder(tuple(hymba(7, 2, window=3, meta_tokens=0)[:3]))
    with pytest.raises(ValueError, match=r"ahead is \(2, 2\), a tree, but Parallel of the model reads none: .* as 2"):
        speculate(recurrent, PromptLookup(), PROMPTS, LENGTHS, max_new_tokens=2, temperature=0.0, ahead=(2, 2))
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
