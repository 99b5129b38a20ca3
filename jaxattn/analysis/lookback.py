"""Does an answer rest on the context? A classifier of how much each head looks back at it, and decoding that is guided.

The feature of a head is the lookback ratio, `core.attend.Lookback`: mean weights, so that it does not drift as the
answer grows. (Chuang et al., 2024.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxattn.analysis.heads import check_heads, check_unpadded
from jaxattn.core.attend.measure import Lookback
from jaxattn.core.checks import check_static_int
from jaxattn.trace import run
from jaxattn.trace.patching import as_inputs


def lookback_features(
    model: Any, tokens: Int[Array, "b t"], split: Int[Array, " b"] | int, **options: Any
) -> Float[Array, "b t features"]:
    """Returns the lookback ratio of every head at every token, [B, T, L N], heads of layer 0 first.

        ā_C / (ā_C + ā_G),   the mean weights on the context before `split` and on what was written since

    Rows before the split see no new token: theirs is 1. The sink is part of the context, as in the authors' code.

    Args:
        model: A decoder.
        tokens: [B, T], contexts and the answers behind them.
        split: The position from which tokens are new; the authors count the words that introduce the answer as new.
        options: Other arguments of the model, without `positions`.

    Raises:
        ValueError: Layers have different numbers of heads, or not all have weights, or the model has tokens of its own
            before the sequence.
    """
    check_unpadded(options)
    tokens = jnp.asarray(tokens)
    record = {"ratio": ("weights", Lookback(jnp.asarray(split)))}
    _, records = run(model, *as_inputs("tokens", tokens, options, ("record",)), record=record, **options)
    check_heads(records["ratio"], tokens.shape[1])
    return jnp.moveaxis(records["ratio"], 0, 2).reshape(*tokens.shape, -1)


def span_means(features: Float[Array, "b t f"], first: Int[Array, " b"], last: Int[Array, " b"]) -> Float[Array, "b f"]:
    """Returns the mean feature of each row over the tokens from `first` to `last`, both included; NaN for none.

    Args:
        features: [B, T, F].
        first: [B].
        last: [B].
    """
    place = jnp.arange(features.shape[1])
    inside = (place >= jnp.asarray(first)[:, None]) & (place <= jnp.asarray(last)[:, None])
    count = inside.sum(1)[:, None]
    total = jnp.where(inside[..., None], features, 0).sum(1)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)


def sliding_windows(
    features: Float[Array, "t f"], labels: Bool[Array, " t"], size: int = 8
) -> tuple[Float[Array, "windows f"], Bool[Array, " windows"]]:
    """Returns the mean feature of each window of tokens, and its least label: a window is good if all of it is.

    A window of one token is the token itself.

    Args:
        features: [T, F], of the tokens of an answer.
        labels: [T], True for tokens that the context supports.
        size: Tokens of a window, from 1 to T.

    Raises:
        ValueError: `size` is out of range.
    """
    check_static_int("sliding_windows", "size", size, 1)
    if size > len(features):
        raise ValueError(f"size is {size}: need at most {len(features)}, the tokens of the answer")
    index = jnp.arange(len(features) - size + 1)[:, None] + jnp.arange(size)
    return features[index].mean(1), jnp.asarray(labels)[index].all(1)


def guided_chunks(
    sample: Callable[[PRNGKeyArray, Array], Array],
    score: Callable[[Array, int], Array],
    tokens: Int[Array, " t"],
    key: PRNGKeyArray,
    *,
    chunks: int,
    candidates: int = 8,
) -> Int[Array, " longer"]:
    """Returns a text that is continued chunk by chunk: of some sampled chunks, the one with the best score is kept.

    With the probability of a classifier of `span_means` as the score this is the guided decoding of Lookback Lens; the
    paper samples 8 chunks of 8 tokens. With one candidate it is plain sampling.

    Args:
        sample: sample(key, tokens [C, t]) -> [C, t + chunk], which continues each row by a chunk.
        score: score(tokens [C, t + chunk], t) -> [C], of the chunk that begins at position t.
        tokens: The prompt.
        key: The random key.
        chunks: How many chunks are added, at least 0.
        candidates: C, at least 1. Of equal scores, and of NaN, the first is kept.
    """
    check_static_int("guided_chunks", "chunks", chunks, 0)
    check_static_int("guided_chunks", "candidates", candidates, 1)
    tokens = jnp.asarray(tokens)
    for number in range(chunks):
        rows = sample(jax.random.fold_in(key, number), jnp.tile(tokens, (candidates, 1)))
        each = score(rows, len(tokens))
        tokens = rows[int(jnp.argmax(jnp.where(jnp.isnan(each), -jnp.inf, each)))]
    return tokens
