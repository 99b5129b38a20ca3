"""What a memory forgets within a chunk of tokens, as factors that are all at most 1.

With a log decay g_t <= 0 per token, the weight of token j at token i is exp(g_{j+1} + ... + g_i). The sum is never a
difference of cumulative sums, which would lose digits, overflow as exp(-G_j), and be NaN where a gate is exactly closed
(g = -inf). Instead a chunk is halved again and again: for i in the second half and j in the first,

    exp(g_{j+1} + ... + g_i) = exp(from the start of i's half to i) exp(from after j to the end of j's half),

both at most 1, so one half against the other is one matrix product, also where every channel decays by itself.
Tangents are small and finite, so theirs are differences of cumulative sums G: those of exp(G_i - G_j) are (dG_i - dG_j)
times it, which costs a reverse pass two sums instead of the whole tree. Chunks have a power of two of tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.core.score import product


def _halves(x: Array, size: int, axis: int) -> tuple[Array, Array]:
    """The first and the second halves of all blocks of 2 size tokens, [..., blocks, size, ...]."""
    axis %= x.ndim
    first, second = jax.lax.split(x.reshape(*x.shape[:axis], -1, 2, size, *x.shape[axis + 1 :]), (1, 1), axis + 1)
    return first.squeeze(axis + 1), second.squeeze(axis + 1)


def _sums(log_decay: Float[Array, "... c k"]) -> list[tuple[Array, Array]]:
    """For blocks of 1, 2, 4, ..., C tokens the sums of log decays [..., C, K] from a block's start to a token, its own
    included, and from after the token to the block's end."""
    through, after, size = log_decay, jnp.zeros_like(log_decay), 1
    levels = [(through, after)]
    while size < log_decay.shape[-2]:
        (first, second), (first_after, second_after) = _halves(through, size, -2), _halves(after, size, -2)
        joined = jnp.concatenate([first, second + first[..., -1:, :]], -2)
        joined_after = jnp.concatenate([first_after + second[..., -1:, :], second_after], -2)
        through, after = joined.reshape(log_decay.shape), joined_after.reshape(log_decay.shape)
        levels.append((through, after))
        size *= 2
    return levels


def _cumulative(tangent: Float[Array, "... c k"]) -> Float[Array, "... c k"]:
    return product(jnp.tri(tangent.shape[-2], dtype=tangent.dtype), tangent)


@jax.custom_jvp
def ends(log_decay: Float[Array, "... c k"]) -> tuple[Float[Array, "... c k"], Float[Array, "... c k"]]:
    """(exp(g_1 + ... + g_i), exp(g_{i+1} + ... + g_C)): what is left at token i of the state the chunk starts from, and
    at the end of the chunk of what token i writes."""
    through, after = _sums(log_decay)[-1]
    return jnp.exp(through), jnp.exp(after)


@ends.defjvp
def _ends_jvp(primals: tuple, tangents: tuple) -> tuple:
    through, after = ends(*primals)
    change = _cumulative(*tangents)
    return (through, after), (through * change, after * (change[..., -1:, :] - change))


@jax.custom_jvp
def decay_matrix(log_decay: Float[Array, "... c 1"]) -> Float[Array, "... c c"]:
    """D_ij = exp(g_{j+1} + ... + g_i) for j <= i, else 0."""
    matrix, size = jnp.ones((*log_decay.shape[:-1], 1, 1), log_decay.dtype), 1
    for through, after in _sums(log_decay)[:-1]:
        late, early = _halves(jnp.exp(through), size, -2)[1], _halves(jnp.exp(after), size, -2)[0]
        matrix = _join(matrix, late * early.swapaxes(-1, -2))
        size *= 2
    return matrix[..., 0, :, :]


@decay_matrix.defjvp
def _decay_matrix_jvp(primals: tuple, tangents: tuple) -> tuple:
    matrix, change = decay_matrix(*primals), _cumulative(*tangents)
    return matrix, matrix * (change - change.swapaxes(-1, -2))


@jax.custom_jvp
def decayed_scores(
    rows: Float[Array, "... c k"], columns: Float[Array, "... c k"], log_decay: Float[Array, "... c k"]
) -> Float[Array, "... c c"]:
    """A_ij = Σ_k rows_ik exp(g_{j+1} + ... + g_i)_k columns_jk for j <= i, else 0."""
    shape = jnp.broadcast_shapes(rows.shape, columns.shape, log_decay.shape)
    scores, size = jnp.broadcast_to((rows * columns).sum(-1), shape[:-1])[..., None, None], 1
    for through, after in _sums(log_decay)[:-1]:
        late, early = _halves(rows * jnp.exp(through), size, -2)[1], _halves(columns * jnp.exp(after), size, -2)[0]
        scores = _join(scores, product(late, early.swapaxes(-1, -2)))
        size *= 2
    return scores[..., 0, :, :]


@decayed_scores.defjvp
def _decayed_scores_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Scores are those of rows e^{G} and columns e^{−G}, so dG is one more change of both."""
    (rows, columns, log_decay), (d_rows, d_columns, d_log_decay) = primals, tangents
    change = _cumulative(d_log_decay)
    d_rows, d_columns = d_rows + rows * change, d_columns - columns * change
    tangent = decayed_scores(d_rows, columns, log_decay) + decayed_scores(rows, d_columns, log_decay)
    return decayed_scores(*primals), tangent


@jax.custom_jvp
def unit_lower_inverse(lower: Float[Array, "... c c"]) -> Float[Array, "... c c"]:
    """(I + lower)⁻¹ for a strictly lower triangular matrix; what stands on or above its diagonal is not looked at.

    By halves: the inverse of [[P, 0], [R, Q]] is [[P⁻¹, 0], [−Q⁻¹ R P⁻¹, Q⁻¹]]. Doubling, Π (I + lower^{2^i}), has
    errors of many orders of magnitude where keys repeat.
    """
    inverse, size = jnp.ones((*lower.shape[:-1], 1, 1), lower.dtype), 1
    while size < lower.shape[-1]:
        late = _halves(lower, size, -2)[1]  # [..., blocks, size, C]
        corner = _halves(late, size, -1)[0]  # [..., blocks, size, blocks, size]
        corner = jnp.moveaxis(jnp.diagonal(corner, axis1=-4, axis2=-2), -1, -3)
        first, second = _halves(inverse, 1, -3)
        first, second = first.squeeze(-3), second.squeeze(-3)
        inverse = _join(inverse, -product(product(second, corner), first))
        size *= 2
    return inverse[..., 0, :, :]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals: tuple, tangents: tuple) -> tuple:
    inverse = unit_lower_inverse(*primals)
    return inverse, -product(product(inverse, jnp.tril(tangents[0], -1)), inverse)


def _join(diagonal: Float[Array, "... b s s"], corner: Float[Array, "... h s s"]) -> Float[Array, "... h t t"]:
    """[[P, 0], [R, Q]] for each two neighbours P, Q of the 2h blocks on the diagonal and each corner R."""
    first, second = _halves(diagonal, 1, -3)
    first, second = first.squeeze(-3), second.squeeze(-3)
    top = jnp.concatenate([first, jnp.zeros_like(corner)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)
