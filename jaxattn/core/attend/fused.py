"""Kernels of libraries, for the calls that they can serve: cuDNN through JAX on NVIDIA GPUs, tokamax where installed.

A call is translated to the arguments of `dot_product_attention`, which both libraries have, or refused by name. The
kernels return no `lse` with a gradient and no statistic, so calls that ask for those are refused too.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.core.attend.bias import Bias
from jaxattn.core.attend.maps import SoftCap
from jaxattn.core.attend.mask import Causal, Lengths, Window, anded
from jaxattn.core.attend.normalize import Softmax
from jaxattn.core.attend.score import Dot
from jaxattn.core.matmul import not_finite


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static arguments of the library's call."""

    kernel: str
    scale: float | None
    is_causal: bool
    window: tuple[int, int] | None
    soft_cap: float | None


def plan(given: Any, return_lse: bool, platform: str | None = None) -> Plan | str:
    """Returns how to serve a call (the arguments of `attend`), or why it cannot be served.

    Args:
        given: The call.
        return_lse: As in `attend`.
        platform: The platform to plan for, by default JAX's backend.
    """
    platform = jax.default_backend() if platform is None else platform
    if platform not in ("gpu", "cuda", "tpu"):
        return f"platform {platform}: library kernels are for GPU and TPU"
    described = _describe(given, return_lse)
    if isinstance(described, str):
        return described
    reasons = []
    for kernel, refuse in (("cudnn", _cudnn_refusal), ("tokamax", _tokamax_refusal)):
        reason = refuse(given, described, platform)
        if reason is None:
            return dataclasses.replace(described, kernel=kernel)
        reasons.append(f"{kernel}: {reason}")
    return "; ".join(reasons)


def _describe(given: Any, return_lse: bool) -> Plan | str:
    """Returns the call in the libraries' terms, or the first thing in it that neither of them has."""
    length, keys = given.query.shape[-3], given.key.shape[-3]
    normalize, maps = given.slots.normalize, tuple(given.slots.score_maps)
    unserved = {
        "return_lse=True: the kernels' lse has no gradient": return_lse,
        "measures": bool(given.slots.measures),
        "dropout": given.slots.dropout is not None,
        "weight_maps": bool(given.slots.weight_maps),
        "query_positions or key_positions": given.query_positions is not None or given.key_positions is not None,
        f"normalize={type(normalize).__name__}": not isinstance(normalize, Softmax),
        "normalize=Softmax with a null logit or a temperature": jax.tree.leaves(normalize) != [],
        f"score={type(given.slots.score).__name__}": not isinstance(given.slots.score, Dot),
        "score_maps other than one SoftCap": len(maps) > 1 or not all(isinstance(each, SoftCap) for each in maps),
        f"bias={type(given.slots.bias).__name__}": not (given.slots.bias is None or isinstance(given.slots.bias, Bias)),
        "key and value that differ in shape": given.key.shape != given.value.shape,
        "a query, key and value that differ in dtype": len({x.dtype for x in given[:3]}) > 1,
    }
    for reason, holds in unserved.items():
        if holds:
            return reason
    if not (given.slots.score.scale is None or isinstance(given.slots.score.scale, int | float)):
        return "score=Dot with an array for a scale"
    if given.slots.bias is not None and jnp.shape(given.slots.bias.array)[-2:] != (length, keys):
        return f"bias=Bias unless its array ends in ({length}, {keys})"
    terms = anded(given.slots.mask)
    windows = [term for term in terms if isinstance(term, Window)]
    others = [term for term in terms if not isinstance(term, Causal | Window | Lengths)]
    if others:
        return f"mask={type(others[0]).__name__}"
    if len(windows) > 1 or sum(isinstance(term, Lengths) for term in terms) > 1:
        return "two masks of a kind"
    lengths = any(isinstance(term, Lengths) for term in terms)
    if windows and (lengths or length > keys + windows[0].left):
        return "a window under which a query may see no key"
    is_causal = any(isinstance(term, Causal) for term in terms)
    window = (windows[0].left, 0 if is_causal else windows[0].right) if windows else None
    return Plan("", given.slots.score.scale, is_causal or (window is not None and window[1] == 0), window,
                maps[0].cap if maps else None)  # fmt: skip


def _cudnn_refusal(given: Any, described: Plan, platform: str) -> str | None:
    width, bias = given.query.shape[-1], given.slots.bias
    unserved = {
        f"platform {platform}": platform not in ("gpu", "cuda"),
        f"dtype {given.query.dtype}, need float16 or bfloat16": given.query.dtype not in (jnp.float16, jnp.bfloat16),
        f"head dim {width}, need a multiple of 8 up to 128": width % 8 != 0 or width > 128,
        "score_maps=SoftCap": described.soft_cap is not None,
        "a window to the right": described.window is not None and described.window[1] > 0,
        # Which corner the kernel's causal mask starts from does not matter then.
        "a causal mask for other queries than keys": described.is_causal
        and given.query.shape[-3] != given.key.shape[-3],
        "a bias of another dtype": bias is not None and bias.array.dtype != given.query.dtype,
        "a bias of odd lengths": given.slots.bias is not None
        and (given.query.shape[-3] % 2 or given.key.shape[-3] % 2),
    }
    return next((reason for reason, holds in unserved.items() if holds), None)


def _tokamax_refusal(given: Any, described: Plan, platform: str) -> str | None:
    return None if importlib.util.find_spec("tokamax") else "not installed"


def fused(given: Any, plan: Plan) -> Float[Array, "*b t n v"]:
    """Returns the out of a call with this plan, by the library's kernel."""
    if plan.kernel == "cudnn":
        return call(given, plan, jax.nn.dot_product_attention, implementation="cudnn")
    from tokamax import dot_product_attention

    options = {} if plan.soft_cap is None else {"logits_soft_cap": plan.soft_cap}
    return call(given, plan, dot_product_attention, **options)


def call(given: Any, plan: Plan, attention: Callable, **options: Any) -> Float[Array, "*b t n v"]:
    """Returns out = attention(...), with one batch axis.

    Sequences without a key are computed with one key and then zeroed. Keys beyond a length may hold anything. A query
    that is not finite is 0 for the kernel and NaN in the end. Other hidden keys must be finite, since the libraries do
    not say what a kernel does with a weight of 0.
    """
    batch = given.query.shape[:-3]
    count = int(np.prod(batch))
    query, key, value = (x.reshape(count, *x.shape[-3:]) for x in given[:3])
    wrong = not_finite(query)[..., None]
    query = jnp.where(wrong, 0, query)
    options |= {"scale": plan.scale, "is_causal": plan.is_causal, "local_window_size": plan.window}
    if given.slots.bias is not None:
        bias = jnp.asarray(given.slots.bias.array)
        bias = bias.reshape((1,) * (len(batch) + 3 - bias.ndim) + bias.shape)
        by_batch = max(bias.shape[:-3], default=1) > 1
        bias = jnp.broadcast_to(bias, (*batch, *bias.shape[-3:])) if by_batch else bias
        options["bias"] = bias.reshape(-1, *bias.shape[-3:])
    lengths = next((term.lengths for term in anded(given.slots.mask) if isinstance(term, Lengths)), None)
    if lengths is None:
        return jnp.where(wrong, jnp.nan, attention(query, key, value, **options)).reshape(given.query.shape)
    lengths = jnp.broadcast_to(jnp.asarray(lengths), tuple(batch)).reshape(count).astype(jnp.int32)
    there = (jnp.arange(key.shape[1]) < lengths[:, None])[..., None, None]
    key, value = jnp.where(there, key, 0), jnp.where(there, value, 0)
    out = attention(query, key, value, key_value_seq_lengths=jnp.clip(lengths, 1, key.shape[1]), **options)
    out = jnp.where(wrong, jnp.nan, out)
    return jnp.where((lengths > 0)[:, None, None, None], out, 0).reshape(given.query.shape)
