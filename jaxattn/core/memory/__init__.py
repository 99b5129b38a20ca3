"""`memory_scan`: memories that are trained while they read, their losses and the links to their weights."""

from jaxattn.core.memory.api import MemoryState, memory_read, memory_scan
from jaxattn.core.memory.inner import (
    DotProduct,
    Huber,
    Identity,
    InnerLoss,
    Link,
    LpError,
    LqMirror,
    LqScale,
    MatrixMemory,
    Memory,
    MLPMemory,
    SigmoidLink,
    SoftmaxLink,
    SoftThreshold,
    SquaredError,
)
from jaxattn.core.memory.sharded import sharded_memory_scan

__all__ = [
    "DotProduct",
    "Huber",
    "Identity",
    "InnerLoss",
    "Link",
    "LpError",
    "LqMirror",
    "LqScale",
    "MLPMemory",
    "MatrixMemory",
    "Memory",
    "MemoryState",
    "SigmoidLink",
    "SoftThreshold",
    "SoftmaxLink",
    "SquaredError",
    "memory_read",
    "memory_scan",
    "sharded_memory_scan",
]
