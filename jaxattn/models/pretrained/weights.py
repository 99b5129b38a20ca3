"""Published arrays into the parameters of a model, by a table of names.

A table says for every published name which parameters its array holds, and in which layout. `*` in a name stands for
the number of a layer:

    {"transformer.h.*.ln_1.weight": [To("layers.*.branches.0.norm.scale")]}

Paths are attributes of the model. Layers of a `Transformer` are counted through all of its runs, as `layers.3`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn.models.transformer import Transformer

Layout = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class To:
    """The place that an array goes to.

    Attributes:
        path: The parameter, such as `layers.*.branches.0.module.query.kernel`.
        layout: The function from the published array to that of the parameter.
    """

    path: str
    layout: Layout = np.asarray


Table = dict[str, list[To]]


def transposed(x: np.ndarray) -> np.ndarray:
    """Returns an array [out, in] as [in, out]."""
    return x.T


def part_of_columns(index: int, count: int) -> Layout:
    """Returns the layout that takes one of `count` equal parts of the last axis."""
    return lambda x: np.split(x, count, -1)[index]


def linear(name: str, path: str, *, bias: bool = False) -> dict[str, list[To]]:
    """Returns the rows of a table for a map whose published weight is [out, in]."""
    rows = {f"{name}.weight": [To(f"{path}.kernel", transposed)]}
    return rows | ({f"{name}.bias": [To(f"{path}.bias")]} if bias else {})


def norm(name: str, path: str, *, bias: bool = False) -> dict[str, list[To]]:
    """Returns the rows of a table for a norm."""
    rows = {f"{name}.weight": [To(f"{path}.scale")]}
    return rows | ({f"{name}.bias": [To(f"{path}.bias")]} if bias else {})


def assign(model: nnx.Module, weights: Mapping[str, Any], table: Table, ignored: Iterable[str] = ()) -> None:
    """Puts published arrays into the parameters of the model, in the dtypes of the parameters.

    Args:
        model: The model, which is changed.
        weights: Published name -> array.
        table: Published name -> the places of the array.
        ignored: Patterns of published names that are no parameters, such as buffers.

    Raises:
        ValueError: The table lacks a name, no name fills a parameter, or an array has another shape.
    """
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    unfilled = set(_paths(model, params))
    found: dict[str, np.ndarray] = {}
    unknown, wrong = [], []
    for name, array in weights.items():
        if any(_match(pattern, name) is not None for pattern in ignored):
            continue
        rows = [(each, number) for pattern, each in table.items() if (number := _match(pattern, name)) is not None]
        if not rows:
            unknown.append(name)
        for each, number in rows:
            for to in each:
                path = to.path.replace("*", number)
                found[path] = to.layout(np.asarray(array))
    shapes = _paths(model, params)
    for path, array in found.items():
        if path not in shapes:
            wrong.append(f"{path}: the model has no such parameter")
        elif shapes[path] != array.shape:
            wrong.append(f"{path}: {array.shape} was published, but the model has {shapes[path]}")
        unfilled.discard(path)
    if unknown or unfilled or wrong:
        raise ValueError(
            f"the weights do not fit the model: unused names {sorted(unknown)}; parameters without weights "
            f"{sorted(unfilled)}; other shapes {sorted(wrong)}"
        )
    for keys, param in params.items():
        name = ".".join(map(str, keys))
        layers = _layers_of(model, name)
        if layers is None:
            value: Any = found[name]
        else:
            value = np.stack([found[each] for each in layers])
        param[...] = jnp.asarray(value, param.dtype)
    nnx.update(model, nnx.from_flat_state(params))


def _match(pattern: str, name: str) -> str | None:
    """Returns the number that `*` stands for, "" without one; None if the name is another."""
    found = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    return None if found is None else "".join(found.groups())


def _layers_of(model: Any, name: str) -> list[str] | None:
    """Returns the names by layer of a parameter of a run of layers."""
    found = re.fullmatch(r"((?:\w+\.)*?)runs\.(\d+)\.(.*)", name)
    if found is None:
        return None
    owner, run, rest = found.groups()
    transformer: Transformer = model
    for attribute in filter(None, owner.split(".")):
        transformer = getattr(transformer, attribute)
    first = sum(transformer.lengths[: int(run)])
    return [f"{owner}layers.{first + i}.{rest}" for i in range(transformer.lengths[int(run)])]


def _paths(model: Any, params: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of all parameters, by layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, param in params.items():
        name = ".".join(map(str, path))
        layers = _layers_of(model, name)
        if layers is None:
            shapes[name] = param.shape
        else:
            shapes |= dict.fromkeys(layers, param.shape[1:])
    return shapes
