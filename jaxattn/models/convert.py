"""From softmax to linear attention: a trained decoder with learned features in place of its attention (Hedgehog).

First the features are fitted to the attention maps of the decoder, layer by layer, and nothing else; then the whole is
trained on the task as any decoder is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxattn import nn
from jaxattn.core.attend.mask import Causal, Documents
from jaxattn.models.config import Attention, Mixer
from jaxattn.models.decoder import Decoder


@dataclass(frozen=True)
class Linearized(Mixer):
    """An attention read as linear attention; see `nn.Linearized`.

    Attributes:
        attention: The attention whose projections it has.
        kind: Of the Hedgehog features.
    """

    attention: Attention = Attention()
    kind: Literal["softmax", "exp"] = "softmax"

    def build(self, features: int, dtype: Any, rngs: nnx.Rngs) -> nn.Recurrent:
        """The module; raises ValueError for an attention that features cannot stand for."""
        return nn.Recurrent(nn.Linearized(self.attention.build(features, dtype, rngs), kind=self.kind))


def linearize(model: Decoder, kind: Literal["softmax", "exp"] = "softmax") -> Decoder:
    """The decoder with the same parameters and `Linearized` in place of every causal attention.

    Layers with other masks (windows) and other mixers stay as they are. The features start at W = I: fit them by
    `matching_loss`. Raises ValueError if there is no causal attention, or one that features cannot stand for: with a
    null logit, ALiBi, another normaliser, or keys of another layer.
    """

    def spec(mixer: Mixer) -> Mixer:
        causal = isinstance(mixer, Attention) and mixer.mask == Causal() and mixer.own_keys
        return Linearized(mixer, kind) if causal else mixer  # type: ignore[arg-type]

    layers = [replace(layer, mixer=spec(layer.mixer)) for layer in model.config.layers]
    if not any(isinstance(layer.mixer, Linearized) for layer in layers):
        raise ValueError("model has no layer with causal attention: there is nothing to linearise")
    converted = Decoder(replace(model.config, layers=layers), rngs=nnx.Rngs(0))
    trained = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    def of_model(path: tuple, param: Any) -> Any:
        wrapped = ("mechanism", "attention")
        return param if _FEATURE_MAP in path else trained[tuple(name for name in path if name not in wrapped)]

    params = dict(nnx.to_flat_state(nnx.state(converted, nnx.Param)))
    nnx.update(converted, nnx.from_flat_state({path: of_model(path, param) for path, param in params.items()}))
    if model.runs[0].deterministic:
        converted.eval()
    return converted


def matching_loss(student: Decoder, teacher: Decoder) -> tuple[Any, Callable[..., tuple[Array, dict[str, Array]]]]:
    """The features of the student, and the loss that fits them to the teacher, as `fit` and `make_step` take them.

    For every linearised layer the mean over rows of −Σ_j P_j log A_j: the teacher's attention weights P against those
    that the features make of the same queries and keys, so that each layer learns by itself. The loss is the mean over
    layers, per token of the packed batch. The features are not decayed. Memory is T² per head of one layer. Raises
    ValueError for decoders with meta tokens.
    """
    if teacher.config.meta_tokens:
        raise ValueError(f"teacher has {teacher.config.meta_tokens} meta tokens: maps are matched without them only")
    maps = nnx.All(nnx.Param, nnx.PathContains(_FEATURE_MAP))
    graph, *states = nnx.split(student, maps, ...)
    params, rest = states

    def loss_fn(params, batch, key):
        ids = batch["documents"]
        _, _, records = teacher(batch["tokens"], mask=Documents(ids), record=("resid_pre",))
        inputs = records["resid_pre"]
        losses: list[Array] = []
        first = 0
        model = nnx.merge(graph, params, rest)
        for run, length in zip(model.runs, model.lengths, strict=True):
            if isinstance(getattr(run.mixer, "mechanism", None), nn.Linearized):
                form, arrays = nnx.split(run)

                def divergence(layer, form=form):
                    arrays, x = layer
                    block = nnx.merge(form, arrays)
                    return block.mixer.mechanism.divergence(block.mixer_norm(x), ids)

                losses.append(jax.lax.map(divergence, (arrays, inputs[first : first + length])))
            first += length
        weight = jnp.asarray(batch["weights"], jnp.float32).sum()
        return jnp.concatenate(losses).mean() * weight, {"weight": weight}

    return params, loss_fn


_FEATURE_MAP = "feature_map"
