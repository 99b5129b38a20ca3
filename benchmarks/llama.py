"""The decoder of Llama in PyTorch, written out, with the weights of one of ours: what one would loop over otherwise."""

import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import nn
from jaxattn.models import Transformer

torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None


class TorchLlama:
    """Logits [B, T, vocabulary] in float32: RMS norms, rotary positions, grouped heads, gated blocks of SiLU.

    Args:
        model: A decoder of that architecture, with all layers alike and a tied head.
    """

    def __init__(self, model: Transformer):
        (layers,) = model.runs
        attention, block = layers.branches
        module, gated = attention.module, block.module
        self.heads, self.key_heads, self.width = module.heads, module.key_heads, module.head_dim
        self.eps, self.base = attention.norm.eps, module.position.base
        maps = {
            "query": module.query,
            "key": module.key,
            "value": module.value,
            "out": module.out,
            "gate": gated.gate,
            "up": gated.up,
            "down": gated.down,
        }
        self.maps = {name: self._of(map_.kernel[...].swapaxes(1, 2)) for name, map_ in maps.items()}  # [L, out, in]
        self.norms = self._of(jnp.stack([attention.norm.scale[...], block.norm.scale[...]], 1))
        assert isinstance(model.embed, nn.TokenEmbedding)
        self.table, self.last = self._of(model.embed.table[...]), self._of(model.norm.scale[...])
        self.layers = len(self.norms)

    @staticmethod
    def _of(array: jax.Array) -> Any:
        return torch.from_numpy(np.array(array, np.float32))

    def _norm(self, x: Any, scale: Any) -> Any:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), scale, self.eps)

    def _split(self, x: Any, heads: int) -> Any:
        return x.view(*x.shape[:2], heads, self.width).transpose(1, 2)  # [B, N, T, H]

    def _turned(self, x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def __call__(
        self, tokens: Any, ablated: tuple[int, int] | None = None, start: tuple[int, Any] | None = None
    ) -> tuple[Any, list[Any]]:
        """Returns the pair (logits, the stream before each layer that ran).

        Args:
            tokens: [B, T].
            ablated: The layer and the number of a head whose z is 0.
            start: A layer, and the stream before it, from which the run begins.
        """
        linear, maps = torch.nn.functional.linear, self.maps
        places = torch.arange(tokens.shape[1], dtype=torch.float32)[:, None]
        angles = places * self.base ** (-torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)
        cos, sin = angles.cos(), angles.sin()
        first, x = (0, self.table[tokens]) if start is None else start
        streams = []
        for layer in range(first, self.layers):
            streams.append(x)
            y = self._norm(x, self.norms[layer, 0])
            query = self._turned(self._split(linear(y, maps["query"][layer]), self.heads), cos, sin)
            key = self._turned(self._split(linear(y, maps["key"][layer]), self.key_heads), cos, sin)
            value = self._split(linear(y, maps["value"][layer]), self.key_heads)
            z = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            if ablated is not None and ablated[0] == layer:
                z[:, ablated[1]] = 0
            x = x + linear(z.transpose(1, 2).flatten(2), maps["out"][layer])
            y = self._norm(x, self.norms[layer, 1])
            gate = torch.nn.functional.silu(linear(y, maps["gate"][layer]))
            x = x + linear(gate * linear(y, maps["up"][layer]), maps["down"][layer])
        return linear(self._norm(x, self.last), self.table), streams
