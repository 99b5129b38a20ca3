"""Attention to keys in pieces that are read apart and merged: split-K decoding, and a prefix that a batch shares."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.api import attend
from jaxattn.core.attend.normalize import Softmax
from jaxattn.core.attend.partial import Partial, merge, merge_axis
from jaxattn.core.checks import check_array, check_int


def attend_split(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s kv v"],
    *,
    splits: int,
    key_positions: Int[Array, "*#b s"] | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Returns `attend` of the same arguments, from `splits` pieces of the keys that are read side by side and merged.

    A single query has little to do in parallel but its keys: this is split-K decoding (Flash-Decoding, Dao et al.,
    2023). The result does not depend on the number of pieces. A piece in which no key is seen counts for nothing.

    Args:
        query: As of `attend`.
        key: As of `attend`.
        value: As of `attend`.
        splits: The number of pieces, from 1 to S. The last one is filled up with empty slots.
        key_positions: Integers [..., S], as of `attend`.
        return_lse: As of `attend`.
        options: Other arguments of `attend`, without `measures` and maps that read complete rows.

    Raises:
        TypeError: `splits` is no int.
        ValueError: `splits` is out of range, positions differ by key head, or the normaliser is not `Softmax`, or
            another option needs complete rows, so that pieces do not merge.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_array(name, x)
    length = key.shape[-3]
    check_int("splits", splits)
    if not 1 <= splits <= length:
        raise ValueError(f"splits is {splits} of {length} keys: need from 1 to {length}")
    normalize = _mergeable(options)
    places = jnp.arange(length) if key_positions is None else jnp.asarray(key_positions)
    if places.shape[-1] != length:
        raise ValueError(f"key_positions has shape {places.shape}: need [..., {length}], the same for all key heads")
    fill = -length % splits

    def pieces(x: Array, axis: int, constant: int) -> Array:
        """Cuts the axis of keys, and puts the pieces in front."""
        width = [(0, 0)] * x.ndim
        width[axis] = (0, fill)
        x = jnp.pad(x, width, constant_values=constant)
        axis %= x.ndim
        return jnp.moveaxis(x.reshape(*x.shape[:axis], splits, -1, *x.shape[axis + 1 :]), axis, 0)

    def read(key: Array, value: Array, places: Array, number: Array) -> Partial:
        # A null logit has a mass of its own, which counts once.
        null = None if normalize.null_logit is None else jnp.where(number == 0, normalize.null_logit, -jnp.inf)
        given = options | {"normalize": dataclasses.replace(normalize, null_logit=null)}
        out, extras = attend(query, key, value, key_positions=places, return_lse=True, **given)
        return Partial(out, extras["lse"])

    cut = (pieces(key, -3, 0), pieces(value, -3, 0), pieces(places, -1, -1), jnp.arange(splits))
    whole = merge_axis(jax.vmap(read)(*cut), 0)
    return (whole.out, {"lse": whole.lse}) if return_lse else whole.out


def attend_cascade(
    query: Float[Array, "b t n h"],
    prefix: tuple[Float[Array, "p k h"], Float[Array, "p kv v"]],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s kv v"],
    *,
    query_positions: Int[Array, "#b t"],
    key_positions: Int[Array, "#b s"],
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Returns `attend` to a prefix that all rows share and to keys of each row's own, with the prefix read once:

        merge(attend(all queries as rows of one, prefix), attend(query, key, value))

    Keys and values of the prefix are held and read once for the batch, so that a step of decoding reads P + B S of them
    and not B (P + S) (cascade attention, Ye et al., 2024). Gradients of the prefix are sums over the rows.

    Args:
        query: [B, T, N, H].
        prefix: The pair (key, value) of the first P tokens of every row, [P, K, H] and [P, Kv, V], at the positions
            0..P−1.
        key: [B, S, K, H], the keys of what follows.
        value: [B, S, Kv, V].
        query_positions: [B, T] or [T], counted from the beginning of the prefix.
        key_positions: [B, S] or [S], counted likewise; −1 is an empty slot.
        return_lse: As of `attend`.
        options: Other arguments of `attend` that are the same for all rows, without `measures` and maps that read
            complete rows.

    Raises:
        ValueError: The prefix has a batch axis, or the normaliser is not `Softmax`, or another option needs complete
            rows, so that the parts do not merge.
    """
    for name, x in (("query", query), ("key", key), ("value", value), ("prefix", prefix[0]), ("prefix", prefix[1])):
        check_array(name, x)
    if prefix[0].ndim != 3 or query.ndim != 4:
        raise ValueError(
            f"prefix has keys {prefix[0].shape} and query has shape {query.shape}: need [P, K, H], without a batch "
            "axis, and [B, T, N, H]"
        )
    normalize = _mergeable(options)
    batch, length = query.shape[:2]
    places = jnp.broadcast_to(query_positions, (batch, length))
    shared = options | {"normalize": dataclasses.replace(normalize, null_logit=None), "return_lse": True}
    rows = query.reshape(1, batch * length, *query.shape[2:])
    of_prefix = (x[None] for x in prefix)
    out, extras = attend(rows, *of_prefix, query_positions=places.reshape(1, -1), **shared)
    first = Partial(out.reshape(batch, length, *out.shape[2:]), extras["lse"].reshape(batch, length, -1))
    own = options | {"normalize": normalize, "return_lse": True}
    out, extras = attend(query, key, value, query_positions=query_positions, key_positions=key_positions, **own)
    whole = merge(first, Partial(out, extras["lse"]))
    return (whole.out, {"lse": whole.lse}) if return_lse else whole.out


def _mergeable(options: dict[str, Any]) -> Softmax:
    """Returns the normaliser of the call, or raises ValueError where results over parts of the keys do not merge."""
    normalize = options.get("normalize", Softmax())
    if type(normalize) is not Softmax:
        raise ValueError(f"normalize is {type(normalize).__name__}, whose parts do not merge: need Softmax()")
    for name in ("weight_maps", "measures", "dropout"):
        if options.get(name):
            raise ValueError(f"{name} is given, which needs the weights of complete rows: need attend")
    return normalize
