"""Copying and recall by state-space layers: what it brings to start them as linear attention.

Layers of Mamba-2 learn to repeat a string of random letters, or to look up pairs in their context. They start by
default, or so that they are nearly linear attention: hardly any decay, steps of 1, and queries like keys (mimetic
initialisation). The accuracy is measured along the training.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from experiments import decoders, recall
from jaxattn import icl, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_names
from jaxattn.train import Drawn, OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_steps=0, final_fraction=1.0, weight_decay=0.0)
RECALL = recall.Config(mixers=(), pairs=8, length=32, steps=400)
STARTS = {"default": False, "mimetic": True}


@dataclass(frozen=True)
class Config:
    """Layers of Mamba-2 alone, trained on fresh strings of random letters; with layers of the same, associative recall.

    Attributes:
        tasks: What is learned: copying, recall or both.
        letters: Different letters.
        length: Letters of a string.
        width: Width of the model.
        layers: Number of layers.
        heads: Heads of a layer.
        state: Channels of its keys and queries.
        steps: Training steps.
        batch_size: Strings per step.
        eval_every: Steps between measurements of the accuracy.
        eval_batches: Batches per measurement.
        optimizer: The optimiser.
        associative: The recall task, and how it is trained.
    """

    tasks: tuple[str, ...] = ("copying", "recall")
    letters: int = 64
    length: int = 24
    width: int = 64
    layers: int = 2
    heads: int = 4
    state: int = 64
    steps: int = 400
    batch_size: int = 32
    eval_every: int = 50
    eval_batches: int = 4
    optimizer: OptimizerConfig = OPTIMIZER
    associative: recall.Config = RECALL


QUICK = Config(
    tasks=("copying",),
    letters=8,
    length=6,
    width=32,
    heads=2,
    state=32,
    steps=100,
    eval_every=25,
)

CLAIMS = (
    Claim(
        "A small Mamba-2 that starts as linear attention copies most of a string after 400 steps.",
        paper="mimetic_ssm",
        number="copying, mimetic: accuracy",
        confirmed=at_least(0.5),
    ),
    Claim(
        "With the default start it has hardly begun to copy by then.",
        paper="mimetic_ssm",
        number="copying, default: accuracy",
        confirmed=at_most(0.2),
    ),
    Claim(
        "Starting as linear attention makes copying easier to learn: 30 points ahead after 400 steps.",
        paper="mimetic_ssm",
        number="copying: accuracy gained",
        confirmed=at_least(0.3),
        refuted=at_most(0.0),
    ),
    Claim(
        "It makes associative recall easier to learn: 5 points ahead in the mean over 400 steps.",
        paper="mimetic_ssm",
        number="recall: mean accuracy gained",
        confirmed=at_least(0.05),
        refuted=at_most(-0.05),
    ),
)


def task(config: Config) -> Drawn:
    strings = icl.Copying(config.letters, config.length)
    digest = json.dumps({"length": config.length, "letters": config.letters})
    return Drawn(lambda key, rows: strings.sample(key, rows).tokens(), 2 * config.length, digest)


def mixer(config: Config, start: str) -> models.Spec:
    return models.Spec(nn.Mamba2, heads=config.heads, state=config.state, mimetic=STARTS[start])


def copying(config: Config, start: str, seed: int, folder, console) -> list[tuple[float, float]]:
    """(step, accuracy) at every measurement."""
    model = decoders.build(
        mixer(config, start),
        vocabulary=config.letters + 1,
        length=2 * config.length,
        width=config.width,
        layers=config.layers,
        seed=seed,
        hidden=None,
    )
    _, result = decoders.train(
        model,
        task(config),
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        eval_batches=config.eval_batches,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"start": start, "copying": asdict(config) | {"associative": None}},
        folder=folder,
        console=console,
    )
    return decoders.measured(result, "correct")


def run(config, seed, folder, console):
    check_names("tasks", config.tasks, ("copying", "recall"))
    numbers: dict[str, Any] = dict.fromkeys(
        (
            *(f"copying, {start}: accuracy" for start in STARTS),
            *(f"recall, {start}: mean accuracy" for start in STARTS),
            "copying: accuracy gained",
            "recall: mean accuracy gained",
        )
    )
    figures = {}
    for name in config.tasks:
        learning = {}
        for start in STARTS:
            console.print(f"{name}: {start}")
            place = folder / f"{name}_{start}"
            if name == "copying":
                learning[start] = copying(config, start, seed, place, console)
                numbers[f"copying, {start}: accuracy"] = learning[start][-1][1]
            else:
                spec = recall.Mixer(mixer(config, start))
                learning[start], _ = recall.train(config.associative, spec, seed, place, console)
                mean = sum(accuracy for _, accuracy in learning[start]) / len(learning[start])
                numbers[f"recall, {start}: mean accuracy"] = mean
        what = "accuracy" if name == "copying" else "mean accuracy"
        one, other = (numbers[f"{name}, {start}: {what}"] for start in ("mimetic", "default"))
        numbers[f"{name}: {what} gained"] = one - other
        figures[f"Accuracy of {name}"] = Curves("step", "accuracy", learning)
    return Result(numbers, figures=figures)
