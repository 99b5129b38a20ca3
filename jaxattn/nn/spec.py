"""A class or constructor with arguments, as data: a config holds specs, and modules build them when sizes are known."""

import dataclasses
import difflib
import inspect
import pkgutil
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx


class Spec:
    """`target(**arguments)`, to be built where the sizes are known. Frozen; it compares, hashes and prints as data.

        Spec(nn.NeuralScore, hidden=64)          # head_dim and rngs come from the attention that it stands in
        Spec(Alibi.geometric)                    # heads too

    Args:
        target: A class, or a function or class method that makes something, which can be imported by its name.
        arguments: Some of its arguments. Arrays are refused, since a config holds none.

    Raises:
        TypeError: The target cannot be called or imported, it does not have one of the arguments (the nearest name is
            suggested), or an argument holds an array.
    """

    target: Callable[..., Any]
    arguments: dict[str, Any]

    def __init__(self, target: Callable[..., Any], /, **arguments: Any):
        if not callable(target):
            raise TypeError(f"Spec: target must be a class or a function, got {target!r}")
        path = path_of(target)
        names = list(_parameters(target))
        arguments = {name: _frozen(value) for name, value in arguments.items()}
        for name, value in arguments.items():
            if name not in names and not _takes_any(target):
                near = difflib.get_close_matches(name, names, 1)
                hint = f": did you mean {near[0]!r}?" if near else f": need some of {names}"
                raise TypeError(f"Spec of {path} has an unknown argument {name!r}{hint}")
            if _holds_function(value):
                raise TypeError(
                    f"Spec of {path}: {name} holds a function or a class, which cannot be written as data: {value!r}; "
                    "need a part, or a Spec"
                )
            if any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value)):
                raise TypeError(f"Spec of {path}: {name} holds an array, and a config holds none: {value!r}")
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "arguments", arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Spec is frozen: need spec.replace({name}=...)")

    def build(self, **sizes: Any) -> Any:
        """Returns the result of the target.

        Args:
            sizes: The arguments that the place knows. The target gets those for which it has a parameter without a
                default, and `rngs` and `dtype`.

        Raises:
            TypeError: Neither the spec nor the place gives a parameter without a default.
        """
        given = dict(self.arguments)
        for name, parameter in _parameters(self.target).items():
            needed = parameter.default is inspect.Parameter.empty or name in ("rngs", "dtype")
            if name not in given and needed and name in sizes:
                given[name] = sizes[name]
            elif name not in given and parameter.default is inspect.Parameter.empty:
                raise TypeError(f"Spec of {path_of(self.target)} lacks {name!r}, which its place does not know")
        return self.target(**given)

    def replace(self, **arguments: Any) -> "Spec":
        """Returns the spec with other arguments."""
        return Spec(self.target, **(self.arguments | arguments))

    def _key(self) -> tuple[Any, ...]:
        return (path_of(self.target), *sorted(self.arguments.items(), key=lambda pair: pair[0]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        said = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        return f"Spec({path_of(self.target)}{said})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.target, dict(self.arguments))

    def __deepcopy__(self, memo: Any) -> "Spec":
        return self


def built(slot: Any, **sizes: Any) -> Any:
    """Returns the content of a slot: a spec is built, all else stays as it is."""
    return slot.build(**sizes) if isinstance(slot, Spec) else slot


def owned(slot: Any) -> Any:
    """Returns a slot as an attribute of a module: parts with arrays are data, so that NNX sees their leaves."""
    return slot if isinstance(slot, nnx.Module) else nnx.data(slot)


def part_of(slot: Any) -> Any:
    """Returns the part that stands in a slot: a module makes it when called."""
    return slot() if isinstance(slot, nnx.Module) else slot


def path_of(target: Callable[..., Any]) -> str:
    """Returns the dotted name under which the target is found.

    Raises:
        TypeError: The target has no such name.
    """
    owner = getattr(target, "__self__", None)
    name = f"{owner.__qualname__}.{target.__name__}" if isinstance(owner, type) else getattr(target, "__qualname__", "")
    path = f"{getattr(target, '__module__', '')}.{name}"
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found != target:
        raise TypeError(f"Spec: {target!r} cannot be imported as {path}: need a class or function of a module")
    return path


def from_plain(plain: Any) -> Any:
    """Returns the spec that `models.to_plain` made; parts of core among its arguments are made as they are.

    Raises:
        ValueError: `plain` does not have the form, a name or an argument is unknown, or the class is one of parts,
            which stand in a config as they are.
    """
    if isinstance(plain, Spec):
        return plain
    if not isinstance(plain, Mapping) or not set(plain) <= {"class_path", "init_args"} or "class_path" not in plain:
        raise ValueError(f"not a spec: need class_path and init_args, got {plain!r}")
    target = _found(plain["class_path"])
    if isinstance(target, type) and hasattr(target, "__dataclass_fields__"):
        raise ValueError(f"{plain['class_path']} is a class of parts, which need no spec")
    try:
        return Spec(target, **{name: _read(value) for name, value in (plain.get("init_args") or {}).items()})
    except TypeError as error:
        raise ValueError(str(error)) from None


def _read(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_read, value))
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        raise ValueError(f"not a spec, nor a part: need class_path and init_args, got {value!r}")
    target = _found(value["class_path"])
    if isinstance(target, type) and hasattr(target, "__dataclass_fields__"):
        return target(**{name: _read(x) for name, x in (value.get("init_args") or {}).items()})
    return from_plain(value)


def _found(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path {path!r} stands for nothing: {error}") from None


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters by name. Of an NNX class those of `__init__`: its metaclass hides them."""
    if isinstance(target, type):
        _, *rest = inspect.signature(target.__init__).parameters.items()  # type: ignore[misc]
        found = dict(rest)
    else:
        found = dict(inspect.signature(target).parameters)
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: parameter for name, parameter in found.items() if parameter.kind not in variadic}


def _takes_any(target: Callable[..., Any]) -> bool:
    signature = inspect.signature(target.__init__ if isinstance(target, type) else target)  # type: ignore[misc]
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values())


def _frozen(value: Any) -> Any:
    """Returns lists as tuples, and numbers of NumPy as numbers."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(_frozen(each) for each in value) if isinstance(value, list | tuple) else value


def _holds_function(value: Any) -> bool:
    """Returns whether there is a function or a class in a value, or in the fields of a part."""
    if isinstance(value, tuple):
        return any(map(_holds_function, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_holds_function(getattr(value, field.name)) for field in dataclasses.fields(value))
    return isinstance(value, type | types.FunctionType | types.MethodType | types.BuiltinFunctionType | partial)


def _remake(target: Callable[..., Any], arguments: dict[str, Any]) -> Spec:
    return Spec(target, **arguments)
