"""Pictures: each function takes arrays (or a mask) and returns a matplotlib `Figure`; `save` writes it as PNG."""

from jaxattn.viz.attention import show_heads
from jaxattn.viz.curves import show_curves, show_risks
from jaxattn.viz.figure import save
from jaxattn.viz.masks import show_mask
from jaxattn.viz.scores import show_scores

__all__ = ["save", "show_curves", "show_heads", "show_mask", "show_risks", "show_scores"]
