"""Where batches come from: whatever can be indexed or iterated over, in batches that a run can resume.

A source is one of

- a source by index: anything with a length and `source[i]`, such as `Windows`, a list of records, a data set of
  Hugging Face, or a dict of arrays with rows. Each pass over it has a new shuffled order, a function of the seed alone.
- a pipeline of grain, `MapDataset` or `IterDataset`: its order, its repeats and its threads are those that it says.
- anything else that can be iterated over. An iterator with `get_state` and `set_state` resumes where it was; of any
  other a resumed run reads and drops, with a warning, the records that were used before.
- `Drawn`: batches that are drawn inside the step.

Its records are dicts of numbers and arrays, or other pytrees of them. All have one structure and one shape, that of one
row; `Batched` is for sources whose records are whole batches. A resumed run knows a source by its `digest`, a string,
or else by the length and three records of a source by index: one whose records are random has to have a `digest`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from grain import experimental

from jaxattn.core.checks import check_int
from jaxattn.train.data import VALIDATION, Drawn, check_seed, drawn_batch

_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True)
class Batched:
    """A source that makes whole batches, pytrees of arrays `[batch_size, ...]`, such as the loader of another library.

    Attributes:
        source: A pipeline, or anything else that can be iterated over.
    """

    source: Any


def batches(source: Any, batch_size: int, seed: int = 0, rows: np.ndarray | None = None) -> grain.DatasetIterator[Any]:
    """Returns an iterator over batches, which are dicts (or other pytrees) of arrays `[B, ...]`.

    Over a source by index it is endless. `get_state()` of the iterator is a small dict that JSON can hold, and
    `set_state(...)` continues from there exactly. Batches are made in the calling thread, unless a pipeline says
    otherwise.

    Args:
        source: Any source but `Drawn`.
        batch_size: B, at least 1.
        seed: From 0 to 2³² − 1. It orders a source by index, and no other.
        rows: Which rows of each batch to make, in increasing order; all by default. Of a source by index no others are
            read, of what is iterated over they are dropped. The state of the iterator is the same for any.

    Raises:
        TypeError: It is no source.
        ValueError: The batch size is below 1, the seed is out of range, or a source by index is empty. When read, a
            record is no row of numbers, or not of the shape of the others.
    """
    check_batch_size(batch_size)
    check_seed(seed)
    if isinstance(source, Batched):
        return iter(_stream(source.source).map(lambda batch: _taken(_whole(batch, batch_size), rows)))
    if isinstance(source, grain.MapDataset | grain.IterDataset) or not _by_index(source):
        stack = _stack if rows is None else lambda records: _stack([records[row] for row in rows])
        return iter(_stream(source).map(_record).batch(batch_size, drop_remainder=True, batch_fn=stack))
    check_source("train_data", source)
    dataset = grain.MapDataset.source(_rows(source)).seed(seed).shuffle().repeat()
    if rows is not None:
        dataset, batch_size = _RowsOf(dataset, batch_size, rows), len(rows)
    return iter(dataset.map(_record).batch(batch_size, batch_fn=_stack).to_iter_dataset(_READ))


class _RowsOf(grain.MapDataset):
    """The records of some rows of each batch, one after the other."""

    def __init__(self, records: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(records)
        self.batch_size, self.rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self.batch_size * len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self.rows))
        return self._parent[batch * self.batch_size + int(self.rows[row])]


def _taken(batch: Any, rows: np.ndarray | None) -> Any:
    return batch if rows is None else jax.tree.map(lambda array: np.asarray(array)[rows], batch)


def ordered_batches(
    source: Any,
    batch_size: int,
    limit: int | None = None,
    multiple: int = 1,
    rows_of: Callable[[int], np.ndarray] | None = None,
) -> Iterator[Any]:
    """Iterates over one ordered pass for validation, in batches `[B, ...]`.

    The last batch of a source by index is filled up with repeats of its last row whose `weights` are 0: they count for
    nothing in a weighted sum. Where records have no `weights` it has fewer rows, as many as `multiple` divides. Of what
    is iterated over, a last batch that is not full is left out. Of a `Drawn` source the batches are the first `limit`
    of a fixed sequence, the same in every run.

    Args:
        source: Any source that can be read again from its beginning.
        batch_size: B, at least 1.
        limit: The largest number of batches: of a source by index spread evenly over it, of others the first. None
            takes all.
        multiple: The number of devices that share the rows of a batch.
        rows_of: rows_of(size): which rows of a batch of so many to make, in increasing order; all by default.

    Raises:
        TypeError: It is no source.
        ValueError: The batch size or the limit is below 1, there is nothing to read, a drawn source has no limit, or an
            iterator can be read only once.
    """
    check_batch_size(batch_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: need at least 1 batch, or None for all")
    if isinstance(source, Drawn):
        if limit is None:
            raise ValueError("limit is None but batches are drawn without end: need a number of batches")
        mine = None if rows_of is None else rows_of(batch_size)
        return (_taken(drawn_batch(source, batch_size, 0, VALIDATION, i), mine) for i in range(limit))
    check_source("validation_data", source)
    if isinstance(source, Batched) or not _by_index(source) or isinstance(source, grain.MapDataset):
        if isinstance(source.source if isinstance(source, Batched) else source, Iterator):
            raise ValueError("validation_data is an iterator, which can be read once: need what iter() begins anew")
        found = batches(source, batch_size, rows=None if rows_of is None else rows_of(batch_size))
        return found if limit is None else (batch for batch, _ in zip(found, range(limit), strict=False))
    rows = _rows(source)
    count = len(rows) if limit is None else min(len(rows), limit * batch_size)
    chosen = [i * len(rows) // count for i in range(count)]
    return _ordered_batches(rows, batch_size, chosen, multiple, rows_of or np.arange)


def _ordered_batches(
    source: Any, batch_size: int, indices: list[int], multiple: int, rows_of: Callable[[int], np.ndarray]
) -> Iterator[Any]:
    for first in range(0, len(indices), batch_size):
        chosen = indices[first : first + batch_size]
        counted = len(chosen)
        if counted < batch_size:
            last = _record(source[chosen[-1]])
            if isinstance(last, Mapping) and "weights" in last:
                chosen = chosen + chosen[-1:] * (batch_size - counted)
            else:
                counted = counted // multiple * multiple
                chosen = chosen[:counted]
        if not chosen:
            continue
        mine = rows_of(len(chosen))
        rows = [_record(source[chosen[i]]) for i in mine]
        yield _stack(
            [
                row if i < counted else {**row, "weights": np.zeros_like(row["weights"])}
                for i, row in zip(mine, rows, strict=True)
            ]
        )


def packed(source: Any, length: int, *, bins: int = 64) -> grain.IterDataset:
    """Returns rows of `length` tokens in which records stand side by side, whole where they fit: a pipeline of grain.

    A record is a sequence of integers `[n]`, the tokens of one document, or a dict with `tokens`, and perhaps
    `targets`, `weights` and `bytes`, all `[n]`. Without `targets` these are the next tokens, and the last token has
    none. A record that is longer than a row is cut. Rows are dicts of arrays `[length]` as `Windows` makes them.
    Padding is in document −1 with weight 0.

    Records go into the first of `bins` rows that has room (grain's `FirstFitPackIterDataset`). Beside `Windows`, which
    cuts documents anywhere and pads nothing, this is for examples that have to be whole.

    Args:
        source: Any source but `Drawn` and `Batched`, in its own order: shuffle and repeat it first, as in
            `grain.MapDataset.source(records).shuffle(seed=0).repeat()`.
        length: The length of rows, at least 1.
        bins: The number of rows that are filled at a time: more of them leave less padding.

    Raises:
        TypeError: It is no source.
        ValueError: A size is below 1. When read, a record has no tokens or columns of several lengths.
    """
    for name, value in (("length", length), ("bins", bins)):
        check_int(name, value)
        if value < 1:
            raise ValueError(f"{name} is {value}: need at least 1")
    if _by_index(source) and not isinstance(source, grain.MapDataset):
        source = grain.MapDataset.source(_rows(source))
    pieces = experimental.FlatMapIterDataset(_stream(source), _Cut(length))

    def row(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        documents = found["tokens_segment_ids"].astype(np.int32) - 1
        return {name: found[name] for name in _PACKED if name in found} | {"documents": documents}

    class _Packed(grain.IterDataset):
        """Packs the columns that the first piece has: grain wants their names before."""

        def __iter__(self) -> grain.DatasetIterator[Any]:
            names = next(iter(pieces), {"tokens": None})
            packs = experimental.FirstFitPackIterDataset(
                pieces, length_struct=dict.fromkeys(names, length), num_packing_bins=bins, shuffle_bins=False
            )
            return iter(packs.map(row))

    return _Packed()


_PACKED = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "bytes": np.uint8}


class _Cut(experimental.FlatMapTransform):
    """Makes pieces of at most `length` tokens of a record, with the target of each."""

    def __init__(self, length: int):
        self.length = length

    def flat_map(self, record: Any) -> Sequence[Any]:
        record = dict(record) if isinstance(record, Mapping) else {"tokens": record}
        if "tokens" not in record:
            raise ValueError(f"a record has no 'tokens', but {', '.join(map(repr, record)) or 'nothing'}")
        if unknown := sorted(record.keys() - _PACKED.keys()):
            raise ValueError(f"a record has the columns {unknown}: need some of {list(_PACKED)} alone")
        columns = {name: np.asarray(value) for name, value in record.items()}
        tokens = columns["tokens"]
        if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"a record has tokens of dtype {tokens.dtype}: need integers")
        lengths = {name: value.shape for name, value in columns.items()}
        if len(set(lengths.values())) > 1 or tokens.ndim != 1:
            raise ValueError(f"the columns of a record have the shapes {lengths}: need one length for all")
        if "targets" not in columns:
            # What belongs to a target moves with it.
            moved = {name: value[1:] for name, value in columns.items() if name != "tokens"}
            columns = {"tokens": tokens[:-1], "targets": tokens[1:], **moved}
        columns = {name: value.astype(_PACKED[name]) for name, value in columns.items()}
        columns.setdefault("weights", np.ones(columns["tokens"].shape, np.float32))
        starts = range(0, len(columns["tokens"]), self.length)
        return [{name: value[i : i + self.length] for name, value in columns.items()} for i in starts]


def check_source(name: str, source: Any) -> None:
    """Raises TypeError unless this is a source, and ValueError if it is known to be empty."""
    if isinstance(source, Drawn):
        return
    if isinstance(source, np.ndarray | jax.Array):
        shape = np.shape(source)
        raise TypeError(
            f"{name} is an array of shape {shape}: need named columns, as in {{'tokens': array}}, or for one stream of "
            "tokens Windows(array, length)"
        )
    source = source.source if isinstance(source, Batched) else source
    if not (_by_index(source) or isinstance(source, Iterable | Iterator)):
        raise TypeError(f"{name} is a {type(source).__name__}: need what has a length and records, or iter()")
    if _by_index(source) and not len(_rows(source)):
        raise ValueError(f"{name} is empty: need at least one record")


def described(source: Any) -> str:
    """Returns what tells a source from another when a run is resumed.

    That is its `digest`; or the length and a SHA-256 of three records of a source by index, first, middle and last. Of
    what is iterated over nothing is known.
    """
    if isinstance(source, Batched):
        return f"batches of {described(source.source)}"
    if isinstance(digest := getattr(source, "digest", None), str):
        return digest
    if not _by_index(source):
        return "iterated"
    rows, content = _rows(source), hashlib.sha256()
    for index in sorted({0, len(rows) // 2, len(rows) - 1}):
        # A pipeline may drop records, and repeat others without end.
        record = rows[index] if len(rows) < sys.maxsize or index == 0 else None
        for leaf in jax.tree.leaves(record):
            content.update(np.asarray(leaf).tobytes())
    return f"{len(rows)} records {content.hexdigest()[:16]}"


def check_batch_size(batch_size: int) -> None:
    """Raises unless this is a number of rows."""
    check_int("batch_size", batch_size)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: need at least 1 window per batch")


def _by_index(source: Any) -> bool:
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


class _Columns:
    """The records of a dict of arrays with rows."""

    def __init__(self, columns: Mapping[str, Any]):
        sizes = {name: np.shape(array)[:1] for name, array in columns.items()}
        if len(set(sizes.values())) != 1 or () in sizes.values():
            raise ValueError(f"the columns of a source have the numbers of rows {sizes}: need one number for all")
        self.columns, (self.size,) = columns, next(iter(sizes.values()))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self.columns.items()}

    def __repr__(self) -> str:
        return f"{len(self)} rows of {', '.join(self.columns)}"


def _rows(source: Any) -> Any:
    return _Columns(source) if isinstance(source, Mapping) and source else source


def _stream(source: Any) -> grain.IterDataset:
    """Returns whatever can be iterated over as a pipeline."""
    if isinstance(source, grain.MapDataset):
        return source.to_iter_dataset(_READ)
    return source if isinstance(source, grain.IterDataset) else _Iterated(source)


class _Iterated(grain.IterDataset):
    """What can be iterated over, as a pipeline."""

    def __init__(self, source: Any):
        super().__init__()
        self.source = source

    def __iter__(self) -> grain.DatasetIterator[Any]:
        return _Iterating(iter(self.source))


class _Iterating(grain.DatasetIterator):
    """An iterator as grain's: by its own state if it has one, else by the number of records that were taken."""

    def __init__(self, iterator: Any):
        super().__init__()
        self.iterator, self.taken = iterator, 0

    def __next__(self) -> Any:
        record = next(self.iterator)
        self.taken += 1
        return record

    def get_state(self) -> dict[str, Any]:
        if not hasattr(self.iterator, "get_state"):
            return {"taken": self.taken}
        state = self.iterator.get_state()
        if isinstance(state, bytes):  # grain's DataLoader
            return {"text": state.decode()}
        try:
            json.dumps(state)
        except TypeError as error:
            raise TypeError(f"the state of the iterator of train_data is not JSON: {error}") from None
        return {"state": state}

    def set_state(self, state: dict[str, Any]) -> None:
        if "taken" not in state:
            self.iterator.set_state(state["text"].encode() if "text" in state else state["state"])
            return
        if state["taken"] < self.taken:
            raise ValueError(f"the iterator is past record {state['taken']}: need a new one")
        if skipped := state["taken"] - self.taken:
            message = f"train_data has no get_state: {skipped} records that the run has used are read again and dropped"
            warnings.warn(message, stacklevel=2)
        for _ in range(skipped):
            if next(self, self) is self:
                raise ValueError(f"train_data ends at record {self.taken}, but the run has used {state['taken']}")


def _record(record: Any) -> Any:
    """Returns a record whose leaves are arrays of numbers. Lists of numbers are arrays."""
    if isinstance(record, Mapping):
        return {name: _column(name, value) for name, value in record.items()}
    if isinstance(record, tuple) and record:
        return jax.tree.map(np.asarray, record)
    raise ValueError(
        f"a record is a {type(record).__name__}: need a dict of numbers and arrays, such as {{'tokens': [T]}}"
    )


def _column(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{inner}": _column(f"{name}.{inner}", each) for inner, each in value.items()}
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"column {name!r} of a record is no array: {error}") from None
    if not (np.issubdtype(array.dtype, np.number) or array.dtype.kind in "bV"):  # V: bfloat16 and its kin
        raise ValueError(
            f"column {name!r} of a record has dtype {array.dtype}: need numbers; drop it, or make it tokens"
        )
    return array


def _stack(rows: Sequence[Any]) -> Any:
    """Returns the batch of rows."""
    try:
        return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
    except ValueError:
        _check_alike(rows)
        raise


def _check_alike(rows: Sequence[Any]) -> None:
    """Raises ValueError that says in what rows differ."""
    first, structure = jax.tree.flatten_with_path(rows[0])
    for row in rows[1:]:
        leaves, other = jax.tree.flatten_with_path(row)
        if str(other) != str(structure):
            raise ValueError(f"records have the structures {structure} and {other}: need one")
        for (path, leaf), (_, one) in zip(leaves, first, strict=True):
            if leaf.shape != one.shape:
                raise ValueError(
                    f"records have {jax.tree_util.keystr(path)} of the shapes {one.shape} and {leaf.shape}: need one "
                    "for all; pad them, or pack them with train.packed"
                )


def _whole(batch: Any, batch_size: int) -> Any:
    """Returns a batch that came whole."""
    batch = _record(batch)
    for path, leaf in jax.tree.leaves_with_path(batch):
        if leaf.shape[:1] != (batch_size,):
            raise ValueError(
                f"a batch has {jax.tree_util.keystr(path)} of shape {leaf.shape}: need {batch_size} rows (batch_size)"
            )
    return batch
