"""Tokenizers that come as lists of pieces, and what a model with a tokenizer does with texts."""

import json

import numpy as np
import pytest
from published import GPT2
from published_more import BERT
from test_pretrained import written
from tokenizers import Tokenizer, pre_tokenizers

from jaxattn.models import load_pretrained
from jaxattn.models.pretrained import Pretrained, tokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##in", "##g", "é", "e", "Play", "!", "你"]


def bert(folder, **settings):
    written(folder, BERT)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_pretrained(folder)


def test_words_are_cut_into_their_longest_pieces(tmp_path):
    """Letters are lowered and lose accents, unless the folder says otherwise; signs stand alone."""
    loaded = bert(tmp_path)
    ids = loaded.encode("Playing É! zzz你 [MASK]")
    shown = ["[CLS]", "play", "##ing", "e", "!", "[UNK]", "你", "[MASK]", "[SEP]"]
    assert loaded.token_strings(ids) == shown
    assert ids.tolist() == [PIECES.index(each) for each in shown]
    assert ids.dtype == np.int32
    assert loaded.encode("play", special=False).tolist() == [PIECES.index("play")]
    assert loaded.decode(loaded.encode("playing e!")) == "playing e!"
    pair = loaded.tokenizer.encode("play", "e")
    assert pair.tokens == ["[CLS]", "play", "[SEP]", "e", "[SEP]"]
    assert pair.type_ids == [0, 0, 0, 1, 1]
    cased = bert(tmp_path, do_lower_case=False)
    assert cased.token_strings(cased.encode("Playing É é", special=False)) == ["Play", "##ing", "[UNK]", "é"]


def test_a_vocabulary_without_its_special_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no \['<mask>'\]: need the special tokens of BERT"):
        bert(tmp_path, mask_token="<mask>")


def gpt2(folder, **config):
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe"]
    written(folder, GPT2.changed(vocab_size=len(tokens), **config))
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
    return load_pretrained(folder)


def test_bytes_are_merged_in_order(tmp_path):
    loaded = gpt2(tmp_path, eos_token_id=0)
    ids = loaded.encode("the the<|endoftext|>")
    assert loaded.token_strings(ids) == ["the", "␣the", "<|endoftext|>"]
    assert ids[-1] == loaded.end_token == 0
    assert loaded.decode(ids) == "the the"
    assert loaded.tokenizer.encode("the 't").tokens == ["the", "Ġ", "'", "t"]


def test_every_byte_has_its_character():
    """Each of the 256 characters stands for one byte, those of text for themselves."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    assert sorted(tokenizer.bytes_of(letter) for letter in letters) == [bytes([byte]) for byte in range(256)]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "a é\n\u0000\x7f\xad–😀"
    assert tokenizer.bytes_of(split.pre_tokenize_str(text)[0][0]) == text.encode()


def test_a_byte_that_is_no_character_is_shown_as_it_is(tmp_path):
    loaded = gpt2(tmp_path)
    part = loaded.tokenizer.token_to_id("â")
    assert loaded.token_strings([part]) == ["\\xe2"]


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    loaded = gpt2(tmp_path)
    size = loaded.config["vocab_size"]
    for number in (-1, size, 2**40):
        with pytest.raises(
            ValueError, match=rf"token {number} at place 1 is not in the vocabulary: need 0 to {size - 1}"
        ):
            loaded.decode([0, number])
        with pytest.raises(ValueError, match=rf"token {number} at place 1 is not in"):
            loaded.token_strings(np.array([0, number]))
    with pytest.raises(ValueError, match=r"ids has shape \(1, 2\) and dtype int64: need whole numbers \[T\]"):
        loaded.decode([[0, 1]])
    with pytest.raises(ValueError, match="dtype float64: need whole numbers"):
        loaded.decode([0.5])
    assert loaded.decode([]) == ""
    loaded.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=rf"token {size} at place 0 is not in"):
        loaded.encode("zebra")
    with pytest.raises(ValueError, match="there is no tokenizer"):
        Pretrained(loaded.model).encode("the")


TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'judge' %}{{ raise_exception('no judges') }}{% endif %}
{{ message['role'] }}:{{ message['content'] | trim }}
{% endfor %}
{% if add_generation_prompt %}t:{% endif %}"""


def test_a_conversation_is_written_as_the_template_says(tmp_path):
    gpt2(tmp_path, bos_token_id=0)
    with pytest.raises(ValueError, match="chat needs a chat template"):
        load_pretrained(tmp_path).chat([])
    said = [{"name": "other", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
    loaded = load_pretrained(tmp_path)
    messages = [{"role": "t", "content": " the "}, {"role": "h", "content": "e"}]
    expected = ["<|endoftext|>", *"t:", "the", *"⏎h:e⏎"]
    assert loaded.token_strings(loaded.chat(messages, answer=False)) == expected
    assert loaded.token_strings(loaded.chat(messages)) == [*expected, "t", ":"]
    with pytest.raises(ValueError, match="the chat template refuses the messages: no judges"):
        loaded.chat([{"role": "judge", "content": "e"}])
    with pytest.raises(ValueError, match=r"messages\[1\] has \['content'\]: need 'role' and 'content'"):
        loaded.chat([messages[0], {"content": "e"}])
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="the chat template refuses the messages: access to attribute '__class__'"):
        load_pretrained(tmp_path).chat(messages)


def test_a_tokenizer_neither_cuts_nor_pads(tmp_path):
    loaded = bert(tmp_path)
    loaded.tokenizer.enable_padding(length=9)
    loaded.tokenizer.enable_truncation(4)
    loaded.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert (
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("play play play").ids.count(PIECES.index("play"))
        == 2
    )
    assert len(load_pretrained(tmp_path).encode("play play play")) == 5
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json' is no tokenizer"):
        load_pretrained(tmp_path)
