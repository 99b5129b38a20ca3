"""The pictures of the README and of docs/look.md: the mask it composes, and the last demo run's, with fewer colours."""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.demo import CONTEXT, TEXT
from jaxattn import Causal, Sinks, Window, viz
from jaxattn.__main__ import opened, seen

DOCS, RUN = Path(__file__).parent.parent / "docs", Path("runs/demo")
HEAD, SIZE = "layer=1&head=3&theme=light", (1400, 1700)  # what the photograph of the page shows


def photograph(page: Path, file: Path) -> None:
    """Writes what Chromium shows of a page."""
    browser = shutil.which("chromium")
    if browser is None:
        print(f"no chromium on PATH: {file} is left as it was")
        return
    with tempfile.TemporaryDirectory() as folder:
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
        shot = f"--user-data-dir={folder}", f"--screenshot={file}", f"--window-size={SIZE[0]},{SIZE[1]}"
        command = [browser, *options, "--hide-scrollbars", *shot, f"file://{page.resolve()}#{HEAD}"]
        subprocess.run(command, capture_output=True, check=True)
    fewer_colours(file, file)


def fewer_colours(source: Path, file: Path) -> None:
    Image.open(source).convert("RGB").quantize(64).save(file, optimize=True)


def lags(weights: np.ndarray, count: int = 12) -> tuple[list[float], list[float]]:
    """The mean weight [T, T] at each lag, and its standard error."""
    along = [np.diagonal(weights, -lag) for lag in range(count)]
    return [x.mean() for x in along], [x.std(ddof=1) / len(x) ** 0.5 for x in along]


def pictures(folder: Path, positions: int = 12) -> list[list[Figure]]:
    """Rows of figures for docs/look.md, of the demo's first decoder."""
    model, encoded, strings = opened(str(folder / "softmax"))
    example = seen(model, encoded(TEXT[: CONTEXT - 1]), strings)
    weights, entropy = np.asarray(example.weights), example.statistics["entropy (nats)"]
    profiles = {}
    for lag in (0, 1, 2):  # the head that looks there most
        means = np.diagonal(weights, -lag, axis1=2, axis2=3).mean(-1)
        layer, head = np.unravel_index(means.argmax(), means.shape)
        profiles[f"layer {layer}, head {head}"] = lags(weights[layer, head])
    lens = example.lens
    assert lens is not None  # a decoder has logits
    best = [[place[0] for place in row[:positions]] for row in lens.tokens]
    probabilities = np.asarray(lens.probabilities)[:, :positions, 0]
    return [
        [viz.show_grid(entropy, "entropy (nats)"), viz.show_by_layer({"entropy": entropy}, "entropy (nats)")],
        [viz.show_lags(profiles), viz.show_grid(example.statistics["mass on the first key"], "mass on the first key")],
        [viz.show_lens(best, probabilities, example.tokens[:positions], rows=lens.rows)],
    ]


def sheet(rows: list[list[Figure]], dpi: int = 110) -> Image.Image:
    """The figures in rows, each in its size, on white."""
    images: list[list[Image.Image]] = []
    for row in rows:
        images.append([])
        for figure in row:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=dpi)
            images[-1].append(Image.open(buffer).convert("RGB"))
    width = max(sum(image.width for image in row) for row in images)
    heights = [max(image.height for image in row) for row in images]
    whole = Image.new("RGB", (width, sum(heights)), "white")
    for number, drawn in enumerate(images):
        for place, image in enumerate(drawn):
            left, space = sum(each.width for each in drawn[:place]), heights[number] - image.height
            whole.paste(image, (left, sum(heights[:number]) + space // 2))
    return whole


if __name__ == "__main__":
    viz.save(viz.show_mask(Causal() & (Window(7) | Sinks(3)), 32), DOCS / "mask.png")
    for name in ("loss.png", "attention.png"):
        fewer_colours(RUN / name, DOCS / name)
    photograph(RUN / "look.html", DOCS / "look.png")
    sheet(pictures(RUN)).quantize(255).save(DOCS / "pictures.png", optimize=True)
