"""Overlaps and sizes of circuits, and a quick run."""

import dataclasses

import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments import circuits
from experiments.circuits import CLAIMS, QUICK, overlap, smallest
from jaxattn import trace
from jaxattn.claims import report


def test_overlap_is_the_share_of_edges_that_are_in_both():
    sizes = {"query": (3, 1, 1), "key": (3, 1, 1), "value": (3, 1, 1), "mlp": (3, 1), "output": (3,)}
    none = trace.Circuit(**{name: jnp.zeros(shape, bool) for name, shape in sizes.items()})
    one = dataclasses.replace(none, output=jnp.array([True, True, False]))
    other = dataclasses.replace(one, key=jnp.ones((3, 1, 1), bool), output=jnp.array([True, False, False]))
    assert overlap(one, one) == 1
    assert overlap(one, other) == 1 / 5
    assert overlap(none, none) is None


def test_a_circuit_is_faithful_where_all_larger_ones_are():
    assert smallest((1, 2, 4, 8), [0.1, 0.9, 0.7, 1.0]) == 8
    assert smallest((1, 2, 4, 8), [0.1, 0.9, 0.8, 1.0]) == 2
    assert smallest((1, 2), [1.0, 0.1]) is None


def test_steps_that_do_not_ascend_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"steps is \(5,\)"):
        circuits.run(dataclasses.replace(QUICK, steps=(5,)), 0, tmp_path, Console(quiet=True))


def test_a_quick_run_judges_every_claim(quick_run):
    quick = quick_run("circuits")[1]
    assert {claim.number for claim in CLAIMS} <= quick.numbers.keys()
    report.judged(CLAIMS, [quick])
    assert [row["step"] for row in quick.tables["Looks"]] == [5, 10]
    for points in quick.figures["Faithfulness by edges"].lines.values():
        assert points[-1][1] == pytest.approx(1, abs=1e-2)  # all edges are the model
