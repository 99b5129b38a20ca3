"""Needles in a haystack: what attention in a window finds with Titans' memory beside it, also in longer haystacks.

A haystack holds four pairs of a key and a value among other tokens, and asks for the values at its end. Two layers
learn to answer: with softmax attention, a window alone, Titans' memory alone, and the memory joined to a window in
three ways. The trained models then read haystacks of 2 and 4 times the length.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments import decoders
from jaxattn import Window, models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_names
from jaxattn.train import Drawn, OptimizerConfig

WINDOW = 16
MEMORY = models.Spec(nn.NeuralMemory, heads=2, hidden=(), inner_batch=8)
MIXERS: dict[str, models.Spec] = {
    "softmax": models.Spec(nn.MultiHeadAttention, heads=2, convolution=3),
    "window": models.Spec(nn.MultiHeadAttention, heads=2, mask=Window(WINDOW - 1), convolution=3),
    "memory alone": MEMORY,
    "memory as gate": models.Spec(nn.memory_as_gate, heads=2, window=WINDOW, persistent=2, memory=MEMORY),
    "memory as layer": models.Spec(nn.memory_as_layer, heads=2, window=WINDOW, persistent=2, memory=MEMORY),
    "memory as context": models.Spec(
        nn.MemoryAsContext, heads=2, segment=WINDOW, persistent=2, memory=MEMORY.replace(convolution=0)
    ),
    "gated DeltaNet": models.Spec(nn.DeltaNet, heads=2, key_dim=16, decay="head"),
}
TIMES = (1, 2, 4)


@dataclass(frozen=True)
class Config:
    """Two layers of one mixer and a feed-forward block each, trained on fresh haystacks of the first length.

    Attributes:
        mixers: Names in `MIXERS`.
        needles: Key-value pairs in a haystack, each asked for at its end.
        length: Tokens of a haystack in training, its questions included; the trained model reads 4 times as many.
        keys: Different keys.
        values: Different values.
        letters: Different tokens of hay.
        width: Width of the model.
        layers: Number of layers.
        steps: Training steps.
        batch_size: Haystacks per step.
        eval_every: Steps between measurements of the accuracy.
        eval_batches: Batches per measurement.
        optimizer: The optimiser.
    """

    mixers: tuple[str, ...] = tuple(MIXERS)
    needles: int = 4
    length: int = 96
    keys: int = 16
    values: int = 16
    letters: int = 16
    width: int = 64
    layers: int = 2
    steps: int = 600
    batch_size: int = 32
    eval_every: int = 50
    eval_batches: int = 4
    optimizer: OptimizerConfig = decoders.OPTIMIZER


QUICK = Config(
    mixers=("memory as context",),
    needles=2,
    length=16,
    keys=4,
    values=4,
    letters=2,
    width=16,
    layers=1,
    steps=20,
    eval_every=10,
    eval_batches=2,
    optimizer=replace(decoders.OPTIMIZER, warmup_steps=5),
)


def _gains(wiring: str) -> Claim:
    return Claim(
        f"{wiring[0].upper()}{wiring[1:]} finds needles that its window does not reach: 30 points more than the window "
        "without it.",
        paper="titans",
        number=f"{wiring}: accuracy gained over the window",
        confirmed=at_least(0.3),
        refuted=at_most(0.0),
    )


CLAIMS = (
    _gains("memory as gate"),
    _gains("memory as layer"),
    _gains("memory as context"),
    Claim(
        "Memory as context still finds them in haystacks 4 times as long as in training: 90 percent.",
        paper="titans",
        number="memory as context: accuracy at 4 times the length",
        confirmed=at_least(0.9),
    ),
    Claim(
        "Of the three wirings, memory as context finds most needles in haystacks 4 times as long.",
        paper="titans",
        number="memory as context over the best of the others: accuracy at 4 times the length",
        confirmed=at_least(0.0),
        refuted=at_most(-0.02),
    ),
    Claim(
        "Attention finds needles beside the memory that the memory alone does not: as gate, more than alone.",
        paper="titans",
        number="memory as gate over the memory alone: accuracy",
        confirmed=at_least(0.01),
        refuted=at_most(-0.02),
    ),
)


def needle_batch(
    key: jax.Array, rows: int, *, length: int, needles: int, keys: int, values: int, letters: int
) -> dict[str, jax.Array]:
    """Hay with pairs k v in it, at any place, and at its end the keys in another order: each one's target is its value.

    Tokens 0 .. keys − 1 are keys, then come values, then hay. Keys of a row differ. The hay before the questions is cut
    into slots of two tokens, and each needle takes one. As `next_token_loss` takes them.
    """
    for_keys, for_values, for_hay, for_slots, for_order = jax.random.split(key, 5)
    asked = jax.random.uniform(for_keys, (rows, keys)).argsort(-1)[:, :needles]
    answers = keys + jax.random.randint(for_values, (rows, needles), 0, values)
    tokens = keys + values + jax.random.randint(for_hay, (rows, length), 0, letters)
    slots = jax.random.uniform(for_slots, (rows, (length - needles) // 2)).argsort(-1)[:, :needles]
    order = jax.random.uniform(for_order, (rows, needles)).argsort(-1)
    row, last = jnp.arange(rows)[:, None], slice(length - needles, length)
    tokens = tokens.at[row, 2 * slots].set(asked).at[row, 2 * slots + 1].set(answers)
    tokens = tokens.at[:, last].set(jnp.take_along_axis(asked, order, 1))
    targets = jnp.zeros_like(tokens).at[:, last].set(jnp.take_along_axis(answers, order, 1))
    return {"tokens": tokens, "targets": targets, "weights": jnp.zeros((rows, length)).at[:, last].set(1.0)}


def task(config: Config, times: int = 1) -> Drawn:
    """Haystacks of `times` the length of training. Raises ValueError for needles that do not fit."""
    if config.needles > config.keys or 3 * config.needles > config.length:
        raise ValueError(
            f"needles is {config.needles} for {config.keys} keys and a length of {config.length}: need no more than "
            "keys, and 3 tokens for each"
        )
    options = {name: getattr(config, name) for name in ("needles", "keys", "values", "letters")}
    draw = partial(needle_batch, length=times * config.length, **options)
    return Drawn(draw, times * config.length, json.dumps(draw.keywords))


def accuracy(config: Config, model: models.Transformer, times: int, seed: int) -> float:
    """The share of right answers in fresh haystacks of `times` the length of training."""

    @jax.jit
    def one(key):
        batch = task(config, times).draw(key, config.batch_size)
        logits, *_ = model(batch["tokens"])
        right = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
        return right.sum() / batch["weights"].sum()

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), times), 2 * config.eval_batches)
    return sum(float(one(key)) for key in keys) / len(keys)


def run(config, seed, folder, console):
    check_names("mixers", config.mixers, MIXERS)
    found: dict[str, dict[int, float]] = {}
    rows: list[dict[str, Any]] = []
    learning = {}
    for name in config.mixers:
        console.print(f"needle: {name}")
        sizes = {"length": TIMES[-1] * config.length, "width": config.width, "layers": config.layers, "seed": seed}
        vocabulary = config.keys + config.values + config.letters
        model, result = decoders.train(
            decoders.build(MIXERS[name], vocabulary=vocabulary, **sizes),
            task(config),
            steps=config.steps,
            batch_size=config.batch_size,
            eval_every=config.eval_every,
            eval_batches=config.eval_batches,
            optimizer=config.optimizer,
            seed=seed,
            run_config={"mixer": repr(MIXERS[name]), "needle": asdict(config) | {"mixers": None}},
            folder=folder / name.replace(" ", "_"),
            console=console,
        )
        learning[name] = decoders.measured(result, "correct")
        found[name] = {times: accuracy(config, model, times, seed) for times in TIMES}
        rows.append({"mixer": name} | {f"accuracy at {t} times the length": found[name][t] for t in TIMES})

    def over(first: str, *others: str, times: int = 1) -> float | None:
        if not {first, *others} <= found.keys():
            return None
        return found[first][times] - max(found[other][times] for other in others)

    numbers: dict[str, float | None] = {
        f"{name}: accuracy at {times} times the length": found.get(name, {}).get(times)
        for name in MIXERS
        for times in TIMES
    }
    wirings = [name for name in MIXERS if name.startswith("memory as")]
    numbers |= {f"{name}: accuracy gained over the window": over(name, "window") for name in wirings}
    numbers["memory as context over the best of the others: accuracy at 4 times the length"] = over(
        "memory as context", "memory as gate", "memory as layer", times=4
    )
    numbers["memory as gate over the memory alone: accuracy"] = over("memory as gate", "memory alone")
    lengths = {name: [(times * config.length, found[name][times]) for times in TIMES] for name in found}
    return Result(
        numbers,
        {"Needles found": rows},
        {
            "Accuracy against step": Curves("step", "accuracy", learning),
            "Accuracy against length": Curves("tokens of the haystack", "accuracy", lengths, log="x"),
        },
    )
