"""The losses of NNX models: of any, and of a language model, `model(tokens, mask=...) -> (logits, ...)`."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from jaxattn.core.attend.mask import Documents
from jaxattn.core.checks import check_range
from jaxattn.train.losses import column, distillation_loss, hidden_loss, next_token_loss
from jaxattn.train.step import LossFunction, Params, as_tree

M = TypeVar("M", bound=nnx.Module)


def module_loss(
    model: nnx.Module, loss: Callable[[Any, Any, Any], Any], trained: Any = nnx.Param
) -> tuple[Params, LossFunction]:
    """Returns the parameters of a model, and a loss of it as a function of them, as `fit` and `make_step` take them.

    The random streams of the model (dropout) restart at every step from the step's key, so a resumed run draws the same
    numbers. Without a key (in evaluations) the model has no dropout. What the model holds beside parameters stays as it
    is.

    Args:
        model: The model: any NNX module.
        loss: loss(model, batch, key) -> (total, sums), such as a loss of `train.losses` of what the model says, or a
            scalar; see `make_step`. The key is None in evaluations. Large arrays that it needs, such as those of a
            teacher, are best given by a `jax.tree_util.Partial`, as the loss that is returned is one: they are
            arguments of a compiled step then, and not constants in it.
        trained: The filter of NNX for what counts as parameters: by default all of them. Others stay as they are.
    """
    graph, *states = nnx.split(model, trained, nnx.RngCount, ...)
    params, counts, rest = states

    def loss_fn(loss: Any, counts: Any, rest: Any, params: Params, batch: Any, key: Any) -> Any:
        start = 0 if key is None else jax.random.bits(key, dtype=jnp.uint32)
        restarted = jax.tree.map(lambda count: jnp.full_like(count, start), counts)
        called = nnx.merge(graph, params, restarted, rest)
        called.eval() if key is None else called.train()
        return loss(called, batch, key)

    return params, Partial(loss_fn, as_tree(loss), counts, rest)


def language_loss(model: nnx.Module, z_loss: float = 0.0) -> tuple[Params, LossFunction]:
    """Returns the model's parameters, and their next-token loss on rows of tokens, as `fit` and `make_step` take them.

    A batch has `tokens` `[B, T]`. It may have `targets`, `weights`, `documents` and `bytes`, as those of `Windows` are.
    Without `targets` these are the next tokens of the row and of the document, and the last token has none.

    No token sees another document: the batch's document ids are passed to the model as a `Documents` mask. For the
    random streams of the model see `module_loss`.

    A token is padding if its document id is negative. A negative token is padding too where nothing in its row counts
    from there on. The model sees token 0 in document −1 in its place, so that no padding id (such as −100) reaches the
    loss or a gradient. Any other token outside the vocabulary is the model's to judge. Without `documents` there is no
    mask, and a padding token of a model that is not causal is seen.

    Args:
        model: The model.
        z_loss: The factor of the penalty on large logits, at least 0.

    Raises:
        ValueError: `z_loss` is known and below 0. The loss raises as `next_token_loss`, and for a batch with other
            columns.
    """
    check_range("z_loss", z_loss, lambda x: (x >= 0) & (x < jnp.inf), "from 0 on")

    def loss(model: Any, batch: Any, key: Any) -> Any:
        tokens, options, batch = _read(batch)
        logits, *_ = model(tokens, **options)
        return next_token_loss(logits, batch, z_loss)

    return module_loss(model, loss)


def imitation_loss(
    student: nnx.Module,
    teacher: nnx.Module,
    *,
    logits: float = 1.0,
    hidden: float = 1.0,
    text: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Params, LossFunction]:
    """Returns the parameters of a student, and a loss of it as `fit` takes them: imitation of a teacher, and text.

        total = logits · KD + hidden · H + text · CE

    with KD of `distillation_loss`, H of `hidden_loss` over the residual stream behind every layer, and CE of
    `next_token_loss`. These are the terms of the first stage of EchoAtt (2024), whose weights are not published; the
    text may be one that the teacher wrote. The second stage is `language_loss`. Batches, padding and random streams are
    those of `language_loss`. The teacher is called in evaluation mode, and no gradient reaches it.

    Args:
        student: The model that learns, `model(tokens, mask=..., record=("resid",)) -> (logits, state, records)`, as a
            `Transformer`.
        teacher: The model that is imitated, with as many layers of the same width.
        logits: The factor of KD, at least 0.
        hidden: The factor of H, at least 0; at 0 the layers of the teacher may be others.
        text: The factor of CE, at least 0.
        temperature: τ of KD, above 0.

    Returns:
        A pair (parameters, loss). The sums of the loss are those of `next_token_loss`, and `logits_apart` (KD),
            `hidden_apart` (H) and `agree`.

    Raises:
        ValueError: A factor is known and below 0, or the temperature not above 0. The loss raises as that of
            `language_loss`, and where vectors of the two have other shapes.
    """
    for name, factor in (("logits", logits), ("hidden", hidden), ("text", text)):
        check_range(name, factor, lambda x: (x >= 0) & (x < jnp.inf), "from 0 on")
    check_range("temperature", temperature, lambda x: x > 0, "above 0")
    imitated = nnx.merge(*nnx.split(teacher))
    imitated.eval()
    of_teacher, arrays = nnx.split(imitated)
    record = ("resid",) if hidden else ()

    def loss(arrays: Any, model: Any, batch: Any, key: Any) -> Any:
        tokens, options, batch = _read(batch)
        said, _, records = model(tokens, record=record, **options)
        wanted, _, seen = nnx.merge(of_teacher, arrays)(tokens, record=record, **options)
        total, sums = next_token_loss(said, batch)
        apart, more = distillation_loss(said, wanted, batch, temperature)
        sums = sums | {"logits_apart": apart, "agree": more["agree"]}
        total = text * total + logits * apart
        if hidden:
            far, _ = hidden_loss(records["resid"], seen["resid"], batch)
            total, sums = total + hidden * far, sums | {"hidden_apart": far}
        return total, sums

    return module_loss(student, Partial(loss, arrays))


def _read(batch: Any) -> tuple[jax.Array, dict[str, Any], dict[str, jax.Array]]:
    """Returns the tokens that a model is to see, the mask as an option of its call, and the batch with targets."""
    tokens = jnp.asarray(column(batch, "tokens"))
    check_columns(batch, "tokens", "targets", "weights", "documents", "bytes")
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    if "targets" not in batch:
        batch = batch | _next_tokens(batch)
    padding = (tokens < 0) & ~_counts_later(batch, tokens)
    if "documents" not in batch:
        return jnp.where(padding, 0, tokens), {}, batch
    padding |= batch["documents"] < 0
    return jnp.where(padding, 0, tokens), {"mask": Documents(jnp.where(padding, -1, batch["documents"]))}, batch


def masked_language_loss(
    model: nnx.Module, mask_token: int, vocabulary: int, *, fraction: float = 0.15
) -> tuple[Params, LossFunction]:
    """Returns the parameters of an encoder, and its loss at tokens that it does not see (BERT, Devlin et al., 2019).

    In each step a `fraction` of the tokens is drawn anew, in evaluations always the same: the model is to say what they
    are. In their places it sees `mask_token` (80 %), any token (10 %), or the token itself (10 %). For the random
    streams of the model see `module_loss`.

    A batch has `tokens` `[B, T]`, and perhaps `documents`, as `language_loss` takes them, and `weights`: a token of
    weight 0, or of document −1, or that is negative, is never drawn. Negative tokens are padding, which is not seen.

    Args:
        model: The model, `model(tokens, mask=...) -> (logits, ...)`, as a `Transformer` with `causal=False`.
        mask_token: The id of the token that stands for one that is not seen.
        vocabulary: V: random tokens are from 0 to V − 1.
        fraction: The probability of each token to be drawn, above 0, and 1 at most.

    Raises:
        ValueError: A number makes no sense. The loss raises for a batch without `tokens`, or with other columns.
    """
    check_range("fraction", fraction, lambda x: (x > 0) & (x <= 1), "above 0, and 1 at most")
    if not mask_token >= 0:
        raise ValueError(f"mask_token is {mask_token}: need the id of a token")
    if vocabulary < 1:
        raise ValueError(f"vocabulary is {vocabulary}: need at least 1")

    def loss(model: Any, batch: Any, key: Any) -> Any:
        tokens = jnp.asarray(column(batch, "tokens"))
        check_columns(batch, "tokens", "weights", "documents")
        documents = jnp.asarray(batch.get("documents", jnp.zeros_like(tokens)))
        padding = (tokens < 0) | (documents < 0)
        weights = jnp.where(padding, 0, jnp.asarray(batch.get("weights", jnp.ones(tokens.shape))))
        draws = jax.random.split(jax.random.key(0) if key is None else jax.random.fold_in(key, 1), 3)
        drawn = (jax.random.uniform(draws[0], tokens.shape) < fraction) & (weights != 0)
        kind = jax.random.uniform(draws[1], tokens.shape)
        anything = jax.random.randint(draws[2], tokens.shape, 0, vocabulary, tokens.dtype)
        other = jnp.where(kind < 0.8, mask_token, jnp.where(kind < 0.9, anything, tokens))
        seen = jnp.where(padding, 0, jnp.where(drawn, other, tokens))
        logits, *_ = model(seen, mask=Documents(jnp.where(padding, -1, documents)))
        return next_token_loss(logits, {"targets": tokens, "weights": jnp.where(drawn, weights, 0)})

    return module_loss(model, loss)


def sequence_loss(model: nnx.Module, z_loss: float = 0.0) -> tuple[Params, LossFunction]:
    """Returns the parameters of an encoder and a decoder, and their next-token loss on the second of two sequences.

    A batch has `inputs` `[B, S, ...]` of the encoder, and of the decoder `tokens` `[B, T]`, and perhaps `targets` and
    `weights` `[B, T]`: without `targets` these are the next tokens, and the last has none. So `tokens` begin with the
    token that starts every answer. Where inputs are integers, negative ones are padding, which is not seen. A negative
    token is padding where nothing counts from there on. For the random streams of the model see `module_loss`.

    Args:
        model: The model, `model(inputs, tokens, input_positions=...) -> (logits, ...)`, as an `EncoderDecoder`.
        z_loss: As of `next_token_loss`.

    Raises:
        ValueError: The loss raises for a batch without `inputs` or `tokens`, or with other columns.
    """

    def loss(model: Any, batch: Any, key: Any) -> Any:
        inputs, tokens = (jnp.asarray(column(batch, name)) for name in ("inputs", "tokens"))
        check_columns(batch, "inputs", "tokens", "targets", "weights")
        batch = {name: jnp.asarray(value) for name, value in batch.items()}
        if "targets" not in batch:
            batch = batch | _next_tokens(batch)
        positions = None
        if jnp.issubdtype(inputs.dtype, jnp.integer) and inputs.ndim == 2:
            padding = inputs < 0
            positions = jnp.where(padding, -1, jnp.cumsum(~padding, axis=1) - 1)
            inputs = jnp.where(padding, 0, inputs)
        seen = jnp.where((tokens < 0) & ~_counts_later(batch, tokens), 0, tokens)
        logits, *_ = model(inputs, seen, input_positions=positions)
        return next_token_loss(logits, batch, z_loss)

    return module_loss(model, loss)


def check_columns(batch: Any, *names: str) -> None:
    """Raises ValueError for columns that a loss would not read."""
    if unknown := sorted(set(batch) - set(names)):
        raise ValueError(f"batch has the columns {unknown}, which this loss does not read: drop or rename them")


def _counts_later(batch: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Returns where a token counts, there or later in its row."""
    counts = (batch.get("weights", jnp.ones(tokens.shape)) != 0).astype(jnp.int32)
    return jax.lax.cummax(counts, axis=tokens.ndim - 1, reverse=True) > 0


def _next_tokens(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the targets of rows of tokens, with weights: the last token of a row and of a document has none."""

    def next_of(x: jax.Array, last: Any) -> jax.Array:
        return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], last)], axis=1)

    tokens = batch["tokens"]
    there = next_of(jnp.ones(tokens.shape, bool), False) & (next_of(tokens, -1) >= 0)
    if "documents" in batch:
        documents = batch["documents"]
        there &= (documents == next_of(documents, -1)) & (documents >= 0)
    given = next_of(batch["weights"], 0) if "weights" in batch else jnp.ones(tokens.shape)
    moved = {"bytes": next_of(batch["bytes"], 0)} if "bytes" in batch else {}
    return moved | {"targets": next_of(tokens, 0), "weights": jnp.where(there, given, 0)}


def with_params(model: M, params: Any, trained: Any = nnx.Param) -> M:
    """Returns the model with these parameters, such as `Result.params` or those of a checkpoint.

    `trained` is that of `module_loss`, which made the parameters.
    """
    graph, *states = nnx.split(model, trained, ...)
    return nnx.merge(graph, params, states[1])
