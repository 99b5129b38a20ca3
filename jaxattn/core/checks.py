"""Checks of arguments. Each raises one error that names the argument, the value that was given and a right one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

MOST = 2**30  # so that the sum of two of these, or of one and a position, fits an int32


def check_int(name: str, value: Any) -> None:
    """Raises TypeError for a value that is not an int of Python or of NumPy; a bool is refused."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_static_int(owner: str, name: str, value: Any, least: int) -> None:
    """Raises unless `value` is an int from `least` to `MOST`; for the `__post_init__` of parts."""
    check_int(f"{owner}: {name}", value)
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")
    if value > MOST:
        raise ValueError(f"{owner}: {name} must be at most 2**30, got {value}")


def check_positive(owner: str, name: str, value: Any) -> None:
    """Raises ValueError for a Python number that is not positive, TypeError for anything but numbers, arrays and None.

    The numbers in arrays are not checked.
    """
    if isinstance(value, int | float | np.number) and not value > 0:
        raise ValueError(f"{owner}: {name} must be positive, got {value}")
    if value is not None and not isinstance(value, int | float) and not hasattr(value, "dtype"):
        raise TypeError(f"{owner}: {name} must be a number or an array, got {value!r}")


def check_all_positive(owner: str, name: str, value: Any) -> None:
    """Checks as `check_positive`; also raises ValueError for arrays whose numbers are known and not all positive."""
    if not isinstance(value, np.number):
        check_positive(owner, name, value)
    check_range(f"{owner}: {name}", value, lambda x: x > 0, "above 0")


def count_ids(owner: str, ids: Any, size: int | None) -> int:
    """Returns `size`, or if it is None one more than the largest of the ids, for the `__post_init__` of parts.

    Raises:
        ValueError: The ids are traced, and so unknown, or the size is not at least 1.
    """
    if size is None:
        if isinstance(ids, jax.core.Tracer):
            raise ValueError(f"{owner}: groups is traced, so their number is not known: need size=")
        size = int(np.max(np.asarray(ids), initial=0)) + 1
    check_static_int(owner, "size", size, 1)
    return size


def positions_fit(positions: tuple[int, ...], batch: tuple[int, ...], length: int) -> bool:
    """Returns whether positions of this shape are [..., length] with batch axes that broadcast to `batch`."""
    pairs = zip(positions[-2::-1], batch[::-1], strict=False)
    return len(positions) <= len(batch) + 1 and positions[-1:] == (length,) and all(a in (1, b) for a, b in pairs)


def check_segments(segment_ids: Any, shape: tuple[int, ...]) -> None:
    """Raises unless these are integers that broadcast to `shape`, [..., T], and do not decrease along T where known."""
    if not hasattr(segment_ids, "shape"):
        raise TypeError(f"segment_ids must be an array, got {type(segment_ids).__name__}")
    if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {jnp.result_type(segment_ids)}")
    if not positions_fit(tuple(segment_ids.shape), tuple(shape[:-1]), shape[-1]):
        raise ValueError(f"segment_ids has shape {segment_ids.shape}: need [..., {shape[-1]}] that fits {shape}")
    if isinstance(segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(segment_ids)
    if (ids[..., 1:] < ids[..., :-1]).any():
        raise ValueError("segment_ids decreases along the tokens: need segments one after the other")


def check_array(name: str, x: Any) -> None:
    """Raises TypeError for values that hold no numbers: lists, strings, and shapes without an array."""
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(f"{name} is a ShapeDtypeStruct, which holds no numbers: need an array, or jax.eval_shape")
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")


def as_ids(x: Any) -> Int[Array, "..."]:
    """Returns integers in at least 32 bits, where a comparison with a size does not wrap. In 8 bits 258 is 2."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.int32))


def check_floating(name: str, x: Any) -> None:
    """Raises TypeError for a value that is not an array of floating-point numbers."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}: need floating point")


def check_tokens(name: str, x: Any) -> None:
    """Raises unless these are floating point, [..., length, heads, channels]."""
    check_floating(name, x)
    if len(x.shape) < 3 or 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}: need [..., length, heads, channels], none of them empty")


def check_range(name: str, x: Any, allowed: Callable[[np.ndarray], np.ndarray], wanted: str) -> None:
    """Raises ValueError where the numbers are known and not all allowed."""
    if x is None or isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    numbers = np.asarray(x)
    if not (fine := allowed(numbers)).all():
        raise ValueError(f"{name} holds {numbers[~fine].ravel()[0]}: need numbers {wanted}")


def check_probability(name: str, x: Any) -> None:
    """Raises ValueError where the numbers are known and not all from 0 to 1."""
    check_range(name, x, lambda p: (p >= 0) & (p <= 1), "from 0 to 1")


def check_entries(owner: str, name: str, table: Any, *positions: Any) -> None:
    """Raises ValueError for a table of one entry in a call of several positions along one of its axes.

    An entry describes one token (its document, its neighbours). One entry for all tokens could mean that they share it,
    or that the others are outside the table.
    """
    most = max(max(places.shape[-2:]) for places in positions)
    if table.shape[-1] == 1 and most > 1:
        raise ValueError(f"{owner}: {name} has 1 entry but the call has {most} positions: need one for each")
