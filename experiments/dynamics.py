"""How attention learns: it scans for the tokens that tell what comes next and then snaps; topics appear in its weights.

One layer is trained on facts, texts whose last token and context say what comes next, along the path of exact
gradients. Another is trained as a masked language model on documents of topics, and its weights are looked at by pairs
of topics.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import decoders
from jaxattn import icl
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, check_names, outside, within
from jaxattn.core.merged import SoftmaxHeads
from jaxattn.icl import TopicDocuments, dynamics
from jaxattn.train import OptimizerConfig, drawn, prompt_loss

OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.0, beta2=0.999, clip_norm=None
)
MODELS = ("attention", "uniform", "embeddings")


@dataclass(frozen=True)
class Config:
    """A language of facts and its path, and documents of topics and how they are learned.

    Attributes:
        facts: Last tokens, and next tokens of each, of the language whose path is followed.
        several: The same of the language on which rates are compared.
        distinct: Types that occur with one next token alone; their probabilities are uniform from 0.1 to 1.
        common: Types that occur with all next tokens.
        iterations: Steps of gradient descent on the first language, and on the second with each rate.
        rates: Rates of the decoder over that of the scores, which is 1.
        context: Tokens of a context, where contexts are sampled.
        sampled: Steps with sampled contexts.
        batch: Contexts of such a step.
        models: What learns topics: "attention" with a value matrix, the value matrix of "uniform" attention, or the
            "embeddings" that both read and answer for it.
        topics: Topics.
        words: Words of each.
        present: Topics in a document.
        length: Words in a document.
        width: Channels of embeddings.
        steps: Training steps.
        batch_size: Documents per step.
        optimizer: The optimiser.
        lengths: Lengths of documents of whose frequencies a value matrix is the least-squares fit.
        documents: Documents of each length, for the fit and for the weights of attention.
    """

    facts: tuple[int, int] = (2, 1)
    several: tuple[int, int] = (3, 2)
    distinct: int = 10
    common: int = 10
    iterations: tuple[int, int] = (10_000, 3000)
    rates: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0)
    context: int = 128
    sampled: int = 1000
    batch: int = 128
    models: tuple[str, ...] = MODELS
    topics: int = 6
    words: int = 5
    present: int = 2
    length: int = 40
    width: int = 32
    steps: int = 3000
    batch_size: int = 64
    optimizer: OptimizerConfig = OPTIMIZER
    lengths: tuple[int, ...] = (40, 200, 1000)
    documents: int = 4096


QUICK = Config(
    iterations=(200, 50),
    rates=(1.0, 10.0),
    sampled=20,
    batch=16,
    models=("attention",),
    topics=3,
    words=3,
    present=1,
    length=12,
    steps=30,
    batch_size=16,
    lengths=(12,),
    documents=128,
)

SNAP, TOPICS = "scan_snap", "lda_topics"
CLAIMS = (
    Claim(
        "Attention scans away from common tokens: its weight on them falls at every step.",
        paper=SNAP,
        number="largest rise of the weight on common tokens",
        confirmed=at_most(1e-9),
        refuted=at_least(1e-3),
    ),
    Claim(
        "Scores of common tokens fall: after all steps they are below 0.",
        paper=SNAP,
        number="largest score of a common token",
        confirmed=at_most(0),
        refuted=at_least(0.01),
    ),
    Claim(
        "Scores of distinct tokens rise.",
        paper=SNAP,
        number="smallest score of a distinct token",
        confirmed=at_least(0),
        refuted=at_most(-0.01),
    ),
    Claim(
        "And the more the more often they occur: their order is that of their probabilities.",
        paper=SNAP,
        number="rank correlation of score and probability",
        confirmed=at_least(0.999),
        refuted=at_most(0.5),
    ),
    Claim(
        "Then attention snaps: more than half of what changes does so in the first hundredth of all steps.",
        paper=SNAP,
        number="share of the change in the first 1% of steps",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "It snaps as the decoder has fitted: behind a decoder that was trained before it, attention changes at most "
        "half as much in as many steps.",
        paper=SNAP,
        number="change behind a trained decoder over change",
        confirmed=at_most(0.5),
        refuted=at_least(1.0),
    ),
    Claim(
        "The faster the decoder learns, the more even attention stays: its entropy rises with the rate of the decoder.",
        paper=SNAP,
        number="least rise of the entropy with the rate",
        confirmed=at_least(1e-4),
        refuted=at_most(0),
    ),
    Claim(
        "Sampled contexts of 128 tokens go the same way: the weight on common tokens is within 0.03 of the exact path.",
        paper=SNAP,
        number="difference of the sampled path",
        confirmed=at_most(0.03),
        refuted=at_least(0.1),
    ),
    Claim(
        "Attention learns topics: words of one topic attend to each other 1.8 times as much as to words of others, or "
        "more.",
        paper=TOPICS,
        number="attention, same topic over different topic",
        confirmed=at_least(1.8),
        refuted=at_most(1.0),
    ),
    Claim(
        "The value matrix learns topics: its smallest entry of two words of one topic is above its largest of two "
        "words of two topics.",
        paper=TOPICS,
        number="values, least of a topic less most of others",
        confirmed=at_least(0),
        refuted=at_most(-1.0),
    ),
    Claim(
        "It does so under uniform attention too.",
        paper=TOPICS,
        number="values under uniform attention, least of a topic less most of others",
        confirmed=at_least(0),
        refuted=at_most(-1.0),
    ),
    Claim(
        "Its blocks are those of the closed form: fitted to long documents by least squares, entries of one topic and "
        "of others differ by 1 / (v (1 − (1 − p_c) p_m)).",
        paper=TOPICS,
        number="fitted difference over that of the closed form",
        confirmed=within(0.98, 1.02),
        refuted=outside(within(0.8, 1.25)),
    ),
    Claim(
        "Embeddings learn topics: those of words of one topic have a larger mean inner product than those of two.",
        paper=TOPICS,
        number="inner products of embeddings, same less different",
        confirmed=at_least(0.1),
        refuted=at_most(0.0),
    ),
)


@partial(jax.jit, static_argnames="steps")
def path(
    facts: dynamics.Facts, decoder: jax.Array, decoder_rate: Any, score_rate: Any, steps: int
) -> tuple[jax.Array, jax.Array]:
    """(the decoder at the end, the scores [steps + 1, last tokens, types] before every step and at the end)."""

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        decoder, scores = carry
        after = dynamics.scan_snap_step(decoder, scores, facts, decoder_rate, score_rate)
        return after[:2], after[1]

    zero = jnp.zeros((int(facts.last.shape[0]), facts.frequency.shape[1]), decoder.dtype)  # a row per fact is enough
    (decoder, _), scores = jax.lax.scan(step, (decoder, zero), length=steps)
    return decoder, jnp.concatenate([zero[None], scores])


@partial(jax.jit, static_argnames=("steps", "batch", "context"))
def sampled_path(key: jax.Array, facts: dynamics.Facts, steps: int, batch: int, context: int) -> jax.Array:
    """The scores after so many steps, each on a batch of contexts that are drawn."""
    count, types = facts.frequency.shape

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        which, within_context = jax.random.split(key)
        fact = jax.random.randint(which, (batch,), 0, count)
        logits = jnp.log(facts.frequency)[fact][:, None]
        tokens = jax.random.categorical(within_context, logits, shape=(batch, context))
        counts = jax.nn.one_hot(tokens, types).sum(1)
        drawn = dynamics.Facts(facts.last[fact], facts.next[fact], counts)
        decoder, scores = carry
        return dynamics.scan_snap_step(decoder, scores, drawn, 1.0, 1.0)[:2], None

    zero = jnp.zeros((types, types)), jnp.zeros((count, types))
    return jax.lax.scan(step, zero, jax.random.split(key, steps))[0][1]


def entropy(weights: np.ndarray) -> np.ndarray:
    return -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)


def scan_and_snap(config: Config, seed: int) -> tuple[dict[str, float | None], list[dict[str, Any]], dict[str, Any]]:
    """(numbers, rows by rate, figures) of the path of exact gradients, in float64, and of sampled contexts."""
    rng = np.random.default_rng(seed)
    probabilities = np.sort(rng.uniform(0.1, 1, config.distinct))
    with jax.enable_x64(True):
        language = dynamics.distinct_and_common(*config.facts, probabilities, config.common)
        facts = language.facts
        types = facts.frequency.shape[1]
        zero = jnp.zeros((types, types))
        steps = config.iterations[0]
        _, scores = path(facts, zero, 1.0, 1.0, steps)
        weights = np.asarray(dynamics.type_weights(scores[:, facts.last], facts.frequency))  # [steps + 1, F, M]
        on_common = weights[:, :, language.common].sum(-1).mean(-1)
        trained, _ = path(facts, zero, 1.0, 0.0, steps)
        _, late = path(facts, trained, 1.0, 1.0, steps)
        behind = np.asarray(dynamics.type_weights(late[:, facts.last], facts.frequency))[:, :, language.common].sum(-1)
        behind = behind.mean(-1)
        last, at = np.asarray(scores[-1]), np.asarray(facts.last)
        of_distinct = np.stack([last[at[fact], own] for fact, own in enumerate(language.distinct)])
        rank = [np.corrcoef(np.argsort(np.argsort(each)), np.arange(each.size))[0, 1] for each in of_distinct]

        several = dynamics.distinct_and_common(*config.several, probabilities, config.common)
        zero = jnp.zeros((several.facts.frequency.shape[1],) * 2)
        rows, entropies, last_weights = [], [], {}
        for rate in config.rates:
            _, path_of = path(several.facts, zero, rate, 1.0, config.iterations[1])
            every = np.asarray(dynamics.type_weights(path_of[:, several.facts.last], several.facts.frequency))
            common = every[:, :, several.common].sum(-1).mean(-1)
            half = int((common[0] - common >= (common[0] - common[-1]) / 2).argmax())
            last_weights[rate] = every
            entropies.append(float(entropy(every[-1]).mean()))
            rows.append(
                {
                    "rate of the decoder": str(rate),
                    "entropy (nats)": entropies[-1],
                    "weight on common tokens": float(common[-1]),
                    "steps to half of the change": float(half),
                }
            )
    drawn_scores = sampled_path(
        jax.random.key(seed), jax.tree.map(jnp.asarray, single(facts)), config.sampled, config.batch, config.context
    )
    drawn = dynamics.type_weights(drawn_scores[np.asarray(facts.last)], jnp.asarray(facts.frequency, jnp.float32))
    sampled = float(np.asarray(drawn)[:, language.common].sum(-1).mean())
    change = on_common[0] - on_common
    numbers = {
        "largest rise of the weight on common tokens": float(np.diff(on_common).max()),
        "largest score of a common token": float(last[np.unique(at)][:, language.common].max()),
        "smallest score of a distinct token": float(of_distinct.min()),
        "rank correlation of score and probability": float(min(rank)),
        "share of the change in the first 1% of steps": float(change[steps // 100] / change[-1]),
        "change behind a trained decoder over change": float((behind[0] - behind[-1]) / change[-1]),
        "least rise of the entropy with the rate": float(np.diff(entropies).min()),
        "least rise of the entropy with the rate, from the second rate on": min(
            np.diff(entropies)[1:].tolist(), default=None
        ),
        "least rise of the weight on common tokens with the rate": float(
            np.diff([row["weight on common tokens"] for row in rows]).min()
        ),
        "difference of the sampled path": abs(sampled - float(on_common[min(config.sampled, steps)])),
    }
    shown = [2**i for i in range(int(np.log2(config.iterations[1])) + 1)]
    own = np.concatenate([several.distinct[0], several.common])
    maps = {
        f"rate of the decoder {rate:g}": last_weights[rate][shown][:, 0, own].T.tolist()
        for rate in (config.rates[0], config.rates[-1])
    }
    points = np.unique(np.geomspace(1, steps, 60).astype(int))
    falls = {"trained together": on_common, "behind a trained decoder": behind}
    return (
        numbers,
        rows,
        {
            "Weights on types over training": Maps(maps, "distinct (0 rarest) and common types", "log2 of the step"),
            "Weight on common tokens": Curves(
                "step",
                "weight on common tokens",
                {k: [(int(i), float(x[i])) for i in points] for k, x in falls.items()},
                "x",
            ),
            "Entropy by the rate of the decoder": Curves(
                "rate of the decoder over that of scores",
                "entropy of attention (nats)",
                {"after all steps": list(zip(config.rates, entropies, strict=True))},
                "x",
            ),
        },
    )


def single(facts: dynamics.Facts) -> dynamics.Facts:
    """The same facts in 32 bits."""
    last, following = (jnp.asarray(np.asarray(x), jnp.int32) for x in (facts.last, facts.next))
    return dynamics.Facts(last, following, jnp.asarray(np.asarray(facts.frequency), jnp.float32))


def heads(params: dict[str, jax.Array], words: int) -> SoftmaxHeads:
    """The layer of a model of topics: attention is uniform where no scores are learned."""
    size = words + 1
    if "embeddings" in params:
        ov = params["embeddings"][:words] @ params["embeddings"].T
        return SoftmaxHeads(jnp.zeros((1, size, size)), ov[None])
    return SoftmaxHeads(params.get("scores", jnp.zeros((size, size)))[None], params["values"][None])


def learn_topics(config: Config, name: str, seed: int, folder, console) -> tuple[dict[str, jax.Array], Any]:
    """(the parameters of a model of topics, what `fit` says of its training)."""
    task = TopicDocuments(config.topics, config.words, config.length, config.present)
    words, keys = task.mask, jax.random.split(jax.random.key(seed), 3)
    start = {
        "scores": 0.02 * jax.random.normal(keys[0], (words + 1, words + 1)),
        "values": 0.02 * jax.random.normal(keys[1], (words, words + 1)),
        "embeddings": jax.random.normal(keys[2], (words + 1, config.width)) / config.width**0.5,
    }
    learned = {"attention": ("scores", "values"), "uniform": ("values",), "embeddings": ("embeddings",)}[name]

    def answer(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        tokens = jax.nn.one_hot(x, words + 1)
        return heads(params, words)(tokens, tokens)

    result = decoders.train_params(
        prompt_loss(answer, optax.softmax_cross_entropy_with_integer_labels),
        {kind: start[kind] for kind in learned},
        drawn(task),
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=max(config.steps // 10, 1),
        eval_batches=8,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"model": name},
        folder=folder / name,
        console=console,
    )
    return result.params, result


def attention_of_pairs(layer: SoftmaxHeads, prompt: icl.Prompt, words: int) -> np.ndarray:
    """The mean weight [words, words] that a word gives to a word, over all pairs of places where both stand."""

    @jax.jit
    def sums(x: jax.Array) -> jax.Array:
        tokens = jax.nn.one_hot(x, words + 1)
        weights = layer.weights(tokens, tokens)[:, 0]
        pairs = weights, jnp.ones_like(weights)
        return jnp.stack([jnp.einsum("btm,bts,bsn->mn", tokens, each, tokens) for each in pairs])

    total, count = np.asarray(sum(sums(x) for x in np.split(np.asarray(prompt.x), max(len(prompt.x) // 256, 1))))
    return (total / np.maximum(count, 1))[:words, :words]


def fitted_values(key: jax.Array, task: TopicDocuments, documents: int) -> tuple[float, float]:
    """(same topic, another) entries of the values that are fitted by least squares to frequencies of sampled documents.

    Words of a topic are told apart by noise alone, so a word and itself count with the other pairs of its topic.
    """
    prompt = task.sample(key, documents)
    seen = np.stack([np.bincount(row, minlength=task.mask + 1) for row in np.asarray(prompt.x)]) / task.length
    truth = np.repeat(np.asarray(prompt.hidden) / task.words, task.words, -1)
    solved = np.linalg.lstsq(seen, truth, rcond=1e-9)[0].T
    blocks = icl.block_statistic(jnp.asarray(solved[:, : task.mask]), jnp.arange(task.mask) // task.words)
    return float((blocks.token + (task.words - 1) * blocks.same) / task.words), float(blocks.different)


def margin(values: np.ndarray, groups: np.ndarray) -> float:
    """The least entry of two words of a topic less the largest of two words of two, each column less its mean."""
    values = values - values.mean(0)
    alike = groups[:, None] == groups
    return float(values[alike].min() - values[~alike].max())


def topics(config: Config, seed: int, folder, console) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(numbers, tables, figures) of models of topics."""
    task = TopicDocuments(config.topics, config.words, config.length, config.present)
    groups = jnp.arange(task.mask) // config.words
    numbers: dict[str, float | None] = {claim.number: None for claim in CLAIMS if claim.paper == TOPICS}
    losses, maps = [], {}
    prompt = task.sample(jax.random.fold_in(jax.random.key(seed), 9), config.documents)
    for name in config.models:
        console.print(f"dynamics: topics by {name}")
        params, result = learn_topics(config, name, seed, folder, console)
        losses.append({"model": name, "loss (nats)": decoders.measured(result, "loss")[-1][1]})
        if name == "embeddings":
            inner = params["embeddings"][: task.mask] @ params["embeddings"][: task.mask].T
            blocks = icl.block_statistic(inner, groups)
            numbers["inner products of embeddings, same less different"] = float(blocks.same - blocks.different)
            continue
        own = "values" if name == "attention" else "values under uniform attention"
        numbers[f"{own}, least of a topic less most of others"] = margin(
            np.asarray(params["values"])[:, : task.mask], np.asarray(groups)
        )
        if name == "attention":
            pairs = attention_of_pairs(heads(params, task.mask), prompt, task.mask)
            blocks = icl.block_statistic(jnp.asarray(pairs), groups)
            numbers["attention, same topic over different topic"] = float(blocks.same / blocks.different)
            numbers |= {f"attention, {kind}": float(x) for kind, x in blocks._asdict().items()}
            others = np.where(np.eye(task.mask, dtype=bool), np.nan, pairs)
            split = others.reshape(config.topics, config.words, config.topics, config.words)
            maps["mean weight, without a word and itself"] = np.nanmean(split, (1, 3)).tolist()
    closed = icl.topic_values(config.topics, config.words)
    rows = []
    for length in config.lengths:
        key = jax.random.fold_in(jax.random.key(seed), length)
        same, different = fitted_values(key, replace(task, length=length), config.documents)
        rows.append({"words in a document": str(length), "same": same, "different": different})
    exact = float(closed.same), float(closed.different)
    numbers["fitted difference over that of the closed form"] = (same - different) / (exact[0] - exact[1])
    rows.append({"words in a document": "closed form", "same": exact[0], "different": exact[1]})
    figures = {"Attention by pair of topics": Maps(maps, "topic of the query", "topic of the key")} if maps else {}
    return numbers, {"Values fitted by least squares": rows, "Loss of models of topics": losses}, figures


def run(config, seed, folder, console):
    check_names("models", config.models, MODELS)
    console.print("dynamics: scan and snap")
    numbers, rows, figures = scan_and_snap(config, seed)
    others, tables, more = topics(config, seed, folder, console)
    return Result(numbers | others, {"Rates": rows} | tables, figures | more)
