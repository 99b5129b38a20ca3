"""`dot_product_attention`: `attend` under the arguments of `jax.nn` and of Flax, for code that was written for them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jaxattn.core.attend.api import Implementation, attend, attention_weights
from jaxattn.core.attend.bias import Bias
from jaxattn.core.attend.call import check_pairs
from jaxattn.core.attend.maps import Dropout
from jaxattn.core.attend.mask import Causal, Explicit, Lengths, Mask, Window
from jaxattn.core.attend.score import Dot
from jaxattn.core.checks import check_array, check_floating


def dot_product_attention(
    query: Float[Array, "*b t n h"],
    key: Float[Array, "*b s k h"],
    value: Float[Array, "*b s k v"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Num[Array, "..."] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " b"] | None = None,
    key_value_seq_lengths: Int[Array, " b"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    implementation: Implementation | Literal["xla", "cudnn"] | None = None,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
) -> Any:
    """softmax(q·k · scale + bias where mask) v, with the arguments of `jax.nn.dot_product_attention` and of Flax.

        nnx.MultiHeadAttention(..., attention_fn=jaxattn.dot_product_attention)
        linen.MultiHeadDotProductAttention(..., attention_fn=jaxattn.dot_product_attention)

    The arguments mean what they mean there, with one difference: a query that sees no key gives zeros, where `jax.nn`
    gives the mean of all values. Hidden keys and values may hold NaN. Scores and statistics are float32 or better.

    Args:
        query: [..., T, N, H].
        key: [..., S, K, H], where N is a multiple of K.
        value: [..., S, K, V].
        bias: An array that broadcasts to [..., N, T, S] and is added to the scores.
        mask: True where a query sees a key: an array that broadcasts to [..., N, T, S], boolean or, as Flax makes them,
            of zeros and ones.
        scale: The factor of q·k, by default H**-0.5.
        is_causal: Query i sees the keys up to i.
        query_seq_lengths: [B], the number of queries that each sequence has; the rows of other queries are zeros.
        key_value_seq_lengths: [B], the number of keys that each sequence has.
        local_window_size: (left, right), or one number for both: query i sees the keys i − left .. i + right.
        return_residual: Also return the log of each row's total weight, [..., T, N].
        implementation: As in `attend`. None and "xla" are "auto", and "cudnn" is "fused".
        dropout_rng: The random key of the dropout on the weights, which are scaled by 1 / (1 − rate).
        dropout_rate: The rate of the dropout, from 0 to below 1.
        broadcast_dropout: All batch entries and heads drop the same pairs.
        deterministic: No dropout.
        dtype: The dtype that query, key and value are cast to, by default the one that they promote to.
        precision: The precision of products: one of JAX's names or a `jax.lax.Precision`.
        module: A module of Flax to whose intermediates `attention_weights` are added.
        promote_dtype: A function that casts instead, promote_dtype((query, key, value), dtype=dtype).
        qk_attn_weights_einsum: Refused, since no product here is an einsum.
        attn_weights_value_einsum: Refused, likewise.

    Returns:
        out [..., T, N, V], or the pair (out, residual) with `return_residual`.

    Raises:
        TypeError or ValueError: Shapes do not fit, a mask holds other numbers than 0 and 1, or dropout has no key. The
            message names the argument.
        NotImplementedError: One of the two einsums is given.
    """
    einsums = {"qk_attn_weights": qk_attn_weights_einsum, "attn_weights_value": attn_weights_value_einsum}
    for name, einsum in einsums.items():
        if einsum is not None:
            raise NotImplementedError(f"{name}_einsum is given: attend makes its products without an einsum")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_array(name, x)
    if promote_dtype is None:
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    else:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    masks: list[Mask] = []
    if mask is not None:
        check_array("mask", mask)
        check_pairs("mask", mask, query, key)
        masks.append(Explicit(_boolean(mask)))
    if is_causal:
        masks.append(Causal())
    if local_window_size is not None:
        window = local_window_size if isinstance(local_window_size, tuple | list) else (local_window_size,) * 2
        if len(window) != 2:
            raise ValueError(f"local_window_size is {local_window_size}: need one number, or (left, right)")
        masks.append(Window(*window))
    if key_value_seq_lengths is not None:
        masks.append(Lengths(_lengths("key_value_seq_lengths", key_value_seq_lengths, query)))
    whole: Mask | None = None
    for each in masks:
        whole = each if whole is None else whole & each
    positions = None
    if query_seq_lengths is not None:
        lengths = _lengths("query_seq_lengths", query_seq_lengths, query)
        places = jnp.arange(query.shape[-3])
        positions = jnp.where(places < lengths[..., None], places, -1)
    if bias is not None:
        check_floating("bias", bias)
        check_pairs("bias", bias, query, key)
    options: dict[str, Any] = {
        "score": Dot(scale),
        "bias": None if bias is None else Bias(jnp.asarray(bias)),
        "mask": whole,
        "query_positions": positions,
    }
    if dropout_rate and not deterministic and dropout_rng is None:
        raise ValueError(f"dropout_rng is None and dropout_rate is {dropout_rate}: need a key, or deterministic=True")
    dropout = None
    if dropout_rate and not deterministic:
        dropout = Dropout(dropout_rate, dropout_rng, shared=broadcast_dropout)
    chosen: Any = {None: "auto", "xla": "auto", "cudnn": "fused"}.get(implementation, implementation)
    with nullcontext() if precision is None else jax.default_matmul_precision(_precision(precision)):
        if module is not None:
            _sow(module, attention_weights(query, key, **options)[0])
        options |= {"dropout": dropout, "implementation": chosen, "return_lse": return_residual}
        found = attend(query, key, value, **options)
    return (found[0], found[1]["lse"]) if return_residual else found


def _sow(module: Any, weights: Array) -> None:
    from flax import nnx  # which whoever has such a module has

    collection: Any = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(collection, "attention_weights", weights)


def _boolean(mask: Any) -> Bool[Array, "..."]:
    """A mask of booleans, or of zeros and ones."""
    mask = jnp.asarray(mask)
    if mask.dtype == bool:
        return mask
    if not isinstance(mask, jax.core.Tracer) and not np.isin(np.asarray(mask, np.float32), (0, 1)).all():
        raise ValueError(f"mask is {mask.dtype} with other numbers than 0 and 1: an additive mask is a bias")
    return mask != 0


def _lengths(name: str, lengths: Any, query: Array) -> Int[Array, "*b"]:
    check_array(name, lengths)
    batch = query.shape[:-3]
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or tuple(lengths.shape) not in (batch, batch or (1,)):
        raise ValueError(f"{name} is {lengths.dtype}{list(lengths.shape)}: need integers {list(batch or (1,))}")
    return jnp.reshape(lengths, batch)


def _precision(precision: Any) -> Any:
    return precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision
