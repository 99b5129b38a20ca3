"""Forecasts of attention: the measures, the network, what steps read against a plain loop, and the fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from multi_head import randomise

from jaxattn import Causal, attend
from jaxattn.cache import Convolutions, Forecasted, LastRow, MeanOverTime, Policy
from jaxattn.core.attend import BlockMax, attention_weights
from jaxattn.models import Spec, Transformer, TransformerConfig, attention_history, fit_forecast, pre_norm
from jaxattn.nn import AttentionForecast, MultiHeadAttention, Tap, Tokens

B, T, D, N, K = 2, 24, 16, 4, 2
G, H = N // K, D // N
X = jnp.asarray(np.random.default_rng(4).standard_normal((B, T, D)), jnp.float32)
RAGGED = np.stack([np.arange(T), np.where(np.arange(T) < 3, -1, np.arange(T) - 3)])


def test_the_largest_weight_of_blocks_is_its_definition():
    """Row 1 is padded at both ends, and a key behind the last block counts for none."""
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.standard_normal((2, 9, heads, 4)), jnp.float32) for heads in (N, K))
    places = np.stack([np.arange(9), [-1, 0, 1, 2, 3, 4, 5, -1, -1]])
    at = {"query_positions": jnp.asarray(places), "key_positions": jnp.asarray(places)}
    _, extras = attend(query, key, key, mask=Causal(), measures={"blocks": BlockMax(3, 2)}, **at)
    weights = np.asarray(attention_weights(query, key, mask=Causal(), **at)[0])  # [B, N, T, S]
    blocks = np.zeros((2, 9, N, 2))
    for b, t, s in np.ndindex(2, 9, 9):
        if 0 <= places[b, s] < 6:
            of_block = blocks[b, t, :, places[b, s] // 3]
            of_block[:] = np.maximum(of_block, weights[b, :, t, s])
    np.testing.assert_allclose(extras["blocks"], blocks, atol=1e-6)


def test_scores_of_shifted_pages_are_shifted_away_from_the_edges():
    module = AttentionForecast(rngs=nnx.Rngs(0))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(module))) == 4832
    history = jnp.asarray(np.random.default_rng(1).random((2, 3, 7, 20)), jnp.float32)
    one, other = module()(history), module()(jnp.roll(history, 4, -1))
    assert one.shape == (2, 3, 20)
    np.testing.assert_allclose(np.roll(one, 4, -1)[..., 6:-2], other[..., 6:-2], rtol=1e-4, atol=1e-5)


@nnx.jit
def step(module, x, positions, store):
    tap = Tap(record=("read",))
    _, store = module(x, Tokens.of(x, positions=positions), tap, store)
    return store, tap.records["read"]


@pytest.mark.parametrize("kind", ["last", "mean", "network"])
def test_a_step_reads_the_pages_of_the_best_forecast_and_its_weights_join_the_history(kind):
    network = AttentionForecast(4, 4, rngs=nnx.Rngs(1))()
    forecast = {"last": LastRow(), "mean": MeanOverTime(), "network": network}[kind]
    pages, size, steps, every, prompt = 3, 3, 4, 3, 12
    module = randomise(MultiHeadAttention(D, N, key_heads=K, mask=Causal(), rngs=nnx.Rngs(0)))
    policy = Policy(select=Forecasted(forecast, pages, size, steps, every, sinks=1, recent=2))
    store = module.init_state(B, T, policy)
    places = jnp.asarray(RAGGED)
    query = np.asarray(module.turn(module.queries(X), places), np.float64)
    key = np.asarray(module.turn(module.keys_and_values(X)[0], places), np.float64)
    count, partial = T // size, 0

    def rows(b, k, t, read):
        """The largest weight in each page, over the query heads of a key head, of the query at t."""
        found = np.zeros(count)
        first = (RAGGED[b] < 0).sum()
        for n in range(k * G, (k + 1) * G):
            scores = np.array([key[b, first + s, k] @ query[b, t, n] for s in read]) / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            for s, weight in zip(read, weights / weights.sum(), strict=True):
                found[s // size] = max(found[s // size], weight)
        return found

    history = np.zeros((B, K, steps, count))
    for b, k in np.ndindex(B, K):
        for t in range(prompt):
            if RAGGED[b, t] >= 0:
                history[b, k] = [*history[b, k, 1:], rows(b, k, t, range(RAGGED[b, t] + 1))]
    store, _ = step(module, X[:, :prompt], places[:, :prompt], store)
    np.testing.assert_allclose(np.moveaxis(store.remembered.rows["history"], -1, 1), history, atol=1e-6)
    for t in range(prompt, T):
        store, read = step(module, X[:, t : t + 1], places[:, t : t + 1], store)
        read = np.broadcast_to(read, (B, T, K))
        for b, k in np.ndindex(B, K):
            now = RAGGED[b, t]
            ever = {s // size for s in range(now + 1) if s < 1 or s > now - 2}
            seen = history[b, k].copy()
            seen[:, list(ever)] = 0
            scores = np.asarray(forecast(jnp.asarray(seen, jnp.float32)))
            rest = sorted({*range(now // size + 1)} - ever, key=lambda page: -scores[page])
            few = ever | set(rest[: pages - len(ever)])
            whole = (t - prompt) % every == every - 1
            expected = [s for s in range(now + 1) if whole or s // size in few]
            assert set(read[b, read[b, :, k] >= 0, k]) == set(expected)
            partial += len(expected) <= now
            history[b, k] = [*history[b, k, 1:], rows(b, k, t, expected)]
        np.testing.assert_allclose(np.moveaxis(store.remembered.rows["history"], -1, 1), history, atol=1e-5)
    assert partial > 10


def test_a_fitted_forecast_sees_where_attention_moves():
    """A page of attention that moves on by one with every step: neither baseline can know the next one."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 12, 40)
    histories = np.zeros((40, 9, 12), np.float32)
    for m, t in np.ndindex(40, 9):
        histories[m, t, (start[m] + t) % 12] = 1
    module = AttentionForecast(8, 8, rngs=nnx.Rngs(0))
    losses = fit_forecast(module, histories, window=3, steps=250, batch=16, learning_rate=1e-2)
    assert losses[-20:].mean() < 0.5 * losses[:5].mean()
    seen, following = histories[:, 3:6], histories[:, 6].argmax(-1)

    def right(forecast):
        return (np.asarray(forecast(jnp.asarray(seen))).argmax(-1) == following).mean()

    assert right(module()) > 0.9
    assert right(LastRow()) == right(MeanOverTime()) == 0


def test_histories_of_a_model_are_those_of_its_weights():
    layers = [pre_norm(Spec(MultiHeadAttention, heads=N, key_heads=K))] * 2
    model = Transformer(TransformerConfig(11, 10, D, layers), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(1).integers(0, 11, (B, 10))
    weights = np.asarray(model(tokens, record=("weights",))[2]["weights"])  # [L, B, N, T, S]
    expected = np.pad(weights, [(0, 0)] * 4 + [(0, 2)]).reshape(2, B, N, 10, 3, 4).max(-1)
    found = attention_history(model, tokens, 4)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_is_no_forecast_is_refused():
    with pytest.raises(TypeError, match="Forecasted: forecast is 'last': need a Forecast"):
        Forecasted("last", 2)
    with pytest.raises(ValueError, match="Forecasted: steps must be at least 1, got 0"):
        Forecasted(LastRow(), 2, steps=0)
    with pytest.raises(ValueError, match="histories have 3 rows: need more than the window, 4"):
        fit_forecast(AttentionForecast(rngs=nnx.Rngs(0)), np.zeros((2, 3, 8)), window=4)
    assert isinstance(AttentionForecast(2, 2, rngs=nnx.Rngs(0))(), Convolutions)
