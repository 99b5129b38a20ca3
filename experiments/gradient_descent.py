"""Linear self-attention as gradient descent: one trained layer against its closed form, and layers against steps.

One layer of linear self-attention that is trained on linear functions has a closed form: it is one step of
preconditioned gradient descent. The trained weights are held against that form, for inputs of equal and of unequal
variances. Stacks of layers are then held against as many steps whose sizes are tuned.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray
from rich.console import Console

from experiments import predictors
from jaxattn import icl, nn
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, outside, within
from jaxattn.icl import FunctionTask, Gaussian, layer_theory, readout
from jaxattn.train import OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, final_fraction=0.0, weight_decay=0.0, beta2=0.999)


@dataclass(frozen=True)
class Config:
    """Layers of linear self-attention, trained on prompts of linear functions w·x with w ~ N(0, I).

    Attributes:
        dim: Dimension d.
        context: Examples in a prompt n, for one layer.
        noise: Standard deviation of the noise, for one layer.
        steps: Training steps.
        batch_size: Prompts per step.
        starts: Random starts in which every weight is free.
        depths: Numbers of layers.
        deep_context: Examples in a prompt for several layers, without noise.
        prompts: Prompts that risks are measured on, a multiple of 4096.
        optimizer: The optimiser.
    """

    dim: int = 5
    context: int = 10
    noise: float = 0.5
    steps: int = 3000
    batch_size: int = 512
    starts: int = 3
    depths: tuple[int, ...] = (1, 2, 3, 4)
    deep_context: int = 20
    prompts: int = 2**20
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(steps=200, batch_size=64, starts=0, depths=(1,), prompts=16384)
CLAIMS = (
    Claim(
        "A layer trained from a structured start on isotropic inputs has the least risk that any such layer has.",
        paper="linear_attention_icl",
        number="isotropic: risk over the minimum",
        confirmed=within(0.99, 1.005),
        refuted=outside(within(0.97, 1.02)),
    ),
    Claim(
        "So it has on inputs whose covariance is not.",
        paper="linear_attention_icl",
        number="anisotropic: risk over the minimum",
        confirmed=within(0.99, 1.005),
        refuted=outside(within(0.97, 1.02)),
    ),
    Claim(
        "Its weights are then those of one step of preconditioned gradient descent: Γ is Γ* within 3 percent.",
        paper="linear_attention_icl",
        number="anisotropic: distance of Γ",
        confirmed=at_most(0.03),
        refuted=at_least(0.1),
    ),
    Claim(
        "One step of gradient descent on isotropic inputs: Γ is a multiple of the identity within 3 percent.",
        paper="icl_gradient_descent",
        number="isotropic: distance of Γ from a multiple of I",
        confirmed=at_most(0.03),
        refuted=at_least(0.1),
    ),
    Claim(
        "Deeper is better, as more steps are: with tuned steps, 4 layers leave at most a tenth of the excess of 1.",
        paper="icl_gradient_descent",
        number="steps: excess of 4 layers over 1",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "Layers that also move the inputs (GD++) are faster: 2 of them leave less than 3 layers of plain steps.",
        paper="icl_gradient_descent",
        number="excess of 2 layers of GD++ over 3 of steps",
        confirmed=at_most(1.0),
        refuted=at_least(1.5),
    ),
    Claim(
        "Two layers with every weight free come to what two tuned layers of GD++ do: their excess is at most 1.1 times "
        "as large.",
        paper="icl_gradient_descent",
        number="excess of 2 trained layers over 2 of GD++",
        confirmed=at_most(1.1),
        refuted=at_least(2.0),
    ),
    Claim(
        "And they answer alike: the mean square of the difference is at most a tenth of their excess risk.",
        paper="icl_gradient_descent",
        number="difference of 2 trained layers and 2 of GD++",
        confirmed=at_most(0.1),
        refuted=at_least(1.0),
    ),
    Claim(
        "For x ~ N(0, Σ) and w ~ N(0, Σ⁻¹) the layers of a trained stack are preconditioned by Σ⁻¹: each Γ is a "
        "multiple of it within 10 percent.",
        paper="preconditioned_icl",
        number="preconditioned: largest distance of a Γ from a multiple of Σ⁻¹",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
)


def rotated(key: PRNGKeyArray, dim: int) -> Float[Array, "d d"]:
    """A covariance with the eigenvalues 1, 1/2, ..., 1/d in a random basis."""
    basis = jax.random.orthogonal(key, dim)
    return (basis / jnp.arange(1.0, dim + 1)) @ basis.T


def start(key: PRNGKeyArray, dim: int, structured: bool, layers: int = 1) -> icl.LinearLayers:
    """Layers as `nn.MergedLinearAttention` starts them."""
    rngs = nnx.Rngs(params=key)
    return icl.LinearLayers(
        tuple(nn.MergedLinearAttention(dim + 1, structured=structured, rngs=rngs)() for _ in range(layers))
    )


def fitted(config: Config, task: FunctionTask, params: Any, build: Any, name: str, seed: int, *where: Any) -> Any:
    """(the trained params, the risk at every measurement); build(params) is the predictor, asked for the last x."""
    record = {"gradient_descent": asdict(replace(config, prompts=0, depths=(), starts=0))}
    given = config.optimizer, config.steps, config.batch_size
    return predictors.train(task, params, build, name, seed, record, *given, *where)


def one_layer(config: Config, seed: int, folder: Path, console: Console) -> Result:
    """A layer against the closed form of the best one, for two covariances and two kinds of start."""
    key = jax.random.key(seed)
    numbers: dict[str, float | None] = {}
    rows: list[dict[str, Any]] = []
    learning: dict[str, Any] = {}
    maps: dict[str, Any] = {}
    kinds = [("isotropic", False, 0), ("anisotropic", False, 0)]
    for kind, free, number in [*kinds, *(("anisotropic", True, number) for number in range(config.starts))]:
        covariance = jnp.eye(config.dim) if kind == "isotropic" else rotated(jax.random.fold_in(key, 1), config.dim)
        inputs = Gaussian(config.dim, covariance)
        given: dict[str, Any] = {"n": config.context, "sigma2": config.noise**2}
        task = FunctionTask(icl.Linear(), inputs, config.context + 1, noise=config.noise)
        name = f"{kind}, free start {number}" if free else kind
        console.print(f"gradient_descent: {name}")
        begun = start(jax.random.fold_in(key, 2 + number), config.dim, structured=not free)
        layer, learning[name] = fitted(config, task, begun, lambda layer: layer, name, seed, folder, console)
        mean, error = predictors.risk(task, layer, config.prompts, seed)
        gamma, best = readout.effective_gamma(layer.layers[0]), layer_theory.lsa_optimum(covariance, **given)
        least = float(layer_theory.lsa_minimum(covariance, **given))
        rank_one = float(layer_theory.lsa_rank_one_risk(covariance, **given))
        distance = float(jnp.linalg.norm(gamma - best) / jnp.linalg.norm(best))
        row = {"training": name, "risk": mean, "standard error": error, "minimum": least, "best of rank one": rank_one}
        rows.append(row | {"distance of Γ": distance})
        if not free:
            numbers[f"{kind}: risk over the minimum"] = mean / least
            numbers[f"{kind}: distance of Γ"] = distance
            maps |= {f"{kind}: Γ": jnp.abs(gamma).tolist(), f"{kind}: Γ*": jnp.abs(best).tolist()}
        if kind == "isotropic":
            numbers["isotropic: distance of Γ from a multiple of I"] = float(
                readout.pattern_distance(gamma, jnp.eye(config.dim))
            )
    stuck = [abs(row["risk"] / row["best of rank one"] - 1) < 0.01 for row in rows if "free" in row["training"]]
    numbers["free starts at the best of rank one"] = float(sum(stuck)) if stuck else None
    curves = Curves("step", "risk", learning)
    return Result(
        numbers,
        {"One layer": rows},
        {"Training one layer": curves, "Weights |Γ|": Maps(maps, y="channel", x="channel", value="size of the entry")},
    )


def steps(params: dict[str, Array], dim: int) -> icl.LinearLayers:
    """Layers that take steps of the given sizes, and move the inputs by the given factors if there are some."""
    moves = None if "moves" not in params else params["moves"][:, None, None] * jnp.eye(dim)
    return icl.preconditioned_steps(params["steps"][:, None, None] * jnp.eye(dim), moves)


def layers(config: Config, seed: int, folder: Path, console: Console) -> Result:
    """Stacks of layers: tuned steps, with and without moving the inputs; and matrices that learn a covariance."""
    numbers: dict[str, float | None] = {"steps: excess of 4 layers over 1": None}
    numbers["excess of 2 layers of GD++ over 3 of steps"] = None
    task = FunctionTask(icl.Linear(), Gaussian(config.dim), config.deep_context + 1)
    rows: list[dict[str, Any]] = []
    excess, build = {}, partial(steps, dim=config.dim)
    tuned: icl.LinearLayers | None = None
    for kind in ("steps", "GD++"):
        for depth in config.depths:
            if kind == "GD++" and depth == 1:
                continue  # what the last layer moves is not read
            console.print(f"gradient_descent: {depth} layers, {kind}")
            params = {"steps": jnp.full(depth, 0.5)} | ({"moves": jnp.zeros(depth)} if kind == "GD++" else {})
            name = f"{kind} {depth}"
            params, _ = fitted(config, task, params, build, name, seed, folder, console)
            excess[kind, depth], error = predictors.risk(task, build(params), config.prompts, seed)
            row = {"layers": depth, "kind": kind, "excess": excess[kind, depth], "standard error": error}
            tuned = build(params) if name == "GD++ 2" else tuned
            rows.append(row | {f"{each} learned": " ".join(f"{x:.3g}" for x in params[each]) for each in params})
    if {("steps", 1), ("steps", 4)} <= excess.keys():
        numbers["steps: excess of 4 layers over 1"] = excess["steps", 4] / excess["steps", 1]
    if {("steps", 3), ("GD++", 2)} <= excess.keys():
        numbers["excess of 2 layers of GD++ over 3 of steps"] = excess["GD++", 2] / excess["steps", 3]
    for name in ("excess of 2 trained layers over 2 of GD++", "difference of 2 trained layers and 2 of GD++"):
        numbers[name] = None
    if tuned is not None:
        console.print("gradient_descent: 2 layers, every weight free")
        # A step leaves y_j − w·x_j in the labels of the examples, and −w·x in that of the question: the sign is turned.
        turned = tuple(replace(x, kq=-x.kq) for x in start(jax.random.key(seed), config.dim, True, layers=2).layers)
        begun = icl.LinearLayers(turned, negate=True)
        free, _ = fitted(config, task, begun, lambda layers: layers, "free 2", seed, folder, console)
        mean, error = predictors.risk(task, free, config.prompts, seed)
        asked = task.sample(jax.random.key(seed), 65536)
        one, other = (each.after(asked.x, asked.y, [config.deep_context]) for each in (free, tuned))
        rows.append({"layers": 2, "kind": "every weight free", "excess": mean, "standard error": error})
        numbers["excess of 2 trained layers over 2 of GD++"] = mean / excess["GD++", 2]
        numbers["difference of 2 trained layers and 2 of GD++"] = float(((one - other) ** 2).mean()) / mean
    numbers["one tuned step over its closed form"] = None
    if ("steps", 1) in excess:
        closed = float(layer_theory.lsa_minimum(jnp.eye(config.dim), n=config.deep_context))
        numbers["one tuned step over its closed form"] = excess["steps", 1] / closed

    covariance = rotated(jax.random.fold_in(jax.random.key(seed), 1), config.dim)
    inverse = jnp.linalg.inv(covariance)
    task = FunctionTask(icl.Linear(covariance=inverse), Gaussian(config.dim, covariance), config.deep_context + 1)
    small = jnp.tile(0.2 * jnp.eye(config.dim), (2, 1, 1))
    gammas, _ = fitted(config, task, small, icl.preconditioned_steps, "preconditioned", seed, folder, console)
    distances = readout.pattern_distance(gammas, inverse)
    numbers["preconditioned: largest distance of a Γ from a multiple of Σ⁻¹"] = float(distances.max())
    numbers["preconditioned: distance of Σ⁻¹ from a multiple of I"] = float(
        readout.pattern_distance(inverse, jnp.eye(config.dim))
    )
    lines = {kind: [(d, excess[kind, d]) for d in config.depths if (kind, d) in excess] for kind in ("steps", "GD++")}
    return Result(numbers, {"Layers": rows}, {"Excess by layers": Curves("layers", "excess risk", lines, log="y")})


def run(config, seed, folder, console):
    predictors.check(config.steps, config.prompts)
    if not config.depths or min(config.depths) < 1:
        raise ValueError(f"depths is {config.depths}: need numbers from 1 on")
    one, several = one_layer(config, seed, folder, console), layers(config, seed, folder, console)
    return Result(
        {**one.numbers, **several.numbers}, {**one.tables, **several.tables}, {**one.figures, **several.figures}
    )
