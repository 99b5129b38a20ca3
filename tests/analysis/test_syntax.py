"""Heads that read syntactic heads, offsets as a baseline, and the probe against a fit by another optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxattn import analysis

rng = np.random.default_rng(0)


def rows(*shape):
    x = rng.gamma(0.5, size=shape)
    return x / x.sum(-1, keepdims=True)


def test_pieces_are_merged_by_sums_and_means():
    weights = rows(2, 5, 5)
    words = np.array([0, 0, 1, 2, 2])
    merged = analysis.merge_pieces(weights, words)
    np.testing.assert_allclose(merged.sum(-1), 1)
    expected = weights[:, :2, 3:].sum(-1).mean(1)
    np.testing.assert_allclose(merged[:, 0, 2], expected)
    without = analysis.merge_pieces(weights, np.array([-1, 0, 1, 2, -1]))
    np.testing.assert_allclose(without, weights[:, 1:4, 1:4])
    assert analysis.merge_pieces(weights, np.full(5, -1)).shape == (2, 0, 0)
    with pytest.raises(ValueError, match="word 1 has no token"):
        analysis.merge_pieces(weights, np.array([0, 0, 2, 2, 2]))
    with pytest.raises(ValueError, match="need one word for each token"):
        analysis.merge_pieces(weights, words[:4])


def test_planted_heads_are_found_in_the_direction_that_they_have():
    heads = np.array([1, -1, 1, 2, 2])
    reads = np.zeros((5, 5))
    reads[np.arange(5), np.maximum(heads, 0)] = 0.4
    reads += 0.6 * np.eye(5)  # a word that reads itself does not count
    both = np.stack([reads, reads.T])
    found = analysis.relation_accuracy(both, heads)
    assert found[0, 0] == found[1, 1] == 1
    assert found[0, 1] < 1
    assert np.isnan(analysis.relation_accuracy(both, np.full(5, -1))).all()
    with pytest.raises(ValueError, match=r"need \[..., 4, 4\]"):
        analysis.relation_accuracy(both, heads[:4])


def test_random_maps_are_right_by_chance():
    """Of 12 words each has 11 others: the mean over 400 maps is 1/11 within 4 standard errors."""
    heads = np.array([*range(1, 12), 0])
    found = analysis.relation_accuracy(rows(400, 12, 12), heads).mean(0)
    assert (abs(found - 1 / 11) < 4 * (1 / 11 / 400 / 12) ** 0.5).all()


def test_the_best_offset_is_a_share_of_the_words_that_have_heads():
    heads = np.array([[1, 2, -1, 2, -1], [-1, 0, 1, 1, -1]])
    assert analysis.best_offset(heads) == (-1, 0.5)
    assert analysis.best_offset(heads[:1], 2) == (1, 2 / 3)
    assert np.isnan(analysis.best_offset(np.full((1, 3), -1))[1])


def parsed(batch, length):
    heads = rng.integers(0, length - 1, (batch, length))
    heads += heads >= np.arange(length)
    heads[:, 0] = -1
    return heads


def test_a_probe_finds_the_head_that_reads_heads():
    heads = parsed(6, 7)
    maps = rows(6, 4, 7, 7)
    maps[:, 2] = np.where(heads[..., None] == np.arange(7), 0.9, 0.02)
    probe = analysis.fit_attention_probe(jnp.asarray(maps, jnp.float32), heads, penalty=0.1)
    assert ((probe.guess(maps) == heads) | (heads < 0)).all()
    assert probe.reads.argmax() == 2
    assert probe.reads[2] > 3 * abs(probe.read_by).max()
    other_way = analysis.fit_attention_probe(jnp.asarray(maps.swapaxes(-1, -2), jnp.float32), heads, penalty=0.1)
    np.testing.assert_allclose(other_way.read_by, probe.reads, atol=1e-3)
    np.testing.assert_allclose(probe(maps)[0, 1, 2], probe.reads @ maps[0, :, 1, 2] + probe.read_by @ maps[0, :, 2, 1])


def test_the_probe_has_the_least_loss_also_with_padding():
    """Against BFGS on the loss as it is written, in float64."""
    heads, maps = parsed(4, 5), rows(4, 2, 5, 5)
    words = np.ones((4, 5), bool)
    words[3, 3:] = words[2, 1:] = False
    heads[3] = [1, 2, 1, -1, -1]
    heads[2] = -1  # a text of one word

    def loss(w):
        total = 0.5 * w @ w / 2
        for b, i in np.argwhere(heads >= 0):
            others = [j for j in range(5) if j != i and words[b, j]]
            scores = {j: w[:2] @ maps[b, :, i, j] + w[2:] @ maps[b, :, j, i] for j in others}
            total -= scores[heads[b, i]] - np.log(sum(np.exp(s) for s in scores.values()))
        return total

    best = scipy.optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    with jax.enable_x64(True):
        probe = analysis.fit_attention_probe(jnp.asarray(maps), heads, words, penalty=0.5)
        np.testing.assert_allclose([*probe.reads, *probe.read_by], best, atol=1e-6)
        guessed = probe.guess(jnp.asarray(maps), words)
    assert words[np.arange(4)[[0, 1, 3], None], guessed[jnp.array([0, 1, 3])]].all()


def test_what_is_no_relation_is_refused():
    maps = rows(1, 2, 3, 3)
    with pytest.raises(ValueError, match="heads has one that is the word itself, or no word"):
        analysis.fit_attention_probe(maps, np.array([[0, -1, -1]]))
    with pytest.raises(ValueError, match="heads has one that is the word itself, or no word"):
        analysis.fit_attention_probe(maps, np.array([[3, -1, -1]]))
    with pytest.raises(ValueError, match=r"need \[B, K, W, W\] and \[B, W\]"):
        analysis.fit_attention_probe(maps, np.array([[1, -1]]))
    with pytest.raises(ValueError, match="penalty is 0: need a number above 0"):
        analysis.fit_attention_probe(maps, np.array([[1, -1, -1]]), penalty=0)
