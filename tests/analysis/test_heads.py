"""Head statistics against their closed forms."""

import jax.numpy as jnp
import numpy as np

from jaxattn.analysis import head_statistics


def test_uniform_causal_attention_has_harmonic_sink_mass_and_log_entropy():
    # Row i spreads 1 over i keys: sink mass H_T / T (0.0741 at T = 64), entropy the mean of log i.
    length = 64
    weights = jnp.tril(jnp.ones((length, length))) / jnp.arange(1, length + 1)[:, None]
    found = head_statistics(weights[None, None, None])
    np.testing.assert_allclose(found.sink_mass, np.sum(1 / np.arange(1, 65)) / 64, rtol=1e-6)
    np.testing.assert_allclose(found.sink_mass, 0.0741, atol=5e-5)
    np.testing.assert_allclose(found.entropy, np.mean(np.log(np.arange(1, 65))), rtol=1e-6)


def test_rows_are_normalised_first_and_empty_rows_left_out():
    weights = jnp.array([[3.0, 1.0], [0.0, 0.0]])[None, None, None]
    found = head_statistics(weights)
    np.testing.assert_allclose(found.sink_mass, [[0.75]], rtol=1e-6)
    np.testing.assert_allclose(found.entropy, [[-0.75 * np.log(0.75) - 0.25 * np.log(0.25)]], rtol=1e-6)
    assert head_statistics(jnp.zeros((1, 1, 2, 3, 3))).entropy.tolist() == [[0, 0]]


def test_layers_and_heads_keep_their_places():
    to_first, to_self = jnp.zeros((4, 4)).at[:, 0].set(1), jnp.eye(4)
    weights = jnp.stack([jnp.stack([to_first, to_self]), jnp.stack([to_self, to_self])])[:, None]  # [L, B, N, T, S]
    np.testing.assert_allclose(head_statistics(weights).sink_mass, [[1, 0.25], [0.25, 0.25]])
