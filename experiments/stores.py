"""What a trained model (SmolLM2) loses when its store keeps or reads a part of the text: mass, loss, needles by depth.

Every policy has the same budget of slots, or of slots that a step reads. A text of prose and one of code are read to
three quarters at once, and then token by token. Needles are one sentence with a code somewhere in prose, and a question
for it at the end: asked within the prompt, before anything is cut, or in a second turn, after the text has been cut.
"""

import argparse
import inspect
import pydoc_data.topics
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.inside_smollm2 import RANDOM, loaded
from experiments.trained import encoded
from jaxattn.cache import (
    Attentive,
    Forecasted,
    HeavyHitters,
    MeanKeys,
    MeanOverTime,
    Policy,
    Quantised,
    Quest,
    Recent,
    Recycled,
    SnapKV,
)
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, check_names
from jaxattn.models import compare_stores

SINKS, HEAVY, VOTES, PAGES, MEANS = "streaming_llm", "h2o", "snapkv", "quest", "moba"
LATE, BITS, AGAIN, AHEAD = "attendre", "kivi", "recycled_attention", "attention_predictor"
EVERY = 10  # every tenth step of recycled and forecast attention is full
NAMES = {
    SINKS: "sinks and recent",
    HEAVY: "heavy hitters",
    VOTES: "SnapKV",
    LATE: "attended to last",
    PAGES: "Quest",
    MEANS: "mean keys",
    AGAIN: "recycled",
    AHEAD: "forecast by the mean",
}


@dataclass(frozen=True)
class Config:
    """A trained decoder, the length of its texts, and budgets.

    Attributes:
        weights: As of the experiment `inside_smollm2`.
        length: Tokens of a text, a multiple of all `parts`.
        parts: A budget is one such part of the text.
        page: Slots per page, of policies that read pages.
        depths: Where a needle lies, in shares of the text.
        bits: Bits of quantised stores, which hold the whole text.
        policies: Names of policies.
    """

    weights: str = "smollm2"
    length: int = 1024
    parts: tuple[int, ...] = (16, 8, 4)
    page: int = 16
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    bits: tuple[int, ...] = (4, 2)
    policies: tuple[str, ...] = tuple(NAMES.values())


QUICK = Config(
    weights=RANDOM,
    length=128,
    parts=(4,),
    page=8,
    depths=(0.2, 0.6),
    bits=(2,),
    policies=("Quest",),
)
EIGHTH = ", at 1/8"
CLAIMS = (
    Claim(
        "At an eighth of the text the tokens with the most attention lose less mass than the most recent ones: at most "
        "nine tenths.",
        paper=HEAVY,
        number="lost by heavy hitters over sinks and recent" + EIGHTH,
        confirmed=at_most(0.9),
        refuted=at_least(1),
    ),
    Claim(
        "What the last queries of a prompt attend to is what later ones need: SnapKV loses at most nine tenths of what "
        "heavy hitters lose.",
        paper=VOTES,
        number="lost by SnapKV over heavy hitters" + EIGHTH,
        confirmed=at_most(0.9),
        refuted=at_least(1),
    ),
    Claim(
        "Pages that are chosen for each query lose at most half of what policies lose that do not know the query.",
        paper=PAGES,
        number="lost by Quest over sinks and recent" + EIGHTH,
        confirmed=at_most(0.5),
        refuted=at_least(1),
    ),
    Claim(
        "The bound finds more than the mean key: Quest loses at most nine tenths of the mass.",
        paper=PAGES,
        number="lost by Quest over mean keys" + EIGHTH,
        confirmed=at_most(0.9),
        refuted=at_least(1),
    ),
    Claim(
        "Quest reads needles as well as the whole store does: nine tenths of its accuracy, or more.",
        paper=PAGES,
        number="needles of Quest over all, second turn" + EIGHTH,
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "SnapKV keeps what a question within the prompt asks for: nine tenths of the accuracy of all, or more.",
        paper=VOTES,
        number="needles of SnapKV over all, in the prompt" + EIGHTH,
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "And loses what is asked for in a second turn: at most half of that accuracy.",
        paper=VOTES,
        number="needles of SnapKV, second turn over in the prompt" + EIGHTH,
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "Heavy hitters lose a needle that is asked for once and late: at most half of the accuracy of all.",
        paper=HEAVY,
        number="needles of heavy hitters over all, second turn" + EIGHTH,
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "The tokens that were attended to last lose less mass than the most recent ones: at most nine tenths.",
        paper=LATE,
        number="lost by attended to last over sinks and recent" + EIGHTH,
        confirmed=at_most(0.9),
        refuted=at_least(1),
    ),
    Claim(
        "What one step attends to is what the next ones need: recycled attention, in which every tenth step is full, "
        "loses at most half of what sinks and recent tokens lose.",
        paper=AGAIN,
        number="lost by recycled over sinks and recent" + EIGHTH,
        confirmed=at_most(0.5),
        refuted=at_least(1),
    ),
    Claim(
        "Recycled attention finds needles in a second turn, though only every tenth step reads all: at least half as "
        "many as the whole store.",
        paper=AGAIN,
        number="needles of recycled over all, second turn" + EIGHTH,
        confirmed=at_least(0.5),
        refuted=at_most(0.2),
    ),
    Claim(
        "A mean over the last 64 steps forecasts better than the last full step alone: it loses at most nine tenths.",
        paper=AHEAD,
        number="lost by forecast by the mean over recycled" + EIGHTH,
        confirmed=at_most(0.9),
        refuted=at_least(1),
    ),
    Claim(
        "Two bits are enough: the loss rises by at most 0.1 nats per token.",
        paper=BITS,
        number="cost of 2 bits",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "Four bits cost next to nothing: at most 0.01 nats per token.",
        paper=BITS,
        number="cost of 4 bits",
        confirmed=at_most(0.01),
        refuted=at_least(0.1),
    ),
)


def policies(config: Config, length: int) -> dict[str, dict[int, Policy]]:
    """The policies by name and part of the text, of a text with so many tokens."""
    recent = max(4, length // (4 * max(config.parts)))
    kept = {
        SINKS: Recent(4),
        HEAVY: HeavyHitters(4, recent),
        VOTES: SnapKV(recent),
        LATE: Attentive("last", 4, 4, recent),
    }
    found: dict[str, dict[int, Policy]] = {}
    for name, retain in kept.items():
        found[NAMES[name]] = {part: Policy(retain, length // part) for part in config.parts}
    for name, select in ((PAGES, Quest), (MEANS, MeanKeys)):
        found[NAMES[name]] = {
            part: Policy(select=select(length // part // config.page, config.page)) for part in config.parts
        }
    found[NAMES[AGAIN]] = {part: Policy(select=Recycled(length // part, EVERY)) for part in config.parts}
    found[NAMES[AHEAD]] = {
        part: Policy(
            select=Forecasted(
                MeanOverTime(), length // part // config.page, config.page, every=EVERY, sinks=4, recent=recent
            )
        )
        for part in config.parts
    }
    check_names("policies", config.policies, found)
    return {name: found[name] for name in config.policies}


def texts(got: Any, length: int) -> np.ndarray:
    """Prose and code of the standard library, [2, length]."""
    prose = (
        " ".join(pydoc_data.topics.topics["exceptions"].split())
        + " "
        + " ".join(pydoc_data.topics.topics["specialnames"].split())
    )
    return np.stack([encoded(got, text)[:length] for text in (prose, inspect.getsource(argparse))])


def needles(got: Any, config: Config, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """(texts with a needle at each depth [depths, length], tokens of the question, tokens of the answer)."""
    hay = encoded(got, " ".join(pydoc_data.topics.topics["specialnames"].split()))
    rows, question = [], encoded(got, "\nQuestion: What is the code of the vault?\nAnswer: The code of the vault is")
    for depth in config.depths:
        code = "".join(map(str, rng.integers(0, 10, 5)))
        needle, answer = encoded(got, f"\nThe code of the vault is {code}.\n"), encoded(got, f" {code}")
        rest = config.length - len(needle) - len(question) - len(answer)
        at = round(depth * rest)
        rows.append(np.concatenate([hay[:at], needle, hay[at:rest], question, answer]))
    return np.stack(rows), len(question), len(answer)


def run(config, seed, folder, console):
    if any(config.length % (part * config.page) for part in config.parts):
        raise ValueError(
            f"length is {config.length}: need a multiple of page times part, {config.page} x {config.parts}"
        )
    got, rng = loaded(config), np.random.default_rng(seed)
    read, (rows, question, answer) = texts(got, config.length), needles(got, config, rng)
    prompt = 3 * config.length // 4
    asked = np.zeros(rows.shape, bool)
    asked[:, -answer:] = True
    turns = {"in the prompt": config.length - answer, "second turn": config.length - answer - question}

    by_part = policies(config, config.length)
    compared = {"all": Policy()}
    compared |= {f"{n} bits": Policy(storage=Quantised(n, config.page, config.page)) for n in config.bits}
    compared |= {f"{name}, 1/{part}": each for name, parts in by_part.items() for part, each in parts.items()}
    console.print("[bold]texts")
    of_text = compare_stores(got.model, read, compared, prompt=prompt, console=console)
    of_turn = {}
    for turn, at in turns.items():
        console.print(f"[bold]needles, {turn}")
        of_turn[turn] = compare_stores(got.model, rows, compared, prompt=at, answers=asked, lost=False, console=console)

    def measured(name: str) -> dict[str, Any]:
        return {
            "memory (MiB)": of_text[name].memory / 2**20,
            "lost mass": float(of_text[name].lost.mean()),
            "loss": of_text[name].loss,
            **{f"needles, {turn}": float(each[name].accuracy.mean()) for turn, each in of_turn.items()},
            "by depth": {turn: each[name].accuracy for turn, each in of_turn.items()},
        }

    bits = {n: measured(f"{n} bits") for n in config.bits}
    found = {(name, part): measured(f"{name}, 1/{part}") for name, parts in by_part.items() for part in parts}
    return results(config, measured("all"), bits, found)


def results(config: Config, whole: Any, bits: Any, found: Any) -> Result:
    """Numbers, tables and figures of what was measured for all tokens, for bits, and by policy and part."""
    part = 8 if 8 in config.parts else config.parts[0]
    late, early = "needles, second turn", "needles, in the prompt"

    def over(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    def of(name: str, what: str) -> float | None:
        return found[NAMES[name], part][what] if (NAMES[name], part) in found else None

    def lost(one: str, other: str) -> float | None:
        return over(of(one, "lost mass"), of(other, "lost mass"))

    numbers = {
        "lost by heavy hitters over sinks and recent" + EIGHTH: lost(HEAVY, SINKS),
        "lost by SnapKV over heavy hitters" + EIGHTH: lost(VOTES, HEAVY),
        "lost by Quest over sinks and recent" + EIGHTH: lost(PAGES, SINKS),
        "lost by Quest over mean keys" + EIGHTH: lost(PAGES, MEANS),
        "lost by attended to last over sinks and recent" + EIGHTH: lost(LATE, SINKS),
        "lost by recycled over sinks and recent" + EIGHTH: lost(AGAIN, SINKS),
        "lost by forecast by the mean over recycled" + EIGHTH: lost(AHEAD, AGAIN),
        "needles of recycled over all, second turn" + EIGHTH: over(of(AGAIN, late), whole[late]),
        "needles of Quest over all, second turn" + EIGHTH: over(of(PAGES, late), whole[late]),
        "needles of SnapKV over all, in the prompt" + EIGHTH: over(of(VOTES, early), whole[early]),
        "needles of SnapKV, second turn over in the prompt" + EIGHTH: over(of(VOTES, late), of(VOTES, early)),
        "needles of heavy hitters over all, second turn" + EIGHTH: over(of(HEAVY, late), whole[late]),
        **{f"cost of {n} bits": bits[n]["loss"] - whole["loss"] if n in bits else None for n in (4, 2)},
    }
    named = {"all": whole} | {f"{n} bits": each for n, each in bits.items()}
    named |= {f"{name}, 1/{part}": each for (name, part), each in found.items()}
    table = [{"policy": name} | {k: x for k, x in each.items() if k != "by depth"} for name, each in named.items()]
    lines = {
        y: {
            name: [(1 / p, found[name, p][y]) for p in sorted(config.parts, reverse=True)]
            for name in dict.fromkeys(name for name, _ in found)
        }
        for y in ("lost mass", "loss", late, early)
    }
    lines["loss"]["all"] = [(1 / p, whole["loss"]) for p in sorted(config.parts, reverse=True)]
    figures: dict[str, Curves | Maps] = {
        title: Curves("share of the slots", y, lines[y], log="x")
        for title, y in (
            ("Lost mass by budget", "lost mass"),
            ("Loss by budget", "loss"),
            ("Needles by budget, second turn", late),
            ("Needles by budget, in the prompt", early),
        )
    }
    for turn in ("second turn", "in the prompt"):
        figures[f"Needles by depth, {turn}"] = Maps(
            {
                name: [found[name, p]["by depth"][turn].tolist() for p in config.parts]
                for name in dict.fromkeys(name for name, _ in found)
            },
            y="share of the slots",
            x="depth",
            rows=[f"1/{part}" for part in config.parts],
            columns=[f"{depth:g}" for depth in config.depths],
            value="right answers",
        )
    return Result(numbers, {"Policies": table}, figures)
