"""The policy of attention histories (NAMM): its features, its network and its decisions, each against plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.cache import Attended, ByHistory, HistoryScorer, Policy, empty

B, S, K, T, WINDOW, HOP, DECAY = 2, 5, 2, 23, 8, 4, 0.9
BINS = WINDOW // 2 + 1
RNG = np.random.default_rng(0)
SIGNAL = RNG.random((B, T, S, K))  # what token s gets from the query at position t
BORN = np.array([[0, 1, 6, 9, 14], [3, 2, 5, 0, 17]])  # slots hold these tokens, in any order
SIGNAL *= (np.arange(T)[None, :, None] >= BORN[:, None])[..., None]


def random_scorer(seed=0, recency=4, hidden=3):
    rng = np.random.default_rng(seed)
    zeros = HistoryScorer.zeros(WINDOW, recency, hidden)
    some = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), zeros)
    return dataclasses.replace(some, center=jnp.asarray(rng.random(BINS), jnp.float32),
                               spread=jnp.asarray(1 + rng.random(BINS), jnp.float32))  # fmt: skip


def loop_spectrum(signal, born, last):
    """The average of one token's spectra up to position `last`, by the recursion, in float64."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    padded, z = np.r_[np.zeros(WINDOW), signal], np.zeros(BINS)
    for end in range(HOP - 1, last + 1, HOP):
        if end >= born:
            frame = padded[end + 1 : end + 1 + WINDOW]
            z = DECAY**HOP * z + (1 - DECAY**HOP) * abs(np.fft.rfft(hann * frame))
    return z


def softmax(x):
    mass = np.exp(x - x.max())
    return mass / mass.sum()


def loop_scores(scorer, spectra, positions, now):
    """Scores of tokens in a list, in float64: each looks at itself and at newer ones."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), scorer)
    half = (w.query[0].shape[0] - BINS) // 2
    angles = (now - np.asarray(positions))[:, None] / 10000 ** (np.arange(half) / max(half, 1))
    x = np.concatenate([(np.asarray(spectra) - w.center) / w.spread, np.sin(angles), np.cos(angles)], 1)
    q, k, v = (x @ each[0] + each[1] for each in (w.query, w.key, w.value))
    scores = []
    for i, position in enumerate(positions):
        newer = [j for j, other in enumerate(positions) if other >= position]
        seen = softmax(k[newer] @ q[i] / np.sqrt(q.shape[1])) @ v[newer]
        shift, scale = np.split(seen @ w.mix[0] + w.mix[1], 2)
        changed = x[i] * (1 + scale) + shift
        hidden = np.maximum(changed @ w.hidden[0] + w.hidden[1], 0)
        scores.append((hidden @ w.score[0] + w.score[1])[0])
    return scores


def observed(policy, cut):
    """The statistics after all queries, so many at a time. The second row ends two queries before the first."""
    statistics, first = policy.start((B, S, K)), 0
    for size in cut:
        last = np.array([first + size - 1, min(first + size, T - 2) - 1])
        measured = np.zeros((B, S, size, K))
        positions = np.where(last[:, None] >= BORN, BORN, -1)
        for b, i in np.ndindex(B, size):
            if last[b] - i >= first:
                measured[b, :, i] = SIGNAL[b, last[b] - i]
        # A slot whose token has not come holds nothing, and is new when the token comes.
        come = jnp.asarray((positions >= 0) & (first <= BORN))[..., None]
        start = policy.start((B, S, K))
        statistics = {name: jnp.where(come.reshape(B, S, 1, *[1] * (x.ndim - 3)), start[name], x)
                      for name, x in statistics.items()}  # fmt: skip
        places = jnp.broadcast_to(jnp.asarray(positions)[..., None], (B, S, K))
        seen = Attended(
            {"signal": jnp.asarray(measured, jnp.float32)}, places, jnp.asarray(last)[:, None, None], size > 1
        )
        statistics = policy.observe(statistics, seen)
        first += size
    return statistics


@pytest.mark.parametrize("cut", [[1] * T, [T], [7, 1, 9, 2, 4]], ids=["one by one", "at once", "pieces"])
def test_spectra_are_averages_of_fourier_transforms_whatever_the_calls_in_which_queries_come(cut):
    policy = ByHistory(random_scorer(), every=1000, window=WINDOW, hop=HOP, decay=DECAY)
    found = observed(policy, cut)["spectrum"]
    for b, s, k in np.ndindex(B, S, K):
        expected = loop_spectrum(SIGNAL[b, :, s, k], BORN[b, s], T - 1 - 2 * b)
        np.testing.assert_allclose(found[b, s, k], expected, rtol=0, atol=2e-6)


def test_a_frame_that_ends_while_a_token_is_not_read_counts_as_nothing():
    """And numbers that were not measured are zeros in later frames."""
    policy = ByHistory(HistoryScorer.zeros(4, 0, 1), every=1000, window=4, hop=2, decay=0.5)
    statistics, z, signal = policy.start((1, 1, 1)), np.zeros(3), np.zeros(12)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(4) / 4)
    for t in (0, 1, 2, 5, 6, 7):
        signal[t + 4] = 1 + t
        seen = {"signal": jnp.full((1, 1, 1, 1), 1.0 + t)}
        statistics = policy.observe(
            statistics, Attended(seen, jnp.zeros((1, 1, 1), int), jnp.full((1, 1, 1), t), False)
        )
    for end in (1, 3, 5, 7):
        z = 0.25 * z + (0 if end == 3 else 0.75 * abs(np.fft.rfft(hann * signal[end + 1 : end + 5])))
    np.testing.assert_allclose(statistics["spectrum"][0, 0, 0], z, rtol=1e-5)


@pytest.mark.parametrize("recency", [0, 4])
def test_scores_are_those_of_a_loop_in_which_tokens_look_at_newer_ones(recency):
    scorer, rng = random_scorer(1, recency), np.random.default_rng(2)
    spectra, positions = rng.random((2, 3, S, BINS)), np.array([4, -1, 0, 7, 2])
    places, now = jnp.broadcast_to(positions, (2, 3, S)), jnp.array([9])
    found = jax.jit(HistoryScorer.__call__)(scorer, jnp.asarray(spectra, jnp.float32), places, now)
    there = positions >= 0
    for at in np.ndindex(2, 3):
        expected = loop_scores(scorer, spectra[at][there], positions[there], 9)
        np.testing.assert_allclose(found[at][there], expected, rtol=0, atol=1e-5)
    older = spectra.copy()
    older[:, :, 2] += 1  # of the token at 0: no other score changes
    changed = jax.jit(HistoryScorer.__call__)(scorer, jnp.asarray(older, jnp.float32), places, now)
    same = np.asarray(found == changed)
    assert same[:, :, [0, 3, 4]].all()
    assert not same[:, :, 2].any()
    empty_slots = scorer(jnp.full((1, S, BINS), jnp.inf), jnp.full((1, S), -1), jnp.array([3]))
    assert empty_slots.shape == (1, S)


def test_tokens_without_a_positive_score_go_when_a_multiple_of_tokens_is_there_and_the_newest_stays():
    scorer = random_scorer(3)
    policy = ByHistory(scorer, every=11, window=WINDOW, hop=HOP, decay=DECAY)
    score = observed(policy, [1] * T)["score"]
    dropped = 0
    for b, k in np.ndindex(B, K):
        expected = dict.fromkeys(range(S), np.inf)
        for now in (10, 21):
            if now > T - 1 - 2 * b:
                continue
            held = [s for s in range(S) if BORN[b, s] <= now]
            spectra = [loop_spectrum(SIGNAL[b, :, s, k], BORN[b, s], now) for s in held]
            for s, each in zip(held, loop_scores(scorer, spectra, BORN[b, held], now), strict=True):
                expected[s] = each if each > 0 else np.inf if BORN[b, s] == now else -np.inf
        np.testing.assert_allclose(score[b, :, k], list(expected.values()), rtol=0, atol=1e-5)
        dropped += sum(x == -np.inf for x in expected.values())
    assert 0 < dropped < B * S * K
    everything = dataclasses.replace(scorer, score=(scorer.score[0], jnp.full(1, jnp.inf)))
    kept = observed(dataclasses.replace(policy, scorer=everything), [1] * T)["score"]
    assert (kept > 0).all()
    nothing = observed(dataclasses.replace(policy, scorer=HistoryScorer.zeros(WINDOW)), [1] * 11)["score"]
    assert (nothing[:, :2] == -np.inf).all()  # a score of 0 is not positive


def test_a_population_is_one_policy_with_another_axis_and_one_program():
    traced = []

    @jax.jit
    def kept(policies):
        def of_one(policy):
            traced.append(policy)
            store = empty(1, 40, (1, 2), (1, 2), jnp.float32, Policy(policy, 30))
            for t in range(6):
                store = store.append(jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2)), jnp.array([[t]]))
                seen = store.read(jnp.ones((1, 1, 1, 2)))
                store = store.observe({"signal": jnp.sin(seen.positions + t)[:, :, None] + 1.0}, seen)
            return (store.positions >= 0).sum(), store.positions

        return jax.vmap(of_one)(policies)

    scorers = [random_scorer(seed) for seed in range(4)]
    policies = [ByHistory(each, every=4, window=WINDOW, hop=HOP) for each in scorers]
    together = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(each) for each in x]), *policies)
    counts, positions = kept(together)
    alone = [kept(jax.tree.map(lambda x: jnp.asarray(x)[None], each)) for each in policies]
    np.testing.assert_array_equal(positions, np.concatenate([each[1] for each in alone]))
    assert len(traced) == 2  # of four, and of one
    assert len({int(x) for x in counts}) > 1


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"window is 8 and hop 9: need an even window, at least as long as hop"):
        ByHistory(HistoryScorer.zeros(8), window=8, hop=9)
    with pytest.raises(ValueError, match=r"scorer reads 5 features, but a window of 32 has 17"):
        ByHistory(HistoryScorer.zeros(8))
    with pytest.raises(ValueError, match=r"decay holds 1\.5: need numbers from 0 to 1"):
        ByHistory(HistoryScorer.zeros(), decay=1.5)
    with pytest.raises(ValueError, match="recency is 3: need an even number"):
        HistoryScorer.zeros(recency=3)
