"""One step, however its batch is cut and wherever it runs, descends the same mean loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from jaxattn.train import (
    data_mesh,
    init_state,
    loss_scaling,
    make_evaluation,
    make_step,
    next_token_loss,
    on_mesh,
    on_one_device,
    on_pmap,
)
from jaxattn.train.step import repeated

EPS = float(np.finfo(np.float32).eps)
VOCABULARY, ROWS, LENGTH = 8, 16, 5
STEPS, RATE = 4, 0.5

# Two ways of summing differ, in a parameter and per step, by the rate times the error of the gradient. The gradient is
# a sum over tokens of terms of size at most weight / Σ weight, from softmaxes over the vocabulary: (tokens + V) · eps.
# The Hessian of the cross-entropy is at most 1/2, so an error grows by at most 1 + rate/2 in each later step.
TOLERANCE = STEPS * RATE * (ROWS * LENGTH + VOCABULARY) * EPS * (1 + RATE / 2) ** STEPS


def loss_fn(params, batch, key):
    return next_token_loss(params["table"][batch["tokens"]], batch, z_loss=1e-2)


def noisy_loss_fn(params, batch, key):
    logits = params["table"][batch["tokens"]]
    return next_token_loss(logits + jax.random.normal(key, logits.shape), batch)


def random_batches(count=STEPS, seed=0):
    random = np.random.default_rng(seed)
    return [
        {
            "tokens": random.integers(0, VOCABULARY, (ROWS, LENGTH)),
            "targets": random.integers(0, VOCABULARY, (ROWS, LENGTH)),
            # Rows differ in how many of their tokens count: a mean of means would be wrong.
            "weights": (random.random((ROWS, LENGTH)) < np.linspace(0.1, 1, ROWS)[:, None]).astype(np.float32),
            "bytes": np.ones((ROWS, LENGTH), np.uint8),
        }
        for _ in range(count)
    ]


def fresh_state(optimizer):
    return init_state({"table": jax.random.normal(jax.random.key(1), (VOCABULARY,) * 2)}, optimizer, jax.random.key(2))


def train(wrap, optimizer=None, batches=None, loss_fn=loss_fn, **options):
    optimizer = optimizer or optax.sgd(RATE)
    step = wrap(make_step(loss_fn, optimizer, **options))
    state, metrics = fresh_state(optimizer), []
    for batch in batches or random_batches():
        state, of_step = step(state, batch)
        metrics.append(jax.device_get(of_step))
    return state, metrics


@pytest.fixture(scope="module")
def reference():
    return train(on_one_device)


def size_of_program(step, batch):
    """Characters of the program of a step of `on_one_device`, in which its constants are written out."""
    return len(step.func.lower(*step.args, fresh_state(optax.sgd(RATE)), batch).as_text())


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["whole", "micro-batches"])
def test_arrays_of_a_partial_are_arguments_of_the_program_and_not_constants_in_it(options):
    """The loss towards a fixed table, which a function closes over or is given."""
    target = jax.random.normal(jax.random.key(3), (300, 300))

    def towards(target, params, batch, key):
        total, sums = loss_fn(params, batch, key)
        size = params["table"].shape[0]
        return total + ((params["table"] - target[:size, -size:]) ** 2).sum(), sums

    given, closed = Partial(towards, target), partial(towards, target)
    batch = random_batches(1)[0]
    sizes = [
        size_of_program(on_one_device(make_step(each, optax.sgd(RATE), **options)), batch) for each in (given, closed)
    ]
    assert sizes[0] < target.nbytes < sizes[1]
    for wrap in (on_one_device, lambda step: on_pmap(step, "devices")):
        named = {"axis_name": "devices"} if wrap is not on_one_device else {}
        results = [train(wrap, loss_fn=each, batches=[batch] * 2, **named, **options) for each in (given, closed)]
        jax.tree.map(np.testing.assert_array_equal, *[(state.params, metrics) for state, metrics in results])
    repeats = [repeated(make_step(each, optax.sgd(RATE)), 2, lambda _: batch) for each in (given, closed)]
    states = [on_one_device(each)(fresh_state(optax.sgd(RATE)), None)[0].params for each in repeats]
    jax.tree.map(np.testing.assert_array_equal, *states)
    measured = [
        on_one_device(make_evaluation(each))(fresh_state(optax.sgd(RATE)), batch)[1] for each in (given, closed)
    ]
    jax.tree.map(np.testing.assert_array_equal, *measured)


def test_the_step_descends_the_gradient_of_the_mean_over_tokens():
    optimizer, (batch,) = optax.sgd(RATE), random_batches(1)
    before = fresh_state(optimizer)

    def mean(params):
        total, sums = loss_fn(params, batch, None)
        return total / sums["weight"]

    loss, gradient = jax.value_and_grad(mean)(before.params)
    after, metrics = make_step(loss_fn, optimizer)(before, batch)
    np.testing.assert_allclose(after.params["table"], before.params["table"] - RATE * gradient["table"], atol=TOLERANCE)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=ROWS * LENGTH * EPS)
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(gradient["table"]), rtol=ROWS * LENGTH * EPS)
    assert (int(before.step), int(after.step)) == (0, 1)


def test_metrics_are_means_per_token():
    (batch,) = random_batches(1)
    state = fresh_state(optax.sgd(RATE))
    total, sums = loss_fn(state.params, batch, None)
    _, metrics = make_step(loss_fn, optax.sgd(RATE))(state, batch)
    assert metrics.keys() == {"loss", "grad_norm", "weight", "nll", "bytes", "correct"}
    assert metrics["weight"] == sums["weight"] == batch["weights"].sum()
    assert metrics["bytes"] == pytest.approx(1, rel=EPS)
    for name, value in {**sums, "loss": total}.items():
        if name != "weight":
            assert float(metrics[name]) == pytest.approx(float(value / sums["weight"]), rel=2 * ROWS * LENGTH * EPS)


WAYS = {
    "mesh": (lambda step: on_mesh(step, data_mesh()), {}),
    "mesh, accumulating": (lambda step: on_mesh(step, data_mesh()), {"accumulate": 2}),
    "pmap": (lambda step: on_pmap(step, "device"), {"axis_name": "device"}),
    "pmap, accumulating": (lambda step: on_pmap(step, "device"), {"axis_name": "device", "accumulate": 2}),
    "accumulating": (on_one_device, {"accumulate": 4}),
    "accumulating row by row": (on_one_device, {"accumulate": ROWS}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_a_step_gives_the_loss_and_parameters_of_one_device(way, reference):
    assert len(jax.devices()) == 8
    wrap, options = WAYS[way]
    state, metrics = train(wrap, **options)
    expected, expected_metrics = reference
    moved = np.abs(expected.params["table"] - fresh_state(optax.sgd(RATE)).params["table"])
    assert moved.mean() > 100 * TOLERANCE
    np.testing.assert_allclose(state.params["table"], expected.params["table"], rtol=0, atol=TOLERANCE)
    assert int(state.step) == STEPS
    for found, wanted in zip(metrics, expected_metrics, strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert found[name].shape == ()
            # Each mean has a slope of at most 2 in the parameters of a row, beside its own rounding.
            np.testing.assert_allclose(found[name], wanted[name], rtol=ROWS * LENGTH * EPS, atol=4 * TOLERANCE)


def test_a_mesh_draws_the_random_numbers_of_one_device():
    one, _ = train(on_one_device, loss_fn=noisy_loss_fn)
    mesh, _ = train(lambda step: on_mesh(step, data_mesh()), loss_fn=noisy_loss_fn)
    np.testing.assert_allclose(mesh.params["table"], one.params["table"], rtol=0, atol=TOLERANCE)


def key_of(params, batch, key):
    """A loss that shows the key it got."""
    number = jax.random.uniform(key)
    return 0.0 * params["table"].sum(), {"weight": jnp.float32(1), "number": number, "square": number**2}


def test_each_step_has_its_own_random_numbers_and_repeats_them():
    _, first = train(on_one_device, loss_fn=key_of)
    _, again = train(on_one_device, loss_fn=key_of)
    numbers = [float(metrics["number"]) for metrics in first]
    assert len(set(numbers)) == STEPS
    assert numbers == [float(metrics["number"]) for metrics in again]


@pytest.mark.parametrize("way", ["pmap", "accumulating"])
def test_devices_and_micro_batches_have_random_numbers_of_their_own(way):
    wrap, options = WAYS[way]
    _, (metrics, *_) = train(wrap, loss_fn=key_of, **options)
    variance = metrics["square"] - metrics["number"] ** 2
    assert variance > 1e-3  # of one number repeated it is 0; of uniform numbers, 1/12


def test_a_batch_without_weight_changes_nothing():
    (batch,) = random_batches(1)
    batch["weights"][:] = 0
    state, (metrics,) = train(on_one_device, batches=[batch])
    np.testing.assert_array_equal(state.params["table"], fresh_state(optax.sgd(RATE)).params["table"])
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)


@pytest.mark.parametrize("way", ["one", "mesh", "pmap"])
def test_a_step_is_traced_once(way):
    traces = []

    def counting(params, batch, key):
        traces.append(1)
        return loss_fn(params, batch, key)

    wrap, options = WAYS.get(way, (on_one_device, {}))
    train(wrap, loss_fn=counting, **options)
    assert len(traces) == 1


@pytest.mark.parametrize("way", ["one", "mesh", "pmap"])
def test_the_callers_parameters_outlive_the_steps(way):
    optimizer = optax.sgd(RATE)
    params, key = {"table": jnp.ones((VOCABULARY,) * 2)}, jax.random.key(0)
    wrap, options = WAYS.get(way, (on_one_device, {}))
    step = wrap(make_step(loss_fn, optimizer, **options))
    state = init_state(params, optimizer, key)
    for batch in random_batches(2):
        state, _ = step(state, batch)
    np.testing.assert_array_equal(params["table"], 1)
    assert jax.random.uniform(key) == jax.random.uniform(jax.random.key(0))


@pytest.mark.parametrize("way", ["one", "mesh", "pmap"])
def test_an_evaluation_sums_over_the_whole_batch_and_changes_nothing(way):
    def sees_no_key(params, batch, key):
        assert key is None
        return loss_fn(params, batch, key)

    wrap, options = WAYS.get(way, (on_one_device, {}))
    evaluation = wrap(make_evaluation(sees_no_key, **options))
    (batch,) = random_batches(1)
    before = jax.device_get(fresh_state(optax.sgd(RATE)).params)
    state, sums = evaluation(fresh_state(optax.sgd(RATE)), batch)
    total, expected = loss_fn(before, batch, None)
    np.testing.assert_array_equal(state.params["table"], before["table"])
    assert int(state.step) == 0
    for name, value in {**expected, "loss": total}.items():
        np.testing.assert_allclose(sums[name], value, rtol=(ROWS * LENGTH + VOCABULARY) * EPS)


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="accumulate is 0: need at least 1"):
        make_step(loss_fn, optax.sgd(RATE), accumulate=0)
    with pytest.raises(ValueError, match="accumulate is 3 but a device has 16 rows of the batch"):
        train(on_one_device, accumulate=3)


@pytest.mark.parametrize("way", ["mesh", "pmap"])
def test_a_batch_that_devices_do_not_divide_is_refused(way):
    wrap, options = WAYS[way]
    (batch,) = random_batches(1)
    words = r"batch has 12 rows but there are 8 devices|batch\[.[a-z]+.\]: axis .batch. of 12 does not divide"
    with pytest.raises(ValueError, match=f"({words}).*: need a multiple of 8"):
        train(wrap, batches=[{name: array[:12] for name, array in batch.items()}], **options)


def test_some_of_the_devices_can_be_chosen(reference):
    two = jax.devices()[:2]
    meshed, _ = train(lambda step: on_mesh(step, data_mesh(two)))
    mapped, _ = train(lambda step: on_pmap(step, "device", two), axis_name="device")
    for state in (meshed, mapped):
        assert state.params["table"].sharding.device_set == set(two)
        np.testing.assert_allclose(state.params["table"], reference[0].params["table"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_small_gradients_of_float16_reach_the_parameters_by_scaling(accumulate):
    """In float16 a slope of 2⁻²⁷ is 0. With the loss times 2¹⁵ it is 2⁻¹², and exact; times 2²⁴ it is too large."""

    def loss_fn(params, batch, key):
        half = params["w"].astype(jnp.float16) * batch["x"].astype(jnp.float16)
        return jnp.sum(half.astype(jnp.float32)) * 2.0**-27, {"weight": jnp.float32(batch["x"].shape[0])}

    state, metrics = {}, {}
    for name, optimizer in {
        "plain": optax.sgd(1.0),
        "scaled": loss_scaling(optax.sgd(1.0)),
        "too much": loss_scaling(optax.sgd(1.0), 2.0**44),
    }.items():
        step = make_step(loss_fn, optimizer, accumulate=accumulate)
        first = init_state({"w": jnp.zeros(3)}, optimizer, jax.random.key(0))
        state[name], metrics[name] = jax.jit(step)(first, {"x": jnp.ones((4, 1))})
    assert (state["plain"].params["w"] == 0).all()
    np.testing.assert_array_equal(state["scaled"].params["w"], -(2.0**-27))
    assert (float(metrics["scaled"]["loss_scale"]), float(metrics["scaled"]["skipped"])) == (2**15, 0)
    assert (state["too much"].params["w"] == 0).all()
    assert (float(metrics["too much"]["skipped"]), float(metrics["too much"]["grad_norm"])) == (1, 0)
    assert float(state["too much"].opt_state.scale) == 2**43
    assert float(metrics["scaled"]["loss"]) == float(metrics["plain"]["loss"]) == 0


def test_a_gradient_that_no_scale_makes_finite_is_seen():
    optimizer = loss_scaling(optax.sgd(1.0), 1.0)
    state = init_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0))
    step = make_step(lambda params, batch, key: jnp.sqrt(params["w"]), optimizer)
    _, metrics = step(state, {"x": jnp.ones(2)})
    assert not np.isfinite(metrics["grad_norm"])


def test_optimisers_that_need_the_loss_or_keep_parameters_or_several_steps_are_taken():
    rows = {"x": np.arange(4.0, dtype=np.float32)}

    def mean(params, batch, key):
        return jnp.mean((params["w"] - batch["x"]) ** 2)

    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    for optimizer in (
        plateau,
        optax.polyak_sgd(1.0),
        optax.MultiSteps(optax.sgd(0.4), 2),
        optax.chain(optax.clip(1.0), optax.masked(optax.add_decayed_weights(0.1), {"w": True}), optax.adam(0.1)),
    ):
        step = on_one_device(make_step(mean, optimizer))
        state = init_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0))
        for _ in range(4):
            state, metrics = step(state, rows)
        assert float(metrics["loss"]) < (rows["x"] ** 2).mean(), optimizer


@pytest.mark.parametrize("way", ["accumulating", "mesh", "pmap, accumulating"])
def test_a_scalar_loss_is_a_mean_over_rows(way):
    """Its gradient is that of the mean over all rows, however they are cut."""

    def mean(params, batch, key):
        return jnp.mean((params["w"] - batch["x"]) ** 2)

    wrap, options = WAYS[way]
    x = np.random.default_rng(0).standard_normal(ROWS).astype(np.float32)
    optimizer = optax.sgd(0.5)
    state = init_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0))
    state, metrics = wrap(make_step(mean, optimizer, **options))(state, {"x": x})
    # The slope at 0 is −2 · mean(x), and half of it is gone down.
    exact = x.astype(np.float64)
    assert float(state.params["w"]) == pytest.approx(exact.mean(), abs=ROWS * EPS)
    assert float(metrics["loss"]) == pytest.approx((exact**2).mean(), rel=ROWS * EPS)
    assert float(metrics["weight"]) == ROWS
    _, sums = make_evaluation(mean)(init_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0)), {"x": x})
    assert float(sums["loss"] / sums["weight"]) == pytest.approx((exact**2).mean(), rel=ROWS * EPS)


@pytest.mark.parametrize(
    "result",
    [
        lambda total: None,
        lambda total: total[None],
        lambda total: {"loss": total},
        lambda total: (total,),
        lambda total: (total, total),
        lambda total: (total, {"nll": total}),
        lambda total: (total[None], {"weight": total}),
    ],
)
def test_a_loss_that_is_not_a_total_with_its_sums_is_named(result):
    def loss_fn(params, batch, key):
        return result(jnp.sum(params["table"] ** 2))

    optimizer = optax.sgd(0.1)
    state = init_state({"table": jnp.ones(3)}, optimizer, jax.random.key(0))
    needed = r"need \(total, sums\), a scalar and a dict of scalars, 'weight' being the number of tokens"
    for step in (make_step(loss_fn, optimizer), make_evaluation(loss_fn)):
        with pytest.raises(TypeError, match=f"loss_fn returns .*: {needed}"):
            jax.jit(step)(state, {"tokens": jnp.zeros((2, 3), int)})


def test_sums_with_names_that_the_step_has_itself_are_refused():
    step = make_step(lambda params, batch, key: (params["w"], {"weight": 1.0, "loss": params["w"]}), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"sums with the names \['loss'\], which the step has itself"):
        step(init_state({"w": jnp.ones(())}, optax.sgd(0.1), jax.random.key(0)), {"x": jnp.ones(2)})


def test_an_optimiser_may_keep_the_parameters_themselves():
    """As a teacher or a starting point: a step must not give the memory of both away."""
    kept = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    optimizer = optax.chain(kept, optax.sgd(0.1))
    step = on_one_device(make_step(lambda params, batch, key: params["w"], optimizer))
    state = init_state({"w": jnp.ones(())}, optimizer, jax.random.key(0))
    state, _ = step(state, {"x": jnp.ones(2)})
    assert float(state.opt_state[0]["w"]) == 1
