"""Massive channels: norms against records, a planted one, and what clearing it does."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from jaxattn.analysis import (
    channel_norms,
    concentration,
    extreme_channels,
    massive_channels,
    pair_norms,
    without_channels,
)
from jaxattn.trace import run

B, T = 2, 7
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 64)
PLACES = jnp.asarray([[*range(T)], [-1, -1, *range(T - 2)]])


@pytest.fixture(scope="module")
def model():
    return planted.random(layers=2, heads=4)


def test_norms_are_those_of_the_records_without_padding(model):
    sites = ("q", "k", "q_rotated", "k_rotated", "v")
    found = channel_norms(model, TOKENS, sites, positions=PLACES)
    records = run(model, TOKENS, record=sites, positions=PLACES)[1]
    seen = np.asarray(PLACES >= 0)[..., None, None]
    for site in sites:
        x = np.where(seen, np.asarray(records[site], np.float64), 0)
        np.testing.assert_allclose(found[site], (x**2).sum((1, 2)) ** 0.5, rtol=1e-5)
        np.testing.assert_allclose((found[site] ** 2).sum(), (x**2).sum(), rtol=1e-5)  # Frobenius
    # Rotation mixes the channels of a pair, and keeps its norm.
    assert not np.allclose(found["q"], found["q_rotated"], rtol=1e-2)
    for name in ("q", "k"):
        np.testing.assert_allclose(pair_norms(found[name]), pair_norms(found[f"{name}_rotated"]), rtol=1e-5)
    swapped = channel_norms(model, TOKENS[::-1], sites, positions=PLACES[::-1])
    np.testing.assert_allclose(swapped["v"], found["v"], rtol=1e-5)


def test_a_planted_channel_is_massive_and_the_others_are_not():
    """One of 16 channels of size 100 among ones: 100 / (115 / 16) times the mean; nothing among normal numbers."""
    norms = np.ones((2, 3, 16), np.float32)
    norms[0, 1, 5] = 100
    expected = norms > 50
    np.testing.assert_array_equal(massive_channels(norms), expected)
    np.testing.assert_array_equal(extreme_channels(norms, 1)[0, 1], expected[0, 1])
    np.testing.assert_array_equal(np.flatnonzero(extreme_channels(norms, 2)[1, 0]), [0, 1])  # ties by number
    np.testing.assert_array_equal(extreme_channels(norms, 15, smallest=True)[0, 1], ~expected[0, 1])
    assert concentration(norms)[0, 1] == pytest.approx(100 / (115 / 16))
    assert concentration(norms)[1, 2] == 1
    assert concentration(jnp.zeros(4)) == 0
    random = jnp.sqrt(jnp.square(jax.random.normal(jax.random.key(0), (100, 64, 16))).sum(0))
    assert not massive_channels(random).any()
    with pytest.raises(ValueError, match="count is 17: need at most 16"):
        extreme_channels(norms, 17)


@pytest.mark.parametrize("value", [None, 0.0])
def test_cleared_channels_have_one_value_and_others_their_own(model, value):
    on = {
        site: jax.random.bernoulli(jax.random.key(3), 0.3, (2, heads, 8))
        for site, heads in (("q_rotated", 4), ("k_rotated", 2))
    }
    options = {"record": ("q_rotated", "k_rotated", "scores"), "positions": PLACES}
    edited = run(model, TOKENS, edits=without_channels(on, value), **options)[1]
    plain = run(model, TOKENS, **options)[1]
    seen = np.asarray(PLACES >= 0)
    layer = 0  # later layers have other inputs
    for site in on:
        x, y, mask = np.asarray(plain[site][layer]), np.asarray(edited[site][layer]), np.asarray(on[site][layer])
        for row, head in np.ndindex(x.shape[0], x.shape[2]):
            chosen = x[row, seen[row]][:, head][:, mask[head]]
            expected = 0 if value is not None else chosen.mean() if mask[head].any() else 0
            np.testing.assert_allclose(y[row, :, head][:, mask[head]], expected, atol=1e-5)
            np.testing.assert_array_equal(y[row, :, head][:, ~mask[head]], x[row, :, head][:, ~mask[head]])
    nothing = without_channels({site: jnp.zeros_like(each) for site, each in on.items()}, value)
    np.testing.assert_array_equal(run(model, TOKENS, edits=nothing, **options)[1]["scores"], plain["scores"])
