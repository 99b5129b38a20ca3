"""Pictures and pages. They take arrays (or a mask), never models.

Each `show_` function returns a matplotlib `Figure`, which `save` writes as PNG, SVG or PDF; `page` returns HTML.
"""

from jaxattn.viz.attention import show_heads
from jaxattn.viz.curves import show_by_layer, show_curves, show_lags, show_risks
from jaxattn.viz.figure import save
from jaxattn.viz.masks import show_mask
from jaxattn.viz.pages import Example, Lens, page
from jaxattn.viz.patterns import show_arcs, show_offsets, show_points
from jaxattn.viz.scores import show_scores
from jaxattn.viz.tables import show_grid, show_lens, show_patching

__all__ = [
    "Example",
    "Lens",
    "page",
    "save",
    "show_arcs",
    "show_by_layer",
    "show_curves",
    "show_grid",
    "show_heads",
    "show_lags",
    "show_lens",
    "show_mask",
    "show_offsets",
    "show_patching",
    "show_points",
    "show_risks",
    "show_scores",
]
