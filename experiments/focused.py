"""Focused Transformer: attention that learns among other texts finds its own context among many, and else does not."""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments import decoders
from experiments.experiment import Claim, Curves, Result, at_least, at_most, within
from jaxattn import Causal, models, nn
from jaxattn.core.attend.measure import Mass
from jaxattn.core.numeric import ratio
from jaxattn.train import Drawn, OptimizerConfig

OPTIMIZER = replace(decoders.OPTIMIZER, learning_rate=2e-3, warmup_steps=100)


@dataclass(frozen=True)
class Config:
    """One layer of attention without positions and a feed-forward block, trained on texts of two windows.

    The first window of a text holds pairs, a key and its value in one token. The second asks for all of them. Keys are
    unit vectors of random direction, so that no two texts share one.

    Attributes:
        contexts: Numbers of first windows that a second one sees in training, its own among them.
        pairs: Pairs in a text: tokens of a window.
        key_dim: Channels of a key.
        values: Different values.
        width: Width of the model.
        steps: Training steps.
        texts: Texts per step.
        most: The most contexts that the trained model sees, a power of two.
        measured: Texts per measurement.
        eval_every: Steps between measurements of the accuracy in training.
        optimizer: The optimiser.
    """

    contexts: tuple[int, ...] = (1, 2, 8)
    pairs: int = 32
    key_dim: int = 16
    values: int = 16
    width: int = 64
    steps: int = 800
    texts: int = 32
    most: int = 256
    measured: int = 8
    eval_every: int = 50
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(
    contexts=(1, 2),
    pairs=4,
    key_dim=8,
    values=4,
    width=16,
    steps=40,
    texts=8,
    most=4,
    measured=4,
    eval_every=20,
    optimizer=replace(OPTIMIZER, warmup_steps=5),
)

CLAIMS = (
    Claim(
        "Attention that has only ever seen its own context takes others for it: among 64 contexts its own gets 1/64 of "
        "the weight, within a factor of 2.",
        paper="fot",
        number="trained with 1: share of the own context among 64, times 64",
        confirmed=within(0.5, 2.0),
        refuted=at_least(4.0),
    ),
    Claim(
        "So accuracy falls: with 256 contexts it is 30 points lower than with its own alone, or more.",
        paper="fot",
        number="trained with 1: accuracy lost from 1 to 256 contexts",
        confirmed=at_least(0.3),
        refuted=at_most(0.05),
    ),
    Claim(
        "Trained among 8 contexts accuracy is nearly flat: with 256 contexts it is 5 points lower at most.",
        paper="fot",
        number="trained with 8: accuracy lost from 1 to 256 contexts",
        confirmed=at_most(0.05),
        refuted=at_least(0.2),
    ),
    Claim(
        "Attention trained among 8 contexts is less distracted than attention trained with its own alone: among 64 "
        "contexts the own one gets twice the share of weight, or more.",
        paper="fot",
        number="share of the own context among 64: trained with 8 over trained with 1",
        confirmed=at_least(2.0),
        refuted=at_most(1.0),
    ),
)


def draw(key: jax.Array, rows: int, *, pairs: int, key_dim: int, values: int) -> dict[str, jax.Array]:
    """Rows 2i and 2i + 1 are the two windows of a text: pairs, and questions for them in another order.

    An input is a key, a one-hot value (0 in a question), and 1 in a question. As `next_token_loss` takes them.
    """
    of_keys, of_values, of_order = jax.random.split(key, 3)
    keys = jax.random.normal(of_keys, (rows // 2, pairs, key_dim))
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    answers = jax.random.randint(of_values, (rows // 2, pairs), 0, values)
    order = jax.random.uniform(of_order, (rows // 2, pairs)).argsort(-1)
    asked = jnp.take_along_axis(keys, order[..., None], 1)
    shown = jnp.concatenate([keys, jax.nn.one_hot(answers, values), jnp.zeros((*answers.shape, 1))], -1)
    asks = jnp.concatenate([asked, jnp.zeros((*answers.shape, values)), jnp.ones((*answers.shape, 1))], -1)
    answers = jnp.take_along_axis(answers, order, 1)

    def by_turns(first, second):
        return jnp.stack([first, second], 1).reshape(rows, *first.shape[1:])

    return {
        "tokens": by_turns(shown, asks),
        "targets": by_turns(jnp.zeros_like(answers), answers),
        "weights": by_turns(jnp.zeros(answers.shape), jnp.ones(answers.shape)),
    }


def task(config: Config) -> Drawn:
    sizes = {name: getattr(config, name) for name in ("pairs", "key_dim", "values")}
    return Drawn(partial(draw, **sizes), config.pairs, json.dumps(sizes))


def build(config: Config, contexts: int, seed: int) -> models.Transformer:
    """The model whose second windows see, in training, the first ones of `contexts` texts: 1, 3, 5 ... rows up."""
    offsets = tuple(range(1, 2 * contexts, 2))
    mixer = models.Spec(nn.MultiHeadAttention, heads=2, position=None, mask=Causal(), crossbatch=offsets)
    sizes: dict[str, Any] = {"width": config.width, "layers": 1, "length": 2 * config.pairs, "seed": seed}
    return decoders.build(mixer, vocabulary=config.values, inputs=config.key_dim + config.values + 1, **sizes)


def measure(config: Config, model: models.Transformer, contexts: int, seed: int) -> tuple[float, float]:
    """(accuracy, share of the own context in the weight on contexts) of questions behind so many first windows.

    The layer has no positions, so that windows in one row are what windows in a memory are.
    """
    pairs = config.pairs
    group = jnp.repeat(jnp.array([1] * (contexts - 1) + [0, 2]), pairs)  # other contexts, the own one, questions

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch = task(config).draw(key, 2 * contexts)
        row = jnp.concatenate([batch["tokens"][::2], batch["tokens"][-1:]]).reshape(1, -1, batch["tokens"].shape[-1])
        logits, _, records = model(row, record={"mass": ("weights", Mass(group, 3))})
        right = (logits[0, -pairs:].argmax(-1) == batch["targets"][-1]).mean()
        own, others = records["mass"][0, 0, -pairs:, :, 0], records["mass"][0, 0, -pairs:, :, 1]
        return right, ratio(own, own + others).mean()

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), contexts), config.measured)
    accuracy, share = jax.jit(lambda keys: jax.lax.map(one, keys))(keys)
    return float(accuracy.mean()), float(share.mean())


def run(config, seed, folder, console):
    counts = [2**n for n in range(config.most.bit_length()) if 2**n <= config.most]
    accuracy: dict[str, list[tuple[float, float]]] = {}
    share: dict[str, list[tuple[float, float]]] = {}
    learning, rows = {}, []
    for contexts in config.contexts:
        name = f"trained with {contexts}"
        console.print(f"focused: {name}")
        model, result = decoders.train(
            build(config, contexts, seed),
            task(config),
            steps=config.steps,
            batch_size=2 * config.texts,
            eval_every=config.eval_every,
            eval_batches=4,
            optimizer=config.optimizer,
            seed=seed,
            run_config={"contexts": contexts, "focused": asdict(config) | {"contexts": None}},
            folder=folder / f"{contexts}",
            console=console,
        )
        learning[name] = decoders.measured(result, "correct")
        model.eval()
        found = {count: measure(config, model, count, seed) for count in counts}
        accuracy[name] = [(count, each[0]) for count, each in found.items()]
        share[name] = [(count, each[1]) for count, each in found.items()]
        for count, (right, own) in found.items():
            rows.append({"model": name, "contexts": count, "accuracy": right, "share of the own": own})

    def at(lines: dict[str, Any], contexts: int, count: int) -> float | None:
        return dict(lines.get(f"trained with {contexts}", ())).get(count)

    numbers: dict[str, float | None] = {
        f"{name}: accuracy with {count} contexts": value for name in accuracy for count, value in accuracy[name]
    }
    numbers |= {f"{name}: share of the own among {count}": value for name in share for count, value in share[name]}
    for contexts in (1, 8):
        first, last = at(accuracy, contexts, 1), at(accuracy, contexts, 256)
        name = f"trained with {contexts}: accuracy lost from 1 to 256 contexts"
        numbers[name] = None if first is None or last is None else first - last
    alone, among = at(share, 1, 64), at(share, 8, 64)
    name = "trained with 1: share of the own context among 64, times 64"
    numbers[name] = None if alone is None else 64 * alone
    name = "share of the own context among 64: trained with 8 over trained with 1"
    numbers[name] = None if alone is None or among is None else among / alone
    even = [(count, 1 / count) for count in counts]
    return Result(
        numbers,
        {"Among other contexts": rows},
        {
            "Accuracy against contexts": Curves("contexts", "accuracy", accuracy, log="x"),
            "Share of the own context": Curves(
                "contexts", "share of the weight on contexts", share | {"1 / contexts": even}, log="xy"
            ),
            "Accuracy in training": Curves("step", "accuracy among the contexts of training", learning),
        },
    )
