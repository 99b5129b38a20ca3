"""Masks in the call: causality, empty slots, order; how masks are made and read. (That each mask shows what its
predicate says, at any positions, is in test_schedule.py.)"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    BATCH_IDS,
    BY_HEAD,
    IMPLEMENTATIONS,
    MASKS,
    NEIGHBOURS,
    PARENTS,
    assert_close,
    by_implementation,
    evaluate,
)
from test_schedule import any_and_all, in_tiles

from jaxattn import (
    Alibi,
    Bias,
    Causal,
    Chunked,
    Documents,
    Dot,
    Explicit,
    KeyBias,
    Lengths,
    Mask,
    Mass,
    PerHead,
    Prefix,
    RelativeBias,
    Sigmoid,
    Sinks,
    Softmax,
    Tile,
    Window,
    attend,
    part,
)
from jaxattn.core.attend import Ancestors, Dilated, GaussianWindow, Graph, Location, LogGaussian, Reallocate, Within

LENGTH = 12


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def a_call(seed=0):
    return (
        normal(2, LENGTH, 4, 4, seed=seed),
        normal(2, LENGTH, 2, 4, seed=seed + 1),
        normal(2, LENGTH, 1, 3, seed=seed + 2),
    )


PARTS = Dot(np.float32(0.6)), Alibi(np.array([0.1, 0.2, 0.3, 0.4], np.float32)), Softmax(normal(4, seed=9))
COTANGENTS = normal(2, LENGTH, 4, 3, seed=20), normal(2, LENGTH, 4, seed=21)


@pytest.mark.parametrize("name", ["causal", "window", "streaming", "strided"])
@by_implementation("tiled")
def test_the_future_does_not_change_the_past(name, implementation):
    query, key, value = a_call()
    other = a_call(seed=30)
    run = partial(evaluate, implementation=implementation, block=4)
    (out, lse), _ = run((query, key, value), PARTS, MASKS[name][0], (None, None), COTANGENTS)
    for now in (0, 4, 7):
        changed = tuple(
            np.concatenate([x[:, : now + 1], y[:, now + 1 :]], 1) for x, y in zip((key, value), other[1:], strict=True)
        )
        (out2, lse2), _ = run((query, *changed), PARTS, MASKS[name][0], (None, None), COTANGENTS)
        np.testing.assert_array_equal(out[:, : now + 1], out2[:, : now + 1])
        np.testing.assert_array_equal(lse[:, : now + 1], lse2[:, : now + 1])
        assert (out[:, now + 1 :] != out2[:, now + 1 :]).any((0, 2, 3)).all()
        past = tuple(x * (np.arange(LENGTH) <= now).reshape(1, -1, *[1] * (x.ndim - 2)) for x in COTANGENTS)
        _, gradients = run((query, key, value), PARTS, MASKS[name][0], (None, None), past)
        assert not any(np.any(gradient[:, now + 1 :]) for gradient in gradients[:3])
        assert all(np.all(gradient[:, now] != 0) for gradient in gradients[1:3])


TABLE = Bias(normal(4, 20, 20, seed=10))


@pytest.mark.parametrize("name", ["streaming", "explicit by batch"])
@by_implementation("tiled")
def test_order_is_only_in_the_positions(name, implementation):
    """Permuting keys with their positions changes nothing; permuting queries with theirs permutes the rows."""
    parts, (query, key, value) = (Dot(), TABLE, Softmax()), a_call()
    place, rng = np.arange(LENGTH, dtype=np.int32), np.random.default_rng(5)
    run = partial(evaluate, implementation=implementation, block=4)
    before = run((query, key, value), parts, MASKS[name][0], (place, place), COTANGENTS)
    rows, columns = rng.permutation(LENGTH), rng.permutation(LENGTH)
    after = run(
        (query[:, rows], key[:, columns], value[:, columns]),
        parts,
        MASKS[name][0],
        (place[rows], place[columns]),
        tuple(x[:, rows] for x in COTANGENTS),
    )
    (out, lse), (d_query, d_key, d_value, _, d_bias, _) = before
    moved = (out[:, rows], lse[:, rows]), (d_query[:, rows], d_key[:, columns], d_value[:, columns], d_bias.array)
    (out, lse), (d_query, d_key, d_value, _, d_bias, _) = after
    for x, y in zip(jax.tree.leaves(moved), (out, lse, d_query, d_key, d_value, d_bias.array), strict=True):
        # Only the order of sums of at most 24 terms, none above 8 times the largest, has changed.
        assert_close(y, x, 8 * np.abs(x).max(where=np.isfinite(x), initial=0))


@pytest.mark.parametrize("normalize", [Softmax(normal(4, seed=9)), Sigmoid()], ids=["softmax", "sigmoid"])
@by_implementation("tiled")
def test_what_empty_slots_hold_is_ignored(normalize, implementation):
    arrays = a_call()
    places = np.arange(LENGTH, dtype=np.int32), np.arange(LENGTH, dtype=np.int32)
    empty = np.array([1, 8, 9, 10, 11]), np.array([0, 1, 2, 3, 6])
    for place, slots in zip(places, empty, strict=True):
        place[slots] = -1
    run = partial(evaluate, implementation=implementation, block=4)
    rest = (Dot(np.float32(0.6)), TABLE, normalize), Causal(), places
    before = run(arrays, *rest, COTANGENTS)
    garbage = tuple(x.copy() for x in arrays)
    for x, slots in zip(garbage, (empty[0], empty[1], empty[1]), strict=True):
        x[:, slots] = np.nan
    after = run(garbage, *rest, COTANGENTS)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.isnan(x).any()
        np.testing.assert_array_equal(x, y)
    (out, lse), (d_query, d_key, d_value, *_) = after
    assert not np.any(out[:, empty[0]])
    nothing = normalize.null_logit if isinstance(normalize, Softmax) else -np.inf
    np.testing.assert_array_equal(lse[:, empty[0]], np.broadcast_to(nothing, lse[:, empty[0]].shape))
    assert not np.any(d_query[:, empty[0]])
    assert not np.any(d_key[:, empty[1]])
    assert not np.any(d_value[:, empty[1]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32])
def test_positions_of_any_integer_dtype_are_the_same_positions(dtype):
    """Distances are negative and tables long, also where the dtype of the positions has room for neither."""
    query, key, value = a_call()
    place = np.arange(LENGTH, dtype=np.int32)
    options = {"mask": MASKS["window"][0], "bias": Bias(normal(1, 20, 200, seed=10))}

    def out(place):
        return attend(query, key, value, query_positions=place, key_positions=place, **options)

    np.testing.assert_array_equal(out(place.astype(dtype)), out(place))


@part
class Every(Mask):
    """A mask as a user would write one: keys at a distance divisible by `step`."""

    step: int

    def __call__(self, query, key):
        return (query - key) % self.step == 0


def test_a_mask_needs_nothing_but_its_call():
    query, key, value = a_call()
    table = (np.arange(LENGTH)[:, None] - np.arange(LENGTH)) % 3 == 0

    @jax.jit
    def both(query, key, value):
        def run(mask, implementation):
            def call(*x):
                out, extras = attend(*x, mask=mask, return_lse=True, block=4, implementation=implementation)
                return out, extras["lse"]

            results, pull = jax.vjp(call, query, key, value)
            return results, pull(COTANGENTS)

        return run(Every(3), "tiled"), run(Documents(jnp.arange(LENGTH) % 3), "dense")

    for x, y in zip(*map(jax.tree.leaves, both(query, key, value)), strict=True):
        assert_close(x, y, 8 * np.abs(y).max())
    np.testing.assert_array_equal((Every(3) & ~Every(1))(np.arange(4)[:, None], np.arange(4)), np.zeros((4, 4), bool))
    np.testing.assert_array_equal(Every(3)(np.arange(LENGTH)[:, None], np.arange(LENGTH)), table)


# Of masks whose bounds are exact: whether a tile shows a pair; and those of whole tiles too.
EXACT = ("prefix", "prefix of 5", "chunked", "per head of exact ones")
POSSIBLE = (*EXACT, "dilated", "graph")
TILES = in_tiles(np.arange(2, 14, dtype=np.int32)[None].repeat(2, 0), np.arange(12, dtype=np.int32), (4, 3))


def exact_case(name):
    if name == "per head of exact ones":
        windows = (Window(0), Window(2, 1), Window(9), Documents(jnp.asarray(BATCH_IDS)))
        return PerHead(windows), lambda b, n, p, r: (
            p == r,
            -2 <= r - p <= 1,
            p - 9 <= r <= p,
            BATCH_IDS[b[-1], p] == BATCH_IDS[b[-1], r] and BATCH_IDS[b[-1], p] >= 0,
        )[n]
    return MASKS[name]


@pytest.mark.parametrize("name", POSSIBLE)
def test_bounds_are_exact_on_contiguous_positions(name):
    """For batch entry 0, whose documents are in order: the ids of a tile are known by their range."""
    mask, predicate = exact_case(name)
    query, key = np.arange(2, 14)[None].repeat(2, 0), np.arange(12)
    some, every = any_and_all(oracle.pairs(predicate, query, key, (2,), 4), query, key, (4, 3))
    possible, certain = (np.broadcast_to(x, some.shape) for x in mask.bounds(*TILES))
    np.testing.assert_array_equal(possible[0], some[0])
    if name in EXACT:
        np.testing.assert_array_equal(certain[0], every[0])


@pytest.mark.parametrize("mask", [Dilated(3), Chunked(4), PerHead((Window(1), Causal() & Dilated(2)))], ids=str)
def test_static_masks_have_static_bounds(mask):
    assert all(isinstance(x, np.ndarray) for x in mask.bounds(*TILES))


@pytest.mark.parametrize("step", [1, 2])
def test_tiles_of_one_pair_are_classified_exactly(step):
    query, key = (np.arange(6, dtype=np.int32) for _ in range(2))
    possible, certain = Dilated(step).bounds(*in_tiles(query, key, (1, 1)))
    expected = (query[:, None] - key) % step == 0
    np.testing.assert_array_equal(possible[0], expected)
    np.testing.assert_array_equal(certain[0], expected)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "none"])
def test_a_mask_as_an_array_is_the_same_mask(name):
    """to_array is the predicate, Explicit of it is the mask again, and density its mean."""
    mask, predicate = MASKS[name]

    array = mask.to_array(12, 14)
    expected = oracle.pairs(predicate, np.arange(12), np.arange(14), (2,), 4)
    assert array.ndim >= 3
    assert array.dtype == bool
    np.testing.assert_array_equal(np.broadcast_to(array, expected.shape), expected)
    np.testing.assert_array_equal(np.broadcast_to(Explicit(array).to_array(12, 14), expected.shape), expected)
    assert mask.density(12, 14) == pytest.approx(expected.mean(), abs=1e-6)
    assert isinstance(mask.describe(), str)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "none"])
def test_keys_may_stand_elsewhere_for_every_head(name):
    """As in a cache that evicts by head: each head's mask at its positions, and bounds that keep their promises."""
    mask, predicate = MASKS[name]
    rng = np.random.default_rng(0)
    query, key = np.arange(2, 14, dtype=np.int32)[None].repeat(2, 0), rng.integers(-1, 16, (2, 4, 12)).astype(np.int32)
    key[:, :, 3:9].sort()
    tiled_query, tiled_key = in_tiles(query, key, (4, 3))
    tiled_key = tiled_key[..., 0, 0, :, :][..., None, :, :]  # [2, 4, 1, KB, 3]

    @jax.jit
    def read(mask):
        return mask(query[:, None, :, None], key[:, :, None, :]), mask.bounds(tiled_query, tiled_key)

    shown, (possible, certain) = read(mask)
    for head in range(4):
        visible = oracle.pairs(predicate, query, key[:, head], (2,), 4)[:, head]
        slots = key[:, head, None, :] >= 0
        np.testing.assert_array_equal(np.broadcast_to(shown, (2, 4, 12, 12))[:, head] & slots, visible)
        some, every = any_and_all(visible[:, None], query, key[:, head], (4, 3))
        assert not (some[:, 0] & ~np.broadcast_to(possible, (2, 4, 3, 4))[:, head]).any()
        assert not (~every[:, 0] & np.broadcast_to(certain, (2, 4, 3, 4))[:, head]).any()


def test_an_array_at_given_positions_hides_empty_slots():
    places = np.array([[3, -1, 0], [2, 2, 1]])
    expected = (places[:, None, :, None] >= [1, 0, -1]) & (places >= 0)[:, None, :, None] & [True, True, False]
    np.testing.assert_array_equal(Causal().to_array(places, np.array([1, 0, -1])), expected)
    np.testing.assert_array_equal(Causal().to_array(3), [np.tri(3, dtype=bool)])


@part
class Undescribed(Mask):
    """A user's mask."""

    step: int
    table: jax.Array

    def __call__(self, query, key):
        return query == key


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Causal() & (Window(7) | Sinks(3)), "causal and (the last 8 keys or the first 3 keys)"),
        (~(Causal() & Window(2, 1)) | Sinks(1), "not (causal and 2 back to 1 ahead) or the first key"),
        (Causal() & Window(0) & Dilated(3), "causal and itself and distances divisible by 3"),
        (~Documents(np.zeros(2, int)) | Chunked(4), "not the same document or the same chunk of 4"),
        (Prefix(3), "a prefix of 3, then causal"),
        (Prefix(np.array([3, 4])) & Lengths(np.array([5, 6])), "a prefix, then causal and within the length"),
        (PerHead((Causal(), Causal(), Window(1))), "heads 0-1: causal; head 2: the last 2 keys"),
        (~PerHead((Causal(),)), "not (head 0: causal)"),
        (
            Explicit(np.ones((1, 1, 1), bool)) & Graph(np.zeros((1, 1, 1), int)),
            "a table of pairs and neighbours in a graph",
        ),
        (Ancestors(np.array([-1])), "itself and its ancestors"),
        (Undescribed(4, np.zeros(3)), "Undescribed(step=4)"),
    ],
)
def test_masks_say_what_they_show(mask, text):
    assert mask.describe() == text


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: Dilated(0), ValueError, "Dilated: step must be at least 1, got 0"),
        (lambda: Dilated(1.5), TypeError, "Dilated: step must be an int, got 1.5"),
        (lambda: Chunked(0), ValueError, "Chunked: size must be at least 1, got 0"),
        (lambda: Chunked(jnp.int32(2)), TypeError, "Chunked: size must be an int, got Array"),
        (lambda: PerHead(()), ValueError, "PerHead: masks is empty: need one per head"),
        (lambda: PerHead([Causal()]), TypeError, "PerHead: masks must be a tuple of masks, got list"),
        (
            lambda: PerHead((Causal(), Causal(), Explicit(jnp.asarray(BY_HEAD)))).to_array(4),
            ValueError,
            "PerHead: 3 masks, but one of them is itself for 4 heads: need the same",
        ),
        (lambda: Graph.from_edges([0, 1], [1], 2), ValueError, r"have shapes \(2,\), \(1,\): need \[E\] for both"),
        (lambda: Graph.from_edges([0, 2], [1, 1], 2), ValueError, r"edges must be between the nodes 0..1"),
        (lambda: Graph.from_adjacency([True]), ValueError, r"adjacency has shape \(1,\): need \[P, R\] or"),
        (lambda: Causal().to_array(0), ValueError, "queries must be at least 1, got 0"),
        (lambda: Causal().to_array(3, 0), ValueError, "keys must be at least 1, got 0"),
        (lambda: Causal().density(2.0), TypeError, "queries must be an int or an integer array, got float"),
        (lambda: Causal().to_array(2, np.ones(2)), TypeError, "keys must be an int or an integer array, got float64"),
    ],
)
def test_what_masks_refuse(make, exception, message):
    with pytest.raises(exception, match=message):
        make()


def test_a_call_names_masks_that_do_not_fit_it():
    x = normal(5, 4, 2)
    with pytest.raises(ValueError, match=r"mask gives shape \(1, 3, 5, 5\)|mask gives shape \(3, 5, 5\)"):
        attend(x, x, x, mask=PerHead((Causal(),) * 3))
    with pytest.raises(TypeError, match=r"mask: Graph.neighbours must be Int\[Array, .* got bool"):
        attend(x, x, x, mask=Graph(np.ones((1, 5, 5), bool)))


def test_a_prefix_is_causal_or_the_first_keys():
    for length in (0, 1, 4, 9):
        expected = (Causal() | Sinks(length)).to_array(7)
        np.testing.assert_array_equal(Prefix(length).to_array(7), expected)
        np.testing.assert_array_equal(jax.jit(lambda mask: mask.to_array(7))(Prefix(length)), expected)


def test_a_dilated_window_by_hand():
    shown = (Dilated(2) & Window(4)).to_array(np.array([7]), 9)
    np.testing.assert_array_equal(shown[0, 0], [p in (3, 5, 7) for p in range(9)])


def test_graphs_from_edges_and_from_an_adjacency_are_the_same():
    rng = np.random.default_rng(0)
    adjacency = rng.random((9, 9)) < 0.2
    adjacency[3] = False
    receivers, senders = np.nonzero(adjacency)
    again = rng.permutation(np.tile(np.arange(len(senders)), 2))  # every edge twice, in any order
    for graph in (Graph.from_edges(senders[again], receivers[again], 9), Graph.from_adjacency(adjacency)):
        np.testing.assert_array_equal(graph.to_array(9)[0], adjacency)
        assert graph.neighbours.shape == (1, 9, adjacency.sum(-1).max())
    np.testing.assert_array_equal(Graph.from_adjacency(BY_HEAD).to_array(16), BY_HEAD)
    assert not Graph.from_edges([], [], 3).to_array(3).any()


def test_attention_over_a_graph_is_a_loop_over_neighbours():
    query, key, value = a_call()
    for implementation in IMPLEMENTATIONS:
        graph = Graph(jnp.asarray(NEIGHBOURS))
        out = attend(query, key, value, mask=graph, score=Dot(1.0), implementation=implementation, block=4)
        for n, p in np.ndindex(4, LENGTH):
            seen = sorted({int(r) for r in NEIGHBOURS[n, p] if 0 <= r < LENGTH})
            weights = np.exp(key[0, seen, n // 2] @ query[0, p, n])
            expected = weights @ value[0, seen, 0] / weights.sum() if seen else np.zeros(3)
            assert_close(out[0, p, n], expected, 8 * np.abs(value).max())


def test_a_graph_needs_no_memory_for_all_pairs():
    """10 000 nodes of 8 neighbours: the 10^8 pairs would take 95 MiB as booleans."""
    x = jax.ShapeDtypeStruct((10_000, 1, 2), jnp.float32)
    graph = Graph(jax.ShapeDtypeStruct((1, 10_000, 8), jnp.int32))
    call = jax.jit(lambda x, graph: attend(x, x, x, mask=graph, implementation="tiled", block=128))
    assert call.lower(x, graph).compile().memory_analysis().temp_size_in_bytes < 2**24


def path_to_root(parents, node):
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def test_a_chain_of_ancestors_is_causal_and_roots_are_apart():
    chain = Ancestors(jnp.arange(9) - 1)
    np.testing.assert_array_equal(chain.to_array(9), Causal().to_array(9))
    np.testing.assert_array_equal(Ancestors(jnp.full(4, -1)).to_array(4)[0], np.eye(4))
    assert not chain.to_array(np.array([9, 12]), 9).any()  # no such nodes
    assert not chain.to_array(9, np.array([9, 12])).any()


def test_a_tree_needs_no_tiles_after_the_diagonal_and_forests_none_between_their_trees():
    tree, places = Ancestors(jnp.maximum(jnp.arange(12) // 3 - 1, -1)), np.arange(12, dtype=np.int32)
    possible, _ = tree.bounds(*in_tiles(places, places, (4, 3)))
    assert not np.any(possible & ~np.tri(3, 4, k=1, dtype=bool))
    forest = Ancestors(jnp.array([-1, 0, 0, 2, -1, 4, 5, 5, -1, 8, 9, 10]))
    possible, _ = forest.bounds(*in_tiles(places, places, (4, 4)))
    np.testing.assert_array_equal(possible[0], np.eye(3))


@pytest.mark.parametrize("nodes", [1, 2, 7, 8, 9, 33])
def test_ancestors_of_random_trees_are_found_by_walking_up(nodes):
    rng = np.random.default_rng(nodes)
    parents = np.stack([[rng.integers(-1, i) if i else -1 for i in range(nodes)] for _ in range(4)])
    expected = [[[j in path_to_root(tree, i) for j in range(nodes)] for i in range(nodes)] for tree in parents]
    np.testing.assert_array_equal(Ancestors(jnp.asarray(parents)).to_array(nodes)[:, 0], expected)


@by_implementation("dense")
def test_every_path_of_a_tree_alone_gives_the_same_outputs(implementation):
    """What verifying a tree of drafts in one call relies on."""
    parents = PARENTS[0]
    query, key, value = (normal(16, heads, 4, seed=heads) for heads in (4, 2, 1))
    out = attend(query, key, value, mask=Ancestors(parents), implementation=implementation, block=4)
    for node in range(16):
        path = np.array(path_to_root(parents, node))
        alone = attend(query[path], key[path], value[path], mask=Causal(), implementation="dense")
        assert_close(out[path], alone, 8 * np.abs(value).max())


@by_implementation("dense")
def test_a_mask_per_head_is_a_loop_over_heads(implementation):
    query, key, value = a_call()
    masks = (Window(1), Window(6), ~Causal(), PerHead((Causal(), Causal(), Causal(), Sinks(3))))
    out = attend(query, key, value, mask=PerHead(masks), implementation=implementation, block=4)
    for n, mask in enumerate((*masks[:3], Sinks(3))):
        alone = attend(query[:, :, n : n + 1], key[:, :, n // 2 : n // 2 + 1], value, mask=mask)
        assert_close(out[:, :, n : n + 1], alone, 8 * np.abs(value).max())


# Axes of size 1 in tables over positions.

Q, K = normal(2, 5, 4, 8, seed=30), normal(2, 6, 2, 8, seed=31)


SHARED = (2, 1, 1, 6), (2, 1, 5, 1), (1, 4, 1, 6), (2, 4, 5, 1), (1, 1, 1), (5, 6), (1, 6), (5, 1), (6,)


@by_implementation("dense")
def test_axes_of_size_1_are_shared_as_in_jax(implementation):
    tables = [np.random.default_rng(len(shape)).random(shape) < 0.6 for shape in SHARED]

    @jax.jit
    def results(table):
        full = jnp.broadcast_to(table, (2, 4, 5, 6))
        by_mask = [attend(Q, K, K, mask=Explicit(x), implementation=implementation, block=2) for x in (table, full)]
        return *by_mask, jax.nn.dot_product_attention(
            Q, K, K, mask=table.reshape((1,) * (4 - table.ndim) + table.shape)
        )

    for table in tables:
        found, same, expected = map(np.asarray, results(table))
        np.testing.assert_allclose(found, same, atol=1e-6)
        sees = np.broadcast_to(table, (2, 4, 5, 6)).any(-1).swapaxes(-1, -2)
        np.testing.assert_allclose(found[sees], expected[sees], atol=1e-5)
        np.testing.assert_array_equal(found[~sees], 0)


def test_a_shared_axis_serves_every_position_but_that_of_an_empty_slot():
    mask = Explicit(jnp.asarray([[[True, False, True, True]]]))
    places, keys = jnp.array([0, 7, -1, 300]), jnp.array([3, 1, -1, 0])
    shown = mask.to_array(places, keys)[0]
    np.testing.assert_array_equal(shown, np.outer([1, 1, 0, 1], [1, 0, 0, 1]).astype(bool))
    everything = Explicit(jnp.ones((1, 1, 1), bool)).to_array(places, keys)[0]
    np.testing.assert_array_equal(everything, np.outer(places >= 0, keys >= 0))


def test_other_tables_share_an_axis_of_size_1_too():
    for one, many in (
        ({"bias": KeyBias(jnp.full((4, 1), 0.3))}, {"bias": KeyBias(jnp.full((4, 6), 0.3))}),
        (
            {"bias": LogGaussian(jnp.full((4, 1), 2.0), 1.5), "mask": Causal()},
            {"bias": LogGaussian(jnp.full((4, 5), 2.0), 1.5), "mask": Causal()},
        ),
        (
            {"weight_maps": (GaussianWindow(jnp.full((1, 1), 2.0), 1.5),)},
            {"weight_maps": (GaussianWindow(jnp.full((1, 5), 2.0), 1.5),)},
        ),
        ({"score": Location(jnp.ones((1, 8)))}, {"score": Location(jnp.ones((6, 8)))}),
        ({"score": Location(jnp.ones((4, 1, 8)))}, {"score": Location(jnp.ones((4, 6, 8)))}),
    ):
        options = {"normalize": Softmax(jnp.zeros(4))}  # under which a bias that all keys share matters
        found, expected = (attend(Q, K, K, **options, **each) for each in (one, many))
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mask": Documents(jnp.zeros((2, 1), int))}, "Documents: ids"),
        ({"mask": Documents(jnp.zeros((2, 6), int), jnp.zeros((2, 1), int))}, "Documents: key_ids"),
        ({"mask": Within(Causal(), jnp.zeros((2, 1), int))}, "Within: places"),
        ({"mask": Graph(jnp.zeros((1, 1, 3), int))}, "Graph: neighbours"),
        ({"mask": Ancestors(jnp.full((2, 1), -1))}, "Ancestors: parents"),
        ({"measures": {"mass": Mass(jnp.zeros(1, int))}}, "Mass: groups"),
        ({"weight_maps": (Reallocate(jnp.zeros(1, int), jnp.ones(1)),)}, "Reallocate: groups"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_one_entry_for_several_tokens_is_refused_where_it_could_mean_two_things(options, name):
    with pytest.raises(ValueError, match=rf"{name} has 1 entry but the call has [56] positions: need one for each"):
        attend(Q, K, K, **options)


def test_python_operators_on_masks_are_refused():
    """`Causal() and Documents(ids)` would be the documents alone: the future would leak."""
    for combine in (lambda: Causal() and Window(2), lambda: Causal() or Window(2), lambda: not Causal()):
        with pytest.raises(TypeError, match=r"combine masks by &, \| and ~"):
            combine()


def test_positions_near_the_largest_integer_do_not_overflow():
    last = np.iinfo(np.int32).max
    places = jnp.array([last - 2, last - 1, last], jnp.int32)
    for mask, expected in (
        (Window(0, 1), np.eye(3) + np.eye(3, k=1)),
        (Window(1, 2**30), 1 - np.tri(3, k=-2)),
        (Window(2**30, 0), np.tri(3)),
    ):
        np.testing.assert_array_equal(mask.to_array(places)[0], expected.astype(bool))
        for xp in (np, jnp):  # one tile of all queries, and one for each key
            queries, keys = xp.asarray(places)[None, None, None, None], xp.asarray(places)[None, None, None, :, None]
            possible, certain = mask.bounds(queries, keys)
            np.testing.assert_array_equal(possible[0, 0, 0], expected.any(0))
            np.testing.assert_array_equal(certain[0, 0, 0], expected.all(0))
    table = jnp.arange(8.0)[None]
    far = RelativeBias(table, 20)(Tile(jnp.array([[[last]]]), jnp.array([[[0, 1, 2]]])))
    np.testing.assert_array_equal(far, 7)


def test_documents_give_each_document_the_mask_it_would_have_alone():
    """Sinks of their own; `Sinks & Documents` shows the first positions of the row, to the first document alone."""
    ids = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    own = Causal() & (Window(1) | Sinks(1))
    packed = Documents(jnp.asarray(ids)).within(own).to_array(9)[0]
    expected = np.zeros((9, 9), bool)
    expected[:4, :4], expected[4:, 4:] = own.to_array(4)[0], own.to_array(5)[0]
    np.testing.assert_array_equal(packed, expected)
    by_row = (own & Documents(jnp.asarray(ids))).to_array(9)[0]
    assert not by_row[8, 4]
    with pytest.raises(ValueError, match="within counts places in one row: need key_ids=None"):
        Documents(jnp.asarray(ids), jnp.asarray(ids)).within(own)
    for wrong, message in (
        (ids, "mask has dtype int64: need booleans"),
        ("causal", "a mask combines with masks, arrays"),
    ):
        with pytest.raises(TypeError, match=message):
            Documents(jnp.asarray(ids)).within(wrong)
