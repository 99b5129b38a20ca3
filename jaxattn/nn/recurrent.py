"""Recurrent mixers: `Recurrent(mechanism)` has the protocol of every mixer, and a state of fixed size.

A mechanism holds the parameters. It says what the memory gets from the input (`inputs`) and how the reads become the
output (`output`). State of earlier tokens besides the memory, such as the last inputs of a convolution, comes from
`Past`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxattn.core.attend.api import attend
from jaxattn.core.attend.mask import Documents, Mask, Window
from jaxattn.core.attend.measure import Measure
from jaxattn.core.linear.api import Form, mixing_matrix
from jaxattn.core.linear.recurrence import Delta, Erase, Read
from jaxattn.core.memory.api import memory_scan
from jaxattn.core.memory.inner import Identity, InnerLoss, Link, Memory, SquaredError
from jaxattn.nn.mixer import Mixer
from jaxattn.nn.packing import earlier, in_order, layout, scatter
from jaxattn.nn.sharding import linear_in_shards
from jaxattn.nn.spec import built
from jaxattn.nn.tap import Tap
from jaxattn.nn.tokens import Tokens


class MemoryInputs(Protocol):
    """The inputs of a memory, and the way it runs.

    `LinearInputs` run in `linear_attention`, and `LearningInputs` in `memory_scan`.
    """

    query: Array
    key: Array
    value: Array

    def tapped(self, tap: Tap) -> "MemoryInputs":
        """Returns the same with the edits at `q`, `k` and `v`, which are recorded."""

    def run(
        self, state: Any, seen: Bool[Array, "b t"], segments: Int[Array, "b t"] | None, chunk: int | None
    ) -> tuple[Float[Array, "b t n v"], Any]:
        """Runs the memory; tokens that are not seen are as if they were not there.

        Args:
            state: The memory before these tokens, or None.
            seen: [B, T], which tokens are there.
            segments: [B, T], the document of each token; None where nothing is packed.
            chunk: The number of tokens worked on at once, for speed alone.

        Returns:
            A pair (read, state): the reads of each head [B, T, N, V], and the memory after the tokens.
        """

    def weights(self, seen: Bool[Array, "b t"], segments: Int[Array, "b t"] | None) -> Float[Array, "b n t t"]:
        """Returns the weight of each value in the read of each token."""


class LinearInputs(NamedTuple):
    """The arguments of `linear_attention`.

    Attributes:
        query: [B, T, N, K].
        key: [B, T, M, K].
        value: [B, T, M, V].
        log_decay: The gate, as of `linear_attention`.
        erase: The erasure, as of `linear_attention`.
        bonus: The bonus, as of `linear_attention`.
        read: When the state is read, as of `linear_attention`.
        form: The form, as of `linear_attention`.
    """

    query: Float[Array, "b t n k"]
    key: Float[Array, "b t m k"]
    value: Float[Array, "b t m v"]
    log_decay: Array | None = None
    erase: Delta | Erase | None = None
    bonus: Array | None = None
    read: Read = "post"
    form: Form = "auto"

    def tapped(self, tap):
        query, key = tap("q", self.query), tap("k", self.key)
        return self._replace(query=query, key=key, value=tap("v", self.value))

    def run(self, state, seen, segments, chunk):
        gates = self._hidden(seen)
        return linear_in_shards(self.query, state=state, segment_ids=segments, form=self.form, chunk=chunk, **gates)

    def weights(self, seen, segments):
        gates = self._hidden(seen)
        gates.pop("value")
        return mixing_matrix(self.query, segment_ids=segments, **gates)

    def _hidden(self, seen: Bool[Array, "b t"]) -> dict[str, Any]:
        """Returns arguments with which unseen tokens neither write nor erase, and nothing decays at them."""

        def only(x: Array) -> Array:
            return jnp.where(seen.reshape(*seen.shape, *(1,) * (x.ndim - 2)), x, 0)

        log_decay = self.log_decay
        if log_decay is not None and log_decay.ndim == 1:  # one per head, for every token
            log_decay = jnp.broadcast_to(log_decay, (*seen.shape, *log_decay.shape))
        gates = {"key": self.key, "value": self.value, "log_decay": log_decay, "erase": self.erase}
        return jax.tree.map(only, gates) | {"bonus": self.bonus, "read": self.read}


class Passed(NamedTuple):
    """The inputs of a mechanism without a memory: its read is the value.

    Attributes:
        value: [B, T, N, V].
    """

    value: Float[Array, "b t n v"]

    @property
    def query(self) -> Array:
        return self.value

    @property
    def key(self) -> Array:
        return self.value

    def tapped(self, tap):
        return Passed(tap("v", tap("k", tap("q", self.value))))

    def run(self, state, seen, segments, chunk):
        return self.value, ()

    def weights(self, seen, segments):
        raise ValueError("record has 'weights', which a mixer without a memory does not have")


class LearningInputs(NamedTuple):
    """The arguments of `memory_scan`; gates are numbers or [B, T, N].

    Packed documents each begin an inner batch, in a row that is made longer for them. A row has room for `documents` of
    them, or for more short ones as long as they still fit; a row that holds more is NaN.

    Attributes:
        memory: As of `memory_scan`.
        query: [B, T, N, K].
        key: [B, T, N, K].
        value: [B, T, N, V].
        rate: As of `memory_scan`.
        log_decay: As of `memory_scan`.
        log_momentum: As of `memory_scan`.
        row_rate: As of `memory_scan`.
        loss: As of `memory_scan`.
        link: As of `memory_scan`.
        inner_batch: As of `memory_scan`.
        documents: The number of documents that a packed row has room for.
    """

    memory: Memory
    query: Float[Array, "b t n k"]
    key: Float[Array, "b t n k"]
    value: Float[Array, "b t n v"]
    rate: Array
    log_decay: Array | None = None
    log_momentum: Array | None = None
    row_rate: Array | None = None
    loss: InnerLoss = SquaredError()
    link: Link = Identity()
    inner_batch: int = 16
    documents: int = 8

    def tapped(self, tap):
        query, key = tap("q", self.query), tap("k", self.key)
        return self._replace(query=query, key=key, value=tap("v", self.value))

    def run(self, state, seen, segments, chunk):
        batch, length = seen.shape
        if segments is None:  # what is there comes first
            rows = layout(seen, jnp.zeros((batch, length), int), documents=0)
            options: dict[str, Any] = {"lengths": seen.sum(-1)}
        else:
            rows = layout(seen, segments, documents=self.documents, align=self.inner_batch)
            options = {"segment_ids": rows.ids}

        def placed(x: Any) -> Any:
            if x is None or jnp.ndim(x) < 3:
                return x
            return rows.put(jnp.broadcast_to(x, (batch, length, *x.shape[2:])))

        query, key, value, rate, log_decay, log_momentum, row_rate = map(placed, self[1:8])
        out, state = memory_scan(
            self.memory,
            query,
            key,
            value,
            rate=rate,
            log_decay=log_decay,
            log_momentum=log_momentum,
            row_rate=row_rate,
            loss=self.loss,
            link=self.link,
            inner_batch=self.inner_batch,
            state=state,
            **options,
        )
        return rows.take(out), state

    def weights(self, seen, segments):
        raise ValueError(
            "record has 'weights', which a memory that learns does not have: its reads are no sums of values"
        )


class Past:
    """The arrays that a mechanism carries from earlier tokens, by name: `held` before this call, `kept` after it.

    Tokens that are not seen (padding) are as if they were not there.

    Args:
        held: The arrays from an earlier call, empty at the start.
        seen: [B, T], which tokens are there.
        segments: [B, T], the document of each token; None where nothing is packed.
        padded: Whether padding may be anywhere in the row. Otherwise padding may not stand inside a document: a packed
            row in which it does is NaN.

    Attributes:
        held: The arrays before this call.
        kept: The arrays after this call.
        layer: What the layer before gave, in the same places, for mechanisms with keys_from="layer"; None for others.
        given: What the mechanism gives to layers with keys_from="layer".
        seen: As given.
        segments: As given.
    """

    def __init__(
        self,
        held: dict[str, Array],
        seen: Bool[Array, "b t"],
        segments: Int[Array, "b t"] | None,
        *,
        padded: bool = True,
    ):
        self.held, self.seen, self.segments = held, seen, segments
        self.kept: dict[str, Array] = {}
        self.layer: Array | None = None
        self.given: Array | None = None
        # The place of each token among those that are there, if any may be missing before it.
        self._rank = jnp.cumsum(seen, -1) - 1 if padded and seen.shape[1] > 1 else None
        self._lost = None  # rows in which padding stands inside a document, where it may not
        if self._rank is None and segments is not None and seen.shape[1] > 1:
            inside = ~seen[:, :-1] & seen[:, 1:] & (segments[:, :-1] == segments[:, 1:])
            self._lost = inside.any(-1)

    @property
    def starts(self) -> Bool[Array, "b t"] | None:
        """Whether each token is the first of a document in a packed row; None where nothing is packed."""
        return None if self.segments is None else self.segments != earlier(self.segments, 1, -1)

    def places(self, positions: Int[Array, "b t"]) -> Int[Array, "b t"]:
        """Returns the place of each token in its document, from 0."""
        if self.segments is None:
            return jnp.maximum(positions, 0)
        segments, index = self._together(self.segments, -1), jnp.arange(self.seen.shape[1])
        starts = segments != earlier(segments, 1, -1)
        places = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
        return places if self._rank is None else self._apart(places)

    def lags(self, name: str, x: Float[Array, "b t c"], width: int, use: Callable[[list[Array]], Any] = list) -> Any:
        """Returns the result of `use` for x as it was 0, 1, ..., width − 1 tokens ago.

        Before the sequence or document began, x is zero.

        Args:
            name: The name under which the last inputs are kept.
            x: [B, T, C].
            width: The number of lags.
            use: A function of the list of lagged arrays that works on each token by itself.
        """
        length = x.shape[1]
        x = self._together(jnp.where(self.seen[..., None], x, 0))
        whole = self._continued(name, x, width - 1)
        lagged = [whole[:, width - 1 - lag : width - 1 - lag + length] for lag in range(width)]
        if self.segments is not None:
            segments = self._together(self.segments, -1)
            same = [segments == earlier(segments, lag, -1) for lag in range(width)]
            lagged = [jnp.where(each[..., None], y, 0) for each, y in zip(same, lagged, strict=True)]
        return jax.tree.map(self._apart, use(lagged))

    def attend_near(
        self,
        name: str,
        query: Float[Array, "b t n h"],
        key: Float[Array, "b t n h"],
        value: Float[Array, "b t n v"],
        window: int,
    ) -> Float[Array, "b t n v"]:
        """Runs softmax attention of each token to the last `window` of its document, itself included.

        Args:
            name: The name under which the last keys and values are kept.
            query: [B, T, N, H].
            key: [B, T, N, H].
            value: [B, T, N, V].
            window: The number of tokens that a token sees.

        Returns:
            The reads [B, T, N, V].
        """
        before, length = window - 1, query.shape[1]
        query, key, value, seen = map(self._together, (query, key, value, self.seen))
        there = self._continued(f"{name}.there", seen[..., None].astype(jnp.int32), before)[..., 0] > 0
        at = jnp.where(there, jnp.arange(before + length), -1)
        key, value = self._continued(f"{name}.key", key, before), self._continued(f"{name}.value", value, before)
        mask: Mask = Window(before)
        if self.segments is not None:
            segments = self._together(self.segments, -1)
            mask = mask & Documents(jnp.pad(segments, ((0, 0), (before, 0)), constant_values=-1))
        return self._apart(attend(query, key, value, mask=mask, query_positions=at[:, before:], key_positions=at))

    def _together(self, x: Shaped[Array, "b t ..."], fill: int = 0) -> Shaped[Array, "b t ..."]:
        """Returns x of the tokens that are seen, one behind the other, and `fill` in the rest of the row."""
        if self._rank is None:
            return x
        length = x.shape[1]
        return scatter(x, jnp.where(self.seen, self._rank, length), length, fill)

    def _apart(self, x: Shaped[Array, "b t ..."]) -> Shaped[Array, "b t ..."]:
        """Undoes `_together`: the places of tokens that are not seen hold anything finite."""
        if self._rank is None:
            return x if self._lost is None else jnp.where(self._lost.reshape(-1, *(1,) * (x.ndim - 1)), jnp.nan, x)
        return jnp.take_along_axis(x, jnp.maximum(self._rank, 0).reshape(*self._rank.shape, *(1,) * (x.ndim - 2)), 1)

    def _continued(self, name: str, x: Float[Array, "b t ..."], count: int) -> Float[Array, "b count+t ..."]:
        """Returns x, together, behind the last `count` entries before it or zeros, and keeps its own."""
        batch = x.shape[0]
        held = self.held.get(name, jnp.zeros((batch, count, *x.shape[2:]), x.dtype))
        whole = jnp.concatenate([held.astype(x.dtype), x], 1)
        end = self.seen.sum(-1)
        last = (end[:, None] + jnp.arange(count)).reshape(batch, count, *(1,) * (x.ndim - 2))
        self.kept[name] = jnp.take_along_axis(whole, last, 1).astype(held.dtype)
        return whole


class Mechanism(nnx.Module):
    """The base class of mechanisms, of which a recurrence is made.

    Attributes:
        in_features: The channels of its input x.
        keys_from: As of `Mixer`. With "layer" the mechanism reads `Past.layer`, which one with "self" gave as
            `Past.given`.
    """

    in_features: int
    keys_from: str = "none"

    def inputs(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"], past: Past) -> tuple[MemoryInputs, Any]:
        """Returns a pair: the inputs of the memory, and whatever else `output` needs.

        Args:
            x: [B, T, D].
            positions: [B, T], in packed rows within each document.
            past: The arrays of earlier tokens.
        """
        raise NotImplementedError

    def output(self, read: Float[Array, "b t n v"], rest: Any) -> Float[Array, "b t d"]:
        """Returns y from the reads of each head.

        Args:
            read: [B, T, N, V].
            rest: The second result of `inputs`.
        """
        raise NotImplementedError


def as_mixer(slot: Any, **sizes: Any) -> Mixer:
    """Returns the mixer that stands in a slot: a module, or a `Spec` that is built with `sizes`.

    A mechanism becomes `Recurrent`.
    """
    module = built(slot, **sizes)
    return Recurrent(module) if isinstance(module, Mechanism) else module


class Recurrent(Mixer):
    """y = output(memory(inputs(x))): a mixer whose state does not grow.

    At the site `weights` stands the mixing matrix of the memory, which can be recorded, and not edited.

    Args:
        mechanism: A mechanism of this package, or your own.
        chunk: The number of tokens worked on at once in training, for speed alone.
    """

    sites: ClassVar = ("q", "k", "v", "weights", "z", "attn_out")
    recorded_only: ClassVar = ("weights",)

    def __init__(self, mechanism: Mechanism, *, chunk: int | None = None):
        self.mechanism, self.chunk = mechanism, chunk

    @property
    def keys_from(self) -> str:  # type: ignore[override]
        """The `keys_from` of the mechanism; "none" for a module that only has the methods of one."""
        return self.mechanism.keys_from if isinstance(self.mechanism, Mechanism) else "none"

    def __call__(
        self,
        x: Float[Array, "b t d"],
        tokens: Tokens | None = None,
        tap: Tap | None = None,
        state: dict[str, Any] | None = None,
        context: Array | None = None,
        give: dict[str, Any] | None = None,
    ) -> tuple[Float[Array, "b t d"], dict[str, Any] | None]:
        """Mixes the tokens of x.

        The memory does not see padding, and in packed rows every document begins with an empty memory.

        Args:
            x: [B, T, D].
            tokens: As of any mixer.
            tap: As of any mixer.
            state: As of any mixer.
            context: What the layer before gave, for a mechanism with keys_from="layer"; None for others.
            give: A dict that takes under "keys" what a mechanism with keys_from="self" gives to later layers.

        Returns:
            A pair (y, state), as of any mixer.

        Raises:
            ValueError: The mask of the tokens is other than `Documents(ids)` and `Causal()`, which is what a recurrence
                is anyway. Or there is a context that the mechanism does not read, or none for one that does, or
                documents together with a state, or a mask or state for a mechanism that reads all of a row; or an input
                has another width, a site is unknown, `weights` is edited, recorded with a state, or recorded by a
                measure.
        """
        tokens, tap = self.started(x, tokens, tap, state)
        if self.keys_from != "layer" and context is not None:
            raise ValueError("context is given: a recurrent mixer sees only its own tokens")
        if self.keys_from == "layer" and getattr(context, "shape", None) is None:
            raise ValueError(f"context is {context!r}: need what the layer before gave, an array [batch, length, ...]")
        if x.ndim != 3 or x.shape[-1] != self.mechanism.in_features:
            raise ValueError(f"x has shape {x.shape}: need [batch, length, {self.mechanism.in_features}]")
        batch, length, _ = x.shape
        segments = tokens.segments(batch)
        if segments is not None and state is not None:
            raise ValueError("mask has documents and a state is given: need one or the other")
        positions, seen = jnp.broadcast_to(tokens.positions, (batch, length)), tokens.seen(batch)
        x = tokens.clean(x)

        past = Past({} if state is None else state["past"], seen, segments, padded=tokens.padded)
        past.layer = context
        inputs, rest = self.mechanism.inputs(x, past.places(positions), past)
        if getattr(inputs, "read", "post") == "all" and (tokens.mask is not None or state is not None):
            given = "mask" if state is None else "state"
            raise ValueError(f"{given} is given, but this mixer reads all of a row at once: need None")
        if give is not None:
            give["keys"] = past.given
        inputs = inputs.tapped(tap)
        segments = None if segments is None else in_order(segments)
        if tap.wants("weights") and state is not None:
            raise ValueError("record has 'weights', which leave out what a state holds: need state=None")
        for name, (site, reducer) in tap.asked.items():
            if site == "weights" and isinstance(reducer, Measure):
                raise ValueError(f"record {name!r} is a measure of weights, which are those of attention: need Whole()")
        if tap.wants("weights"):
            tap("weights", inputs.weights(seen, segments))
        z, memory = inputs.run(None if state is None else state["memory"], seen, segments, self.chunk)
        y = tap("attn_out", self.mechanism.output(tap("z", z), rest))
        if state is not None:
            last = jnp.maximum(positions.max(-1) + 1, state["position"])
            state = {"memory": memory, "past": past.kept, "position": last}
        return y, state

    def reached(self, state: dict[str, Any]) -> Int[Array, " b"]:
        """Returns the position after the last token that the state has seen."""
        return state["position"]

    def init_state(self, batch: int, capacity: int, store: Any = None) -> dict[str, Any]:
        """Returns the state before any token; its size does not depend on `capacity`."""
        nothing = jnp.zeros((batch, 1, self.mechanism.in_features))
        past = Past({}, jnp.zeros((batch, 1), bool), None)
        inputs, _ = self.mechanism.inputs(nothing, jnp.full((batch, 1), -1), past)
        _, memory = inputs.run(None, past.seen, None, None)
        return {"memory": memory, "past": past.kept, "position": jnp.zeros(batch, jnp.int32)}
