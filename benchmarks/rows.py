"""One measured call, and ratios between two of them."""

import dataclasses
import math
from statistics import mean

from benchmarks.cases import Setting
from benchmarks.measure import median, median_ratio


@dataclasses.dataclass(frozen=True)
class Row:
    """seconds: one per round, in the same order for all rows of a setting. Sizes in bytes, None if not known."""

    contender: str
    case: str
    setting: Setting
    seconds: list[float]
    compile_seconds: float
    floor_seconds: float
    temporaries: int | None
    resident: int | None = None

    @property
    def median(self) -> float:
        return median(self.seconds)


class Rows:
    """All rows of a run, found by contender, case and setting."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self._of = {(row.contender, row.case, row.setting): row for row in rows}

    def find(self, contender: str, case: str, setting: Setting) -> Row | None:
        return self._of.get((contender, case, setting))

    def ratio_of_fastest(self, row: Row, contender: str, *cases: str) -> float | None:
        """The same of the fastest rounds, which other work on the machine disturbs least."""
        bases = [base for base in (self.find(contender, case, row.setting) for case in cases) if base is not None]
        return min(row.seconds) / mean(min(base.seconds) for base in bases) if len(bases) == len(cases) else None

    def ratio(self, row: Row, contender: str, *cases: str) -> float | None:
        """Time over the mean of other rows of the same setting, the median over rounds; None if not all of these were
        measured."""
        bases = [base for base in (self.find(contender, case, row.setting) for case in cases) if base is not None]
        if len(bases) < len(cases):
            return None
        return median_ratio(row.seconds, [mean(each) for each in zip(*(base.seconds for base in bases), strict=True)])


@dataclasses.dataclass(frozen=True)
class Slope:
    """How a case's temporaries grow between the two longest T: bytes per token, and the power of T."""

    case: str
    direction: str
    bytes_per_token: float
    power: float


def slopes(rows: Rows) -> list[Slope]:
    """Of this library's cases with T = S, float32; of recurrences in the form that trains."""
    found = []
    for row in rows.rows:
        setting = row.setting
        if row.contender not in ("jaxattn", "chunk") or setting.queries < setting.keys or setting.dtype != "float32":
            continue
        lengths = {r.setting.keys for r in rows.rows if r.setting.queries == r.setting.keys}
        shorter = max((length for length in lengths if length < setting.keys), default=None)
        if setting.keys < max(lengths) or shorter is None:
            continue
        base = rows.find(row.contender, row.case, dataclasses.replace(setting, queries=shorter, keys=shorter))
        if base is not None and base.temporaries and row.temporaries:
            found.append(
                Slope(
                    row.case,
                    setting.direction,
                    (row.temporaries - base.temporaries) / (setting.keys - shorter),
                    math.log(row.temporaries / base.temporaries) / math.log(setting.keys / shorter),
                )
            )
    return found
