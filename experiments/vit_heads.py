"""Where the heads of a trained vision transformer look around themselves, and which of them its class vector needs.

For each head the weights between patches are added up by offset, with the query in the middle: a head that always looks
at the patch to its left has all of its weight at one offset. Rings of neighbours say how local a head is, and grey
images what it does by position alone. Heads are scored by how far the vector of the class token turns without them, on
some images, and the best and the worst are removed together on others. That layer 0 of this model is not its most local
one had been seen before the claims were written down.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from experiments.attention_distance import IMAGES, SMALL, shown
from experiments.trained import RANDOM, loaded
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, check_names


@dataclass(frozen=True)
class Config:
    """A vision transformer, and images that it sees.

    Attributes:
        weights: A name of `python -m jaxattn weights list`, or "random" for a small model that has learned nothing.
        images: Some of those of `experiments.attention_distance`, among them "photograph" and "grey". Heads are scored
            on the photograph and what is made of it, and removed on "noise" too.
        share: The share of heads that are removed together.
        draws: Draws of as many random heads to compare with.
        chunk: Runs computed at once.
    """

    weights: str = "vit-focus"
    images: tuple[str, ...] = IMAGES
    share: float = 0.25
    draws: int = 5
    chunk: int = 2


QUICK = Config(weights=RANDOM, images=("photograph", "grey"), draws=2, chunk=8)
OFFSETS, PROFILES = "vit_supervision", "vit_head_analytics"

CLAIMS = (
    Claim(
        "There are heads that look at one neighbour: of a head whose mean offset is half a patch or more, 0.3 of the "
        "weight or more is at a single offset.",
        paper=OFFSETS,
        number="largest peak of a head that looks to one side",
        confirmed=at_least(0.3),
        refuted=at_most(0.1),
    ),
    Claim(
        "They look to that side whatever the image: of these heads the least cosine between the offsets on the "
        "photograph and on grey is 0.5 or more.",
        paper=OFFSETS,
        number="least cosine of offsets on photograph and grey",
        confirmed=at_least(0.5),
        refuted=at_most(0),
    ),
    Claim(
        "Such heads are in the first half of the layers: the one with the largest peak is.",
        paper=OFFSETS,
        number="depth of the largest peak (0 first, 1 last)",
        confirmed=at_most(0.5),
        refuted=at_least(0.75),
    ),
    Claim(
        "Early layers are more local: the first third of the layers has 0.1 more of the weight on a patch and its "
        "eight neighbours than the last third, or more.",
        paper=PROFILES,
        number="local mass, first less last third",
        confirmed=at_least(0.1),
        refuted=at_most(0),
    ),
    Claim(
        "Layer 0 is the most local one: no later layer has more weight on the neighbours.",
        paper=PROFILES,
        number="local mass of layer 0 less the largest of later layers",
        confirmed=at_least(0),
        refuted=at_most(-0.05),
    ),
    Claim(
        "Scores of single heads foretell what groups do: without the best quarter of the heads the class vector turns "
        "twice as far as without the worst quarter, or more.",
        paper=PROFILES,
        number="best over worst quarter removed",
        confirmed=at_least(2),
        refuted=at_most(1),
    ),
    Claim(
        "And farther than without random heads of that number.",
        paper=PROFILES,
        number="best quarter over random heads removed",
        confirmed=at_least(1),
        refuted=at_most(0.8),
    ),
)


def run(config, seed, folder, console):
    check_names("images", config.images, IMAGES)
    if not {"photograph", "grey"} <= set(config.images):
        raise ValueError(f"images is {config.images}: need 'photograph' and 'grey' among them, for the claims")
    got, rng, log = loaded(config.weights, SMALL), np.random.default_rng(seed), console.print
    model: Any = got.model
    size, patch = got.config["image_size"], got.config["patch_size"]
    images = jnp.asarray(shown(config.images, size, patch, rng))
    at, grey = config.images.index("photograph"), config.images.index("grey")

    log("where heads look")
    output, seen = trace.run(model, images, record=("weights", "resid_pre"))
    weights = np.asarray(seen["weights"])
    patches = analysis.patch_weights(weights)
    side = round(patches.shape[-1] ** 0.5)
    aligned = analysis.aligned_map(patches) / side**2  # shares of the queries' weight
    offsets = analysis.mean_offset(aligned) * (side - 1)  # in patches, [L, B, N, 2]
    far = np.hypot(*np.moveaxis(offsets, -1, 0))
    peak = aligned.max((-2, -1))
    rings = analysis.ring_profile(patches)
    local = rings.mass[..., :2].sum(-1)  # [L, B, N]
    layers, _, heads = local.shape
    sided = far[:, at] >= 0.5
    cosines = (offsets[:, at] * offsets[:, grey]).sum(-1) / (far[:, at] * far[:, grey])
    best = np.unravel_index(np.where(sided, peak[:, at], -1).argmax(), sided.shape)
    pointed = sided & (peak[:, at] >= 0.3)
    by_layer = local[:, at].mean(1)
    third = max(1, layers // 3)

    log("heads removed")
    scored = [number for number, name in enumerate(config.images) if name not in ("noise", "grey")]
    others = [number for number in range(len(config.images)) if number not in scored]

    def turned(of: Array, plain: Array) -> Array:
        norms = jnp.linalg.norm(of, axis=-1) * jnp.linalg.norm(plain, axis=-1)
        return (1 - (of * plain).sum(-1) / norms).mean()

    def alone(edits: Any, start: Any) -> Array:
        found = model(images[jnp.array(scored)], edits=edits, start=start)[0]
        return turned(found[:, 0], output[jnp.array(scored), 0])

    stream = seen["resid_pre"][:, jnp.array(scored)]
    moved = np.asarray(
        trace.sweep(alone, trace.heads(model, inputs=(images[:1],)), chunk=config.chunk, resid_pre=stream)
    )
    count = max(1, round(config.share * moved.size))
    order = np.argsort(moved.ravel())

    def mask(some: np.ndarray) -> Bool[np.ndarray, "l n"]:
        kept = np.ones(moved.size, np.float32)
        kept[some] = 0
        return kept.reshape(moved.shape)

    groups = [mask(order[-count:]), mask(order[:count])]
    groups += [mask(rng.permutation(moved.size)[:count]) for _ in range(config.draws)]

    def together(kept: Array) -> Array:
        edits = {"z": trace.Layers(trace.Scale(kept[..., None]))}
        found = model(images[jnp.array(others)], edits=edits)[0]
        return turned(found[:, 0], output[jnp.array(others), 0])

    without = np.asarray(trace.sweep(together, jnp.asarray(np.stack(groups)), chunk=1))
    drawn = float(without[2:].mean())

    ranked = sorted(zip(*np.nonzero(sided), strict=True), key=lambda place: -peak[place[0], at, place[1]])
    flat = aligned[:, at].reshape(layers * heads, -1)
    places = np.asarray(analysis.principal_axes(flat, 2).coordinates(flat)).reshape(layers, heads, 2)
    numbers = {
        "largest peak of a head that looks to one side": float(peak[:, at][best]) if sided.any() else 0.0,
        "heads that look to one side": float(sided.sum()),
        "heads with a peak of 0.3 that look to one side": float(pointed.sum()),
        "least cosine of offsets on photograph and grey": float(cosines[pointed].min()) if pointed.any() else None,
        "depth of the largest peak (0 first, 1 last)": float(best[0] / (layers - 1)) if sided.any() else None,
        "largest offset (patches)": float(far[:, at].max()),
        "local mass, first less last third": float(by_layer[:third].mean() - by_layer[-third:].mean()),
        "local mass of layer 0": float(by_layer[0]),
        "local mass of layer 0 less the largest of later layers": float(by_layer[0] - by_layer[1:].max()),
        "local mass of equal weights": float(analysis.ring_profile(np.full((side**2,) * 2, side**-2.0)).mass[:2].sum()),
        "turned without the best quarter": float(without[0]),
        "turned without the worst quarter": float(without[1]),
        "turned without random heads": drawn,
        "best over worst quarter removed": float(without[0] / without[1]),
        "best quarter over random heads removed": float(without[0] / drawn),
        "rank correlation of score and local mass, over heads": float(
            analysis.rank_correlation(moved.ravel(), local[:, at].ravel())
        ),
    }
    steps = range(side)
    return Result(
        numbers,
        {
            "Heads that look to one side, the largest peak first": [
                {
                    "head": f"layer {layer}, head {head}",
                    "down (patches)": float(offsets[layer, at, head, 0]),
                    "right (patches)": float(offsets[layer, at, head, 1]),
                    "weight at one offset": float(peak[layer, at, head]),
                    "cosine with grey": float(cosines[layer, head]),
                    "class vector turns": float(moved[layer, head]),
                }
                for layer, head in ranked[:12]
            ],
            "By layer, on the photograph": [
                {
                    "layer": layer,
                    "weight on a patch and its neighbours": float(by_layer[layer]),
                    "largest offset (patches)": float(far[layer, at].max()),
                    "deviation of a key's weight over queries": float(
                        analysis.position_deviation(patches[layer, at]).mean()
                    ),
                    "class vector turns, largest": float(moved[layer].max()),
                }
                for layer in range(layers)
            ],
        },
        {
            "Mean weight by distance on the photograph": Curves(
                "steps to the patch that is read (larger of both directions)",
                "mean weight of a patch there",
                {
                    name: [(k, float(rings.mean[some, at].mean((0, 1))[k])) for k in steps]
                    for name, some in (
                        ("layer 0", slice(0, 1)),
                        (f"layers 1 to {third}", slice(1, third + 1)),
                        (f"the last {third} layers", slice(-third, None)),
                    )
                },
                log="y",
            ),
            "Local mass by layer": Curves(
                "layer",
                "weight on a patch and its neighbours",
                {
                    name: [(layer, float(local[layer, number].mean())) for layer in range(layers)]
                    for number, name in enumerate(config.images)
                },
            ),
            "Patterns of heads": Curves(
                "first principal component of aligned maps",
                "second",
                {
                    name: [(float(x), float(y)) for x, y in places[some].reshape(-1, 2)]
                    for name, some in (
                        ("first third of the layers", slice(0, third)),
                        ("middle", slice(third, layers - third)),
                        ("last third", slice(layers - third, None)),
                    )
                },
                cloud=True,
            ),
            "Heads on the photograph": Maps(
                {
                    f"{name} (max {each.max():.2f})": each.T.tolist()
                    for name, each in (
                        ("mean offset, patches", far[:, at]),
                        ("weight at one offset", peak[:, at]),
                        ("local mass", local[:, at]),
                        ("class vector turns", moved),
                    )
                },
                y="head",
                x="layer",
            ),
        },
    )
