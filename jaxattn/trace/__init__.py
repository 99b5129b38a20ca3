"""Looking into models and changing them: sites, edits, records. A model is called with `edits=` and `record=`."""

from jaxattn.nn.tap import ALIASES, SITES, Edit, Layers, Reducer, Tap, Whole
from jaxattn.trace.edits import Add, OnlyAt, Patch, Put, Scale
from jaxattn.trace.reducers import Along, MeanOfTokens, TokensAt

__all__ = [
    "ALIASES",
    "SITES",
    "Add",
    "Along",
    "Edit",
    "Layers",
    "MeanOfTokens",
    "OnlyAt",
    "Patch",
    "Put",
    "Reducer",
    "Scale",
    "Tap",
    "TokensAt",
    "Whole",
]
