"""Queries that wait: with a store of the last keys, token by token, they are attention in a window with two sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Causal, Window, attend
from jaxattn.cache import Policy, Recent, delay_line, empty, waiting

B, T, N, K, H, V = 2, 13, 4, 2, 4, 3
EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (
    jnp.asarray(RNG.standard_normal((B, T, *shape)), jnp.float32) for shape in ((N, H), (K, H), (K, V))
)


def delayed(wait, slots, count=1, positions=None):
    """[B, T, N, V]: tokens come `count` at a time, and then as many empty ones as are needed for the last to leave."""
    store = empty(B, 2 * T, (K, H), (K, V), jnp.float32, Policy(Recent(0), slots))
    line, out = waiting(B, wait, (N, H)), np.full((B, T, N, V), np.nan, np.float32)
    positions = np.tile(np.arange(T), (B, 1)) if positions is None else positions

    @jax.jit
    def step(line, store, query, key, value, at):
        line, late, places = delay_line(line, query, at)
        store = store.append(key, value, at)
        seen = store.read(late)
        read = attend(late, seen.key, seen.value, query_positions=places, key_positions=seen.positions[..., 0])
        return line, store.observe({}, seen), read, places

    pad = [(0, 0), (0, wait + count)]
    places = np.pad(positions, pad, constant_values=-1)
    query, key, value = (jnp.pad(x, [*pad, (0, 0), (0, 0)]) for x in (QUERY, KEY, VALUE))
    for first in range(0, T + wait, count):
        piece = slice(first, first + count)
        line, store, read, left = step(line, store, query[:, piece], key[:, piece], value[:, piece], places[:, piece])
        for b, i in np.argwhere(np.asarray(left) >= 0):
            out[b, np.flatnonzero(positions[b] == left[b, i])[0]] = read[b, i]
    return out


@pytest.mark.parametrize(("wait", "slots"), [(0, 4), (3, 5), (2, 3), (5, 12), (T, 2 * T), (4, 3)])
def test_queries_that_wait_see_a_window_with_two_sides(wait, slots):
    """i + wait − slots < j ≤ i + wait. Keys that came early enough may all have gone: where wait ≥ slots, also i."""
    place = np.arange(T)
    ahead = place - place[:, None]
    shown = (ahead <= wait) & (ahead > wait - slots)
    # At the end no keys push others out.
    shown |= (place[:, None] + wait >= T) & (ahead <= wait) & (place > T - 1 - slots)
    expected = attend(QUERY, KEY, VALUE, mask=jnp.asarray(shown))
    np.testing.assert_allclose(delayed(wait, slots), expected, rtol=0, atol=50 * EPS * abs(np.asarray(expected)).max())


def test_without_waiting_it_is_a_causal_window_and_with_enough_of_both_every_token_is_seen():
    for wait, slots, mask in ((0, 4, Window(3)), (0, T, Causal()), (T, 2 * T, None)):
        expected = attend(QUERY, KEY, VALUE, mask=mask)
        tolerance = 50 * EPS * abs(np.asarray(expected)).max()
        np.testing.assert_allclose(delayed(wait, slots), expected, rtol=0, atol=tolerance)


def test_rows_that_are_padded_wait_for_their_own_tokens():
    """A row whose text begins later leaves later; what leaves at −1 reads nothing."""
    positions = np.stack([np.arange(T), np.where(np.arange(T) < 2, -1, np.arange(T) - 2)])
    out = delayed(3, 5, positions=positions)
    plain = delayed(3, 5)
    np.testing.assert_array_equal(out[0], plain[0])
    place = np.arange(T - 2)
    ahead = place - place[:, None]
    shown = (ahead <= 3) & ((ahead > -2) | ((place[:, None] + 3 >= T - 2) & (place > T - 8)))
    expected = attend(QUERY[1:, 2:], KEY[1:, 2:], VALUE[1:, 2:], mask=jnp.asarray(shown))
    np.testing.assert_allclose(out[1:, 2:], expected, rtol=0, atol=50 * EPS * abs(np.asarray(expected)).max())
    line, late, places = delay_line(waiting(1, 2, (1,)), jnp.ones((1, 3, 1)), jnp.array([4, 5, 6]))
    np.testing.assert_array_equal(places, [[-1, -1, 4]])
    np.testing.assert_array_equal(late[..., 0], [[0, 0, 1]])
    np.testing.assert_array_equal(line.positions, [[5, 6]])
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 2\) but what waits has \(1, 2, 1\)"):
        delay_line(line, jnp.ones((1, 3, 2)), jnp.array([4, 5, 6]))
    with pytest.raises(ValueError, match="capacity must be at least 0"):
        waiting(1, -1, (1,))
