"""A tree of drafts is read in one call: each path as if it stood alone, and the text is that without drafts."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import CONTEXT, VOCABULARY, assert_close, decoder, shared, tokens

from jaxattn import Alibi, Causal, Window, nn
from jaxattn.cache import Policy
from jaxattn.core.attend import Ancestors, MoBA
from jaxattn.models import Spec, generate, hymba, joined, longest_path, pre_norm

TEXT, LENGTHS = tokens(length=CONTEXT), np.array([5, 1, 3])
PARENTS = np.array([-1, 0, 0, 1, 1, 2, 5, -1])
FEED = Spec(nn.FeedForward, hidden=16)
SHARING = (
    pre_norm(Spec(nn.MultiHeadAttention, heads=2, key_heads=1, mask=Causal() & Window(3)), FEED),
    pre_norm(Spec(nn.MultiHeadAttention, heads=2, key_heads=1, keys_from="layer"), FEED),
    pre_norm(Spec(nn.MultiHeadAttention, heads=4, position=None, bias=Spec(Alibi.geometric)), FEED),
)


@nnx.jit
def read(model, text, positions=None, state=None, parents=None):
    return model(text, positions=positions, state=state, parents=parents)[:2]


def begun(model):
    """The state after three ragged texts."""
    places = np.arange(5)
    positions = np.where(places < LENGTHS[:, None], places, -1)
    return read(model, TEXT[:, :5], positions, model.init_state(3, CONTEXT, Policy()))[1]


def path_to(node, parents=PARENTS):
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@pytest.mark.parametrize("meta", [0, 2])
@pytest.mark.parametrize("layers", [None, SHARING], ids=["mixed", "sharing"])
def test_every_path_alone_has_the_same_logits_and_joins_as_if_it_were_the_text(layers, meta):
    """With windows, sinks, null logits, linear biases, keys of another layer, ragged rows and meta tokens."""
    model = shared() if layers is None and not meta else decoder(layers or shared().config.layers, meta_tokens=meta)
    state = begun(model)
    drafts = tokens(length=len(PARENTS), seed=7)
    logits, nodes = read(model, drafts, state=state, parents=PARENTS)
    for leaf in (3, 4, 6, 7):
        path = path_to(leaf)
        steps = np.pad(np.array(path), (0, 4 - len(path)))
        there = np.arange(4) < len(path)
        positions = np.where(there, LENGTHS[:, None] + np.arange(4), -1)
        alone, after = read(model, drafts[:, steps], positions, state)
        assert_close(logits[:, path], alone[:, : len(path)])
        chosen = np.isin(np.arange(len(PARENTS)), path)
        then = [
            read(model, drafts[:, :1], (LENGTHS + len(path))[:, None], each)[0]
            for each in (joined(nodes, jnp.broadcast_to(chosen, drafts.shape)), after)
        ]
        assert_close(*then)


def test_a_chain_is_a_text_also_without_a_state():
    """And so are two chains side by side, each by itself."""
    model = shared()
    whole, _ = read(model, TEXT)
    assert_close(read(model, TEXT, parents=np.arange(CONTEXT) - 1)[0], whole)
    two = np.array([-1, -1, 0, 1, 2, 3])
    both = np.stack([TEXT[:, :3], TEXT[:, 4:7]], 2).reshape(3, 6)
    logits, _ = read(model, both, parents=two)
    assert_close(logits[:, ::2], whole[:, :3])
    assert_close(logits[:, 1::2], read(model, TEXT[:, 4:7])[0])


def test_trees_of_drafts_do_not_change_the_greedy_text():
    """Drafts are random, or a path of them is what comes; their rows accept other numbers, and none are left behind."""
    model, rng, new = shared(), np.random.default_rng(0), 6
    plain = np.asarray(generate(model, TEXT, LENGTHS, max_new_tokens=new, temperature=0.0).tokens)
    state = model.init_state(3, CONTEXT, Policy())
    places = np.arange(5)
    state = read(model, TEXT[:, :5], np.where(places < LENGTHS[:, None] - 1, places, -1), state)[1]
    made, most = [[int(TEXT[b, LENGTHS[b] - 1])] for b in range(3)], 0
    parents = PARENTS[:7]
    while min(map(len, made)) <= new:
        drafts = rng.integers(0, VOCABULARY, (3, 7))
        for b, path in enumerate(([0, 1, 4], [0, 2, 5, 6], [0, 1, 3])):
            coming = plain[b, len(made[b]) - 1 :][: len(path) - 1]
            drafts[b, path[1 : 1 + len(coming)]] = coming
            drafts[b, 0] = made[b][-1]
        at = LENGTHS[:, None] - 2 + np.array([len(each) for each in made])[:, None] + Ancestors(parents).depths
        logits, nodes = read(model, drafts, np.where(at < CONTEXT, at, -1), state, parents)
        choices = np.asarray(logits.argmax(-1))
        chosen = longest_path(jnp.asarray(parents), jnp.asarray(drafts), jnp.asarray(choices))
        state = joined(nodes, chosen)
        for b, path in enumerate(map(np.flatnonzero, np.asarray(chosen))):
            made[b] += [int(drafts[b, node]) for node in path[1:]] + [int(choices[b, path[-1]])]
            most = max(most, len(path))
    assert most == 4
    for b in range(3):
        np.testing.assert_array_equal(made[b][1 : 1 + new], plain[b])


def test_the_longest_path_is_found_by_walking_all_of_them():
    rng = np.random.default_rng(0)
    for _ in range(20):
        parents = np.array([rng.integers(-1, i) if i else -1 for i in range(9)])
        drafts, choices = rng.integers(0, 2, (2, 4, 9))
        got = np.asarray(longest_path(jnp.asarray(parents), jnp.asarray(drafts), jnp.asarray(choices)))
        for b in range(4):
            paths = [path_to(node, parents) for node in range(9)]
            right = [p for p in paths if all(drafts[b, y] == choices[b, x] for x, y in itertools.pairwise(p))]
            longest = max(map(len, right))
            assert np.flatnonzero(got[b]).tolist() == next(p for p in right if len(p) == longest)
        np.testing.assert_array_equal(Ancestors(parents).depths, [len(path_to(i, parents)) - 1 for i in range(9)])


def test_what_reads_no_trees_says_so():
    for layers, options, message in (
        (tuple(hymba(7, 2, window=3, meta_tokens=0)[:3]), {}, "parents is given, but Parallel reads no trees"),
        (
            (pre_norm(Spec(nn.MultiHeadAttention, heads=2, convolution=3), FEED),),
            {},
            "parents is given, but MultiHeadAttention reads no trees",
        ),
        (
            (pre_norm(Spec(nn.MultiHeadAttention, heads=2, choice=MoBA(2, 1)), FEED),),
            {},
            "parents is given, but MultiHeadAttention reads no trees",
        ),
        (
            (
                pre_norm(Spec(nn.MultiHeadAttention, heads=2), FEED),
                pre_norm(Spec(nn.MultiHeadAttention, heads=2, keys_from="layer", echo=True), FEED),
            ),
            {},
            "parents is given, but MultiHeadAttention reads no trees",
        ),
        (
            None,
            {"record": ("resid",)},
            r"parents has shape \(1, 8\) for 8 tokens: need one for each",
        ),
    ):
        model = shared() if layers is None else decoder(layers)
        with pytest.raises(ValueError, match=message):
            model(jnp.asarray(TEXT[:, :8]), parents=PARENTS, **options)
    with pytest.raises(ValueError, match=r"parents has shape \(1, 8\) for 5 tokens"):
        shared()(jnp.asarray(TEXT[:, :5]), parents=PARENTS)
