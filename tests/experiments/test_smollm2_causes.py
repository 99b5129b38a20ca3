"""Why claims failed: copying measured from the stream on maps that copy, and a quick run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.smollm2_causes import CLAIMS, own_logit
from jaxattn.analysis import Factored
from jaxattn.claims import report


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("smollm2_causes")[1]


def test_a_head_that_copies_raises_the_logit_of_what_it_reads():
    """OV = I, −I and 0.1 times a random matrix, on tokens whose vectors are nearly orthogonal, 64 in 256 channels.

    The dot products of two such vectors have a deviation of √256, that of a vector with itself is 256: 16 deviations.
    """
    table = jax.random.normal(jax.random.key(0), (64, 256))
    random = jax.random.normal(jax.random.key(1), (256, 256))
    maps = jnp.stack([jnp.eye(256), -jnp.eye(256), 0.1 * random])[None]
    values = Factored(maps, jnp.broadcast_to(jnp.eye(256), maps.shape))
    copies, against, neither = own_logit(table[None], jnp.arange(64), values, table.T)[0]
    assert 14 < copies < 18
    np.testing.assert_allclose(against, -copies, rtol=1e-4)
    assert abs(neither) < 4 / 64**0.5  # the mean of 64 entries of deviation 1


def test_what_is_said_of_every_token_is_no_copying():
    """A head that writes one direction whatever it reads, twice as long for some tokens."""
    table = jax.random.normal(jax.random.key(0), (64, 32))
    one = jnp.zeros((32, 32)).at[:, 0].set(jax.random.normal(jax.random.key(1), (32,)))
    found = own_logit(table[None], jnp.arange(64), Factored(one[None, None], jnp.eye(32)[None, None]), table.T)
    assert abs(float(found[0, 0])) < 1


def test_a_quick_run_judges_every_claim(quick):
    assert {claim.number for claim in CLAIMS} <= quick.numbers.keys()
    report.judged(CLAIMS, [quick])
    assert [row["which"] for row in quick.tables["Heads that were looked at"]] == [
        "costliest early head",
        "head that restores most",
    ]
