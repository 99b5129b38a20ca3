"""What is said of whole tiles is true, exact where it can be, and saves the work it promises to save."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BATCH_IDS, IDS, LENGTHS, MASKS, VISITS, Counted, by_implementation, evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxattn import Causal, Documents, Dot, Explicit, Lengths, Sinks, Softmax, Window, attend
from jaxattn.core.attend.schedule import BLOCKS, Block, Kinds, blocks_for, choose_block, fit, schedule

BATCH, HEADS, LENGTH, BLOCK = (2,), 4, 12, (4, 3)
PLACES = arrays(np.int32, LENGTH, elements=st.integers(-1, 15))
STATIC = ("causal", "window", "wide window", "sinks", "strict future")
MASKED = [name for name in MASKS if name != "none"]


def in_tiles(query, key, block):
    """[..., T] and [..., S], padded with −1, as [..., 1, QB, 1, bq] and [..., 1, 1, KB, bk]."""
    (query, key) = (
        np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % b)], constant_values=-1)
        for x, b in zip((query, key), block, strict=True)
    )
    query = query.reshape(*query.shape[:-1], -1, block[0])[..., None, :, None, :]
    return query, key.reshape(*key.shape[:-1], -1, block[1])[..., None, None, :, :]


@jax.jit
def pairs_and_bounds(mask, query, key, tiled_query, tiled_key):
    return mask(query[..., None, :, None], key[..., None, None, :]), mask.bounds(tiled_query, tiled_key)


def any_and_all(visible, query, key, block):
    """Per tile, [*b, N, QB, KB]: does any pair of slots see each other; does every pair of non-empty slots?"""
    empty = (query < 0)[..., None, :, None] | (key < 0)[..., None, None, :]
    short = [(0, -visible.shape[axis] % b) for axis, b in zip((-2, -1), block, strict=True)]
    pad = [(0, 0)] * (visible.ndim - 2) + short
    shown, every = np.pad(visible, pad), np.pad(visible | empty, pad, constant_values=True)
    cut = (*visible.shape[:-2], shown.shape[-2] // block[0], block[0], shown.shape[-1] // block[1], block[1])
    return shown.reshape(cut).any((-3, -1)), every.reshape(cut).all((-3, -1))


@pytest.mark.parametrize("name", MASKED)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(first=PLACES, second=PLACES, key=PLACES)
def test_masks_are_their_predicates_and_bounds_are_promises_kept(name, first, second, key):
    """At any positions: empty slots, repeated and in any order."""
    mask, predicate = MASKS[name]
    query = np.stack([first, second])
    tiles = in_tiles(query, key, BLOCK)
    shown, bounds = pairs_and_bounds(mask, query, key, *tiles)
    visible = oracle.pairs(predicate, query, key, BATCH, HEADS)
    slots = (query >= 0)[:, None, :, None] & (key >= 0)
    np.testing.assert_array_equal(np.broadcast_to(shown & slots, visible.shape), visible)
    some, every = any_and_all(visible, query, key, BLOCK)
    for possible, certain in (bounds, mask.bounds(*tiles))[: 2 if name in STATIC else 1]:
        assert not (some & ~np.asarray(possible)).any(), "a tile with a visible pair must be possible"
        assert not (~every & np.asarray(certain)).any(), "in a certain tile every pair of non-empty slots is visible"


EXACT = {name: MASKS[name][0] for name in (*STATIC, "documents", "lengths", "explicit by head", "explicit by batch")}


@pytest.mark.parametrize("name", EXACT)
def test_bounds_are_exact_on_contiguous_positions(name):
    query, key = np.arange(2, 14)[None].repeat(2, 0), np.arange(LENGTH)
    visible = oracle.pairs(MASKS[name][1], query, key, BATCH, HEADS)
    tiles = in_tiles(query, key, BLOCK)
    for (possible, certain), (some, every) in [(EXACT[name].bounds(*tiles), any_and_all(visible, query, key, BLOCK))]:
        np.testing.assert_array_equal(np.broadcast_to(possible, some.shape), some)
        np.testing.assert_array_equal(np.broadcast_to(certain, every.shape), every)


def index_of(mask, lengths, block):
    return schedule(mask, *in_tiles(*(np.arange(length, dtype=np.int32) for length in lengths), block))


def test_the_tiles_of_masks_by_hand():
    index, kinds = index_of(Causal(), (16, 16), (4, 4))  # tile (i, j): full below the diagonal, partial on it
    assert (index.full.tolist(), index.count.tolist(), kinds) == ([0, 1, 2, 3], [1, 2, 3, 4], Kinds(True, True, False))
    assert [row[:n].tolist() for row, n in zip(index.starts, index.count, strict=True)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]
    index, kinds = index_of(Window(3), (16, 16), (4, 4))  # the diagonal and the tile before it, both partial
    assert (index.full.tolist(), index.count.tolist(), kinds) == ([0] * 4, [1, 2, 2, 2], Kinds(False, True, False))
    assert index.starts.shape == (4, 2)
    index, kinds = index_of(None, (8, 10), (4, 5))
    assert (index.full.tolist(), index.count.tolist(), kinds) == ([2, 2], [2, 2], Kinds(True, False, False))
    index, kinds = index_of(None, (7, 9), (4, 5))  # padded slots make a tile partial
    assert (index.full.tolist(), index.count.tolist(), kinds) == ([1, 0], [2, 2], Kinds(True, True, False))
    index, _ = index_of(Causal() & (Window(3) | Sinks(2)), (16, 16), (4, 4))  # the window's tiles and the first
    assert (index.full.tolist(), index.count.tolist()) == ([0] * 4, [1, 2, 3, 3])
    index, _ = index_of(~Causal(), (16, 16), (4, 4))
    assert (index.full.tolist(), index.count.tolist()) == ([3, 2, 1, 0], [4, 3, 2, 1])


def test_tiles_of_several_granules_start_where_the_mask_does():
    """Tiles of 4 queries and 6 keys, from any multiple of 2 on. A window of 3 needs keys 4i − 3 .. 4i + 3."""
    places = in_tiles(np.arange(16, dtype=np.int32), np.arange(16, dtype=np.int32), (4, 2))
    index, kinds = schedule(Window(3), *places, run=3)
    starts = [row[:n].tolist() for row, n in zip(index.starts, index.count, strict=True)]
    assert (starts, kinds.single) == ([[0], [0, 3], [2, 5], [4, 7]], False)
    index, kinds = schedule(Window(2), *places, run=3)  # keys 4i − 2 .. 4i + 3 are one tile
    assert (index.starts.tolist(), kinds) == ([[0], [1], [3], [5]], Kinds(False, True, True))
    index, kinds = schedule(Causal(), *places, run=3)  # full where all three granules are
    starts = [row[:n].tolist() for row, n in zip(index.starts, index.count, strict=True)]
    assert (starts, index.full.tolist()) == ([[0], [0, 3], [0, 3], [0, 3, 6]], [0, 0, 1, 2])
    index, kinds = schedule(~Causal() & Sinks(6), *places, run=2)  # nothing to see for the last queries
    assert (index.count.tolist(), kinds.single) == ([2, 1, 0, 0], False)


def test_the_tiles_of_documents_and_lengths_under_jit_by_hand():
    ids, lengths = jnp.array([0] * 8 + [1] * 4 + [-1] * 4), jnp.array([3, 8])
    places = in_tiles(np.arange(16, dtype=np.int32), np.arange(16, dtype=np.int32), (4, 4))
    index = jax.jit(lambda ids: schedule(Documents(ids), *places)[0])(ids)
    assert (index.full.tolist(), index.count.tolist()) == ([2, 2, 1, 0], [2, 2, 1, 0])
    index = jax.jit(lambda lengths: schedule(Lengths(lengths), *places)[0])(lengths)  # the batch shares its tiles
    assert (index.full.tolist(), index.count.tolist()) == ([0] * 4, [2] * 4)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("run", [1, 2, 3])
def test_a_schedule_covers_all_visible_pairs_of_all_heads_and_batch_entries(name, run):
    """Each once: the tiles of a row do not overlap, and those called full are."""
    query, key = np.arange(14, dtype=np.int32)[None].repeat(2, 0), np.arange(13, dtype=np.int32)
    index, kinds = schedule(MASKS[name][0], *in_tiles(query, key, (4, 3)), run)
    some, every = any_and_all(oracle.pairs(MASKS[name][1], query, key, BATCH, HEADS), query, key, (4, 3))
    for i, row in enumerate(np.asarray(index.starts)):
        full, count = int(index.full[i]), int(index.count[i])
        covered = [granule for start in row[:count] for granule in range(start, start + run)]
        assert len(set(covered)) == len(covered)
        assert every[:, :, i, covered[: full * run]].all()
        assert not some[:, :, i, np.setdiff1d(np.arange(5), covered)].any()
        assert kinds.full or not full
        assert kinds.partial or full == count
        assert count == 1 or not kinds.single


def test_narrow_masks_get_small_tiles_and_unknown_ones_the_largest():
    lengths = 4096, 4096

    def choose(mask, dynamic=False):
        def of(block):
            sizes = block.queries, block.granule
            places = in_tiles(*(np.arange(length, dtype=np.int32) for length in lengths), sizes)
            return schedule(mask, *(map(jnp.asarray, places) if dynamic else places), block.keys // block.granule)[0]

        return choose_block(of, lengths, BLOCKS["cpu"])

    assert choose(None) == BLOCKS["cpu"][0]
    assert choose(Window(16)).keys < choose(Window(256)).keys < BLOCKS["cpu"][0].keys
    assert choose(Window(16), dynamic=True) == BLOCKS["cpu"][0]


def test_a_few_queries_get_tiles_of_keys_that_fit_a_cache():
    assert blocks_for(1, 8 * 2**11) == (Block(1, 256, 256),)
    assert blocks_for(4, 2**11) == (Block(4, 2048, 2048),)
    assert blocks_for(1, 2**20) == (Block(1, 64, 64),)
    assert blocks_for(17, 2**11) == BLOCKS["cpu"]


def test_blocks_are_no_larger_than_the_lengths_need():
    assert fit(Block(256, 512, 128), (100, 300)) == Block(100, 384, 128)
    assert fit(Block(256, 512, 128), (1000, 100)) == Block(256, 100, 100)
    assert fit(Block(256, 512, 128), (1000, 1000)) == Block(256, 512, 128)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("mask", "tiles"),
    [(Causal(), 10), (Window(3), 7), (Documents(jnp.array([0] * 8 + [1] * 4 + [2] * 4)), 6)],
    ids=["causal", "window", "documents"],
)
def test_each_active_tile_is_computed_once_and_no_other(mask, tiles):
    x = normal(16, 1, 2)
    VISITS.clear()
    attend(x, x, x, score=Counted(), mask=mask, block=4, implementation="tiled").block_until_ready()
    jax.effects_barrier()
    assert len(VISITS) == tiles


# A mask under which the last four queries need none of the first eight keys, whole tiles of 4.
SKIPPING = {
    "window": Window(3),
    "documents": Documents(jnp.array([0] * 8 + [1] * 8)),
    "explicit": Explicit(jnp.asarray(np.tril(np.ones((16, 16), bool)) & ~np.tri(16, 16, -5, bool))[None]),
    "lengths": ~Lengths(jnp.array([9])),
    "streaming": Causal() & Documents(jnp.array([0] * 8 + [1] * 8)) & (Window(2) | Sinks(1)),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_skipped_tiles_are_not_read(name):
    """Not even NaN is noticed there, and only the tiles of the other keys are computed."""
    query, key, value = normal(1, 4, 2, 4, seed=1), normal(1, 16, 1, 4, seed=2), normal(1, 16, 1, 4, seed=3)
    key[:, :8], value[:, :8] = np.nan, np.nan
    cotangents = normal(1, 4, 2, 4, seed=4), normal(1, 4, 2, seed=5)
    call = (query, key, value), (Dot(), None, Softmax()), SKIPPING[name], (np.arange(12, 16), None), cotangents
    results, gradients = evaluate(*call, implementation="tiled", block=4)
    for x in jax.tree.leaves((results, gradients)):
        assert np.isfinite(x).all()
    assert not np.any(gradients[1][:, :8])
    arrays, places = [jnp.asarray(x) for x in (query, key, value)], jnp.arange(12, 16)
    options = {"mask": SKIPPING[name], "query_positions": places, "block": 4, "implementation": "tiled"}
    VISITS.clear()
    attend(*arrays, score=Counted(), **options).block_until_ready()
    jax.effects_barrier()
    assert 1 <= len(VISITS) <= 2


@pytest.mark.parametrize("name", ["documents", "streaming"])
@by_implementation("tiled")
def test_documents_never_leak(name, implementation):
    """Changing one document changes its own outputs and gradients and, bit for bit, nobody else's."""
    arrays = normal(1, 16, 4, 4, seed=1), normal(1, 16, 2, 4, seed=2), normal(1, 16, 2, 4, seed=3)
    cotangents = normal(1, 16, 4, 4, seed=4), normal(1, 16, 4, seed=5)
    rest = (Dot(), None, Softmax()), MASKS[name][0], (None, None), cotangents
    before = evaluate(arrays, *rest, implementation=implementation, block=4)
    for document in set(IDS.tolist()):
        inside = document == IDS
        changed = tuple(x + 3 * inside[:, None, None] * normal(*x.shape, seed=7) for x in arrays)
        after = evaluate(changed, *rest, implementation=implementation, block=4)
        for old, new in zip(*((results[0], *gradients[:3]) for results, gradients in (before, after)), strict=True):
            np.testing.assert_array_equal(old[:, ~inside], new[:, ~inside])
            assert document < 0 or (old[:, inside] != new[:, inside]).any((0, 2, 3)).all()
        assert (before[0][1] != after[0][1])[:, inside].all() or document < 0


def test_the_tables_are_worth_testing():
    assert len(set(IDS[IDS >= 0].tolist())) > 2
    assert LENGTHS.min() == 0
    assert (np.diff(BATCH_IDS) < 0).any()  # documents out of order, which bounds must not count on


def test_a_window_of_256_at_length_8192_computes_less_than_a_tenth_of_causal():
    def pairs(mask):
        def index_of(block):
            query = np.arange(8192, dtype=np.int32).reshape(1, -1, 1, block.queries)
            key = np.arange(8192, dtype=np.int32).reshape(1, 1, -1, block.granule)
            return schedule(mask, query, key, block.keys // block.granule)[0]

        block = choose_block(index_of, (8192, 8192), BLOCKS["cpu"])
        return int(index_of(block).count.sum()) * block.queries * block.keys

    assert 10 * pairs(Causal() & Window(256)) < pairs(Causal())


def test_a_block_larger_than_the_lengths_costs_no_memory():
    x = jax.ShapeDtypeStruct((1, 6, 1, 4), jnp.float32)
    call = jax.jit(lambda x: attend(x, x, x, implementation="tiled", block=2**15))
    assert call.lower(x).compile().memory_analysis().temp_size_in_bytes < 2**16
