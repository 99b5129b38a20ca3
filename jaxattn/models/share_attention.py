"""Layers that attend as an earlier one does: a trained decoder with fewer maps of queries and keys (EchoAtt)."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from jaxattn import nn
from jaxattn.models.replace import replace_mixers
from jaxattn.models.transformer import Transformer
from jaxattn.nn.spec import Spec


def share_attention(model: Transformer, blocks: Sequence[Sequence[int]]) -> Transformer:
    """Returns the model in which the later layers of each block attend as its first one does (EchoAtt, 2024).

    They keep their values, output maps and parameters of slots, and lose W_q and W_k. Train the result to imitate the
    model, for instance by `train.distillation_loss`.

        blocks = similar_blocks(attention_similarity(weights), size=3, count=2)

    Args:
        model: The model, which stays as it is.
        blocks: Blocks of adjacent layers, each at least 2, such as [(3, 4, 5)].

    Raises:
        ValueError: A block is not made of adjacent layers of the model, two blocks share a layer, or a layer is not one
            of attention with its own keys and as many heads as the first of its block.
    """
    count, echoes = len(model.config.layers), set()
    for block in blocks:
        block = list(block)
        inside = len(block) >= 2 and block[0] >= 0 and block[-1] < count
        if not inside or block != list(range(block[0], block[0] + len(block))):
            raise ValueError(f"blocks has {block}: need at least 2 adjacent layers from 0 to {count - 1}")
        echoes |= set(block[1:])
    said = [layer for block in blocks for layer in block]
    if len(set(said)) < len(said):
        raise ValueError(f"blocks is {list(map(list, blocks))}: need blocks that share no layer")

    def change(layer: int, mixer: Spec) -> Spec:
        if layer not in said:
            return mixer
        if mixer.target is not nn.MultiHeadAttention or mixer.arguments.get("keys_from", "self") != "self":
            raise ValueError(f"layers[{layer}] is {mixer}: need MultiHeadAttention with keys of its own, alone")
        return mixer.replace(keys_from="layer", echo=True, qk_norm=None) if layer in echoes else mixer

    return replace_mixers(model, change, _take)


def _take(new: Any, old: Any) -> None:
    """Moves over the parameters that both have."""
    wanted = dict(nnx.to_flat_state(nnx.state(new, nnx.Param)))
    there = dict(nnx.to_flat_state(nnx.state(old, nnx.Param)))
    nnx.update(new, nnx.from_flat_state({path: there[path] for path in wanted}))
