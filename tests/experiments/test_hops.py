"""Accuracies are by number of hops, and every claim on depth is judged."""

import jax
import numpy as np

from experiments import hops
from experiments.hops import CLAIMS, QUICK
from jaxattn import icl
from jaxattn.claims import report


def test_accuracies_are_those_of_each_number_of_hops():
    """A model that follows the pointers has 1 everywhere, and one that answers the query has the shortcut's."""
    look = hops.looks(QUICK)

    def model(predictor, count):
        return lambda x: (jax.nn.one_hot(predictor(x, x), count),)

    perfect = look(model(icl.PointerChasing(QUICK.symbols), 8), None)
    assert {name: float(x) for name, x in perfect.items()} == {"hops 1": 1.0, "hops 2": 1.0}
    echo = look(model(icl.Echo(), 8), None)
    for count in (1, 2):
        chance = icl.echo_accuracy(QUICK.symbols, count)
        error = np.sqrt(chance * (1 - chance) / QUICK.tested)
        assert abs(float(echo[f"hops {count}"]) - chance) < 4 * error


def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("hops")[1]
    report.judged(CLAIMS, [result])
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    rows = result.tables["Accuracy by hops"]
    assert [(row["layers"], row["trained on"]) for row in rows] == [
        (layers, prompts) for layers in (1,) for prompts in ("all hops", "most hops")
    ]
