"""Read-outs find in weights what was put there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl
from jaxattn.core.attend.api import attention_weights
from jaxattn.core.merged import LinearSelfAttention, SoftmaxHeads

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_merged_matrices_are_the_heads_of_attention():
    """Scores and outputs of heads with their own projections, four query heads to two key heads, by the merged ones."""
    keys = jax.random.split(KEY, 6)
    x, y = jax.random.normal(keys[0], (5, 6)), jax.random.normal(keys[1], (7, 6))
    query, key = jax.random.normal(keys[2], (6, 4, 3)), jax.random.normal(keys[3], (6, 2, 3))
    value, out = jax.random.normal(keys[4], (6, 2, 8)), jax.random.normal(keys[5], (4, 8, 6))
    heads = SoftmaxHeads(icl.effective_kq(query, key), icl.effective_ov(value, out))
    projected = jnp.einsum("td,dnh->tnh", x, query), jnp.einsum("sd,dkh->skh", y, key)
    weights, _ = attention_weights(*projected)
    np.testing.assert_allclose(heads.weights(x, y), weights, rtol=1e-10)
    values = jnp.repeat(jnp.einsum("sd,dkv->skv", y, value), 2, 1)
    expected = jnp.einsum("nts,snv,nvm->tm", weights, values, out)
    np.testing.assert_allclose(heads(x, y), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(icl.effective_kq(query, key, 1.0), 3**0.5 * icl.effective_kq(query, key), rtol=1e-12)


def test_diagonality_is_the_share_of_the_diagonal():
    assert icl.diagonality(jnp.diag(jnp.array([1.0, -2, 3]))) == 1
    assert icl.diagonality(jnp.ones((2, 2)) - jnp.eye(2)) == 0
    assert icl.diagonality(jnp.zeros((2, 2))) == 0
    np.testing.assert_allclose(icl.diagonality(jnp.array([[1.0, 2], [2, 4]])), 17 / 25)
    many = icl.diagonality(jax.random.normal(KEY, (1000, 5, 5)))  # of independent entries 1 / 5
    assert abs(many.mean() - 0.2) < 4 * many.std() / np.sqrt(1000)


def test_homogeneity_is_the_spread_of_the_diagonal():
    assert icl.homogeneity(-2 * jnp.eye(3) + jnp.ones((3, 3)) - jnp.eye(3)) == 0
    np.testing.assert_allclose(icl.homogeneity(jnp.diag(jnp.array([1.0, -1]))), 1)
    np.testing.assert_allclose(icl.homogeneity(jnp.diag(jnp.array([1.0, 3]))), 1 / np.sqrt(5))


def test_the_distance_to_a_pattern_is_a_sine():
    pattern = jax.random.normal(KEY, (4, 3))
    np.testing.assert_allclose(icl.pattern_distance(-3 * pattern, pattern), 0, atol=1e-15)
    np.testing.assert_allclose(icl.pattern_distance(jnp.array([[3.0, 4]]), jnp.array([[1.0, 0]])), 0.8, rtol=1e-12)
    assert icl.pattern_distance(jnp.array([[0.0, 1]]), jnp.array([[1.0, 0]])) == 1
    assert icl.pattern_distance(jnp.zeros((4, 3)), pattern) == 0
    batch = jax.random.normal(jax.random.key(1), (6, 4, 3))
    cosine = (batch * pattern).sum((1, 2)) / jnp.linalg.norm(batch, axis=(1, 2)) / jnp.linalg.norm(pattern)
    np.testing.assert_allclose(icl.pattern_distance(batch, pattern), jnp.sqrt(1 - cosine**2), rtol=1e-10)


def test_constructed_heads_have_the_numbers_they_were_made_of():
    found = icl.effective_heads(icl.debiased_gradient_step(4, 0.7, 0.1).heads)
    np.testing.assert_allclose(found.omega, [0.1, -0.1], rtol=1e-12)
    np.testing.assert_allclose(found.mu, [3.5, -3.5], rtol=1e-12)
    np.testing.assert_array_equal(found.offdiagonal, [0, 0])
    kq = jnp.array([[[1.0, 3, 9], [4, 2, 9], [9, 9, 9]]])
    found = icl.effective_heads(SoftmaxHeads(kq, jnp.array([[5.0, 6, 7]])))
    np.testing.assert_allclose(found, np.array([[1.5], [7], [np.sqrt(12.5)]]), rtol=1e-12)


def test_the_gamma_of_a_layer_is_what_it_does_to_the_label():
    gamma = jax.random.normal(KEY, (3, 3))
    steps = icl.preconditioned_steps(gamma)
    np.testing.assert_allclose(-icl.effective_gamma(steps.layers[0]), gamma, rtol=1e-12)
    for form, sign in (("von oswald", -1), ("ahn", -1), ("zhang", 1)):
        found = icl.effective_gamma(icl.one_gradient_step(3, 0.7, form).layers[0])
        np.testing.assert_allclose(found, sign * 0.7 * np.eye(3), rtol=1e-12)


def test_balanced_descent_on_the_risk_ends_at_the_best_gamma():
    """From W_KQ = s diag(ΘΘᵀ, 0), W_PV = s diag(0, 1), on the population risk: c⁻¹ Γ* and c = [tr Γ*²]^¼."""
    covariance = jnp.diag(1 / jnp.arange(1.0, 6))

    def risk(weights):
        kq, c = weights
        layer = LinearSelfAttention(jnp.pad(kq, ((0, 1), (0, 1))), jnp.zeros((6, 6)).at[-1, -1].set(c))
        return icl.layer_theory.linear_icl_risk(icl.effective_gamma(layer), covariance, m=10, sigma2=0.25)

    @jax.jit
    def descend(weights):
        def step(_, weights):
            return jax.tree.map(lambda x, g: x - 0.02 * g, weights, jax.grad(risk)(weights))

        return jax.lax.fori_loop(0, 20000, step, weights)

    theta = jax.random.normal(KEY, (5, 5))
    gram = theta @ theta.T
    kq, c = descend((0.1 * gram / jnp.linalg.norm(gram), jnp.array(0.1)))
    gamma = icl.layer_theory.lsa_optimum(covariance, n=10, sigma2=0.25)
    scale = jnp.trace(gamma @ gamma) ** 0.25
    # The invariant ‖W_KQ‖² − W_PV² of the flow is kept by steps of 0.02 up to a few of its squares.
    np.testing.assert_allclose(c, scale, rtol=0.01)
    np.testing.assert_allclose(kq, gamma / scale, atol=0.01 * float(jnp.abs(kq).max()))


def test_errors_name_the_argument():
    for call, message in (
        (
            lambda: icl.effective_kq(jnp.ones((4, 3, 2)), jnp.ones((4, 2, 2))),
            "query_kernel has 3 heads and key_kernel 2",
        ),
        (
            lambda: icl.effective_kq(jnp.ones((4, 2, 3)), jnp.ones((4, 2, 2))),
            "3 channels and key_kernel 2: need the same",
        ),
        (
            lambda: icl.effective_ov(jnp.ones((4, 2, 3)), jnp.ones((3, 3, 4))),
            "has 3 heads and value_kernel 2",
        ),
        (
            lambda: icl.effective_ov(jnp.ones((4, 2, 3)), jnp.ones((2, 2, 4))),
            "2 channels and value_kernel 3: need the same",
        ),
        (lambda: icl.effective_heads(icl.superposed_gradient_steps(2, 2, 0.1).heads), "need one output"),
        (lambda: icl.effective_heads(icl.debiased_gradient_step(1, 0.1).heads), "need two coordinates"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
