"""Other mixers in the layers of a model: of its config, and of a trained model with its parameters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.models.config import Branch, Layer, TransformerConfig
from jaxattn.models.transformer import Block, Transformer
from jaxattn.nn import Mechanism, Mixer
from jaxattn.nn.spec import Spec


def is_mixer(spec: Spec, width: int) -> bool:
    """Returns whether a spec makes a module that moves information between tokens."""
    if isinstance(spec.target, type):
        return issubclass(spec.target, Mixer | Mechanism)
    made = nnx.eval_shape(lambda: spec.build(features=width, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return isinstance(made, Mixer | Mechanism)


def map_mixers(config: TransformerConfig, change: Callable[[int, Spec], Spec]) -> TransformerConfig:
    """Returns the config with `change(layer, mixer)` in place of every mixer of its layers."""

    def of_branch(number: int, branch: Branch) -> Branch:
        mixes = is_mixer(branch.module, config.width)
        return replace(branch, module=change(number, branch.module)) if mixes else branch

    def of_layer(number: int, layer: Layer) -> Layer:
        return replace(layer, branches=[of_branch(number, branch) for branch in layer.branches])

    return replace(config, layers=[of_layer(number, layer) for number, layer in enumerate(config.layers)])


def replace_mixers(
    model: Transformer,
    change: Callable[[int, Spec], Spec],
    take: Callable[[Any, Any], None] | None = None,
    *,
    rngs: nnx.Rngs | None = None,
) -> Transformer:
    """Returns a model with other mixers in its layers, and the parameters of the old one everywhere else.

        replace_mixers(model, lambda layer, mixer: mixer.replace(mask=Window(64)) if layer % 2 else mixer)

    Args:
        model: The model, which stays as it is.
        change: A function from the number of a layer and the spec of its mixer to the spec of the new one; the same
            spec keeps the mixer.
        take: A function called as `take(new, old)` with the modules of each mixer that was changed, of one layer. It
            moves over the parameters that the new one can use. By default all parameters, if both have the same.
        rngs: Streams for parameters that the old model does not have; seed 0 by default.

    Returns:
        The new model, in evaluation mode if the old one is.

    Raises:
        ValueError: A mixer has other parameters than the old one, and there is no `take`.
    """
    take = _all if take is None else take
    config = map_mixers(model.config, change)
    new = Transformer(config, rngs=nnx.Rngs(0) if rngs is None else rngs)
    for name in ("embed", "positions", "embed_norm", "embed_map", "bias", "norm", "head"):
        if isinstance(getattr(new, name), nnx.Module):
            nnx.update(getattr(new, name), nnx.state(getattr(model, name)))
    if new.meta is not None and model.meta is not None:
        new.meta[...] = model.meta[...]
    old_layers = _layers(model)
    first = 0
    for run, length in zip(new.runs, new.lengths, strict=True):
        made = []
        for number, block in zip(range(first, first + length), _blocks(run, length), strict=True):
            of_old, of_new = model.config.layers[number].branches, config.layers[number].branches
            for old, branch, said, says in zip(
                old_layers[number].branches, block.branches, of_old, of_new, strict=True
            ):
                changed = said.module != says.module
                _update(branch, old, norms_only=changed)
                if changed:
                    take(branch.module, old.module)
            made.append(nnx.state(block))
        made = made[:1] if config.shared else made
        nnx.update(run, jax.tree.map(lambda *x: jnp.stack(x), *made))
        first += length
    if model.runs[0].deterministic:
        new.eval()
    return new


def _update(branch: Any, old: Any, *, norms_only: bool) -> None:
    """Takes over the state of a branch; that of its module unless `norms_only`."""
    for name in ("norm", "norm_after", "norm_sum", "gate", *(() if norms_only else ("module",))):
        if getattr(branch, name) is not None:
            nnx.update(getattr(branch, name), nnx.state(getattr(old, name)))
    if branch.scale is not None:
        branch.scale[...] = old.scale[...]


def _all(new: Any, old: Any) -> None:
    there, here = (dict(nnx.to_flat_state(nnx.state(each, nnx.Param))) for each in (old, new))
    shapes = [{path: param.shape for path, param in each.items()} for each in (there, here)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{type(new).__name__} has other parameters than {type(old).__name__}: need `take`, which says what is used"
        )
    nnx.update(new, nnx.from_flat_state(there))


def _layers(model: Transformer) -> list[Block]:
    """Returns every layer of the model as a module of its own."""
    return [block for run, length in zip(model.runs, model.lengths, strict=True) for block in _blocks(run, length)]


def _blocks(run: Any, length: int) -> list[Block]:
    graph, arrays = nnx.split(run)
    # Shared parameters have a layer axis of 1.
    return [nnx.merge(graph, jax.tree.map(lambda x, i=i: x[min(i, len(x) - 1)], arrays)) for i in range(length)]
