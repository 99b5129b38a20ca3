"""Flax NNX modules over the core: they own parameters and random streams, and call `attend` with parts.

Every token mixer has one protocol:

    mixer(x, *, context=None, positions=None, mask=None, state=None, record=()) -> (y, state, records)
    mixer.init_state(batch, capacity) -> state

`state` is what decoding carries (None outside it), `records` a dict of the sites named in `record`.
"""

from jaxattn.nn.attention import MultiHeadAttention
from jaxattn.nn.feed_forward import FeedForward
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
from jaxattn.nn.mechanisms import (
    GLA,
    HGRN2,
    RWKV7,
    DeltaNet,
    HeadOutput,
    Latte,
    LinearAttention,
    LowRank,
    Mamba2,
    Projections,
    RetNet,
    ShortConvolution,
    mimetic_initialization,
)
from jaxattn.nn.recurrent import Inputs, LearningInputs, LinearInputs, Mechanism, Past, Recurrent
from jaxattn.nn.sites import SITES, Recorder

__all__ = [
    "GLA",
    "HGRN2",
    "RWKV7",
    "SITES",
    "TTT",
    "AdditiveScore",
    "BilinearScore",
    "DeltaNet",
    "FeedForward",
    "HeadMixing",
    "HeadOutput",
    "HedgehogMap",
    "Inputs",
    "KeyQueryConvolution",
    "Latte",
    "LearnedTemperature",
    "LearningInputs",
    "LinearAttention",
    "LinearInputs",
    "LowRank",
    "Mamba2",
    "Mechanism",
    "MultiHeadAttention",
    "NeuralMemory",
    "NeuralScore",
    "NullSoftmax",
    "Past",
    "Projections",
    "RandomFeatureMap",
    "Recorder",
    "Recurrent",
    "RelativePositionBias",
    "RetNet",
    "ShortConvolution",
    "mimetic_initialization",
]
