"""Boolean functions learned in context: by which mixers, how near to the optimal learner, and with a teacher.

A decoder of 3 layers is trained for each class of functions of signs, on prompts that are drawn anew in every step. Its
accuracy by the number of examples stands beside that of the best learner of the class: Bayes where it can be computed,
else the nearest neighbour. Other token mixers take the place of softmax attention in some classes, and one class begins
with the examples that teach its function.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import decoders
from jaxattn import icl, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_multiple, check_names, within
from jaxattn.core.linear import Elu1Features
from jaxattn.icl import FunctionTask, Planted, Signs, Teaching
from jaxattn.train import OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=200, final_fraction=0.0, weight_decay=0.0)


class Setting(NamedTuple):
    """A class of functions, the learner that is optimal for it, if one is known, and weaker ones."""

    task: FunctionTask
    learners: dict[str, Any]


def enumerated(task: FunctionTask) -> Setting:
    """A class that is small enough to weigh every function, with its optimal learner and the nearest neighbour."""
    return Setting(task, {"Bayes": icl.BayesFinite.of(task), "nearest neighbour": icl.KNearestNeighbours(1)})


CONJUNCTION = FunctionTask(icl.Conjunction(), Planted(Signs(6), 0.3), 25)
UNTAUGHT = replace(CONJUNCTION, inputs=Planted(Signs(6), 0.4))  # the examples that come after a lesson
SETTINGS = {
    "conjunction": enumerated(CONJUNCTION),
    "taught conjunction": Setting(
        replace(CONJUNCTION, inputs=Teaching(UNTAUGHT.inputs)), {"nearest neighbour": icl.KNearestNeighbours(1)}
    ),
    "disjunction": enumerated(FunctionTask(icl.Disjunction(), Planted(Signs(6), 0.3), 25)),
    "DNF": Setting(
        FunctionTask(icl.DNF(), Planted(Signs(6), 0.35), 25), {"nearest neighbour": icl.KNearestNeighbours(1)}
    ),
    "majority": enumerated(FunctionTask(icl.Majority(), Signs(6), 25)),
    "sparse parity": enumerated(FunctionTask(icl.SparseParity(2), Signs(10), 25)),
    "parity": Setting(
        FunctionTask(icl.Parity(), Signs(10), 25),
        {"GF(2)": icl.GF2Parity(), "nearest neighbour": icl.KNearestNeighbours(1)},
    ),
    "copied label": Setting(
        FunctionTask(icl.NearestNeighbour(8), Signs(8), 33, first=8),
        {"nearest by cosine": icl.KNearestNeighbours(1, "cosine"), "majority": icl.MajorityLabel()},
    ),
}
MIXERS: dict[str, Any] = {
    "softmax": models.Spec(nn.MultiHeadAttention, heads=2),
    "linear": models.Spec(nn.LinearAttention, heads=2, feature_map=Elu1Features(), convolution=3),
    "RetNet": models.Spec(nn.RetNet, heads=2, convolution=3),
    "gated DeltaNet": models.Spec(nn.DeltaNet, heads=2, decay="head", convolution=3),
    "Mamba-2": models.Spec(nn.Mamba2, heads=4, convolution=3),
}


@dataclass(frozen=True)
class Config(decoders.Learner):
    """A small decoder of each mixer for each class, trained on fresh prompts, then measured on more of them.

    Attributes:
        runs: What is trained: "class: mixer", of `SETTINGS` and `MIXERS`.
        prompts: Prompts that the accuracy is measured on, a multiple of 256.
    """

    optimizer: OptimizerConfig = OPTIMIZER
    runs: tuple[str, ...] = (
        "conjunction: softmax",
        "conjunction: linear",
        "conjunction: RetNet",
        "conjunction: Mamba-2",
        "taught conjunction: softmax",
        "disjunction: softmax",
        "DNF: softmax",
        "majority: softmax",
        "sparse parity: softmax",
        "parity: softmax",
        "copied label: softmax",
        "copied label: linear",
        "copied label: RetNet",
        "copied label: gated DeltaNet",
        "copied label: Mamba-2",
    )
    prompts: int = 8192


QUICK = Config(
    runs=("conjunction: softmax",),
    width=32,
    layers=2,
    steps=60,
    eval_every=30,
    prompts=256,
    optimizer=replace(OPTIMIZER, warmup_steps=20),
)
PAPER = "boolean_icl"
CLAIMS = (
    Claim(
        "Softmax attention learns conjunctions as the optimal learner does: after 16 or more examples its accuracy is "
        "at most 2 points below that of Bayes.",
        paper=PAPER,
        number="conjunction: softmax: largest gap to Bayes after 16 or more",
        confirmed=at_most(0.02),
        refuted=at_least(0.1),
    ),
    Claim(
        "It does not do so as a nearest neighbour would: it is 8 points or more above that after 24 examples.",
        paper=PAPER,
        number="conjunction: softmax: above the nearest neighbour at the end",
        confirmed=at_least(0.08),
        refuted=at_most(0.0),
    ),
    Claim(
        "So it learns disjunctions.",
        paper=PAPER,
        number="disjunction: softmax: largest gap to Bayes after 16 or more",
        confirmed=at_most(0.02),
        refuted=at_least(0.1),
    ),
    Claim(
        "Parities of 10 bits are not learned: accuracy after 24 examples, where all is known, stays at one half.",
        paper=PAPER,
        number="parity: softmax: accuracy at the end",
        confirmed=within(0.47, 0.53),
        refuted=at_least(0.75),
    ),
    Claim(
        "A teaching sequence is made use of: once it is over, at most 8 examples, accuracy is above 97 percent.",
        paper=PAPER,
        number="taught conjunction: softmax: accuracy after the lesson",
        confirmed=at_least(0.97),
        refuted=at_most(0.9),
    ),
    Claim(
        "And above that of the optimal learner after as many examples that do not teach, planted as often as those "
        "after the lesson.",
        paper=PAPER,
        number="taught conjunction: softmax: above Bayes without teaching",
        confirmed=at_least(0.02),
        refuted=at_most(0.0),
    ),
    Claim(
        "On conjunctions linear attention is nearly as good as softmax attention: 3 points at most in the mean.",
        paper=PAPER,
        number="conjunction: softmax over linear",
        confirmed=at_most(0.03),
        refuted=at_least(0.1),
    ),
    Claim(
        "Models without attention are too: RetNet loses 3 points at most.",
        paper=PAPER,
        number="conjunction: softmax over RetNet",
        confirmed=at_most(0.03),
        refuted=at_least(0.1),
    ),
    Claim(
        "To find the nearest neighbour takes attention: linear attention is 10 points or more behind in the mean.",
        paper=PAPER,
        number="copied label: softmax over linear",
        confirmed=at_least(0.1),
        refuted=at_most(0.02),
    ),
    Claim(
        "So are models without it: RetNet is 10 points or more behind.",
        paper=PAPER,
        number="copied label: softmax over RetNet",
        confirmed=at_least(0.1),
        refuted=at_most(0.02),
    ),
)
LESSON = 8  # examples that a conjunction of 6 literals, the longest, takes to be taught


def accuracy(task: FunctionTask, asked: dict[str, Any], prompts: int, seed: int) -> dict[str, np.ndarray]:
    """The accuracy of each predictor after every number of examples; an answer of 0 counts half.

    NaN where answers do not count yet.
    """
    given: dict[str, Any] = {"batch": 256, "batches": prompts // 256, "loss": icl.mistakes}
    table = icl.compare(task, asked, range(task.first, task.length), jax.random.key(seed), **given)
    return {name: np.pad(1 - risk.mean, (task.first, 0), constant_values=np.nan) for name, risk in table.risks.items()}


def train(config: Config, name: str, seed: int, folder, console) -> Any:
    """The decoder of a run, and what `fit` says of it."""
    setting, mixer = name.split(": ")
    return config.learn(
        SETTINGS[setting].task,
        MIXERS[mixer],
        icl.logistic,
        seed=seed,
        run_config={"run": name, "boolean_functions": asdict(replace(config, runs=(), prompts=0))},
        folder=folder / name.replace(": ", "_").replace(" ", "_"),
        console=console,
    )


def run(config, seed, folder, console):
    check_names("runs", config.runs, [f"{setting}: {mixer}" for setting in SETTINGS for mixer in MIXERS])
    check_multiple("prompts", config.prompts, 256)
    trained, learning = {}, {}
    for name in config.runs:
        console.print(f"boolean_functions: {name}")
        model, result = train(config, name, seed, folder, console)
        trained[name], learning[name] = decoders.predictor(model), decoders.measured(result, "loss")

    numbers: dict[str, float | None] = {claim.number: None for claim in CLAIMS}
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"Learning": Curves("step", "cross-entropy", learning)}
    found: dict[str, dict[str, np.ndarray]] = {}
    for setting, (task, learners) in SETTINGS.items():
        mixers = {name.split(": ")[1]: each for name, each in trained.items() if name.split(": ")[0] == setting}
        if not mixers:
            continue
        asked = {**mixers, **{f"({name})": learner for name, learner in learners.items()}}
        found[setting] = accuracy(task, asked, config.prompts, seed)
        points = {name: list(enumerate(each.tolist()))[task.first :] for name, each in found[setting].items()}
        figures[f"Accuracy: {setting}"] = Curves("examples in the prompt", "accuracy", points)
        for name, each in found[setting].items():
            some = {f"after {i}": float(each[i]) for i in (8, 16, 24)}
            mean = float(each[task.first :].mean())
            rows.append({"class": setting, "learner": name, "mean": mean, **some, "at the end": float(each[-1])})
    for name in config.runs:
        setting, mixer = name.split(": ")
        ours = found[setting]
        numbers[f"{name}: accuracy at the end"] = float(ours[mixer][-1])
        if mixer != "softmax" and "softmax" in ours:
            first = SETTINGS[setting].task.first
            behind = ours["softmax"][first:].mean() - ours[mixer][first:].mean()
            numbers[f"{setting}: softmax over {mixer}"] = float(behind)
    for setting, ours in found.items():
        if "softmax" in ours and "(Bayes)" in ours:
            gap = (ours["(Bayes)"] - ours["softmax"])[16:].max()
            numbers[f"{setting}: softmax: largest gap to Bayes after 16 or more"] = float(gap)
    if "softmax" in (ours := found.get("conjunction", {})):
        above = ours["softmax"][-1] - ours["(nearest neighbour)"][-1]
        numbers["conjunction: softmax: above the nearest neighbour at the end"] = float(above)
    if "softmax" in (ours := found.get("taught conjunction", {})):
        taught = float(ours["softmax"][LESSON])
        usual = accuracy(UNTAUGHT, {"Bayes": icl.BayesFinite.of(UNTAUGHT)}, config.prompts, seed)["Bayes"][LESSON]
        numbers["taught conjunction: softmax: accuracy after the lesson"] = taught
        numbers["taught conjunction: softmax: above Bayes without teaching"] = taught - float(usual)
    return Result(numbers, {"Accuracy": rows}, figures)
