"""Every part that can stand in a slot of attend, and beside it what it computes, in float64 NumPy written apart.

A slot's oracle works on whole arrays, heads first: scores [B, N, T, S], `visible` the same, positions p [T] and r [S].
Its slopes along some directions are differences of it, exact to about 1e-9.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxattn.core.attend as ja
from jaxattn.core import noise

B, T, S, N, K, KV, H, V = 2, 9, 11, 4, 2, 1, 4, 3
KEY = jax.random.key(7)
TABLE = 13  # positions that tables of the scattered cases cover; some queries and keys stand outside


@dataclasses.dataclass(frozen=True)
class Slot:
    """`arrays` name -> shape of what is learned; `parts` makes arguments of attend of them, `oracle` those of `weigh`.

    `positive`: arrays that must be. `tiles`: tiled serves it. `rows`: rows does.
    """

    arrays: dict[str, tuple[int, ...]]
    parts: Callable[[dict], dict[str, Any]]
    oracle: Callable[[dict, np.ndarray, np.ndarray], dict[str, Any]]
    positive: tuple[str, ...] = ()
    tiles: bool = True
    rows: bool = True


# The stages, by definition.


def softmax(x, visible):
    top = np.where(visible, x, -np.inf).max(-1, keepdims=True)
    w = np.where(visible, np.exp(np.where(visible, x, 0) - np.where(np.isfinite(top), top, 0)), 0)
    total = w.sum(-1, keepdims=True)
    lse = np.where(total > 0, np.log(np.where(total > 0, total, 1)) + np.where(np.isfinite(top), top, 0), -np.inf)
    return w / np.where(total > 0, total, 1), lse[..., 0]


def elementwise(weight, normalized, largest=False):
    """Weights that depend on each score alone; `largest`: divide by max(|total|, 1) instead of the total."""

    def normalize(x, visible):
        w = np.where(visible, weight(x), 0.0)
        total = w.sum(-1)
        divisor = np.maximum(abs(total), 1) if largest else np.where(total > 0, total, 1)
        with np.errstate(divide="ignore"):
            lse = np.log(abs(total))
        return (w / divisor[..., None] if normalized else w), lse

    return normalize


def null_softmax(null, temperature):
    def normalize(x, visible):
        x = x / np.reshape(temperature, (-1, 1, 1))
        b = np.broadcast_to(null[:, None, None], (*x.shape[:-1], 1))
        w, lse = softmax(np.concatenate([x, b], -1), np.concatenate([visible, np.ones_like(b, bool)], -1))
        return w[..., :-1], lse

    return normalize


def by_bisection(power):
    """p_j = max(z_j − τ, 0)^power with Σ p = 1, for the τ that bisection finds: sparsemax (1) and 1.5-entmax (2)."""

    def normalize(x, visible):
        z = np.where(visible, x / power, -np.inf)
        top = z.max(-1, keepdims=True)
        seen = np.isfinite(top)
        low, high = np.where(seen, top, 0) - 1, np.where(seen, top, 0.0)
        for _ in range(80):
            middle = (low + high) / 2
            above = (np.maximum(z - middle, 0) ** power).sum(-1, keepdims=True) >= 1
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(seen, np.maximum(z - low, 0) ** power, 0), np.where(seen[..., 0], 0, -np.inf)

    return normalize


def largest(x, visible, k):
    """Which visible entries of each row are its k largest."""
    order = np.argsort(-np.where(visible, x, -np.inf), -1, kind="stable")
    chosen = np.zeros(x.shape, bool)
    np.put_along_axis(chosen, order[..., :k], True, -1)
    return chosen & visible


def top_k(k):
    return lambda x, visible: softmax(x, visible & largest(x, visible, k))


def draws(p, r, fill=noise.gumbel):
    """The library's noise at these positions; its distribution is tested in test_noise.py."""
    seeds = noise.seeds(KEY, (B, N))
    return np.asarray(fill(seeds, np.asarray(p, np.int32)[:, None], np.asarray(r, np.int32)[None]), np.float64)


def gated(m, p, r):
    def normalize(x, visible):
        m_here = m[:, :, np.maximum(p, 0)[:, None], np.maximum(r, 0)]
        mass = np.where(visible, m_here * np.exp(np.where(visible, x, 0)), 0)
        total = mass.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            return mass / np.where(total > 0, total, 1), np.log(total[..., 0])

    return normalize


def one_hot_sample(p, r):
    def normalize(x, visible):
        probability, _ = softmax(x, visible)
        noisy = np.where(visible, x + draws(p, r), -np.inf)
        hot = visible & (np.arange(x.shape[-1]) == noisy.argmax(-1)[..., None])
        with np.errstate(divide="ignore"):
            return hot.astype(float), np.log((hot * probability).sum(-1))

    return normalize


def keep(w, kept):
    left = np.where(kept, w, 0)
    return left * w.sum(-1, keepdims=True) / np.where(left.sum(-1, keepdims=True) != 0, left.sum(-1, keepdims=True), 1)


def keep_groups(r, count, top):
    """Keeps the groups of a row with the largest sums of a few weights, or means; by a loop."""

    def mapped(w, visible):
        kept = np.zeros(w.shape, bool)
        for row in np.ndindex(*w.shape[:-1]):
            ids = np.broadcast_to(np.where(r < S, GROUPS[np.clip(r, 0, S - 1)], -1), (B, 1, 1, w.shape[-1]))[
                row[0], 0, 0
            ]
            scores = {}
            for group in range(3):
                of_group = w[row][(ids == group) & np.broadcast_to(visible, w.shape)[row]]
                if len(of_group):
                    scores[group] = np.sort(of_group)[::-1][:top].sum() if top else of_group.mean()
            best = sorted(scores, key=lambda g: (-scores[g], g))[:count]
            kept[row] = np.isin(ids, best) | (ids < 0)
        return keep(w, kept)

    return mapped


def drop_top_k(k, rate, p, r):
    coins = draws(p, r, noise.uniform)

    def mapped(w, visible):
        top = largest(w, visible, k)
        dropped = np.zeros(w.shape, bool)
        for row in np.ndindex(*w.shape[:-1]):
            best = np.flatnonzero(top[row])
            count = int(np.floor(rate * len(best) + 1e-9))
            dropped[row][best[np.argsort(coins[row][best])[:count]]] = True
        return keep(w, ~dropped)

    return mapped


def convolve(kernel):
    def mapped(x, visible):
        _, above, across = kernel.shape
        sides = [(0, 0), (0, 0), (above - 1, 0), (across // 2, across // 2)]
        around = np.pad(np.where(visible, x, 0), sides)
        windows = np.lib.stride_tricks.sliding_window_view(around, (above, across), (-2, -1))  # [B, N, T, S, a, b]
        return np.where(visible, np.einsum("bntsxy,nxy->bnts", windows, np.broadcast_to(kernel, (N, above, across))), 0)

    return mapped


def temporal(x, visible):
    """The recurrent form: a running Σ exp per key; no discount before the first query that sees it."""
    out, total = x.copy(), np.zeros_like(x[..., 0, :])
    for t in range(x.shape[-2]):
        out[..., t, :] = x[..., t, :] - np.where(total > 0, np.log(np.where(total > 0, total, 1)), 0)
        total = total + np.where(visible[..., t, :], np.exp(x[..., t, :]), 0)
    return out


def reallocate(groups, masses):
    def mapped(w, visible):
        out = w.copy()
        for g in range(masses.shape[-1]):
            inside = groups == g
            old = w[..., inside].sum(-1, keepdims=True)
            new = np.broadcast_to(masses, (*w.shape[:-1], masses.shape[-1]))[..., g, None]
            out[..., inside] = w[..., inside] * np.where(old > 0, new / np.where(old > 0, old, 1), 1)
        return out

    return mapped


def look_up(table, *places):
    """table[..., places], 0 where a place is outside; places broadcast against each other."""
    sizes = table.shape[len(table.shape) - len(places) :]
    inside = np.ones(np.broadcast_shapes(*map(np.shape, places)), bool)
    for place, size in zip(places, sizes, strict=True):
        inside = inside & (np.asarray(place) >= 0) & (np.asarray(place) < size)
    return np.where(inside, table[(..., *(np.clip(x, 0, size - 1) for x, size in zip(places, sizes, strict=True)))], 0)


def gaussian(a, p, r):
    inside = (p >= 0) & (p < a["centres"].shape[-1])
    centre = look_up(a["centres"], p)
    return np.where(inside[:, None], -((r - centre[..., None]) ** 2) / (2 * a["sigma"] ** 2), 0)


def bucket(distance, buckets, most, bidirectional):
    """T5's buckets, from their formula."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = np.where(distance < 0, buckets, 0)
        distance = abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = buckets // 2
    safe = np.maximum(distance, 1)
    grown = exact + np.floor(np.log(safe / exact) / np.log(most / exact) * (buckets - exact) + 1e-9).astype(int)
    return offset + np.where(distance < exact, distance, np.minimum(grown, buckets - 1))


def pairwise(of_pair):
    return lambda q, k: of_pair(q[..., :, None, :], k[..., None, :, :])


def plain(score=None, bias=None, score_maps=(), normalize=softmax, weight_maps=()):
    return {"score": score, "bias": bias, "score_maps": score_maps, "normalize": normalize, "weight_maps": weight_maps}


def scores_of(name, shapes, make, oracle):
    return Slot(shapes, lambda a: {"score": make(a)}, lambda a, p, r: plain(score=oracle(a, p, r)))


def a_bias(shapes, make, oracle, **rest):
    return Slot(shapes, lambda a: {"bias": make(a)}, lambda a, p, r: plain(bias=oracle(a, p, r)), **rest)


def a_normaliser(make, oracle, shapes=None, **rest):
    parts = lambda a: {"normalize": make(a)}  # noqa: E731
    return Slot(shapes or {}, parts, lambda a, p, r: plain(normalize=oracle(a, p, r)), **rest)


def a_map(slot, make, oracle, shapes=None, **rest):
    parts = lambda a: {slot: (make(a),)}  # noqa: E731
    return Slot(shapes or {}, parts, lambda a, p, r: plain(**{slot: (oracle(a, p, r),)}), **rest)


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def elu1(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


GROUPS = np.array([0, 1, 2, 0, 1, -1, 2, 0, 0, 1, 2])
ROWS = {"tiles": False}

SLOTS: dict[str, Slot] = {
    # scores
    "Dot": scores_of(
        "dot",
        {"scale": ()},
        lambda a: ja.Dot(a["scale"]),
        lambda a, p, r: lambda q, k: a["scale"] * np.einsum("bnth,bnsh->bnts", q, k),
    ),
    "Bilinear": scores_of(
        "bilinear",
        {"w": (H, H)},
        lambda a: ja.Bilinear(a["w"]),
        lambda a, p, r: lambda q, k: np.einsum("bnth,hg,bnsg->bnts", q, a["w"], k),
    ),
    "Bilinear by head": scores_of(
        "bilinear",
        {"w": (N, H, H)},
        lambda a: ja.Bilinear(a["w"]),
        lambda a, p, r: lambda q, k: np.einsum("bnth,nhg,bnsg->bnts", q, a["w"], k),
    ),
    "Additive": scores_of(
        "additive",
        {"a": (H, 5), "b": (H, 5), "v": (5,)},
        lambda a: ja.Additive(a["a"], a["b"], a["v"]),
        lambda a, p, r: pairwise(lambda q, k: np.tanh(q @ a["a"] + k @ a["b"]) @ a["v"]),
    ),
    "Neural": scores_of(
        "neural",
        {"w1": (2 * H, 5), "b1": (5,), "w2": (5,)},
        lambda a: ja.Neural(a["w1"], a["b1"], a["w2"]),
        lambda a, p, r: pairwise(lambda q, k: relu(q @ a["w1"][:H] + k @ a["w1"][H:] + a["b1"]) @ a["w2"]),
    ),
    "Neural, two layers": scores_of(
        "neural",
        {"w1": (2 * H, 5), "b1": (5,), "w2": (5, 3), "b2": (3,), "w3": (3,)},
        lambda a: ja.Neural(a["w1"], a["b1"], a["w2"], a["b2"], a["w3"]),
        lambda a, p, r: pairwise(
            lambda q, k: relu(relu(q @ a["w1"][:H] + k @ a["w1"][H:] + a["b1"]) @ a["w2"] + a["b2"]) @ a["w3"]
        ),
    ),
    "NegativeDistance": scores_of(
        "distance",
        {"scale": ()},
        lambda a: ja.NegativeDistance(a["scale"]),
        lambda a, p, r: pairwise(lambda q, k: -a["scale"] * ((q - k) ** 2).sum(-1)),
    ),
    "PairSum": scores_of(
        "pair sum",
        {"a": (N, H), "b": (H,)},
        lambda a: ja.PairSum(a["a"], a["b"]),
        lambda a, p, r: pairwise(
            lambda q, k: (lambda x: np.where(x > 0, x, 0.2 * x))((q * a["a"][:, None, None]).sum(-1) + k @ a["b"])
        ),
    ),
    "Location": scores_of(
        "location",
        {"w": (N, TABLE, H)},
        lambda a: ja.Location(a["w"]),
        lambda a, p, r: lambda q, k: np.einsum("bnth,nhs->bnts", q, look_up(a["w"].swapaxes(-1, -2), r)),
    ),
    # biases
    "Bias": a_bias(
        {"x": (N, TABLE, TABLE)}, lambda a: ja.Bias(a["x"]), lambda a, p, r: look_up(a["x"], p[:, None], r[None])
    ),
    "Bias by batch": a_bias(
        {"x": (B, 1, TABLE - 1, TABLE)}, lambda a: ja.Bias(a["x"]), lambda a, p, r: look_up(a["x"], p[:, None], r[None])
    ),
    "Bias of keys": a_bias({"x": (TABLE,)}, lambda a: ja.Bias(a["x"]), lambda a, p, r: look_up(a["x"], r)),
    "Bias of queries": a_bias(
        {"x": (B, N, TABLE, 1)}, lambda a: ja.Bias(a["x"]), lambda a, p, r: look_up(a["x"][..., 0], p)[..., None]
    ),
    "KeyBias": a_bias(
        {"x": (B, N, TABLE)}, lambda a: ja.KeyBias(a["x"]), lambda a, p, r: look_up(a["x"], r)[..., None, :]
    ),
    "Alibi": a_bias(
        {"x": (N,)}, lambda a: ja.Alibi(a["x"]), lambda a, p, r: -a["x"][:, None, None] * abs(p[:, None] - r[None])
    ),
    "RelativeBias": a_bias(
        {"x": (N, 8)},
        lambda a: ja.RelativeBias(a["x"], 9),
        lambda a, p, r: a["x"][:, bucket(p[:, None] - r[None], 8, 9, False)],
    ),
    "RelativeBias, both ways": a_bias(
        {"x": (1, 8)},
        lambda a: ja.RelativeBias(a["x"], 7, True),
        lambda a, p, r: a["x"][:, bucket(p[:, None] - r[None], 8, 7, True)],
    ),
    "LogGaussian": a_bias(
        {"centres": (N, TABLE), "sigma": ()},
        lambda a: ja.LogGaussian(a["centres"], a["sigma"]),
        gaussian,
        positive=("sigma",),
    ),
    # score maps
    "SoftCap": a_map("score_maps", lambda a: ja.SoftCap(0.8), lambda a, p, r: lambda x, seen: 0.8 * np.tanh(x / 0.8)),
    "Temperature": a_map(
        "score_maps",
        lambda a: ja.Temperature(a["x"]),
        lambda a, p, r: lambda x, seen: x / a["x"][:, None, None],
        {"x": (N,)},
        positive=("x",),
    ),
    "MixHeads": a_map(
        "score_maps",
        lambda a: ja.MixHeads(a["x"]),
        lambda a, p, r: lambda x, seen: np.einsum("nm,bmts->bnts", a["x"], np.where(seen, x, 0)),
        {"x": (N, N)},
    ),
    "Convolution": a_map(
        "score_maps", lambda a: ja.Convolution(a["x"]), lambda a, p, r: convolve(a["x"]), {"x": (N, 3, 5)}, **ROWS
    ),
    "Temporal": a_map("score_maps", lambda a: ja.Temporal(), lambda a, p, r: temporal, tiles=False, rows=False),
    # weight maps
    "MixHeads of weights": a_map(
        "weight_maps",
        lambda a: ja.MixHeads(a["x"]),
        lambda a, p, r: lambda x, seen: np.einsum("nm,bmts->bnts", a["x"], np.where(seen, x, 0)),
        {"x": (N, N)},
        **ROWS,
    ),
    "Convolution of weights": a_map(
        "weight_maps", lambda a: ja.Convolution(a["x"]), lambda a, p, r: convolve(a["x"]), {"x": (1, 2, 3)}, **ROWS
    ),
    "TopKWeights": a_map(
        "weight_maps", lambda a: ja.TopKWeights(3), lambda a, p, r: lambda w, seen: keep(w, largest(w, seen, 3)), **ROWS
    ),
    "DropTopK": a_map(
        "weight_maps", lambda a: ja.DropTopK(5, 0.6, KEY), lambda a, p, r: drop_top_k(5, 0.6, p, r), **ROWS
    ),
    "KeepGroups": a_map(
        "weight_maps", lambda a: ja.KeepGroups(GROUPS, 1, 2), lambda a, p, r: keep_groups(r, 1, 2), **ROWS
    ),
    "KeepGroups by means": a_map(
        "weight_maps", lambda a: ja.KeepGroups(GROUPS, 2, 0), lambda a, p, r: keep_groups(r, 2, 0), **ROWS
    ),
    "Reallocate": a_map(
        "weight_maps",
        lambda a: ja.Reallocate(GROUPS, a["x"], 3),
        lambda a, p, r: reallocate(np.where(r < S, GROUPS[np.clip(r, 0, S - 1)], -1), a["x"]),
        {"x": (N, 1, 3)},
        positive=("x",),
        **ROWS,
    ),
    "GaussianWindow": a_map(
        "weight_maps",
        lambda a: ja.GaussianWindow(a["centres"], a["sigma"]),
        lambda a, p, r: lambda w, seen: w * np.exp(gaussian(a, p, r)),
        {"centres": (N, TABLE), "sigma": ()},
        positive=("sigma",),
    ),
    # normalisers
    "Softmax": a_normaliser(
        lambda a: ja.Softmax(a["null"], a["t"]),
        lambda a, p, r: null_softmax(a["null"], a["t"]),
        {"null": (N,), "t": (N,)},
        positive=("t",),
    ),
    "Sigmoid": a_normaliser(
        lambda a: ja.Sigmoid(a["x"]),
        lambda a, p, r: elementwise(lambda x: sigmoid(x + a["x"][:, None, None]), False),
        {"x": (N,)},
    ),
    "Sigmoid, normalised": a_normaliser(
        lambda a: ja.Sigmoid(a["x"], True), lambda a, p, r: elementwise(lambda x: sigmoid(x + a["x"]), True), {"x": ()}
    ),
    "Relu": a_normaliser(lambda a: ja.Relu(), lambda a, p, r: elementwise(relu, False)),
    "Relu, normalised": a_normaliser(lambda a: ja.Relu(True), lambda a, p, r: elementwise(relu, True)),
    "ReluSquared": a_normaliser(lambda a: ja.ReluSquared(), lambda a, p, r: elementwise(lambda x: relu(x) ** 2, False)),
    "ReluSquared, normalised": a_normaliser(
        lambda a: ja.ReluSquared(True), lambda a, p, r: elementwise(lambda x: relu(x) ** 2, True)
    ),
    "Elu1": a_normaliser(lambda a: ja.Elu1(), lambda a, p, r: elementwise(elu1, False)),
    "Elu1, normalised": a_normaliser(lambda a: ja.Elu1(True), lambda a, p, r: elementwise(elu1, True)),
    "LinearWeights": a_normaliser(lambda a: ja.LinearWeights(), lambda a, p, r: elementwise(lambda x: x, False)),
    "LinearWeights, normalised": a_normaliser(
        lambda a: ja.LinearWeights(True), lambda a, p, r: elementwise(lambda x: x, True, largest=True)
    ),
    "Sparsemax": a_normaliser(lambda a: ja.Sparsemax(), lambda a, p, r: by_bisection(1), **ROWS),
    "Entmax15": a_normaliser(lambda a: ja.Entmax15(), lambda a, p, r: by_bisection(2), **ROWS),
    "TopK": a_normaliser(lambda a: ja.TopK(3), lambda a, p, r: top_k(3), **ROWS),
    "OneHotSample": a_normaliser(lambda a: ja.OneHotSample(KEY), lambda a, p, r: one_hot_sample(p, r), **ROWS),
    "GatedSoftmax": a_normaliser(
        lambda a: ja.GatedSoftmax(a["m"]),
        lambda a, p, r: gated(a["m"], p, r),
        {"m": (B, N, 16, 16)},
        positive=("m",),
        **ROWS,
    ),
    "Gumbel": a_normaliser(
        lambda a: ja.Gumbel(KEY, a["t"]),
        lambda a, p, r: lambda x, seen: softmax((x + draws(p, r)) / a["t"], seen),
        {"t": ()},
        positive=("t",),
        **ROWS,
    ),
    # several at once
    "everything on tiles": Slot(
        {"b": (N, 8), "t": (), "null": (N,), "one": (), "centres": (N, TABLE), "sigma": (), "m": (N, N)},
        lambda a: {
            "bias": ja.RelativeBias(a["b"], 9),
            "score_maps": (ja.SoftCap(2.0), ja.MixHeads(a["m"]), ja.Temperature(a["t"])),
            "normalize": ja.Softmax(a["null"], a["one"]),
            "weight_maps": (ja.GaussianWindow(a["centres"], a["sigma"]),),
        },
        lambda a, p, r: plain(
            bias=a["b"][:, bucket(p[:, None] - r[None], 8, 9, False)],
            score_maps=(
                lambda x, seen: 2 * np.tanh(x / 2),
                lambda x, seen: np.einsum("nm,bmts->bnts", a["m"], np.where(seen, x, 0)),
                lambda x, seen: x / a["t"],
            ),
            normalize=null_softmax(a["null"], a["one"]),
            weight_maps=(lambda w, seen: w * np.exp(gaussian(a, p, r)),),
        ),
        positive=("t", "one", "sigma"),
    ),
    "everything on rows": Slot(
        {"b": (1, TABLE, TABLE), "kernel": (N, 2, 3), "m": (N, N), "masses": (N, 1, 3), "second": (N, 2, 3)},
        lambda a: {
            "bias": ja.Bias(a["b"]),
            "score_maps": (ja.Convolution(a["kernel"]), ja.MixHeads(a["m"])),
            "normalize": ja.Entmax15(),
            "weight_maps": (ja.Reallocate(GROUPS, a["masses"], 3), ja.Convolution(a["second"]), ja.TopKWeights(4)),
        },
        lambda a, p, r: plain(
            bias=look_up(a["b"], p[:, None], r[None]),
            score_maps=(
                convolve(a["kernel"]),
                lambda x, seen: np.einsum("nm,bmts->bnts", a["m"], np.where(seen, x, 0)),
            ),
            normalize=by_bisection(2),
            weight_maps=(
                reallocate(np.where(r < S, GROUPS[np.clip(r, 0, S - 1)], -1), a["masses"]),
                convolve(a["second"]),
                lambda w, seen: keep(w, largest(w, seen, 4)),
            ),
        ),
        positive=("masses",),
        tiles=False,
    ),
}


# A whole call.


@dataclasses.dataclass(frozen=True)
class Places:
    """Where queries and keys stand, and which pairs the mask shows."""

    query: np.ndarray
    key: np.ndarray
    mask: Any
    visible: np.ndarray  # [T, S]


def places(scattered: bool) -> Places:
    """Causal without the first two keys, so that rows are empty: in order, or anywhere, with empty slots."""
    p, r = np.arange(T, dtype=np.int32), np.arange(S, dtype=np.int32)
    if scattered:
        rng = np.random.default_rng(3)
        p, r = rng.permutation(16)[:T].astype(np.int32), rng.permutation(16)[:S].astype(np.int32)
        p[4], r[[0, 7]] = -1, -1
    seen = (p[:, None] >= 0) & (r[None] >= 0) & (r[None] <= p[:, None]) & (r[None] >= 2)
    return Places(p, r, ja.Causal() & ~ja.Sinks(2), seen)


def weigh(query, key, visible, *, score, bias, score_maps, normalize, weight_maps):
    """(weights, scores, lse), heads first, from [B, T, N, H] and [B, S, K, H]."""
    q, k = query.swapaxes(1, 2), np.repeat(key, N // key.shape[2], 2).swapaxes(1, 2)
    scores = np.einsum("bnth,bnsh->bnts", q, k) / np.sqrt(q.shape[-1]) if score is None else score(q, k)
    scores = scores + (0 if bias is None else bias)
    visible = np.broadcast_to(visible, scores.shape)
    for score_map in score_maps:
        scores = score_map(scores, visible)
    weights, lse = normalize(scores, visible)
    for weight_map in weight_maps:
        weights = weight_map(weights, visible)
    return weights, scores, lse


def draw(slot: Slot, where: Places) -> dict[str, np.ndarray]:
    """Everything that has a gradient, and the cotangents of out and lse; empty slots hold 0."""
    rng = np.random.default_rng(11)
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, KV, V), **slot.arrays}
    arrays = {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    arrays |= {name: np.asarray(abs(arrays[name]) + 0.5) for name in slot.positive}
    if "centres" in arrays:
        arrays["centres"] = 6 + 3 * arrays["centres"]
    arrays["query"][:, where.query < 0] = 0
    arrays["key"][:, where.key < 0] = 0
    arrays["value"][:, where.key < 0] = 0
    d_out, d_lse = rng.normal(size=(B, T, N, V)), rng.normal(size=(B, T, N))
    # log is steep where a row's total is near 0 (relu, linear): differences say little about it there.
    return arrays | {"d_out": d_out, "d_lse": np.where(answer(slot, where, arrays)[1] > -2, d_lse, 0)}


def answer(slot: Slot, where: Places, arrays: dict) -> tuple[np.ndarray, np.ndarray]:
    """(out [B, T, N, V], lse [B, T, N]) by the oracle."""
    stages = slot.oracle(arrays, where.query, where.key)
    weights, _, lse = weigh(arrays["query"], arrays["key"], where.visible, **stages)
    value = np.repeat(arrays["value"], N // KV, 2).swapaxes(1, 2)
    return (weights @ value).swapaxes(1, 2), lse.swapaxes(1, 2)


STEP = 3e-6  # of differences of fourth order: they err by STEP⁴ f⁽⁵⁾ / 30, and by rounding, 1e-15 |f| / STEP ~ 1e-9
DIRECTIONS = 3  # along which every entry of an array moves at once, by ±1: no error of an entry is lost in the others


def directions(arrays: dict, name: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.choice([-1.0, 1.0], (DIRECTIONS, *arrays[name].shape))


def slopes(slot: Slot, where: Places, arrays: dict) -> dict[str, np.ndarray]:
    """Of Σ d_out·out + Σ d_lse·lse (over rows that see a key) along the directions of every array."""

    def loss(arrays):
        out, lse = answer(slot, where, arrays)
        return (arrays["d_out"] * out).sum() + (arrays["d_lse"] * np.where(np.isfinite(lse), lse, 0)).sum()

    def slope(name, direction):
        one, two = (
            loss(arrays | {name: arrays[name] + step * direction})
            - loss(arrays | {name: arrays[name] - step * direction})
            for step in (STEP, 2 * STEP)
        )
        return (8 * one - two) / (12 * STEP)

    names = ("query", "key", "value", *slot.arrays)
    return {name: np.array([slope(name, each) for each in directions(arrays, name)]) for name in names}
