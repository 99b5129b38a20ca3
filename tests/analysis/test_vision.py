"""Patterns of patches that are known by hand, and scores of heads against runs without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance as scipy_distance
from flax import nnx

from jaxattn import analysis, nn, trace
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm

rng = np.random.default_rng(0)
K = 4
UNIFORM = np.full((K**2, K**2), 1 / K**2)


def shift(down, right):
    """Each patch reads the one at this offset; those at the border read nothing."""
    made = np.zeros((K, K, K, K))
    for y, x in np.ndindex(K, K):
        if 0 <= y + down < K and 0 <= x + right < K:
            made[y, x, y + down, x + right] = 1
    return made.reshape(K**2, K**2)


def rows(*shape):
    x = rng.gamma(0.4, size=shape)
    return x / x.sum(-1, keepdims=True)


def test_the_class_token_is_left_out_and_rows_are_divided():
    weights = rows(2, 3, 10, 10)
    weights[0, 0, 3, 1:] = 0
    left = analysis.patch_weights(weights)
    expected = weights[..., 1:, 1:]
    np.testing.assert_array_equal(analysis.patch_weights(weights, divide=False), expected)
    assert (left[0, 0, 2] == 0).all()
    np.testing.assert_allclose(left[1], expected[1] / expected[1].sum(-1, keepdims=True))
    assert analysis.patch_weights(weights[..., :9, :9], own=0).shape == (2, 3, 9, 9)
    with pytest.raises(ValueError, match=r"weights are between \(8, 8\) patches: need as many, a square number"):
        analysis.patch_weights(weights, own=2)


def test_a_shift_has_its_own_offset_and_nothing_else_does():
    """One patch is 1 / (K − 1) of a canvas from −1 to 1."""
    heads = np.stack([np.eye(K**2), shift(1, 0), shift(0, -1), shift(2, 1), UNIFORM, np.zeros((K**2, K**2))])
    aligned = analysis.aligned_map(heads)
    np.testing.assert_allclose(aligned.sum((1, 2)), heads.sum((1, 2)))
    for head, (y, x) in enumerate([(0, 0), (1, 0), (0, -1), (2, 1)]):
        assert aligned[head, K - 1 + y, K - 1 + x] == heads[head].sum()
    offsets = analysis.mean_offset(aligned)
    np.testing.assert_allclose(offsets[:5] * (K - 1), [[0, 0], [1, 0], [0, -1], [2, 1], [0, 0]], atol=1e-12)
    assert np.isnan(offsets[5]).all()
    assert np.isnan(analysis.mean_offset(np.ones((1, 1)))).all()


def test_aligned_maps_are_sums_over_pairs():
    patches = rows(9, 9)
    expected = np.zeros((5, 5))
    for i, j in np.ndindex(9, 9):
        expected[2 + j // 3 - i // 3, 2 + j % 3 - i % 3] += patches[i, j]
    np.testing.assert_allclose(analysis.aligned_map(patches), expected)
    pairs = analysis.aligned_map(np.ones((9, 9)))
    np.testing.assert_array_equal(pairs, np.outer([1, 2, 3, 2, 1], [1, 2, 3, 2, 1]))


def test_distances_are_means_over_pairs():
    uniform = np.mean([np.hypot(a - c, b - d) for a, b, c, d in np.ndindex(K, K, K, K)])
    assert analysis.patch_distance(UNIFORM) == pytest.approx(uniform)
    assert analysis.patch_distance(np.eye(K**2)) == 0
    assert analysis.patch_distance(shift(2, 1)).item() == pytest.approx(5**0.5 * 6 / 16)
    assert analysis.position_deviation(UNIFORM) == 0
    assert analysis.position_deviation(np.eye(9)) == pytest.approx(8**0.5 / 9)


def test_rings_count_the_patches_that_they_have():
    profile = analysis.ring_profile(np.stack([UNIFORM, np.eye(K**2), shift(1, 1)]))
    np.testing.assert_allclose(profile.mean[0], 1 / K**2)
    np.testing.assert_allclose(profile.mass[:2].sum(-1), 1)
    np.testing.assert_array_equal(profile.mass[1], [1, 0, 0, 0])
    np.testing.assert_allclose(profile.mass[2], [0, 9 / 16, 0, 0])
    patches = rows(9, 9)
    found = analysis.ring_profile(patches)
    for k in range(3):
        at = [[(i, j) for j in range(9) if max(abs(i // 3 - j // 3), abs(i % 3 - j % 3)) == k] for i in range(9)]
        means = [np.mean([patches[pair] for pair in pairs]) for pairs in at if pairs]
        assert found.mean[k] == pytest.approx(np.mean(means))
        assert found.mass[k] == pytest.approx(sum(patches[pair] for pairs in at for pair in pairs) / 9)
    assert analysis.ring_profile(np.ones((1, 1))).mean.tolist() == [1]


def test_planted_heads_are_told_from_random_ones():
    """Heads that look at a neighbour have a peak there; of 200 random heads none comes near."""
    random = analysis.aligned_map(rows(200, K**2, K**2)) / K**2
    planted = analysis.aligned_map(0.6 * shift(0, 1) + 0.4 * rows(K**2, K**2)) / K**2
    assert planted[K - 1, K] > 0.4
    assert random.max() < 0.3  # chance is 12 / 16 / 16
    size = np.hypot(*analysis.mean_offset(random).T)
    assert np.hypot(*analysis.mean_offset(planted)) > size.max()


@pytest.fixture(scope="module")
def classifier():
    config = TransformerConfig(
        vocabulary=3,
        length=10,
        width=16,
        layers=[pre_norm(Spec(nn.MultiHeadAttention, heads=2, key_heads=1, position=None))] * 2,
        causal=False,
        embed=Spec(nn.PatchEmbedding, patch=(2, 2), size=(6, 6), channels=1),
        positions=Spec(nn.PositionEmbedding),
        head=Spec(nn.Pooler, classes=3),
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    noisy = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    model.eval()
    return model


IMAGES = np.random.default_rng(1).normal(size=(2, 6, 6, 1)).astype(np.float32)


def test_scores_of_heads_are_differences_of_two_runs(classifier):
    """Also beyond heads that are gone already, whose own scores are then 0."""
    labels, gone = np.array([0, 2]), np.array([[True, False], [False, False]])
    found = analysis.pruning_scores(classifier, IMAGES, labels, chunk=2)
    beyond = analysis.pruning_scores(classifier, IMAGES, labels, pruned=gone, chunk=2)

    def answers(*removed):
        z = jnp.ones((2, 2, 1)).at[tuple(jnp.array(removed, int).reshape(-1, 2).T)].set(0)
        logits, _, seen = classifier(IMAGES, edits={"z": trace.Layers(trace.Scale(z))}, record=("resid",))
        return np.asarray(jax.nn.softmax(logits), float), np.asarray(seen["resid"][-1, :, 0], float)

    for scores, before in ((found, ()), (beyond, ((0, 0),))):
        p, state = answers(*before)
        for layer, head in np.ndindex(2, 2):
            q, moved = answers(*before, (layer, head))
            at = (layer, head)
            np.testing.assert_allclose(scores.drop[at], (p - q)[np.arange(2), labels], atol=1e-5)
            apart = [scipy_distance.jensenshannon(*pair) ** 2 for pair in zip(p, q, strict=True)]
            np.testing.assert_allclose(scores.divergence[at], apart, atol=1e-5)
            cosine = (state * moved).sum(-1) / np.linalg.norm(state, axis=-1) / np.linalg.norm(moved, axis=-1)
            np.testing.assert_allclose(scores.moved[at], 1 - cosine, atol=1e-5)
    np.testing.assert_allclose(beyond.drop[0, 0], 0, atol=1e-6)
    with pytest.raises(ValueError, match=r"the logits have shape \(2,\): need \[2, classes\]"):
        analysis.pruning_scores(classifier, IMAGES, labels, lambda logits: logits[:, 0])


def test_overlaps_of_maps():
    """Half of two sets of 4 places is shared; maps may have any scale."""
    a, b = np.zeros((2, 3, 3))
    a[0], b[1] = 1, 1
    a[1, 0], b[2, 0] = 1, 1
    shared = (a * b).sum()
    assert analysis.soft_iou(a, 5 * b) == pytest.approx(2 * shared / (4 + shared))
    assert analysis.soft_iou(a, a) == pytest.approx(1)
    assert analysis.soft_iou(a, np.zeros((3, 3))) == 0
    assert analysis.soft_iou(np.eye(3), 1 - np.eye(3)) == 0
    x, y = rng.gamma(0.5, size=(2, 20, 4, 4))
    found = analysis.soft_iou(x, y)
    np.testing.assert_allclose(analysis.soft_iou(y, x), found, rtol=1e-6)
    p, q = (z / z.sum((1, 2), keepdims=True) for z in (x, y))
    np.testing.assert_allclose(found, (p * q).sum((1, 2)) / (((p + q) / 2) ** 2).sum((1, 2)), rtol=1e-5)
    assert ((found > 0) & (found < 1)).all()
    assert np.isnan(analysis.soft_iou(np.full((2, 2), np.nan), np.ones((2, 2))))


def test_maps_of_gradients_are_products_with_mean_gradients(classifier):
    """The gradient is that of the layers behind, begun from the stream."""

    def logit(logits):
        return logits[:, 1]

    found = np.asarray(analysis.grad_cam(classifier, IMAGES, logit, layer=1))
    stream = classifier(IMAGES, record=("resid_pre",))[2]["resid_pre"][1]
    after = lambda x: logit(classifier(IMAGES, start=(1, x))[0]).sum()  # noqa: E731
    gradient = np.asarray(jax.grad(after)(stream)[:, 1:].mean(1), float)
    expected = np.maximum(np.einsum("bc,bpc->bp", gradient, stream[:, 1:]), 0).reshape(2, 3, 3)
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())
    with pytest.raises(ValueError, match="layer is 2: need one of 2"):
        analysis.grad_cam(classifier, IMAGES, logit, layer=2)
    with pytest.raises(ValueError, match="10 tokens, 0 of them no patches: need a square"):
        analysis.grad_cam(classifier, IMAGES, logit, layer=0, own=0)
