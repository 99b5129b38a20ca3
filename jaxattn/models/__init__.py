"""Models: a decoder from a list of layer specs, and generation from it."""

from jaxattn.models.config import Attention, DecoderConfig, FeedForward, Layer, Mixer
from jaxattn.models.convert import Linearized, linearize, matching_loss
from jaxattn.models.decoder import Decoder
from jaxattn.models.folded import FoldedDecoder
from jaxattn.models.generate import (
    Combine,
    Contrast,
    Generation,
    MinimumLength,
    Processor,
    RepetitionPenalty,
    generate,
    sample,
)
from jaxattn.models.hybrid import Hymba, Titans
from jaxattn.models.load import from_plain, load_decoder, register_specs, to_plain
from jaxattn.models.patterns import based, hymba, pattern
from jaxattn.models.recurrent import (
    GLA,
    HGRN2,
    RWKV7,
    S6,
    TTT,
    DeltaNet,
    GatedConvolution,
    Latte,
    LinearAttention,
    Mamba2,
    NeuralMemory,
    RetNet,
)
from jaxattn.models.spec import Spec

__all__ = [
    "GLA",
    "HGRN2",
    "RWKV7",
    "S6",
    "TTT",
    "Attention",
    "Combine",
    "Contrast",
    "Decoder",
    "DecoderConfig",
    "DeltaNet",
    "FeedForward",
    "FoldedDecoder",
    "GatedConvolution",
    "Generation",
    "Hymba",
    "Latte",
    "Layer",
    "LinearAttention",
    "Linearized",
    "Mamba2",
    "MinimumLength",
    "Mixer",
    "NeuralMemory",
    "Processor",
    "RepetitionPenalty",
    "RetNet",
    "Spec",
    "Titans",
    "based",
    "from_plain",
    "generate",
    "hymba",
    "linearize",
    "load_decoder",
    "matching_loss",
    "pattern",
    "register_specs",
    "sample",
    "to_plain",
]
