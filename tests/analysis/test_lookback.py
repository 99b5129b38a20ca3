"""Lookback: features against weights, windows and spans by hand, a planted classifier, and guided chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from jaxattn.analysis import auroc, fit_logistic, guided_chunks, lookback_features, sliding_windows, span_means


def test_features_are_ratios_of_mean_weights():
    model = planted.random(layers=2, heads=4)
    tokens, split = jax.random.randint(jax.random.key(0), (2, 8), 0, 64), jnp.array([3, 5])
    found = np.asarray(lookback_features(model, tokens, split))
    assert found.shape == (2, 8, 8)
    w = np.asarray(model(tokens, record=("weights",))[2]["weights"])
    for row, t, layer, head in ((0, 5, 0, 1), (1, 7, 1, 3), (1, 4, 1, 0)):
        weights, at = w[layer, row, head, t, : t + 1], int(split[row])
        context, new = weights[:at].mean(), weights[at:].mean() if t >= at else 0.0
        np.testing.assert_allclose(found[row, t, layer * 4 + head], context / (context + new), rtol=1e-5)
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_array_equal(found[0, :3], 1)  # nothing is new yet
    with pytest.raises(ValueError, match="positions is given"):
        lookback_features(model, tokens, 3, positions=jnp.arange(8))


def test_heads_of_equal_weights_are_at_one_half_and_a_copying_head_tells_supported_answers():
    """The planted head looks at the context where the token stood there, and else at all tokens alike."""
    model, rng = planted.planted(), np.random.default_rng(0)
    context = np.stack([rng.permutation(8) for _ in range(20)])
    supported = np.arange(20) % 2 == 0
    asked = np.where(supported, context[:, 3], 8 + np.arange(20) % 4)
    tokens = jnp.asarray(np.concatenate([context, np.full((20, 1), 14), asked[:, None]], 1))
    features = lookback_features(model, tokens, 8)
    np.testing.assert_allclose(features[:, 9, 5:], 0.5, atol=1e-6)  # maps of zeros
    last = span_means(features, jnp.full(20, 9), jnp.full(20, 9))
    np.testing.assert_array_equal(last, features[:, 9])
    probe = fit_logistic(last[:10], jnp.asarray(supported[:10], int))
    scores = probe(last[10:])
    assert auroc(scores[:, 1] - scores[:, 0], jnp.asarray(supported[10:])) == 1
    assert probe.weight[4, 1] > 0  # more looking back, more support


def test_spans_and_windows_are_means_and_least_labels():
    features = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 3)), jnp.float32)
    found = span_means(features, jnp.array([1, 4]), jnp.array([3, 3]))
    np.testing.assert_allclose(found[0], features[0, 1:4].mean(0), rtol=1e-5)
    assert np.isnan(found[1]).all()  # no token
    labels = jnp.array([True, True, False, True, True, True])
    means, least = sliding_windows(features[0], labels, 2)
    np.testing.assert_allclose(means[3], features[0, 3:5].mean(0), rtol=1e-5)
    assert least.tolist() == [True, False, False, True, True]
    one, same = sliding_windows(features[0], labels, 1)
    np.testing.assert_array_equal(one, features[0])
    np.testing.assert_array_equal(same, labels)
    with pytest.raises(ValueError, match="size is 7: need at most 6"):
        sliding_windows(features[0], labels, 7)


def test_guided_chunks_keep_the_best_and_one_candidate_is_plain_sampling():
    def sample(key, tokens):
        return jnp.concatenate([tokens, jax.random.randint(key, (len(tokens), 2), 0, 100)], 1)

    def score(tokens, begins):
        assert tokens.shape[1] == begins + 2
        return tokens[:, begins:].sum(-1) * 1.0

    prompt, key = jnp.array([7, 8, 9]), jax.random.key(0)
    found, text = guided_chunks(sample, score, prompt, key, chunks=3, candidates=5), prompt
    for number in range(3):
        rows = sample(jax.random.fold_in(key, number), jnp.tile(text, (5, 1)))
        text = rows[int(rows[:, -2:].sum(-1).argmax())]
    np.testing.assert_array_equal(found, text)
    plain = guided_chunks(sample, lambda *_: jnp.array([jnp.nan]), prompt, key, chunks=1, candidates=1)
    np.testing.assert_array_equal(plain, sample(jax.random.fold_in(key, 0), prompt[None])[0])
    np.testing.assert_array_equal(guided_chunks(sample, score, prompt, key, chunks=0), prompt)
