"""The language-model loss of any NNX model that is called as `model(tokens, mask=...) -> (logits, ...)`."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.core.attend.mask import Documents
from jaxattn.core.checks import check_range
from jaxattn.train.loss import next_token_loss
from jaxattn.train.step import LossFunction, Params

M = TypeVar("M", bound=nnx.Module)


def language_loss(model: nnx.Module, z_loss: float = 0.0) -> tuple[Params, LossFunction]:
    """Returns the model's parameters, and their next-token loss on packed batches, as `fit` and `make_step` take them.

    No token sees another document: the batch's document ids are passed to the model as a `Documents` mask. The random
    streams of the model (dropout) restart at every step from the step's key, so a resumed run draws the same numbers.
    Without a key (in evaluations) the model has no dropout.

    A token is padding if its document id is negative. A negative token is padding too where nothing in its row counts
    from there on. The model sees token 0 in document −1 in its place, so that no padding id (such as −100) reaches the
    loss or a gradient. Any other token outside the vocabulary is the model's to judge.

    Args:
        model: The model.
        z_loss: The factor of the penalty on large logits, at least 0.

    Raises:
        ValueError: `z_loss` is known and below 0. The loss raises as `next_token_loss`.
    """
    check_range("z_loss", z_loss, lambda x: (x >= 0) & (x < jnp.inf), "from 0 on")
    graph, *states = nnx.split(model, nnx.Param, nnx.RngCount, ...)
    params, counts, rest = states

    def loss_fn(params, batch, key):
        start = 0 if key is None else jax.random.bits(key, dtype=jnp.uint32)
        restarted = jax.tree.map(lambda count: jnp.full_like(count, start), counts)
        called = nnx.merge(graph, params, restarted, rest)
        called.eval() if key is None else called.train()
        tokens, documents, weights = (jnp.asarray(batch[name]) for name in ("tokens", "documents", "weights"))
        counts_later = jax.lax.cummax((weights != 0).astype(jnp.int32), axis=weights.ndim - 1, reverse=True) > 0
        padding = (documents < 0) | ((tokens < 0) & ~counts_later)
        tokens, documents = jnp.where(padding, 0, tokens), jnp.where(padding, -1, documents)
        logits, *_ = called(tokens, mask=Documents(documents))
        return next_token_loss(logits, batch, z_loss)

    return params, loss_fn


def with_params(model: M, params: Any) -> M:
    """Returns the model with these parameters, such as `Result.params` or those of a checkpoint."""
    graph, *states = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, params, states[1])
