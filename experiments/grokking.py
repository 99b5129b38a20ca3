"""Grokking: addition mod p is learned by heart first, and by Fourier features much later, if weights decay.

One layer of attention and a feed-forward block are trained on all pairs of one side of a split, as one batch, with and
without weight decay. What it has learned is measured on the other side, in the Fourier spectrum of its embedding, and
by how much of its logits are sums of cos(2π k (a + b − c) / p).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import decoders
from jaxattn import icl, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most
from jaxattn.train import Drawn, OptimizerConfig

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, warmup_steps=10, schedule="constant", weight_decay=1.0, beta2=0.98, clip_norm=None
)


@dataclass(frozen=True)
class Config:
    """A decoder of one layer with learned positions, and its training with all pairs of a side in each step.

    Attributes:
        modulus: p.
        share: The share of the pairs that it is trained on.
        width: Width of the model.
        heads: Heads of its layer.
        steps: Training steps.
        eval_every: Steps between measurements.
        optimizer: The optimiser; the control has no weight decay.
    """

    modulus: int = 29
    share: float = 0.5
    width: int = 32
    heads: int = 4
    steps: int = 6000
    eval_every: int = 100
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(modulus=7, width=16, heads=2, steps=100, eval_every=50)

LEARNED = 0.99
CLAIMS = (
    Claim(
        "With weight decay the sums of pairs that were never shown come out right in the end.",
        paper="grokking",
        number="decay: held-out accuracy",
        confirmed=at_least(0.95),
        refuted=at_most(0.1),
    ),
    Claim(
        "They do so long after those that were: it takes twice as many steps or more to 99 of 100 of them.",
        paper="grokking",
        number="decay: steps to learn the others over those to learn by heart",
        confirmed=at_least(2.0),
        refuted=at_most(1.1),
    ),
    Claim(
        "Without weight decay they do not within the same steps.",
        paper="grokking",
        number="no decay: held-out accuracy",
        confirmed=at_most(0.5),
        refuted=at_least(0.95),
    ),
    Claim(
        "The embedding comes to few frequencies: their effective number falls to half of that at the start, or less.",
        paper="progress_measures",
        number="decay: frequencies of the embedding, end over start",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "Without weight decay it does not.",
        paper="progress_measures",
        number="no decay: frequencies of the embedding, end over start",
        confirmed=at_least(0.75),
        refuted=at_most(0.5),
    ),
    Claim(
        "The logits are then sums of cos(2π k (a + b − c) / p): that form explains 80 percent of them.",
        paper="progress_measures",
        number="decay: share of the logits that is trigonometric",
        confirmed=at_least(0.8),
        refuted=at_most(0.3),
    ),
    Claim(
        "Of the logits of a network that has learned by heart it explains less than half.",
        paper="progress_measures",
        number="no decay: share of the logits that is trigonometric",
        confirmed=at_most(0.5),
        refuted=at_least(0.8),
    ),
)


def whole(task: icl.ModularAddition) -> tuple[Drawn, int]:
    """(batches that are all prompts of a side, each of them the same; their number)."""
    digest = f"all of {task}"
    return Drawn(lambda key, rows: task.every(), task.length, digest), len(task.pairs())


def spectrum(model: models.Transformer, task: icl.ModularAddition) -> tuple[jax.Array, jax.Array]:
    """(the shares of frequencies in the embedding, those of the trigonometric form in the logits of all pairs)."""
    p = task.modulus
    number = np.arange(p)
    pairs = np.stack(np.meshgrid(number, number, indexing="ij"), -1).reshape(-1, 2)
    logits = model(task.prompts(jnp.asarray(pairs)).x)[0][:, 2, :p].reshape(p, p, p)
    return icl.fourier_shares(model.embed.table[...][:p]), icl.trigonometric_shares(logits)


def effective(shares: jax.Array) -> float:
    """The number of frequencies that equal shares of the same sum of squares would have: 1 / Σ s²."""
    return float(1 / (shares**2).sum())


def train(
    config: Config, decay: bool, seed: int, folder, console
) -> tuple[models.Transformer, dict[str, list[tuple[float, float]]]]:
    """(the trained model, the curves of what was measured on the way)."""
    task = icl.ModularAddition(config.modulus, config.share, seed=seed)
    shown, rows = whole(task)
    others, _ = whole(replace(task, held_out=True))
    model = decoders.build(
        models.Spec(nn.MultiHeadAttention, heads=config.heads, position=None),
        vocabulary=task.vocabulary,
        length=task.length,
        width=config.width,
        layers=1,
        seed=seed,
        hidden=4,
        positions=models.Spec(nn.PositionEmbedding),
    )
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    curves: dict[str, list[tuple[float, float]]] = {"frequencies": [], "trigonometric": []}
    measure = jax.jit(lambda params: spectrum(nnx.merge(graph, params, *rest), task))

    def look(step: int, params: Any, metrics: Any) -> None:
        of_table, of_logits = measure(params)
        curves["frequencies"].append((step, effective(of_table)))
        curves["trigonometric"].append((step, float(of_logits.sum())))

    look(0, params, None)
    optimizer = config.optimizer if decay else replace(config.optimizer, weight_decay=0.0)
    model, result = decoders.train(
        model,
        shown,
        loss=decoders.answered_tokens,
        validation=others,
        on_eval=look,
        steps=config.steps,
        batch_size=rows,
        eval_every=config.eval_every,
        eval_batches=1,
        optimizer=optimizer,
        seed=seed,
        run_config={"decay": decay, "grokking": asdict(config)},
        folder=folder,
        console=console,
    )
    curves["shown"] = [(line["step"], line["correct"]) for line in result.history if "correct" in line]
    curves["held out"] = decoders.measured(result, "correct")
    return model, curves


def run(config, seed, folder, console):
    numbers: dict[str, float | None] = {}
    accuracy: dict[str, list[tuple[float, float]]] = {}
    frequencies, explained = {}, {}
    rows: list[dict[str, Any]] = []
    for name, decay in (("decay", True), ("no decay", False)):
        console.print(f"grokking: {name}")
        model, curves = train(config, decay, seed, folder / name.replace(" ", "_"), console)
        task = icl.ModularAddition(config.modulus, config.share, seed=seed)
        of_table, of_logits = spectrum(model, task)
        by_heart, learned = (decoders.first_step(curves[each], LEARNED) for each in ("shown", "held out"))
        numbers |= {
            f"{name}: shown accuracy": curves["shown"][-1][1],
            f"{name}: held-out accuracy": curves["held out"][-1][1],
            f"{name}: steps to learn by heart": by_heart,
            f"{name}: steps to learn the others": learned,
            f"{name}: steps to learn the others over those to learn by heart": None
            if learned is None or by_heart is None
            else learned / by_heart,
            f"{name}: frequencies of the embedding, start": curves["frequencies"][0][1],
            f"{name}: frequencies of the embedding, end": effective(of_table),
            f"{name}: frequencies of the embedding, end over start": effective(of_table) / curves["frequencies"][0][1],
            f"{name}: share of the logits that is trigonometric": float(of_logits.sum()),
        }
        accuracy |= {f"{name}, {side}": curves[side] for side in ("shown", "held out")}
        frequencies[name], explained[name] = curves["frequencies"], curves["trigonometric"]
        rows += [
            {
                "training": name,
                "frequency": str(k),
                "share of the embedding": float(one),
                "share of the logits": float(other),
            }
            for k, (one, other) in enumerate(zip(of_table, of_logits, strict=True), 1)
        ]
    return Result(
        numbers,
        {"Frequencies at the end": rows},
        {
            "Accuracy": Curves("step", "accuracy", accuracy, log="x"),
            "Frequencies of the embedding": Curves("step", "effective number of frequencies", frequencies),
            "Trigonometric share of the logits": Curves("step", "share of the squared size", explained),
        },
    )
