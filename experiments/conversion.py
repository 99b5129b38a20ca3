"""A trained decoder converted to linear attention: what Hedgehog keeps of its quality, and what each stage brings."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from flax import nnx

from experiments.experiment import Claim, Curves, Result, at_least, at_most, outside
from jaxattn import models, nn
from jaxattn.train import (
    OptimizerConfig,
    TrainConfig,
    Windows,
    bits_per_byte,
    fit,
    language_loss,
    make_optimizer,
    ordered_batches,
    split,
    standard_library,
    with_params,
)

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
    documents, validation = split(standard_library(), 0.05, seed)
    windows, held_out = Windows(documents, config.context), Windows(validation, config.context)
    learning: dict[str, list[tuple[float, float]]] = {}

    def stage(name: str, given: Any, steps: int, optimizer: OptimizerConfig) -> Any:
        """Parameters after `steps` of the loss in `given`, (params, loss_fn); taken up again where it was stopped."""
        console.print(f"conversion: {name}")
        params, loss_fn = given
        result = fit(
            loss_fn=loss_fn,
            params=params,
            optimizer=make_optimizer(optimizer, steps),
            train_data=windows,
            validation_data=held_out,
            config=TrainConfig(
                steps=steps,
                batch_size=config.batch_size,
                eval_every=steps,
                eval_batches=1,
                save_every=max(steps // 3, 1),
                keep=1,
                log_every=max(steps // 30, 1),
                seed=seed,
            ),
            run_config={"stage": name, "conversion": asdict(config)},
            folder=folder / name.replace(" ", "_"),
            console=console,
        )
        if not result.complete:
            raise KeyboardInterrupt
        key = "bits_per_byte" if "bits_per_byte" in result.history[0] else "loss"
        learning[name] = [(line["step"], line[key]) for line in result.history if key in line]
        return result.params

    def bits(model: nnx.Module) -> float:
        params, loss_fn = language_loss(model)
        measure = jax.jit(lambda batch: loss_fn(params, batch, None)[1])
        sums: Counter = Counter()
        for batch in ordered_batches(held_out, config.batch_size, config.eval_batches):
            sums.update({name: float(value) for name, value in measure(batch).items()})
        return bits_per_byte(sums)

    layer = models.pre_norm(models.Spec(nn.MultiHeadAttention, heads=config.heads, qk_norm=models.Spec(nn.RMSNorm)))
    decoder = models.TransformerConfig(length=config.context, width=config.width, layers=[layer] * config.layers)
    model = models.Transformer(decoder, rngs=nnx.Rngs(seed))
    teacher = with_params(model, stage("teacher", language_loss(model), config.steps, config.optimizer))
    teacher.eval()
    converted = models.linearize(teacher)
    matched = models.linearize(teacher)
    nnx.update(matched, stage("matching", models.matching_loss(matched, teacher), config.match_steps, config.matching))

    def finetuned(name: str, model: nnx.Module) -> nnx.Module:
        return with_params(model, stage(name, language_loss(model), config.finetune_steps, config.finetuning))

    measured = {
        "teacher": bits(teacher),
        "teacher, finetuned": bits(finetuned("teacher finetuned", teacher)),
        "converted": bits(converted),
        "converted, finetuned": bits(finetuned("converted finetuned", converted)),
        "matched": bits(matched),
        "matched, finetuned": bits(finetuned("matched finetuned", matched)),
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
    finetuning = {name: points for name, points in learning.items() if name.endswith("finetuned")}
    return Result(
        numbers | {f"{name}: bits per byte": value for name, value in measured.items()},
        {"Quality on held-out text": table},
        {
            "Finetuning": Curves("step", "bits per byte of the step's batch", finetuning),
            "Matching": Curves("step", "cross-entropy of attention maps, nats", {"matching": learning["matching"]}),
        },
    )
