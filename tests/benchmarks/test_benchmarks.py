"""The benchmark runs, and its cases compute the same thing where they should."""

import jax
import numpy as np

from benchmarks.__main__ import call, cases, measure


def test_every_case_is_timed_and_weighed():
    for seconds, temporaries in measure(64, backward=True, turns=1).values():
        assert seconds > 0
        assert temporaries > 0


def test_the_causal_cases_agree():
    arrays = [jax.random.normal(key, (1, 64, 2, 8)) for key in jax.random.split(jax.random.key(0), 3)]
    causal = {name: options for name, options in cases(64).items() if name.endswith(", causal")}
    assert len(causal) == 3
    gradients = [call(options, backward=True)(*arrays) for options in causal.values()]
    for gradient in gradients[1:]:
        for ours, theirs in zip(gradient, gradients[0], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=20 * np.finfo(np.float32).eps * np.abs(theirs).max())
