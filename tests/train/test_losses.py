"""The loss is a weighted sum of cross-entropies and squared log-normalisers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.train import (
    BOS,
    EOS,
    VOCABULARY,
    bits_per_byte,
    classification_loss,
    contrastive_loss,
    distillation_loss,
    hidden_loss,
    next_token_loss,
    squared_error_loss,
)

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
    batch = {"targets": jnp.array([1, 0, 1]), "weights": jnp.array([1.0, 1.0, 0.0]), "bytes": jnp.array([2, 0, 5])}
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


def test_bytes_are_counted_only_where_the_batch_says_what_they_are():
    batch = {"targets": jnp.array([0, 255, BOS, EOS, 7]), "weights": jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])}
    _, sums = next_token_loss(jnp.zeros((5, VOCABULARY)), batch)
    assert sums.keys() == {"nll", "weight", "correct"}
    _, sums = next_token_loss(jnp.zeros((5, VOCABULARY)), {**batch, "bytes": np.array([1, 1, 0, 0, 1], np.uint8)})
    assert (float(sums["bytes"]), float(sums["weight"])) == (2, 4)


def test_a_uniform_guess_costs_the_log_of_the_vocabulary():
    targets = jnp.arange(200) % 256
    _, sums = next_token_loss(jnp.zeros((200, VOCABULARY)), {"targets": targets, "weights": jnp.ones(200)})
    # log2(258) = 8 + log2(1 + 2/256) = 8.01123 bits.
    sums["bytes"] = sums["weight"]
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
    assert np.isfinite([sums["weight"], sums["correct"]]).all()
    gradient = gradient_of_logits(logits, batch)
    assert np.isnan(gradient[0, 2]).all()
    assert np.isfinite(np.delete(gradient.reshape(18, 7), 2, 0)).all()


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
    """258 in 8 bits is 2: a target of 100 is inside a vocabulary of 300 all the same."""
    logits, weights = jax.random.normal(jax.random.key(0), (1, 2, 300)), jnp.ones((1, 2))
    targets = np.array([[1, 100]], dtype)
    total, _ = next_token_loss(logits, {"targets": targets, "weights": weights})
    expected, _ = next_token_loss(logits, {"targets": targets.astype(np.int32), "weights": weights})
    np.testing.assert_array_equal(total, expected)


def log_softmax(x, axis=-1):
    """In float64."""
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def classification(logits, _, weights):
    labels = np.array([1, 0, 3, 2, 1, 0])
    batch = {"labels": labels, "weights": weights}
    return lambda x: classification_loss(x, batch), -log_softmax(logits)[np.arange(6), labels], 6


def squared(predictions, targets, weights):
    batch = {"targets": targets, "weights": weights}
    exact = np.asarray(predictions, np.float64) - np.asarray(targets, np.float64)
    return lambda x: squared_error_loss(x, batch), (exact**2).sum(-1), 4


def distillation(logits, teacher, weights):
    tau = 2.5
    log_p, log_q = log_softmax(np.asarray(teacher, np.float64) / tau), log_softmax(np.asarray(logits, np.float64) / tau)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return lambda x: distillation_loss(x, teacher, {"weights": weights}, tau), tau**2 * divergence, 4


def contrastive(queries, keys, weights):
    q, k = (np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, keys))
    scores = np.where(weights > 0, q @ k.T / 0.5, -np.inf)  # a pair that does not count is no negative
    down = np.where(weights[:, None] > 0, q @ k.T / 0.5, -np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.nan_to_num(-(np.diagonal(log_softmax(scores)) + np.diagonal(log_softmax(down, 0))) / 2)
    return lambda x: contrastive_loss(x, keys, {"weights": weights}, 0.5), each, 6


@pytest.mark.parametrize("case", [classification, squared, distillation, contrastive])
def test_a_loss_is_the_weighted_sum_of_float64_and_reads_nothing_of_weight_0(case):
    rng = np.random.default_rng(0)
    said, other = (rng.standard_normal((6, 4)).astype(np.float32) for _ in range(2))
    weights = np.array([1, 0, 2, 0.5, 0, 1], np.float32)
    loss, each, terms = case(said, other, weights)
    expected = (weights * each)[weights > 0].sum()
    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, sums), gradient = value_and_grad(said)
    # Sums of 6 rows of `terms` numbers, of scores of at most 4 / 0.5.
    assert float(total) == pytest.approx(expected, rel=6 * terms * 8 * EPS)
    assert float(sums["weight"]) == pytest.approx(weights.sum() * (terms if case is squared else 1))
    spoiled = np.where(weights[:, None] > 0, said, np.nan)
    (same, _), of_spoiled = value_and_grad(spoiled)
    assert same == total
    np.testing.assert_array_equal(of_spoiled, gradient)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[weights == 0], 0)
    assert (abs(gradient[weights > 0]).max(-1) > 0).all()
    nudge = 1e-3 * rng.standard_normal((6, 4)) * (weights > 0)[:, None]  # a central difference, of third order
    ahead, behind = (case((said + sign * nudge), other, weights)[1] for sign in (1, -1))
    slope = (weights * (ahead - behind))[weights > 0].sum() / 2
    assert (np.asarray(gradient, np.float64) * nudge).sum() == pytest.approx(slope, rel=1e-3)


def test_losses_without_weights_count_all_alike():
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    ones = {"weights": np.ones(6, np.float32)}
    for loss in (
        lambda batch: classification_loss(x, {"labels": np.zeros(6, int), **batch}),
        lambda batch: squared_error_loss(x, {"targets": x[::-1], **batch}),
        lambda batch: distillation_loss(x, x[::-1], batch),
        lambda batch: contrastive_loss(x, x[::-1], batch),
        lambda batch: next_token_loss(x, {"targets": np.zeros(6, int), **batch}),
    ):
        assert jax.tree.map(float, loss({})) == jax.tree.map(float, loss(ones))


def test_a_number_by_itself_can_have_weight_0():
    batch = {"targets": np.array([[1.0, np.nan]]), "weights": np.array([[1.0, 0.0]])}
    total, sums = squared_error_loss(np.array([[3.0, 1.0]]), batch)
    assert (float(total), float(sums["weight"])) == (4, 1)
    assert np.isnan(squared_error_loss(np.zeros((1, 2)), {"targets": batch["targets"]})[0])


def test_what_the_teacher_rules_out_costs_nothing():
    teacher = jnp.array([[0.0, -jnp.inf]])
    (total, sums), gradient = jax.value_and_grad(lambda x: distillation_loss(x, teacher, {}), has_aux=True)(
        jnp.array([[0.0, 0.0]])
    )
    assert float(total) == pytest.approx(math.log(2), rel=4 * EPS)  # p = (1, 0), q = (1/2, 1/2)
    np.testing.assert_allclose(gradient, [[-0.5, 0.5]], atol=EPS)
    assert float(sums["agree"]) == 1
    ruled_out = distillation_loss(jnp.array([[0.0, -jnp.inf]]), teacher, {})[0]
    assert float(ruled_out) == 0
    assert (jax.grad(lambda x: distillation_loss(teacher * 0, x, {})[0])(jnp.ones((1, 2))) == 0).all()


def test_a_vector_of_zeros_has_no_direction_and_no_gradient_that_is_nan():
    gradient = jax.grad(lambda x: contrastive_loss(x, jnp.eye(3), {})[0])(jnp.zeros((3, 3)))
    assert np.isfinite(gradient).all()


def test_batches_that_do_not_fit_a_loss_are_named():
    x = jnp.zeros((6, 4))
    for loss, batch, message in (
        (next_token_loss, {"tokens": x}, r"batch has no 'targets', but 'tokens': need 'targets'"),
        (classification_loss, {}, "batch has no 'labels', but nothing"),
        (classification_loss, [1], "batch is a list: need a dict with 'labels'"),
        (classification_loss, {"labels": jnp.zeros(5, int)}, r"batch\['targets'\] has shape \(5,\) but logits"),
        (squared_error_loss, {"targets": jnp.zeros((6, 3))}, r"batch\['targets'\] has shape \(6, 3\) but predictions"),
        (squared_error_loss, {"targets": x, "weights": -jnp.ones(6)}, r"batch\['weights'\] holds -1.0"),
        (squared_error_loss, {"targets": x, "weights": jnp.ones(5)}, r"batch\['weights'\] has shape \(5,\)"),
        (lambda x, batch: distillation_loss(x, x[1:], batch), {}, r"teacher_logits has shape \(5, 4\) but logits"),
        (lambda x, batch: distillation_loss(x, x, batch, 0), {}, "temperature holds 0: need numbers above 0"),
        (lambda x, batch: contrastive_loss(x, x[1:], batch), {}, r"keys has shape \(5, 4\) but queries"),
        (lambda x, batch: contrastive_loss(x[None], x, batch), {}, r"queries has shape \(1, 6, 4\): need \[rows"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(x, batch)


def test_the_loss_of_layers_is_a_relative_distance_to_the_teacher():
    """By a loop in float64, with a vector of the teacher that is 0, and NaN where nothing counts."""
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 3, 2, 4, 5))  # [layers, batch, tokens, channels]
    teacher[1, 0, 2] = 0
    weights = np.array([[1.0, 0.0, 2.0, 0.5], [0.0, 1.0, 1.0, 3.0]])
    expected = 0.0
    for layer, row, token in np.ndindex(3, 2, 4):
        length = (teacher[layer, row, token] ** 2).sum()
        far = ((student[layer, row, token] - teacher[layer, row, token]) ** 2).sum()
        expected += weights[row, token] * (far / length if length else 0) / 3
    student[:, 0, 1], teacher[:, 1, 0] = np.nan, np.nan
    given = jnp.asarray(student), jnp.asarray(teacher), {"weights": jnp.asarray(weights)}
    (total, sums), slopes = jax.value_and_grad(hidden_loss, argnums=(0, 1), has_aux=True)(*given)
    assert float(total) == pytest.approx(expected, rel=40 * EPS)
    assert float(sums["weight"]) == 8.5
    assert np.isfinite(slopes[0]).all()
    assert (slopes[0][:, 0, 1] == 0).all()
    assert abs(slopes[0]).max() > 0
    assert (slopes[1] == 0).all()
    with pytest.raises(
        ValueError, match=r"teacher_hidden has shape \(2, 2, 4, 5\) but hidden has shape \(3, 2, 4, 5\)"
    ):
        hidden_loss(given[0], given[1][:2], {})
