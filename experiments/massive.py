"""Massive channels and rotary pairs in a trained language model (SmolLM2): where they are, and what clearing them does.

The norms of channels of queries, keys and values are measured over a text. Then the largest channel of each head is
cleared while a text with a hidden code is read, and while a question is read whose answer the model knows by heart;
clearing the smallest is the control. Heads whose slow rotary pairs explain their scores of far keys are masked, and
codes near the question are held against codes far from it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import inside_smollm2
from experiments.fixtures import trained
from experiments.heads import answered, needles
from experiments.inside_smollm2 import PARAGRAPH, RANDOM, best, drawn
from experiments.trained import encoded
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Result, at_least, at_most

FACTS = (
    ("The capital of France is the city of", " Paris"),
    ("The capital of Japan is the city of", " Tokyo"),
    ("The capital of Italy is the city of", " Rome"),
    ("The capital of Spain is the city of", " Madrid"),
    ("The capital of Russia is the city of", " Moscow"),
    ("The capital of England is the city of", " London"),
    ("The capital of Greece is the city of", " Athens"),
    ("The capital of Germany is the city of", " Berlin"),
    ("The capital of Egypt is the city of", " Cairo"),
    ("The capital of China is the city of", " Beijing"),
    ("The capital of Ireland is the city of", " Dublin"),
    ("The capital of Austria is the city of", " Vienna"),
)


@dataclass(frozen=True)
class Config:
    """A trained decoder, and the fixture beside it.

    Attributes:
        weights: As of the experiment `inside_smollm2`.
        hay: As of the experiment `heads`, as are the next three.
        digits: Digits of a code.
        draws: Codes that are hidden at each depth.
        depths: Depths, from the first sentence to the last.
        cleared: Channels of each head that are cleared; the claims are about the first.
        distance: Keys further back than this are far, in tokens.
        positional: The share of heads that count as positional.
        others: Draws of as many random heads to compare with.
        rows: Rows of the fixture that are looked at.
        small: Whether the fixture is the one for tests, kept with the results.
    """

    weights: str = "smollm2"
    hay: int = 12
    digits: int = 5
    draws: int = 4
    depths: int = 3
    cleared: tuple[int, ...] = (1, 2, 4)
    distance: int = 32
    positional: float = 0.05
    others: int = 4
    rows: int = 256
    small: bool = False


QUICK = Config(
    weights=RANDOM, hay=2, digits=2, draws=2, depths=2, cleared=(1,), distance=8, positional=0.2, others=2, rows=16,
    small=True,
)  # fmt: skip

MASSIVE, POSITIONAL = "massive_values", "positional_heads"
CLAIMS = (
    Claim(
        "Keys have massive channels and values have none: the largest channel of a head over the mean, at its median "
        "over heads, is 1.5 times as much for keys as for values, or more.",
        paper=MASSIVE,
        number="SmolLM2: concentration of keys over that of values",
        confirmed=at_least(1.5),
        refuted=at_most(1),
    ),
    Claim(
        "So have queries.",
        paper=MASSIVE,
        number="SmolLM2: concentration of queries over that of values",
        confirmed=at_least(1.5),
        refuted=at_most(1),
    ),
    Claim(
        "They stand where rotation is slow: in three quarters of the heads the largest rotary pair of keys is in the "
        "slower half.",
        paper=MASSIVE,
        number="SmolLM2: share of heads whose largest pair of keys is slow",
        confirmed=at_least(0.75),
        refuted=at_most(0.5),
    ),
    Claim(
        "What is in the context is lost without them: clearing the largest channel of each head in queries and keys "
        "loses half of the codes, or more.",
        paper=MASSIVE,
        number="SmolLM2: codes lost, largest channels cleared",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "Without the smallest channels it is not: at most a tenth of the codes is lost.",
        paper=MASSIVE,
        number="SmolLM2: codes lost, smallest channels cleared",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "What is known by heart suffers less: the share of codes that is lost is above that of capitals by 0.2 or "
        "more.",
        paper=MASSIVE,
        number="SmolLM2: codes lost less capitals lost",
        confirmed=at_least(0.2),
        refuted=at_most(0),
    ),
    Claim(
        "Positional heads serve what is far: masking those whose slow pairs explain their far scores best loses more "
        "codes at the first depth than at the last, by a tenth of them or more.",
        paper=POSITIONAL,
        number="SmolLM2: codes lost without positional heads, far less near",
        confirmed=at_least(0.1),
        refuted=at_most(-0.1),
    ),
    Claim(
        "Masking them loses more far codes than masking as many other heads, by a tenth of them or more.",
        paper=POSITIONAL,
        number="SmolLM2: far codes lost, positional less random heads",
        confirmed=at_least(0.1),
        refuted=at_most(0),
    ),
    Claim(
        "FIX-KV-ABSENT: clearing the largest channels costs answers that stand in the row more accuracy than answers "
        "that are known by heart, by 20 points or more.",
        paper=MASSIVE,
        number="FIX-KV-ABSENT: accuracy lost, in the row less by heart",
        confirmed=at_least(0.2),
        refuted=at_most(0),
    ),
)


def cleared(norms: dict[str, Array], count: int, *, smallest: bool, positions: Array | None = None) -> dict[str, Any]:
    """The edits that clear channels of queries and keys of each head, at some positions or at all."""
    on = {site: analysis.extreme_channels(norms[site], count, smallest=smallest) for site in ("q_rotated", "k_rotated")}
    if positions is None:
        return dict(analysis.without_channels(on))
    return {
        site: trace.Layers(trace.OnlyAt(analysis.ClearChannels(each), jnp.tile(positions, (len(each), 1))))
        for site, each in on.items()
    }


def slow_scores(model: Any, tokens: Array, distance: int, *, others: bool) -> Float[np.ndarray, "l n"]:
    """How well the slower half of the rotary pairs explains each head's scores of far keys: the mean correlation.

    Pairs without any spread do not count.
    """
    _, seen = trace.run(model, tokens, record=("q_rotated", "k_rotated"))
    query, key = seen["q_rotated"][:, 0], seen["k_rotated"][:, 0]  # [L, T, N, H]
    key = jnp.repeat(key, query.shape[2] // key.shape[2], 2)

    def of_layer(given: Any) -> Array:
        q, k = (jnp.moveaxis(x, 1, 0) for x in given)
        return jax.lax.map(lambda x: analysis.pair_correlations(*x, distance=distance, others=others), (q, k))

    found = np.asarray(jax.jit(lambda *given: jax.lax.map(of_layer, given))(query, key))
    slow = found[..., found.shape[-1] // 2 :]
    return np.where(np.isnan(slow).all(-1), 0, np.nan_to_num(slow).sum(-1) / np.maximum((~np.isnan(slow)).sum(-1), 1))


def share_lost(before: float, after: float) -> float | None:
    """The share of right answers that is lost; None where there are none."""
    return None if before == 0 else (before - after) / before


def less(x: float | None, y: float | None) -> float | None:
    return None if x is None or y is None else x - y


def run(config, seed, folder, console):
    got = inside_smollm2.loaded(inside_smollm2.Config(weights=config.weights))
    model: Any = got.model
    rng, start, log = np.random.default_rng(seed), got.config["bos_token_id"], console.print

    log("norms of channels")
    text = jnp.asarray(np.concatenate([[start], encoded(got, PARAGRAPH)]))[None]
    sites = ("q", "k", "q_rotated", "k_rotated", "v")
    norms = analysis.channel_norms(model, text, sites)
    spread = {site: np.asarray(analysis.concentration(each)) for site, each in norms.items()}
    median = {site: float(np.median(each)) for site, each in spread.items()}
    pairs = {site: np.asarray(analysis.pair_norms(norms[site])) for site in ("q", "k")}
    slow = {site: (each.argmax(-1) >= each.shape[-1] // 2).mean() for site, each in pairs.items()}
    massive = {site: float(np.asarray(analysis.massive_channels(norms[site])).any(-1).mean()) for site in sites}

    log("channels cleared")
    texts = needles(lambda text: encoded(got, text), start, config, rng)
    tokens, rows = jnp.asarray(texts.tokens), np.flatnonzero(texts.answer) - 1
    prompt = jnp.arange(int(rows[0]) + 1)  # what is read before anything is answered

    def codes(edits: dict[str, Any]) -> float:
        logits, _ = trace.run(model, tokens, edits=edits, logits_at=jnp.asarray(rows))
        return float((np.asarray(logits).argmax(-1) == texts.tokens[:, rows + 1]).all(-1).mean())

    asked = [(encoded(got, question), encoded(got, answer)) for question, answer in FACTS]
    width = max(len(question) for question, _ in asked) + 1
    padded = np.array([[*[0] * (width - 1 - len(question)), start, *question] for question, _ in asked])
    places = np.array([[*[-1] * (width - 1 - len(question)), *range(len(question) + 1)] for question, _ in asked])
    first = np.array([answer[0] for _, answer in asked])

    def capitals(edits: dict[str, Any]) -> float:
        logits, _ = trace.run(model, jnp.asarray(padded), positions=jnp.asarray(places), edits=edits)
        return float((np.asarray(logits[:, -1]).argmax(-1) == first).mean())

    plain = codes({}), capitals({})
    table: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    for which in ("largest", "smallest"):
        for count in config.cleared:
            options: dict[str, Any] = {"smallest": which == "smallest"}
            of_codes = codes(cleared(norms, count, positions=prompt, **options))
            of_capitals = capitals(cleared(norms, count, **options))
            table.append({"cleared": f"{which} {count}", "codes right": of_codes, "capitals right": of_capitals})
            lines.setdefault(f"codes, {which}", [(0.0, plain[0])]).append((float(count), of_codes))
            lines.setdefault(f"capitals, {which}", [(0.0, plain[1])]).append((float(count), of_capitals))
    lost = {name: share_lost(points[0][1], points[1][1]) for name, points in lines.items()}

    log("positional heads")
    scores = slow_scores(model, text, config.distance, others=False)
    control = slow_scores(model, text, config.distance, others=True)
    count = max(1, round(config.positional * scores.size))
    top = best(control, count)
    off = np.concatenate([np.zeros_like(top)[None], top[None], drawn(~top, count, config.others, rng)])
    each = np.asarray(trace.sweep(lambda off: answered(model, texts, off), jnp.asarray(off)))  # [masks, B]
    far, near = (each[:, texts.depth == depth].mean(1) for depth in (0, config.depths - 1))
    without = {
        name: (share_lost(right[0], right[1]), share_lost(right[0], right[2:].mean()))
        for name, right in (("far", far), ("near", near))
    }

    log("FIX-KV-ABSENT")
    fixture = trained(
        "FIX-KV-ABSENT", seed, small=config.small, folder=folder / "fixtures" if config.small else None,
        console=console,
    )  # fmt: skip
    sample = fixture.task.sample(jax.random.key(seed + 1), config.rows)
    inside = analysis.channel_norms(fixture.model, sample.x, ("q_rotated", "k_rotated", "v"))
    known = jnp.repeat(sample.hidden < 0, fixture.task.width + 1, 1)  # of each token of the questions

    def right(edits: dict[str, Any]) -> tuple[float, float]:
        logits, _ = trace.run(fixture.model, sample.x, edits=edits)
        start = fixture.task.start
        hit, counts = (logits.argmax(-1) == sample.y)[:, start:], sample.weights[:, start:]
        return tuple(float((hit * counts * on).sum() / jnp.maximum((counts * on).sum(), 1)) for on in (~known, known))  # type: ignore[return-value]

    whole, largest, smallest = (
        right(edits) for edits in ({}, cleared(inside, 1, smallest=False), cleared(inside, 1, smallest=True))
    )
    of_fixture = {site: float(np.median(analysis.concentration(each))) for site, each in inside.items()}

    numbers = {
        **{f"SmolLM2: median concentration, {site}": x for site, x in median.items()},
        **{f"SmolLM2: share of heads with a massive channel, {site}": x for site, x in massive.items()},
        "SmolLM2: concentration of keys over that of values": median["k_rotated"] / median["v"],
        "SmolLM2: concentration of queries over that of values": median["q_rotated"] / median["v"],
        "SmolLM2: share of heads whose largest pair of keys is slow": float(slow["k"]),
        "SmolLM2: share of heads whose largest pair of queries is slow": float(slow["q"]),
        "SmolLM2: codes answered": plain[0],
        "SmolLM2: capitals answered": plain[1],
        "SmolLM2: codes lost, largest channels cleared": lost["codes, largest"],
        "SmolLM2: codes lost, smallest channels cleared": lost["codes, smallest"],
        "SmolLM2: capitals lost, largest channels cleared": lost["capitals, largest"],
        "SmolLM2: codes lost less capitals lost": less(lost["codes, largest"], lost["capitals, largest"]),
        "SmolLM2: codes lost without positional heads, far less near": less(without["far"][0], without["near"][0]),
        "SmolLM2: far codes lost, positional less random heads": less(*without["far"]),
        "SmolLM2: best correlation of slow pairs": float(scores.max()),
        "SmolLM2: best correlation of slow pairs with the others": float(control.max()),
        **{f"FIX-KV-ABSENT: median concentration, {site}": x for site, x in of_fixture.items()},
        "FIX-KV-ABSENT: answers in the row right": whole[0],
        "FIX-KV-ABSENT: answers by heart right": whole[1],
        "FIX-KV-ABSENT: accuracy lost, in the row less by heart": (whole[0] - largest[0]) - (whole[1] - largest[1]),
        "FIX-KV-ABSENT: the same, smallest channels": (whole[0] - smallest[0]) - (whole[1] - smallest[1]),
    }
    layers = range(len(scores))
    return Result(
        numbers,
        {"Answers with channels cleared": table},
        {
            "Answers by channels cleared": Curves("channels of each head cleared", "share of answers right", lines),
            "Concentration by depth": Curves(
                "layer",
                "largest channel over the mean (median of heads)",
                {
                    site: [(x, float(np.median(spread[site][x]))) for x in layers]
                    for site in ("q_rotated", "k_rotated", "v")
                },
            ),
            "Norms of rotary pairs": Curves(
                "rotary pair, the fastest first",
                "norm over the mean of the head (mean of heads)",
                {
                    site: [
                        (x, float(y))
                        for x, y in enumerate((each / each.mean(-1, keepdims=True)).reshape(-1, each.shape[-1]).mean(0))
                    ]
                    for site, each in pairs.items()
                },
            ),
        },
    )
