"""The recurrence of linear attention in its forms: token by token, and as chunks that are affine maps of the state.

A chunk of tokens is an affine map of the state it starts from, both in what it reads and in the state it leaves. So
every form but `steps` is the same chunks: one of them (parallel), a scan over their maps (chunk), a tree of them
(associative).
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.decay import decay_matrix, decayed_scores, ends, unit_lower_inverse
from jaxattn.core.parts import part
from jaxattn.core.score import accumulator, product

Read = Literal["post", "pre", "all"]

CHUNK = 32  # tokens
SPAN = 8  # chunks worked on at once; the state is kept for the backward pass once per span


@part
class Delta:
    """The delta rule: β_t of what the memory returns for key t is replaced by β_t of value t.

    S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t−1} + β_t k_t v_tᵀ: a step of size β_t of gradient descent on
    ½ ‖S ᵀ k_t − v_t‖² after the decay. With ‖k‖ = 1, β in [0, 1] forgets what k held in part or in full, and β in
    (1, 2] turns it around. Schlag et al. (2021), Yang et al. (2024).

    Attributes:
        beta: [..., T, N], at least 0; at most 2 / ‖k‖² for a memory that does not grow.
    """

    beta: Float[Array, "..."]


@part
class Erase:
    """The general correction of rank one: S_t = diag(e^{g_t}) S_{t−1} + write_t (read_tᵀ S_{t−1}) + k_t v_tᵀ.

    `read` sees the state before the decay. The delta rule is read = e^g ⊙ k, write = −β k with the key β k; RWKV-7
    (Peng et al., 2025) is read = −κ, write = κ ⊙ a.

    Attributes:
        read: [..., T, N, K].
        write: [..., T, N, K].
    """

    read: Float[Array, "..."]
    write: Float[Array, "..."]


class StateMap(NamedTuple):
    """What some tokens do to the state: S ↦ through S + add; through is a diagonal [..., K] or a matrix [..., K, K]."""

    through: Float[Array, "..."]
    add: Float[Array, "... k v"]

    def __call__(self, memory: Float[Array, "... k v"]) -> Float[Array, "... k v"]:
        """The state after the tokens, from the state before them."""
        return self.keep(memory) + self.add

    def keep(self, memory: Float[Array, "... k v"]) -> Float[Array, "... k v"]:
        """through S: what the tokens leave of a state."""
        return self.through[..., None] * memory if self.is_diagonal else product(self.through, memory)

    @property
    def is_diagonal(self) -> bool:
        """Whether through is [..., K], as it is when nothing is erased."""
        return self.through.ndim < self.add.ndim


def combine(first: StateMap, second: StateMap) -> StateMap:
    """The map of the tokens of `first` and then those of `second`. Associative, with the identity (1, 0).

    Shards of a sequence, each with its own map, are joined by it (context parallelism): the state that a shard starts
    from is the maps of the shards before it, combined.
    """
    if first.is_diagonal and second.is_diagonal:
        return StateMap(second.through * first.through, second(first.add))
    through = _diagonal(first.through) if first.is_diagonal else first.through
    return StateMap(second.keep(through), second(first.add))


def _diagonal(entries: Float[Array, "... k"]) -> Float[Array, "... k k"]:
    return entries[..., None] * jnp.eye(entries.shape[-1], dtype=entries.dtype)


class Tokens(NamedTuple):
    """Tokens of a call: query [..., T, M, R, K] for R queries of each state, others [..., T, M or 1, 1, K, V or 1]."""

    query: Array
    key: Array
    value: Array
    log_decay: Array | None
    erase: Delta | Erase | None
    bonus: Array | None  # Σ_k bonus_k query_k key_k


class _Chunk(NamedTuple):
    """A chunk as an affine map of the state S it starts from: it reads own + inflow S, and leaves leaves(S)."""

    own: Float[Array, "... c v"]
    inflow: Float[Array, "... c k"]
    leaves: StateMap


def steps(tokens: Tokens, memory: Array, read: Read) -> tuple[Array, Array]:
    """The definition, token by token."""

    def step(memory: Array, token: Tokens) -> tuple[Array, Array]:
        query, key, value, log_decay, erase, bonus = jax.tree.map(lambda x: x.astype(memory.dtype)[..., None, :], token)
        before, new = memory, product(key.swapaxes(-1, -2), value)
        if log_decay is not None:
            memory = jnp.exp(log_decay).swapaxes(-1, -2) * memory
        if isinstance(erase, Delta):
            new = product(key.swapaxes(-1, -2), erase.beta * (value - product(key, memory)))
        elif isinstance(erase, Erase):
            new = new + product(erase.write.swapaxes(-1, -2), product(erase.read, before))
        memory = memory + new
        out = product(query, before if read == "pre" else memory)
        return memory, (out if bonus is None else out + bonus * value)[..., 0, :]

    memory, out = jax.lax.scan(step, memory, jax.tree.map(lambda x: jnp.moveaxis(x, -4, 0), tokens))
    return memory, jnp.moveaxis(out, 0, -4)


def chunks(tokens: Tokens, memory: Array, read: Read, chunk: int, associative: bool) -> tuple[Array, Array]:
    """Spans of chunks: all of a span but the state is worked out at once. A span is recomputed in the backward pass, so
    what is kept is the tokens and one state per span."""
    length = tokens.key.shape[-4]
    count = -(-length // chunk)
    spans = 1 if associative else -(-count // SPAN)

    def span(memory: Array, tokens: Tokens) -> tuple[Array, Array]:
        own, inflow, leaves = maps(jax.tree.map(partial(cut, size=chunk), tokens), read)
        if associative:
            after = jax.lax.associative_scan(combine, leaves)(memory)
            starts, memory = jnp.concatenate([memory[None], after[:-1]]), after[-1]
        else:
            memory, starts = jax.lax.scan(lambda memory, leaves: (leaves(memory), memory), memory, leaves)
        return memory, _uncut(own + product(inflow, starts))

    if spans == 1:
        memory, out = span(memory, tokens)
    else:
        size = -(-count // spans) * chunk
        by_span = jax.tree.map(lambda x: jnp.moveaxis(_blocks(x, size), -5, 0), tokens)
        memory, out = jax.lax.scan(jax.checkpoint(span), memory, by_span)
        out = jnp.moveaxis(out, 0, -5)
        out = out.reshape(*out.shape[:-5], -1, *out.shape[-3:])
    return memory, out[..., :length, :, :, :]


def _blocks(x: Float[Array, "... t m r x"], size: int) -> Float[Array, "... blocks size m r x"]:
    """Time cut into blocks; what is missing in the last is filled with zeros, tokens that do nothing."""
    missing = -x.shape[-4] % size
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 4) + [(0, missing)] + [(0, 0)] * 3)
    return x.reshape(*x.shape[:-4], -1, size, *x.shape[-3:])


def cut(x: Float[Array, "... t m r x"], size: int) -> Float[Array, "chunks ... m r size x"]:
    return jnp.moveaxis(jnp.moveaxis(_blocks(x, size), -4, -2), -5, 0)


def _uncut(x: Float[Array, "chunks ... m r size x"]) -> Float[Array, "... t m r x"]:
    x = jnp.moveaxis(jnp.moveaxis(x, 0, -5), -2, -4)
    return x.reshape(*x.shape[:-5], -1, *x.shape[-3:])


def maps(tokens: Tokens, read: Read) -> _Chunk:
    """Each chunk as an affine map of the state it starts from."""
    dtype = accumulator(*jax.tree.leaves(tokens))
    query, key, value, log_decay, erase, bonus = jax.tree.map(lambda x: x.astype(dtype), tokens)
    before = read == "pre"
    kept, after = (None, None) if log_decay is None else ends(log_decay)
    matrix = None if log_decay is None or log_decay.shape[-1] > 1 else decay_matrix(log_decay)

    def scores(rows: Array, columns: Array, before: bool = False) -> Array:
        if before:  # what row i sees before its token is what it would see after token i − 1
            earlier = jnp.concatenate([rows[..., 1:, :], rows[..., :1, :]], -2)
            return _after(scores(earlier, columns), 0.0)
        if log_decay is not None and matrix is None:
            return decayed_scores(rows, columns, log_decay)
        plain = product(rows, columns.swapaxes(-1, -2))
        return jnp.tril(plain) if matrix is None else plain * matrix

    def inflow(rows: Array, before: bool = False) -> Array:
        return rows if kept is None else rows * (_after(kept, 1.0) if before else kept)

    def outflow(columns: Array) -> Array:
        return (columns if after is None else columns * after).swapaxes(-1, -2)

    # What is written: columns [C, K], the values that go there [C, V], and what those take from the state [C, K].
    writes: list[tuple[Array, Array, Array | None]] = [(key, value, None)]
    if isinstance(erase, Delta):
        solved = unit_lower_inverse(erase.beta * scores(key, key))
        solved = solved * erase.beta.swapaxes(-1, -2)
        writes = [(key, product(solved, value), -product(solved, inflow(key)))]
    elif isinstance(erase, Erase):
        solved = unit_lower_inverse(-scores(erase.read, erase.write, True))
        erased = product(solved, product(scores(erase.read, key, True), value))
        writes.append((erase.write, erased, product(solved, inflow(erase.read, True))))

    weights, out = [[f(columns) for columns, _, _ in writes] for f in (partial(scores, query, before=before), outflow)]
    own = jnp.zeros((), dtype) if bonus is None else bonus * value
    own = sum((product(a, values) for a, (_, values, _) in zip(weights, writes, strict=True)), own)
    add = sum((product(a, values) for a, (_, values, _) in zip(out, writes, strict=True)), jnp.zeros((), dtype))
    into = inflow(query, before)
    through = jnp.broadcast_to(1.0 if kept is None else kept[..., -1, :], add.shape[:-1]).astype(dtype)
    if (taken := writes[-1][-1]) is not None:
        into, through = into + product(weights[-1], taken), _diagonal(through) + product(out[-1], taken)
    return _Chunk(own, into, StateMap(through, add))


def _after(x: Float[Array, "... t x"], first: float) -> Float[Array, "... t x"]:
    """x a row later, the first row filled."""
    return jnp.concatenate([jnp.full_like(x[..., :1, :], first), x[..., :-1, :]], -2)
