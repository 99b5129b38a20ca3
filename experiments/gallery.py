"""The gallery, docs/gallery.md: a picture of every mask, bias, normaliser, map, rotary scaling and detector of heads.

`python -m experiments.gallery` draws it anew. Each entry is a line of Python, evaluated with the names of
`jaxattn.core.attend` and of `EXAMPLES`; what it does is the first paragraph of its part's docstring.
"""

import dataclasses
import inspect
import io
import textwrap
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import jaxattn.core.attend
from jaxattn import Causal, Explicit, analysis, attend, viz

DOCS = Path(__file__).parent.parent / "docs"
LENGTH, WIDTH, COLOURS, GAP = 20, 1440, 64, 20

rng = np.random.default_rng(0)
EXAMPLES: dict[str, Any] = {
    "documents": jnp.array([0] * 7 + [1] * 4 + [2] * 9),
    "places": jnp.array([*range(7), *range(4), *range(9)]),
    "array": jnp.asarray(rng.random((1, LENGTH, LENGTH)) < 0.3),
    "senders": np.arange(LENGTH - 1).repeat(2),
    "receivers": np.stack([np.arange(1, LENGTH), np.arange(1, LENGTH) // 2], 1).ravel(),
    "parents": jnp.array([-1, 0, 0, 1, 1, 2, 3, 3, 5, 5, 6, 8, 8, 9, 10, 11, 11, 12, 13, 14]),
    "expiry": jnp.array([99, 4, 6, 4, 99, 7, 8, 9, 13, 13, 13, 12, 13, 99, 16, 99, 18, 19, 20, 21]),
    "gates": jnp.asarray(np.arange(LENGTH) % 3 > 0, float)[None, None],
    "scores": jnp.asarray(rng.normal(size=(1, LENGTH, 5))),
    "table": jnp.asarray(rng.normal(size=(LENGTH, LENGTH)).cumsum(0).cumsum(1)) / 10,
    "buckets": jnp.linspace(1.5, -1.5, 12)[None],
    "prior": jnp.asarray(rng.normal(size=(1, LENGTH))),
    "centres": jnp.asarray(10 + 8 * np.sin(np.arange(LENGTH) / 4))[None],
    "mixing": jnp.array([[0.8, 0.6], [-0.6, 0.8]]),
    "kernel": jnp.array([[[0.0, 0.3, 0.0], [0.3, 0.8, 0.3]]]),
    "halves": jnp.array([0] * 10 + [1] * 10),
    "pieces": jnp.array([-1] * 3 + [0] * 4 + [1] * 6 + [2] * 3 + [-2] * 4),
    "key": jax.random.key(0),
    "DETECTORS": analysis.DETECTORS,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Parts of one slot: what the page says of them, and the lines that make them."""

    title: str
    text: str
    entries: tuple[str, ...]
    columns: int = 4

    @property
    def file(self) -> str:
        return f"gallery/{self.title.lower().replace(' ', '_')}.png"


FAMILIES = (
    Family(
        "Masks",
        "Rows are queries, columns keys; blue is visible. `&`, `|` and `~` combine masks.",
        (
            "Causal()",
            "Window(4)",
            "Causal() & (Window(4) | Sinks(2))",
            "Dilated(3)",
            "Causal() & (Window(3) | Dilated(4))",
            "Chunked(5)",
            "Documents(documents)",
            "Causal() & Documents(documents)",
            "Within(Causal() & (Window(1) | Sinks(1)), places) & Documents(documents)",
            "Lengths(jnp.array([13]))",
            "Prefix(6)",
            "Explicit(array)",
            "Expires(expiry)",
            "Causal() & Pieces(pieces)",
            "Graph.from_edges(senders, receivers, 20)",
            "Ancestors(parents)",
            "Causal() & Blocks(BlockIndex.from_scores(scores, 2, (1, 4)))",
            "~Window(4, 4)",
            "PerHead((Window(1), Window(9), Causal() & Dilated(3), Chunked(4)))",
        ),
    ),
    Family(
        "Biases",
        "What is added to a score because of where query and key stand: blue adds, red takes away.",
        (
            "Bias(table)",
            "KeyBias(prior)",
            "RelativeBias(buckets, max_distance=16)",
            "LogGaussian(centres, sigma=3.0)",
            "Alibi.geometric(4)",
        ),
        columns=3,
    ),
    Family(
        "Normalisers",
        "How scores become weights: rows of 16 scores that fall evenly from 2 to −2, times 1/2, 1 and 2.",
        (
            "Softmax()",
            "Softmax(null_logit=jnp.array([3.0]))",
            "GatedSoftmax(gates)",
            "Sparsemax()",
            "Entmax15()",
            "TopK(4)",
            "Sigmoid()",
            "Relu()",
            "ReluSquared()",
            "Elu1()",
            "Elu1(normalized=True)",
            "LinearWeights()",
            "OneHotSample(key)",
            "Gumbel(key, temperature=0.5)",
        ),
    ),
    Family(
        "Score maps",
        "An example of scores, what becomes of them, and the one against the other.",
        ("SoftCap(3.0)", "Temperature(2.0)", "MixHeads(mixing)", "Convolution(kernel)", "Temporal()"),
        columns=2,
    ),
    Family(
        "Weight maps",
        "The same for weights, the softmax of those scores.",
        (
            "TopKWeights(4)",
            "DropTopK(6, 0.5, key)",
            "Reallocate(halves, jnp.array([0.9, 0.1]), 2)",
            "GaussianWindow(centres, sigma=3.0)",
            "Dropout(0.3, key)",
            "KeepGroups(pieces, keep=1)",
        ),
        columns=2,
    ),
    Family(
        "Rotary scalings",
        "The score of a query and a key that are equal, by their distance: the mean of cos(distance · frequency) over "
        "64 channels. A factor of 4 reads 4 times the length of training.",
        (
            "Interpolate(4.0)",
            "NTK(4.0)",
            "Yarn(4.0, 128)",
            "Llama3(4.0, 128)",
            "LongRope(tuple(1 + 3 * i / 31 for i in range(32)), 4.0, 128)",
        ),
        columns=3,
    ),
    Family(
        "Heads",
        "What a head of each kind looks at where a text of 11 tokens comes again: the pairs that `analysis.detect` "
        "counts. Rows are queries, columns keys.",
        tuple(f'DETECTORS["{name}"]' for name, each in analysis.DETECTORS.items() if each.measure is not None),
        columns=5,
    ),
)


def make(line: str) -> Any:
    return eval(line, vars(jaxattn.core.attend) | EXAMPLES | {"jnp": jnp})


def looks_at(detector: analysis.Detector) -> np.ndarray:
    """Which pairs of query and key a detector counts, [T, T]: what it says of weights that are all on one key."""
    given = analysis.copies(jax.random.key(3), 1, LENGTH, LENGTH)
    assert detector.measure is not None
    measures, flat = {"score": detector.measure(given)}, jnp.zeros((1, LENGTH, 1, 1))
    columns = jnp.eye(LENGTH, dtype=bool)

    @jax.vmap
    def with_key(column):
        one = Explicit(jnp.broadcast_to(column, (LENGTH, LENGTH)))
        return attend(flat, flat, flat, mask=Causal() & one, measures=measures)[1]["score"].reshape(LENGTH)

    return np.asarray(with_key(columns) > 0.5).T & np.asarray(given.again).T


def draw(family: Family, line: str) -> Figure:
    part, title = make(line), "\n".join(textwrap.wrap(line, 40))
    match family.title:
        case "Masks":
            return viz.show_mask(part, LENGTH, title=title)
        case "Normalisers":
            return viz.show_scores(part, 3, 16, title=title)
        case "Score maps" | "Weight maps":
            part = part.draw((), 1) if isinstance(part, jaxattn.Dropout) else part
            on: Literal["scores", "weights"] = "scores" if family.title == "Score maps" else "weights"
            return viz.show_scores(part, LENGTH, title=title, on=on, heads=2 if "MixHeads" in line else 1)
        case "Heads":
            name = line.split('"')[1]
            return viz.show_mask(Explicit(jnp.asarray(looks_at(part))), LENGTH, title=name)
        case "Rotary scalings":
            return viz.show_scores(part, 256, title=title)
    return viz.show_scores(part, LENGTH, title=title)


def montage(figures: list[Figure], columns: int) -> Image.Image:
    """The figures in rows, each drawn at the width of its column and cut to what is drawn, on white."""
    width, images = WIDTH // columns, []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=(width - GAP) / figure.get_figwidth())
        image = Image.open(buffer).convert("RGB")
        images.append(image.crop(ImageOps.invert(image.convert("L")).getbbox()))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.height for image in row) + GAP for row in rows]
    whole = Image.new("RGB", (WIDTH, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            whole.paste(image, (column * width + GAP // 2, sum(heights[:number]) + GAP // 2))
    return whole.quantize(COLOURS, dither=Image.Dither.NONE)


def described(line: str) -> str:
    """What the part of a line does: the first paragraph of its docstring; of a composed mask, its own description."""
    part = make(line)
    if isinstance(part, jaxattn.Mask) and any(operator in line for operator in "&|~"):
        return f"{part.describe()}."
    if isinstance(part, analysis.Detector):
        return f"A head that {part.says}."
    text = inspect.getdoc(type(part)) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def page() -> str:
    """The gallery in Markdown."""
    parts = ["# Gallery\n", "Drawn by `python -m experiments.gallery`, which also holds the example arrays.\n"]
    for family in FAMILIES:
        parts += [
            f"## {family.title}\n",
            f"{family.text}\n",
            f"![{family.title}]({family.file})\n",
            "| part | what it does |\n|---|---|",
        ]
        parts += [f"| `{line.replace('|', chr(92) + '|')}` | {described(line)} |" for line in family.entries]
        parts += [""]
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "gallery").mkdir(exist_ok=True)
    (DOCS / "gallery.md").write_text(page())
    for family in FAMILIES:
        montage([draw(family, line) for line in family.entries], family.columns).save(DOCS / family.file, optimize=True)
