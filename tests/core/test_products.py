"""grouped_matmul is one product per head, however it is computed, and so are its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxattn.core.matmul import FEW_ROWS, grouped_matmul

# batch, query heads, queries, groups, columns: with few rows and many, one batch axis larger than 1 and several.
SIZES = {
    "few": ((2,), 4, 1, 4, 40),
    "few, grouped": ((2,), 4, 2, 2, 40),
    "few, no batch": ((), 6, 1, 3, 40),
    "few columns": ((2,), 4, 1, 4, FEW_ROWS),
    "many": ((1,), 4, 9, 2, 40),
    "many, batch": ((2, 3), 4, 9, 4, 20),
    "one group": ((2,), 4, 1, 1, 40),
}


def operands(sizes, axis):
    batch, heads, length, groups, columns = sizes
    draw = np.random.default_rng(0).normal
    width = 5 if axis == -1 else columns
    return draw(size=(*batch, heads, length, width)), draw(size=(*batch, groups, columns, 5))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", SIZES)
def test_it_is_the_product_of_each_head_with_its_group(name, axis, gathered):
    rows, columns = operands(SIZES[name], axis)
    with jax.enable_x64(True):
        actual = grouped_matmul(jnp.asarray(rows), jnp.asarray(columns), axis, gathered)
        repeated = columns.repeat(rows.shape[-3] // columns.shape[-3], -3)
        expected = rows @ (repeated.swapaxes(-1, -2) if axis == -1 else repeated)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", ["few, grouped", "many", "many, batch"])
def test_its_derivatives_in_both_modes(name, axis):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in operands(SIZES[name], axis)]
        check_grads(lambda *x: grouped_matmul(*x, axis), arrays, order=2, modes=("fwd", "rev"))
