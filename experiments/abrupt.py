"""Learning in context comes abruptly, or not at all: it depends on how many classes there are and how they come.

A decoder of two layers of attention reads items with their labels and names the label of one more item. It can look for
the item in its context, or know its class by heart. What its heads do is measured while it learns, and held against the
gradient flow of three nested softmaxes.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import decoders
from jaxattn import icl, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_names
from jaxattn.core.attend import AtLags, Matching
from jaxattn.train import OptimizerConfig, drawn

OF_LABELS = optax.softmax_cross_entropy_with_integer_labels
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, warmup_steps=0, schedule="constant", weight_decay=1e-4, beta2=0.999, clip_norm=None
)


@dataclass(frozen=True)
class Config:
    """Two layers of attention with one head and no norms, and a feed-forward block after the second.

    Attributes:
        cells: Names of cells, of `cells`.
        few: Classes of the small dictionary.
        many: Classes of the large one.
        burst: How often a class comes in a context where it comes more than once.
        labels: Labels.
        dim: Channels of items and labels.
        items: Items in a context.
        most: Items for which there are positions.
        noise: How far items are from their class.
        zipf: The exponent of the frequencies of classes in the last cell.
        width: Width of the model.
        hidden: Hidden units of its feed-forward block, per channel.
        steps: Training steps.
        batch_size: Sequences per step.
        eval_every: Steps between measurements.
        tested: Sequences of each test.
        flow: The time up to which the gradient flow is followed.
        optimizer: The optimiser.
    """

    cells: tuple[str, ...] = (
        "few classes, once",
        "few classes, bursts",
        "many classes, once",
        "many classes, bursts",
        "many classes, once, Zipf",
    )
    few: int = 64
    many: int = 1024
    burst: int = 4
    labels: int = 16
    dim: int = 31
    items: int = 8
    most: int = 16
    noise: float = 0.1
    zipf: float = 1.0
    width: int = 64
    hidden: int = 2
    steps: int = 6000
    batch_size: int = 64
    eval_every: int = 100
    tested: int = 512
    flow: float = 120.0
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(
    cells=("many classes, once", "few classes, bursts"),
    few=8,
    many=32,
    dim=8,
    items=4,
    most=5,
    width=16,
    steps=20,
    batch_size=16,
    eval_every=10,
    tested=64,
)

PAPER = "abrupt_icl"
CLAIMS = (
    Claim(
        "With many classes that come once in a context, the model learns in context: it labels new classes.",
        paper=PAPER,
        number="many classes, once: accuracy in context",
        confirmed=at_least(0.9),
        refuted=at_most(0.25),
    ),
    Claim(
        "It does with many classes that come in bursts.",
        paper=PAPER,
        number="many classes, bursts: accuracy in context",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "With few classes it does not, though they come in bursts: it picks one of two labels that are there, at best.",
        paper=PAPER,
        number="few classes, bursts: accuracy in context",
        confirmed=at_most(0.45),
        refuted=at_least(0.9),
    ),
    Claim(
        "Nor with few classes that come once.",
        paper=PAPER,
        number="few classes, once: accuracy in context",
        confirmed=at_most(0.45),
        refuted=at_least(0.9),
    ),
    Claim(
        "Few classes are known by heart instead.",
        paper=PAPER,
        number="few classes, once: accuracy in weights",
        confirmed=at_least(0.9),
        refuted=at_most(0.25),
    ),
    Claim(
        "A dictionary whose classes are of unequal frequency supports both at once: the lesser of both accuracies is "
        "0.4 or more.",
        paper=PAPER,
        number="many classes, once, Zipf: lesser of both accuracies",
        confirmed=at_least(0.4),
        refuted=at_most(0.15),
    ),
    Claim(
        "Learning in context is abrupt: from 0.3 to 0.85 it takes at most half of the time before.",
        paper=PAPER,
        number="many classes, once: rise over plateau",
        confirmed=at_most(0.5),
        refuted=at_least(2.0),
    ),
    Claim(
        "First labels look at their items, then answers are right: attention of labels to items crosses 0.3 before "
        "accuracy crosses 0.5.",
        paper=PAPER,
        number="many classes, once: steps from items at 0.3 to accuracy at 0.5",
        confirmed=at_least(0),
        refuted=at_most(-100),
    ),
    Claim(
        "The gradient flow of three nested softmaxes is as abrupt: from half of its loss to a tenth it takes at most a "
        "tenth of the time in which it loses the first tenth.",
        paper=PAPER,
        number="gradient flow: fall over plateau",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
)


def cells(config: Config) -> dict[str, dict[str, Any]]:
    """Name of a cell -> its classes, burst and exponent."""
    return {
        "few classes, once": {"classes": config.few, "burst": 1},
        "few classes, bursts": {"classes": config.few, "burst": config.burst},
        "many classes, once": {"classes": config.many, "burst": 1},
        "many classes, bursts": {"classes": config.many, "burst": config.burst},
        "many classes, once, Zipf": {"classes": config.many, "burst": 1, "exponent": config.zipf},
    }


def task(config: Config, cell: dict[str, Any], seed: int) -> icl.ItemLabels:
    sizes: dict[str, Any] = {"items": config.items, "most": config.most, "noise": config.noise}
    return icl.ItemLabels.draw(jax.random.key(seed), labels=config.labels, dim=config.dim, **sizes, **cell)


def build(config: Config, task: icl.ItemLabels, seed: int) -> models.Transformer:
    attention = models.Branch(models.Spec(nn.MultiHeadAttention, heads=1, position=None), norm=None)
    block = models.Spec(nn.FeedForward, hidden=config.hidden * config.width, activation="relu", gated=False)
    built = models.TransformerConfig(
        config.labels,
        task.length,
        config.width,
        [models.Layer([attention]), models.Layer([attention, models.Branch(block, norm=None)])],
        embed=models.Spec(nn.VectorEmbedding, inputs=task.positions + config.dim),
        norm=None,
        head=models.Spec(nn.Head, use_bias=True),
    )
    return models.Transformer(built, rngs=nnx.Rngs(seed))


def last(model, prompt) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of the label of the last item."""
    logits = model(prompt.x)[0][:, -1]
    return OF_LABELS(logits, prompt.y[:, -1]).sum(), {"weight": prompt.weights.sum()}


def progress(model, prompt: icl.Prompt) -> dict[str, jax.Array]:
    """How much label tokens read of their items in layer 1, and the query of the right labels in layer 2; and how
    likely the answer is a label that is there."""
    labels = prompt.hidden[1]
    shown = jnp.full(prompt.y.shape, -1).at[:, 1::2].set(labels[:, :-1])
    asked = jnp.full(prompt.y.shape, -1).at[:, -1].set(labels[:, -1])
    record = {"before": ("weights", AtLags((1,))), "right": ("weights", Matching(asked, shown))}
    logits, _, records = model(prompt.x, record=record)
    there = (shown[:, 1::2, None] == jnp.arange(logits.shape[-1])).any(1)
    return {
        "items": records["before"][0, :, 1::2].mean(),
        "labels": records["right"][1, :, -1].mean(),
        "present": (jax.nn.softmax(logits[:, -1]) * there).sum(-1).mean(),
        "in context": (logits[:, -1].argmax(-1) == labels[:, -1]).mean(),
    }


def looks(config: Config, of: icl.ItemLabels):
    for_context, for_weights = jax.random.split(jax.random.key(0))

    def look(model, batch):
        by_heart = of.in_weights().sample(for_weights, config.tested)
        answers = model(by_heart.x)[0][:, -1].argmax(-1)
        numbers = progress(model, of.in_context().sample(for_context, config.tested))
        return numbers | {"in weights": (answers == by_heart.y[:, -1]).mean()}

    return look


def run(config, seed, folder, console):
    numbers: dict[str, Any] = {claim.number: None for claim in CLAIMS}
    rows, lines = [], {}
    check_names("cells", config.cells, cells(config))
    for name in config.cells:
        cell = cells(config)[name]
        console.print(f"abrupt: {name}")
        of = task(config, cell, seed)
        _, result = decoders.train(
            build(config, of, seed),
            drawn(of),
            loss=last,
            look=looks(config, of),
            steps=config.steps,
            batch_size=config.batch_size,
            eval_every=config.eval_every,
            eval_batches=1,
            optimizer=config.optimizer,
            seed=seed,
            run_config={"cell": name, "abrupt": asdict(replace(config, flow=0.0))},
            folder=folder / name.replace(" ", "_").replace(",", ""),
            console=console,
        )
        found = {
            each: decoders.measured(result, each) for each in ("in context", "in weights", "items", "labels", "present")
        }
        lines[name] = found
        last_ones = {each: line[-1][1] for each, line in found.items()}
        numbers[f"{name}: accuracy in context"] = last_ones["in context"]
        numbers[f"{name}: accuracy in weights"] = last_ones["in weights"]
        rows.append(
            {
                "classes": cell["classes"],
                "times each": cell["burst"],
                "exponent": int(cell.get("exponent", 0)),
                "in context": last_ones["in context"],
                "in weights": last_ones["in weights"],
                "labels to items": last_ones["items"],
                "query to labels": last_ones["labels"],
                "on labels that are there": last_ones["present"],
                "minutes": float(config.steps * config.batch_size * of.length / result.tokens_per_second / 60),
            }
        )
    name = "many classes, once"
    learned: dict[str, Any] = lines.get(name, dict.fromkeys(("in context", "items", "labels", "present"), ()))
    begins, ends = (decoders.first_step(learned["in context"], level) for level in (0.3, 0.85))
    if begins is not None and ends is not None:
        numbers[f"{name}: rise over plateau"] = (ends - begins) / begins
    marks: dict[str, Any] = {
        each: decoders.first_step(learned[each], level) for each, level in (("items", 0.3), ("in context", 0.5))
    }
    if None not in marks.values():
        numbers[f"{name}: steps from items at 0.3 to accuracy at 0.5"] = marks["in context"] - marks["items"]
    numbers |= {f"{name}: step of {each}": step for each, step in marks.items()}
    both: list[Any] = [numbers.get(f"{name}, Zipf: accuracy in {where}") for where in ("context", "weights")]
    numbers[f"{name}, Zipf: lesser of both accuracies"] = None if None in both else min(both)

    flow = icl.gradient_flow(icl.NestedSoftmaxes(config.items, config.labels), jnp.zeros(3), config.flow)
    times = {share: float(flow.when(share)) for share in (0.9, 0.5, 0.1)}
    numbers |= {f"gradient flow: time at {share:g} of the loss": time for share, time in times.items()}
    numbers["gradient flow: fall over plateau"] = (times[0.1] - times[0.5]) / times[0.9]
    some = slice(None, None, max(len(flow.time) // 300, 1))
    share = flow.loss / flow.loss[0]
    fall = list(zip(flow.time[some].tolist(), share[some].tolist(), strict=True))
    logits = {
        each: list(zip(flow.time[some].tolist(), flow.logits[some, i].tolist(), strict=True))
        for i, each in enumerate(("β, labels to items", "α, query to labels", "ξ, answer"))
    }
    names = {
        "in context": "accuracy in context",
        "items": "labels to items, layer 1",
        "labels": "query to right labels, layer 2",
        "present": "answers that are there",
    }
    return Result(
        numbers,
        {"Cells": rows},
        {
            "In context": Curves(
                "step", "accuracy on new classes", {n: each["in context"] for n, each in lines.items()}
            ),
            "In weights": Curves(
                "step", "accuracy without the class in context", {n: each["in weights"] for n, each in lines.items()}
            ),
            "Progress": Curves("step", "share", {shown: learned[each] for each, shown in names.items()}),
            "Gradient flow": Curves("time", "logit", logits),
            "Loss of the gradient flow": Curves("time", "loss over its first", {"loss": fall}),
        },
    )
