"""Layers that rest on a token are measured as their weights say, and every claim is judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sinks
from experiments.sinks import CLAIMS, LAYERS, Config
from jaxattn import icl
from jaxattn.claims import report

SMALL = Config(dim=2, length=5, head_dim=4, prompts=256)


def drawn_params(width):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {name: jax.random.normal(key, (width, 4)) for name, key in zip(("query", "key"), keys[:2], strict=True)}
    return params | {"value": jax.random.normal(keys[2], (width, 2)), "extra": jax.random.normal(keys[3], (4,))}


def test_an_extra_key_with_value_0_adds_its_weight_to_the_denominator():
    x = icl.GatedCopy(2, 5).sample(jax.random.key(1), 3).x
    params = drawn_params(4 + 5)
    answers, weights = sinks.read(LAYERS["extra key"], params, x)
    plain, without = sinks.read(LAYERS["softmax"], params, x)
    tokens = sinks.features(x)
    query, key = tokens @ params["query"], tokens @ params["key"]
    scores = jnp.where(np.tri(5, dtype=bool), query @ key.swapaxes(1, 2) / 2, -jnp.inf)
    log = jax.nn.logsumexp(scores, -1)
    kept = jax.nn.sigmoid(log - query @ params["extra"] / 2)[..., None]
    np.testing.assert_allclose(answers, kept * plain, atol=1e-5)
    np.testing.assert_allclose(weights[..., :-1], kept * without, atol=1e-5)
    far = params | {"extra": jnp.zeros(4)}
    np.testing.assert_allclose(
        sinks.read(LAYERS["off by one"], far, x)[0], sinks.read(LAYERS["extra key"], far, x)[0], atol=1e-6
    )


def test_weights_of_sigmoid_do_not_depend_on_other_keys_and_those_of_softmax_do():
    x = icl.GatedCopy(2, 5).sample(jax.random.key(1), 1).x
    changed = x.at[0, 1].add(1.0)
    for name, alike in (("sigmoid", True), ("softmax", False)):
        one, other = (sinks.read(LAYERS[name], drawn_params(4 + 5), each)[1][0, 2:, 2:] for each in (x, changed))
        assert bool((one == other).all()) == alike


def test_a_layer_built_by_hand_rests_on_a_start_token_without_a_value():
    """Queries with a flag look for the position before theirs, and the others for the mark of the start."""
    length, dim, sharp = 5, 2, 60.0
    query, key = np.zeros((dim + 2 + length, length)), np.zeros((dim + 2 + length, length))
    query[dim + 2 + np.arange(1, length), np.arange(length - 1)] = sharp  # position t asks for t − 1
    key[dim + 2 + np.arange(length), np.arange(length)] = 1
    query[dim, -1], query[dim + 2 :, -1] = -2 * sharp, 1.5 * sharp  # the last channel asks for the start, but for flags
    key[dim + 1, -1], key[-1, -1] = 1, 0
    value = np.zeros((dim + 2 + length, dim))
    value[:dim] = np.eye(dim)
    params = {
        name: jnp.asarray(each, jnp.float32)
        for name, each in zip(("query", "key", "value"), (query, key, value), strict=True)
    }
    found = sinks.measure(SMALL, "softmax", True, params, 0)
    assert found["error"] < 1e-10
    assert found["mass on it, no flag"] > 0.999 > 0.001 > found["mass on it, flag"]
    assert found["value of the start over others"] == 0
    assert found["error with the start hidden over error"] > 100


@pytest.mark.slow
def test_a_quick_run_judges_every_claim(quick_run):
    result = quick_run("sinks")[1]
    assert {claim.number for claim in CLAIMS} <= result.numbers.keys()
    report.judged(CLAIMS, [result])
    assert 0 <= result.numbers["sink rate, text"] <= 1
