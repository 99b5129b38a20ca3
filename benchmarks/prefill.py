"""`python -m benchmarks.prefill`: prompts read with a quarter of the causal pairs, beside dense attention.

Each choice is timed with what it costs to choose. Keys and queries are standard normal, so that heads choose apart.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import Setting, arrays
from benchmarks.measure import Prepared, compile_call, median, median_ratio, take_turns
from jaxattn import Blocks, Causal, attend
from jaxattn.core.attend import Choice, FlexPrefill, MoBA, VerticalSlash

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
SHARE = 0.134  # of the blocks of a row at the end, so that rows on average read a quarter of what they may


def choices(length: int, block: int) -> dict[str, Choice]:
    """The choices, each of about a quarter of the causal pairs of random queries and keys."""
    count = length // block
    pages, lines = max(round(SHARE * count), 1), max(count // 8 - 1, 0)
    return {
        "MoBA, blocks": MoBA(block, pages, queries=block),
        "MoBA, each query": MoBA(block, pages),
        "VerticalSlash": VerticalSlash(lines, lines, block=block, dense_below=0),
        "FlexPrefill, lines": FlexPrefill(0.125, 0.0, block, 2 * block, dense_below=0),
        "FlexPrefill, means": FlexPrefill(0.4, 1.0, block, 2 * block, dense_below=0),
    }


def calls(length: int, block: int, of: list[str]) -> dict[str, Prepared]:
    """The compiled calls by name."""
    query, key, value, _ = arrays(Setting(1, length, length, "float32", backward=False))

    def sparse(choice: Any) -> Callable[..., Any]:
        return lambda query, key, value: attend(query, key, value, mask=Causal() & choice(query, key))

    chosen = {name: choice for name, choice in choices(length, block).items() if not of or name in of}
    for name, choice in chosen.items():
        mask: Any = choice(query, key)
        share = "all" if isinstance(mask, Causal) else f"{share_of_pairs(mask):.3f}"
        print(f"T = {length}, block {block}, {name}: {share} of the causal blocks")
    functions = {"dense": lambda query, key, value: attend(query, key, value, mask=Causal())}
    functions |= {name: sparse(choice) for name, choice in chosen.items()}
    return {name: compile_call(function, query, key, value) for name, function in functions.items()}


def share_of_pairs(mask: Blocks) -> float:
    """Returns the share of the blocks that are read, of those not in the future."""
    active, block = mask.index.active, mask.index.block
    first, last = (size * np.arange(count) for size, count in zip(block[::-1], active.shape[:-3:-1], strict=True))
    return float(active.mean() / (first <= last[:, None] + block[0] - 1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    parser.add_argument("--length", nargs="+", type=int, default=LENGTHS, help="only these T")
    parser.add_argument("--block", nargs="+", type=int, default=[64, 128], help="queries and keys per block")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing per length and block")
    parser.add_argument("--of", nargs="+", default=[], help="only these choices")
    arguments = parser.parse_args()
    for length in arguments.length:
        for block in arguments.block:
            ready = calls(length, block, arguments.of)
            seconds = take_turns({name: each.run for name, each in ready.items()}, arguments.budget)
            for name, each in seconds.items():
                ratio, compiling = median_ratio(seconds["dense"], each), ready[name].compile_seconds
                figures = f"{1000 * median(each):.1f} ms, fastest {1000 * min(each):.1f}, compiled in {compiling:.1f} s"
                print(f"T = {length}, block {block}, {name}: {figures}; dense takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
