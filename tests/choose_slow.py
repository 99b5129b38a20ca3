"""Writes slow.txt: what `make test` leaves out beside tests that are marked as slow, from the seconds that tests took.

    : > tests/slow.txt
    make test PYTEST=".venv/bin/python -m pytest -n 2 --cpu-times=times.tsv"
    .venv/bin/python tests/choose_slow.py times.tsv

Of a test with several cases the cheapest stays in `make test`, so that every law is held to something there, and with
it those that take little. Where cheaper cases have all values of its parameters between them, a case has to take less
still: a law that holds for every mechanism and in every layout is held to each of them, but not to each in each. A
test of one case is left out if it takes long, but for the pages of the docs.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

# Seconds of CPU from which on a test of one case, a further case, and one that has no new value are left out.
TEST, CASE, AGAIN = 2.0, 0.7, 0.2
KEPT = ("tests/test_docs.py", "tests/test_readme.py")


class Parameters:
    """A plugin that keeps, by the name of each test that is collected, the parameters and their values."""

    def __init__(self) -> None:
        self.of: dict[str, set[tuple[str, Any]]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            values = item.callspec.params if hasattr(item, "callspec") else {}
            self.of[item.nodeid] = {(name, id(value)) for name, value in values.items()}


def slow(times: Mapping[str, float], parameters: Mapping[str, set[tuple[str, Any]]]) -> list[str]:
    """Returns the tests to leave out, from the seconds of each and the values of its parameters."""
    cases: dict[str, list[str]] = defaultdict(list)
    for name in times:
        if not name.startswith(KEPT):
            cases[name.partition("[")[0]].append(name)
    found = []
    for names in cases.values():
        first, *further = sorted(names, key=lambda name: times[name])
        if not further and times[first] >= TEST:
            found.append(first)
        seen = set(parameters[first])
        for name in further:
            if times[name] >= CASE or (times[name] >= AGAIN and parameters[name] <= seen):
                found.append(name)
            else:
                seen |= parameters[name]
    return sorted(found)


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    times = {name: float(seconds) for seconds, _, name in (line.partition("\t") for line in lines)}
    collected = Parameters()
    if code := pytest.main(["--collect-only", "-qq", str(Path(__file__).parent)], plugins=[collected]):
        sys.exit(code)
    times = {name: seconds for name, seconds in times.items() if name in collected.of}
    (Path(__file__).parent / "slow.txt").write_text("\n".join(slow(times, collected.of)) + "\n")
