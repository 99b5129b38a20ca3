"""jaxattn: attention in JAX. The calls and the parts; subpackages are imported by name (`from jaxattn import nn`)."""

from jaxattn.core.attend import attend, explain
from jaxattn.core.bias import Alibi, Bias
from jaxattn.core.blocks import BlockIndex, Blocks, block_means, select_tokens, take_tokens
from jaxattn.core.graph import Ancestors, Graph
from jaxattn.core.maps import Dropout
from jaxattn.core.mask import (
    Causal,
    Chunked,
    Dilated,
    Documents,
    Explicit,
    Lengths,
    Mask,
    PerHead,
    Prefix,
    Sinks,
    Window,
)
from jaxattn.core.normalize import Normalize, Sigmoid, Softmax, Streaming
from jaxattn.core.partial import EMPTY, Partial, merge
from jaxattn.core.parts import part
from jaxattn.core.position import NTK, Interpolate, LearnedPositions, Yarn, rotary, rotary_2d, sinusoidal
from jaxattn.core.score import Dot

__all__ = [
    "EMPTY",
    "NTK",
    "Alibi",
    "Ancestors",
    "Bias",
    "BlockIndex",
    "Blocks",
    "Causal",
    "Chunked",
    "Dilated",
    "Documents",
    "Dot",
    "Dropout",
    "Explicit",
    "Graph",
    "Interpolate",
    "LearnedPositions",
    "Lengths",
    "Mask",
    "Normalize",
    "Partial",
    "PerHead",
    "Prefix",
    "Sigmoid",
    "Sinks",
    "Softmax",
    "Streaming",
    "Window",
    "Yarn",
    "attend",
    "block_means",
    "explain",
    "merge",
    "part",
    "rotary",
    "rotary_2d",
    "select_tokens",
    "sinusoidal",
    "take_tokens",
]
