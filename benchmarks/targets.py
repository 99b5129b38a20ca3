"""What the library aims at, as ratios to something measured in the same rounds."""

import dataclasses
from typing import NamedTuple

from benchmarks.cases import HEADS, RECURRENCES, WINDOWS, Setting
from benchmarks.rows import Rows, slopes


@dataclasses.dataclass(frozen=True)
class Target:
    """The time of `case` by `contender` over that of `base` (contender, case), or of several cases the mean, is at most
    `limit`."""

    case: str
    base: tuple[str, ...]
    limit: float
    directions: tuple[bool, ...] = (False, True)
    lengths: tuple[int, ...] = (8192,)
    queries: int | None = None  # None: as many as keys
    contender: str = "jaxattn"
    key_heads: int = HEADS


GATED = ("no decay", "scalar decay", "channel decay")

TARGETS = (
    Target("causal", ("torch SDPA", "causal"), 1.1, (False,), (2048, 8192)),
    Target("causal", ("torch SDPA", "causal"), 1.25, (True,), (2048, 8192)),
    Target("causal", ("jax.nn", "causal"), 1 / 3.5, lengths=(2048, 8192)),
    Target("window", ("jaxattn", "causal"), 1 / 10),
    Target("documents", ("jaxattn", "causal"), 1 / 6),
    Target("bias table", ("jaxattn", "causal"), 1.4, lengths=(2048, 8192)),
    Target("soft cap", ("jaxattn", "causal"), 1.4, lengths=(2048, 8192)),
    Target("full", ("one read", "full"), 1.3, (False,), (32768,), queries=1),
    # 70 percent of the speed-up that the share of causal pairs in the chosen blocks, 0.221 at T = 8192, allows.
    Target("blocks", ("jaxattn", "causal"), 0.221 / 0.7, key_heads=4),
    Target("windows", ("jaxattn", *(f"window {w}" for w in WINDOWS)), 1.25, key_heads=4),
    Target("mass", ("jaxattn", "causal"), 1.2, key_heads=4),
    *(Target(case, ("step", case), 1.0, lengths=(512, 2048, 8192), contender="chunk") for case in RECURRENCES),
    *(Target(case, ("jaxattn", "causal"), 1 / 5, (True,), contender="chunk") for case in GATED),
    *(Target(case, ("torch SDPA", "causal"), 1 / 3, (True,), contender="chunk") for case in GATED),
)
COMPILE_SECONDS, RECURRENCE_COMPILE_SECONDS = 3.0, 5.0


class Checked(NamedTuple):
    """A target's measured ratio (median over rounds), that of the fastest rounds where it is a time, and its limit."""

    what: str
    measured: float
    fastest: float | None
    limit: float


def check(rows: Rows) -> list[Checked]:
    """Every target whose rows were measured; float32."""
    found = []
    for target in TARGETS:
        for length in target.lengths:
            for backward in target.directions:
                batch, queries = (1, length) if target.queries is None else (8, target.queries)
                setting = Setting(batch, queries, length, "float32", backward, target.key_heads)
                row = rows.find(target.contender, target.case, setting)
                ratio = None if row is None else rows.ratio(row, *target.base)
                if row is not None and ratio is not None:
                    by = target.case if target.contender == "jaxattn" else f"{target.contender} {target.case}"
                    base = (
                        " ".join(target.base) if len(target.base) < 3 else f"the mean of {', '.join(target.base[1:])}"
                    )
                    what = f"{by} / {base}; {setting.name}"
                    found.append(Checked(what, ratio, rows.ratio_of_fastest(row, *target.base), target.limit))
    compiled = [row.compile_seconds for row in rows.rows if row.contender == "jaxattn" and row.setting.backward]
    if compiled:
        found.append(Checked("compile seconds, forward + backward, the slowest", max(compiled), None, COMPILE_SECONDS))
    compiled = [row.compile_seconds for row in rows.rows if row.contender == "chunk" and row.setting.backward]
    if compiled:
        what = "compile seconds of a recurrence, forward + backward, the slowest"
        found.append(Checked(what, max(compiled), None, RECURRENCE_COMPILE_SECONDS))
    for slope in slopes(rows):
        what = f"power of T in the temporaries of {slope.case}, {slope.direction}"
        found.append(Checked(what, slope.power, None, 1.1))
    return found
