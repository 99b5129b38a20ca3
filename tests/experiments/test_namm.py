"""The texts of `namm` ask for what they hold, a run counts what a store keeps, the search is an optional package."""

import builtins
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from experiments import decoders, namm
from experiments.namm import CLAIMS, QUICK
from jaxattn import Causal, models, nn
from jaxattn.cache import HeavyHitters, Policy


def test_texts_hold_pairs_and_fillers_in_any_order_and_then_ask_for_every_key():
    batch = jax.tree.map(np.asarray, namm.draw(QUICK, jax.random.key(0), 5))
    context = QUICK.pairs + QUICK.fillers
    key, value, kind, mark = np.split(batch["x"], np.cumsum([QUICK.keys, QUICK.values, QUICK.kinds]), -1)
    assert batch["x"].shape == (5, namm.length(QUICK), namm.inputs(QUICK))
    for row in range(5):
        pairs = {int(key[row, t].argmax()): int(value[row, t].argmax()) for t in range(context) if key[row, t].any()}
        assert len(pairs) == QUICK.pairs
        assert kind[row, :context].sum() == QUICK.fillers
        assert not value[row, context:].any()
        asked = key[row, context:].argmax(-1)
        assert sorted(asked) == sorted(pairs)
        np.testing.assert_array_equal([pairs[k] for k in asked], batch["targets"][row, context:])
    np.testing.assert_array_equal(mark[..., 0], batch["weights"])
    np.testing.assert_array_equal(batch["weights"], np.arange(namm.length(QUICK)) >= context + np.zeros((5, 1)))
    places = {tuple(key[row, :context].any(-1)) for row in range(5)}
    assert len(places) > 1


@pytest.fixture(scope="module")
def untrained():
    spec = models.Spec(nn.MultiHeadAttention, heads=2, position=None, mask=Causal())
    model = decoders.build(spec, vocabulary=QUICK.values, length=namm.length(QUICK), width=16, layers=1, seed=0,
                           inputs=namm.inputs(QUICK))  # fmt: skip
    return model, *nnx.split(model)


def test_reading_token_by_token_is_the_full_pass_with_a_whole_cache_and_counts_what_is_held(untrained):
    model, graph, arrays = untrained
    batch = namm.draw(QUICK, jax.random.key(1), 6)
    right, held, _ = jax.jit(lambda batch: namm.read(graph, arrays, batch, Policy()))(batch)
    answers = model(batch["x"])[0].argmax(-1) == batch["targets"]
    assert float(right) == pytest.approx(float((answers * batch["weights"]).sum() / batch["weights"].sum()))
    assert float(held) == pytest.approx(np.mean(np.arange(13, 17)))  # of 12 tokens and 1 to 4 questions
    few = Policy(HeavyHitters(0, 2), QUICK.slots)
    assert float(jax.jit(lambda batch: namm.read(graph, arrays, batch, few)[1])(batch)) == QUICK.slots


def test_features_begin_at_mean_0_and_size_1_and_a_scorer_without_weights_keeps_what_is_new(untrained):
    _, graph, arrays = untrained
    scorer = namm.start(QUICK, graph, arrays, 0)
    assert (scorer.spread > 0).all()
    assert float(abs(scorer.center).max()) > 0
    batch = namm.draw(QUICK, jax.random.key(1), 6)
    held = jax.jit(lambda batch: namm.read(graph, arrays, batch, namm.policy_of(QUICK, scorer))[1])(batch)
    assert 1 <= float(held) <= QUICK.every


def test_what_is_missing_or_does_not_fit_is_said(untrained, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="slots is 4: need more than 4 pairs, fewer than 16 tokens"):
        namm.run(dataclasses.replace(QUICK, slots=4), 0, tmp_path, Console(quiet=True))
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.startswith("evosax"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"evosax is not installed: need `pip install jaxattn\[evolve\]`"):
        namm.evolve(QUICK, *untrained[1:], 0, Console(quiet=True))


def test_a_quick_run_measures_every_claim(quick_run):
    pytest.importorskip("evosax")
    result = quick_run("namm")[1]
    assert {claim.number for claim in CLAIMS} <= set(result.numbers)
    rows = result.tables["Policies of as many slots"]
    assert len(rows) == 12
    assert all(row["tokens held"] <= QUICK.slots for row in rows if row["policy"] != "whole cache")
    assert jnp.isfinite(jnp.array([y for _, y in result.figures["Accuracy by generation"].lines["evolution"]])).all()
