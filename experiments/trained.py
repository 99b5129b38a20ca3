"""Trained models for experiments: those that registries have, or small ones of the same architecture for quick runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from experiments.weights import folder_of
from jaxattn import models
from jaxattn.models import pretrained

RANDOM = "random"


def encoded(got: pretrained.Pretrained, text: str) -> np.ndarray:
    """The tokens of a text without special ones; bytes, if the model has no tokenizer."""
    if got.tokenizer is None:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return np.asarray(got.encode(text, special=False), np.int32)


def loaded(weights: str, small: Mapping[str, Any]) -> pretrained.Pretrained:
    """Returns a model, and fetches its weights where they are not there.

    Args:
        weights: A name of `python -m jaxattn weights list`; or "random" for a model that has learned nothing.
        small: The numbers of config.json of that model.

    Raises:
        ValueError: There are no such weights.
        ConnectionError: The registry cannot be reached.
    """
    if weights != RANDOM:
        return models.load_pretrained(folder_of(weights))
    configs = pretrained.FAMILIES[small["model_type"]].configs(small)
    model: Any
    if isinstance(configs, tuple):
        model = models.EncoderDecoder(*configs, rngs=nnx.Rngs(0))
    else:
        model = models.Transformer(configs, rngs=nnx.Rngs(0))
    model.eval()
    return pretrained.Pretrained(model, config=dict(small))
