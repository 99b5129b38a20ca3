"""Models: transformers from a list of layer specs, generation from them, and other mixers in them."""

from jaxattn.models.config import Branch, Layer, TransformerConfig, pre_norm
from jaxattn.models.convert import linearize, matching_loss
from jaxattn.models.encoder_decoder import EncoderDecoder
from jaxattn.models.fold import centre_writes, fold_norms
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
from jaxattn.models.image_size import with_image_size
from jaxattn.models.load import from_plain, load_model, register_specs, to_plain
from jaxattn.models.patterns import based, hymba, pattern
from jaxattn.models.pretrained import fetch_weights, load_pretrained, save_pretrained
from jaxattn.models.replace import map_mixers, replace_mixers
from jaxattn.models.share_attention import share_attention
from jaxattn.models.transformer import Transformer
from jaxattn.nn.spec import Spec

__all__ = [
    "Branch",
    "Combine",
    "Contrast",
    "EncoderDecoder",
    "FoldedDecoder",
    "Generation",
    "Layer",
    "MinimumLength",
    "Processor",
    "RepetitionPenalty",
    "Spec",
    "Transformer",
    "TransformerConfig",
    "based",
    "centre_writes",
    "fetch_weights",
    "fold_norms",
    "from_plain",
    "generate",
    "hymba",
    "linearize",
    "load_model",
    "load_pretrained",
    "map_mixers",
    "matching_loss",
    "pattern",
    "pre_norm",
    "register_specs",
    "replace_mixers",
    "sample",
    "save_pretrained",
    "share_attention",
    "to_plain",
    "with_image_size",
]
