"""Attention in float64 NumPy, one batch entry, head and query at a time; nothing here imports the code under test.

Beside every result stands its *magnitude*: the same sum with every summand replaced by its absolute value (for lse,
which is a logarithm, 1 + |lse|). An algorithm that rounds every step has an error of some epsilons times that.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Numbers(NamedTuple):
    """out [*b, T, N, V], lse [*b, T, N], and the gradients of Σ d_out·out + Σ d_lse·lse."""

    out: np.ndarray
    lse: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scores: np.ndarray  # [*b, N, T, S], with respect to score + bias
    scale: np.ndarray
    null_logit: np.ndarray


def pairs(predicate: Callable, query_positions, key_positions, batch: tuple[int, ...], heads: int) -> np.ndarray:
    """visible[*b, n, t, s] = predicate(b, n, query position, key position), False for empty slots (position −1)."""
    query_positions = np.broadcast_to(query_positions, (*batch, np.shape(query_positions)[-1]))
    key_positions = np.broadcast_to(key_positions, (*batch, np.shape(key_positions)[-1]))
    visible = np.zeros((*batch, heads, query_positions.shape[-1], key_positions.shape[-1]), bool)
    for b in np.ndindex(*batch):
        for t, p in enumerate(query_positions[b].tolist()):
            for s, r in enumerate(key_positions[b].tolist()):
                if p >= 0 and r >= 0:
                    visible[b][:, t, s] = [bool(predicate(b, n, p, r)) for n in range(heads)]
    return visible


def _softmax_row(x, null):
    top = max(x.max(), null)
    unnormalised = np.exp(x - top)
    total = unnormalised.sum() + np.exp(null - top)
    return unnormalised / total, np.exp(null - top) / total, top + np.log(total)


def attention(
    query, key, value, visible, d_out, d_lse, *, scale=None, bias=0.0, normalize="softmax", null_logit=None
) -> tuple[Numbers, Numbers]:
    """(results, magnitudes). `bias` and `visible` broadcast to [*b, N, T, S]; normalize is "softmax" or "sigmoid"."""
    query, key, value, d_out, d_lse = (np.asarray(x, np.float64) for x in (query, key, value, d_out, d_lse))
    *batch, length, heads, width = query.shape
    size, shared_keys, shared_values = key.shape[-3], heads // key.shape[-2], heads // value.shape[-2]
    scale = width**-0.5 if scale is None else float(scale)
    rows = (*batch, heads, length, size)
    bias, visible = np.broadcast_to(np.asarray(bias, np.float64), rows), np.broadcast_to(visible, rows)
    null = np.full(heads, -np.inf) if null_logit is None else np.asarray(null_logit, np.float64)

    def zeros():
        lse = np.full((*batch, length, heads), -np.inf)
        out = np.zeros((*batch, length, heads, value.shape[-1]))
        shapes = query.shape, key.shape, value.shape, rows, (), (heads,)
        return [out, lse, *(np.zeros(shape) for shape in shapes)]

    exact, size_of = Numbers(*zeros()), Numbers(*zeros())
    for b, n, t in itertools.product(np.ndindex(*batch), range(heads), range(length)):
        seen = np.flatnonzero(visible[b][n, t])
        if not len(seen):
            if null_logit is not None:  # the mass of the null logit is there all the same
                exact.lse[b][t, n], size_of.lse[b][t, n] = null[n], 1 + abs(null[n])
                exact.null_logit[n] += d_lse[b][t, n]
                size_of.null_logit[n] += abs(d_lse[b][t, n])
            continue
        q, do, dl = query[b][t, n], d_out[b][t, n], d_lse[b][t, n]
        k, v = key[b][seen, n // shared_keys], value[b][seen, n // shared_values]
        x = scale * (k @ q) + bias[b][n, t, seen]
        dp, dp_size = v @ do, abs(v) @ abs(do)
        if normalize == "softmax":
            w, w_null, lse = _softmax_row(x, null[n])
            ds = w * (dp - w @ dp + dl)
            ds_size = w * (dp_size + w @ dp_size + abs(dl))
            exact.null_logit[n] += w_null * (dl - w @ dp)
            size_of.null_logit[n] += w_null * (abs(dl) + w @ dp_size)
        else:
            w = 1 / (1 + np.exp(-x))
            lse = np.log(w.sum())
            ds = w * (1 - w) * (dp + dl / w.sum())
            ds_size = w * (dp_size + abs(dl) / w.sum())
        for numbers, weight, d_score, qs, ks, vs, d_row, log_total, each in (
            (exact, w, ds, q, k, v, do, lse, scale),
            (size_of, w, ds_size, abs(q), abs(k), abs(v), abs(do), 1 + abs(lse), abs(scale)),
        ):
            numbers.out[b][t, n] = weight @ vs
            numbers.lse[b][t, n] = log_total
            numbers.query[b][t, n] += each * d_score @ ks
            numbers.key[b][seen, n // shared_keys] += each * np.outer(d_score, qs)
            numbers.value[b][seen, n // shared_values] += np.outer(weight, d_row)
            numbers.scores[b][n, t, seen] += d_score
            numbers.scale[...] += d_score @ (ks @ qs)
    return exact, size_of


def distance(query_positions, key_positions) -> np.ndarray:
    """|query position − key position|, [*b, 1, T, S]."""
    query_positions, key_positions = np.asarray(query_positions), np.asarray(key_positions)
    return abs(query_positions[..., None, :, None] - key_positions[..., None, None, :]).astype(np.float64)


def alibi(slopes, query_positions, key_positions) -> np.ndarray:
    return -np.asarray(slopes, np.float64)[:, None, None] * distance(query_positions, key_positions)


def alibi_gradient(d_scores, query_positions, key_positions) -> np.ndarray:
    by_head = np.moveaxis(-d_scores * distance(query_positions, key_positions), -3, 0)
    return by_head.reshape(len(by_head), -1).sum(-1)


def _table_entries(shape, rows, query_positions, key_positions):
    """(entry of [*b, N, T, S], entry of the table) for each pair inside the table, whose axes of size 1 are shared."""
    *batch, _, length, size = rows
    query_positions = np.broadcast_to(query_positions, (*batch, length))
    key_positions = np.broadcast_to(key_positions, (*batch, size))
    for *b, n, t, s in np.ndindex(*rows):
        p, r = query_positions[(*b, t)], key_positions[(*b, s)]
        if 0 <= p < shape[-2] and 0 <= r < shape[-1]:
            lead = (*b, n)[len(b) + 1 - (len(shape) - 2) :]
            lead = tuple(0 if size_ == 1 else i for i, size_ in zip(lead, shape[:-2], strict=True))
            yield (*b, n, t, s), (*lead, p, r)


def table(array, rows, query_positions, key_positions) -> np.ndarray:
    """bias[*b, n, t, s] = array[..., n, query position, key position], 0 outside."""
    bias, array = np.zeros(rows), np.asarray(array, np.float64)
    for pair, entry in _table_entries(array.shape, rows, query_positions, key_positions):
        bias[pair] = array[entry]
    return bias


def table_gradient(d_scores, shape, query_positions, key_positions) -> np.ndarray:
    gradient = np.zeros(shape)
    for pair, entry in _table_entries(shape, d_scores.shape, query_positions, key_positions):
        gradient[entry] += d_scores[pair]
    return gradient
