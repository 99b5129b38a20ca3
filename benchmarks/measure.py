"""Time by taking turns, temporaries by XLA's account, peak resident memory in a process of its own."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)

# PyTorch's OpenMP threads spin for a while after each call, on the cores that the next one needs.
PAUSE = 0.02


# The longest T at which a peer that holds T x S arrays is given more than the plain cases.
DENSE_LENGTH = 2048


class RefusedError(Exception):
    """A contender does not run a case. The message says why, for the report."""


class Prepared(NamedTuple):
    """A call ready to be timed. `run` returns when the result is there; temporaries are bytes, None if not known."""

    run: Callable[[], Any]
    compile_seconds: float
    temporaries: int | None = None


def compile_call(function: Callable, *arguments: Any) -> Prepared:
    """`function` compiled by JAX for these arguments."""
    start = time.perf_counter()
    program: Any = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    temporaries = None if memory is None else memory.temp_size_in_bytes
    return Prepared(lambda: jax.block_until_ready(program(*arguments)), seconds, temporaries)


def take_turns(
    runs: dict[Name, Callable[[], Any]], budget: float, least: int = 3, most: int = 25
) -> dict[Name, list[float]]:
    """Seconds of each run in each of the rounds, in which all runs take turns: a slow moment hits them alike.

    As many rounds as fit `budget` seconds, between `least` and `most`; one more goes first and is not counted.
    """

    def one_round() -> dict[Name, float]:
        seconds = {}
        for name, run in runs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - start
        return seconds

    start = time.perf_counter()
    one_round()
    rounds = int(budget / (time.perf_counter() - start))
    results = [one_round() for _ in range(min(max(rounds, least), most))]
    return {name: [result[name] for result in results] for name in runs}


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def median_ratio(seconds: list[float], base: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds, base, strict=True))


def _resident(field: str) -> int:
    """Bytes: VmRSS is what the process holds now, VmHWM the most that it held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_while(run: Callable[[], Any]) -> int:
    """Bytes by which resident memory rises while `run` runs, above what it was before. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which compiling set
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def peak_in_a_fresh_process(contender: str, case: str, setting: dict[str, Any]) -> int | None:
    """`peak_while` of the call's first run, where no other call has left memory to reuse. None where not measurable."""
    command = [sys.executable, "-m", "benchmarks.resident", contender, case, json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None
