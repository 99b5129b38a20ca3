"""Parts of scores: they add up to what the model records, in every basis."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from jaxattn.analysis import (
    Channels,
    Factored,
    RotaryPairs,
    SingularVectors,
    fewest_terms,
    pair_correlations,
    participation,
    qk,
    score_terms,
    writer_signals,
)
from jaxattn.core.attend.position import rotary
from jaxattn.trace import run

T, N, K, H = 9, 8, 4, 4


@pytest.fixture(scope="module")
def seen():
    model = planted.random(layers=2)
    tokens = jax.random.randint(jax.random.key(0), (1, T), 0, 64)
    record = ("q", "k", "q_rotated", "k_rotated", "scores", "resid_pre", "mixer_norm_scale")
    return model, jax.tree.map(np.asarray, run(model, tokens, record=record)[1])


@pytest.mark.parametrize(("layer", "head", "i", "j"), [(0, 0, 8, 2), (1, 5, 6, 6), (1, 7, 7, 0)])
def test_parts_add_up_to_the_score_that_the_model_records(seen, layer, head, i, j):
    """Of grouped heads, head n has the keys of key head n // 2."""
    model, x = seen
    q, k = x["q_rotated"][layer, 0, i, head], x["k_rotated"][layer, 0, j, head // (N // K)]
    whole = x["scores"][layer, 0, head, i, j] * H**0.5
    tolerance = 64 * np.finfo(np.float32).eps * abs(q * k).sum()
    for basis in (Channels(), RotaryPairs()):
        assert abs(score_terms(q, k, basis).sum() - whole) < tolerance
    stream = x["resid_pre"][layer, 0] / x["mixer_norm_scale"][layer, 0]
    singular = SingularVectors.of(qk(model, offset=i - j)[layer, head])
    terms = score_terms(stream[i], stream[j], singular)
    assert terms.shape == (H,)
    assert abs(terms.sum() - whole) < 64 * np.finfo(np.float32).eps * (abs(terms).sum() + abs(q * k).sum())


def test_a_pair_is_a_product_of_complex_numbers_turned_by_the_distance(seen):
    """Re(q̂ conj(k̂) exp(i (i − j) θ)), with pairs p and p + H/2; a pair that turns slowly hardly sees the distance."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 8))
    theta = 100.0 ** (-np.arange(4) / 4)
    for i, j in ((5, 2), (31, 28), (4, 4)):
        with jax.enable_x64(True):
            turned = [rotary(jnp.asarray(x)[None, None], jnp.asarray([at]), 100.0)[0, 0] for x, at in ((q, i), (k, j))]
            found = score_terms(*turned, RotaryPairs())
        complex_q, complex_k = (x[:4] + 1j * x[4:] for x in (q, k))
        expected = (complex_q * np.conj(complex_k) * np.exp(1j * (i - j) * theta)).real
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_channels_that_are_not_rotated_are_one_part():
    q, k = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    found = score_terms(q, k, RotaryPairs(0.5))
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found[:, 0], q[:, 0] * k[:, 0] + q[:, 2] * k[:, 2], rtol=1e-5)
    np.testing.assert_allclose(found[:, 2], (q * k)[:, 4:].sum(-1), rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match="basis is str: need a Basis"):
        score_terms(q, k, "channels")


def test_the_fewest_terms_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    for share in (0.5, 0.9, 1.0):
        terms = rng.standard_normal((50, 7))
        terms[0], terms[1] = [5, 3, -6, 0, 0, 0, 0], [2, 2, 2, 2, 0, 0, 0]
        taken = np.asarray(fewest_terms(jnp.asarray(terms, jnp.float32), share))
        for row, got in zip(terms, taken, strict=True):
            expected, total = set(), 0.0
            for place in np.argsort(-row, kind="stable"):
                if row.sum() <= 0 or total >= share * row.sum() - 1e-6 * abs(row).sum():
                    break
                expected.add(place)
                total += row[place]
            assert set(np.flatnonzero(got)) == expected
    assert taken[0].tolist() == [True] + [False] * 6  # 5 is more than 2, all of it
    assert taken[1].sum() == 4
    assert not fewest_terms(jnp.array([1.0, jnp.nan])).any()
    with pytest.raises(ValueError, match="share is 0"):
        fewest_terms(jnp.ones(3), 0)


def test_signals_of_all_writers_add_up_to_what_the_terms_read():
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((2, 10, 4))
    with jax.enable_x64(True):
        basis = SingularVectors.of(Factored(jnp.asarray(left), jnp.asarray(right.T)))
        writers, key = rng.standard_normal((5, 10)), rng.standard_normal(10)
        stream = writers.sum(0)
        kept = fewest_terms(score_terms(jnp.asarray(stream), jnp.asarray(key), basis) ** 2, 0.9)
        found = writer_signals(writers, stream, basis.left, basis.values, kept)
        at_key = writer_signals(key[None], key, basis.right.swapaxes(-1, -2), basis.values, kept)
    u, s, v = np.linalg.svd(left @ right.T)
    expected = sum(s[m] ** 0.5 * abs(stream @ u[:, m]) for m in range(4) if kept[m])
    np.testing.assert_allclose(np.asarray(found).sum(), expected, rtol=1e-9)
    theirs = sum(s[m] ** 0.5 * abs(key @ v[m]) for m in range(4) if kept[m])
    np.testing.assert_allclose(np.asarray(at_key).sum(), theirs, rtol=1e-9)
    assert 0 < kept.sum() < 4


def test_participation_counts_parts_of_equal_size():
    found = participation(jnp.array([[3.0, 0, 0, 0], [1, -1, 1, 1], [0, 0, 0, 0]]))
    np.testing.assert_allclose(found, [1, 4, 0], rtol=1e-6)


def test_correlations_of_pairs_are_those_of_a_loop_over_rows():
    q, k = np.random.default_rng(2).standard_normal((2, 12, 6))
    for distance, others in ((0, False), (4, True)):
        with jax.enable_x64(True):
            found = pair_correlations(jnp.asarray(q), jnp.asarray(k), distance=distance, others=others)
        parts = np.stack([q[:, [p, p + 3]] @ k[:, [p, p + 3]].T for p in range(3)])
        for p in range(3):
            whole = parts.sum(0) - (parts[p] if others else 0)
            rows = [
                np.corrcoef(parts[p, i, : i - distance], whole[i, : i - distance])[0, 1]
                for i in range(12)
                if i - distance >= 3
            ]
            np.testing.assert_allclose(found[p], np.mean(rows), rtol=1e-8)


def test_one_pair_alone_explains_all_and_independent_pairs_share():
    """With P independent parts of equal spread the correlation with the whole is 1 / √P, with the others 0."""
    q, k = jax.random.normal(jax.random.key(3), (2, 60, 8))
    one = jnp.zeros(8).at[jnp.array([2, 6])].set(1.0)
    alone = pair_correlations(q * one, k)
    assert alone[2] == pytest.approx(1, abs=1e-5)
    assert np.isnan(np.delete(np.asarray(alone), 2)).all()  # without spread
    np.testing.assert_allclose(pair_correlations(q, k), 0.5, atol=0.15)
    np.testing.assert_allclose(pair_correlations(q, k, others=True), 0, atol=0.15)
    assert np.isnan(pair_correlations(q[:4], k[:4], distance=2)).all()  # no row with three far keys
    with pytest.raises(ValueError, match="distance is -1"):
        pair_correlations(q, k, distance=-1)
