"""Dropout: a fair coin for every weight, the same one wherever and however the weight is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, by_implementation, evaluate

from jaxattn import Alibi, Causal, Dot, Dropout, Softmax, attend

RATE, T, S, HEADS, BATCH = 0.3, 16, 24, 3, 2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def factors(key):
    """keep / (1 − rate) [B, T, N, S], read off attention with equal weights and one-hot values."""
    query, value = jnp.zeros((BATCH, T, HEADS, 1)), jnp.eye(S)[None, :, None].repeat(BATCH, 0)
    return S * attend(query, jnp.zeros((BATCH, S, 1, 1)), value, dropout=Dropout(RATE, key), implementation="dense")


def test_weights_are_dropped_or_scaled_up():
    kept = np.asarray(factors(jax.random.key(0)))
    assert_close(np.unique(kept.round(5)), [0, np.float32(1 / (1 - RATE)).round(5)], 1)


def test_the_mean_is_one():
    """keep / (1 − rate) has variance rate / (1 − rate); 5 standard errors are exceeded once in two million keys."""
    kept = np.asarray(factors(jax.random.key(0)))
    error = np.sqrt(RATE / (1 - RATE) / kept.size)
    assert abs(kept.mean() - 1) < 5 * error
    for axis in range(4):
        means = kept.mean(tuple(i for i in range(4) if i != axis))
        assert (abs(means - 1) < 5 * np.sqrt(RATE / (1 - RATE) * kept.shape[axis] / kept.size)).all()


def test_coins_are_independent():
    """Two coins agree with probability p² + (1 − p)²: other keys, heads, batch entries, neighbouring positions."""
    kept = np.asarray(factors(jax.random.key(0))) > 0
    other_key = np.asarray(factors(jax.random.key(1))) > 0
    chance = RATE**2 + (1 - RATE) ** 2
    others = {
        "key": (kept, other_key),
        "batch": (kept[0], kept[1]),
        "head": (kept[:, :, 0], kept[:, :, 1]),
        "query": (kept[:, 1:], kept[:, :-1]),
        "key position": (kept[..., 1:], kept[..., :-1]),
        "diagonal": (kept[:, 1:, :, 1:], kept[:, :-1, :, :-1]),
        "transpose": (kept[..., :T], kept[..., :T].swapaxes(1, 3)),
    }
    for name, (a, b) in others.items():
        # Neighbours share coins: at most every agreement is correlated with two others, which trebles the variance.
        assert abs((a == b).mean() - chance) < 5 * np.sqrt(3 * chance * (1 - chance) / a.size), name


ARRAYS = normal(2, T, 4, 4, seed=1), normal(2, S, 2, 4, seed=2), normal(2, S, 1, 3, seed=3)
COTANGENTS = normal(2, T, 4, 3, seed=4), normal(2, T, 4, seed=5)
CALL = ARRAYS, (Dot(np.float32(0.5)), Alibi(np.full(4, 0.1, np.float32)), Softmax(normal(4, seed=6))), Causal()
PLACES = np.arange(3, 3 + T, dtype=np.int32), None


@pytest.mark.parametrize("block", [5, (16, 8)])
def test_every_implementation_and_block_drops_the_same_weights(block):
    dropout = Dropout(RATE, jax.random.key(3))
    dense = evaluate(*CALL, PLACES, COTANGENTS, dropout=dropout)
    tiled = evaluate(*CALL, PLACES, COTANGENTS, dropout=dropout, implementation="tiled", block=block)
    for x, y in zip(*map(jax.tree.leaves, (tiled, dense)), strict=True):
        # No sum here has more than 2·T·S terms, in random order of sign: √ of that, times the largest of all.
        assert_close(x, y, np.abs(y).max() * np.sqrt(2 * T * S))
    plain = evaluate(*CALL, PLACES, COTANGENTS)
    np.testing.assert_array_equal(dense[0][1], plain[0][1])  # lse is of the weights before dropout
    assert np.mean(dense[0][0] != plain[0][0]) > 0.9


@by_implementation("dense")
def test_rate_zero_is_the_identity(implementation):
    options = {"implementation": implementation, "block": 8}
    plain = evaluate(*CALL, PLACES, COTANGENTS, **options)
    with_dropout = evaluate(*CALL, PLACES, COTANGENTS, dropout=Dropout(0.0, jax.random.key(3)), **options)
    for x, y in zip(*map(jax.tree.leaves, (with_dropout, plain)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_coins_go_with_positions_not_with_order():
    order = np.random.default_rng(0).permutation(S)
    dropout, mask = Dropout(RATE, jax.random.key(3)), Causal()
    place = np.arange(S, dtype=np.int32)
    query, key, value = ARRAYS
    out = attend(query, key, value, mask=mask, key_positions=place, dropout=dropout)
    moved = attend(query, key[:, order], value[:, order], mask=mask, key_positions=place[order], dropout=dropout)
    assert_close(moved, out, np.abs(value).max() / (1 - RATE))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rates_outside_0_to_1_are_refused(rate):
    with pytest.raises(ValueError, match=f"Dropout: rate must be at least 0 and below 1, got {rate}"):
        Dropout(rate, jax.random.key(0))
