"""Measures beside out: each is its dense definition, at any block size, in memory linear in length."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jaxtyping import Array, Float
from slots import SLOTS, B, N, S, T, answer, draw, places, weigh

import jaxattn.core.attend as ja
from jaxattn import attend, part

GROUPS = np.array([0, 0, 2, 1, 1, -1, 2, 0, 5, 1])
ASKED = np.array([1, -1, 0, 2, 0, 1, 4, 5, 0, 2, 1, 0, 2, -1])
AT = np.array([3, 8, 2, 40])
SPLIT = np.array([4, 6])


def table(r):
    """ids of the groups at key positions."""
    return np.where((r >= 0) & (r < len(GROUPS)), GROUPS[np.clip(r, 0, len(GROUPS) - 1)], -1)


def shares(w):
    total = w.sum(-1, keepdims=True)
    return w / np.where(total != 0, total, 1)


def entropy(w, seen, p, r):
    q = shares(w)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(q > 0, q * np.log(q), 0).sum(-1)


def best(w, seen, r, k):
    """(weights, positions) of the k largest visible weights, row by row in plain Python."""
    weights, where = np.zeros((*w.shape[:-1], k)), np.full((*w.shape[:-1], k), -1)
    for row in np.ndindex(*w.shape[:-1]):
        order = sorted(np.flatnonzero(seen[row]), key=lambda j: (-w[row][j], j))[:k]
        weights[row][: len(order)], where[row][: len(order)] = w[row][order], r[order]
    return weights, where


def lags(w, seen, p, r, count):
    out = np.zeros((*w.shape[:2], count))
    for i, j in np.ndindex(*w.shape[-2:]):
        if 0 <= p[i] - r[j] < count:
            out[..., p[i] - r[j]] += w[..., i, j]
    return out


def lookback(w, seen, p, r):
    out = np.zeros(w.shape[:-1])
    for b, n, i in np.ndindex(*w.shape[:-1]):
        parts = []
        for some in (r < SPLIT[b], r >= SPLIT[b]):
            chosen = some & seen[b, n, i]
            parts.append(w[b, n, i, chosen].mean() if chosen.any() else 0)
        out[b, n, i] = parts[0] / sum(parts) if sum(parts) > 0 else 0
    return out


def at_keys(w, r, places):
    return np.stack([w[..., r == place].sum(-1) for place in places], -1)


def at_lags(w, p, r, lags):
    return np.stack([np.where(p[:, None] - r == lag, w, 0).sum(-1) for lag in lags], -1)


def matching(w, p, r):
    """Pair by pair, where −1 matches nothing."""
    out = np.zeros(w.shape[:-1])
    for i, j in np.ndindex(w.shape[-2:]):
        if 0 <= p[i] < len(ASKED) and ASKED[p[i]] >= 0 and ASKED[p[i]] == table(r)[j]:
            out[..., i] += w[..., i, j]
    return out


def at(w, seen, p, r):
    out = np.zeros((*w.shape[:2], len(AT), w.shape[-1]))
    for i, place in enumerate(AT):
        for t in np.flatnonzero(p == place):
            out[:, :, i] = w[:, :, t]
    return out


def latest(w, p, now, count):
    out = np.zeros((w.shape[0], w.shape[3], count, w.shape[1]))
    for b, i in np.ndindex(len(w), count):
        for t in np.flatnonzero(p == now[b] - i) if p.ndim == 1 else np.flatnonzero(p[b] == now[b] - i):
            out[b, :, i] = w[b, :, t].T
    return out


def by_row(x):
    return np.moveaxis(x, 1, 2)


def top_for(w, seen, k):
    """By a loop over queries: of equals the first keys, and none without weight."""
    hits = np.zeros(w.shape)
    for at in np.ndindex(w.shape[:-1]):
        order = sorted(range(w.shape[-1]), key=lambda j: (-w[at][j] * seen[at][j], j))[:k]
        for j in order:
            hits[at][j] = seen[at][j] and w[at][j] > 0
    return hits.sum(-2).swapaxes(-1, -2)


# name: (the measure, the same of weights [B, N, T, S], visible, positions, in the layout that attend returns)
MEASURES = {
    "entropy": (ja.Entropy(), lambda w, seen, p, r: by_row(entropy(w, seen, p, r))),
    "mass": (
        ja.Mass(GROUPS, 3),
        lambda w, seen, p, r: by_row(np.stack([w[..., table(r) == g].sum(-1) for g in range(3)], -1)),
    ),
    "received": (ja.Received(), lambda w, seen, p, r: w.sum(-2).swapaxes(-1, -2)),
    "received of late queries": (
        ja.Received(jnp.array([5, 9])),
        lambda w, seen, p, r: (w * (p[:, None] >= np.array([5, 9])[:, None, None, None])).sum(-2).swapaxes(-1, -2),
    ),
    "seen by": (ja.SeenBy(), lambda w, seen, p, r: (seen + 0.0 * w).sum(-2).swapaxes(-1, -2)),
    "top for": (ja.TopFor(3), lambda w, seen, p, r: top_for(w, seen, 3)),
    "max": (ja.MaxWeight(), lambda w, seen, p, r: by_row(best(w, seen, r, 1)[0][..., 0])),
    "argmax": (ja.ArgMax(), lambda w, seen, p, r: by_row(best(w, seen, r, 1)[1][..., 0])),
    "top": (ja.TopWeights(4), lambda w, seen, p, r: tuple(map(by_row, best(w, seen, r, 4)))),
    "more than there are": (ja.TopWeights(S + 2), lambda w, seen, p, r: tuple(map(by_row, best(w, seen, r, S + 2)))),
    "distance": (ja.Distance(), lambda w, seen, p, r: by_row((shares(w) * abs(p[:, None] - r)).sum(-1))),
    "place": (ja.MeanPosition(), lambda w, seen, p, r: by_row((shares(w) * np.maximum(r, 0)).sum(-1))),
    "lags": (ja.LagProfile(5), partial(lags, count=5)),
    "at keys": (
        ja.AtKeys((2, 0)),
        lambda w, seen, p, r: by_row(at_keys(w, r, (2, 0))),
    ),
    "at lags": (ja.AtLags((3, 0, 1)), lambda w, seen, p, r: by_row(at_lags(w, p, r, (3, 0, 1)))),
    "matching": (ja.Matching(ASKED, GROUPS), lambda w, seen, p, r: by_row(matching(w, p, r))),
    "rows": (ja.RowsOf(AT), at),
    "latest": (ja.Latest(jnp.array([7, 12]), 3), lambda w, seen, p, r: latest(w, p, (7, 12), 3)),
    "lookback": (ja.Lookback(SPLIT), lambda w, seen, p, r: by_row(lookback(w, seen, p, r))),
}
KINDS = ("Dot", "Sigmoid", "Sparsemax", "everything on rows")


def call(name, scattered, arrays, implementation, block, measures):
    where, slot = places(scattered), SLOTS[name]
    return attend(
        *(arrays[x] for x in ("query", "key", "value")),
        mask=where.mask,
        query_positions=where.query if scattered else None,
        key_positions=where.key if scattered else None,
        return_lse=True,
        measures=measures,
        implementation=implementation,
        block=block,
        **slot.parts(arrays),
    )


ALL = {name: measure for name, (measure, _) in MEASURES.items()}


@pytest.mark.parametrize("scattered", [False, True], ids=["in order", "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_measure_is_its_definition(kind, scattered):
    """From the oracle's weights, in float64, dense and by rows; out and lse are what they are without measures."""
    where, slot = places(scattered), SLOTS[kind]
    arrays = draw(slot, where)
    weights, _, _ = weigh(arrays["query"], arrays["key"], where.visible, **slot.oracle(arrays, where.query, where.key))
    seen = np.broadcast_to(where.visible, weights.shape)
    with jax.enable_x64(True):
        for implementation, block in (("dense", None), ("rows", 4)):
            out, extras = call(kind, scattered, arrays, implementation, block, ALL)
            expected_out, lse = answer(slot, where, arrays)
            np.testing.assert_allclose(out, expected_out, rtol=0, atol=1e-12)
            np.testing.assert_allclose(extras["lse"], lse, rtol=0, atol=1e-12)
            for name, (_, definition) in MEASURES.items():
                expected = definition(weights, seen, where.query, where.key)
                # Of sums that are hundreds where weights have both signs, which rounds them by their size.
                size = max(1, *(np.abs(x).max(initial=0) for x in jax.tree.leaves(expected)))
                close = partial(np.testing.assert_allclose, rtol=0, atol=1e-12 * size, err_msg=name)
                jax.tree.map(close, extras[name], expected)


@cache
def measured(block):
    arrays = draw(SLOTS["Dot"], places(False))
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    implementation = "dense" if block is None else "rows"

    def loss(arrays):
        _, extras = call("Dot", False, arrays, implementation, block, ALL)
        smooth = [x for x in jax.tree.leaves({n: x for n, x in extras.items() if n != "lse"}) if x.dtype == jnp.float32]
        return sum((jnp.cos(jnp.arange(x.size)).reshape(x.shape) * x).sum() for x in smooth)

    return jax.jit(jax.value_and_grad(loss))(arrays)


@pytest.mark.parametrize("block", [1, 4, 64])
def test_measures_and_their_gradients_do_not_depend_on_the_block(block):
    """Sums of at most T·S·N terms near 1, in another order."""
    for x, y in zip(*map(jax.tree.leaves, (measured(block), measured(None))), strict=True):
        bound = 10 * np.sqrt(T * S * N) * np.finfo(np.float32).eps
        np.testing.assert_allclose(x, y, rtol=0, atol=bound * max(1, np.abs(y).max()))


def test_gradients_of_measures_are_finite_differences():
    arrays = draw(SLOTS["Dot"], places(False))

    @jax.jit
    def smooth(query, key):
        measures = {name: ALL[name] for name in ("entropy", "mass", "received", "distance", "lags", "rows", "lookback")}
        _, extras = attend(
            query, key, arrays["value"], mask=ja.Causal(), measures=measures, implementation="rows", block=4
        )
        return extras

    with jax.enable_x64(True):
        check_grads(smooth, (arrays["query"], arrays["key"]), order=1, modes=["fwd", "rev"])


# Laws of softmax attention.

RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(B, n, k, 4)).astype(np.float32) for n, k in ((T, N), (S, 2), (S, 2)))
EPS = 100 * np.finfo(np.float32).eps


@cache
def laws():
    _, extras = attend(QUERY, KEY, VALUE, mask=ja.Causal(), return_lse=True, measures=ALL, implementation="rows")
    return extras


def test_entropy_is_lse_less_the_mean_score():
    """H = lse − E[s] and E[s] = q · attend(value := key) / √H."""
    mean_key = attend(QUERY, KEY, KEY, mask=ja.Causal())
    np.testing.assert_allclose(laws()["entropy"], laws()["lse"] - (QUERY * mean_key).sum(-1) / 2, rtol=0, atol=EPS)
    keys = np.minimum(np.arange(T) + 1, S)
    assert (laws()["entropy"] >= -EPS).all()
    assert (laws()["entropy"] <= np.log(keys)[:, None] + EPS).all()


def test_mass_is_attention_with_one_hot_values():
    ids = np.arange(S) % 3
    one_hot = jnp.broadcast_to(jax.nn.one_hot(ids, 3)[:, None], (B, S, 1, 3))
    out, extras = attend(QUERY, KEY, one_hot, mask=ja.Causal(), measures={"mass": ja.Mass(ids, 3)})
    np.testing.assert_allclose(extras["mass"], out, rtol=0, atol=EPS)
    np.testing.assert_allclose(extras["mass"].sum(-1), 1, rtol=0, atol=EPS)


def test_what_is_received_is_the_gradient_of_lse_in_a_key_bias():
    def total(bias):
        return attend(QUERY, KEY, VALUE, mask=ja.Causal(), bias=ja.KeyBias(bias), return_lse=True)[1]["lse"].sum()

    gradient = jax.grad(total)(jnp.zeros((B, N, S)))
    np.testing.assert_allclose(laws()["received"].swapaxes(1, 2), gradient, rtol=0, atol=EPS)
    np.testing.assert_allclose(laws()["received"].sum(1), T, rtol=0, atol=T * EPS)


def test_equal_weights_have_known_measures():
    """n visible keys: entropy log n, largest weight 1/n, mean distance (n − 1)/2, lookback ½, lag profile Σ 1/n."""
    measures = {
        "h": ja.Entropy(),
        "max": ja.MaxWeight(),
        "d": ja.Distance(),
        "back": ja.Lookback(3),
        "lag": ja.LagProfile(2),
    }
    x = jnp.zeros((T, 1, 2))
    _, extras = attend(x, x, x, mask=ja.Causal(), measures=measures)
    n = 1 + np.arange(T)
    for name, expected in {"h": np.log(n), "max": 1 / n, "d": (n - 1) / 2, "back": np.where(n > 3, 0.5, 1)}.items():
        np.testing.assert_allclose(extras[name][:, 0], expected, rtol=EPS, atol=EPS, err_msg=name)
    np.testing.assert_allclose(extras["lag"][0], [(1 / n).sum(), (1 / n[1:]).sum()], rtol=EPS)


def test_dropout_is_not_measured():
    dropout = ja.Dropout(0.5, jax.random.key(0))
    _, extras = attend(QUERY, KEY, VALUE, mask=ja.Causal(), dropout=dropout, measures={"entropy": ja.Entropy()})
    np.testing.assert_allclose(extras["entropy"], laws()["entropy"], rtol=0, atol=EPS)


def test_measuring_needs_memory_linear_in_length():
    """By XLA's account: twice the length, at most 2.5 times the temporaries, and far from all weights."""

    @cache
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
        ids = jnp.zeros(length, jnp.int32)
        measures = {
            "entropy": ja.Entropy(),
            "received": ja.Received(),
            "mass": ja.Mass(ids, 4),
            "top": ja.TopWeights(2),
        }

        def loss(x):
            out, extras = attend(x, x, x, mask=ja.Causal(), measures=measures)
            return out.sum() + extras["entropy"].sum() + extras["received"].max()

        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)
    assert temporaries(8192) < 4 * 8192 * 8192 * 4 / 8


@pytest.mark.parametrize(
    ("measures", "exception", "message"),
    [
        ({"h": ja.Softmax()}, TypeError, r"measures must map names to measures such as Entropy\(\), got h=Softmax"),
        ({"lse": ja.Entropy()}, ValueError, "measures: 'lse' is the name of the log of the total weights"),
    ],
)
def test_what_is_no_measure_is_refused(measures, exception, message):
    with pytest.raises(exception, match=message):
        attend(QUERY, KEY, VALUE, measures=measures)


def test_keys_before_the_first_are_refused():
    with pytest.raises(ValueError, match=r"AtKeys: positions is \(0, -1\): need positions from 0"):
        ja.AtKeys((0, -1))
    with pytest.raises(TypeError, match="AtKeys: positions must be a tuple of ints"):
        ja.AtKeys([0])


def test_tiled_refuses_measures():
    with pytest.raises(NotImplementedError, match="'tiled' cannot serve measures=Entropy: it needs whole rows"):
        attend(QUERY, KEY, VALUE, measures={"h": ja.Entropy()}, implementation="tiled")


# Linear measures are more columns of the values: tiled serves them.


@part
class Reads(ja.LinearMeasure):
    """Σ_j w_ij · table[n, key position, :], and the square of the sum: learned, and other columns for every head."""

    table: Float[Array, "heads positions c"]

    def columns(self, key):
        place = jnp.broadcast_to(key[..., 0, :], (*key.shape[:-3], self.table.shape[0], key.shape[-1]))
        inside = (place >= 0) & (place < self.table.shape[1])
        found = self.table[jnp.arange(len(self.table))[:, None], jnp.where(inside, place, 0)]
        return jnp.where(inside[..., None], found, 0)

    def finish(self, sums):
        return {"sum": sums, "square": jnp.square(sums).sum(-1)}


READS = np.random.default_rng(4).normal(size=(N, S, 2))
LINEAR = {name: ALL[name] for name in ("mass", "place")}
TILED_KINDS = ("Dot", "Sigmoid", "Softmax", "GaussianWindow", "everything on tiles")


def reads(w, seen, p, r):
    rows = np.where(((r >= 0) & (r < S))[:, None], READS[:, np.clip(r, 0, S - 1)], 0)  # [N, S, C]
    sums = np.einsum("bnts,nsc->bnct", w, rows).swapaxes(-1, -2)
    return {"sum": by_row(sums), "square": by_row(np.square(sums).sum(-1))}


@pytest.mark.parametrize("scattered", [False, True], ids=["in order", "scattered"])
@pytest.mark.parametrize("kind", TILED_KINDS)
def test_tiled_gives_linear_measures_their_definition(kind, scattered):
    """From the oracle's weights, in float64, with the same columns for all heads, and with others for each."""
    where, slot = places(scattered), SLOTS[kind]
    arrays = draw(slot, where)
    weights, _, _ = weigh(arrays["query"], arrays["key"], where.visible, **slot.oracle(arrays, where.query, where.key))
    seen = np.broadcast_to(where.visible, weights.shape)
    expected_out, lse = answer(slot, where, arrays)
    with jax.enable_x64(True):
        learned = {"reads": Reads(jnp.asarray(READS))}
        for measures in (LINEAR, LINEAR | learned, learned):
            out, extras = call(kind, scattered, arrays, "tiled", (4, 3), measures)
            np.testing.assert_allclose(out, expected_out, rtol=0, atol=1e-12)
            np.testing.assert_allclose(extras["lse"], lse, rtol=0, atol=1e-12)
            definitions = {name: MEASURES[name][1] for name in LINEAR} | {"reads": reads}
            for name in measures:
                expected = definitions[name](weights, seen, where.query, where.key)
                close = partial(np.testing.assert_allclose, rtol=0, atol=1e-12, err_msg=name)
                jax.tree.map(close, extras[name], expected)


@pytest.mark.parametrize("few", [False, True], ids=["many queries", "few queries"])
@pytest.mark.parametrize(
    "dropout", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="dropout")]
)
@pytest.mark.parametrize("mask", ["causal", "by head"])
def test_gradients_of_linear_measures_in_tiles_are_those_of_dense(mask, dropout, few):
    """In query, key, value, null logits and the columns; measures do not see dropout. The values have one head."""
    rng, length = np.random.default_rng(8), 5 if few else 21
    arrays = [jnp.asarray(rng.normal(size=(2, n, k, 4)), jnp.float32) for n, k in ((length, 4), (19, 2), (19, 1))]
    learned = ja.Softmax(jnp.asarray(rng.normal(size=4), jnp.float32)), Reads(jnp.asarray(READS, jnp.float32))
    seen = ja.Causal() if mask == "causal" else ja.PerHead((ja.Causal(), ja.Window(4), ja.Window(9), ~ja.Causal()))
    options = {"mask": seen, "dropout": ja.Dropout(0.4, jax.random.key(3)) if dropout else None}

    @partial(jax.jit, static_argnums=0)
    def both(implementation, arrays, learned):
        def loss(arrays, learned):
            normalize, measure = learned
            measures = {"reads": measure, "mass": ja.Mass(GROUPS, 3)}
            out, extras = attend(
                *arrays,
                normalize=normalize,
                measures=measures,
                return_lse=True,
                block=4,
                implementation=implementation,
                **options,
            )
            tree = out, extras["reads"], extras["mass"], jnp.where(extras["lse"] > -99, extras["lse"], 0)
            return sum((jnp.cos(jnp.arange(x.size)).reshape(x.shape) * x).sum() for x in jax.tree.leaves(tree)), tree

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays, learned)

    for x, y in zip(*(jax.tree.leaves(both(name, arrays, learned)) for name in ("tiled", "dense")), strict=True):
        bound = 10 * np.sqrt(2 * 4 * length * 19) * np.finfo(np.float32).eps  # sums of so many terms near 1
        np.testing.assert_allclose(x, y, rtol=0, atol=bound * max(1, np.abs(y).max(initial=0, where=np.isfinite(y))))


def test_linear_measures_of_rows_that_see_nothing_or_what_is_not_finite():
    """Hidden keys may hold anything; a visible NaN makes the measures of its row NaN, as it does out."""
    key, value = KEY.copy(), VALUE.copy()
    key[:, 9:], value[:, 9:], value[0, 3] = np.nan, np.inf, np.nan
    mask = ja.Causal() & ja.Sinks(9) & ~ja.Sinks(1)
    for length in (T, 7):
        results = [
            attend(QUERY[:, :length], key, value, mask=mask, measures=LINEAR, implementation=name, block=4)[1]
            for name in ("dense", "tiled")
        ]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=EPS), *results)
        assert np.isnan(results[1]["mass"][0, 3:]).all()
        assert np.isfinite(results[1]["mass"][:, :3]).all()
        assert np.isfinite(results[1]["mass"][1]).all()
        assert not np.any(results[1]["mass"][:, 0])


def test_linear_measures_of_narrow_values_are_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2, 4)), jnp.bfloat16)
    exact = attend(x, x, x, mask=ja.Causal(), measures=LINEAR, implementation="dense")[1]
    out, extras = attend(x, x, x, mask=ja.Causal(), measures=LINEAR, implementation="tiled", block=8)
    assert (out.dtype, extras["mass"].dtype, extras["place"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=EPS, atol=EPS), extras, exact)


def test_linear_measures_alone_leave_long_calls_to_tiled(capsys):
    x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
    mass, entropy = {"mass": ja.Mass(np.zeros(4096, int), 1)}, {"entropy": ja.Entropy()}
    assert ja.explain(x, x, x, mask=ja.Causal(), measures=mass) == "tiled"
    assert ja.explain(x, x, x, mask=ja.Causal(), measures=mass | entropy) == "rows"
    assert "tiled: cannot serve measures=Entropy: it needs whole rows" in capsys.readouterr().out


def test_the_distance_of_causal_attention_is_the_position_less_the_mean_position():
    _, extras = attend(QUERY, KEY, VALUE, mask=ja.Causal(), measures=LINEAR, implementation="tiled", block=4)
    np.testing.assert_allclose(np.arange(T)[:, None] - extras["place"], laws()["distance"], rtol=0, atol=S * EPS)
