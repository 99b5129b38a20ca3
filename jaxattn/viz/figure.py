"""What all pictures share: colours, and how they are written."""

import os
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = ("#2f5d8a", "#c8553d", "#4f8a4b", "#8a5fa8", "#b8862b", "#4a8f98")
WEIGHTS = "Blues"


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG, atomically and without a date, so equal figures are equal files. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    os.replace(temporary, path)
    return path
