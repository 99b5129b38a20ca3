"""Which heads copy from the context: how often the key with the largest weight is the token that comes next.

The row of weights is that of the token at hand, and the token that counts is the one that is emitted after it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.analysis.heads import check_heads, check_unpadded
from jaxattn.core.attend.measure import ArgMax
from jaxattn.nn.tap import Layers
from jaxattn.trace import run
from jaxattn.trace.edits import Pairs
from jaxattn.trace.patching import as_inputs


def copy_hits(
    looked: Int[Array, "*b t n"],
    tokens: Int[Array, "*b t"],
    emitted: Int[Array, "*b t"],
    span: Bool[Array, "*b t"],
) -> Bool[Array, "*b t n"]:
    """Returns where a head looks most at a token of the span that is the token emitted next.

        hit_i = [j_i in span and token_{j_i} = emitted_i],   j_i the key with the largest weight in row i

    Args:
        looked: j, the positions that `ArgMax` measures; −1 for a row that sees nothing, which is no hit.
        tokens: [..., T], the tokens by position.
        emitted: [..., T], the token after each row.
        span: [..., T], by position, which tokens may be copied, such as those of a needle.
    """
    there = jnp.maximum(looked, 0)
    size = tokens.shape[-1]

    def at(table: Array) -> Array:
        flat = there.reshape(*there.shape[:-2], -1)
        wide = jnp.broadcast_to(table, (*flat.shape[:-1], size))
        return jnp.take_along_axis(wide, jnp.minimum(flat, size - 1), -1).reshape(there.shape)

    return (looked >= 0) & (looked < size) & at(span) & (at(tokens) == emitted[..., None])


def retrieval_scores(
    model: Any,
    tokens: Int[Array, "b t"],
    span: Bool[Array, "b t"],
    answer: Bool[Array, "b t"],
    *,
    counts: Bool[Array, " b"] | None = None,
    **options: Any,
) -> Float[Array, "layers n"]:
    """Returns the share of a needle's tokens that each head copies while they are emitted, [L, N] (Wu et al., 2024).

        score = mean over texts of |needle tokens that some row of the answer hits| / |needle|

    Texts hold a needle, which is the `span`, and then the answer, emitted by the model itself or given to it. A token
    of the needle counts once, however often it is hit, so that scores are 0 to 1. The paper calls heads from 0.1 on
    retrieval heads, and counts texts alone that the model answers well.

    Args:
        model: A decoder.
        tokens: [B, T], texts and their answers.
        span: [B, T], which tokens are the needle.
        answer: [B, T], which tokens are the answer: the rows that count are those of the tokens before them.
        counts: [B], which texts count, such as those that were answered well; None for all. If none does, scores are
            NaN.
        options: Other arguments of the model, without `positions`.

    Raises:
        ValueError: A text has no needle, layers have different numbers of heads, or not all have weights, or the model
            has tokens of its own before the sequence.
    """
    check_unpadded(options)
    tokens, span, answer = (jnp.asarray(x) for x in (tokens, span, answer))
    size = span.sum(-1)
    if not isinstance(size, jax.core.Tracer) and not bool((size > 0).all()):
        raise ValueError("span has a row without any token: need a needle in every text")
    _, records = run(
        model, *as_inputs("tokens", tokens, options, ("record",)), record={"at": ("weights", ArgMax())}, **options
    )
    check_heads(records["at"], tokens.shape[1])
    rows = jnp.pad(answer[:, 1:], ((0, 0), (0, 1)))  # the token before one of the answer
    hits = copy_hits(records["at"], tokens, jnp.roll(tokens, -1, 1), span) & rows[..., None]  # [L, B, T, N]

    def of_text(looked: Array, hits: Array) -> Array:  # [T, N] each; which positions were hit, [T]
        found = jnp.zeros((looked.shape[-1], looked.shape[0]), bool)
        return found.at[jnp.arange(looked.shape[-1]), looked].max(hits).sum(-1)

    distinct = jax.vmap(jax.vmap(of_text))(jnp.maximum(records["at"], 0), hits)  # [L, B, N]
    share = distinct / size[:, None]
    on = jnp.ones(len(tokens), bool) if counts is None else jnp.asarray(counts)
    total = jnp.where(on[:, None], share, 0).sum(1)
    return jnp.where(on.any(), total / jnp.maximum(on.sum(), 1), jnp.nan)


def uniform_heads(on: Bool[Array, "layers n"], length: int) -> dict[str, Any]:
    """Returns the edits that give some heads equal weights on all tokens that a causal row sees.

    A head then reads the mean of the values so far: it is kept from choosing, and not from writing.

    Args:
        on: [L, N], which heads.
        length: The number of positions.
    """
    equal = jnp.tril(jnp.ones((length, length))) / jnp.arange(1, length + 1)[:, None]
    on = jnp.asarray(on, bool)[..., None, None]
    return {"weights": Layers(Pairs(jnp.where(on, 0.0, 1.0), jnp.where(on, equal, 0.0)))}


def attention_influence(loss: Float[Array, " b"], degraded: Float[Array, " b"]) -> Float[Array, " b"]:
    """Returns (L_degraded − L) / L of each text, by which texts are chosen for training (AttentionInfluence, 2025).

    The degraded model is the same without its retrieval heads, such as by `uniform_heads`: what rises most needs what
    was said long before. Compare texts of one kind only: a small loss makes any change a large one, and a loss of 0
    gives NaN. The paper's masking and thresholds are not confirmed here.

    Args:
        loss: [B], the mean loss per token of each text.
        degraded: [B], the same with the heads masked.
    """
    return jnp.where(loss == 0, jnp.nan, (degraded - loss) / jnp.where(loss == 0, 1, loss))
