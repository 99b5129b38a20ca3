"""Prints docs/papers.md, or with `--summary` the table of the README; with `--write`, both go to their places."""

import argparse
from pathlib import Path

from jaxattn.papers import page, summary

BEGIN, END = "<!-- papers: begin -->\n", "<!-- papers: end -->"


def write(root: Path) -> None:
    """Writes docs/papers.md, and between its two marks the table of README.md, in the repository at `root`.

    Raises:
        ValueError: README.md does not have the two marks, each once and in order.
    """
    readme = (root / "README.md").read_text(encoding="utf-8")
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"README.md needs the lines {BEGIN.strip()} and {END}, each once and in this order")
    (root / "README.md").write_text(before + begin + summary() + end + after, encoding="utf-8")
    (root / "docs" / "papers.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m jaxattn.papers", description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--summary", action="store_true", help="print the table of the README")
    choice.add_argument("--write", type=Path, metavar="ROOT", help="write both into the repository at ROOT")
    given = parser.parse_args()
    if given.write:
        write(given.write)
    else:
        print(summary() if given.summary else page(), end="")
