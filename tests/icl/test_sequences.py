"""Tasks of tokens are what they say, who knows their rule is right, and closed forms say what everyone else scores."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn import icl

RECALL = icl.AssociativeRecall(pairs=5, length=32, keys=9, values=6)
BLOCKS = icl.RepeatedBlock(letters=12, length=30, shortest=3, longest=8)
CHAIN = icl.MarkovChain(states=3, length=24)


SAMPLE = jax.jit(lambda task, key, batch: task.sample(key, batch), static_argnums=2)


def drawn(task, batch=200, seed=0):
    return jax.tree.map(np.asarray, SAMPLE(task, jax.random.key(seed), batch))


def answered(predictor, prompt):
    return np.asarray(jax.jit(predictor)(prompt.x, prompt.y))


def accuracy(prompt, answers):
    return float((prompt.weights * (answers == prompt.y)).sum() / prompt.weights.sum())


def deviation(chance, draws):
    """The standard deviation of the share of successes."""
    return (chance * (1 - chance) / draws) ** 0.5


def test_every_key_is_asked_for_once_and_the_target_is_what_followed_it():
    prompt = drawn(RECALL)
    for tokens, targets, weights in zip(prompt.x, prompt.y, prompt.weights, strict=True):
        pairs = dict(tokens[:10].reshape(5, 2).tolist())
        assert len(pairs) == len(set(pairs.values())) == 5
        places = np.flatnonzero(weights)
        assert sorted(tokens[places]) == sorted(pairs)
        assert (places >= 10).all()
        assert (places % 2 == 0).all()
        assert [pairs[token] for token in tokens[places]] == targets[places].tolist()


def test_tokens_are_keys_values_and_a_filler():
    prompt = drawn(RECALL)
    assert set(prompt.x[:, 0:10:2].ravel()) == set(range(1, 10))
    assert set(prompt.x[:, 1:10:2].ravel()) == set(range(10, 16))
    assert (prompt.x[:, 10:][prompt.weights[:, 10:] == 0] == 0).all()


def test_queries_crowd_behind_the_pairs_unless_the_power_is_one():
    """Slot g of 11 is drawn first with probability ∝ 1/g (power 0), or 1/11 (power 1)."""
    harmonic = sum(1 / g for g in range(1, 12))
    for power, expected in ((0.0, 1 / harmonic), (1.0, 1 / 11)):
        task = dataclasses.replace(RECALL, pairs=1, length=24, power=power)
        share_of_first = drawn(task, 4000, seed=1).weights[:, 2].mean()
        assert abs(share_of_first - expected) < 4 * deviation(expected, 4000)


def test_random_fill_is_uniform_over_the_vocabulary_and_changes_nothing_else():
    plain, filled = drawn(RECALL, 2000), drawn(dataclasses.replace(RECALL, random_fill=True), 2000)
    np.testing.assert_array_equal(plain.y, filled.y)
    rest = (plain.weights == 0) & (np.arange(32) >= 10)
    np.testing.assert_array_equal(plain.x[~rest], filled.x[~rest])
    assert (plain.x[rest] == 0).all()
    share = np.bincount(filled.x[rest], minlength=16) / rest.sum()
    assert len(share) == 16
    assert (np.abs(share - 1 / 16) < 4 * deviation(1 / 16, rest.sum())).all()


def test_lookup_recalls_every_pair_and_a_value_of_the_context_is_right_once_in_n():
    prompt = drawn(RECALL, 2000)
    assert accuracy(prompt, answered(icl.Lookup(), prompt)) == 1
    guess = np.take_along_axis(prompt.x[:, 1:10:2], np.random.default_rng(0).integers(0, 5, (2000, 32)), 1)
    assert abs(accuracy(prompt, guess) - 1 / 5) < 4 * deviation(1 / 5, 5 * 2000)


@pytest.mark.parametrize(("key_dim", "pairs"), [(16, 16), (16, 64), (32, 64)])
def test_an_additive_memory_recalls_as_often_as_its_formula_says_or_a_little_more(key_dim, pairs):
    """The logits of one memory are not independent: what that costs the formula is 0.08 at most."""
    generator = np.random.default_rng(0)

    def unit(rows, columns):
        x = generator.standard_normal((rows, columns))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    right = []
    for _ in range(200):
        keys, embeddings = unit(pairs, key_dim), unit(64, 64)
        state = keys.T @ embeddings[:pairs]
        right.append(((keys @ state @ embeddings.T).argmax(-1) == np.arange(pairs)).mean())
    error = np.std(right) / len(right) ** 0.5
    bias = np.mean(right) - icl.additive_memory_accuracy(pairs, key_dim, 64, 64)
    assert -4 * error < bias < 0.08 + 4 * error


def test_the_formula_of_an_additive_memory_is_that_of_independent_gaussian_logits():
    pairs, key_dim, value_dim, candidates, draws = 6, 8, 12, 20, 40000
    generator = np.random.default_rng(1)
    crosstalk = (pairs - 1) / (key_dim * value_dim)
    right = 1 + crosstalk**0.5 * generator.standard_normal((draws, 1))
    stored = (1 / key_dim + 1 / value_dim + crosstalk) ** 0.5 * generator.standard_normal((draws, pairs - 1))
    others = (1 / value_dim + crosstalk) ** 0.5 * generator.standard_normal((draws, candidates - pairs))
    simulated = (right > np.concatenate([stored, others], -1)).all(-1).mean()
    formula = icl.additive_memory_accuracy(pairs, key_dim, value_dim, candidates)
    assert abs(formula - simulated) < 4 * deviation(simulated, draws)


def test_one_pair_among_one_candidate_is_always_recalled():
    assert icl.additive_memory_accuracy(1, 4, 4, 1) == pytest.approx(1, abs=1e-6)


def test_a_copy_is_the_string_after_its_end_mark():
    prompt = drawn(icl.Copying(letters=7, string=5), 50)
    np.testing.assert_array_equal(prompt.x[:, 5], 7)
    np.testing.assert_array_equal(prompt.x[:, 6:], prompt.x[:, :4])
    np.testing.assert_array_equal(prompt.y[:, 5:], prompt.x[:, :5])
    np.testing.assert_array_equal(prompt.weights, np.broadcast_to(np.arange(10) >= 5, (50, 10)))


def test_a_block_is_repeated_at_its_own_period_and_lookup_knows_it():
    prompt = drawn(BLOCKS, 600)
    for x, y, weights, period in zip(prompt.x, prompt.y, prompt.weights, prompt.hidden, strict=True):
        assert x[0] == 12
        np.testing.assert_array_equal(x[1:], y[:-1])
        assert len(set(y[:period])) == period
        np.testing.assert_array_equal(y[period:], y[:-period])
        np.testing.assert_array_equal(weights, np.arange(30) > period)
    share = np.bincount(prompt.hidden, minlength=9)[3:] / 600
    assert (np.abs(share - 1 / 6) < 4 * deviation(1 / 6, 600)).all()
    assert accuracy(prompt, answered(icl.Lookup(), prompt)) == 1
    assert drawn(BLOCKS.with_length(40), 3).x.shape == (3, 40)


def test_a_block_with_jumps_goes_on_from_anywhere_in_it_as_often_as_is_asked():
    """Of 600 · 29 letters; a jump lands on the next letter anyway in one of `period` cases."""
    prompt, off, expected = drawn(dataclasses.replace(BLOCKS, jump=0.3), 600), 0, 0
    for x, y, weights, period in zip(prompt.x, prompt.y, prompt.weights, prompt.hidden, strict=True):
        pairs = list(zip(x, y, strict=True))
        np.testing.assert_array_equal(x[1:], y[:-1])
        assert len(set(y)) <= period
        np.testing.assert_array_equal(weights, [pair in pairs[:i] for i, pair in enumerate(pairs)])
        following = {a: max(set(y[x == a]), key=list(y[x == a]).count) for a in set(x[1:])}
        off += sum(following[a] != b for a, b in pairs[1:])
        expected += 29 * 0.3 * (1 - 1 / period)
    # Where a letter comes once or twice its next one may not be told from a jump: the count is somewhat low.
    assert 0.6 * expected < off < expected
    every = drawn(dataclasses.replace(BLOCKS, jump=1.0, shortest=8), 600)
    again = (every.y[:, 1:] == every.y[:, :-1]).mean()  # all letters are drawn anew
    assert abs(again - 1 / 8) < 5 * deviation(1 / 8, 600 * 29)


def test_a_markov_chain_moves_as_its_rows_say():
    """Σ_t (1[s_t = j] − p_j(context)) is a martingale of variance Σ_t p_j (1 − p_j)."""
    prompt = drawn(icl.MarkovChain(states=3, length=400, order=2), 50)
    residual, variance = np.zeros(3), np.zeros(3)
    for string, rows in zip(prompt.y, prompt.hidden, strict=True):
        chances = rows[3 * string[:-2] + string[1:-1]]
        residual += (np.eye(3)[string[2:]] - chances).sum(0)
        variance += (chances * (1 - chances)).sum(0)
    assert (np.abs(residual) < 4 * variance**0.5).all()
    # 400 states of a 3-state chain are far from what another order of the context would give.
    other = prompt.hidden[0][3 * prompt.y[0][1:-1] + prompt.y[0][:-2]]
    assert np.abs(other - prompt.hidden[0][3 * prompt.y[0][:-2] + prompt.y[0][1:-1]]).max() > 0.05
    np.testing.assert_array_equal(prompt.x[:, 0], 3)
    np.testing.assert_array_equal(prompt.x[:, 1:], prompt.y[:, :-1])


def test_rows_of_a_chain_have_the_moments_of_a_dirichlet():
    """Σ_j p_j = 1, E p = 1/V and E p² = (α + 1) / (V (V α + 1))."""
    for concentration in (1.0, 0.3):
        rows = drawn(icl.MarkovChain(states=3, length=2, concentration=concentration), 4000).hidden
        np.testing.assert_allclose(rows.sum(-1), 1, rtol=4 * np.finfo(np.float32).eps)
        first = rows[:, 0, 0].astype(float)  # one number of each chain: independent
        for power, expected in ((1, 1 / 3), (2, (concentration + 1) / (3 * (3 * concentration + 1)))):
            assert abs((first**power).mean() - expected) < 4 * (first**power).std() / 4000**0.5


@pytest.mark.parametrize("order", [0, 1, 2])
def test_markov_bayes_counts_what_followed(order):
    prompt, concentration = drawn(CHAIN, 20), 0.7
    predicted = np.exp(answered(icl.MarkovBayes(3, order, concentration), prompt))
    for row, x in enumerate(prompt.x):
        for t in range(24):
            counts = np.full(3, concentration)
            for s in range(order + 1, t + 1):  # the first token with `order` states before it is after BOS and those
                if (x[s - order : s] == x[t + 1 - order : t + 1]).all():
                    counts[x[s]] += 1
            np.testing.assert_allclose(predicted[row, t], counts / counts.sum(), rtol=1e-5)


def test_the_bayes_predictor_of_a_chain_multiplies_up_to_its_evidence():
    """Π_t P(s_t | before) = E Π_t p(s_t | s_{t−1}) over the prior of the rows: a Dirichlet integral, by Monte Carlo."""
    prompt = drawn(CHAIN.with_length(6), 1)
    log_chances = answered(icl.MarkovBayes(3), prompt)[0]
    evidence = np.exp(log_chances[np.arange(6), prompt.y[0]].sum())
    rows = np.random.default_rng(0).dirichlet(np.ones(3), (40000, 3))
    each = np.prod([rows[:, one, next_] for one, next_ in itertools.pairwise(prompt.y[0])], 0) / 3
    assert abs(each.mean() - evidence) < 4 * each.std() / 40000**0.5


def test_bayes_loses_least_at_every_position_and_the_unigram_is_on_the_way():
    """1.0986 nats of a uniform answer > 1.0169 of the unigram > .9022 of Bayes, for V = 3 and T = 64."""
    prompt = drawn(icl.MarkovChain(states=3, length=64), 1500)

    def loss(order):
        log_chances = answered(icl.MarkovBayes(3, order), prompt)
        return -np.take_along_axis(log_chances, prompt.y[..., None], -1)[..., 0]

    bayes = loss(1)
    for order, expected in ((0, 1.0169), (1, 0.9022)):
        each = loss(order).mean(-1)
        # The figures are from at least 500 sequences themselves: 1/1500 + 1/500 = 4/1500.
        assert abs(each.mean() - expected) < 4 * 2 * each.std() / 1500**0.5
    for order in (0, 2):
        gain = loss(order) - bayes
        assert gain.mean() > 4 * gain.mean(-1).std() / 1500**0.5
        assert (gain.mean(0) >= -4 * gain.std(0) / 1500**0.5).all()


def test_risk_of_tokens_is_the_cross_entropy_of_every_position_alone():
    """After 0 states all V are alike: log V. After one its row has not been seen: log V too.

    Later it is what the predictor loses there on prompts drawn anew, within 4 standard errors.
    """
    lengths = (0, 1, 7, 23)
    loss = optax.softmax_cross_entropy_with_integer_labels
    asked = {"Bayes": icl.MarkovBayes(3), "unigram": icl.MarkovBayes(3, order=0)}
    risks = icl.compare(CHAIN, asked, lengths, jax.random.key(1), batch=128, batches=8, loss=loss).risks
    np.testing.assert_allclose(risks["Bayes"].mean[:2], np.log(3), rtol=1e-6)
    prompt = drawn(CHAIN, 1000)
    for name, predictor in asked.items():
        each = -np.take_along_axis(answered(predictor, prompt), prompt.y[..., None], -1)[..., 0][:, list(lengths)]
        error = np.hypot(risks[name].error, each.std(0) / 1000**0.5)
        assert (np.abs(risks[name].mean - each.mean(0)) <= 4 * error + 1e-6).all()
    assert risks["Bayes"].mean[3] < risks["unigram"].mean[3] < np.log(3)


def test_the_score_of_learning_in_context_is_what_late_positions_cost_less():
    losses = np.array([[4.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.0], [1.0] * 9])
    np.testing.assert_allclose(icl.icl_score(losses), [0.125 - 3.0, 0])  # 9 positions have quarters of 2
    np.testing.assert_allclose(icl.icl_score(losses, 1, 4), [-1.5, 0])
    np.testing.assert_allclose(icl.icl_score(losses[0, :4]), -3.0)
    for given, words in (
        ((losses[:, :3],), "losses has 3 positions: need at least 4, or early and late"),
        ((losses, 3), "early is 3 and late None: need both positions, or none"),
        ((losses, 3, 3), "late must be at least 4, got 3"),
        ((losses, 3, 9), "late is 9 of 9 positions: need one below"),
    ):
        with pytest.raises(ValueError, match=words):
            icl.icl_score(*given)


@pytest.mark.parametrize("single_cycle", [False, True])
def test_who_follows_the_pointers_is_right_and_the_shortcut_scores_the_short_cycles(single_cycle):
    prompt = drawn(icl.RetrievalChain(symbols=6, hops=4, single_cycle=single_cycle), 4000)
    for side in (0, 1):
        symbols = np.sort(prompt.x[:, side:12:2])
        np.testing.assert_array_equal(symbols, np.broadcast_to(np.arange(6), (4000, 6)))
    np.testing.assert_array_equal(prompt.x[:, 12], 5 + prompt.hidden)
    np.testing.assert_array_equal(prompt.weights, np.broadcast_to(np.arange(14) == 13, (4000, 14)))
    assert accuracy(prompt, answered(icl.PointerChasing(6), prompt)) == 1
    comes_back = (answered(icl.Echo(), prompt) == prompt.y)[:, -1]
    for hops in range(1, 5):
        of_hops = prompt.hidden == hops
        assert abs(of_hops.mean() - 1 / 4) < 4 * deviation(1 / 4, 4000)
        expected = 0 if single_cycle else icl.echo_accuracy(6, hops)
        assert abs(comes_back[of_hops].mean() - expected) <= 4 * deviation(expected, of_hops.sum())


def test_the_answer_of_a_chain_is_three_lookups_away():
    prompt = drawn(icl.RetrievalChain(symbols=5, hops=3, mixed=False), 100)
    for x, answer in zip(prompt.x, prompt.y[:, -1], strict=True):
        following = dict(x[:10].reshape(5, 2).tolist())
        assert following[following[following[x[-1]]]] == answer


def test_a_single_cycle_comes_back_after_all_symbols_only():
    for x in drawn(icl.RetrievalChain(symbols=5, hops=1, single_cycle=True), 100).x:
        following = dict(x[:10].reshape(5, 2).tolist())
        visited = [0]
        while (at := following[visited[-1]]) != 0:
            visited.append(at)
        assert len(visited) == 5


def test_the_shortcut_is_right_as_often_as_all_permutations_say():
    for hops, expected in ((1, 1 / 6), (2, 1 / 3)):
        assert icl.echo_accuracy(6, hops) == pytest.approx(expected)
    maps = np.array(list(itertools.permutations(range(5))))
    at = np.zeros(len(maps), int)
    for hops in range(1, 5):
        at = maps[np.arange(len(maps)), at]
        assert icl.echo_accuracy(5, hops) == pytest.approx((at == 0).mean())


def test_the_horizon_triples_with_every_layer():
    assert [icl.horizon(layers) for layers in range(5)] == [0, 1, 4, 13, 40]
    assert all(icl.horizon(layers + 1) == 3 * icl.horizon(layers) + 1 for layers in range(8))
    assert [max(hops for hops in range(21) if 2 * hops <= icl.horizon(layers)) for layers in (2, 3, 4)] == [2, 6, 20]


@pytest.mark.parametrize(
    ("task", "predictor"),
    [
        (RECALL, icl.Lookup()),
        (BLOCKS, icl.Lookup()),
        (CHAIN, icl.MarkovBayes(3)),
        (CHAIN, icl.MarkovBayes(3, order=0)),
        (icl.RetrievalChain(symbols=4, hops=2), icl.PointerChasing(4)),
        (icl.RetrievalChain(symbols=4, hops=2), icl.Echo()),
    ],
)
def test_predictors_of_tokens_look_at_the_past_alone(task, predictor):
    prompt = drawn(task, 4)
    assert icl.leaks(predictor, jnp.asarray(prompt.x), jnp.asarray(prompt.y)) == 0


def test_a_predictor_of_tokens_that_looks_ahead_leaks():
    prompt = drawn(RECALL, 4)
    assert icl.leaks(lambda x, y: jnp.roll(x, -1, 1), jnp.asarray(prompt.x), jnp.asarray(prompt.y)) > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dataclasses.replace(RECALL, length=19), "length is 19 for 5 pairs: need an even number, 4 per pair"),
        (lambda: dataclasses.replace(RECALL, values=4), "values is 4 for 5 pairs: need at least as many"),
        (lambda: icl.additive_memory_accuracy(3, 4, 4, 2), "candidates must be at least 3, got 2"),
        (lambda: icl.Copying(letters=0, string=3), "letters must be at least 1, got 0"),
        (lambda: dataclasses.replace(BLOCKS, shortest=9), "longest is 8: need one from shortest, 9, to letters, 12"),
        (lambda: dataclasses.replace(BLOCKS, longest=13), "longest is 13: need one from shortest, 3, to letters, 12"),
        (lambda: BLOCKS.with_length(9), "length must be at least 10, got 9"),
        (lambda: icl.MarkovChain(states=3, length=4, order=-1), "order must be at least 0, got -1"),
        (lambda: icl.MarkovBayes(states=3, concentration=0.0), r"concentration must be positive, got 0\.0"),
        (lambda: icl.RetrievalChain(symbols=3, hops=3), "hops is 3 of 3 symbols: need fewer than symbols"),
        (
            lambda: icl.MarkovChain(3, 4, concentration=jnp.array(-1.0)),
            r"concentration holds -1\.0: need numbers above",
        ),
        (lambda: icl.MarkovBayes(3, concentration=jnp.array(-1.0)), r"concentration holds -1\.0: need numbers above 0"),
        (lambda: icl.echo_accuracy(0, 1), "symbols must be at least 1, got 0"),
        (lambda: icl.echo_accuracy(5, -3), "hops must be at least 0, got -3"),
        (lambda: icl.horizon(-1), "layers must be at least 0, got -1"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("token", [-1, 4, -100])
def test_oracles_of_tokens_do_not_answer_after_what_is_no_token(token):
    x = jnp.array([[3, 0, 1, 2, 0, 1]])
    after = icl.MarkovBayes(3)(x.at[0, 2].set(token), x)
    assert np.isnan(after[0, 2:]).all()
    np.testing.assert_array_equal(after[:, :2], icl.MarkovBayes(3)(x, x)[:, :2])
    chain = jnp.array([[0, 1, 1, 2, 2, 0, 4, 1]])  # two hops from 1: 0
    assert icl.PointerChasing(3)(chain, chain)[0, -1] == 0
    for place in (0, 1, 6, 7):
        assert icl.PointerChasing(3)(chain.at[0, place].set(-1), chain)[0, -1] == -1
