"""How far the heads of a trained vision transformer look, layer by layer, on a photograph and on images without sense.

The distance of a head is the mean over patches of how far away are the patches that it reads, in patches, weighted by
how much it reads them; what goes to the class token is left out of it. A photograph is shown whole, mirrored, and with
its patches in random order. Noise and an even grey are controls: what a head does on grey it does by position alone.
That layer 0 is not the most local one had been seen on the photograph before the claims were written down.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments.trained import RANDOM, loaded
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, check_names

IMAGES = ("photograph", "mirrored", "shuffled", "noise", "grey")


@dataclass(frozen=True)
class Config:
    """A vision transformer, and images that it sees.

    Attributes:
        weights: A name of `python -m jaxattn weights list`, or "random" for a small model that has learned nothing.
        images: Some of `IMAGES`, first "photograph", the one that comes with matplotlib: "mirrored" and "shuffled" (by
            patches) are the same, "noise" is white, and "grey" has the same value everywhere.
    """

    weights: str = "vit-focus"
    images: tuple[str, ...] = IMAGES


QUICK = Config(weights=RANDOM, images=("photograph", "noise"))
SMALL = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_act": "gelu",
    "hidden_size": 32,
    "image_size": 84,
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 4,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}

CLAIMS = (
    Claim(
        "Early layers are local: in layer 0 the mean distance of the heads is less than in every later layer.",
        paper="vit",
        number="distance in layer 0 less the least of later layers",
        confirmed=at_most(0),
        refuted=at_least(0.5),
    ),
    Claim(
        "Even so, later layers look farther: from layer 1 on, distance rises with depth (Spearman).",
        paper="vit",
        number="rank correlation of depth and distance, from layer 1",
        confirmed=at_least(0.7),
        refuted=at_most(0),
    ),
    Claim(
        "In the first layers some heads look far and others near: among the heads of layers 0 to 3 the largest "
        "distance is 3 times the smallest, or more.",
        paper="vit",
        number="farthest over nearest head of layers 0 to 3",
        confirmed=at_least(3),
        refuted=at_most(1.5),
    ),
    Claim(
        "In the last layers all heads look far: the nearest head of the last quarter of layers has half of the "
        "distance of equal weights, or more.",
        paper="vit",
        number="nearest head of the last layers over equal weights",
        confirmed=at_least(0.5),
        refuted=at_most(0.25),
    ),
    Claim(
        "The class token is a sink of patches: in some layer they give it a mean weight of 0.3 or more.",
        paper="attention_sinks",
        number="weight of patches on the class token, largest of layers",
        confirmed=at_least(0.3),
        refuted=at_most(0.05),
    ),
)


def shuffled(image: Float[np.ndarray, "h w c"], patch: int, rng: Any) -> Float[np.ndarray, "h w c"]:
    """The image with its patches in random order."""
    side = len(image) // patch
    pieces = image.reshape(side, patch, side, patch, -1).swapaxes(1, 2).reshape(side**2, patch, patch, -1)
    pieces = rng.permutation(pieces).reshape(side, side, patch, patch, -1)
    return pieces.swapaxes(1, 2).reshape(image.shape)


def shown(names: tuple[str, ...], size: int, patch: int, rng: Any) -> Float[np.ndarray, "b h w c"]:
    """The images, normalised as models of photographs are used to see them."""
    from matplotlib import cbook
    from PIL import Image

    file: Any = cbook.get_sample_data("grace_hopper.jpg")
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB").resize((size, size)), np.float32) / 255
    photograph = ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
    made = {
        "photograph": photograph,
        "mirrored": photograph[:, ::-1],
        "shuffled": shuffled(photograph, patch, rng),
        "noise": rng.standard_normal(photograph.shape, np.float32),
        "grey": np.zeros_like(photograph),
    }
    return np.stack([made[name] for name in names])


def looks(weights: Float[np.ndarray, "l b n t t"]) -> tuple[np.ndarray, np.ndarray]:
    """([L, B, N], how far patches look, in patches; [L, B, N], their weight on the class token, which stands first)."""
    return analysis.patch_distance(analysis.patch_weights(weights)), weights[..., 1:, 0].mean(-1)


def run(config, seed, folder, console):
    check_names("images", config.images, IMAGES)
    if config.images[:1] != IMAGES[:1]:
        raise ValueError(f"images is {config.images}: need 'photograph' first, which claims are judged by")
    got, rng = loaded(config.weights, SMALL), np.random.default_rng(seed)
    size, patch = got.config["image_size"], got.config["patch_size"]
    images = shown(config.images, size, patch, rng)
    console.print("where heads look")
    _, records = trace.run(got.model, jnp.asarray(images), record=("weights",))
    weights = np.asarray(records["weights"])
    distance, to_class = looks(weights)
    class_to_class = weights[..., 0, 0]
    layers = len(distance)
    equal = float(analysis.grid_distances(size // patch).mean())
    photograph, by_layer = distance[:, 0], distance[:, 0].mean(1)
    depth, late = np.arange(layers), photograph[-max(1, layers // 4) :]
    numbers = {
        "distance in layer 0": float(by_layer[0]),
        "distance in layer 0 less the least of later layers": float(by_layer[0] - by_layer[1:].min()),
        "rank correlation of depth and distance, from layer 1": float(
            analysis.rank_correlation(depth[1:], by_layer[1:])
        ),
        "farthest over nearest head of layers 0 to 3": float(photograph[:4].max() / photograph[:4].min()),
        "nearest head of the last layers over equal weights": float(late.min() / equal),
        "distance of equal weights": equal,
        "weight of patches on the class token, largest of layers": float(to_class[:, 0].mean(1).max()),
        "weight of the class token if all were equal": 1 / weights.shape[-1],
        **{
            f"mean difference of heads between photograph and {name}": float(
                abs(distance[:, number] - photograph).mean()
            )
            for number, name in enumerate(config.images[1:], 1)
        },
    }
    lines: dict[str, list[tuple[float, float]]] = {
        name: list(enumerate(map(float, distance[:, number].mean(1)))) for number, name in enumerate(config.images)
    }
    lines["all patches equally"] = [(layer, equal) for layer in range(layers)]
    masses: dict[str, list[tuple[float, float]]] = {
        f"patches, {name}": list(enumerate(map(float, to_class[:, number].mean(1))))
        for number, name in enumerate(config.images)
        if name not in ("mirrored", "shuffled")
    }
    masses["the class token itself, photograph"] = list(enumerate(map(float, class_to_class[:, 0].mean(1))))
    return Result(
        numbers,
        {
            "By layer, on the photograph": [
                {
                    "layer": layer,
                    "distance": float(by_layer[layer]),
                    "nearest head": float(photograph[layer].min()),
                    "farthest head": float(photograph[layer].max()),
                    "patches on the class token": float(to_class[layer, 0].mean()),
                    "class token on itself": float(class_to_class[layer, 0].mean()),
                }
                for layer in range(layers)
            ]
        },
        {
            "Distance by layer": Curves("layer", "mean distance of what patches read (patches)", lines),
            "Distance of heads on the photograph": Curves(
                "layer",
                "mean distance of what patches read (patches)",
                {
                    name: list(enumerate(map(float, of_heads)))
                    for name, of_heads in (
                        ("farthest head of the layer", photograph.max(1)),
                        ("mean of its heads", by_layer),
                        ("nearest head", photograph.min(1)),
                        ("all patches equally", np.full(layers, equal)),
                    )
                },
            ),
            "Weight on the class token": Curves("layer", "mean weight on the class token", masses),
            "Where patches look on the photograph": Maps(
                {
                    f"distance (max {photograph.max():.1f})": photograph.T.tolist(),
                    f"class token (max {to_class[:, 0].max():.2f})": to_class[:, 0].T.tolist(),
                },
                y="head",
                x="layer",
            ),
        },
    )
