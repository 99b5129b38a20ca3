"""Landmark attention, held to its grouped softmax written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from jax.test_util import check_grads
from test_choose import H, N, T, a_call, changed, normal, ragged, softmax

from jaxattn import Causal, attend
from jaxattn.core.attend import landmark_attention

SIZE = 5


def by_hand(query, key, value, size=SIZE, pages=None):
    """One sequence in the order of positions, heads repeated: [T, N, V], and the weights [N, T, T]."""
    length = len(query)
    weights = np.zeros((N, length, length))
    for n, t in np.ndindex(N, length):
        scores = key[:, n] @ query[t, n] * H**-0.5
        own = t // size
        past = sorted(range(own), key=lambda c, s=scores: (-s[c * size + size - 1], c))[:pages]
        near = [j for j in range(own * size, t + 1) if j % size != size - 1]
        shares = softmax(scores[[*(c * size + size - 1 for c in past), *near]]) if past or near else []
        for c, share in zip(past, shares[: len(past)], strict=True):
            inside = slice(c * size, c * size + size - 1)
            weights[n, t, inside] = share * softmax(scores[inside])
        weights[n, t, near] = shares[len(past) :]
    return np.einsum("nts,snv->tnv", weights, value), weights


@pytest.mark.parametrize("pages", [None, 2])
def test_a_block_weighs_what_its_landmark_says(pages):
    """At the default positions and at ragged ones, where empty slots hold NaN; weights sum to 1."""
    query, key, value = a_call()
    run = jax.jit(lambda *x, **places: landmark_attention(*x, SIZE, pages=pages, **places))
    for positions in (None, ragged()):
        at = np.broadcast_to(np.arange(T), (2, T)) if positions is None else positions
        places = {} if positions is None else {"query_positions": positions, "key_positions": positions}
        empty = (at < 0)[..., None, None]
        out = np.asarray(run(*(np.where(empty, np.nan, x) for x in (query, key, value)), **places))
        for b in range(2):
            order = [slot for slot in np.argsort(at[b], kind="stable") if at[b, slot] >= 0]
            wide = (x[b, order].astype(np.float64) for x in (query, np.repeat(key, 2, 2), np.repeat(value, N, 2)))
            expected, weights = by_hand(*wide, pages=pages)
            assert_close(out[b, order], expected, 30 * np.abs(value).max())
            np.testing.assert_allclose(weights.sum(-1), 1)
            assert not np.any(out[b][at[b] < 0])


def test_what_it_reduces_to():
    query, key, value = a_call()
    one_block = landmark_attention(query, key, value, T + 1)
    assert_close(one_block, attend(query, key, value, mask=Causal()), 8 * np.abs(value).max())
    np.testing.assert_allclose(landmark_attention(query, key, np.ones_like(value), SIZE), 1, rtol=1e-5)
    everything = landmark_attention(query, key, value, SIZE)
    assert_close(landmark_attention(query, key, value, SIZE, pages=9), everything, 8 * np.abs(value).max())
    # Landmarks that score the log mass of their blocks: softmax attention without them.
    tokens, wide = 8, normal(1, 9, 1, H + 1, seed=4).astype(np.float64)
    query = np.concatenate([np.zeros((1, 9, 1, H)), np.ones((1, 9, 1, 1))], -1)  # the same query everywhere
    for c in (2, 5, 8):
        scores = wide[0, c - 2 : c, 0] @ query[0, 0, 0] * (H + 1) ** -0.5
        wide[0, c, 0, -1] = np.log(np.exp(scores).sum()) * (H + 1) ** 0.5
    there = np.array([0, 1, -1, 3, 4, -1, 6, 7, -1])
    values = normal(1, 9, 1, 3, seed=5)
    plain = attend(query, wide, values, mask=Causal(), key_positions=there)
    out = landmark_attention(query, wide, values, 3)
    assert_close(out[:, :tokens], plain[:, :tokens], 30 * np.abs(values).max())


def test_no_later_token_has_a_say():
    call = a_call()
    run = jax.jit(lambda *x: landmark_attention(*x, SIZE, pages=1))
    before = run(*call)
    for now in (3, 4, 5, 14):
        after = run(*(changed(x, now, 9 + i) for i, x in enumerate(call)))
        np.testing.assert_array_equal(before[:, : now + 1], after[:, : now + 1])


def test_gradients_are_those_of_the_grouped_softmax():
    """dx = p (g − Σ p g) in each group: by autodiff of the weights as a product of two softmaxes; and numerically."""
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(x[:1, :11], jnp.float64) for x in a_call())
        length, block = 11, np.arange(11) // SIZE
        landmark = np.arange(11) % SIZE == SIZE - 1
        causal = np.tri(length, dtype=bool)
        earlier = block[:, None] > block

        def grouped(query, key, value):
            scores = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 2, 2)) * H**-0.5
            shown = jnp.where(landmark, earlier, causal & ~earlier)
            outer = jnp.exp(jnp.where(shown, scores, -jnp.inf))
            outer = outer / outer.sum(-1, keepdims=True)
            inner = jnp.where(landmark, 0, jnp.exp(scores))
            total = jnp.stack([inner[..., block == c].sum(-1) for c in range(3)], -1)
            ends = np.minimum(block * SIZE + SIZE - 1, length - 1)
            past = jnp.where(earlier & ~landmark, inner / total[..., block] * outer[..., ends], 0)
            weights = past + jnp.where(landmark | earlier, 0, outer)
            return jnp.einsum("bnts,bsnv->btnv", weights, jnp.repeat(value, N, 2))

        def ours(*x):
            return landmark_attention(*x, SIZE)

        (out, pull), (expected, pull_expected) = (jax.vjp(f, query, key, value) for f in (ours, grouped))
        np.testing.assert_allclose(out, expected, atol=1e-12)
        cotangent = jnp.asarray(normal(*out.shape, seed=8), jnp.float64)
        for x, y in zip(pull(cotangent), pull_expected(cotangent), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-11)
        check_grads(lambda *x: ours(*x).sum(2), (query, key, value), 1, modes=["rev"])


def test_vmap_half_precision_and_what_it_refuses():
    query, key, value = a_call()
    out = landmark_attention(query, key, value, SIZE)
    np.testing.assert_allclose(jax.vmap(lambda *x: landmark_attention(*x, SIZE))(query, key, value), out, atol=1e-5)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    wide = landmark_attention(*(x.astype(jnp.float32) for x in half), SIZE)
    assert landmark_attention(*half, SIZE).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(landmark_attention(*half, SIZE)), wide, atol=0.05)  # some epsilons, 2⁻⁸
    for options, message in (
        ({"size": 1}, "landmark_attention: size must be at least 2, got 1"),
        ({"size": 4, "pages": 0}, "landmark_attention: pages must be at least 1, got 0"),
        ({"size": 4, "key_positions": np.zeros((2, T, 2), int)}, r"need positions \[..., S\] that all heads share"),
    ):
        with pytest.raises(ValueError, match=message):
            landmark_attention(query, key, value, **options)
