"""What a mask hides may be NaN or infinite: it reaches no row that does not see it, forward or in any gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IMPLEMENTATIONS, by_implementation

import jaxattn.core.attend as ja
from jaxattn import attend
from jaxattn.core.memory import MatrixMemory, memory_scan

B, T, N, H = 2, 13, 4, 8
LENGTHS = np.array([7, 13])
IDS = np.array([[0] * 5 + [1] * 8, [0] * 6 + [1] * 4 + [-1] * 3])
COLUMN = np.ones((B, 1, T, T), bool)
COLUMN[..., 3] = False
BY_HEAD = np.ones((N, T, T), bool)
BY_HEAD[:, :6, 6:] = False  # the first rows do not see the last keys
PLACES = np.arange(T)

# name: (mask, the tokens [B, T] that are not finite, the tokens whose outputs are used)
CASES = {
    "padding": (ja.Lengths(jnp.asarray(LENGTHS)), LENGTHS[:, None] <= PLACES, LENGTHS[:, None] > PLACES),
    "another document": (ja.Documents(jnp.asarray(IDS)), IDS == 0, IDS == 1),
    "causal documents": (ja.Causal() & ja.Documents(jnp.asarray(IDS)), IDS != 1, IDS == 1),
    "the future": (ja.Causal(), np.broadcast_to(PLACES >= 8, (B, T)), np.broadcast_to(PLACES < 8, (B, T))),
    "a column": (ja.Explicit(jnp.asarray(COLUMN)), np.broadcast_to(PLACES == 3, (B, T)), PLACES[None] != 3),
    "by head": (ja.Explicit(jnp.asarray(BY_HEAD)), np.broadcast_to(PLACES >= 6, (B, T)), PLACES[None] < 6),
    "a window": (ja.Window(2), np.broadcast_to(PLACES == 5, (B, T)), (PLACES[None] < 5) | (PLACES[None] > 7)),
}
NORMALIZERS = {
    "softmax": ja.Softmax(),
    "null": ja.Softmax(jnp.ones(N)),
    "sigmoid": ja.Sigmoid(),
    "elu": ja.Elu1(True),
    "sparsemax": ja.Sparsemax(),
}


def drawn(heads, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, *heads)]


def spoiled(x, where, fill):
    return jnp.where(where[..., None, None], fill, x)


@by_implementation("dense", "tiled")
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_finite_reaches_only_the_rows_that_see_it(case, implementation):
    mask, where, used = CASES[case]
    used, number = np.broadcast_to(used, (B, T)), list(CASES).index(case)
    heads = ((2, 2), (1, 4))[number % 2]
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(np.where(used[..., None, None], rng.normal(size=(B, T, N, H)), 0), jnp.float32)
    d_lse = jnp.asarray(np.where(used[..., None], rng.normal(size=(B, T, N)), 0), jnp.float32)
    # Two normalisers per case, one of them with a score and a bias that read keys and positions in other ways.
    served = [name for name in NORMALIZERS if implementation != "tiled" or name != "sparsemax"]
    calls = [
        {"normalize": NORMALIZERS[served[number % len(served)]]},
        {
            "normalize": NORMALIZERS[served[(number + 2) % len(served)]],
            "score": ja.NegativeDistance(0.2),
            "bias": ja.Alibi.geometric(N),
        },
    ]

    @jax.jit
    def results(arrays):
        found = []
        for options in calls:

            def call(query, key, value, options=options):
                options = options | {"mask": mask, "implementation": implementation, "block": 4}
                out, extras = attend(query, key, value, return_lse=True, **options)
                return out, extras["lse"]

            out, pull = jax.vjp(call, *arrays)
            found.append((*out, *pull((d_out, d_lse))))
        return found

    fine = drawn(heads)
    # A query that is not finite has no result, but zeros if it sees nothing at all.
    nothing = np.broadcast_to(~np.asarray(mask.to_array(T)).any(-1).swapaxes(-1, -2), (B, T, N))
    unknown = where[..., None] & ~nothing
    for fill in (np.nan, np.inf):
        pairs = zip(results(fine), results([spoiled(x, where, fill) for x in fine]), strict=True)
        for (out, lse, *d_arrays), (out2, lse2, *d_arrays2) in pairs:
            np.testing.assert_allclose(out2[used], out[used], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(lse2[used], lse[used], rtol=1e-5, atol=1e-5)
            assert np.isnan(out2[unknown]).all()
            assert np.isnan(lse2[unknown]).all()
            np.testing.assert_array_equal(out2[nothing], 0)
            for d, d2 in zip(d_arrays, d_arrays2, strict=True):
                assert np.isfinite(d2).all()
                np.testing.assert_allclose(d2[used], d[used], rtol=1e-4, atol=1e-4)


@by_implementation("dense", "tiled")
def test_rows_that_see_it_are_nan(implementation):
    """Also where it is the value alone, or one head of the key, or there is no mask."""
    query, key, value = drawn((2, 2))
    for mask in (ja.Causal(), None):
        sees = PLACES >= 6 if mask is not None else PLACES >= 0
        of_value = attend(query, key, value.at[:, 6, 0].set(np.inf), mask=mask, implementation=implementation, block=4)
        of_key = attend(query, key.at[:, 6, 0, 0].set(np.nan), value, mask=mask, implementation=implementation, block=4)
        for out in (of_value, of_key):
            assert not np.isfinite(out[:, sees, :2]).any()
            assert np.isfinite(out[:, ~sees]).all()
            assert np.isfinite(out[:, :, 2:]).all()


def test_one_query_does_not_read_empty_slots():
    query, key, value = drawn((2, 2))
    query, where = query[:, :1], LENGTHS[:, None] <= PLACES
    positions = jnp.where(where, -1, PLACES)
    for implementation in ("dense", "rows", "tiled"):

        def call(query, key, value, implementation=implementation):
            return attend(query, key, value, key_positions=positions, implementation=implementation)

        out, pull = jax.vjp(call, query, key, value)
        out2, pull2 = jax.vjp(call, query, spoiled(key, where, np.nan), spoiled(value, where, np.inf))
        np.testing.assert_array_equal(out, out2)
        for d, d2 in zip(pull(jnp.ones_like(out)), pull2(jnp.ones_like(out)), strict=True):
            np.testing.assert_array_equal(d, d2)


SINGLE = {
    "padding": ja.Lengths(jnp.asarray(LENGTHS)),
    "window": ja.Window(3, 2) & ja.Explicit(jnp.asarray(PLACES != 7)),
    "by key head": ja.Explicit(jnp.asarray(np.arange(2)[:, None] != PLACES % 2).repeat(2, 0)[:, None]),
    "by query head": ja.Explicit(jnp.asarray(np.arange(N)[:, None] != PLACES % N)[:, None]),
}


@by_implementation("dense", "tiled", of=(*IMPLEMENTATIONS, "auto"))
@pytest.mark.parametrize("case", SINGLE)
def test_what_is_hidden_from_a_single_query_may_hold_anything(case, implementation):
    """Every key that no head sees, or of another head: outputs, lse and gradients are those of zeros in its place."""
    query, key, value = drawn((2, 2))
    at, mask = jnp.asarray([6]), SINGLE[case]
    shown = ja.Explicit(jnp.asarray(mask.to_array(np.asarray(at), PLACES)))
    by_key_head = jnp.broadcast_to(mask.to_array(np.asarray(at), PLACES), (B, N, 1, T)).reshape(B, 2, 2, T).any(2)
    hidden = ~by_key_head.swapaxes(1, 2)[..., None]  # [B, T, K, 1]

    @jax.jit
    def results(key, value):
        found = []
        for given in (shown, mask):
            options = {"mask": given, "query_positions": at} if given is mask else {"mask": given}
            options |= {"implementation": implementation, "block": 4}

            def call(query, key, value, options=options):
                return attend(query, key, value, return_lse=True, **options)

            (out, extras), pull = jax.vjp(call, query[:, :1], key, value)
            found.append((out, extras["lse"], *pull((jnp.cos(out), {"lse": jnp.sin(extras["lse"])}))))
        return found

    expected = results(*(jnp.where(hidden, 0, x) for x in (key, value)))
    for fill in (np.nan, np.inf):
        found = results(*(jnp.where(hidden, fill, x) for x in (key, value)))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


@by_implementation("dense", "tiled")
@pytest.mark.parametrize("heads", [(1, 4), (4, 1), (2, 4), (2, 1)], ids=str)
def test_one_head_does_not_reach_the_others(heads, implementation):
    """Of more value heads than key heads, and of fewer: only heads that read it become NaN, the others stay."""
    query, key, value = drawn(heads)
    options = {"mask": ja.Causal(), "implementation": implementation, "block": 4}
    expected = attend(query, key, value, **options)
    for name in ("key", "value"):
        arrays = {"key": key, "value": value}
        arrays[name] = arrays[name].at[0, 2, 0].set(np.nan)
        out = attend(query, **arrays, **options)
        reached = np.zeros(out.shape[:3], bool)
        reached[0, 2:, : N // arrays[name].shape[-2]] = True
        assert np.isnan(out[reached]).all()
        np.testing.assert_allclose(out[~reached], expected[~reached], atol=1e-5)


@by_implementation("dense", "tiled")
def test_a_single_query_whose_heads_see_different_keys(implementation):
    query, key, value = drawn((1, 1))
    shown = np.ones((N, 1, T), bool)
    shown[:2, :, 2] = False
    options = {"mask": ja.Explicit(jnp.asarray(shown)), "implementation": implementation}
    out = attend(query[:, :1], key, value.at[:, 2].set(np.nan), **options)
    np.testing.assert_allclose(out[:, :, :2], attend(query[:, :1], key, value, **options)[:, :, :2], atol=1e-6)
    assert np.isnan(out[:, :, 2:]).all()


@by_implementation("dense", "tiled")
def test_without_a_mask_an_empty_query_sees_nothing_and_an_unused_row_has_no_gradient(implementation):
    query, key, value = drawn((2, 2))
    places = jnp.where(jnp.arange(T) == 3, -1, jnp.arange(T))
    options = {"implementation": implementation, "block": 4}
    for spoil in ({"key": key.at[0, 5].set(np.nan)}, {"value": value.at[0, 5].set(np.nan)}):
        arrays = {"key": key, "value": value} | spoil
        out = attend(query, **arrays, query_positions=places, **options)
        np.testing.assert_array_equal(out[:, 3], 0)
        assert np.isnan(out[0, 4]).all()

        def loss(null, arrays):
            out, extras = attend(query, **arrays, normalize=ja.Softmax(null), return_lse=True, **options)
            return out[1].sum() + extras["lse"][1].sum()

        slope, expected = (jax.grad(loss)(jnp.zeros(N), each) for each in (arrays, {"key": key, "value": value}))
        np.testing.assert_allclose(slope, expected, atol=1e-5)


def test_measures_of_other_rows_are_what_they_were():
    """Rows of their own, and `RowsOf` those that are asked for."""
    query, key, value = drawn((2, 2))
    mask, where, used = CASES["another document"]
    measures = {"entropy": ja.Entropy(), "rows": ja.RowsOf(np.array([7, 8])), "top": ja.TopWeights(2)}
    for implementation in ("dense", "rows"):
        options = {"mask": mask, "measures": measures, "implementation": implementation}
        _, fine = attend(query, key, value, **options)
        _, wrong = attend(*(spoiled(x, where, np.nan) for x in (query, key, value)), **options)
        np.testing.assert_allclose(wrong["entropy"][used], fine["entropy"][used], atol=1e-6)
        np.testing.assert_allclose(wrong["top"][0][used], fine["top"][0][used], atol=1e-6)
        np.testing.assert_allclose(wrong["rows"], fine["rows"], atol=1e-6)
        assert np.isnan(wrong["entropy"][where]).all()


def test_maps_that_mix_heads_spread_it_over_the_heads_of_a_row():
    """And over no other row. Where rows read each other there is nothing to keep it out of."""
    query, key, value = drawn((2, 2))
    maps = {"score_maps": (ja.MixHeads(jnp.full((N, N), 0.25)),)}
    for implementation in ("dense", "rows", "tiled"):
        options = {"mask": ja.Causal(), "implementation": implementation, "block": 4, **maps}
        out = attend(query, key.at[:, 6, 0, 0].set(np.nan), value, **options)
        assert np.isnan(out[:, 6:]).all()
        np.testing.assert_allclose(out[:, :6], attend(query, key, value, **options)[:, :6], atol=1e-6)


def test_a_side_without_weight_may_hold_anything_when_results_merge():
    out, lse = jnp.ones((2, N, H)), jnp.zeros((2, N))
    nothing = ja.Partial(jnp.full_like(out, np.nan), jnp.full_like(lse, -np.inf))

    def merged(out, lse):
        whole = ja.merge(ja.Partial(out, lse), nothing)
        return (whole.out + whole.lse[..., None]).sum()

    np.testing.assert_array_equal(ja.merge(nothing, ja.Partial(out, lse)).out, out)
    d_out, d_lse = jax.grad(merged, (0, 1))(out, lse)
    np.testing.assert_array_equal(d_out, 1)
    np.testing.assert_array_equal(d_lse, H)


def test_totals_that_are_nan_are_not_taken_for_nothing():
    """A NaN in a bias is seen by every row: no normaliser gives zeros for it."""
    query, key, value = drawn((2, 2))
    bias = ja.KeyBias(jnp.full((1, T), np.nan))
    normalizers = (
        *NORMALIZERS.values(),
        ja.Entmax15(),
        ja.Relu(True),
        ja.Sigmoid(normalized=True),
        ja.LinearWeights(True),
    )
    for normalize in normalizers:
        out, extras = attend(query, key, value, bias=bias, normalize=normalize, return_lse=True)
        assert np.isnan(out).all(), normalize
        if not isinstance(normalize, ja.Sparsemax | ja.Entmax15):  # whose lse says how many keys there are
            assert np.isnan(extras["lse"]).all(), normalize


def test_memories_do_not_read_tokens_after_a_row_ends():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 9, 2, 4)), jnp.float32) / 2 for _ in range(3))
    memory, lengths = MatrixMemory(jnp.zeros((2, 4, 4))), jnp.array([5, 9])
    after = np.arange(9) >= np.asarray(lengths)[:, None]

    def call(query, key, value):
        out, state = memory_scan(memory, query, key, value, rate=0.1, lengths=lengths, inner_batch=4)
        return jnp.where(after[..., None, None], 0, out), state.dual

    fine, pull = jax.vjp(call, query, key, value)
    wrong, pull2 = jax.vjp(call, *(spoiled(x, after, np.nan) for x in (query, key, value)))
    ones = jax.tree.map(jnp.ones_like, fine)
    for x, y in zip(jax.tree.leaves((fine, pull(ones))), jax.tree.leaves((wrong, pull2(ones))), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-6)
