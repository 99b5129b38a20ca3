"""Predictors of real functions are what they say, do not look ahead, and have the risk that theory states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl
from jaxattn.icl import theory

KEY = jax.random.key(0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def example(n=12, d=5, seed=0):
    """One prompt in float64, of which every other example and some more are seen, and a query."""
    rng = np.random.default_rng(seed)
    x, y, query = rng.normal(size=(n, d)), rng.normal(size=n), rng.normal(size=d)
    seen = np.arange(n) % 3 != 1
    return x, y, seen, query


def answer(predictor, x, y, seen, query):
    return float(predictor.answer(*map(jnp.asarray, (x, y, seen, query))))


def test_zero_averaging_and_least_squares_are_their_formulas(x64):
    x, y, seen, query = example()
    kept, labels = x[seen], y[seen]
    assert answer(icl.Zero(), x, y, seen, query) == 0
    np.testing.assert_allclose(answer(icl.Averaging(), x, y, seen, query), query @ kept.T @ labels / len(labels), 1e-12)
    least = np.linalg.lstsq(kept, labels, rcond=None)[0]
    np.testing.assert_allclose(answer(icl.LeastSquares(), x, y, seen, query), query @ least, rtol=1e-12)


def test_with_few_examples_least_squares_is_the_shortest_interpolation(x64):
    x, y, seen, query = example(n=5, d=8)
    kept, labels = x[seen], y[seen]
    shortest = kept.T @ np.linalg.solve(kept @ kept.T, labels)
    np.testing.assert_allclose(answer(icl.LeastSquares(), x, y, seen, query), query @ shortest, rtol=1e-12)


@pytest.mark.parametrize("rank", [5, 2])
def test_ridge_is_the_posterior_mean_also_of_a_singular_prior(x64, rank):
    """w ~ N(0, C), y = Xw + noise: E[w | y] = C Xᵀ (X C Xᵀ + σ² I)⁻¹ y, in which C is not inverted."""
    x, y, seen, query = example()
    half = np.random.default_rng(1).normal(size=(5, rank))
    covariance, kept = half @ half.T, x[seen]
    gram = kept @ covariance @ kept.T + 0.3 * np.eye(len(kept))
    posterior = covariance @ kept.T @ np.linalg.solve(gram, y[seen])
    ridge = icl.Ridge(0.3, jnp.asarray(covariance))
    np.testing.assert_allclose(answer(ridge, x, y, seen, query), query @ posterior, rtol=1e-9)


@pytest.mark.parametrize("penalty", [1.0, 1e-4, 1e-8, 1e-20, 1e-40])
def test_ridge_of_small_penalties_is_finite_and_right(penalty):
    """12 examples in 20 dimensions, in float32: a backward stable solution of the system with the rows √penalty e_k.

    Its error is within a small multiple of ε κ ‖w‖ ‖x‖, κ the condition number on the range; outside, the perturbation
    ε s_max ‖w‖ of the rows below is divided by their size at least √penalty, but not by less than rounding's own
    ε s_max. Then w changes by no more than its own length.
    """
    eps = float(np.finfo(np.float32).eps)
    x, y, seen, _ = example(12, 20)
    seen[:] = True
    left, s, right = np.linalg.svd(x, full_matrices=False)
    w = right.T @ (s / (s**2 + penalty) * (left.T @ y))
    given = (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), jnp.asarray(seen))
    for column in np.eye(20, dtype=np.float32):
        found = float(icl.Ridge(penalty).answer(*given, jnp.asarray(column)))
        worst = min(1.0, 20 * eps * s[0] / penalty**0.5) + 20 * eps * s[0] / s[-1]
        assert abs(found - column @ w) <= worst * np.linalg.norm(w)
    slopes = jax.grad(lambda x: icl.Ridge(penalty).answer(x, *given[1:], jnp.ones(20)))(given[0])
    assert jnp.isfinite(slopes).all()


def test_newton_stays_where_it_came_to_whatever_rounding_leaves():
    """5 examples in 8 dimensions, float32: what rounding leaves where no example reaches would double at each step."""
    x, y, seen, query = example(n=5, d=8)
    few = [jnp.asarray(each, jnp.float32) for each in (x, y)]
    there, later = (float(icl.Newton(steps).answer(*few, seen, jnp.asarray(query, jnp.float32))) for steps in (25, 500))
    least = answer(icl.LeastSquares(), x, y, seen, query)
    np.testing.assert_allclose([there, later], least, rtol=1e-4)


@pytest.mark.parametrize("n", [3, 6, 12, 30])
@pytest.mark.parametrize("alpha", [1.0, 0.1, 0.01])
def test_lasso_meets_the_conditions_of_its_minimum(x64, n, alpha):
    x, y, seen, _ = example(n=n, d=6)
    w = np.asarray(icl.Lasso(alpha, tolerance=1e-12).weights(jnp.asarray(x), jnp.asarray(y), jnp.asarray(seen)))
    kept, labels = x[seen], y[seen]
    pull = kept.T @ (labels - kept @ w) / len(labels)
    np.testing.assert_allclose(pull[w != 0], alpha * np.sign(w[w != 0]), atol=1e-9)
    assert (abs(pull) <= alpha + 1e-9).all()


FIT = jax.jit(lambda lasso, x, y, seen: lasso.fit(x, y, seen))


def degenerate(kind):
    """Examples and answers (float64) of which a solver may make a division by 0, or too few steps."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((12, 8)), rng.standard_normal(8)
    if kind == "as many as coordinates":
        x = x[:8]
    if kind == "fewer than coordinates":
        x = x[:3]
    if kind == "one":
        x = x[:1]
    if kind == "columns twice":
        x[:, 4:] = x[:, :4]
    if kind == "columns of zeros":
        x[:, ::3] = 0
    if kind == "a column of others":
        x[:, 7] = x[:, :7].sum(1)
    if kind == "columns of all sizes":
        x = x * 10.0 ** np.arange(-4, 4)
    return x, 0 * x[:, 0] if kind == "answers of zeros" else x @ w


KINDS = [
    *("plain", "as many as coordinates", "fewer than coordinates", "one", "columns twice", "columns of zeros"),
    *("a column of others", "columns of all sizes", "answers of zeros"),
]


@pytest.mark.parametrize("share", [0.3, 0.01, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lasso_says_how_near_it_is_to_its_minimum(dtype, kind, share):
    """The gap against one computed here from any dual point; alpha is this share of the least that gives w = 0."""
    x, y = (each.astype(dtype) for each in degenerate(kind))
    most = float(abs(x.T @ y).max()) / len(y)
    alpha, tolerance, eps = share * (most or 1.0), 1e-6 if dtype == np.float32 else 1e-10, np.finfo(dtype).eps
    with jax.enable_x64(dtype == np.float64):
        lasso = icl.Lasso(alpha, tolerance=tolerance)
        found = jax.device_get(FIT(lasso, jnp.asarray(x), jnp.asarray(y), jnp.ones(len(y), bool)))
    assert found.weights.dtype == dtype
    w, x, y = (each.astype(np.float64) for each in (found.weights, x, y))
    residual = y - x @ w
    loss = (residual**2).mean() / 2 + alpha * abs(w).sum()
    pull = x.T @ residual / len(y)
    dual = residual * min(1, alpha / max(abs(pull).max(), 1e-300))
    gap = loss - ((y**2).mean() - ((y - dual) ** 2).mean()) / 2
    # Each of the numbers that the gap is the difference of is rounded.
    rounding = 8 * eps * ((y**2).mean() + abs(w) @ (abs(x).T @ (abs(y) + abs(x) @ abs(w))) / len(y))
    assert found.converged
    assert found.sweeps <= 60
    assert abs(found.gap - gap) <= rounding
    assert gap <= tolerance * loss + rounding


@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.001, 0.0001])
@pytest.mark.parametrize("n", [10, 19, 20, 40])
def test_lasso_comes_further_than_300_sweeps_of_coordinate_descent(n, alpha):
    """In 20 dimensions, in float32, and meets the conditions of a minimum. The descent is in NumPy, in float64."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 20)).astype(np.float32)
    y = (x @ rng.standard_normal(20)).astype(np.float32)
    padded = jnp.zeros((40, 20)).at[:n].set(x), jnp.zeros(40).at[:n].set(y)  # one program for all
    found = FIT(icl.Lasso(alpha), *padded, jnp.arange(40) < n)
    x, y = x.astype(np.float64), y.astype(np.float64)

    def loss(w):
        return ((y - x @ w) ** 2).mean() / 2 + alpha * abs(w).sum()

    best = loss(np.asarray(found.weights, np.float64))
    w = np.asarray(found.weights, np.float64)
    pull = x.T @ (y - x @ w) / n
    off = np.where(w != 0, abs(pull - alpha * np.sign(w)), np.maximum(abs(pull) - alpha, 0))
    bound = 32 * np.finfo(np.float32).eps * (abs(x).T @ (abs(y) + abs(x) @ abs(w)) / n).max()
    assert off.max() <= bound
    assert found.converged
    gram, target, descended = x.T @ x / n, x.T @ y / n, np.zeros(20)
    for _ in range(300):
        for k in range(20):
            free = target[k] - gram[k] @ descended + gram[k, k] * descended[k]
            descended[k] = np.sign(free) * max(abs(free) - alpha, 0) / gram[k, k]
    assert best <= loss(descended) * (1 + 1e-6)


def test_a_lasso_that_needs_more_sweeps_says_so():
    x, y = (jnp.asarray(each, jnp.float32) for each in degenerate("as many as coordinates"))
    short = icl.Lasso(1e-3, sweeps=1)
    found = FIT(short, x, y, jnp.ones(len(y), bool))
    assert not found.converged
    assert found.sweeps == 1
    assert found.gap > 1e-3
    assert np.isfinite(found.weights).all()
    assert np.isnan(short.weights(x, y, jnp.ones(len(y), bool))).all()


def test_every_prompt_has_its_own_minimum_under_vmap():
    kinds = ("plain", "columns twice", "columns of zeros", "a column of others", "answers of zeros")
    x, y = (jnp.asarray(np.stack(each), jnp.float32) for each in zip(*map(degenerate, kinds), strict=True))
    seen = jnp.ones(y.shape, bool).at[0, 3:].set(False)
    together = jax.jit(jax.vmap(icl.Lasso(0.01).fit))(x, y, seen)
    assert together.converged.all()
    for i in range(len(kinds)):
        alone = FIT(icl.Lasso(0.01), x[i], y[i], seen[i])
        # Twins may share a weight in any way: the minimum fixes what is predicted.
        np.testing.assert_allclose(x[i] @ together.weights[i], x[i] @ alone.weights, atol=1e-4)
        assert abs(together.gap[i] - alone.gap) < 1e-5
    assert jnp.isfinite(icl.Lasso(0.01)(x, y)).all()
    nothing = FIT(icl.Lasso(0.01), x[0], y[0], jnp.zeros(12, bool))
    assert (nothing.weights == 0).all()
    assert nothing.gap == 0


def test_an_alpha_of_0_that_is_traced_is_least_squares(x64):
    x, y = (jnp.asarray(each) for each in degenerate("plain"))
    y = y + jax.random.normal(KEY, y.shape)
    w = jax.jit(lambda alpha: icl.Lasso(alpha).weights(x, y, jnp.ones(12, bool)))(0.0)
    np.testing.assert_allclose(w, np.linalg.lstsq(np.asarray(x), np.asarray(y))[0], rtol=1e-8)


def test_gradients_of_a_lasso_are_those_of_its_minimum(x64):
    x, y = (jnp.asarray(each) for each in degenerate("plain"))

    def answer(alpha, y):
        return jnp.arange(8.0) @ icl.Lasso(alpha, tolerance=1e-14).weights(x, y, jnp.ones(12, bool))

    by_alpha, by_y = jax.grad(answer, (0, 1))(0.1, y)
    step = 1e-5
    np.testing.assert_allclose(by_alpha, (answer(0.1 + step, y) - answer(0.1 - step, y)) / (2 * step), rtol=1e-6)
    along = jnp.cos(jnp.arange(12.0))
    by_difference = (answer(0.1, y + step * along) - answer(0.1, y - step * along)) / (2 * step)
    np.testing.assert_allclose(by_y @ along, by_difference, rtol=1e-6)


def test_lasso_on_orthonormal_inputs_is_the_soft_threshold(x64):
    x = 2 * np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    y = np.random.default_rng(1).normal(size=4)
    w = icl.Lasso(0.2, sweeps=1).weights(jnp.asarray(x), jnp.asarray(y), jnp.ones(4, bool))
    best = x.T @ y / 4
    np.testing.assert_allclose(w, np.sign(best) * np.maximum(abs(best) - 0.2, 0), atol=1e-14)


def test_gradient_descent_takes_its_steps(x64):
    x, y, seen, query = example()
    kept, labels, w = x[seen], y[seen], np.zeros(5)
    for _ in range(4):
        w = w + 0.3 * kept.T @ (labels - kept @ w) / len(labels)
    np.testing.assert_allclose(answer(icl.GradientDescent(0.3, 4), x, y, seen, query), query @ w, rtol=1e-12)
    once = answer(icl.GradientDescent(0.3), x, y, seen, query)
    np.testing.assert_allclose(once, 0.3 * answer(icl.Averaging(), x, y, seen, query), rtol=1e-12)


def test_gradient_descent_and_newton_tend_to_least_squares_and_ridge(x64):
    x, y, seen, query = example(n=30)
    least = answer(icl.LeastSquares(), x, y, seen, query)
    np.testing.assert_allclose(answer(icl.GradientDescent(0.5, 2000), x, y, seen, query), least, rtol=1e-9)
    np.testing.assert_allclose(answer(icl.Newton(20), x, y, seen, query), least, rtol=1e-9)
    ridge = answer(icl.Ridge(0.7), x, y, seen, query)
    np.testing.assert_allclose(answer(icl.Newton(20, 0.7), x, y, seen, query), ridge, rtol=1e-9)
    few = example(n=5, d=8)
    shortest = answer(icl.LeastSquares(), *few)
    np.testing.assert_allclose(answer(icl.Newton(25), *few), shortest, rtol=1e-7)


def test_the_error_of_newton_is_squared_at_each_step(x64):
    x, y, seen, query = example()
    kept = x[seen]
    system = kept.T @ kept + 0.5 * np.eye(5)
    for steps in (0, 1, 3, 5):
        error = np.linalg.matrix_power(np.eye(5) - system @ system / (system**2).sum(), 2**steps)
        inverse = (np.eye(5) - error) @ np.linalg.inv(system)
        found = answer(icl.Newton(steps, 0.5), x, y, seen, query)
        np.testing.assert_allclose(found, query @ inverse @ kept.T @ y[seen], rtol=1e-10)


@pytest.mark.parametrize("scale", ["context", 7.0])
def test_preconditioned_steps_are_steps_of_w(x64, scale):
    x, y, seen, query = example()
    kept, labels, w = x[seen], y[seen], np.zeros(5)
    gammas = 0.3 * np.random.default_rng(2).normal(size=(3, 5, 5))
    for gamma in gammas:
        w = w + gamma @ kept.T @ (labels - kept @ w) / (len(labels) if scale == "context" else scale)
    found = answer(icl.Preconditioned(jnp.asarray(gammas), scale=scale), x, y, seen, query)
    np.testing.assert_allclose(found, query @ w, rtol=1e-10)


def test_plain_steps_are_preconditioned_by_the_identity_and_transforms_of_zero_move_nothing(x64):
    x, y, seen, query = example()
    gammas = 0.3 * jnp.tile(jnp.eye(5), (3, 1, 1))
    plain = answer(icl.GradientDescent(0.3, 3), x, y, seen, query)
    np.testing.assert_allclose(answer(icl.Preconditioned(gammas), x, y, seen, query), plain, rtol=1e-12)
    still = icl.Preconditioned(gammas, jnp.zeros_like(gammas))
    np.testing.assert_allclose(answer(still, x, y, seen, query), plain, rtol=1e-12)


def test_debiased_descent_ignores_constants_and_is_centred_averaging(x64):
    x, y, seen, query = example()
    kept, labels = x[seen], y[seen]
    value = 0.7 / len(labels) * query @ (kept - kept.mean(0)).T @ labels
    np.testing.assert_allclose(answer(icl.DebiasedDescent(0.7), x, y, seen, query), value, rtol=1e-12)
    np.testing.assert_allclose(answer(icl.DebiasedDescent(0.7), x, y + 3, seen, query), value, rtol=1e-11)


def test_the_network_learns_its_examples_by_adam():
    optax = pytest.importorskip("optax")
    x, y, seen, _ = (jnp.asarray(z) for z in example(n=8, d=3))
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    predictor = icl.NetworkByAdam(hidden=16, steps=20)

    def error(weights):
        hidden = jax.nn.relu(x @ weights["u"] + weights["b"])
        return ((hidden @ weights["v"] + weights["c"] - y) ** 2 * seen).sum() / seen.sum()

    weights, adam = predictor.start(3), optax.adam(5e-3)
    state = adam.init(weights)
    for _ in range(20):
        updates, state = adam.update(jax.grad(error)(weights), state)
        weights = optax.apply_updates(weights, updates)
    # Twenty steps of 5e-3, each a quotient of sums of float32.
    trained = predictor.trained(x, y, seen)
    for name in weights:
        np.testing.assert_allclose(trained[name], weights[name], atol=1e-4, err_msg=name)


PREDICTORS = {
    "zero": icl.Zero(),
    "averaging": icl.Averaging(),
    "least squares": icl.LeastSquares(),
    "ridge": icl.Ridge(0.5),
    "lasso": icl.Lasso(0.1),
    "descent": icl.GradientDescent(0.3, 3),
    "preconditioned": icl.Preconditioned(0.3 * jnp.ones((2, 4, 4)), 0.1 * jnp.ones((2, 4, 4))),
    "debiased": icl.DebiasedDescent(0.5),
    "newton": icl.Newton(5, 0.1),
    "network": icl.NetworkByAdam(8, steps=3),
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_no_predictor_looks_ahead_and_none_knows_anything_at_first(name):
    prompt = icl.FunctionTask(icl.Linear(), icl.Gaussian(4), 6, noise=0.1).sample(KEY, 3)
    assert icl.leaks(PREDICTORS[name], prompt.x, prompt.y) == 0
    answers = PREDICTORS[name](prompt.x, prompt.y)
    assert answers.shape == prompt.y.shape
    assert (answers[:, 0] == 0).all()
    assert jnp.isfinite(answers).all()


def test_after_is_the_call_at_those_lengths():
    prompt = icl.FunctionTask(icl.Linear(), icl.Gaussian(4), 9).sample(KEY, 3)
    some = icl.Ridge(0.5).after(prompt.x, prompt.y, [7, 2])
    np.testing.assert_allclose(some, icl.Ridge(0.5)(prompt.x, prompt.y)[:, [7, 2]], rtol=1e-5)


def within(estimate, expected, places=slice(None)):
    """Whether theory is within four standard errors of each mean."""
    expected = np.asarray(expected, float)
    mean, error = estimate.mean[places], estimate.error[places]
    assert (abs(mean - expected) <= 4 * error).all(), f"{mean} ± {error} is not {expected}"
    assert (error <= 0.1 * expected).all(), "too few prompts to tell"


def test_risks_without_noise_are_those_of_theory(x64):
    """d = 20: least squares is at 15, 10, 1 after 5, 10, 19 examples, averaging at 84, 21, 10.5 after 5, 20, 40."""
    lengths = (5, 10, 19, 20, 40)
    task = icl.FunctionTask(icl.Linear(), icl.Gaussian(20), 41)
    predictors = {"least": icl.LeastSquares(), "averaging": icl.Averaging()}
    risks = icl.compare(task, predictors, lengths, KEY, batch=512, batches=2).risks
    assert [theory.ols_excess(d=20, n=n) for n in lengths] == [15, 10, 1, 0, 0]
    assert [theory.averaging_excess(d=20, n=n) for n in (5, 20, 40)] == [84, 21, 10.5]
    within(risks["least"], [15, 10, 1], slice(3))
    assert (risks["least"].mean[3:] < 1e-12).all()
    within(risks["averaging"], [theory.averaging_excess(d=20, n=n) for n in lengths])


def test_risks_of_sparse_functions_are_those_of_theory():
    """s = 3 of d = 20: averaging at 12.6, 3.15, 1.575, least squares at s (1 − i / d)."""
    lengths = (5, 10, 20, 40)
    task = icl.FunctionTask(icl.SparseLinear(3), icl.Gaussian(20), 41)
    predictors = {"averaging": icl.Averaging(), "least": icl.LeastSquares()}
    risks = icl.compare(task, predictors, lengths, KEY, batch=512, batches=8).risks
    expected = [theory.sparse_averaging_excess(d=20, nonzero=3, n=n) for n in lengths]
    np.testing.assert_allclose(expected, [12.6, 6.3, 3.15, 1.575])
    within(risks["averaging"], expected)
    within(risks["least"], [theory.ols_excess(d=20, n=n, psi2=3 / 20) for n in (5, 10)], slice(2))


def test_risks_under_noise_are_those_of_theory(x64):
    """d = 20, noise .5: ridge is at 10.26 and 0.256 after 10 and 40 examples."""
    lengths = (10, 20, 30, 40)
    task = icl.FunctionTask(icl.Linear(), icl.Gaussian(20), 41, noise=0.5)
    steps = {n: theory.gd_step(d=20, n=n, sigma2=0.25) for n in lengths}
    predictors = {"ridge": icl.Ridge(0.25), "heavy": icl.Ridge(3.0), "least": icl.LeastSquares()}
    predictors |= {"descent": icl.GradientDescent(steps[40]), "debiased": icl.DebiasedDescent(0.6)}
    risks = icl.compare(task, predictors, lengths, KEY, batch=256, batches=4, excess=True).risks
    within(risks["ridge"], [theory.ridge_excess(d=20, n=n, sigma2=0.25) for n in lengths])
    within(risks["heavy"], [theory.ridge_excess(d=20, n=n, sigma2=0.25, penalty=3.0) for n in lengths])
    apart = np.array([0, 2, 3])
    within(risks["least"], [theory.ols_excess(d=20, n=n, sigma2=0.25) for n in (10, 30, 40)], apart)
    within(risks["descent"], [theory.gd_excess(d=20, n=n, sigma2=0.25, step=steps[40]) for n in lengths])
    within(risks["debiased"], [theory.debiased_gd_excess(d=20, n=n, sigma2=0.25, step=0.6) for n in lengths])
    np.testing.assert_allclose(
        [theory.ridge_excess(d=20, n=n, sigma2=0.25) for n in (10, 40)], [10.26, 0.2559], rtol=1e-3
    )


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="Lasso: alpha must be positive, got 0"):
        icl.Lasso(0)
    with pytest.raises(ValueError, match="sweeps must be at least 1"):
        icl.Lasso(1.0, 0)
    with pytest.raises(ValueError, match="Lasso: tolerance must be positive, got 0"):
        icl.Lasso(1.0, tolerance=0)
    with pytest.raises(ValueError, match="GradientDescent: steps must be at least 1"):
        icl.GradientDescent(0.1, 0)
    with pytest.raises(ValueError, match="Newton: penalty holds -1: need numbers from 0 on"):
        icl.Newton(3, -1)
    with pytest.raises(ValueError, match=r"gammas has shape \(3,\): need"):
        icl.Preconditioned(jnp.ones(3))
    with pytest.raises(ValueError, match=r"transforms has shape \(3, 3\): need \(2, 3, 3\)"):
        icl.Preconditioned(jnp.ones((2, 3, 3)), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="scale is 'length': need 'context' or a positive number"):
        icl.Preconditioned(jnp.ones((3, 3)), scale="length")
    with pytest.raises(ValueError, match="NetworkByAdam: rate must be positive"):
        icl.NetworkByAdam(rate=0.0)
    with pytest.raises(ValueError, match="Ridge: penalty must be positive"):
        icl.Ridge(0.0)
    several = icl.FunctionTask(icl.BlockwiseLinear(2), icl.Gaussian(4), 3).sample(KEY, 1)
    for predictor in (icl.Lasso(0.1), icl.GreedyTree(2), icl.MajorityLabel(), icl.NetworkByAdam(2)):
        with pytest.raises(ValueError, match=r"the answers have shape \(2,\): need numbers"):
            predictor(several.x, several.y)
    for number in (np.float32(-1), jnp.array(-1.0)):
        with pytest.raises(ValueError, match=r"Preconditioned: scale holds -1\.0: need numbers above 0"):
            icl.Preconditioned(jnp.eye(2), scale=number)
        with pytest.raises(ValueError, match=r"NetworkByAdam: rate holds -1\.0: need numbers above 0"):
            icl.NetworkByAdam(rate=number)
        with pytest.raises(ValueError, match=r"Ridge: penalty holds -1\.0: need numbers above 0"):
            icl.Ridge(number)
        with pytest.raises(ValueError, match=r"Lasso: alpha holds -1\.0: need numbers above 0"):
            icl.Lasso(number)
        with pytest.raises(ValueError, match=r"Newton: penalty holds -1\.0: need numbers from 0 on"):
            icl.Newton(3, number)
    for covariance, words in (
        (-jnp.eye(2), "Ridge: covariance has the eigenvalue -1: need eigenvalues from 0 on"),
        (jnp.array([[1.0, 0.5], [0.0, 1.0]]), "Ridge: covariance is not symmetric"),
        (jnp.ones(3), r"Ridge: covariance has shape \(3,\): need \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            icl.Ridge(0.5, covariance)
    with pytest.raises(ValueError, match=r"Ridge: covariance has shape \(2, 2\): need \(3, 3\)"):
        icl.Ridge(0.5, jnp.eye(2))(jnp.ones((1, 4, 3)), jnp.ones((1, 4)))


def test_numbers_that_are_traced_are_not_looked_at():
    made = jax.vmap(
        lambda number, matrix: jnp.stack([icl.Ridge(number, matrix).penalty, icl.Newton(1, number).penalty])
    )
    assert (made(-jnp.ones(2), -jnp.ones((2, 3, 3))) == -1).all()


def test_only_answers_that_count_are_compared():
    late = icl.FunctionTask(icl.NearestNeighbour(5), icl.Signs(4), 12, first=5)
    zero = {"zero": icl.Zero()}
    with pytest.raises(ValueError, match="lengths holds 3: not every answer of FunctionTask counts there"):
        icl.compare(late, zero, [3, 8], KEY)
    blocks = icl.RepeatedBlock(letters=6, length=10, shortest=2, longest=4)
    with pytest.raises(ValueError, match="lengths holds 4: not every answer of RepeatedBlock counts there"):
        icl.compare(blocks, zero, [4, 8], KEY)
    grown = icl.FunctionTask(icl.Linear(), icl.Gaussian(2), 41, points=11)
    whole = icl.FunctionTask(icl.Linear(), icl.Gaussian(2), 6)
    one, other = (icl.compare(task, zero, [5], KEY, batch=4, batches=1).risks["zero"] for task in (grown, whole))
    np.testing.assert_array_equal(one.mean, other.mean)


def test_what_cannot_be_compared_is_refused():
    task = icl.FunctionTask(icl.Linear(), icl.Gaussian(2), 6)
    for predictor in (lambda x, y: icl.interleave(x, y)[..., 0], lambda x, y: y[:, :1]):
        with pytest.raises(ValueError, match=r"a predictor answers \(4, \d+\) where the answers are \(4, 6\)"):
            icl.compare(task, {"wrong": predictor}, [2, 5], KEY, batch=4)
    for loss in (icl.square, icl.mistakes, icl.logistic):
        with pytest.raises(ValueError, match=rf"{loss.__name__}: answers has shape \(4, 1, 1\) and truth \(4, 1\)"):
            icl.compare(task, {"column": lambda x, y: y[..., None]}, [5], KEY, batch=4, loss=loss)
    with pytest.raises(ValueError, match=r"loss gives \(4,\) of answers \(4, 2\): need \(4, 2\)"):
        icl.compare(task, {"zero": icl.Zero()}, [2, 5], KEY, batch=4, loss=lambda *given: icl.square(*given).sum(1))
    with pytest.raises(TypeError, match=r"lengths is \[2\.7\]: need integers"):
        icl.compare(task, {"zero": icl.Zero()}, [2.7], KEY)
    with pytest.raises(TypeError, match="predictors is a list: need a mapping of names to predictors"):
        icl.compare(task, [icl.Zero()], [2], KEY)
    prompt = task.sample(KEY, 2)
    for lengths in ([6], [-1]):
        with pytest.raises(ValueError, match=r"lengths is \[-?\d\]: need numbers from 0 to 5, one below the x"):
            icl.Ridge(0.1).after(prompt.x, prompt.y, lengths)
    assert icl.Ridge(0.1)(prompt.x[:, :0], prompt.y[:, :0]).shape == (2, 0)


def test_a_network_by_adam_has_gradients_where_units_are_off(x64):
    """In its rate and in the examples, against central differences; one example leaves half of the units off."""
    x, y = jax.random.normal(KEY, (1, 3, 4)), jnp.ones((1, 3))

    def answer(rate, x):
        return icl.NetworkByAdam(hidden=8, rate=rate, steps=5)(x, y)[0, 1]

    of_rate, of_x = jax.grad(answer, (0, 1))(0.01, x)
    move = 1e-6 * jnp.zeros(x.shape).at[0, 0, 1].set(1.0)
    by_rate = (answer(0.01 + 1e-6, x) - answer(0.01 - 1e-6, x)) / 2e-6
    np.testing.assert_allclose(of_rate, by_rate, rtol=1e-6)
    np.testing.assert_allclose(of_x[0, 0, 1], (answer(0.01, x + move) - answer(0.01, x - move)) / 2e-6, rtol=1e-5)
    assert jnp.isfinite(of_x).all()


def test_prompts_of_integers_keep_their_answers():
    x = np.sign(np.random.default_rng(0).normal(size=(1, 4, 3)))
    y = np.array([[0.3, -0.7, 0.9, 1.6]])
    for layout in (icl.interleave, icl.stack):
        np.testing.assert_array_equal(layout(x.astype(int), y), layout(x, y))


def test_x_and_y_are_of_the_same_examples():
    x = jnp.ones((2, 5, 3))
    for given in ((x, jnp.ones((2, 4))), (x[0], jnp.ones(5)), (x, jnp.ones((2, 1)))):
        with pytest.raises(ValueError, match=r"x has shape .* and y .*: need \[B, N, d\] and \[B, N\] or \[B, N, m\]"):
            icl.KNearestNeighbours(1)(*given)
    with pytest.raises(ValueError, match=r"Preconditioned: gammas has shape \(6, 6\) but x has 3 coordinates"):
        icl.Preconditioned(jnp.eye(6))(x, x[..., 0])


@pytest.mark.parametrize(
    "predictor",
    [
        icl.LeastSquares(),
        icl.Ridge(0.1),
        icl.Newton(8, 0.1),
        icl.GradientDescent(np.float64(0.3), 2),
        icl.DebiasedDescent(0.3),
        icl.Preconditioned(0.3 * jnp.eye(3)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_numbers_of_16_bits_are_computed_with_as_32(predictor, x64):
    x = jax.random.normal(KEY, (2, 6, 3), jnp.bfloat16)
    y = x.sum(-1)
    expected = predictor(x.astype(jnp.float32), y.astype(jnp.float32))
    np.testing.assert_array_equal(predictor(x, y), expected)
    assert expected.dtype in (jnp.float32, jnp.float64)


@pytest.mark.parametrize("name", ["least", "ridge", "neighbours"])
def test_inputs_may_be_integers(name):
    predictor = {
        "least": icl.LeastSquares(),
        "ridge": icl.Ridge(0.1),
        "neighbours": icl.KNearestNeighbours(1, "cosine"),
    }
    x = jax.random.rademacher(KEY, (2, 6, 3), int)
    y = x.sum(-1).astype(float)
    np.testing.assert_array_equal(predictor[name](x, y), predictor[name](x.astype(float), y))


def test_what_has_no_other_length_is_not_compared():
    with pytest.raises(TypeError, match=r"task is Copying: need one with with_length\(length\), such as FunctionTask"):
        icl.compare(icl.Copying(letters=4, string=3), {"zero": icl.Zero()}, [1], KEY)


def test_lasso_does_not_call_nan_converged():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 6, 3), (2, 6)))
    for of_x, of_y in ((x.at[0, 0, 0].set(np.nan), y), (x, y.at[0, 0].set(np.inf))):
        answers = icl.Lasso(0.1)(of_x, of_y)
        assert np.isnan(answers[0, 1:]).all()
        assert np.isfinite(answers[1]).all()
        found = icl.Lasso(0.1).fit(of_x[0], of_y[0], jnp.ones(6, bool))
        assert not found.converged
