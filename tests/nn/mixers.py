"""Mixers to test, and how they are run."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import nn
from jaxattn.nn import Tap, Tokens

B, T, D, N = 2, 11, 16, 2
X = jax.random.normal(jax.random.key(1), (B, T, D))


def build(spec, seed=0):
    """The mixer with its gates away from where they start, so that nothing is at zero."""
    mixer = nn.as_mixer(spec, features=D, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.2 * rng.standard_normal(x.shape).astype(np.float32)), params
    )
    return nnx.merge(graph, params, rest)


def call(mixer, x, *, positions=None, mask=None, state=None, context=None, record=(), edits=None):
    """(y, state, records)."""
    after = mixer.reached(state) if state else None
    tap = Tap(edits, record)
    y, state = mixer(x, Tokens.of(x, positions=positions, mask=mask, after=after), tap, state, context)
    return y, state, tap.records


run = nnx.jit(call, static_argnames="record")


def alone(mixer, *documents):
    """y of documents [t, D], at most B of them, that are rows of their own; one program for all lengths up to T."""
    positions = np.full((B, T), -1)
    x = np.zeros((B, T, D), np.float32)
    for row, document in enumerate(documents):
        x[row, : len(document)] = document
        positions[row, : len(document)] = np.arange(len(document))
    y, _, _ = run(mixer, jnp.asarray(x), positions=jnp.asarray(positions))
    return [y[row, : len(document)] for row, document in enumerate(documents)]


@nnx.jit(static_argnums=(1, 2))
def start(mixer, batch, capacity):
    return mixer.init_state(batch, capacity)


def assert_close(actual, expected, factor=1000):
    """Within `factor` float32 roundings of the largest number: some tens of products, norms and solves in a row."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    atol = factor * np.finfo(np.float32).eps * abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
