"""`python -m benchmarks`: measures the cases and writes the report. Options and columns: README.md beside this file."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.cases import CASES, HEADS, RECURRENCES, Setting, settings
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.floors import floor_seconds, measure_floors
from benchmarks.measure import Prepared, RefusedError, peak_in_a_fresh_process, take_turns
from benchmarks.rows import Row, Rows

LENGTHS, CACHE_LENGTHS, DTYPES = [512, 2048, 8192], [2048, 32768], ["float32", "bfloat16"]


def prepare(
    cases: Sequence[str], setting: Setting, contenders: dict[str, Contender]
) -> tuple[dict[tuple[str, str], Prepared], list[str]]:
    """(contender, case) -> a call ready to run; and why others are not."""
    ready: dict[tuple[str, str], Prepared] = {}
    refused: dict[str, list[str]] = {}
    for case, (contender, make) in itertools.product(cases, contenders.items()):
        try:
            ready[contender, case] = make(case, setting)
        except RefusedError as reason:
            refused.setdefault(f"{contender} {reason}", []).append(case)
    return ready, [f"{reason} ({', '.join(cases)})" for reason, cases in refused.items()]


def run(
    cases: Sequence[str],
    chosen: Sequence[Setting],
    budget: float,
    resident: bool,
    say: Callable[[str], None] = print,
    contenders: dict[str, Contender] = CONTENDERS,
) -> tuple[Rows, dict[str, float], list[str]]:
    """Rows, floors and notes. budget: seconds of timing per setting; resident: measure peak memory too (float32)."""
    say("floors of the machine")
    floors = measure_floors(list(dict.fromkeys(setting.dtype for setting in chosen)), budget / 4)
    rows: list[Row] = []
    notes: list[str] = []
    for setting in chosen:
        say(setting.name)
        ready, refused = prepare(cases, setting, contenders)
        notes += refused
        seconds = take_turns({name: prepared.run for name, prepared in ready.items()}, budget)
        for (contender, case), prepared in ready.items():
            peak = None
            if resident and setting.dtype == "float32" and contender != "torch flex":  # which takes long to compile
                peak = peak_in_a_fresh_process(contender, case, dataclasses.asdict(setting))
            floor = floor_seconds(case, setting, floors)
            figures = seconds[contender, case], prepared.compile_seconds, floor, prepared.temporaries, peak
            rows.append(Row(contender, case, setting, *figures))
    return Rows(rows), floors, list(dict.fromkeys(notes))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Times attention against its peers.")
    parser.add_argument("--quick", action="store_true", help="short lengths, few rounds, no peak memory")
    parser.add_argument(
        "--case", nargs="+", choices=[*CASES, *RECURRENCES], default=[*CASES, *RECURRENCES], help="only these cases"
    )
    parser.add_argument("--length", nargs="+", type=int, help="only these T = S, and decoding only where --cache says")
    parser.add_argument("--cache", nargs="+", type=int, help="decoding at these S, and T = S only where --length says")
    parser.add_argument("--key-heads", type=int, default=HEADS, help=f"a divisor of {HEADS}, the number of heads")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="only these dtypes")
    parser.add_argument("--no-resident", action="store_true", help="no peak memory, which takes a process per call")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"), help="folder of the report")
    arguments = parser.parse_args()
    lengths, cache_lengths = ([256], [512]) if arguments.quick else (LENGTHS, CACHE_LENGTHS)
    if arguments.length or arguments.cache:
        lengths, cache_lengths = arguments.length or [], arguments.cache or []
    chosen = settings(lengths, cache_lengths, arguments.dtype, arguments.key_heads)
    console = Console()
    budget, resident = (2.0, False) if arguments.quick else (60.0, not arguments.no_resident)
    with console.status("") as status:
        results = run(arguments.case, chosen, budget, resident, status.update)
    report.write(arguments.output, *results)
    console.print(f"wrote {arguments.output / 'report.md'}")


if __name__ == "__main__":
    main()
