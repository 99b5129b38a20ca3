"""Decays of a memory within a chunk of tokens.

With a log decay g_t ≤ 0 per token, the weight of token j at token i is exp(g_{j+1} + ... + g_i). Sums of log decays are
products with matrices of zeros and ones. They are never differences of cumulative sums, which would lose digits,
overflow as exp(−G_j), and be NaN where a gate is exactly closed (g = −inf). With G_i = g_1 + ... + g_i,
exp(G_i − G_j) is used only where the whole chunk forgets little.

A decay of a chunk is one of the classes below. Each makes rows of the arrays that read and columns of those that are
written, weighs them against each other, and says how the state passes through the chunk:

    out = scores(rows, columns) values + rows.state S        S' = leave(S, columns.stateᵀ values)

Tokens come time first, [..., C, M, K], which is how they lie in memory and how factors are fastest put on them; rows
and columns are heads first, [..., M, C, K].
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxattn.core.matmul import product

# The log decay of a closed gate in sums, where −inf times a zero would be NaN. Its exponential is 0.
CLOSED = -1e30

# The most that a chunk may forget, as a log decay, for its weights to be products of exp(G_i) and exp(−G_j), of which
# the latter and what is masked is at most e^64: 1e10 is left before float32 ends. Rounding sums of at most 64 changes a
# weight by at most 128 ε of itself.
MILD = 64.0


class Side(NamedTuple):
    """Rows or columns of a chunk, as they go into scores and as they meet the state."""

    scored: Array
    state: Float[Array, "... m c k"]
    reads: Bool[Array, "... m c 1"] | None = None  # whether a row reads anything of the state; None: all do

    def read(self, memory: Float[Array, "... m k v"]) -> Float[Array, "... m c v"]:
        """Returns what the rows find in the state. A state that the chunk has forgotten altogether may be anything."""
        found = product(self.state, memory)
        return found if self.reads is None else jnp.where(self.reads, found, 0)


class Decay(Protocol):
    """The methods that the decays of a chunk share."""

    @classmethod
    def of(cls, log_decay: Any) -> "Decay":
        """Makes the decay of log decays [..., C, M, K or 1]."""

    def rows(self, x: Float[Array, "... c m k"], before: bool = False) -> Side:
        """Returns the rows of arrays that read after their token, or before its decay and write."""

    def columns(self, x: Float[Array, "... c m k"]) -> Side:
        """Returns the columns of arrays that are written."""

    def scores(self, rows: Side, columns: Side, before: bool = False) -> Float[Array, "... m c c"]:
        """Returns A_ij = Σ_k rows_ik exp(g_{j+1} + ... + g_i)_k columns_jk for j ≤ i, else 0.

        With `before`, the sum goes up to g_{i−1}, and j < i.
        """

    def leave(self, memory: Float[Array, "... m k v"], add: Float[Array, "... m k v"]) -> Array:
        """Returns the state after the chunk."""


def decayed(kept: Float[Array, "... m k 1"], memory: Float[Array, "... m k v"]) -> Float[Array, "... m k v"]:
    """Returns kept · memory. A memory that is forgotten altogether may be anything, also infinite."""
    return kept * jnp.where(kept == 0, 0, memory)


def heads(x: Float[Array, "... c m k"]) -> Float[Array, "... m c k"]:
    return jnp.swapaxes(x, -3, -2)


def _shifted(x: Array, first: Array, axis: int) -> Array:
    """Returns x a token later, the first one filled."""
    return jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, -1, axis=axis)], axis)


def _plain_scores(rows: Side, columns: Side, before: bool) -> Array:
    return jnp.tril(product(rows.scored, columns.scored.swapaxes(-1, -2)), -int(before))


class NoDecay(NamedTuple):
    """No decay: nothing is forgotten."""

    @classmethod
    def of(cls, log_decay: None) -> "NoDecay":
        return cls()

    def rows(self, x: Array, before: bool = False) -> Side:
        return Side(heads(x), heads(x))

    def columns(self, x: Array) -> Side:
        return self.rows(x)

    def scores(self, rows: Side, columns: Side, before: bool = False) -> Array:
        return _plain_scores(rows, columns, before)

    def leave(self, memory: Array, add: Array) -> Array:
        return memory + add


class HeadDecay(NamedTuple):
    """One decay per head and token: scores are multiplied by a matrix."""

    matrix: Float[Array, "... m c c"]
    kept: Float[Array, "... m c 1"]
    after: Float[Array, "... m c 1"]

    @classmethod
    def of(cls, log_decay: Float[Array, "... c m 1"]) -> "HeadDecay":
        return cls(decay_matrix(heads(log_decay)), *ends(heads(log_decay)))

    def rows(self, x: Array, before: bool = False) -> Side:
        kept = _shifted(self.kept, jnp.ones_like(self.kept[..., :1, :]), -2) if before else self.kept
        return Side(heads(x), heads(x) * kept, kept != 0)

    def columns(self, x: Array) -> Side:
        return Side(heads(x), heads(x) * self.after)

    def scores(self, rows: Side, columns: Side, before: bool = False) -> Array:
        matrix = _shifted(self.matrix, jnp.zeros_like(self.matrix[..., :1, :]), -2) if before else self.matrix
        return product(rows.scored, columns.scored.swapaxes(-1, -2)) * matrix

    def leave(self, memory: Array, add: Array) -> Array:
        return decayed(self.kept[..., -1:, :], memory) + add


class MildDecay(NamedTuple):
    """One decay per channel, of a chunk that forgets at most `MILD`: exp(G_i) on rows and exp(−G_j) on columns."""

    into: Float[Array, "... c+1 m k"]
    out: Float[Array, "... c m k"]

    @classmethod
    def of(cls, log_decay: Float[Array, "... c m k"]) -> "MildDecay":
        size = log_decay.shape[-3]
        into = np.tri(size + 1, size, -1)
        # One exponential with several readers: XLA would work out one with a single reader while it transposes, slowly.
        sums = _sums(np.concatenate([into, -into[1:]]), log_decay)
        # No sum is that large, but those of a chunk that forgets much and, under `vmap`, is worked out for nothing. The
        # bound is out of reach: at it the derivative would be wrong.
        factors = jnp.exp(jnp.minimum(sums, MILD + 1))
        return cls(factors[..., : size + 1, :, :], factors[..., size + 1 :, :, :])

    def rows(self, x: Array, before: bool = False) -> Side:
        scaled = heads(x * (self.into[..., :-1, :, :] if before else self.into[..., 1:, :, :]))
        return Side(scaled, scaled)

    def columns(self, x: Array) -> Side:
        scaled = heads(x * self.out)
        return Side(scaled, scaled)

    def scores(self, rows: Side, columns: Side, before: bool = False) -> Array:
        return _plain_scores(rows, columns, before)

    def leave(self, memory: Array, add: Array) -> Array:
        return heads(self.into[..., -1:, :, :]).swapaxes(-1, -2) * (memory + add)


class ChannelDecay(NamedTuple):
    """One decay per channel, of any strength.

    A chunk is halved again and again: for i in the second half and j in the first,

        exp(g_{j+1} + ... + g_i) = exp(from the start of i's half to i) exp(from after j to the end of j's half),

    both at most 1, so a level of halves is one product of matrices, of which only these pairs are kept.
    """

    levels: Float[Array, "... l c m k"]
    kept: Float[Array, "... c m k"]
    after: Float[Array, "... c m k"]

    @classmethod
    def of(cls, log_decay: Float[Array, "... c m k"]) -> "ChannelDecay":
        size = log_decay.shape[-3]
        which = np.stack([*_halves(size)[0], np.tri(size), 1 - np.tri(size)])
        factors = jnp.exp(_sums(which, log_decay[..., None, :, :, :]))
        return cls(factors[..., :-2, :, :, :], factors[..., -2, :, :, :], factors[..., -1, :, :, :])

    def rows(self, x: Array, before: bool = False) -> Side:
        if not before:
            reads = heads((self.kept != 0).any(-1, keepdims=True))
            return Side(heads(x[..., None, :, :, :] * self.levels), heads(x * self.kept), reads)
        # What row i sees before its token is what it would see after token i - 1.
        earlier = jnp.roll(x, -1, -3)[..., None, :, :, :]
        kept = _shifted(self.kept, jnp.ones_like(self.kept[..., :1, :, :]), -3)
        return Side(heads(earlier * self.levels), heads(x * kept), heads((kept != 0).any(-1, keepdims=True)))

    def columns(self, x: Array) -> Side:
        return Side(heads(x[..., None, :, :, :] * self.levels), heads(x * self.after))

    def scores(self, rows: Side, columns: Side, before: bool = False) -> Array:
        every = product(rows.scored, columns.scored.swapaxes(-1, -2))
        scores = jnp.where(_halves(every.shape[-1])[1][:, None], every, 0).sum(-4)
        return _shifted(scores, jnp.zeros_like(scores[..., :1, :]), -2) if before else scores

    def leave(self, memory: Array, add: Array) -> Array:
        return decayed(heads(self.kept[..., -1:, :, :]).swapaxes(-1, -2), memory) + add


def _halves(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each level of halves [L, C, C] whose log decays a row or column sums up, and which pairs it is for.

    Level 0 is a token with itself.
    """
    row, column = np.arange(size)[:, None], np.arange(size)
    sums, pairs = [np.zeros((size, size))], [row == column]
    half = 1
    while half < size:
        middle = row // (2 * half) * 2 * half + half
        late = row >= middle
        sums.append(np.where(late, (middle <= column) & (column <= row), (row < column) & (column < middle)))
        pairs.append(late & (column < middle) & (column >= middle - half))
        half *= 2
    return np.stack(sums), np.stack(pairs)


def _sums(which: np.ndarray, log_decay: Float[Array, "... s m k"]) -> Float[Array, "... c m k"]:
    """Sums log decays over tokens s, weighed by the rows of `which` [..., C, S]."""
    flat = jnp.maximum(log_decay, CLOSED).reshape(*log_decay.shape[:-2], -1)
    sums = product(jnp.asarray(which, log_decay.dtype), flat)
    return sums.reshape(*sums.shape[:-1], *log_decay.shape[-2:])


def ends(log_decay: Float[Array, "... c k"]) -> tuple[Float[Array, "... c k"], Float[Array, "... c k"]]:
    """Returns (exp(g_1 + ... + g_i), exp(g_{i+1} + ... + g_C)) for each token i.

    The first is the share of the chunk's starting state that is left at token i, and the second the share of the write
    of token i that is left at the end of the chunk.
    """
    through = jnp.tri(log_decay.shape[-2], dtype=log_decay.dtype)
    finite = jnp.maximum(log_decay, CLOSED)
    return jnp.exp(product(through, finite)), jnp.exp(product(1 - through, finite))


@jax.custom_jvp
def decay_matrix(log_decay: Float[Array, "... c 1"]) -> Float[Array, "... c c"]:
    """Returns D_ij = exp(g_{j+1} + ... + g_i) for j ≤ i, else 0."""
    through = jnp.tri(log_decay.shape[-2], dtype=log_decay.dtype)
    later = jnp.where(through == 0, 0, jnp.maximum(log_decay, CLOSED)) * (1 - jnp.eye(len(through)))
    return jnp.tril(jnp.exp(product(through, later)))


@decay_matrix.defjvp
def _decay_matrix_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Tangents are small and finite, so their sums are differences of cumulative sums."""
    matrix = decay_matrix(*primals)
    change = product(jnp.tri(matrix.shape[-1], dtype=matrix.dtype), *tangents)
    return matrix, matrix * (change - change.swapaxes(-1, -2))


@jax.custom_jvp
def unit_lower_inverse(lower: Float[Array, "... c c"]) -> Float[Array, "... c c"]:
    """Returns (I + lower)⁻¹ for a strictly lower triangular matrix. Entries on or above its diagonal are ignored.

    The inverse of [[P, 0], [R, Q]] is [[P⁻¹, 0], [−Q⁻¹ R P⁻¹, Q⁻¹]], for all blocks of a size at once. With X the
    inverse of the diagonal blocks, the corners are those of −X R X. Doubling, Π (I + lower^{2^i}), has errors of many
    orders of magnitude where keys repeat.
    """
    itself, *levels = _halves(lower.shape[-1])[1]
    inverse = itself - jnp.where(levels[0], lower, 0) if levels else jnp.ones_like(lower)
    for pairs in levels[1:]:
        inverse = inverse - product(product(inverse, jnp.where(pairs, lower, 0)), inverse)
    return inverse


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals: tuple, tangents: tuple) -> tuple:
    inverse = unit_lower_inverse(*primals)
    return inverse, -product(product(inverse, jnp.tril(tangents[0], -1)), inverse)
