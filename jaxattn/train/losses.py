"""Losses as sums over what counts, so that they add up over micro-batches, devices and batches.

Each takes what a model says and a batch, and returns (total, sums), as `make_step` takes them. The batch may say what
counts, by its `weights`; without them all counts alike. What has weight 0 is not read: it may be NaN or a padding id
such as −100, and its gradient is 0. A weight below 0 raises where it is known, and makes the loss NaN where it is
traced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.core.checks import as_ids, check_array, check_range

Sums = dict[str, jax.Array]


def next_token_loss(logits: jax.Array, batch: Mapping[str, Any], z_loss: float = 0.0) -> tuple[jax.Array, Sums]:
    """Returns the weighted sum over tokens of cross-entropy, in nats, and of a penalty on large logits:

        total = Σ wₜ · (zₜ − logitsₜ[targetₜ] + z_loss · zₜ²),  zₜ = log Σᵥ exp logitsₜ[v]

    in float32 whatever the dtype of the logits. Targets are whatever the model is to say at each place: the next token,
    the token behind a mask (`mask_tokens`), or the token of another sequence.

    A token of weight 0 is not read: its logits may be NaN and its target any integer (such as −100), and its gradient
    is 0. Where a token counts and its target is outside the vocabulary, total, `nll` and the gradient of its logits are
    NaN. Where a weight is below 0, total, `nll` and `weight` are NaN; weights that are known raise.

    Args:
        logits: `[..., T, V]`.
        batch: A mapping with `targets` (integers from 0 to V − 1), and `weights` (0 where nothing is to be learned,
            above 0 elsewhere; 1 everywhere if there are none), both `[..., T]`. `bytes` `[..., T]` says how many bytes
            of text each target stands for.
        z_loss: The factor of the z-loss, which keeps zₜ near 0 (PaLM, 2022, uses 1e-4). With 0 total = `nll`.

    Returns:
        A pair (total, sums). `sums` are scalars: `nll` (the cross-entropy alone), `weight` = Σ wₜ, `correct` = Σ wₜ
            over targets with the largest logit, and `bytes` = Σ wₜ · bytesₜ if the batch has `bytes`.

    Raises:
        TypeError: Targets are not integers.
        ValueError: The batch has no `targets`, the leading axes of `logits` are not the shape of the others, or a
            weight or `z_loss` is known and below 0.
    """
    check_array("logits", logits)
    check_range("z_loss", z_loss, lambda x: (x >= 0) & (x < math.inf), "from 0 on")
    targets = jnp.asarray(column(batch, "targets"))
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"batch['targets'] has dtype {targets.dtype}: need integers")
    targets = as_ids(targets)
    _check_shape("targets", targets, logits, logits.shape[:-1])
    counted, weights = _weights(batch, logits, logits.shape[:-1])
    inside = (targets >= 0) & (targets < logits.shape[-1])
    logits = jnp.where(counted[..., None], logits.astype(jnp.float32), 0)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.take_along_axis(logits, jnp.where(inside, targets, 0)[..., None], axis=-1)[..., 0]
    known = jnp.where(inside | ~counted, weights, jnp.nan)
    nll = jnp.sum(known * (log_normalizer - of_target))
    total = nll + jnp.where(z_loss == 0, 0, z_loss * jnp.sum(weights * log_normalizer**2))
    sums = {
        "nll": nll,
        "weight": jnp.sum(weights),
        "correct": jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets)),
    }
    if "bytes" in batch:
        of_text = jnp.asarray(batch["bytes"], jnp.float32)
        _check_shape("bytes", of_text, logits, logits.shape[:-1])
        sums["bytes"] = jnp.sum(weights * jnp.where(counted, of_text, 0))
    return total, sums


def classification_loss(logits: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, Sums]:
    """Returns −Σᵢ wᵢ · log softmax(logitsᵢ)[labelᵢ], the weighted sum over rows of cross-entropy, in nats.

    Args:
        logits: `[..., C]`.
        batch: A mapping with `labels` (integers from 0 to C − 1) and perhaps `weights`, both `[...]`.

    Returns:
        A pair (total, sums), as of `next_token_loss`.

    Raises:
        TypeError: Labels are not integers.
        ValueError: The batch has no `labels`, shapes do not fit, or a weight is known and below 0.
    """
    labels = {"targets": column(batch, "labels")}
    return next_token_loss(logits, labels | {name: batch[name] for name in ("weights",) if name in batch})


def squared_error_loss(predictions: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, Sums]:
    """Returns the weighted sum over numbers of the squared error: Σ w · (ŷ − y)², as of the next patch of a series.

    Args:
        predictions: ŷ `[..., C]`.
        batch: A mapping with `targets`, y `[..., C]`, and perhaps `weights`: `[..., C]`, or `[...]` for all C alike.

    Returns:
        A pair (total, sums). `sums` has `weight`, the sum of the weights of all numbers: the loss is a mean per number.

    Raises:
        ValueError: The batch has no `targets`, shapes do not fit, or a weight is known and below 0.
    """
    check_array("predictions", predictions)
    targets = jnp.asarray(column(batch, "targets"))
    _check_shape("targets", targets, predictions, predictions.shape, "predictions")
    given = batch.get("weights")
    if given is not None and jnp.ndim(given) == targets.ndim - 1:
        _check_shape("weights", jnp.asarray(given), predictions, predictions.shape[:-1], "predictions")
        batch = {"weights": jnp.broadcast_to(jnp.asarray(given)[..., None], targets.shape)}
    counted, weights = _weights(batch, predictions, predictions.shape, "predictions")
    difference = _wide(jnp.where(counted, predictions, 0)) - _wide(jnp.where(counted, targets, 0))
    return jnp.sum(weights * difference**2), {"weight": jnp.sum(weights)}


def distillation_loss(
    logits: jax.Array, teacher_logits: jax.Array, batch: Mapping[str, Any], temperature: float = 1.0
) -> tuple[jax.Array, Sums]:
    """Returns the weighted sum over tokens of the divergence of a model from its teacher (Hinton et al., 2015):

        total = τ² Σ wₜ · Σᵥ pₜ[v] · (log pₜ[v] − log qₜ[v]),   p = softmax(teacher / τ),  q = softmax(logits / τ)

    The factor τ² keeps the size of the gradient where τ changes. No gradient reaches the teacher. A token that the
    teacher gives no probability (a logit of −∞) costs nothing. The loss on data is another sum: totals add up.

    Args:
        logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        batch: A mapping with perhaps `weights`, `[...]`.
        temperature: τ, above 0.

    Returns:
        A pair (total, sums): `weight`, and `agree`, Σ wₜ over tokens where both have the same largest logit.

    Raises:
        ValueError: Shapes do not fit, a weight is known and below 0, or `temperature` is known and not above 0.
    """
    check_array("logits", logits)
    check_range("temperature", temperature, lambda x: x > 0, "above 0")
    _check_shape("teacher_logits", teacher_logits, logits, logits.shape, of_batch=False)
    counted, weights = _weights(batch, logits, logits.shape[:-1])
    student, teacher = (
        jnp.where(counted[..., None], _wide(x), 0) for x in (logits, jax.lax.stop_gradient(teacher_logits))
    )
    log_p, log_q = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (teacher, student))
    p = jnp.exp(log_p)
    # Selects, before and after: 0 times ∞ is NaN, in the loss and in its gradient.
    each = jnp.where(p > 0, p * (jnp.where(p > 0, log_p, 0) - jnp.where(p > 0, log_q, 0)), 0)
    agree = jnp.argmax(student, axis=-1) == jnp.argmax(teacher, axis=-1)
    total = temperature**2 * jnp.sum(weights * each.sum(-1))
    return total, {"weight": jnp.sum(weights), "agree": jnp.sum(weights * agree)}


def hidden_loss(hidden: jax.Array, teacher_hidden: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, Sums]:
    """Returns the weighted sum over tokens of how far the vectors of a model are from those of its teacher:

        total = Σ wₜ · mean_l ‖hₗₜ − h′ₗₜ‖² / ‖h′ₗₜ‖²

    over layers l, so that layers whose vectors are long do not outweigh the others (after FitNets, Romero et al.,
    2015). No gradient reaches the teacher. Where a vector of the teacher is 0 the term is 0.

    Args:
        hidden: h `[L, ..., D]`.
        teacher_hidden: h′ `[L, ..., D]`.
        batch: A mapping with perhaps `weights`, `[...]`.

    Returns:
        A pair (total, sums). `sums` has `weight`.

    Raises:
        ValueError: Shapes do not fit, or a weight is known and below 0.
    """
    check_array("hidden", hidden)
    _check_shape("teacher_hidden", teacher_hidden, hidden, hidden.shape, "hidden", of_batch=False)
    counted, weights = _weights(batch, hidden, hidden.shape[1:-1], "hidden")
    student, teacher = (
        jnp.where(counted[..., None], _wide(x), 0) for x in (hidden, jax.lax.stop_gradient(teacher_hidden))
    )
    length = (teacher**2).sum(-1)
    far = ((student - teacher) ** 2).sum(-1)
    each = jnp.where(length > 0, far / jnp.where(length > 0, length, 1), 0).mean(0)
    return jnp.sum(weights * each), {"weight": jnp.sum(weights)}


def contrastive_loss(
    queries: jax.Array, keys: jax.Array, batch: Mapping[str, Any], temperature: Any = 0.07
) -> tuple[jax.Array, Sums]:
    """Returns InfoNCE both ways (van den Oord et al., 2018; Radford et al., 2021), a weighted sum over pairs:

        total = −½ Σᵢ wᵢ · (log softmaxⱼ(sᵢⱼ)[i] + log softmaxⱼ(sⱼᵢ)[i]),   sᵢⱼ = q̂ᵢ · k̂ⱼ / τ,   x̂ = x / ‖x‖

    The other pairs that are seen at once are the negatives: those of a micro-batch, and with `pmap` of one device. So a
    batch that is cut finer has fewer of them. A pair of weight 0 is no negative either.

    Args:
        queries: `[B, D]`.
        keys: `[B, D]`: key i belongs to query i.
        batch: A mapping with perhaps `weights`, `[B]`.
        temperature: τ, above 0; it may be learned.

    Returns:
        A pair (total, sums): `weight`, and `correct`, Σ wᵢ over queries whose own key is the nearest.

    Raises:
        ValueError: Shapes do not fit, a weight is known and below 0, or `temperature` is known and not above 0.
    """
    check_array("queries", queries)
    check_range("temperature", temperature, lambda x: x > 0, "above 0")
    if queries.ndim != 2:
        raise ValueError(f"queries has shape {queries.shape}: need [rows, features]")
    _check_shape("keys", keys, queries, queries.shape, "queries", of_batch=False)
    counted, weights = _weights(batch, queries, queries.shape[:1], "queries")
    q, k = (_unit(jnp.where(counted[:, None], _wide(x), 0)) for x in (queries, keys))
    scores = jnp.matmul(q, k.T, precision="highest") / temperature
    visible = counted[:, None] & counted[None]
    scores = jnp.where(visible, scores, jnp.where(jnp.eye(len(q), dtype=bool), 0, -jnp.inf))
    diagonal = jnp.diagonal(scores)
    each = jax.nn.logsumexp(scores, axis=1) + jax.nn.logsumexp(scores, axis=0) - 2 * diagonal
    correct = jnp.argmax(scores, axis=1) == jnp.arange(len(q))
    return jnp.sum(weights * each) / 2, {"weight": jnp.sum(weights), "correct": jnp.sum(weights * correct)}


def bits_per_byte(sums: Mapping[str, Any]) -> float:
    """Returns nll / (ln 2 · bytes): the bits that coding the text costs per byte, its document ends included.

    A uniform guess over 258 tokens of bytes and their specials costs log₂ 258 = 8.011 bits for each target.

    Args:
        sums: Sums of `next_token_loss` or their per-token means, of batches that say how many bytes targets stand for.

    Returns:
        The number, and NaN where `sums` counts no bytes.
    """
    return float(sums["nll"]) / math.log(2) / float(sums["bytes"]) if float(sums["bytes"]) else math.nan


def column(batch: Any, name: str) -> Any:
    """Returns a column of a batch, or raises ValueError naming those that there are."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch is a {type(batch).__name__}: need a dict with {name!r}")
    if name not in batch:
        raise ValueError(f"batch has no {name!r}, but {', '.join(map(repr, batch)) or 'nothing'}: need {name!r}")
    return batch[name]


def _weights(
    batch: Mapping[str, Any], of: jax.Array, shape: tuple[int, ...], name: str = "logits"
) -> tuple[jax.Array, jax.Array]:
    """Returns what counts, and the weights: 0 where nothing counts, NaN where they are below 0."""
    given = batch.get("weights")
    if given is None:
        return jnp.ones(shape, bool), jnp.ones(shape, jnp.float32)
    check_range("batch['weights']", given, lambda w: w >= 0, "from 0 on")
    weights = jnp.asarray(given, jnp.float32)
    _check_shape("weights", weights, of, shape, name)
    # Selects, before and after: 0 times NaN is NaN, in the loss and in its gradient.
    return weights != 0, jnp.where(weights != 0, jnp.where(weights < 0, jnp.nan, weights), 0)


def _check_shape(
    name: str, array: Any, of: jax.Array, shape: tuple[int, ...], other: str = "logits", of_batch: bool = True
) -> None:
    if jnp.shape(array) != shape:
        said = f"batch[{name!r}]" if of_batch else name
        raise ValueError(f"{said} has shape {jnp.shape(array)} but {other} has shape {of.shape}: need {shape}")


def _wide(x: Any) -> jax.Array:
    """Returns numbers in float32 or better."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _unit(x: jax.Array) -> jax.Array:
    """Returns x / ‖x‖, and 0 for 0."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.where(square > 0, x * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
