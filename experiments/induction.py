"""Induction heads: when they form, what they are for, and the curve by which people recall lists.

Small decoders of attention alone learn random Markov chains, whose best predictor is known, and blocks of random tokens
that come again, now and then from another place. While they learn, every head is scored, and the lags at which it looks
in an earlier copy are held against a model of human recall.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import decoders
from experiments.decoders import OPTIMIZER
from jaxattn import Causal, analysis, icl, models, nn, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, check_names, outside, within
from jaxattn.train import Drawn, OptimizerConfig

OF_TOKENS = optax.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Config:
    """Decoders of attention without feed-forward blocks, with a learned bias per distance.

    Attributes:
        kinds: Models of chains, of `KINDS`.
        states: States of the Markov chains.
        chain: Tokens of a chain.
        chain_width: Width of the models of chains, which have one head per layer.
        chain_steps: Training steps on chains, of two layers.
        single_steps: Training steps on chains of one layer, which learns sooner.
        chains: Chains that losses are measured on, a multiple of 256.
        letters: Different letters of blocks.
        length: Tokens of a row of blocks.
        shortest: The least period.
        longest: The largest period.
        jump: The probability of a jump within the block, in training alone.
        smear: Whether keys of the model of blocks are smeared with the token before.
        width: Width of the model of blocks.
        heads: Its heads per layer.
        steps: Training steps on blocks.
        batch_size: Rows per step.
        eval_every: Steps between looks at the heads.
        probe: The period of the copies by which lags are measured.
        lags: The largest lag.
        grid: Values of β_enc, β_rec and γ of the model of recall.
        optimizer: The optimiser.
    """

    kinds: tuple[str, ...] = ("one layer", "one layer, smeared keys", "two layers")
    states: int = 3
    chain: int = 64
    chain_width: int = 32
    chain_steps: int = 6000
    single_steps: int = 2500
    chains: int = 4096
    letters: int = 32
    length: int = 64
    shortest: int = 6
    longest: int = 20
    jump: float = 0.0
    smear: bool = True
    width: int = 64
    heads: int = 2
    steps: int = 1000
    batch_size: int = 64
    eval_every: int = 10
    probe: int = 20
    lags: int = 5
    grid: tuple[int, int, int] = (10, 11, 6)
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(
    kinds=("one layer, smeared keys",),
    chain=16,
    chain_width=16,
    chain_steps=10,
    single_steps=10,
    chains=256,
    letters=12,
    length=24,
    shortest=3,
    longest=6,
    width=16,
    steps=20,
    batch_size=16,
    eval_every=10,
    probe=7,
    grid=(2, 2, 2),
    optimizer=replace(OPTIMIZER, warmup_steps=2),
)

PAPER = "induction_heads"
ALIKE = 0.3  # the prefix score from which on a head is called an induction head
CLAIMS = (
    Claim(
        "Two layers of attention learn to predict a random Markov chain as well as Bayes: within 0.01 nats.",
        paper=PAPER,
        number="chains, two layers: loss over Bayes",
        confirmed=at_most(0.01),
        refuted=at_least(0.05),
    ),
    Claim(
        "One layer learns how frequent each state is and little more: its loss is that of the best predictor by "
        "frequency within 0.02 nats.",
        paper=PAPER,
        number="chains, one layer: loss over frequencies",
        confirmed=within(-0.02, 0.02),
        refuted=outside(within(-0.06, 0.06)),
    ),
    Claim(
        "One layer whose keys are smeared with the token before does what two layers do: within 0.01 nats of Bayes.",
        paper=PAPER,
        number="chains, one layer, smeared keys: loss over Bayes",
        confirmed=at_most(0.01),
        refuted=at_least(0.05),
    ),
    Claim(
        "On blocks that repeat with random periods, tokens that have been seen cost less than 0.3 nats.",
        paper=PAPER,
        number="blocks: loss of tokens seen before",
        confirmed=at_most(0.3),
        refuted=at_least(1.0),
    ),
    Claim(
        "There is an induction head: the largest prefix score is above 0.7.",
        paper=PAPER,
        number="blocks: largest prefix score",
        confirmed=at_least(0.7),
        refuted=at_most(0.3),
    ),
    Claim(
        "It forms when the model learns to learn in context: prefix score and score of in-context learning are halfway "
        "at steps that are at most a tenth of training apart.",
        paper=PAPER,
        number="blocks: time from prefix score to in-context score, share of training",
        confirmed=within(-0.1, 0.1),
        refuted=outside(within(-0.3, 0.3)),
    ),
    Claim(
        "Without this head in-context learning collapses: at most half of the score is left.",
        paper=PAPER,
        number="blocks: score left without the induction head",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        f"Without all heads whose prefix score is above {ALIKE} it collapses: at most half of the score is left.",
        paper=PAPER,
        number="blocks: score left without all induction heads",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "Without another head of its layer it does not: three quarters of the score are left, or more.",
        paper=PAPER,
        number="blocks: score left without another head of the layer",
        confirmed=at_least(0.75),
        refuted=at_most(0.5),
    ),
    Claim(
        "The induction head looks at lags as people recall lists: its distance to the nearest curve of CMR is below "
        "0.5.",
        paper="cmr_heads",
        number="blocks: distance of the induction head from CMR",
        confirmed=at_most(0.5),
        refuted=at_least(1.0),
    ),
    Claim(
        "Over training its distance falls as its prefix score rises: their rank correlation is −0.5 or less.",
        paper="cmr_heads",
        number="blocks: correlation of distance and prefix score",
        confirmed=at_most(-0.5),
        refuted=at_least(0.0),
    ),
)

# Name -> (layers, whether keys are smeared) of the models of chains.
KINDS = {"one layer": (1, False), "one layer, smeared keys": (1, True), "two layers": (2, False)}


def build(vocabulary: int, length: int, width: int, layers: int, heads: int, seed: int, *, smear: bool = False):
    bias = models.Spec(nn.RelativePositionBias)
    spec = models.Spec(nn.MultiHeadAttention, heads=heads, mask=Causal(), position=None, bias=bias, smear=smear)
    sizes: dict[str, Any] = {"vocabulary": vocabulary, "length": length, "width": width, "layers": layers}
    return decoders.build(spec, **sizes, hidden=None, seed=seed)


def drawn(task: Any, name: str) -> Drawn:
    """Batches of a task, in which every token counts, also where nothing can be known."""

    def draw(key, rows):
        prompt = task.sample(key, rows)
        return prompt.tokens() | {"weights": jnp.ones(prompt.y.shape), "known": prompt.weights}

    return Drawn(draw, task.length, name)


def chains(config: Config, name: str, seed: int, folder, console) -> models.Transformer:
    layers, smear = KINDS[name]
    steps = config.chain_steps if layers > 1 else config.single_steps
    task = icl.MarkovChain(config.states, config.chain)
    model, _ = decoders.train(
        build(config.states + 1, config.chain, config.chain_width, layers, 1, seed, smear=smear),
        drawn(task, json.dumps({"states": config.states, "length": config.chain})),
        steps=steps,
        batch_size=config.batch_size,
        eval_every=max(steps // 10, 1),
        eval_batches=2,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"kind": name, "states": config.states, "width": config.chain_width},
        folder=folder / f"chains_{name}".replace(" ", "_").replace(",", ""),
        console=console,
    )
    model.eval()
    return model


def by_position(model: models.Transformer, batch: Any, **options: Any) -> jax.Array:
    """The mean loss at each position."""
    return OF_TOKENS(model(batch["tokens"], **options)[0], batch["targets"]).mean(0)


def looks(config: Config):
    """What is measured of every head while the model of blocks learns: name -> number, as the log keeps numbers."""
    fixed = blocks(config, config.probe).sample(jax.random.key(0), 64).x[:, : 2 * config.probe + 1]
    batch = drawn(blocks(config), "").draw(jax.random.key(1), 128)

    def look(model, _):
        losses = OF_TOKENS(model(batch["tokens"])[0], batch["targets"])
        known = (losses * batch["known"]).sum() / batch["known"].sum()
        numbers = {"known": known, "score": icl.icl_score(losses.mean(0))}
        prefix = analysis.prefix_scores(model, batch["tokens"])
        curve = analysis.lag_curve(model, fixed, config.probe, config.lags)
        for layer, head in np.ndindex(prefix.shape):
            numbers[f"prefix {layer}.{head}"] = prefix[layer, head]
            numbers |= {f"lag {layer}.{head} {i}": curve[layer, head, i] for i in range(curve.shape[-1])}
        return numbers

    return look


def blocks(config: Config, period: int | None = None) -> icl.RepeatedBlock:
    shortest, longest = (config.shortest, config.longest) if period is None else (period, period)
    return icl.RepeatedBlock(config.letters, config.length, shortest, longest)


def learn_blocks(config: Config, seed: int, folder, console) -> tuple[models.Transformer, list[dict[str, float]]]:
    """(the model, what was measured of its heads at every look)."""
    task = replace(blocks(config), jump=config.jump)
    names = ("letters", "length", "shortest", "longest", "jump", "probe", "lags")
    sizes = {name: getattr(config, name) for name in names}
    model, result = decoders.train(
        build(config.letters + 1, config.length, config.width, 2, config.heads, seed, smear=config.smear),
        drawn(task, json.dumps(sizes)),
        look=looks(config),
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        eval_batches=1,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"blocks": asdict(replace(config, chain_steps=0, single_steps=0, chains=0, grid=(1, 1, 1)))},
        folder=folder / "blocks",
        console=console,
    )
    model.eval()
    seen = [line for line in result.history if "validation_known" in line]
    return model, [{name.removeprefix("validation_"): x for name, x in line.items()} for line in seen]


def halfway(steps: np.ndarray, values: np.ndarray) -> float:
    """The step at which values are first halfway from the first to the last, between measurements on a line.

    NaN where the last value is the first one.
    """
    if values[-1] == values[0]:
        return math.nan
    share = (values - values[0]) / (values[-1] - values[0])
    at = int(np.argmax(share >= 0.5))
    low, high = share[max(at - 1, 0)], share[at]
    return float(steps[at] if at == 0 else steps[at - 1] + (0.5 - low) / (high - low) * (steps[at] - steps[at - 1]))


def run(config, seed, folder, console):
    check_names("kinds", config.kinds, KINDS)
    numbers: dict[str, float | None] = {claim.number: None for claim in CLAIMS}
    chain = icl.MarkovChain(config.states, config.chain)
    known: dict[str, Any] = {
        "frequencies": icl.MarkovBayes(config.states, order=0),
        "Bayes": icl.MarkovBayes(config.states),
    }
    console.print("induction: blocks")
    learned, seen = learn_blocks(config, seed, folder, console)
    for name in config.kinds:
        console.print(f"induction: chains, {name}")
        model = chains(config, name, seed, folder, console)
        known[name] = lambda x, y, model=model: model(x)[0]
    table = icl.compare(
        chain, known, range(config.chain), jax.random.key(seed), batches=max(config.chains // 256, 1), loss=OF_TOKENS
    )
    means = {name: risk.mean for name, risk in table.risks.items()}
    rows: list[dict[str, Any]] = [
        {"predictor": "uniform", "loss": float(np.log(config.states)), "loss in the last quarter": None}
    ]
    rows[0]["loss in the last quarter"] = rows[0]["loss"]
    for name, mean in means.items():
        late = float(mean[-(config.chain // 4) :].mean())
        rows.append({"predictor": name, "loss": float(mean.mean()), "loss in the last quarter": late})
    losses = {row["predictor"]: row["loss"] for row in rows}
    for name in config.kinds:
        for other in ("Bayes", "frequencies"):
            numbers[f"chains, {name}: loss over {other}"] = losses[name] - losses[other]

    steps = np.array([line["step"] for line in seen])
    names = [f"{layer}.{head}" for layer, head in np.ndindex(2, config.heads)]
    prefix = np.array([[line[f"prefix {name}"] for name in names] for line in seen])
    count = 2 * config.lags + 1
    curves = np.array([[[line[f"lag {name} {i}"] for i in range(count)] for name in names] for line in seen])
    score = np.array([line["score"] for line in seen])
    best = int(prefix[-1].argmax())
    apart = halfway(steps, score) - halfway(steps, prefix[:, best])
    numbers |= {
        "blocks: loss of tokens seen before": seen[-1]["known"],
        "blocks: in-context score": float(score[-1]),
        "blocks: largest prefix score": float(prefix[-1, best]),
        "blocks: step at which the prefix score is halfway": halfway(steps, prefix[:, best]),
        "blocks: step at which the in-context score is halfway": halfway(steps, score),
        "blocks: time from prefix score to in-context score, share of training": apart / config.steps,
    }

    batch = drawn(blocks(config), "").draw(jax.random.key(seed + 1), 512)
    whole = float(icl.icl_score(by_position(learned, batch)))
    without = trace.sweep(lambda edits: icl.icl_score(by_position(learned, batch, edits=edits)), trace.heads(learned))
    left = np.asarray(without) / whole
    scores = analysis.head_scores(
        learned, jax.random.key(seed), vocabulary=config.letters, batch=64, period=config.length // 2 - 1,
        first=config.letters,
    )  # fmt: skip
    layer, head = divmod(best, config.heads)
    others = [left[layer, other] for other in range(config.heads) if other != head]
    numbers["blocks: score left without the induction head"] = float(left[layer, head])
    alike = (prefix[-1] > ALIKE).reshape(left.shape)
    none = analysis.without_heads(alike)
    numbers["blocks: induction heads"] = float(alike.sum())
    numbers["blocks: score left without all induction heads"] = (
        float(icl.icl_score(by_position(learned, batch, edits=none))) / whole
    )
    numbers["blocks: score left without another head of the layer"] = float(np.mean(others))

    console.print("induction: curves of recall")
    grid = analysis.cmr_grid(jax.random.key(0), *config.grid, lags=config.lags)
    every = np.asarray(jax.vmap(lambda curve: analysis.cmr_distance(curve, grid.curves))(jnp.asarray(curves[-1])))
    distances = np.array(
        [np.asarray(analysis.cmr_distance(jnp.asarray(each), grid.curves)).min() for each in curves[:, best]]
    )
    nearest = np.asarray(grid.curves)[every[best].argmin()]
    numbers["blocks: distance of the induction head from CMR"] = float(distances[-1])
    numbers["blocks: correlation of distance and prefix score"] = float(
        analysis.rank_correlation(distances, prefix[:, best])
    )
    formed = 1 + int(np.argmax(prefix[:, best] >= 0.9 * prefix[-1, best]))  # looks until the head has formed
    numbers["blocks: correlation of distance and prefix score while the head forms"] = (
        float(analysis.rank_correlation(distances[:formed], prefix[:formed, best])) if formed > 2 else None
    )
    for name, value in zip(("β_enc", "β_rec", "γ"), grid.parameters[every[best].argmin()], strict=True):
        numbers[f"blocks: nearest curve, {name}"] = float(value)
    heads: list[dict[str, Any]] = [
        {
            "head": f"layer {number}, rank {rank + 1}",
            "prefix score": float(prefix[-1][place]),
            "previous token": float(scores.previous[divmod(place, config.heads)]),
            "score left without it": float(left[divmod(place, config.heads)]),
            "distance from CMR": float(every[place].min()),
        }
        for number in range(2)
        for rank, place in enumerate(
            sorted(range(number * config.heads, (number + 1) * config.heads), key=lambda place: -prefix[-1][place])
        )
    ]
    asked = np.arange(-config.lags, config.lags + 1)
    ours, theirs = curves[-1, best] - curves[-1, best].min(), nearest - nearest.min()
    lines = {"induction head": ours, "nearest curve of CMR": theirs * ours.max() / theirs.max()}
    if config.heads > 1:
        beside = next(place for place in range(len(names)) if place // config.heads == layer and place != best)
        lines["another head of the layer"] = curves[-1, beside] - curves[-1, beside].min()
    late = min(len(seen), 2 * int(np.argmax(steps >= halfway(steps, score))) + 2)

    def over(values: np.ndarray) -> list[tuple[float, float]]:
        return list(zip(steps[:late].tolist(), values[:late].tolist(), strict=True))

    return Result(
        numbers,
        {"Chains": rows, "Heads": heads},
        {
            "Loss on chains by position": Curves(
                "position", "nats", {n: list(enumerate(mean.tolist())) for n, mean in means.items()}
            ),
            "Heads and learning in context": Curves(
                "step",
                "share",
                {
                    "prefix score of the induction head": over(prefix[:, best]),
                    "in-context score, over its last": over(score / score[-1]),
                    "distance from CMR, up to 1": over(np.minimum(distances, 1)),
                },
            ),
            "Lags": Curves(
                "lag from the earlier copy",
                "weight, less the least",
                {name: list(zip(asked.tolist(), line.tolist(), strict=True)) for name, line in lines.items()},
            ),
            "Score left without a head": Maps({"all heads": left.tolist()}, y="layer", x="head"),
        },
    )
