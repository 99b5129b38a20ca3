"""Text to tokens and back, of bytes, of a tokenizer, and of any object that can encode and decode."""

import dataclasses

import numpy as np
import pytest
from bigram import CONFIG, run
from tokenizers import Tokenizer as OfLibrary
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from jaxattn.train import BOS, EOS, Document, Tokenizer, Windows, encode

SHORT = dataclasses.replace(CONFIG, steps=2)
TEXTS = ["the cat and the hat", "the naïve 日本 cat", "and the end"]


@pytest.fixture(scope="module")
def library():
    words = OfLibrary(BPE())
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet())
    words.train_from_iterator(TEXTS * 5, trainer)
    return words


class Letters:
    """Any object that can encode and decode."""

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + number) for number in ids)


def test_bytes_are_the_tokens_without_a_tokenizer():
    tokenizer = Tokenizer()
    assert (tokenizer.begin, tokenizer.end, tokenizer.vocabulary, tokenizer.record) == (BOS, EOS, 258, None)
    assert tokenizer.opened("ab").tolist() == [BOS, *encode("ab")]
    assert tokenizer.decode([BOS, 97, EOS]) == "a"
    assert tokenizer.strings([BOS, 97, 200]) == ["BOS", "a", "c8"]
    (document,) = tokenizer.documents(["ab"])
    assert document.tolist() == Windows([Document("a", b"ab")], 3).stream.tolist()
    with pytest.raises(ValueError, match="begin and end are for a tokenizer"):
        Tokenizer(end=3)


def test_a_tokenizer_reads_and_writes_text_with_its_own_ends(library):
    tokenizer = Tokenizer(library, begin="<s>", end="</s>")
    assert (tokenizer.begin, tokenizer.end, tokenizer.vocabulary) == (0, 1, library.get_vocab_size())
    documents = tokenizer.documents([TEXTS[0], Document("b", TEXTS[1].encode())])
    for document, text in zip(documents, TEXTS, strict=False):
        assert document.tolist() == [0, *library.encode(text).ids, 1]
        assert tokenizer.decode(document) == text
        # A byte is a character of a token's name, so bytes of tokens add up to those of the text.
        assert tokenizer.token_bytes[document].sum() == len(text.encode())
    assert tokenizer.strings([0, int(documents[0][1]), 10**6])[::2] == ["<s>", "<1000000>"]
    windows = Windows(documents, 4, token_bytes=tokenizer.token_bytes)
    assert windows[0]["bytes"].tolist() == tokenizer.token_bytes[windows[0]["targets"]].tolist()
    with pytest.raises(ValueError, match="end is '<end>', which the tokenizer does not know"):
        Tokenizer(library, end="<end>")


def test_any_object_that_encodes_and_decodes_is_a_tokenizer():
    tokenizer = Tokenizer(Letters(), end=26)
    assert tokenizer.documents(["cab"])[0].tolist() == [2, 0, 1, 26]
    assert tokenizer.opened("").tolist() == []
    assert tokenizer.decode([2, 0, 1, 26]) == "cab"
    assert tokenizer.strings([2, 0]) == ["c", "a"]
    assert (tokenizer.vocabulary, tokenizer.token_bytes) == (None, None)
    with pytest.raises(TypeError, match="tokenizer is a int: need one with encode"):
        Tokenizer(3)


def test_the_tokenizer_of_a_run_is_saved_with_it(library, tmp_path):
    tokenizer = Tokenizer(library, end="</s>")
    run(tmp_path / "run", SHORT, tokenizer=tokenizer)
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        again = Tokenizer.of_run(folder)
        assert again.record == tokenizer.record
        assert again.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
    with pytest.raises(ValueError, match=r"tokenizer\.end was 1, now null"):
        run(tmp_path / "run", SHORT, tokenizer=Tokenizer(library))
    with pytest.raises(TypeError, match="tokenizer is of a Letters, which cannot be saved with the run"):
        run(tmp_path / "letters", SHORT, tokenizer=Tokenizer(Letters()))
    assert not (tmp_path / "letters").exists()
    other = OfLibrary(BPE())
    other.save(str(tmp_path / "run" / "tokenizer.json"))
    with pytest.raises(ValueError, match="is not the tokenizer that the run was trained with"):
        Tokenizer.of_run(tmp_path / "run")
    run(tmp_path / "bytes", SHORT, tokenizer=Tokenizer())
    assert Tokenizer.of_run(tmp_path / "bytes").record is None
    run(tmp_path / "none", SHORT, train_data=Windows(np.arange(200) % 7, 8))
    with pytest.raises(ValueError, match=r"has no tokenizer, and its tokens are no bytes: give fit one"):
        Tokenizer.of_run(tmp_path / "none")
