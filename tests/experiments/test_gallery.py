"""The gallery shows every part of its slots, as made by lines of Python that run, in files that stay small."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxattn.core.attend
from experiments import gallery
from jaxattn.core.attend import bias
from jaxattn.core.attend.maps import Dropout, Map
from jaxattn.core.attend.mask import Mask
from jaxattn.core.attend.normalize import Normalize
from jaxattn.core.attend.position import RotaryScaling

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "gallery.md").read_text()
PARTS = [
    name
    for name, x in vars(jaxattn.core.attend).items()
    if inspect.isclass(x)
    and not inspect.isabstract(x)
    and x.__name__ != "SumOfBiases"  # which is what `a + b` makes
    and (issubclass(x, Mask | Normalize | Map | RotaryScaling | Dropout) or x.__module__ == bias.__name__)
]


@pytest.mark.parametrize("name", PARTS)
def test_every_part_of_these_slots_has_a_picture(name):
    assert f"{name}(" in PAGE or f"{name}." in PAGE, "run python -m experiments.gallery"
    assert any(name in line for family in gallery.FAMILIES for line in family.entries)


@pytest.mark.parametrize("family", gallery.FAMILIES, ids=lambda family: family.title)
def test_the_page_and_its_pictures_are_those_of_the_script(family):
    assert f"![{family.title}]({family.file})" in PAGE
    for line in family.entries:
        assert f"| `{line.replace('|', chr(92) + '|')}` |" in PAGE
        assert gallery.described(line)
    assert Image.open(DOCS / family.file).width == gallery.WIDTH


def test_a_line_makes_the_part_it_names():
    assert gallery.make("Causal() & Window(4)").describe() == "causal and the last 5 keys"
    assert isinstance(gallery.make("Softmax(null_logit=jnp.array([3.0]))"), jaxattn.Softmax)


@pytest.mark.slow
@pytest.mark.parametrize("family", gallery.FAMILIES, ids=lambda family: family.title)
def test_pictures_are_drawn_side_by_side(family):
    drawn = gallery.montage([gallery.draw(family, line) for line in family.entries[-2:]], family.columns)
    assert drawn.width == gallery.WIDTH
    column = drawn.convert("L").crop(
        (gallery.WIDTH // family.columns, 0, 2 * gallery.WIDTH // family.columns, drawn.height)
    )
    assert column.getextrema()[0] < 100


def test_the_picture_of_a_detector_is_what_it_rewards():
    """The second copy of 11 tokens: the token before, and the token behind the earlier copy."""
    queries = np.arange(11, gallery.LENGTH)
    for name, keys in (("previous token", queries - 1), ("induction", queries - 10), ("sink", 0 * queries)):
        expected = np.zeros((gallery.LENGTH,) * 2, bool)
        expected[queries, keys] = True
        np.testing.assert_array_equal(gallery.looks_at(gallery.make(f'DETECTORS["{name}"]')), expected)


def test_the_pictures_are_small():
    files = list((DOCS / "gallery").iterdir())
    assert sorted(file.name for file in files) == sorted(Path(family.file).name for family in gallery.FAMILIES)
    assert sum(file.stat().st_size for file in files) < 400_000
