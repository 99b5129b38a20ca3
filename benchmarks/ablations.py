"""`python -m benchmarks.ablations WEIGHTS`: ablating every head of a decoder by one sweep, against PyTorch; and the
entropy of every head of a long text, against a run that records nothing.

WEIGHTS is a GGUF file or a folder of the architecture of Llama, such as the one whose path is printed by
`python -m jaxattn weights smollm2`. PyTorch is no dependency: without it (`pip install torch`) only the sweep is timed.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import llama
from benchmarks.measure import PAUSE, compile_call, median, median_ratio, take_turns
from jaxattn import Entropy, analysis, models, trace


def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean of −log p of every token but the first."""
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()


def operations(model: Any, tokens: int) -> dict[str, float]:
    """GFLOP of one pass by part, two for each multiplication: a layer's maps, its pairs of tokens, and the head."""
    arrays = jax.tree.leaves(nnx.state(model.runs[0], nnx.Param))
    maps = sum(x.size for x in arrays if x.ndim == 3)  # [L, in, out]; gains of norms are [L, D]
    count, module = sum(model.lengths), model.runs[0].branches[0].module
    pairs = 4 * tokens**2 * module.heads * module.head_dim
    return {
        "maps of a layer": 2e-9 * tokens * maps / count,
        "pairs of a layer": 1e-9 * pairs,
        "head": 2e-9 * tokens * model.embed.table[...].size,
    }


def swept(model: Any, tokens: jax.Array, chunk: int) -> Callable[[], jax.Array]:
    """The loss with each head ablated, [L, N], restarted at its layer: one call of `trace.sweep` as users write it."""

    def call() -> jax.Array:
        _, records = trace.run(model, tokens, record=("resid_pre",))

        def ablated(edits: Any, start: Any) -> jax.Array:
            return loss(model(tokens, edits=edits, start=start)[0], tokens)

        return trace.sweep(ablated, trace.heads(model), chunk=chunk, resid_pre=records["resid_pre"])

    return call


def ablations(model: Any, tokens: jax.Array, chunks: list[int], rounds: int, plain: bool = True) -> dict[str, Any]:
    """Seconds of all ablations, by who computes them, in rounds of turns; and how far they are apart."""
    graph, state = nnx.split(model)
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {}
    for chunk in chunks:
        prepared = compile_call(lambda state, chunk=chunk: swept(nnx.merge(graph, state), tokens, chunk)(), state)
        runs[f"sweep, chunk {chunk}"] = prepared.run
        found[f"compile, chunk {chunk}, s"] = prepared.compile_seconds
    one = compile_call(lambda state: loss(nnx.merge(graph, state)(tokens)[0], tokens), state)
    runs["one pass"] = one.run
    cells = list(np.ndindex(trace.heads(model).shape))
    if llama.torch is None:
        print("PyTorch is not installed (pip install torch): only the sweep is timed")
    else:
        torch = llama.torch
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        peer, given = llama.TorchLlama(model), torch.from_numpy(np.array(tokens, np.int64))

        def of_peer(*how: Any) -> float:
            return float(torch.nn.functional.cross_entropy(peer(given, *how)[0][0, :-1], given[0, 1:]))

        def restarted() -> list[float]:
            streams = peer(given)[1]
            return [of_peer(cell, (cell[0], streams[cell[0]])) for cell in cells]

        inference = torch.inference_mode()
        runs["PyTorch, one pass"] = inference(of_peer)
        runs["PyTorch, a pass for each head"] = inference(lambda: [of_peer(cell) for cell in cells])
        runs["PyTorch, restarted by hand"] = inference(restarted)
        theirs = inference(peer)(given)[0].numpy()
        found["logits, largest difference"] = float(np.abs(theirs - trace.run(model, tokens)[0]).max())
        found["logits, largest"] = float(np.abs(theirs).max())
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    of_cores: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            time.sleep(PAUSE)
            start, busy = time.perf_counter(), time.process_time()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
            of_cores[name].append(time.process_time() - busy)
            print(f"round {number}: {name}: {seconds[name][-1]:.2f} s, {of_cores[name][-1]:.2f} s of cores", flush=True)
    base = f"sweep, chunk {chunks[0]}"
    found["losses, largest difference from the sweep"] = {
        name: float(np.abs(np.asarray(result).reshape(-1) - np.asarray(results[base]).reshape(-1)).max())
        for name, result in results.items()
        if "one pass" not in name
    }
    found["seconds"] = seconds
    found["median, s"] = {name: median(each) for name, each in seconds.items()}
    found["of cores, median, s"] = {name: median(each) for name, each in of_cores.items()}
    found["over the sweep"] = {name: median_ratio(each, seconds[base]) for name, each in seconds.items()}
    work, count, heads = operations(model, tokens.shape[1]), *trace.heads(model).shape
    layer = work["maps of a layer"] + work["pairs of a layer"]
    found["GFLOP"] = work
    found["GFLOP of whole passes"] = (count * layer + work["head"]) * count * heads
    found["GFLOP restarted"] = ((count + 1) / 2 * layer + work["head"]) * count * heads
    if plain:
        start = time.perf_counter()
        jax.block_until_ready(swept(model, tokens, chunks[0])())
        found["a plain call of the sweep, compiling included, s"] = time.perf_counter() - start
    return found


def entropies(model: Any, tokens: jax.Array, rounds: int) -> dict[str, Any]:
    """Seconds of a pass without records, of one that records the entropy of every head, and of all of `USUAL`."""
    graph, state = nnx.split(model)

    def call(record: dict[str, Any]) -> Callable[..., Any]:
        def run(state: Any) -> Any:
            logits, _, records = nnx.merge(graph, state)(tokens, record=record)
            return loss(logits, tokens), records

        return run

    names: dict[str, dict[str, Any]] = {
        "no records": {},
        "entropy": {"entropy": ("weights", Entropy())},
        "the four of statistics": {name: ("weights", measure) for name, measure in analysis.USUAL.items()},
    }
    ready = {name: compile_call(call(record), state) for name, record in names.items()}
    seconds = take_turns({name: each.run for name, each in ready.items()}, 0.0, rounds)
    return {
        "seconds": seconds,
        "median, s": {name: median(each) for name, each in seconds.items()},
        "over a pass": {name: median_ratio(each, seconds["no records"]) for name, each in seconds.items()},
        "temporaries, MiB": {name: (each.temporaries or 0) / 2**20 for name, each in ready.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--tokens", type=int, default=128, help="length of the text whose heads are ablated")
    parser.add_argument("--chunk", type=int, nargs="+", default=[9], help="ablations at once; the first is the base")
    parser.add_argument("--long", type=int, default=4096, help="length of the text of entropies; 0 for none")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which all take turns")
    parser.add_argument("--plain", action="store_true", help="also a call of the sweep that compiles it, as users do")
    options = parser.parse_args()
    model = models.load_pretrained(options.weights).model
    versions = {name: metadata.version(name) for name in ("jax", "jaxattn")}
    if llama.torch is not None:
        versions["torch"] = llama.torch.__version__
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
        "load before": os.getloadavg(),
    }

    def text(length: int) -> jax.Array:
        return jax.random.randint(jax.random.key(0), (1, length), 0, model.config.vocabulary)

    if options.tokens:
        found["ablations"] = ablations(model, text(options.tokens), options.chunk, options.rounds, options.plain)
    if options.long:
        found["entropies"] = entropies(model, text(options.long), options.rounds)
    found["load after"] = os.getloadavg()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
