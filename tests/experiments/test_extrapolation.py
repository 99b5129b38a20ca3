"""Extrapolation: the chains are what they say, and nothing predicts them better than their posterior."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import extrapolation
from experiments.extrapolation import CLAIMS, QUICK, TIMES, Config
from jaxattn.claims import report

LETTERS, CONCENTRATION = 3, 0.5


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("extrapolation")[1]


@pytest.fixture(scope="module")
def batch():
    config = dataclasses.replace(Config(), letters=LETTERS, concentration=CONCENTRATION, length=40)
    return extrapolation.task(config).draw(jax.random.key(0), 2000)


def test_targets_are_the_next_tokens_and_all_of_them_count(batch):
    tokens, targets = np.asarray(batch["tokens"]), np.asarray(batch["targets"])
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    assert set(np.unique(tokens)) == set(range(LETTERS))
    assert (np.asarray(batch["weights"]) == 1).all()


def test_the_posterior_counts_what_followed():
    """Of 0 1 0 1 1 0: after the last 0 came 1 twice, so p(1 | 0) = (2 + c) / (2 + 3 c); a new letter says nothing."""
    said = np.exp(extrapolation.posterior(np.array([[0, 1, 0, 1, 1, 0]]), LETTERS, CONCENTRATION))[0]
    np.testing.assert_allclose(said[0], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(said[5], np.array([0.5, 2.5, 0.5]) / 3.5, rtol=1e-6)
    np.testing.assert_allclose(said[4], np.array([1.5, 1.5, 0.5]) / 3.5, rtol=1e-6)


def test_the_posterior_is_calibrated(batch):
    """Chains are drawn as it believes: the mean of what it gives the letter 0 is how often that comes, everywhere."""
    said = np.exp(extrapolation.posterior(batch["tokens"], LETTERS, CONCENTRATION))[..., 0]
    came = np.asarray(batch["targets"]) == 0
    for low, high in ((0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1)):
        place = (low <= said) & (said < high)
        errors = np.where(place, came - said, 0).mean(1)  # tokens of one chain go together: by row
        assert abs(errors.mean()) < 4 * errors.std() / len(errors) ** 0.5


def test_no_smoothing_of_the_counts_predicts_better(batch):
    def loss(concentration):
        said = extrapolation.posterior(batch["tokens"], LETTERS, concentration)
        return -np.take_along_axis(np.asarray(said), np.asarray(batch["targets"])[..., None], -1).mean()

    assert loss(CONCENTRATION) < min(loss(CONCENTRATION / 2), loss(2 * CONCENTRATION))


def test_halves_are_means_and_end_at_the_length():
    config = dataclasses.replace(Config(), length=4)
    assert extrapolation.halves(config, [1.0, 3, 5, 7, 9, 11]) == [2, 6, 10]


def test_a_model_learns_chains_and_reads_longer_ones(quick):
    rows = {row["mixer"]: row for row in quick.tables["Loss"]}
    for times in TIMES:
        own, best = (rows[name][f"loss at {times} times the length"] for name in ("ALiBi", "best predictor"))
        assert best < own < np.log(QUICK.letters)
    lines = quick.figures["Loss by position"].lines
    assert [x for x, _ in lines["ALiBi"]] == [4 + 8 * number for number in range(16)]
    assert quick.numbers["ALiBi: loss grown at 8 times the length"] == pytest.approx(
        lines["ALiBi"][15][1] - lines["ALiBi"][1][1]
    )


def test_its_claims_can_be_judged(quick):
    assert {claim.number for claim in CLAIMS} <= quick.numbers.keys()
    assert [values[0] is None for claim, values, _ in report.judged(CLAIMS, [quick])] == [
        "ALiBi keeps" not in claim.says for claim in CLAIMS
    ]


def test_an_unknown_mixer_is_named(tmp_path):
    with pytest.raises(ValueError, match="mixers holds 'magic': there are rotary"):
        extrapolation.run(dataclasses.replace(QUICK, mixers=("magic",)), 0, tmp_path, Console(quiet=True))
