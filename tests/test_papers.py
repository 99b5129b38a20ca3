"""The catalogue of papers: every name in it stands for something, and the pages show what it says."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from pages import ROOT

from jaxattn import papers
from jaxattn.claims import names
from jaxattn.papers import Paper, __main__, catalogue, read

PAPERS = catalogue()
DATA = ROOT / "jaxattn" / "papers" / "data"
NAMES = [paper.name for paper in PAPERS]
EXPERIMENTS = set(names())


@pytest.mark.parametrize("paper", PAPERS, ids=NAMES)
def test_every_part_and_every_check_exists(paper):
    assert paper.parts
    for part in paper.parts:
        papers.resolve(part)
    for check in paper.checks:
        assert check in EXPERIMENTS or (check.startswith("tests/") and (ROOT / check).is_file()), check


def test_names_that_stand_for_nothing_are_found_out():
    for name in ("jaxattn.Nothing", "jaxattn.Causal.nothing", "jaxattn.nothing.Causal"):
        with pytest.raises((ImportError, AttributeError)):
            papers.resolve(name)


def test_lines_are_unique_and_in_order():
    rows = [paper.row for paper in PAPERS if paper.row is not None]
    identifiers = [paper.arxiv for paper in PAPERS if paper.arxiv is not None]
    for values in (rows, identifiers, NAMES, [paper.title for paper in PAPERS]):
        assert len(set(values)) == len(values)
    assert rows == sorted(rows)
    assert [paper.row for paper in PAPERS[: len(rows)]] == rows


def test_numbers_years_and_identifiers_are_what_they_can_be():
    for paper in PAPERS:
        assert paper.row is None or 1 <= paper.row <= 185
        assert paper.year is None or 1990 <= paper.year <= 2026
        assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
        assert re.fullmatch(r"\w+", paper.name)


def test_a_paper_is_found_by_its_name():
    assert papers.find("moba").cite() == (
        "MoBA: Mixture of Block Attention for Long-Context LLMs (2025, [2502.13189](https://arxiv.org/abs/2502.13189))"
    )
    assert papers.find("quest").cite().endswith("LLM Inference (2024)")
    assert papers.find("qk_norm").cite() == "Query and key normalisation"
    assert papers.find("no_such_paper") is None


def test_the_page_is_the_catalogue():
    assert (ROOT / "docs" / "papers.md").read_text() == papers.page(), "run make tables"


def test_the_table_of_the_readme_is_the_catalogue():
    shown = (ROOT / "README.md").read_text().split(__main__.BEGIN)[1].split(__main__.END)[0]
    assert shown == papers.summary(), "run make tables"


def test_the_summary_names_every_paper_once_in_the_folder_of_its_first_part():
    rows = [line.strip("| ").split(" | ") for line in papers.summary().splitlines()[2:]]
    found = {name: folder.strip("`") for folder, _, each in rows for name in each.split(", ")}
    assert sorted(found) == sorted(NAMES)
    assert sum(int(count) for _, count, _ in rows) == len(NAMES)
    expected = {"alibi": "core/attend/", "ttt": "core/memory/", "softmax_icl": "core/", "gla": "nn/", "bertviz": "viz/"}
    assert {name: found[name] for name in expected} == {name: f"jaxattn/{x}" for name, x in expected.items()}


# The files


MINIMAL = """title = "Attention"
parts = ["jaxattn.attend"]
checks = ["recall"]
note = "a call"
"""


@pytest.fixture
def write(tmp_path):
    """write(text, name) reads a catalogue with that one file."""

    def write(text, name="new.toml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return read(tmp_path)

    return write


def test_a_new_paper_is_one_new_file(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(DATA, folder)
    (folder / "new.toml").write_text(MINIMAL)
    new = Paper("new", "Attention", ("jaxattn.attend",), ("recall",), "a call")
    assert read(folder) == (*PAPERS, new)


def test_what_may_be_left_out_is_none_and_what_is_given_is_kept(write):
    given = 'row = 7\norder = 3\nyear = 2017\narxiv = "1706.03762"\n'
    (paper,) = write(given + MINIMAL)
    assert (paper.row, paper.order, paper.year, paper.arxiv) == (7, 3, 2017, "1706.03762")
    (paper,) = write(MINIMAL)
    assert (paper.row, paper.order, paper.year, paper.arxiv) == (None,) * 4


def test_papers_stand_by_row_then_order_then_name(write):
    for name, line in (
        ("e", ""),
        ("d", ""),
        ("a", "order = 20"),
        ("c", "order = 3"),
        ("x", "row = 9"),
        ("z", "row = 2"),
    ):
        found = write(f"{line}\n{MINIMAL}", f"{name}.toml")
    assert "".join(paper.name for paper in found) == "zxcade"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "titel = 1", r"new\.toml: unknown key 'titel': need one of title, .*; did you mean 'title'\?"),
        (MINIMAL + "name = 'other'", r"new\.toml: unknown key 'name': need one of title, .*"),
        (MINIMAL + "[note2]", r"new\.toml: unknown key 'note2'.*"),
        *(
            (re.sub(rf"{key} = .*\n", "", MINIMAL), rf"new\.toml: the key '{key}' is missing")
            for key in ("title", "parts", "checks", "note")
        ),
        (MINIMAL + "year = '2017'", r"new\.toml: year is '2017': need an integer"),
        (MINIMAL + "year = 2017.0", r"new\.toml: year is 2017\.0: need an integer"),
        (MINIMAL + "row = true", r"new\.toml: row is True: need an integer"),
        (MINIMAL + "order = []", r"new\.toml: order is \[\]: need an integer"),
        (MINIMAL + "arxiv = 1706.03762", r"new\.toml: arxiv is 1706\.03762: need a string"),
        (MINIMAL.replace('"a call"', "1"), r"new\.toml: note is 1: need a string"),
        (
            MINIMAL.replace('["recall"]', '"recall"'),
            r"new\.toml: checks is 'recall': need a list of strings, at least one",
        ),
        (MINIMAL.replace('["recall"]', "[1]"), r"new\.toml: checks is \[1\]: need a list of strings, at least one"),
        (
            MINIMAL.replace('["jaxattn.attend"]', "[]"),
            r"new\.toml: parts is \[\]: need a list of strings, at least one",
        ),
        (MINIMAL + "year = ", r"new\.toml is not TOML: .*"),
        (MINIMAL + "year = 1\nyear = 1", r"new\.toml is not TOML: .*"),
        (b'title = "\xff"', r"new\.toml is not TOML: .*"),
    ],
)
def test_a_file_that_is_no_paper_gets_one_error_with_file_and_key(write, text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        write(text)
    assert re.fullmatch(message, str(caught.value)), caught.value


def test_the_name_of_a_file_can_be_cited(write):
    with pytest.raises(ValueError, match=r"two-words\.toml: a file is named after its paper: need letters"):
        write(MINIMAL, "two-words.toml")


def test_write_replaces_what_is_between_the_marks_and_nothing_else(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{__main__.BEGIN}old\n{__main__.END}after\n")
    for _ in range(2):
        __main__.write(tmp_path)
        assert (tmp_path / "README.md").read_text() == (
            f"before\n{__main__.BEGIN}{papers.summary()}{__main__.END}after\n"
        )
    assert (tmp_path / "docs" / "papers.md").read_text() == papers.page()


@pytest.mark.parametrize("marks", ["", "{b}", "{e}", "{e}{b}", "{b}{e}{b}", "{b}{e}{e}", "{b}{b}{e}"])
def test_write_refuses_a_readme_without_its_two_marks(tmp_path, marks):
    text = marks.format(b=__main__.BEGIN, e=__main__.END)
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md needs the lines <!-- papers: begin --> and <!-- papers: end -->"):
        __main__.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def python(code, path):
    """What the code prints in a fresh Python that looks for jaxattn at `path` first."""
    environment = os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True).stdout


def test_the_files_are_read_when_they_are_asked_for():
    printed = python(
        "import sys, jaxattn; print('jaxattn.papers' in sys.modules)\n"
        "from jaxattn import papers; print(papers.catalogue.cache_info().currsize, len(papers.catalogue()))",
        ROOT,
    )
    assert printed.split() == ["False", "0", str(len(PAPERS))]


def test_the_catalogue_and_the_page_are_in_the_wheel(tmp_path):
    """Also as a zip file, where no file has a path of its own."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("jaxattn/papers/data/")}
    assert held == {f"jaxattn/papers/data/{name}.toml" for name in NAMES}
    printed = python("from jaxattn import papers; print(papers.__file__, papers.find('moba').cite())", wheel)
    assert printed == f"{wheel}/jaxattn/papers/__init__.py {papers.find('moba').cite()}\n"
    code = "import numpy; from jaxattn import viz; print(viz.page({'a': viz.Example(['b'], numpy.ones((1, 1, 1, 1)))}))"
    assert python(code, wheel).startswith("<!doctype html>")
