"""What is written of a run: `report.md` with its claims first, the figures, and every number in `results.json`.

All of it is made from the files of the seeds, so it can be made again at any time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxattn import papers, viz
from jaxattn.claims.experiment import (
    FIGURES,
    VERDICTS,
    Claim,
    Experiment,
    Number,
    Range,
    Result,
    Row,
    Verdict,
    judge,
    load,
)

CRITERIA = "claims.json"  # in the folder of a run: its claims, as they were before it measured anything
RANGES = ("confirmed", "refuted")
CHANGED = "criterion changed"


def write(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")  # two runs may write the same index
    temporary.write_text(text)
    os.replace(temporary, file)


def read_seeds(folder: Path) -> dict[int, dict[str, Any]]:
    """The contents of the files of all finished seeds in a folder, by seed."""
    files = sorted((folder / "seeds").glob("*.json"), key=lambda file: int(file.stem))
    return {int(file.stem): json.loads(file.read_text()) for file in files}


def from_result(result: Result) -> dict[str, Any]:
    """A result as dicts and lists, each figure with its kind."""
    figures = {title: {"kind": type(x).__name__} | dataclasses.asdict(x) for title, x in result.figures.items()}
    return dataclasses.asdict(result) | {"figures": figures}


def to_result(seed: Mapping[str, Any]) -> Result:
    """The result that `from_result` took apart. Raises ValueError for a kind of figure that there is no more."""
    figures = {}
    for title, data in seed["figures"].items():
        if data["kind"] not in FIGURES:
            raise ValueError(f"the figure {title!r} is of an unknown kind, {data['kind']!r}")
        options = {name: value for name, value in data.items() if name != "kind"}
        figures[title] = FIGURES[data["kind"]](**options)
    return Result(seed["numbers"], seed["tables"], figures)


def judged(claims: Iterable[Claim], results: Sequence[Result]) -> list[tuple[Claim, list[Number], Verdict]]:
    """Each claim with its number by seed and its verdict.

    Raises ValueError for a number that a result does not have: it was made before the claim was.
    """
    claims = list(claims)
    if missing := [x.number for x in claims if any(x.number not in result.numbers for result in results)]:
        raise ValueError(
            f"{missing[0]!r} was not measured by an earlier version of the experiment: run it in a new folder"
        )
    by_claim = [(claim, [result.numbers[claim.number] for result in results]) for claim in claims]
    return [(claim, values, judge(claim, values)) for claim, values in by_claim]


class Judged(NamedTuple):
    """A claim with its number by seed, its verdict and its criterion, in words.

    The verdict is `CHANGED` where the criterion is not the one that was written down before measuring; then the
    criterion says from what to what, and what the verdict would be by the one that was written.
    """

    claim: Claim
    values: list[Number]
    verdict: str
    criterion: str


def write_claims(folder: Path, claims: Iterable[Claim]) -> None:
    """Write the criteria of the claims down in the folder of a run, before it measures anything."""
    write(folder / CRITERIA, json.dumps(_plain([dataclasses.asdict(claim) for claim in claims]), indent=1) + "\n")


def written_claims(folder: Path) -> list[Claim] | None:
    """The claims as they were written down before measuring; None for a run that did not."""
    if not (folder / CRITERIA).exists():
        return None
    kept = json.loads((folder / CRITERIA).read_text())

    def allowed(given: Mapping[str, Any] | None) -> Range | None:
        return None if given is None else Range(**{name: x for name, x in given.items() if x is not None})

    return [Claim(**{**each, **{name: allowed(each[name]) for name in RANGES}}) for each in kept]


def _plain(x: Any) -> Any:
    """Without the ends that a range does not have, for which JSON has no number."""
    if isinstance(x, dict):
        return {name: _plain(each) for name, each in x.items()}
    if isinstance(x, list):
        return [_plain(each) for each in x]
    return None if isinstance(x, float) and math.isinf(x) else x


def held_to(written: Iterable[Claim] | None, claims: Iterable[Claim], results: Sequence[Result]) -> list[Judged]:
    """Each claim judged, and held to the criterion that was written down; then the claims that were dropped since."""
    outcome = judged(claims, results)
    if written is None:
        return [Judged(*each, str(each[0].confirmed)) for each in outcome]
    left = list(written)
    partners: dict[int, Claim] = {}
    for alike in (lambda a, b: (a.number, a.says) == (b.number, b.says), lambda a, b: a.number == b.number):
        for i, (claim, _, _) in enumerate(outcome):
            found = next((each for each in left if i not in partners and alike(each, claim)), None)
            if found is not None:
                partners[i] = found
                left.remove(found)
    rows = []
    for i, (claim, values, verdict) in enumerate(outcome):
        if i not in partners:
            rows.append(Judged(claim, values, CHANGED, f"{_criterion(claim)}; written after measuring"))
        elif any(getattr(claim, name) != getattr(partners[i], name) for name in RANGES):
            rows.append(Judged(claim, values, CHANGED, f"{_criterion(claim)}; {_was(partners[i], values)}"))
        else:
            rows.append(Judged(claim, values, verdict, str(claim.confirmed)))
    for claim in left:
        values = [result.numbers.get(claim.number) for result in results]
        rows.append(Judged(claim, values, CHANGED, f"dropped after measuring; {_was(claim, values)}"))
    return rows


def _criterion(claim: Claim) -> str:
    return f"{claim.confirmed}" if claim.refuted is None else f"{claim.confirmed} (refuted: {claim.refuted})"


def _was(claim: Claim, values: Sequence[Number]) -> str:
    return f"was {_criterion(claim)}" + (f", by which: {judge(claim, values)}" if values else "")


def write_report(folder: Path, experiment: Experiment) -> None:
    """report.md, results.json and one PNG per figure, from all finished seeds in the folder."""
    seeds = read_seeds(folder)
    results = [to_result(seed) for seed in seeds.values()]
    if not results:
        return
    config = json.loads((folder / "config.json").read_text())
    written = written_claims(folder)
    outcome = held_to(written, experiment.claims, results)
    record = {
        **config,
        "claims": [
            {
                "says": claim.says,
                "paper": claim.paper,
                "number": claim.number,
                "confirmed": str(claim.confirmed),
                "refuted": None if claim.refuted is None else str(claim.refuted),
                "measured": values,
                "verdict": verdict,
                "criterion": criterion,
            }
            for claim, values, verdict, criterion in outcome
        ],
        "criteria_written_before": written is not None,
        "seeds": [{"seed": number, **seed} for number, seed in seeds.items()],
    }
    write(folder / "results.json", json.dumps(record, indent=1) + "\n")
    titles = list(dict.fromkeys(title for result in results for title in result.figures))
    for title in titles:
        figures: list[Any] = [result.figures[title] for result in results if title in result.figures]
        viz.save(type(figures[0]).draw(figures), folder / _file(title))
    write(folder / "report.md", _markdown(experiment, config["config"], seeds, results, outcome, titles, written))


def write_index(root: Path, *, reports: bool = False) -> str:
    """Write README.md with every claim of all runs under `root` in one table, and return it.

    With `reports` the reports of all runs are written anew too. Folders that hold something else are left alone.
    """
    parts, lines, counts = ["# Results\n"], [], dict[str, int](dict.fromkeys(VERDICTS, 0))
    for file in sorted(root.glob("*/config.json")):
        folder = file.parent
        try:
            record = json.loads(file.read_text())
            if not isinstance(record, dict) or "experiment" not in record:
                continue
            experiment = load(str(record.get("file", record["experiment"])))
            if reports:
                write_report(folder, experiment)
            results = [to_result(seed) for seed in read_seeds(folder).values()]
            outcome = held_to(written_claims(folder), experiment.claims, results) if results else []
        except ValueError as error:
            parts.append(f"- {folder.name}: {error}\n")
            continue
        where = f"[{folder.name}]({folder.name}/report.md)"
        for claim, values, verdict, criterion in outcome:
            counts[verdict] = counts.get(verdict, 0) + 1
            lines.append([where, f"**{verdict}**", claim.says, _source(claim), criterion, _mean(values)])
    parts.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".\n")
    parts.append(table(("run", "verdict", "claim", "paper", "criterion", "measured"), lines))
    text = "\n".join(parts)
    write(root / "README.md", text)
    return text


def keep(folder: Path, place: Path) -> None:
    """Copy the report of a run, its numbers and its figures to `place`, without seeds and checkpoints.

    Raises ValueError for a folder without a report.
    """
    if not (folder / "report.md").exists():
        raise ValueError(f"there is no report in {folder}: run the experiment first")
    place.mkdir(parents=True, exist_ok=True)
    for old in place.glob("*.png"):  # figures that are no longer drawn
        old.unlink()
    for file in (folder / "report.md", folder / "results.json", *sorted(folder.glob("*.png"))):
        shutil.copyfile(file, place / file.name)


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def _markdown(
    experiment: Experiment,
    config: Mapping[str, Any],
    seeds: Mapping[int, Mapping[str, Any]],
    results: Sequence[Result],
    outcome: Sequence[Judged],
    titles: Sequence[str],
    written: Sequence[Claim] | None,
) -> str:
    lines = [
        [f"**{verdict}**", claim.says, _source(claim), criterion, _mean(values), _each(values)]
        for claim, values, verdict, criterion in outcome
    ]
    parts = [f"# {experiment.name}\n", f"{experiment.about}\n"]
    parts += [f"Seeds: {', '.join(map(str, seeds))}; ± is the standard deviation over seeds.\n"]
    parts += [table(("verdict", "claim", "paper", "criterion", "measured", "by seed"), lines)]
    if changed := sum(each.verdict == CHANGED for each in outcome):
        parts += [f"**{changed} of these criteria changed after they were written down, before measuring.**\n"]
    if written is None:
        parts += ["The criteria of this run were not written down before it was measured.\n"]
    for title in dict.fromkeys(title for result in results for title in result.tables):
        rows = [result.tables[title] for result in results if title in result.tables]
        if len({len(each) for each in rows}) > 1:
            raise ValueError(f"the table {title!r} has {[len(each) for each in rows]} rows by seed: need as many each")
        parts += [f"## {title}\n", _joined(rows)]
    for title in titles:
        parts += [f"## {title}\n", f"![{title}]({_file(title)})\n"]
    numbers = {name: [result.numbers.get(name) for result in results] for name in results[0].numbers}
    parts += ["## Numbers\n", table(("", "mean", "by seed"), [[x, _mean(v), _each(v)] for x, v in numbers.items()])]
    parts += ["## Config\n", table(("field", "value"), [[name, f"`{value}`"] for name, value in config.items()])]
    made = [seed["made"] for seed in seeds.values()]
    runs = [[name, ", ".join(dict.fromkeys(_text(each.get(name)) for each in made))] for name in made[0]]
    return "\n".join([*parts, "## How it was made\n", table(("", "by seed, where seeds differ"), runs)])


def _source(claim: Claim) -> str:
    paper = papers.find(claim.paper)
    return paper.cite() if paper else claim.paper


def _file(title: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in title.lower()) + ".png"


def _text(x: Any) -> str:
    return "–" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)


def _mean(values: Sequence[Number]) -> str:
    """Mean and standard deviation of the seeds that have the number, and how many do where some do not."""
    known = [x for x in values if x is not None]
    if not known:
        return "–"
    text = f"{statistics.fmean(known):.4g}"
    text += f" ± {statistics.stdev(known):.2g}" if len(known) > 1 else ""
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)} seeds)"


def _each(values: Sequence[Number]) -> str:
    return ", ".join(map(_text, values))


def _joined(tables: Sequence[Sequence[Row]]) -> str:
    """One table of several seeds: floats as mean ± deviation, all else once, or by seed where seeds differ."""
    columns = list(dict.fromkeys(name for row in tables[0] for name in row))

    def cell(rows: Sequence[Row], column: str) -> str:
        values = [row.get(column) for row in rows]
        measured = [x for x in values if isinstance(x, float)]
        if not measured:
            return " / ".join(dict.fromkeys(map(_text, values)))
        return _mean([x if isinstance(x, float) else None for x in values])

    return table(columns, [[cell(rows, column) for column in columns] for rows in zip(*tables, strict=True)])
