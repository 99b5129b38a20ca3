"""Choices of blocks, held to loops over the tokens that are there, in float64, one query block at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from jax.test_util import check_grads

from jaxattn import Blocks, Causal, Dot, Explicit, attend
from jaxattn.core.attend import Choice, FlexPrefill, MoBA, VerticalSlash, cumulative_select, sqrt_jsd

T, N, K, H = 22, 4, 2, 4
# Of sequences as short as these.
by_lines, by_share = (partial(kind, dense_below=0) for kind in (VerticalSlash, FlexPrefill))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def a_call(length=T, scale=2.0):
    query, key = scale * normal(2, length, N, H), normal(2, length, K, H, seed=1)
    key[0, : length // 4, 0] = 0  # scores of exactly 0, all equal
    return query, key, normal(2, length, 1, 3, seed=2)


def ragged(length=T, seed=3):
    """Slots in any order, some of them empty, one of the sequences short."""
    rng = np.random.default_rng(seed)
    positions = np.stack([rng.permutation(length) for _ in range(2)])
    positions[1] = np.where(positions[1] < length - 7, positions[1], -1)
    positions[0] = np.where(positions[0] < length - 1, positions[0], -1)
    return positions


# The oracle: (query [T, N, H], key [S, N, H]) of one sequence in the order of positions -> active [N, QB, KB].


def starts(length, size):
    return range(0, length, size)


def means(x, size):
    return np.stack([x[i : i + size].mean(0) for i in starts(len(x), size)])


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def moba(choice, query, key):
    scores = np.einsum("qnh,knh->nqk", means(query, choice.queries), means(key, choice.size))
    active = np.zeros(scores.shape, bool)
    for n, i, _ in np.ndindex(*scores.shape[:2], 1):
        first, last = (
            min(p, len(query) - 1) // choice.size for p in (i * choice.queries, (i + 1) * choice.queries - 1)
        )
        own = set(range(first, last + 1))
        past = sorted(range(first), key=lambda c, s=scores[n, i]: (-np.float32(s[c]), c))
        active[n, i, [*own, *past[: max(choice.pages - len(own), 0)]]] = True
    return active


def profiles(block, query, key):
    """vertical and slash [N, S] of the last `block` queries."""
    length, heads = query.shape[:2]
    vertical, slash = np.zeros((2, heads, length))
    last = range(max(length - block, 0), length)
    for n in range(heads):
        for i in last:
            weights = softmax(key[: i + 1, n] @ query[i, n] * H**-0.5)
            vertical[n, : i + 1] += weights / len(last)
            slash[n, : i + 1] += weights[::-1] / len(last)
    return vertical, slash


def lines(block, length, columns, diagonals):
    count = -(-length // block)
    i, j = np.arange(count)[:, None], np.arange(count)
    return np.stack([(j <= i) & (np.isin(j, c) | np.isin(i - j, d)) for c, d in zip(columns, diagonals, strict=True)])


def best(sums, count, first):
    rest = sorted(range(first, len(sums)), key=lambda c: (-sums[c], c))
    return [*range(first), *rest[:count]]


def sums(x, block):
    return np.stack([x[..., i : i + block].sum(-1) for i in starts(x.shape[-1], block)], -1)


def vertical_slash(choice, query, key):
    vertical, slash = (sums(x, choice.block) for x in profiles(choice.block, query, key))
    of_head = [np.broadcast_to(x, N).tolist() for x in (choice.vertical, choice.slash)]
    columns = [best(x, c, choice.sinks) for x, c in zip(vertical, of_head[0], strict=True)]
    diagonals = [best(x, c, choice.local) for x, c in zip(slash, of_head[1], strict=True)]
    return lines(choice.block, len(query), columns, diagonals)


def share(p, mass):
    """The largest entries until their sum exceeds the mass."""
    total, kept = 0.0, []
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if total > mass or p[i] <= 0:
            break
        total, kept = total + p[i], [*kept, i]
    return kept


def flex_prefill(choice, query, key):
    b, length = choice.block, len(query)
    vertical, slash = profiles(b, query, key)
    v, s = sums(vertical, b), sums(slash, b)
    fewest, most = -(-choice.least // b), np.inf if choice.most is None else -(-choice.most // b)
    active = np.zeros((N, *(-(-length // b),) * 2), bool)
    for n in range(N):
        counts = [int(np.clip(len(share(x[n], choice.gamma)) // b + 1, fewest, most)) for x in (vertical, slash)]
        k = means(key, b)[:, n]
        pooled = softmax(k @ query[-b:, n].mean(0) * H**-0.5)
        middle = (pooled + v[n]) / 2
        jsd = sum((x[x > 0] * np.log(x[x > 0] / middle[x > 0])).sum() for x in (pooled, v[n])) / 2
        if np.sqrt(jsd) < choice.tau:
            scores = means(query, b)[:, n] @ k.T * H**-0.5
            rows = np.zeros(scores.shape)
            for i in range(len(scores)):
                rows[i, : i + 1] = softmax(scores[i, : i + 1])
            active[n].flat[share(rows.ravel(), choice.gamma * len(rows))] = True
            counts = [fewest, fewest]
        columns, diagonals = ([best(x[n], c - 1, 1)] for x, c in zip((v, s), counts, strict=True))
        active[n] |= lines(b, length, columns, diagonals)[0]
    return active


CHOICES = {
    "moba": (MoBA(4, 3), moba),
    "moba, together": (MoBA(4, 2, queries=6), moba),
    "vertical slash": (by_lines(1, 1, block=3), vertical_slash),
    "vertical slash by head": (
        by_lines(jnp.array([0, 1, 2, 0]), jnp.array([2, 0, 1, 0]), sinks=1, local=2, block=3),
        vertical_slash,
    ),
    "sinks and window": (by_lines(0, 0, sinks=2, local=2, block=4), vertical_slash),
    "flex, lines": (by_share(0.6, 0.0, block=3, least=2), flex_prefill),
    "flex, means": (by_share(0.6, 1.0, block=3, least=3, most=6), flex_prefill),
    "flex, either": (by_share(0.7, 0.25, block=4, least=4), flex_prefill),
}
by_choice = pytest.mark.parametrize("name", CHOICES)


def shown_by_hand(name, query, key, positions):
    """The pairs [B, N, T, S] that are shown, causal."""
    choice, oracle = CHOICES[name]
    block = (choice.queries, choice.size) if isinstance(choice, MoBA) else (choice.block, choice.block)
    shown = np.zeros((2, N, query.shape[1], key.shape[1]), bool)
    for b in range(2):
        order = [slot for slot in np.argsort(positions[b], kind="stable") if positions[b, slot] >= 0]
        q, k = query[b, order].astype(np.float64), np.repeat(key[b, order].astype(np.float64), N // K, 1)
        active = oracle(choice, q, k)
        for i, j in np.ndindex(len(order), len(order)):
            if j <= i:
                shown[b, :, order[i], order[j]] = active[:, i // block[0], j // block[1]]
    return shown


@by_choice
def test_the_chosen_pairs_and_what_is_read_of_them(name):
    """As a loop over the tokens in the order of their positions chooses them, at the default and at any positions."""
    choice, (query, key, value) = CHOICES[name][0], a_call()

    @jax.jit
    def found(choice, query, key, value, places):
        mask = Causal() & choice(query, key, **places)
        at = (T, T) if not places else (places["query_positions"], places["key_positions"])
        return mask.to_array(*at), attend(query, key, value, mask=mask, block=4, implementation="tiled", **places)

    for positions in (None, ragged()):
        places = {} if positions is None else {"query_positions": positions, "key_positions": positions}
        given = [
            x if positions is None else np.where((positions < 0)[..., None, None], np.nan, x) for x in (query, key)
        ]
        at = np.broadcast_to(np.arange(T), (2, T)) if positions is None else positions
        expected = shown_by_hand(name, query, key, at)
        array, out = found(choice, *given, value, places)
        np.testing.assert_array_equal(array, expected)
        reference = attend(query, key, value, mask=Explicit(expected))
        assert_close(out, reference, 8 * np.abs(value).max())
        assert 0.1 < expected.sum() / np.tril(np.ones((T, T))).sum() / 2 / N < 0.9


def test_choices_are_those_of_each_sequence_alone():
    """vmap over entries, one head at a time, and a later continuation at its positions."""
    query, key, value = a_call()
    for choice in (CHOICES[name][0] for name in ("moba", "vertical slash", "flex, either")):

        def run(query, key, value, choice=choice, **places):
            return attend(query, key, value, mask=Causal() & choice(query, key, **places), **places)

        together = run(query, key, value)
        np.testing.assert_allclose(jax.jit(jax.vmap(run))(query, key, value), together, rtol=0, atol=1e-5)
        heads = [run(query[:, :, n : n + 1], key[:, :, n // 2 : n // 2 + 1], value) for n in range(N)]
        np.testing.assert_allclose(jnp.concatenate(heads, 2), together, rtol=0, atol=1e-5)
        later = {"query_positions": np.arange(10, T), "key_positions": np.arange(T)}
        if isinstance(choice, MoBA):  # of the others, blocks of queries begin anew
            np.testing.assert_allclose(run(query[:, 10:], key, value, **later), together[:, 10:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["moba", "vertical slash by head", "flex, either"])
def test_gradients_are_those_of_the_chosen_pairs(name):
    """Values, lse and gradients in float64, of tiles at ragged positions, against a table of the pairs."""
    choice, positions = CHOICES[name][0], ragged()
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(x, jnp.float64) for x in a_call())
        places = {"query_positions": positions, "key_positions": positions}
        table = Explicit((Causal() & choice(query, key, **places)).to_array(positions, positions))
        # The table is by slot: as it has the slots' positions, put it in their places.
        plain = {"query_positions": jnp.where(positions < 0, -1, jnp.arange(T))}
        plain |= {"key_positions": plain["query_positions"]}

        def chosen(*x):
            mask = Causal() & choice(*x[:2], **places)
            return attend(*x, mask=mask, implementation="tiled", block=4, return_lse=True, **places)

        def with_table(*x):
            return attend(*x, mask=table, implementation="dense", return_lse=True, **plain)

        (out, pull), (expected, pull_expected) = (jax.vjp(f, query, key, value) for f in (chosen, with_table))
        there = (positions >= 0)[..., None]
        np.testing.assert_allclose(out[0], expected[0], atol=1e-12)
        np.testing.assert_allclose(out[1]["lse"], expected[1]["lse"], atol=1e-12)
        cotangent = (jnp.ones_like(out[0]), {"lse": jnp.where(there, 0.5, 0.0) + jnp.zeros_like(out[1]["lse"])})
        for x, y in zip(pull(cotangent), pull_expected(cotangent), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-11)
            assert np.abs(y).max() > 0.1
        check_grads(lambda value: chosen(query, key, value)[0], (value,), 1, modes=["rev"])


def test_everything_chosen_is_causal_attention():
    query, key, value = a_call()
    expected = attend(query, key, value, mask=Causal())
    all_lines = by_lines(T, 0, block=4)
    for choice in (MoBA(4, 6), MoBA(22, 1), by_share(1.0, block=4), by_share(0.5), all_lines):
        mask = choice(query, key)
        assert isinstance(mask, Blocks if choice is all_lines else Causal)
        out = attend(query, key, value, mask=Causal() & mask)
        assert_close(out, expected, 8 * np.abs(value).max())
    assert isinstance(VerticalSlash(1, 1, block=4)(query, key), Causal)
    assert isinstance(VerticalSlash(1, 1, block=4, dense_below=T + 1)(query, key), Causal)
    assert isinstance(VerticalSlash(1, 1, block=4, dense_below=T)(query, key), Blocks)
    every = by_share(0.999999, 1.0, block=4, least=4)(query, key)  # by the selection itself, but for rounding
    assert every.index.density() > 0.5


def changed(x, now, seed):
    return np.concatenate([x[:, : now + 1], normal(*x.shape, seed=seed)[:, now + 1 :]], 1)


def test_who_looks_ahead():
    """MoBA never does; with queries that choose together it does within their block alone; the prefill choices do."""
    call = a_call()

    @jax.jit
    def run(query, key, value):
        choices = (MoBA(4, 3), MoBA(4, 4, queries=6), by_lines(1, 1, block=2), by_share(0.6, 0.1, 2, 2))
        return [attend(query, key, value, mask=Causal() & choice(query, key)) for choice in choices]

    before, ahead = run(*call), np.zeros(4, bool)
    for now in (3, 8, 14, 17):
        after = run(*(changed(x, now, 9 + i) for i, x in enumerate(call)))
        same = [np.array_equal(x[:, : now + 1], y[:, : now + 1]) for x, y in zip(before, after, strict=True)]
        ahead |= ~np.array(same)
        whole = (now + 1) // 6 * 6
        np.testing.assert_array_equal(before[1][:, :whole], after[1][:, :whole])
    assert ahead.tolist() == [False, True, True, True]


def test_half_precision_and_numbers_that_are_not_finite():
    """bfloat16 reads what it chose; a NaN in a key reaches the rows that see it, an axis of one token is no trouble."""
    query, key, value = a_call()
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    for choice in (MoBA(4, 2), by_lines(1, 1, block=4), by_share(0.6, 0.3, 4, 4)):
        mask = Causal() & choice(*half[:2])
        wide = [np.asarray(x, np.float32) for x in half]
        reference = attend(*wide, mask=Explicit(mask.to_array(T)))
        assert_close(attend(*half, mask=mask), reference, 8 * np.abs(value).max(), jnp.bfloat16)
        for bad in (np.nan, np.inf):
            wrong = key.copy()
            wrong[:, 9] = bad
            mask = Causal() & choice(query, wrong)
            rows = np.isnan(attend(query, wrong, value, mask=mask)).any(-1)
            np.testing.assert_array_equal(rows, mask.to_array(T)[..., 9].swapaxes(1, 2))
        one = [x[:, :1] for x in (query, key, value)]
        out = attend(*one, mask=Causal() & choice(*one[:2]))
        np.testing.assert_allclose(out, np.broadcast_to(one[2], out.shape), rtol=1e-6)
        late = {"query_positions": np.array([3]), "key_positions": np.array([5])}
        np.testing.assert_array_equal(attend(*one, mask=Causal() & choice(*one[:2], **late), **late), 0)


def test_lines_are_found_where_they_are():
    """Weights on one distance choose its diagonal, weights on one key its column, in the head that has them."""
    b, length, far, column = 4, 32, 13, 9
    key = np.eye(length, dtype=np.float32)[None]
    slash = 99 * np.roll(np.eye(length), far, 0)[..., None, :]
    vertical = np.broadcast_to(99 * np.eye(length)[column], slash.shape)
    query = np.concatenate([slash, vertical], 1).astype(np.float32)
    keys = np.swapaxes(key, 0, 1)
    for choice in (by_lines(1, 1, block=b, score=Dot(1.0)), by_share(0.9, 0.0, b, 2 * b, score=Dot(1.0))):
        active = choice(query, keys).index.active
        i, j = np.arange(length // b)[:, None], np.arange(length // b)
        assert active[0][i - j == far // b].all()
        assert active[1][(j == column // b) & (j <= i)].all()


def test_cumulative_selection_is_the_least_that_exceeds_the_mass():
    rng = np.random.default_rng(0)
    p = rng.choice([0.0, 0.1, 0.25, 0.5], (40, 7))
    for mass in (0.0, 0.3, 1.0, 99.0):
        kept = np.asarray(cumulative_select(jnp.asarray(p, jnp.float32), mass))
        for row, chosen in zip(p, kept, strict=True):
            assert set(np.flatnonzero(chosen)) == set(share(row.astype(np.float32), np.float32(mass)))


def test_the_divergence_is_a_distance():
    p, q = (softmax(normal(5, 6, seed=i).astype(np.float64)) for i in range(2))
    middle = (p + q) / 2
    expected = np.sqrt(((p * np.log(p / middle)).sum(-1) + (q * np.log(q / middle)).sum(-1)) / 2)
    np.testing.assert_allclose(sqrt_jsd(p, q), expected, rtol=1e-5)
    np.testing.assert_allclose(sqrt_jsd(jnp.array([1.0, 0]), jnp.array([0, 1.0])), np.sqrt(np.log(2)), rtol=1e-6)
    np.testing.assert_array_equal(sqrt_jsd(jnp.array([0.25, 0.75, 0]), jnp.array([0.25, 0.75, 0])), 0)


X = np.zeros((5, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: MoBA(0, 1), ValueError, "MoBA: size must be at least 1, got 0"),
        (lambda: MoBA(4, 1.5), TypeError, "MoBA: pages must be an int, got 1.5"),
        (lambda: by_lines(-1, 1), ValueError, "VerticalSlash: vertical must be at least 0, got -1"),
        (lambda: by_lines(1, 1, local=0), ValueError, "VerticalSlash: local must be at least 1, got 0"),
        (lambda: by_share(0.0), ValueError, "FlexPrefill: gamma must be positive, got 0.0"),
        (lambda: by_share(tau=-1.0), ValueError, "FlexPrefill: tau must be at least 0, got -1.0"),
        (lambda: by_share(most=4), ValueError, "FlexPrefill: most must be at least 512, got 4"),
        (lambda: MoBA(4, 1)(X, X[:, :0]), ValueError, "no axis may be empty"),
        (lambda: MoBA(4, 1)(X, np.zeros((5, 3, 3))), ValueError, "key has 3 heads but query has 2"),
        (lambda: MoBA(4, 1)(X, X, key_positions=np.zeros((5, 2), int)), ValueError, "positions .* all heads share"),
        (lambda: MoBA(4, 1)(X, X, query_positions=np.arange(4)), ValueError, "query_positions has shape"),
        (Choice, TypeError, "abstract"),
    ],
)
def test_what_choices_refuse(make, exception, message):
    with pytest.raises(exception, match=message):
        make()
