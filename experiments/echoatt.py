"""EchoAtt: what layers that share their attention cost a trained decoder, and what distillation wins back.

A byte-level decoder of six layers is trained on the Python standard library. Three neighbouring layers of it then share
the attention of the first of them: those whose maps are most alike, or least. What that costs in bits per byte is
measured before any training, after distillation from the teacher and text, and after as many steps on text alone.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from flax import nnx

from experiments.stages import Stages
from jaxattn import models, nn
from jaxattn.analysis import attention_similarity, similar_blocks
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most
from jaxattn.train import OptimizerConfig, imitation_loss, ordered_batches, with_params

OPTIMIZER = OptimizerConfig(learning_rate=4e-3, warmup_steps=40)
FINETUNING = OptimizerConfig(learning_rate=1e-3, warmup_steps=10)


@dataclass(frozen=True)
class Config:
    """A byte-level decoder of the Python standard library, of whose layers three come to attend alike.

    Attributes:
        context: Tokens per window.
        width: Width of the model.
        layers: Number of layers.
        heads: Heads per layer.
        steps: Training steps of the teacher.
        imitate_steps: Steps of the first stage: imitation of logits and layers, and text.
        finetune_steps: Steps of the second stage: text alone. Without distillation all steps of both are on text.
        batch_size: Windows per step.
        eval_batches: Batches of the validation data per measurement.
        skip: First queries that the similarity leaves out, whose few keys make all layers alike.
        optimizer: Of the teacher.
        finetuning: Of each later stage.
    """

    context: int = 64
    width: int = 64
    layers: int = 6
    heads: int = 4
    steps: int = 1200
    imitate_steps: int = 150
    finetune_steps: int = 150
    batch_size: int = 8
    eval_batches: int = 48
    skip: int = 16
    optimizer: OptimizerConfig = OPTIMIZER
    finetuning: OptimizerConfig = FINETUNING


QUICK = Config(
    context=16,
    width=8,
    heads=2,
    steps=10,
    imitate_steps=5,
    finetune_steps=5,
    batch_size=4,
    eval_batches=2,
    skip=4,
    optimizer=replace(OPTIMIZER, warmup_steps=2),
    finetuning=replace(FINETUNING, warmup_steps=2),
)

CLAIMS = (
    Claim(
        "Distillation wins back more of what sharing costs than as many steps on text alone: 0.005 bits per byte, or "
        "more.",
        paper="echoatt",
        number="bits saved by distillation",
        confirmed=at_least(0.005),
        refuted=at_most(-0.005),
    ),
    Claim(
        "Layers that attend alike can share their attention, others cannot: before any training the least similar "
        "block costs 1.5 times as many bits as the most similar one, or more.",
        paper="echoatt",
        number="cost of the least similar block over the most similar, untrained",
        confirmed=at_least(1.5),
        refuted=at_most(1.0),
    ),
    Claim(
        "The least similar block costs more after distillation too: 0.005 bits per byte, or more.",
        paper="echoatt",
        number="bits by which the least similar block is worse, distilled",
        confirmed=at_least(0.005),
        refuted=at_most(-0.005),
    ),
)

BLOCK = 3  # layers that come to share their attention


def least_similar(similarity: Any) -> tuple[int, ...]:
    """The block of adjacent layers, at any place, whose layers are least similar to its first."""

    def mean(first: int) -> float:
        return float(similarity[first, first + 1 : first + BLOCK].mean())

    first = min(range(len(similarity) - BLOCK + 1), key=mean)
    return tuple(range(first, first + BLOCK))


def run(config, seed, folder, console):
    stages = Stages("echoatt", asdict(config), seed, folder, console)

    def distilled(name: str, model: Any, teacher: Any) -> Any:
        """Both stages."""
        given = imitation_loss(model, teacher)
        model = with_params(model, stages.trained(f"{name}, imitation", given, config.imitate_steps, config.finetuning))
        return stages.on_text(f"{name}, text after imitation", model, config.finetune_steps, config.finetuning)

    layer = models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=config.heads))
    decoder = models.TransformerConfig(length=config.context, width=config.width, layers=[layer] * config.layers)
    model = models.Transformer(decoder, rngs=nnx.Rngs(seed))
    teacher = stages.on_text("teacher", model, config.steps, config.optimizer)

    batch = next(iter(ordered_batches(stages.held_out, config.batch_size, 1)))
    weights = jax.jit(lambda tokens: teacher(tokens, record=("weights",))[2]["weights"])(batch["tokens"])
    similarity = jax.device_get(attention_similarity(weights, skip=config.skip))
    blocks = {
        "most similar": similar_blocks(similarity, size=BLOCK, count=1)[0],
        "least similar": least_similar(similarity),
    }
    shared = {name: models.share_attention(teacher, [block]) for name, block in blocks.items()}
    steps = config.imitate_steps + config.finetune_steps
    measured = {"teacher": stages.bits(teacher)}
    for name, student in shared.items():
        measured[f"{name}, untrained"] = stages.bits(student)
        measured[f"{name}, distilled"] = stages.bits(distilled(name, student, teacher))
    plain = stages.on_text("most similar, text alone", shared["most similar"], steps, config.finetuning)
    measured["most similar, text alone"] = stages.bits(plain)

    cost = {name: value - measured["teacher"] for name, value in measured.items()}
    alike, unlike = cost["most similar, untrained"], cost["least similar, untrained"]
    numbers: dict[str, float | None] = {
        "bits saved by distillation": measured["most similar, text alone"] - measured["most similar, distilled"],
        "cost of the least similar block over the most similar, untrained": unlike / alike if alike > 0 else None,
        "bits by which the least similar block is worse, distilled": (
            measured["least similar, distilled"] - measured["most similar, distilled"]
        ),
    }
    rows: list[dict[str, str | int | float | None]] = [
        {"model": name, "bits per byte": value, "more than the teacher": cost[name]} for name, value in measured.items()
    ]
    of_blocks: list[dict[str, str | int | float | None]] = [
        {
            "block": name,
            "first layer": block[0],
            "last layer": block[-1],
            "similarity": float(similarity[block[0], block[1] : block[-1] + 1].mean()),
        }
        for name, block in blocks.items()
    ]
    later = {name: points for name, points in stages.learning.items() if name != "teacher"}
    return Result(
        numbers | {f"{name}: bits per byte": value for name, value in measured.items()},
        {"Quality on held-out text": rows, "Blocks": of_blocks},
        {
            "Training of students": Curves("step", "bits per byte of the step's batch", later),
            "Similarity of attention": Maps(
                {"mean cosine of rows": similarity.tolist()}, y="layer", x="layer", value="mean cosine"
            ),
        },
    )
