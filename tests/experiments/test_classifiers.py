"""Images and brackets of the small classifiers, drawn anew pixel by pixel and read from left to right."""

import jax
import numpy as np
import pytest

from experiments.classifiers import Brackets, Shapes

PAIRS = {1: {0: 1}, 2: {0: 2, 1: 3}}


@pytest.mark.parametrize("background", [0.0, 0.7, 1.0])
def test_a_shape_stands_where_its_mask_says_on_a_background_that_goes_with_its_class(background):
    task = Shapes(background=background, side=4, patch=3, noise=0.0)
    prompt = jax.tree.map(np.asarray, task.sample(jax.random.key(0), 200))
    masks, suggested = prompt.hidden
    labels = prompt.y[:, 0]
    assert abs(labels.mean() - 0.5) < 0.15
    assert abs((suggested == labels).mean() - background) <= 4 * (background * (1 - background) / 200) ** 0.5
    for image, mask, label, tint in zip(prompt.x, masks, labels, suggested, strict=True):
        assert mask.sum() == 4
        pixels = np.kron(mask, np.ones((3, 3))) > 0
        ground = [0.1, 0.1, 0.4] if tint == 0 else [0.4, 0.1, 0.1]
        np.testing.assert_allclose(image[~pixels], np.broadcast_to(ground, image[~pixels].shape), rtol=1e-6)
        drawn = (image[pixels].reshape(6, 6, 3) >= 0.5).all(-1)
        stripes = np.arange(6) % 2 == 0
        np.testing.assert_array_equal(drawn, np.tile(stripes, (6, 1)) if label else np.tile(stripes[:, None], (1, 6)))
    assert task.length == 17
    with pytest.raises(ValueError, match="side must be at least 2, got 1"):
        Shapes(side=1)


def matched(row, pairs):
    """The partner of each bracket, or None where the row is not balanced."""
    stack, partner = [], [0] * len(row)
    for place, token in enumerate(row):
        if token in pairs:
            stack.append(place)
        elif not stack or pairs[row[stack[-1]]] != token:
            return None
        else:
            partner[place], partner[stack[-1]] = stack[-1], place
            stack.pop()
    return None if stack else partner


@pytest.mark.parametrize("kinds", [1, 2])
def test_brackets_are_balanced_if_the_answer_says_so(kinds):
    task = Brackets(kinds=kinds, length=13)
    prompt = jax.tree.map(np.asarray, task.sample(jax.random.key(1), 200))
    assert (prompt.x[:, 0] == 2 * kinds).all()
    assert 0.3 < prompt.y.mean() < 0.8
    unchanged = 0
    for row, answer, partner in zip(prompt.x[:, 1:].tolist(), prompt.y[:, 0], prompt.hidden, strict=True):
        found = matched(row, PAIRS[kinds])
        assert (found is not None) == (answer == 1)
        assert partner[0] == -1
        inside = partner[1:] - 1
        assert (inside[inside] == np.arange(12)).all()  # the partner of the partner
        unchanged += found == inside.tolist()
    assert unchanged > 60
    with pytest.raises(ValueError, match="length is 12: need an odd one"):
        Brackets(kinds=1, length=12)
