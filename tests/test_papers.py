"""The catalogue of papers: every name in it stands for something, and the pages show what it says."""

import re

import pytest
from pages import ROOT

from experiments.experiment import names
from jaxattn import papers
from jaxattn.papers import PAPERS

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
    assert (ROOT / "docs" / "papers.md").read_text() == papers.page(), "run python -m jaxattn.papers > docs/papers.md"


def test_the_table_of_the_readme_is_the_catalogue():
    shown = (ROOT / "README.md").read_text().split("<!-- papers: begin -->\n")[1].split("<!-- papers: end -->")[0]
    assert shown == papers.summary(), "run python -m jaxattn.papers --summary"
