"""The recurrence of linear attention in its forms: token by token, and as chunks that are affine maps of the state.

A chunk of tokens is an affine map of the state it starts from, both in the outputs it reads and in the state it leaves.
So every form but `steps` uses the same chunks: one of them (parallel), a scan over them (chunk), a tree over their maps
(associative).
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.linear.decay import (
    MILD,
    ChannelDecay,
    Decay,
    HeadDecay,
    MildDecay,
    NoDecay,
    decayed,
    heads,
    unit_lower_inverse,
)
from jaxattn.core.matmul import accumulator, product
from jaxattn.core.mesh import vary_like
from jaxattn.core.part import part

Read = Literal["post", "pre", "all"]

CHUNK = 32  # tokens
SMALL = 8  # tokens of the smaller chunks that a chunk is cut into where its channels forget much


@part
class Delta:
    """The delta rule: β_t of the value that the memory returns for key t is replaced by β_t of value t.

        S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t−1} + β_t k_t v_tᵀ

    The rule is a step of size β_t of gradient descent on ½ ‖S ᵀ k_t − v_t‖² after the decay. With ‖k‖ = 1, β in [0, 1]
    forgets the value of k in part or in full, and β in (1, 2] turns it around. Schlag et al. (2021), Yang et al.
    (2024).

    Attributes:
        beta: [..., T, N], at least 0; at most 2 / ‖k‖² for a memory that does not grow.
    """

    beta: Float[Array, "..."]


@part
class Erase:
    """The general correction of rank one: S_t = diag(e^{g_t}) S_{t−1} + write_t (read_tᵀ S_{t−1}) + k_t v_tᵀ.

    The delta rule is read = e^g ⊙ k, write = −β k with the key β k. RWKV-7 (Peng et al., 2025) is read = −κ,
    write = κ ⊙ a.

    Attributes:
        read: [..., T, N, K], applied to the state before the decay.
        write: [..., T, N, K].
    """

    read: Float[Array, "..."]
    write: Float[Array, "..."]


class StateMap(NamedTuple):
    """The effect of some tokens on the state: S ↦ through S + add.

    Attributes:
        through: A diagonal [..., K] or a matrix [..., K, K].
        add: [..., K, V].
    """

    through: Float[Array, "..."]
    add: Float[Array, "... k v"]

    def __call__(self, memory: Float[Array, "... k v"]) -> Float[Array, "... k v"]:
        """Returns the state after the tokens, from the state before them."""
        return self.keep(memory) + self.add

    def keep(self, memory: Float[Array, "... k v"]) -> Float[Array, "... k v"]:
        """Returns through S, the part of a state that the tokens leave."""
        return decayed(self.through[..., None], memory) if self.is_diagonal else product(self.through, memory)

    @property
    def is_diagonal(self) -> bool:
        """Whether through is [..., K], as it is when nothing is erased."""
        return self.through.ndim < self.add.ndim


def combine(first: StateMap, second: StateMap) -> StateMap:
    """Returns the map of the tokens of `first` and then those of `second`.

    The operation is associative, with the identity (1, 0). It joins shards of a sequence, each with its own map
    (context parallelism): the state that a shard starts from is the maps of the shards before it, combined.
    """
    if first.is_diagonal and second.is_diagonal:
        return StateMap(second.through * first.through, second(first.add))
    through = _diagonal(first.through) if first.is_diagonal else first.through
    return StateMap(second.keep(through), second(first.add))


def _diagonal(entries: Float[Array, "... k"]) -> Float[Array, "... k k"]:
    return entries[..., None] * jnp.eye(entries.shape[-1], dtype=entries.dtype)


class Tokens(NamedTuple):
    """The tokens of a call, [..., T, M, X], or M = 1 where heads share.

    The R queries of each state are the first axis.
    """

    query: Array
    key: Array
    value: Array
    log_decay: Array | None
    erase: Delta | Erase | None
    bonus: Array | None  # Σ_k bonus_k query_k key_k


def steps(tokens: Tokens, memory: Array, read: Read) -> tuple[Array, Array]:
    """Returns (last state, reads of the tokens), by the definition, token by token."""

    def step(memory: Array, token: Tokens) -> tuple[Array, Array]:
        query, key, value, log_decay, erase, bonus = jax.tree.map(lambda x: x.astype(memory.dtype)[..., None, :], token)
        before, new = memory, product(key.swapaxes(-1, -2), value)
        if log_decay is not None:
            memory = decayed(jnp.exp(log_decay).swapaxes(-1, -2), memory)
        if isinstance(erase, Delta):
            new = product(key.swapaxes(-1, -2), erase.beta * (value - product(key, memory)))
        elif isinstance(erase, Erase):
            new = new + product(erase.write.swapaxes(-1, -2), product(erase.read, before))
        memory = memory + new
        out = product(query, before if read == "pre" else memory)
        return memory, (out if bonus is None else out + bonus * value)[..., 0, :]

    memory, out = jax.lax.scan(step, memory, jax.tree.map(lambda x: jnp.moveaxis(x, -3, 0), tokens))
    return memory, jnp.moveaxis(out, 0, -3)


def chunks(tokens: Tokens, memory: Array, read: Read, size: int) -> tuple[Array, Array]:
    """Returns the same as `steps`, by a scan over chunks of `size` tokens.

    Each chunk is computed again in the backward pass, so only the tokens and one state per chunk are kept.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(memory: Array, given: _Chunk) -> tuple[Array, Array]:
        return _walk(given, memory, read)

    memory, out = jax.lax.scan(chunk, memory, _cut(tokens, size))
    return memory, _joined(out, tokens)


def tree(tokens: Tokens, memory: Array, read: Read, size: int) -> tuple[Array, Array]:
    """Returns the same as `steps`, for all chunks at once, from the states that a tree over their maps finds."""
    given = _cut(tokens, size)
    # Chunks are one more batch axis here: after the queries that share a state, which have no place in states.
    shared = tokens.query.ndim - tokens.key.ndim
    by_query = given.tokens.query, given.tokens.bonus
    query, bonus = jax.tree.map(lambda x: jnp.moveaxis(x, 0, shared), by_query)
    given = given._replace(tokens=given.tokens._replace(query=query, bonus=bonus))
    after = jax.lax.associative_scan(combine, _maps(given))(memory)
    _, out = _walk(given, jnp.concatenate([memory[None], after[:-1]]), read)
    return after[-1], _joined(jnp.moveaxis(out, shared, 0), tokens)


def whole_map(tokens: Tokens, size: int) -> StateMap:
    """Returns the effect of all tokens on the state, by the same tree."""
    return jax.tree.map(lambda x: x[-1], jax.lax.associative_scan(combine, _maps(_cut(tokens, size))))


class _Chunk(NamedTuple):
    """Chunks of tokens, and which forget little enough for `MildDecay`; None where no channel decays by itself."""

    tokens: Tokens
    mild: Array | None


def _cut(tokens: Tokens, size: int) -> _Chunk:
    """Cuts time into chunks, [chunks, ..., C, M, X], padded with zeros, which are tokens that do nothing."""

    def cut(x: Array) -> Array:
        *batch, length, states, width = x.shape
        if missing := -length % size:
            x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, missing)] + [(0, 0)] * 2)
        return jnp.moveaxis(x.reshape(*batch, -1, size, states, width), -4, 0)

    cuts = jax.tree.map(cut, tokens)
    if (decay := cuts.log_decay) is None or decay.shape[-1] == 1:
        return _Chunk(cuts, None)
    # Asked once for all chunks, for the shards of a batch have to agree.
    total = decay.astype(jnp.float32).sum(-3)
    return _Chunk(cuts, total.min(tuple(range(1, total.ndim))) >= -MILD)


def _joined(out: Float[Array, "chunks ... c m v"], tokens: Tokens) -> Float[Array, "... t m v"]:
    out = jnp.moveaxis(out, 0, -4)
    return out.reshape(*out.shape[:-4], -1, *out.shape[-2:])[..., : tokens.key.shape[-3], :, :]


def _maps(given: _Chunk) -> StateMap:
    """Returns the effect of each chunk on the state.

    With an erasure, a chunk turns a state [0, I] with values [v, 0] into [add, through].
    """
    tokens = given.tokens
    key, value, log_decay, erase = tokens.key, tokens.value, tokens.log_decay, tokens.erase
    dtype = accumulator(*jax.tree.leaves(tokens))
    states = max(x.shape[-2] for x in jax.tree.leaves((key, value, log_decay, erase)))
    channels, width = key.shape[-1], value.shape[-1]
    shape = (*key.shape[:-3], states, channels)
    if erase is None:
        add, _ = _walk(given, vary_like(jnp.zeros((*shape, width), dtype), tokens), "post")
        kept = 1.0 if log_decay is None else jnp.exp(log_decay.astype(dtype).sum(-3))
        return StateMap(jnp.broadcast_to(kept, shape).astype(dtype), add)
    start = jnp.broadcast_to(jnp.eye(channels, width + channels, width, dtype), (*shape, width + channels))
    nothing = jnp.zeros((*value.shape[:-1], channels), value.dtype)
    tokens = tokens._replace(value=jnp.concatenate([value, nothing], -1), bonus=None)
    after, _ = _walk(given._replace(tokens=tokens), vary_like(start, tokens), "post")
    return StateMap(after[..., width:], after[..., :width])


def _walk(given: _Chunk, memory: Array, read: Read) -> tuple[Array, Array]:
    """Returns (state after a chunk, reads of its tokens), from the state that it starts from [..., M, K, V]."""
    tokens = given.tokens
    if tokens.log_decay is None:
        return _pass(NoDecay, read, tokens, memory)
    if given.mild is None:
        return _pass(HeadDecay, read, tokens, memory)
    if tokens.key.shape[-3] <= SMALL:
        return _pass(ChannelDecay, read, tokens, memory)
    strong = partial(chunks, read=read, size=SMALL)
    return jax.lax.cond(given.mild.all(), partial(_pass, MildDecay, read), strong, tokens, memory)


def _pass(kind: type[Decay], read: Read, tokens: Tokens, memory: Array) -> tuple[Array, Array]:
    tokens = jax.tree.map(lambda x: x.astype(memory.dtype), tokens)
    decay, before = kind.of(tokens.log_decay), read == "pre"
    query, key, value = decay.rows(tokens.query, before), decay.columns(tokens.key), heads(tokens.value)
    writes = [(key, value)]
    if isinstance(tokens.erase, Delta):
        beta, row = heads(tokens.erase.beta), decay.rows(tokens.key)
        error = beta * (value - row.read(memory))
        writes = [(key, product(unit_lower_inverse(beta * decay.scores(row, key)), error))]
    elif isinstance(tokens.erase, Erase):
        row, write = decay.rows(tokens.erase.read, True), decay.columns(tokens.erase.write)
        found = row.read(memory) + product(decay.scores(row, key, True), value)
        writes.append((write, product(unit_lower_inverse(-decay.scores(row, write, True)), found)))
    out = sum((product(decay.scores(query, a, before), b) for a, b in writes), query.read(memory))
    add = sum((product(a.state.swapaxes(-1, -2), b) for a, b in writes), jnp.zeros((), memory.dtype))
    memory = decay.leave(memory, add)
    out = heads(out)
    return memory, out if tokens.bonus is None else out + tokens.bonus * tokens.value
