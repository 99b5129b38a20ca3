"""Tokenizers from files of a folder and from GGUF metadata: merges of bytes (GPT-2), pieces of words (BERT), and pieces
with scores (SentencePiece)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ENGLISH = r"'s|'t|'re|'ve|'m|'ll|'d"
# The expressions of two publications, which are part of what their vocabularies mean: contractions, words, numbers of
# at most three digits or of one, signs, line ends, spaces.
CUT = r"(?i:{english})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = (CUT.format(english=ENGLISH, digits=digits) for digits in (r"\p{N}{1,3}", r"\p{N}"))

KINDS = {
    "gpt-2": "gpt-2",
    "smollm": "single digits",
    "starcoder": "single digits",
    "refact": "single digits",
    "command-r": "single digits",
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
}
"""`tokenizer.ggml.pre` -> how text is cut before merging: as GPT-2, so with single digits, or by an expression."""

NORMAL, CONTROL, USER = 1, 3, 4  # of tokenizer.ggml.token_type: the last two are special, and text that is never cut
SPACE = "▁"


def of_folder(folder: Path, kind: str, settings: Mapping[str, Any]) -> Any:
    """Returns the `tokenizers.Tokenizer` of a folder, which neither pads nor cuts texts off; None if it has none.

    Args:
        folder: With tokenizer.json; or with vocab.txt (BERT), or with vocab.json and merges.txt (GPT-2).
        kind: The `model_type` of config.json.
        settings: What tokenizer_config.json says.
    """
    from tokenizers import AddedToken, Tokenizer

    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"file {str(folder / 'tokenizer.json')!r} is no tokenizer: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    if kind == "bert" and (folder / "vocab.txt").is_file():
        words = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return word_pieces({word.rstrip("\r"): number for number, word in enumerate(words)}, settings)
    if kind == "gpt2" and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        tokenizer = byte_level(vocabulary, [(left, right) for left, right in pairs])
        end = "<|endoftext|>"
        tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)] if end in vocabulary else [])
        return tokenizer
    return None


def word_pieces(vocabulary: Mapping[str, int], settings: Mapping[str, Any]) -> Any:
    """Returns a `tokenizers.Tokenizer` that takes the longest pieces of each word (BERT; Devlin et al., 2019).

    Args:
        vocabulary: Piece -> its number. Pieces that go on within a word begin with ##.
        settings: What tokenizer_config.json says: `do_lower_case` (by default True), `strip_accents` (by default as
            letters are lowered), `tokenize_chinese_chars`.

    Raises:
        ValueError: The vocabulary lacks a special token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = [settings.get(f"{name.lower()}_token", f"[{name}]") for name in ("UNK", "CLS", "SEP", "PAD", "MASK")]
    if missing := [token for token in special if token not in vocabulary]:
        raise ValueError(f"the vocabulary has no {missing}: need the special tokens of BERT")
    unknown, first, last, *_ = special
    tokenizer = Tokenizer(models.WordPiece(dict(vocabulary), unk_token=unknown, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, vocabulary[token]) for token in (first, last)],
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def bytes_of(token: str) -> bytes:
    """Returns the bytes of a token that is written as GPT-2 writes bytes.

    Visible characters of Latin-1 stand for themselves; the others are the characters from 256 on, in order. A special
    token stands for itself.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    number = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return bytes(number[char] for char in token) if set(token) <= set(number) else token.encode()


def of_metadata(metadata: Mapping[str, Any]) -> Any:
    """Returns the `tokenizers.Tokenizer` of a GGUF file, or None if it has none.

    Args:
        metadata: What the file says behind `tokenizer.`.

    Raises:
        ValueError: The kind of the vocabulary, or of the cuts before merging, is not known.
    """
    from tokenizers import AddedToken

    kind = metadata.get("ggml.model", "no_vocab")
    if kind == "no_vocab":
        return None
    tokens = metadata["ggml.tokens"]
    kinds = metadata.get("ggml.token_type", [NORMAL] * len(tokens))
    if kind == "gpt2":
        cut = metadata.get("ggml.pre")
        if cut not in KINDS:
            raise ValueError(f"the file has tokenizer.ggml.pre={cut!r}: need one of {sorted(KINDS)}")
        merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata["ggml.merges"])]
        tokenizer = byte_level({token: number for number, token in enumerate(tokens)}, merges, KINDS[cut])
        begins, never_cut = KINDS[cut] == LLAMA3, tokens
    elif kind == "llama":
        merged = [token if each in (NORMAL, USER) else "" for token, each in zip(tokens, kinds, strict=True)]
        prefix = metadata.get("ggml.add_space_prefix", True)
        tokenizer = scored(tokens, metadata["ggml.scores"], merged, metadata["ggml.unknown_token_id"], prefix=prefix)
        begins, never_cut = True, [token for token in tokens if SPACE not in token]  # others are found by merging
    else:
        raise ValueError(f"the file has tokenizer.ggml.model={kind!r}: need 'gpt2' or 'llama'")
    whole = set(never_cut)
    for wanted in (CONTROL, USER):
        chosen = [token for token, each in zip(tokens, kinds, strict=True) if each == wanted and token in whole]
        tokenizer.add_tokens([AddedToken(token, special=wanted == CONTROL, normalized=False) for token in chosen])
    if metadata.get("ggml.add_bos_token", begins):
        _begin_with(tokenizer, tokens[metadata["ggml.bos_token_id"]])
    return tokenizer


def scored(tokens: Sequence[str], scores: Sequence[float], merged: Iterable[str], unknown: int, *, prefix: bool) -> Any:
    """Returns a `tokenizers.Tokenizer` that joins the two neighbours with the best score, again and again, as
    SentencePiece does (Kudo & Richardson, 2018).

    Characters that are not in the vocabulary become tokens of their bytes, <0x00> to <0xFF>.

    Args:
        tokens: All tokens. A space is written ▁.
        scores: The score of each.
        merged: The tokens that neighbours may be joined to.
        unknown: The number of the token for what is not known.
        prefix: Whether a space is put before each text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [
        (token[:place], token[place:])
        for token in merged
        for place in range(1, len(token))
        if token[:place] in vocabulary and token[place:] in vocabulary
    ]
    pairs.sort(key=lambda pair: -scores[vocabulary["".join(pair)]])
    tokenizer = Tokenizer(
        models.BPE(vocabulary, pairs, unk_token=tokens[unknown], fuse_unk=True, byte_fallback="<0x00>" in vocabulary)
    )
    before: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    after: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def byte_level(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], cut: str = "gpt-2") -> Any:
    """Returns a `tokenizers.Tokenizer` that merges bytes (GPT-2; Radford et al., 2019).

    Args:
        vocabulary: Token -> its number. Bytes are written as GPT-2 writes them.
        merges: Pairs of tokens, the first to be merged first.
        cut: How text is cut before: a value of `KINDS`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    whole = cut == LLAMA3  # a word that is a token is taken without merging
    tokenizer = Tokenizer(models.BPE(dict(vocabulary), merges, ignore_merges=whole))
    if cut == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    if cut in ("gpt-2", "single digits"):
        first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut == "single digits" else []
        last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        first = [pre_tokenizers.Split(Regex(cut), "isolated")]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _begin_with(tokenizer: Any, token: str) -> None:
    """Makes every text begin with a token."""
    from tokenizers import processors

    number = tokenizer.token_to_id(token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, number)]
    )
