"""Prefixes are trained alone, tasks are what they say, and every claim is judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import decoders, prefixes
from experiments.prefixes import CLAIMS, KINDS, Digits
from jaxattn import models, nn
from jaxattn.claims import report


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_becomes_of_the_digits(kind):
    task = Digits(6, 4, (kind,))
    batch = task.sample(jax.random.key(0), 20)
    rows = np.concatenate([np.asarray(batch["tokens"]), np.asarray(batch["targets"])[:, -1:]], -1)
    given, answer = rows[:, :4], rows[:, 4:]
    expected = {
        "ascending": np.sort(given, -1),
        "descending": np.sort(given, -1)[:, ::-1],
        "plus one": np.where(given == 5, 0, given + 1),
        "plus two": (given + 2) % 6,
        "reversed": given[:, ::-1],
    }
    np.testing.assert_array_equal(answer, expected[kind])
    np.testing.assert_array_equal(batch["targets"][:, :-1], rows[:, 1:-1])
    np.testing.assert_array_equal(batch["weights"], np.broadcast_to([0, 0, 0, 1, 1, 1, 1], (20, 7)))
    perfect = jax.nn.one_hot(batch["targets"], 6)
    assert float(prefixes.right(perfect, batch)) == 1
    assert float(prefixes.right(perfect.at[:5, -1].set(0).at[5:, 0].set(0), batch)) >= 0.75  # only what is asked counts


def test_a_prefix_changes_nothing_but_itself_and_what_is_read():
    mixer = models.Spec(nn.MultiHeadAttention, heads=2, position=None)
    model = decoders.build(mixer, vocabulary=5, length=7, width=16, layers=2, seed=0)
    prefixed = prefixes.with_prefix(model, 3, 1)
    tokens = jnp.arange(14).reshape(2, 7) % 5
    assert prefixed(tokens)[0].shape == model(tokens)[0].shape
    own = nnx.state(prefixed, nnx.PathContains("prefix"))
    assert sum(x.size for x in jax.tree.leaves(own)) == 2 * 3 * 16
    rest = nnx.state(prefixed, nnx.All(nnx.Param, nnx.Not(nnx.PathContains("prefix"))))
    before = sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(rest)) == pytest.approx(before, rel=1e-6)


@pytest.mark.slow
def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("prefixes")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert len(result.tables["Sequences without a mistake"]) == 5
