"""Sources of every kind give the batches of their records, and continue from where they were."""

import itertools
import json
from collections import Counter, namedtuple

import grain
import numpy as np
import pytest

from jaxattn.train import Batched, Drawn, batches, ordered_batches, packed
from jaxattn.train.sources import check_source, described

ROWS = np.arange(10)


class Records:
    """A data set as others have it: a length, and records by number, with lists for arrays."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": index, "tokens": [index, index + 1]}


class Again:
    """What can be iterated over as often as one likes, and is no iterator."""

    def __init__(self, records=None):
        self.records = Records() if records is None else records

    def __iter__(self):
        return (self.records[i] for i in range(len(self.records)))


class Stateful:
    """An iterator with a state of its own."""

    def __init__(self, as_bytes=False):
        self.at, self.as_bytes = 0, as_bytes

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return {"x": np.array(self.at - 1)}

    def get_state(self):
        return str(self.at).encode() if self.as_bytes else {"at": self.at}

    def set_state(self, state):
        self.at = int(state) if self.as_bytes else state["at"]


Pair = namedtuple("Pair", ["x", "y"])
SOURCES = {
    "records by number": Records,
    "a list": lambda: [{"x": i} for i in range(10)],
    "columns": lambda: {"x": ROWS, "image": np.zeros((10, 2, 2), np.uint8)},
    "tuples": lambda: [Pair(np.array(i), np.array(2 * i)) for i in range(10)],
    "a map of grain": lambda: grain.MapDataset.range(10).map(lambda i: {"x": i}).repeat(),
    "an iteration of grain": lambda: (
        grain.MapDataset.range(10).seed(3).map(lambda i: {"x": i}).shuffle().repeat().to_iter_dataset()
    ),
    "what can be iterated over": lambda: Again([Records()[i % 10] for i in range(60)]),
    "a generator": lambda: ({"x": i % 10} for i in itertools.count()),
    "an iterator with a state": Stateful,
    "a state of bytes": lambda: Stateful(as_bytes=True),
    "whole batches": lambda: Batched({"x": np.arange(4) + i} for i in itertools.count()),
}
SHUFFLED = ("records by number", "a list", "columns", "tuples")


def xs(batch):
    return np.asarray(batch["x"] if isinstance(batch, dict) else batch.x).tolist()


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.filterwarnings("ignore:train_data has no get_state")
def test_batches_continue_from_a_state_that_went_through_json(name):
    iterator = batches(SOURCES[name](), 4, seed=1)
    first = [xs(next(iterator)) for _ in range(3)]
    state = json.dumps(iterator.get_state())
    expected = [xs(next(iterator)) for _ in range(5)]
    resumed = batches(SOURCES[name](), 4, seed=1)
    resumed.set_state(json.loads(state))
    assert [xs(next(resumed)) for _ in range(5)] == expected
    assert all(len(batch) == 4 for batch in (*first, *expected))
    if name in SHUFFLED:
        assert Counter(joined(first + expected)[:30]) == Counter(ROWS.tolist() * 3)
        assert joined(first)[:10] != ROWS.tolist()
        assert [xs(next(batches(SOURCES[name](), 4, seed))) for seed in (1, 2)] != [first[0]] * 2


def test_a_loader_of_another_library_makes_whole_batches():
    class Loader:
        """Has a length and is iterated over, but has no records by number; its arrays are arrays to NumPy."""

        def __len__(self):
            return 2

        def __iter__(self):
            return iter([{"x": memoryview(np.arange(4))}, {"x": memoryview(np.arange(4, 8))}])

    assert [xs(batch) for batch in batches(Batched(Loader()), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [xs(batch) for batch in ordered_batches(Batched(Loader()), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_lists_of_numbers_are_arrays_and_tuples_keep_their_form():
    batch = next(batches(Records(), 4))
    assert batch["tokens"].shape == (4, 2)
    assert (batch["tokens"][:, 0] == batch["x"]).all()
    pairs = next(batches(SOURCES["tuples"](), 4))
    assert (pairs.y == 2 * pairs.x).all()


def test_an_iterator_without_a_state_is_read_again_and_says_so():
    iterator = batches(({"x": i} for i in range(100)), 3)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    resumed = batches(({"x": i} for i in range(100)), 3)
    with pytest.warns(
        UserWarning, match="train_data has no get_state: 15 records that the run has used are read again"
    ):
        resumed.set_state(state)
    assert xs(next(resumed)) == [15, 16, 17]
    with (
        pytest.warns(UserWarning, match="15 records"),
        pytest.raises(ValueError, match="ends at record 9, but the run has used 15"),
    ):
        batches(({"x": i} for i in range(9)), 3).set_state(state)


def test_a_state_that_json_cannot_hold_is_named():
    class Odd(Stateful):
        def get_state(self):
            return {"at": {1, 2}}

    with pytest.raises(TypeError, match="the state of the iterator of train_data is not JSON"):
        batches(Odd(), 2).get_state()


@pytest.mark.parametrize("name", ["records by number", "columns", "what can be iterated over", "whole batches"])
def test_an_ordered_pass_begins_anew_each_time(name):
    source = SOURCES[name]() if name != "whole batches" else Batched([{"x": ROWS[:4]}, {"x": ROWS[4:8]}])
    first, second = ([xs(batch) for batch in ordered_batches(source, 4, 2)] for _ in range(2))
    assert first == second
    assert joined(first)[:4] == ROWS[:4].tolist()


def test_the_last_batch_is_filled_up_where_rows_have_weights_and_is_short_where_not():
    columns = {"x": ROWS, "weights": np.ones((10, 2), np.float32)}
    last = list(ordered_batches(columns, 4))[-1]
    assert last["x"].tolist() == [8, 9, 9, 9]
    assert last["weights"].tolist() == [[1, 1]] * 2 + [[0, 0]] * 2
    assert [xs(batch) for batch in ordered_batches({"x": ROWS}, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [xs(batch) for batch in ordered_batches({"x": ROWS[:9]}, 4, multiple=2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [xs(batch) for batch in ordered_batches(Again(), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


DOCUMENTS = [np.arange(n) + 10 * i for i, n in enumerate((3, 5, 1, 9, 4, 2))]


def test_packed_records_stand_whole_side_by_side_with_their_targets():
    rows = list(packed(DOCUMENTS, 6, bins=2))
    pairs = Counter()
    for row in rows:
        assert {name: (x.shape, x.dtype.name) for name, x in row.items()} == {
            "tokens": ((6,), "int32"),
            "targets": ((6,), "int32"),
            "weights": ((6,), "float32"),
            "documents": ((6,), "int32"),
        }
        counted = row["weights"] > 0
        assert (counted == (row["documents"] >= 0)).all()
        assert (row["targets"] - row["tokens"])[counted].tolist() == [1] * counted.sum()
        for document in range(row["documents"].max() + 1):  # each is a stretch of one record
            tokens = row["tokens"][row["documents"] == document]
            assert (np.diff(tokens) == 1).all()
        pairs.update(row["tokens"][counted].tolist())
    # Every token but the last of its record, once.
    assert pairs == Counter(np.concatenate([document[:-1] for document in DOCUMENTS]).tolist())
    together = [row for row in rows if row["documents"].max() > 0]
    assert together


def test_packing_keeps_weights_with_their_targets():
    """A record of a question and its answer: the answer alone counts."""
    record = {"tokens": [1, 2, 3, 4], "weights": [0, 0, 1, 1], "bytes": [5, 6, 7, 8]}
    (row,) = packed([record], 4)
    assert row["targets"].tolist() == [2, 3, 4, 0]
    assert row["weights"].tolist() == [0, 1, 1, 0]
    assert row["bytes"].tolist() == [6, 7, 8, 0]
    given = {"tokens": [1, 2], "targets": [8, 9], "weights": [1, 0]}
    (row,) = packed([given], 4)
    assert row["targets"].tolist() == [8, 9, 0, 0]
    assert row["weights"].tolist() == [1, 0, 0, 0]


def test_packing_resumes():
    source = grain.MapDataset.source(DOCUMENTS).shuffle(seed=1).repeat()
    iterator = batches(packed(source, 6, bins=2), 2)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator)["tokens"].tolist() for _ in range(6)]
    resumed = batches(packed(source, 6, bins=2), 2)
    resumed.set_state(state)
    assert [next(resumed)["tokens"].tolist() for _ in range(6)] == expected


def test_what_tells_sources_apart():
    assert described(Records()) == described(Records())
    assert described({"x": ROWS}) != described({"x": ROWS + 1})
    assert described({"x": ROWS}) != described({"x": ROWS[:9]})
    assert described(Again()) == described(iter([])) == "iterated"
    assert described(Batched(Again())) == "batches of iterated"
    assert described(Drawn(None, 3, "mine")) == "mine"

    class Random(Records):
        digest = "random crops"

        def __getitem__(self, index):
            return {"x": np.random.default_rng().random()}

    assert described(Random()) == "random crops"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((3, 4), int), TypeError, r"train_data is an array of shape \(3, 4\): need named columns, as in"),
        (5, TypeError, "train_data is a int: need what has a length and records, or iter"),
        ([], ValueError, "train_data is empty: need at least one record"),
        ({}, ValueError, "train_data is empty"),
        ({"x": np.zeros((0, 3))}, ValueError, "train_data is empty"),
        ({"x": ROWS, "y": ROWS[1:]}, ValueError, r"the columns of a source have the numbers of rows \{'x': \(10,\)"),
    ],
)
def test_what_is_no_source_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        check_source("train_data", source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"text": "a"}] * 4, "column 'text' of a record has dtype <U1: need numbers; drop it, or make it tokens"),
        ([{"a": {"b": [None]}}] * 4, r"column 'a\.b' of a record has dtype object"),
        ([{"x": [[1], [1, 2]]}] * 4, "column 'x' of a record is no array"),
        ([np.zeros(3)] * 4, r"a record is a ndarray: need a dict of numbers and arrays"),
        (
            [{"x": [1] * (i + 1)} for i in range(4)],
            r"records have \['x'\] of the shapes .* or pack them with train.packed",
        ),
        ([{"x": 1}, {"y": 1}] * 2, "records have the structures"),
        (Batched(iter([{"x": ROWS[:3]}])), r"a batch has \['x'\] of shape \(3,\): need 4 rows"),
        (packed([{"x": 1}], 4), "a record has no 'tokens', but 'x'"),
        (packed([{"tokens": [1], "id": [1]}], 4), r"a record has the columns \['id'\]: need some of"),
        (packed([{"tokens": [1, 2], "weights": [1]}], 4), "the columns of a record have the shapes"),
        (packed([[0.5, 1.0]], 4), "a record has tokens of dtype float64: need integers"),
    ],
)
def test_records_that_are_no_rows_are_named_when_they_are_read(source, message):
    with pytest.raises(ValueError, match=message):
        next(batches(source, 4))


def test_sizes_and_iterators_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="validation_data is an iterator, which can be read once"):
        ordered_batches(iter(Again()), 4)
    with pytest.raises(ValueError, match="length is 0: need at least 1"):
        packed(DOCUMENTS, 0)
    with pytest.raises(ValueError, match="bins is 0: need at least 1"):
        packed(DOCUMENTS, 4, bins=0)
