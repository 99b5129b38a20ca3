"""Partial results form a commutative monoid, and attention maps the union of key sets to merge."""

from functools import partial, reduce
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import MASKS, assert_close, by_implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxattn import Causal, Dot, KeyBias, Partial, Softmax, attend, merge
from jaxattn.core.attend import EMPTY, add_log_mass, merge_axis, psum_merge, with_log_mass

T, S, HEADS, PARTS = 12, 14, 4, 4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


QUERY, KEY, VALUE = normal(2, T, HEADS, 4, seed=1), normal(2, S, 2, 4, seed=2), normal(2, S, 1, 3, seed=3)
D_OUT, D_LSE = normal(2, T, HEADS, 3, seed=4), normal(2, T, HEADS, seed=5)
NULL = normal(HEADS, seed=6)
MASK, PREDICATE = MASKS["explicit by head"]


@partial(jax.jit, static_argnames="implementation")
def by_parts(arrays, owner, order, holder, implementation):
    """Attention to the keys of each owner, merged in the given order; the holder's has the null logit."""

    def call(query, key, value, null):
        def one(number):
            mine = jnp.where(owner == number, jnp.arange(S), -1)
            normalize = Softmax(jnp.where(number == holder, null, -jnp.inf))
            options = {"mask": MASK, "normalize": normalize, "block": 5, "implementation": implementation}
            options["return_lse"] = True
            out, extras = attend(query, key, value, key_positions=mine, **options)
            return Partial(out, extras["lse"])

        results = jax.vmap(one)(jnp.arange(PARTS))
        pieces = [jax.tree.map(lambda x, i=i: x[order[i]], results) for i in range(PARTS)]
        whole = merge(merge(pieces[0], pieces[1]), merge(pieces[2], pieces[3]))
        return whole.out, whole.lse

    results, pull = jax.vjp(call, *arrays)
    return results, pull((D_OUT, D_LSE))


VISIBLE = oracle.pairs(PREDICATE, np.arange(T), np.arange(S), (2,), HEADS)
EXPECTED = oracle.attention(QUERY, KEY, VALUE, VISIBLE, D_OUT, D_LSE, null_logit=NULL)


@by_implementation("dense")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    owner=st.lists(st.integers(0, PARTS - 1), min_size=S, max_size=S),
    order=st.permutations(range(PARTS)),
    holder=st.integers(0, PARTS - 1),
)
def test_any_split_of_the_keys_merged_in_any_order_is_one_call(implementation, owner, order, holder):
    """Values and gradients, the null logit's too, whichever part has it; some parts are empty, and so are some rows."""
    arrays = QUERY, KEY, VALUE, NULL
    results, gradients = by_parts(arrays, jnp.array(owner), jnp.array(order), holder, implementation)
    for name, x in zip(("out", "lse", "query", "key", "value", "null_logit"), (*results, *gradients), strict=True):
        magnitude = getattr(EXPECTED[1], name)
        # A merge of four parts is three more rounded steps on every summand of both factors.
        assert_close(
            x, getattr(EXPECTED[0], name), magnitude.max(where=np.isfinite(magnitude), initial=0), err_msg=name
        )


def test_slices_of_different_lengths_and_implementations_merge():
    options = {"return_lse": True}
    whole, extras = attend(QUERY, KEY, VALUE, **options)
    cuts = [0, 3, 4, 14]
    pieces = [
        Partial(out, e["lse"])
        for (a, b), implementation in zip(pairwise(cuts), ("dense", "tiled", "dense"), strict=True)
        for out, e in [attend(QUERY, KEY[:, a:b], VALUE[:, a:b], implementation=implementation, **options)]
    ]
    merged = reduce(merge, pieces, EMPTY)
    assert_close(merged.out, whole, np.abs(VALUE).max())
    assert_close(merged.lse, extras["lse"], 1 + np.abs(extras["lse"]).max())


def random_partial(seed):
    """Some entries are empty."""
    lse = np.where(np.random.default_rng(seed).random((6, 5, 2)) < 0.3, -np.inf, 3 * normal(6, 5, 2, seed=seed))
    return Partial(
        jnp.asarray(np.where(np.isneginf(lse)[..., None], 0, normal(6, 5, 2, 3, seed=seed + 50))),
        jnp.asarray(lse, jnp.float32),
    )


def assert_equal(a, b, factor):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert_close(x, y, 1 + np.abs(y).max(where=np.isfinite(y), initial=0), factor=factor)


def test_merge_is_commutative_associative_and_has_a_unit():
    a, b, c = (random_partial(seed) for seed in range(3))
    assert_equal(merge(a, b), merge(b, a), factor=0)
    assert_equal(merge(merge(a, b), c), merge(a, merge(b, c)), factor=8)  # two steps of exp, sum, divide and log
    assert_equal(merge(a, EMPTY), a, factor=0)
    assert_equal(merge(EMPTY, a), a, factor=0)
    nothing = merge(EMPTY, EMPTY)
    assert not np.any(nothing.out)
    assert np.isneginf(nothing.lse).all()
    assert_equal(merge(nothing, a), a, factor=0)


def test_merge_by_hand():
    """Weights 1 and 3: out = (1·8 + 3·4) / 4 = 5, lse = log 4."""
    merged = merge(
        Partial(jnp.full((1, 1, 1), 8.0), jnp.zeros((1, 1))),
        Partial(jnp.full((1, 1, 1), 4.0), jnp.log(jnp.full((1, 1), 3.0))),
    )
    assert_close(merged.out, [[[5]]], 5, factor=2)
    assert_close(merged.lse, [[np.log(4)]], np.log(4), factor=2)


def test_gradients_of_merge_are_finite_where_a_side_is_empty():
    """d out / d out_a = exp(lse_a − lse), and the empty side gets 0."""
    a, b = random_partial(0), random_partial(1)

    def total(a, b):
        merged = merge(a, b)
        return merged.out.sum() + jnp.where(jnp.isneginf(merged.lse), 0, merged.lse).sum()

    d_a, d_b = jax.grad(total, argnums=(0, 1))(a, b)
    lse = np.logaddexp(a.lse, b.lse)
    for side, gradient in ((a, d_a), (b, d_b)):
        empty = np.isneginf(side.lse)
        assert empty.any()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
        assert not np.any(gradient.lse[empty])
        share = np.where(empty, 0, np.exp(side.lse - np.where(np.isneginf(lse), 0, lse)))
        assert_close(gradient.out, np.repeat(share[..., None], 3, -1), 1)
    d_a = jax.grad(lambda a: total(a, EMPTY))(a)
    assert_close(d_a.lse, ~np.isneginf(a.lse), 1)


def test_merge_keeps_the_dtype_of_out_and_float32_statistics():
    a, b = (Partial(p.out.astype(jnp.bfloat16), p.lse) for p in map(random_partial, (0, 1)))
    assert (merge(a, b).out.dtype, merge(a, b).lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert (merge(a, EMPTY).out.dtype, merge(a, EMPTY).lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_partial_results_pass_through_scan():
    """Attention one key at a time: the whole of flash attention in a scan over merge."""

    @jax.jit
    def scanned(query, key, value):
        def step(carry, one):
            k, v = one
            out, extras = attend(query, k[:, None], v[:, None], score=Dot(), normalize=Softmax(), return_lse=True)
            return merge(carry, Partial(out, extras["lse"])), None

        start = Partial(jnp.zeros((2, T, HEADS, 3)), jnp.full((2, T, HEADS), -jnp.inf))
        return jax.lax.scan(step, start, (key.swapaxes(0, 1), value.swapaxes(0, 1)))[0]

    whole, extras = attend(QUERY, KEY, VALUE, return_lse=True)
    result = scanned(QUERY, KEY, VALUE)
    assert_close(result.out, whole, np.abs(VALUE).max())
    assert_close(result.lse, extras["lse"], 1 + np.abs(extras["lse"]).max())


# Merged along an axis, and over devices.


def exact(lse, out, axis):
    """The definition, in float64 NumPy: (out, lse) of entries along an axis of lse."""
    lse, out = np.asarray(lse, np.float64), np.asarray(out, np.float64)
    weight = np.exp(lse)
    mass = weight.sum(axis)
    sums = np.where(weight[..., None] == 0, 0, weight[..., None] * out).sum(axis)
    with np.errstate(divide="ignore"):
        return sums / np.where(mass == 0, 1, mass)[..., None], np.log(mass)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_an_axis_is_merged_by_its_definition(axis):
    """In float64, with empty entries that hold NaN, and with rows in which all are empty."""
    rng = np.random.default_rng(3)
    lse = np.where(rng.random((3, 4, 5)) < 0.4, -np.inf, rng.normal(size=(3, 4, 5)))
    lse[:, 0, 0] = lse[0, :, 0] = lse[0, 0, :] = -np.inf
    out = np.where(np.isneginf(lse)[..., None], np.nan, rng.normal(size=(3, 4, 5, 2)))
    with jax.enable_x64(True):
        merged = merge_axis(Partial(jnp.asarray(out), jnp.asarray(lse)), axis)
    for x, y in zip((merged.out, merged.lse), exact(lse, out, axis % 3), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-13)
    assert np.isneginf(merged.lse).any()


def test_merging_an_axis_is_merging_one_by_one():
    parts = [random_partial(seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x, 1), *parts)
    assert_equal(merge_axis(stacked, 1), reduce(merge, parts, EMPTY), factor=16)


def test_gradients_of_a_merged_axis_are_those_of_its_definition():
    """d out_i = p_i d, d lse_i = p_i (d · (out_i − out) + d_lse), p_i = exp(lse_i − lse); nothing for empty ones."""
    rng = np.random.default_rng(5)
    lse = np.where(rng.random((4, 3)) < 0.3, -np.inf, rng.normal(size=(4, 3)))
    lse[:, 1] = -np.inf
    out, d_out, d_lse = (rng.normal(size=shape) for shape in ((4, 3, 2), (3, 2), (3,)))
    out[np.isneginf(lse)] = np.nan
    with jax.enable_x64(True):
        _, pull = jax.vjp(lambda p: merge_axis(p, 0), Partial(jnp.asarray(out), jnp.asarray(lse)))
        (found,) = pull(Partial(jnp.asarray(d_out), jnp.asarray(d_lse)))
    mean, total = exact(lse, out, 0)
    share = np.exp(lse - np.where(np.isneginf(total), 0, total))
    inner = np.where(share > 0, (d_out * (np.where(share[..., None] > 0, out, 0) - mean)).sum(-1) + d_lse, 0)
    np.testing.assert_allclose(found.out, share[..., None] * d_out, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.lse, share * inner, rtol=1e-12, atol=1e-13)


def split_keys(query, key, value, bias, places, parts):
    """Attention to each of `parts` slices of the keys, stacked in front."""
    key, value, places = (
        jnp.moveaxis(x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), axis, 0)
        for x, axis in ((key, 1), (value, 1), (places, 0))
    )

    def one(key, value, places):
        options = {"key_positions": places, "mask": Causal(), "bias": KeyBias(bias), "return_lse": True}
        out, extras = attend(query, key, value, **options)
        return Partial(out, extras["lse"])

    return jax.vmap(one)(key, value, places)


def test_partials_over_devices_are_one_call():
    """Keys over eight devices, one of which holds none but NaN: values, and gradients in what is shared and what is
    not, through out and lse; and the same by an axis on one device."""
    rng, devices = np.random.default_rng(1), 8
    query, key, value = (rng.normal(size=(2, n, k, 4)) for n, k in ((5, 4), (16, 2), (16, 1)))
    bias, places = rng.normal(size=(4, 16)), np.arange(16)[::-1].copy()
    places[6:8] = -1
    hidden = value.copy()
    hidden[:, 6:8] = np.nan
    weight = rng.normal(size=(2, 5, 4, 4))

    def loss(merged):
        return (jnp.asarray(weight) * merged.out).sum() + jnp.where(merged.lse > -99, jnp.sin(merged.lse), 0).sum()

    def whole(query, key, value, bias):
        options = {"key_positions": jnp.asarray(places), "mask": Causal(), "bias": KeyBias(bias), "return_lse": True}
        out, extras = attend(query, key, value, implementation="dense", **options)
        return loss(Partial(out, extras["lse"]))

    def by_axis(*arrays):
        return loss(merge_axis(split_keys(*arrays, jnp.asarray(places), devices), 0))

    mesh = jax.make_mesh((devices,), ("keys",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P(), P(None, "keys"), P(None, "keys"), P(), P("keys")

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    def by_devices(query, key, value, bias, places):
        one = jax.tree.map(lambda x: x[0], split_keys(query, key, value, bias, places, 1))
        return loss(psum_merge(one, "keys"))

    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, (query, key, value, bias)))
        with_nan = (*arrays[:2], jnp.asarray(hidden), arrays[3])
        expected = jax.jit(jax.value_and_grad(whole, (0, 1, 2, 3)))(*arrays)
        for run, given in ((by_axis, ()), (by_devices, (jnp.asarray(places),))):
            found = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3)))(*with_nan, *given)
            for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * max(1, np.abs(y).max()))


def test_log_masses_say_how_much_a_part_counts():
    """add: the merge with exp(b) times the weights; with: with the total weight exp(s). Empty parts stay empty."""
    a, b = random_partial(0), random_partial(1)
    mass = jnp.asarray(normal(6, 5, 2, seed=9))
    empty = np.isneginf(a.lse)
    weights = np.where(empty, 0, np.exp(np.float64(mass))), np.exp(np.float64(a.lse) + np.float64(mass))
    for changed, weight in zip((with_log_mass(a, mass), add_log_mass(a, mass)), weights, strict=True):
        with np.errstate(divide="ignore"):
            assert_close(changed.lse, np.log(weight), 8)
        both = merge(changed, b)
        with np.errstate(divide="ignore"):
            expected = exact(np.stack([np.log(weight), b.lse]), np.stack([a.out, b.out]), 0)
        assert_close(both.out, expected[0], 1 + np.abs(expected[0]).max())
    assert_equal(with_log_mass(a, a.lse), a, factor=0)
    assert_equal(add_log_mass(a, 0.0), a, factor=0)
    assert_equal(merge(with_log_mass(a, -np.inf), b), b, factor=0)
    assert_equal(merge(add_log_mass(a, -np.inf), b), b, factor=0)


def test_adding_a_log_mass_is_adding_it_to_every_score_and_has_the_same_gradients():
    """A constant b per head in the bias: out is unchanged and lse + b; the gradient of b is that of lse."""
    mass = jnp.asarray(normal(HEADS, seed=2))

    def results(query, mass, by_bias):
        options = {"mask": MASK, "return_lse": True}
        if by_bias:
            options["bias"] = KeyBias(jnp.broadcast_to(mass[:, None], (HEADS, S)))
        out, extras = attend(query, KEY, VALUE, **options)
        partial_result = Partial(out, extras["lse"])
        whole = merge(partial_result if by_bias else add_log_mass(partial_result, mass), random_fixed)
        return whole.out, whole.lse

    random_fixed = Partial(jnp.asarray(normal(2, T, HEADS, 3, seed=7)), jnp.asarray(normal(2, T, HEADS, seed=8)))
    found = [jax.vjp(partial(results, by_bias=by_bias), jnp.asarray(QUERY), mass) for by_bias in (False, True)]
    for x, y in zip(*(jax.tree.leaves((x, pull((D_OUT, D_LSE)))) for x, pull in found), strict=True):
        assert_close(x, y, np.sqrt(2 * T * S) * max(1, np.abs(y).max()))


def test_the_gradient_of_a_replaced_mass_goes_to_it_alone():
    """Landmark attention: a block's weight is that of its landmark's score. d s = p (1 − p) (out_a − out_b) · d."""
    a, b = random_partial(2), random_partial(3)
    score = jnp.asarray(normal(6, 5, 2, seed=4))

    def total(a, score):
        return merge(with_log_mass(a, score), b).out.sum()

    d_a, d_score = jax.grad(total, argnums=(0, 1))(a, score)
    empty = np.isneginf(a.lse)
    share = np.where(empty, 0, 1 / (1 + np.exp(np.float64(b.lse) - np.float64(score))))
    difference = (np.float64(a.out) - np.float64(b.out)).sum(-1)
    assert_close(d_score, share * (1 - share) * difference, 1 + np.abs(difference).max())
    assert not np.any(d_a.lse)
    assert_close(d_a.out, np.repeat(share[..., None], 3, -1), 1)


@pytest.mark.parametrize(
    ("run", "exception", "message"),
    [
        (lambda p: merge_axis((p.out, p.lse), 0), TypeError, r"partials must be a Partial\(out, lse\), got tuple"),
        (lambda p: merge_axis(p, 3), ValueError, r"axis is 3 but lse has shape \(6, 5, 2\): need one of its 3 axes"),
        (lambda p: merge_axis(p, 0.0), TypeError, "axis must be an int, got 0.0"),
        (lambda p: psum_merge(p.out, "keys"), TypeError, r"partial must be a Partial\(out, lse\), got"),
        (lambda p: with_log_mass(p.lse, 0.0), TypeError, r"partial must be a Partial\(out, lse\), got"),
        (lambda p: add_log_mass(p, jnp.zeros(5)), ValueError, r"log_mass has shape \(5,\): need one .* \(6, 5, 2\)"),
    ],
)
def test_what_is_no_partial_is_refused(run, exception, message):
    with pytest.raises(exception, match=message):
        run(random_partial(0))
