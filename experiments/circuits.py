"""Circuits over training: which edges carry induction in a small model while it learns, and how few are faithful.

FIX-IND is looked at after several numbers of steps. The clean text is blocks of random tokens that come again, and the
corrupted one has another first copy, so that nothing foretells the second. Edges are scored by gradients, at the clean
text alone (EAP) and on the way between both (EAP-IG), and a circuit is the edges with the largest scores.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.fixtures import trained
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Result, at_least, at_most

KEPT = 0.8  # the faithfulness that a circuit needs, as the paper has it as we remember it


@dataclass(frozen=True)
class Config:
    """FIX-IND at several steps of its training.

    Attributes:
        steps: When the model is looked at, ascending.
        rows: Texts.
        period: Tokens of a block, each of which comes twice.
        gradients: Gradients that are averaged between both texts.
        counts: Numbers of edges in a circuit, ascending.
        small: Whether the fixture is the one for tests, kept with the results.
    """

    steps: tuple[int, ...] = (300, 600, 900, 1200)
    rows: int = 16
    period: int = 24
    gradients: int = 8
    counts: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    small: bool = False


QUICK = Config(steps=(5, 10), rows=2, period=5, gradients=2, counts=(2, 8), small=True)

PAPER = "circuits_over_training"
CLAIMS = (
    Claim(
        "A quarter of the edges keeps 80 percent of what the model gains on the second copy, at the end of training.",
        paper=PAPER,
        number="share of the edges that is faithful, last step",
        confirmed=at_most(0.25),
        refuted=at_least(0.75),
    ),
    Claim(
        "Gradients on the way find circuits that are no larger than those of gradients at the clean text.",
        paper=PAPER,
        number="edges that are faithful, EAP-IG over EAP",
        confirmed=at_most(1),
        refuted=at_least(1.5),
    ),
    Claim(
        "The edge into keys with the largest score leads from the previous-token head to the keys of layer 1.",
        paper=PAPER,
        number="whether the largest edge into keys of layer 1 is from the best previous-token head",
        confirmed=at_least(1),
        refuted=at_most(0),
    ),
    Claim(
        "Circuits settle: the edges of the two last looks overlap more than those of the first and the last, by 0.1 or "
        "more (Jaccard).",
        paper=PAPER,
        number="overlap of the last two looks less that of the first and last",
        confirmed=at_least(0.1),
        refuted=at_most(-0.1),
    ),
    Claim(
        "Edges that are drawn at random do not carry it: as many as the faithful circuit keep a tenth or less.",
        paper=PAPER,
        number="kept by as many random edges, last step",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
)


def overlap(one: trace.Circuit, other: trace.Circuit) -> float | None:
    """The edges that are in both circuits over those that are in one of them; None where there are none."""
    a, b = (np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(each)]) for each in (one, other))
    return float((a & b).sum() / (a | b).sum()) if (a | b).any() else None


def smallest(counts: tuple[int, ...], kept: Any) -> int | None:
    """The smallest number of edges from which on all larger circuits are faithful; None if none is."""
    good = np.flip(np.cumprod(np.flip(np.asarray(kept) >= KEPT))).astype(bool)
    return counts[int(good.argmax())] if good.any() else None


def run(config, seed, folder, console):
    if config.steps != tuple(sorted(config.steps)) or len(config.steps) < 2:
        raise ValueError(f"steps is {config.steps}: need two or more, ascending")
    circuits, lines, rows = [], {}, []
    numbers: dict[str, float | None] = {claim.number: None for claim in CLAIMS}
    for steps in config.steps:
        console.print(f"circuits: {steps} steps")
        fixture = trained(
            "FIX-IND", seed, steps=steps, small=config.small, folder=folder / "fixtures" if config.small else None,
            console=console,
        )  # fmt: skip
        model, first = fixture.model, fixture.task.letters
        # Tokens of a block differ, so that the corrupted copy foretells nothing.
        drawn = jax.random.uniform(jax.random.key(seed), (2, config.rows, first)).argsort(-1)[..., : config.period]
        begin = jnp.full((config.rows, 1), first)
        clean, corrupted = (jnp.concatenate([begin, one, drawn[0]], 1) for one in drawn)

        def metric(logits: Any, clean: Any = clean) -> Any:
            """The mean log-probability of the second copy, but for its first token."""
            right = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), clean[:, 1:, None], -1)[..., 0]
            return right[:, 1 - config.period :].mean()

        scores = {
            name: trace.edge_attribution(model, clean, corrupted, metric, steps=gradients)
            for name, gradients in (("EAP-IG", config.gradients), ("EAP", None))
        }
        every = scores["EAP-IG"].count
        counts = (*(count for count in config.counts if count < every), every)
        kept = {
            name: trace.faithfulness(model, clean, corrupted, metric, each, counts, key=jax.random.key(seed))
            for name, each in scores.items()
        }
        sizes = {name: smallest(counts, each.kept) for name, each in kept.items()}
        size = sizes["EAP-IG"]
        circuit = trace.largest(scores["EAP-IG"], every if size is None else size)
        circuits.append(circuit)
        found = analysis.detect(
            model, jax.random.key(seed), vocabulary=first, first=first, length=model.config.length - 1
        )
        into_keys = np.abs(np.asarray(scores["EAP-IG"].key[:, 1])).max(1)  # of each writer, into keys of layer 1
        names = scores["EAP-IG"].names()
        previous = found["previous token"].score[0]
        best = names[1 + int(previous.argmax())]
        lines[f"{steps} steps"] = list(zip(map(float, counts), map(float, kept["EAP-IG"].kept), strict=True))
        rows.append(
            {
                "step": steps,
                "gain of the second copy (nats)": float(metric(model(clean)[0]) - metric(model(corrupted)[0])),
                "edges of the faithful circuit": None if size is None else float(size),
                "the same, EAP": None if sizes["EAP"] is None else float(sizes["EAP"]),
                "previous-token score": float(previous.max()),
                "induction score": float(found["induction"].score[1].max()),
                "largest edge into keys is from it": float(names[int(into_keys.argmax())] == best),
            }
        )
    if size is not None:
        numbers["share of the edges that is faithful, last step"] = size / every
        numbers["kept by as many random edges, last step"] = float(kept["EAP-IG"].random[counts.index(size)])
        if sizes["EAP"] is not None:
            numbers["edges that are faithful, EAP-IG over EAP"] = size / sizes["EAP"]
    numbers["whether the largest edge into keys of layer 1 is from the best previous-token head"] = float(
        rows[-1]["largest edge into keys is from it"]
    )
    late, early = overlap(circuits[-2], circuits[-1]), overlap(circuits[0], circuits[-1])
    numbers |= {
        "overlap of the last two looks less that of the first and last": None
        if late is None or early is None
        else late - early,
        "edges of the model": float(every),
        "answers right at the last step": fixture.accuracy,
    }
    return Result(
        numbers,
        {"Looks": rows},
        {
            "Faithfulness by edges": Curves("edges kept", "share of the gain that is kept", lines, log="x"),
            "Heads over training": Curves(
                "step",
                "score",
                {
                    name: [(float(row["step"]), row[f"{name} score"]) for row in rows]
                    for name in ("previous-token", "induction")
                },
            ),
        },
    )
