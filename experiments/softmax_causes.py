"""Why claims of `softmax_regression` did not come out: other starts, longer training, and parts that are taken away.

There two heads failed on one of two seeds, heads read more than the label, and three heads stayed 6.5 percent behind
four on two tasks. The claims below say why, and were written after that run and before this one measured.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import predictors, softmax_regression
from experiments.softmax_regression import PAPER
from jaxattn import icl, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most
from jaxattn.core import merged
from jaxattn.icl import FunctionTask, Gaussian, readout, theory

ALONE = replace(softmax_regression.OPTIMIZER, clip_norm=None)
FULL = softmax_regression.Config(optimizer=ALONE)


@dataclass(frozen=True)
class Config:
    """The layer and the prompts of `softmax_regression`, and the sizes of the interventions.

    Attributes:
        layer: The prompts and the training, of which the optimiser clips nothing: layers that are trained together
            would share its factor.
        draws: Starts of each kind on one task, trained together.
        two_draws: Starts of each kind on two tasks.
        small: Standard deviation of the weights at a small start.
        omega: The size of the scores of the layer for two tasks that is built by hand.
        longer: Steps of the longest training on two tasks, as a multiple; 0 for one task alone.
        prompts: Prompts that a risk is measured on, a multiple of 4096.
    """

    layer: softmax_regression.Config = FULL
    draws: int = 8
    two_draws: int = 2
    small: float = 0.01
    omega: float = 0.1
    longer: int = 4
    prompts: int = 2**16


QUICK = Config(replace(softmax_regression.QUICK, optimizer=ALONE), 2, prompts=4096, longer=0)
CLAIMS = (
    Claim(
        "Two heads fail where both took the same sign, and only there: so it is in every draw of the start (a risk "
        "above 1.3 times that of debiased descent with equal signs, at most 1.06 times with different ones).",
        paper=PAPER,
        number="draws that the signs of two heads explain, share",
        confirmed=at_least(1.0),
        refuted=at_most(0.5),
    ),
    Claim(
        "So two heads that start with different signs are the debiased step in every draw: at most 1.06 times "
        "its risk.",
        paper=PAPER,
        number="two heads that start with different signs: largest risk over debiased descent",
        confirmed=at_most(1.06),
        refuted=at_least(1.3),
    ),
    Claim(
        "What heads read of x is of no use: with those entries of OV at 0, the risk of four heads changes by at most "
        "2 percent.",
        paper=PAPER,
        number="four heads, label alone: largest change of the risk",
        confirmed=at_most(0.02),
        refuted=at_least(0.2),
    ),
    Claim(
        "It is left over from the start: from weights a tenth as large, OV reads the label alone, 95 percent or more "
        "in every head of every draw.",
        paper=PAPER,
        number="four heads, small start: least share of OV on the label",
        confirmed=at_least(0.95),
        refuted=at_most(0.66),
    ),
    Claim(
        "And so is what KQ has off its diagonal: from such a start 95 percent or more is on it.",
        paper=PAPER,
        number="four heads, small start: least diagonality",
        confirmed=at_least(0.95),
        refuted=at_most(0.9),
    ),
    Claim(
        "Three heads can serve two tasks: from the solution built by hand, training ends within 5 percent of "
        "four heads.",
        paper=PAPER,
        number="two tasks: excess of 3 heads, built by hand, over 4",
        confirmed=at_most(1.05),
        refuted=at_least(1.065),
    ),
    Claim(
        "Two heads are too few then: over twice the excess of those three.",
        paper=PAPER,
        number="two tasks: excess of 2 heads over 3, built by hand",
        confirmed=at_least(2.0),
        refuted=at_most(1.876),
    ),
    Claim(
        "Training from small weights gets there late: with 4 times the steps it is within 5 percent too.",
        paper=PAPER,
        number="two tasks: excess of 3 heads over 4, trained longest",
        confirmed=at_most(1.05),
        refuted=at_least(1.065),
    ),
)


def run(config, seed, folder, console):
    setup, key = config.layer, jax.random.key(seed)
    predictors.check(setup.steps, config.prompts)
    record = {"softmax_causes": asdict(replace(config, prompts=0))}
    record["softmax_causes"].pop("two_draws")
    psi2, noise = 1 / setup.dim, setup.noise2**0.5
    one = FunctionTask(icl.Linear(scale=psi2**0.5), Gaussian(setup.dim), setup.context + 1, noise=noise)
    blocks = icl.BlockwiseLinear(2, scale=setup.blocks**-0.5)
    two = FunctionTask(blocks, Gaussian(2 * setup.blocks), setup.two_context + 1, noise=noise)
    best = setup.noise2 + float(theory.debiased_gd_excess(d=setup.dim, n=setup.context, sigma2=setup.noise2, psi2=psi2))

    def starts(heads: int, size: float, outputs: int = 1) -> Any:
        width = 2 * setup.blocks + 2 if outputs == 2 else setup.dim + 1

        def start(key):
            return icl.SoftmaxLayer(nn.MergedSoftmaxHeads(heads, width, outputs, start=size, rngs=nnx.Rngs(key))())

        draws = config.two_draws if outputs == 2 else config.draws
        return jax.vmap(start)(jax.random.split(jax.random.fold_in(key, heads), draws))

    def layer(kq: jax.Array, ov: jax.Array) -> icl.SoftmaxLayer:
        return icl.SoftmaxLayer(merged.SoftmaxHeads(kq, ov))

    def trained(name: str, task: FunctionTask, layers: Any, times: int = 1) -> tuple[Any, Any]:
        console.print(f"softmax_causes: {name}")
        draws = len(layers.heads.kq)
        given = setup.optimizer, times * setup.steps, draws * setup.batch_size, folder, console
        return predictors.train(task, layers, lambda x: x, name, seed, record, *given, draws=draws)

    def risks(task: FunctionTask, layers: Any, excess: bool = False) -> np.ndarray:
        each = [jax.tree.map(lambda x, draw=draw: x[draw], layers) for draw in range(len(layers.heads.kq))]
        return np.array([predictors.risk(task, layer, config.prompts, seed, excess=excess)[0] for layer in each])

    learning: dict[str, Any] = {}
    layers, learning["two heads"] = trained("two heads", one, starts(2, setup.size))
    ends = jax.vmap(readout.effective_heads)(layers.heads)
    alike = np.asarray(ends.omega[:, 0] * ends.omega[:, 1] > 0)
    ratios = risks(one, layers) / best
    explained = np.where(alike, ratios > 1.3, ratios <= 1.06)
    rows = [
        {"draw": draw, "signs": "equal" if same else "different", "risk over debiased descent": ratio}
        for draw, (same, ratio) in enumerate(zip(alike.tolist(), ratios.tolist(), strict=True))
    ]

    # Head h has the score ω_h x·x_q and the value μ_h y: both change sign together, and only their product counts.
    begun = jax.vmap(lambda key: nn.MergedSoftmaxHeads(2, setup.dim + 1, structured=True, rngs=nnx.Rngs(key))())(
        jax.random.split(key, config.draws)
    )
    sign, noisy = jnp.array([1.0, -1.0])[:, None, None], starts(2, setup.size)
    kq = sign * jnp.abs(begun.kq) + noisy.heads.kq / 10
    ov = sign[..., 0] * jnp.abs(begun.ov) + noisy.heads.ov / 10
    different = jax.vmap(layer)(kq, ov)
    layers, learning["two heads, different signs"] = trained("two heads, different signs", one, different)
    of_different = risks(one, layers) / best

    layers, learning["four heads"] = trained("four heads", one, starts(4, setup.size))
    whole = risks(one, layers)
    label = jax.vmap(layer)(layers.heads.kq, layers.heads.ov.at[..., :-1].set(0))
    alone = risks(one, label)

    small, learning["four heads, small start"] = trained("four heads, small start", one, starts(4, config.small))
    ov = small.heads.ov
    share = (ov[..., -1] ** 2 / (ov**2).sum(-1)).min(-1)
    diagonal = readout.diagonality(small.heads.kq[..., :-1, :-1]).min(-1)
    of_small = risks(one, small) / best
    rows_four = [
        {
            "draw": draw,
            "risk": whole[draw],
            "label alone": alone[draw],
            "small start: risk over debiased descent": of_small[draw],
            "share of OV on the label": float(share[draw]),
            "diagonality": float(diagonal[draw]),
        }
        for draw in range(config.draws)
    ]

    step = theory.debiased_gd_step(d=setup.blocks, n=setup.two_context, sigma2=setup.noise2, psi2=1 / setup.blocks)
    built = icl.superposed_gradient_steps(2, setup.blocks, step, config.omega)
    by_hand = jax.tree.map(lambda x: jnp.repeat(x[None], config.two_draws, 0), built)
    excess = {}
    kinds = (
        ("2 heads", starts(2, setup.size, 2), 1),
        ("3 heads", starts(3, setup.size, 2), 1),
        ("4 heads", starts(4, setup.size, 2), 1),
        ("3 heads, built by hand", by_hand, 1),
        ("3 heads, trained longest", starts(3, setup.size, 2), config.longer),
        ("4 heads, trained longest", starts(4, setup.size, 2), config.longer),
    )
    for name, layers, times in kinds if config.longer else ():
        ended, learning[f"two tasks, {name}"] = trained(f"two tasks, {name}", two, layers, times)
        excess[name] = risks(two, ended, excess=True) / 2
    excess["3 heads, as built"] = risks(two, by_hand, excess=True) / 2
    of_one = float(
        theory.debiased_gd_excess(d=setup.blocks, n=setup.two_context, sigma2=setup.noise2, psi2=1 / setup.blocks)
    )
    rows_two = [{"layer": "debiased descent, by formula", "excess per task": of_one}] + [
        {"layer": name, "excess per task": x.mean(), "least": x.min(), "largest": x.max()} for name, x in excess.items()
    ]

    def over(one: str, other: str) -> float | None:
        return float(excess[one].mean() / excess[other].mean()) if {one, other} <= excess.keys() else None

    numbers = {
        "draws that the signs of two heads explain, share": float(explained.mean()),
        "draws of two heads with different signs, share": float((~alike).mean()),
        "two heads that start with different signs: largest risk over debiased descent": float(of_different.max()),
        "four heads, label alone: largest change of the risk": float(np.abs(alone / whole - 1).max()),
        "four heads, small start: least share of OV on the label": float(share.min()),
        "four heads, small start: least diagonality": float(diagonal.min()),
        "two tasks: excess of 3 heads, built by hand, over 4": over("3 heads, built by hand", "4 heads"),
        "two tasks: excess of 2 heads over 3, built by hand": over("2 heads", "3 heads, built by hand"),
        "two tasks: excess of 3 heads over 4": over("3 heads", "4 heads"),
        "two tasks: excess of 3 heads over 4, trained longest": over(
            "3 heads, trained longest", "4 heads, trained longest"
        ),
    }
    return Result(
        numbers,
        {"Two heads": rows, "Four heads": rows_four, "Two tasks on halves of the input": rows_two},
        {
            "Training on one task": Curves(
                "step", "risk, mean over draws", {k: v for k, v in learning.items() if "tasks" not in k}, log="y"
            ),
            "Training on two tasks": Curves(
                "step", "risk, mean over draws", {k: v for k, v in learning.items() if "tasks" in k}, log="y"
            ),
        },
    )
