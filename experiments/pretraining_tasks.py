"""How many tasks a layer of linear attention must be trained on, and how near it then comes to ridge regression.

A layer of linear attention is trained by stochastic gradient descent, with one fresh task of linear regression in each
step. Its excess risk by the number of tasks is held against the bounds of theory, with a spectrum of inputs that falls.
Layers that have seen the most tasks are then used at other lengths, beside ridge regression.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxattn import icl
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_multiple, outside
from jaxattn.icl import FunctionTask, Gaussian, layer_theory


@dataclass(frozen=True)
class Config:
    """Stochastic gradient descent on Γ in ŷ = xᵀ Γ Xᵀy / n, from 0, with one fresh task at each step.

    Inputs have the covariance diag(1, 2^−decay, ..., d^−decay).

    Attributes:
        dim: Dimension d.
        context: Examples per task n.
        noise: Standard deviation of the noise.
        decay: How fast the eigenvalues of the covariance fall.
        tasks: Numbers of tasks to train on, ascending; the rate is halved every T / ln T of them.
        rate: The first learning rate times tr Σ tr C_n.
        runs: Independent runs for each number of tasks.
        lengths: Numbers of examples at which the layers of the most tasks are used.
        prompts: Prompts that ridge regression and a layer are measured on, a multiple of 256.
    """

    dim: int = 20
    context: int = 40
    noise: float = 0.5
    decay: float = 1.5
    tasks: tuple[int, ...] = (100, 1000, 10000, 40000)
    rate: float = 0.15
    runs: int = 16
    lengths: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)
    prompts: int = 16384


QUICK = Config(dim=5, context=10, tasks=(100, 400), runs=8, lengths=(3, 10, 30), prompts=2048)
PAPER = "pretraining_tasks"
CLAIMS = (
    Claim(
        "The bias of the mean path is a lower bound of the excess risk: at no number of tasks is the mean over runs "
        "below it by more than 2 standard errors.",
        paper=PAPER,
        number="least (excess - bias) / standard error",
        confirmed=at_least(-2.0),
        refuted=at_most(-4.0),
    ),
    Claim(
        "Bias and (ψ² tr Σ + σ²) D_eff / T_eff together bound it, with the constant 1.",
        paper=PAPER,
        number="largest excess over bias + bound",
        confirmed=at_most(1.0),
        refuted=outside(at_most(1.5)),
    ),
    Claim(
        "More tasks are better: the excess falls at every step up in their number.",
        paper=PAPER,
        number="largest ratio of one excess to that of fewer tasks",
        confirmed=at_most(1.0),
        refuted=outside(at_most(1.0)),
    ),
    Claim(
        "The number of tasks does not depend on the dimension, for spectra that fall: with twice the coordinates the "
        "excess after as many tasks is at most 1.25 times as large.",
        paper=PAPER,
        number="excess in twice the dimension over that in one",
        confirmed=at_most(1.25),
        refuted=at_least(2.0),
    ),
    Claim(
        "At the length of training the trained layer is nearly Bayes: its excess risk over the noise is at most 1.25 "
        "times that of ridge regression.",
        paper=PAPER,
        number="excess of the trained layer over ridge at the length of training",
        confirmed=at_most(1.25),
        refuted=at_least(1.5),
    ),
    Claim(
        "At other lengths it is not: at the longest its excess over the noise is over twice that of the layer which is "
        "best there.",
        paper=PAPER,
        number="excess at the longest over that of the best layer for it",
        confirmed=at_least(2.0),
        refuted=at_most(1.1),
    ),
    Claim(
        "The formula of the risk at any length is exact: largest distance from simulation in standard errors.",
        paper=PAPER,
        number="largest distance of formula and simulation",
        confirmed=at_most(4.0),
        refuted=outside(at_most(6.0)),
    ),
)


def setting(config: Config) -> tuple[FunctionTask, Float[Array, "d d"]]:
    """(the task, n examples and the one that is asked about; the covariance of its inputs)."""
    covariance = jnp.diag(jnp.arange(1.0, config.dim + 1) ** -config.decay)
    inputs = Gaussian(config.dim, covariance)
    return FunctionTask(icl.Linear(), inputs, config.context + 1, noise=config.noise), covariance


@partial(jax.jit, static_argnames="runs")
def descend(key: PRNGKeyArray, task: FunctionTask, rates: Float[Array, " t"], runs: int) -> Float[Array, "r d d"]:
    """Γ after a task per rate, Γ ← Γ − g (ŷ − y) x (Xᵀy / n)ᵀ, in independent runs."""

    def step(gammas: Float[Array, "r d d"], inputs: tuple[Array, Array]) -> tuple[Array, None]:
        number, rate = inputs
        prompts = task.sample(jax.random.fold_in(key, number), runs)
        query, moment = prompts.x[:, -1], jnp.einsum("rnd,rn->rd", prompts.x[:, :-1], prompts.y[:, :-1])
        moment = moment / (task.length - 1)
        wrong = jnp.einsum("rd,rde,re->r", query, gammas, moment) - prompts.y[:, -1]
        return gammas - rate * wrong[:, None, None] * query[:, :, None] * moment[:, None], None

    dim = task.inputs.dim
    return jax.lax.scan(step, jnp.zeros((runs, dim, dim)), (jnp.arange(len(rates)), rates))[0]


def run(config, seed, folder, console):
    if list(config.tasks) != sorted(set(config.tasks)) or len(config.tasks) < 2:
        raise ValueError(f"tasks is {config.tasks}: need two numbers or more, ascending")
    if config.context not in config.lengths:
        raise ValueError(f"lengths is {config.lengths}: need {config.context} among them, the length of training")
    if config.runs < 2:
        raise ValueError(f"runs is {config.runs}: need 2 or more, for a standard error")
    check_multiple("prompts", config.prompts, 256)
    if not config.noise > 0:
        raise ValueError(f"noise is {config.noise}: need a positive number, the penalty of ridge regression")
    key = jax.random.key(seed)
    task, covariance = setting(config)
    rows = []
    for number, count in enumerate(config.tasks):
        console.print(f"pretraining_tasks: {count} tasks")
        row, gammas = pretrained(config, count, jax.random.fold_in(key, number))
        rows.append(row)
    console.print("pretraining_tasks: twice the dimension")
    wide, _ = pretrained(replace(config, dim=2 * config.dim), config.tasks[-2], jax.random.fold_in(key, len(rows)))
    after, distance = lengths(config, task, covariance, gammas, key)
    at, excesses = config.lengths.index(config.context), [row["excess"] for row in rows]
    numbers = {
        # In NumPy: the least and the largest are NaN if one is, as after a descent that diverged.
        "least (excess - bias) / standard error": float(
            np.min([(x["excess"] - x["bias"]) / x["standard error"] for x in rows])
        ),
        "largest excess over bias + bound": float(np.max([x["excess"] / (x["bias"] + x["bound"]) for x in rows])),
        "largest ratio of one excess to that of fewer tasks": float(np.max(np.divide(excesses[1:], excesses[:-1]))),
        "excess in twice the dimension over that in one": wide["excess"] / excesses[-2],
        "excess of the trained layer over ridge at the length of training": after[at]["trained"] / after[at]["ridge"],
        "excess at the longest over that of the best layer for it": after[-1]["trained"]
        / after[-1]["best layer there"],
        "largest distance of formula and simulation": distance,
    }
    rows.append(wide)
    by_tasks = {name: [(row["tasks"], row[name]) for row in rows[:-1]] for name in ("excess", "bias")}
    by_tasks["bias + bound"] = [(row["tasks"], row["bias"] + row["bound"]) for row in rows[:-1]]
    by_length = {name: [(x["examples"], x[name]) for x in after] for name in LAYERS}
    return Result(
        numbers,
        {"Excess risk by the number of tasks": rows, "Excess risk over the noise by the number of examples": after},
        {
            "Excess risk by tasks": Curves("tasks", "excess risk", by_tasks, log="xy"),
            "Excess risk by length": Curves("examples", "excess risk over the noise", by_length, log="xy"),
        },
    )


def pretrained(config: Config, count: int, key: PRNGKeyArray) -> tuple[dict[str, Any], Float[Array, "r d d"]]:
    """(the excess risk after so many tasks and what the theory says of it, the weights of all runs)."""
    task, covariance = setting(config)
    given: dict[str, Any] = {"n": config.context, "sigma2": config.noise**2}
    rate = config.rate / float(jnp.trace(covariance) * jnp.trace(layer_theory.moment_matrix(covariance, **given)))
    rates = layer_theory.halving_rates(rate=rate, tasks=count)
    least = float(layer_theory.lsa_minimum(covariance, **given))
    gammas = descend(key, task, rates, config.runs)
    length: dict[str, Any] = {"m": config.context, "sigma2": config.noise**2}
    excess = np.array([float(layer_theory.linear_icl_risk(gamma, covariance, **length)) - least for gamma in gammas])
    row = {
        "dimension": config.dim,
        "tasks": count,
        "excess": float(excess.mean()),
        "standard error": float(excess.std(ddof=1) / math.sqrt(config.runs)),
        "bias": float(layer_theory.mean_path_bias(rates, covariance, **given)),
        "bound": float(layer_theory.task_complexity_bound(covariance, rate=rate, tasks=count, **given)),
        "effective dimension": float(layer_theory.effective_dimension(covariance, rate=rate, tasks=count, **given)),
    }
    return row, gammas


LAYERS = ("trained", "best at the length of training", "best layer there", "ridge")


def lengths(
    config: Config,
    task: FunctionTask,
    covariance: Float[Array, "d d"],
    gammas: Float[Array, "r d d"],
    key: PRNGKeyArray,
) -> tuple[list[dict[str, float]], float]:
    """(excess over the noise after so many examples of the trained layers, in the mean, of the best ones and of ridge;
    the largest distance of the formula from a simulation, of one trained layer, in standard errors)."""
    noise2 = config.noise**2
    best = layer_theory.lsa_optimum(covariance, n=config.context, sigma2=noise2)
    asked = {"layer": icl.Preconditioned(gammas[0]), "ridge": icl.Ridge(noise2)}
    options: dict[str, Any] = {"batch": 256, "batches": config.prompts // 256, "excess": True}
    table = icl.compare(task, asked, config.lengths, key, **options)
    rows, distances = [], []
    for number, count in enumerate(config.lengths):
        after = [
            float(layer_theory.linear_icl_risk(x, covariance, m=count, sigma2=noise2)) - noise2 for x in (*gammas, best)
        ]
        simulated = table.risks["layer"]
        distances.append(abs(float(simulated.mean[number]) - after[0]) / float(simulated.error[number]))
        there = float(layer_theory.lsa_minimum(covariance, n=count, sigma2=noise2)) - noise2
        values = sum(after[:-1]) / len(gammas), after[-1], there, float(table.risks["ridge"].mean[number])
        rows.append({"examples": count, **dict(zip(LAYERS, values, strict=True))})
    return rows, float(np.max(distances))
