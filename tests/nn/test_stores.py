"""The laws of stores in attention: replay, decode = prefill, garbage, per head, grouped heads, padding, chunks."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from multi_head import randomise

from jaxattn import Causal, Explicit, nn, rotary
from jaxattn.cache import (
    ActQKV,
    Attentive,
    ByHistory,
    Dense,
    Everything,
    Forecasted,
    HeavyHitters,
    HistoryScorer,
    Ltri,
    MeanKeys,
    MeanOverTime,
    Memory,
    Paged,
    Policy,
    QAdA,
    Quantised,
    Quest,
    Rank,
    Recent,
    Recycled,
    SnapKV,
    Spans,
)
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm
from jaxattn.nn import MultiHeadAttention, Tap, Tokens

B, T, D, N, K = 2, 24, 16, 4, 2
EPS = float(np.finfo(np.float32).eps)
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)
SCORER = HistoryScorer.zeros(4, 2, 3)
SCORER = jax.tree.map(
    lambda x: x + jnp.asarray(np.random.default_rng(5).standard_normal(x.shape) / 4, jnp.float32), SCORER
)
POLICIES = {
    "sinks and recent": Policy(Recent(2), 8),
    "a ring": Policy(Recent(0), 5),
    "budgets by head": Policy(Recent(1), 9, budget=jnp.array([4, 9])),
    "heavy hitters": Policy(HeavyHitters(1, 3), 8),
    "heavy hitters, budgets by head": Policy(HeavyHitters(1, 2), 12, budget=jnp.array([5, 9])),
    "pages": Policy(select=Quest(2, 4)),
    "heavy hitters and pages": Policy(HeavyHitters(1, 3), 12, Quest(2, 4)),
    "spans": Policy(Spans(jnp.array([1.0, 5.5]), jnp.array([0.25, 0.0]), 1), 12),
    "recent ones, in shared pages": Policy(Recent(2), 8, storage=Paged(4)),
    "heavy hitters in pages": Policy(HeavyHitters(1, 2), 12, Quest(2, 4), jnp.array([5, 9]), storage=Paged(2)),
}
# Any way to keep with any way to choose, in any storage.
RETAIN = {
    "all": Everything(),
    "recent": Recent(2),
    "heavy": HeavyHitters(1, 3),
    "heavy by mean": HeavyHitters(1, 3, mean=True),
    "votes": SnapKV(3, 3, 1),
    "attended last": Attentive("last", 2, 1, 2),
    "attended most": Attentive("count", 1, 0, 2),
    "spans of heads": Spans(jnp.array([1.0, 5.5]), jnp.array([0.25, 0.0]), 1),
    "histories": ByHistory(SCORER, every=5, window=4, hop=2),
}
SELECT = {
    "read whole": None,
    "by bounds": Quest(2, 4),
    "by means": MeanKeys(2, 4, "sum"),
    "recycled": Recycled(5, 4),
    "local or all": QAdA(1, 5, 0.5),
    "by a forecast": Forecasted(MeanOverTime(), 2, 4, 3, 4, 1, 2),
    "by a probe": ActQKV(2, 4, 3),
    "by spans": Ltri(8, 5, 1, 2),
}
STORAGE = {"dense": Dense(), "paged": Paged(4), "in bits": Quantised(16, 4, 4)}
TRIPLES = {f"{r}, {s}, {m}": (r, s, m) for r, s, m in itertools.product(RETAIN, SELECT, STORAGE)}
# A policy each that does not read as many slots in every step.
DECIDED = ["heavy, recycled, paged", "all, local or all, dense", "all, by a forecast, dense"]


def number(name):
    return sum(list(way).index(part) for way, part in zip((RETAIN, SELECT, STORAGE), TRIPLES[name], strict=True))


# A third of the triples, in which all pairs of two parts occur; of the others, those whose steps read as many slots.
PAIRS = [name for name in TRIPLES if name in DECIDED or number(name) % 3 == 0]
PRODUCT = {
    name: Policy(RETAIN[r], 12 if RETAIN[r].evicts else None, SELECT[s], storage=STORAGE[m])
    for name, (r, s, m) in TRIPLES.items()
    if SELECT[s] is None or not SELECT[s].decides or name in PAIRS
}


def decides(policy):
    return policy.select is not None and policy.select.decides


def policy_case(name, *values):
    """A case that is run always if it is a named policy, or one of the pairs whose steps all read as many slots."""
    quick = name in (*POLICIES, *DECIDED) or (name in PAIRS and not decides(PRODUCT[name]))
    return pytest.param(name, *values, marks=() if quick else pytest.mark.slow)


PADDING = {
    "none": np.tile(np.arange(T), (B, 1)),
    "left": np.stack([np.where(np.arange(T) < 5, -1, np.arange(T) - 5), np.arange(T)]),
    "gaps": np.stack([np.arange(T), np.where(np.arange(T) % 6 == 3, -1, np.cumsum(np.arange(T) % 6 != 3) - 1)]),
}


def padding_of(name):
    """The padding that a policy of the product is tried with: every part of it meets every padding."""
    retain, select, _ = TRIPLES[name]
    return list(PADDING)[([*RETAIN].index(retain) + 2 * [*SELECT].index(select)) % 3]


CASES = [policy_case(name) for name in (*POLICIES, *PAIRS)]
PADDED = [policy_case(name, padding) for padding in PADDING for name in POLICIES]
PADDED += [policy_case(name, padding_of(name)) for name in PRODUCT]


@pytest.fixture(scope="module")
def module():
    return randomise(MultiHeadAttention(D, N, key_heads=K, mask=Causal(), rngs=nnx.Rngs(0)))


@nnx.jit
def step(module, x, positions, store):
    tap = Tap(record=("read",))
    y, store = module(x, Tokens.of(x, positions=positions), tap, store)
    return y, store, tap.records["read"]


def decoded(module, policy, positions, cut, fill=0.0):
    """(y [B, T, D], what each token read: True for [B, T, K, place])."""
    store = module.init_state(B, T, policy)
    numbers = jax.tree.map(lambda x: x + fill if jnp.issubdtype(x.dtype, jnp.floating) else x, store.held)
    store = dataclasses.replace(store, held=numbers)
    pieces, reads, first = [], np.zeros((B, T, K, T), bool), 0
    for size in cut:
        piece = slice(first, first + size)
        y, store, read = step(module, X[:, piece], jnp.asarray(positions[:, piece]), store)
        pieces.append(y)
        read = np.broadcast_to(read, (*read.shape[:2], K))
        for b, t, k in np.ndindex(B, size, K):
            reads[b, first + t, k, read[b, read[b, :, k] >= 0, k]] = True
        first += size
    return np.concatenate(pieces, 1), reads


def rounding(policy):
    """The error of a row over its size: of 16 bits it is at most a 2^-17th of the range of a group."""
    return 300 * (EPS + (2.0**-17 if isinstance(policy.storage, Quantised) else 0))


def assert_same(actual, expected, seen, tolerance=300 * EPS):
    error = abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))[seen]
    assert error.max() <= tolerance * abs(np.asarray(expected)).max()


@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_an_evicting_store_equals_a_dense_pass_under_the_mask_of_what_was_read(module, name, padding):
    """Replay, token by token; what empty slots hold does not matter."""
    positions, policy = PADDING[padding], (POLICIES | PRODUCT)[name]
    y, reads = decoded(module, policy, positions, [1] * T, np.nan)
    seen = positions >= 0
    # The mask over places, [B, N, T, T]: what the token at place p read.
    by_place = np.zeros((B, K, T, T), bool)
    for b in range(B):
        by_place[b][:, positions[b][seen[b]]] = reads[b, seen[b]].swapaxes(0, 1)
    mask = Explicit(jnp.asarray(by_place.repeat(N // K, 1)))
    dense, _ = module(X, Tokens.of(X, positions=jnp.asarray(positions), mask=mask))
    assert_same(y, dense, seen, rounding(policy))
    counts = reads[seen].sum(-1)
    room = policy.select.pages * policy.select.size if policy.select else policy.slots
    if policy.select is None or not policy.select.decides:
        assert room is None or counts.max() <= room < T
    elif name in DECIDED:  # other ways to keep may hold so few tokens that whole steps read no more
        assert counts.min() < counts.max() > room
    if policy.budget is not None:
        np.testing.assert_array_equal(counts.max(0), np.minimum(policy.budget, room))
    if name.startswith("heavy") and padding == "none":
        assert (reads[:, -1, 0] != reads[:, -1, 1]).any()  # heads keep different tokens


CHUNKS = ["sinks and recent", "a ring", "budgets by head", "spans", "recent ones, in shared pages"]


@pytest.mark.parametrize("name", CHUNKS)
def test_a_prompt_in_pieces_is_kept_as_one_that_comes_at_once(module, name):
    """For policies that do not read weights: the tokens after it see the same."""
    positions = PADDING["none"]
    for cuts in ([[1] * T, [7, 5, 1, 3, *[1] * 8]], [[16, *[1] * 8], [9, 7, *[1] * 8]]):
        (one, reads), (other, reads2) = (decoded(module, POLICIES[name], positions, cut) for cut in cuts)
        np.testing.assert_array_equal(reads[:, 16:], reads2[:, 16:])
        assert_same(one[:, 16:], other[:, 16:], np.ones((B, 8), bool))


def test_a_prompt_is_read_in_full_and_then_cut(module):
    y, reads = decoded(module, POLICIES["heavy hitters"], PADDING["none"], [16, *[1] * 8])
    whole, _ = module(X)
    assert_same(y[:, :16], whole[:, :16], np.ones((B, 16), bool))
    assert (reads[:, 16:].sum(-1) == 8).all()


@pytest.mark.parametrize("name", CASES)
def test_with_room_for_all_every_policy_is_the_whole_cache(module, name):
    policy = (POLICIES | PRODUCT)[name]
    policy = dataclasses.replace(policy, slots=T if policy.retain.evicts else None, budget=None)
    if policy.select is not None:
        all_ = {"window": T} if isinstance(policy.select, QAdA) else {"pages": T // policy.select.size}
        select = dataclasses.replace(policy.select, **all_)
        policy = dataclasses.replace(policy, select=select)
    if isinstance(policy.retain, Spans):
        policy = dataclasses.replace(policy, retain=Spans(0, 1.0))
    if isinstance(policy.retain, ByHistory):
        scorer = dataclasses.replace(SCORER, score=(SCORER.score[0], jnp.full(1, jnp.inf)))
        policy = dataclasses.replace(policy, retain=dataclasses.replace(policy.retain, scorer=scorer))
    whole, _ = module(X)
    for cut in ([1] * T, [11, *[1] * 13]):
        y, _ = decoded(module, policy, PADDING["none"], cut)
        assert_same(y, whole, np.ones((B, T), bool), rounding(policy))


@pytest.mark.parametrize("select", [Quest(2, 4), Recycled(2, 4, size=8), None], ids=["by bounds", "recycled", "all"])
@pytest.mark.parametrize("storage", [Dense(), Paged(6), Quantised(16, 4, 4)], ids=["dense", "paged", "in bits"])
def test_a_store_for_21_tokens_ends_with_its_last_page_and_reads_as_a_longer_one(module, select, storage):
    """Records are of the 21 positions, and a token beyond them is refused or makes its row NaN."""
    policy, length = Policy(select=select, storage=storage), 21
    short, long = (module.init_state(B, size, policy) for size in (length, T))
    for cut in (slice(0, 9), *(slice(t, t + 1) for t in range(9, length))):
        positions = jnp.arange(length)[None, cut]
        a, short, _ = step(module, X[:, cut], jnp.broadcast_to(positions, (B, positions.size)), short)
        b, long, _ = step(module, X[:, cut], jnp.broadcast_to(positions, (B, positions.size)), long)
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="positions reaches 21 but the state has capacity 21: need at most 20"):
        module(X[:, :1], Tokens.of(X[:, :1], positions=jnp.full((B, 1), 21)), state=short)
    beyond, _, _ = step(module, X[:, :1], jnp.array([[21], [20]]), short)
    assert np.isnan(beyond[0]).all()
    assert np.isfinite(beyond[1]).all()
    if select is None or not select.decides:
        tap = Tap(record=("weights",))
        module(X[:, :1], Tokens.of(X[:, :1], positions=jnp.full((B, 1), 20)), tap, short)
        assert tap.records["weights"].shape == (B, N, 1, length)


@pytest.mark.parametrize("name", ["heavy hitters", "pages", "budgets by head"])
def test_recorded_weights_stand_at_positions_whatever_the_slots(module, name):
    """They make z of the values, and are 0 where nothing was read."""
    store, graph = module.init_state(B, T, POLICIES[name]), nnx.split(module)[0]
    values = module.keys_and_values(X)[1]

    @jax.jit
    def one(arrays, x, store):
        tap = Tap(record=("weights", "z", "read"))
        return nnx.merge(graph, arrays)(x, tap=tap, state=store)[1], tap.records

    for t in range(T):
        store, records = one(nnx.split(module)[1], X[:, t : t + 1], store)
    weights, read = (
        np.asarray(records["weights"])[:, :, 0],
        np.broadcast_to(records["read"], (B, *records["read"].shape[1:2], K)),
    )
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    z = np.einsum("bns,bsnh->bnh", weights, np.repeat(values, N // K, 2))
    np.testing.assert_allclose(z, records["z"][:, 0], rtol=1e-4, atol=1e-5)
    for b, n in np.ndindex(B, N):
        places = read[b, :, n // (N // K)]
        assert set(np.flatnonzero(weights[b, n])) <= set(places[places >= 0])


def test_numbers_of_a_policy_change_without_another_program(module):
    graph, state = nnx.split(module)
    traced = []

    @jax.jit
    def one(state, x, store):
        traced.append(store)
        return nnx.merge(graph, state)(x, state=store)

    for sinks, recent, budget in ((1, 3, [5, 6]), (2, 4, [8, 7])):
        store = module.init_state(B, T, Policy(HeavyHitters(sinks, recent), 8, budget=jnp.array(budget)))
        for t in range(3):
            _, store = one(state, X[:, t : t + 1], store)
    assert len(traced) == 1


def test_a_trained_model_decodes_under_another_store():
    """Without another config. Layers are scanned; records say what each of them read."""
    layers = [pre_norm(Spec(nn.MultiHeadAttention, heads=N, key_heads=K))] * 2
    model = Transformer(TransformerConfig(11, T, D, layers), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(1).integers(0, 11, (B, T))
    graph, arrays = nnx.split(model)

    @jax.jit
    def one(arrays, tokens, state):
        return nnx.merge(graph, arrays)(tokens, state=state, record=("read",))

    state = model.init_state(B, T, Policy(HeavyHitters(1, 3), 8))
    logits, state, _ = one(arrays, tokens[:, :16], state)
    whole = model(tokens)[0]
    assert_same(logits, whole[:, :16], np.ones((B, 16), bool))
    for t in range(16, T):
        logits, state, records = one(arrays, tokens[:, t : t + 1], state)
        read = np.asarray(records["read"])
        assert read.shape == (2, B, 8, K)
        assert (read == t).any(2).all()  # the newest is read
    assert np.isfinite(logits).all()
    assert abs(logits[:, 0] - whole[:, -1]).max() > 1e-4  # something was evicted


@pytest.mark.parametrize("budget", [None, np.array([4, 7])], ids=["together", "by head"])
@pytest.mark.parametrize(
    "cut", [[1] * T, [10, *[1] * (T - 10)], [9, 1, 8, 6]], ids=["one by one", "a prompt", "pieces"]
)
@pytest.mark.parametrize("local", [None, 3], ids=["ranks", "memory"])
def test_places_are_a_loop_that_turns_all_keys_anew(module, cut, budget, local):
    """In float64, by lists: what is held of each key head, each key turned to its place in the list, or those before
    the last three to place 0.
    """
    sinks, slots, at = 2, 7, Rank() if local is None else Memory(local)
    policy = Policy(Recent(sinks), slots, budget=None if budget is None else jnp.asarray(budget), key_position=at)
    actual, _ = decoded(module, policy, PADDING["none"], cut)
    query, (key, value) = np.asarray(module.queries(X)), map(np.asarray, module.keys_and_values(X))
    z = np.zeros((B, T, N, D // N))
    for b, k in np.ndindex(B, K):
        room, held, first = slots if budget is None else budget[k], [], 0
        for size in cut:
            piece = list(range(first, first + size))
            if size == 1:
                while len(held) >= room:
                    held.remove(min(each for each in held if each >= sinks))
            for t in piece:
                seen = held + [each for each in piece if each <= t]
                places = np.arange(len(seen))
                if local is not None:
                    places = np.maximum(np.array(seen) - (piece[-1] - local + 1), 0)
                turned = np.asarray(rotary(key[b, seen][:, k : k + 1], places), np.float64)[:, 0]
                for n in range(k * N // K, (k + 1) * N // K):
                    place = places[-1:]
                    asks = np.asarray(rotary(query[b, t][None, n : n + 1], place), np.float64)[0, 0]
                    scores = turned @ asks / np.sqrt(D // N)
                    weights = np.exp(scores - scores.max())
                    z[b, t, n] = weights / weights.sum() @ value[b, seen, k]
            held = held + piece
            if size > 1 and len(held) > room:
                held = held[:sinks] + held[len(held) - (room - sinks) :]
            first += size
    expected = np.asarray(module.merge(jnp.asarray(z, jnp.float32), X))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=200 * EPS * abs(expected).max())


@pytest.mark.parametrize("padding", PADDING)
def test_ranks_are_the_positions_while_nothing_is_evicted(module, padding):
    positions = PADDING[padding]
    by_rank, _ = decoded(module, Policy(key_position=Rank()), positions, [7, *[1] * (T - 7)])
    absolute, _ = decoded(module, Policy(), positions, [7, *[1] * (T - 7)])
    np.testing.assert_allclose(by_rank, absolute, rtol=0, atol=100 * EPS * abs(np.asarray(absolute)).max())


def test_what_needs_keys_as_they_were_written_refuses_ranks(module):
    with pytest.raises(ValueError, match="select is Quest, which bounds scores by keys as they are written"):
        module.init_state(B, T, Policy(select=Quest(2, 4), key_position=Rank()))
    store = module.init_state(B, T, Policy(key_position=Rank()))
    with pytest.raises(ValueError, match=r"turns keys when they are read \(Rank\): need Policy\(key_position=Absolute"):
        module(X, tap=Tap(record=("k_rotated",)), state=store)
    with pytest.raises(ValueError, match="for layers that share keys"):
        module(X, state=store, give={})


GRADIENTS = {
    "sinks and recent": Policy(Recent(2), 6),
    "heavy hitters and pages": Policy(HeavyHitters(1, 3), 8, Quest(1, 4), jnp.array([5, 7])),
    "votes, at their rank": Policy(SnapKV(2, 3, 1), 6, key_position=Rank()),
    "recycled": Policy(select=Recycled(5, 4, 0.9)),
    "local or all": Policy(select=QAdA(1, 5, 0.5)),
    "pages of a pool": Policy(Attentive("last", 2, 1, 2), 6, MeanKeys(2, 2), storage=Paged(2)),
    "histories": Policy(ByHistory(SCORER, every=5, window=4, hop=2), 6),
}


SLOW = {"histories": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in GRADIENTS])
def test_gradients_through_decoding_are_finite_differences(name):
    """In float64, of inputs and of every parameter: what is kept is piecewise constant, what is read is not."""
    with jax.enable_x64(True):
        module = randomise(MultiHeadAttention(D, N, key_heads=K, mask=Causal(), dtype=jnp.float64, rngs=nnx.Rngs(0)))
        graph, arrays = nnx.split(module)
        arrays = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        x = jnp.asarray(np.asarray(X, np.float64))
        goal = jnp.asarray(np.random.default_rng(7).standard_normal((B, T, D)))

        @jax.jit
        def loss(inputs):
            arrays, x = inputs
            module = nnx.merge(graph, arrays)
            prompt, store = module(x[:, :8], state=module.init_state(B, T, GRADIENTS[name]))

            def one(store, x):
                y, store = nnx.merge(graph, arrays)(x[:, None], state=store)
                return store, y[:, 0]

            _, rest = jax.lax.scan(one, store, jnp.moveaxis(x[:, 8:], 1, 0))
            return (goal * jnp.concatenate([prompt, jnp.moveaxis(rest, 0, 1)], 1)).sum()

        rng = np.random.default_rng(2)
        leaves, tree = jax.tree.flatten((arrays, x))
        gradient = jax.tree.leaves(jax.jit(jax.grad(loss))((arrays, x)))
        for number, leaf in enumerate(leaves):
            way = jnp.asarray(rng.standard_normal(leaf.shape))
            way = way / jnp.linalg.norm(way)
            sides = ([x + sign * 1e-6 * way if i == number else x for i, x in enumerate(leaves)] for sign in (1, -1))
            up, down = (float(loss(tree.unflatten(side))) for side in sides)
            # A central difference errs by the third derivative times h²/6, and by ε |loss| / h.
            assert float((gradient[number] * way).sum()) == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-7)
