"""Outputs of blocks as sums: planted coefficients come back, in vectors and in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from jaxattn.analysis import block_regression, regress_vectors
from jaxattn.trace import run


def test_planted_coefficients_come_back_and_r2_says_what_the_constant_explains():
    rng = np.random.default_rng(0)
    basis, direction, beta = rng.standard_normal((3, 40, 6)), rng.standard_normal(6), np.array([2.0, -0.5, 0.0])
    with jax.enable_x64(True):
        target = jnp.asarray(np.tensordot(beta, basis, 1) + direction)
        found = regress_vectors(target, jnp.asarray(basis))
        without = regress_vectors(target, jnp.asarray(basis), constant=False)
        fewer = regress_vectors(target, jnp.asarray(basis[1:]))
        both = regress_vectors(target, jnp.asarray(np.concatenate([basis, basis[:1]])))  # one of them twice
    found, without, fewer, both = (jax.tree.map(np.asarray, each) for each in (found, without, fewer, both))
    np.testing.assert_allclose(found.coefficient, beta, atol=1e-10)
    np.testing.assert_allclose(found.constant, direction, rtol=1e-9)
    np.testing.assert_allclose(found.r2, 1, rtol=1e-12)
    np.testing.assert_allclose(both.coefficient[[0, 3]].sum(), 2, rtol=1e-9)
    # Least squares over the stacked rows, by NumPy.
    rows = basis.reshape(3, -1).T
    expected, rest, *_ = np.linalg.lstsq(rows, np.asarray(target).reshape(-1), rcond=None)
    np.testing.assert_allclose(without.coefficient, expected, rtol=1e-8)
    np.testing.assert_allclose(without.r2, 1 - rest[0] / (np.asarray(target) ** 2).sum(), rtol=1e-8)
    assert (without.constant == 0).all()
    assert without.r2 < found.r2
    assert fewer.r2 < found.r2


def test_what_cannot_be_fitted_is_refused_or_nan():
    with pytest.raises(ValueError, match="basis has shape"):
        regress_vectors(jnp.ones((4, 3)), jnp.ones((2, 4, 2)))
    with pytest.raises(ValueError, match="penalty is -1"):
        regress_vectors(jnp.ones((4, 3)), jnp.ones((2, 4, 3)), penalty=-1)
    assert np.isnan(regress_vectors(jnp.zeros((4, 3)), jnp.ones((2, 4, 3))).r2)


def test_regressions_of_a_model_are_those_of_what_its_heads_write():
    model = planted.random(layers=2, heads=4)
    tokens = jax.random.randint(jax.random.key(0), (30, 5), 0, 64)
    found = block_regression(model, tokens, 4, penalty=0.0)
    seen = run(model, tokens, record=("z", "resid_pre", "mlp_out"))[1]
    out = np.asarray(model.runs[0].branches[0].module.out.kernel[...], np.float64).reshape(2, 4, -1, 32)
    for layer in range(2):
        z, x, y = (np.asarray(seen[site][layer][:, 4], np.float64) for site in ("z", "resid_pre", "mlp_out"))
        basis = np.concatenate([np.einsum("bnh,nhd->nbd", z, out[layer]), x[None]])
        columns = [each.reshape(-1) for each in basis]
        columns += list(np.tile(np.eye(32), (30, 1)).T)  # a constant in each channel
        fit, rest, *_ = np.linalg.lstsq(np.stack(columns, 1), y.reshape(-1), rcond=None)
        np.testing.assert_allclose(found.coefficient[layer], fit[:5], rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(found.r2[layer], 1 - rest[0] / (y**2).sum(), rtol=1e-3)
        np.testing.assert_allclose(found.constant[layer], fit[5:], rtol=1e-2, atol=1e-2)
