"""Boolean functions are what logic says, have the priors of their paper, and their lessons leave no other function."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import icl

EPS = float(np.finfo(np.float32).eps)
CUBE = np.array(list(itertools.product((-1, 1), repeat=5)))
SAMPLE = jax.jit(lambda task, key, batch: task.sample(key, batch), static_argnums=2)


def drawn(function, inputs, length=8, batch=500, seed=0, **options):
    task = icl.FunctionTask(function, inputs, length, **options)
    return jax.tree.map(np.asarray, SAMPLE(task, jax.random.key(seed), batch))


def literals(w, x):
    """The truth of each literal."""
    return [x[j] == w[j] for j in range(len(w)) if w[j] != 0]


def odd(f, x):
    return sum(x[j] == 1 for j in range(len(f)) if f[j]) % 2 == 1


LOGIC = {
    icl.Conjunction(): lambda f, x: all(literals(f, x)),
    icl.Conjunction(monotone=True): lambda f, x: all(literals(f, x)),
    icl.Disjunction(): lambda f, x: any(literals(f, x)),
    icl.SparseDisjunction(): lambda f, x: any(literals(f, x)),
    icl.DNF(): lambda f, x: any(all(literals(term, x)) for term in f[0]),
    icl.CNF(): lambda f, x: all(any(literals(clause, x)) for clause in f[0]),
    icl.Majority(): lambda f, x: 2 * sum(literals(f, x)) > sum(f),
    icl.IntegerHalfspace(): lambda f, x: sum(f * x) > 0.5,
    icl.SparseThreshold(): lambda f, x: sum(f[0] * x) > f[1],
    icl.Parity(): odd,
    icl.SparseParity(): odd,
}


@pytest.mark.parametrize("function", LOGIC)
def test_values_are_those_of_logic_on_the_whole_cube(function):
    draws = jax.vmap(lambda key: function.draw(key, 5, 5))(jax.random.split(jax.random.key(0), 30))
    values = np.asarray(jax.vmap(lambda f: function(f, jnp.asarray(CUBE, float)))(draws))
    assert set(values.ravel()) == {-1, 1}
    for row in range(30):
        f = jax.tree.map(lambda each: np.asarray(each)[row], draws)  # noqa: B023
        assert [LOGIC[function](f, x) for x in CUBE] == (values[row] == 1).tolist()


@pytest.mark.parametrize("function", LOGIC)
def test_hidden_coordinates_are_in_no_function(function):
    draws = jax.vmap(lambda key: function.draw(key, 5, 3))(jax.random.split(jax.random.key(1), 30))
    for each in jax.tree.leaves(draws):
        if each.shape[-1:] == (5,):
            assert (each[..., 3:] == 0).all()
            assert (each[..., :3] != 0).any()


def test_the_priors_are_those_of_the_paper():
    """The share of each value among independent coordinates, and the means of small choices."""

    def draws(function, dim=5):
        return jax.vmap(lambda key: function.draw(key, dim, dim))(jax.random.split(jax.random.key(2), 4000))

    def shares_are(numbers, expected):
        numbers = np.asarray(numbers).ravel()
        for value, share in expected.items():
            assert abs((numbers == value).mean() - share) < 4 * (share * (1 - share) / numbers.size) ** 0.5
        assert sum(expected.values()) == pytest.approx(1)

    shares_are(draws(icl.Conjunction()), {0: 0.7, 1: 0.15, -1: 0.15})
    shares_are(draws(icl.Conjunction(monotone=True)), {0: 0.7, 1: 0.3})
    shares_are(draws(icl.Disjunction()), {0: 0.7, 1: 0.15, -1: 0.15})
    for function in (icl.DNF(), icl.CNF()):
        terms, chosen = draws(function)
        assert terms.shape == (4000, 3, 5)
        shares_are(terms, {0: 0.8, 1: 0.1, -1: 0.1})
        shares_are(chosen, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    shares_are(draws(icl.Majority()), {0: 0.7, 1: 0.3})
    shares_are(draws(icl.IntegerHalfspace()), dict.fromkeys(range(-3, 4), 1 / 7))
    weights, threshold = draws(icl.SparseThreshold())
    shares_are(weights, {0: 0.7, 1: 0.15, -1: 0.15})
    shares_are(threshold, {half / 2: 1 / 6 for half in (-5, -3, -1, 1, 3, 5)})
    shares_are(draws(icl.Parity()), {0: 0.5, 1: 0.5})
    for function, count in ((icl.SparseDisjunction(), 4), (icl.SparseParity(), 2)):
        subsets = np.asarray(draws(function))
        assert (subsets.sum(-1) == count).all()
        assert (np.abs(subsets.mean(0) - count / 5) < 4 * (count / 5 * (1 - count / 5) / 4000) ** 0.5).all()


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (icl.Conjunction(0.5), 1),
        (icl.Disjunction(0.5), -1),
        (icl.SparseDisjunction(3), -1),
        (icl.DNF(3, 0.5), 1),
        (icl.CNF(3, 0.5), -1),
    ],
)
def test_a_planted_example_has_the_value_it_is_planted_for(function, value):
    always = drawn(function, icl.Planted(icl.Signs(5), 1.0))
    assert (always.clean == value).all()
    never = drawn(function, icl.Planted(icl.Signs(5), 0.0))
    assert (never.clean != value).any()


def test_planting_has_its_moments():
    """P(x follows a pattern of k signs) = p + (1 − p) 2^{−k}, E x = p w, and outside the pattern E x_i x_j = 0."""
    prompt = drawn(icl.Conjunction(), icl.Planted(icl.Signs(5), 0.3), length=4, batch=8000)
    w, x = prompt.hidden, prompt.x
    size = np.abs(w).sum(-1)
    share = 0.3 + 0.7 * 2.0**-size
    of_prompt = ((prompt.clean == 1) - share[:, None]).mean(-1)
    assert abs(of_prompt.mean()) < 4 * of_prompt.std() / 8000**0.5
    residual = (x - 0.3 * w[:, None]).mean(1)
    assert (np.abs(residual.mean(0)) < 4 * residual.std(0) / 8000**0.5).all()
    along = (x * w[:, None]).sum((1, 2)) / 4 - 0.3 * size
    assert abs(along.mean()) < 4 * along.std() / 8000**0.5
    outside = (w[:, 0] == 0) & (w[:, 1] == 0)
    products = (x[outside, :, 0] * x[outside, :, 1]).mean(-1)
    assert abs(products.mean()) < 4 * products.std() / outside.sum() ** 0.5


def test_the_likelihood_of_planted_inputs_sums_to_one_and_is_how_often_they_are_drawn():
    for pattern in ([0, 0, 0, 0, 0], [1, 0, -1, 0, 0], [-1, -1, 1, 1, 1]):
        inputs = icl.Planted(icl.Signs(5), 0.3)
        log_chances = inputs.log_likelihood(jnp.asarray(CUBE, float), jnp.asarray(pattern, float))
        chances = np.exp(np.asarray(log_chances)) / 32
        assert chances.sum() == pytest.approx(1, abs=32 * EPS)
        x = np.asarray(inputs.draw(jax.random.key(0), 8000, icl.Conjunction(), jnp.asarray(pattern, float)))
        shares = np.bincount(((x + 1) / 2 @ 2 ** np.arange(4, -1, -1)).astype(int), minlength=32) / 8000
        assert (np.abs(shares - chances) <= 4 * (chances * (1 - chances) / 8000) ** 0.5).all()


def consistent(x, y, table):
    """Which conjunctions w of the table agree with all examples, by counting the literals that fail."""
    failing = ((x[:, None] != table) & (table != 0)).sum(-1)
    return ((failing == 0) == (y[:, None] == 1)).all(0)


@pytest.mark.parametrize(("monotone", "extra"), [(False, 2), (True, 1)])
def test_the_lesson_of_a_conjunction_leaves_no_other(monotone, extra):
    """All 3^6 conjunctions of 6 literals, and all 2^6 monotone ones."""
    function = icl.Conjunction(monotone=monotone)
    table = np.asarray(function.table(6)[0])
    assert len(table) == len({tuple(w) for w in table}) == (2**6 if monotone else 3**6)
    lessons, belongs = (np.asarray(each) for each in jax.vmap(function.lesson)(jnp.asarray(table)))
    values = np.asarray(jax.vmap(function)(jnp.asarray(table), jnp.asarray(lessons)))
    for w, rows, inside, labels in zip(table, lessons, belongs, values, strict=True):
        size = int(np.abs(w).sum())
        assert inside.sum() == size + extra
        assert (labels[inside] == np.where(np.arange(size + extra) < extra, 1, -1)).all()
        left = table[consistent(rows[inside], labels[inside], table)]
        np.testing.assert_array_equal(left, [w])
        if size:  # no example is too many: the last one is needed
            assert consistent(rows[inside][:-1], labels[inside][:-1], table).sum() > 1


def test_the_lesson_of_a_monotone_dnf_leaves_no_other():
    """All 3-term DNFs of 4 coordinates of whose terms none holds another; a function is its values on the cube.

    Where one does, as in x_1 or (x_1 and x_2), others may be left.
    """
    function, cube = icl.DNF(monotone=True), np.array(list(itertools.product((-1, 1), repeat=4)))
    terms = np.array(list(itertools.product((0, 1), repeat=4)))
    triples = np.array(list(itertools.combinations_with_replacement(terms, 3)), float)
    given = (jnp.asarray(triples), jnp.zeros(len(triples), int))
    values = np.asarray(jax.vmap(lambda f: function(f, jnp.asarray(cube, float)))(given))
    lessons, belongs = (np.asarray(each) for each in jax.vmap(function.lesson)(given))
    place = ((lessons + 1) / 2 @ 2 ** np.arange(3, -1, -1)).astype(int)  # of each example in the cube
    left = {False: [], True: []}  # by whether a term holds another
    for row, triple in enumerate(triples):
        taught = place[row][belongs[row]]
        assert len(taught) == triple.sum() + 3
        same = (values[:, taught] == values[row, taught]).all(-1)
        holds = any((one <= other).all() for one, other in itertools.permutations(triple, 2))
        left[holds].append(len(np.unique(values[same], axis=0)))
    assert len(left[False]) > 10
    assert max(left[False]) == 1
    assert max(left[True]) > 1


def test_teaching_puts_the_lesson_first_and_ordinary_examples_after_it():
    prompt = drawn(icl.Conjunction(0.5), icl.Teaching(icl.Planted(icl.Signs(5), 1.0)), length=9, batch=200)
    for x, y, w in zip(prompt.x, prompt.y, prompt.hidden, strict=True):
        size = int(np.abs(w).sum())
        assert y.tolist() == [1, 1] + [-1] * size + [1] * (7 - size)
        flips = [(x[2 + i] != x[0]).nonzero()[0].tolist() for i in range(size)]
        assert flips == [[j] for j in np.flatnonzero(w)]
    short = drawn(icl.Conjunction(1.0), icl.Teaching(icl.Signs(5)), length=4, batch=3)
    assert short.y.tolist() == [[1, 1, -1, -1]] * 3


def test_labels_of_neighbours_are_those_of_the_nearest_earlier_input():
    task = icl.FunctionTask(icl.NearestNeighbour(start=6), icl.Signs(4), 20, first=6)
    prompt = SAMPLE(task, jax.random.key(0), 300)
    assert (prompt.weights == (np.arange(20) >= 6)).all()
    for x, y in zip(np.asarray(prompt.x), np.asarray(prompt.y), strict=True):
        for i in range(20):
            same = [j for j in range(i) if (x[j] == x[i]).all()]
            assert not same or y[i] == y[same[0]]
            if i >= 6:
                agreements = [(x[j] == x[i]).sum() for j in range(i)]
                assert y[i] == y[int(np.argmax(agreements))]
    assert abs(float((prompt.y[:, 0] == 1).mean()) - 1 / 2) < 4 * 0.5 / 300**0.5


def test_noise_flips_labels_as_often_as_it_says():
    prompt = drawn(icl.Parity(), icl.Signs(5), noise=0.2)
    flipped = (prompt.y != prompt.clean).mean()
    assert abs(flipped - 0.2) < 4 * (0.2 * 0.8 / prompt.y.size) ** 0.5


@pytest.mark.parametrize("function", [icl.Conjunction(1), icl.DNF(2, 1), icl.Majority(0), icl.Parity()])
def test_probabilities_may_be_integers(function):
    prompt = drawn(function, icl.Planted(icl.Signs(4), 1) if isinstance(function, icl.DNF) else icl.Signs(4), noise=0)
    np.testing.assert_array_equal(prompt.y, prompt.clean)


def test_a_mixture_is_planted_with_the_pattern_of_the_one_that_was_drawn():
    """Where all examples are planted, conjunctions are always true and disjunctions never."""
    prompt = drawn(icl.OneOf((icl.Conjunction(), icl.Disjunction())), icl.Planted(icl.Signs(4), 1.0))
    index, _ = prompt.hidden
    np.testing.assert_array_equal(prompt.y, np.broadcast_to(np.where(index == 0, 1, -1)[:, None], prompt.y.shape))
    assert {0, 1} == set(np.asarray(index).tolist())
    with pytest.raises(TypeError, match="OneOf: Parity has no pattern: need Plantable functions"):
        drawn(icl.OneOf((icl.Conjunction(), icl.Parity())), icl.Planted(icl.Signs(4)))


def test_every_table_holds_its_whole_prior():
    """Probabilities that sum to 1, and draws that follow them.

    χ² = Σ (n_f − n p_f)² / (n p_f) over F functions has mean F − 1, variance 2 (F − 1) + (Σ 1/p_f − F² − 2F + 2) / n.
    """
    for function, dim in (
        (icl.Conjunction(), 4),
        (icl.Conjunction(monotone=True), 4),
        (icl.Disjunction(0.4), 4),
        (icl.SparseDisjunction(), 6),
        (icl.Majority(), 4),
        (icl.Parity(), 4),
        (icl.SparseParity(), 5),
        (icl.IntegerHalfspace(2), 3),
        (icl.SparseThreshold(0.4), 2),
        (icl.DNF(2, 0.4), 2),
        (icl.DNF(2, 0.4, monotone=True), 3),
        (icl.CNF(2, 0.4), 2),
    ):
        # What a function is, as one vector: the parameters are one array or several.
        flat = jax.vmap(lambda f: jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(f)]))
        parameters, log_prior = function.table(dim)
        table, log_prior = np.asarray(flat(parameters)), np.asarray(log_prior)
        assert np.exp(log_prior).sum() == pytest.approx(1, abs=len(table) * EPS)
        draws = jax.vmap(lambda key: function.draw(key, dim, dim))(jax.random.split(jax.random.key(3), 4000))  # noqa: B023
        shares = (np.asarray(flat(draws))[:, None] == table).all(-1).mean(0)
        chances = np.exp(log_prior)
        count = len(table)
        chi = 4000 * ((shares - chances) ** 2 / chances).sum()
        variance = 2 * (count - 1) + ((1 / chances).sum() - count**2 - 2 * count + 2) / 4000
        assert abs(chi - (count - 1)) < 4 * variance**0.5


@pytest.mark.parametrize(
    ("function", "dim", "words"),
    [
        (icl.SparseDisjunction(), 3, "SparseDisjunction: literals is 4 of dim 3: need at most as many"),
        (icl.SparseParity(6), 5, "SparseParity: relevant is 6 of dim 5: need at most as many"),
    ],
)
def test_more_literals_than_coordinates_are_refused(function, dim, words):
    with pytest.raises(ValueError, match=words):
        drawn(function, icl.Signs(dim))
    with pytest.raises(ValueError, match=words):
        function.table(dim)


def test_what_cannot_be_is_refused():
    with pytest.raises(TypeError, match="Planted: Parity has no pattern"):
        drawn(icl.Parity(), icl.Planted(icl.Signs(4)))
    with pytest.raises(TypeError, match="Teaching: Disjunction has no lesson"):
        drawn(icl.Disjunction(), icl.Teaching(icl.Signs(4)))
    with pytest.raises(ValueError, match="DNF: monotone is False"):
        drawn(icl.DNF(), icl.Teaching(icl.Signs(4)))
    with pytest.raises(ValueError, match="dim is 28, for 22876792454961 functions: need one with at most"):
        icl.Conjunction().table(28)
    with pytest.raises(ValueError, match="DNF: dim is 6, for 1162261467 functions: need one with at most"):
        icl.DNF().table(6)
    with pytest.raises(ValueError, match="IntegerHalfspace: dim is 8, for 5764801 functions: need one with at most"):
        icl.IntegerHalfspace().table(8)
    for make, words in (
        (lambda: icl.Planted(icl.Signs(4), 1.5), r"Planted: probability holds 1\.5: need numbers from 0 to 1"),
        (lambda: icl.Signs(0), "dim must be at least 1, got 0"),
        (lambda: icl.Conjunction(2.0), "Conjunction: probability holds 2.0: need numbers from 0 to 1"),
        (lambda: icl.Disjunction(-0.5), "Disjunction: probability holds -0.5"),
        (lambda: icl.DNF(3, 2.0), "DNF: probability holds 2.0"),
        (lambda: icl.CNF(3, jnp.array(2.0)), "CNF: probability holds 2.0"),
        (lambda: icl.Majority(2.0), "Majority: probability holds 2.0"),
        (lambda: icl.SparseThreshold(2.0), "SparseThreshold: probability holds 2.0"),
        (lambda: icl.DNF(terms=0), "terms must be at least 1, got 0"),
        (lambda: icl.CNF(clauses=0), "clauses must be at least 1, got 0"),
        (lambda: icl.IntegerHalfspace(most=0), "most must be at least 1, got 0"),
        (lambda: icl.NearestNeighbour(start=0), "start must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
