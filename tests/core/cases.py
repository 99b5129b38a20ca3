"""Calls of attend that cover its slots, each with the visible pairs written down a second time, in plain Python."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from jaxattn import (
    Alibi,
    Bias,
    BlockIndex,
    Blocks,
    Causal,
    Chunked,
    Documents,
    Dot,
    Explicit,
    Lengths,
    Mask,
    PerHead,
    Prefix,
    Score,
    Sigmoid,
    Sinks,
    Softmax,
    Window,
    attend,
    part,
)
from jaxattn.core.attend import Ancestors, Dilated, Expires, Graph, Pieces, Within
from jaxattn.core.attend.mask import places_in_documents

IMPLEMENTATIONS = ("dense", "rows", "tiled")


def by_implementation(*often: str, of: tuple[str, ...] = IMPLEMENTATIONS):
    """A law in every implementation. Since they agree, which is a law of its own, some among the slow tests."""
    slow = {name: () if name in often else pytest.mark.slow for name in of}
    return pytest.mark.parametrize("implementation", [pytest.param(name, marks=slow[name]) for name in of])


FACTOR = 20  # epsilons of the accumulator, times the oracle's magnitude


def epsilon(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


VISITS: list[int] = []


@part
class Counted(Score):
    """Dot, counting how often it is evaluated."""

    def __call__(self, query, key, tile):
        jax.debug.callback(lambda: VISITS.append(1))
        return Dot()(query, key, tile)


# Tables over 16 positions, for a batch of 2 and 4 heads.
IDS = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 5, 5, 5, 5, 5, -1, -1])
BATCH_IDS = np.array(
    [[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2], [3, 1, 3, 1, -1, 1, 1, 1, 0, 0, 0, -1, 2, 3, 3, 3]]
)
LENGTHS = np.array([0, 7])
BY_HEAD = np.random.default_rng(1).random((4, 16, 16)) < 0.3
BY_HEAD[:, 5] = False
BY_BATCH = np.random.default_rng(2).random((2, 1, 16, 16)) < 0.5
BY_BATCH[1, :, :, 8:] = False
ACTIVE = np.random.default_rng(4).random((2, 4, 6, 3)) < 0.4
NEIGHBOURS = np.random.default_rng(3).integers(-1, 16, (4, 12, 3))
EXPIRY = np.arange(12) + np.random.default_rng(5).choice([-1, 0, 2, 5, 100], (2, 4, 12))
CHUNKS = range(5), range(5, 10), range(10, 15)
PARENTS = np.array(
    [[-1, 0, 0, 1, 1, 2, 5, 0, -1, 8, 9, 8, 3, 12, 13, 10], [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
)


PIECE_IDS = np.array(
    [[-1, -1, 0, 0, 0, 1, 1, 2, 2, 2, 2, -2, -2, -2, -2, -2], [-1, 3, 0, 3, -1, 0, 0, 1, 1, -2, 1, 1, 0, 0, 0, 0]]
)


def in_pieces(ids, query, key) -> bool:
    of_query, of_key = (ids[at] if at < len(ids) else -2 for at in (query, key))
    return of_query == -2 or of_key == -1 or of_query == of_key


def descends(parents, node, ancestor) -> bool:
    while node > ancestor:
        node = parents[node]
    return node == ancestor


# name: (the part, the same thing said anew: does head n of batch entry b at position p see the key at position r?)
MASKS: dict[str, tuple[Mask | None, Callable]] = {
    "none": (None, lambda b, n, p, r: True),
    "causal": (Causal(), lambda b, n, p, r: r <= p),
    "window": (Window(3), lambda b, n, p, r: p - 3 <= r <= p),
    "wide window": (Window(1, 2), lambda b, n, p, r: -1 <= r - p <= 2),
    "sinks": (Sinks(2), lambda b, n, p, r: r in (0, 1)),
    "strict future": (~Causal(), lambda b, n, p, r: r > p),
    "documents": (Documents(jnp.asarray(IDS)), lambda b, n, p, r: IDS[p] == IDS[r] and IDS[p] >= 0),
    "batch documents": (
        Documents(jnp.asarray(BATCH_IDS)),
        lambda b, n, p, r: BATCH_IDS[b[-1], p] == BATCH_IDS[b[-1], r] and BATCH_IDS[b[-1], p] >= 0,
    ),
    "cross documents": (
        Documents(jnp.asarray(IDS[:10]), jnp.asarray(BATCH_IDS)),
        lambda b, n, p, r: p < 10 and IDS[p] >= 0 and IDS[p] == BATCH_IDS[b[-1], r],
    ),
    "pieces": (Pieces(jnp.asarray(PIECE_IDS)), lambda b, n, p, r: in_pieces(PIECE_IDS[b[-1]], p, r)),
    "lengths": (Lengths(jnp.asarray(LENGTHS)), lambda b, n, p, r: r < LENGTHS[b[-1]]),
    "explicit by head": (Explicit(jnp.asarray(BY_HEAD)), lambda b, n, p, r: BY_HEAD[n, p, r]),
    "explicit by batch": (
        Explicit(jnp.asarray(BY_BATCH[..., :12, :])),
        lambda b, n, p, r: p < 12 and BY_BATCH[b[-1], 0, p, r],
    ),
    "streaming": (
        Causal() & (Window(2) | Sinks(2)) & Documents(jnp.asarray(IDS)),
        lambda b, n, p, r: r <= p and (r >= p - 2 or r < 2) and IDS[p] == IDS[r] >= 0,
    ),
    "streaming by document": (
        Within(Causal() & (Window(1) | Sinks(1)), places_in_documents(jnp.asarray(IDS))) & Documents(jnp.asarray(IDS)),
        lambda b, n, p, r: r <= p and (r >= p - 1 or IDS[r - 1] != IDS[r]) and IDS[p] == IDS[r] >= 0,
    ),
    "outside the window": (
        ~Window(2, 1) & Lengths(jnp.asarray(LENGTHS)),
        lambda b, n, p, r: not p - 2 <= r <= p + 1 and r < LENGTHS[b[-1]],
    ),
    "prefix": (Prefix(jnp.asarray(LENGTHS)), lambda b, n, p, r: r <= p or r < LENGTHS[b[-1]]),
    "prefix of 5": (Prefix(5), lambda b, n, p, r: r <= p or r < 5),
    "dilated": (Dilated(3), lambda b, n, p, r: abs(p - r) in (0, 3, 6, 9, 12, 15)),
    "strided": (
        Causal() & (Window(2) | Dilated(4)),
        lambda b, n, p, r: r <= p and (p - r <= 2 or p - r in (4, 8, 12)),
    ),
    "chunked": (Chunked(5), lambda b, n, p, r: [p in chunk for chunk in CHUNKS] == [r in chunk for chunk in CHUNKS]),
    "expires": (Expires(jnp.asarray(EXPIRY)), lambda b, n, p, r: r < 12 and r <= p <= EXPIRY[b[-1], n, r]),
    "graph": (Graph(jnp.asarray(NEIGHBOURS)), lambda b, n, p, r: p < 12 and r in NEIGHBOURS[n, p].tolist()),
    "ancestors": (Ancestors(jnp.asarray(PARENTS)), lambda b, n, p, r: descends(PARENTS[b[-1]], p, r)),
    "blocks": (
        Blocks(BlockIndex(jnp.asarray(ACTIVE), (2, 4))),
        lambda b, n, p, r: p < 12 and r < 12 and ACTIVE[b[-1], n, p // 2, r // 4],
    ),
    "per head": (
        PerHead((Window(1), Causal() & ~Window(4), Documents(jnp.asarray(BATCH_IDS)), Explicit(jnp.asarray(BY_HEAD)))),
        lambda b, n, p, r: (
            p - 1 <= r <= p,
            r < p - 4,
            BATCH_IDS[b[-1], p] == BATCH_IDS[b[-1], r] and BATCH_IDS[b[-1], p] >= 0,
            BY_HEAD[3, p, r],
        )[n],
    ),
    "causal or explicit": (
        Causal() & Explicit(jnp.asarray(BY_HEAD)) | ~(Sinks(9) | Causal()),
        lambda b, n, p, r: (r <= p and BY_HEAD[n, p, r]) or (r >= 9 and r > p),
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; sizes are (T, S), (N, K, Kv), (H, V). `learned` says which parts hold arrays that get gradients."""

    mask: str
    lengths: tuple[int, int]
    block: Any
    heads: tuple[int, int, int] = (4, 2, 2)
    widths: tuple[int, int] = (4, 4)
    batch: tuple[int, ...] = (2,)
    normalize: str = "softmax"
    learned: tuple[str, ...] = ()  # of "scale", "null", "alibi", "table", "table by batch"
    positions: str = "default"  # or "last", "scattered"
    dtype: Any = np.float32

    def __str__(self):
        return "-".join(
            (self.mask.replace(" ", "_"), "x".join(map(str, self.lengths)), self.normalize, np.dtype(self.dtype).name)
        )


CASES = (
    Case("none", (9, 11), 4, (4, 2, 4), (6, 5), learned=("scale", "null", "table")),
    Case("none", (5, 7), (2, 3), (4, 1, 1), batch=(), normalize="sigmoid", learned=("alibi",), dtype=np.float64),
    Case("causal", (13, 13), (3, 5), (4, 4, 1), (4, 6), (), learned=("alibi",)),
    Case("causal", (12, 12), 4, (4, 2, 1), learned=("scale", "null", "alibi"), dtype=ml_dtypes.bfloat16),
    Case("causal", (1, 11), None, (4, 1, 4), positions="last", learned=("scale",), normalize="sigmoid"),
    Case("causal", (4, 5), 1, (2, 1, 2), (2, 3), (), learned=("null",)),
    Case("window", (16, 16), (8, 4), (4, 1, 2), normalize="sigmoid", learned=("scale", "alibi")),
    Case("wide window", (5, 12), 3, (2, 2, 1), (3, 5), (1, 2), learned=("null", "alibi")),
    Case("strict future", (7, 7), (2, 4), batch=(2, 2), normalize="sigmoid", learned=("table",)),
    Case("documents", (16, 15), 4, (4, 1, 4), normalize="sigmoid", learned=("alibi",), dtype=ml_dtypes.bfloat16),
    Case("batch documents", (16, 16), (4, 2), learned=("null", "table by batch"), widths=(4, 2)),
    Case("cross documents", (14, 9), 5, (2, 1, 1), learned=("scale",), dtype=np.float64),
    Case("pieces", (14, 16), (4, 3), (4, 2, 1), learned=("scale",)),
    Case("lengths", (6, 12), 4, (4, 4, 2), learned=("null", "table by batch")),
    Case("explicit by head", (9, 16), 4, learned=("scale", "alibi"), widths=(5, 4)),
    Case("explicit by batch", (14, 10), 4, (2, 1, 2), (4, 3), normalize="sigmoid", learned=("table",)),
    Case("streaming", (16, 16), 4, (4, 2, 4), learned=("scale", "null", "alibi"), dtype=np.float64),
    Case("streaming", (10, 13), (3, 4), (4, 2, 1), positions="scattered", learned=("null", "table by batch")),
    Case("outside the window", (6, 11), 64, positions="scattered", normalize="sigmoid", learned=("scale",)),
    Case("causal or explicit", (11, 14), (4, 8), (4, 4, 4), positions="scattered", learned=("alibi",)),
    Case("prefix", (12, 14), (4, 3), learned=("scale", "null", "table by batch")),
    Case("streaming by document", (14, 16), (4, 3), (4, 4, 2), batch=(), learned=("scale", "alibi")),
    Case("prefix of 5", (11, 9), 4, (4, 4, 1), batch=(), normalize="sigmoid", learned=("alibi",)),
    Case("dilated", (8, 13), (3, 4), (4, 1, 1), positions="scattered", learned=("table",)),
    Case("strided", (16, 16), (4, 2), (2, 2, 1), learned=("scale", "alibi")),
    Case("chunked", (14, 16), 4, (4, 1, 2), (5, 3), dtype=np.float64, learned=("null",)),
    Case("expires", (14, 16), (4, 3), (4, 4, 2), learned=("scale", "null")),
    Case("graph", (13, 16), 4, (4, 2, 1), batch=(), learned=("scale", "alibi")),
    Case("graph", (11, 12), (3, 4), positions="scattered", normalize="sigmoid", learned=("table",)),
    Case("ancestors", (16, 16), 4, (4, 2, 4), learned=("null", "table by batch")),
    Case("ancestors", (7, 12), 3, (2, 1, 1), positions="scattered", dtype=ml_dtypes.bfloat16),
    Case("blocks", (13, 12), (4, 3), learned=("scale", "null", "alibi")),
    Case("blocks", (6, 13), 4, (4, 1, 2), positions="scattered", normalize="sigmoid", learned=("table by batch",)),
    Case("per head", (12, 15), (4, 5), (4, 2, 1), learned=("scale", "null", "alibi")),
)


def draw(case: Case) -> tuple[tuple, tuple, tuple, tuple]:
    """NumPy arrays and parts of a call: (arrays, parts, positions, cotangents)."""
    rng = np.random.default_rng(0)
    (t, s), (n, k, kv), (h, v) = case.lengths, case.heads, case.widths

    def normal(*shape):
        return rng.normal(size=shape).astype(case.dtype)

    wide = np.float64 if case.dtype == np.float64 else np.float32
    arrays = normal(*case.batch, t, n, h), normal(*case.batch, s, k, h), normal(*case.batch, s, kv, v)
    scale = wide(rng.uniform(0.4, 0.8)) if "scale" in case.learned else None
    null = rng.normal(size=n).astype(wide) if "null" in case.learned else None
    bias: Any = None
    if "alibi" in case.learned:
        bias = Alibi(rng.uniform(0.05, 0.5, n).astype(wide))
    if "table" in case.learned:
        bias = Bias(rng.normal(size=(1, t + 2, s - 2)).astype(wide))
    if "table by batch" in case.learned:
        bias = Bias(rng.normal(size=(2, n, 14, 15)).astype(wide))
    normalize = Sigmoid() if case.normalize == "sigmoid" else Softmax(null)
    positions = {
        "default": (None, None),
        "last": (np.array([s - 1]), None),
        "scattered": (
            np.stack([rng.permutation(16)[:t] for _ in range(2)]).astype(np.int32),
            np.where(rng.random(s) < 0.3, -1, rng.permutation(16)[:s]).astype(np.int32),
        ),
    }[case.positions]
    if case.positions == "scattered":
        positions[0][0, :3] = -1
    d_out, d_lse = rng.normal(size=(*case.batch, t, n, v)), rng.normal(size=(*case.batch, t, n)).astype(wide)
    return arrays, (Dot(scale), bias, normalize), positions, (d_out.astype(case.dtype), d_lse)


@partial(jax.jit, static_argnames=("implementation", "block"))
def evaluate(arrays, parts, mask, positions, cotangents, *, implementation="dense", block=None, dropout=None):
    """(out, lse) and the gradients of Σ d_out·out + Σ d_lse·lse in the arrays and in every array of the parts."""

    def call(query, key, value, score, bias, normalize):
        out, extras = attend(
            query,
            key,
            value,
            score=score,
            bias=bias,
            mask=mask,
            normalize=normalize,
            query_positions=positions[0],
            key_positions=positions[1],
            dropout=dropout,
            return_lse=True,
            block=block,
            implementation=implementation,
        )
        return out, extras["lse"]

    results, pull = jax.vjp(call, *arrays, *parts)
    return results, pull(jax.tree.map(lambda d, x: d.astype(x.dtype), cotangents, results))


@cache
def measured(case: Case, implementation: str) -> dict[str, np.ndarray]:
    """What attend makes of a case."""
    arrays, parts, positions, cotangents = draw(case)
    with jax.enable_x64(case.dtype == np.float64):
        (out, lse), (*d_arrays, d_score, d_bias, d_normalize) = evaluate(
            arrays, parts, MASKS[case.mask][0], positions, cotangents, implementation=implementation, block=case.block
        )
    named = {"out": out, "lse": lse} | dict(zip(("query", "key", "value"), d_arrays, strict=True))
    named |= {"scale": d_score.scale, "null": getattr(d_normalize, "null_logit", None)}
    named |= {"slopes": getattr(d_bias, "slopes", None), "table": getattr(d_bias, "array", None)}
    return {name: np.asarray(x) for name, x in named.items() if x is not None}


@cache
def expected(case: Case) -> dict[str, tuple[np.ndarray, float]]:
    """What the oracle makes of it: name -> (value, largest magnitude)."""
    (query, key, value), (score, bias, normalize), positions, cotangents = draw(case)
    (t, s), heads = case.lengths, case.heads[0]
    places = tuple(np.arange(size) if p is None else p for p, size in zip(positions, (t, s), strict=True))
    rows = (*case.batch, heads, t, s)
    visible = oracle.pairs(MASKS[case.mask][1], *places, case.batch, heads)
    added: Any = 0.0
    if isinstance(bias, Alibi):
        added = oracle.alibi(bias.slopes, *places)
    if isinstance(bias, Bias):
        added = oracle.table(bias.array, rows, *places)
    null = getattr(normalize, "null_logit", None)
    options = {"scale": score.scale, "bias": added, "normalize": case.normalize, "null_logit": null}
    both = oracle.attention(query, key, value, visible, *cotangents, **options)
    named = {name: tuple(getattr(x, name) for x in both) for name in ("out", "lse", "query", "key", "value")}
    if score.scale is not None:
        named["scale"] = both[0].scale, both[1].scale
    if null is not None:
        named["null"] = both[0].null_logit, both[1].null_logit
    if isinstance(bias, Alibi):
        named["slopes"] = tuple(oracle.alibi_gradient(x.scores, *places) for x in both)
    if isinstance(bias, Bias):
        named["table"] = tuple(oracle.table_gradient(x.scores, bias.array.shape, *places) for x in both)
    return {
        name: (exact, float(np.abs(size).max(where=np.isfinite(size), initial=0)))
        for name, (exact, size) in named.items()
    }


def assert_close(actual, reference, magnitude, dtype=np.float32, factor=FACTOR, err_msg=""):
    """|actual − reference| <= factor epsilons of float32 (float64) times the magnitude, and the rounding to bfloat16.

    A bfloat16 result is rounded once when it is returned and each of its summands at most once before, by half an
    epsilon each. Infinities must agree.
    """
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    bound = factor * epsilon(wide) * magnitude
    if np.dtype(dtype) == ml_dtypes.bfloat16:
        bound += epsilon(dtype) * magnitude
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    np.testing.assert_allclose(actual, reference, rtol=0, atol=bound, err_msg=err_msg)
