"""Functions and inputs have the moments they state, to four standard errors, and tasks put them together as told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl

KEY = jax.random.key(1)
PROMPTS = 8000


def drawn(function=None, inputs=None, length=3, batch=PROMPTS, **options):
    task = icl.FunctionTask(function or icl.Linear(), inputs or icl.Gaussian(4), length, **options)
    return jax.jit(lambda key: task.sample(key, batch))(KEY)


def near(samples, expected, factor=4):
    """Whether the mean over the first axis is as expected, within four standard errors."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(0) / np.sqrt(len(samples))
    np.testing.assert_array_less(abs(samples.mean(0) - expected), factor * error + 1e-5)


def covariances(x):
    """x_i x_iᵀ for the first input of each prompt, and x_1 x_2ᵀ."""
    x = np.asarray(x, np.float64)
    return np.einsum("bi,bj->bij", x[:, 0], x[:, 0]), np.einsum("bi,bj->bij", x[:, 0], x[:, 1])


# Functions.


def test_linear_functions_have_the_covariance_given():
    half = np.random.default_rng(0).normal(size=(4, 4)) / 2
    prompt = drawn(icl.Linear(1.5, jnp.asarray(half @ half.T)))
    near(prompt.hidden, 0)
    near(np.einsum("bi,bj->bij", prompt.hidden, prompt.hidden), 2.25 * half @ half.T)
    np.testing.assert_allclose(prompt.y, np.einsum("bnd,bd->bn", prompt.x, prompt.hidden), atol=1e-5)


def test_sparse_functions_have_so_many_weights_anywhere_among_the_visible():
    prompt = drawn(icl.SparseLinear(2))
    assert ((prompt.hidden != 0).sum(1) == 2).all()
    near(prompt.hidden != 0, 0.5)
    near(prompt.hidden**2, 0.5)
    few = drawn(icl.SparseLinear(2), visible=3, batch=200)
    assert ((few.hidden[:, :3] != 0).sum(1) == 2).all()
    assert (few.hidden[:, 3] == 0).all()
    assert ((drawn(icl.SparseLinear(2), visible=1, batch=50).hidden != 0).sum(1) == 1).all()


def test_pools_are_drawn_from_evenly():
    pool = jax.random.normal(KEY, (5, 4))
    prompt = drawn(icl.Pool(pool))
    near((prompt.hidden[:, None] == pool).all(-1), 0.2)


def test_blocks_see_their_own_coordinates():
    prompt = drawn(icl.BlockwiseLinear(2, 0.5), batch=50)
    products = prompt.x * prompt.hidden[:, None]
    np.testing.assert_allclose(
        prompt.y, jnp.stack([products[..., :2].sum(-1), products[..., 2:].sum(-1)], -1), atol=1e-5
    )
    near(drawn(icl.BlockwiseLinear(2, 0.5)).hidden ** 2, 0.25)


def test_networks_are_networks_of_variance_d():
    """E f² = (2 / h) h E[v²] E[relu(u·x)²] = E |x|² = d."""
    prompt = drawn(icl.ReluNetwork(7))
    u, v = prompt.hidden
    hidden = np.maximum(np.einsum("bnd,bdh->bnh", prompt.x, u), 0)
    np.testing.assert_allclose(prompt.y, np.sqrt(2 / 7) * np.einsum("bnh,bh->bn", hidden, v), atol=1e-4)
    near(prompt.y, 0)
    near(prompt.y**2, 4)


@pytest.mark.parametrize("depth", [0, 3])
def test_trees_walk_from_the_root_to_a_leaf(depth):
    prompt = drawn(icl.DecisionTree(depth), batch=40)
    coordinates, values = prompt.hidden
    for b in range(40):
        for n in range(3):
            node = 0
            for _ in range(depth):
                node = 2 * node + (2 if prompt.x[b, n, coordinates[b, node]] > 0 else 1)
            assert prompt.y[b, n] == values[b, node - (2**depth - 1)]
    many = drawn(icl.DecisionTree(depth))
    near(many.y, 0)
    near(many.y**2, 1)


def test_quadratic_functions_have_the_variance_of_linear_ones():
    prompt = drawn(icl.Quadratic())
    np.testing.assert_allclose(
        prompt.y, np.einsum("bnd,bd->bn", prompt.x**2, prompt.hidden) / np.sqrt(3), rtol=1e-4, atol=1e-5
    )
    near(prompt.y**2, 4)


def test_signs_are_signs_and_noise_flips_them():
    prompt = drawn(icl.LinearSign(), noise=0.2)
    clean = np.where(np.einsum("bnd,bd->bn", prompt.x, prompt.hidden) >= 0, 1, -1)
    assert (prompt.clean == clean).mean() > 0.9999  # but for products at rounding
    near(prompt.y != prompt.clean, 0.2)


def test_logistic_labels_have_the_probability_of_their_score():
    """E[y | x, w] = tanh(scale w·x / 2), so the residual has no mean, also times any function of the score."""
    prompt = drawn(icl.Logistic(2.0))
    w, _ = prompt.hidden
    score = np.einsum("bnd,bd->bn", prompt.x, w)
    assert set(np.unique(prompt.y)) == {-1, 1}
    residual = np.asarray(prompt.y) - np.tanh(score)
    near(residual, 0)
    near(residual * score, 0)
    near(residual[:, 0] * residual[:, 1], 0)


def test_mixtures_draw_each_prior_as_often_as_they_say():
    mixture = icl.OneOf((icl.Linear(), icl.ScaledValues(icl.Linear(), 10.0)), (0.25, 0.75))
    prompt = drawn(mixture)
    index, (first, second) = prompt.hidden
    near(index, 0.75)
    weights = np.where(np.asarray(index)[:, None] == 0, first, 10 * np.asarray(second))
    np.testing.assert_allclose(prompt.y, np.einsum("bnd,bd->bn", prompt.x, weights), rtol=1e-4, atol=1e-3)


# Inputs.


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.5), (1.0, 0.25, 0.0)])
def test_the_root_has_a_derivative_where_eigenvalues_are_equal(values):
    """d(R R) = dΣ, along a change that keeps the range of Σ: of equal eigenvalues there are no derivatives alone."""
    with jax.enable_x64(True):
        basis = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
        covariance = basis @ np.diag(values) @ basis.T
        change = np.random.default_rng(1).normal(size=(3, 3))
        inside = basis @ np.diag(np.sign(values)) @ basis.T
        change = inside @ (change + change.T) @ inside
        root, moved = jax.jvp(icl.inputs.root, (jnp.asarray(covariance),), (jnp.asarray(change),))
        np.testing.assert_allclose(root @ root, covariance, atol=1e-12)
        np.testing.assert_allclose(root @ moved + moved @ root, change, atol=1e-12)


def test_numbers_of_numpy_and_integers_are_taken_too():
    prompt = drawn(icl.Pool(np.eye(4)), noise=0, batch=3)
    np.testing.assert_array_equal(prompt.y, prompt.clean)


def test_gaussian_inputs_have_the_moments_given():
    half = np.random.default_rng(0).normal(size=(4, 4)) / 2
    mean = np.array([1.0, 0, -2, 3])
    x = drawn(inputs=icl.Gaussian(4, jnp.asarray(half @ half.T), jnp.asarray(mean))).x
    near(x[:, 0], mean)
    own, other = covariances(x - mean)
    near(own, half @ half.T)
    near(other, 0)
    x = drawn(inputs=icl.Scaled(icl.Gaussian(4), 3.0, jnp.asarray(mean))).x
    near(x[:, 0], mean)
    near(covariances(x - mean)[0], 9 * np.eye(4))


def test_skewed_inputs_have_eigenvalues_that_fall_as_squares_in_a_basis_of_each_prompt():
    """Over bases the covariance is I; of one long prompt its eigenvalues are 1/k², with the trace d."""
    near(covariances(drawn(inputs=icl.Skewed(4)).x)[0], np.eye(4))
    x = np.asarray(drawn(inputs=icl.Skewed(4), length=20000, batch=1).x[0], np.float64)
    expected = 1 / np.arange(1, 5) ** 2
    values = np.linalg.eigvalsh(x.T @ x / len(x))[::-1]
    # The standard error of an eigenvalue is √(2 / n) of it.
    np.testing.assert_allclose(values, 4 * expected / expected.sum(), rtol=4 * np.sqrt(2 / 20000))


def test_inputs_of_a_subspace_span_it_and_no_more():
    x = drawn(inputs=icl.Subspace(4, 2), length=6).x
    near(covariances(x)[0], np.eye(4))
    assert (np.linalg.matrix_rank(x[:100], rtol=1e-4) == 2).all()


def test_inputs_of_an_orthant_share_their_signs():
    x = drawn(inputs=icl.Orthant(4)).x
    signs = np.sign(x)
    assert (signs == signs[:, :1]).all()
    near(signs[:, 0], 0)
    own, other = covariances(x)
    near(own, np.eye(4))
    near(other, 2 / np.pi * np.eye(4))  # E |z| |z'| = 2 / π


def test_queries_are_fresh_seen_or_orthogonal():
    inputs = icl.Scaled(icl.Gaussian(4), 5.0)
    fresh = drawn(inputs=inputs, query=icl.Fresh())
    near(np.einsum("bi,bj->bij", fresh.x[:, -1], fresh.x[:, -1]), np.eye(4))
    seen = drawn(inputs=inputs, length=4, query=icl.Seen())
    same = (seen.x[:, :-1] == seen.x[:, -1:]).all(-1)
    near(same, 1 / 3)
    assert (same.sum(1) == 1).all()
    orthogonal = drawn(inputs=icl.Gaussian(4), length=4, query=icl.Orthogonal())
    query = orthogonal.x[:, -1]
    products = np.einsum("bnd,bd->bn", orthogonal.x[:, :-1], query)
    norms = np.linalg.norm(query, axis=-1)
    assert (abs(products) <= 1e-3 * np.linalg.norm(orthogonal.x[:, :-1], axis=-1) * norms[:, None] + 1e-6).all()
    there = norms > 0
    assert there.mean() > 0.99
    near(norms[there] ** 2, 4)
    assert (drawn(inputs=icl.Gaussian(2), length=4, query=icl.Orthogonal(), batch=50).x[:, -1] == 0).all()
    assert (fresh.weights == jnp.array([0, 0, 1])).all()


def test_an_orthogonal_query_is_orthogonal_among_the_visible_coordinates():
    """And as long as a fresh one of them, and 0 once the context spans them."""
    prompt = drawn(length=3, visible=3, query=icl.Orthogonal(), batch=2000)
    query = prompt.x[:, -1]
    assert (prompt.x[..., 3:] == 0).all()
    there = jnp.linalg.norm(query, axis=-1) > 0
    assert there.mean() > 0.99
    near((query[there] ** 2).sum(-1), 3)
    products = np.einsum("bnd,bd->bn", prompt.x[:, :-1], query)
    norms = np.linalg.norm(prompt.x[:, :-1], axis=-1) * np.linalg.norm(query, axis=-1)[:, None]
    # The complement is cut out in float32 and rescaled by at most 1e3 (`Orthogonal`).
    assert (abs(products) <= 1e3 * 4 * np.finfo(np.float32).eps * norms).all()
    spanned = drawn(length=4, visible=3, query=icl.Orthogonal(), batch=50).x[:, -1]
    assert (spanned == 0).all()


# Tasks.


def test_noise_has_its_variance_and_answers_count_from_the_first_to_the_last_point():
    prompt = drawn(noise=0.5, length=5, first=1, points=4)
    near((prompt.y - prompt.clean) ** 2, 0.25)
    near((prompt.y - prompt.clean)[:, 0] * (prompt.y - prompt.clean)[:, 1], 0)
    assert (prompt.weights == jnp.array([0, 1, 1, 1, 0])).all()


def test_a_curriculum_grows_to_the_task_and_stays_there():
    task = icl.FunctionTask(icl.Linear(), icl.Gaussian(4), 6)
    grows = icl.Curriculum(task, every=10, dims=(2, 1), points=(3, 2))

    @jax.jit
    def at(step):
        prompt = grows.at(step).sample(KEY, 2)
        return (prompt.x != 0).all((0, 1)).sum(), prompt.weights[0].sum()

    sizes = [tuple(map(int, at(step))) for step in (0, 9, 10, 20, 1000, 2**31 - 1)]
    assert sizes == [(2, 3), (2, 3), (3, 5), (4, 6), (4, 6), (4, 6)]
    np.testing.assert_array_equal(grows.at(1000).sample(KEY, 2).x, task.sample(KEY, 2).x)


def test_errors_name_the_argument():
    linear, gaussian = icl.Linear(), icl.Gaussian(4)
    for call, message in (
        (lambda: icl.FunctionTask(linear, gaussian, 0), "length must be at least 1"),
        (lambda: icl.FunctionTask(linear, gaussian, 3, first=3), "first is 3 but length is 3"),
        (lambda: icl.FunctionTask(linear, gaussian, 3, noise=-0.1), "noise holds -0.1: need numbers from 0 to inf"),
        (
            lambda: icl.FunctionTask(icl.LinearSign(), gaussian, 3, noise=0.6),
            "noise holds 0.6: need numbers from 0 to 0.5",
        ),
        (lambda: icl.FunctionTask(linear, gaussian, 3, noise=jnp.array(-0.5)), "noise holds -0.5: need numbers from 0"),
        (lambda: icl.FunctionTask(linear, gaussian, 3, visible=-2), "visible is -2: need a number from 1 to 4"),
        (lambda: icl.FunctionTask(linear, gaussian, 3, visible=5), "visible is 5: need a number from 1 to 4"),
        (lambda: icl.FunctionTask(linear, gaussian, 3, points=0), "points is 0: need a number from 1 to 3"),
        (lambda: icl.FunctionTask(linear, gaussian, 3, points=99), "points is 99: need a number from 1 to 3"),
        (lambda: icl.FunctionTask(linear, gaussian, 3, first=1, points=1), "points is 1: need a number from 2 to 3"),
        (lambda: icl.Curriculum(icl.FunctionTask(linear, gaussian, 3), 5, dims=(5, 1)), r"dims is \(5, 1\)"),
        (
            lambda: icl.Curriculum(icl.FunctionTask(linear, gaussian, 9, first=4), 5, points=(4, 1)),
            r"points is \(4, 1\): need a start from 5 to 9",
        ),
        (
            lambda: icl.Curriculum(icl.FunctionTask(linear, gaussian, 9, query=icl.Fresh()), 5, points=(4, 1)),
            r"points is \(4, 1\): need a start from 9 to 9",
        ),
        (lambda: icl.Linear(covariance=-jnp.eye(2)), "Linear: covariance has the eigenvalue -1"),
        (lambda: icl.Linear(covariance=jnp.array([[1.0, 0.5], [0.0, 1.0]])), "Linear: covariance is not symmetric"),
        (lambda: icl.Linear(covariance=jnp.ones(())), r"Linear: covariance has shape \(\)"),
        (lambda: icl.Linear(covariance=jnp.eye(3)).draw(KEY, 4, 4), r"has shape \(3, 3\): need \(4, 4\)"),
        (lambda: icl.Gaussian(2, jnp.eye(3)), r"covariance has shape \(3, 3\): need \(2, 2\)"),
        (lambda: icl.Gaussian(1, mean=jnp.ones(3)), r"Gaussian: mean has shape \(3,\): need \(1,\)"),
        (lambda: icl.Scaled(gaussian, shift=jnp.ones(3)), r"Scaled: shift has shape \(3,\): need \(4,\)"),
        (
            lambda: drawn(icl.OneOf((linear, icl.BlockwiseLinear(2)))),
            r"OneOf: functions has values of shapes \[\(\), \(2,\)\]",
        ),
        (lambda: icl.Gaussian(2, -jnp.eye(2)), "need eigenvalues from 0 on"),
        (lambda: icl.Subspace(3, 4), "dimensions is 4 of dim 3"),
        (lambda: icl.Pool(jnp.ones((3, 5))).draw(KEY, 4, 4), r"weights has shape \(3, 5\): need \[M, 4\]"),
        (lambda: icl.BlockwiseLinear(3).draw(KEY, 4, 4), "tasks is 3 for dim 4: need a divisor"),
        (lambda: icl.SparseLinear(5).draw(KEY, 4, 4), "nonzero is 5 of dim 4"),
        (lambda: icl.OneOf(()), "functions is empty"),
        (lambda: icl.OneOf((linear, icl.LinearSign())), "need one kind"),
        (lambda: icl.OneOf((linear, linear), (0.5, 0.6)), "need 2 numbers that sum to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
