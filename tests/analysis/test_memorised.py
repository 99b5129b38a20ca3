"""Gradients by part, sparse updates, and single tokens that are replaced, against loops and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from flax import nnx

from jaxattn.analysis import gradient_sizes, largest_gradients, masked_update, rarity_correlation, replace_tokens

TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 20)


def test_gradients_are_means_of_absolute_values_by_layer():
    model = planted.random(layers=2, heads=2, vocabulary=20)
    graph, params = nnx.split(model)

    def loss(params):
        logits = nnx.merge(graph, params)(TOKENS)[0][:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], -1).mean()

    gradients = jax.jit(jax.grad(loss))(params)
    found = gradient_sizes(gradients)
    query = found["runs.0.branches.0.module.query.kernel"]
    plain = nnx.merge(graph, gradients)
    for layer in range(2):
        each = plain.runs[0].branches[0].module.query.kernel[...][layer]
        np.testing.assert_allclose(query[layer], np.abs(each).mean(), rtol=1e-5)
    assert found["embed.table"].shape == ()
    assert all((np.asarray(x) > 0).all() for x in found.values())


def test_the_largest_gradients_are_chosen_over_all_parameters():
    gradients = {"a": jnp.array([1.0, -5, 2]), "b": jnp.array([[3.0, 0], [-4, 0.5]])}
    mask = largest_gradients(gradients, 3 / 7)
    assert mask["a"].tolist() == [False, True, False]
    assert mask["b"].tolist() == [[True, False], [True, False]]
    kept = masked_update(gradients, mask)
    assert kept["a"].tolist() == [0, -5, 0]
    every, none = (masked_update(gradients, largest_gradients(gradients, share)) for share in (1, 0))
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), every, gradients))
    assert not any(leaf.any() for leaf in jax.tree.leaves(none))
    with pytest.raises(ValueError, match="share is 2"):
        largest_gradients(gradients, 2)


def test_the_planted_circuit_breaks_where_the_token_that_is_copied_is_replaced():
    """Behind 4 5 6 7 8 9 5 the circuit copies 6 7 8 from the prefix; what is replaced there is copied as it is."""
    circuit, tokens = planted.planted(), jnp.array([4, 5, 6, 7, 8, 9, 5, 6, 7, 8])
    found = replace_tokens(circuit, tokens, 7, jnp.array([1, 1, 1, 1, 1, 1, 5]))
    assert found.before == 3
    assert found.matched.tolist() == [3, 0, 0, 1, 2, 3, 3]  # 4 and 9 are not asked for, and 5 is the same token
    assert found.loss[6] == 0
    assert (found.loss[1:5] > 0.5).all()
    assert (abs(found.loss[jnp.array([0, 5])]) < 0.1).all()
    with pytest.raises(ValueError, match="prefix is 10 of 10 tokens"):
        replace_tokens(circuit, tokens, 10, jnp.zeros(10, int))


def test_a_head_that_looks_at_rare_tokens_follows_them_and_equal_weights_do_not():
    circuit = planted.planted()
    tokens = jnp.array([[5, 6, 5, 7, 6, 8, 9, 5]])
    log_frequency = -jax.random.uniform(jax.random.key(0), (16,))
    found = np.asarray(rarity_correlation(circuit, tokens, log_frequency))
    w = np.asarray(circuit(tokens, record=("weights",))[2]["weights"])[:, 0]
    rare = -np.asarray(log_frequency)[np.asarray(tokens[0])]
    for head in (0, 2):
        rows = [np.corrcoef(w[0, head, i, : i + 1], rare[: i + 1])[0, 1] for i in range(1, 8)]
        np.testing.assert_allclose(found[0, head], np.mean(rows), rtol=1e-3, atol=1e-4)
    assert np.isnan(found[1, 1:]).all()  # equal weights
    with pytest.raises(ValueError, match="positions is given"):
        rarity_correlation(circuit, tokens, log_frequency, positions=jnp.arange(8))
