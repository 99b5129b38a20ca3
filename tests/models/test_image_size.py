"""Positions of patches at another size of the images, against a loop over the definition."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import nn
from jaxattn.models import Spec, Transformer, TransformerConfig, pre_norm, with_image_size

CONFIG = TransformerConfig(
    vocabulary=3,
    length=16,
    width=6,
    layers=[pre_norm(Spec(nn.MultiHeadAttention, heads=2, position=None), None)],
    causal=False,
    embed=Spec(nn.PatchEmbedding, patch=(2, 3), size=(10, 9), channels=2),
    positions=Spec(nn.PositionEmbedding),
    head=Spec(nn.Head),
)


def kernel(distance):
    """The cubic convolution of Keys (1981) with a = −3/4."""
    x = abs(distance)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0


def interpolated(grid, rows, columns):
    """Each new point is a sum over the 16 old ones around it, the nearest one in place of those beyond the border."""
    old_rows, old_columns, channels = grid.shape
    made = np.zeros((rows, columns, channels))
    for y in range(rows):
        for x in range(columns):
            v, u = (y + 0.5) * old_rows / rows - 0.5, (x + 0.5) * old_columns / columns - 0.5
            for j in range(int(np.floor(v)) - 1, int(np.floor(v)) + 3):
                for i in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
                    old = grid[min(max(j, 0), old_rows - 1), min(max(i, 0), old_columns - 1)]
                    made[y, x] += kernel(v - j) * kernel(u - i) * old
    return made


@pytest.mark.parametrize(("height", "width"), [(4, 15), (14, 3), (22, 27), (10, 9)])
@pytest.mark.parametrize("class_token", [True, False])
def test_positions_are_interpolated(height, width, class_token):
    """Smaller, larger, and both at once; at the old size the table stays to the bit."""
    embed = CONFIG.embed.replace(class_token=class_token)
    model = Transformer(dataclasses.replace(CONFIG, embed=embed, length=15 + class_token), rngs=nnx.Rngs(0))
    before = np.asarray(model.positions.table[...])
    new = with_image_size(model, height, width)
    table = np.asarray(new.positions.table[...])
    np.testing.assert_array_equal(table[:class_token], before[:class_token])
    expected = interpolated(before[class_token:].reshape(5, 3, -1), height // 2, width // 3).reshape(-1, 6)
    # 16 products of float32 per number.
    np.testing.assert_allclose(table[class_token:], expected, rtol=0, atol=2e-6 * abs(before).max())
    if (height, width) == (10, 9):
        np.testing.assert_array_equal(table, before)


def test_a_model_reads_images_of_its_size_alone():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    new = with_image_size(model, 4, 6)
    assert (new.config.length, new.config.embed.arguments["size"]) == (5, (4, 6))
    assert new(jnp.ones((2, 4, 6, 2)))[0].shape == (2, 5, 3)
    assert model(jnp.ones((2, 10, 9, 2)))[0].shape == (2, 16, 3)
    for each, shape, size in ((new, (10, 9), (4, 6)), (model, (4, 6), (10, 9))):
        message = re.escape(
            f"inputs are images of {shape[0]} by {shape[1]}: need {size}, for which there are positions"
        )
        with pytest.raises(ValueError, match=message):
            each(jnp.ones((2, *shape, 2)))
    with pytest.raises(ValueError, match="images are 5 by 6: need multiples of the patch, 2 by 3"):
        with_image_size(model, 5, 6)
    without = dataclasses.replace(CONFIG, embed=CONFIG.embed.replace(size=None))
    with pytest.raises(ValueError, match="need a PatchEmbedding with a size"):
        with_image_size(Transformer(without, rngs=nnx.Rngs(0)), 4, 6)
    other = dataclasses.replace(CONFIG, length=9)
    with pytest.raises(ValueError, match="model has 9 positions: need 16, one for each patch and the class token"):
        with_image_size(Transformer(other, rngs=nnx.Rngs(0)), 4, 6)
