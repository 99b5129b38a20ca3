"""Models: transformers from a list of layer specs, generation from them, and other mixers in them."""

from jaxattn.models.beam import Beams, beam_search
from jaxattn.models.config import Branch, Layer, TransformerConfig, pre_norm
from jaxattn.models.convert import linearize, matching_loss
from jaxattn.models.encoder_decoder import EncoderDecoder
from jaxattn.models.fold import centre_writes, fold_norms
from jaxattn.models.folded import FoldedDecoder
from jaxattn.models.forecast import attention_history, fit_forecast
from jaxattn.models.frozen import FrozenReader
from jaxattn.models.generate import (
    Combine,
    Contrast,
    Generation,
    MinimumLength,
    Processor,
    RepetitionPenalty,
    generate,
)
from jaxattn.models.image_size import with_image_size
from jaxattn.models.load import from_plain, load_model, register_specs, to_plain
from jaxattn.models.patterns import based, hymba, pattern
from jaxattn.models.pretrained import fetch_weights, load_pretrained, save_pretrained
from jaxattn.models.replace import map_mixers, replace_mixers
from jaxattn.models.sample import sample
from jaxattn.models.server import Finished, Server
from jaxattn.models.share_attention import share_attention
from jaxattn.models.simultaneous import (
    EDAtt,
    Simultaneous,
    WaitK,
    WritePolicy,
    average_lagging,
    first_crossing,
    simultaneous,
)
from jaxattn.models.speculate import Drafter, PromptLookup, Speculation, speculate
from jaxattn.models.state import joined, reordered, rolled_back
from jaxattn.models.stores import UnderPolicy, compare_stores, lost_mass
from jaxattn.models.transformer import Transformer
from jaxattn.models.tree import Branches, longest_path
from jaxattn.nn.spec import Spec

__all__ = [
    "Beams",
    "Branch",
    "Branches",
    "Combine",
    "Contrast",
    "Drafter",
    "EDAtt",
    "EncoderDecoder",
    "Finished",
    "FoldedDecoder",
    "FrozenReader",
    "Generation",
    "Layer",
    "MinimumLength",
    "Processor",
    "PromptLookup",
    "RepetitionPenalty",
    "Server",
    "Simultaneous",
    "Spec",
    "Speculation",
    "Transformer",
    "TransformerConfig",
    "UnderPolicy",
    "WaitK",
    "WritePolicy",
    "attention_history",
    "average_lagging",
    "based",
    "beam_search",
    "centre_writes",
    "compare_stores",
    "fetch_weights",
    "first_crossing",
    "fit_forecast",
    "fold_norms",
    "from_plain",
    "generate",
    "hymba",
    "joined",
    "linearize",
    "load_model",
    "load_pretrained",
    "longest_path",
    "lost_mass",
    "map_mixers",
    "matching_loss",
    "pattern",
    "pre_norm",
    "register_specs",
    "reordered",
    "replace_mixers",
    "rolled_back",
    "sample",
    "save_pretrained",
    "share_attention",
    "simultaneous",
    "speculate",
    "to_plain",
    "with_image_size",
]
