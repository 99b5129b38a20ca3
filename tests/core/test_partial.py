"""Partial results form a commutative monoid, and attention maps the union of key sets to merge."""

from functools import partial, reduce
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import IMPLEMENTATIONS, MASKS, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn import EMPTY, Dot, Partial, Softmax, attend, merge

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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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
