"""Native sparse attention, held to loops over queries in float64, and to the attention that its branches reduce to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from test_choose import H, K, N, T, a_call, changed, normal, ragged, softmax

from jaxattn import Causal, Explicit, Window, attend
from jaxattn.core.attend import CompressedBlocks, native_sparse_attention

SIZE, PAGES, WINDOW = 3, 4, 5
OPTIONS = {"size": SIZE, "blocks": PAGES, "window": WINDOW}


def gates_of(length=T):
    return 1 / (1 + np.exp(-normal(2, length, N, 3, seed=7)))


def by_hand(query, key, value, gates):
    """One sequence in the order of positions, heads repeated: [T, N, V], and the pairs that are chosen [N, T, T]."""
    length, out = len(query), np.zeros((*query.shape[:2], value.shape[-1]))
    chosen = np.zeros((N, length, length), bool)
    for t in range(length):
        whole = range(0, t + 2 - SIZE, SIZE)
        weights = np.zeros((N, len(whole)))
        for n in range(N):
            means = np.array([key[i : i + SIZE, n].mean(0) for i in whole]).reshape(-1, H)
            if len(whole):
                weights[n] = softmax(means @ query[t, n] * H**-0.5)
                out[t, n] += gates[t, n, 0] * weights[n] @ [value[i : i + SIZE, n].mean(0) for i in whole]
        for group in range(K):
            heads, own = slice(group * N // K, (group + 1) * N // K), t // SIZE
            shared = np.zeros(own + 1)
            shared[: len(whole)] = weights[heads].mean(0)
            always = sorted({0, own, max(own - 1, 0)})
            rest = sorted(set(range(own)) - set(always), key=lambda c: (-np.float32(shared[c]), c))
            for c in [*always, *rest[: max(PAGES - len(always), 0)]]:
                chosen[heads, t, c * SIZE : min((c + 1) * SIZE, t + 1)] = True
        for n in range(N):
            seen = np.flatnonzero(chosen[n, t])
            near = np.arange(max(t + 1 - WINDOW, 0), t + 1)
            for gate, places in ((gates[t, n, 1], seen), (gates[t, n, 2], near)):
                out[t, n] += gate * softmax(key[places, n] @ query[t, n] * H**-0.5) @ value[places, n]
    return out, chosen


run = jax.jit(lambda *arrays, **places: native_sparse_attention(*arrays, **OPTIONS, **places))


def test_the_three_branches_and_their_gates():
    """At the default positions and at ragged ones, where empty slots hold NaN."""
    query, key, value = a_call()
    gates = gates_of()
    for positions in (None, ragged()):
        at = np.broadcast_to(np.arange(T), (2, T)) if positions is None else positions
        places = {} if positions is None else {"query_positions": positions, "key_positions": positions}
        empty = (at < 0)[..., None, None]
        out = np.asarray(run(*(np.where(empty, np.nan, x) for x in (query, key, value)), gates, **places))
        shown = np.zeros((2, N, T, T), bool)
        for b in range(2):
            order = [slot for slot in np.argsort(at[b], kind="stable") if at[b, slot] >= 0]
            arrays = (
                x[b, order].astype(np.float64) for x in (query, np.repeat(key, N // K, 2), np.repeat(value, N, 2))
            )
            expected, chosen = by_hand(*arrays, gates[b, order])
            assert_close(out[b, order], expected, 30 * np.abs(value).max())
            shown[b][:, np.array(order)[:, None], order] = chosen
            assert not np.any(out[b][at[b] < 0])
        mask = Causal() & CompressedBlocks(SIZE, PAGES)(query, key, **places)
        np.testing.assert_array_equal(mask.to_array(at, at), shown)
        assert shown.sum() < 0.8 * 2 * N * np.tri(T).sum()


def test_what_the_gates_reduce_it_to():
    query, key, value = a_call()

    def with_gates(*gates, **options):
        given = np.broadcast_to(np.float32(gates), (2, T, N, 3))
        return native_sparse_attention(query, key, value, given, **(OPTIONS | options))

    causal = attend(query, key, value, mask=Causal())
    assert_close(with_gates(0, 1, 0, blocks=-(-T // SIZE)), causal, 8 * np.abs(value).max())
    near = attend(query, key, value, mask=Window(WINDOW - 1))
    assert_close(with_gates(0, 0, 1), near, 8 * np.abs(value).max())
    compressed = np.asarray(with_gates(1, 0, 0))
    assert not np.any(compressed[:, : SIZE - 1])  # no block is whole yet
    assert np.any(compressed[:, SIZE - 1 :], -1).all()
    assert_close(with_gates(1, 0, 0, size=1), causal, 8 * np.abs(value).max())


def test_no_later_token_has_a_say():
    call, gates = a_call(), gates_of()
    before = run(*call, gates)
    for now in (2, 7, 13):
        after = run(*(changed(x, now, 9 + i) for i, x in enumerate(call)), gates)
        np.testing.assert_array_equal(before[:, : now + 1], after[:, : now + 1])
        assert np.any(before[:, now + 1 :] != after[:, now + 1 :])


def test_gradients_are_those_of_the_branches_with_the_choice_held():
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(x, jnp.float64) for x in a_call())
        gates = jnp.asarray(gates_of(), jnp.float64)
        table = Explicit((Causal() & CompressedBlocks(SIZE, PAGES)(query, key)).to_array(T))

        def held(query, key, value, gates):
            whole = T // SIZE * SIZE
            means = (x[:, :whole].reshape(2, -1, SIZE, *x.shape[2:]).mean(2) for x in (key, value))
            ends = Explicit(np.arange(T)[:, None] >= np.arange(1, T // SIZE + 1) * SIZE - 1)
            compressed = attend(query, *means, mask=ends, implementation="dense")
            masks = table, Window(WINDOW - 1)
            chosen, near = (attend(query, key, value, mask=mask, implementation="dense") for mask in masks)
            return sum(gates[..., i, None] * x for i, x in enumerate((compressed, chosen, near)))

        sparse = jax.vjp(lambda *x: native_sparse_attention(*x, **OPTIONS), query, key, value, gates)
        expected = jax.vjp(held, query, key, value, gates)
        np.testing.assert_allclose(sparse[0], expected[0], atol=1e-12)
        cotangent = jnp.asarray(normal(*sparse[0].shape, seed=8), jnp.float64)
        for x, y in zip(sparse[1](cotangent), expected[1](cotangent), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-11)


def test_one_token_half_precision_and_vmap():
    query, key, value = a_call()
    gates = gates_of()
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value, gates)]
    out = run(*half)
    assert out.dtype == jnp.bfloat16
    wide = run(*(x.astype(jnp.float32) for x in half))
    np.testing.assert_allclose(np.float32(out), wide, atol=0.05)  # a few epsilons of bfloat16, 2⁻⁸, on each branch
    np.testing.assert_allclose(jax.vmap(run)(query, key, value, gates), run(query, key, value, gates), atol=1e-5)
    one = [x[:, :1] for x in (query, key, value, gates)]
    expected = one[3][..., 1:].sum(-1, keepdims=True) * one[2]
    np.testing.assert_allclose(run(*one), expected, rtol=1e-5)


X = np.zeros((5, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: native_sparse_attention(X, X, X, X, size=0),
            "native_sparse_attention: size must be at least 1, got 0",
        ),
        (lambda: native_sparse_attention(X, X, X, np.zeros((5, 2))), r"gates has shape \(5, 2\): need .* \(5, 2, 3\)"),
        (lambda: CompressedBlocks(4, 0), "CompressedBlocks: pages must be at least 1, got 0"),
    ],
)
def test_what_it_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
