"""What the heads of a trained BERT look at: neighbours, special tokens, syntax, and the shape of their graphs.

Sentences come from a small grammar, so that the tree of each is known: determiners and adjectives before nouns, objects
behind verbs, prepositions with their nouns. For every sentence there is one in which two words have changed places. A
head is chosen for a relation on one half of the sentences and scored on the other, and so are probes and classifiers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from experiments.trained import RANDOM, loaded
from jaxattn import analysis, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most

SMALL = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "type_vocab_size": 2,
    "vocab_size": 100,
}
WORDS = {
    "det": ("the", "a", "this", "every"),
    "amod": ("old", "small", "red", "quiet", "young", "heavy", "bright", "cold"),
    "noun": (
        "dog",
        "teacher",
        "river",
        "house",
        "child",
        "bird",
        "farmer",
        "train",
        "garden",
        "letter",
        "boat",
        "king",
    ),
    "verb": ("saw", "found", "painted", "followed", "sold", "watched", "carried", "forgot"),
    "prep": ("near", "behind", "with", "under", "from", "beside"),
}
RELATIONS = ("det", "amod", "nsubj", "dobj", "prep", "pobj")


@dataclass(frozen=True)
class Config:
    """A trained BERT, and sentences.

    Attributes:
        weights: A name of `python -m jaxattn weights list`; or "random" for a small model that has learned nothing, and
            whose tokens are words.
        sentences: How many sentences, each with one in which two words are swapped.
        shaped: The number of these whose graphs are looked at.
        components: Principal components that classifiers see.
        penalty: That of the probe of attention.
    """

    weights: str = "bge-small"
    sentences: int = 200
    shaped: int = 100
    components: int = 20
    penalty: float = 0.1


QUICK = Config(weights=RANDOM, sentences=12, shaped=8, components=3)
HEADS, SHAPES = "bert_attention_stats", "attention_topology"

CLAIMS = (
    Claim(
        "There are heads for neighbours: one gives half of its weight or more to the token before, and one to the "
        "token after.",
        paper=HEADS,
        number="lower of the best weights on the token before and after",
        confirmed=at_least(0.5),
        refuted=at_most(0.2),
    ),
    Claim(
        "Layers in the middle rest on [SEP]: in some layer it gets half of all weight or more.",
        paper=HEADS,
        number="weight on [SEP], largest of layers",
        confirmed=at_least(0.5),
        refuted=at_most(0.2),
    ),
    Claim(
        "The broadest heads are in the first layers: the head with the largest entropy is in the first third.",
        paper=HEADS,
        number="depth of the head with the largest entropy (0 first, 1 last)",
        confirmed=at_most(1 / 3),
        refuted=at_least(2 / 3),
    ),
    Claim(
        "A head finds the noun of a determiner in 0.8 of the cases or more.",
        paper=HEADS,
        number="best head for det",
        confirmed=at_least(0.8),
        refuted=at_most(0.5),
    ),
    Claim(
        "A head finds the verb of an object in 0.7 of the cases or more.",
        paper=HEADS,
        number="best head for dobj",
        confirmed=at_least(0.7),
        refuted=at_most(0.4),
    ),
    Claim(
        "Heads know more than distances: for determiners, objects, and nouns of prepositions the best head is right "
        "more often than the best fixed offset, by 0.1 or more.",
        paper=HEADS,
        number="best head less best offset, least of det, dobj and pobj",
        confirmed=at_least(0.1),
        refuted=at_most(0),
    ),
    Claim(
        "No head knows syntax as a whole: over all relations the best one is right in half of the cases or less.",
        paper=HEADS,
        number="best head for all relations",
        confirmed=at_most(0.5),
        refuted=at_least(0.7),
    ),
    Claim(
        "All heads together know it: the attention-only probe is right more often than the best fixed offset, by 0.3 "
        "or more.",
        paper=HEADS,
        number="probe less best offset",
        confirmed=at_least(0.3),
        refuted=at_most(0),
    ),
    Claim(
        "Heads of one layer are alike: their divergence is 0.8 of that between layers or less.",
        paper=HEADS,
        number="divergence within layers over between",
        confirmed=at_most(0.8),
        refuted=at_least(1),
    ),
    Claim(
        "The shape of attention tells sentences with swapped words better than the vector of the first token does "
        "(AUROC of linear classifiers).",
        paper=SHAPES,
        number="shapes less first token (AUROC)",
        confirmed=at_least(0.02),
        refuted=at_most(-0.02),
    ),
    Claim(
        "In some head the number of cycles or of matched pairs is another where words are swapped (Wilcoxon, corrected "
        "for the number of heads).",
        paper=SHAPES,
        number="smallest corrected p of cycles and matched pairs",
        confirmed=at_most(0.01),
        refuted=at_least(0.5),
    ),
)


@dataclass(frozen=True)
class Parsed:
    """A sentence and its tree.

    Attributes:
        words: The words, the full stop among them.
        heads: The head of each word, −1 for the verb and the full stop.
        relations: The name of the relation to it, "" where there is none.
    """

    words: tuple[str, ...]
    heads: tuple[int, ...]
    relations: tuple[str, ...]


def parsed(rng: np.random.Generator) -> Parsed:
    """A sentence: a noun phrase, a verb, and one or two more, each noun perhaps with a phrase of its own."""
    words: list[str] = []
    links: list[tuple[int, int, str]] = []

    def add(kind: str) -> int:
        words.append(str(rng.choice(WORDS[kind])))
        return len(words) - 1

    def phrase(deep: bool = True) -> int:
        det, adjectives = add("det"), [add("amod") for _ in range(rng.integers(0, 3))]
        noun = add("noun")
        links.extend((word, noun, name) for word, name in ((det, "det"), *((x, "amod") for x in adjectives)))
        if deep and rng.random() < 0.3:
            prepositional(noun)
        return noun

    def prepositional(head: int) -> None:
        preposition = add("prep")
        links.extend([(preposition, head, "prep"), (phrase(deep=False), preposition, "pobj")])

    subject = phrase()
    verb = add("verb")
    links += [(subject, verb, "nsubj"), (phrase(), verb, "dobj")]
    if rng.random() < 0.4:
        prepositional(verb)
    words.append(".")
    heads, relations = [-1] * len(words), [""] * len(words)
    for word, head, name in links:
        heads[word], relations[word] = head, name
    return Parsed(tuple(words), tuple(heads), tuple(relations))


def swapped(words: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """The words, of which two of different kinds have changed places."""
    kind = {word: name for name, members in WORDS.items() for word in members}
    pairs = [
        (i, j)
        for i in range(len(words) - 1)
        for j in range(i + 1, len(words) - 1)
        if kind[words[i]] != kind[words[j]] and {kind[words[i]], kind[words[j]]} != {"det", "amod"}
    ]
    i, j = pairs[rng.integers(len(pairs))]
    changed = list(words)
    changed[i], changed[j] = words[j], words[i]
    return tuple(changed)


def vocabulary() -> Any:
    """A tokenizer whose tokens are the words of the grammar, for a model without one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = ["[UNK]", "[CLS]", "[SEP]", ".", *(word for members in WORDS.values() for word in members)]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


def accuracies(
    between: Sequence[Float[np.ndarray, "l n w w"]], sentences: Sequence[Parsed], names: Sequence[str]
) -> tuple[Float[np.ndarray, "l n 2"], float, int]:
    """(accuracy of every head for these relations, that of the best offset, how many words have one)."""
    heads = [
        np.where(np.isin(each.relations, names), each.heads, -1) if len(each.words) else np.array([], int)
        for each in sentences
    ]
    counts = np.array([(x >= 0).sum() for x in heads])
    found = [analysis.relation_accuracy(x, h) for x, h, n in zip(between, heads, counts, strict=True) if n]
    total = sum(x * n for x, n in zip(found, counts[counts > 0], strict=True)) / counts.sum()
    longest = max(map(len, heads))
    rows = np.array([np.pad(x, (0, longest - len(x)), constant_values=-1) for x in heads])
    return total, analysis.best_offset(rows)[1], int(counts.sum())


def shape(weights: Float[np.ndarray, "t t"]) -> dict[str, np.ndarray]:
    """The features of one head and one text: graphs by threshold, and bars of both dimensions."""
    graphs = analysis.graph_features(weights)
    bars = analysis.bars(analysis.graph_distances(weights))
    return graphs | {
        f"bars {dimension}": np.array(list(analysis.bar_features(each).values())) for dimension, each in enumerate(bars)
    }


def classified(features: Float[np.ndarray, "n f"], labels: Int[np.ndarray, " n"], train: Any, components: int) -> float:
    """The AUROC on the other half of a logistic classifier of principal components of standardised features."""
    scale = features[train].std(0)
    x = (features - features[train].mean(0))[:, scale > 0] / scale[scale > 0]
    _, _, axes = np.linalg.svd(x[train], full_matrices=False)
    x = x @ axes[:components].T
    x = jnp.asarray(x / x[train].std(0).max(), jnp.float32)
    probe = analysis.fit_logistic(x[train], jnp.asarray(labels[train]), 2)
    scores = probe(x[~train])
    return float(analysis.auroc(scores[:, 1] - scores[:, 0], jnp.asarray(labels[~train] == 1)))


def run(config, seed, folder, console):
    if not 2 * config.components <= config.shaped <= config.sentences:
        raise ValueError(f"shaped is {config.shaped}: need {2 * config.components} to {config.sentences}")
    got, log, rng = loaded(config.weights, SMALL), console.print, np.random.default_rng(seed)
    model: Any = got.model
    tokenizer = vocabulary() if got.tokenizer is None else got.tokenizer
    sentences = [parsed(rng) for _ in range(config.sentences)]
    changed = [swapped(each.words, rng) for each in sentences[: config.shaped]]
    encoded = [tokenizer.encode(" ".join(words)) for words in (*(each.words for each in sentences), *changed)]
    length = max(len(each.ids) for each in encoded)
    tokens = np.array([each.ids + [0] * (length - len(each.ids)) for each in encoded])
    places = np.array([[*range(len(each.ids)), *[-1] * (length - len(each.ids))] for each in encoded])

    log("where heads look")
    batches = np.array_split(np.arange(len(tokens)), max(1, len(tokens) // 50))
    weights, first = [], []
    for some in batches:
        _, seen = trace.run(model, jnp.asarray(tokens[some]), record=("weights", "resid"), positions=places[some])
        weights.append(np.asarray(seen["weights"]))
        first.append(np.asarray(seen["resid"])[-1, :, 0])
    of_all, first_token = np.concatenate(weights, 1), np.concatenate(first)
    layers, _, heads = of_all.shape[:3]
    maps = [of_all[:, b, :, : len(each.ids), : len(each.ids)] for b, each in enumerate(encoded)]
    plain = maps[: len(sentences)]
    rows = sum(x.shape[-1] for x in plain)
    before, after = (
        sum(np.trace(x, offset, -2, -1) for x in plain) / (rows - len(plain)) for offset in (-1, 1)
    )  # of the tokens that have a neighbour there
    entropy = sum(-(x * np.log(np.maximum(x, 1e-30))).sum((-2, -1)) for x in plain) / rows
    on_first, on_last = (sum(x[..., place].sum(-1) for x in plain) / rows for place in (0, -1))
    stop = sum(x[..., -2].sum(-1) for x in plain) / rows
    apart = np.asarray(analysis.head_distances(jnp.asarray(of_all[:, : len(sentences)])))
    layer_of = np.arange(layers * heads) // heads
    same = (layer_of[:, None] == layer_of) & ~np.eye(layers * heads, dtype=bool)
    within, across = apart[same].mean(), apart[layer_of[:, None] != layer_of].mean()

    log("heads and syntax")
    between = [
        analysis.merge_pieces(x, np.array([-1 if word is None else word for word in each.word_ids]))
        for x, each in zip(plain, encoded, strict=False)
    ]
    half = len(sentences) // 2
    syntax: list[dict[str, Any]] = []
    for names in (*((name,) for name in RELATIONS), RELATIONS):
        chosen = accuracies(between[:half], sentences[:half], names)[0]
        layer, head, way = np.unravel_index(chosen.argmax(), chosen.shape)
        held_out, offset, number = accuracies(between[half:], sentences[half:], names)
        syntax.append(
            {
                "relation": names[0] if len(names) == 1 else "all",
                "head": f"layer {layer}, head {head}",
                "who reads": ("the word its head", "the head its word")[way],
                "accuracy": float(held_out[layer, head, way]),
                "best offset": offset,
                "words": number,
            }
        )
    by_name = {row["relation"]: row for row in syntax}
    longest = max(len(each.words) for each in sentences)
    padded = np.zeros((len(sentences), layers * heads, longest, longest), np.float32)
    tree = np.full((len(sentences), longest), -1)
    there = np.zeros((len(sentences), longest), bool)
    for number, (each, x) in enumerate(zip(sentences, between, strict=True)):
        size = len(each.words)
        padded[number, :, :size, :size] = x.reshape(-1, size, size)
        tree[number, :size], there[number, :size] = each.heads, True
    probe = analysis.fit_attention_probe(padded[:half], tree[:half], there[:half], penalty=config.penalty)
    right = np.asarray(probe.guess(padded[half:], there[half:])) == tree[half:]
    probed = float(right[tree[half:] >= 0].mean())

    log("shapes")
    changed_at = slice(len(sentences), len(sentences) + config.shaped)
    texts = [*maps[: config.shaped], *maps[changed_at]]
    shapes = [[shape(head) for head in text.reshape(-1, *text.shape[-2:])] for text in texts]
    names = tuple(shapes[0][0])
    features = np.array([np.concatenate([each[name] for each in text for name in names]) for text in shapes])
    tokens_of = np.concatenate([first_token[: config.shaped], first_token[changed_at]])
    labels = np.repeat([1, 0], config.shaped)
    train = np.tile(np.arange(config.shaped) < config.shaped // 2, 2)  # both sentences of a pair are in one half
    by_shape = classified(features, labels, train, config.components)
    by_token = classified(tokens_of, labels, train, config.components)
    tests: list[float] = []
    for name in ("cycles", "matching"):
        values = np.array([[each[name] for each in text] for text in shapes])  # [texts, heads, thresholds]
        difference = values[: config.shaped] - values[config.shaped :]
        for head in difference.reshape(config.shaped, -1).T:
            tests.append(float(scipy.stats.wilcoxon(head).pvalue) if head.any() else 1.0)
    corrected = min(1.0, min(tests) * len(tests))

    places_of = analysis.classical_mds(apart).reshape(layers, heads, 2)
    third = max(1, layers // 3)
    numbers = {
        "lower of the best weights on the token before and after": float(min(before.max(), after.max())),
        "heads with half of their weight on a neighbour": float(((before > 0.5) | (after > 0.5)).sum()),
        "weight on [CLS], largest of layers": float(on_first.mean(1).max()),
        "weight on [SEP], largest of layers": float(on_last.mean(1).max()),
        "weight on the full stop, largest of layers": float(stop.mean(1).max()),
        "largest entropy of a head (nats)": float(entropy.max()),
        "depth of the head with the largest entropy (0 first, 1 last)": float(
            entropy.argmax() // heads / max(layers - 1, 1)
        ),
        **{f"best head for {name}": by_name[name]["accuracy"] for name in RELATIONS},
        "best head for all relations": by_name["all"]["accuracy"],
        "best offset for all relations": by_name["all"]["best offset"],
        "best head less best offset, least of det, dobj and pobj": min(
            by_name[name]["accuracy"] - by_name[name]["best offset"] for name in ("det", "dobj", "pobj")
        ),
        "probe of all heads": probed,
        "probe less best offset": probed - by_name["all"]["best offset"],
        "divergence within layers over between": float(within / across),
        "AUROC of shapes": by_shape,
        "AUROC of the first token": by_token,
        "shapes less first token (AUROC)": by_shape - by_token,
        "smallest corrected p of cycles and matched pairs": corrected,
    }
    return Result(
        numbers,
        {
            "Heads for relations, chosen on one half of the sentences and scored on the other": syntax,
            "By layer": [
                {
                    "layer": layer,
                    "on the token before, best head": float(before[layer].max()),
                    "on the token after, best head": float(after[layer].max()),
                    "on [CLS]": float(on_first[layer].mean()),
                    "on [SEP]": float(on_last[layer].mean()),
                    "entropy (nats)": float(entropy[layer].mean()),
                }
                for layer in range(layers)
            ],
        },
        {
            "Heads by the divergence of their rows": Curves(
                "first axis (multidimensional scaling)",
                "second",
                {
                    name: [(float(x), float(y)) for x, y in places_of[some].reshape(-1, 2)]
                    for name, some in (
                        ("first third of the layers", slice(0, third)),
                        ("middle", slice(third, layers - third)),
                        ("last third", slice(layers - third, None)),
                    )
                },
                cloud=True,
            ),
            "Weight on special tokens": Curves(
                "layer",
                "mean weight (all tokens, all heads)",
                {
                    name: [(layer, float(x[layer].mean())) for layer in range(layers)]
                    for name, x in (("[CLS]", on_first), ("[SEP]", on_last), ("full stop", stop))
                },
            ),
            "Heads": Maps(
                {
                    f"{name} (max {x.max():.2f})": x.T.tolist()
                    for name, x in (
                        ("token before", before),
                        ("token after", after),
                        ("[SEP]", on_last),
                        ("entropy, nats", entropy),
                    )
                },
                y="head",
                x="layer",
            ),
        },
    )
