"""Head statistics against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import Received, Sigmoid, nn
from jaxattn.analysis import (
    USUAL,
    between_classes,
    head_scores,
    head_statistics,
    repeated_tokens,
    sink_rate,
    statistics,
)
from jaxattn.core.attend import AtLags, LagProfile
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm


def test_uniform_causal_attention_has_harmonic_sink_mass_and_log_entropy():
    # Row i spreads 1 over i keys: sink mass H_T / T (0.0741 at T = 64), entropy the mean of log i.
    length = 64
    weights = jnp.tril(jnp.ones((length, length))) / jnp.arange(1, length + 1)[:, None]
    found = head_statistics(weights[None, None, None])
    np.testing.assert_allclose(found.sink_mass, np.sum(1 / np.arange(1, 65)) / 64, rtol=1e-6)
    np.testing.assert_allclose(found.sink_mass, 0.0741, atol=5e-5)
    np.testing.assert_allclose(found.entropy, np.mean(np.log(np.arange(1, 65))), rtol=1e-6)


def test_rows_are_normalised_first_and_empty_rows_left_out():
    weights = jnp.array([[3.0, 1.0], [0.0, 0.0]])[None, None, None]
    found = head_statistics(weights)
    np.testing.assert_allclose(found.sink_mass, [[0.75]], rtol=1e-6)
    np.testing.assert_allclose(found.entropy, [[-0.75 * np.log(0.75) - 0.25 * np.log(0.25)]], rtol=1e-6)
    assert head_statistics(jnp.zeros((1, 1, 2, 3, 3))).entropy.tolist() == [[0, 0]]


def test_layers_and_heads_keep_their_places():
    to_first, to_self = jnp.zeros((4, 4)).at[:, 0].set(1), jnp.eye(4)
    weights = jnp.stack([jnp.stack([to_first, to_self]), jnp.stack([to_self, to_self])])[:, None]  # [L, B, N, T, S]
    np.testing.assert_allclose(head_statistics(weights).sink_mass, [[1, 0.25], [0.25, 0.25]])


L, N, V, B, T = 2, 4, 13, 2, 9


def decoder():
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=N, key_heads=2), Spec(nn.FeedForward, hidden=8))
    model = Transformer(TransformerConfig(V, 40, 16, [layer] * L), rngs=nnx.Rngs(0))
    noisy = lambda x: x + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    model.eval()
    return model


def test_statistics_are_means_over_tokens_that_are_no_padding():
    model = decoder()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
    places = np.stack([np.arange(T), np.maximum(np.arange(T) - 3, -1)])
    more = {"lags": LagProfile(3), "received": Received(), "back": AtLags((1, 2))}
    found = statistics(model, tokens, USUAL | more, positions=jnp.asarray(places))
    w = np.asarray(model(tokens, positions=jnp.asarray(places), record=("weights",))[2]["weights"])  # [L, B, N, T, S]
    seen = places >= 0
    rows = lambda x: np.stack([x[:, b, :, t] for b, t in zip(*np.nonzero(seen), strict=True)]).mean(0)  # noqa: E731
    logs = np.log(np.where(w > 0, w, 1))
    np.testing.assert_allclose(found["entropy"], rows(-(w * logs).sum(-1)), rtol=1e-4, atol=1e-6)
    apart = places[:, None, :, None] - places[:, None, None]
    np.testing.assert_allclose(found["distance"], rows((w * apart).sum(-1)), rtol=1e-4, atol=1e-6)
    first = np.where(places == 0, 1, 0)[:, None, None]
    np.testing.assert_allclose(found["first"][..., 0], rows((w * first).sum(-1)), rtol=1e-4, atol=1e-6)
    for name, lag, at in (("previous", 1, 0), ("back", 2, 1)):
        expected = rows(np.where(apart == lag, w, 0).sum(-1))
        np.testing.assert_allclose(found[name][..., at], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["received"].sum(1), np.full((L, N), seen.sum() / B), rtol=1e-5)
    assert found["lags"].shape == (L, N, 3)


@pytest.mark.parametrize("places", [None, [[*range(T)], [-1, -1, *range(T - 2)]], [*range(T - 3), -1, -1, -1]])
def test_classes_read_from_each_other(places):
    """Over all classes a row is 1; tokens of no class neither read nor are read. Classes are by position."""
    model = decoder()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
    classes = np.random.default_rng(1).integers(-1, 3, (B, T))
    options = {} if places is None else {"positions": jnp.asarray(places)}
    found = between_classes(model, tokens, jnp.asarray(classes), 3, **options)
    whole = between_classes(model, tokens, jnp.asarray(classes % 3), 3, **options)
    w = np.asarray(model(tokens, record=("weights",), **options)[2]["weights"])
    if places is not None:
        places = np.broadcast_to(places, (B, T))
        classes = np.where(places < 0, -1, np.take_along_axis(classes, places, 1))
    for f, t in np.ndindex(3, 3):
        mass = (w * (classes == t)[:, None, None]).sum(-1)  # [L, B, N, T]
        on = (classes == f)[:, None]
        np.testing.assert_allclose(found[:, :, f, t], (mass * on).sum((1, 3)) / on.sum(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("first", [pytest.param(None, marks=pytest.mark.slow), 7])
def test_scores_of_heads_are_weights_of_the_second_copy(first):
    model, period = decoder(), 11
    found = head_scores(model, jax.random.key(3), batch=B, period=period, first=first)
    tokens = repeated_tokens(jax.random.key(3), B, period, V, first=first)
    w = np.asarray(model(tokens, record=("weights",))[2]["weights"])
    queries = np.arange(tokens.shape[1])[-period:]
    for name, lag in (("previous", 1), ("duplicate", period), ("induction", period - 1)):
        expected = w[:, :, :, queries, queries - lag].mean((1, 3))
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4, atol=1e-6)
        assert (tokens[:, queries] == tokens[:, queries - period]).all()
    np.testing.assert_allclose(found.first, w[:, :, :, queries, 0].mean((1, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.chance, np.mean(1 / (queries + 1)), rtol=1e-6)


def test_tokens_of_the_model_itself_count_and_heads_of_several_sizes_are_refused():
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=2), Spec(nn.FeedForward, hidden=8))
    tokens = jnp.zeros((B, T), jnp.int32)
    own = Transformer(TransformerConfig(V, 40, 16, [layer], meta_tokens=2), rngs=nnx.Rngs(0))
    found = statistics(own, tokens, {"entropy": USUAL["entropy"]}, positions=jnp.arange(T))["entropy"]
    w = np.asarray(own(tokens, record=("weights",))[2]["weights"], np.float64)
    np.testing.assert_allclose(found, -(w * np.log(np.where(w > 0, w, 1))).sum(-1).mean((1, 3)), rtol=1e-5)
    with pytest.raises(ValueError, match="the model sees 20 tokens where the inputs have 18"):
        head_scores(own, jax.random.key(0), period=9)
    other = pre_norm(Spec(nn.MultiHeadAttention, heads=4), Spec(nn.FeedForward, hidden=8))
    mixed = Transformer(TransformerConfig(V, 40, 16, [layer, other]), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="different numbers of heads"):
        head_scores(mixed, jax.random.key(0), period=9)
    with pytest.raises(ValueError, match="different numbers of heads"):
        between_classes(mixed, tokens, tokens, 2)


def test_the_sink_rate_is_the_share_of_texts_whose_mean_weight_is_above_a_threshold():
    model = decoder()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (5, T)))
    w = np.asarray(model(tokens, record=("weights",))[2]["weights"])  # [L, B, N, T, S]
    for at in (0, 1, T - 1):
        alpha = w[..., at:, at].mean(-1)
        for threshold in (0.0, float(np.median(alpha)), 1.0):
            expected = (alpha > threshold).mean(1)
            np.testing.assert_allclose(sink_rate(model, tokens, at=at, threshold=threshold), expected, atol=1e-6)


def test_padding_does_not_count_in_the_sink_rate_and_weights_are_not_normalised():
    model = decoder()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (1, T)))
    places = jnp.maximum(jnp.arange(T) - 3, -1)[None]
    padded = sink_rate(model, tokens, threshold=0.2, positions=places)
    np.testing.assert_array_equal(padded, sink_rate(model, tokens[:, 3:], threshold=0.2))
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=1, normalize=Sigmoid(-8.0)))
    small = Transformer(TransformerConfig(V, 40, 16, [layer]), rngs=nnx.Rngs(0))
    assert not sink_rate(small, tokens).any()  # all weights are near 0; their shares of the row are not
    with pytest.raises(ValueError, match="positions is"):
        sink_rate(model, tokens, at=-1)


def test_texts_without_the_position_do_not_count_in_the_sink_rate_and_nan_stays():
    model = decoder()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, T)))
    places = jnp.stack([jnp.arange(T), jnp.where(jnp.arange(T) < 2, jnp.arange(T), -1)])
    both = sink_rate(model, tokens, at=3, threshold=0.05, positions=places)
    np.testing.assert_array_equal(both, sink_rate(model, tokens[:1], at=3, threshold=0.05))
    assert both.any()
    assert np.isnan(sink_rate(model, tokens[1:], at=3, positions=places[1:])).all()
    assert np.isnan(sink_rate(model, jnp.full((1, T), V))).all()  # outside the vocabulary: all weights are NaN
