"""A trained decoder converted to linear attention: what Hedgehog keeps of its quality, and what each stage brings.

A byte-level decoder with softmax attention is trained on the Python standard library. Each of its layers then gets
Hedgehog features for its softmax: the features alone are fitted to the attention maps, and the whole model is
finetuned. Bits per byte of held-out text after each stage stand beside those of the teacher, which trains for as many
more steps.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from flax import nnx

from experiments.stages import Stages
from jaxattn import models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, outside
from jaxattn.train import OptimizerConfig

# The decoder and the training of `experiments.demo`.
OPTIMIZER = OptimizerConfig(learning_rate=4e-3, warmup_steps=40)
MATCHING = OptimizerConfig(learning_rate=1e-2, warmup_steps=10, weight_decay=0.0)
FINETUNING = OptimizerConfig(learning_rate=1e-3, warmup_steps=20)


@dataclass(frozen=True)
class Config:
    """A byte-level decoder of the Python standard library: trained, converted, fitted, finetuned.

    Attributes:
        context: Tokens per window.
        width: Width of the model.
        layers: Number of layers.
        heads: Heads per layer.
        steps: Training steps of the teacher.
        match_steps: Steps in which the features alone are fitted to its attention maps.
        finetune_steps: Steps in which all is trained on the text again.
        batch_size: Windows per step.
        eval_batches: Batches of the validation data per measurement.
        optimizer: Of the teacher.
        matching: Of the features.
        finetuning: Of the last stage.
    """

    context: int = 128
    width: int = 96
    layers: int = 4
    heads: int = 4
    steps: int = 900
    match_steps: int = 200
    finetune_steps: int = 300
    batch_size: int = 8
    eval_batches: int = 48
    optimizer: OptimizerConfig = OPTIMIZER
    matching: OptimizerConfig = MATCHING
    finetuning: OptimizerConfig = FINETUNING


QUICK = Config(
    context=32,
    width=16,
    layers=1,
    heads=2,
    steps=20,
    match_steps=10,
    finetune_steps=10,
    batch_size=4,
    eval_batches=4,
    optimizer=replace(OPTIMIZER, warmup_steps=5),
    matching=replace(MATCHING, warmup_steps=2),
    finetuning=replace(FINETUNING, warmup_steps=2),
)

CLAIMS = (
    Claim(
        "A decoder that is converted and finetuned keeps 99 percent of its quality (bits per byte of the teacher over "
        "those of the student, both after the same finetuning).",
        paper="hedgehog",
        number="share of quality kept",
        confirmed=at_least(0.99),
        refuted=at_most(0.9),
    ),
    Claim(
        "Fitting the features to the attention maps restores quality before anything else is trained: it wins back "
        "half of the bits per byte that conversion costs, or more.",
        paper="hedgehog",
        number="share of the loss won back by matching",
        confirmed=at_least(0.5),
        refuted=outside(at_least(0.0)),
    ),
    Claim(
        "Matching first is better than finetuning at once: fewer bits per byte after the same finetuning.",
        paper="hedgehog",
        number="bits saved by matching first",
        confirmed=at_least(0.0),
        refuted=outside(at_least(0.0)),
    ),
)


def run(config, seed, folder, console):
    stages = Stages("conversion", asdict(config), seed, folder, console, saves=3, lines=30)
    layer = models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=config.heads, qk_norm=models.Spec(nn.RMSNorm)))
    decoder = models.TransformerConfig(length=config.context, width=config.width, layers=[layer] * config.layers)
    model = models.Transformer(decoder, rngs=nnx.Rngs(seed))
    teacher = stages.on_text("teacher", model, config.steps, config.optimizer)
    converted = models.linearize(teacher)
    matched = models.linearize(teacher)
    matching = models.matching_loss(matched, teacher)
    nnx.update(matched, stages.trained("matching", matching, config.match_steps, config.matching))

    def finetuned(name: str, model: nnx.Module) -> Any:
        return stages.on_text(name, model, config.finetune_steps, config.finetuning)

    measured = {
        "teacher": stages.bits(teacher),
        "teacher, finetuned": stages.bits(finetuned("teacher finetuned", teacher)),
        "converted": stages.bits(converted),
        "converted, finetuned": stages.bits(finetuned("converted finetuned", converted)),
        "matched": stages.bits(matched),
        "matched, finetuned": stages.bits(finetuned("matched finetuned", matched)),
    }
    costs = measured["converted"] - measured["teacher"]
    numbers = {
        "share of quality kept": measured["teacher, finetuned"] / measured["matched, finetuned"],
        "share of the loss won back by matching": (measured["converted"] - measured["matched"]) / costs,
        "bits saved by matching first": measured["converted, finetuned"] - measured["matched, finetuned"],
    }
    table: list[dict[str, str | int | float | None]] = [
        {"model": name, "bits per byte": value} for name, value in measured.items()
    ]
    finetuning = {name: points for name, points in stages.learning.items() if name.endswith("finetuned")}
    return Result(
        numbers | {f"{name}: bits per byte": value for name, value in measured.items()},
        {"Quality on held-out text": table},
        {
            "Finetuning": Curves("step", "bits per byte of the step's batch", finetuning),
            "Matching": Curves(
                "step", "cross-entropy of attention maps, nats", {"matching": stages.learning["matching"]}
            ),
        },
    )
