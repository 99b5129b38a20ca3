"""What the experiment on a trained model measures, on a small one: its grid, its draws, and a quick run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import inside_smollm2
from experiments.inside_smollm2 import CLAIMS, QUICK, Config, OneOfEach
from jaxattn import trace
from jaxattn.claims import report
from jaxattn.models import pretrained


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("inside_smollm2")[1]


def test_one_head_of_each_layer_is_that_entry_of_the_table_of_all_heads():
    model, tokens = inside_smollm2.loaded(QUICK).model, jnp.arange(12)[None]
    chosen = jnp.asarray([2, 0, 3])
    some = OneOfEach((3,), ("layer",), jnp.ones((3, 1), bool), "z", trace.Layers(trace.Scale(jnp.zeros(3))), None, None)

    def loss(edits):
        return inside_smollm2.nll(model(tokens, edits=edits)[0], tokens).mean()

    every = trace.sweep(loss, trace.heads(model), chunk=4)
    found = trace.sweep(loss, dataclasses.replace(some, chosen=chosen))
    np.testing.assert_allclose(found, every[np.arange(3), chosen], rtol=1e-6)
    assert np.ptp(np.asarray(every)) > 1e-4


def test_the_loss_is_that_of_the_next_token():
    logits, tokens = jax.random.normal(jax.random.key(0), (1, 4, 5)), jnp.asarray([[3, 1, 0, 4]])
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = [-np.log(p[0, 0, 1]), -np.log(p[0, 1, 0]), -np.log(p[0, 2, 4])]
    np.testing.assert_allclose(inside_smollm2.nll(logits, tokens)[0], expected, rtol=1e-5)


def test_heads_are_chosen_by_score_and_drawn_among_others():
    scores = np.asarray([[0.1, 0.9, 0.3], [0.8, 0.2, 0.3]])
    best = inside_smollm2.best(scores, 3)
    np.testing.assert_array_equal(best, [[0, 1, 1], [1, 0, 0]])  # the first of two equal ones
    drawn = inside_smollm2.drawn(~best, 2, 50, np.random.default_rng(0))
    assert (drawn.sum((1, 2)) == 2).all()
    assert not (drawn & best).any()
    assert len({each.tobytes() for each in drawn}) == 3  # all pairs of three
    assert (inside_smollm2.drawn(~best, 9, 2, np.random.default_rng(0)) == ~best).all()


def test_weights_that_are_not_there_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="weights holds 'smollm3': did you mean 'smollm2'"):
        inside_smollm2.loaded(Config(weights="smollm3"))
    monkeypatch.setattr(pretrained, "fetched", lambda name: None)
    with pytest.raises(ValueError, match="not on this machine: python -m jaxattn weights smollm2"):
        inside_smollm2.loaded(Config())
    with pytest.raises(ValueError, match=r"top is 5: need one of removed, \(1, 2\)"):
        inside_smollm2.run(dataclasses.replace(QUICK, top=5), 0, tmp_path, Console(quiet=True))


def test_a_quick_run_judges_every_claim(quick):
    assert {claim.number for claim in CLAIMS} <= quick.numbers.keys()
    report.judged(CLAIMS, [quick])
    assert len(quick.tables["Heads"]) == 12
    for points in quick.figures["Loss by heads removed"].lines.values():
        assert points[0] == [0, pytest.approx(quick.numbers["loss on the second copy"], rel=1e-5)]
        assert [count for count, _ in points] == [0, 1, 2]
