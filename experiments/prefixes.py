"""What a prefix can teach a trained model: tasks that it has learned, and not another pattern of attention.

A decoder of one layer sorts digits; a prefix of learned tokens, a change of rank 1 of its queries and keys, and all of
its parameters are then trained to sort the other way. A deeper decoder has learned four tasks that it cannot tell
apart, and a prefix says which one is meant.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import decoders
from jaxattn import models, nn
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_names
from jaxattn.core.part import part
from jaxattn.icl import Prompt
from jaxattn.train import OptimizerConfig, drawn, next_token_loss

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=100, final_fraction=0.1, weight_decay=0.0, beta2=0.99)
TUNING = OptimizerConfig(learning_rate=3e-3, warmup_steps=50, final_fraction=0.1, weight_decay=0.0, beta2=0.99)
KINDS = ("ascending", "descending", "plus one", "plus two", "reversed")
MIXED = KINDS[:4]
WAYS = ("prefix", "rank 1", "all")


@dataclass(frozen=True)
class Config:
    """Digits that are sorted or changed, the two decoders that do it, and how each is trained and tuned.

    Attributes:
        parts: What is measured: "sorting" by one layer, the "mixture" of tasks, or both.
        digits: Different digits.
        count: Digits of a sequence.
        width: Width of both decoders.
        layers: Layers of the second decoder.
        heads: Heads of each of these layers.
        steps: Training steps of the first decoder, and of the second.
        tuning: Steps of each tuning of the first, and of the second.
        batch_size: Sequences per step.
        eval_every: Steps between measurements.
        optimizer: The optimiser of training and of tuning all parameters.
        tuner: The optimiser of prefixes and changes of rank 1.
        tokens: Tokens of a prefix, of the first decoder and of the second.
        sequences: Sequences that are answered at the end.
    """

    parts: tuple[str, ...] = ("sorting", "mixture")
    digits: int = 6
    count: int = 6
    width: int = 64
    layers: int = 2
    heads: int = 4
    steps: tuple[int, int] = (3000, 4000)
    tuning: tuple[int, int] = (2000, 1000)
    batch_size: int = 64
    eval_every: int = 250
    optimizer: OptimizerConfig = OPTIMIZER
    tuner: OptimizerConfig = TUNING
    tokens: tuple[int, int] = (10, 10)
    sequences: int = 4096


QUICK = Config(
    parts=("sorting",),
    digits=3,
    count=3,
    width=16,
    steps=(30, 30),
    tuning=(10, 10),
    batch_size=8,
    eval_every=10,
    optimizer=replace(OPTIMIZER, warmup_steps=5),
    tuner=replace(TUNING, warmup_steps=5),
    sequences=64,
)

PAPER = "prefix_tuning_theory"
CLAIMS = (
    Claim(
        "One layer learns to sort: half of all sequences or more are sorted without a mistake.",
        paper=PAPER,
        number="sorting: ascending, as trained",
        confirmed=at_least(0.5),
        refuted=at_most(0.2),
    ),
    Claim(
        "A prefix does not make it sort the other way: at most 5 percent of sequences are right.",
        paper=PAPER,
        number="sorting: descending, prefix",
        confirmed=at_most(0.05),
        refuted=at_least(0.5),
    ),
    Claim(
        "A change of rank 1 of its queries and keys does, with fewer parameters: more than 60 percent.",
        paper=PAPER,
        number="sorting: descending, rank 1",
        confirmed=at_least(0.6),
        refuted=at_most(0.1),
    ),
    Claim(
        "Training all parameters does: more than 60 percent.",
        paper=PAPER,
        number="sorting: descending, all",
        confirmed=at_least(0.6),
        refuted=at_most(0.1),
    ),
    Claim(
        "A model of four tasks that nothing tells apart answers few sequences: at most 35 percent of any task.",
        paper=PAPER,
        number="mixture: most of a task, as trained",
        confirmed=at_most(0.35),
        refuted=at_least(0.9),
    ),
    Claim(
        "A prefix tells them apart: with one of its own, every task has more than 90 percent.",
        paper=PAPER,
        number="mixture: least of a task, prefix",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "It brings out what was learned and teaches nothing new: digits in reverse order, which no task was, stay "
        "below 10 percent.",
        paper=PAPER,
        number="mixture: reversed, prefix",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "Training all parameters for as many steps teaches that: more than 60 percent.",
        paper=PAPER,
        number="mixture: reversed, all",
        confirmed=at_least(0.6),
        refuted=at_most(0.1),
    ),
)


@part
class Digits:
    """Random digits d_1 .. d_n, then what becomes of them, y_1 .. y_n: tokens d_1 .. d_n y_1 .. y_(n − 1).

    Attributes:
        digits: Different digits.
        count: n.
        kinds: Names in `KINDS`; each sequence has one of them at random, and nothing says which.
    """

    digits: int
    count: int
    kinds: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.count - 1

    def sample(self, key: jax.Array, batch: int) -> dict[str, jax.Array]:
        """Tokens, targets and weights, as losses of language models take them."""
        for_digits, for_kind = jax.random.split(key)
        given = jax.random.randint(for_digits, (batch, self.count), 0, self.digits)
        ways = {
            "ascending": jnp.sort(given, -1),
            "descending": -jnp.sort(-given, -1),
            "plus one": (given + 1) % self.digits,
            "plus two": (given + 2) % self.digits,
            "reversed": given[:, ::-1],
        }
        kind = jax.random.randint(for_kind, (batch, 1), 0, len(self.kinds))
        answer = jnp.take_along_axis(jnp.stack([ways[name] for name in self.kinds], 1), kind[..., None], 1)[:, 0]
        tokens = jnp.concatenate([given, answer[:, :-1]], -1)
        targets = jnp.concatenate([given[:, 1:], answer], -1)
        asked = jnp.broadcast_to(jnp.arange(self.length) >= self.count - 1, tokens.shape).astype(float)
        return Prompt(tokens, targets, asked, targets).tokens()


def right(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The share of sequences all of whose answers are right, each after the right ones before it.

    A model that answers token by token has the same share, as its first mistake is the same.
    """
    return ((logits.argmax(-1) == batch["targets"]) | (batch["weights"] == 0)).all(-1).mean()


def answered(model: models.Transformer, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, and beside it the share of sequences that are right."""
    logits, *_ = model(batch["tokens"])
    total, sums = next_token_loss(logits, batch)
    return total, {"weight": sums["weight"], "right": sums["weight"] * right(logits, batch)}


def with_prefix(model: models.Transformer, tokens: int, seed: int) -> models.Transformer:
    """The model with learned tokens before the sequence in every layer, seen by all queries."""
    return models.replace_mixers(
        model,
        lambda _, mixer: models.Spec(nn.Prefixed, mixer=mixer, tokens=tokens),
        lambda new, old: nnx.update(new.mixer, nnx.state(old)),
        rngs=nnx.Rngs(seed),
    )


class Tuned:
    """A decoder and what is made of it, all trained in the same way."""

    def __init__(self, config: Config, which: int, seed: int, folder: Any, console: Any):
        self.config, self.which, self.seed, self.folder, self.console = config, which, seed, folder, console
        self.lines: dict[str, list[tuple[float, float]]] = {}

    def options(self, name: str, steps: int, optimizer: OptimizerConfig) -> dict[str, Any]:
        self.console.print(f"prefixes: {name}")
        return {
            "steps": steps,
            "batch_size": self.config.batch_size,
            "eval_every": self.config.eval_every,
            "eval_batches": 4,
            "optimizer": optimizer,
            "seed": self.seed,
            "run_config": {"run": name},
            "folder": self.folder / name.replace(" ", "_").replace(":", "").replace(",", ""),
            "console": self.console,
        }

    def trained(self, name: str, kinds: tuple[str, ...], layers: int, heads: int) -> models.Transformer:
        """A decoder without rotary positions, so that all queries see a prefix in the same way."""
        model = decoders.build(
            models.Spec(nn.MultiHeadAttention, heads=heads, position=None),
            vocabulary=self.config.digits,
            length=2 * self.config.count - 1,
            width=self.config.width,
            layers=layers,
            seed=self.seed,
            hidden=4,
            positions=models.Spec(nn.PositionEmbedding),
        )
        given = self.options(name, self.config.steps[self.which], self.config.optimizer)
        return decoders.train(model, drawn(self.task(*kinds)), loss=answered, **given)[0]

    def task(self, *kinds: str) -> Digits:
        return Digits(self.config.digits, self.config.count, kinds)

    def tune(self, model: models.Transformer, way: str, kind: str, part: str) -> float:
        """The share of right sequences of a task after a model was tuned to it in one of `WAYS`."""
        name, steps = f"{part}: {kind}, {way}", self.config.tuning[self.which]
        given = self.options(name, steps, self.config.optimizer if way == "all" else self.config.tuner)
        source = drawn(self.task(kind))
        if way == "rank 1":
            kernels = nnx.All(nnx.Param, nnx.Any(nnx.PathContains("query"), nnx.PathContains("key")))
            graph, fixed, *rest = nnx.split(model, kernels, ...)
            leaves, structure = jax.tree.flatten(fixed)

            def made(factors: Any) -> models.Transformer:
                """The model with kernels W + a bᵀ, by layer."""
                pairs = zip(leaves, factors, strict=True)
                changed = [w + pair["a"][..., :, None] * pair["b"][..., None, :] for w, pair in pairs]
                return nnx.merge(graph, jax.tree.unflatten(structure, changed), *rest)

            keys = jax.random.split(jax.random.key(self.seed), len(leaves))
            factors = [  # b is 0, so that nothing changes at first
                {"a": jax.random.normal(key, w.shape[:-1]) / w.shape[-2] ** 0.5, "b": jnp.zeros_like(w[..., 0, :])}
                for key, w in zip(keys, leaves, strict=True)
            ]
            result = decoders.train_params(
                lambda factors, batch, _: answered(made(factors), batch), factors, source, **given
            )
            tuned = made(result.params)
        else:
            start = with_prefix(model, self.config.tokens[self.which], self.seed) if way == "prefix" else model
            trained = nnx.PathContains("prefix") if way == "prefix" else nnx.Param
            tuned, result = decoders.train(start, source, loss=answered, trained=trained, **given)
        self.lines[name.split(": ")[1]] = decoders.measured(result, "right")
        return self.share(tuned, kind)

    def share(self, model: models.Transformer, kind: str) -> float:
        """The share of right sequences of a task."""
        batch = self.task(kind).sample(jax.random.fold_in(jax.random.key(self.seed), 7), self.config.sequences)
        return float(right(nnx.jit(lambda model, tokens: model(tokens)[0])(model, batch["tokens"]), batch))


def run(config, seed, folder, console):
    check_names("parts", config.parts, ("sorting", "mixture"))
    numbers: dict[str, float | None] = {claim.number: None for claim in CLAIMS}
    rows: list[dict[str, Any]] = []
    figures = {}

    def put(part: str, kind: str, way: str, share: float) -> float:
        numbers[f"{part}: {kind}, {way}"] = share
        rows.append({"model": part, "task": kind, "tuned": way, "right": share})
        return share

    if "sorting" in config.parts:
        one = Tuned(config, 0, seed, folder, console)
        model = one.trained("sorting", ("ascending",), 1, 1)
        for kind in ("ascending", "descending"):
            put("sorting", kind, "as trained", one.share(model, kind))
        for way in WAYS:
            put("sorting", "descending", way, one.tune(model, way, "descending", "sorting"))
        figures["Tuning one layer to sort the other way"] = Curves("step", "sequences that are right", one.lines)
    if "mixture" in config.parts:
        several = Tuned(config, 1, seed, folder, console)
        model = several.trained("mixture", MIXED, config.layers, config.heads)
        before = [put("mixture", kind, "as trained", several.share(model, kind)) for kind in MIXED]
        after = [put("mixture", kind, "prefix", several.tune(model, "prefix", kind, "mixture")) for kind in MIXED]
        numbers["mixture: most of a task, as trained"] = max(before)
        numbers["mixture: least of a task, prefix"] = min(after)
        for way in ("prefix", "all"):
            put("mixture", "reversed", way, several.tune(model, way, "reversed", "mixture"))
        figures["Tuning a model of four tasks"] = Curves("step", "sequences that are right", several.lines)
    return Result(numbers, {"Sequences without a mistake": rows}, figures)
