"""Titans (Behrouz et al., 2025): attention over little, a memory that learns for the rest, and how they are wired."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.attend.mask import Causal, Mask, Sinks, Window
from jaxattn.core.memory.api import MemoryState, memory_read
from jaxattn.nn.attention import MultiHeadAttention
from jaxattn.nn.hybrid import Chain, Parallel
from jaxattn.nn.learning import NeuralMemory
from jaxattn.nn.mixer import Mixer
from jaxattn.nn.norm import RMSNorm
from jaxattn.nn.packing import scan_segments, where_row
from jaxattn.nn.parameter import undecayed
from jaxattn.nn.prefix import Prefixed
from jaxattn.nn.recurrent import Past, Recurrent
from jaxattn.nn.spec import Spec, built
from jaxattn.nn.tokens import Tokens

MemorySlot: TypeAlias = Spec | NeuralMemory


def memory_as_gate(
    features: int,
    heads: int,
    memory: MemorySlot,
    *,
    window: int,
    persistent: int,
    eps: float = 1e-6,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """MAG: y = norm(attention(X̃)) ⊙ σ(norm(M(X̃))),  X̃ = [P; X], attention over P and the last `window` tokens.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads of the attention.
        memory: M, a `NeuralMemory` or a spec of one.
        window: The number of tokens that a token sees, at least 1.
        persistent: The number of tokens of P, at least 0.
        eps: The eps of the norms.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `window` or `persistent` is too small, or `heads` is no divisor of `features`.
    """
    learning: NeuralMemory = built(memory, features=features, dtype=dtype, rngs=rngs)
    attention = _near_attention(features, heads, window, persistent, dtype, rngs)
    mixer = Parallel(features, [attention, Recurrent(learning)], fuse="gate", eps=eps, dtype=dtype, rngs=rngs)
    return _behind(mixer, features, learning, persistent, rngs)


def memory_as_layer(
    features: int, heads: int, memory: MemorySlot, *, window: int, persistent: int, dtype: Any = None, rngs: nnx.Rngs
) -> nnx.Module:
    """MAL: y = attention(M([P; X])), attention over P and the last `window` tokens.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads of the attention.
        memory: M, a `NeuralMemory` or a spec of one.
        window: The number of tokens that a token sees, at least 1.
        persistent: The number of tokens of P, at least 0.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: `window` or `persistent` is too small, or `heads` is no divisor of `features`.
    """
    learning: NeuralMemory = built(memory, features=features, dtype=dtype, rngs=rngs)
    attention = _near_attention(features, heads, window, persistent, dtype, rngs)
    return _behind(Chain([Recurrent(learning), attention]), features, learning, persistent, rngs)


def _near_attention(
    features: int, heads: int, window: int, persistent: int, dtype: Any, rngs: nnx.Rngs
) -> MultiHeadAttention:
    if window < 1 or persistent < 0:
        raise ValueError(f"need window >= 1 and persistent >= 0, got {window} and {persistent}")
    mask: Mask = Window(window - 1)
    if persistent:
        mask = Causal() & (mask | Sinks(persistent))
    return MultiHeadAttention(features, heads, mask=mask, dtype=dtype, rngs=rngs)


def _behind(mixer: nnx.Module, features: int, memory: NeuralMemory, persistent: int, rngs: nnx.Rngs) -> nnx.Module:
    if not persistent:
        return mixer
    return Prefixed(mixer, features, persistent, documents=memory.documents, rngs=rngs)


class MemoryAsContext(Mixer):
    """MAC: attention within segments, each of which reads the recall of a memory M and writes to M.

        h_j = M_{s−1}(x_j)                      M after the segment before
        y = attention([P; h; X_s]) at X_s       causal: x_i sees P, and h_j and x_j for j <= i
        o_i = norm(y_i) ⊙ σ(norm(M_i(y_i)))     M_i: after y_1, …, y_i were written

    As h_j depends on x_j, all three are causal, token by token; the paper reads M after the whole segment. Positions
    count within the segment, P first, then h_1, x_1, h_2, x_2, …

    The state holds the memory as it is and as it was, and a segment of keys. With a state, tokens are read one after
    the other.

    Args:
        features: D, the channels of x and y.
        heads: N, the number of heads of the attention.
        memory: A `NeuralMemory` without a convolution, or a spec of one. Its `inner_batch` must divide `segment`, or a
            segment would end inside one.
        segment: The number of tokens of a segment.
        persistent: The number of tokens of P, at least 0.
        eps: The eps of the norms.
        dtype: The dtype of the computation; parameters are float32.
        rngs: Streams for the initial parameters.

    Raises:
        ValueError: The memory has a convolution, `segment` is no multiple of its `inner_batch`, or `persistent` is
            negative.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        memory: MemorySlot,
        *,
        segment: int,
        persistent: int,
        eps: float = 1e-6,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        learning: NeuralMemory = built(memory, features=features, dtype=dtype, rngs=rngs)
        if learning.project.convolution:
            raise ValueError("memory has a convolution, which memory as context has no place for: need convolution=0")
        if segment < 1 or segment % learning.inner_batch:
            raise ValueError(f"segment is {segment}: need a multiple of inner_batch, which is {learning.inner_batch}")
        if persistent < 0:
            raise ValueError(f"persistent must be at least 0, got {persistent}")
        self.in_features, self.segment, self.memory = features, segment, learning
        self.attention = MultiHeadAttention(features, heads, mask=Causal(), dtype=dtype, rngs=rngs)
        self.count = persistent
        self.persistent = (
            undecayed(jax.random.normal(rngs.params(), (persistent, features)), None, "width") if persistent else None
        )
        self.norms = nnx.List([RMSNorm(features, eps=eps, dtype=dtype) for _ in range(2)])

    def __call__(self, x, tokens=None, tap=None, state=None, context=None):
        """Returns (y, state), with the errors of `Recurrent`."""
        tokens, tap = self.started(x, tokens, tap, state)
        if context is not None:
            raise ValueError("context is given: a memory sees only its own tokens")
        if x.ndim != 3 or x.shape[-1] != self.in_features:
            raise ValueError(f"x has shape {x.shape}: need [batch, length, {self.in_features}]")
        batch = x.shape[0]
        segments, seen = tokens.segments(batch), tokens.seen(batch)
        if segments is not None and state is not None:
            raise ValueError("mask has documents and a state is given: need one or the other")
        if state is None:
            given: dict[str, Any] = {"size": self.segment, "documents": self.memory.documents}
            y = scan_segments(self._segment, self._start(batch), x, seen, segments, **given)
        else:
            y, state = self._tokens(x, seen, state)
            last = jnp.broadcast_to(tokens.positions, seen.shape).max(-1) + 1
            state |= {"position": jnp.maximum(state["position"], last)}
        return tap("attn_out", y), state

    def reached(self, state: dict[str, Any]) -> Int[Array, " b"]:
        """Returns the position after the last token that the state has seen."""
        return state["position"]

    def init_state(self, batch: int, capacity: int, store: Any = None) -> dict[str, Any]:
        """Returns the state before any token; its size does not depend on `capacity`."""
        memory, nothing = self._start(batch), jnp.zeros(batch, jnp.int32)
        return {"memory": memory, "before": memory, "keys": self._opened(batch), "count": nothing, "position": nothing}

    def _segment(self, memory: MemoryState, x: Float[Array, "b t d"], filled: Bool[Array, "b t"]) -> Any:
        return self._learn(self._attend(x, self._recall(x, memory), filled), filled, memory)

    def _tokens(self, x, seen, state):
        """Returns (y, state), read token by token."""
        opened = self._opened(x.shape[0])

        def one(state: dict[str, Any], given: tuple[Array, Array]) -> tuple[dict[str, Any], Array]:
            x, seen = given
            place = state["count"] % self.segment
            opens = place == 0
            before, keys = where_row(opens, state["memory"], state["before"]), where_row(opens, opened, state["keys"])
            h = self._recall(x[:, None], before)
            pair = jnp.concatenate([h, x[:, None]], 1)
            positions = jnp.where(seen[:, None], self.count + 2 * place[:, None] + jnp.arange(2), -1)
            y, keys = self.attention(pair, Tokens.of(pair, positions=positions), state=keys)
            memory, out = self._learn(y[:, 1:], seen[:, None], state["memory"])
            after = {"memory": memory, "before": before, "keys": keys, "count": state["count"] + 1}
            return where_row(seen, after | {"position": state["position"]}, state), out[:, 0]

        state, y = jax.lax.scan(one, state, (jnp.moveaxis(x, 1, 0), seen.T))
        return jnp.moveaxis(y, 0, 1), state

    def _start(self, batch: int) -> MemoryState:
        """Returns the memory before any token."""
        nothing = jnp.zeros((batch, 1, self.in_features))
        return self._learn(nothing, jnp.zeros((batch, 1), bool), None)[0]

    def _opened(self, batch: int) -> Any:
        """Returns the keys of a segment that holds P alone."""
        keys: Any = self.attention.init_state(batch, self.count + 2 * self.segment)
        if self.persistent is not None:
            _, keys = self.attention(self._persistent(batch), state=keys)
        return keys

    def _persistent(self, batch: int) -> Float[Array, "b n d"]:
        persistent = jnp.zeros((0, self.in_features)) if self.persistent is None else self.persistent[...]
        return jnp.broadcast_to(persistent, (batch, *persistent.shape))

    def _inputs(self, x: Float[Array, "b t d"], seen: Bool[Array, "b t"]) -> tuple[Any, Any]:
        return self.memory.inputs(x, jnp.where(seen, 0, -1), Past({}, seen, None, padded=False))

    def _recall(self, x: Float[Array, "b t d"], memory: MemoryState) -> Float[Array, "b t d"]:
        inputs, rest = self._inputs(x, jnp.ones(x.shape[:2], bool))
        return self.memory.output(memory_read(inputs.memory, inputs.query, link=inputs.link, state=memory), rest)

    def _attend(self, x: Float[Array, "b t d"], h: Float[Array, "b t d"], filled: Bool[Array, "b t"]) -> Array:
        """Returns the attention of a segment to P, h and itself."""
        batch, size, _ = x.shape
        count = self.count
        places = count + 2 * jnp.arange(size)
        of_h, of_x = (jnp.where(filled, each, -1) for each in (places, places + 1))
        positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(count), (batch, count)), of_h, of_x], 1)
        tokens = jnp.concatenate([self._persistent(batch).astype(x.dtype), h, x], 1)
        y, _ = self.attention(tokens, Tokens.of(tokens, positions=positions))
        return y[:, count + size :]

    def _learn(self, y: Float[Array, "b t d"], seen: Bool[Array, "b t"], memory: MemoryState | None) -> Any:
        """Returns the memory after y was written, and the output."""
        inputs, rest = self._inputs(y, seen)
        read, memory = inputs.run(memory, seen, None, None)
        norm, gate_norm = self.norms
        return memory, norm(y) * nnx.sigmoid(gate_norm(self.memory.output(read, rest)))
