"""Writes slow.txt: what `make test` leaves out beside tests that are marked as slow, from the seconds that tests took.

    : > tests/slow.txt
    make test PYTEST=".venv/bin/python -m pytest -n 2 --cpu-times=times.tsv"
    .venv/bin/python tests/choose_slow.py times.tsv

Of a test with several cases the cheapest stays in `make test`, so that every law is held to something there, and with
it those that take little. A test of one case is left out if it takes long, but for the pages of the docs.
"""

import sys
from collections import defaultdict
from pathlib import Path

CASE, TEST = 0.7, 2.0  # seconds of CPU from which on a further case, and a test of one case, are left out
KEPT = ("tests/test_docs.py", "tests/test_readme.py")


def slow(times: dict[str, float]) -> list[str]:
    """Returns the tests to leave out, from the seconds of each."""
    cases: dict[str, list[str]] = defaultdict(list)
    for name in times:
        if not name.startswith(KEPT):
            cases[name.partition("[")[0]].append(name)
    found = []
    for names in cases.values():
        names = sorted(names, key=lambda name: times[name])
        least, rest = (CASE, names[1:]) if len(names) > 1 else (TEST, names)
        found += [name for name in rest if times[name] >= least]
    return sorted(found)


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    names = slow({name: float(seconds) for seconds, _, name in (line.partition("\t") for line in lines)})
    (Path(__file__).parent / "slow.txt").write_text("\n".join(names) + "\n")
