"""What the attention of a small encoder says about how it tells balanced brackets: flow, partners, and needed heads.

The encoder answers at its first token. How much a bracket matters is seen by taking it out; attention of the last
layer, rollout and maximum flow are held against that. Whether heads read the partner of a bracket is known exactly. All
rows that are looked at are balanced.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.fixtures import trained
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most


@dataclass(frozen=True)
class Config:
    """A trained fixture, and rows of brackets.

    Attributes:
        small: Whether the fixture is of the size for tests, which has learned little.
        rows: Rows that are drawn; of them the balanced ones are looked at.
        chunk: Runs computed at once.
    """

    small: bool = False
    rows: int = 64
    chunk: int = 4


QUICK = Config(small=True, rows=12, chunk=8)
FLOW, BERT, ROLES = "attention_flow", "bert_attention_stats", "dodrio"

CLAIMS = (
    Claim(
        "Rollout tells better than the attention of the last layer which tokens matter (Spearman with the change of "
        "the answer without a token).",
        paper=FLOW,
        number="rollout less last layer",
        confirmed=at_least(0.05),
        refuted=at_most(0),
    ),
    Claim(
        "So does maximum flow.",
        paper=FLOW,
        number="flow less last layer",
        confirmed=at_least(0.05),
        refuted=at_most(0),
    ),
    Claim(
        "Some head reads the partner of a bracket more often than the best fixed offset finds it, by 0.1 or more.",
        paper=BERT,
        number="best head less best offset",
        confirmed=at_least(0.1),
        refuted=at_most(0),
    ),
    Claim(
        "All heads together find partners better than the best one alone: the attention-only probe, by 0.05 or more.",
        paper=BERT,
        number="probe less best head",
        confirmed=at_least(0.05),
        refuted=at_most(0),
    ),
    Claim(
        "The head that reads what matters most is needed more than the one that reads it least.",
        paper=ROLES,
        number="change without the head of the highest less the lowest semantic score",
        confirmed=at_least(0),
        refuted=at_most(-0.1),
    ),
)


def margin(output: Array) -> Array:
    """How much more the model takes a row for balanced than for not, in nats."""
    return output[:, 1] - output[:, 0]


def run(config, seed, folder, console):
    log = console.print
    fixture = trained("FIX-CLS", seed, small=config.small, folder=folder if config.small else None, console=console)
    model: Any = fixture.model
    prompt = fixture.task.sample(jax.random.key(seed), config.rows)
    # In a balanced row every bracket has its partner; of a swapped row that is still balanced partners are not known.
    partner = np.asarray(prompt.hidden)
    opened = np.take_along_axis(np.asarray(prompt.x), np.maximum(partner, 0), 1)
    fits = abs(np.asarray(prompt.x) - opened) == fixture.task.kinds
    some = (np.asarray(prompt.y)[:, 0] == 1) & fits[:, 1:].all(1)
    if some.sum() < 2:
        raise ValueError(f"rows is {config.rows}: need more, {some.sum()} of them are balanced as drawn")
    tokens, partner = prompt.x[some], partner[some]

    log("tokens taken out")
    groups = jnp.arange(-1, tokens.shape[1] - 1)[None].repeat(len(tokens), 0)  # the first token stays
    effects = np.asarray(analysis.token_effects(model, tokens, margin, groups=groups, chunk=config.chunk))
    output, seen = trace.run(model, tokens, record=("weights", "resid_pre"))
    weights = seen["weights"]
    ways = {
        "last layer": np.asarray(weights[-1, :, :, 0].mean(1)),
        "rollout": np.asarray(analysis.rollout(weights)[-1, :, 0]),
        "flow": analysis.max_flow(weights, [0])[:, 0],
    }
    at = analysis.input_gradients(model, tokens, margin)
    ways["gradient"] = np.asarray(at.saliency())
    means = {
        name: float(np.nanmean(np.asarray(analysis.rank_correlation(x[:, 1:], abs(effects)))))
        for name, x in ways.items()
    }

    log("partners")
    without = np.asarray(weights)[..., 1:, 1:]  # between brackets
    heads = partner[:, 1:] - 1
    half = len(tokens) // 2
    found = np.stack([analysis.relation_accuracy(without[:, b], heads[b]) for b in range(len(tokens))])  # [B, L, N, 2]
    best = np.unravel_index(found[:half].mean(0).argmax(), found.shape[1:])
    alone = float(found[half:].mean(0)[best])
    baseline = analysis.best_offset(heads[half:])[1]
    maps = np.moveaxis(without, 0, 1).reshape(len(tokens), -1, *without.shape[-2:])
    probe = analysis.fit_attention_probe(maps[:half], heads[:half], penalty=0.1)
    probed = float((np.asarray(probe.guess(maps[half:])) == heads[half:]).mean())

    log("heads")
    sums = jnp.abs(at.gradient).sum(-1)
    semantic = np.asarray(analysis.semantic_scores(weights, sums).mean(1))

    def scores(edits: Any) -> Array:
        return jnp.abs(margin(model(tokens, edits=edits)[0]) - margin(output)).mean()

    change = np.asarray(trace.sweep(scores, trace.heads(model), chunk=config.chunk))
    low, high = (float(change.ravel()[place]) for place in (semantic.argmin(), semantic.argmax()))
    shown = {name: each[0, 1:] for name, each in ways.items()} | {"taken out": abs(effects[0])}
    numbers = {
        "accuracy of the model": fixture.accuracy,
        **{f"correlation with taking out, {name}": value for name, value in means.items()},
        "rollout less last layer": means["rollout"] - means["last layer"],
        "flow less last layer": means["flow"] - means["last layer"],
        "partners found by the best head": alone,
        "partners found by the best offset": baseline,
        "partners found by the probe": probed,
        "best head less best offset": alone - baseline,
        "probe less best head": probed - alone,
        "change without the head of the highest semantic score": high,
        "change without the head of the lowest semantic score": low,
        "change without the head of the highest less the lowest semantic score": high - low,
    }
    return Result(
        numbers,
        {
            "Heads": [
                {
                    "head": f"layer {layer}, head {head}",
                    "reads the partner": float(found[:, layer, head, 0].mean()),
                    "is read by the partner": float(found[:, layer, head, 1].mean()),
                    "semantic score": float(semantic[layer, head]),
                    "change when ablated": float(change[layer, head]),
                }
                for layer, head in np.ndindex(*semantic.shape)
            ]
        },
        {
            "Importance of the brackets of one row": Curves(
                "place of the bracket",
                "share of the largest",
                {
                    name: [(place + 1, float(x[place] / x.max())) for place in range(len(x))]
                    for name, x in shown.items()
                },
            ),
            "Heads, partners read": Maps({"reads the partner": found[..., 0].mean(0).T.tolist()}, y="head", x="layer"),
        },
    )
