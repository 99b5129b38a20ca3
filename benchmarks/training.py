"""`python -m benchmarks.training`: training steps of decoders, against the same decoder in PyTorch, eager and compiled.

All steps of a size take turns in one process. PyTorch is no dependency: without it (`pip install torch`) only ours are
timed.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks.measure import Prepared, median, median_ratio, peak_while, take_turns
from benchmarks.torch_decoder import TorchDecoder, torch
from jaxattn import models, nn, train

RATE, DECAY = 1e-3, 0.1


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder and its batch: RMS norms, rotary positions, norms of queries and keys, gated blocks, a tied head."""

    width: int
    layers: int
    heads: int
    key_heads: int
    hidden: int
    vocabulary: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def gflop(self) -> float:
        """The products of a step, forward and twice that backward: maps, visible pairs and the head."""
        head_dim = self.width // self.heads
        maps = self.width * (2 * self.heads + 2 * self.key_heads) * head_dim + 3 * self.width * self.hidden
        pairs = (self.length + 1) * self.heads * head_dim
        return 6e-9 * self.tokens * (self.layers * (maps + pairs) + self.width * self.vocabulary)


SIZES = {
    "small": Size(96, 4, 4, 4, 256, 258, 8, 128),
    "medium": Size(384, 6, 6, 6, 1024, 258, 4, 512),
    "135M": Size(576, 30, 9, 3, 1536, 49152, 1, 512),  # the shape of SmolLM2-135M
}
MIXERS: dict[str, Callable[[Size], models.Spec]] = {
    "attention": lambda size: models.Spec(
        nn.MultiHeadAttention, heads=size.heads, key_heads=size.key_heads, qk_norm=models.Spec(nn.RMSNorm)
    ),
    "Mamba-2": lambda size: models.Spec(nn.Mamba2, heads=size.heads),
    "gated DeltaNet": lambda size: models.Spec(nn.DeltaNet, heads=size.heads, decay="head"),
    "GLA": lambda size: models.Spec(nn.GLA, heads=size.heads),
}


def decoder(size: Size, mixer: str = "attention", remat: Any = "cheap") -> models.Transformer:
    """Makes the decoder, with parameters drawn from seed 0."""
    layer = models.pre_norm(MIXERS[mixer](size), models.Spec(nn.FeedForward, hidden=size.hidden))
    config = models.TransformerConfig(
        vocabulary=size.vocabulary, width=size.width, length=size.length, layers=[layer] * size.layers, remat=remat
    )
    return models.Transformer(config, rngs=nnx.Rngs(0))


def tokens_of(size: Size) -> np.ndarray:
    """Returns [rows, length + 1] random tokens."""
    return np.random.default_rng(0).integers(size.vocabulary, size=(size.rows, size.length + 1)).astype(np.int32)


def prepared(size: Size, mixer: str = "attention", remat: Any = "cheap") -> Prepared:
    """Makes a step of `train.make_step`, ready to be timed: each run takes the next step and returns its loss."""
    params, loss = train.language_loss(decoder(size, mixer, remat))
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    tokens = tokens_of(size)
    weights = np.ones((size.rows, size.length), np.float32)
    batch = jax.device_put({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    kept = {"state": train.init_state(params, optimizer, jax.random.key(0))}
    step: Any = train.on_one_device(train.make_step(loss, optimizer))
    start = time.perf_counter()
    # A step is its compiled function and the arrays of its loss. Compiled here, so that the first run does not.
    program: Any = step.func.lower(*step.args, kept["state"], batch).compile()
    seconds = time.perf_counter() - start

    def run() -> float:
        kept["state"], metrics = program(*step.args, kept["state"], batch)
        return float(metrics["loss"])

    return Prepared(run, seconds, program.memory_analysis().temp_size_in_bytes)


def prepared_in_torch(size: Size, compiled: bool) -> Callable[[], float]:
    """Makes a step of the same decoder in PyTorch, from the same parameters."""
    model = TorchDecoder(decoder(size))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY, fused=True
    )
    tokens = torch.from_numpy(tokens_of(size).astype(np.int64))
    loss_of = torch.compile(model.loss) if compiled else model.loss

    def run() -> float:
        loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return run


def contenders(size: Size, names: list[str]) -> dict[str, Callable[[], float]]:
    """Makes the steps of these names, ready to be timed."""
    runs: dict[str, Callable[[], float]] = {}
    for name in names:
        kind, _, option = name.partition(", ")
        if kind == "PyTorch" and torch is None:
            print("PyTorch is not installed (pip install torch): only ours is timed", file=sys.stderr)
        elif kind == "PyTorch":
            runs[name] = prepared_in_torch(size, option == "compiled")
        else:
            runs[name] = prepared(size, kind, option.removeprefix("remat ") or "cheap").run
    return runs


def peak(size: str, name: str) -> int | None:
    """Bytes by which memory rises in the first step, in a process of its own; None where that cannot be measured."""
    command = [sys.executable, "-m", "benchmarks.training", "--size", size, "--peak-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    usual = ["attention", "PyTorch, eager", "PyTorch, compiled"]
    parser.add_argument("--of", nargs="+", default=usual, help="mixers, 'MIXER, remat full', 'PyTorch, compiled'")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing for each size")
    parser.add_argument("--no-resident", action="store_true", help="no peak memory, which takes a process per step")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if torch is not None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    if options.peak_of:
        (run,) = contenders(SIZES[options.size[0]], [options.peak_of]).values()
        print(peak_while(run))
        return
    versions = {name: metadata.version(name) for name in ("jax", "jaxattn")}
    versions |= {"torch": torch.__version__} if torch is not None else {}
    found: dict[str, Any] = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), **versions}
    found["load before"] = os.getloadavg()
    for name in options.size:
        size = SIZES[name]
        runs = contenders(size, options.of)
        losses = {of: [run() for _ in range(3)] for of, run in runs.items()}
        seconds = take_turns(runs, options.budget)
        base = next(iter(seconds.values()))
        found[name] = {
            "gflop": size.gflop,
            "losses of the first steps": losses,
            "median, s": {of: median(each) for of, each in seconds.items()},
            "tokens per second": {of: size.tokens / median(each) for of, each in seconds.items()},
            "over the first": {of: median_ratio(each, base) for of, each in seconds.items()},
            "fastest, s": {of: min(each) for of, each in seconds.items()},
        }
        if not options.no_resident:
            peaks = {of: peak(name, of) for of in runs}
            found[name]["peak, MiB"] = {of: None if bytes_ is None else bytes_ / 2**20 for of, bytes_ in peaks.items()}
    found["load after"] = os.getloadavg()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
