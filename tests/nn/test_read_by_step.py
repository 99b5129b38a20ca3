"""Policies that look back at earlier steps: what each step reads is what a plain loop over tokens says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from multi_head import randomise

from jaxattn import Causal, Received
from jaxattn.cache import ActQKV, HeavyHitters, Ltri, MeanKeys, Policy, QAdA, Rank, Recent, Recycled, empty
from jaxattn.nn import MultiHeadAttention, Tap, Tokens

B, T, D, N, K = 2, 20, 16, 4, 2
G, H = N // K, D // N
X = jnp.asarray(np.random.default_rng(3).standard_normal((B, T, D)), jnp.float32)
RAGGED = np.stack([np.arange(T), np.where(np.arange(T) < 3, -1, np.arange(T) - 3)])  # by position, padded on the left


@pytest.fixture(scope="module")
def module():
    return randomise(MultiHeadAttention(D, N, key_heads=K, mask=Causal(), rngs=nnx.Rngs(0)))


@nnx.jit
def step(module, x, positions, store):
    tap = Tap(record=("read",))
    y, store = module(x, Tokens.of(x, positions=positions), tap, store)
    return y, store, tap.records["read"]


def reads(module, policy, positions, prompt):
    """[B][t after the prompt][K] -> the set of positions that was read, and the store at the end."""
    _, store, _ = step(module, X[:, :prompt], jnp.asarray(positions[:, :prompt]), module.init_state(B, T, policy))
    found = [[] for _ in range(B)]
    for t in range(prompt, T):
        _, store, read = step(module, X[:, t : t + 1], jnp.asarray(positions[:, t : t + 1]), store)
        read = np.broadcast_to(read, (*read.shape[:2], K))
        for b in range(B):
            found[b].append([set(map(int, read[b, read[b, :, k] >= 0, k])) for k in range(K)])
    return found, store


def turned(module, positions):
    """Queries and keys of all tokens, by position, in float64: [B][T][N or K, H]."""
    places = jnp.asarray(positions)
    query = np.asarray(module.turn(module.queries(X), places), np.float64)
    key = np.asarray(module.turn(module.keys_and_values(X)[0], places), np.float64)
    return query, key


def weights(query, keys):
    """Softmax of one query [H] over keys [n, H]."""
    scores = keys @ query / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("below", "pool"), [(None, 1), (0.3, 1), (None, 5)], ids=["by number", "by the query", "with neighbours"]
)
def test_a_recycled_step_reads_what_the_last_full_step_attended_to_and_what_came_since(module, below, pool):
    tokens, every, prompt = 6, 3, 9
    found, _ = reads(module, Policy(select=Recycled(tokens, every, below, pool=pool)), RAGGED, prompt)
    query, key = turned(module, RAGGED)
    kinds = set()
    for b in range(B):
        first = int((RAGGED[b] < 0).sum())

        def best(t, first=first, b=b):
            """The tokens by weight of the full step at t: per key head, the most for one of its query heads."""
            seen = np.arange(first, t + 1)
            most = [
                np.max([weights(query[b, t, n], key[b, seen, k]) for n in range(k * G, (k + 1) * G)], 0)
                for k in range(K)
            ]
            most = [[max(each[max(i - pool // 2, 0) : i + pool // 2 + 1]) for i in range(len(each))] for each in most]
            return [list(seen[np.argsort(-np.array(each), kind="stable")]) for each in most]

        chosen, at_full, since, steps = best(prompt - 1), query[b, prompt - 1].mean(0), [], 0
        for i, t in enumerate(range(prompt, T)):
            since.append(t)
            mean = query[b, t].mean(0)
            due = steps + 1 >= every
            cosine = mean @ at_full / np.linalg.norm(mean) / np.linalg.norm(at_full)
            whole = due and (below is None or cosine < below)
            for k in range(K):
                few = [*chosen[k][: max(tokens - len(since), 0)], *since[-tokens:]]
                expected = range(first, t + 1) if whole else few
                assert found[b][i][k] == {int(RAGGED[b, each]) for each in expected}
            if whole:
                chosen, at_full, since = best(t), mean, []
            steps = 0 if due else steps + 1
            kinds.add((due, whole))
    assert kinds == {(False, False), (True, True)} | ({(True, False)} if below else set())


def test_with_every_step_full_it_is_the_whole_cache_and_no_token_is_lost(module):
    positions = jnp.asarray(RAGGED)
    one, two = (module.init_state(B, T, policy) for policy in (Policy(), Policy(select=Recycled(3, 1))))
    for cut in (slice(0, 7), *(slice(t, t + 1) for t in range(7, T))):
        a, one, _ = step(module, X[:, cut], positions[:, cut], one)
        b, two, _ = step(module, X[:, cut], positions[:, cut], two)
        np.testing.assert_allclose(a, b, rtol=0, atol=50 * np.finfo(np.float32).eps * abs(np.asarray(a)).max())
    np.testing.assert_array_equal(one.positions, two.positions)
    np.testing.assert_array_equal(np.sort(two.positions[1, :, 0])[3:], np.arange(T - 3))


def test_a_step_that_is_not_full_does_not_read_all(module):
    """One of two branches is run: the other is not a `select` of both results."""
    store = module.init_state(1, T, Policy(select=Recycled(6, 3)))
    text = str(jax.make_jaxpr(lambda x, store: module(x, state=store)[0])(X[:1, :1], store))
    assert "cond[" in text
    plain = str(jax.make_jaxpr(lambda x, store: module(x, state=store)[0])(X[:1, :1], module.init_state(1, T)))
    assert "cond[" not in plain


def test_records_are_the_same_kind_in_full_steps_and_others(module):
    """Weights stand at positions and are 0 where nothing was read; a number per key is refused."""
    policy, graph = Policy(HeavyHitters(1, 2), 12, Recycled(5, 3)), nnx.split(module)[0]

    @jax.jit
    def one(arrays, x, store):
        tap = Tap(record=("weights", "scores", "read", "lse"))
        return nnx.merge(graph, arrays)(x, tap=tap, state=store)[1], tap.records

    _, store, _ = step(module, X[:, :9], jnp.broadcast_to(jnp.arange(9), (B, 9)), module.init_state(B, T, policy))
    counts = set()
    for t in range(9, T):
        store, records = one(nnx.split(module)[1], X[:, t : t + 1], store)
        read, of_heads = np.asarray(records["read"]), np.asarray(records["weights"])[:, :, 0]
        np.testing.assert_allclose(of_heads.sum(-1), 1, rtol=1e-5)
        for b, n in np.ndindex(B, N):
            places = read[b, :, n // G]
            assert set(np.flatnonzero(of_heads[b, n])) <= set(places[places >= 0])
            counts.add(int((places >= 0).sum()))
    assert counts == {5, 12}
    with pytest.raises(ValueError, match="'x' has a number per key, and Recycled decides by step how many keys"):
        module(X[:, :1], tap=Tap(record={"x": ("weights", Received())}), state=store)
    with pytest.raises(ValueError, match=r"decides by step what is read \(Recycled\), which layers that share keys"):
        module(X[:, :1], state=store, give={})


def test_what_looks_back_needs_positions_and_is_not_taken_back():
    store = empty(B, 8, (K, H), (K, H), jnp.float32, Policy(select=Recycled(3, 2)))
    key = jnp.ones((B, 1, K, H))
    store = store.append(key, key, jnp.zeros((B, 1), jnp.int32))
    with pytest.raises(ValueError, match="positions of the queries, which Recycled looks back at"):
        store.observe({}, store.read(jnp.ones((B, 1, N, H))))
    with pytest.raises(ValueError, match=r"remembers what earlier steps have read \(Recycled\)"):
        store.rolled_back(jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="Recycled: every holds 0: need numbers at least 1"):
        Recycled(4, 0)
    with pytest.raises(ValueError, match="Recycled: pool is 4: need an odd number of neighbours"):
        Recycled(4, pool=4)


def test_rows_go_their_own_way(module):
    """A row is read as if it were alone, whichever rows stand beside it and however many steps they have come."""
    policy = Policy(select=Recycled(4, 4))
    found, _ = reads(module, policy, RAGGED, 8)
    late = RAGGED.copy()
    late[0, :9] = -1  # the first row begins in the middle
    late[0, 9:] = np.arange(T - 9)
    apart, store = reads(module, policy, late, 8)
    assert apart[1] == found[1]
    same = jax.tree.leaves(store.reordered(jnp.array([1, 0])).reordered(jnp.array([1, 0])))
    jax.tree.map(np.testing.assert_array_equal, same, jax.tree.leaves(store))


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.1])
def test_qada_reads_sinks_and_window_where_they_outweigh_what_the_moments_say_of_the_rest(module, threshold):
    sinks, window, prompt = 2, 4, 9
    found, _ = reads(module, Policy(select=QAdA(sinks, window, threshold)), RAGGED, prompt)
    query, key = turned(module, RAGGED)
    kinds = []
    for b in range(B):
        first = int((RAGGED[b] < 0).sum())
        for i, t in enumerate(range(prompt, T)):
            seen = np.arange(first, t + 1)
            local = [s for s in seen if s - first < sinks or s > t - window]
            for k in range(K):
                rest = key[b, first + sinks : t, k]  # the moments are those before this step
                mean, spread = rest.mean(0), np.cov(rest.T, bias=True)
                shares = []
                for n in range(k * G, (k + 1) * G):
                    q = query[b, t, n] / np.sqrt(H)
                    bulk = np.log(len(seen) - len(local)) + q @ mean + q @ spread @ q / 2
                    shares.append(1 / (1 + np.exp(bulk - np.log(np.exp(key[b, local, k] @ q).sum()))))
                whole = min(shares) < threshold
                kinds.append(whole)
                assert found[b][i][k] == {int(RAGGED[b, s]) for s in (seen if whole else local)}
    assert np.mean(kinds) == {0.0: 0, 1.1: 1}.get(threshold, pytest.approx(0.5, abs=0.45))


def mean(weights):
    return jnp.isfinite(weights) / jnp.isfinite(weights).sum(-1, keepdims=True)


@pytest.mark.parametrize("prompt", [1, 9])
@pytest.mark.parametrize("turns", ["as they met", "turned on", "before any turn", "a plain mean"])
def test_actqkv_reads_the_pages_that_one_query_for_the_window_likes_best(module, turns, prompt):
    pages, size, window = 3, 2, 4
    options = {"turned on": {"position": module.position}, "a plain mean": {"weigh": mean}}.get(turns, {})
    at = {"key_position": Rank()} if turns == "before any turn" else {}
    found, _ = reads(module, Policy(select=ActQKV(pages, size, window, **options), **at), RAGGED, prompt)
    differs = 0
    for b in range(B):
        first = int((RAGGED[b] < 0).sum())
        for i, t in enumerate(range(prompt, T)):
            if t < first:
                continue
            now = RAGGED[b, t]
            last = list(range(first, t + 1))[-window:]
            query, key = turned(module, RAGGED)
            if turns == "before any turn":
                query, key = (np.asarray(x, np.float64) for x in (module.queries(X), module.keys_and_values(X)[0]))
            if turns == "turned on":
                query = np.asarray(module.turn(module.queries(X), jnp.full((B, T), now)), np.float64)
            asks = [query[b, s] for s in last]
            away = []  # how far each query is from the mean, channel by channel
            for q in asks:
                total = 0.0
                for n, c in np.ndindex(N, H):
                    channel = np.array([other[n, c] for other in asks])
                    total += (q[n, c] - channel.mean()) ** 2 / channel.var() if channel.var() > 1e-12 else 0.0
                away.append(total / (N * H))
            weights = np.exp(away) / np.exp(away).sum()
            if turns == "a plain mean":
                weights = np.full(len(last), 1 / len(last))
            probe = sum(w * q for w, q in zip(weights, asks, strict=True))
            chunks = [range(first + p, min(first + p + size, t + 1)) for p in range(0, now + 1, size)]
            for k in range(K):
                means = [key[b, list(chunk), k].mean(0) for chunk in chunks]
                worth = [max(means[p] @ probe[n] for n in range(k * G, (k + 1) * G)) for p in range(len(chunks))]
                worth[-1] = np.inf
                best = np.argsort(-np.array(worth))[:pages]
                assert found[b][i][k] == {int(RAGGED[b, s]) for p in best for s in chunks[p]}
                alone = [max(means[p] @ query[b, t, n] for n in range(k * G, (k + 1) * G)) for p in range(len(chunks))]
                differs += set(np.argsort(-np.array([*alone[:-1], np.inf]))[:pages]) != set(best)
    assert differs > 0  # the newest query alone would have read other pages


def test_a_window_of_one_query_is_the_query(module):
    one, _ = reads(module, Policy(select=ActQKV(3, 2, window=1)), RAGGED, 8)
    other, _ = reads(module, Policy(select=MeanKeys(3, 2)), RAGGED, 8)
    assert one == other


def spans_of(attention, factor, overlap, count, least):
    """The spans of a window by lists: dense triangles, the best without those that overlap it, and what is between."""
    size = len(attention)
    scores = {}
    for x in range(size):
        for y in range(x + least - 1, size):
            score = sum(attention[i][j] - factor / (i + 1) for i in range(x, y + 1) for j in range(x, i + 1))
            if score > 0:
                scores[x, y] = score
    taken = []
    for x, y in sorted(scores, key=lambda each: -scores[each]):
        common = [max(0, min(y, b) - max(x, a) + 1) for a, b in taken]
        union = [(y - x + 1) + (b - a + 1) - both for (a, b), both in zip(taken, common, strict=True)]
        if len(taken) < count and all(both <= overlap * of for both, of in zip(common, union, strict=True)):
            taken.append((x, y))
    owner = [next((n for n, (a, b) in enumerate(taken) if a <= i <= b), None) for i in range(size)]
    spans = [[0]]
    for i in range(1, size):
        if owner[i] == owner[i - 1]:
            spans[-1].append(i)
        else:
            spans.append([i])
    return spans


@pytest.mark.parametrize("prompt", [1, 7, 14])
def test_ltri_reads_whole_spans_of_full_windows_and_all_of_the_last_one(module, prompt):
    tokens, size, sinks, count, overlap, least = 9, 6, 1, 2, 0.2, 2
    policy = Policy(select=Ltri(tokens, size, sinks, count, overlap, least=least))
    found, _ = reads(module, policy, RAGGED, prompt)
    query, key = turned(module, RAGGED)
    lengths, cut = set(), 0
    for b in range(B):
        first = int((RAGGED[b] < 0).sum())
        spans = []
        for begin in range(first, T - size + 1, size):
            attention = np.zeros((size, size))
            for i, n in np.ndindex(size, N):
                attention[i, : i + 1] += weights(query[b, begin + i, n], key[b, begin : begin + i + 1, n // G]) / N
            spans += [[begin + i for i in span] for span in spans_of(attention, 1.1, overlap, count, least)]
        lengths |= set(map(len, spans))
        for i, t in enumerate(range(prompt, T)):
            if t < first:
                continue
            past = (t - first) // size * size + first  # the step that fills a window sees it as open still
            for k in range(K):
                held = set(range(past, t + 1)) | set(range(first, min(first + sinks, t + 1)))
                known = [span for span in spans if span[-1] < past]

                def worth(span, b=b, t=t, k=k):
                    mean = key[b, span, k].mean(0)
                    return max(mean @ query[b, t, n] for n in range(k * G, (k + 1) * G))

                for span in sorted(known, key=worth, reverse=True):
                    for s in span:
                        if len(held) < tokens:
                            held.add(s)
                        else:
                            cut += s not in held
                assert found[b][i][k] == {int(RAGGED[b, s]) for s in held}
    assert len(lengths) > 2
    assert cut > 0


@pytest.mark.parametrize("select", [Ltri(7, 4, 1), ActQKV(3, 2, 3)], ids=["spans", "a probe"])
def test_what_is_remembered_of_a_prompt_does_not_depend_on_the_pieces_in_which_it_came(module, select):
    """Also where the store evicts: what a token of a full window is worth stays with the token."""
    for policy in (Policy(select=select), Policy(Recent(1), 16, select)):
        after = []
        for cut in ([16], [1] * 16, [5, 1, 7, 3]):
            store, start = module.init_state(B, T, policy), 0
            for length in cut:
                piece = slice(start, start + length)
                _, store, _ = step(module, X[:, piece], jnp.asarray(RAGGED[:, piece]), store)
                start += length
            row, order = np.arange(B)[:, None], np.asarray(store.positions)[..., 0].argsort(1)
            marks = [np.asarray(x)[row, order] for x in jax.tree.leaves(store.remembered.slots)]
            after.append((marks, store.remembered.rows))
        for other in after[1:]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after[0], other)


def test_probes_and_spans_out_of_range_are_refused():
    for make, error, message in (
        (lambda: ActQKV(0), ValueError, "ActQKV: pages must be at least 1, got 0"),
        (lambda: ActQKV(2, position="rotary"), TypeError, "ActQKV: position is 'rotary': need a part"),
        (lambda: Ltri(60), ValueError, "Ltri: pages must be at least 68, got 60"),
        (lambda: Ltri(80, overlap=2.0), ValueError, r"Ltri: overlap is 2\.0: need a number from 0 to 1"),
        (lambda: Ltri(80, factor=1.0), ValueError, r"Ltri: factor holds 1\.0: need numbers above 1"),
    ):
        with pytest.raises(error, match=message):
            make()
