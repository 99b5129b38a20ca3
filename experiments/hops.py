"""Lookups of lookups: how many layers so many hops take, and whether they are learned without easier ones.

A prompt shows a permutation as pairs in random order, and asks where h steps from a symbol lead. The decoder is causal,
so that a token sees the pairs before it alone. In training h is either drawn anew for every prompt, which makes a
curriculum of itself, or always the largest.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from experiments import decoders
from jaxattn import icl, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most
from jaxattn.train import Drawn, OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=50, final_fraction=0.0, weight_decay=0.0)


@dataclass(frozen=True)
class Config:
    """Decoders of 1, 2 and 3 layers, with a learned vector for each position.

    Attributes:
        symbols: Symbols of a permutation.
        hops: The largest number of hops.
        layers: Numbers of layers.
        width: Width of the models.
        heads: Heads per layer.
        steps: Training steps.
        batch_size: Prompts per step.
        eval_every: Steps between measurements.
        tested: Prompts per number of hops that accuracies are measured on.
        optimizer: The optimiser.
    """

    symbols: int = 6
    hops: int = 2
    layers: tuple[int, ...] = (1, 2, 3)
    width: int = 64
    heads: int = 2
    steps: int = 5000
    batch_size: int = 128
    eval_every: int = 200
    tested: int = 1024
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(
    symbols=3,
    layers=(1,),
    width=16,
    steps=20,
    batch_size=16,
    eval_every=10,
    tested=64,
    optimizer=replace(OPTIMIZER, warmup_steps=2),
)

PAPER = "retrieval_depth"
CLAIMS = (
    Claim(
        "One layer cannot follow one hop, which is two links away: it is right in at most 60 percent.",
        paper=PAPER,
        number="1 layer, all hops: accuracy after 1 hop",
        confirmed=at_most(0.6),
        refuted=at_least(0.95),
    ),
    Claim(
        "Two layers can, in 95 percent or more.",
        paper=PAPER,
        number="2 layers, all hops: accuracy after 1 hop",
        confirmed=at_least(0.95),
        refuted=at_most(0.6),
    ),
    Claim(
        "Two hops take more layers where tokens see earlier pairs alone: three layers are ahead of two by 10 points or "
        "more.",
        paper=PAPER,
        number="accuracy after 2 hops gained by a third layer",
        confirmed=at_least(0.1),
        refuted=at_most(-0.1),
    ),
    Claim(
        "Without easier prompts nothing but the shortcut is learned: after 2 hops three layers are right in at most 40 "
        "percent, where answering with the symbol itself is right in a third.",
        paper=PAPER,
        number="3 layers, most hops: accuracy after 2 hops",
        confirmed=at_most(0.4),
        refuted=at_least(0.6),
    ),
    Claim(
        "With easier ones among them it is: 20 points more.",
        paper=PAPER,
        number="accuracy after 2 hops gained by easier prompts, 3 layers",
        confirmed=at_least(0.2),
        refuted=at_most(0.0),
    ),
    Claim(
        "Hops are learned in their order: with three layers, one hop is at 90 percent before two are at 50.",
        paper=PAPER,
        number="3 layers, all hops: steps from 1 hop at 0.9 to 2 hops at 0.5",
        confirmed=at_least(0),
        refuted=at_most(-200),
    ),
)

# Name -> whether hops are drawn anew for every prompt.
PROMPTS = {"all hops": True, "most hops": False}


def task(config: Config, hops: int, mixed: bool) -> icl.RetrievalChain:
    return icl.RetrievalChain(config.symbols, hops, mixed=mixed)


def looks(config: Config):
    """The accuracy by number of hops."""
    asked = {
        hops: task(config, hops, False).sample(jax.random.key(hops), config.tested)
        for hops in range(1, config.hops + 1)
    }

    def look(model, batch):
        answers = {hops: model(prompt.x)[0][:, -1].argmax(-1) for hops, prompt in asked.items()}
        return {f"hops {hops}": (answers[hops] == prompt.y[:, -1]).mean() for hops, prompt in asked.items()}

    return look


def learn(config: Config, layers: int, prompts: str, seed: int, folder, console) -> dict[int, list[Any]]:
    """Hops -> (step, accuracy) at every measurement."""
    of = task(config, config.hops, PROMPTS[prompts])
    model = decoders.build(
        models.Spec(nn.MultiHeadAttention, heads=config.heads, position=None),
        vocabulary=config.symbols + config.hops,
        length=of.length,
        width=config.width,
        layers=layers,
        positions=models.Spec(nn.PositionEmbedding),
        seed=seed,
    )
    _, result = decoders.train(
        model,
        Drawn(lambda key, rows: of.sample(key, rows).tokens(), of.length, repr(of)),
        look=looks(config),
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        eval_batches=1,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"layers": layers, "prompts": prompts, "hops": asdict(replace(config, layers=()))},
        folder=folder / f"{layers}_{prompts}".replace(" ", "_"),
        console=console,
    )
    return {hops: decoders.measured(result, f"hops {hops}") for hops in range(1, config.hops + 1)}


def run(config, seed, folder, console):
    numbers: dict[str, Any] = {claim.number: None for claim in CLAIMS}
    rows, lines = [], {}
    for layers in config.layers:
        for prompts in PROMPTS:
            name = f"{layers} layer{'s' if layers > 1 else ''}, {prompts}"
            console.print(f"hops: {name}")
            lines[name] = learn(config, layers, prompts, seed, folder, console)
            ends = {f"accuracy after {hops} hop{'s' if hops > 1 else ''}": x[-1][1] for hops, x in lines[name].items()}
            numbers |= {f"{name}: {what}": x for what, x in ends.items()}
            sees = f"{icl.horizon(layers)} links, {icl.horizon(layers) // 2} hops"
            rows.append({"layers": layers, "trained on": prompts, "reach": sees} | ends)
    for name, (one, other) in {
        "accuracy after 2 hops gained by a third layer": ("3 layers, all hops", "2 layers, all hops"),
        "accuracy after 2 hops gained by easier prompts, 3 layers": ("3 layers, all hops", "3 layers, most hops"),
    }.items():
        pair: list[Any] = [numbers.get(f"{each}: accuracy after 2 hops") for each in (one, other)]
        numbers[name] = None if None in pair else pair[0] - pair[1]
    if "3 layers, all hops" in lines:
        learned = lines["3 layers, all hops"]
        marks: list[Any] = [decoders.first_step(learned[hops], level) for hops, level in ((1, 0.9), (2, 0.5))]
        numbers |= {"3 layers: step of 1 hop at 0.9": marks[0], "3 layers: step of 2 hops at 0.5": marks[1]}
        if None not in marks:
            numbers["3 layers, all hops: steps from 1 hop at 0.9 to 2 hops at 0.5"] = marks[1] - marks[0]
    shortcut = icl.echo_accuracy(config.symbols, config.hops)
    numbers["accuracy of the shortcut after 2 hops"] = shortcut if config.hops == 2 else None
    flat = [(float(config.eval_every), shortcut), (float(config.steps), shortcut)]
    return Result(
        numbers,
        {"Accuracy by hops": rows},
        {
            f"After {hops} hop{'s' if hops > 1 else ''}": Curves(
                "step",
                "accuracy",
                {name: line[hops] for name, line in lines.items()}
                | ({"the symbol itself": flat} if hops == config.hops else {}),
            )
            for hops in range(1, config.hops + 1)
        },
    )
