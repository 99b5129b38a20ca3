"""One HTML page of what attention does on a few texts: it opens from a file, and fetches nothing.

The page is put together from page.html, page.css and page.js beside this file. The numbers stand in it as JSON, in
which arrays are base64.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxattn.viz.figure import visible

LEVELS = 254  # steps between the smallest and the largest number of a row; code 255 is for what is not finite
MOST_COLUMNS = 2**16  # which two bytes can count
FEWEST = 4  # weights of a row that a page keeps at least


@dataclass(frozen=True)
class Lens:
    """The tokens that the residual stream would give after each layer, if it were read as the output.

    Attributes:
        tokens: [R, T, k], the k likeliest tokens in each row of the table, the likeliest first.
        probabilities: [R, T, k], theirs.
        rows: The names [R] of the rows; by default the numbers of the layers.
        ahead: How far ahead the tokens are that are predicted: 1 for a decoder, 0 for an encoder.
    """

    tokens: Sequence[Sequence[Sequence[str]]]
    probabilities: ArrayLike
    rows: Sequence[str] = ()
    ahead: int = 1


@dataclass(frozen=True)
class Example:
    """What a page shows of one text.

    Attributes:
        tokens: [T], those of the queries.
        weights: [L, N, T, S].
        key_tokens: [S], those of the keys where they are of another text (cross-attention).
        statistics: [L, N] by name, such as the entropy of each head.
        lens: The logit lens.
        queries: [L, N, T, H], as they are multiplied with keys (after rotary embeddings).
        keys: [L, K, S, H], with K a divisor of N.
        scale: The factor of q · k in the scores; by default 1 / √H.
        matrices: Any other matrices by name. Rows are labelled with tokens where there are T of them, columns where
            there are S.
        layers: The numbers [L] of the layers, where the arrays are of some of them.
        heads: The numbers [N] of the heads, where the arrays are of some of them.
    """

    tokens: Sequence[str]
    weights: ArrayLike
    key_tokens: Sequence[str] | None = None
    statistics: Mapping[str, ArrayLike] = field(default_factory=dict)
    lens: Lens | None = None
    queries: ArrayLike | None = None
    keys: ArrayLike | None = None
    scale: float | None = None
    matrices: Mapping[str, ArrayLike] = field(default_factory=dict)
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None


def page(examples: Mapping[str, Example], title: str = "Attention", largest: int = 5_000_000) -> str:
    """Returns a page in HTML: all heads, one head with lines between tokens, and what else the examples hold.

    The first weight of a row is kept as it is. Each other number x is kept as the nearest of 255 even steps between the
    smallest and the largest number of the rest of its row, 0 included, so within 1/508 of that range; for weights, that
    are not negative, within 1/508 of the row's maximum. If the page would be larger than `largest`, queries and keys
    are left out, and then all but the largest weights of each row: the page says so.

    Args:
        examples: What to show, by the name of the text.
        title: The title.
        largest: The number of bytes of the page at most.

    Raises:
        ValueError: Shapes do not fit, or the page would be larger with the fewest weights.
    """
    if not examples:
        raise ValueError("examples is empty: need at least one Example")
    for name, example in examples.items():
        _check(f"examples[{name!r}]", example)
    counts = [np.shape(example.weights)[-1] - 1 for example in examples.values()]
    # All weights; without queries and keys; and then ever fewer weights of each row.
    fewer = [k for k in (256, 128, 64, 48, 32, 24, 16, 12, 8, 6, FEWEST) if k < max(counts)]
    for most in (None, *fewer):
        for pairs in (True, False) if most is None else (False,):
            if _least(examples, most, pairs) <= largest:
                made = _filled(examples, title, most, pairs)
                if len(made.encode()) <= largest:
                    return made
    raise ValueError(f"the page would be larger than {largest} bytes: need fewer layers, heads, tokens or examples")


def _check(name: str, example: Example) -> None:
    """Raises ValueError if the shapes of an example do not fit."""
    shape = np.shape(example.weights)
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{name}.weights has shape {shape}: need [layers, heads, queries, keys], at least one of each")
    layers, heads, queries, keys = shape
    for argument, values in {"weights": example.weights, **example.matrices}.items():
        if np.shape(values)[-1:] > (MOST_COLUMNS,):
            raise ValueError(f"{name}: {argument!r} has {np.shape(values)[-1]} columns: need at most {MOST_COLUMNS}")
    if example.key_tokens is None and queries != keys:
        raise ValueError(f"{name}.key_tokens is None, but weights has {queries} queries and {keys} keys: need {keys}")
    for argument, given, count in (
        ("tokens", example.tokens, queries),
        ("key_tokens", example.key_tokens, keys),
        ("layers", example.layers, layers),
        ("heads", example.heads, heads),
    ):
        if given is not None and len(given) != count:
            raise ValueError(f"{name}.{argument} has {len(given)} entries: need {count}, as weights of shape {shape}")
    for statistic, values in example.statistics.items():
        if np.shape(values) != (layers, heads):
            raise ValueError(f"{name}.statistics[{statistic!r}] has shape {np.shape(values)}: need {(layers, heads)}")
    for matrix, values in example.matrices.items():
        if len(np.shape(values)) != 2 or 0 in np.shape(values):
            raise ValueError(f"{name}.matrices[{matrix!r}] has shape {np.shape(values)}: need [rows, columns]")
    if (example.queries is None) != (example.keys is None):
        raise ValueError(f"{name} has one of queries and keys: need both of them, or none")
    if example.queries is not None and example.keys is not None:
        of_query, of_key = np.shape(example.queries), np.shape(example.keys)
        fits = len(of_query) == len(of_key) == 4 and of_query[:3] == shape[:3] and of_key[1] and not heads % of_key[1]
        if not fits or (of_key[0], *of_key[2:]) != (layers, keys, of_query[3]):
            raise ValueError(
                f"{name}.queries has shape {of_query} and keys {of_key}: need [{layers}, {heads}, {queries}, channels] "
                f"and [{layers}, a divisor of {heads}, {keys}, channels]"
            )
    if example.lens is not None:
        probabilities, rows = np.shape(example.lens.probabilities), example.lens.rows
        tokens = {(len(example.lens.tokens), len(row), len(best)) for row in example.lens.tokens for best in row}
        expected = (len(rows) or layers, queries)
        if len(probabilities) != 3 or probabilities[:2] != expected or tokens != {probabilities}:
            raise ValueError(
                f"{name}.lens has tokens of shapes {sorted(tokens)} and probabilities of {probabilities}: need "
                f"[{expected[0]}, {expected[1]}, k] of both"
            )


def _least(examples: Mapping[str, Example], most: int | None, pairs: bool) -> int:
    """Returns a bound from below on the bytes of a page, to pack only what may fit."""
    size = 0
    for example in examples.values():
        if pairs and example.queries is not None and example.keys is not None:
            size += 4 * (np.size(example.queries) + np.size(example.keys))
        *_, keys = shape = np.shape(example.weights)
        rows = int(np.prod(shape[:-1]))
        size += rows * (10 if most is None else 10 + 3 * min(most, (keys - 1) // 2))  # of a causal mask, half
    return size * 4 // 3


def _filled(examples: Mapping[str, Example], title: str, most: int | None, pairs: bool) -> str:
    """Returns the page with `most` weights of each row, and with queries and keys or without."""
    data = {"examples": [_payload(name, example, most, pairs) for name, example in examples.items()]}
    # Nothing ends the script early, and no text is taken for an address.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for letters in ("<", ">", "&", "http"):
        text = text.replace(letters, f"\\u{ord(letters[0]):04x}{letters[1:]}")
    parts = {
        kind: (files("jaxattn.viz") / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    }
    heading = html.escape(title).replace("http", "&#104;ttp")
    return Template(parts["html"]).substitute(title=heading, style=parts["css"], script=parts["js"], data=text)


def _payload(name: str, example: Example, most: int | None, pairs: bool) -> dict[str, Any]:
    """Returns an example as data for JSON."""
    weights = np.asarray(example.weights)
    layers, heads, _, keys = weights.shape
    packed, kept = _packed(weights, most)
    notes = []
    if most is not None and most < keys - 1:
        notes.append(
            f"To keep the page small, only the first weight of each row and the {most} largest others are kept. They "
            f"hold {kept.mean():.1%} of a row's total on average, and {kept.min():.1%} at the least."
        )
    found: dict[str, Any] = {
        "name": name,
        "tokens": [visible(token) for token in example.tokens],
        "weights": packed,
        "layers": [int(layer) for layer in (range(layers) if example.layers is None else example.layers)],
        "heads": [int(head) for head in (range(heads) if example.heads is None else example.heads)],
        "statistics": [{"name": each, "values": _rounded(values)} for each, values in example.statistics.items()],
        "lens": None,
        "matrices": [
            {"name": each, "values": _packed(np.asarray(values), None)[0]} for each, values in example.matrices.items()
        ],
        "notes": notes,
    }
    if example.key_tokens is not None:
        found["key_tokens"] = [visible(token) for token in example.key_tokens]
    if example.queries is not None and example.keys is not None:
        query, key = (np.asarray(x, "<f4") for x in (example.queries, example.keys))
        if pairs:
            scale = query.shape[-1] ** -0.5 if example.scale is None else float(example.scale)
            found |= {"queries": _base64(query), "keys": _base64(key), "scale": scale}
            found |= {"channels": query.shape[-1], "key_heads": key.shape[1]}
        else:
            notes.append("To keep the page small, queries and keys are left out.")
    if example.lens is not None:
        lens, names = example.lens, example.lens.rows or [f"layer {layer}" for layer in found["layers"]]
        found["lens"] = {
            "rows": list(names),
            "ahead": lens.ahead,
            "tokens": [[[visible(token) for token in best] for best in row] for row in lens.tokens],
            "probabilities": _rounded(lens.probabilities),
        }
    return found


def _packed(values: np.ndarray, most: int | None) -> tuple[dict[str, Any], np.ndarray]:
    """Returns rows of numbers as data for JSON, and the share of each row's total that is kept.

    Args:
        values: [..., R, C].
        most: How many numbers of a row to keep beside the first; all if None.
    """
    rows = values.reshape(-1, values.shape[-1])
    parts: dict[str, list[np.ndarray]] = {}
    step = max(1, 2**22 // rows.shape[1])
    for begin in range(0, len(rows), step):
        for name, part in _packed_rows(np.asarray(rows[begin : begin + step], np.float32), most).items():
            parts.setdefault(name, []).append(part)
    joined = {name: np.concatenate(part) for name, part in parts.items()}
    kept = joined.pop("kept")
    if not joined["low"].any():
        del joined["low"]
    return {"shape": values.shape, **{name: _base64(part) for name, part in joined.items()}}, kept


def _packed_rows(rows: np.ndarray, most: int | None) -> dict[str, np.ndarray]:
    """Returns the arrays of `_packed`, of as many rows as fit into memory at a time.

    `first` is the first column. The rest of row r has `length[r]` codes, from column 1 + `start[r]` on or at the
    columns 1 + `index`; code c stands for low + c · (high − low) / 254, and 255 for a number that is not finite.
    """
    first, rest = rows[:, 0], rows[:, 1:]
    finite = np.isfinite(rest)
    low, high = (f(np.where(finite, rest, 0), 1, initial=0) for f in (np.min, np.max))
    step = (high.astype(np.float64) - low) / LEVELS
    codes = np.where(finite, (rest - low[:, None]) / np.where(step > 0, step, 1)[:, None], 255)
    codes = np.rint(codes).astype(np.uint8)
    kept = rest != 0
    found = {"first": first.astype("<f4"), "low": low.astype("<f4"), "high": high.astype("<f4")}
    size = np.where(finite, np.abs(rest), np.inf)
    if most is not None and most < rest.shape[1]:
        chosen = np.argpartition(-size, most - 1, 1)[:, :most]
        largest = np.zeros(rest.shape, bool)
        np.put_along_axis(largest, chosen, True, 1)
        kept &= largest
        found |= {"index": np.nonzero(kept)[1].astype("<u2")}
    else:
        after = np.maximum.accumulate(kept, 1)
        before = np.maximum.accumulate(kept[:, ::-1], 1)[:, ::-1]
        kept = after & before
        found |= {"start": kept.argmax(1).astype("<u2") if kept.shape[1] else np.zeros(len(rows), "<u2")}
    sizes = np.where(finite, size, 0)
    total = np.abs(np.where(np.isfinite(first), first, 0)) + sizes.sum(1)
    share = np.where(total > 0, 1 - np.where(kept, 0, sizes).sum(1) / np.where(total > 0, total, 1), 1)
    return found | {"length": kept.sum(1).astype("<u2"), "codes": codes[kept], "kept": share}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _rounded(values: ArrayLike) -> Any:
    """Returns numbers as lists for JSON, with 5 digits, and None for what is not finite."""
    array = np.asarray(values, np.float64)
    if array.ndim:
        return [_rounded(row) for row in array]
    return float(f"{array:.5g}") if np.isfinite(array) else None
