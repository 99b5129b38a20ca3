"""Prefix scores, curves over lags, and the model of recall that they are held against."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import Causal, analysis, nn
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm

V, L, N, T = 9, 2, 2, 21


@pytest.fixture(scope="module")
def model():
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=N, mask=Causal()))
    model = Transformer(TransformerConfig(V, T, 16, [layer] * L), rngs=nnx.Rngs(0))
    noisy = lambda x: x + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    model.eval()
    return model


def weights_of(model, tokens):
    return np.asarray(model(tokens, record=("weights",))[2]["weights"], np.float64)  # [L, B, N, T, T]


def test_prefix_scores_are_the_weight_behind_earlier_occurrences(model):
    """Token by token, with tokens that come twice in a row among them."""
    tokens = np.random.default_rng(0).integers(0, V, (3, T))
    tokens[0, 4:6] = 3
    w, total, count = weights_of(model, tokens), np.zeros((L, N)), 0
    for b, i in np.ndindex(tokens.shape):
        earlier = [j for j in range(i) if tokens[b, j] == tokens[b, i]]
        count += bool(earlier)
        total += sum((w[:, b, :, i, j + 1] for j in earlier), np.zeros((L, N)))
    np.testing.assert_allclose(analysis.prefix_scores(model, tokens), total / count, rtol=0, atol=1e-6)


def test_of_uniform_attention_the_prefix_score_is_its_chance():
    """Zero queries weigh all i + 1 tokens alike: of a copy with period P one of them is behind the earlier one."""
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=1, mask=Causal()))
    model = Transformer(TransformerConfig(V, 12, 8, [layer]), rngs=nnx.Rngs(0))
    model.eval()
    flat = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "query" in jax.tree_util.keystr(path) else x, nnx.state(model, nnx.Param)
    )
    nnx.update(model, flat)
    tokens = np.tile(np.arange(6), (2, 2))
    expected = np.mean([1 / (i + 1) for i in range(6, 12)])
    np.testing.assert_allclose(analysis.prefix_scores(model, tokens), [[expected]], rtol=1e-6)
    np.testing.assert_allclose(
        analysis.lag_curve(model, tokens, 6, 2)[0, 0],
        [np.mean([1 / (i + 7) for i in range(6) if 0 <= i + lag < 6]) for lag in range(-2, 3)],
        rtol=1e-6,
    )


def test_curves_over_lags_are_means_of_weights_in_the_first_copy(model):
    period, lags = 8, 3
    tokens = np.asarray(analysis.repeated_tokens(jax.random.key(1), 3, period, V, first=0))
    w, expected = weights_of(model, tokens), np.zeros((L, N, 2 * lags + 1))
    for at, lag in enumerate(range(-lags, lags + 1)):
        pairs = [(1 + period + i, 1 + i + lag) for i in range(period) if 0 <= i + lag < period]
        expected[..., at] = np.mean([w[..., i, j].mean(1) for i, j in pairs], 0)
    np.testing.assert_allclose(analysis.lag_curve(model, tokens, period, lags), expected, rtol=0, atol=1e-6)


def test_what_has_no_score_is_refused(model):
    tokens = np.arange(V)[None]
    with pytest.raises(ValueError, match="tokens has no token that comes again"):
        analysis.prefix_scores(model, tokens)
    with pytest.raises(ValueError, match="tokens has 9 of a row: need two copies of the period 5"):
        analysis.lag_curve(model, tokens, 5, 2)
    with pytest.raises(ValueError, match="period must be at least 4, got 3"):
        analysis.lag_curve(model, tokens, 3, 3)
    for measure in (analysis.prefix_scores, lambda *given, **options: analysis.lag_curve(*given, 4, 2, **options)):
        with pytest.raises(ValueError, match="positions is given"):
            measure(model, tokens, positions=tokens)


# The model of recall.


@pytest.mark.parametrize("items", [1, 2, 7])
@pytest.mark.parametrize("encoding", [0.0, 0.3, 1.0])
def test_the_matrix_is_that_of_the_drift_of_contexts(items, encoding):
    """By inverting, with T the shift to the next item: M = (I − (1 − β) T)⁻¹ T."""
    shift = np.eye(items, k=1)
    expected = np.linalg.inv(np.eye(items) - (1 - encoding) * shift) @ shift
    with jax.enable_x64(True):
        np.testing.assert_allclose(analysis.cmr_matrix(items, encoding), expected, rtol=0, atol=1e-14)


def transitions(parameters, items, recalls, lags):
    """The expected shares of transitions, over all sequences of recalls one by one, in float64."""
    encoding, retrieval, gamma = parameters
    matrix = np.asarray([[(1 - encoding) ** (j - i - 1) if j > i else 0.0 for j in range(items)] for i in range(items)])
    counts = np.zeros(2 * lags + 1)

    def follow(context, last, chance, left):
        evoked = context @ matrix
        if not left or evoked.sum() <= 0:
            return
        for item in np.flatnonzero(evoked):
            of_item = chance * evoked[item] / evoked.sum()
            if abs(item - last) <= lags:
                counts[item - last + lags] += of_item
            recalled = np.eye(items)[item]
            new = (1 - gamma) * recalled + gamma * matrix @ recalled
            moved = (1 - retrieval) * context + retrieval * new / max(np.linalg.norm(new), 1e-300)
            follow(moved / max(np.linalg.norm(moved), 1e-300), item, of_item, left - 1)

    starts = range(items // 4, max(items - items // 4, items // 4 + 1))
    for start in starts:
        follow(np.eye(items)[start], start, 1 / len(starts), recalls)
    return counts / counts.sum()


@pytest.mark.parametrize(
    "parameters", [(0.5, 0.5, 0.5), (0.3, 1.0, 0.0), (0.2, 0.0, 0.0), (0.6, 1.0, 1.0), (1.0, 0.4, 0.3)]
)
def test_simulated_recall_is_the_mean_over_all_sequences(parameters):
    """20 000 runs of up to 3 recalls: the share of a lag has a standard error of at most √(¼ / 20 000) = 0.0035."""
    expected = transitions(parameters, 8, 3, 4)
    found = analysis.cmr_crp(jax.random.key(3), *parameters, items=8, recalls=3, lags=4, runs=20_000)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5 * 0.0035)


def test_a_context_that_is_that_of_the_last_item_gives_a_geometric_curve():
    """Far from the end of a list, with β_rec = 1 and γ = 0: shares ∝ (1 − β)^(lag − 1), none at other lags."""
    for encoding in (0.3, 0.7):
        found = np.asarray(analysis.cmr_crp(jax.random.key(0), encoding, 1.0, 0.0, items=200, recalls=5, runs=10_000))
        powers = (1 - encoding) ** np.arange(5)
        assert (found[:6] == 0).all()
        np.testing.assert_allclose(found[6:], powers / powers.sum(), rtol=0, atol=5 * np.sqrt(0.25 / 40_000))


def test_recall_of_the_next_item_alone_is_a_perfect_induction_head():
    found = analysis.cmr_crp(jax.random.key(0), 1.0, 1.0, 0.0, lags=2, runs=10)
    np.testing.assert_array_equal(found, [0, 0, 0, 1, 0])
    for scale, offset in ((1.0, 0.0), (0.6, 0.03)):
        head = scale * found + offset
        assert float(analysis.cmr_distance(head, found)) < 1e-6


def test_people_recall_forward_more_than_backward_and_near_more_than_far():
    found = np.asarray(analysis.cmr_crp(jax.random.key(0), 0.5, 0.5, 0.5, runs=5000))
    assert found[6] > found[4] > found[3] > found[2]
    assert found[6] > found[7] > found[8]


def test_distances_by_hand_and_over_a_grid():
    """(0, 1, 0) from (0, ½, 1): scaled, their squares are 0, ¼ and 1, over a variance of 2/9."""
    head, crp = jnp.array([0.0, 1.0, 0.0]), jnp.array([0.2, 0.4, 0.6])
    np.testing.assert_allclose(analysis.cmr_distance(head, crp), (1.25 / 3) / (2 / 9), rtol=1e-5)
    np.testing.assert_allclose(analysis.cmr_distance(3 * head + 1, 7 * crp), (1.25 / 3) / (2 / 9), rtol=1e-5)
    assert np.isnan(analysis.cmr_distance(jnp.ones(3), crp))
    options = {"runs": 20, "lags": 1}
    grid = analysis.cmr_grid(jax.random.key(0), 2, 2, 3, chunk=5, **options)
    expected = list(itertools.product((0.5, 1.0), (0.0, 1.0), (0.0, 0.5, 1.0)))
    np.testing.assert_allclose(grid.parameters, expected)
    one = analysis.cmr_crp(jax.random.key(0), *expected[7], **options)
    np.testing.assert_allclose(grid.curves[7], one, rtol=0, atol=1e-6)
    assert analysis.cmr_distance(head, grid.curves).shape == (12,)


def test_numbers_that_are_out_of_range_are_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"encoding holds 1\.5: need numbers from 0 to 1"):
        analysis.cmr_matrix(3, 1.5)
    with pytest.raises(ValueError, match="gamma holds -1"):
        analysis.cmr_crp(key, 0.5, 0.5, -1)
    with pytest.raises(ValueError, match="items must be at least 6, got 5"):
        analysis.cmr_crp(key, 0.5, 0.5, 0.5, items=5)
    with pytest.raises(ValueError, match="curve has 3 lags and crp 5: need the same"):
        analysis.cmr_distance(jnp.ones(3), jnp.ones(5))
    with pytest.raises(ValueError, match="gamma must be at least 1, got 0"):
        analysis.cmr_grid(key, gamma=0)
