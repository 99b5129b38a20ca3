"""What a policy loses is what a full pass gives to the keys that the policy does not read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import Window, nn
from jaxattn.cache import HeavyHitters, Paged, Policy, Quantised, Quest, Rank, Recent
from jaxattn.models import Spec, Transformer, TransformerConfig, compare_stores, lost_mass, pre_norm

B, T, PROMPT, N, K = 2, 20, 9, 4, 2


@pytest.fixture(scope="module")
def model():
    layers = [pre_norm(Spec(nn.MultiHeadAttention, heads=N, key_heads=K))] * 2
    layers += [pre_norm(Spec(nn.MultiHeadAttention, heads=N, key_heads=K, mask=Window(6)))]
    made = Transformer(TransformerConfig(11, T, 16, layers), rngs=nnx.Rngs(0))
    larger = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, nnx.state(made, nnx.Param))
    nnx.update(made, larger)
    return made


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 11, (B, T))


def test_the_lost_mass_of_sinks_and_recent_is_that_of_the_dense_weights(model, tokens):
    """The policy keeps positions 0, 1 and the last 4 by definition, so the mass is a sum over recorded weights."""
    lost = np.asarray(lost_mass(model, tokens, Policy(Recent(2), 6), prompt=PROMPT))
    weights = model(tokens, record={"w": "weights"})[2]["w"]
    for layer in range(3):
        for t in range(T):
            w = np.asarray(weights[layer], np.float64)[:, :, t]
            gone = range(2, t - 3) if t >= PROMPT else ()
            np.testing.assert_allclose(lost[layer, :, t], w[:, :, list(gone)].sum(-1), atol=1e-5)
    assert lost.max() > 0.2


@pytest.mark.parametrize("policy", [Policy(), Policy(Recent(2), T), Policy(HeavyHitters(1, 2), T, Quest(T // 4, 4))])
def test_nothing_is_lost_where_there_is_room(model, tokens, policy):
    assert np.asarray(lost_mass(model, tokens, policy, prompt=PROMPT)).max() < 1e-5


def test_dropout_is_off_also_in_a_model_that_trains(tokens):
    layer = pre_norm(Spec(nn.MultiHeadAttention, heads=N, key_heads=K, dropout=0.5))
    model = Transformer(TransformerConfig(11, T, 16, [layer]), rngs=nnx.Rngs(0, dropout=1))
    found = []
    for mode in (model.train, model.eval):
        mode()
        each = compare_stores(model, tokens, {"few": Policy(Recent(1), 4)}, prompt=PROMPT)["few"]
        lost = lost_mass(model, tokens, Policy(Recent(1), 4), prompt=PROMPT)
        found.append((each.loss, each.lost, np.asarray(lost)))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_padding_loses_nothing_and_is_not_counted(model, tokens):
    positions = np.stack([np.arange(T), np.where(np.arange(T) < 15, np.arange(T), -1)])
    padded = np.asarray(lost_mass(model, tokens, Policy(Recent(1), 4), prompt=PROMPT, positions=positions))
    plain = np.asarray(lost_mass(model, tokens, Policy(Recent(1), 4), prompt=PROMPT))
    np.testing.assert_allclose(padded[:, 0], plain[:, 0], atol=1e-6)
    np.testing.assert_allclose(padded[:, 1, :15], plain[:, 1, :15], atol=1e-6)
    assert not padded[:, 1, 15:].any()


def test_a_comparison_says_memory_loss_accuracy_and_mass(model, tokens):
    answers = np.zeros((B, T), bool)
    answers[:, [5, 15, 19]] = True
    policies = {
        "all": Policy(),
        "few": Policy(Recent(1), 4),
        "pages": Policy(storage=Paged(4, 5)),
        "bits": Policy(storage=Quantised(8, 4, 4)),
    }
    found = compare_stores(model, tokens, policies, prompt=PROMPT, answers=answers)
    logits = np.asarray(model(tokens)[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    dense = -np.take_along_axis(logp[:, PROMPT:-1], tokens[:, PROMPT + 1 :, None], -1).mean()
    assert found["all"].loss == pytest.approx(dense, rel=1e-5)
    right = (logits[:, :-1].argmax(-1) == tokens[:, 1:]) & answers[:, 1:]
    np.testing.assert_allclose(found["all"].accuracy, right.sum(1) / 3, rtol=1e-6)
    assert found["few"].loss != pytest.approx(dense, rel=1e-3)
    assert found["bits"].loss == pytest.approx(dense, rel=1e-2)
    assert np.isnan(found["pages"].loss)  # five pages do not hold two rows of 20 tokens
    assert found["few"].memory < found["all"].memory
    assert found["few"].lost.shape == (3, N)
    assert found["few"].lost.max() > 0.01 > found["all"].lost.max()
    unasked = compare_stores(model, tokens, {"all": Policy()}, prompt=PROMPT, lost=False)["all"]
    assert np.isnan(unasked.accuracy).all()
    assert unasked.lost.size == 0


def test_what_cannot_be_told_is_refused(model, tokens):
    with pytest.raises(ValueError, match=r"prompt is 20 of tokens \(2, 20\): need .* 1 to length − 1"):
        lost_mass(model, tokens, Policy(), prompt=T)
    with pytest.raises(ValueError, match="policy has key_position=Rank"):
        lost_mass(model, tokens, Policy(key_position=Rank()), prompt=4)
    recurrent = Transformer(TransformerConfig(11, T, 16, [pre_norm(Spec(nn.Mamba2, heads=2))]), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a layer has no attention"):
        lost_mass(recurrent, jnp.asarray(tokens), Policy(), prompt=4)
