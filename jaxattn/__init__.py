"""jaxattn: attention in JAX. The calls, and the parts that a user writes by name.

More parts are in the wings `jaxattn.core.attend`, `jaxattn.core.linear` and `jaxattn.core.memory`. Modules, models,
stores and the rest are in packages of their own (`from jaxattn import nn`).
"""

from jaxattn.core.attend.api import attend, explain
from jaxattn.core.attend.bias import Alibi, Bias, KeyBias, RelativeBias, ScoreBias
from jaxattn.core.attend.blocks import BlockIndex, Blocks
from jaxattn.core.attend.dot_product import dot_product_attention
from jaxattn.core.attend.maps import Dropout, Map, SoftCap, Temperature
from jaxattn.core.attend.mask import Causal, Chunked, Documents, Explicit, Lengths, Mask, PerHead, Prefix, Sinks, Window
from jaxattn.core.attend.measure import Entropy, Mass, Measure, Received
from jaxattn.core.attend.normalize import Entmax15, Normalize, Sigmoid, Softmax, Sparsemax
from jaxattn.core.attend.partial import Partial, merge
from jaxattn.core.attend.position import Llama3, Position, Rotary, Yarn, rotary, sinusoidal
from jaxattn.core.attend.score import Dot, Score
from jaxattn.core.attend.slots import Slots
from jaxattn.core.attend.tile import Tile
from jaxattn.core.linear.api import linear_attention
from jaxattn.core.memory.api import memory_scan
from jaxattn.core.part import part

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "Bias",
    "BlockIndex",
    "Blocks",
    "Causal",
    "Chunked",
    "Documents",
    "Dot",
    "Dropout",
    "Entmax15",
    "Entropy",
    "Explicit",
    "KeyBias",
    "Lengths",
    "Llama3",
    "Map",
    "Mask",
    "Mass",
    "Measure",
    "Normalize",
    "Partial",
    "PerHead",
    "Position",
    "Prefix",
    "Received",
    "RelativeBias",
    "Rotary",
    "Score",
    "ScoreBias",
    "Sigmoid",
    "Sinks",
    "Slots",
    "SoftCap",
    "Softmax",
    "Sparsemax",
    "Temperature",
    "Tile",
    "Window",
    "Yarn",
    "attend",
    "dot_product_attention",
    "explain",
    "linear_attention",
    "memory_scan",
    "merge",
    "part",
    "rotary",
    "sinusoidal",
]
