"""Dense triangles, greedy suppression and spans, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import Intervals, interval_nms, span_of_tokens, triangle_scores

RNG = np.random.default_rng(0)
W = 9


def test_scores_are_the_double_sum():
    weights = RNG.random((2, W, W)).astype(np.float32)
    for threshold in (0.4, 0.9 / (1 + np.arange(W, dtype=np.float32))[:, None]):
        found, theta = triangle_scores(jnp.asarray(weights), threshold), np.broadcast_to(threshold, (W, W))
        for b, x, y in np.ndindex(2, W, W):
            inside = [(i, j) for i in range(x, y + 1) for j in range(x, i + 1)]
            expected = sum(float(weights[b, i, j]) - theta[i, j] for i, j in inside) if x <= y else -np.inf
            assert float(found[b, x, y]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("overlap", [0.0, 0.3])
def test_intervals_are_those_of_a_plain_loop(overlap):
    scores = np.where(np.tri(W).T > 0, RNG.standard_normal((3, W, W)), -np.inf).astype(np.float32)
    scores[0, 2:4] = scores[0, 2, 3]  # ties
    found = jax.jit(lambda x: interval_nms(x, overlap, 6, 2, 5))(jnp.asarray(scores))
    for b in range(3):
        pairs = [(x, y) for x in range(W) for y in range(x + 1, min(x + 5, W)) if scores[b, x, y] > 0]
        taken = []
        for x, y in sorted(pairs, key=lambda p, b=b: (-scores[b, p[0], p[1]], p)):
            common = [(max(0, min(y, v) - max(x, u) + 1), y - x + v - u + 2) for u, v in taken]
            if all(c <= overlap * (n - c) for c, n in common):
                taken.append((x, y))
        taken = taken[:6]
        got = [(int(x), int(y)) for x, y, valid in zip(*(np.asarray(each[b]) for each in found), strict=True) if valid]
        assert got == taken
        if overlap == 0:
            assert len({t for x, y in taken for t in range(x, y + 1)}) == sum(y - x + 1 for x, y in taken)


def test_dense_blocks_are_the_spans():
    """Blocks of ones on the diagonal, under any threshold below 1, with what lies between them."""
    blocks, weights = [(0, 3), (4, 5), (8, 11)], np.zeros((1, 12, 12), np.float32)
    for x, y in blocks:
        weights[0, x : y + 1, x : y + 1] = 1
    for threshold in (0.3, 0.9):
        found = interval_nms(triangle_scores(jnp.asarray(weights), threshold), 0.0, 5)
        assert sorted(zip(found.start[0][:3].tolist(), found.end[0][:3].tolist(), strict=True)) == blocks
        assert found.valid[0].tolist() == [True] * 3 + [False] * 2
        assert span_of_tokens(found, 12)[0].tolist() == [0] * 4 + [1] * 2 + [2] * 2 + [3] * 4
    none = Intervals(jnp.full(2, -1), jnp.full(2, -1), jnp.zeros(2, bool))
    assert span_of_tokens(none, 4).tolist() == [0] * 4


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"weights has shape \(3, 4\): need \[..., W, W\]"):
        triangle_scores(jnp.zeros((3, 4)), 0.1)
    with pytest.raises(ValueError, match="overlap is 2: need a number from 0 to 1"):
        interval_nms(jnp.zeros((3, 3)), 2, 1)
    with pytest.raises(ValueError, match="interval_nms: most must be at least 3, got 2"):
        interval_nms(jnp.zeros((3, 3)), 0.5, 1, 3, 2)
