"""The schedule, the clipping, and which parameters are decayed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn.train import (
    OptimizerConfig,
    decay_mask,
    evaluation_params,
    learning_rate,
    loss_scaling,
    make_optimizer,
    parameter_roles,
)

EPS = float(np.finfo(np.float32).eps)


def one_step(config, params, gradients, steps=10, **roles):
    optimizer = make_optimizer(config, steps, **roles)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    return updates, state


def test_the_schedule_at_points_computed_by_hand():
    schedule = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=3, final_fraction=0.1), steps=11)
    expected = {
        0: 0.5,  # 2 · 1/4
        1: 1.0,  # 2 · 2/4
        3: 2.0,  # the peak
        5: 2.0 * (0.1 + 0.9 * (1 + 0.5**0.5) / 2),  # a quarter of the cosine: cos(π/4) = √½
        7: 1.1,  # half of it: 2 · (0.1 + 0.9/2)
        11: 0.2,  # its end
        50: 0.2,
    }
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=8 * EPS), step


@pytest.mark.parametrize("name", ["cosine", "constant", "stable"])
def test_a_schedule_without_warm_up_begins_at_the_peak(name):
    schedule = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule=name), steps=10)
    assert float(schedule(0)) == pytest.approx(2.0, rel=8 * EPS)


def test_schedules_that_stay_do_not_know_the_last_step_until_they_fall():
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=3, schedule="stable", decay_fraction=0.5, final_fraction=0.1
    )
    constant = learning_rate(dataclasses.replace(config, schedule="constant"), steps=10)
    short, long = (learning_rate(config, steps) for steps in (10, 100))
    for step in range(60):
        expected = min(2.0, 2.0 * (step + 1) / 4)
        assert float(constant(step)) == pytest.approx(expected, rel=8 * EPS)
        if step <= 50:
            assert float(long(step)) == pytest.approx(expected, rel=8 * EPS)
    # From step 5 on to 0.2 at step 10, along a line.
    for step, rate in ((5, 2.0), (6, 2.0 - 1.8 / 5), (9, 2.0 - 4 * 1.8 / 5), (10, 0.2), (11, 0.2)):
        assert float(short(step)) == pytest.approx(rate, rel=16 * EPS)


class Model(nnx.Module):
    def __init__(self, rngs):
        undecayed = {"role": "undecayed"}
        self.linear = nnx.Linear(2, 3, kernel_metadata={"role": "hidden"}, bias_metadata=undecayed, rngs=rngs)
        self.norm = nnx.LayerNorm(3, scale_metadata=undecayed, rngs=rngs)
        self.slope = nnx.Param(jnp.ones((2, 3)), role="undecayed")
        self.embed = nnx.Embed(4, 2, embedding_metadata={"role": "decayed"}, rngs=rngs)


SAID = {
    "linear": {"kernel": "hidden", "bias": "undecayed"},
    "norm": {"scale": "undecayed", "bias": "decayed"},  # nothing is said of this bias
    "slope": "undecayed",
    "embed": {"embedding": "decayed"},
}


def test_what_is_decayed_is_what_variables_say():
    params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)[1]
    assert nnx.to_pure_dict(parameter_roles(params)) == SAID
    assert nnx.to_pure_dict(decay_mask(params)) == jax.tree.map(lambda role: role != "undecayed", SAID)


def test_layers_that_are_stacked_say_what_each_of_them_says():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return Model(rngs)

    params = nnx.split(stack(nnx.Rngs(0)), nnx.Param)[1]
    assert params["slope"].shape == (3, 2, 3)
    assert nnx.to_pure_dict(parameter_roles(params)) == SAID


def test_arrays_say_nothing_whatever_they_are_called():
    """No name is guessed from; the roles of the caller, as a pytree, a prefix of one or a function, are what holds."""
    params = {"norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}, "kernel": jnp.ones((3, 2))}
    assert decay_mask(params) == {"norm": {"scale": True, "bias": True}, "kernel": True}
    expected = {"norm": {"scale": False, "bias": False}, "kernel": True}
    assert decay_mask(params, {"norm": "undecayed", "kernel": "hidden"}) == expected
    by_axes = decay_mask(params, lambda p: jax.tree.map(lambda x: "decayed" if x.ndim > 1 else "undecayed", p))
    assert by_axes == expected


def test_a_role_that_is_none_is_refused():
    with pytest.raises(ValueError, match="roles holds 'free': need one of hidden, decayed, undecayed"):
        decay_mask({"w": jnp.ones(3)}, {"w": "free"})
    optimizer = make_optimizer(OptimizerConfig(), 200, roles={"w": "kernel"})
    with pytest.raises(ValueError, match="roles holds 'kernel'"):
        optimizer.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="roles holds None"):
        decay_mask({"w": jnp.ones(3)}, {"w": None})
    with pytest.raises(ValueError, match="roles must be a pytree like the parameters, or a prefix of theirs"):
        decay_mask({"w": jnp.ones(3), "b": jnp.ones(3)}, {"w": "hidden"})


ROLES = {"kernel": "hidden", "scale": "undecayed", "w": "decayed"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_takes_its_share_of_decayed_parameters_and_no_more(name):
    params = {"kernel": jnp.full((2, 2), 3.0), "scale": jnp.full(2, 3.0), "w": jnp.full((2, 2), 3.0)}
    config = OptimizerConfig(name, learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    updates, _ = one_step(config, params, jax.tree.map(jnp.zeros_like, params), roles=ROLES)
    np.testing.assert_array_equal(updates["scale"], 0)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 3, rtol=8 * EPS)
    np.testing.assert_allclose(updates["w"], -0.5 * 0.1 * 3, rtol=8 * EPS)


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, 1.0), (None, 5.0), (10.0, 5.0)])
def test_gradients_are_clipped_to_their_global_norm(clip_norm, expected):
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # of norm 5
    _, state = one_step(OptimizerConfig(beta1=0.75, clip_norm=clip_norm, warmup_steps=0), params, gradients)
    first_moment = optax.tree.get(state, "mu")  # (1 − beta1) times the clipped gradient
    assert float(optax.tree.norm(first_moment)) == pytest.approx(0.25 * expected, rel=8 * EPS)
    assert float(first_moment["b"][0] / first_moment["a"][0]) == pytest.approx(4 / 3, rel=8 * EPS)


def test_the_first_step_of_adamw_is_the_sign_of_the_gradient():
    gradients = {"w": jnp.array([0.3, -0.2])}
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0.0, clip_norm=None, eps=1e-12)
    updates, _ = one_step(config, {"w": jnp.ones(2)}, gradients)
    np.testing.assert_allclose(updates["w"], [-0.01, 0.01], rtol=16 * EPS)


def test_eps_and_beta2_reach_adamw():
    # First step: m̂ = g and v̂ = g², so the update is −lr · g / (|g| + eps). Second step, gradient 0:
    # m = b1 (1−b1) g, v = b2 (1−b2) g², each divided by 1 − b².
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=0, final_fraction=1.0, weight_decay=0.0, clip_norm=None, eps=1.0, beta2=0.5
    )
    optimizer = make_optimizer(config, 10)
    params = {"w": jnp.ones(1)}
    first, state = optimizer.update({"w": jnp.array([2.0])}, optimizer.init(params), params)
    assert float(first["w"][0]) == pytest.approx(-2 / 3, rel=16 * EPS)
    second, _ = optimizer.update({"w": jnp.array([0.0])}, state, params)
    moment, square = 0.9 * 0.1 * 2 / (1 - 0.9**2), 0.25 * 4 / (1 - 0.5**2)
    assert float(second["w"][0]) == pytest.approx(-moment / (square**0.5 + 1), rel=16 * EPS)


def newton_schulz(matrix):
    """Five quintic iterations from norm 1, in float64, with the coefficients of Jordan et al. (2024)."""
    x = np.asarray(matrix, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_is_jordans_rule():
    """m ← β m + g and the direction of g + β m: Nesterov's average, whose bias is not corrected."""
    shape, beta = (3, 5), 0.9
    gradients = [np.asarray(jax.random.normal(jax.random.key(i), shape)) for i in range(3)]
    config = OptimizerConfig("muon", 1.0, 0, final_fraction=1.0, weight_decay=0.0, beta1=beta, clip_norm=None)
    optimizer = make_optimizer(config, 10, roles="hidden")
    params = {"w": jnp.zeros(shape)}
    state, momentum = optimizer.init(params), np.zeros(shape)
    for gradient in gradients:
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        momentum = beta * momentum + gradient.astype(np.float64)
        expected = -0.2 * np.sqrt(max(shape)) * newton_schulz(gradient + beta * momentum)
        # Each iteration multiplies errors by up to its slope at 0, 3.4.
        np.testing.assert_allclose(updates["w"], expected, rtol=0, atol=3.4445**5 * 4 * EPS)


def test_muon_serves_the_matrices_of_stacked_layers_as_those_of_single_ones():
    kernels = jax.random.normal(jax.random.key(0), (3, 4, 6))
    config = OptimizerConfig("muon", warmup_steps=0, clip_norm=None)
    stacked, _ = one_step(config, {"kernel": kernels}, {"kernel": kernels**2}, roles="hidden")
    for layer, kernel in enumerate(kernels):
        single, _ = one_step(config, {"kernel": kernel}, {"kernel": kernel**2}, roles="hidden")
        # Newton-Schulz: 5 iterations of three products of length 6 at most, of matrices of norm near 1.
        np.testing.assert_allclose(stacked["kernel"][layer], single["kernel"], rtol=0, atol=5 * 3 * 6 * 4 * EPS)


def test_muon_leaves_all_but_hidden_matrices_to_adamw():
    """Also a matrix that is called kernel, such as that of a convolution or of the output."""
    params = {"w": jnp.ones((2, 3)), "embedding": jnp.ones((4, 3)), "kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}
    gradients = jax.tree.map(lambda leaf: jnp.linspace(-1.0, 2.0, leaf.size).reshape(leaf.shape), params)
    config = OptimizerConfig("muon", warmup_steps=0, clip_norm=None, weight_decay=0.0)
    roles = {"w": "hidden", "embedding": "decayed", "kernel": "decayed", "bias": "undecayed"}
    updates, _ = one_step(config, params, gradients, roles=roles)
    adamw = optax.adamw(config.learning_rate, config.beta1, config.beta2, config.eps, weight_decay=0.0)
    expected, _ = adamw.update(gradients, adamw.init(params), params)
    for name in ("embedding", "kernel", "bias"):
        np.testing.assert_allclose(updates[name], expected[name], rtol=16 * EPS)
    assert np.abs(updates["w"] - expected["w"]).max() > 1e-4


def test_muon_serves_the_parameters_of_flax_modules():
    params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)[1]
    updates, _ = one_step(OptimizerConfig("muon", warmup_steps=0), params, jax.tree.map(jnp.ones_like, params))
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(updates))


def test_muon_without_matrices_is_refused():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match="name is 'muon' but no parameter is a hidden matrix: need roles"):
        make_optimizer(OptimizerConfig("muon"), 200).init(params)
    with pytest.raises(ValueError, match=r"a parameter of shape \(2,\) is a hidden matrix: need two axes"):
        make_optimizer(OptimizerConfig("muon"), 200, roles="hidden").init(params)


def test_schedule_free_averages_the_steps_of_its_rule():
    """One parameter, gradients of constant sign and no decay: AdamW without momentum goes down by its rate."""
    config = OptimizerConfig(
        "schedule_free", 0.1, 0, "constant", weight_decay=0.0, beta1=0.9, beta2=0.5, clip_norm=None
    )
    optimizer = make_optimizer(config, 10)
    params = {"w": jnp.ones(1)}
    state, z, mean = optimizer.init(params), 1.0, 1.0
    for step in range(4):
        updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
        z -= 0.1
        mean += (z - mean) / (step + 1)
        # Means of 4 numbers, which the division by beta1 of differences of 1 magnifies.
        np.testing.assert_allclose(evaluation_params(state, params)["w"], mean, rtol=100 * EPS)
        np.testing.assert_allclose(params["w"], 0.9 * mean + 0.1 * z, rtol=100 * EPS)
    assert evaluation_params(optax.adam(0.1).init(params), params) is params
    inside = optax.chain(optax.identity(), optimizer)
    np.testing.assert_allclose(evaluation_params(inside.init(params), params)["w"], params["w"], rtol=10 * EPS)


def test_the_loss_scale_halves_where_the_gradient_overflows_and_grows_again():
    optimizer = loss_scaling(optax.sgd(1.0, momentum=0.5), scale=8.0, period=2)
    params = {"w": jnp.ones(2)}
    state, scales, moved = optimizer.init(params), [], []
    for value in (1.0, np.inf, 1.0, np.nan, 1.0, 1.0, 1.0):
        updates, state = optimizer.update({"w": jnp.array([1.0, value])}, state, params)
        scales.append(float(state.scale))
        moved.append(updates["w"].tolist())
    assert scales == [8, 4, 4, 2, 2, 4, 4]
    assert moved[1] == moved[3] == [0, 0]
    assert moved[2] == [-1.5, -1.5]  # the momentum is that of the steps that counted
    for _ in range(9):
        _, state = optimizer.update({"w": jnp.full(2, np.nan)}, state, params)
    assert float(state.scale) == 1
    with pytest.raises(ValueError, match=r"scale is 0\.5: need a number from 1 on"):
        loss_scaling(optax.sgd(1.0), 0.5)
    with pytest.raises(ValueError, match="period is 0"):
        loss_scaling(optax.sgd(1.0), period=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "name is 'sgd': need 'adamw', 'muon' or 'schedule_free'"),
        ({"name": "schedule_free"}, "schedule is 'cosine' with 'schedule_free': need 'constant'"),
        ({"name": "schedule_free", "schedule": "constant", "beta1": 0.0}, "beta1 is 0 with 'schedule_free'"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: need a number above 0"),
        ({"warmup_steps": 10}, "warmup_steps is 10 of 10 steps"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"final_fraction": 1.5}, "final_fraction is 1.5"),
        ({"schedule": "linear"}, "schedule is 'linear': need 'cosine', 'constant' or 'stable'"),
        ({"decay_fraction": 0.0}, "decay_fraction is 0.0: need a number above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(**{"warmup_steps": 1, **changes}), 10)
