"""Blocks: chosen by masks, positions or scores, combined, and read by attention as a mask that skips the rest."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import ACTIVE, IMPLEMENTATIONS, MASKS, VISITS, Counted, assert_close, by_implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import any_and_all, in_tiles

from jaxattn import Alibi, BlockIndex, Blocks, Causal, Chunked, Documents, Dot, Explicit, Sigmoid, Sinks, Window, attend
from jaxattn.core.attend import attention_weights, block_means, select_tokens, take_tokens

T, SIZE = 22, 4  # the last block is short


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def a_call(length=T):
    return tuple(normal(2, length, heads, 4, seed=heads) for heads in (4, 2, 1))


def gates(query, key, size=SIZE):
    return attention_weights(query, block_means(key, size), score=Dot(1.0))[1]


def moba(query, key, value, k, size=SIZE, **options):
    index = BlockIndex.from_scores(gates(query, key, size), k, (1, size))
    return attend(query, key, value, mask=Causal() & Blocks(index), **options)


def chosen_by_hand(scores, k, block, forced, causal):
    """Row by row: forced blocks, then the best of the others, the first of equals, until there are k."""
    active = np.zeros(scores.shape, bool)
    for *row, i in np.ndindex(*scores.shape[:-1]):
        first, last = i * block[0], (i + 1) * block[0] - 1
        order = sorted(range(scores.shape[-1]), key=lambda j, s=scores[(*row, i)]: (-s[j], j))
        seen = [j for j in order if not causal or j * block[1] <= last]
        must = [j for j in seen if forced[(*row, i, j)] or (causal and (j + 1) * block[1] - 1 >= first)]
        rest = [j for j in seen if j not in must and scores[(*row, i, j)] > -np.inf]
        for j in must + rest[: max(k - len(must), 0)]:
            active[(*row, i, j)] = True
    return active


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    k=st.integers(1, 7),
    causal=st.booleans(),
    block=st.sampled_from([(1, 4), (4, 4), (6, 4), (4, 2)]),
)
def test_the_best_blocks_are_chosen_the_first_of_equals(seed, k, causal, block):
    rng = np.random.default_rng(seed)
    scores = rng.choice([-np.inf, -1.0, -0.0, 0.0, 0.5, 2.0, np.inf], (2, 4, 6)).astype(np.float32)
    forced = rng.random((2, 4, 6)) < 0.15
    index = BlockIndex.from_scores(jnp.asarray(scores), k, block, forced=forced, causal=causal)
    np.testing.assert_array_equal(index.active, chosen_by_hand(scores, k, block, forced, causal))


def test_equal_scores_choose_exactly_k_and_nan_is_never_chosen():
    index = BlockIndex.from_scores(jnp.zeros((3, 5, 8)), 3, (1, 4), causal=False)
    np.testing.assert_array_equal(index.active, np.broadcast_to(np.arange(8) < 3, (3, 5, 8)))
    index = BlockIndex.from_scores(jnp.array([[[jnp.nan, 1.0, jnp.nan, -jnp.inf]]]), 3, (1, 4), causal=False)
    np.testing.assert_array_equal(index.active, [[[False, True, False, False]]])


def test_moba_by_hand():
    """Blocks of 2 keys, k = 2: the query's own block and the best of those wholly past (Lu et al., 2025)."""
    scores = jnp.array([[9.0, 1, 1], [9, 1, 1], [0, 1, 1], [5, 1, 9], [2, 3, 1], [3, 2, 9]])[None]
    shown = (Causal() & Blocks(BlockIndex.from_scores(scores, 2, (1, 2)))).to_array(6)[0]
    expected = ["100000", "110000", "111000", "111100", "001110", "110011"]
    np.testing.assert_array_equal(shown, [[c == "1" for c in row] for row in expected])


@by_implementation("dense")
def test_moba_of_all_blocks_is_causal_and_of_one_block_is_local(implementation):
    query, key, value = a_call()
    options = {"implementation": implementation, "block": 4}
    for k, mask in ((-(-T // SIZE), Causal()), (99, Causal()), (1, Causal() & Chunked(SIZE))):
        expected = attend(query, key, value, mask=mask, implementation="dense")
        assert_close(moba(query, key, value, k, **options), expected, 8 * np.abs(value).max())


@by_implementation("dense")
def test_moba_does_not_look_ahead(implementation):
    query, key, value = a_call()
    others = tuple(normal(*x.shape, seed=9 + i) for i, x in enumerate((query, key, value)))
    run = jax.jit(lambda *x: moba(*x, 3, implementation=implementation, block=4))
    before = run(query, key, value)
    for now in (0, 3, 8, 13, 20):
        changed = tuple(
            np.concatenate([x[:, : now + 1], y[:, now + 1 :]], 1)
            for x, y in zip((query, key, value), others, strict=True)
        )
        after = run(*changed)
        np.testing.assert_array_equal(before[:, : now + 1], after[:, : now + 1])
        assert (before[:, now + 1 :] != after[:, now + 1 :]).any()


def test_moba_gradients_are_those_of_the_chosen_pairs():
    """Choosing has no gradient: values and gradients are those of a table of the pairs, also through tiles."""
    query, key, value = a_call()
    cotangent = normal(2, T, 4, 4, seed=8)
    table = (Causal() & Blocks(BlockIndex.from_scores(gates(query, key), 3, (1, SIZE)))).to_array(T)

    def with_table(*x):
        return attend(*x, mask=Explicit(table), implementation="dense")

    def with_blocks(*x):
        return moba(*x, 3, implementation="tiled", block=4)

    for run in (with_blocks, jax.checkpoint(with_blocks)):
        (out, pull), (expected, pull_expected) = (jax.vjp(f, query, key, value) for f in (run, with_table))
        assert_close(out, expected, 8 * np.abs(value).max())
        for x, y in zip(pull(cotangent), pull_expected(cotangent), strict=True):
            assert_close(x, y, np.sqrt(4 * T) * np.abs(y).max())


@pytest.mark.parametrize(
    "normalize",
    [pytest.param(None, id="softmax"), pytest.param(Sigmoid(), id="sigmoid", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("shape", [(1, 6, 6), (2, 4, 6, 6), (2, 1, 6, 6)], ids=str)
def test_blocks_in_tiles_of_any_size_are_the_mask_as_an_array(shape, normalize):
    active = np.random.default_rng(0).random(shape) < 0.4
    active[..., 2, :] = False
    blocks, (query, key, value) = Blocks(BlockIndex(jnp.asarray(active), (4, 4))), a_call()
    options = {"bias": Alibi.geometric(4)} | ({} if normalize is None else {"normalize": normalize})
    expected = attend(query, key, value, mask=Explicit(blocks.to_array(T)), implementation="dense", **options)
    for block in (4, (8, 4), (3, 5), 64):
        out = attend(query, key, value, mask=blocks, implementation="tiled", block=block, **options)
        assert_close(out, expected, 8 * T * np.abs(value).max())
    assert not np.any(expected[:, 8:12])


@pytest.mark.parametrize("tile", [(4, 4), (8, 4), (4, 12), (3, 5), (1, 2), (22, 22)], ids=str)
def test_bounds_are_exact_on_contiguous_positions(tile):
    query, key = np.arange(3, 21), np.arange(22)
    active = np.random.default_rng(1).random((2, 4, 6, 6)) < 0.5
    active[0, :, 1:4, 2:5] = True
    mask = Blocks(BlockIndex(jnp.asarray(active), (4, 4)))
    some, every = any_and_all(np.asarray(jax.jit(lambda: mask.to_array(query, key))()), query, key, tile)
    possible, certain = jax.jit(lambda: mask.bounds(*in_tiles(query, key, tile)))()
    np.testing.assert_array_equal(possible, some)
    np.testing.assert_array_equal(certain, every)


def test_only_active_blocks_are_computed():
    active = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1]], bool)
    x = normal(16, 1, 2)
    for mask, blocks in (
        (Blocks(BlockIndex(active[None], (4, 4))), 6),
        (Causal() & Blocks(BlockIndex(~active[None], (4, 4))), 4),
    ):
        VISITS.clear()
        attend(x, x, x, score=Counted(), mask=mask, block=4, implementation="tiled").block_until_ready()
        jax.effects_barrier()
        assert len(VISITS) == blocks


def test_nothing_of_the_size_of_all_pairs_is_held():
    """4096 queries choose 4 of 64 blocks: the scores of all pairs would take 64 MiB per head."""
    x = jax.ShapeDtypeStruct((2**12, 1, 8), jnp.float32)
    call = jax.jit(lambda x: moba(x, x, x, 4, size=64, implementation="tiled", block=128))
    assert call.lower(x).compile().memory_analysis().temp_size_in_bytes < 2**23


@pytest.mark.parametrize("name", [name for name in MASKS if name != "none"])
def test_the_blocks_of_a_mask_contain_it(name):
    block = 4, 3

    @jax.jit
    def arrays(mask):
        index = BlockIndex.from_mask(mask, (14, 13), block)
        return index.active, mask.to_array(14, 13), (mask & Blocks(index)).to_array(14, 13)

    active, visible, both = map(np.asarray, arrays(MASKS[name][0]))
    some, _ = any_and_all(visible, np.arange(14), np.arange(13), block)
    assert active.shape[-2:] == (4, 5)
    assert not (some & ~active).any()
    np.testing.assert_array_equal(np.broadcast_to(both, np.broadcast_shapes(both.shape, visible.shape)), visible)


def test_the_blocks_of_static_masks_by_hand():
    index = BlockIndex.from_mask(Causal() & Window(3), (16, 16), (4, 4))
    assert isinstance(index.active, np.ndarray)
    np.testing.assert_array_equal(index.active[0], np.eye(4) + np.eye(4, k=-1))
    np.testing.assert_array_equal(
        BlockIndex.from_mask(Causal(), (6, 6), (1, 3)).active[0], np.arange(6)[:, None] >= [0, 3]
    )
    assert float(index.density()) == 7 / 16


def test_the_blocks_at_given_positions_are_those_with_a_visible_pair():
    """Of a cache: permuted, partly empty, different per batch entry; under jit as well."""
    rng = np.random.default_rng(0)
    query, key = np.array([[9], [4]]), np.stack([rng.permutation(12), rng.permutation(12)])
    key[:, :3] = -1
    mask = Causal() & (Window(3) | Sinks(2)) & Documents(jnp.zeros(16, int))
    for run in (BlockIndex.from_positions, jax.jit(BlockIndex.from_positions, static_argnums=3)):
        active = np.asarray(run(query, key, mask, (1, 2)).active)
        shown = oracle.pairs(lambda b, n, p, r: r <= p and (p - r <= 3 or r < 2), query, key, (2,), 1)
        some, _ = any_and_all(shown, query, key, (1, 2))
        assert not (some & ~active).any()
        assert not active[..., 0].any()  # a block of empty slots
    np.testing.assert_array_equal(
        BlockIndex.from_positions(np.arange(4), np.array([0, 1, -1, -1, 9]), None, (2, 2)).active,
        [[[1, 0, 1], [1, 0, 1]]],
    )


@by_implementation("dense")
@pytest.mark.parametrize("name", ["an offset", "permuted", "a cache"])
def test_an_index_over_slots_means_the_slots_at_any_positions(name, implementation):
    """`Blocks.at` shows slot i of the queries slot j of the keys iff their blocks are active, wherever they stand."""
    rng = np.random.default_rng(5)
    active, block = rng.random((2, 4, 3, 4)) < 0.5, (4, 5)
    queries, keys = {
        "an offset": (np.arange(100, 111), 2**20 + np.arange(18)),
        "permuted": (rng.permutation(11), np.stack([rng.permutation(18), rng.permutation(18)])),
        "a cache": (np.array([-1, *range(30, 40)]), np.where(rng.random((2, 18)) < 0.3, -1, rng.permutation(90)[:18])),
    }[name]
    arrays = normal(2, 11, 4, 4), normal(2, 18, 2, 4, seed=1), normal(2, 18, 1, 3, seed=2)
    tiles = in_tiles(np.broadcast_to(queries, (2, 11)), np.broadcast_to(keys, (2, 18)), (3, 5))
    options = {"query_positions": queries, "key_positions": keys, "block": (3, 5), "implementation": implementation}

    @jax.jit
    def found(active):
        mask = Blocks.at(BlockIndex(active, block), queries, keys)
        return mask.to_array(queries, keys), mask.bounds(*tiles), attend(*arrays, mask=mask, **options)

    array, bounds, out = found(active)
    slots = np.arange(11), np.arange(18)
    shown = active[..., slots[0][:, None] // 4, slots[1] // 5] & (queries >= 0)[:, None]
    shown &= np.broadcast_to(keys >= 0, (2, 18))[:, None, None]
    np.testing.assert_array_equal(array, shown)
    some, every = any_and_all(shown, np.broadcast_to(queries, (2, 11)), np.broadcast_to(keys, (2, 18)), (3, 5))
    possible, certain = map(np.asarray, bounds)
    assert not (some & ~possible).any()
    assert not (~every & certain).any()
    expected = attend(*arrays, mask=Explicit(jnp.asarray(shown)), implementation="dense")
    assert_close(out, expected, 8 * np.abs(arrays[2]).max())
    assert np.abs(expected).max() > 0.1


def test_the_index_of_a_mask_at_positions_is_read_at_these_positions():
    """from_positions and at are inverse: the mask is the same with and without the blocks that it rules out."""
    rng = np.random.default_rng(2)
    query, key = rng.permutation(20)[:11], np.where(rng.random(14) < 0.2, -1, rng.permutation(20)[:14])
    mask = Causal() & Window(6)
    blocks = Blocks.at(BlockIndex.from_positions(query, key, mask, (2, 3)), query, key)
    np.testing.assert_array_equal((mask & blocks).to_array(query, key)[0], mask.to_array(query, key)[0])
    assert blocks.index.density() < 1


def test_union_intersection_and_transpose():
    rng = np.random.default_rng(0)
    a, b = (BlockIndex(jnp.asarray(rng.random(shape) < 0.5), (4, 4)) for shape in ((2, 1, 6, 6), (4, 6, 6)))
    for index, expected in (((a | b), a.active | b.active), ((a & b), a.active & b.active)):
        np.testing.assert_array_equal(index.active, expected)
        assert index.active.shape == (2, 4, 6, 6)
        assert float(index.density()) == pytest.approx(np.mean(expected))
    for name, joined in (("__or__", a | b), ("__and__", a & b)):
        as_masks = getattr(Blocks(a), name)(Blocks(b))
        np.testing.assert_array_equal(Blocks(joined).to_array(T), as_masks.to_array(T))
    wide = BlockIndex(jnp.asarray(rng.random((1, 3, 8)) < 0.5), (8, 3))
    turned = wide.transpose()
    assert turned.block == (3, 8)
    np.testing.assert_array_equal(Blocks(turned).to_array(24)[0], Blocks(wide).to_array(24)[0].T)
    assert Blocks(wide).describe() == "active blocks of 8 x 3"


def test_block_means_are_means_also_of_a_short_last_block():
    key = normal(2, 11, 3, 5)
    expected = np.stack([key[:, i : i + 4].astype(np.float64).mean(1) for i in (0, 4, 8)], 1)
    assert_close(block_means(key, 4), expected, np.abs(key).max())
    np.testing.assert_array_equal(block_means(key, 1), key)
    assert block_means(jnp.asarray(key, jnp.bfloat16), 4).dtype == jnp.float32


def each_head(query, key, value, positions, **options):
    """attend, a key head and its queries at a time, at positions [..., c, K]."""
    group = query.shape[-2] // key.shape[-2]
    outs = []
    for head in range(key.shape[-2]):
        arrays = (
            query[..., head * group : (head + 1) * group, :],
            key[..., head : head + 1, :],
            value[..., head : head + 1, :],
        )
        outs.append(attend(*arrays, key_positions=positions[..., head], **options))
    return jnp.concatenate(outs, -2)


def test_all_tokens_selected_is_plain_attention():
    query, key, value = normal(2, 1, 4, 4), normal(2, 9, 2, 4, seed=1), normal(2, 9, 2, 3, seed=2)
    places = np.stack([np.random.default_rng(b).permutation(9) for b in range(2)])
    places[1, :2] = -1
    scores = normal(2, 2, 9, seed=3)
    options = {"query_positions": np.array([6]), "mask": Causal()}
    expected = attend(query, key, value, key_positions=places, **options)
    for k in (9, 50):
        chosen = select_tokens(scores, key, value, k, key_positions=places)
        assert chosen[0].shape == (2, 9, 2, 4)
        assert_close(each_head(query, *chosen, **options), expected, 8 * np.abs(value).max())
        for implementation in IMPLEMENTATIONS:
            new_key, new_value, positions = chosen
            out = attend(query, new_key, new_value, key_positions=positions, implementation=implementation, **options)
            assert_close(out, expected, 8 * np.abs(value).max())


def test_selected_tokens_are_the_best_and_the_only_ones_read():
    """A query group reads k tokens of its key head: attention under the mask of the chosen ones."""
    query, key, value = normal(2, 1, 4, 4), normal(2, 9, 2, 4, seed=1), normal(2, 9, 2, 3, seed=2)
    scores = normal(2, 2, 9, seed=3)
    scores[0, 0, 2:] = -np.inf  # two tokens are all there is
    scores[1, 1] = np.nan  # none
    k, table = 3, np.zeros((2, 4, 1, 9), bool)
    for b, head in itertools.product(range(2), range(2)):
        for slot in sorted(range(9), key=lambda j: -scores[b, head, j])[:k] if (b, head) != (1, 1) else []:
            table[b, 2 * head : 2 * head + 2, 0, slot] = scores[b, head, slot] > -np.inf
    assert table.sum(-1)[:, ::2, 0].tolist() == [[2, 3], [3, 0]]
    expected = attend(query, key, value, mask=Explicit(jnp.asarray(table)))

    def selected(query, key, value):
        key, value, positions = select_tokens(scores, key, value, k)
        return attend(query, key, value, key_positions=positions)

    assert_close(each_head(query, *select_tokens(scores, key, value, k)), expected, 8 * np.abs(value).max())

    out, pull = jax.vjp(selected, query, key, value)
    assert_close(out, expected, 8 * np.abs(value).max())
    d_key, d_value = pull(jnp.ones_like(out))[1:]
    read = table[:, ::2, 0].swapaxes(-1, -2)
    assert not np.any(d_key * ~read[..., None])
    np.testing.assert_array_equal(np.any(d_value, -1), read)


def test_equal_scores_select_the_first_tokens():
    x = normal(7, 2, 3)
    _, _, positions = select_tokens(jnp.zeros((2, 7)), x, x, 4)
    np.testing.assert_array_equal(positions, np.arange(4)[:, None].repeat(2, 1))


def test_tokens_are_taken_by_slot_per_head_and_others_are_empty():
    key, value = normal(2, 5, 2, 3), normal(2, 5, 2, 4, seed=1)
    slots = np.array([[[4, 0], [1, -1]], [[2, 5], [3, 3]]])
    places = np.arange(5) * 10
    for taken in (
        take_tokens(slots, key, value, places),
        jax.vmap(take_tokens, (0, 0, 0, None))(slots, key, value, places),
    ):
        new_key, new_value, positions = taken
        for b, head, c in np.ndindex(2, 2, 2):
            slot = slots[b, head, c]
            assert positions[b, c, head] == (places[slot] if 0 <= slot < 5 else -1)
            if 0 <= slot < 5:
                np.testing.assert_array_equal(new_key[b, c, head], key[b, slot, head])
                np.testing.assert_array_equal(new_value[b, c, head], value[b, slot, head])


X = np.zeros((5, 2, 3), np.float32)
A, B = BlockIndex(np.ones((1, 2, 2), bool), (4, 4)), BlockIndex(np.ones((1, 2, 2), bool), (4, 2))


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: BlockIndex(ACTIVE, 4), TypeError, r"block must be a tuple of two, \(queries, keys\), got 4"),
        (lambda: BlockIndex(ACTIVE, (4, 0)), ValueError, "BlockIndex: block must be at least 1, got 0"),
        (lambda: BlockIndex(ACTIVE, (4, 1.5)), TypeError, "BlockIndex: block must be an int, got 1.5"),
        (lambda: BlockIndex.from_mask(Causal(), (4, 4), (0, 2)), ValueError, "block must be at least 1, got 0"),
        (
            lambda: BlockIndex.from_positions(np.ones(3), np.arange(3), None, (1, 1)),
            TypeError,
            "query_positions must be an",
        ),
        (lambda: BlockIndex.from_scores(jnp.zeros((1, 2, 2)), 0, (1, 1)), ValueError, "k must be at least 1, got 0"),
        (
            lambda: BlockIndex.from_scores(jnp.zeros((2, 2)), 1, (1, 1)),
            ValueError,
            r"scores is float32\[2, 2\]: need float",
        ),
        (lambda: A | B, ValueError, r"blocks of \(4, 4\), \(2, 2\) of them, and of \(4, 2\), \(2, 2\): need the same"),
        (lambda: block_means(X, 0), ValueError, "block_means: size must be at least 1, got 0"),
        (lambda: select_tokens(jnp.zeros((2, 5)), X, X, 0), ValueError, "select_tokens: k must be at least 1, got 0"),
        (lambda: select_tokens(jnp.zeros((3, 5)), X, X, 1), ValueError, r"scores has shape \(3, 5\): need .* \(2, 5\)"),
        (lambda: take_tokens(jnp.zeros((2, 5)), X, X), TypeError, "slots must be integers, got float32"),
        (
            lambda: take_tokens(jnp.zeros((3, 5), int), X, X),
            ValueError,
            r"slots has shape \(3, 5\): need \[..., K, c\]",
        ),
        (
            lambda: take_tokens(jnp.zeros((2, 5), int), X, X[:, :1]),
            ValueError,
            r"value has shape \(5, 1, 3\) but key has",
        ),
        (
            lambda: take_tokens(jnp.zeros((2, 1), int), X, X, np.arange(4)),
            ValueError,
            r"key_positions has shape \(4,\)",
        ),
    ],
)
def test_what_blocks_refuse(make, exception, message):
    with pytest.raises(exception, match=message):
        make()
