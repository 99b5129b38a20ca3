"""Bytes, documents, windows and the iterators over them."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from jaxattn.train import (
    BOS,
    EOS,
    VOCABULARY,
    Document,
    Windows,
    batches,
    decode,
    encode,
    ordered_batches,
    read_documents,
    split,
    standard_library,
)
from jaxattn.train.data import _digest


def documents_of_one_byte(lengths):
    """Document i holds the byte i only: every token shows where it came from."""
    return [Document(str(i), bytes([i]) * length) for i, length in enumerate(lengths)]


def documents_named(count):
    return [Document(f"name {i}", f"text {i}".encode()) for i in range(count)]


def test_decode_inverts_encode_and_drops_specials():
    text = "naïve, 日本\n"
    tokens = encode(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == list(text.encode())
    assert encode(text.encode()).tolist() == tokens.tolist()
    assert decode([BOS, *tokens, EOS]) == text


def test_decode_marks_bytes_that_are_not_text():
    assert decode([0x61, 0xFF, 0x62]) == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_decode_refuses_what_is_not_a_token(token):
    with pytest.raises(ValueError, match=rf"tokens holds {token}: every token is in 0..257"):
        decode([0, token])


def test_a_folder_is_read_in_order_without_hidden_and_empty_files(tmp_path):
    for name, text in {"b.txt": "B", "a/c.md": "C", "empty.txt": "", ".hidden": "no", ".git/x": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_documents(tmp_path) == [Document("a/c.md", b"C"), Document("b.txt", b"B")]


def test_a_file_is_one_document_also_below_a_hidden_folder(tmp_path):
    file = tmp_path / ".hidden" / "text.txt"
    file.parent.mkdir()
    file.write_text("text")
    assert read_documents(file) == [Document("text.txt", b"text")]
    assert read_documents(file.parent) == [Document("text.txt", b"text")]


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"path '.*nowhere' does not exist"):
        read_documents(tmp_path / "nowhere")


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    for path in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(ValueError, match="holds no text: need at least one file"):
            read_documents(path)


def test_a_file_that_is_not_text_is_named_with_the_offset(tmp_path):
    (tmp_path / "image.png").write_bytes(b"ok\n\x89PNG")
    with pytest.raises(ValueError, match=r"image.png' is not UTF-8 text: byte 0x89 at offset 3"):
        read_documents(tmp_path)


def test_the_standard_library_is_a_corpus_of_its_own_sources():
    documents = standard_library()
    names = [document.name for document in documents]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert len(set(names)) == len(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    assert sum(len(document.content) for document in documents) > 5e6  # 10 MB in Python 3.11 and 3.13


def test_a_split_parts_the_documents_and_keeps_their_order():
    documents = documents_named(100)
    train, validation = split(documents, 0.3)
    assert sorted(train + validation, key=documents.index) == documents
    assert train == sorted(train, key=documents.index)
    assert validation == sorted(validation, key=documents.index)


def test_the_validation_fraction_is_the_probability_of_validation():
    count, fraction = 2000, 0.2
    _, validation = split(documents_named(count), fraction)
    deviation = (count * fraction * (1 - fraction)) ** 0.5
    assert abs(len(validation) - count * fraction) < 4 * deviation


def test_adding_documents_to_a_split_moves_no_other():
    few, many = split(documents_named(50), 0.2, seed=3), split(documents_named(80), 0.2, seed=3)
    assert set(few[0]) < set(many[0])
    assert set(few[1]) < set(many[1])


def test_another_seed_is_another_split_and_the_same_seed_the_same():
    documents = documents_named(50)
    assert split(documents, 0.2, seed=1) == split(documents, 0.2, seed=1)
    assert split(documents, 0.2, seed=1) != split(documents, 0.2, seed=2)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_a_split_is_empty(fraction):
    train, validation = split(documents_named(4), fraction)
    assert sorted([len(train), len(validation)]) == [1, 3]
    assert len(validation) == (1 if fraction < 0.5 else 3)


def test_a_single_document_is_cut_at_a_line():
    lines = [f"line {i}\n".encode() for i in range(10)]
    train, validation = split([Document("book", b"".join(lines))], 0.2)
    assert train == [Document("book", b"".join(lines[:8]))]
    assert validation == [Document("book#validation", b"".join(lines[8:]))]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_validation_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match=r"validation_fraction is .*: need a number between 0 and 1"):
        split(documents_named(4), fraction)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="documents is empty"):
        split([], 0.5)
    with pytest.raises(ValueError, match="one document, 'x', of a single line"):
        split([Document("x", b"one line\n")], 0.5)


def test_windows_are_the_stream_cut_in_pieces():
    documents = documents_of_one_byte([5, 0, 9, 1, 13, 2])
    stream = [token for document in documents for token in (BOS, *document.content, EOS)]
    windows = Windows(documents, 4)
    assert len(windows) == (len(stream) - 1) // 4
    tokens = np.concatenate([windows[i]["tokens"] for i in range(len(windows))])
    targets = np.concatenate([windows[i]["targets"] for i in range(len(windows))])
    assert tokens.tolist() == stream[: tokens.size]
    assert targets.tolist() == stream[1 : tokens.size + 1]


@pytest.mark.parametrize("length", [1, 3, 8, 50])
def test_documents_are_those_that_counting_finds(length):
    windows = Windows(documents_of_one_byte([5, 0, 9, 1, 13, 2, 20]), length)
    document = -1
    for i in range(len(windows)):
        window = windows[i]
        for t in range(length):
            if window["tokens"][t] == BOS:
                document += 1
            assert window["documents"][t] == document


@pytest.mark.parametrize("length", [1, 3, 8, 50])
def test_no_token_is_trained_to_predict_across_documents(length):
    windows = Windows(documents_of_one_byte([5, 0, 9, 1, 13, 2, 20]), length)
    for i in range(len(windows)):
        window = windows[i]
        learned = window["weights"] == 1
        assert np.all(window["weights"][~learned] == 0)
        assert np.all((window["targets"] == BOS) == ~learned)
        of_bytes = learned & (window["targets"] < BOS)
        assert np.all(window["targets"][of_bytes] == window["documents"][of_bytes])


def test_windows_have_static_shapes_and_dtypes():
    window = Windows(documents_of_one_byte([5, 9]), 4)[0]
    dtypes = {name: (array.shape, array.dtype.name) for name, array in window.items()}
    integers = dict.fromkeys(("tokens", "targets", "documents"), ((4,), "int32"))
    assert dtypes == {**integers, "weights": ((4,), "float32"), "bytes": ((4,), "uint8")}


def test_the_smallest_corpus_is_one_window_and_its_target():
    documents = [Document("a", b"abc")]  # 5 tokens
    assert len(Windows(documents, 4)) == 1
    with pytest.raises(ValueError, match=r"documents hold 5 tokens .* needs 6"):
        Windows(documents, 5)
    with pytest.raises(ValueError, match="source holds 0 tokens"):
        Windows([], 5)
    with pytest.raises(ValueError, match="length is 0: a window has at least 1 token"):
        Windows(documents, 0)


def test_windows_end():
    windows = Windows(documents_of_one_byte([9]), 5)
    with pytest.raises(IndexError, match="window 2 of 2"):
        windows[2]


def test_the_digest_tells_corpora_apart():
    one, other = documents_of_one_byte([5, 9]), documents_of_one_byte([9, 5])
    assert Windows(one, 4).digest == Windows(one, 3).digest
    assert Windows(one, 4).digest != Windows(other, 4).digest


def windows_that_tell_themselves_apart(count):
    return Windows([Document("all", bytes(range(count * 2)))], 2)  # window i > 0 begins with byte 2i - 1


def firsts(batch):
    return batch["tokens"][:, 0].tolist()


def test_each_pass_over_the_windows_has_each_once_in_a_new_order():
    windows = windows_that_tell_themselves_apart(12)
    rows = [row for batch in itertools.islice(batches(windows, 4, seed=1), 6) for row in firsts(batch)]
    first, second = rows[:12], rows[12:]
    assert Counter(first) == Counter(second) == Counter(windows[i]["tokens"][0] for i in range(12))
    assert first != second
    assert first != sorted(first)


STREAM = np.array([7, 3, 4, 7, 5, 7, 6, 6, 6, 9], np.uint16)


def test_a_stream_of_integers_is_neither_copied_nor_read_before_it_is_used(tmp_path):
    STREAM.tofile(tmp_path / "tokens")
    stream = np.memmap(tmp_path / "tokens", np.uint16, "r")
    windows = Windows(stream, 4)
    assert windows.stream is stream
    assert len(windows) == 2
    assert {name: array.tolist() for name, array in windows[1].items()} == {
        "tokens": [5, 7, 6, 6],
        "targets": [7, 6, 6, 6],
        "weights": [1, 1, 1, 1],
    }
    assert windows.digest == Windows(STREAM, 4).digest != Windows(STREAM + 1, 4).digest


def test_documents_of_a_stream_are_where_it_says_and_a_first_token_is_no_target():
    by_starts = Windows(STREAM, 9, starts=np.flatnonzero(STREAM == 7))
    by_parts = Windows(np.split(STREAM, [3, 5]), 9)
    for windows in (by_starts, by_parts):
        assert windows[0]["documents"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
        assert windows[0]["weights"].tolist() == [1, 1, 0, 1, 0, 1, 1, 1, 1]
    assert by_starts.digest == by_parts.digest != Windows(STREAM, 9).digest
    tail = Windows(STREAM, 9, starts=[3])  # what comes before the first start is a document too
    assert tail[0]["documents"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_streams_that_take_much_memory_are_told_apart_by_pieces():
    stream = np.arange(10**6)
    other = np.where(stream == 10**6 - 1, 0, stream)
    first, second = (_digest(each, b"", limit=2**18) for each in (stream, other))
    assert first != second
    assert first == _digest(stream, b"", limit=2**18) != _digest(stream, b"")


def test_the_bytes_of_tokens_are_those_of_the_table():
    windows = Windows(STREAM, 9, token_bytes=np.arange(10))
    assert windows[0]["bytes"].tolist() == windows[0]["targets"].tolist()
    with pytest.raises(ValueError, match="token_bytes has 9 entries but there is a token 9"):
        Windows(STREAM, 9, token_bytes=np.arange(9))[0]
    text = Windows([Document("a", b"abc")], 4)
    assert text[0]["bytes"].tolist() == [1, 1, 1, 0]  # EOS is none


def test_tokens_that_are_none_are_refused_when_they_are_read():
    with pytest.raises(ValueError, match="the token at 9 of the stream is 9: need tokens from 0 to 8"):
        Windows(STREAM, 9, vocabulary=9)[0]
    with pytest.raises(ValueError, match="the token at 1 of the stream is -1"):
        Windows(np.array([0, -1, 2]), 2)[0]
    with pytest.raises(ValueError, match="the token at 0 of the stream is 2147483648"):
        Windows(np.array([2**31, 0, 0]), 2)[0]


def test_streams_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"source holds an array of shape \(2, 5\): need one axis"):
        Windows(STREAM.reshape(2, 5), 2)
    with pytest.raises(TypeError, match="source holds tokens of dtype float64: need integers"):
        Windows(np.zeros(5), 2)
    with pytest.raises(ValueError, match="source holds 10 tokens: a window of length 10 with its targets needs 11"):
        Windows(STREAM, 10)
    for starts in ([3, 1], [0, 11], [[0]], [0.0]):
        with pytest.raises(ValueError, match="starts must be integers"):
            Windows(STREAM, 4, starts=starts)
    with pytest.raises(ValueError, match="starts is given, but the source is a sequence of documents"):
        Windows([STREAM], 4, starts=[0])
    with pytest.raises(ValueError, match="are for streams of integers: documents are bytes"):
        Windows([Document("a", b"abc")], 4, vocabulary=300)


def test_batches_larger_than_the_corpus_repeat_it():
    assert next(batches(windows_that_tell_themselves_apart(3), 7))["tokens"].shape == (7, 2)


def test_the_order_of_batches_is_a_function_of_the_seed():
    windows = windows_that_tell_themselves_apart(30)

    def order(seed):
        return [firsts(batch) for batch in itertools.islice(batches(windows, 5, seed), 6)]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("done", [0, 1, 5, 9])
def test_batches_continue_from_a_state_that_went_through_json(done):
    windows = windows_that_tell_themselves_apart(12)
    iterator = batches(windows, 5, seed=2)
    for _ in range(done):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [firsts(next(iterator)) for _ in range(8)]
    resumed = batches(windows, 5, seed=2)
    resumed.set_state(json.loads(state))
    assert [firsts(next(resumed)) for _ in range(8)] == expected


def test_the_ordered_pass_counts_each_window_once_in_batches_of_one_shape():
    windows = windows_that_tell_themselves_apart(10)
    found = list(ordered_batches(windows, 4))
    assert [batch["tokens"].shape for batch in found] == [(4, 2)] * 3
    counted = np.concatenate([batch["tokens"][batch["weights"].any(axis=1), 0] for batch in found])
    assert counted.tolist() == [windows[i]["tokens"][0] for i in range(10)]
    assert sum(batch["weights"].sum() for batch in found) == sum(windows[i]["weights"].sum() for i in range(10))
    assert np.all(found[-1]["weights"][2:] == 0)


def test_a_limited_pass_is_spread_over_the_corpus():
    windows = windows_that_tell_themselves_apart(100)
    (batch,) = ordered_batches(windows, 4, limit=1)
    assert firsts(batch) == [windows[i]["tokens"][0] for i in (0, 25, 50, 75)]
    assert len(list(ordered_batches(windows, 4, limit=1000))) == 25


def test_batch_sizes_and_limits_below_1_are_refused():
    windows = windows_that_tell_themselves_apart(3)
    for make in (batches, ordered_batches):
        with pytest.raises(ValueError, match="batch_size is 0: need at least 1"):
            make(windows, 0)
    with pytest.raises(ValueError, match="limit is 0: need at least 1"):
        ordered_batches(windows, 1, limit=0)


def test_identical_texts_are_on_one_side_of_a_split():
    """Whatever their names. Texts that stand alone are drawn as ever."""
    alone = [Document(f"{i}.py", f"text {i}".encode()) for i in range(60)]
    copies = [Document(f"copy of {i}.py", f"text {i}".encode()) for i in range(0, 60, 2)]
    for seed in range(5):
        for documents in ([*alone, *copies], [*copies, *alone]):
            train, validation = split(documents, 0.3, seed)
            assert not {text for _, text in train} & {text for _, text in validation}
            assert sorted(train + validation) == sorted(documents)
            assert [x for x in documents if x in validation] == validation
        before, after = split(alone, 0.3, seed)[1], split([*alone, *copies], 0.3, seed)[1]
        texts = {text for _, text in copies}
        assert [x for x in before if x.content not in texts] == [x for x in after if x.content not in texts]


def test_copies_alone_are_split_and_named():
    with pytest.warns(UserWarning, match="the 2 documents 'a' to 'b' have one text, which is on both sides"):
        train, validation = split([Document("a", b"one"), Document("b", b"one")], 0.5)
    assert {name for name, _ in (*train, *validation)} == {"a", "b"}
    assert len(train) == len(validation) == 1
    train, validation = split([Document("a", b"one"), Document("b", b"one"), Document("c", b"two")], 1e-9)
    assert {text for _, text in train} != {text for _, text in validation}
    assert len(train) + len(validation) == 3


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_is_none_is_refused(seed):
    source = Windows([Document("a", bytes(range(50)))], 4)
    with pytest.raises(ValueError, match=rf"seed is {seed}: need one from 0 to 2\*\*32 - 1"):
        batches(source, 2, seed)
    with pytest.raises(TypeError, match=r"seed must be an int, got 1\.5"):
        batches(source, 2, 1.5)
    with pytest.raises(TypeError, match=r"batch_size must be an int, got 2\.0"):
        batches(source, 2.0)
    assert next(batches(source, np.int64(2), np.int32(3)))["tokens"].shape == (2, 4)
