"""Routing attention, held to loops over clusters in float64, and its running k-means to Lloyd's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from test_choose import H, N, T, a_call, changed, normal, ragged, softmax

from jaxattn import Causal, attend
from jaxattn.core.attend import Clusters, balanced_members, kmeans_step, routing_attention

C, WIDTH = 3, 6
MU = normal(N, C, H, seed=6)
HOW = ("balanced", "nearest")


def normed(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def by_hand(membership, query, key, value, causal=True):
    """One sequence in the order of positions, heads repeated: [T, N, V]."""
    query, key = normed(query), normed(key)
    out = np.zeros((*query.shape[:2], value.shape[-1]))
    for n in range(N):
        near_q, near_k = query[:, n] @ MU[n].T, key[:, n] @ MU[n].T
        reads = [[] for _ in query]
        for c in range(C):
            queries, keys = (sorted(np.argsort(-x[:, c], kind="stable")[:WIDTH]) for x in (near_q, near_k))
            if membership == "nearest":
                queries, keys = (np.flatnonzero(x.argmax(-1) == c) for x in (near_q, near_k))
            for t in queries:
                seen = [s for s in keys if s <= t or not causal]
                seen = seen[-WIDTH:] if membership == "nearest" else seen
                reads[t] += [
                    softmax(key[seen, n] @ query[t, n] * H**-0.5) @ value[seen, n] if seen else 0 * value[0, n]
                ]
        for t, read in enumerate(reads):
            out[t, n] = np.mean(read, 0) if read else 0
    return out


def run(membership, causal=True):
    options = {"membership": membership, "causal": causal}
    return jax.jit(lambda *x, **places: routing_attention(*x, MU, WIDTH, **options, **places))


@pytest.mark.parametrize(("membership", "causal"), [("balanced", True), ("balanced", False), ("nearest", True)])
def test_what_clusters_read(membership, causal):
    """At the default positions and at ragged ones, where empty slots hold NaN."""
    query, key, value = a_call()
    key = key + 0.1 * normal(*key.shape, seed=5)  # no ties, which rounding would break
    for positions in (None, ragged()):
        at = np.broadcast_to(np.arange(T), (2, T)) if positions is None else positions
        places = {} if positions is None else {"query_positions": positions, "key_positions": positions}
        empty = (at < 0)[..., None, None]
        given = (np.where(empty, np.nan, x) for x in (query, key, value))
        out = np.asarray(run(membership, causal)(*given, **places))
        for b in range(2):
            order = [slot for slot in np.argsort(at[b], kind="stable") if at[b, slot] >= 0]
            wide = (x[b, order].astype(np.float64) for x in (query, np.repeat(key, 2, 2), np.repeat(value, N, 2)))
            assert_close(out[b, order], by_hand(membership, *wide, causal), 60 * np.abs(value).max())
            assert not np.any(out[b][at[b] < 0])


def test_one_cluster_of_all_tokens_is_attention_of_normed_queries_and_keys():
    query, key, value = a_call()
    for causal, how in ((True, "balanced"), (True, "nearest"), (False, "balanced")):
        out = routing_attention(query, key, value, MU[:, :1], T, membership=how, causal=causal)
        mask = Causal() if causal else None
        assert_close(out, attend(normed(query), normed(key), value, mask=mask), 30 * np.abs(value).max())


def test_who_looks_ahead():
    """The choice of balanced clusters does, the values that are read do not; the nearest cluster never does.

    Keys of a cluster stand elsewhere when others change their cluster, so that sums are equal to rounding.
    """
    call, ahead = a_call(), {}
    for how in HOW:
        before, ahead[how] = run(how)(*call), False
        for now in (3, 8, 14):
            after = run(how)(*(changed(x, now, 9 + i) for i, x in enumerate(call)))
            ahead[how] |= np.abs(before[:, : now + 1] - after[:, : now + 1]).max() > 20 * np.finfo(np.float32).eps * 4
            after = run(how)(*call[:2], changed(call[2], now, 11))
            np.testing.assert_array_equal(before[:, : now + 1], after[:, : now + 1])
    assert ahead == {"balanced": True, "nearest": False}


def test_gradients_vmap_and_half_precision():
    query, key, value = a_call()
    for how in HOW:
        out = run(how)(query, key, value)
        np.testing.assert_allclose(jax.vmap(run(how))(query, key, value), out, atol=1e-5)
        half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
        assert run(how)(*half).dtype == jnp.bfloat16
        wide = run(how)(*(x.astype(jnp.float32) for x in half))
        np.testing.assert_allclose(np.float32(run(how)(*half)), wide, atol=0.05)  # some epsilons of bfloat16, 2⁻⁸
        with jax.enable_x64(True):
            arrays = [jnp.asarray(x, jnp.float64) for x in (query, key + 0.1 * normal(*key.shape, seed=5), value)]
            towards = [jnp.asarray(normal(*x.shape, seed=i), jnp.float64) for i, x in enumerate(arrays)]
            total = jax.jit(lambda *x, how=how: (routing_attention(*x, MU, WIDTH, membership=how) ** 2).sum())
            slope = sum((g * t).sum() for g, t in zip(jax.grad(total, (0, 1, 2))(*arrays), towards, strict=True))
            step = 1e-6  # small enough that no token changes its cluster
            ends = [total(*(x + s * t for x, t in zip(arrays, towards, strict=True))) for s in (step, -step)]
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2 / step, rtol=1e-6)


def test_a_step_without_memory_is_a_step_of_lloyds():
    x = normed(normal(2, 30, N, H).astype(np.float64)).astype(np.float32)
    there = np.arange(30) < 24
    new, loss = kmeans_step(x, Clusters.of(MU), decay=0.0, there=there, eps=1e-9)
    tokens, distances = x[:, :24].reshape(-1, N, H), []
    for n in range(N):
        near = (tokens[:, n] @ MU[n].T).argmax(-1)
        for c in range(C):
            np.testing.assert_allclose(new.centroids[n, c], tokens[near == c, n].mean(0), rtol=1e-4, atol=1e-5)
            assert new.counts[n, c] == (near == c).sum()
        distances.append(((tokens[:, n] - MU[n][near]) ** 2).sum(-1))
    np.testing.assert_allclose(loss, np.mean(distances), rtol=1e-5)
    slow, _ = kmeans_step(x, Clusters.of(MU), decay=0.75, there=there)
    np.testing.assert_allclose(slow.sums, 0.75 * MU + 0.25 * new.sums, rtol=1e-4, atol=1e-4)
    slope = jax.grad(lambda x: kmeans_step(x, Clusters.of(MU))[1])(x)
    nearest = (np.einsum("btnh,nch->btnc", x, MU)).argmax(-1)
    expected = 2 * (x - MU[np.arange(N), nearest]) / (2 * 30 * N)
    np.testing.assert_allclose(slope, expected, atol=1e-6)


def test_members_and_what_is_refused():
    np.testing.assert_array_equal(balanced_members(jnp.array([0.5, np.nan, 2, -np.inf, 1]), 4), [-1, 0, 2, 4])
    query, key, value = a_call()
    for options, message in (
        ({"width": 0}, "routing_attention: width must be at least 1, got 0"),
        ({"width": 2, "membership": "all"}, "membership is 'all': need 'balanced' or 'nearest'"),
        ({"width": 2, "membership": "nearest", "causal": False}, "causal is False"),
        ({"width": 2, "centroids": MU[:2]}, r"centroids has shape \(2, 3, 4\): need \[N, C, H\] = \[4, C, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            routing_attention(query, key, value, **({"centroids": MU} | options))
