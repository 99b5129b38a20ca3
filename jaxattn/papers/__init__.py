"""The catalogue: papers, the parts of this library that carry them, and the checks of those parts.

Each paper is one file, `data/<name>.toml`, whose keys are the fields of `Paper`. A paper without a file is not covered.
A file describes the library as it is: where it has only a part of a paper, the note says which.

`python -m jaxattn.papers` prints docs/papers.md, and with `--summary` the table of the README. `make tables` writes
both into their places.
"""

import difflib
import functools
import importlib
import importlib.resources
import math
import re
import tomllib
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple, get_type_hints


class Paper(NamedTuple):
    """One paper. The fields are the keys of its file, but for the name, which is the file's.

    Attributes:
        name: Its short name, by which experiments cite it.
        title: Its title, or the field's name for it and its authors.
        parts: Dotted names of the objects that carry it.
        checks: Experiments, by name, and test files that hold those objects to the paper.
        note: The parts in the paper's terms, in one line.
        row: Its number in the list of papers that the library sets out to cover; None for works they build on.
        year: The year when it appeared; None where that was not confirmed.
        arxiv: Its arXiv id; None where it was not confirmed.
        order: Papers without a row stand after those with one, by this number; without it last, by name.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    checks: tuple[str, ...]
    note: str
    row: int | None = None
    year: int | None = None
    arxiv: str | None = None
    order: int | None = None

    def cite(self) -> str:
        """Returns title, year and arXiv id, as far as they are known."""
        known = [str(self.year)] if self.year else []
        known += [f"[{self.arxiv}](https://arxiv.org/abs/{self.arxiv})"] if self.arxiv else []
        return f"{self.title} ({', '.join(known)})" if known else self.title


KINDS = {key: kind for key, kind in get_type_hints(Paper).items() if key != "name"}


@functools.cache
def catalogue() -> tuple[Paper, ...]:
    """Returns every paper, in the order of the page. The files are read at the first call."""
    return read(importlib.resources.files(__name__) / "data")


def read(folder: Traversable) -> tuple[Paper, ...]:
    """Returns the papers whose files are in a folder: by row, then by order, then by name.

    Raises:
        ValueError: A file is not TOML, its name is not made of letters, digits and underscores, or a key is unknown,
            missing, or not of its type. The message names the file and the key.
    """
    papers = [_paper(file) for file in folder.iterdir() if file.name.endswith(".toml")]
    last = math.inf

    def place(paper: Paper) -> tuple[float, float, str]:
        return last if paper.row is None else paper.row, last if paper.order is None else paper.order, paper.name

    return tuple(sorted(papers, key=place))


def _paper(file: Traversable) -> Paper:
    name = file.name.removesuffix(".toml")
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"{file.name}: a file is named after its paper: need letters, digits and underscores")
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} is not TOML: {error}") from None
    for key in entries:
        if key not in KINDS:
            nearest = difflib.get_close_matches(key, KINDS, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{file.name}: unknown key {key!r}: need one of {', '.join(KINDS)}{hint}")
    for key in KINDS:
        if key not in entries and key not in Paper._field_defaults:
            raise ValueError(f"{file.name}: the key {key!r} is missing")
    return Paper(name, **{key: _value(f"{file.name}: {key}", KINDS[key], x) for key, x in entries.items()})


def _value(where: str, kind: Any, value: Any) -> Any:
    if kind == tuple[str, ...]:
        if not (isinstance(value, list) and value and all(isinstance(each, str) for each in value)):
            raise ValueError(f"{where} is {value!r}: need a list of strings, at least one")
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, kind):  # True is an int, but no year
        raise ValueError(f"{where} is {value!r}: need {'an integer' if kind == int | None else 'a string'}")
    return value


def find(name: str) -> Paper | None:
    """Returns the paper of this short name."""
    return next((paper for paper in catalogue() if paper.name == name), None)


def resolve(name: str) -> Any:
    """Returns the object that a dotted name stands for.

    Raises:
        ImportError or AttributeError: The name stands for nothing.
    """
    package, *rest = name.split(".")
    found: Any = importlib.import_module(package)
    for step, attribute in enumerate(rest):
        if not hasattr(found, attribute):
            importlib.import_module(".".join([package, *rest[: step + 1]]))
        found = getattr(found, attribute)
    return found


def table() -> str:
    """Returns every paper in Markdown, one a line: number, paper, parts, checks, and the note."""
    lines = ["| no. | name | paper | by | checked by | what is there |", "|---|---|---|---|---|---|"]
    for paper in catalogue():
        parts = ", ".join(f"`{part.removeprefix('jaxattn.')}`" for part in paper.parts)
        checks = ", ".join(check.removeprefix("tests/").removesuffix(".py") for check in paper.checks)
        cells = (str(paper.row or ""), paper.name, paper.cite(), parts, checks, paper.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def summary() -> str:
    """Returns the names of all papers in Markdown, by the folder that holds the first of their parts."""
    by_folder: dict[str, list[str]] = {}
    for paper in catalogue():
        module = importlib.import_module(resolve(paper.parts[0]).__module__)
        by_folder.setdefault(f"{module.__package__}".replace(".", "/"), []).append(paper.name)
    lines = ["| folder | papers | |", "|---|---|---|"]
    for folder, names in sorted(by_folder.items()):
        lines.append(f"| `{folder}/` | {len(names)} | {', '.join(sorted(names))} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Returns docs/papers.md."""
    papers = catalogue()
    listed = sum(paper.row is not None for paper in papers)
    return f"""# Papers

Printed by `python -m jaxattn.papers`. {len(papers)} papers. The {listed} with a number are on the list of those that
this library sets out to cover. A paper without a line is not covered; where only a part of one is, the last column says
which. What a paper claims is measured by [experiments](experiments.md).

{table()}"""
