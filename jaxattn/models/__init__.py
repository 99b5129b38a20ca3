"""Models: a decoder from a list of layer specs, and generation from it."""

from jaxattn.models.config import Attention, DecoderConfig, FeedForward, Layer
from jaxattn.models.decoder import Decoder
from jaxattn.models.generate import Generation, generate, sample

__all__ = ["Attention", "Decoder", "DecoderConfig", "FeedForward", "Generation", "Layer", "generate", "sample"]
