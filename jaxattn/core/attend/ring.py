"""Context parallelism: attention where queries, keys and values are cut along their length over devices.

The functions here are called inside `jax.shard_map`, each device with its own shard, and return what `attend` would for
the whole sequence. Everything goes by positions, so the order of the tokens may be any.

`ring` is the loop of `tiled` with a loop around it. Keys and values go from device to device, and the three numbers
that a query carries over tiles are carried over devices too. The normaliser's `finish` comes once, after them. In the
backward pass keys and values go round again, together with their gradients.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.api import attend, check_block, in_form, needs_of, traceable
from jaxattn.core.attend.call import Call, check_pairs, guard_of, prepare
from jaxattn.core.attend.call import Given as Arguments
from jaxattn.core.attend.check import check
from jaxattn.core.attend.cut import dimensions, hinted_leaves
from jaxattn.core.attend.mask import Mask
from jaxattn.core.attend.schedule import Block, Kinds, Schedule, blocks_for, fit, schedule
from jaxattn.core.attend.slots import Slots
from jaxattn.core.attend.tiled import (
    FEW_VISITS,
    OVER_KEYS,
    Given,
    Gradients,
    Learned,
    Plan,
    Sums,
    add_keys,
    gradient_of,
    in_tiles,
    no_gradients,
    no_sums,
    operands,
    pull_keys,
    referred,
    with_measures,
    without_wrong_keys,
    without_wrong_rows,
)
from jaxattn.core.first_order import not_reversed, reverse_only
from jaxattn.core.mesh import mesh_axes, vary
from jaxattn.core.part import inexact_leaves
from jaxattn.core.shards import Axis, passed_on, positions_of

FIRST_ORDER = (
    "{} has first derivatives in reverse mode only: for jax.jvp, and for gradients of gradients, call "
    "gathered(..., implementation='rows')"
)


def ring(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s kv v"],
    axis_name: Axis,
    *,
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | Int[Array, "*b s k"] | None = None,
    return_lse: bool = False,
    block: int | tuple[int, int] | None = None,
    **slots: Any,
) -> Any:
    """Computes `attend` over a sequence in shards, by sending keys and values around; inside `jax.shard_map`.

        @partial(jax.shard_map, mesh=mesh, in_specs=P(None, "context"), out_specs=P(None, "context"))
        def attention(query, key, value):  # [B, T, ...] in shards along T
            return ring(query, key, value, "context", mask=Causal())

    Results and gradients are those of `attend` of the whole sequence, of `out`, `lse`, linear measures and every array
    of every part. A device holds its own shards and those that pass by, of keys and values with their own heads, in
    their own dtype. Sums and gradients are carried in float32 or better. It is ring attention (Liu et al., 2023).

    The devices stop as soon as none of them needs a key that is still to come: for a causal window of W keys and
    contiguous shards of T tokens after ⌈(W − 1) / T⌉ + 1 steps. The steps are known when the program is made if the
    positions are the default ones and the mask holds no arrays; then they may also begin with keys that lie ahead.
    Otherwise the positions go round once, before the keys.

    Arrays of parts are those of the whole sequence, on every device: a mask or bias [.., T, S] of all pairs, the ids of
    all documents. They are read by position, so they need not be sharded. One that differs along the axis is refused.

    Dropout is by position: its seeds are those of `Dropout`, for the heads and batch entries of the device. Where a
    mesh axis divides the batch, fold its index into the key.

    All heads and batch entries of a device share their tiles, even if they see different keys.

    Args:
        query: This device's queries [..., T, N, H].
        key: This device's keys [..., S, K, H], as many on each device.
        value: [..., S, Kv, V].
        axis_name: The mesh axis along which the length is cut, or several.
        query_positions: The places of these queries in the whole sequence [..., T], by default those of contiguous
            shards, device index · T + 0..T−1. −1 marks an empty slot.
        key_positions: The places of these keys, likewise; also [..., S, K].
        return_lse: Also return the log of each row's total weight.
        block: The tile size, as in `attend`.
        **slots: The slots of `attend`: score, bias, mask, normalize, score_maps, weight_maps, measures, dropout.

    Returns:
        As `attend`, for this device's queries.

    Raises:
        NotImplementedError: A part needs complete rows or the whole matrix. `gathered` serves it.
        TypeError or ValueError: As `attend`, or a table over positions differs between the devices of the axis. Where
            no such axis is bound, JAX raises its own error.
    """
    arrays, positions = (query, key, value), (query_positions, key_positions)
    return _over_devices("ring", arrays, positions, axis_name, return_lse, block, slots)


def split_keys(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s kv v"],
    axis_name: Axis,
    *,
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | Int[Array, "*b s k"] | None = None,
    return_lse: bool = False,
    block: int | tuple[int, int] | None = None,
    **slots: Any,
) -> Any:
    """Computes `attend` of the same queries on all devices and keys in shards; inside `jax.shard_map`.

    This is how to decode with a cache that is cut along its length. Keys and values stay where they are. Each device
    sums over its own keys, and the sums, V + 2 numbers per query and head, are added up over the devices (split-K
    decoding). The result is the same on all devices, with all gradients.

    Arguments, results and errors are those of `ring`, with one exception: `query_positions` is by default 0..T−1.
    """
    arrays, positions = (query, key, value), (query_positions, key_positions)
    return _over_devices("split_keys", arrays, positions, axis_name, return_lse, block, slots)


def gathered(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s kv v"],
    axis_name: Axis,
    *,
    query_positions: Int[Array, "*#b t"] | None = None,
    key_positions: Int[Array, "*#b s"] | Int[Array, "*b s k"] | None = None,
    **options: Any,
) -> Any:
    """Computes `attend` over a sequence in shards, after gathering keys and values on every device.

    The function serves everything that `attend` does, by any implementation. Memory per device is linear in the whole
    length. For short sequences it is faster than `ring`. What a part needs decides what is gathered: a map that reads
    other queries than its own (a `halo`, or the whole matrix) has queries gathered too, and every device computes all
    rows. Measures that are sums over queries are those over all queries, the same on every device.

    Arguments, results and errors are those of `ring`, and of `attend` for `implementation`.
    """
    slots = _slots("gathered", options, "return_lse", "block", "implementation")
    _check_replicated(slots, axis_name)
    size, length = jax.lax.axis_size(axis_name), query.shape[-3]
    all_rows = any(each.halo or "matrix" in (each.scores_need, each.weights_need) for each in slots.maps)

    def whole(x: Array, axis: int) -> Array:
        return jax.lax.all_gather(x, axis_name, axis=x.ndim + axis, tiled=True)

    def own(x: Array, axis: int) -> Array:
        """This device's rows, of those that were computed."""
        start = jax.lax.axis_index(axis_name) * length
        return jax.lax.dynamic_slice_in_dim(x, start, length, axis) if all_rows else x

    def once(x: Array) -> Array:
        """The sum over all rows. If every device computed all of them, it is that of the first."""
        counts = ~jnp.bool_(all_rows) | (jax.lax.axis_index(axis_name) == 0)
        return jax.lax.psum(jnp.where(counts, x, jnp.zeros_like(x)), axis_name)

    rows, places = query, _places((query, key), (query_positions, key_positions), axis_name)
    if query_positions is None and key_positions is None:  # keys are at 0..S−1, which masks can read at trace time
        _check_tables(slots, query, key, (size, size))
    else:
        key_positions = whole(places[1], -2 if jnp.ndim(places[1]) == key.ndim - 1 else -1)
    query_positions = places[0]
    if all_rows:
        rows, query_positions = whole(query, -3), whole(query_positions, -1)
    options |= {"query_positions": query_positions, "key_positions": key_positions}
    result = attend(rows, whole(key, -3), whole(value, -3), **options)
    out, extras = result if isinstance(result, tuple) else (result, {})
    out = own(out, out.ndim - 3)
    for name, x in extras.items():
        summed = name in slots.measures and slots.measures[name].over == "sum"
        extras[name] = jax.tree.map(once if summed else lambda x: own(x, query.ndim - 3), x)
    return (out, extras) if isinstance(result, tuple) else out


# Checks.


def _axes(axis_name: Axis) -> frozenset[str]:
    """Returns the names of the mesh axes, where `jax.shard_map` keeps account of what differs along them."""
    return mesh_axes(jax.lax.axis_index(axis_name))


# The names of axes in annotations that positions, or the slots of a call, are counted along.
_BY_POSITION = frozenset({"positions", "key_positions", "p", "r", "queries", "nodes", "places"})


def _check_replicated(slots: Slots, axis_name: Axis) -> None:
    """Raises ValueError for a table over positions that differs between the devices of the axis."""
    axes = _axes(axis_name)
    for where, leaf, hint in hinted_leaves(slots.in_parts()):
        by_position = any(_BY_POSITION.intersection(names) for names in dimensions(hint))
        if hasattr(leaf, "dtype") and axes & mesh_axes(leaf) and (by_position or where.startswith(".mask")):
            raise ValueError(
                f"{where[1:]} differs between the devices of axis {axis_name!r}: parts hold the tables of the whole "
                "sequence, so give it to every device in whole, without the axis in its in_specs"
            )


def _check_tables(slots: Slots, query: Any, key: Any, shards: tuple[int, int]) -> None:
    """Raises ValueError for a mask or bias that is an array and does not fit the whole sequence.

    Args:
        slots: The slots.
        query: The queries of a device.
        key: The keys of a device.
        shards: How many shards there are of queries, and of keys.
    """
    if not all(len(getattr(x, "shape", ())) > 2 for x in (query, key)):
        return
    whole = [
        jax.ShapeDtypeStruct((*x.shape[:-3], count * x.shape[-3], *x.shape[-2:]), x.dtype)
        for x, count in zip((query, key), shards, strict=True)
    ]
    for slot in ("mask", "bias"):
        if hasattr(table := getattr(slots, slot), "dtype"):
            check_pairs(slot, table, *whole)


def _slots(owner: str, options: dict[str, Any], *others: str) -> Slots:
    slots = {name: x for name, x in options.items() if name not in others}
    if unknown := set(slots) - set(Slots.__dataclass_fields__):
        raise TypeError(f"{owner} got unknown arguments {sorted(unknown)}: need those of attend")
    if isinstance(measures := slots.get("measures", {}), Mapping):
        slots["measures"] = dict(measures)  # a read-only mapping is no pytree
    return Slots(**slots)


def _places(arrays: tuple, positions: tuple, axis_name: Axis) -> tuple[Any, ...]:
    """Returns positions, by default those of contiguous shards."""
    return tuple(
        positions_of(x.shape[-3], axis_name) if at is None and len(getattr(x, "shape", ())) > 2 else at
        for x, at in zip(arrays, positions, strict=True)
    )


# Sums over devices.


class Way(NamedTuple):
    """How sums are taken over devices; static.

    Attributes:
        axis: The mesh axis.
        travels: Whether keys go round. Otherwise the sums of all devices are added up.
        hops: The number of devices whose keys a device computes with, if it is known.
        first: A device begins with the keys of the device so many places before it, and goes on with those before.
    """

    axis: Axis
    travels: bool
    hops: int | None
    first: int = 0


class Travelling(NamedTuple):
    """The arguments that go from device to device."""

    key: Array
    value: Array
    positions: Array
    seen: Array | None  # see `WrongKeys`

    @classmethod
    def of(cls, learned: Learned, given: Given) -> "Travelling":
        return cls(learned.key, learned.value, given.key_positions, None if given.wrong is None else given.wrong.seen)

    def into(self, learned: Learned, given: Given) -> tuple[Learned, Given]:
        """Returns the arguments with these keys."""
        wrong = None if given.wrong is None else given.wrong._replace(seen=self.seen)
        learned = learned._replace(key=self.key, value=self.value)
        return learned, given._replace(key_positions=self.positions, wrong=wrong)


def _scheduled(plan: Plan, given: Given) -> Given:
    """Returns the arguments with the schedule of these keys, if it is not the same for all."""
    if given.active is not None:
        return given
    places = in_tiles(given.query_positions, given.key_positions, plan.block)
    return given._replace(active=jax.tree.map(jnp.asarray, schedule(given.mask, *places)[0]))


def _hops_needed(plan: Plan, way: Way, given: Given) -> Int[Array, ""]:
    """Returns how many hops the device needs that needs the most, by sending the positions round."""

    def hop(number: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        needed, places = carry
        some = (_scheduled(plan, given._replace(key_positions=places)).active.count > 0).any()
        return jnp.where(some, number + 1, needed), passed_on(places, way.axis)

    start = vary((jnp.int32(0), given.key_positions), mesh_axes(given) | _axes(way.axis))
    needed, _ = jax.lax.fori_loop(0, jax.lax.axis_size(way.axis), hop, start)
    # Over every axis: devices have to agree on how often they take part.
    return jax.lax.pmax(needed, tuple(sorted(mesh_axes(needed))))


def _all_sums(plan: Plan, way: Way, learned: Learned, given: Given, hops: Array | None) -> Sums:
    rows = (*learned.query.shape[:-3], learned.query.shape[-2], learned.query.shape[-3])
    nothing = no_sums(learned, rows, mesh_axes((learned, given)))

    def with_keys(keys: Travelling, sums: Sums) -> Sums:
        here, given_here = keys.into(learned, given)
        return add_keys(plan, here, _scheduled(plan, given_here), sums)

    def hop(_: Any, carry: tuple[Sums, Travelling]) -> tuple[Sums, Travelling]:
        sums, keys = carry
        return with_keys(keys, sums), passed_on(keys, way.axis)

    keys = passed_on(Travelling.of(learned, given), way.axis, way.first)
    if way.travels:
        return referred(jax.lax.fori_loop(0, way.hops if hops is None else hops, hop, (nothing, keys))[0])
    sums = with_keys(keys, nothing)
    reference = jax.lax.pmax(sums.reference, way.axis)
    reference = jnp.where(jnp.isneginf(reference), 0, reference)
    shrink = jnp.exp(sums.reference - reference)
    numerator, total = jax.lax.psum((sums.numerator * shrink[..., None], sums.total * shrink), way.axis)
    return Sums(numerator, total, reference)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(plan: Plan, way: Way, learned: Learned, given: Given, hops: Array | None) -> Sums:
    """Returns the sums of all queries over the keys of all devices; `hops` where `way.hops` is not known."""
    return _all_sums(plan, way, without_wrong_keys(learned, given), given, hops)


def _sums_forward(plan: Plan, way: Way, learned: Learned, given: Given, hops: Array | None) -> tuple[Sums, Any]:
    learned = without_wrong_keys(learned, given)
    sums = checkpoint_name(_all_sums(plan, way, learned, given, hops), OVER_KEYS)
    return sums, (learned, given, hops, without_wrong_rows(sums)[0].reference)


def _sums_backward(plan: Plan, way: Way, residuals: Any, d_sums: Sums) -> tuple[Learned, None, None]:
    learned, given, hops, reference = residuals
    axes = mesh_axes((learned, given, d_sums))
    if not way.travels and not _axes(way.axis):  # then JAX takes the cotangent of each device for a part of it
        d_sums = jax.lax.psum(d_sums, way.axis)
    d_sums = vary(d_sums._replace(reference=reference), axes)
    d_query = jnp.zeros_like(learned.query, d_sums.total.dtype).swapaxes(-2, -3)

    def with_keys(keys: Travelling, carry: tuple[Array, Gradients]) -> tuple[Array, Gradients]:
        here, given_here = keys.into(learned, given)
        return pull_keys(plan, here, _scheduled(plan, given_here), d_sums, *carry)

    def hop(_: Any, carry: tuple[Array, Gradients, Travelling]) -> tuple[Array, Gradients, Travelling]:
        d_query, gradients, keys = carry
        d_query, gradients = with_keys(keys, (d_query, gradients))
        d_key, d_value, keys = passed_on((gradients.key, gradients.value, keys), way.axis)
        return d_query, gradients._replace(key=d_key, value=d_value), keys

    keys = passed_on(Travelling.of(learned, given), way.axis, way.first)
    carry = vary((d_query, no_gradients(plan, learned)), axes)
    if way.travels:
        d_query, gradients, _ = jax.lax.fori_loop(0, way.hops if hops is None else hops, hop, (*carry, keys))
    else:
        d_query, gradients = with_keys(keys, carry)
    d_query, gradients = not_reversed((d_query, gradients), FIRST_ORDER.format("ring" if way.travels else "split_keys"))
    d_learned = gradient_of(plan, learned, d_query.swapaxes(-2, -3).astype(learned.query.dtype), gradients)
    if way.travels:
        d_key, d_value = _brought_home((d_learned.key, d_learned.value), way, hops)
        d_learned = d_learned._replace(key=d_key, value=d_value)
    return d_learned, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _brought_home(tree: Any, way: Way, hops: Array | None) -> Any:
    """Returns what belongs here, after all hops."""
    if hops is None and way.hops is not None:
        return passed_on(tree, way.axis, -way.first - way.hops)
    # By binary digits of the way that is left, since devices that are passed on to have to be known.
    size = jax.lax.axis_size(way.axis)
    left = -jnp.asarray(hops) % size
    for digit in range((size - 1).bit_length()):
        moved = passed_on(tree, way.axis, 2**digit)
        tree = jax.tree.map(lambda x, y, digit=digit: jnp.where(left >> digit & 1, y, x), tree, moved)
    return tree


def _known_way(mask: Mask | None, size: int, lengths: tuple[int, int], contiguous: bool) -> tuple[int, int | None]:
    """Returns where a device begins and the number of hops, None if that is not known when the program is made."""
    if mask is None or size == 1:
        return 0, size
    if not contiguous:
        return 0, None
    query, key = (np.arange(size * length, dtype=np.int32).reshape(size, length) for length in lengths)
    bounds: Any = mask.bounds
    possible = bounds(query[None, :, None], key[None, None])[0]
    if not isinstance(possible, np.ndarray | np.bool_):
        return 0, None
    possible = np.broadcast_to(possible, (*np.shape(possible)[:-2], size, size)).reshape(-1, size, size).any(0)
    device, shard = np.nonzero(possible)
    needed = np.unique((device - shard) % size)  # how far the keys have to come
    if not len(needed):
        return 0, 0
    # All but the largest gap between them, around the ring.
    gaps = np.diff(needed, append=needed[0] + size)
    first = needed[(gaps.argmax() + 1) % len(needed)] if gaps.max() > gaps[-1] else needed[0]
    return int(first), int(size - gaps.max() + 1)


def _block_of(mask: Mask | None, lengths: tuple[int, int], bytes_per_key: int, block: Any) -> Block:
    """Returns the tile size. Tiles of keys divide them evenly, for what is filled up would travel too."""
    if block is not None:
        queries, keys = (block, block) if isinstance(block, int | np.integer) else block
        return fit(Block(int(queries), int(keys), int(keys)), lengths)
    grain = None if mask is None else mask.grain
    first = fit(blocks_for(lengths[0], bytes_per_key, grain)[0], lengths)
    keys = first.keys if grain is not None else -(-lengths[1] // -(-lengths[1] // first.keys))
    return Block(first.queries, keys, keys)


def _over_devices(
    owner: str, arrays: tuple, positions: tuple, axis_name: Axis, return_lse: bool, block: Any, options: dict
) -> Any:
    travels, contiguous = owner == "ring", all(x is None for x in positions)
    slots = _slots(owner, options)
    _check_replicated(slots, axis_name)
    size = jax.lax.axis_size(axis_name)
    if contiguous:
        _check_tables(slots, arrays[0], arrays[1], (size if travels else 1, size))
    if travels:
        query_positions, key_positions = _places(arrays[:2], positions, axis_name)
    else:
        query_positions, (key_positions,) = positions[0], _places(arrays[1:2], positions[1:], axis_name)
    query, key, value = arrays
    given = Arguments(query, key, value, slots, query_positions, key_positions).in_parts()
    check_block(block)
    check(given)
    needs = needs_of(given)
    if needed := " and ".join(needs["rows"] + needs["matrix"]):
        raise NotImplementedError(f"{owner} cannot serve {needed}: it needs whole rows, so call gathered")
    given = traceable(given)
    mask, lengths = given.slots.mask, (given.query.shape[-3], given.key.shape[-3])
    bytes_per_key = given.key.size // lengths[1] * given.key.dtype.itemsize
    chosen = _block_of(mask, lengths, bytes_per_key, block)
    first, hops = _known_way(mask, size, lengths, contiguous) if travels else (0, None)
    if hops is None and not _axes(axis_name):  # whether devices of other axes would agree on their number is not known
        hops = size
    kinds, active = Kinds(True, True, False), None
    if mask is None and contiguous and travels:  # the same tiles, all of them, at every hop
        here = np.arange(lengths[0])[None, :, None], np.arange(lengths[1])[None, None]
        active, kinds = schedule(None, *in_tiles(*here, chosen))
    attention = partial(_attention, chosen, kinds, Way(axis_name, travels, hops, first), active)
    out, lse, measured = in_form(given, *with_measures(attention, prepare(given)))
    extras = ({"lse": lse} if return_lse else {}) | measured
    return (out, extras) if return_lse or measured else out


def _attention(chosen: Block, kinds: Kinds, way: Way, active: Schedule | None, call: Call) -> tuple[Array, Array]:
    """Returns (out, lse) of a call without measures."""
    length, keys = call.query.shape[-3], -(-call.key.shape[-3] // chosen.keys) * chosen.keys
    guard = guard_of(call)
    if way.travels:  # keys meet the queries of other devices too
        guard = guard._replace(keys=guard.queries, one=False)
    heads_first = way.travels or math.ceil(length / chosen.queries) > FEW_VISITS
    plan = Plan(chosen, kinds, heads_first, guard, call.value.dtype)
    learned, given = operands(plan, keys, call, active, _axes(way.axis))
    given = vary(given, mesh_axes((learned, given)))
    leaves, rebuild = inexact_leaves(learned)
    learned = rebuild(reverse_only(leaves, FIRST_ORDER.format("ring" if way.travels else "split_keys")))
    hops = _hops_needed(plan, way, given) if way.travels and way.hops is None else None
    sums = _sums(plan, way, learned, given, hops)
    sums, wrong = without_wrong_rows(sums)
    normalize: Any = call.slots.normalize
    out, lse = normalize.finish(*sums)
    out, lse = jnp.where(wrong[..., None], jnp.nan, out), jnp.where(wrong, jnp.nan, lse)
    return out.swapaxes(-2, -3)[..., :length, :, :], lse.swapaxes(-1, -2)[..., :length, :]
