"""The loss is a weighted sum of cross-entropies and squared log-normalisers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.train import BOS, EOS, VOCABULARY, bits_per_byte, next_token_loss

EPS = float(np.finfo(np.float32).eps)


def random_batch(tokens=6, vocabulary=VOCABULARY, batch=3, scale=3.0):
    keys = jax.random.split(jax.random.key(0), 3)
    logits = scale * jax.random.normal(keys[0], (batch, tokens, vocabulary))
    targets = jax.random.randint(keys[1], (batch, tokens), 0, vocabulary)
    weights = jax.random.bernoulli(keys[2], 0.7, (batch, tokens)).astype(jnp.float32)
    return logits, {"targets": targets, "weights": weights}


def test_a_loss_computed_by_hand():
    # Weights 1, 1, 0. Row 1: p = (1/4, 3/4), target 1. Row 2: p = (1/2, 1/2), target 0. Row 3 counts for nothing.
    logits = jnp.log(jnp.array([[1.0, 3.0], [2.0, 2.0], [9.0, 1.0]]))
    batch = {"targets": jnp.array([1, 0, 1]), "weights": jnp.array([1.0, 1.0, 0.0])}
    total, sums = next_token_loss(logits, batch)
    assert float(total) == float(sums["nll"]) == pytest.approx(math.log(4 / 3) + math.log(2), rel=4 * EPS)
    assert {k: float(v) for k, v in sums.items() if k != "nll"} == {"weight": 2, "bytes": 2, "correct": 2}


def test_a_z_loss_computed_by_hand():
    # exp of the logits sums to 4 in both rows: z = log 4 in each of the two tokens that count.
    logits = jnp.log(jnp.array([[1.0, 3.0], [2.0, 2.0], [9.0, 1.0]]))
    batch = {"targets": jnp.array([1, 0, 1]), "weights": jnp.array([1.0, 1.0, 0.0])}
    total, sums = next_token_loss(logits, batch, z_loss=0.5)
    assert float(sums["nll"]) == pytest.approx(math.log(8 / 3), rel=4 * EPS)
    assert float(total) == pytest.approx(math.log(8 / 3) + 0.5 * 2 * math.log(4) ** 2, rel=4 * EPS)


def test_the_loss_agrees_with_float64():
    logits, batch = random_batch()
    exact = np.asarray(logits, np.float64)
    z = np.log(np.exp(exact).sum(axis=-1))
    nll = z - np.take_along_axis(exact, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    weights = np.asarray(batch["weights"], np.float64)
    total, sums = next_token_loss(logits, batch, z_loss=0.1)
    # Each z is a float32 sum over the vocabulary, and the loss a sum over the tokens.
    relative = (VOCABULARY + weights.size) * EPS
    assert float(sums["nll"]) == pytest.approx((weights * nll).sum(), rel=relative)
    assert float(total) == pytest.approx((weights * (nll + 0.1 * z**2)).sum(), rel=2 * relative)


def test_the_gradient_is_the_softmax_minus_the_target():
    logits, batch = random_batch(vocabulary=7)
    gradient = jax.grad(lambda logits: next_token_loss(logits, batch)[0])(logits)
    expected = batch["weights"][..., None] * (jax.nn.softmax(logits) - jax.nn.one_hot(batch["targets"], 7))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=7 * EPS)


def test_the_gradient_of_the_z_loss_is_twice_z_times_the_softmax():
    logits, batch = random_batch(vocabulary=7)
    z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    with_z = jax.grad(lambda logits: next_token_loss(logits, batch, z_loss=1.0)[0])(logits)
    without = jax.grad(lambda logits: next_token_loss(logits, batch)[0])(logits)
    expected = batch["weights"][..., None] * 2 * z * jax.nn.softmax(logits)
    np.testing.assert_allclose(with_z - without, expected, rtol=0, atol=float(jnp.max(jnp.abs(z))) * 16 * EPS)


def test_losses_of_parts_add_up():
    logits, batch = random_batch(batch=4)
    whole, sums = next_token_loss(logits, batch, z_loss=0.1)
    parts = [
        next_token_loss(logits[rows], jax.tree.map(lambda a, rows=rows: a[rows], batch), z_loss=0.1)
        for rows in (slice(1), slice(1, 4))
    ]
    bound = batch["weights"].size * EPS
    np.testing.assert_allclose(sum(total for total, _ in parts), whole, rtol=bound)
    for name, value in sums.items():
        np.testing.assert_allclose(sum(part[name] for _, part in parts), value, rtol=bound)


def test_bfloat16_logits_are_summed_in_float32():
    logits, batch = random_batch()
    half = logits.astype(jnp.bfloat16)
    total, sums = next_token_loss(half, batch)
    assert total.dtype == jnp.float32
    assert all(value.dtype == jnp.float32 for value in sums.values())
    assert total == next_token_loss(half.astype(jnp.float32), batch)[0]


def test_bytes_are_the_weighted_targets_that_are_no_specials():
    batch = {"targets": jnp.array([0, 255, BOS, EOS, 7]), "weights": jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])}
    _, sums = next_token_loss(jnp.zeros((5, VOCABULARY)), batch)
    assert (float(sums["bytes"]), float(sums["weight"])) == (2, 4)


def test_a_uniform_guess_costs_the_log_of_the_vocabulary():
    targets = jnp.arange(200) % 256
    _, sums = next_token_loss(jnp.zeros((200, VOCABULARY)), {"targets": targets, "weights": jnp.ones(200)})
    # log2(258) = 8 + log2(1 + 2/256) = 8.01123 bits.
    assert bits_per_byte(sums) == pytest.approx(8.01122725542, rel=(200 + VOCABULARY) * EPS)
    means = {name: value / sums["weight"] for name, value in sums.items()}
    assert bits_per_byte(means) == pytest.approx(8.01122725542, rel=(200 + VOCABULARY) * EPS)


def test_the_end_of_a_document_is_paid_for_by_its_bytes():
    _, sums = next_token_loss(jnp.zeros((4, 2**8)), {"targets": jnp.array([1, 2, 3, 0]), "weights": jnp.ones(4)})
    assert bits_per_byte({**sums, "bytes": 3.0}) == pytest.approx(4 * 8 / 3, rel=2**8 * EPS)


def test_bits_per_byte_of_no_bytes_is_not_a_number():
    assert math.isnan(bits_per_byte({"nll": 1.0, "bytes": 0.0}))


@pytest.mark.parametrize("name", ["targets", "weights"])
def test_shapes_that_do_not_fit_are_named(name):
    logits, batch = random_batch(vocabulary=7)
    batch[name] = batch[name][:, 1:]
    with pytest.raises(ValueError, match=rf"batch\['{name}'\] has shape \(3, 5\) but logits has shape \(3, 6, 7\)"):
        next_token_loss(logits, batch)


def gradient_of_logits(logits, batch, **options):
    return np.asarray(jax.grad(lambda logits: next_token_loss(logits, batch, **options)[0])(logits))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_of_weight_0_is_not_read(z_loss, bad):
    """Neither its logits nor its target: loss, sums and gradient are those of the row without it."""
    logits, batch = random_batch(vocabulary=7)
    counted = np.asarray(batch["weights"]) > 0
    assert counted.any()
    assert not counted.all()
    spoiled = jnp.where(counted[..., None], logits, bad)
    for target in (-100, -1, 7, 2**31 - 1):
        padded = {**batch, "targets": jnp.where(counted, batch["targets"], target)}
        total, sums = next_token_loss(spoiled, padded, z_loss)
        expected, of_rest = next_token_loss(logits[counted], jax.tree.map(lambda x: x[counted], batch), z_loss)
        np.testing.assert_allclose(total, expected, rtol=counted.size * EPS)
        for name, value in sums.items():
            np.testing.assert_allclose(value, of_rest[name], rtol=counted.size * EPS)
        gradient = gradient_of_logits(spoiled, padded, z_loss=z_loss)
        np.testing.assert_array_equal(gradient[~counted], 0)
        np.testing.assert_array_equal(gradient, gradient_of_logits(logits, batch, z_loss=z_loss))
        by_weight = jax.grad(lambda w, padded=padded: next_token_loss(spoiled, {**padded, "weights": w}, z_loss)[0])
        assert np.isfinite(by_weight(batch["weights"])).all()


@pytest.mark.parametrize("target", [-1, -7, -11, -100, 7, 8, 2**31 - 1])
def test_a_target_that_counts_and_is_no_token_makes_the_loss_nan(target):
    logits, batch = random_batch(vocabulary=7)
    batch = {"targets": batch["targets"].at[0, 2].set(target), "weights": jnp.ones((3, 6))}
    total, sums = jax.jit(next_token_loss)(logits, batch)
    assert np.isnan(total)
    assert np.isnan(sums["nll"])
    assert np.isfinite([sums["weight"], sums["bytes"], sums["correct"]]).all()
    gradient = gradient_of_logits(logits, batch)
    assert np.isnan(gradient[0, 2]).all()
    assert np.isfinite(np.delete(gradient.reshape(18, 7), 2, 0)).all()


def test_a_negative_target_is_no_byte():
    _, sums = next_token_loss(jnp.zeros((2, VOCABULARY)), {"targets": jnp.array([-1, 3]), "weights": jnp.ones(2)})
    assert float(sums["bytes"]) == 1


def test_logits_that_overflow_when_squared_cost_nothing_without_a_z_loss():
    """z is 1e20 and its square no float32; the other token's gap is exact."""
    logits, batch = jnp.array([[1e20, 0.0]]), {"targets": jnp.array([0]), "weights": jnp.ones(1)}
    assert float(next_token_loss(logits, batch)[0]) == 0
    np.testing.assert_array_equal(gradient_of_logits(logits, batch), 0)


def test_weights_and_penalties_below_0_and_float_targets_are_refused():
    logits, batch = random_batch(vocabulary=7)
    with pytest.raises(ValueError, match=r"batch\['weights'\] holds -1.0: need numbers from 0 on"):
        next_token_loss(logits, {**batch, "weights": -jnp.ones((3, 6))})
    for z_loss in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"z_loss holds {z_loss}: need numbers from 0 on"):
            next_token_loss(logits, batch, z_loss)
    with pytest.raises(TypeError, match=r"batch\['targets'\] has dtype float32: need integers"):
        next_token_loss(logits, {**batch, "targets": batch["targets"].astype(float)})


def test_a_traced_weight_below_0_makes_the_loss_nan():
    logits, batch = random_batch(vocabulary=7)
    total, sums = jax.jit(next_token_loss)(logits, {**batch, "weights": batch["weights"].at[1, 1].set(-1.0)})
    assert np.isnan([total, sums["nll"], sums["weight"]]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64])
def test_narrow_integers_are_the_numbers_they_say(dtype):
    """258 in 8 bits is 2: a target of 100 is inside a vocabulary of 300 all the same, and a byte."""
    logits, weights = jax.random.normal(jax.random.key(0), (1, 2, 300)), jnp.ones((1, 2))
    targets = np.array([[1, 100]], dtype)
    total, sums = next_token_loss(logits, {"targets": targets, "weights": weights})
    expected, _ = next_token_loss(logits, {"targets": targets.astype(np.int32), "weights": weights})
    np.testing.assert_array_equal(total, expected)
    assert sums["bytes"] == 2
