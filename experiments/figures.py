"""The pictures of the README: the mask it composes, and the two figures of the last demo run, with fewer colours."""

from pathlib import Path

from PIL import Image

from jaxattn import Causal, Sinks, Window, viz

DOCS = Path(__file__).parent.parent / "docs"

if __name__ == "__main__":
    viz.save(viz.show_mask(Causal() & (Window(7) | Sinks(3)), 32), DOCS / "mask.png")
    for name in ("loss.png", "attention.png"):
        Image.open(Path("runs/demo") / name).convert("RGB").quantize(64).save(DOCS / name, optimize=True)
