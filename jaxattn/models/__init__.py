"""Models: a decoder from a list of layer specs, and generation from it."""

from jaxattn.models.config import Attention, DecoderConfig, FeedForward, Layer
from jaxattn.models.decoder import Decoder
from jaxattn.models.generate import Generation, generate, sample
from jaxattn.models.load import from_plain, load_decoder, to_plain

__all__ = [
    "Attention",
    "Decoder",
    "DecoderConfig",
    "FeedForward",
    "Generation",
    "Layer",
    "from_plain",
    "generate",
    "load_decoder",
    "sample",
    "to_plain",
]
