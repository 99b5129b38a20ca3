"""Feature maps: their products are the kernels they are named for, whatever the heads, dtypes and transformations."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import epsilon
from jax.test_util import check_grads

from jaxattn.core.linear import (
    Elu1Features,
    HedgehogFeatures,
    IdentityFeatures,
    LogNormalFeatures,
    RandomFeatures,
    ReluFeatures,
    StandardizedFeatures,
    TaylorFeatures,
    UnitFeatures,
    distillation_loss,
    moment_match,
    orthogonal_gaussian,
)
from jaxattn.core.part import check_fields

T, S, N, K, H = 5, 6, 4, 2, 3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


QUERY, KEY = normal(2, T, N, H, seed=1), normal(2, S, K, H, seed=2)
PROJECTION = normal(7, H, seed=3)
ALPHA, BETA = np.array([0.5, 1.0, 1.5, 2.0]), np.array([0.7, 1.3])
WEIGHTS = normal(N, H, 5, seed=4), normal(K, H, 5, seed=5)
BIASES = normal(N, 5, seed=6), normal(K, 5, seed=7)


# The kernels, a second time and in NumPy: of every pair of q [B, N, T, 1, H] and k [B, N, 1, S, H] in float64.


def elu1(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def powers(s, degree):
    return sum(s**level / math.factorial(level) for level in range(degree + 1))


def standard(x, tiny=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + tiny)


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def dot(q, k):
    return (q * k).sum(-1)


def relu(x):
    return np.maximum(x, 0)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def random_kernel(kind):
    def kernel(q, k):
        x, y = q * H**-0.25, k * H**-0.25
        sizes = (dot(x, x) + dot(y, y)) / 2
        if kind == "relu":
            return ((relu(x @ PROJECTION.T) + 1e-3) * (relu(y @ PROJECTION.T) + 1e-3)).mean(-1)
        if kind == "trigonometric":
            return np.exp(sizes) * np.cos((x - y) @ PROJECTION.T).mean(-1)
        wave = np.exp if kind == "positive" else np.cosh
        return np.exp(-sizes) * wave((x + y) @ PROJECTION.T).mean(-1)

    return kernel


def linear(x, weight, bias):
    """x W + b with the weights of each of the N heads."""
    repeats = N // len(weight)
    weight, bias = (np.repeat(a, repeats, 0) for a in (weight, bias))
    return np.einsum("bntsh,nhd->bntsd", x, weight) + bias[:, None, None]


def hedgehog(kind):
    def kernel(q, k):
        z, y = (linear(x, w, b) for x, w, b in zip((q, k), WEIGHTS, BIASES, strict=True))
        if kind == "exp":
            return 2 * np.cosh(z + y).sum(-1)
        return dot(softmax(z), softmax(y)) + dot(softmax(-z), softmax(-y))

    return kernel


def log_normal(q, k):
    return np.exp(q * ALPHA[:, None, None, None] + k * np.repeat(BETA, 2)[:, None, None, None]).sum(-1)


MAPS = {
    "identity": (IdentityFeatures(), H, lambda q, k: dot(q, k) * H**-0.5),
    "identity, scale": (IdentityFeatures(np.float64(-0.3)), H, lambda q, k: -0.3 * dot(q, k)),
    "elu + 1": (Elu1Features(), H, lambda q, k: dot(elu1(q), elu1(k))),
    "relu": (ReluFeatures(), H, lambda q, k: dot(relu(q), relu(k))),
    "relu, offset": (ReluFeatures(0.1), H, lambda q, k: dot(relu(q) + 0.1, relu(k) + 0.1)),
    "log-normal": (LogNormalFeatures(np.float64(0.9), 0.5), H, lambda q, k: np.exp(0.9 * q + 0.5 * k).sum(-1)),
    "log-normal, heads": (LogNormalFeatures(ALPHA, BETA), H, log_normal),
    "taylor 1": (TaylorFeatures(1), 4, lambda q, k: 1 + dot(q, k) * H**-0.5),
    "taylor 2": (TaylorFeatures(), 10, lambda q, k: powers(dot(q, k) * H**-0.5, 2)),
    "taylor 4": (TaylorFeatures(4, np.float64(0.7)), 35, lambda q, k: powers(dot(q, k) * 0.7, 4)),
    "positive": (RandomFeatures(PROJECTION), 7, random_kernel("positive")),
    "hyperbolic": (RandomFeatures(PROJECTION, "hyperbolic"), 14, random_kernel("hyperbolic")),
    "trigonometric": (RandomFeatures(PROJECTION, "trigonometric"), 14, random_kernel("trigonometric")),
    "random relu": (RandomFeatures(PROJECTION, "relu"), 7, random_kernel("relu")),
    "hedgehog": (HedgehogFeatures(*WEIGHTS, *BIASES), 10, hedgehog("softmax")),
    "hedgehog, exp": (HedgehogFeatures(*WEIGHTS, *BIASES, kind="exp"), 10, hedgehog("exp")),
    "fastmax": (
        StandardizedFeatures(TaylorFeatures(2, scale=1.0)),
        10,
        lambda q, k: powers(dot(standard(q), standard(k)), 2),
    ),
    "cosine": (UnitFeatures(), H, lambda q, k: dot(unit(q), unit(k))),
    "cosine, taylor": (UnitFeatures(TaylorFeatures(3, 1.0)), 20, lambda q, k: powers(dot(unit(q), unit(k)), 3)),
}
NORMALIZED = {
    "log-normal": LogNormalFeatures(ALPHA, BETA, normalized=True),
    "positive": RandomFeatures(PROJECTION, normalized=True),
    "hyperbolic": RandomFeatures(PROJECTION, "hyperbolic", normalized=True),
    "trigonometric": RandomFeatures(PROJECTION, "trigonometric", normalized=True),
    "random relu": RandomFeatures(PROJECTION, "relu", normalized=True),
    "hedgehog": HedgehogFeatures(*WEIGHTS, *BIASES, normalized=True),
    "hedgehog, exp": HedgehogFeatures(*WEIGHTS, *BIASES, kind="exp", normalized=True),
}
ALL = {name: features for name, (features, _, _) in MAPS.items()}
ALL |= {f"{name}, normalised": features for name, features in NORMALIZED.items()}
EVERY = pytest.mark.parametrize("features", ALL.values(), ids=ALL)


@jax.jit
def apply(features, query, key):
    return features(query, key)


@partial(jax.jit, static_argnames="heads")
def kernel_of(phi, psi, heads=N):
    return jnp.einsum("...tnf,...snf->...nts", phi, jnp.repeat(psi, heads // psi.shape[-2], -2), precision="highest")


def expected_kernel(name, query=QUERY, key=KEY):
    key = np.repeat(np.asarray(key, np.float64), N // K, -2)
    pairs = (np.moveaxis(np.asarray(x, np.float64), -2, -3) for x in (query, key))
    query, key = pairs
    q, k = np.broadcast_arrays(query[..., :, None, :], key[..., None, :, :])
    return MAPS[name][2](q, k)


def largest_product(phi, psi):
    """max Σ_f |φ_f ψ_f|: what rounding errors of the kernel are relative to."""
    return float(kernel_of(jnp.abs(phi), jnp.abs(psi)).max())


# A feature is rounded some ten times and has an exponent of up to ten, rounded as often; F of them are summed.
ROUNDINGS = 100


@pytest.mark.parametrize("name", MAPS)
def test_products_of_features_are_the_kernel(name):
    features, size, _ = MAPS[name]
    with jax.enable_x64(True):
        phi, psi = apply(features, QUERY, KEY)
        assert (phi.dtype, psi.dtype) == (np.float64, np.float64)
        assert (phi.shape, psi.shape) == ((2, T, N, size), (2, S, K, size))
        assert features.size(H) == size
        bound = ROUNDINGS * epsilon(np.float64) * largest_product(phi, psi)
        np.testing.assert_allclose(kernel_of(phi, psi), expected_kernel(name), rtol=0, atol=bound)


@pytest.mark.parametrize("name", MAPS)
def test_features_of_bfloat16_are_float32(name):
    query, key = (x.astype(ml_dtypes.bfloat16) for x in (QUERY, KEY))
    phi, psi = apply(MAPS[name][0], query, key)
    assert (phi.dtype, psi.dtype) == (np.float32, np.float32)
    bound = ROUNDINGS * epsilon(np.float32) * largest_product(phi, psi)
    np.testing.assert_allclose(kernel_of(phi, psi), expected_kernel(name, query, key), rtol=0, atol=bound)


@EVERY
def test_the_dtype_of_the_inputs_decides_and_not_that_of_the_arrays_of_the_map(features):
    with jax.enable_x64(True):
        phi, psi = jax.eval_shape(features, QUERY.astype(np.float32), KEY.astype(ml_dtypes.bfloat16))
    assert (phi.dtype, psi.dtype) == (np.float32, np.float32)


@EVERY
def test_features_of_a_token_depend_on_it_alone(features):
    """Mapped over tokens, each gives what it gives among others."""
    tokens = jax.vmap(apply, (None, 1, 1), 1)(features, QUERY[:, :, None], KEY[:, :T, None])
    bound = ROUNDINGS * epsilon(np.float32)
    for alone, whole in zip(tokens, apply(features, QUERY, KEY), strict=True):
        np.testing.assert_allclose(alone[:, :, 0], whole[:, :T], rtol=bound, atol=bound)


@EVERY
def test_gradients_in_inputs_and_arrays(features):
    with jax.enable_x64(True):
        features = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), features)
        # Central differences of step h are off by about h² f''' and eps f / h.
        check_grads(apply, (features, QUERY[0], KEY[0]), order=1, modes=("fwd", "rev"), eps=1e-5, rtol=1e-6)


@EVERY
def test_gradients_at_zero_and_where_channels_are_equal_are_finite(features):
    query, key = (np.stack([np.zeros_like(x[0]), np.ones_like(x[0])]).astype(np.float32) for x in (QUERY, KEY))
    phi_psi, pull = jax.vjp(apply, features, query, key)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((phi_psi, pull(phi_psi))))


def test_elu_plus_one_has_slope_one_at_zero():
    """As it has from both sides."""
    x = jnp.array([-1e-6, 0.0, 1e-6]).reshape(3, 1, 1)
    slopes = jax.grad(lambda x: Elu1Features()(x, x)[0].sum())(x)
    np.testing.assert_allclose(slopes, 1, atol=2e-6)


@EVERY
def test_fields_are_what_annotations_say(features):
    check_fields("features", features)


# Range


def weights_of(phi, psi, heads=N):
    kernel = kernel_of(phi, psi, heads)
    return kernel / kernel.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", NORMALIZED)
def test_a_normalised_query_changes_the_kernel_by_a_factor_per_query(name):
    plain = MAPS["log-normal, heads" if name == "log-normal" else name][0]
    with jax.enable_x64(True):
        bound = ROUNDINGS * epsilon(np.float64)
        (phi, psi), (exact, same) = apply(NORMALIZED[name], QUERY, KEY), apply(plain, QUERY, KEY)
        np.testing.assert_array_equal(psi, same)
        scale = (phi / exact)[..., :1]
        np.testing.assert_allclose(phi, exact * scale, rtol=bound)
        weights = weights_of(exact, psi)
        magnitude = largest_product(phi, psi) / jnp.abs(kernel_of(phi, psi).sum(-1)).min()
        np.testing.assert_allclose(weights_of(phi, psi), weights, rtol=0, atol=bound * float(magnitude))


@pytest.mark.parametrize("name", NORMALIZED)
def test_no_query_is_too_large_for_normalised_features(name):
    query = jnp.asarray(1e4 * QUERY, jnp.float32)
    phi_psi, pull = jax.vjp(apply, NORMALIZED[name], query, KEY.astype(np.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((phi_psi, pull(phi_psi))))


@pytest.mark.parametrize(
    "name", ["elu + 1", "relu, offset", "log-normal", "positive", "hyperbolic", "random relu", "hedgehog"]
)
def test_some_features_are_positive(name):
    assert all((np.asarray(x) > 0).all() for x in apply(MAPS[name][0], QUERY, KEY))


@pytest.mark.parametrize("name", ["taylor 2", "taylor 4", "fastmax"])
def test_kernels_of_even_degree_are_positive(name):
    """Degree 2 is ((s + 1)² + 1) / 2."""
    phi, psi = apply(MAPS[name][0], 4 * QUERY, 4 * KEY)
    least = 0.5 if MAPS[name][1] == 10 else 0
    assert kernel_of(phi, psi).min() > least - ROUNDINGS * epsilon(np.float32) * largest_product(phi, psi)


# Taylor


def of_scores(features, scores):
    """The kernel of pairs with these scores q·k, in heads of one channel."""
    phi, psi = features(jnp.ones((1, 1, 1)), jnp.asarray(scores, jnp.float32)[:, None, None])
    return np.asarray(kernel_of(phi, psi, heads=1))[0, 0]


def test_a_taylor_kernel_rises_again_below_minus_one():
    s = np.array([-3.0, -1.0, 0.0, 1.0])
    np.testing.assert_allclose(of_scores(TaylorFeatures(1), s), [-2, 0, 1, 2], rtol=0, atol=4 * epsilon(np.float32))
    exact = [2.5, 0.5, 1, 2.5]
    np.testing.assert_allclose(of_scores(TaylorFeatures(2), s), exact, rtol=0, atol=20 * epsilon(np.float32))


@pytest.mark.parametrize("degree", range(1, 9))
def test_taylor_features_become_softmax_as_the_degree_grows(degree):
    """By Lagrange's remainder."""
    with jax.enable_x64(True):
        phi, psi = apply(TaylorFeatures(degree), QUERY, KEY)
        scores = kernel_of(QUERY, KEY) * H**-0.5
        error = np.abs(kernel_of(phi, psi) - jnp.exp(scores))
        bound = np.abs(scores) ** (degree + 1) * np.exp(np.abs(scores)) / math.factorial(degree + 1)
        assert (error <= bound + ROUNDINGS * epsilon(np.float64) * largest_product(phi, psi)).all()


def test_sizes_of_the_papers():
    assert TaylorFeatures().size(16) == 153  # 273 if both x_a x_b and x_b x_a were kept, as in BASED
    assert TaylorFeatures().size(64) == 2145
    phi, _ = jax.eval_shape(TaylorFeatures(), jnp.zeros((1, 1, 64)), jnp.zeros((1, 1, 64)))
    assert phi.shape == (1, 1, 2145)


# FAST and cosine


@pytest.mark.parametrize("shift", [0.0, -3.0])
@pytest.mark.parametrize("factor", [0.5, 7.0])
def test_standardised_features_do_not_see_a_scale_or_a_shift(factor, shift):
    tiny = 1e-12
    with jax.enable_x64(True):
        features = StandardizedFeatures(TaylorFeatures(2, scale=1.0), tiny)
        moved, plain = features(factor * QUERY + shift, KEY)[0], features(QUERY, KEY)[0]
    # x̂ changes by a factor of 1 ± ε / 2 var, and φ, of degree 2, by twice that; then rounding, of means of 3 or so.
    least = min(1, factor**2) * QUERY.var(-1).min()
    bound = tiny / least + 10 * epsilon(np.float64) / np.sqrt(least)
    np.testing.assert_allclose(moved, plain, rtol=0, atol=bound * np.abs(plain).max())


def test_cosines_do_not_see_lengths_and_stay_within_one():
    lengths = 10.0 ** np.arange(-1, T - 1)[:, None, None]
    with jax.enable_x64(True):
        kernel = kernel_of(*UnitFeatures()(lengths * QUERY, KEY))
        plain = kernel_of(*UnitFeatures()(QUERY, KEY))
    assert np.abs(kernel).max() <= 1
    shortest = (QUERY**2).sum(-1).min() / 100
    np.testing.assert_allclose(kernel, plain, rtol=0, atol=1e-6 / shortest / 2 + ROUNDINGS * epsilon(np.float64))


# FAVOR+

DRAWS, ROWS = 2000, 16  # of projections, and of rows and channels in each


def pair(cosine, size=1.0):
    """Two vectors of this length and angle."""
    x, y = np.zeros(ROWS), np.zeros(ROWS)
    x[0], y[:2] = size, (size * cosine, size * math.sqrt(1 - cosine**2))
    return x, y


@cache
def projections(scaling):
    draw = jax.jit(jax.vmap(lambda key: orthogonal_gaussian(key, ROWS, ROWS, scaling)))
    return draw(jax.random.split(jax.random.key(0), DRAWS))


@partial(jax.jit, static_argnames="kind")
def products(projection, kind, x, y):
    def product(projection):
        phi, psi = RandomFeatures(projection, kind, scale=1.0)(x[None, None], y[None, None])
        return (phi * psi).sum()

    return jax.vmap(product)(projection)


def estimates(kind, scaling, x, y):
    """φ(x)·ψ(y) for many projections, in float64."""
    projection = np.asarray(projections(scaling), np.float64)
    with jax.enable_x64(True):
        return np.asarray(products(projection, kind, x, y))


def standard_error(samples):
    return samples.std() / math.sqrt(len(samples))


@pytest.mark.parametrize("scaling", ["chi", "none"])
@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trigonometric"])
@pytest.mark.parametrize("cosine", [-0.9, 0.2])
def test_random_features_are_the_softmax_kernel_on_average(kind, scaling, cosine):
    values = estimates(kind, scaling, *pair(cosine))
    assert abs(values.mean() - math.exp(cosine)) < 4 * standard_error(values)


@pytest.mark.parametrize("cosine", [-0.9, 0.2, 1.0])
def test_relu_features_are_the_arc_cosine_kernel_on_average(cosine):
    """E max(w·x, 0) max(w·y, 0) = |x| |y| (sin θ + (π − θ) cos θ) / 2π, and E max(w·x, 0) = |x| / √2π."""
    values, angle = estimates("relu", "chi", *pair(cosine, 1.5)), math.acos(cosine)
    kernel = 1.5**2 * (math.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)
    kernel += 1e-3 * 2 * 1.5 / math.sqrt(2 * math.pi) + 1e-6
    assert abs(values.mean() - kernel) < 4 * standard_error(values)


def exact_error(kind, x, y):
    """The mean squared error with independent rows."""
    true, plus, minus = math.exp(x @ y), ((x + y) ** 2).sum(), ((x - y) ** 2).sum()
    positive = true**2 * math.exp(plus) * (1 - math.exp(-plus)) / ROWS
    return {
        "positive": positive,
        "hyperbolic": positive * (1 - math.exp(-plus)) / 2,
        "trigonometric": math.exp(plus) / true**2 * (1 - math.exp(-minus)) ** 2 / (2 * ROWS),
    }[kind]


@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trigonometric"])
@pytest.mark.parametrize("cosine", [-0.9, 0.0])
def test_errors_of_random_features_are_those_of_the_paper(kind, cosine):
    x, y = pair(cosine)
    squares = (estimates(kind, "none", x, y) - math.exp(cosine)) ** 2
    assert abs(squares.mean() - exact_error(kind, x, y)) < 4 * standard_error(squares)


def test_orthogonal_rows_have_a_smaller_error():
    """Above all for hyperbolic features where weights are small: 0.2 of the error of independent rows."""
    x, y = pair(-0.9)
    squares = (estimates("hyperbolic", "chi", x, y) - math.exp(-0.9)) ** 2
    assert squares.mean() + 4 * standard_error(squares) < exact_error("hyperbolic", x, y) / 2


@pytest.mark.parametrize("scaling", ["chi", "sqrt"])
def test_directions_are_orthogonal_in_blocks(scaling):
    rows = np.asarray(orthogonal_gaussian(jax.random.key(0), 11, 4, scaling), np.float64)
    assert rows.shape == (11, 4)
    lengths = np.linalg.norm(rows, axis=-1)
    bound = 20 * epsilon(np.float32)
    for start in range(0, 11, 4):
        block = rows[start : start + 4] / lengths[start : start + 4, None]
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), rtol=0, atol=bound)
    if scaling == "sqrt":
        np.testing.assert_allclose(lengths, 2, rtol=bound)
    assert np.ptp(lengths) > 0.1 or scaling == "sqrt"
    assert np.abs(rows[:4] @ rows[4:8].T).max() > 0.1  # blocks are independent


@pytest.mark.parametrize("scaling", ["chi", "none"])
def test_each_row_is_a_standard_gaussian(scaling):
    """Mean 0, covariance I and E |w|⁴ = H (H + 2), within 5 standard errors: it is some hundreds of numbers."""
    rows = np.asarray(projections(scaling), np.float64)[:, :3]
    moments = (rows, 0), (np.einsum("zni,znj->znij", rows, rows), np.eye(ROWS)), ((rows**2).sum(-1) ** 2, ROWS * 18)
    for samples, exact in moments:
        error = samples.std(0) / math.sqrt(DRAWS)
        assert (np.abs(samples.mean(0) - exact) < 5 * error).all()


# Hedgehog


def test_hedgehog_starts_as_a_hyperbolic_cosine_of_the_sum():
    features = HedgehogFeatures.identity(N, H, K, kind="exp")
    assert features.size(H) == 2 * H
    phi, psi = features(QUERY, KEY)
    q, k = np.moveaxis(QUERY, -2, -3)[..., :, None, :], np.moveaxis(np.repeat(KEY, 2, -2), -2, -3)[..., None, :, :]
    bound = ROUNDINGS * epsilon(np.float32) * largest_product(phi, psi)
    np.testing.assert_allclose(kernel_of(phi, psi), 2 * np.cosh(q + k).sum(-1), rtol=0, atol=bound)
    assert HedgehogFeatures.identity(N, H).key_weight.shape == (N, H, H)


@pytest.mark.parametrize("kind", ["softmax", "exp"])
def test_the_order_of_features_does_not_matter(kind):
    order = np.random.default_rng(8).permutation(5)
    arrays = [*WEIGHTS, *BIASES]
    phi, psi = HedgehogFeatures(*arrays, kind=kind)(QUERY, KEY)
    other = HedgehogFeatures(*(x[..., order] for x in arrays), kind=kind)(QUERY, KEY)
    bound = ROUNDINGS * epsilon(np.float32) * largest_product(phi, psi)
    np.testing.assert_allclose(kernel_of(*other), kernel_of(phi, psi), rtol=0, atol=bound)


def test_biases_of_none_are_zero():
    plain = HedgehogFeatures(*WEIGHTS)(QUERY, KEY)
    zero = HedgehogFeatures(*WEIGHTS, *(np.zeros_like(x) for x in BIASES))(QUERY, KEY)
    for x, y in zip(plain, zero, strict=True):
        np.testing.assert_array_equal(x, y)


def rows_of(logits, visible):
    return jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), where=visible)


VISIBLE = np.tri(T, S, -1, dtype=bool)  # the first row sees nothing
TEACHER = np.where(VISIBLE, np.exp(normal(2, N, T, S, seed=9)), 0)
TEACHER = TEACHER / np.where(VISIBLE.any(-1, keepdims=True), TEACHER.sum(-1, keepdims=True), 1)


def test_the_distillation_loss_is_the_cross_entropy_of_rows_that_see_a_key():
    student = np.where(VISIBLE, np.exp(normal(2, N, T, S, seed=10)), 0)
    student = student / np.where(VISIBLE.any(-1, keepdims=True), student.sum(-1, keepdims=True), 1)
    rows = [
        -sum(p * math.log(a) for p, a in zip(TEACHER[i], student[i], strict=True) if p > 0)
        for i in np.ndindex(TEACHER.shape[:-1])
        if TEACHER[i].any()
    ]
    assert len(rows) == 2 * N * (T - 1)
    np.testing.assert_allclose(distillation_loss(TEACHER, student), np.mean(rows), rtol=20 * epsilon(np.float32))
    with jax.enable_x64(True):
        assert distillation_loss(TEACHER, student).dtype == np.float64
    assert distillation_loss(jnp.asarray(TEACHER, jnp.bfloat16), jnp.asarray(student, jnp.bfloat16)).dtype == np.float32


def test_the_distillation_loss_is_least_at_the_teacher():
    """There it is the entropy and its gradient is the same for all visible keys; any other weights give more."""
    with jax.enable_x64(True):
        entropy = -np.where(VISIBLE, TEACHER * np.log(np.where(VISIBLE, TEACHER, 1)), 0).sum((0, 1, -1))[1:].mean()
        entropy = entropy / (2 * N)
        np.testing.assert_allclose(distillation_loss(TEACHER, TEACHER), entropy, rtol=ROUNDINGS * epsilon(np.float64))
        logits = jnp.log(jnp.where(VISIBLE, TEACHER, 1))
        loss = jax.jit(lambda logits: distillation_loss(TEACHER, jnp.where(VISIBLE, rows_of(logits, VISIBLE), 0)))
        slope = jax.grad(loss)(logits)
        np.testing.assert_allclose(slope, 0, rtol=0, atol=ROUNDINGS * epsilon(np.float64))
        for seed in range(5):
            assert loss(logits + 0.1 * normal(*logits.shape, seed=seed)) > entropy + 1e-4


def test_the_distillation_loss_is_finite_where_weights_are_zero():
    teacher = np.array([[[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]])
    student = np.array([[[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])
    loss, slopes = jax.value_and_grad(distillation_loss, (0, 1))(teacher, student)
    exact = -1.5 * math.log(1e-12) / 2  # row one, and half of row three
    np.testing.assert_allclose(loss, exact, rtol=10 * epsilon(np.float32))
    assert np.isfinite(slopes).all()
    assert distillation_loss(np.zeros((1, 2, 2)), np.zeros((1, 2, 2))) == 0


def test_the_gradient_of_the_distillation_loss():
    with jax.enable_x64(True):
        check_grads(distillation_loss, (TEACHER[0] + 0.1, TEACHER[0] + 0.2), order=1, eps=1e-5, rtol=1e-6)


# Linear log-normal attention


def test_moment_matching_is_the_formula_of_the_paper():
    sigma_q, sigma_k = np.array([0.5, 1.3, 2.0]), np.array([1.0, 1.3, 0.7])
    both = np.sqrt((sigma_q**2 * sigma_k**2 + 0.35487039) / 0.29710356)
    with jax.enable_x64(True):
        alpha, beta = moment_match(sigma_q, sigma_k)
    np.testing.assert_allclose(alpha, both / sigma_q, rtol=10 * epsilon(np.float64))
    np.testing.assert_allclose(beta, both / sigma_k, rtol=10 * epsilon(np.float64))


def test_matched_weights_vary_as_those_of_softmax():
    """The claim of the paper, in one draw: within 30 % of softmax, where exp(q)·exp(k) varies far less."""
    query, key = 1.3 * normal(2, 512, 1, 64, seed=11).astype(np.float32)
    softmax = jax.nn.softmax(kernel_of(query, key, heads=1) / 8)
    matched, plain = (
        weights_of(*LogNormalFeatures(alpha, beta)(query, key), heads=1)
        for alpha, beta in (moment_match(1.3, 1.3), (1.0, 1.0))
    )
    softmax, matched, plain = (float(jnp.log(weights).var()) for weights in (softmax, matched, plain))
    assert 0.7 < matched / softmax < 1.3
    assert plain < softmax / 7


def test_moment_matching_where_there_is_nothing_to_match():
    assert [float(x) for x in moment_match(0.5, 0.5, b=0.1)] == [0, 0]  # 0.0625 < b
    alpha, beta = moment_match(jnp.array([0.0, 1.0]), 1.0)
    assert alpha[0] == 0
    assert np.isfinite([alpha, beta]).all()
    slopes = jax.grad(lambda q, k: sum(moment_match(q, k)), (0, 1))(1.3, 0.8)
    assert [float(x) for x in slopes] == [0, 0]


# What is refused


def queries(heads=N, width=H):
    return np.zeros((T, heads, width), np.float32)


def keys(heads=K, width=H):
    return np.zeros((S, heads, width), np.float32)


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: TaylorFeatures(0), ValueError, "TaylorFeatures: degree must be at least 1, got 0"),
        (lambda: TaylorFeatures(2.0), TypeError, "TaylorFeatures: degree must be an int, got 2.0"),
        (lambda: TaylorFeatures(2, -1.0), ValueError, "TaylorFeatures: scale must be positive, got -1.0"),
        (lambda: RandomFeatures(PROJECTION, scale=0), ValueError, "RandomFeatures: scale must be positive, got 0"),
        (lambda: ReluFeatures(-0.5), ValueError, "ReluFeatures: offset must be at least 0, got -0.5"),
        (lambda: ReluFeatures(jnp.ones(())), TypeError, "ReluFeatures: offset must be a number, got Array"),
        (
            lambda: RandomFeatures(PROJECTION, "cosine"),
            ValueError,
            "RandomFeatures: kind must be one of 'positive', 'hyperbolic', 'trigonometric', 'relu', got 'cosine'",
        ),
        (
            lambda: HedgehogFeatures.identity(N, H, kind="relu"),
            ValueError,
            "HedgehogFeatures: kind must be one of 'softmax', 'exp', got 'relu'",
        ),
        (
            lambda: RandomFeatures(PROJECTION)(queries(width=4), keys(width=4)),
            ValueError,
            r"RandomFeatures: projection has shape \(7, 3\) but query has head dim 4: need \[m, 4\] with m >= 1",
        ),
        (
            lambda: RandomFeatures(PROJECTION[:0])(queries(), keys()),
            ValueError,
            r"projection has shape \(0, 3\) .* need \[m, 3\] with m >= 1",
        ),
        (
            lambda: HedgehogFeatures(*WEIGHTS)(queries(2), keys()),
            ValueError,
            r"query_weight has shape \(4, 3, 5\) but query has 2 heads of dim 3: need \[2, 3, D\]",
        ),
        (
            lambda: HedgehogFeatures(WEIGHTS[0], WEIGHTS[0])(queries(), keys()),
            ValueError,
            r"key_weight has shape \(4, 3, 5\) but key has 2 heads of dim 3: need \[2, 3, 5\]",
        ),
        (
            lambda: HedgehogFeatures(WEIGHTS[0], WEIGHTS[1][..., :4])(queries(), keys()),
            ValueError,
            r"key_weight has shape \(2, 3, 4\) but key has 2 heads of dim 3: need \[2, 3, 5\]",
        ),
        (
            lambda: HedgehogFeatures(*WEIGHTS, *BIASES[::-1])(queries(), keys()),
            ValueError,
            r"query_bias has shape \(2, 5\) but query_weight \(4, 3, 5\): need \(4, 5\)",
        ),
        (
            lambda: LogNormalFeatures(ALPHA, ALPHA)(queries(), keys()),
            ValueError,
            r"LogNormalFeatures: beta has shape \(4,\): need one number or one per head, \(2,\)",
        ),
        (
            lambda: Elu1Features()(queries(), keys(width=4)),
            ValueError,
            "query has head dim 3 but key has 4: Elu1Features needs them to be equal",
        ),
        (
            lambda: IdentityFeatures()(queries().astype(int), keys()),
            TypeError,
            r"query must be floating point \[..., length, heads, head dim\], got int32\[5, 4, 3\]",
        ),
        (lambda: TaylorFeatures()(queries(), keys()[0]), TypeError, r"key must be floating point .*\[2, 3\]"),
        (lambda: UnitFeatures(Elu1Features), TypeError, "UnitFeatures: then must be a feature map, got <class"),
        (
            lambda: StandardizedFeatures(Elu1Features(), 0.0),
            ValueError,
            "StandardizedFeatures: epsilon must be positive, got 0.0",
        ),
        (lambda: moment_match(0.0, 1.0), ValueError, "moment_match: query_std must be positive, got 0.0"),
        (lambda: moment_match(1.0, 1.0, a=-1.0), ValueError, "moment_match: a must be positive, got -1.0"),
        (
            lambda: distillation_loss(np.zeros((2, 3, 4)), np.zeros((2, 3, 5))),
            ValueError,
            r"teacher_weights has shape \(2, 3, 4\) but student_weights \(2, 3, 5\): need them to be equal",
        ),
        (
            lambda: orthogonal_gaussian(jax.random.key(0), 0, 4),
            ValueError,
            "orthogonal_gaussian: count must be at least 1, got 0",
        ),
        (
            lambda: orthogonal_gaussian(jax.random.key(0), 4, 4, "unit"),
            ValueError,
            "orthogonal_gaussian: scaling must be 'chi', 'sqrt' or 'none', got 'unit'",
        ),
    ],
)
def test_what_is_refused(call, exception, message):
    with pytest.raises(exception, match=message):
        call()
