"""From softmax to linear attention: a trained decoder with learned features in place of its attention (Hedgehog).

First the features are fitted to the attention maps of the decoder, layer by layer, and nothing else. Then the whole is
trained on the task as any decoder is.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array

from jaxattn import nn
from jaxattn.core.attend.mask import Causal, Documents
from jaxattn.models.replace import replace_mixers
from jaxattn.models.transformer import Transformer
from jaxattn.nn.spec import Spec


def linearize(model: Transformer, kind: Literal["softmax", "exp"] = "softmax") -> Transformer:
    """Returns the decoder with the same parameters and `nn.Linearized` in place of every causal attention.

    Layers with other masks (windows) and other mixers stay as they are. The features start at W = I: fit them by
    `matching_loss`.

    Args:
        model: The decoder.
        kind: The kind of the features, see `HedgehogFeatures`.

    Raises:
        ValueError: There is no causal attention, or one that features cannot stand for: with a null logit, ALiBi,
            another normaliser, or keys of another layer.
    """
    if model.config.bias is not None:
        raise ValueError("model has a bias that all layers share, which features cannot stand for: need bias=None")
    found = []

    def change(layer: int, mixer: Spec) -> Spec:
        said = mixer.arguments
        own = mixer.target is nn.MultiHeadAttention and said.get("keys_from", "self") == "self"
        if not own or not model.config.causal or said.get("mask") not in (None, Causal()):
            return mixer
        found.append(layer)
        return Spec(nn.Linearized, attention=mixer.replace(mask=Causal()), kind=kind)

    def take(new: Any, old: Any) -> None:
        nnx.update(new.mechanism.attention, nnx.state(old))

    converted = replace_mixers(model, change, take)
    if not found:
        raise ValueError("model has no layer with causal attention: there is nothing to linearise")
    return converted


def _is_linearized(module: Any) -> bool:
    return isinstance(module, nn.Recurrent) and isinstance(module.mechanism, nn.Linearized)


def matching_loss(
    student: Transformer, teacher: Transformer
) -> tuple[Any, Callable[..., tuple[Array, dict[str, Array]]]]:
    """Returns the features of the student, and the loss that fits them to the teacher.

    For every linearised layer the loss is the mean over rows of −Σ_j P_j log A_j: the teacher's attention weights P
    against those that the features make of the same queries and keys, so that each layer learns by itself. The loss of
    a batch is the mean over layers, per token of the packed batch. The features are not decayed. Memory is T² per head
    of one layer.

    Args:
        student: The linearised decoder.
        teacher: The decoder with attention.

    Returns:
        A pair (parameters, loss), as `fit` and `make_step` take them.

    Raises:
        ValueError: The decoder has meta tokens, cross-attention or shared layers, or a linearised mixer that is not the
            first branch of its layer.
    """
    if teacher.config.meta_tokens:
        raise ValueError(f"teacher has {teacher.config.meta_tokens} meta tokens: maps are matched without them only")
    if teacher.crosses:
        raise ValueError("teacher has cross-attention, for which a batch holds no context: need a decoder without")
    if teacher.config.shared:
        raise ValueError("teacher has shared layers, whose maps are matched one by one: need shared=False")
    for run in student.runs:
        if any(map(_is_linearized, run.mixers)) and not _is_linearized(run.branches[0].module):
            raise ValueError("student has a linearised mixer behind another branch of its layer: need it first")
    maps = nnx.All(nnx.Param, nnx.PathContains(_FEATURE_MAP))
    graph, *states = nnx.split(student, maps, ...)
    params, rest = states
    of_teacher, arrays = nnx.split(teacher)

    def loss_fn(arrays, rest, params, batch, key):
        ids = batch["documents"]
        _, _, records = nnx.merge(of_teacher, arrays)(batch["tokens"], mask=Documents(ids), record=("resid_pre",))
        inputs = records["resid_pre"]
        losses: list[Array] = []
        first = 0
        model = nnx.merge(graph, params, rest)
        for run, length in zip(model.runs, model.lengths, strict=True):
            if _is_linearized(run.branches[0].module):
                form, arrays = nnx.split(run)

                def divergence(layer, form=form):
                    arrays, x = layer
                    branch = nnx.merge(form, arrays).branches[0]
                    return branch.module.mechanism.divergence(x if branch.norm is None else branch.norm(x), ids)

                losses.append(jax.lax.map(divergence, (arrays, inputs[first : first + length])))
            first += length
        weight = jnp.asarray(batch["weights"], jnp.float32).sum()
        return jnp.concatenate(losses).mean() * weight, {"weight": weight}

    return params, Partial(loss_fn, arrays, rest)


_FEATURE_MAP = "feature_map"
