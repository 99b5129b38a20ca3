"""Models: a decoder from a list of layer specs, and generation from it."""

from jaxattn.models.config import Attention, DecoderConfig, FeedForward, Layer, Mixer
from jaxattn.models.decoder import Decoder
from jaxattn.models.generate import Generation, generate, sample
from jaxattn.models.load import from_plain, load_decoder, to_plain
from jaxattn.models.recurrent import (
    GLA,
    HGRN2,
    RWKV7,
    TTT,
    DeltaNet,
    Latte,
    LinearAttention,
    Mamba2,
    NeuralMemory,
    RetNet,
)

__all__ = [
    "GLA",
    "HGRN2",
    "RWKV7",
    "TTT",
    "Attention",
    "Decoder",
    "DecoderConfig",
    "DeltaNet",
    "FeedForward",
    "Generation",
    "Latte",
    "Layer",
    "LinearAttention",
    "Mamba2",
    "Mixer",
    "NeuralMemory",
    "RetNet",
    "from_plain",
    "generate",
    "load_decoder",
    "sample",
    "to_plain",
]
