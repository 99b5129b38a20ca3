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
    KeyQueryConvolution,
    LearnedTemperature,
    NeuralScore,
    NullSoftmax,
    RelativePositionBias,
)
from jaxattn.nn.sites import SITES, Recorder

__all__ = [
    "SITES",
    "AdditiveScore",
    "BilinearScore",
    "FeedForward",
    "HeadMixing",
    "KeyQueryConvolution",
    "LearnedTemperature",
    "MultiHeadAttention",
    "NeuralScore",
    "NullSoftmax",
    "Recorder",
    "RelativePositionBias",
]
