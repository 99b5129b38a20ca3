"""Spans of heads: what a mask shows is what a store of these spans keeps, and what is expected is what is measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import spans
from experiments.inside_smollm2 import loaded
from experiments.spans import CLAIMS, QUICK, SEARCHED, UNIFORM, Config, HeadSpans
from jaxattn import trace
from jaxattn.cache import Spans
from jaxattn.claims import report


def test_the_mask_shows_what_a_store_of_the_same_spans_keeps():
    """By the worth of its slots: −∞ goes. A head with a span of the whole text sees all."""
    sinks, lengths, places = 2, np.array([3, 1, 12]), np.arange(12)
    shown = np.asarray(HeadSpans(jnp.asarray(lengths), sinks).to_array(12))
    for t in range(12):
        store = Spans(jnp.asarray(lengths), 0.0, sinks)
        slots = jnp.broadcast_to(jnp.asarray(places)[None, :, None], (1, 12, 3))
        kept = np.asarray(store.keep(slots, {}, jnp.full((1, 1, 1), t)))[0] > -np.inf
        np.testing.assert_array_equal(shown[:, t, : t + 1], kept[: t + 1].T)


def test_what_is_expected_of_a_hidden_key_is_what_the_slope_says_of_the_output_without_it():
    """A span of 15 hides one pair of 16 tokens: the first key, from the last query. Without it the head reads

    (z − A v) / (1 − A), and the loss moves by the slope times that change, in first order.
    """
    model = loaded(QUICK).model
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 16)))
    expected, together = map(np.asarray, spans.influence(model, tokens, np.array([15, 16]), 0))
    assert not expected[..., 1].any()
    np.testing.assert_allclose(together[..., 1], 0, atol=1e-7)

    def loss(delta):
        logits, _, records = model(tokens, edits={"z": trace.Layers(trace.Add(delta))}, record=("weights", "v", "z"))
        return spans.late_loss(logits, tokens), records

    slope, records = jax.grad(loss, has_aux=True)(jnp.zeros((3, 1, 16, 4, 8)))
    weight = np.asarray(records["weights"])[:, 0, :, -1, 0, None]
    value = np.repeat(np.asarray(records["v"]), 2, 3)[:, 0, 0]
    z = np.asarray(records["z"])[:, 0, -1]
    moved = (z - weight * value) / (1 - weight) - z
    change = (moved * slope[:, 0, -1]).sum(-1)
    np.testing.assert_allclose(expected[..., 0], abs(change), rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(together[..., 0], change, rtol=1e-3, atol=1e-6 * abs(change).max())


def test_texts_of_calibration_and_held_out_ones_share_nothing_and_what_is_too_short_is_refused():
    got, rng = loaded(QUICK), np.random.default_rng(0)
    known, unknown = spans.texts(got, Config(weights="random", length=64, characters=1000), rng)
    assert [x.shape for x in (*known, *unknown)] == [(1, 64)] * 3 + [(1, 128)] * 2
    assert len({bytes(np.asarray(x[0, :64], np.uint8)) for x in (*known, *unknown)}) == 5
    with pytest.raises(ValueError, match="characters is 100, which are 100 tokens: need 128, or more characters"):
        spans.texts(got, Config(weights="random", length=64, characters=100), rng)


def test_the_span_that_costs_as_much_lies_between_those_that_were_measured():
    config = Config(budgets=(0.125, 0.25, 0.5))
    costs = {(UNIFORM, b, 512): c for b, c in ((0.125, 1.0), (0.25, 0.5), (0.5, 0.1))}
    for goal, expected in ((1.0, 1), (0.5, 2), (0.75, 2**0.5), (0.0, 4), (2.0, 1)):
        found = spans.longer(config, costs | {(SEARCHED, 0.125, 512): goal}, 0.125)
        assert found == pytest.approx(expected)


def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("spans")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert [row["budget"] for row in result.tables["Cost of spans"]] == ["0.25"]
