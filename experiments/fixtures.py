"""Small models that experiments look into: each is trained once with fixed seeds, and kept.

    python -m experiments.fixtures                 # trains all that are missing, minutes each
    python -m experiments.fixtures FIX-IND --seeds 3

An entry of `FIXTURES` says which model learns which task, and for how long. `SMALL` has the same entries at a size for
tests, which have learned little. To add a fixture, add one entry to each.
"""

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray
from rich.console import Console

from experiments import classifiers, decoders
from jaxattn import Rotary, icl, models, nn
from jaxattn.claims import check_names
from jaxattn.core.checks import check_static_int
from jaxattn.core.part import part
from jaxattn.train import OptimizerConfig, drawn

OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, warmup_steps=100, schedule="constant", final_fraction=0.0, weight_decay=0.0, beta2=0.98
)


@part
class KeyValues:
    """Hay in which keys stand before strings of values; at the end each key is asked, and its values are the answer.

    A row is hay and pairs k v₁ ... v_w, and then the questions, which have the same form. Keys of a row differ, and so
    do all its values. Some keys are asked that stand nowhere in the row: their answer is a string that is the same in
    all rows, which can be learned by heart only. Tokens 0 .. letters − 1 are hay, then come keys, and then values.

    `hidden` of a prompt is [B, Q], where the key of each question stands in the row, −1 where it does not.

    Attributes:
        pairs: Pairs in a row, each of which is asked.
        length: T, the number of tokens.
        keys: The number of different keys.
        values: The number of different values, at least pairs · width.
        letters: The number of different tokens of hay.
        width: w, how many values belong to a key.
        absent: The probability that the pair of a question is left out of the row.

    Raises:
        ValueError: Pairs do not fit.
    """

    pairs: int
    length: int
    keys: int
    values: int
    letters: int
    width: int = 3
    absent: float = 0.0

    def __post_init__(self):
        for name in ("pairs", "length", "keys", "values", "letters", "width"):
            check_static_int("KeyValues", name, getattr(self, name), 1)
        if self.pairs > self.keys or self.pairs * self.width > self.values or len(self.slots) < self.pairs:
            raise ValueError(
                f"KeyValues: pairs is {self.pairs} for {self.keys} keys, {self.values} values and {len(self.slots)} "
                "slots of hay: need as many keys and slots, and as many values as stand in all pairs"
            )

    @property
    def vocabulary(self) -> int:
        """The number of different tokens."""
        return self.letters + self.keys + self.values

    @property
    def start(self) -> int:
        """The position of the first question."""
        return self.length - self.pairs * (self.width + 1)

    @property
    def slots(self) -> Int[np.ndarray, " slots"]:
        """The positions at which a pair may begin."""
        return np.arange(0, self.start - self.width, self.width + 1)

    @property
    def by_heart(self) -> Int[np.ndarray, "keys w"]:
        """The answers of keys that do not stand in the row."""
        drawn = np.random.default_rng(self.keys).integers(0, self.values, (self.keys, self.width))
        return self.letters + self.keys + drawn

    def sample(self, key: PRNGKeyArray, batch: int) -> icl.Prompt:
        """Returns prompts; an answer counts at the token before it."""
        for_keys, for_values, for_slots, for_hay, for_absent, for_order = jax.random.split(key, 6)

        def some(key: PRNGKeyArray, count: int, among: int) -> Int[Array, "b n"]:
            return jax.random.uniform(key, (batch, among)).argsort(-1)[:, :count]

        number = some(for_keys, self.pairs, self.keys)  # [B, m]
        values = self.letters + self.keys + some(for_values, self.pairs * self.width, self.values)
        values = values.reshape(batch, self.pairs, self.width)
        there = jax.random.uniform(for_absent, (batch, self.pairs)) >= self.absent
        begins = jnp.asarray(self.slots)[some(for_slots, self.pairs, len(self.slots))]
        tokens = jax.random.randint(for_hay, (batch, self.length), 0, self.letters)
        row, inside = jnp.arange(batch)[:, None, None], jnp.arange(self.width + 1)
        planted = jnp.concatenate([self.letters + number[..., None], values], -1)
        places = jnp.where(there[..., None], begins[..., None] + inside, self.length)  # out of range: not written
        tokens = tokens.at[row, places].set(planted, mode="drop")
        answer = jnp.where(there[..., None], values, jnp.asarray(self.by_heart)[number])
        order = some(for_order, self.pairs, self.pairs)
        asked = jnp.concatenate([self.letters + number[..., None], answer], -1)
        asked = jnp.take_along_axis(asked, order[..., None], 1).reshape(batch, -1)
        tokens = tokens.at[:, self.start :].set(asked)
        targets = jnp.roll(tokens, -1, 1)
        counts = np.zeros(self.length)
        counts[self.start :] = np.tile([*[1.0] * self.width, 0.0], self.pairs)
        where = jnp.take_along_axis(jnp.where(there, begins, -1), order, 1)
        return icl.Prompt(tokens, targets, jnp.tile(counts, (batch, 1)), targets, where)


@part
class Facts:
    """Hay with a subject in it, and at the end a relation, to which the object of both is the answer.

    Each relation is a permutation of the objects, the same in all rows, to be learned by heart. Tokens 0 .. letters − 1
    are hay, then come subjects, relations and objects. `hidden` of a prompt is [B, 3]: the number of the subject, that
    of the relation, and the position of the subject.

    Attributes:
        subjects: The number of subjects, and of objects.
        relations: The number of relations.
        length: T, the number of tokens, at least 2.
        letters: The number of different tokens of hay.
    """

    subjects: int
    relations: int
    length: int
    letters: int

    @property
    def vocabulary(self) -> int:
        """The number of different tokens."""
        return self.letters + 2 * self.subjects + self.relations

    @property
    def table(self) -> Int[np.ndarray, "relations subjects"]:
        """The token of the object of each relation and subject."""
        rng = np.random.default_rng(self.subjects)
        objects = np.stack([rng.permutation(self.subjects) for _ in range(self.relations)])
        return self.letters + self.subjects + self.relations + objects

    def sample(self, key: PRNGKeyArray, batch: int) -> icl.Prompt:
        """Returns prompts; the answer counts at the last token."""
        for_subject, for_relation, for_place, for_hay = jax.random.split(key, 4)
        subject = jax.random.randint(for_subject, (batch,), 0, self.subjects)
        relation = jax.random.randint(for_relation, (batch,), 0, self.relations)
        place = jax.random.randint(for_place, (batch,), 0, self.length - 1)
        tokens = jax.random.randint(for_hay, (batch, self.length), 0, self.letters)
        tokens = tokens.at[jnp.arange(batch), place].set(self.letters + subject)
        tokens = tokens.at[:, -1].set(self.letters + self.subjects + relation)
        targets = jnp.roll(tokens, -1, 1).at[:, -1].set(jnp.asarray(self.table)[relation, subject])
        counts = jnp.zeros((batch, self.length)).at[:, -1].set(1.0)
        return icl.Prompt(tokens, targets, counts, targets, jnp.stack([subject, relation, place], -1))


@dataclass(frozen=True)
class Fixture:
    """A model, what it learns, and for how long.

    Attributes:
        model: What makes the model; it is given `seed`.
        task: What makes the task: prompts by `sample(key, batch)`.
        steps: Training steps.
        batch_size: Prompts per step.
        optimizer: The optimiser. A constant rate makes a run of fewer steps the beginning of one of more.
        loss: loss(model, prompt), as of `decoders.train`.
    """

    model: models.Spec
    task: models.Spec
    steps: int
    batch_size: int = 32
    optimizer: OptimizerConfig = OPTIMIZER
    loss: Callable[[models.Transformer, icl.Prompt], Any] = decoders.answered_tokens


def _decoder(
    vocabulary: int, length: int, *, width: int = 64, hidden: int | None = None, layers: int = 2, heads: int = 4
):
    attention = models.Spec(nn.MultiHeadAttention, heads=heads, position=Rotary(base=1000.0))
    sizes: dict[str, Any] = {"vocabulary": vocabulary, "length": length, "width": width, "layers": layers}
    return models.Spec(decoders.build, mixer=attention, hidden=hidden, **sizes)


def _fixture(
    task: models.Spec,
    vocabulary: int,
    steps: int,
    *,
    batch_size: int = 32,
    optimizer: OptimizerConfig = OPTIMIZER,
    **sizes: Any,
) -> Fixture:
    model = _decoder(vocabulary, task.arguments["length"], **sizes)
    return Fixture(model, task, steps, batch_size, optimizer)


_BLOCKS = models.Spec(icl.RepeatedBlock, letters=63, length=64, shortest=8, longest=32)
_PAIRS = models.Spec(KeyValues, pairs=4, length=128, keys=16, values=32, letters=16)
_FACTS = models.Spec(Facts, subjects=64, relations=4, length=12, letters=16)
_FEW_BLOCKS = _BLOCKS.replace(letters=11, length=16, shortest=3, longest=6)
_FEW_PAIRS = _PAIRS.replace(pairs=2, length=24, keys=4, values=8, letters=4)
_FEW_FACTS = _FACTS.replace(subjects=6, relations=2, length=5, letters=3)


def _classifier(task: models.Spec, make: Callable[..., Any], steps: int, batch_size: int, **sizes: Any) -> Fixture:
    warm = min(100, steps // 5)
    optimizer = dataclasses.replace(OPTIMIZER, learning_rate=1e-3, warmup_steps=warm)
    return Fixture(models.Spec(make, layers=2, **sizes), task, steps, batch_size, optimizer, classifiers.classified)


def _images(background: float, steps: int, batch_size: int, *, side: int, patch: int, **sizes: Any) -> Fixture:
    task = models.Spec(classifiers.Shapes, background=background, side=side, patch=patch)
    return _classifier(task, classifiers.vision, steps, batch_size, side=side, patch=patch, **sizes)


def _brackets(length: int, steps: int, batch_size: int, **sizes: Any) -> Fixture:
    task = models.Spec(classifiers.Brackets, kinds=2, length=length)
    return _classifier(task, classifiers.encoder, steps, batch_size, vocabulary=5, length=length, **sizes)


BACKGROUNDS = {"FIX-VIT": 0.5, "FIX-VIT-70": 0.7, "FIX-VIT-90": 0.9, "FIX-VIT-100": 1.0}
"""How often the background of the images of a fixture is right about the class."""

FIXTURES: Mapping[str, Fixture] = {
    "FIX-IND": _fixture(_BLOCKS, 64, 1200),
    "FIX-KV": _fixture(_PAIRS, 64, 1500),
    "FIX-KV-ABSENT": _fixture(_PAIRS.replace(absent=0.5), 64, 2000, hidden=2),
    "FIX-FACT": _fixture(_FACTS, 148, 1500, batch_size=256, hidden=4, layers=3),
    "FIX-FACT-ATTENTION": _fixture(_FACTS, 148, 2000, batch_size=256),
    **{name: _images(b, 400, 32, side=8, patch=4, width=64, heads=4) for name, b in BACKGROUNDS.items()},
    "FIX-CLS": _brackets(11, 1500, 64, width=64, heads=4),
}
"""Name -> what is trained. In FIX-KV-ABSENT half of the answers have to be known by heart; FIX-FACT-ATTENTION has no
feed-forward blocks, so that heads have to know the facts."""

_TINY: dict[str, Any] = {"width": 16, "heads": 2, "optimizer": dataclasses.replace(OPTIMIZER, warmup_steps=2)}
SMALL: Mapping[str, Fixture] = {
    "FIX-IND": _fixture(_FEW_BLOCKS, 12, 10, **_TINY),
    "FIX-KV": _fixture(_FEW_PAIRS, 16, 10, **_TINY),
    "FIX-KV-ABSENT": _fixture(_FEW_PAIRS.replace(absent=0.5), 16, 10, hidden=2, **_TINY),
    "FIX-FACT": _fixture(_FEW_FACTS, 17, 10, hidden=2, **_TINY),
    "FIX-FACT-ATTENTION": _fixture(_FEW_FACTS, 17, 10, **_TINY),
    **{name: _images(b, 10, 8, side=4, patch=2, width=16, heads=2) for name, b in BACKGROUNDS.items()},
    "FIX-CLS": _brackets(9, 10, 8, width=16, heads=2),
}
"""The same names, at a size for tests."""


def fixtures_folder() -> Path:
    """The folder of all trained fixtures: what JAXATTN_FIXTURES names, or ~/.cache/jaxattn/fixtures."""
    return Path(os.environ.get("JAXATTN_FIXTURES") or Path.home() / ".cache/jaxattn/fixtures")


@dataclass(frozen=True)
class Trained:
    """A fixture that has learned.

    Attributes:
        model: The model, in evaluation.
        task: Its task.
        accuracy: The share of right answers in fresh prompts, at the last step.
        learning: (step, loss on fresh prompts) of every measurement.
    """

    model: models.Transformer
    task: Any
    accuracy: float
    learning: list[tuple[float, float]]


def trained(
    name: str,
    seed: int = 0,
    *,
    steps: int | None = None,
    small: bool = False,
    folder: Path | None = None,
    console: Console | None = None,
) -> Trained:
    """Returns a fixture, from the folder if it is there, else after its training.

    Args:
        name: A name of `FIXTURES`.
        seed: The seed of its parameters and of its prompts.
        steps: Training steps, if not those of the fixture. Fewer are a look at the same training, earlier.
        small: Whether to take it from `SMALL`.
        folder: Where trained fixtures are kept; by default `fixtures_folder()`.
        console: The console for progress.

    Raises:
        ValueError: There is no such name.
    """
    check_names("name", [name], FIXTURES)
    fixture = (SMALL if small else FIXTURES)[name]
    fixture = dataclasses.replace(fixture, steps=fixture.steps if steps is None else steps)
    said = {
        field.name: repr(getattr(fixture, field.name)) for field in dataclasses.fields(fixture) if field.name != "loss"
    }
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]  # another fixture has another folder
    task = fixture.task.build()
    model, result = decoders.train(
        fixture.model.build(seed=seed),
        drawn(task),
        loss=fixture.loss,
        steps=fixture.steps,
        batch_size=fixture.batch_size,
        eval_every=min(100, fixture.steps),
        eval_batches=4,
        optimizer=fixture.optimizer,
        seed=seed,
        run_config={"fixture": said},
        folder=(fixtures_folder() if folder is None else folder) / f"{name}-{digest}" / str(seed),
        console=Console(quiet=True) if console is None else console,
    )
    model.eval()
    right = decoders.measured(result, "correct")[-1][1]
    return Trained(model, task, float(right), decoders.measured(result, "loss"))


def main(arguments: list[str] | None = None) -> None:
    """Trains fixtures that are missing, and prints how well each answers."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fixtures", description=main.__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(FIXTURES)}; by default all")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds of each, from 0")
    parser.add_argument("--small", action="store_true", help="at the size for tests")
    parser.add_argument("--folder", type=Path, help="where they are kept")
    given = parser.parse_args(arguments)
    console = Console()
    for name in given.names or FIXTURES:
        for seed in range(given.seeds):
            found = trained(name, seed, small=given.small, folder=given.folder, console=console)
            console.print(f"{name}, seed {seed}: {found.accuracy:.3f} of the answers are right", soft_wrap=True)


if __name__ == "__main__":
    main()
