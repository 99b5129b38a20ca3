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


def shaped(published: tuple[int, ...], ours: tuple[int, ...]) -> Layout:
    """The array has the numbers of the parameter in another shape; of a third shape it stays, to be refused."""
    return Layout(lambda x: (x.reshape(ours) if x.shape == published else x,), lambda x: x.reshape(published))


CONVOLUTION = Layout(lambda x: (x.transpose(2, 1, 0),), lambda x: x.transpose(2, 1, 0))
"""A convolution over a line that is published as [out, in, width]."""


def columns(count: int) -> Layout:
    """The array has `count` parameters side by side in its last axis."""
    return Layout(lambda x: tuple(np.split(x, count, -1)), lambda *parts: np.concatenate(parts, -1))


def stacked(*sizes: int) -> Layout:
    """The array has maps or biases of these sizes one below the other in its first axis; maps are [out, in]."""
    places = np.cumsum(sizes)[:-1]
    return Layout(
        lambda x: tuple(part.T for part in np.split(x, places)), lambda *parts: np.concatenate([x.T for x in parts])
    )


@dataclass(frozen=True)
class Row:
    """Where an array goes.

    Attributes:
        paths: The parameters, such as `layers.*.branches.0.module.query.kernel`; one, or several in a tuple.
        layout: How the array holds them.
        copy: Whether another row has the same parameters, as that of a tied embedding. A file may hold either name, or
            both with the same numbers; the name of the copy is not written.
    """

    paths: str | tuple[str, ...]
    layout: Layout = PLAIN
    copy: bool = False

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
        ignored: Patterns of published names that are no parameters, such as buffers; names of the table are used all
            the same.

    Raises:
        ValueError: There are names that the table does not have, parameters that no name fills, arrays of another
            shape, or copies that differ.
    """
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    by_layer = {path: _names_of(model, path, param.shape) for path, param in params.items()}
    sources: dict[str, list[tuple[bool, str, int, Layout]]] = {}  # of each parameter; copies come last
    unused = []
    for name in weights:
        rows = [(row, number) for pattern, row in table.items() if (number := _match(pattern, name)) is not None]
        if not rows and all(_match(pattern, name) is None for pattern in ignored):
            unused.append(name)
        for row, number in rows:
            for index, path in enumerate(row.all):
                found = sources.setdefault(path.replace("*", number), [])
                found.insert(len(found) if row.copy else 0, (row.copy, name, index, row.layout))
    there = {path for paths in by_layer.values() for path in paths}
    unused += sorted({name for path, found in sources.items() if path not in there for _, name, *_ in found})
    if unused or there - set(sources):
        raise ValueError(
            f"the weights do not fit the model: unused names {sorted(unused)}; parameters without weights "
            f"{sorted(there - set(sources))}"
        )

    def value(path: str, shape: tuple[int, ...]) -> np.ndarray:
        arrays = [layout.read(np.asarray(weights[name]))[index] for _, name, index, layout in sources[path]]
        names = [name for _, name, *_ in sources[path]]
        if arrays[0].shape != shape:
            raise ValueError(
                f"the weights do not fit the model: {names[0]} makes {arrays[0].shape} of {path}, which is {shape} in "
                "the model"
            )
        for name, array in zip(names, arrays, strict=True):
            if not np.array_equal(array, arrays[0]):
                raise ValueError(
                    f"the weights do not fit the model: {name} differs from {names[0]}, but by the config both are "
                    f"{path} (tied)"
                )
        return arrays[0]

    # The largest first, while there is room for the copies that are made when one is read.
    for keys, param in sorted(params.items(), key=lambda item: -math.prod(item[1].shape)):
        names, filled = by_layer[keys], _empty(param.shape, param.dtype)
        if names == [_joined(keys)]:
            filled[...] = value(names[0], param.shape)
        else:
            for layer, each in enumerate(names):
                filled[layer] = value(each, param.shape[1:])
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
        names, array = _names_of(model, path, param.shape), np.asarray(param[...])
        params |= {names[0]: array} if names == [_joined(path)] else dict(zip(names, array, strict=True))
    arrays, written = {}, set()
    for pattern, row in table.items():
        if row.copy:
            continue
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


def _names_of(model: Any, path: tuple[Any, ...], shape: tuple[int, ...]) -> list[str]:
    """Returns the names by layer of a parameter of a run of layers; of another parameter its name."""
    module = model
    for place, key in enumerate(path):
        if isinstance(module, Transformer) and key == "runs":
            run, *rest = path[place + 1 :]
            first = sum(module.lengths[:run])
            return [_joined((*path[:place], "layers", first + i, *rest)) for i in range(shape[0])]
        module = getattr(module, key) if isinstance(key, str) and hasattr(module, key) else module[key]
    return [_joined(path)]


def _joined(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))
