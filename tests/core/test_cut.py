"""Calls cut by head and by batch entry: the names of axes in annotations say how, for every part of the library."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, VISITS, Counted
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import SLOTS, B, S, T, draw, places

import jaxattn.core.attend as ja
from jaxattn import attend, part
from jaxattn.core.attend.call import Given, prepare
from jaxattn.core.attend.cut import by_entries, by_heads, named_axes
from jaxattn.core.attend.dense import dense
from jaxattn.core.attend.schedule import Apart, Block, schedule
from jaxattn.core.attend.slots import Slots
from jaxattn.core.attend.tiled import apart_of, tiled

# Their noise is drawn for the heads of a call together; they need complete rows, and tiles alone are cut.
DRAWN = {"OneHotSample", "Gumbel", "DropTopK"}


def a_call(arrays, slots, **positions):
    where = {"query_positions": None, "key_positions": None} | positions
    call = Given(*(jnp.asarray(arrays[x]) for x in ("query", "key", "value")), slots, **where)
    return prepare(call)


def random_arrays(length=T, keys=S, heads=(4, 2, 1), seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, length, heads[0], 4), "key": (B, keys, heads[1], 4), "value": (B, keys, heads[2], 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def joined(results, axis):
    """[pieces, ...] with the pieces joined along an axis that counts without that of pieces."""
    x = np.moveaxis(np.asarray(results), 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


@pytest.mark.parametrize("name", SLOTS)
def test_every_part_is_cut_by_the_names_of_its_axes(name):
    """Attention a few heads, or a batch entry, at a time is attention of all. In float64, dense."""
    slot, where = SLOTS[name], places(True)
    arrays = draw(slot, where)
    with jax.enable_x64(True):
        slots = Slots(mask=where.mask, **slot.parts(arrays))
        kinds = {type(part).__name__ for part in (slots.normalize, *slots.maps)}
        if kinds & DRAWN:
            return

        @jax.jit
        def whole_and_pieces(arrays):
            parts = slot.parts(arrays)
            call = a_call(arrays, Slots(mask=where.mask, **parts), query_positions=where.query, key_positions=where.key)
            cuts = (by_heads(call, 2), by_heads(call, 4), by_entries(call))
            return [run(dense)[:2] for run in (lambda dense: dense(call), *(cut.each for cut in cuts))]

        if "MixHeads" in kinds:
            with pytest.raises(ValueError, match=r"an array of shape \(4, 4\) has 2 axes of heads, which it mixes"):
                whole_and_pieces(arrays)
            return
        (out, lse), *by_groups, (found_out, found_lse) = whole_and_pieces(arrays)
        for some_out, some_lse in by_groups:
            np.testing.assert_allclose(joined(some_out, 2), out, rtol=0, atol=1e-12)
            np.testing.assert_allclose(joined(some_lse, 2), lse, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found_out[:, 0], out, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found_lse[:, 0], lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "none"])
def test_every_mask_is_cut_by_the_names_of_its_axes(name):
    def shown(cut, heads, entries=B):
        return cut.each(lambda piece: jnp.broadcast_to(piece.tile.visible, (entries, heads, T, S)))

    @jax.jit
    def whole_and_pieces(mask):
        call = a_call(random_arrays(), Slots(mask=mask))
        pieces = shown(by_heads(call, 2), 2), shown(by_heads(call, 4), 1), shown(by_entries(call), 4, 1)
        return jnp.broadcast_to(call.tile.visible, (B, 4, T, S)), pieces

    visible, (*by_groups, by_entry) = whole_and_pieces(MASKS[name][0])
    for groups in by_groups:
        np.testing.assert_array_equal(joined(groups, 1), visible)
    np.testing.assert_array_equal(by_entry[:, 0], visible)


def test_a_cut_part_can_be_cut_again():
    """First by key head, then each of its query heads, then by batch entry."""
    call = a_call(random_arrays(), Slots(mask=MASKS["per head"][0] | MASKS["blocks"][0]))
    visible = np.broadcast_to(call.tile.visible, (B, 4, T, S))

    def twice(piece):
        return by_heads(piece, 2).each(lambda piece: jnp.broadcast_to(piece.tile.visible, (1, 1, T, S)))

    shown = by_entries(call).each(lambda entry: by_heads(entry, 2).each(twice))  # [B, 2, 2, 1, 1, T, S]
    np.testing.assert_array_equal(np.asarray(shown).reshape(B, 4, T, S), visible)


def test_axes_are_named_from_both_ends():
    hints = {field.name: field.type for field in dataclasses.fields(ja.Explicit)}
    assert named_axes(hints["array"], 5) == (2, (2,))
    assert named_axes(hints["array"], 3) == (0, (0,))
    assert named_axes(hints["array"], 2) == (0, ())
    assert named_axes(ja.Alibi.__dataclass_fields__["slopes"].type, 1) == (0, (0,))
    assert named_axes(ja.Documents.__dataclass_fields__["ids"].type, 3) == (2, ())
    assert named_axes(ja.MixHeads.__dataclass_fields__["weight"].type, 2).heads == (0, 1)
    assert named_axes(None, 2) == (0, ())


BY_HEAD = MASKS["explicit by head"][0]


@part
class Careless(ja.ScoreBias):
    """A bias whose annotation does not say which axis is that of heads."""

    slopes: ja.bias.Float[ja.bias.Array, " n"]

    def __call__(self, tile):
        return self.slopes[:, None, None] * jnp.abs(tile.query - tile.key)


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (Slots(mask=BY_HEAD), "each head has its own tiles"),
        (Slots(mask=ja.Causal()), "all heads share their tiles"),
        (Slots(mask=BY_HEAD, score_maps=(ja.SoftCap(3.0),)), "each head has its own tiles"),
        (
            Slots(mask=BY_HEAD, score_maps=(ja.MixHeads(jnp.eye(4)),)),
            "all heads share their tiles, since score_maps=MixHeads may let heads read each other",
        ),
        (
            Slots(mask=BY_HEAD, bias=Careless(jnp.ones(4))),
            "all heads share their tiles, since the weights of a piece have shape",
        ),
        (
            Slots(mask=BY_HEAD & ja.mask.MaskFunction(lambda query, key: np.ones((4, 1, 1), bool))),
            "all heads share their tiles, since a part does not fit a piece",
        ),
    ],
    ids=["table by head", "causal", "soft cap", "mixed heads", "no name", "function by head"],
)
def test_explain_says_who_shares_tiles_and_the_result_is_the_definition(slots, words, capsys):
    arrays = random_arrays(12, 12)
    call = arrays["query"], arrays["key"], arrays["value"]
    options = {"block": 4, "score_maps": slots.score_maps, "bias": slots.bias, "mask": slots.mask}
    assert ja.explain(*call, implementation="tiled", **options) == "tiled"
    assert words in capsys.readouterr().out
    results = [attend(*call, implementation=name, **options) for name in ("dense", "tiled")]
    np.testing.assert_allclose(*results, rtol=0, atol=1e-5)


def test_few_queries_and_single_tiles_are_not_cut():
    few, one = a_call(random_arrays(4, 999), Slots(mask=BY_HEAD)), a_call(random_arrays(40, 60), Slots(mask=BY_HEAD))
    assert apart_of(few, None) == (Apart(), "all heads share their tiles, since few queries are bound by reading keys")
    assert apart_of(one, None) == (Apart(), "all heads share the one tile of keys")


def test_key_heads_whose_slots_differ_keep_their_group_together():
    """Positions by key head, as after eviction: the query heads of a group see the same keys."""
    arrays = random_arrays(9, 12, (4, 2, 2))
    where = np.stack([np.random.default_rng(i).permutation(12) for i in range(4)]).reshape(2, 12, 2)
    call = a_call(arrays, Slots(mask=ja.Window(2)), query_positions=np.arange(9), key_positions=jnp.asarray(where))
    assert apart_of(call, (4, 4)) == (Apart(1, 2, 1), "each key head has its own tiles")


WINDOWS = ja.PerHead(tuple(ja.Window(w) for w in (0, 3, 7, 15)))


@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 1), (4, 1, 1)], ids=str)
def test_each_head_computes_the_tiles_that_its_own_mask_needs(heads):
    """Windows of 0, 3, 7 and 15 keys back at length 16 need 4, 7, 9 and 10 tiles of 4 x 4: 30, where the union is 10
    for each of four heads."""
    x = random_arrays(16, 16, heads)
    VISITS.clear()
    out = attend(x["query"], x["key"], x["value"], score=Counted(), mask=WINDOWS, block=4, implementation="tiled")
    out.block_until_ready()
    jax.effects_barrier()
    assert len(VISITS) == 4 + 7 + 9 + 10
    expected = attend(x["query"], x["key"], x["value"], mask=WINDOWS, implementation="dense")
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_schedules_of_heads_by_hand():
    at = np.arange(16, dtype=np.int32)
    where = at.reshape(1, 4, 1, 4), at.reshape(1, 1, 4, 4)
    index, kinds = schedule(WINDOWS, *where, apart=Apart(groups=4))
    assert index.count.tolist() == [[1, 1, 1, 1], [1, 2, 2, 2], [1, 2, 3, 3], [1, 2, 3, 4]]
    assert (kinds.single, index.starts.shape) == (False, (4, 4, 4))
    index, _ = schedule(WINDOWS, *where, apart=Apart(groups=2))
    assert index.count.tolist() == [[1, 2, 2, 2], [1, 2, 3, 4]]
    ids = jnp.asarray([[0] * 16, [0] * 4 + [1] * 12])
    index, _ = schedule(ja.Documents(ids), *where, apart=Apart(entries=2), batch=(2,))
    assert index.count.tolist() == [[4, 4, 4, 4], [1, 3, 3, 3]]


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(4, 4, 4), (4, 2, 1), (6, 2, 3), (4, 1, 2)]),
    seed=st.integers(0, 99),
    entries=st.booleans(),
    dropout=st.booleans(),
)
def test_pieces_have_the_values_and_gradients_of_the_whole(heads, seed, entries, dropout):
    """Of query, key, value, the null logits and slopes, through out and lse, where heads and entries see other keys."""
    rng, count = np.random.default_rng(seed), heads[0]
    arrays = random_arrays(11, 13, heads, seed)
    mask = ja.Blocks(ja.BlockIndex(jnp.asarray(rng.random((B, count, 4, 3)) < 0.4), (3, 5)))
    learned = {"normalize": ja.Softmax(jnp.asarray(rng.normal(size=count), jnp.float32))}
    learned |= {"bias": ja.Alibi(jnp.asarray(rng.random(count), jnp.float32))}
    noise = ja.Dropout(0.3, jax.random.key(seed)) if dropout else None

    def loss(run, arrays, learned):
        call = a_call(arrays, Slots(mask=mask & ja.Causal(), dropout=noise, **learned))
        out, lse, _ = run(call)
        return (jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out).sum() + jnp.where(lse > -99, lse, 0).sum()

    devices = jax.device_count
    jax.device_count = lambda: 1 if entries else devices()
    try:
        call = a_call(arrays, Slots(mask=mask & ja.Causal(), **learned))
        assert apart_of(call, (4, 4))[0][0] == (B if entries else 1)
        by_tiles = jax.jit(jax.value_and_grad(lambda *x: loss(lambda call: tiled(call, (4, 4)), *x), (0, 1)))
        pieces = by_tiles(arrays, learned)
    finally:
        jax.device_count = devices
    whole = jax.jit(jax.value_and_grad(lambda *x: loss(dense, *x), (0, 1)))(arrays, learned)
    for x, y in zip(*map(jax.tree.leaves, (pieces, whole)), strict=True):  # sums of at most B·N·T·S terms near 1
        np.testing.assert_allclose(x, y, rtol=0, atol=10 * np.sqrt(B * count * 143) * 1.2e-7 * max(1, np.abs(y).max()))


def test_tiles_fit_the_blocks_of_a_mask():
    from jaxattn.core.attend.schedule import BLOCKS, blocks_for

    blocks = ja.Blocks(ja.BlockIndex(np.ones((1, 2, 2), bool), (48, 64)))
    other = ja.Blocks(ja.BlockIndex(np.ones((1, 2, 2), bool), (32, 64)))
    assert (ja.Causal() & blocks).grain == (~blocks).grain == (48, 64)
    assert (blocks | other).grain == ja.PerHead((ja.Causal(), blocks, other)).grain == (16, 64)
    assert (ja.Causal() | ja.Window(3)).grain is None
    assert blocks_for(999, 1, (48, 1024))[0] == Block(144, 512, 512)
    assert blocks_for(999, 1, (200, 192))[0] == Block(200, 192, 192)
    assert blocks_for(999, 1, (300, 997))[0] == Block(150, 512, 512)
    assert blocks_for(999, 1, (1, 256), alone=True)[0] == Block(128, 128, 128)
    assert blocks_for(999, 1, (1, 256), alone=True)[1:] == BLOCKS["cpu"][-1:]


@pytest.mark.slow
def test_pieces_stand_under_vmap_shard_map_and_checkpoint():
    """Heads with other masks and other blocks, a bias by head and a linear measure: values and gradients of dense."""
    rng = np.random.default_rng(0)
    arrays = tuple(rng.normal(size=(2, 12, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    active = jnp.asarray(rng.random((2, 4, 3, 3)) < 0.6)
    heads = ja.PerHead((ja.Window(1), ja.Causal(), ja.Documents(jnp.arange(12) // 5), ja.Window(5)))

    def loss(query, key, value, active, implementation="tiled"):
        options = {"mask": ja.Blocks(ja.BlockIndex(active, (4, 4))) | heads, "bias": ja.Alibi(jnp.arange(4.0))}
        options |= {"measures": {"mass": ja.Mass(np.arange(12) % 3, 3)}, "block": 4, "implementation": implementation}
        out, extras = attend(query, key, value, return_lse=True, **options)
        seen = jnp.where(extras["lse"] > -99, extras["lse"], 0)
        return (jnp.sin(out).sum(-1) + extras["mass"][..., 0] + seen).sum((-1, -2))

    def gradient(run):
        return lambda *x: jax.value_and_grad(lambda *y: run(*y, *x[3:]).sum(), (0, 1, 2))(*x[:3])

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_data = jax.sharding.PartitionSpec("data")
    shared = gradient(lambda *x: jax.lax.psum(loss(*x).sum(), "data"))
    specs = {"in_specs": over_data, "out_specs": (jax.sharding.PartitionSpec(), over_data)}
    runs = {
        "plain": gradient(loss),
        "vmap": gradient(jax.vmap(loss)),
        "shard_map": jax.shard_map(shared, mesh=mesh, **specs),
        "checkpoint": gradient(jax.checkpoint(loss)),
    }
    expected = jax.jit(gradient(lambda *x: loss(*x, "dense")))(*arrays, active)
    for name, run in runs.items():
        for x, y in zip(*map(jax.tree.leaves, (jax.jit(run)(*arrays, active), expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.abs(y).max()), err_msg=name)


@pytest.mark.parametrize(
    "mask", [None, ja.Causal(), ja.Window(3) & ja.Documents(jnp.asarray([[0] * 9 + [1] * 11] * B))]
)
def test_entries_that_leave_the_cache_are_computed_one_after_the_other(mask, monkeypatch):
    """Values and gradients of dense, also where entries share null logits and slopes."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr("jaxattn.core.attend.tiled.CACHE_BYTES", 0)
    arrays = random_arrays(20, 20, (4, 2, 1))
    learned = {"normalize": ja.Softmax(jnp.linspace(-1, 1, 4)), "bias": ja.Alibi(jnp.linspace(0, 1, 4))}

    def loss(arrays, learned, implementation):
        out, aux = attend(**arrays, mask=mask, **learned, block=4, implementation=implementation, return_lse=True)
        return (jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out).sum() + aux["lse"].sum()

    of = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    for x, y in zip(*(jax.tree.leaves(of(arrays, learned, each)) for each in ("tiled", "dense")), strict=True):
        # Sums of at most B·N·T·S terms near 1, as in the law above.
        np.testing.assert_allclose(x, y, rtol=0, atol=10 * np.sqrt(B * 1600) * 1.2e-7 * max(1, np.abs(y).max()))
    call = a_call(arrays, Slots(mask=mask, **learned))
    ways, words = apart_of(call, (4, 4))
    assert ways.entries == B
    assert "one batch entry after the other" in words or mask is not None


def test_entries_that_share_a_large_bias_are_computed_together(monkeypatch):
    """Its gradient is summed over entries: one after the other, that would be one more array of all pairs for each."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr("jaxattn.core.attend.tiled.CACHE_BYTES", 0)
    arrays = random_arrays(20, 20, (4, 2, 1))
    for batch, entries in ((1, 1), (B, B)):
        bias = ja.Bias(jnp.zeros((batch, 4, 20, 20)))
        assert apart_of(a_call(arrays, Slots(bias=bias)), (4, 4))[0].entries == entries
