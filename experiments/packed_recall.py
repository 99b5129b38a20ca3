"""Stores on recall: one layer of attention learns to look up pairs, and then keeps or reads a part of what it has seen.

A text shows pairs, a key and its value in one token, and then asks for them, one question after the other. All pairs
are asked for alike, or a few of them often. The layer is trained with all that it has seen, and decodes under policies
of equal budgets.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import decoders
from jaxattn import Causal, models, nn
from jaxattn.cache import Attentive, HeavyHitters, MeanKeys, Policy, Quest, Recent, SnapKV
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_names
from jaxattn.train import Drawn, OptimizerConfig

ALIKE, OFTEN = "all alike", "a few often"
OPTIMIZER = replace(decoders.OPTIMIZER, learning_rate=2e-3, warmup_steps=100)


@dataclass(frozen=True)
class Config:
    """One layer of attention without positions and a feed-forward block.

    Attributes:
        pairs: Pairs in a text.
        questions: Questions in a text.
        prompt: Questions that come with the pairs at once; the others come one by one.
        power: A few pairs are asked for often: the i-th with probability ∝ i^−power, in an order that each text draws.
        key_dim: Channels of a key, a unit vector of random direction.
        values: Different values.
        parts: A budget is one such part of the text.
        page: Slots per page, of policies that read pages.
        policies: Names of policies.
        width: Width of the model.
        steps: Training steps.
        batch_size: Texts per step.
        measured: Texts per measurement.
        eval_every: Steps between measurements of the accuracy in training.
        optimizer: The optimiser.
    """

    pairs: int = 32
    questions: int = 64
    prompt: int = 8
    power: float = 1.5
    key_dim: int = 16
    values: int = 16
    parts: tuple[int, ...] = (16, 8, 4, 2)
    page: int = 2
    policies: tuple[str, ...] = (
        "recent",
        "heavy hitters",
        "SnapKV",
        "attended to last",
        "attended to most",
        "Quest",
        "mean keys",
    )
    width: int = 64
    steps: int = 800
    batch_size: int = 32
    measured: int = 64
    eval_every: int = 50
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(
    pairs=8,
    questions=8,
    prompt=2,
    values=4,
    parts=(4,),
    policies=("recent", "heavy hitters", "Quest"),
    width=16,
    steps=40,
    batch_size=8,
    measured=4,
    eval_every=20,
    optimizer=replace(OPTIMIZER, warmup_steps=5),
)
QUARTER = ", at 1/4"
CLAIMS = (
    Claim(
        "Where a few pairs are asked for often, what got the most attention is worth keeping: heavy hitters are 20 "
        "points more accurate than the most recent tokens, or more.",
        paper="h2o",
        number=f"heavy hitters − recent, {OFTEN}{QUARTER}",
        confirmed=at_least(0.2),
        refuted=at_most(0),
    ),
    Claim(
        "So is what was attended to last: 20 points more than the most recent tokens, or more.",
        paper="attendre",
        number=f"attended to last − recent, {OFTEN}{QUARTER}",
        confirmed=at_least(0.2),
        refuted=at_most(0),
    ),
    Claim(
        "And what was attended to most often: 20 points more than the most recent tokens, or more.",
        paper="attendre",
        number=f"attended to most − recent, {OFTEN}{QUARTER}",
        confirmed=at_least(0.2),
        refuted=at_most(0),
    ),
    Claim(
        "Where all pairs are asked for alike, the past does not say which: with an eighth of the tokens, 12 for 32 "
        "pairs, heavy hitters keep at most half of the accuracy.",
        paper="h2o",
        number=f"heavy hitters over all, {ALIKE}, at 1/8",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "Pages that are chosen for each question lose little then: Quest keeps nine tenths of the accuracy, or more.",
        paper="quest",
        number=f"Quest over all, {ALIKE}{QUARTER}",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
)


def draw(
    key: jax.Array, rows: int, *, pairs: int, questions: int, key_dim: int, values: int, power: float
) -> dict[str, jax.Array]:
    """Texts, as `next_token_loss` takes them. An input is a key, its value (0 in a question), and 1 in a question."""
    of_keys, of_values, of_order, of_asked = jax.random.split(key, 4)
    keys = jax.random.normal(of_keys, (rows, pairs, key_dim))
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    answers = jax.random.randint(of_values, (rows, pairs), 0, values)
    order = jax.random.uniform(of_order, (rows, pairs)).argsort(-1)
    ranks = jax.random.categorical(of_asked, -power * jnp.log1p(jnp.arange(pairs)), shape=(rows, questions))
    asked = jnp.take_along_axis(order, ranks, 1)
    shown = jnp.concatenate([keys, jax.nn.one_hot(answers, values), jnp.zeros((rows, pairs, 1))], -1)
    asks = jnp.take_along_axis(keys, asked[..., None], 1)
    asks = jnp.concatenate([asks, jnp.zeros((rows, questions, values)), jnp.ones((rows, questions, 1))], -1)
    return {
        "tokens": jnp.concatenate([shown, asks], 1),
        "targets": jnp.concatenate([jnp.zeros_like(answers), jnp.take_along_axis(answers, asked, 1)], 1),
        "weights": jnp.concatenate([jnp.zeros((rows, pairs)), jnp.ones((rows, questions))], 1),
    }


def task(config: Config, power: float = 0.0) -> Drawn:
    sizes = {name: getattr(config, name) for name in ("pairs", "questions", "key_dim", "values")} | {"power": power}
    return Drawn(partial(draw, **sizes), config.pairs + config.questions, json.dumps(sizes))


def policies(config: Config) -> dict[str, dict[int, Policy]]:
    """The policies by name and part. Without positions there are no sinks, and neighbours mean nothing."""
    length = config.pairs + config.questions
    recent = max(1, length // (2 * max(config.parts)))
    kept = {
        "recent": Recent(0),
        "heavy hitters": HeavyHitters(0, recent),
        "SnapKV": SnapKV(recent, 1, 0),
        "attended to last": Attentive("last", 1, 0, recent),
        "attended to most": Attentive("count", 1, 0, recent),
    }
    found = {name: {part: Policy(retain, length // part) for part in config.parts} for name, retain in kept.items()}
    for name, select in (("Quest", Quest), ("mean keys", MeanKeys)):
        found[name] = {part: Policy(select=select(length // part // config.page, config.page)) for part in config.parts}
    check_names("policies", config.policies, found)
    return {name: found[name] for name in config.policies}


@nnx.jit(static_argnames="prompt")
def accuracy(model: models.Transformer, batch: dict[str, jax.Array], policy: Policy, *, prompt: int) -> jax.Array:
    """The share of right answers to the questions that come one by one, behind `prompt` tokens at once."""
    tokens, (rows, length) = batch["tokens"], batch["targets"].shape
    _, state, _ = model(tokens[:, :prompt], positions=jnp.arange(prompt), state=model.init_state(rows, length, policy))

    def step(state: Any, piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        token, target, at = piece
        logits, state, _ = model(token[:, None], positions=at[None], state=state)
        return state, logits[:, 0].argmax(-1) == target

    pieces = tokens[:, prompt:].swapaxes(0, 1), batch["targets"][:, prompt:].T, jnp.arange(prompt, length)
    return jax.lax.scan(step, state, pieces)[1].mean()


def run(config, seed, folder, console):
    length = config.pairs + config.questions
    if any(length % (part * config.page) for part in config.parts):
        raise ValueError(
            f"a text has {length} tokens: need a multiple of page times part, {config.page} x {config.parts}"
        )
    compared = policies(config)
    mixer = models.Spec(nn.MultiHeadAttention, heads=2, position=None, mask=Causal())
    sizes = {"width": config.width, "layers": 1, "length": length, "seed": seed}
    model, result = decoders.train(
        decoders.build(mixer, vocabulary=config.values, inputs=config.key_dim + config.values + 1, **sizes),
        task(config),
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        eval_batches=4,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"packed_recall": asdict(config) | {"policies": None, "parts": None}},
        folder=folder,
        console=console,
    )
    model.eval()
    found: dict[tuple[str, str, int], float] = {}
    for stream, power in ((ALIKE, 0.0), (OFTEN, config.power)):
        batch = task(config, power).draw(jax.random.fold_in(jax.random.key(seed), 1), config.measured)
        prompt = config.pairs + config.prompt
        found["all", stream, 1] = float(accuracy(model, batch, Policy(), prompt=prompt))
        for name, by_part in compared.items():
            console.print(f"packed_recall: {stream}, {name}")
            for part, policy in by_part.items():
                found[name, stream, part] = float(accuracy(model, batch, policy, prompt=prompt))
    return results(config, found, decoders.measured(result, "correct"))


def results(config: Config, found: dict[tuple[str, str, int], float], learning: Any) -> Result:
    """Numbers, tables and figures of accuracies by policy, stream and part."""

    def at(name: str, stream: str, part: int = 4) -> float | None:
        return found.get((name, stream, part))

    def less(name: str, other: str, stream: str) -> float | None:
        one, two = at(name, stream), at(other, stream)
        return None if one is None or two is None else one - two

    def over_all(name: str, part: int) -> float | None:
        one = at(name, ALIKE, part)
        return None if one is None else one / max(found["all", ALIKE, 1], 1 / config.values)

    numbers: dict[str, float | None] = {
        f"{name} − recent, {OFTEN}{QUARTER}": less(name, "recent", OFTEN)
        for name in ("heavy hitters", "attended to last", "attended to most")
    }
    numbers[f"heavy hitters over all, {ALIKE}, at 1/8"] = over_all("heavy hitters", 8)
    numbers[f"Quest over all, {ALIKE}{QUARTER}"] = over_all("Quest", 4)
    numbers |= {f"accuracy of all, {stream}": found["all", stream, 1] for stream in (ALIKE, OFTEN)}
    rows: list[dict[str, Any]] = [
        {"policy": name, "share": 1 / part}
        | {stream: value for (other, stream, of), value in found.items() if (other, of) == (name, part)}
        for name, part in dict.fromkeys((name, part) for name, _, part in found)
    ]
    parts = sorted(config.parts, reverse=True)
    lines = {
        stream: {"all": [(1 / part, found["all", stream, 1]) for part in parts]}
        | {name: [(1 / part, found[name, stream, part]) for part in parts] for name in config.policies}
        for stream in (ALIKE, OFTEN)
    }
    figures = {
        f"Accuracy by budget, {stream}": Curves("share of the tokens", "accuracy", each, log="x")
        for stream, each in lines.items()
    }
    return Result(
        numbers,
        {"Policies": rows},
        figures | {"Accuracy in training": Curves("step", "accuracy", {"all": learning})},
    )
