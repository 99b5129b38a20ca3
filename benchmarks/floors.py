"""What the machine reaches at best, measured in the same process: the floor under every figure.

A visible pair of a query and a key costs 4 H operations forward (q·k, and adding w v), 10 H backward (q·k again, d_w,
d_v, d_q, d_k) and one exponential each way. Decoding costs one read of the cache. A token of a recurrence costs the
operations of its write, its read and its erasure, and twice as many backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import HEAD_DIM, HEADS, RECURRENCES, Setting, visible_pairs
from benchmarks.measure import median, take_turns

QUERIES, KEYS = 256, 512  # the largest tile of `jaxattn.core.attend.schedule` on a CPU
REPEATS = 16  # per timing and inside one program, so that neither starting it nor fresh memory counts


def _repeat(step: Callable[[Any], Any], start: Any) -> Callable[[], Any]:
    program = jax.jit(lambda x: jax.lax.fori_loop(0, REPEATS, lambda _, x: step(x), x))
    return lambda: jax.block_until_ready(program(start))


def measure_floors(dtypes: Sequence[str], budget: float) -> dict[str, float]:
    """Rates per second: "matmul DTYPE", operations of (q kᵀ) v on a tile; "exp", exponentials; "read", bytes."""
    runs: dict[str, Callable[[], Any]] = {}
    amounts: dict[str, float] = {}
    for dtype in dtypes:
        query, key = (jnp.ones((HEADS, length, HEAD_DIM), dtype) for length in (QUERIES, KEYS))

        def two_matmuls(query, key=key):
            scores = jnp.einsum("nqh,nkh->nqk", query, key, preferred_element_type=jnp.float32)
            out = jnp.einsum("nqk,nkh->nqh", scores.astype(key.dtype), key, preferred_element_type=jnp.float32)
            return out.astype(key.dtype)

        runs[f"matmul {dtype}"] = _repeat(two_matmuls, query)
        amounts[f"matmul {dtype}"] = REPEATS * 2 * 2 * HEADS * QUERIES * KEYS * HEAD_DIM
    scores, cache = jnp.ones((HEADS, QUERIES, KEYS)), jnp.ones(2**26)
    runs["exp"], amounts["exp"] = _repeat(lambda x: jnp.exp(-x), scores), REPEATS * scores.size
    largest = jax.jit(jnp.max)
    runs["read"], amounts["read"] = lambda: jax.block_until_ready(largest(cache)), cache.nbytes
    return {name: amounts[name] / median(seconds) for name, seconds in take_turns(runs, budget).items()}


def floor_seconds(case: str, setting: Setting, floors: dict[str, float]) -> float:
    """The least time for the case's pairs: matmuls and exponentials in turn; decoding, one read of keys and values."""
    if case in RECURRENCES:
        operations = RECURRENCES[case].operations * HEAD_DIM**2 * (3 if setting.backward else 1)
        return setting.batch * HEADS * setting.queries * operations / floors[f"matmul {setting.dtype}"]
    pairs = setting.batch * HEADS * visible_pairs(case, setting)
    matmuls = 7 if setting.backward else 2
    compute = matmuls * 2 * HEAD_DIM / floors[f"matmul {setting.dtype}"] + (1 + setting.backward) / floors["exp"]
    if setting.queries > 1:
        return pairs * compute
    bytes_per_pair = 2 * HEAD_DIM * jnp.dtype(setting.dtype).itemsize
    return pairs * max(compute, bytes_per_pair / floors["read"])
