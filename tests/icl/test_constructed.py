"""Layers with weights written by hand are the closed forms, to rounding; the induction circuit repeats what it saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl
from jaxattn.core.merged import SoftmaxHeads

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def prompt(dim=4, length=9, batch=3, function=None):
    task = icl.FunctionTask(function or icl.Linear(), icl.Gaussian(dim), length, noise=0.3)
    drawn = task.sample(KEY, batch)
    return drawn.x.astype(float), drawn.y.astype(float)


@jax.jit
def answers(predictor, x, y):
    return predictor(x, y)


def assert_same(one, other, x, y, tolerance=1e-12):
    expected = answers(other, x, y)
    np.testing.assert_allclose(answers(one, x, y), expected, rtol=0, atol=tolerance * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(("dim", "length"), [(1, 2), (4, 9)])
@pytest.mark.parametrize("form", ["von oswald", "ahn", "zhang"])
def test_one_layer_is_one_gradient_step_in_every_form(form, dim, length):
    """Also with the query among the keys, as in the third."""
    x, y = prompt(dim, length)
    layer = icl.one_gradient_step(dim, 0.7, form)
    assert layer.layers[0].mask_query == (form != "zhang")
    assert_same(layer, icl.GradientDescent(0.7), x, y)


def test_layers_are_preconditioned_steps_and_the_labels_residuals():
    x, y = prompt()
    gammas = 0.3 * jax.random.normal(KEY, (3, 4, 4))
    layers = icl.preconditioned_steps(gammas)
    assert_same(layers, icl.Preconditioned(gammas), x, y)
    z = icl.stack(x, y)
    step = jax.jit(lambda layer, z: layer(z))
    w = jnp.zeros((3, 4))
    for layer, gamma in zip(layers.layers, gammas, strict=True):
        z = step(layer, z)
        residuals = y[:, :-1] - jnp.einsum("bnd,bd->bn", x[:, :-1], w)
        w = w + jnp.einsum("bn,bnd->bd", residuals, x[:, :-1]) @ gamma.T / 8
        after = y.at[:, -1].set(0) - jnp.einsum("bnd,bd->bn", x, w)
        np.testing.assert_allclose(z[..., -1], after, rtol=0, atol=1e-12 * float(jnp.abs(after).max()))


def test_layers_that_move_their_inputs_are_gd_plus_plus():
    x, y = prompt()
    gammas, transforms = 0.3 * jax.random.normal(KEY, (2, 3, 4, 4))
    assert_same(icl.preconditioned_steps(gammas, transforms), icl.Preconditioned(gammas, transforms), x, y, 1e-11)


def test_moving_the_inputs_conditions_the_problem():
    """The error of two steps is a polynomial in the Gram matrix, of higher degree where the inputs move between them:
    (1 − a λ) (1 − b λ), or 1 − a λ − b λ (1 − c λ)² (1 − a λ). At d 5, N 20 without noise the best of the first leave
    0.363 of the risk 5, and the second, with these a, b, c, 0.057."""
    a, b, c = 0.517, 3.477, 0.449
    x, _ = prompt(5, 21, 6)
    w = jax.random.normal(KEY, (6, 5))
    eye = jnp.eye(5)
    predictor = icl.Preconditioned(jnp.stack([a * eye, b * eye]), jnp.stack([c / a * eye, eye]))
    y = jnp.einsum("bnd,bd->bn", x, w)
    gram = jnp.einsum("bnd,bne->bde", x[:, :-1], x[:, :-1]) / 20
    values, vectors = jnp.linalg.eigh(gram)
    error = 1 - a * values - b * values * (1 - c * values) ** 2 * (1 - a * values)
    expected = jnp.einsum("bd,bdk,bk,bek,be->b", x[:, -1], vectors, error, vectors, w)
    np.testing.assert_allclose((y - answers(predictor, x, y))[:, -1], expected, rtol=0, atol=1e-11)

    many = np.random.default_rng(0).normal(size=(20000, 20, 5))
    values = np.linalg.eigvalsh(np.swapaxes(many, 1, 2) @ many / 20)
    powers = np.stack([values, values**2], -1).reshape(-1, 2)
    best = np.linalg.lstsq(powers, np.ones(len(powers)), rcond=None)[0]
    plain = ((1 - powers @ best).reshape(20000, 5) ** 2).sum(1)
    moved = ((1 - a * values - b * values * (1 - c * values) ** 2 * (1 - a * values)) ** 2).sum(1)
    # The figures have three digits. At its minimum the first does not move with the coefficients, to first order, so
    # that its standard error is that of a mean.
    for risk, figure in ((plain, 0.363), (moved, 0.057)):
        np.testing.assert_allclose(risk.mean(), figure, atol=4 * risk.std() / np.sqrt(20000) + 5e-4)


def test_heads_that_cancel_are_a_debiased_step_with_an_error_of_second_order():
    x, y = prompt()
    exact = icl.DebiasedDescent(0.7)(x, y)
    errors = []
    for omega in (0.04, 0.02, 0.01):
        layer = icl.debiased_gradient_step(4, 0.7, omega)
        assert abs(layer.heads.ov.sum()) < 1e-12
        errors.append(float(jnp.abs(answers(layer, x, y) - exact).max()))
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 4, rtol=0.05)


def test_a_constant_added_to_the_labels_comes_back_times_the_sum_of_the_values():
    x, y = prompt()
    kq = 0.3 * jnp.pad(jax.random.normal(KEY, (2, 4, 4)), ((0, 0), (0, 1), (0, 1)))
    layer = icl.SoftmaxLayer(SoftmaxHeads(kq, jnp.zeros((2, 5)).at[:, -1].set(jnp.array([0.8, -0.5]))))
    np.testing.assert_allclose(layer(x, y + 2)[:, 1:], layer(x, y)[:, 1:] + 0.6, rtol=1e-10)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_one_head_more_than_tasks_takes_a_debiased_step_on_each(tasks):
    x, y = prompt(tasks * 2, 9, 3, icl.BlockwiseLinear(tasks))
    errors = []
    for omega in (0.02, 0.01, 0.005):
        layer = icl.superposed_gradient_steps(tasks, 2, 0.7, omega)
        assert layer.heads.kq.shape[0] == tasks + 1
        said = answers(layer, x, y)
        assert said.shape == y.shape
        blocks = x.reshape(*x.shape[:2], tasks, 2)
        exact = jnp.stack([icl.DebiasedDescent(0.7)(blocks[:, :, m], y[..., m]) for m in range(tasks)], -1)
        errors.append(float(jnp.abs(said - exact).max()))
    order = 2 if tasks == 1 else 1  # two heads are opposite, and cancel even orders as well
    np.testing.assert_allclose(np.log2([errors[0] / errors[1], errors[1] / errors[2]]), order, atol=0.1)


@pytest.mark.parametrize("layer", ["linear", "softmax"])
def test_layers_are_predictors_that_do_not_look_ahead(layer):
    x, y = prompt(3, 5)
    predictor = icl.one_gradient_step(3, 0.7) if layer == "linear" else icl.debiased_gradient_step(3, 0.7)
    assert icl.leaks(predictor, x, y) == 0
    assert (answers(predictor, x, y)[:, 0] == 0).all()


def test_a_constructed_layer_has_gradients_where_it_is_trained():
    """The slope along the step is the difference between layers of nearby steps."""
    x, y = prompt(3, 7, 4)

    @jax.jit
    def loss(layer):
        return ((layer(x, y) - y) ** 2).mean()

    layer = icl.one_gradient_step(3, 0.3)
    slope = jax.grad(loss)(layer)
    ahead, behind = (loss(icl.one_gradient_step(3, s)) for s in (0.3 + 1e-6, 0.3 - 1e-6))
    along = -jnp.trace(slope.layers[0].kq[:-1, :-1])  # kq = −step · diag(I, 0)
    np.testing.assert_allclose(along, (ahead - behind) / 2e-6, rtol=1e-6)


# The induction circuit.


def copies(first=None, symbols=8):
    """[first r r] for r of distinct symbols, with `first` of a number no other symbol has."""
    block = jax.random.permutation(KEY, symbols)
    twice = jnp.concatenate([block, block])
    return twice if first is None else jnp.concatenate([jnp.array([first]), twice])


def scores(circuit, tokens, start):
    """(previous-token score, prefix score, accuracy on the second copy of 8 symbols), from where the copies start."""
    before, again = (w[0] for w in circuit.weights(tokens))
    previous = np.mean([before[t, t - 1] for t in range(1, len(tokens))])
    second = np.arange(start + 8, start + 16)
    prefix = np.mean([again[t, t - 8 + 1] for t in second])
    said = circuit(tokens)
    right = [said[t, tokens[t + 1]] > jnp.delete(said[t], tokens[t + 1]).max() + 1e-6 for t in second[:-1]]
    return previous, prefix, np.mean(right)


def test_with_a_first_token_the_circuit_completes_everything():
    circuit, tokens = icl.induction_head(9, 17, 50.0), copies(first=8)
    np.testing.assert_allclose(scores(circuit, tokens, 1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(circuit(tokens).sum(-1), 1, rtol=1e-12)


def test_without_one_the_first_symbol_passes_for_its_own_successor():
    """Position 0 attends to itself, so the first match is split: prefix score 15/16, six of seven are right."""
    previous, prefix, accuracy = scores(icl.induction_head(8, 16, 50.0), copies(), 0)
    np.testing.assert_allclose([previous, prefix, accuracy], [1, 15 / 16, 6 / 7], rtol=1e-12)


def test_the_circuit_counts_successors():
    """After a, seen before b, b and c, the output is two thirds b and one third c."""
    a, b, c, first = 0, 1, 2, 3
    said = icl.induction_head(4, 8)(jnp.array([first, a, b, a, b, a, c, a]))
    np.testing.assert_allclose(said[-1], [0, 2 / 3, 1 / 3, 0], atol=1e-12)


@pytest.mark.parametrize("token", [-1, 4, -100])
def test_a_token_outside_the_vocabulary_is_nan_from_there_on(token):
    said = icl.induction_head(4, 8)(jnp.array([3, 0, 1, 0, token, 0, 2, 0]))
    assert np.isnan(said[4:]).all()


def test_weak_scores_are_a_softmax_between_the_places():
    """With beta 0 every layer averages."""
    circuit, tokens = icl.induction_head(5, 6, 0.0), jnp.array([4, 0, 1, 2, 0, 3])
    for weights in circuit.weights(tokens):
        np.testing.assert_allclose(weights[0], np.tri(6) / np.arange(1, 7)[:, None], rtol=1e-12)


def test_errors_name_the_argument():
    for call, message in (
        (lambda: icl.one_gradient_step(0, 0.1), "dim must be at least 1"),
        (lambda: icl.one_gradient_step(3, 0.1, "garg"), "form is 'garg': need one of"),
        (lambda: icl.preconditioned_steps(jnp.ones(3)), r"gammas has shape \(3,\)"),
        (lambda: icl.preconditioned_steps(jnp.ones((2, 3, 3)), jnp.ones((3, 3))), r"transforms has shape \(3, 3\)"),
        (lambda: icl.superposed_gradient_steps(0, 3, 0.1), "tasks must be at least 1"),
        (lambda: icl.induction_head(3, 0), "length must be at least 1"),
        (lambda: icl.induction_head(3, 4)(jnp.zeros(5, int)), "tokens has 5 positions: need at most 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
