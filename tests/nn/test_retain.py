"""What a policy keeps is what a plain loop over lists of tokens keeps, from the weights that were recorded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from multi_head import randomise

from jaxattn import Causal
from jaxattn.cache import Attentive, ByHistory, HeavyHitters, HistoryScorer, Policy, SnapKV, Spans
from jaxattn.nn import MultiHeadAttention, Tap, Tokens

B, T, PROMPT, D, N, K = 2, 26, 12, 16, 4, 2
G = N // K
X = jnp.asarray(np.random.default_rng(3).standard_normal((B, T, D)), jnp.float32)
SHORT = 3  # the second row has so many tokens less: they come as padding, the prompt's on the right


class Mass:
    """The heavy hitters of a head: sums of weights, or their mean over the queries that saw the token."""

    def __init__(self, sinks, recent, mean):
        self.sinks, self.recent, self.mean, self.mass, self.count = sinks, recent, mean, {}, {}

    def attended(self, weights, queries, held, several):
        for j in held:
            seen = [t for t in queries if t >= j]
            self.mass[j] = self.mass.get(j, 0) + sum(weights[:, t, j].sum() for t in seen)
            self.count[j] = self.count.get(j, 0) + G * len(seen)

    def worth(self, j, now):
        if j < self.sinks or j > now - self.recent:
            return np.inf
        return self.mass.get(j, 0) / max(self.count.get(j, 0), 1) if self.mean else self.mass.get(j, 0)


class Votes:
    def __init__(self, window, pool, sinks, capacity=None):
        self.window, self.pool, self.sinks, self.capacity, self.votes = window, pool, sinks, capacity, {}

    def attended(self, weights, queries, held, several):
        if several:
            last, held = max(queries), sorted(held)
            raw = [sum(weights[:, t, j].sum() for t in queries if t > last - self.window) for j in held]
            half = self.pool // 2
            for i, j in enumerate(held):
                self.votes[j] = sum(raw[max(i - half, 0) : i + half + 1]) / self.pool
            best = sorted(held, key=lambda j: (-self.worth(j, last), -j))
            for j in best[len(best) if self.capacity is None else self.capacity :]:
                self.votes[j] = -np.inf

    def worth(self, j, now):
        votes = self.votes.get(j, (j - 1e9) / 1e9)  # without votes: below all that have some, the older the lower
        if votes == -np.inf:
            return votes
        return np.inf if j < self.sinks or j > now - self.window else votes


class Hits:
    def __init__(self, by, top, sinks, recent):
        self.by, self.top, self.sinks, self.recent, self.last, self.count = by, top, sinks, recent, {}, {}

    def attended(self, weights, queries, held, several):
        for of_head in weights:
            for t in queries:
                seen = [j for j in held if j <= t]
                for j in sorted(seen, key=lambda j: -of_head[t, j])[: self.top]:
                    self.last[j], self.count[j] = max(queries), self.count.get(j, 0) + 1

    def worth(self, j, now):
        if j < self.sinks or j > now - self.recent:
            return np.inf
        return max(self.last.get(j, 0), j) if self.by == "last" else self.count.get(j, 0)


class Span:
    def __init__(self, alpha, beta, sinks):
        self.alpha, self.beta, self.sinks = alpha, beta, sinks

    def attended(self, weights, queries, held, several):
        pass

    def worth(self, j, now):
        if j < self.sinks:
            return np.inf
        return j if now - j < max(int(self.alpha + self.beta * (now + 1)), 1) else -np.inf


class Histories:
    """The tokens to which a network gives a positive score, from what each got of one query after another."""

    def __init__(self, policy):
        self.policy, self.signal, self.scores = policy, {}, {}

    def attended(self, weights, queries, held, several):
        every, window, hop = self.policy.every, self.policy.window, self.policy.hop
        for j in held:
            self.signal.setdefault(j, np.zeros(T))[queries] = weights[:, queries, j].sum(0)
        now = max(queries)
        if (now + 1) // every == min(queries) // every:
            return
        hann, spectra = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window), []
        for j in held:
            padded, z = np.r_[np.zeros(window), self.signal[j]], 0
            for end in range(hop - 1, now + 1, hop):
                if end >= j:
                    spectrum = abs(np.fft.rfft(hann * padded[end + 1 : end + 1 + window]))
                    z = 0.9**hop * z + (1 - 0.9**hop) * spectrum
            spectra.append(z + np.zeros(window // 2 + 1))
        scores = self.policy.scorer(jnp.asarray(spectra), jnp.asarray(held), jnp.array([now]))
        for j, score in zip(held, np.asarray(scores), strict=True):
            # A token that came after the multiple was there has no score yet.
            if (now + 1) // every > max(j, min(queries)) // every:
                self.scores[j] = score if score > 0 else np.inf if j == now else -np.inf

    def worth(self, j, now):
        return self.scores.get(j, np.inf)


def random_scorer(window, seed):
    rng = np.random.default_rng(seed)
    zeros = HistoryScorer.zeros(window, 2, 3)
    some = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), zeros)
    return dataclasses.replace(some, center=zeros.center, spread=zeros.spread)


HISTORIES = ByHistory(random_scorer(4, 5), every=5, window=4, hop=2, decay=0.9)
CASES = {
    "histories": (HISTORIES, lambda k: Histories(HISTORIES)),
    "mass": (HeavyHitters(1, 3), lambda k: Mass(1, 3, False)),
    "mean mass": (HeavyHitters(0, 2, mean=True), lambda k: Mass(0, 2, True)),
    "votes": (SnapKV(3, 3, 1), lambda k: Votes(3, 3, 1)),
    "votes without a pool": (SnapKV(2, 1, 0), lambda k: Votes(2, 1, 0)),
    "votes up to a capacity": (SnapKV(2, 3, 1, capacity=6), lambda k: Votes(2, 3, 1, 6)),
    "last": (Attentive("last", 2, 1, 2), lambda k: Hits("last", 2, 1, 2)),
    "count": (Attentive("count", 1, 0, 2), lambda k: Hits("count", 1, 0, 2)),
    "no hits": (Attentive("count", 0, 1, 1), lambda k: Hits("count", 0, 1, 1)),
    "spans": (Spans(jnp.array([1.0, 6.0]), jnp.array([0.25, 0.0]), 2), lambda k: Span((1, 6)[k], (0.25, 0)[k], 2)),
}
SLOTS = 9


@pytest.mark.parametrize("name", CASES)
def test_a_policy_keeps_what_a_loop_over_lists_keeps(name):
    policy, make = CASES[name]
    module = randomise(MultiHeadAttention(D, N, key_heads=K, mask=Causal(), rngs=nnx.Rngs(1)), scale=1.0)
    graph, arrays = nnx.split(module)

    @jax.jit
    def call(arrays, x, positions, store):
        tap = Tap(record=("weights", "read"))
        store = nnx.merge(graph, arrays)(x, Tokens.of(x, positions=positions), tap, store)[1]
        return store, tap.records

    store = module.init_state(B, T, Policy(policy, SLOTS))
    loops = [[make(k) for k in range(K)] for _ in range(B)]
    held = [[[] for _ in range(K)] for _ in range(B)]
    evicted, first = 0, 0
    for size in [PROMPT, *[1] * (T - PROMPT - 2), 2]:
        at = np.arange(first, first + size)
        positions = np.stack([at, np.where(at < T - SHORT, at, -1)])
        if size == PROMPT:
            positions[1] = np.where(at < PROMPT - SHORT, at, -1)
        elif size == 1:
            positions[1] = at - SHORT
        store, records = call(arrays, X[:, at], jnp.asarray(positions), store)
        weights, read = (np.asarray(records[x]) for x in ("weights", "read"))
        for b, k in np.ndindex(B, K):
            loop, new = loops[b][k], [int(p) for p in positions[b] if p >= 0]
            if not new:
                continue
            now, mine = max(new), held[b][k]
            mine[:] = [j for j in mine if loop.worth(j, min(new)) > -np.inf]
            if size == 1 and len(mine) == SLOTS:
                mine.remove(min(mine, key=lambda j: (loop.worth(j, now), j)))
                evicted += 1
            mine += new
            places = read[b, :, k]
            assert sorted(places[places >= 0]) == sorted(mine)
            by_query = np.zeros((G, T, T))
            for t, p in enumerate(positions[b]):
                if p >= 0:
                    by_query[:, p] = weights[b, k * G : (k + 1) * G, t]
            loop.attended(by_query, new, mine, size > 1)
            if size > 1:
                mine[:] = sorted(mine, key=lambda j: (-loop.worth(j, now), -j))[:SLOTS]
                mine[:] = [j for j in mine if loop.worth(j, now) > -np.inf]
        first += size
    assert name in ("spans", "histories") or evicted > 20
