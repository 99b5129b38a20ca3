"""Parallel context: pieces read apart, places that begin anew, and the groups that a row keeps."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Causal, Entropy, Explicit, attend
from jaxattn.core.attend import READER, SHARED, KeepGroups, Pieces, attention_weights, piece_places

B, N, H, V = 2, 2, 4, 3
EPS = float(np.finfo(np.float32).eps)


def arrays(length, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((B, length, N, c)), jnp.float32) for c in (H, H, V)]


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=50 * EPS * abs(np.asarray(expected)).max())


def test_one_piece_is_causal():
    query, key, value = arrays(9)
    ids = jnp.array([SHARED] * 2 + [0] * 4 + [READER] * 3)
    np.testing.assert_array_equal((Causal() & Pieces(ids)).to_array(9), Causal().to_array(9))
    assert_same(attend(query, key, value, mask=Causal() & Pieces(ids)), attend(query, key, value, mask=Causal()))
    np.testing.assert_array_equal(piece_places(ids), np.arange(9))


def test_two_identical_pieces_read_as_one_with_the_log_of_two_more_entropy():
    query, key, value = arrays(5)
    twice = [jnp.concatenate([x[:, :4], x[:, :4], x[:, 4:]], 1) for x in (query, key, value)]
    ids = jnp.array([0] * 4 + [1] * 4 + [READER])
    apart = Explicit(jnp.arange(9) < 8) & Pieces(ids)  # nothing but the pieces, also for the reader
    measures = {"entropy": Entropy()}
    out, found = attend(*twice, mask=apart, measures=measures)
    one, alone = attend(query, key, value, mask=Explicit(jnp.arange(5) < 4), measures=measures)
    assert_same(out[:, 8], one[:, 4])
    assert_same(found["entropy"][:, 8], alone["entropy"][:, 4] + np.log(2))
    for first in (0, 4):
        assert_same(out[:, first : first + 4], one[:, :4])


def test_places_begin_anew_in_each_piece_and_readers_stand_behind_the_longest():
    """In any order; also without a prefix, or without readers."""
    ids = jnp.array([[-1, -1, 0, 0, 0, 1, 1, -2, -2], [0, 1, 0, -2, 1, -1, 1, 0, 1], [5, 5, 5, 5, 2, 2, 2, 2, 2]])
    places = [[0, 1, 2, 3, 4, 2, 3, 5, 6], [1, 1, 2, 5, 2, 0, 3, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(piece_places(ids), places)


def test_kept_groups_are_those_of_a_mask_and_all_of_them_change_nothing():
    """Zeros that are made up for equal masking the scores."""
    query, key, value = arrays(12)
    groups = jnp.array([-1, -1, 0, 0, 0, 1, 1, 1, 2, 2, 2, -1])
    weights = np.asarray(attention_weights(query, key, mask=Causal())[0])
    out = attend(query, key, value, mask=Causal(), weight_maps=(KeepGroups(groups, 2, 2),))
    shown = np.tile(np.tri(12, dtype=bool), (B, N, 1, 1))
    for b, n, t in np.ndindex(B, N, 12):
        there = [g for g in range(3) if (np.asarray(groups)[: t + 1] == g).any()]
        score = {g: np.sort(weights[b, n, t, np.asarray(groups) == g])[::-1][:2].sum() for g in there}
        best = sorted(there, key=lambda g: (-score[g], g))[:2]
        shown[b, n, t] &= np.isin(groups, [-1, *best])
    assert_same(out, attend(query, key, value, mask=Causal() & Explicit(jnp.asarray(shown))))
    plain = attend(query, key, value, mask=Causal())
    assert abs(out - plain).max() > 0.01
    for keep, top in ((3, 5), (7, 0)):
        assert_same(attend(query, key, value, mask=Causal(), weight_maps=(KeepGroups(groups, keep, top),)), plain)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        KeepGroups(jnp.zeros(3, int), 0)
    with pytest.raises(ValueError, match="top must be at least 0, got -1"):
        KeepGroups(jnp.zeros(3, int), 1, -1)
    with pytest.raises(ValueError, match="ids has 1 entry but the call has 9 positions"):
        attend(*arrays(9), mask=Pieces(jnp.zeros(1, int)))
