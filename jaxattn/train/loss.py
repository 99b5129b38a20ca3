"""The loss of a language model as a sum over tokens, so that it adds up over micro-batches, devices and batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.core.checks import as_ids, check_array, check_range
from jaxattn.train.data import BOS

Sums = dict[str, jax.Array]


def next_token_loss(logits: jax.Array, batch: Mapping[str, Any], z_loss: float = 0.0) -> tuple[jax.Array, Sums]:
    """Returns the weighted sum over tokens of cross-entropy, in nats, and of a penalty on large logits:

        total = Σ wₜ · (zₜ − logitsₜ[targetₜ] + z_loss · zₜ²),  zₜ = log Σᵥ exp logitsₜ[v]

    in float32 whatever the dtype of the logits.

    A token of weight 0 is not read: its logits may be NaN and its target any integer (such as −100), and its gradient
    is 0. Where a token counts and its target is outside the vocabulary, total, `nll` and the gradient of its logits are
    NaN. Where a weight is below 0, total, `nll` and `weight` are NaN; weights that are known raise.

    Args:
        logits: `[..., T, V]`.
        batch: A mapping with `targets` (integers from 0 to V − 1) and `weights` (0 where nothing is to be learned,
            above 0 elsewhere), both `[..., T]`.
        z_loss: The factor of the z-loss, which keeps zₜ near 0 (PaLM, 2022, uses 1e-4). With 0 total = `nll`.

    Returns:
        A pair (total, sums). `sums` are scalars: `nll` (the cross-entropy alone), `weight` = Σ wₜ, `bytes` = Σ wₜ over
            targets that are bytes, and `correct` = Σ wₜ over targets with the largest logit.

    Raises:
        TypeError: Targets are not integers.
        ValueError: The leading axes of `logits` are not the shape of `targets` and `weights`, or a weight or `z_loss`
            is known and below 0.
    """
    check_array("logits", logits)
    check_range("z_loss", z_loss, lambda x: (x >= 0) & (x < math.inf), "from 0 on")
    check_range("batch['weights']", batch["weights"], lambda w: w >= 0, "from 0 on")
    targets, weights = jnp.asarray(batch["targets"]), jnp.asarray(batch["weights"], jnp.float32)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"batch['targets'] has dtype {targets.dtype}: need integers")
    targets = as_ids(targets)
    for name, array in (("targets", targets), ("weights", weights)):
        if array.shape != logits.shape[:-1]:
            raise ValueError(
                f"batch[{name!r}] has shape {array.shape} but logits has shape {logits.shape}: need {logits.shape[:-1]}"
            )
    counted, inside = weights != 0, (targets >= 0) & (targets < logits.shape[-1])
    # Selects, before and after: 0 times NaN is NaN, in the loss and in its gradient.
    weights = jnp.where(counted, jnp.where(weights < 0, jnp.nan, weights), 0)
    logits = jnp.where(counted[..., None], logits.astype(jnp.float32), 0)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.take_along_axis(logits, jnp.where(inside, targets, 0)[..., None], axis=-1)[..., 0]
    known = jnp.where(inside | ~counted, weights, jnp.nan)
    nll = jnp.sum(known * (log_normalizer - of_target))
    total = nll + jnp.where(z_loss == 0, 0, z_loss * jnp.sum(weights * log_normalizer**2))
    sums = {
        "nll": nll,
        "weight": jnp.sum(weights),
        "bytes": jnp.sum(weights * ((targets >= 0) & (targets < BOS))),
        "correct": jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets)),
    }
    return total, sums


def bits_per_byte(sums: Mapping[str, Any]) -> float:
    """Returns nll / (ln 2 · bytes): the bits that coding the text costs per byte, its document ends included.

    A uniform guess over the 258 tokens costs log₂ 258 = 8.011 bits for each target.

    Args:
        sums: Sums of `next_token_loss` or their per-token means, of text whose tokens are bytes, as in `Windows`. The
            ids of another vocabulary below 256 are no bytes.

    Returns:
        The number, and NaN where `sums` counts no bytes.
    """
    return float(sums["nll"]) / math.log(2) / float(sums["bytes"]) if float(sums["bytes"]) else math.nan
