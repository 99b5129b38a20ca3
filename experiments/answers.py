"""Where answers come from, in small models: from the context or from memory, by which tokens, and by which blocks.

FIX-KV-ABSENT answers some questions from the row and others by heart: a linear classifier of how much heads look back
is asked which. FIX-IND reads texts that repeat and texts that do not: the rise of the loss without its retrieval heads
is asked which. FIX-FACT knows facts by heart: the outputs of its blocks are written as sums of what heads fetched.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.fixtures import trained
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Result, at_least, at_most


@dataclass(frozen=True)
class Config:
    """The fixtures, and how much of each is looked at.

    Attributes:
        rows: Rows of a fixture; half of them train the classifier.
        share: The share of the heads, by their retrieval score, that is masked for influence.
        prompts: Prompts of one relation.
        small: Whether fixtures are those for tests, kept with the results.
    """

    rows: int = 512
    share: float = 0.25
    prompts: int = 64
    small: bool = False


QUICK = Config(rows=24, prompts=6, small=True)

LOOKBACK, INFLUENCE, RECALL, LENS = "lookback_lens", "attention_influence", "factual_recall", "token_lens_knockout"
CLAIMS = (
    Claim(
        "How much heads look back tells whether an answer stands in the row: AUROC above 0.9 on other rows.",
        paper=LOOKBACK,
        number="FIX-KV-ABSENT: AUROC of lookback for supported answers",
        confirmed=at_least(0.9),
        refuted=at_most(0.6),
    ),
    Claim(
        "Texts that repeat lose most without retrieval heads: AUROC of influence for texts that repeat above 0.9.",
        paper=INFLUENCE,
        number="FIX-IND: AUROC of influence for texts that repeat",
        confirmed=at_least(0.9),
        refuted=at_most(0.6),
    ),
    Claim(
        "Outputs of the deepest block are sums of what heads wrote, the stream and one direction: R² above 0.5.",
        paper=RECALL,
        number="FIX-FACT: R² of the last block, mean over relations",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "The direction of the task is needed: without it R² is lower by 0.05 or more.",
        paper=RECALL,
        number="FIX-FACT: R² of the last block less that without a direction",
        confirmed=at_least(0.05),
        refuted=at_most(0),
    ),
    Claim(
        "The object is there behind the deepest block alone: its rank by the stream before that block is above 3 "
        "(median), and behind it 1.",
        paper=RECALL,
        number="FIX-FACT: median rank of the object before the last block, over that behind it",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "Reading the subject promotes its object: of all tokens attention raises the object's logit most by the "
        "subject, in three quarters of the prompts or more.",
        paper=LENS,
        number="FIX-FACT: share of prompts in which the subject promotes its object most",
        confirmed=at_least(0.75),
        refuted=at_most(0.25),
    ),
    Claim(
        "Without reading the subject the answer is lost: at most a tenth is right.",
        paper=LENS,
        number="FIX-FACT: right without reading the subject",
        confirmed=at_most(0.1),
        refuted=at_least(0.9),
    ),
)


def lookback(model: Any, task: Any, config: Config, key: Any) -> dict[str, float | None]:
    """Whether answers that stand in the row are told from others, by lookback at the first value of a question."""
    prompt = task.sample(key, config.rows)
    features = analysis.lookback_features(model, prompt.x, task.start)
    width = task.width + 1
    # The first question sees no earlier one; its span is its key and all of its values but the last.
    begins = jnp.full(config.rows, task.start)
    spans = analysis.span_means(features, begins, begins + width - 2)
    supported = np.asarray(prompt.hidden[:, 0] >= 0)
    half = config.rows // 2
    probe = analysis.fit_logistic(spans[:half], jnp.asarray(supported[:half], int), 2)
    scores = probe(spans[half:])
    margin = scores[:, 1] - scores[:, 0]
    right = (model(prompt.x)[0].argmax(-1) == prompt.y)[:, task.start : task.start + width - 1].all(1)
    return {
        "AUROC of lookback for supported answers": float(analysis.auroc(margin, jnp.asarray(supported[half:]))),
        "the same for answers that are right": float(analysis.auroc(margin, right[half:])),
        "supported answers right": float(right[supported].mean()),
        "answers by heart right": float(right[~supported].mean()),
    }


def influence(model: Any, task: Any, config: Config, key: Any) -> dict[str, float | None]:
    """Whether texts that repeat are told from random ones by the loss without the heads that copy."""
    found = analysis.detect(model, key, vocabulary=task.letters, first=task.letters, length=task.length - 1)
    scores = found["induction"].score
    off = jnp.asarray(scores >= np.sort(scores.reshape(-1))[-max(1, round(config.share * scores.size))])
    repeated = task.sample(key, config.rows).x
    random = jax.random.randint(jax.random.fold_in(key, 1), repeated[:, 1:].shape, 0, task.letters)
    texts = jnp.concatenate([repeated, jnp.concatenate([repeated[:, :1], random], 1)])

    def losses(edits: Any) -> Any:
        logits, _ = trace.run(model, texts, edits=edits)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), texts[:, 1:, None], -1)[..., 0].mean(-1)

    rise = analysis.attention_influence(losses({}), losses(analysis.uniform_heads(off, task.length)))
    labels = jnp.arange(2 * config.rows) < config.rows
    return {
        "AUROC of influence for texts that repeat": float(analysis.auroc(rise, labels)),
        "influence, texts that repeat": float(rise[labels].mean()),
        "influence, random texts": float(rise[~labels].mean()),
    }


def facts(model: Any, task: Any, config: Config, key: Any) -> tuple[dict[str, float | None], list[tuple[float, float]]]:
    """(numbers, (layers read, median rank of the object)) of prompts at the last token."""
    prompt = task.sample(key, config.rows)
    last, rows = task.length - 1, jnp.arange(config.rows)
    answer, place = prompt.y[:, -1], prompt.hidden[:, 2]
    fits = []
    for relation in range(task.relations):
        sample = task.sample(jax.random.fold_in(key, relation), config.prompts).x
        tokens = sample.at[:, -1].set(task.letters + task.subjects + relation)
        with_, without = (analysis.block_regression(model, tokens, last, constant=on) for on in (True, False))
        fits.append((np.asarray(with_.r2), np.asarray(without.r2)))
    r2, other = np.mean(fits, 0)

    def rank(logits: Any) -> Any:
        own = jnp.take_along_axis(logits[:, -1], answer[:, None], 1)
        return 1 + (logits[:, -1] > own).sum(-1)

    ranks = np.median(np.asarray(analysis.lens(model, prompt.x, rank)), 1)
    middle = trace.run(model, prompt.x, record=("resid_mid",))[1]["resid_mid"][-1]
    before = float(np.median(rank(model(prompt.x, start=(len(r2), middle))[0])))
    groups = jnp.tile(jnp.arange(task.length), (config.rows, 1))
    brought = analysis.token_lens(
        model, prompt.x, lambda logits: logits[rows, -1, answer].sum(), groups, task.length
    ).sum(0)  # [B, T]
    unseen = jnp.zeros((config.rows, task.length, task.length), bool).at[rows, :, place].set(True)
    edits = analysis.knockout(unseen & (jnp.arange(task.length)[:, None] > place[:, None, None]))

    def right(edits: Any) -> float:
        return float((trace.run(model, prompt.x, edits=edits)[0][:, -1].argmax(-1) == answer).mean())

    return {
        "right": right({}),
        "right without reading the subject": right(edits),
        "R² of the last block, mean over relations": float(r2[-1]),
        "R² of the last block less that without a direction": float(r2[-1] - other[-1]),
        "median rank of the object before the last block, over that behind it": before / float(ranks[-1]),
        "share of prompts in which the subject promotes its object most": float((brought.argmax(1) == place).mean()),
    }, [(float(layer), float(each)) for layer, each in enumerate(ranks)]


def run(config, seed, folder: Path, console):
    if config.rows < 4 or config.rows % 2:
        raise ValueError(f"rows is {config.rows}: need an even number, 4 or more")
    numbers: dict[str, float | None] = {}
    ranks: list[tuple[float, float]] = []
    for number, (name, look) in enumerate((("FIX-KV-ABSENT", lookback), ("FIX-IND", influence), ("FIX-FACT", facts))):
        console.print(f"answers: {name}")
        fixture = trained(
            name, seed, small=config.small, folder=folder / "fixtures" if config.small else None, console=console
        )
        key = jax.random.fold_in(jax.random.key(seed), number)
        found: Any = look(fixture.model, fixture.task, config, key)
        found, ranks = found if isinstance(found, tuple) else (found, ranks)
        numbers |= {f"{name}: {what}": value for what, value in found.items()}
        numbers[f"{name}: accuracy at the end of training"] = fixture.accuracy
    return Result(
        numbers,
        figures={
            "Rank of the object by depth": Curves(
                "layers read", "median rank of the object", {"FIX-FACT": ranks}, log="y"
            )
        },
    )
