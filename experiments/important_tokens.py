"""Which tokens a trained cross-encoder needs, and what its attention and its gradients say they are.

The model reads a query and a passage that answers it, and gives a number from the vector of its first token. How much a
token matters is seen by putting an unknown token in its place (blank-out). Held against that are the weights that the
first token gives in the last layer, what reaches it through all layers by rollout and by maximum flow, and gradients at
the inputs. Special tokens are left out of all comparisons: they cannot be blanked. Correlations are Spearman's, over
the tokens of one text, and means over texts.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.cross_encoder import SMALL, TEXTS, padded, pair, words
from experiments.trained import RANDOM, loaded
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most

MORE = (
    ("Where does the night train stop?", "lisbon", "The night train stops in Lisbon before it goes on to the coast."),
    ("How long is the tunnel?", "nine", "The tunnel is nine kilometers long and was built for two railway lines."),
    ("What colour is the old lighthouse?", "red", "The old lighthouse is red and stands on a rock above the harbour."),
    ("Who won the chess tournament?", "anna", "The chess tournament was won by Anna after a long game on Sunday."),
    ("Which animal guards the castle?", "bear", "The castle is guarded by a bear that sleeps at the gate all day."),
    ("When does the market open?", "dawn", "The market opens at dawn, and by noon all the bread has been sold."),
)


@dataclass(frozen=True)
class Config:
    """A trained cross-encoder, and texts.

    Attributes:
        weights: A name of `python -m jaxattn weights list`; or "random" for a small model that has learned nothing, and
            whose tokens are words.
        texts: How many pairs of a query and the passage that answers it.
        top: The number of heads with the highest, and with the lowest, scores that are ablated.
        chunk: Runs computed at once.
    """

    weights: str = "cross-encoder"
    texts: int = 9
    top: int = 16
    chunk: int = 4


QUICK = Config(weights=RANDOM, texts=2, top=2, chunk=8)
FLOW, PEOPLE, RANKING, ROLES = "attention_flow", "attention_alignment", "bert_ranking", "dodrio"

CLAIMS = (
    Claim(
        "Rollout tells better than the attention of the last layer which tokens matter: its correlation with blank-out "
        "is higher by 0.05 or more.",
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
        "Both agree with blank-out at all: the lower of the two correlations is 0.2 or more.",
        paper=FLOW,
        number="lower of rollout and flow",
        confirmed=at_least(0.2),
        refuted=at_most(0),
    ),
    Claim(
        "Flow is more even than rollout: the entropy of its shares is higher.",
        paper=FLOW,
        number="entropy of flow less rollout (nats)",
        confirmed=at_least(0),
        refuted=at_most(-0.05),
    ),
    Claim(
        "Rollout with the measured share of the residual stream tells more than with one half.",
        paper=FLOW,
        number="rollout, measured shares, less one half",
        confirmed=at_least(0.02),
        refuted=at_most(-0.02),
    ),
    Claim(
        "Removal finds what people would mark: of the tokens of the passage, those of the answer change the score more "
        "than others (AUROC).",
        paper=PEOPLE,
        number="answer found by blank-out (AUROC)",
        confirmed=at_least(0.8),
        refuted=at_most(0.5),
    ),
    Claim(
        "It finds it better than gradients do.",
        paper=PEOPLE,
        number="blank-out less gradients (AUROC)",
        confirmed=at_least(0),
        refuted=at_most(-0.05),
    ),
    Claim(
        "Gradients find it better than the attention of the last layer.",
        paper=PEOPLE,
        number="gradients less last layer (AUROC)",
        confirmed=at_least(0),
        refuted=at_most(-0.05),
    ),
    Claim(
        "The token of the passage whose removal lowers the score most is the answer or a word of the query, in three "
        "quarters of the texts or more.",
        paper=RANKING,
        number="texts whose most needed token is the answer or shared",
        confirmed=at_least(0.75),
        refuted=at_most(0.25),
    ),
    Claim(
        "Heads that read what matters are needed: ablated one at a time, those with the highest semantic scores change "
        "the score more than those with the lowest, by half as much again.",
        paper=ROLES,
        number="change without heads of high over low semantic scores",
        confirmed=at_least(1.5),
        refuted=at_most(1),
    ),
)


def score(output: Array) -> Array:
    return output[:, 0]


def of_places(effects: Array, length: int) -> np.ndarray:
    """The effects of the tokens that are none of the special ones, [B, T], 0 for these."""
    return np.pad(np.asarray(effects), ((0, 0), (0, length - effects.shape[1])))


def entropy(shares: np.ndarray) -> float:
    return float(-(shares * np.log(np.maximum(shares, 1e-30))).sum())


def run(config, seed, folder, console):
    texts = [(query, answer, passage) for query, answer, passage, *_ in (*TEXTS, *MORE)]
    if not 1 <= config.texts <= len(texts):
        raise ValueError(f"texts is {config.texts}: need 1 to {len(texts)}")
    got, log = loaded(config.weights, SMALL), console.print
    model: Any = got.model
    tokenizer = words() if got.tokenizer is None else got.tokenizer
    pairs = [pair(tokenizer, query, passage, answer) for query, answer, passage in texts[: config.texts]]
    classes = padded([each.classes for each in pairs], -1)
    positions = np.where(classes >= 0, np.arange(classes.shape[1]), -1)
    types = padded([each.types for each in pairs], 0)
    options: dict[str, Any] = {"types": jnp.asarray(types), "positions": jnp.asarray(positions)}
    tokens = jnp.asarray(padded([each.ids for each in pairs], 0))
    unknown = tokenizer.token_to_id("[UNK]")

    log("tokens blanked and taken out")
    own = jnp.where(jnp.asarray((classes == 0) | (classes == 1)), jnp.arange(classes.shape[1]), -1)
    inputs = {"groups": own, "chunk": config.chunk, **options}
    blanked = of_places(analysis.token_effects(model, tokens, score, blank=unknown, **inputs), classes.shape[1])
    removed = of_places(analysis.token_effects(model, tokens, score, **inputs), classes.shape[1])

    log("attention and gradients")
    output, seen = trace.run(model, tokens, record=("weights", "resid_pre", "attn_out"), **options)
    weights = seen["weights"]
    shares = analysis.residual_share(seen["resid_pre"], seen["attn_out"])
    rolled = np.asarray(analysis.rollout(weights)[-1, :, 0])
    by_norms = np.asarray(analysis.rollout(weights, shares)[-1, :, 0])
    raw = np.asarray(weights.mean(2))
    at = analysis.input_gradients(model, tokens, score, **options)
    flow = np.zeros_like(rolled)
    for number, each in enumerate(pairs):
        length = len(each.ids)
        flow[number, :length] = analysis.max_flow(weights[:, number : number + 1, :, :length, :length], [0])[0, 0]
    ways = {
        "last layer": raw[-1, :, 0],
        "mean of layers": raw[:, :, 0].mean(0),
        "received in all layers": raw.sum((0, 2)),
        "rollout": rolled,
        "rollout, measured shares": by_norms,
        "flow": flow,
        "gradient": np.asarray(at.saliency()),
        "input x gradient": abs(np.asarray(at.times_input())),
        "blank-out": abs(blanked),
        "taken out": abs(removed),
    }

    correlations: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    for name, importance in ways.items():
        of_texts = [(classes[b] == 0) | (classes[b] == 1) for b in range(len(pairs))]
        correlations[name] = [
            float(analysis.rank_correlation(importance[b][here], abs(blanked[b])[here]))
            for b, here in enumerate(of_texts)
        ]
        found[name] = []
        for b, each in enumerate(pairs):
            passage = each.classes == 1
            chances = jnp.asarray(importance[b, : len(passage)][passage]), jnp.asarray(each.answer[passage])
            found[name].append(float(analysis.auroc(*chances)))
    means = {name: float(np.mean(each)) for name, each in correlations.items()}
    chance = {name: float(np.mean(each)) for name, each in found.items()}
    most = [
        int(np.where(each.classes == 1, removed[b, : len(each.classes)], -np.inf).argmax())
        for b, each in enumerate(pairs)
    ]
    hit = [bool(each.answer[place] or each.shared[place]) for each, place in zip(pairs, most, strict=True)]

    log("heads")
    sums = jnp.abs(at.gradient).sum(-1)  # the L1 norm of the paper
    semantic = np.asarray(analysis.semantic_scores(weights, jnp.where(positions >= 0, sums, 0)).mean(1))

    def scores(edits: Any, start: Any) -> Array:
        return score(model(tokens, edits=edits, start=start, **options)[0])

    ablated = trace.sweep(scores, trace.heads(model), chunk=config.chunk, resid_pre=seen["resid_pre"])
    change = np.asarray(jnp.abs(ablated - score(output)).mean(-1))
    order = np.argsort(semantic.ravel())
    low, high = (float(change.ravel()[some].mean()) for some in (order[: config.top], order[-config.top :]))
    regular = jnp.asarray((classes == 0) | (classes == 1))
    sure = np.asarray(analysis.confidence(weights, regular).mean(1))

    numbers = {
        **{f"correlation with blank-out, {name}": value for name, value in means.items() if name != "blank-out"},
        "rollout less last layer": means["rollout"] - means["last layer"],
        "flow less last layer": means["flow"] - means["last layer"],
        "lower of rollout and flow": min(means["rollout"], means["flow"]),
        "rollout, measured shares, less one half": means["rollout, measured shares"] - means["rollout"],
        "entropy of rollout (nats)": float(np.mean([entropy(row) for row in rolled])),
        "entropy of flow less rollout (nats)": float(
            np.mean([entropy(a) - entropy(b) for a, b in zip(flow, rolled, strict=True)])
        ),
        "mean share of the residual stream": float(np.asarray(shares)[:, positions >= 0].mean()),
        **{f"answer found by {name} (AUROC)": value for name, value in chance.items()},
        "blank-out less gradients (AUROC)": chance["blank-out"] - chance["gradient"],
        "gradients less last layer (AUROC)": chance["gradient"] - chance["last layer"],
        "texts whose most needed token is the answer or shared": float(np.mean(hit)),
        "change without heads of high semantic scores": high,
        "change without heads of low semantic scores": low,
        "change without heads of high over low semantic scores": high / low,
        "rank correlation of semantic scores and changes, over heads": float(
            analysis.rank_correlation(semantic.ravel(), change.ravel())
        ),
    }
    shown = pairs[0]
    lines = {
        name: [(place, float(x[0, place] / x[0, : len(shown.ids)].max())) for place in range(1, len(shown.ids) - 1)]
        for name, x in ways.items()
        if name in ("last layer", "rollout", "flow", "gradient", "blank-out")
    }
    return Result(
        numbers,
        {
            "Agreement with blank-out by text (Spearman)": [
                {"query": texts[b][0]} | {name: each[b] for name, each in correlations.items() if name != "blank-out"}
                for b in range(len(pairs))
            ],
            "What the score falls by most": [
                {
                    "query": texts[b][0],
                    "score": float(output[b, 0]),
                    "token": each.strings[most[b]],
                    "falls by": float(removed[b, most[b]]),
                    "answer or shared": "yes" if hit[b] else "no",
                }
                for b, each in enumerate(pairs)
            ],
            "Ways to find the answer (AUROC among tokens of the passage)": [
                {"way": name, "mean": chance[name], "lowest": min(each), "highest": max(each)}
                for name, each in found.items()
            ],
        },
        {
            "Importance of the tokens of one text": Curves("place of the token", "share of the largest", lines),
            "Heads": Maps(
                {
                    f"{name} (max {each.max():.2f})": each.T.tolist()
                    for name, each in (
                        ("semantic score", semantic),
                        ("confidence, without special tokens", sure),
                        ("change of the score when ablated", change),
                    )
                },
                y="head",
                x="layer",
            ),
        },
    )
