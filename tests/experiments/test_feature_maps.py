"""Feature maps against softmax: the measures are right, the formulas are those of independent draws, and at the quick
size the claims that need no scale come out confirmed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import feature_maps
from experiments.feature_maps import CLAIMS, QUICK, formula
from jaxattn.claims import report
from jaxattn.core.linear import TaylorFeatures

# Slopes need a longer range of counts than the quick size has, and their verdict there is chance.
OF_SCALE = {claim.number for claim in CLAIMS if claim.number.startswith("slope")}


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("feature_maps")[1]


def test_the_slope_of_a_power_is_its_exponent():
    assert feature_maps.slope([(x, 3 * x**-0.5) for x in (8.0, 16.0, 64.0)]) == pytest.approx(-0.5)


def test_measures_of_equal_and_of_known_weights():
    p = jnp.array([[0.5, 0.5, 0.0, 0.0]])
    q = jnp.full((1, 4), 0.25)
    assert feature_maps.error(p, p) == feature_maps.divergence(p, p) == 0
    np.testing.assert_allclose(feature_maps.error(p, q), 1)
    np.testing.assert_allclose(feature_maps.entropy(p), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(feature_maps.divergence(p, q), np.log(2), rtol=1e-6)


def test_weights_of_a_map_are_its_kernel_by_row():
    query, key = jax.random.normal(jax.random.key(0), (2, 5, 2, 4)) / 2
    made = feature_maps.weights(TaylorFeatures(2), query, key)
    scores = np.einsum("tnh,snh->nts", query, key) / 2
    kernel = 1 + scores + scores**2 / 2
    np.testing.assert_allclose(made, kernel / kernel.sum(-1, keepdims=True), rtol=1e-5)


def test_the_formulas_are_those_of_the_paper_at_points_worked_out_by_hand():
    """At cosine 0, |x+y|² = |x−y|² = 2 and the kernel is 1: e²(1 − e⁻²) = e² − 1 and e²(1 − e⁻²)² / 2."""
    np.testing.assert_allclose(formula("positive", 0.0, 1), np.exp(2) - 1)
    np.testing.assert_allclose(formula("hyperbolic", 0.0, 1), (np.exp(2) - 1) * (1 - np.exp(-2)) / 2)
    np.testing.assert_allclose(formula("trigonometric", 0.0, 1), np.exp(2) * (1 - np.exp(-2)) ** 2 / 2)
    np.testing.assert_allclose(formula("positive", -0.9, 16), 0.0138, atol=1e-4)
    np.testing.assert_allclose(formula("trigonometric", -0.9, 16), 1.335, atol=1e-3)
    assert formula("positive", -1.0, 16) == 0
    assert formula("trigonometric", 1.0, 16) == 0


def test_the_first_of_many_directions_are_as_good_as_few():
    """The error with the first m of many directions is that of a map with m directions, up to its spread."""
    query, key = jax.random.normal(jax.random.key(0), (2, 16, 1, 8)) / 2
    few, many = (
        feature_maps.random_error(jax.random.key(seed), query, key, jnp.array([4]), "positive", "chi", most, 256)[0]
        for seed, most in ((1, 4), (2, 16))
    )
    np.testing.assert_allclose(few, many, rtol=0.1)


def test_every_claim_has_its_number_and_the_exact_ones_are_confirmed(quick):
    for claim, values, verdict in report.judged(CLAIMS, [quick]):
        assert values[0] is not None
        if claim.number not in OF_SCALE:
            assert verdict == "confirmed", (claim, values)


def test_every_map_is_in_the_table_and_softmax_is_its_own_best_mimic(quick):
    rows = {row["map"]: row for row in quick.tables["Mimicry of softmax"]}
    assert {"softmax", "elu+1", "Taylor, degree 2", "Hedgehog", "Hedgehog, exp"} <= rows.keys()
    assert rows["softmax"]["divergence"] == pytest.approx(0, abs=1e-5)
    assert all(row["divergence"] > 0.1 for name, row in rows.items() if name != "softmax")
    assert rows["Hedgehog"]["divergence"] < rows["Hedgehog, untrained"]["divergence"]


def test_errors_fall_with_the_number_of_features(quick):
    lines = quick.figures["Error of attention"].lines
    for name, points in lines.items():
        errors = [y for _, y in points]
        assert errors == sorted(errors, reverse=True), name
    assert [x for x, _ in lines["positive"]] == list(QUICK.counts)
    assert [x for x, _ in lines["Taylor"]] == [17, 153, 969]
