"""The README's Python runs as written, in order, and shows what it says; its figures and files exist."""

import re

import numpy as np
import pytest
from pages import ROOT, run_page
from PIL import Image

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names the README's code blocks define, run one after the other in an empty folder with a few texts."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_texts").mkdir()
    for number in range(12):
        lines = (f"The {word} number {number} is here, and the line goes on. " for word in ("cat", "dog", "owl") * 6)
        (folder / "my_texts" / f"{number}.txt").write_text("\n".join(lines))
    return run_page("README.md", folder) | {"folder": folder}


def test_the_parts_merge_to_the_whole(names):
    at_once = names["over"](slice(0, 128))
    np.testing.assert_allclose(names["whole"].out, at_once.out, atol=20 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(names["whole"].lse, at_once.lse, rtol=20 * np.finfo(np.float32).eps)


def test_shapes_are_those_in_the_comments(names):
    assert names["out"].shape == names["gradient"].shape == (2, 128, 8, 64)
    assert names["extras"]["lse"].shape == (2, 128, 8)


def test_the_picture_is_the_one_in_the_repository(names):
    files = names["folder"] / "mask.png", ROOT / "docs" / "mask.png"
    drawn, kept = (np.asarray(Image.open(file).convert("L"), float) for file in files)
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 5  # of 255; letters may be drawn differently, another mask differs by 20


def test_training_your_own_learns(names):
    assert names["step"] == 200
    first, last = names["result"].history[0]["bits_per_byte"], names["result"].metrics["validation_bits_per_byte"]
    assert last < 2 < first


def test_every_file_and_figure_named_exists():
    named = re.findall(r"\]\((docs/[^)]+)\)|`((?:jaxattn|tests)/[\w/.]*)`", README)
    assert len(named) > 6
    for figure, file in named:
        assert (ROOT / (figure or file)).exists(), figure or file


def test_the_demo_output_is_shown():
    shown = README.split("<!-- demo output: begin -->")[1].split("<!-- demo output: end -->")[0]
    assert all(name in shown for name in ("softmax", "window+sinks", "sigmoid"))
