"""Text: documents, their split, and windows cut from their stream; and draws.

A token of a text is a byte, or one of two specials that open and close a document, unless the tokens are your own. A
window is a stretch of the stream of tokens, with the ids and weights that keep its documents apart. A task that is a
distribution rather than a text is `Drawn`.
"""

from __future__ import annotations

import hashlib
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxattn.core.checks import check_int

BOS = 256
EOS = 257
VOCABULARY = 258

Batch = dict[str, np.ndarray]

# Folders of the standard library that hold tests, programs or installed packages rather than the library's own text.
_NOT_LIBRARY = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}


class Document(NamedTuple):
    """One text.

    Attributes:
        name: Its name, unique in its corpus.
        content: Its bytes, UTF-8.
    """

    name: str
    content: bytes


def encode(text: str | bytes) -> np.ndarray:
    """Returns the tokens of a text: its UTF-8 bytes as int32 `[T]`, values 0..255, without BOS and EOS."""
    content = text.encode() if isinstance(text, str) else text
    return np.frombuffer(content, np.uint8).astype(np.int32)


def decode(tokens: Sequence[int] | np.ndarray) -> str:
    """Returns the text of tokens `[T]`: specials are dropped, bytes that are not UTF-8 become U+FFFD.

    Raises:
        ValueError: A token is outside 0..257.
    """
    tokens = np.asarray(tokens, np.int64).reshape(-1)
    outside = tokens[(tokens < 0) | (tokens >= VOCABULARY)]
    if outside.size:
        raise ValueError(f"tokens holds {outside[0]}: every token is in 0..{VOCABULARY - 1}")
    return tokens[tokens < BOS].astype(np.uint8).tobytes().decode(errors="replace")


def read_documents(path: str | Path) -> list[Document]:
    """Returns the documents of a text file, or of all files in a folder and its subfolders, ordered by name.

    A document's name is its path inside the folder. Hidden files and folders, and empty files, are left out.

    Raises:
        ValueError: The path does not exist, nothing is left to read, or a file is not UTF-8 text.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"path {str(path)!r} does not exist: need a text file or a folder of text files")
    folder = path if path.is_dir() else path.parent
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    visible = [file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts)]
    documents = [_read(file, folder) for file in visible]
    documents = [document for document in documents if document.content]
    if not documents:
        raise ValueError(f"path {str(path)!r} holds no text: need at least one file that is neither empty nor hidden")
    return documents


def standard_library() -> list[Document]:
    """Returns the default corpus: each `*.py` file of the installed Python standard library, ordered by name.

    The corpus is real text, code and prose, that every machine with Python has. It differs between versions of Python.
    Installed packages, tests and example programs are left out.

    Raises:
        ValueError: Python is installed without sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(folder).parts))
    documents = [document for document in (_read(file, folder) for file in files) if document.content]
    if not documents:
        raise ValueError(f"the standard library in {str(folder)!r} has no *.py files: give a folder of text instead")
    return documents


def _read(file: Path, folder: Path) -> Document:
    content = file.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"file {str(file)!r} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start} "
            f"({error.reason})"
        ) from None
    if b"\0" in content:
        raise ValueError(f"file {str(file)!r} is not text: byte 0x00 at offset {content.index(0)}")
    return Document(file.relative_to(folder).as_posix(), content)


def split(
    documents: Sequence[Document], validation_fraction: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Splits documents into (train, validation): each goes to validation with probability `validation_fraction`.

    The draw of a document is u = SHA-256(seed, name) / 2²⁵⁶, validation where u < `validation_fraction`. It depends on
    nothing else, so adding documents to a corpus moves no other. Documents with the same text share the draw of the
    first of their names, so that none is on both sides. Both sides keep the order of `documents`.

    When all draws fall on one side, the text whose draw is nearest to the other side goes there. Documents that all
    have one text are drawn by their own names, with a `UserWarning` that names them. A single document is cut in two at
    the line break nearest to its last `validation_fraction` of bytes.

    Args:
        documents: The documents, at least one.
        validation_fraction: Between 0 and 1, both excluded.
        seed: The seed of the draws.

    Raises:
        ValueError: The fraction is outside (0, 1), `documents` is empty, or a single document has no line to cut at.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}: need a number between 0 and 1, both excluded")
    if not documents:
        raise ValueError("documents is empty: need at least one document to split")
    if len(documents) == 1:
        return _cut(documents[0], validation_fraction)
    first: dict[bytes, str] = {}  # of the names of each text
    for name, content in documents:
        first[content] = min(name, first.get(content, name))
    if len(first) == 1:
        names = f"{documents[0].name!r} to {documents[-1].name!r}"
        warnings.warn(f"the {len(documents)} documents {names} have one text, which is on both sides", stacklevel=2)
        drawn_by = [name for name, _ in documents]
    else:
        drawn_by = [first[content] for _, content in documents]
    draws = [int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()) / 2**256 for name in drawn_by]
    chosen = {draw for draw in draws if draw < validation_fraction}
    if not chosen:
        chosen = {min(draws)}
    elif len(chosen) == len(set(draws)):
        chosen.remove(max(draws))
    pairs = list(zip(draws, documents, strict=True))
    return [x for draw, x in pairs if draw not in chosen], [x for draw, x in pairs if draw in chosen]


def _cut(document: Document, validation_fraction: float) -> tuple[list[Document], list[Document]]:
    name, content = document
    breaks = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
    breaks = breaks[breaks < len(content)]
    if not breaks.size:
        raise ValueError(f"documents holds one document, {name!r}, of a single line: need two documents or two lines")
    at = breaks[np.argmin(np.abs(breaks - (1 - validation_fraction) * len(content)))]
    return [Document(name, content[:at])], [Document(f"{name}#validation", content[at:])]


class Windows:
    """Random access to the windows of `length` tokens that a stream of tokens is cut into.

    With the stream x₀ x₁ ..., window i holds the inputs x at iL .. iL+L−1, as a dict of arrays `[L]`:

    - `tokens` int32: x.
    - `targets` int32: the token after each; it comes from the next window for the last one.
    - `weights` float32: 0 where the target is the first token of another document, else 1.
    - `documents` int32 ≥ 0: the index of each token's document, for the `Documents` attention mask. A stream whose
      documents are not known has none.
    - `bytes` uint8: how many bytes of text the target stands for, where that is known.

    A tail of the stream shorter than a window is left out. `digest` says which stream it is: the SHA-256 of its
    numbers, or of a part of them, spread evenly, where they take more than 256 MiB.

    Args:
        source: Documents of text, whose tokens are bytes: the stream is `BOS bytes EOS BOS bytes EOS ...`. Or a stream
            of any integers `[S]`, such as `np.memmap` of a file, which is not copied. Or
            a sequence of such arrays, one per document, which are joined.
        length: L, at least 1.
        starts: Where documents begin in a stream of integers, in increasing order, such as
            `np.flatnonzero(stream == bos)`.
        vocabulary: V: a token that is not from 0 to V − 1 raises when it is read. By default any that int32 holds, from
            0 on, is taken.
        token_bytes: The number of bytes that each token stands for, `[V]`, at most 255. With it the log says how many
            bits the text costs per byte, which is comparable between vocabularies. Documents of text have it.

    Raises:
        TypeError: The tokens are no integers.
        ValueError: The length is below 1, there are fewer than L+1 tokens, or an argument does not fit.
    """

    def __init__(
        self,
        source: Sequence[Document] | Sequence[np.ndarray] | np.ndarray,
        length: int,
        *,
        starts: Any = None,
        vocabulary: int | None = None,
        token_bytes: Any = None,
    ):
        if length < 1:
            raise ValueError(f"length is {length}: a window has at least 1 token")
        self.length = length
        self.of_text = of_text = not isinstance(source, np.ndarray | jax.Array) and any(
            isinstance(x, Document) for x in source
        )
        if of_text:
            if not (starts is None and vocabulary is None and token_bytes is None):
                raise ValueError("starts, vocabulary and token_bytes are for streams of integers: documents are bytes")
            documents = cast(Sequence[Document], source)
            parts = [np.pad(np.frombuffer(content, np.uint8).astype(np.uint16), 1) for _, content in documents]
            for part in parts:
                part[0], part[-1] = BOS, EOS
            token_bytes = np.arange(VOCABULARY) < BOS
        elif isinstance(source, np.ndarray | jax.Array):
            parts = [np.asanyarray(source)]
        else:
            if starts is not None:
                raise ValueError("starts is given, but the source is a sequence of documents: need one of both")
            parts = [np.asanyarray(part) for part in source]
        for part in parts:
            if part.ndim != 1:
                raise ValueError(f"source holds an array of shape {part.shape}: need one axis, as reshape(-1) makes")
            if not np.issubdtype(part.dtype, np.integer):
                raise TypeError(f"source holds tokens of dtype {part.dtype}: need integers")
        total = sum(part.size for part in parts)
        if total < length + 1:
            held = (
                f"documents hold {total} tokens (BOS and EOS included)" if of_text else f"source holds {total} tokens"
            )
            raise ValueError(f"{held}: a window of length {length} with its targets needs {length + 1}")
        self.stream = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self.starts = np.cumsum([0] + [part.size for part in parts[:-1]]) if starts is None else np.asarray(starts)
        if starts is not None and (
            self.starts.ndim != 1
            or not np.issubdtype(self.starts.dtype, np.integer)
            or (np.diff(self.starts, prepend=0, append=total) < 0).any()
        ):
            raise ValueError(f"starts must be integers [documents] that increase, from 0 to {total} at most")
        if not self.starts.size or self.starts[0] > 0:  # what comes before the first start is a document too
            self.starts = np.concatenate([[0], self.starts]).astype(int)
        self._has_documents = of_text or starts is not None or not isinstance(source, np.ndarray | jax.Array)
        self._limit = 2**31 if vocabulary is None else vocabulary
        self._bytes = None if token_bytes is None else np.asarray(token_bytes).astype(np.uint8)
        self.digest = _digest(self.stream, b"" if of_text or not self._has_documents else self.starts.tobytes())

    def __len__(self) -> int:
        return (self.stream.size - 1) // self.length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.length
        stretch = np.asarray(self.stream[start : start + self.length + 1])
        outside = np.flatnonzero((stretch < 0) | (stretch >= self._limit))
        if outside.size:
            place = int(outside[0])
            raise ValueError(
                f"the token at {start + place} of the stream is {stretch[place]}: need tokens from 0 to "
                f"{self._limit - 1}"
            )
        stretch = stretch.astype(np.int32)
        tokens, targets = stretch[:-1], stretch[1:]
        window: Batch = {"tokens": tokens, "targets": targets, "weights": np.ones(self.length, np.float32)}
        if self._has_documents:
            places = start + np.arange(self.length + 1)
            documents = (np.searchsorted(self.starts, places, side="right") - 1).astype(np.int32)
            window["weights"] = (documents[1:] == documents[:-1]).astype(np.float32)
            window["documents"] = documents[:-1]
        if self._bytes is not None:
            if stretch.max() >= self._bytes.size:
                raise ValueError(f"token_bytes has {self._bytes.size} entries but there is a token {stretch.max()}")
            window["bytes"] = self._bytes[targets]
        return window

    def __repr__(self) -> str:
        # Grain prints its sources: a summary, not the stream.
        documents = f", from {self.starts.size} documents" if self._has_documents else ""
        return f"Windows({len(self)} of length {self.length}{documents})"


def _digest(stream: np.ndarray, more: bytes, limit: int = 2**28) -> str:
    """Returns the SHA-256 of a stream, or of 1024 pieces of it where it takes more than `limit` bytes."""
    content = hashlib.sha256()
    if stream.nbytes <= limit:
        content.update(np.ascontiguousarray(stream).data)
    else:
        content.update(f"{stream.dtype} {stream.size}".encode())
        piece = limit // 1024 // stream.itemsize
        for start in np.linspace(0, stream.size - piece, 1024).astype(int):
            content.update(np.ascontiguousarray(stream[start : start + piece]).data)
    content.update(more)
    return content.hexdigest()


@dataclass(frozen=True)
class Drawn:
    """Batches that are drawn and never repeat: `draw(key, rows)` makes one, a pytree of arrays `[rows, ...]`.

    In training `draw` runs inside the compiled step, so the data never leave the device. It must be a pure function.

    Attributes:
        draw: (key, rows) -> batch; for a curriculum (key, rows, step) -> batch.
        length: The number of tokens per row, by which speed is measured.
        digest: A description of the draws, in any words: a run is resumed only with a source that has the same.
        curriculum: Whether draws depend on the step, an int32 that may be traced. Validation is at the largest step
            there is, `LAST`: the end of the curriculum.
    """

    draw: Callable[..., Any]
    length: int
    digest: str
    curriculum: bool = False


# Of a seed's random numbers, those for drawing data: streams that no step, which counts from 0, can reach.
TRAINING, VALIDATION = 2**32 - 1, 2**32 - 2


# The step at which a curriculum is at its end.
LAST = 2**31 - 1


@partial(jax.jit, static_argnames=("source", "rows", "seed", "stream"))
def drawn_batch(source: Drawn, rows: int, seed: int, stream: int, number: Any) -> Any:
    """Returns batch `number` of a stream of a seed, which in training is that of step `number`."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)
    if not source.curriculum:
        return source.draw(key, rows)
    return source.draw(key, rows, number if stream == TRAINING else LAST)


def check_seed(seed: int) -> None:
    """Raises unless this is a seed that every generator of random numbers takes."""
    check_int("seed", seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: need one from 0 to 2**32 - 1")
