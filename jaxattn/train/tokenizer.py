"""From text to tokens and back: bytes, or a tokenizer of your own, which is kept with the run that is trained on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxattn.train.data import BOS, EOS, VOCABULARY, Document, decode, encode

_FILE = "tokenizer.json"


class Tokenizer:
    """Text to tokens and back, with the tokens that open and close a document.

    Attributes:
        tokenizer: The tokenizer that it was given, or None.
        begin: The id of the token before each document, or None for none.
        end: The id of the token after each document, or None.
        vocabulary: The number of ids, or None if that is not known.
        token_bytes: The number of bytes of text that each token stands for, uint8 `[vocabulary]`, where tokens are made
            of bytes (a `ByteLevel` decoder of `tokenizers`, or no tokenizer), else None. Special tokens stand for none.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, or any object with `encode(text)`, which returns ids or has them as `ids`,
            and `decode(ids)`. None for bytes, opened by `BOS` and closed by `EOS`.
        begin: An id, or of a `tokenizers.Tokenizer` also the name of a token; None for no token.
        end: Likewise.

    Raises:
        TypeError: The tokenizer cannot encode and decode.
        ValueError: The tokenizer does not know a token by this name.
    """

    def __init__(self, tokenizer: Any = None, *, begin: int | str | None = None, end: int | str | None = None):
        if tokenizer is None and not (begin is None and end is None):
            raise ValueError("begin and end are for a tokenizer: those of bytes are BOS and EOS")
        if tokenizer is not None and not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")):
            raise TypeError(f"tokenizer is a {type(tokenizer).__name__}: need one with encode(text) and decode(ids)")
        self.tokenizer = tokenizer
        self.vocabulary: int | None = VOCABULARY
        self.token_bytes: np.ndarray | None = (np.arange(VOCABULARY) < BOS).astype(np.uint8)
        self.begin, self.end = (BOS, EOS) if tokenizer is None else (self._id("begin", begin), self._id("end", end))
        if tokenizer is not None:
            of_library = hasattr(tokenizer, "get_vocab_size")
            self.vocabulary = tokenizer.get_vocab_size() if of_library else None
            self.token_bytes = _token_bytes(tokenizer) if of_library else None

    def _id(self, name: str, token: int | str | None) -> int | None:
        if not isinstance(token, str):
            return token
        number = self.tokenizer.token_to_id(token) if hasattr(self.tokenizer, "token_to_id") else None
        if number is None:
            raise ValueError(
                f"{name} is {token!r}, which the tokenizer does not know: need one of its tokens, or an id"
            )
        return number

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of a text, int32 `[T]`, without any that open or close it."""
        if self.tokenizer is None:
            return encode(text)
        if hasattr(self.tokenizer, "get_vocab_size"):
            return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        ids = self.tokenizer.encode(text)
        return np.asarray(getattr(ids, "ids", ids), np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens `[T]`, without special ones."""
        if self.tokenizer is None:
            return decode(tokens)
        ids = np.asarray(tokens, np.int64).reshape(-1)
        return self.tokenizer.decode([token for token in ids.tolist() if token not in (self.begin, self.end)])

    def opened(self, text: str) -> np.ndarray:
        """Returns the tokens of a document that starts with a text, int32 `[T]`."""
        return np.concatenate([self._ends(self.begin), self.encode(text)])

    def documents(self, texts: Iterable[str | Document]) -> list[np.ndarray]:
        """Returns the tokens of whole documents, opened and closed, each an array of integers `[n]`, for `Windows`."""
        plain = [text.content.decode() if isinstance(text, Document) else text for text in texts]
        begin, end = self._ends(self.begin), self._ends(self.end)
        if hasattr(self.tokenizer, "encode_batch"):  # the library works on several at a time
            inner = (np.asarray(x.ids, np.int32) for x in self.tokenizer.encode_batch(plain, add_special_tokens=False))
        else:
            inner = (self.encode(text) for text in plain)
        return [np.concatenate([begin, tokens, end]) for tokens in inner]

    @staticmethod
    def _ends(token: int | None) -> np.ndarray:
        return np.array([] if token is None else [token], np.int32)

    def strings(self, tokens: Sequence[int] | np.ndarray) -> list[str]:
        """Returns a short label for each token."""
        ids = np.asarray(tokens, np.int64).reshape(-1).tolist()
        if self.tokenizer is None:
            names = {BOS: "BOS", EOS: "EOS"}
            return [names.get(token) or (chr(token) if token < 128 else f"{token:02x}") for token in ids]
        return [
            (self.tokenizer.id_to_token(token) if hasattr(self.tokenizer, "id_to_token") else self.decode([token]))
            or f"<{token}>"
            for token in ids
        ]

    @property
    def record(self) -> dict[str, Any] | None:
        """What tells it from another in the config of a run; None for bytes.

        Raises:
            TypeError: The tokenizer cannot be written to a file.
        """
        if self.tokenizer is None:
            return None
        if not hasattr(self.tokenizer, "to_str"):
            kind = type(self.tokenizer).__name__
            raise TypeError(
                f"tokenizer is of a {kind}, which cannot be saved with the run: need a tokenizers.Tokenizer, or none "
                "and its own encode and decode afterwards"
            )
        digest = hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]
        return {"digest": digest, "begin": self.begin, "end": self.end}

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into the folder of a run. Bytes have no file."""
        if self.record is not None:
            (Path(folder) / _FILE).write_text(self.tokenizer.to_str(), encoding="utf-8")

    @classmethod
    def of_file(cls, file: str | Path, begin: int | str | None = None, end: int | str | None = None) -> Tokenizer:
        """Returns the tokenizer in a file tokenizer.json, which the library `tokenizers` reads.

        Raises:
            ValueError: The file is no tokenizer.
        """
        from tokenizers import Tokenizer as OfLibrary

        try:
            tokenizer = OfLibrary.from_file(str(file))
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"file {str(file)!r} is no tokenizer: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(tokenizer, begin=begin, end=end)

    @classmethod
    def of_run(cls, folder: str | Path) -> Tokenizer:
        """Returns the tokenizer of a run by its output folder, or the folder `best` in that: bytes if it has none.

        Raises:
            ValueError: The file of the tokenizer is missing or has changed, or the run has none and its tokens were no
                bytes.
        """
        folder = Path(folder)
        folder = folder if (folder / "config.json").exists() else folder.parent
        file = folder / "config.json"
        config = json.loads(file.read_text()) if file.exists() else {}
        said = config.get("tokenizer")
        if said is None:
            if config.get("corpus", {}).get("bytes") is False:
                raise ValueError(
                    f"the run in {str(folder)!r} has no tokenizer, and its tokens are no bytes: give fit one"
                )
            return cls()
        if not (folder / _FILE).exists():
            raise ValueError(f"file {str(folder / _FILE)!r} is missing: the run was trained on its tokens")
        tokenizer = cls.of_file(folder / _FILE, said["begin"], said["end"])
        if tokenizer.record != said:
            raise ValueError(f"file {str(folder / _FILE)!r} is not the tokenizer that the run was trained with")
        return tokenizer


def _token_bytes(tokenizer: Any) -> np.ndarray | None:
    """Returns how many bytes each token stands for, if tokens are written with a character for each byte."""
    if type(tokenizer.decoder).__name__ != "ByteLevel":
        return None
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    names = [
        None if number in special else tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())
    ]
    return np.array([min(len(name or ""), 255) for name in names], np.uint8)
