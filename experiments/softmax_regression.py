"""What heads of one softmax layer learn from linear functions in context: a debiased step of gradient descent.

A layer of 1, 2 or 4 softmax heads, in which all matrices are free, is trained on linear functions with noise. Its risk
is held against closed forms: one step of gradient descent, one step on examples whose mean is taken off, ridge
regression. Its weights are read out and held against the pattern that theory foretells, also for two tasks at once.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import predictors
from jaxattn import icl, nn
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, outside, within
from jaxattn.icl import FunctionTask, Gaussian, layer_theory, readout, theory
from jaxattn.train import OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, final_fraction=0.0, weight_decay=0.0, beta2=0.999)


@dataclass(frozen=True)
class Config:
    """One layer of softmax heads with all matrices free, on w·x with w ~ N(0, I / d), from small random numbers.

    Attributes:
        dim: Dimension d.
        context: Examples in a prompt L.
        noise2: Variance of the noise.
        heads: Numbers of heads for one task.
        lengths: Numbers of examples that a trained layer is tried at.
        blocks: Coordinates of each of two tasks that are given at once.
        two_context: Examples in a prompt of two tasks.
        two_heads: Numbers of heads for two tasks.
        size: Standard deviation of the weights at the start.
        steps: Training steps.
        batch_size: Prompts per step.
        prompts: Prompts that risks are measured on, a multiple of 4096.
        optimizer: The optimiser.
    """

    dim: int = 5
    context: int = 40
    noise2: float = 0.1
    heads: tuple[int, ...] = (1, 2, 4)
    lengths: tuple[int, ...] = (10, 40, 80, 160)
    blocks: int = 5
    two_context: int = 60
    two_heads: tuple[int, ...] = (2, 3, 4)
    size: float = 0.1
    steps: int = 6000
    batch_size: int = 256
    prompts: int = 2**17
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(context=12, heads=(1,), lengths=(12, 24), two_heads=(), steps=100, batch_size=64, prompts=8192)
PAPER = "softmax_icl"
CLAIMS = (
    Claim(
        "A single head stays behind: its risk is the one of the best single head, near 0.40.",
        paper=PAPER,
        number="1 heads: risk",
        confirmed=within(0.36, 0.42),
        refuted=outside(within(0.30, 0.50)),
    ),
    Claim(
        "Two heads take a debiased gradient step: their risk is at most 6 percent above that of the best one.",
        paper=PAPER,
        number="2 heads: risk over debiased descent",
        confirmed=at_most(1.06),
        refuted=at_least(1.3),
    ),
    Claim(
        "So do four.",
        paper=PAPER,
        number="4 heads: risk over debiased descent",
        confirmed=at_most(1.06),
        refuted=at_least(1.3),
    ),
    Claim(
        "What heads write from y cancels: Σ_h μ_h of four heads is 0 within 0.15.",
        paper=PAPER,
        number="4 heads: sum of mu",
        confirmed=within(-0.15, 0.15),
    ),
    Claim(
        "KQ is diagonal: of the squared norm of its block of x, the diagonal has 95 percent or more in every head.",
        paper=PAPER,
        number="4 heads: least diagonality",
        confirmed=at_least(0.95),
        refuted=at_most(0.5),
    ),
    Claim(
        "And homogeneous: the standard deviation of its diagonal is at most a tenth of its size.",
        paper=PAPER,
        number="4 heads: largest homogeneity",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "OV reads the label alone: at least 95 percent of its squared norm is on the last entry, in every head.",
        paper=PAPER,
        number="4 heads: least share of OV on the label",
        confirmed=at_least(0.95),
        refuted=at_most(0.5),
    ),
    Claim(
        "On prompts longer than in training it still is debiased descent with the step of training: within 10 percent.",
        paper=PAPER,
        number="4 heads: largest distance from debiased descent at longer prompts",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "On inputs that are not isotropic it is preconditioned: its risk is at most 6 percent above that of the best "
        "debiased step with a matrix.",
        paper=PAPER,
        number="anisotropic: risk over preconditioned debiased descent",
        confirmed=at_most(1.06),
        refuted=at_least(1.3),
    ),
    Claim(
        "Two tasks share three heads (superposition): they are within 5 percent of four heads.",
        paper=PAPER,
        number="two tasks: excess of 3 heads over 4",
        confirmed=at_most(1.05),
        refuted=at_least(1.3),
    ),
    Claim(
        "Two heads are too few for two tasks: their excess is over twice that of three.",
        paper=PAPER,
        number="two tasks: excess of 2 heads over 3",
        confirmed=at_least(2.0),
        refuted=at_most(1.05),
    ),
)


def run(config, seed, folder, console):
    if not config.heads or min(config.heads + config.two_heads) < 1:
        raise ValueError(
            f"heads is {config.heads}, two_heads {config.two_heads}: need numbers from 1 on, and some heads"
        )
    if config.dim < 2:
        raise ValueError(f"dim is {config.dim}: need at least 2, for what is off the diagonal of KQ")
    predictors.check(config.steps, config.prompts)
    record = {"softmax_regression": asdict(replace(config, prompts=0, lengths=(), heads=(), two_heads=()))}
    key, given = jax.random.key(seed), (config.optimizer, config.steps, config.batch_size, folder, console)

    def trained(name: str, task: FunctionTask, heads: int, outputs: int = 1) -> tuple[icl.SoftmaxLayer, Any]:
        console.print(f"softmax_regression: {name}")
        rngs = nnx.Rngs(params=jax.random.fold_in(key, heads))
        width = task.inputs.dim + outputs
        begun = icl.SoftmaxLayer(nn.MergedSoftmaxHeads(heads, width, outputs, start=config.size, rngs=rngs)())
        return predictors.train(task, begun, lambda layer: layer, name, seed, record, *given)

    numbers: dict[str, float | None] = {claim.number: None for claim in CLAIMS}
    psi2, noise = 1 / config.dim, config.noise2**0.5
    setting: dict[str, Any] = {"d": config.dim, "n": config.context, "sigma2": config.noise2, "psi2": psi2}
    task = FunctionTask(icl.Linear(scale=psi2**0.5), Gaussian(config.dim), config.context + 1, noise=noise)
    known = {
        "one step of gradient descent": config.noise2 + float(theory.gd_excess(**setting)),
        "debiased": config.noise2 + float(theory.debiased_gd_excess(**setting)),
        "ridge": config.noise2 + float(theory.ridge_excess(**setting)),
    }
    rows: list[dict[str, Any]] = [{"predictor": name, "risk": value} for name, value in known.items()]
    learning: dict[str, Any] = {}
    scatter: dict[str, Any] = {}
    maps: dict[str, Any] = {}
    by_length: dict[str, Any] = {}
    step = icl.DebiasedDescent(theory.debiased_gd_step(**setting))
    for count in config.heads:
        name = f"{count} heads"
        layer, learning[name] = trained(name, task, count)
        heads = readout.effective_heads(layer.heads)
        mean, error = predictors.risk(task, layer, config.prompts, seed)
        block, ov = layer.heads.kq[:, :-1, :-1], layer.heads.ov
        numbers |= {
            f"{name}: risk": mean,
            f"{name}: risk over debiased descent": mean / known["debiased"],
            f"{name}: risk over ridge": mean / known["ridge"],
            f"{name}: sum of mu": float(heads.mu.sum()),
            f"{name}: sum of mu omega": float(heads.mu @ heads.omega),
            f"{name}: least diagonality": float(readout.diagonality(block).min()),
            f"{name}: largest homogeneity": float(readout.homogeneity(block).max()),
            f"{name}: least share of OV on the label": float((ov[:, -1] ** 2 / (ov**2).sum(-1)).min()),
        }
        rows.append(
            {"predictor": name, "risk": mean, "standard error": error}
            | {"ω": " ".join(f"{x:.3f}" for x in heads.omega), "μ": " ".join(f"{x:.3f}" for x in heads.mu)}
        )
        for number, pair in enumerate(zip(heads.omega.tolist(), heads.mu.tolist(), strict=True)):
            scatter[f"{count}.{number}"] = [pair]
        maps |= {f"{name}: |KQ| {number}": jnp.abs(kq).tolist() for number, kq in enumerate(layer.heads.kq)}
        others = {name: layer, "debiased, step of training": step, "ridge": icl.Ridge(config.noise2 / psi2)}
        options: dict[str, Any] = {"batch": 1024, "batches": max(1, config.prompts // 4096)}
        table = icl.compare(task, others, config.lengths, key, **options)
        by_length |= {x: list(zip(table.lengths, y.mean.tolist(), strict=True)) for x, y in table.risks.items()}
        ratios = table.risks[name].mean / table.risks["debiased, step of training"].mean
        longer = [abs(float(x) - 1) for x, n in zip(ratios, config.lengths, strict=True) if n > config.context]
        distance = float(np.max(longer)) if longer else None
        numbers[f"{name}: largest distance from debiased descent at longer prompts"] = distance

    most, covariance = max(config.heads), jnp.diag(1 / jnp.arange(1.0, config.dim + 1))
    skewed = replace(task, inputs=Gaussian(config.dim, covariance))
    layer, learning["anisotropic"] = trained("anisotropic", skewed, most)
    mean, error = predictors.risk(skewed, layer, config.prompts, seed)
    # Examples with their mean taken off are as good as L − 1 others: the best step is the best Γ for so many.
    best = float(layer_theory.lsa_minimum(covariance, n=config.context - 1, sigma2=config.noise2, psi2=psi2))
    numbers["anisotropic: risk over preconditioned debiased descent"] = mean / best
    rows.append({"predictor": f"{most} heads, anisotropic", "risk": mean, "standard error": error})
    rows.append({"predictor": "debiased with a matrix, anisotropic", "risk": best})

    blocks = icl.BlockwiseLinear(2, scale=config.blocks**-0.5)
    both = FunctionTask(blocks, Gaussian(2 * config.blocks), config.two_context + 1, noise=noise)
    of_one = float(
        theory.debiased_gd_excess(d=config.blocks, n=config.two_context, sigma2=config.noise2, psi2=1 / config.blocks)
    )
    shared: list[dict[str, Any]] = [{"predictor": "debiased, one task", "excess per task": of_one}]
    excesses = {}
    for count in config.two_heads:
        name = f"two tasks, {count} heads"
        layer, learning[name] = trained(name, both, count, outputs=2)
        mean, error = predictors.risk(both, layer, config.prompts, seed, excess=True)
        excesses[count] = mean / 2
        shared.append({"predictor": name, "excess per task": mean / 2, "standard error": error / 2})
    for one, other in ((3, 4), (2, 3)):
        if {one, other} <= excesses.keys():
            numbers[f"two tasks: excess of {one} heads over {other}"] = excesses[one] / excesses[other]
    return Result(
        numbers,
        {"One task": rows, "Two tasks on halves of the input": shared},
        {
            "Training": Curves("step", "risk", learning, log="y"),
            "Heads": Curves("ω", "μ", scatter),
            "Risk by length": Curves("examples", "risk", by_length, log="xy"),
            "Merged matrices": Maps(maps, y="channel of the key", x="channel of the query", value="size of the entry"),
        },
    )
