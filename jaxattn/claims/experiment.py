"""What an experiment is: a module whose numbers are held against claims that were written down before.

A Python file is an experiment if it defines

- `Config`: a frozen dataclass of plain values; its defaults are the full size, minutes to two hours on two cores;
- `QUICK`: a `Config` that takes less than a minute;
- `CLAIMS`: a tuple of `Claim`;
- `run(config, seed, folder, console) -> Result`: what one seed measures. It may keep checkpoints in `folder`, which is
  its own, and shows its progress on the rich `console`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxattn.viz.figure import COLOURS, SIGNED, STYLES, WEIGHTS, legend_above, panels

PACKAGE = "experiments"  # of the experiments that have names

Verdict = Literal["confirmed", "refuted", "not seen at this scale"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Number = float | None
Row = Mapping[str, str | int | float | None]


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included, or all others if `outside`. NaN is in no range.

    Attributes:
        low: The smallest number.
        high: The largest number.
        outside: Whether the range is all numbers but these.
    """

    low: float = -math.inf
    high: float = math.inf
    outside: bool = False

    def __contains__(self, x: float) -> bool:
        return not math.isnan(x) and (self.low <= x <= self.high) != self.outside

    def __str__(self) -> str:
        if self.outside:
            return f"not {Range(self.low, self.high)}"
        if self.low == -math.inf:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"


def at_least(low: float) -> Range:
    """Returns the numbers from `low` on."""
    return Range(low=low)


def at_most(high: float) -> Range:
    """Returns the numbers up to `high`."""
    return Range(high=high)


def within(low: float, high: float) -> Range:
    """Returns the numbers from `low` to `high`, both included."""
    return Range(low, high)


def outside(confirmed: Range) -> Range:
    """Returns all other numbers: what refutes a claim that is exact, and so has nothing to do with scale."""
    return Range(confirmed.low, confirmed.high, not confirmed.outside)


@dataclass(frozen=True)
class Claim:
    """What a paper says, and which numbers would confirm or refute it.

    Attributes:
        says: The statement, in words.
        paper: Where it is from: a name in `jaxattn.papers`.
        number: The name of the measured number, in `Result.numbers`, that decides.
        confirmed: Where the number must be for the claim to hold.
        refuted: Where it must be for the claim to be wrong; None where missing it at this size proves nothing.
    """

    says: str
    paper: str
    number: str
    confirmed: Range
    refuted: Range | None = None


def judge(claim: Claim, values: Sequence[Number]) -> Verdict:
    """The verdict on a claim, from its number as measured with each seed; None where it could not be measured.

    All seeds must be in the range of a verdict: what seeds disagree on was not seen.
    """

    def all_in(allowed: Range | None) -> bool:
        return allowed is not None and bool(values) and all(x is not None and x in allowed for x in values)

    if all_in(claim.confirmed):
        return "confirmed"
    return "refuted" if all_in(claim.refuted) else "not seen at this scale"


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis, as data: name -> points (x, y), with y None where it could not be measured.

    Attributes:
        x: Label of the x axis.
        y: Label of the y axis.
        lines: The points of each line, by its name.
        log: The axes that are logarithmic: "", "x", "y" or "xy".
        cloud: Whether the points of a name are a cloud: they are not joined, and none is cut off.
    """

    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, Number]]]
    log: str = ""
    cloud: bool = False

    @staticmethod
    def draw(seeds: Sequence[Curves]) -> Figure:
        """The mean of each line over the seeds, in a band from the smallest to the largest.

        A line of one point per seed is no line: it has its name beside it, the others in the legend. A linear y axis
        ends below what would flatten all else at the beginning of lines, as a loss begins; of effects with both signs,
        and of peaks further on, it shows all.
        """
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes, first = figure.subplots(), seeds[0]
        drawn: list[list[float]] = []
        for number, name in enumerate(dict.fromkeys(name for seed in seeds for name in seed.lines)):
            at: dict[float, list[float]] = {}
            for seed in seeds:
                for x, y in seed.lines.get(name, ()):
                    if y is not None:
                        at.setdefault(x, []).append(y)
            xs = sorted(at)
            colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
            means = [sum(at[x]) / len(at[x]) for x in xs]
            drawn.append(means)
            alone = bool(xs) and all(len(seed.lines.get(name, ())) <= 1 for seed in seeds)
            label, style = (f"_{name}", "") if alone else (name, "" if first.cloud else style)
            axes.plot(xs, means, color=colour, linestyle=style, marker="o", markersize=3, label=label)
            if alone:
                axes.vlines(xs, [min(at[x]) for x in xs], [max(at[x]) for x in xs], color=colour, lw=1)
                turn = 35 if number % 2 else -35  # the names of neighbours go apart
                text = axes.annotate(name, (xs[0], means[0]), (4, 0), textcoords="offset points", fontsize="x-small")
                text.set(rotation=turn, rotation_mode="anchor", verticalalignment="bottom" if turn > 0 else "top")
                continue
            if first.cloud:
                continue
            axes.fill_between(xs, [min(at[x]) for x in xs], [max(at[x]) for x in xs], color=colour, alpha=0.15, lw=0)
        axes.set(xlabel=first.x, ylabel=first.y)
        axes.set_xscale("log" if "x" in first.log else "linear")
        axes.set_yscale("log" if "y" in first.log else "linear")
        values = [y for line in drawn for y in line]
        if values and not first.cloud and "y" not in first.log:
            least, most = min(values), 1.5 * float(np.quantile(values, 0.9))
            begins = all(sorted(high := [y > most for y in line], reverse=True) == high for line in drawn)
            if least >= 0 and max(values) > 3 * most > 0 and begins:
                axes.set_ylim(least - 0.05 * (most - least), most)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if count := len(axes.get_legend_handles_labels()[0]):
            if count > 8:  # inside the axes names would hide lines
                figure.legend(frameon=False, fontsize="small", loc="outside right upper")
            else:
                legend_above(figure, columns=min(count, 3), fontsize="small")
        return figure


@dataclass(frozen=True)
class Maps:
    """Matrices, as data: title -> rows. The picture is that of the first seed.

    Colours go from 0 to the largest number, or both ways from 0 where some are negative; a bar shows the scale. What is
    not finite stays grey.

    Attributes:
        panels: The rows of each matrix, by its title.
        y: What rows are.
        x: What columns are.
        rows: A name for each row; by default they are counted.
        columns: A name for each column.
        value: The quantity that all matrices are of, which gives them one scale. Without, each has its own.
    """

    panels: Mapping[str, Sequence[Sequence[float | None]]]
    y: str = "query position"
    x: str = "key position"
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    value: str = ""

    @staticmethod
    def draw(seeds: Sequence[Maps]) -> Figure:
        first = seeds[0]
        drawn = {title: np.ma.masked_invalid(np.array(rows, float)) for title, rows in first.panels.items()}
        rows, columns = next(iter(drawn.values())).shape
        ratio = columns / rows
        figure, places = panels(len(drawn), ratio, 0.7, columns=2 if ratio > 2 and len(drawn) > 2 else None)
        if ratio > 2:  # flat ones need the width, and room for ticks
            width, height = figure.get_size_inches()
            figure.set_size_inches(1.7 * width, max(1.7 * height, 1.1 * math.ceil(len(drawn) / 2) + 0.5))
        whole = np.concatenate([matrix.compressed() for matrix in drawn.values()])
        for axes, (title, matrix) in zip(places, drawn.items(), strict=True):
            shown = whole if first.value else matrix.compressed()
            signed, largest = bool((shown < 0).any()), float(np.abs(shown).max(initial=0)) or 1.0
            colours = {"cmap": SIGNED if signed else WEIGHTS, "vmin": -largest if signed else 0, "vmax": largest}
            image = axes.imshow(matrix, interpolation="nearest", **colours)
            if not first.value:
                figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize="x-small")
            axes.set_facecolor("#bbbbbb")
            for axis, names, count in (
                (axes.yaxis, first.rows, len(matrix)),
                (axes.xaxis, first.columns, len(matrix.T)),
            ):
                if names:
                    axis.set_ticks(range(count), names, fontsize="x-small")
                else:  # rows and columns have whole numbers
                    axis.set_major_locator(MaxNLocator(min(count, 5), integer=True, min_n_ticks=1))
            axes.set_title(title, fontsize="small")
            axes.set_ylabel(seeds[0].y if axes.get_ylabel() else "")
            axes.set_xlabel(seeds[0].x if axes.get_xlabel() else "")
        if first.value:
            bar = figure.colorbar(image, ax=places, fraction=0.05, pad=0.02, label=first.value)
            bar.ax.tick_params(labelsize="x-small")
        return figure


FIGURES: dict[str, Any] = {kind.__name__: kind for kind in (Curves, Maps)}


@dataclass(frozen=True)
class Result:
    """What one seed measured.

    Attributes:
        numbers: What claims are judged by, and whatever else is worth a line; None where it could not be measured.
        tables: Rows by the title of their table, as many for every seed. A float is measured, and averaged over
            seeds; text and integers say what a row is, and are shown by seed where they differ.
        figures: Figures as data, by title.
    """

    numbers: Mapping[str, Number]
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    figures: Mapping[str, Curves | Maps] = field(default_factory=dict)


class Experiment(NamedTuple):
    """A module with an experiment, by its name.

    `about` is its docstring: what is studied, in a few sentences. `file` is that of an experiment of one's own.
    """

    name: str
    about: str
    default: Any
    quick: Any
    claims: tuple[Claim, ...]
    run: Callable[..., Result]
    file: str | None = None


def names() -> dict[str, str]:
    """Every experiment of the package `experiments`, by name, and the first line of its docstring; none is imported.

    Without such a package, which a checkout of this library has, there is none.
    """
    found: dict[str, str] = {}
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations or () if spec is not None else ()
    files = [file for folder in folders for file in Path(folder).glob("*.py")]
    for file in sorted(files):
        tree = ast.parse(file.read_text())
        assigned = {target.id for node in tree.body for target in _targets(node) if isinstance(target, ast.Name)}
        if "CLAIMS" in assigned:
            found[file.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def load(name: str) -> Experiment:
    """The experiment of this name, or in a Python file of one's own: `load("folder/my_experiment.py")`.

    Raises ValueError, with the nearest name, if there is none.
    """
    file = name if name.endswith(".py") else None
    if file:
        module = _from_file(Path(file))
    else:
        known = names()
        if name not in known:
            where = nearest(name, known) if known else ": need a file, such as my_experiment.py"
            raise ValueError(f"there is no experiment {name!r}{where}")
        module = importlib.import_module(f"{PACKAGE}.{name}")
    about = inspect.cleandoc(module.__doc__ or "")
    return Experiment(Path(name).stem, about, module.Config(), module.QUICK, module.CLAIMS, module.run, file)


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    name = f"experiment {file.resolve()}".replace(".", "_")  # the name of no other module, such as json
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} cannot be imported: its name must be one of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if missing := [name for name in ("Config", "QUICK", "CLAIMS", "run") if not hasattr(module, name)]:
        raise ValueError(f"{file} is no experiment: it has no {', '.join(missing)}")
    return module


def check_names(field: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError, with the nearest known name or all of them, if a field of a config holds another."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{field} holds {name!r}{nearest(name, known)}")


def check_multiple(field: str, value: int, unit: int) -> None:
    """Raises ValueError if a field of a config holds no multiple of `unit`, or none above 0."""
    if value < unit or value % unit:
        raise ValueError(f"{field} is {value}: need a multiple of {unit}")


def nearest(name: str, known: Iterable[str] | Mapping[str, Any]) -> str:
    """What to say after an unknown name: the nearest one, or all."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else f": there are {', '.join(known) or 'none'}"
