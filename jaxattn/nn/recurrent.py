"""Recurrent mixers: `Recurrent(mechanism)` has the protocol of every mixer, and a state of fixed size.

A mechanism says what the memory of `linear_attention` gets from the input (`inputs`) and how what is read becomes the
output (`output`); it holds the parameters. What it needs of earlier tokens besides the memory, such as the last inputs
of a convolution, it asks of `Past`.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.linear import linear_attention, mixing_matrix
from jaxattn.core.mask import And, Causal, Documents, Mask
from jaxattn.core.recurrence import Delta, Erase, Read
from jaxattn.nn.sites import Recorder


class Inputs(NamedTuple):
    """The arguments of `linear_attention`."""

    query: Float[Array, "b t n k"]
    key: Float[Array, "b t m k"]
    value: Float[Array, "b t m v"]
    log_decay: Array | None = None
    erase: Delta | Erase | None = None
    bonus: Array | None = None
    read: Read = "post"


class Past:
    """What is carried from earlier tokens, by name: `held` before this call, `kept` after it.

    Tokens that are not `seen` (padding) are as if they were not there; `starts` marks the first token of a document in
    a packed row (None: nothing is packed).
    """

    def __init__(self, held: dict[str, Array], seen: Bool[Array, "b t"], segments: Int[Array, "b t"] | None):
        self.held, self.seen, self.segments = held, seen, segments
        self.kept: dict[str, Array] = {}

    @property
    def starts(self) -> Bool[Array, "b t"] | None:
        return None if self.segments is None else self.segments != _earlier(self.segments, 1, -1)

    def lags(self, name: str, x: Float[Array, "b t c"], width: int) -> list[Float[Array, "b t c"]]:
        """x as it was 0, 1, ..., width − 1 tokens ago; zeros before the sequence or document began."""
        x = jnp.where(self.seen[..., None], x, 0)
        batch, length, channels = x.shape
        held = self.held.get(name, jnp.zeros((batch, width - 1, channels), x.dtype))
        whole = jnp.concatenate([held.astype(x.dtype), x], 1)
        end = jnp.where(self.seen, jnp.arange(1, length + 1), 0).max(-1)  # tokens up to the last that is there
        last = end[:, None] + jnp.arange(width - 1)
        self.kept[name] = jnp.take_along_axis(whole, last[..., None], 1).astype(held.dtype)
        lagged = [whole[:, width - 1 - lag : width - 1 - lag + length] for lag in range(width)]
        if self.segments is None:
            return lagged
        same = [self.segments == _earlier(self.segments, lag, -1) for lag in range(width)]
        return [jnp.where(each[..., None], y, 0) for each, y in zip(same, lagged, strict=True)]


def _earlier(x: Int[Array, "b t"], lag: int, fill: int) -> Int[Array, "b t"]:
    return jnp.pad(x, ((0, 0), (lag, 0)), constant_values=fill)[:, : x.shape[1]]


class Mechanism(Protocol):
    """What a recurrence is made of. Its input x has `in_features` channels."""

    in_features: int

    def inputs(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"], past: Past) -> tuple[Inputs, Any]:
        """What the memory gets, and whatever else `output` needs."""

    def output(self, read: Float[Array, "b t n v"], rest: Any) -> Float[Array, "b t d"]:
        """y from what each head read."""


class Recurrent(nnx.Module):
    """y = output(linear_attention(inputs(x))): a mixer whose state does not grow.

    mechanism: one of this package's, or your own. chunk: tokens worked on at once in training; speed only.
    Its records: `q`, `k`, `v` as the memory gets them, `weights` (the mixing matrix), `z`, `attn_out`.
    """

    def __init__(self, mechanism: Mechanism, *, chunk: int | None = None):
        self.mechanism, self.chunk = mechanism, chunk

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        context: None = None,
        positions: Int[Array, "#b t"] | None = None,
        mask: Mask | None = None,
        state: dict[str, Any] | None = None,
        record: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], dict[str, Any] | None, dict[str, Array]]:
        """(y, state, records). positions [B, T] or [T]; −1 marks padding, which the memory does not see. With a `state`
        from `init_state` the tokens continue what it holds, and positions default to those after its last.

        mask: `Documents(ids)` for packed rows, where every document begins with an empty memory; `Causal()` is what a
        recurrence is anyway. Raises ValueError for any other mask, a context, documents together with a state, inputs
        of another width, and the record `scores`, which a recurrence does not have.
        """
        tap = Recorder(record)
        if tap.wants("scores"):
            raise ValueError("record has 'scores', which a recurrent mixer does not have: need 'weights' or others")
        if context is not None:
            raise ValueError("context is given: a recurrent mixer sees only its own tokens")
        if x.ndim != 3 or x.shape[-1] != self.mechanism.in_features:
            raise ValueError(f"x has shape {x.shape}: need [batch, length, {self.mechanism.in_features}]")
        batch, length, _ = x.shape
        segments = _segments(mask, batch, length)
        if segments is not None and state is not None:
            raise ValueError("mask has documents and a state is given: need one or the other")
        after = 0 if state is None else state["position"][:, None]
        positions = after + jnp.arange(length) if positions is None else positions
        positions = jnp.broadcast_to(positions, (batch, length))
        seen = positions >= 0 if segments is None else (positions >= 0) & (segments >= 0)

        past = Past({} if state is None else state["past"], seen, segments)
        inputs, rest = self.mechanism.inputs(x, positions, past)
        inputs = _hide(inputs, seen)
        query, key, value, *_ = inputs
        tap("q", query), tap("k", key), tap("v", value)
        gates: dict[str, Any] = {
            "log_decay": inputs.log_decay,
            "erase": inputs.erase,
            "bonus": inputs.bonus,
            "read": inputs.read,
        }
        if tap.wants("weights"):
            tap("weights", mixing_matrix(query, key, **gates, segment_ids=_sorted(segments)))
        memory = None if state is None else state["memory"]
        z, memory = linear_attention(
            query, key, value, **gates, state=memory, segment_ids=_sorted(segments), chunk=self.chunk
        )
        y = tap("attn_out", self.mechanism.output(tap("z", z), rest))
        if state is not None:
            last = jnp.maximum(positions.max(-1) + 1, state["position"])
            state = {"memory": memory, "past": past.kept, "position": last}
        return y, state, tap.records

    def init_state(self, batch: int, capacity: int) -> dict[str, Any]:
        """The state before any token; its size does not depend on `capacity`."""
        nothing = jnp.zeros((batch, 1, self.mechanism.in_features))
        past = Past({}, jnp.zeros((batch, 1), bool), None)
        inputs, _ = self.mechanism.inputs(nothing, jnp.full((batch, 1), -1), past)
        inputs = _hide(inputs, past.seen)
        _, memory = linear_attention(*inputs[:3], log_decay=inputs.log_decay, erase=inputs.erase)
        return {"memory": memory, "past": past.kept, "position": jnp.zeros(batch, jnp.int32)}


def _segments(mask: Mask | None, batch: int, length: int) -> Int[Array, "b t"] | None:
    """The document of each token, from a mask that a recurrence can keep."""
    if mask is None or isinstance(mask, Causal):
        return None
    if isinstance(mask, And):
        both = [each for each in (mask.first, mask.second) if not isinstance(each, Causal)]
        if len(both) < 2:
            return _segments(both[0] if both else None, batch, length)
    if isinstance(mask, Documents) and mask.key_ids is None and jnp.shape(mask.ids)[-1] == length:
        return jnp.broadcast_to(jnp.asarray(mask.ids), (batch, length))
    raise ValueError(
        f"mask is {type(mask).__name__}: a recurrent mixer takes None, Causal() or Documents(ids) with one id per token"
    )


def _sorted(segments: Int[Array, "b t"] | None) -> Int[Array, "b t"] | None:
    """Segments numbered in their order, whatever their ids were; padding (−1) goes with the segment before it."""
    if segments is None:
        return None
    return jnp.cumsum((segments != _earlier(segments, 1, -1)) & (segments >= 0), -1)


def _hide(inputs: Inputs, seen: Bool[Array, "b t"]) -> Inputs:
    """Tokens that are not seen neither write nor erase, and nothing decays at them."""

    def only(x: Array) -> Array:
        return jnp.where(seen.reshape(*seen.shape, *(1,) * (x.ndim - 2)), x, 0)

    log_decay = inputs.log_decay if inputs.log_decay is None or inputs.log_decay.ndim > 1 else None
    if inputs.log_decay is not None and log_decay is None:  # one per head, for every token
        log_decay = jnp.broadcast_to(inputs.log_decay, (*seen.shape, *inputs.log_decay.shape))
    hidden = jax.tree.map(only, (inputs.key, inputs.value, log_decay, inputs.erase))
    key, value, log_decay, erase = hidden
    return inputs._replace(key=key, value=value, log_decay=log_decay, erase=erase)
