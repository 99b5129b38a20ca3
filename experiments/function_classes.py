"""Functions learned in context: linear, sparse, trees and networks, beside the estimators made for each of them.

A decoder of 3 layers is trained for each class, on prompts that are drawn anew in every step. Its error by the number
of examples stands beside that of ridge regression, the lasso, a greedy tree, or a network that is fitted to each
prompt. Prompts that it was not trained on (one orthant, other scales) are tried afterwards.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from experiments import decoders
from jaxattn import icl, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_multiple, check_names
from jaxattn.icl import FunctionTask, Gaussian
from jaxattn.train import OptimizerConfig


class Setting(NamedTuple):
    """A class of functions, and who is asked beside the model: the first baseline is the one it is held against.

    With `growth` the model is trained along a curriculum whose 16 stages are equally long: first with so many
    coordinates and examples, at every stage with so many more.
    """

    task: FunctionTask
    baselines: dict[str, Any]
    growth: dict[str, tuple[int, int]] | None = None


class Shift(NamedTuple):
    """Prompts that differ from those of the training: of which class, examples before the query, what is changed."""

    setting: str
    examples: int
    changes: dict[str, Any]


SETTINGS = {
    "linear": Setting(
        FunctionTask(icl.Linear(), Gaussian(5), 16, noise=0.5),
        {"ridge": icl.Ridge(0.25), "least squares": icl.LeastSquares(), "averaging": icl.Averaging()},
    ),
    "sparse": Setting(
        FunctionTask(icl.SparseLinear(2), Gaussian(10), 21),
        {"lasso 0.01": icl.Lasso(0.01), "lasso 0.1": icl.Lasso(0.1), "least squares": icl.LeastSquares()},
    ),
    "tree": Setting(
        FunctionTask(icl.DecisionTree(3), Gaussian(5), 21),
        {"greedy tree": icl.GreedyTree(3), "3 nearest": icl.KNearestNeighbours(3)},
    ),
    "network": Setting(
        FunctionTask(icl.ReluNetwork(20), Gaussian(5), 21),
        {
            "network": icl.NetworkByAdam(20, steps=200),
            "least squares": icl.LeastSquares(),
            "3 nearest": icl.KNearestNeighbours(3),
        },
    ),
}
SETTINGS["sparse, growing"] = SETTINGS["sparse"]._replace(growth={"dims": (4, 1), "points": (8, 2)})

SHIFTS = {
    "none": Shift("linear", 10, {}),
    "skewed inputs": Shift("linear", 10, {"inputs": icl.Skewed(5)}),
    "subspace": Shift("linear", 10, {"inputs": icl.Subspace(5, 2)}),
    "one orthant, query anywhere": Shift("linear", 10, {"inputs": icl.Orthant(5), "query": icl.Fresh()}),
    "query seen before": Shift("linear", 10, {"query": icl.Seen()}),
    "query orthogonal": Shift("linear", 3, {"query": icl.Orthogonal()}),
    "inputs × 2": Shift("linear", 10, {"inputs": icl.Scaled(Gaussian(5), 2.0)}),
    "inputs × 1/2": Shift("linear", 10, {"inputs": icl.Scaled(Gaussian(5), 0.5)}),
    "answers × 2": Shift("linear", 10, {"function": icl.ScaledValues(icl.Linear(), 2.0)}),
    "noise × 2": Shift("linear", 10, {"noise": 1.0}),
    "sparse: none": Shift("sparse", 15, {}),
    "sparse: skewed inputs": Shift("sparse", 15, {"inputs": icl.Skewed(10)}),
    "sparse: inputs × 2": Shift("sparse", 15, {"inputs": icl.Scaled(Gaussian(10), 2.0)}),
    "sparse: 4 coordinates": Shift("sparse", 15, {"function": icl.SparseLinear(4)}),
    "tree: none": Shift("tree", 20, {}),
    "tree: skewed inputs": Shift("tree", 20, {"inputs": icl.Skewed(5)}),
    "tree: inputs × 2": Shift("tree", 20, {"inputs": icl.Scaled(Gaussian(5), 2.0)}),
    "network: none": Shift("network", 20, {}),
    "network: skewed inputs": Shift("network", 20, {"inputs": icl.Skewed(5)}),
    "network: inputs × 2": Shift("network", 20, {"inputs": icl.Scaled(Gaussian(5), 2.0)}),
}


OPTIMIZER = OptimizerConfig(warmup_steps=200, final_fraction=0.0, weight_decay=0.0)


@dataclass(frozen=True)
class Config(decoders.Learner):
    """A small decoder for each class, trained on fresh prompts, then measured on more of them.

    Attributes:
        classes: Names in `SETTINGS`.
        shifts: Names in `SHIFTS`: other prompts that the decoder of their class is tried on, if it is trained.
        heads: Heads of a layer.
        prompts: Prompts that the risk is measured on, a multiple of 256.
    """

    steps: int = 8000
    eval_every: int = 500
    optimizer: OptimizerConfig = OPTIMIZER
    classes: tuple[str, ...] = tuple(SETTINGS)
    shifts: tuple[str, ...] = tuple(SHIFTS)
    heads: int = 2
    prompts: int = 4096


QUICK = Config(
    classes=("linear",),
    shifts=("inputs × 2",),
    width=32,
    layers=2,
    steps=100,
    eval_every=50,
    prompts=256,
    optimizer=replace(OPTIMIZER, warmup_steps=20),
)
PAPER = "garg_icl"
CLAIMS = (
    Claim(
        "A decoder learns linear functions in context: its mean risk over context lengths is within 15 percent of that "
        "of the Bayes answer, ridge regression.",
        paper=PAPER,
        number="linear: mean risk over ridge",
        confirmed=at_most(1.15),
        refuted=at_least(2.0),
    ),
    Claim(
        "It learns sparse linear functions nearly as well as the lasso: mean error at most 1.5 times.",
        paper=PAPER,
        number="sparse: mean risk over lasso 0.01",
        confirmed=at_most(1.5),
    ),
    Claim(
        "It makes use of sparsity: at half the dimension its error is below that of least squares.",
        paper=PAPER,
        number="sparse: risk over least squares at half the dimension",
        confirmed=at_most(0.9),
    ),
    Claim(
        "A curriculum over dimension and length helps: as many steps end at a lower mean error.",
        paper=PAPER,
        number="sparse: growing over not",
        confirmed=at_most(0.98),
        refuted=at_least(1.1),
    ),
    Claim(
        "It learns decision trees better than a greedy tree: mean error lower.",
        paper=PAPER,
        number="tree: mean risk over greedy tree",
        confirmed=at_most(1.0),
    ),
    Claim(
        "It learns two-layer networks about as well as a network fitted to each prompt: mean error at most 1.25 times.",
        paper=PAPER,
        number="network: mean risk over network",
        confirmed=at_most(1.25),
    ),
    Claim(
        "Out of distribution, for prompts in one orthant with a query anywhere, its excess risk after 10 examples is "
        "at most twice that of ridge regression.",
        paper=PAPER,
        number="one orthant, query anywhere: excess over ridge",
        confirmed=at_most(2.0),
    ),
    Claim(
        "It breaks where inputs are larger than in training: at twice the scale its excess risk after 10 examples is "
        "over 4 times that of ridge regression.",
        paper=PAPER,
        number="inputs × 2: excess over ridge",
        confirmed=at_least(4.0),
        refuted=at_most(1.5),
    ),
)


def lessons(name: str, steps: int) -> FunctionTask | icl.Curriculum:
    """What the decoder of a class is trained on for so many steps."""
    task, _, growth = SETTINGS[name]
    return task if growth is None else icl.Curriculum(task, max(1, steps // 16), **growth)


def train(config: Config, name: str, seed: int, folder: Path, console: Console) -> tuple[models.Transformer, Any]:
    """(the decoder trained on a class of functions, what `fit` says of the run)."""
    return config.learn(
        lessons(name, config.steps),
        models.Spec(nn.MultiHeadAttention, heads=config.heads),
        icl.square,
        seed=seed,
        run_config={"class": name, "function_classes": asdict(replace(config, classes=(), shifts=(), prompts=0))},
        folder=folder / name.replace(", ", "_"),
        console=console,
    )


def shifted(
    config: Config, setting: str, model: models.Transformer, seed: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The excess risk of the model of a class over that of its first baseline, for each shift of the class."""
    numbers, rows = {}, []
    usual, baselines, _ = SETTINGS[setting]
    best = next(iter(baselines))
    for name in config.shifts:
        of, after, changes = SHIFTS[name]
        if of != setting:
            continue
        asked: dict[str, Any] = {"decoder": decoders.predictor(model), best: baselines[best]}
        options: dict[str, Any] = {"batch": 256, "batches": config.prompts // 256, "excess": True}
        table = icl.compare(replace(usual, **changes), asked, [after], jax.random.key(seed), **options)
        ours, theirs = (float(table.risks[each].mean[0]) for each in asked)
        numbers[f"{name}: excess over {best}"] = ours / theirs
        rows.append(
            {
                "prompts": name,
                "examples": after,
                "excess of the decoder": ours,
                f"of {best}": theirs,
                "ratio": ours / theirs,
            }
        )
    return numbers, rows


def run(config, seed, folder, console):
    check_names("classes", config.classes, SETTINGS)
    check_names("shifts", config.shifts, SHIFTS)
    check_multiple("prompts", config.prompts, 256)
    numbers: dict[str, Any] = {claim.number: None for claim in CLAIMS}
    tables: dict[str, list[dict[str, Any]]] = {}
    figures = {}
    for name in config.classes:
        console.print(f"function_classes: {name}")
        task, baselines, _ = SETTINGS[name]
        model, result = train(config, name, seed, folder, console)
        lengths = range(task.length) if name != "network" else range(0, task.length, 5)  # each is a network to fit
        asked: dict[str, Any] = {"decoder": decoders.predictor(model), **baselines, "zero": icl.Zero()}
        table = icl.compare(task, asked, lengths, jax.random.key(seed), batch=256, batches=config.prompts // 256)
        means = {each: float(risk.mean.mean()) for each, risk in table.risks.items()}
        best, half = next(iter(baselines)), task.inputs.dim // 2
        numbers[f"{name}: mean risk"] = means["decoder"]
        numbers[f"{name}: mean risk over {best}"] = means["decoder"] / means[best]
        if "least squares" in baselines and half in table.lengths:
            at = table.lengths.index(half)
            there = [float(table.risks[each].mean[at]) for each in ("decoder", "least squares")]
            numbers[f"{name}: risk over least squares at half the dimension"] = there[0] / there[1]
        some = [0, len(table.lengths) // 4, len(table.lengths) // 2, len(table.lengths) - 1]
        tables[f"Risk: {name}"] = [
            {"predictor": each, "mean": means[each]}
            | {f"after {table.lengths[i]}": float(risk.mean[i]) for i in some}
            | {"error of the last": float(risk.error[-1])}
            for each, risk in table.risks.items()
        ]
        lines = {each: list(zip(table.lengths, risk.mean.tolist(), strict=True)) for each, risk in table.risks.items()}
        figures[f"Risk: {name}"] = Curves("examples in the prompt", "risk", lines)
        figures[f"Learning: {name}"] = Curves("step", "risk", {"decoder": decoders.measured(result, "loss")}, log="y")
        ratios, rows = shifted(config, name, model, seed)
        numbers |= ratios
        if rows:
            tables[f"Out of distribution: {name}"] = rows
    if {"sparse", "sparse, growing"} <= set(config.classes):
        numbers["sparse: growing over not"] = numbers["sparse, growing: mean risk"] / numbers["sparse: mean risk"]
    return Result(numbers, tables, figures)
