"""What moves the score of a trained cross-encoder: tokens taken out, heads ablated, and heads of another passage.

A cross-encoder reads a query and a passage together and gives one number, how well the passage answers. Here each of
three queries has a passage that answers, one with the same words that does not, as long in tokens, and an unrelated
one. A token is taken out as padding: no other token sees it, and the others stay where they are. Effects are in units
of the score, a logit. Gradients that are averaged on the way from one passage to the other are the same in both
directions, so they cannot foretell both. What answering passages get, and what others do, had been seen before the
claims were written down, on other texts.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from experiments.trained import RANDOM, loaded
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most

# (query, words of it that are the answer, the passage that answers, the one of the same words, the unrelated one)
TEXTS = (
    (
        "When was the stone bridge opened?",
        "1874",
        "The stone bridge over the river was opened in 1874 after four years of work.",
        "The stone bridge over the river was crowded in summer with visitors from all sides.",
        "Bread dough rises faster in a warm kitchen than it does in a cold one.",
    ),
    (
        "Who wrote the violin concerto?",
        "clara brandt",
        "The violin concerto was written by a young composer named Clara Brandt in Vienna.",
        "The violin concerto was played by a large orchestra and recorded twice in Vienna.",
        "Bread dough rises faster in a warm kitchen than it does in a cold one.",
    ),
    (
        "What do bees make honey from?",
        "flowers",
        "Bees make their honey from flowers in the fields, and they keep it in the hive.",
        "Bees do not like the smoke, and their honey is sold in the village in autumn.",
        "Bread dough rises faster in a warm kitchen than it does in a cold one.",
    ),
)
KINDS = ("answers", "same words", "unrelated")
CLASSES = ("query", "passage", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Config:
    """A trained cross-encoder.

    Attributes:
        weights: A name of `python -m jaxattn weights list`; or "random" for a small model that has learned nothing,
            and whose tokens are words.
        queries: How many of the queries of `TEXTS` are asked.
        steps: Gradients that are averaged on the way from one passage to the other, beside the one at its start.
        chunk: Runs computed at once.
    """

    weights: str = "cross-encoder"
    queries: int = 3
    steps: int = 8
    chunk: int = 6


QUICK = Config(weights=RANDOM, queries=2, steps=2, chunk=4)
SMALL = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_act": "gelu",
    "hidden_size": 32,
    "id2label": {"0": "LABEL_0"},
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "type_vocab_size": 2,
    "vocab_size": 100,
}

RANKING, BERT, HEADS, PATCHES = "cross_encoder", "bert_attention_stats", "head_importance", "attribution_patching"
CLAIMS = (
    Claim(
        "The model sees more than shared words: each answering passage scores above the one of the same words by 2 or "
        "more.",
        paper=RANKING,
        number="least margin, answers over same words",
        confirmed=at_least(2),
        refuted=at_most(0),
    ),
    Claim(
        "Shared words count: they score above unrelated passages by 2 or more.",
        paper=RANKING,
        number="least margin, same words over unrelated",
        confirmed=at_least(2),
        refuted=at_most(0),
    ),
    Claim(
        "Without its answer an answering passage scores less: taking out a token of the answer costs 3 times what it "
        "changes to take out another token of the passage that is not in the query, or more.",
        paper=RANKING,
        number="answer over other tokens of the passage",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "Words that stand in the query and in the passage matter more than other words: taking one out changes the "
        "score of an answering passage 1.5 times as much, or more.",
        paper=RANKING,
        number="shared over other tokens",
        confirmed=at_least(1.5),
        refuted=at_most(1),
    ),
    Claim(
        "Most heads can be spared one at a time (z = 0): 90 percent change the margin of answers over same words by "
        "less than a tenth of it.",
        paper=HEADS,
        number="share of heads that change the margin by less than a tenth",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "No single head decides the order: whichever is ablated, every answering passage stays first.",
        paper=HEADS,
        number="share of heads without which the order stays",
        confirmed=at_least(1),
        refuted=at_most(0.9),
    ),
    Claim(
        "Layers in the middle rest on [SEP]: in some layer it gets half of all weight or more.",
        paper=BERT,
        number="weight on [SEP], largest of layers",
        confirmed=at_least(0.5),
        refuted=at_most(0.2),
    ),
    Claim(
        "Gradients foretell patches: over all heads attribution and true patching correlate, where values of the "
        "answering passage are put into the one of the same words.",
        paper=PATCHES,
        number="correlation of attribution and patching, denoising",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "And the other way round.",
        paper=PATCHES,
        number="correlation of attribution and patching, noising",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "The mean of gradients on the way foretells better than the one at the start, in both directions.",
        paper=PATCHES,
        number="correlation with steps less without, least of both ways",
        confirmed=at_least(0),
        refuted=at_most(-0.05),
    ),
)


def words() -> Any:
    """A tokenizer of pairs whose tokens are words, for a model without one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    found = dict.fromkeys(
        word for text in TEXTS for part in text for word, _ in made.pre_tokenizer.pre_tokenize_str(part.lower())
    )
    made.add_tokens(list(found))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


@dataclass(frozen=True)
class Pair:
    """A query and a passage as tokens.

    Attributes:
        ids: The tokens.
        types: 0 for tokens of the query, 1 for those of the passage.
        strings: The tokens, to be read.
        classes: The number of each token in `CLASSES`.
        answer: Whether a token is part of the answer.
        shared: Whether a token stands in the query and in the passage.
    """

    ids: list[int]
    types: list[int]
    strings: list[str]
    classes: Int[np.ndarray, " t"]
    answer: Bool[np.ndarray, " t"]
    shared: Bool[np.ndarray, " t"]


def pair(tokenizer: Any, query: str, passage: str, answer: str) -> Pair:
    """A pair as tokens. Raises ValueError if the passage holds the answer, but no token of it."""
    both = tokenizer.encode(query, passage)
    at = passage.lower().find(answer)
    classes, of_answer = [], []
    for token, sequence, (start, end) in zip(both.tokens, both.sequence_ids, both.offsets, strict=True):
        classes.append(CLASSES.index(token) if sequence is None else sequence)
        of_answer.append(sequence == 1 and at >= 0 and at <= start < end <= at + len(answer))
    if at >= 0 and not any(of_answer):
        raise ValueError(f"answer {answer!r} is no whole token of {passage!r}")
    asked, told = ({token for token, x in zip(both.tokens, classes, strict=True) if x == kind} for kind in (0, 1))
    words = {token for token in asked & told if token.isalnum()}
    shared = [token in words and x < 2 for token, x in zip(both.tokens, classes, strict=True)]
    return Pair(both.ids, both.type_ids, both.tokens, np.array(classes), np.array(of_answer), np.array(shared))


def padded(rows: Any, fill: int) -> np.ndarray:
    """[B, T]"""
    length = max(map(len, rows))
    return np.array([[*row, *[fill] * (length - len(row))] for row in rows])


def run(config, seed, folder, console):
    if not 1 <= config.queries <= len(TEXTS):
        raise ValueError(f"queries is {config.queries}: need 1 to {len(TEXTS)}")
    got, log = loaded(config.weights, SMALL), console.print
    model: Any = got.model
    tokenizer = words() if got.tokenizer is None else got.tokenizer
    texts = TEXTS[: config.queries]
    # Kind by kind, so that scores are [3, queries].
    pairs = [pair(tokenizer, text[0], text[2 + kind], text[1]) for kind in range(3) for text in texts]
    answers, others = pairs[: config.queries], pairs[config.queries : 2 * config.queries]
    for one, other in zip(answers, others, strict=True):
        if len(one.ids) != len(other.ids):
            raise ValueError(f"passages have {len(one.ids)} and {len(other.ids)} tokens: need as many, {one.strings}")
    ids, types = padded([each.ids for each in pairs], 0), padded([each.types for each in pairs], 0)
    classes = padded([each.classes for each in pairs], -1)
    positions = np.where(classes >= 0, np.arange(ids.shape[1]), -1)
    options: dict[str, Any] = {"types": jnp.asarray(types), "positions": jnp.asarray(positions)}
    tokens = jnp.asarray(ids)

    log("tokens taken out")
    output, records = trace.run(model, tokens, record=("resid_pre",), **options)
    plain = np.asarray(output[:, 0]).reshape(3, -1)
    length = ids.shape[1]
    effects = []
    for row in range(config.queries):
        places = np.tile(positions[row], (length, 1))
        np.fill_diagonal(places, -1)
        tiled: dict[str, Any] = {"types": jnp.tile(types[row], (length, 1)), "positions": jnp.asarray(places)}
        without, _ = trace.run(model, jnp.tile(ids[row], (length, 1)), **tiled)
        effects.append(np.asarray(without[:, 0])[: len(pairs[row].ids)] - plain[0, row])
    kinds = {
        "answer": lambda each: each.answer,
        "query, shared with the passage": lambda each: each.shared & (each.classes == 0),
        "query, other": lambda each: ~each.shared & (each.classes == 0),
        "passage, shared with the query": lambda each: each.shared & (each.classes == 1),
        "passage, other": lambda each: ~each.shared & ~each.answer & (each.classes == 1),
        "[SEP]": lambda each: each.classes == 3,
    }
    group = {
        name: np.concatenate([effect[on(each)] for effect, each in zip(effects, answers, strict=True)])
        for name, on in kinds.items()
    }

    log("heads ablated")

    def scores(edits: Any, start: Any) -> Array:
        return model(tokens, edits=edits, start=start, **options)[0][:, 0]

    ablated = np.asarray(trace.sweep(scores, trace.heads(model), chunk=config.chunk, resid_pre=records["resid_pre"]))
    ablated = ablated.reshape(*ablated.shape[:2], 3, -1)  # [layers, heads, kinds, queries]
    margin, margins = plain[0] - plain[1], ablated[:, :, 0] - ablated[:, :, 1]
    moved = ((margins - margin) / margin).mean(-1)
    first = (ablated[:, :, :1] > ablated[:, :, 1:]).all((2, 3))

    log("where heads look")
    mass = np.asarray(analysis.between_classes(model, tokens, jnp.asarray(classes), len(CLASSES), **options)).mean(1)
    share = np.array([(classes == kind).sum() for kind in range(len(CLASSES))]) / (classes >= 0).sum()
    received = (mass * share[:, None]).sum(1)  # of all tokens, [layers, classes]

    log("patching")
    some = slice(0, config.queries), slice(config.queries, 2 * config.queries)
    shares, guesses = {}, {}
    for way, (base, source) in (("denoising", some[::-1]), ("noising", some)):
        chosen: dict[str, Any] = {name: each[base] for name, each in options.items()}
        if not (types[base] == types[source]).all():
            raise ValueError("the queries of two passages have different lengths: need the same in both")
        runs = tokens[base], tokens[source], lambda output: output[:, 0]
        found = trace.interchange(model, *runs, trace.heads(model), chunk=config.chunk, **chosen)
        shares[way] = np.asarray(found.share)  # [layers, heads, queries]
        gap = np.asarray(found.source - found.base)
        for name, steps in (("", None), (", with steps", config.steps)):
            guess = trace.attribution(model, *runs, steps=steps, **chosen)["z"]
            guesses[way + name] = np.asarray(guess.sum(2)).swapaxes(1, 2) / gap
    agreed = {
        name: [
            float(np.corrcoef(shares[name.split(",")[0]][..., query].flat, guess[..., query].flat)[0, 1])
            for query in range(config.queries)
        ]
        for name, guess in guesses.items()
    }
    means = {name: float(np.mean(each)) for name, each in agreed.items()}

    numbers = {
        "least margin, answers over same words": float(margin.min()),
        "least margin, same words over unrelated": float((plain[1] - plain[2]).min()),
        "answer over other tokens of the passage": float(-group["answer"].mean() / abs(group["passage, other"]).mean()),
        "shared over other tokens": float(
            abs(np.concatenate([x for name, x in group.items() if "shared" in name])).mean()
            / abs(np.concatenate([x for name, x in group.items() if "other" in name])).mean()
        ),
        "share of heads that change the margin by less than a tenth": float((abs(moved) < 0.1).mean()),
        "share of heads without which the order stays": float(first.mean()),
        "largest change of the margin by a head": float(abs(moved).max()),
        "weight on [SEP], largest of layers": float(received[:, 3].max()),
        "weight on [CLS], largest of layers": float(received[:, 2].max()),
        **{f"correlation of attribution and patching, {name}": each for name, each in means.items()},
        "correlation with steps less without, least of both ways": min(
            means[f"{way}, with steps"] - means[way] for way in shares
        ),
        **{f"sum of shares, {way}": float(each.sum((0, 1)).mean()) for way, each in shares.items()},
        **{f"largest share of a head, {way}": float(each.mean(-1).max()) for way, each in shares.items()},
    }
    shown = answers[0]
    layers = range(len(mass))
    rows: list[dict[str, Any]] = [
        {
            "head": f"layer {layer}, head {head}",
            "margin moved when ablated (share of it)": float(moved[layer, head]),
        }
        | {f"{way}, share of the gap": float(each[layer, head].mean()) for way, each in shares.items()}
        | {f"{name}, by gradient": float(each[layer, head].mean()) for name, each in guesses.items()}
        for layer, head in np.ndindex(moved.shape)
    ]
    agreement: list[dict[str, Any]] = [
        {"way": name} | {text[0]: each[row] for row, text in enumerate(texts)} for name, each in agreed.items()
    ]
    scored: list[dict[str, Any]] = [
        {"query": text[0]} | {kind: float(plain[number, row]) for number, kind in enumerate(KINDS)}
        for row, text in enumerate(texts)
    ]
    return Result(
        numbers,
        {
            "Scores": scored,
            "Change of the score of answering passages without a token": [
                {
                    "token of": name,
                    "tokens": len(x),
                    "mean": float(x.mean()),
                    "mean of sizes": float(abs(x).mean()),
                    "lowest": float(x.min()),
                    "highest": float(x.max()),
                }
                for name, x in group.items()
                if len(x)
            ],
            "Heads": rows,
            "Agreement of gradients and patches by query": agreement,
        },
        {
            "Score without a token": Curves(
                "place of the token in query and passage",
                "change of the score when it is taken out",
                {
                    f"{token} ({place})" if shown.strings.count(token) > 1 else token: [
                        (place, float(effects[0][place]))
                    ]
                    for place, token in enumerate(shown.strings)
                    if place
                },
            ),
            "Heads": Maps(
                {
                    f"{name} (max {each.max():.2f})": each.T.tolist()
                    for name, each in (
                        ("margin moved, ablated", abs(moved)),
                        ("share restored", shares["denoising"].mean(-1)),
                        ("share lost", shares["noising"].mean(-1)),
                        ("by gradient", guesses["denoising"].mean(-1)),
                    )
                },
                y="head",
                x="layer",
            ),
            "Who is read": Curves(
                "layer",
                "mean weight (all tokens, all heads)",
                {f"on {name}": [(x, float(received[x, kind])) for x in layers] for kind, name in enumerate(CLASSES)},
            ),
            "Who reads across": Curves(
                "layer",
                "mean weight (all heads)",
                {
                    f"{CLASSES[one]} reads {CLASSES[other]}": [(x, float(mass[x, one, other])) for x in layers]
                    for one, other in ((0, 1), (1, 0), (0, 0), (1, 1), (2, 0), (2, 1))
                },
            ),
            "Gradients and patches": Curves(
                "share of the gap by patching a head",
                "share by one gradient",
                {
                    f"{way}": sorted(
                        (float(x), float(y))
                        for x, y in zip(shares[way].mean(-1).flat, guesses[way].mean(-1).flat, strict=True)
                    )
                    for way in shares
                },
                cloud=True,
            ),
        },
    )
