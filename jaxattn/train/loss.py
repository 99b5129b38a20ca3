"""The loss of a language model as a sum over tokens, so that it adds up over micro-batches, devices and batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.train.data import BOS

Sums = dict[str, jax.Array]


def next_token_loss(logits: jax.Array, batch: Mapping[str, Any], z_loss: float = 0.0) -> tuple[jax.Array, Sums]:
    """(total, sums): the weighted sum over tokens of cross-entropy, in nats, and of a penalty on large logits.

    total = Σ wₜ · (zₜ − logitsₜ[targetₜ] + z_loss · zₜ²),  zₜ = log Σᵥ exp logitsₜ[v]

    in float32 whatever the dtype of `logits` `[..., T, V]`. `batch` holds `targets` (integers) and `weights`
    (0 where nothing is to be learned), both `[..., T]`. `sums` are scalars: `nll` (the cross-entropy alone),
    `weight` = Σ wₜ, `bytes` = Σ wₜ over targets that are bytes, and `correct` = Σ wₜ over targets with the largest
    logit. The z-loss (PaLM, 2022, uses 1e-4) keeps zₜ near 0; with `z_loss=0` total = `nll`.

    Raises `ValueError` when the leading axes of `logits` are not the shape of `targets` and `weights`.
    """
    targets, weights = jnp.asarray(batch["targets"]), jnp.asarray(batch["weights"], jnp.float32)
    for name, array in (("targets", targets), ("weights", weights)):
        if array.shape != logits.shape[:-1]:
            raise ValueError(
                f"batch[{name!r}] has shape {array.shape} but logits has shape {logits.shape}: need {logits.shape[:-1]}"
            )
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jnp.sum(weights * (log_normalizer - of_target))
    total = nll + z_loss * jnp.sum(weights * log_normalizer**2)
    sums = {
        "nll": nll,
        "weight": jnp.sum(weights),
        "bytes": jnp.sum(weights * (targets < BOS)),
        "correct": jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets)),
    }
    return total, sums


def bits_per_byte(sums: Mapping[str, Any]) -> float:
    """nll / (ln 2 · bytes): the bits that coding the text costs for each of its bytes, its document ends included.

    Takes sums or their per-token means alike. A uniform guess over the 258 tokens costs log₂ 258 = 8.011 bits for
    each target. NaN where `sums` counts no bytes.
    """
    return float(sums["nll"]) / math.log(2) / float(sums["bytes"]) if float(sums["bytes"]) else math.nan
