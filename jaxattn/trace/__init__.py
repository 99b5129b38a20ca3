"""Looking into models and changing them: sites, edits, records. A model is called with `edits=` and `record=`."""

from jaxattn.nn.tap import ALIASES, SITES, Edit, Layers, Reducer, Tap, Whole
from jaxattn.trace.attribution import attribution, integrated_gradients
from jaxattn.trace.circuit import Circuit, Faithfulness, edge_attribution, faithfulness, largest, with_edges
from jaxattn.trace.edits import Add, Cut, Mix, OnlyAt, Pairs, Patch, Put, Scale
from jaxattn.trace.patching import Effects, interchange, path
from jaxattn.trace.reducers import Along, MeanOfTokens, TokensAt
from jaxattn.trace.sweep import Edges, Grid, Places, edges, heads, positions, run, sweep

__all__ = [
    "ALIASES",
    "SITES",
    "Add",
    "Along",
    "Circuit",
    "Cut",
    "Edges",
    "Edit",
    "Effects",
    "Faithfulness",
    "Grid",
    "Layers",
    "MeanOfTokens",
    "Mix",
    "OnlyAt",
    "Pairs",
    "Patch",
    "Places",
    "Put",
    "Reducer",
    "Scale",
    "Tap",
    "TokensAt",
    "Whole",
    "attribution",
    "edge_attribution",
    "edges",
    "faithfulness",
    "heads",
    "integrated_gradients",
    "interchange",
    "largest",
    "path",
    "positions",
    "run",
    "sweep",
    "with_edges",
]
