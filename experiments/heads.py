"""What heads are in a trained language model (SmolLM2) and in small fixtures: kinds, retrieval, importance, relations.

Every head is scored by a registry of detectors. Texts in which a code is hidden and later asked for say which heads
copy it, and masking those says whether they are needed, beside as many other heads. Heads are removed in the order of
their importance. Pairs of words say what a head maps a token to, from its weights and from prompts. The fixtures are
small models that were trained on one thing each, so that what should be found is known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments import inside_smollm2
from experiments.fixtures import Trained, trained
from experiments.inside_smollm2 import PARAGRAPH, RANDOM, best, drawn, nll
from experiments.trained import encoded
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most

HAY = (
    " The market opened late because of the rain.",
    " A red bicycle leaned against the wall of the bakery.",
    " Nobody could remember when the clock had stopped.",
    " The children counted the boats from the top of the hill.",
    " In the evening the smell of bread filled the street.",
    " The library kept its oldest maps in a wooden chest.",
    " Two dogs slept under the table near the fire.",
    " The train to the coast left without the musicians.",
    " Every spring the river rose above the lower bridge.",
    " A letter without a name lay on the desk for weeks.",
    " The garden behind the school was full of bees.",
    " Snow covered the roofs before the first bell rang.",
)
NEEDLE, QUESTION = " The code of the old tower is", " Remember this. The code of the old tower is"
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "body information"
)


@dataclass(frozen=True)
class Config:
    """A trained decoder, and the fixtures beside it.

    Attributes:
        weights: As of the experiment `inside_smollm2`.
        hay: Sentences of hay around a code.
        digits: Digits of a code.
        draws: Codes that are hidden at each depth.
        depths: Depths, from the first sentence to the last.
        masked: Numbers of heads that are masked together; claims are about the last.
        others: Draws of as many random heads to compare with.
        examples: Pieces of text that importance is measured on.
        length: Tokens of a piece of text.
        pruned: Shares of all heads that are removed; the claim is about one fifth.
        words: How many pairs of words.
        top: k of the relations.
        rows: Rows of a fixture that are looked at.
        small: Whether fixtures are those for tests, kept with the results.
        chunk: Runs computed at once.
    """

    weights: str = "smollm2"
    hay: int = 12
    digits: int = 5
    draws: int = 3
    depths: int = 4
    masked: tuple[int, ...] = (4, 8, 16)
    others: int = 4
    examples: int = 4
    length: int = 20
    pruned: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
    words: int = 60
    top: int = 10
    rows: int = 256
    small: bool = False
    chunk: int = 9


QUICK = Config(
    weights=RANDOM,
    hay=2,
    digits=2,
    draws=2,
    depths=2,
    masked=(1, 2),
    others=2,
    examples=2,
    length=8,
    pruned=(0.0, 0.2, 0.5),
    words=12,
    rows=16,
    small=True,
    chunk=4,
)

RETRIEVAL, IMPORTANCE, RELATIONS, INDUCTION = "retrieval_heads", "head_importance", "maps", "induction_heads"
CLAIMS = (
    Claim(
        "Retrieval heads are few: less than 5 percent of the heads copy a tenth of a hidden code or more.",
        paper=RETRIEVAL,
        number="SmolLM2: share of retrieval heads",
        confirmed=at_most(0.05),
        refuted=at_least(0.2),
    ),
    Claim(
        "They are the same wherever the code is hidden: scores of the first and the last depth correlate over heads.",
        paper=RETRIEVAL,
        number="SmolLM2: correlation of scores, first and last depth",
        confirmed=at_least(0.8),
        refuted=at_most(0.3),
    ),
    Claim(
        "Without them codes are lost: masking the 16 best (z = 0) loses half of the answers, or more.",
        paper=RETRIEVAL,
        number="SmolLM2: answers lost without retrieval heads",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "Without as many others they are not: at most a tenth of the answers is lost.",
        paper=RETRIEVAL,
        number="SmolLM2: answers lost without random heads",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "A fifth of the heads can be spared without noticeable loss, in the order of their importance: the loss on "
        "text rises by a twentieth or less.",
        paper=IMPORTANCE,
        number="SmolLM2: rise of the loss without a fifth of the heads",
        confirmed=at_most(0.05),
        refuted=at_least(0.5),
    ),
    Claim(
        "Importance chooses them: in random order the rise is twice as much, or more.",
        paper=IMPORTANCE,
        number="SmolLM2: rise in random order over that by importance",
        confirmed=at_least(2),
        refuted=at_most(1),
    ),
    Claim(
        "Importance ranks heads as their removal does (Spearman).",
        paper=IMPORTANCE,
        number="SmolLM2: rank correlation of importance and removal",
        confirmed=at_least(0.7),
        refuted=at_most(0.2),
    ),
    Claim(
        "Relations that are read from weights are those that heads apply in prompts: over heads, the score for words "
        "and the same words in capitals correlates with that in prompts.",
        paper=RELATIONS,
        number="SmolLM2: correlation of relations from weights and in prompts",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "FIX-IND has a previous-token head in layer 0 and an induction head in layer 1.",
        paper=INDUCTION,
        number="FIX-IND: the lesser of the best previous-token score and the best induction score",
        confirmed=at_least(0.4),
        refuted=at_most(0.1),
    ),
    Claim(
        "FIX-IND: importance ranks heads as their removal does (Spearman).",
        paper=IMPORTANCE,
        number="FIX-IND: rank correlation of importance and removal",
        confirmed=at_least(0.7),
        refuted=at_most(0.2),
    ),
    Claim(
        "FIX-IND: a quarter of the heads can be spared, in the order of their importance: at most 0.4 nats.",
        paper=IMPORTANCE,
        number="FIX-IND: rise of the loss without a quarter of the heads",
        confirmed=at_most(0.4),
        refuted=at_least(2),
    ),
    Claim(
        "FIX-KV: without its retrieval heads, those from 0.1 on, at most a fifth of the answers is right.",
        paper=RETRIEVAL,
        number="FIX-KV: answers right without retrieval heads",
        confirmed=at_most(0.2),
        refuted=at_least(0.8),
    ),
    Claim(
        "FIX-FACT without feed-forward blocks: over heads, relations from weights correlate with those in prompts.",
        paper=RELATIONS,
        number="FIX-FACT: correlation of relations from weights and in prompts",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "FIX-FACT: without the head of the best score for a relation its answers suffer more than without another: 20 "
        "points of accuracy, or more.",
        paper=RELATIONS,
        number="FIX-FACT: accuracy lost without the best head less others",
        confirmed=at_least(0.2),
        refuted=at_most(0),
    ),
)


@dataclass(frozen=True)
class Needles:
    """Texts in which a code is hidden, and asked for at their end, answered by the code.

    Attributes:
        tokens: [depths · draws, T].
        needle: [depths · draws, T], which tokens are the code where it is hidden.
        answer: [T], which tokens are the answer.
        depth: [depths · draws], the number of the depth.
    """

    tokens: Int[np.ndarray, "b t"]
    needle: Bool[np.ndarray, "b t"]
    answer: Bool[np.ndarray, " t"]
    depth: Int[np.ndarray, " b"]


def needles(encode: Callable[[str], Any], start: int, config: Config, rng: Any) -> Needles:
    """Texts as long as each other: pieces are tokenized one by one. Raises ValueError if digits are no tokens."""
    hay = [list(encode(sentence)) for sentence in HAY[: config.hay]]
    before, stop, question = list(encode(NEEDLE + " ")), list(encode(".")), list(encode(QUESTION + " "))
    digits = [list(encode(str(digit))) for digit in range(10)]
    if any(len(digit) != 1 for digit in digits):
        raise ValueError("the tokenizer has no token for each digit: need one that does, for codes of one length")
    places = np.linspace(0, len(hay), config.depths).round().astype(int)
    tokens, spans, depths = [], [], []
    for depth, place in enumerate(places):
        for _ in range(config.draws):
            code = [digits[digit][0] for digit in rng.choice(10, config.digits, replace=False)]
            first = [start, *(token for sentence in hay[:place] for token in sentence), *before]
            rest = [*stop, *(token for sentence in hay[place:] for token in sentence), *question]
            tokens.append([*first, *code, *rest, *code])
            spans.append((len(first), len(first) + config.digits))
            depths.append(depth)
    index = np.arange(len(tokens[0]))
    needle = np.array([(index >= begin) & (index < end) for begin, end in spans])
    return Needles(np.array(tokens), needle, index >= len(index) - config.digits, np.array(depths))


def answered(model: Any, texts: Needles, off: Any) -> Float[Array, " b"]:
    """Whether each text is answered right by the most likely tokens, 1 or 0, without some heads."""
    rows = np.flatnonzero(texts.answer) - 1
    logits, *_ = model(jnp.asarray(texts.tokens), edits=analysis.without_heads(off), logits_at=jnp.asarray(rows))
    return (logits.argmax(-1) == texts.tokens[:, rows + 1]).all(-1) * 1.0


def retrieval(model: Any, texts: Needles, config: Config, rng: Any) -> tuple[dict[str, float | None], Any, Any]:
    """(numbers, scores [L, N], lines of right answers by the number of masked heads)."""
    none = jnp.zeros((len(model.config.layers), _heads(model)), bool)
    tokens, rows = jnp.asarray(texts.tokens), np.flatnonzero(texts.answer)
    right = np.asarray(jax.device_get(trace.sweep(lambda off: answered(model, texts, off), none[None])))[0]

    def scores(of: Bool[np.ndarray, " b"]) -> Float[np.ndarray, "l n"]:
        found = analysis.retrieval_scores(
            model, tokens, jnp.asarray(texts.needle), jnp.broadcast_to(jnp.asarray(texts.answer), tokens.shape),
            counts=jnp.asarray(of & (right > 0)), logits_at=jnp.asarray(rows[:1]),
        )  # fmt: skip
        return np.asarray(found)

    every = scores(np.ones(len(right), bool))
    early, late = (scores(texts.depth == depth) for depth in (0, config.depths - 1))
    masks, names = [np.asarray(none)[None]], ["none"]
    filled = np.nan_to_num(every)
    for count in config.masked:
        top = best(filled, count)
        sets = drawn(~top, count, config.others, rng)
        masks += [top[None], sets]
        names += [f"retrieval {count}", *[f"random {count}"] * len(sets)]
    shares = np.asarray(trace.sweep(lambda off: answered(model, texts, off).mean(), jnp.asarray(np.concatenate(masks))))
    lines: dict[str, list[tuple[float, float]]] = {}
    for kind in ("retrieval", "random"):
        points = [(0.0, float(shares[0]))]
        for count in config.masked:
            at = [number for number, name in enumerate(names) if name == f"{kind} {count}"]
            points.append((float(count), float(shares[at].mean())))
        lines[f"{kind} heads"] = points

    def lost(kind: str) -> float | None:
        whole, left = lines[f"{kind} heads"][0][1], lines[f"{kind} heads"][-1][1]
        return None if whole == 0 else (whole - left) / whole

    numbers = {
        "codes answered": float(shares[0]),
        "share of retrieval heads": _known((every >= 0.1).mean(), every),
        "best retrieval score": _known(every.max(), every),
        "correlation of scores, first and last depth": correlation(early, late),
        "answers lost without retrieval heads": lost("retrieval"),
        "answers lost without random heads": lost("random"),
    }
    return numbers, every, lines


def _heads(model: Any) -> int:
    return trace.heads(model).shape[1]


def _known(value: Any, scores: np.ndarray) -> float | None:
    """The value, or None where no text was answered, so that there are no scores."""
    return None if np.isnan(scores).any() else float(value)


def correlation(x: Any, y: Any) -> float | None:
    """Pearson's over heads; None where one has no spread or is not known."""
    x, y = np.asarray(x, np.float64).reshape(-1), np.asarray(y, np.float64).reshape(-1)
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def pruning(
    model: Any, inputs: Array, loss: Callable[[Any], Array], shares: tuple[float, ...], config: Config, rng: Any
) -> tuple[dict[str, float], Any, Any, Any]:
    """(numbers, importance [L, N], cost of removing each head [L, N], lines of the loss by heads removed)."""
    importance = np.asarray(analysis.head_importance(model, inputs, loss))
    whole = float(jnp.mean(loss(model(inputs)[0])))
    single = np.asarray(
        trace.sweep(lambda edits: loss(model(inputs, edits=edits)[0]).mean(), trace.heads(model), chunk=config.chunk)
    )
    total = importance.size
    counts = [round(share * total) for share in shares]
    orders = np.stack([analysis.pruning_order(importance), *(rng.permutation(total) for _ in range(config.others))])
    curves = np.asarray(analysis.pruning_curve(model, inputs, loss, orders, counts, chunk=config.chunk))
    lines = {
        "by importance": list(zip(map(float, shares), map(float, curves[0]), strict=True)),
        "in random order": list(zip(map(float, shares), map(float, curves[1:].mean(0)), strict=True)),
    }
    return (
        {
            "loss": whole,
            "rank correlation of importance and removal": float(
                analysis.rank_correlation(importance.reshape(-1), single.reshape(-1))
            ),
        },
        importance,
        single - whole,
        lines,
    )


def rise(lines: Any, name: str, share: float) -> float:
    """How much the loss of a line rises at a share of removed heads, in nats."""
    points = dict(lines[name])
    return points[share] - points[0.0]


def pairs_of_words(got: Any, config: Config) -> tuple[Array, Array]:
    """Words and the same in capitals, where both are one token each; tokens and the next ones without a tokenizer."""
    if got.tokenizer is None:
        return jnp.arange(config.words), jnp.arange(config.words) + 1
    found = [(encoded(got, f" {word}"), encoded(got, f" {word.capitalize()}")) for word in WORDS.split()]
    single = [(int(x[0]), int(y[0])) for x, y in found if len(x) == len(y) == 1][: config.words]
    if len(single) < min(30, config.words):
        raise ValueError(f"{len(single)} pairs of words are single tokens: need 30 or more")
    return tuple(jnp.asarray(side) for side in np.array(single).T)  # type: ignore[return-value]


def on_model(config: Config, seed: int, log: Any) -> tuple[dict[str, float | None], dict[str, Any], dict[str, Any]]:
    """(numbers, columns of the table of heads, lines of figures) of the language model."""
    got = inside_smollm2.loaded(inside_smollm2.Config(weights=config.weights))
    model: Any = got.model
    rng, key, start = np.random.default_rng(seed), jax.random.key(seed), got.config["bos_token_id"]
    log("SmolLM2: kinds of heads")
    found = analysis.detect(model, key, first=start, length=40, batch=4)
    labels = analysis.label_heads(found)
    log("SmolLM2: retrieval heads")
    texts = needles(lambda text: encoded(got, text), start, config, rng)
    numbers, scores, masked = retrieval(model, texts, config, rng)
    log("SmolLM2: importance")
    text = encoded(got, PARAGRAPH)[: config.examples * config.length].reshape(config.examples, -1)
    tokens = jnp.asarray(np.concatenate([np.full((len(text), 1), start), text], 1))
    of_pruning, importance, cost, lines = pruning(
        model, tokens, lambda logits: nll(logits, tokens).mean(-1), config.pruned, config, rng
    )
    by_importance, by_chance = (rise(lines, name, 0.2) for name in lines)
    log("SmolLM2: relations")
    sources, targets = pairs_of_words(got, config)
    prompts = jnp.stack([jnp.full_like(sources, start), sources], 1)
    static = analysis.relation_scores(model, sources, targets, k=config.top)
    dynamic, forced = (
        np.asarray(analysis.dynamic_scores(model, prompts, targets, k=config.top, sources=at, logits_at=jnp.array([1])))
        for at in (None, jnp.ones(len(sources), int))
    )
    numbers |= {
        **of_pruning,
        "rise of the loss without a fifth of the heads": by_importance / of_pruning["loss"],
        "rise in random order over that by importance": by_chance / by_importance if by_importance > 0 else None,
        "correlation of relations from weights and in prompts": correlation(static.score, forced),
        "the same where heads look where they do": correlation(static.score, dynamic),
        "best score of the relation": float(static.score.max()),
        "score of the relation by chance": static.chance,
    }
    for name, each in found.items():
        numbers[f"best score, {name}"] = float(np.nanmax(each.score))
        numbers[f"heads of the kind, {name}"] = float(sum(row.count(name) for row in labels))
    columns = {
        "kind": labels,
        **{name: each.score for name, each in found.items()},
        "retrieval": np.nan_to_num(scores),
        "importance": importance,
        "cost of removal": cost,
        "relation, weights": np.asarray(static.score),
        "relation, prompts": forced,
    }
    return {f"SmolLM2: {name}": x for name, x in numbers.items()}, columns, {"masked": masked, "pruned": lines}


def on_fixtures(
    config: Config, seed: int, folder: Path, console: Any
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """(numbers, lines of figures) of the fixtures."""
    rng, key = np.random.default_rng(seed), jax.random.key(seed + 1)

    def made(name: str) -> Trained:
        console.print(name)
        return trained(name, seed, small=config.small, folder=folder if config.small else None, console=console)

    blocks, pairs, facts = (made(name) for name in ("FIX-IND", "FIX-KV", "FIX-FACT-ATTENTION"))
    found = analysis.detect(
        blocks.model, key, vocabulary=blocks.task.letters, first=blocks.task.letters,
        length=blocks.model.config.length - 1,
    )  # fmt: skip
    both = min(found["previous token"].score[0].max(), found["induction"].score[1].max())

    def answers(task: Any) -> tuple[Array, Callable[[Any], Array], Any]:
        prompt = task.sample(key, config.rows)

        def loss(logits: Any) -> Array:
            each = -jnp.take_along_axis(jax.nn.log_softmax(logits), prompt.y[..., None], -1)[..., 0]
            return (each * prompt.weights).sum(-1) / prompt.weights.sum(-1)

        return prompt.x, loss, prompt

    tokens, loss, _ = answers(blocks.task)
    of_pruning, *_, lines = pruning(blocks.model, tokens, loss, (0.0, 0.25, 0.5, 0.75, 1.0), config, rng)

    tokens, _, prompt = answers(pairs.task)
    index, width = jnp.arange(tokens.shape[1]), pairs.task.width
    # The first question alone: where its values stand, and where they are given as the answer.
    begins = prompt.hidden[:, :1]
    needle = (index > begins) & (index <= begins + width)
    at = pairs.task.start + 1
    answer = jnp.broadcast_to((index >= at) & (index < at + width), tokens.shape)
    scores = np.asarray(analysis.retrieval_scores(pairs.model, tokens, needle, answer))
    chosen = scores >= 0.1

    def right(model: Any, prompt: Any, off: Any) -> Array:
        logits = model(prompt.x, edits=analysis.without_heads(off))[0]
        return ((logits.argmax(-1) == prompt.y) * prompt.weights).sum() / prompt.weights.sum()

    others = drawn(~chosen, int(chosen.sum()), config.others, rng)
    off = np.concatenate([np.zeros_like(chosen)[None], chosen[None], others])
    of_pairs = np.asarray(trace.sweep(lambda off: right(pairs.model, prompt, off), jnp.asarray(off)))

    table, task = np.asarray(facts.task.table), facts.task
    subjects = jnp.arange(task.subjects) + task.letters
    static, forced, lost = [], [], []
    for relation, objects in enumerate(table):
        k = max(1, round(config.top * task.vocabulary / 1000))
        given = analysis.relation_scores(facts.model, subjects, jnp.asarray(objects), k=k, first_block=False)
        asked = jnp.full_like(subjects, task.letters + task.subjects + relation)
        prompts = jnp.stack([jnp.zeros_like(subjects), subjects, asked], 1)
        static.append(np.asarray(given.score))
        forced.append(np.asarray(analysis.dynamic_scores(facts.model, prompts, jnp.asarray(objects), k=k)))

        def correct(off: Any, prompts: Any = prompts, objects: Any = objects) -> Array:
            logits = facts.model(prompts, edits=analysis.without_heads(off))[0][:, -1]
            return (logits.argmax(-1) == jnp.asarray(objects)).mean()

        size = static[-1].size
        each = np.asarray(trace.sweep(correct, jnp.asarray(np.eye(size, dtype=bool).reshape(-1, *static[-1].shape))))
        first = int(static[-1].argmax())
        lost.append(float(np.delete(each, first).mean() - each[first]))
    return {
        "FIX-IND: answers right": blocks.accuracy,
        "FIX-KV: answers right": pairs.accuracy,
        "FIX-FACT: answers right": facts.accuracy,
        "FIX-IND: the lesser of the best previous-token score and the best induction score": float(both),
        **{f"FIX-IND: {name}": x for name, x in of_pruning.items()},
        "FIX-IND: rise of the loss without a quarter of the heads": rise(lines, "by importance", 0.25),
        "FIX-KV: retrieval heads": float(chosen.sum()),
        "FIX-KV: best retrieval score": float(scores.max()),
        "FIX-KV: answers right without retrieval heads": float(of_pairs[1]) if chosen.any() else None,
        "FIX-KV: answers right without as many others": float(of_pairs[2:].mean()) if chosen.any() else None,
        "FIX-FACT: correlation of relations from weights and in prompts": correlation(static, forced),
        "FIX-FACT: best score of a relation": float(np.max(static)),
        "FIX-FACT: accuracy lost without the best head less others": float(np.mean(lost)),
    }, lines  # fmt: skip


def run(config, seed, folder, console):
    if 0.2 not in config.pruned or 0.0 not in config.pruned:
        raise ValueError(f"pruned is {config.pruned}: need 0.0 and 0.2 among them, which claims are about")
    numbers, columns, lines = on_model(config, seed, console.print)
    more, of_blocks = on_fixtures(config, seed, folder / "fixtures", console)
    labels = columns.pop("kind")
    shape = columns["importance"].shape
    rows = [
        {"head": f"layer {layer}, head {head}", "kind": labels[layer][head]}
        | {name: float(x[layer, head]) for name, x in columns.items()}
        for layer, head in np.ndindex(shape)
    ]
    shown = ("previous token", "induction", "sink", "retrieval", "importance", "cost of removal")
    return Result(
        numbers | more,
        {"Heads of SmolLM2": rows},
        {
            "Heads of SmolLM2": Maps(
                {f"{name} (max {columns[name].max():.2f})": columns[name].T.tolist() for name in shown},
                y="head",
                x="layer",
            ),
            "Codes by heads masked": Curves("heads masked", "share of codes that are answered", lines["masked"]),
            "Loss by heads removed": Curves("share of heads removed", "loss on text (nats)", lines["pruned"]),
            "FIX-IND: loss by heads removed": Curves("share of heads removed", "loss (nats)", of_blocks),
        },
    )
