"""What a call to attend must be: shapes that fit, parts in their slots. Everything else is refused by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.call import Given, prepare
from jaxattn.core.dense import weigh
from jaxattn.core.maps import Dropout, Map
from jaxattn.core.mask import Mask
from jaxattn.core.measure import Measure
from jaxattn.core.normalize import Normalize
from jaxattn.core.parts import check_fields, positions_fit
from jaxattn.core.score import accumulator, raw_scores


def check(given: Given) -> None:
    """Raises for every call that could not mean anything, before any of it is traced."""
    _check_parts(given)
    query, key, value = given.query, given.key, given.value
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {x.dtype}: need floating point")
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
    rows = jax.ShapeDtypeStruct((*batch, heads, length, keys), accumulator(query, key))

    def slots(given: Given):
        call = prepare(given)
        positions = call.query_positions, call.key_positions
        scores = raw_scores(call.score, call.query.swapaxes(-2, -3), call.key.swapaxes(-2, -3), *positions)
        if scores.shape == rows.shape:
            for score_map in call.score_maps:
                scores = score_map(scores, None, *positions)
            view = weigh(dataclasses.replace(call, bias=None, mask=None))
            measured = {name: measure(view) for name, measure in call.measures.items()}
            del measured
        return scores, call.bias and call.bias(*positions), call.mask and call.mask(*positions)

    shapes = jax.eval_shape(slots, given._replace(measures=dict(given.measures)))  # a read-only mapping is no pytree
    if shapes[0].shape != rows.shape:
        raise ValueError(f"score gives shape {shapes[0].shape}: need [..., N, T, S] = {rows.shape}")
    for slot, result in (("bias", shapes[1]), ("mask", shapes[2])):
        if result is not None:
            try:
                broadcasts = np.broadcast_shapes(result.shape, rows.shape) == rows.shape
            except ValueError:
                broadcasts = False
            if not broadcasts:
                raise ValueError(f"{slot} gives shape {result.shape}: need one that broadcasts to {rows.shape}")


def _check_parts(given: Given) -> None:
    """Raises for what is not a part, or stands in the wrong slot, or holds something its fields do not say."""
    for slot in ("score", "bias", "mask", "normalize", "dropout"):
        _check_made(slot, getattr(given, slot))
    for slot, example in (("score_maps", "(SoftCap(50.0),)"), ("weight_maps", "(TopKWeights(8),)")):
        maps = getattr(given, slot)
        if not isinstance(maps, tuple | list):
            raise TypeError(f"{slot} must be a tuple of maps such as {example}, got {type(maps).__name__}")
        for each in maps:
            _check_made(slot, each)
            if not isinstance(each, Map):
                raise TypeError(f"{slot} must be a tuple of maps such as {example}, got {type(each).__name__} in it")
    if not isinstance(given.measures, Mapping):
        raise TypeError(f"measures must be a dict such as {{'h': Entropy()}}, got {type(given.measures).__name__}")
    for name, measure in given.measures.items():
        _check_made("measures", measure)
        if not isinstance(measure, Measure):
            raise TypeError(f"measures must map names to measures such as Entropy(), got {name}={measure!r}")
        if name == "lse":
            raise ValueError("measures: 'lse' is the name of the log of the total weights, choose another")
    if given.mask is not None and not isinstance(given.mask, Mask):
        raise TypeError(f"mask must be a Mask such as Causal() or Explicit(array), got {type(given.mask).__name__}")
    if not isinstance(given.normalize, Normalize):
        raise TypeError(f"normalize must be a normaliser such as Softmax(), got {type(given.normalize).__name__}")
    if given.dropout is not None and not isinstance(given.dropout, Dropout):
        raise TypeError(f"dropout must be Dropout(rate, key), got {type(given.dropout).__name__}")
    if not callable(given.score) or not (given.bias is None or callable(given.bias)):
        raise TypeError("score and bias must be parts such as Dot() and Bias(array)")


def _check_made(slot: str, part: Any) -> None:
    if isinstance(part, type):
        raise TypeError(f"{slot} is the class {part.__name__}: need one of its parts, {part.__name__}(...)")
    check_fields(slot, part)
