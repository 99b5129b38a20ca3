"""Gated copying against its definition, and the attention that must solve it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.icl import GatedCopy


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(("dim", "length"), [(1, 2), (3, 7)])
def test_answers_are_the_content_before_where_the_flag_is_set_and_else_0(start, dim, length):
    task = GatedCopy(dim, length, 0.5, start)
    prompt = task.sample(jax.random.key(0), 50)
    content, flag, mark = (np.asarray(x) for x in (prompt.x[..., :dim], prompt.x[..., dim], prompt.x[..., dim + 1]))
    assert prompt.x.shape == (50, length, task.width)
    np.testing.assert_array_equal(flag, prompt.hidden)
    for t in range(1, length):
        np.testing.assert_array_equal(prompt.y[:, t], flag[:, t, None] * content[:, t - 1])
    np.testing.assert_array_equal(prompt.weights, np.broadcast_to(np.arange(length) > 0, (50, length)))
    np.testing.assert_array_equal(mark, np.broadcast_to((np.arange(length) == 0) & start, (50, length)))
    assert (content[:, 0] == 0).all() == start
    assert set(np.unique(flag[:, 1:])) == {0, 1}


def test_always_and_never_are_probabilities_and_others_are_refused():
    assert GatedCopy(2, 5, 1).sample(jax.random.key(0), 4).hidden[:, 1:].all()
    assert not GatedCopy(2, 5, 0).sample(jax.random.key(0), 4).y.any()
    with pytest.raises(ValueError, match=r"probability holds 1\.5: need numbers from 0 to 1"):
        GatedCopy(2, 5, 1.5)
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        GatedCopy(2, 1)


def test_attention_that_rests_on_a_start_token_without_a_value_solves_it():
    prompt = GatedCopy(3, 6).sample(jax.random.key(1), 8)
    to_previous, to_start = jnp.eye(6, k=-1), jnp.zeros((6, 6)).at[:, 0].set(1)
    weights = jnp.where(prompt.hidden[..., None], to_previous, to_start)
    read = weights @ prompt.x[..., :3]
    np.testing.assert_array_equal(jnp.where(prompt.weights[..., None] > 0, read, 0), prompt.y)
