"""Relations read from weights: heads that hold a permutation by construction, and chance."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from flax import nnx

from jaxattn import nn
from jaxattn.analysis import dynamic_scores, hit_rate, relation_scores, salient_tokens, token_vectors
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm
from jaxattn.trace import run

V, D = 12, 12
ORDER = np.random.default_rng(0).permutation(V)


@pytest.fixture(scope="module")
def model():
    """Layer 0: head 0 copies, head 1 suppresses what it reads, head 2 maps token t to ORDER[t], head 3 does nothing.

    The table is orthogonal and not the identity, and so is that of the outputs: W_VO = E⁻¹ P U⁻¹.
    """
    attention = Spec(nn.MultiHeadAttention, heads=4, head_dim=D, position=None)
    config = TransformerConfig(V, 8, D, [pre_norm(attention, None, None)], norm=None)
    model = Transformer(config, rngs=nnx.Rngs(0))
    table = np.linalg.qr(np.random.default_rng(1).standard_normal((V, D)))[0]
    model.embed.table[...] = jnp.asarray(table, jnp.float32)
    maps = np.stack([np.eye(V), -np.eye(V), np.eye(V)[ORDER], np.zeros((V, V))])
    module = model.runs[0].branches[0].module
    module.value.kernel[...] = jnp.tile(jnp.eye(D), (1, 1, 4))
    module.out.kernel[...] = jnp.asarray(table.T @ maps @ table, jnp.float32).reshape(1, 4 * D, D)
    model.eval()
    return model


def test_a_head_that_holds_a_permutation_scores_one_on_it(model):
    every = jnp.arange(V)
    copy, mapped = (relation_scores(model, every, t, k=1, first_block=False) for t in (every, jnp.asarray(ORDER)))
    fixed = float((np.arange(V) == ORDER).mean())
    np.testing.assert_allclose(copy.score[0], [1, 0, fixed, 0], atol=1e-6)
    assert copy.suppression[0, 1] == 1
    assert (copy.score[0, 0], copy.suppression[0, 0]) == (1, 0)
    np.testing.assert_allclose(mapped.score[0, jnp.array([0, 2, 3])], [fixed, 1, 0], atol=1e-6)
    assert copy.chance == pytest.approx(1 / V)


def test_relations_of_random_heads_are_at_chance():
    """k / V = 10 / 64 on 64 pairs and 32 heads: a share of the mean with a deviation of 0.008 if all were apart."""
    found = relation_scores(planted.random(), jnp.arange(64), jnp.asarray(np.random.default_rng(0).permutation(64)))
    assert found.chance == 10 / 64
    assert abs(float(found.score.mean()) - found.chance) < 0.05
    assert found.score.shape == (4, 8)


def test_the_rate_counts_targets_among_the_largest():
    logits = jnp.array([[3.0, 2, 1, 0], [0, 0, 0, 0], [jnp.nan, 1, 2, 3], [1, 2, 2, 0]])
    np.testing.assert_allclose(hit_rate(logits, jnp.array([1, 0, 0, 1]), 2), 2 / 4)
    np.testing.assert_allclose(hit_rate(logits, jnp.array([1, 0, 3, 1]), 1), 1 / 4)
    random = jax.random.normal(jax.random.key(0), (20000, 20))
    rate = hit_rate(random, jnp.zeros(20000, int), 3)
    assert abs(rate - 3 / 20) < 5 * (3 / 20 * 17 / 20 / 20000) ** 0.5
    with pytest.raises(ValueError, match="k is 4: need 1 to 3"):
        hit_rate(logits, jnp.zeros(4, int), 4)


def test_later_layers_read_what_the_first_block_makes_of_tokens():
    """E' = MLP_0(norm(E)) by hand, and the first layer reads E."""
    model = planted.random(layers=2, heads=2, vocabulary=20)
    table, branch = model.embed.table[...], model.runs[0].branches[1]
    scale = branch.norm.scale[...][0]
    normed = table / np.sqrt((np.asarray(table) ** 2).mean(-1, keepdims=True) + 1e-6) * scale
    weights = {
        name: kernel[...][0] for name, kernel in (("up", branch.module.up.kernel), ("down", branch.module.down.kernel))
    }
    gate = branch.module.gate.kernel[...][0]
    expected = (jax.nn.silu(normed @ gate) * (normed @ weights["up"])) @ weights["down"]
    np.testing.assert_allclose(token_vectors(model), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(token_vectors(model, first_block=False), table, rtol=1e-6)
    pairs = jnp.arange(20), jnp.roll(jnp.arange(20), 1)
    with_block, without = (relation_scores(model, *pairs, first_block=on).score for on in (True, False))
    np.testing.assert_array_equal(with_block[0], without[0])
    assert (with_block[1] != without[1]).any()


def test_dynamic_scores_of_one_source_are_those_of_weights(model):
    """A prompt whose last row reads the source alone: what the head writes is E[source] W_VO."""
    sources, tokens = jnp.array([2, 0, 1]), jax.random.randint(jax.random.key(0), (3, 5), 0, V)
    source = jnp.take_along_axis(tokens, sources[:, None], 1)[:, 0]
    for target in (source, jnp.asarray(ORDER)[source]):
        found = dynamic_scores(model, tokens, target, k=1, sources=sources)
        np.testing.assert_allclose(found, relation_scores(model, source, target, k=1, first_block=False).score)
    # Attention is uniform, since queries are random and small: the mean over tokens, by hand.
    z = run(model, tokens, record=("z",))[1]["z"][0, :, -1]
    out = model.runs[0].branches[0].module.out.kernel[...].reshape(4, D, D)
    logits = np.einsum("bnh,nhe,ve->nbv", z, out, model.embed.table[...])
    expected = [(each.argmax(-1) == np.asarray(source)).mean() for each in logits]
    found = dynamic_scores(model, tokens, source, k=1)[0]
    np.testing.assert_allclose(found[:3], expected[:3], atol=1e-6)
    with pytest.raises(ValueError, match="sources has shape"):
        relation_scores(model, jnp.arange(3), jnp.arange(2))


def test_salient_tokens_are_those_that_are_changed_most(model):
    top, promoted = salient_tokens(model, 0, 2, sources=V, targets=1, first_block=False)
    np.testing.assert_array_equal(promoted[:, 0], ORDER[np.asarray(top)])
    assert sorted(top.tolist()) == list(range(V))
