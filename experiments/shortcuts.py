"""Does a small vision transformer look at the shape, or at a background that gives the class away?

Models are trained on images whose background is right about the class more and more often, and read images on which it
says nothing. The map of where the answer comes from (Grad-CAM) is held against the patches of the shape. In the model
whose background says nothing, heads are removed, and the class token is asked where it looks. The class token stands
for the text of papers that ask models of text and images.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from experiments.fixtures import BACKGROUNDS, trained
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, check_names


@dataclass(frozen=True)
class Config:
    """Trained fixtures, and images.

    Attributes:
        backgrounds: Fixtures whose backgrounds say more and more, first "FIX-VIT", in which they say nothing.
        small: Whether fixtures are of the size for tests, which have learned little.
        images: Images that maps and heads are measured on.
        share: The share of heads that are removed together.
        draws: Draws of as many random heads to compare with.
        chunk: Heads removed at once, each in a run of its own.
    """

    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    small: bool = False
    images: int = 128
    share: float = 0.25
    draws: int = 5
    chunk: int = 2


QUICK = Config(backgrounds=("FIX-VIT", "FIX-VIT-100"), small=True, images=16, draws=1, chunk=4)
OVERLAP, PRUNING, FOCUS, POINTING = "attention_iou", "vit_head_analytics", "visual_heads", "tag_grounding"

CLAIMS = (
    Claim(
        "The more the background says, the less the answer comes from the shape: the overlap of map and shape is less "
        "by 0.05 or more where the background is always right than where it says nothing.",
        paper=OVERLAP,
        number="overlap, background says nothing less always right",
        confirmed=at_least(0.05),
        refuted=at_most(0),
    ),
    Claim(
        "It falls at every step: from no background to the next it never rises.",
        paper=OVERLAP,
        number="largest rise of the overlap between backgrounds",
        confirmed=at_most(0),
        refuted=at_least(0.05),
    ),
    Claim(
        "Scores of single heads foretell what groups do: without the quarter of heads whose removal costs the answer "
        "most, accuracy is lower than without the quarter whose removal costs least, by 0.1 or more.",
        paper=PRUNING,
        number="accuracy without the worst quarter less without the best",
        confirmed=at_least(0.1),
        refuted=at_most(0),
    ),
    Claim(
        "Heads by which the class token looks at few patches are needed: without the fifth with the largest mass times "
        "concentration accuracy falls more than without random heads.",
        paper=FOCUS,
        number="accuracy without random heads less without focused ones",
        confirmed=at_least(0.1),
        refuted=at_most(0),
    ),
    Claim(
        "Attention points at the shape: the patch that the heads with the most weight on the image read most is one of "
        "it, four times as often as by chance or more.",
        paper=POINTING,
        number="pointing over chance",
        confirmed=at_least(4),
        refuted=at_most(1),
    ),
)


def run(config, seed, folder, console):
    check_names("backgrounds", config.backgrounds, tuple(BACKGROUNDS))
    if config.backgrounds[:1] != ("FIX-VIT",) or len(config.backgrounds) < 2:
        raise ValueError(f"backgrounds is {config.backgrounds}: need 'FIX-VIT' first, and others to compare with")
    log, key = console.print, jax.random.key(seed)
    overlaps: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    at = folder if config.small else None
    fixtures = {
        name: trained(name, seed, small=config.small, folder=at, console=console) for name in config.backgrounds
    }
    plain = fixtures["FIX-VIT"]
    prompt = plain.task.sample(key, config.images)  # the background says nothing
    labels, masks = prompt.y[:, 0], prompt.hidden[0]

    log("maps")
    at_class = jnp.arange(config.images), labels
    maps = {}
    for name, fixture in fixtures.items():
        maps[name] = analysis.grad_cam(fixture.model, prompt.x, lambda logits: logits[at_class], layer=-1)
        overlaps[name] = float(analysis.soft_iou(maps[name], masks.astype(float)).mean())
        answers, _ = trace.run(fixture.model, prompt.x)
        accuracy[name] = float((answers.argmax(-1) == labels).mean())
    uniform = float(analysis.soft_iou(jnp.ones(masks.shape[1:]), masks.astype(float)).mean())

    log("heads")
    model: Any = plain.model
    rng = np.random.default_rng(seed)
    scores = analysis.pruning_scores(model, prompt.x, labels, chunk=config.chunk)
    drop = np.asarray(scores.drop.mean(-1))
    weights = trace.run(model, prompt.x, record=("weights",))[1]["weights"]
    on_patches = jnp.arange(weights.shape[-1]) > 0
    focus = analysis.segment_focus(weights[:, :, :, 0], on_patches)
    narrow = np.asarray((focus.mass * focus.concentration).mean(1))
    other = plain.task.sample(jax.random.fold_in(key, 1), config.images)

    def correct(kept: Array) -> Array:
        answers = model(other.x, edits={"z": trace.Layers(trace.Scale(kept[..., None]))})[0]
        return (answers.argmax(-1) == other.y[:, 0]).mean()

    def without(some: np.ndarray) -> Bool[np.ndarray, "l n"]:
        kept = np.ones(drop.size, np.float32)
        kept[some] = 0
        return kept.reshape(drop.shape)

    quarter, fifth = max(1, round(config.share * drop.size)), max(1, round(0.2 * drop.size))
    order, focused = np.argsort(drop.ravel()), np.argsort(narrow.ravel())
    groups = [without(order[-quarter:]), without(order[:quarter]), without(focused[-fifth:]), without(order[:0])]
    groups += [without(rng.permutation(drop.size)[:fifth]) for _ in range(config.draws)]
    right = np.asarray(trace.sweep(correct, jnp.asarray(np.stack(groups)), chunk=1))
    random = float(right[4:].mean())

    log("pointing")
    asked = jnp.zeros(weights.shape[-2], bool).at[0].set(True)[None].repeat(config.images, 0)
    pointing = analysis.ground(weights, asked, jnp.arange(1, weights.shape[-1]), top=fifth)
    best = pointing.map.argmax(-1)
    hits = float(jnp.take_along_axis(masks.reshape(config.images, -1), best[:, None], 1).mean())
    chance = float(masks.mean())

    backgrounds = config.backgrounds
    steps = [overlaps[b] - overlaps[a] for a, b in itertools.pairwise(backgrounds)]
    numbers = {
        **{f"overlap, background right in {BACKGROUNDS[name]:.0%}": overlaps[name] for name in backgrounds},
        **{f"accuracy, background right in {BACKGROUNDS[name]:.0%}": accuracy[name] for name in backgrounds},
        "overlap of a map without differences": uniform,
        "overlap, background says nothing less always right": overlaps[backgrounds[0]] - overlaps[backgrounds[-1]],
        "largest rise of the overlap between backgrounds": max(steps),
        "accuracy without the best quarter": float(right[0]),
        "accuracy without the worst quarter": float(right[1]),
        "accuracy without the worst quarter less without the best": float(right[1] - right[0]),
        "accuracy without focused heads": float(right[2]),
        "accuracy with all heads": float(right[3]),
        "accuracy without random heads": random,
        "accuracy without random heads less without focused ones": float(random - right[2]),
        "pointing at the shape": hits,
        "pointing by chance": chance,
        "pointing over chance": hits / chance,
    }
    return Result(
        numbers,
        {
            "Heads, background says nothing": [
                {
                    "head": f"layer {layer}, head {head}",
                    "probability of the class falls by": float(drop[layer, head]),
                    "answers diverge by (nats)": float(scores.divergence[layer, head].mean()),
                    "class vector turns": float(scores.moved[layer, head].mean()),
                    "mass times concentration": float(narrow[layer, head]),
                }
                for layer, head in np.ndindex(*drop.shape)
            ]
        },
        {
            "Overlap of map and shape": Curves(
                "how often the background was right in training",
                "overlap (soft IoU)",
                {
                    "Grad-CAM": [(BACKGROUNDS[name], overlaps[name]) for name in backgrounds],
                    "a map without differences": [(BACKGROUNDS[name], uniform) for name in backgrounds],
                },
            ),
            "Maps of one image": Maps(
                {"shape": np.asarray(masks[0], float).tolist()}
                | {f"background right in {BACKGROUNDS[name]:.0%}": np.asarray(maps[name][0]).tolist() for name in maps},
                y="row of patches",
                x="column",
            ),
        },
    )
