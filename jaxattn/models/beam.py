"""Beam search: the likeliest texts, found by keeping the best of all that are one token longer."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxattn.cache import Policy
from jaxattn.core.checks import check_int
from jaxattn.core.mesh import Axes, under_auto_axes
from jaxattn.core.part import part
from jaxattn.models.sample import check_drawn, check_end_token, checked_prompts, in_evaluation
from jaxattn.models.state import reordered
from jaxattn.models.transformer import Transformer


@part
class Beams:
    """The result of `beam_search`, the best first.

    Attributes:
        tokens: [B, K, M], the new tokens; −1 after the end of a text.
        lengths: [B, K], how many of them each text has, its end token included; 0 where there are fewer than K texts.
        scores: [B, K], log p / length^α of each text.
    """

    tokens: Int[Array, "b k m"]
    lengths: Int[Array, "b k"]
    scores: Float[Array, "b k"]


def beam_search(
    model: Transformer,
    prompts: Int[Any, "b p"],
    lengths: Int[Any, " b"] | None = None,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 0.0,
    end_token: int | None = None,
    store: Policy | None = None,
    context: Any = None,
) -> Beams:
    """Continues each prompt by the K texts of the largest log p / length^α that are found.

    In each step every text is continued by every token, and the K best stay; texts that have ended stay as they are.
    One beam is the greedy choice. As many beams as there are texts make the search exhaustive. The whole loop is one
    compiled program, which reorders the rows of the state in every step. Dropout is off.

    Args:
        model: The decoder.
        prompts: As of `generate`.
        lengths: As of `generate`.
        beams: K, at least 1.
        max_new_tokens: M, the most tokens of a continuation.
        length_penalty: α. With 0 the likeliest text is best, and longer texts are never likelier; 1 compares means over
            tokens.
        end_token: As of `generate`.
        store: As of `generate`.
        context: As of `generate`.

    Raises:
        ValueError: As of `generate`, or `beams` is below 1, or `length_penalty` is not finite.
        TypeError: As of `generate`, or `beams` is no int, or `length_penalty` no number.
        FloatingPointError: The model gives logits that are NaN.
    """
    prompts, lengths = checked_prompts(model, prompts, lengths, max_new_tokens)
    check_end_token(end_token, model.config.vocabulary)
    check_int("beams", beams)
    if beams < 1:
        raise ValueError(f"beams is {beams}: need at least 1")
    if not isinstance(length_penalty, int | float) or not abs(length_penalty) < float("inf"):
        kind = ValueError if isinstance(length_penalty, int | float) else TypeError
        raise kind(f"length_penalty must be a finite number, got {length_penalty!r}")
    graph, arrays = nnx.split(in_evaluation(model))
    end = jnp.asarray(-1 if end_token is None else end_token, jnp.int32)
    dynamic = (arrays, prompts, lengths, store, context, jnp.asarray(length_penalty, jnp.float32), end)
    found, lost = under_auto_axes(lambda given: _search(graph, int(max_new_tokens), int(beams), *given), dynamic, Axes)
    check_drawn(found.lengths[:, 0], lost)
    return found


@partial(jax.jit, static_argnums=(0, 1, 2))
def _search(graph, max_new_tokens, beams, arrays, prompts, lengths, store, context, penalty, end_token):
    batch, width = prompts.shape
    places, kept_by = jnp.arange(width), {} if store is None else {"store": store}

    def read(tokens, positions, state, **options):
        return nnx.merge(graph, arrays)(tokens, positions=positions, state=state, **options)[:2]

    # A pool of pages is made for the rows of all beams.
    state = nnx.merge(graph, arrays).init_state(batch * beams, width + max_new_tokens, **kept_by)
    state = reordered(state, jnp.arange(batch))
    given = {} if context is None else {"context": context}
    positions = jnp.where(places < lengths[:, None], places, -1)
    logits, state = read(prompts, positions, state, logits_at=(lengths - 1)[:, None], **given)
    vocabulary = logits.shape[-1]

    def unfinished(carry):
        return (carry["step"] < max_new_tokens) & ~carry["done"].all()

    def one_token(carry):
        done = carry["done"]
        alive = ~done & (carry["total"] > -jnp.inf)
        lost = carry["lost"] | (jnp.isnan(carry["logits"]).any(-1) & alive).any(-1)
        stays = jnp.where(jnp.arange(vocabulary) == 0, 0.0, -jnp.inf)  # an ended text has one continuation: itself
        more = jnp.where(done[..., None], stays, jax.nn.log_softmax(carry["logits"].astype(jnp.float32), -1))
        total = carry["total"][..., None] + jnp.where(jnp.isnan(more), -jnp.inf, more)  # [B, K, V]
        count = carry["count"] + ~done
        scores, best = jax.lax.top_k((total / (count**penalty)[..., None]).reshape(batch, -1), beams)
        parent = best // vocabulary

        def of_parent(x: Array) -> Array:
            return jnp.take_along_axis(x, parent.reshape(*parent.shape, *(1,) * (x.ndim - 2)), 1)

        token = jnp.where(of_parent(done), -1, best % vocabulary)
        tokens = of_parent(carry["tokens"]).at[:, :, carry["step"]].set(token)
        done = of_parent(done) | (token == end_token)
        at = jnp.where(done, -1, lengths[:, None] + carry["step"])
        rows = (jnp.arange(batch)[:, None] * beams + parent).reshape(-1)
        logits, state = read(token.reshape(-1, 1), at.reshape(-1, 1), reordered(carry["state"], rows))
        return {
            "step": carry["step"] + 1,
            "logits": logits.reshape(batch, beams, vocabulary),
            "state": state,
            "tokens": tokens,
            "total": jnp.take_along_axis(total.reshape(batch, -1), best, 1),
            "scores": scores,
            "count": of_parent(count),
            "done": done,
            "lost": lost,
        }

    shape = (batch, beams)
    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)  # the prompt is one text: the others are none
    end = jax.lax.while_loop(
        unfinished,
        one_token,
        {
            "step": 0,
            "logits": jnp.broadcast_to(logits, (*shape, vocabulary)),
            "state": reordered(state, jnp.repeat(jnp.arange(batch), beams)),
            "tokens": jnp.full((*shape, max_new_tokens), -1, jnp.int32),
            "total": jnp.broadcast_to(first, shape),
            "scores": jnp.broadcast_to(first, shape),
            "count": jnp.zeros(shape, jnp.int32),
            "done": jnp.zeros(shape, bool),
            "lost": jnp.zeros(batch, bool),
        },
    )
    there = end["scores"] > -jnp.inf
    tokens = jnp.where(there[..., None], end["tokens"], -1)
    return Beams(tokens, jnp.where(there, end["count"], 0), end["scores"]), end["lost"]
