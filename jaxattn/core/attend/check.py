"""Checks of a call to `attend`: shapes fit, and the slots hold parts. The errors name the argument that is refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.attend.bias import ScoreBias
from jaxattn.core.attend.call import Given, prepare
from jaxattn.core.attend.maps import Dropout, Map
from jaxattn.core.attend.mask import Mask
from jaxattn.core.attend.measure import Measure, View
from jaxattn.core.attend.normalize import Normalize
from jaxattn.core.attend.score import Score
from jaxattn.core.attend.tile import Tile
from jaxattn.core.checks import check_floating, positions_fit
from jaxattn.core.matmul import accumulator
from jaxattn.core.part import check_fields


def check(given: Given) -> None:
    """Raises TypeError or ValueError for a call that cannot mean anything, before any of it is traced."""
    _check_parts(given)
    query, key, value = given.query, given.key, given.value
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        check_floating(name, x)
        if len(x.shape) < 3:
            raise ValueError(f"{name} has shape {x.shape}: need [..., length, heads, head dim]")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}: no axis may be empty")
    *batch, length, heads, _ = query.shape
    for name, x in (("key", key), ("value", value)):
        if list(x.shape[:-3]) != batch:
            raise ValueError(f"{name} has batch axes {x.shape[:-3]} but query has {tuple(batch)}: need the same")
        if heads % x.shape[-2]:
            raise ValueError(f"{name} has {x.shape[-2]} heads but query has {heads}: need a divisor of {heads}")
    keys = key.shape[-3]
    if value.shape[-3] != keys:
        raise ValueError(f"value has length {value.shape[-3]} but key has {keys}: need the same")
    positions = (("query_positions", given.query_positions, length), ("key_positions", given.key_positions, keys))
    for name, x, size in positions:
        if x is None:
            continue
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} must be an integer array, got {getattr(x, 'dtype', type(x).__name__)}")
        if name == "key_positions" and len(x.shape) == len(batch) + 2:
            if x.shape != (*batch, keys, key.shape[-2]) or value.shape[-2] != key.shape[-2]:
                raise ValueError(
                    f"key_positions has shape {x.shape}: by key head need {(*batch, keys, key.shape[-2])}, and as many "
                    f"value heads ({value.shape[-2]}) as key heads"
                )
            continue
        if not positions_fit(tuple(x.shape), tuple(batch), size):
            raise ValueError(f"{name} has shape {x.shape}: need [..., {size}] with batch axes that fit {tuple(batch)}")
    slots = dataclasses.replace(given.slots, measures=dict(given.slots.measures))  # a read-only mapping is no pytree
    jax.eval_shape(_check_slots, given._replace(slots=slots))


@jax.jit  # which keeps what it has traced, so that a call like an earlier one is checked at once
def _check_slots(given: Given) -> None:
    """Traces every slot by itself, so that an error names the slot that does not fit."""
    call = prepare(given)
    slots = call.slots
    places = call.query_positions, call.key_positions
    tile = Tile(*places)
    *batch, length, heads, _ = given.query.shape
    rows = (*batch, heads, length, given.key.shape[-3])

    def run(slot: str, part: Any, *arguments: Any) -> Any:
        try:
            return part(*arguments)
        except Exception as error:
            owner = getattr(part, "__self__", part)
            name = owner.kind if isinstance(owner, Map) else type(owner).__name__
            kind = type(error) if type(error) in (TypeError, NotImplementedError) else ValueError
            raise kind(
                f"{slot}={name} does not fit query {given.query.shape} and key {given.key.shape}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error

    query, key = call.query.swapaxes(-2, -3), call.key.swapaxes(-2, -3)
    scores = run("score", slots.score, query, key, tile)
    if scores.shape != rows:
        raise ValueError(f"score gives shape {scores.shape}: need [..., N, T, S] = {rows}")
    scores = scores.astype(accumulator(given.query, given.key))
    for slot, part, arguments in (("bias", slots.bias, (tile,)), ("mask", slots.mask, places)):
        if part is None:
            continue
        result = run(slot, part, *arguments)
        try:
            fits = np.broadcast_shapes(result.shape, rows) == rows
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{slot} gives shape {result.shape}: need one that broadcasts to {rows}")
    for score_map in slots.score_maps:
        scores = run("score_maps", score_map, scores, tile)
    tile = Tile(jnp.asarray(tile.query), jnp.asarray(tile.key), jnp.ones(rows, bool))
    weights, lse = run("normalize", slots.normalize.weights, scores, tile)
    for weight_map in slots.weight_maps:
        weights = run("weight_maps", weight_map, weights, tile)
    for name, measure in slots.measures.items():
        run(f"measures: {name}", measure, View(weights, scores, lse), tile)


def _check_parts(given: Given) -> None:
    """Raises for a slot that holds no part, or a part of another slot, or a part whose fields hold the wrong things."""
    slots, single = given.slots, ("score", "bias", "mask", "normalize", "dropout")
    for slot in single:
        part = getattr(slots, slot)
        if isinstance(part, type):
            raise TypeError(f"{slot} is the class {part.__name__}: need one of its parts, {part.__name__}(...)")
    if slots.mask is not None and not isinstance(slots.mask, Mask):
        raise TypeError(f"mask must be a Mask such as Causal() or Explicit(array), got {type(slots.mask).__name__}")
    if not isinstance(slots.normalize, Normalize):
        raise TypeError(f"normalize must be a normaliser such as Softmax(), got {type(slots.normalize).__name__}")
    if slots.dropout is not None and not isinstance(slots.dropout, Dropout):
        raise TypeError(f"dropout must be Dropout(rate, key), got {type(slots.dropout).__name__}")
    if not isinstance(slots.score, Score):
        raise TypeError(f"score must be a Score such as Dot(), got {type(slots.score).__name__}")
    if slots.bias is not None and not isinstance(slots.bias, ScoreBias):
        raise TypeError(
            f"bias must be a ScoreBias such as Bias(array) or Alibi(slopes), got {type(slots.bias).__name__}"
        )
    for slot in single:
        _check_fields(slot, getattr(slots, slot))
    for slot, example in (("score_maps", "(SoftCap(50.0),)"), ("weight_maps", "(TopKWeights(8),)")):
        maps = getattr(slots, slot)
        if not isinstance(maps, tuple | list):
            raise TypeError(f"{slot} must be a tuple of maps such as {example}, got {type(maps).__name__}")
        for each in maps:
            if not isinstance(each, Map):
                raise TypeError(f"{slot} must be a tuple of maps such as {example}, got {type(each).__name__} in it")
            _check_fields(slot, each)
    if not isinstance(slots.measures, Mapping):
        raise TypeError(f"measures must be a dict such as {{'h': Entropy()}}, got {type(slots.measures).__name__}")
    for name, measure in slots.measures.items():
        if not isinstance(measure, Measure):
            raise TypeError(f"measures must map names to measures such as Entropy(), got {name}={measure!r}")
        if name == "lse":
            raise ValueError("measures: 'lse' is the name of the log of the total weights, choose another")
        _check_fields("measures", measure)


def _check_fields(slot: str, part: Any) -> None:
    check_fields(slot, part)
    for leaf in jax.tree.leaves(part):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise TypeError(f"{slot} must be a part that holds arrays and numbers only, got {leaf!r}")
