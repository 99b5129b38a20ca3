"""Flax NNX modules over the core: they own parameters and random streams, and call `attend` with parts.

Every token mixer has one protocol:

    mixer(x, *, context=None, positions=None, mask=None, state=None, record=()) -> (y, state, records)
    mixer.init_state(batch, capacity) -> state      for positions below `capacity`

`state` is what decoding carries (None outside it), `records` a dict of the sites named in `record`.
"""

from jaxattn.nn.attention import ConvolvedState, KeyValue, MultiHeadAttention
from jaxattn.nn.feed_forward import FeedForward
from jaxattn.nn.hybrid import Chain, Parallel
from jaxattn.nn.learned import (
    AdditiveScore,
    BilinearScore,
    HeadMixing,
    HedgehogMap,
    KeyQueryConvolution,
    LearnedTemperature,
    NeuralScore,
    NullSoftmax,
    RandomFeatureMap,
    RelativePositionBias,
)
from jaxattn.nn.learning import TTT, NeuralMemory
from jaxattn.nn.linearized import Linearized
from jaxattn.nn.mechanisms import (
    GLA,
    HGRN2,
    RWKV7,
    DeltaNet,
    GatedConvolution,
    HeadOutput,
    Latte,
    LinearAttention,
    LowRank,
    Projections,
    RetNet,
    ShortConvolution,
)
from jaxattn.nn.merged import LinearSelfAttention, SoftmaxHeads
from jaxattn.nn.prefix import Prefixed, after_prefix, with_prefix
from jaxattn.nn.recurrent import Inputs, LearningInputs, LinearInputs, Mechanism, Passed, Past, Recurrent
from jaxattn.nn.sites import EDITED, SITES, Add, Put, Recorder
from jaxattn.nn.state_space import S6, Mamba2, mimetic_initialization
from jaxattn.nn.titans import MemoryAsContext, memory_as_gate, memory_as_layer

__all__ = [
    "EDITED",
    "GLA",
    "HGRN2",
    "RWKV7",
    "S6",
    "SITES",
    "TTT",
    "Add",
    "AdditiveScore",
    "BilinearScore",
    "Chain",
    "ConvolvedState",
    "DeltaNet",
    "FeedForward",
    "GatedConvolution",
    "HeadMixing",
    "HeadOutput",
    "HedgehogMap",
    "Inputs",
    "KeyQueryConvolution",
    "KeyValue",
    "Latte",
    "LearnedTemperature",
    "LearningInputs",
    "LinearAttention",
    "LinearInputs",
    "LinearSelfAttention",
    "Linearized",
    "LowRank",
    "Mamba2",
    "Mechanism",
    "MemoryAsContext",
    "MultiHeadAttention",
    "NeuralMemory",
    "NeuralScore",
    "NullSoftmax",
    "Parallel",
    "Passed",
    "Past",
    "Prefixed",
    "Projections",
    "Put",
    "RandomFeatureMap",
    "Recorder",
    "Recurrent",
    "RelativePositionBias",
    "RetNet",
    "ShortConvolution",
    "SoftmaxHeads",
    "after_prefix",
    "memory_as_gate",
    "memory_as_layer",
    "mimetic_initialization",
    "with_prefix",
]
