"""The same function with other weights: gains of norms moved into maps, and what is written without its mean.

To read weights one wants maps that act on the normed stream itself, and writes without the part that every norm takes
away. Both functions are exact. They go by the branches of a model: what stands behind a norm reads the stream, and the
last map of a module writes to it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxattn import nn
from jaxattn.models.transformer import Residual, Transformer
from jaxattn.nn.spec import built


def fold_norms(model: Transformer) -> Transformer:
    """Returns the model with norms without gains and biases, which went into the maps behind them.

        W norm(x) + a = (W diag(g)) n + (a + W b),   with norm(x) = g ⊙ n + b

    A tied head gets weights of its own. The head gets a bias where the final norm has one.

    Args:
        model: The model, which stays as it is. Every branch has one norm, before it.

    Returns:
        A model with the same logits up to rounding.

    Raises:
        ValueError: A branch has a norm behind it (Gemma 2) or a norm of the sum (BERT), whose gains no map can take
            over; a module or a norm is of a class whose maps are not known; or a map lacks the bias that it would need.
            The branch is named.
    """
    new = _copy(model)
    head = _untied(new, use_bias=getattr(new.norm, "bias", None) is not None)
    for where, branch in _branches(new):
        _check_norms(where, branch)
        if branch.norm is not None:
            _fold(where, branch.norm, {name: getattr(branch.module, name) for name in _reads(where, branch)})
    if new.norm is not None:
        bias = _fold("the final norm", new.norm, {"map": head.map}, has_bias=True)
        if bias is not None:
            head.bias[...] += head.scale * bias
    return new


def centre_writes(model: Transformer) -> Transformer:
    """Returns the model whose every write to the residual stream has mean 0 over the channels, and logits mean 0.

    LayerNorm takes away the mean of what it reads, and softmax what all logits have in common: neither sees it. A tied
    head gets weights of its own, and LayerScale goes into the maps that it scales.

    Args:
        model: The model, which stays as it is. All that reads the stream is behind a LayerNorm.

    Returns:
        A model with the same log-probabilities up to rounding.

    Raises:
        ValueError: A branch reads the stream without a norm or behind an RMSNorm, which does see the mean; a norm or a
            map from a narrow embedding writes to the stream (Gemma 2, BERT, ALBERT); logits are capped, so that what
            they have in common counts; or a class is not known. It is named.
    """
    new = _copy(model)
    head = _untied(new)
    if head.cap is not None:
        raise ValueError(f"logits are capped at {head.cap}, so that a constant added to all changes them: need no cap")
    if not isinstance(new.embed, nn.TokenEmbedding):
        raise ValueError(f"embed is {type(new.embed).__name__}: need TokenEmbedding, whose tables are known")
    if new.embed_norm is not None:
        raise ValueError(f"embed_norm is {type(new.embed_norm).__name__}, which writes to the stream: need None")
    if narrow := new.config.embed_width:
        raise ValueError(f"embed_width is {narrow}, from which a map writes to the stream: need None")
    if not (new.positions is None or isinstance(new.positions, nn.PositionEmbedding)):
        raise ValueError(f"positions is {type(new.positions).__name__}: need PositionEmbedding, or None")
    for where, norm in [*((where, branch.norm) for where, branch in _branches(new)), ("the final norm", new.norm)]:
        if not isinstance(norm, nn.LayerNorm):
            raise ValueError(
                f"{where} reads the stream through {type(norm).__name__}, which sees its mean: need LayerNorm"
            )
    tables = (new.embed.table, new.embed.types, new.meta, None if new.positions is None else new.positions.table)
    for table in tables:
        if table is not None:
            table[...] = _centred(table[...])
    for where, branch in _branches(new):
        _check_norms(where, branch)
        _reads(where, branch)  # of a known class
        last = branch.module.out if branch.mixes else branch.module.down
        if last is None:
            raise ValueError(f"{where} writes without a map: need project=True")
        for param in (last.kernel, last.bias):
            if param is not None:
                scale: Any = 1.0 if branch.scale is None else branch.scale[...]
                scale = scale[..., None, :] if param is last.kernel and branch.scale is not None else scale
                param[...] = _centred(scale * param[...])
        if branch.scale is not None:
            branch.scale[...] = jnp.ones_like(branch.scale[...])
    head.map.kernel[...] = _centred(head.map.kernel[...])
    if head.bias is not None:
        head.bias[...] = _centred(head.bias[...])
    return new


def _copy(model: Transformer) -> Transformer:
    """Returns a model with the same arrays, of which any may be replaced."""
    if not isinstance(model, Transformer):
        raise TypeError(f"model is {type(model).__name__}: need a Transformer, such as the decoder of a model of two")
    return nnx.clone(model)


def _untied(model: Transformer, *, use_bias: bool = False) -> Any:
    """Gives a model a head with weights of its own, and with `use_bias` with a bias; returns it."""
    old, config = model.head, model.config
    if not isinstance(old, nn.Head):
        raise ValueError(f"head is {type(old).__name__}: need nn.Head, which gives logits")
    spec: Any = config.head
    more = {"tied": False} if old.tied else {}
    more |= {"use_bias": True} if use_bias and old.bias is None else {}
    if not more:
        return old
    spec, kernel = spec.replace(**more), model.embed.table[...].T if old.map is None else old.map.kernel[...]
    sizes: dict[str, Any] = {"features": config.width, "vocabulary": config.vocabulary, "length": config.length}
    head: Any = nnx.eval_shape(lambda: built(spec, **sizes, rngs=nnx.Rngs(0)))
    head.map.kernel.set_value(kernel)
    if head.bias is not None:
        head.bias.set_value(jnp.zeros(kernel.shape[-1], kernel.dtype) if old.bias is None else old.bias[...])
    model.head, model.config = head, dataclasses.replace(config, head=spec)
    return head


def _branches(model: Transformer) -> Iterator[tuple[str, Residual]]:
    """Yields the branches of all runs of layers, each with its place."""
    first = 0
    for run, length in zip(model.runs, model.lengths, strict=True):
        for number, branch in enumerate(run.branches):
            yield f"layers[{first}].branches[{number}]", branch
        first += length


def _check_norms(where: str, branch: Residual) -> None:
    if branch.gate is not None:
        raise ValueError(f"{where} has the gate {type(branch.gate).__name__}, which reads the norm too: need gate=None")
    for name in ("norm_after", "norm_sum"):
        if (norm := getattr(branch, name)) is not None:
            raise ValueError(
                f"{where} has {name}={type(norm).__name__}, which writes to the stream: need a norm before only"
            )


def _reads(where: str, branch: Residual) -> tuple[str, ...]:
    """Returns the names of the maps of a branch that read the normed stream."""
    module = branch.module
    if type(module) is nn.FeedForward:
        names: tuple[str, ...] = ("up", "gate")
    elif type(module) is nn.MultiHeadAttention:
        names = ("query", "gate", *(() if module.keys_from == "context" else ("key", "value")))
    else:
        raise ValueError(
            f"{where} is {type(module).__name__}: need MultiHeadAttention or FeedForward, whose maps are known"
        )
    return tuple(name for name in names if getattr(module, name) is not None)


def _fold(where: str, norm: Any, maps: dict[str, Any], *, has_bias: bool = False) -> Array | None:
    """Moves gains and biases of a norm into maps; with `has_bias` returns what the bias adds, instead of adding it."""
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        raise ValueError(f"{where} has the norm {type(norm).__name__}: need LayerNorm or RMSNorm")
    bias, added = getattr(norm, "bias", None), None
    for name, each in maps.items():
        kernel = each.kernel[...]
        if bias is not None:
            added = jnp.einsum("...d,...de->...e", bias[...], kernel)
            if not has_bias and each.bias is not None:
                each.bias[...] += added
            elif not has_bias and jnp.any(bias[...]):
                raise ValueError(
                    f"{where} has a norm with a bias, but its map {name} has none to take it over: need use_bias"
                )
        if norm.scale is not None:
            gain: Any = norm.scale[...] + getattr(norm, "offset", 0.0)
            each.kernel[...] = gain[..., None] * kernel
    if norm.scale is not None:
        norm.scale[...] = jnp.full_like(norm.scale[...], 1 - getattr(norm, "offset", 0.0))
    if bias is not None:
        bias[...] = jnp.zeros_like(bias[...])
    return added


def _centred(x: Array) -> Array:
    return x - x.mean(-1, keepdims=True)
