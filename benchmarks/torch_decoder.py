"""A decoder in PyTorch as one writes it there, with the parameters of one of ours: the peer of training steps."""

from typing import Any

import jax
import numpy as np

from benchmarks.llama import torch
from jaxattn.models import Transformer

Module: Any = object if torch is None else torch.nn.Module


def of(array: jax.Array) -> Any:
    """Returns a parameter of these numbers."""
    return torch.nn.Parameter(torch.from_numpy(np.array(array, np.float32)))


class TorchDecoder(Module):
    """RMS norms, rotary positions, norms of queries and keys, grouped heads, gated blocks of SiLU, a tied head.

    Args:
        model: A decoder of that architecture, with all layers alike.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        (run,) = model.runs
        attention, block = run.branches
        module, gated = attention.module, block.module
        self.heads, self.key_heads, self.head_dim = module.heads, module.key_heads, module.head_dim
        self.base, self.eps = module.position.base, attention.norm.eps
        assert {module.query_norm.eps, module.key_norm.eps, block.norm.eps, model.norm.eps} == {self.eps}
        arrays = {
            "query": module.query.kernel,
            "key": module.key.kernel,
            "value": module.value.kernel,
            "out": module.out.kernel,
            "gate": gated.gate.kernel,
            "up": gated.up.kernel,
            "down": gated.down.kernel,
            "norm": attention.norm.scale,
            "query_norm": module.query_norm.scale,
            "key_norm": module.key_norm.scale,
            "block_norm": block.norm.scale,
        }
        layers = [
            {name: np.asarray(array[...])[layer].T for name, array in arrays.items()} for layer in range(*model.lengths)
        ]
        self.layers = torch.nn.ModuleList(
            torch.nn.ParameterDict({name: of(array) for name, array in layer.items()}) for layer in layers
        )
        self.table, self.last = of(model.embed.table[...]), of(model.norm.scale[...])
        places = torch.arange(model.config.length, dtype=torch.float32)[:, None]
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        angles = places * self.base**-powers
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def _norm(self, x: Any, scale: Any) -> Any:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), scale, self.eps)

    def _turned(self, x: Any) -> Any:
        first, second = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, tokens: Any) -> Any:
        """Returns logits [B, T, vocabulary] of tokens [B, T]."""
        linear, split = torch.nn.functional.linear, (*tokens.shape, -1, self.head_dim)
        x = self.table[tokens]
        for layer in self.layers:
            y = self._norm(x, layer["norm"])
            query = self._norm(linear(y, layer["query"]).view(split), layer["query_norm"]).transpose(1, 2)
            key = self._norm(linear(y, layer["key"]).view(split), layer["key_norm"]).transpose(1, 2)
            value = linear(y, layer["value"]).view(split).transpose(1, 2)
            z = torch.nn.functional.scaled_dot_product_attention(
                self._turned(query), self._turned(key), value, is_causal=True, enable_gqa=self.heads != self.key_heads
            )
            x = x + linear(z.transpose(1, 2).flatten(2), layer["out"])
            y = self._norm(x, layer["block_norm"])
            gate = torch.nn.functional.silu(linear(y, layer["gate"]))
            x = x + linear(gate * linear(y, layer["up"]), layer["down"])
        return linear(self._norm(x, self.last), self.table)

    def loss(self, tokens: Any, targets: Any) -> Any:
        """Returns the mean of −log p of the targets [B, T]."""
        return torch.nn.functional.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
