"""What an output owes to tokens: how it changes when they are taken out, and how closely two rankings agree."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.trace import sweep
from jaxattn.trace.patching import as_inputs


def token_effects(
    model: Any,
    inputs: Any,
    metric: Callable[[Any], Array],
    *,
    blank: int | None = None,
    groups: Int[Array, "b t"] | None = None,
    chunk: int = 1,
    **options: Any,
) -> Float[Array, "b g"]:
    """Returns by how much a metric of the output falls without each token, or without each group of tokens.

        effect_bg = metric_b(all tokens) − metric_b(without group g)

    Without `blank` a token is taken out as padding: no other token sees it, and all others stay where they are. With it
    the token becomes another one, such as that of unknown words (blank-out). A group that a text does not have has
    effect 0. An output at the place of a token that was taken out means nothing.

    Args:
        model: The model.
        inputs: Its inputs: tokens [B, T], or a tuple of inputs of which they are the first.
        metric: From the output to one number per text, [B].
        blank: The token that others are replaced by; None takes them out.
        groups: [B, T], the number of the group of each token, from 0 to G − 1, such as that of its word or of its
            class; −1 for tokens that stay. By default each token is a group.
        chunk: How many groups are removed at once, each in a run of its own.
        options: Other arguments of the model.

    Raises:
        ValueError: Groups do not have the shape of the tokens, or the metric is not one number per text.
    """
    tokens, *others = as_inputs("inputs", inputs, options)
    tokens = jnp.asarray(tokens)
    batch, length = tokens.shape
    member = jnp.broadcast_to(jnp.arange(length), tokens.shape) if groups is None else jnp.asarray(groups)
    if member.shape != tokens.shape:
        raise ValueError(f"groups has shape {member.shape}: need that of the tokens, {tokens.shape}")
    count = length if groups is None else int(np.max(np.asarray(member), initial=-1)) + 1
    places = options.pop("positions", None)
    places = jnp.broadcast_to(jnp.arange(length) if places is None else jnp.asarray(places), tokens.shape)

    def removed(group: Array) -> Array:
        out = member == group
        kept, seen = (tokens, jnp.where(out, -1, places)) if blank is None else (jnp.where(out, blank, tokens), places)
        return metric(model(kept, *others, positions=seen, **options)[0])

    found = sweep(removed, jnp.arange(count + 1), chunk=chunk)  # the last group is nobody's
    if found.shape[1:] != (batch,):
        raise ValueError(f"metric has shape {found.shape[1:]}: need one number for each of {batch} texts")
    there = (member[:, None] == jnp.arange(count)[:, None]).any(-1)
    return jnp.where(there, (found[-1] - found[:-1]).T, 0)


def rank_correlation(x: Float[Any, "*b n"], y: Float[Any, "*b n"]) -> Float[Array, "*b"]:
    """Returns Spearman's correlation, that of the ranks along the last axis; equal numbers share their mean rank.

    NaN where one of both is the same everywhere, or has a NaN.

    Args:
        x: [..., n].
        y: [..., n].
    """

    @partial(jnp.vectorize, signature="(n)->(n)")
    def ranks(x: Array) -> Array:
        ordered = jnp.sort(x)
        rank = (jnp.searchsorted(ordered, x, side="left") + jnp.searchsorted(ordered, x, side="right")) / 2
        rank = jnp.where(jnp.isnan(x).any(), jnp.nan, rank)
        return rank - rank.mean()

    a, b = ranks(jnp.asarray(x)), ranks(jnp.asarray(y))
    return (a * b).sum(-1) / jnp.sqrt((a**2).sum(-1) * (b**2).sum(-1))
