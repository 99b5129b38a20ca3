"""`python -m benchmarks [--quick]`: times attention calls side by side and prints ratios; machines are noisy.

Every case is compiled first, then all cases take turns, so that a change in the machine's speed hits them alike.
Figures are medians over the turns; temporaries are XLA's memory analysis of the compiled call.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxattn import Causal, Documents, Window, attend

HEADS, HEAD_DIM = 8, 64


def cases(length: int) -> dict[str, dict[str, Any]]:
    """The calls to compare at one length, as options of `attend`."""
    tiled = {
        "causal": Causal(),
        "window 256": Causal() & Window(256),
        "documents of 512": Causal() & Documents(jnp.arange(length) // 512),
    }
    options: dict[str, dict[str, Any]] = {
        f"tiled, {name}": {"mask": mask, "implementation": "tiled"} for name, mask in tiled.items()
    }
    if length <= 2048:
        options["dense, causal"] = {"mask": Causal(), "implementation": "dense"}
        options["jax.nn, causal"] = {}
    return options


def call(options: dict[str, Any], backward: bool) -> Callable:
    """Forward, or forward and the gradients of query, key and value."""

    def forward(query, key, value):
        if not options:
            return jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return attend(query, key, value, **options)

    if not backward:
        return forward
    return jax.grad(lambda *arrays: forward(*arrays).sum(), (0, 1, 2))


def measure(length: int, backward: bool, turns: int) -> dict[str, tuple[float, float]]:
    """Case -> (median seconds, MiB of temporaries)."""
    shape = (1, length, HEADS, HEAD_DIM)
    arrays = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]
    compiled = {
        name: jax.jit(call(options, backward)).lower(*arrays).compile() for name, options in cases(length).items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(turns + 1):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            seconds[name].append(time.perf_counter() - start)
    memory: dict[str, Any] = {name: function.memory_analysis() for name, function in compiled.items()}
    return {name: (statistics.median(seconds[name][1:]), memory[name].temp_size_in_bytes / 2**20) for name in compiled}


def main(lengths: list[int], turns: int) -> None:
    """Prints one table per length."""
    console = Console(width=110)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}, jax {jax.__version__}, Python "
        f"{platform.python_version()}; batch 1, {HEADS} heads of {HEAD_DIM}, float32, median of {turns}"
    )
    for length in lengths:
        table = Table(title=f"T = S = {length}")
        for column in ("call", "forward ms", "ratio", "forward+backward ms", "ratio", "temporaries MiB"):
            table.add_column(column, justify="left" if column == "call" else "right")
        forward, both = (measure(length, backward, turns) for backward in (False, True))
        for name in forward:
            base = "tiled, causal"
            table.add_row(
                name,
                f"{forward[name][0] * 1e3:.1f}",
                f"{forward[name][0] / forward[base][0]:.2f}",
                f"{both[name][0] * 1e3:.1f}",
                f"{both[name][0] / both[base][0]:.2f}",
                f"{both[name][1]:.0f}",
            )
        console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shortest length, three turns")
    arguments = parser.parse_args()
    main([256] if arguments.quick else [256, 512, 1024, 2048, 8192], 3 if arguments.quick else 9)
