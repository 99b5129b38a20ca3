"""Published arrays into the parameters of a model, and back, by a table of names.

A table says for every published name which parameters its array holds, and in which layout. `*` in a name stands for
the number of a layer:

    {"transformer.h.*.attn.c_proj.weight": Row("layers.*.branches.0.module.out.kernel")}

Paths are attributes of the model. Layers of a `Transformer` are counted through all of its runs, as `layers.3`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxattn.models.transformer import Transformer


@dataclass(frozen=True)
class Layout:
    """How a published array holds parameters.

    Attributes:
        read: From the array to its parameters.
        write: From the parameters to the array, the inverse.
    """

    read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    write: Callable[..., np.ndarray]


PLAIN = Layout(lambda x: (x,), lambda x: x)
"""The array is the parameter."""

TRANSPOSED = Layout(lambda x: (x.T,), lambda x: x.T)
"""A map that is published as [out, in]."""

FIRST_ROW = Layout(lambda x: (x[0],), lambda x: x[None])
"""The array has one more axis, of size 1, before those of the parameter."""

CONVOLUTION = Layout(lambda x: (x.transpose(2, 1, 0),), lambda x: x.transpose(2, 1, 0))
"""A convolution over a line that is published as [out, in, width]."""


def columns(count: int) -> Layout:
    """The array has `count` parameters side by side in its last axis."""
    return Layout(lambda x: tuple(np.split(x, count, -1)), lambda *parts: np.concatenate(parts, -1))


@dataclass(frozen=True)
class Row:
    """Where an array goes.

    Attributes:
        paths: The parameters, such as `layers.*.branches.0.module.query.kernel`; one, or several in a tuple.
        layout: How the array holds them.
    """

    paths: str | tuple[str, ...]
    layout: Layout = PLAIN

    @property
    def all(self) -> tuple[str, ...]:
        """The parameters in a tuple."""
        return (self.paths,) if isinstance(self.paths, str) else self.paths


Table = dict[str, Row]


def linear(name: str, path: str, *, bias: bool = False) -> Table:
    """Returns the rows of a map whose published weight is [out, in]."""
    rows = {f"{name}.weight": Row(f"{path}.kernel", TRANSPOSED)}
    return rows | ({f"{name}.bias": Row(f"{path}.bias")} if bias else {})


def norm(name: str, path: str, *, bias: bool = False) -> Table:
    """Returns the rows of a norm."""
    rows = {f"{name}.weight": Row(f"{path}.scale")}
    return rows | ({f"{name}.bias": Row(f"{path}.bias")} if bias else {})


def assign(model: nnx.Module, weights: Mapping[str, Any], table: Table, ignored: Iterable[str] = ()) -> None:
    """Puts published arrays into the parameters of the model, in the dtypes of the parameters.

    Arrays are taken from `weights` one after the other and written where their parameter lies, so that beside the
    parameters there are only a few copies of one array, when `weights` reads files.

    Args:
        model: The model, which is changed. It may be without numbers yet, as `nnx.eval_shape` makes one.
        weights: Published name -> array.
        table: Where each goes.
        ignored: Patterns of published names that are no parameters, such as buffers.

    Raises:
        ValueError: There are names that the table does not have, parameters that no name fills, or arrays of another
            shape.
    """
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    by_layer = {path: _layers_of(model, ".".join(map(str, path))) for path in params}
    sources: dict[str, tuple[str, int, Layout]] = {}
    unused = []
    for name in weights:
        if any(_match(pattern, name) is not None for pattern in ignored):
            continue
        rows = [(row, number) for pattern, row in table.items() if (number := _match(pattern, name)) is not None]
        if not rows:
            unused.append(name)
        for row, number in rows:
            for index, path in enumerate(row.all):
                sources[path.replace("*", number)] = (name, index, row.layout)
    there = {path for paths in by_layer.values() for path in paths}
    unused += sorted({name for path, (name, *_) in sources.items() if path not in there})
    if unused or there - set(sources):
        raise ValueError(
            f"the weights do not fit the model: unused names {sorted(unused)}; parameters without weights "
            f"{sorted(there - set(sources))}"
        )

    def value(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name, index, layout = sources[path]
        array = layout.read(np.asarray(weights[name]))[index]
        if array.shape != shape:
            raise ValueError(
                f"the weights do not fit the model: {name} makes {array.shape} of {path}, which is {shape} in the model"
            )
        return array

    # The largest first, while there is room for the copies that are made when one is read.
    for keys, param in sorted(params.items(), key=lambda item: -math.prod(item[1].shape)):
        layers, filled = by_layer[keys], _empty(param.shape, param.dtype)
        if "runs" in keys:
            for layer, each in enumerate(layers):
                filled[layer] = value(each, param.shape[1:])
        else:
            filled[...] = value(layers[0], param.shape)
        param.set_value(jax.device_put(filled))
    nnx.update(model, nnx.from_flat_state(params))


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array without numbers, which begins where a CPU takes it over without a copy: at 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)


def published(model: nnx.Module, table: Table) -> dict[str, np.ndarray]:
    """Returns published name -> array of the parameters of a model: the inverse of `assign`.

    Raises:
        ValueError: A parameter has no row in the table, so that it would be lost.
    """
    params: dict[str, np.ndarray] = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        layers, array = _layers_of(model, ".".join(map(str, path))), np.asarray(param[...])
        params |= dict(zip(layers, array, strict=True)) if "runs" in path else {layers[0]: array}
    arrays, written = {}, set()
    for pattern, row in table.items():
        numbers = {_match(row.all[0], path) for path in params} - {None}
        for number in sorted(numbers, key=str):
            paths = [path.replace("*", str(number)) for path in row.all]
            arrays[pattern.replace("*", str(number))] = row.layout.write(*(params[path] for path in paths))
            written.update(paths)
    if lost := sorted(set(params) - written):
        raise ValueError(f"the table has no names for the parameters {lost}")
    return arrays


def _match(pattern: str, name: str) -> str | None:
    """Returns the number that `*` stands for, "" without one; None if the name is another."""
    found = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    return None if found is None else "".join(found.groups())


def _layers_of(model: Any, name: str) -> list[str]:
    """Returns the names by layer of a parameter of a run of layers; of another parameter its name."""
    found = re.fullmatch(r"((?:\w+\.)*?)runs\.(\d+)\.(.*)", name)
    if found is None:
        return [name]
    owner, run, rest = found.groups()
    transformer: Transformer = model
    for attribute in filter(None, owner.split(".")):
        transformer = getattr(transformer, attribute)
    first = sum(transformer.lengths[: int(run)])
    return [f"{owner}layers.{first + i}.{rest}" for i in range(transformer.lengths[int(run)])]
