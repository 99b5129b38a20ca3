"""Whether a memory that sees nothing but attention can be evolved (NAMM): recall with a part of the cache, transfer.

A context holds pairs and filler tokens in random order, then every key is asked for. One token carries key and value,
so one layer of attention can answer. A small model is trained with all of its cache and then left as it is. CMA-ES
evolves the numbers of `ByHistory`, which decides what the model keeps in a few slots, by the share of right answers
alone. The policy that comes out is held against others of as many slots, on other texts, and in a model of other width
and heads that it has never seen.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree

from experiments import decoders
from experiments.decoders import OPTIMIZER
from jaxattn import Causal, models, nn
from jaxattn.cache import Attentive, ByHistory, HeavyHitters, HistoryScorer, Policy, Recent, Store
from jaxattn.claims import Claim, Curves, Result, at_least, at_most
from jaxattn.train import Drawn, OptimizerConfig, next_token_loss


@dataclass(frozen=True)
class Config:
    """The task, two models and a search.

    Attributes:
        pairs: Pairs per text, each asked for once.
        fillers: Tokens without a pair among them.
        keys: Different keys.
        values: Different values.
        kinds: Different filler tokens.
        slots: The tokens that a store keeps, of 2 · pairs + fillers.
        widths: Width of the model of the search, and of the other one.
        heads: Heads of both.
        steps: Training steps of each.
        batch_size: Texts per step.
        every: Tokens between decisions.
        window: Queries per frame.
        hop: Queries from frame to frame.
        recency: Channels that say how old a token is.
        hidden: Hidden units of the scorer.
        population: Policies per generation.
        generations: Generations.
        texts: Texts that judge a generation, the same for all of its policies.
        spread: The first standard deviation of the search.
        held_out: Texts by which the result is judged.
    """

    pairs: int = 16
    fillers: int = 48
    keys: int = 32
    values: int = 16
    kinds: int = 8
    slots: int = 32
    widths: tuple[int, int] = (64, 96)
    heads: tuple[int, int] = (2, 3)
    steps: int = 1500
    batch_size: int = 64
    every: int = 8
    window: int = 8
    hop: int = 4
    recency: int = 4
    hidden: int = 4
    population: int = 32
    generations: int = 150
    texts: int = 32
    spread: float = 0.2
    held_out: int = 256
    optimizer: OptimizerConfig = OPTIMIZER


QUICK = Config(
    pairs=4, fillers=8, keys=8, values=4, kinds=2, slots=8, widths=(32, 24), heads=(2, 2), steps=150, batch_size=32,
    every=4, window=4, hop=2, recency=2, hidden=2, population=8, generations=4, texts=8, held_out=32,
    optimizer=replace(OPTIMIZER, warmup_steps=20),
)  # fmt: skip

CLAIMS = (
    Claim(
        "A memory that was evolved keeps the accuracy of the whole cache with a part of it: it loses a tenth at most.",
        paper="namm",
        number="evolved over whole cache",
        confirmed=at_least(0.9),
    ),
    Claim(
        "It recalls more than heavy hitters of as many slots, by 10 points or more.",
        paper="namm",
        number="evolved over heavy hitters: accuracy gained",
        confirmed=at_least(0.1),
        refuted=at_most(0.0),
    ),
    Claim(
        "It recalls more than the most recent tokens, by 10 points or more.",
        paper="namm",
        number="evolved over recent: accuracy gained",
        confirmed=at_least(0.1),
        refuted=at_most(0.0),
    ),
    Claim(
        "It serves a model of other width and heads that it was not evolved with: there too it is ahead of heavy "
        "hitters by 10 points or more.",
        paper="namm",
        number="transferred over heavy hitters: accuracy gained",
        confirmed=at_least(0.1),
        refuted=at_most(0.0),
    ),
)


def length(config: Config) -> int:
    """Tokens of a text."""
    return 2 * config.pairs + config.fillers


def inputs(config: Config) -> int:
    """Channels of a token: its key, its value or its kind as one-hot vectors, and the mark of a question."""
    return config.keys + config.values + config.kinds + 1


def draw(config: Config, key: jax.Array, rows: int) -> dict[str, jax.Array]:
    """Texts as vectors `x`, the value that is asked for at each token, and `weights`, 1 where one is."""

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys, values, kinds, places, asked = jax.random.split(key, 5)
        own = jax.random.permutation(keys, config.keys)[: config.pairs]
        value = jax.random.randint(values, (config.pairs,), 0, config.values)
        kind = jax.random.randint(kinds, (config.fillers,), 0, config.kinds)
        pairs = jnp.concatenate(
            [jax.nn.one_hot(own, config.keys), jax.nn.one_hot(value, config.values),
             jnp.zeros((config.pairs, config.kinds + 1))], 1)  # fmt: skip
        fillers = jax.nn.one_hot(config.keys + config.values + kind, inputs(config))
        context = jax.random.permutation(places, jnp.concatenate([pairs, fillers]))
        order = jax.random.permutation(asked, config.pairs)
        questions = jnp.zeros((config.pairs, inputs(config))).at[:, : config.keys].set(pairs[order, : config.keys])
        before = jnp.zeros(len(context), jnp.int32)
        return {
            "x": jnp.concatenate([context, questions.at[:, -1].set(1.0)]),
            "targets": jnp.concatenate([before, value[order]]),
            "weights": jnp.concatenate([before, jnp.ones(config.pairs, jnp.int32)]).astype(jnp.float32),
        }

    return jax.vmap(one)(jax.random.split(key, rows))


def loss(model: models.Transformer, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss on a batch of texts, and what is measured beside it."""
    total, sums = next_token_loss(model(batch["x"])[0], batch)
    return total, {name: sums[name] for name in ("weight", "correct")}


def trained(config: Config, number: int, seed: int, folder: Any, console: Any) -> models.Transformer:
    """The first or the second model, trained with its whole cache."""
    mixer = models.Spec(nn.MultiHeadAttention, heads=config.heads[number], position=None, mask=Causal())
    model = decoders.build(
        mixer, vocabulary=config.values, length=length(config), width=config.widths[number], layers=1,
        seed=seed + 1000 * number, inputs=inputs(config),
    )  # fmt: skip
    return decoders.train(
        model, Drawn(partial(draw, config), length(config), repr(config)), loss=loss, steps=config.steps,
        batch_size=config.batch_size, eval_every=max(config.steps // 4, 1), eval_batches=4, optimizer=config.optimizer,
        seed=seed, run_config={"number": number, "namm": asdict(config)}, folder=folder / f"model{number}",
        console=console,
    )[0]  # fmt: skip


def read(graph: Any, arrays: Any, batch: Any, policy: Policy) -> tuple[jax.Array, jax.Array, Any]:
    """(the share of right answers, the mean number of tokens that are held when one is given, the state at the end)."""

    def step(state: Any, token: Any) -> tuple[Any, Any]:
        x, target, weight = token
        logits, state, _ = nnx.merge(graph, arrays)(x[:, None], state=state)
        held = jnp.mean(jnp.concatenate([(each.positions >= 0).sum(-2).reshape(-1) for each in stores(state)]))
        return state, ((logits[:, 0].argmax(-1) == target) * weight, held * (weight > 0).any())

    state = nnx.merge(graph, arrays).init_state(*batch["targets"].shape, policy)
    pieces = tuple(jnp.moveaxis(batch[name], 1, 0) for name in ("x", "targets", "weights"))
    state, (right, held) = jax.lax.scan(step, state, pieces)
    return right.sum() / batch["weights"].sum(), held.sum() / batch["weights"][0].sum(), state


def stores(state: Any) -> list[Store]:
    return [each for each in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Store)) if isinstance(each, Store)]


def policy_of(config: Config, scorer: HistoryScorer) -> Policy:
    history = ByHistory(scorer, every=config.every, window=config.window, hop=config.hop)
    return Policy(history, config.slots)


def start(config: Config, graph: Any, arrays: Any, seed: int) -> HistoryScorer:
    """A scorer without weights, whose features are brought to mean 0 and size 1 by texts that are read in full."""
    zeros = HistoryScorer.zeros(config.window, config.recency, config.hidden)
    keeps = replace(zeros, score=(zeros.score[0], jnp.full(1, jnp.inf)))
    whole = replace(policy_of(config, keeps), slots=length(config))
    batch = draw(config, jax.random.key(seed), config.texts)
    state = jax.jit(lambda batch: read(graph, arrays, batch, whole)[2])(batch)
    spectra = jnp.concatenate([each.statistics["spectrum"].reshape(-1, len(zeros.center)) for each in stores(state)])
    return replace(zeros, center=spectra.mean(0), spread=spectra.std(0) + 1e-6)


def evolve(
    config: Config, graph: Any, arrays: Any, seed: int, console: Any
) -> tuple[HistoryScorer, list[tuple[float, float]]]:
    """(the mean of the last generation, the mean accuracy of every generation). Raises ValueError without evosax."""
    try:
        from evosax.algorithms import CMA_ES
    except ImportError:
        raise ValueError("evosax is not installed: need `pip install jaxattn[evolve]`") from None
    scorer = start(config, graph, arrays, seed)
    names = ("query", "key", "value", "mix", "hidden", "score")
    flat, restore = ravel_pytree({name: getattr(scorer, name) for name in names})
    search = CMA_ES(population_size=config.population, solution=flat)
    settings = search.default_params.replace(std_init=config.spread)
    first, second = jax.random.split(jax.random.key(seed))
    state = search.init(first, flat, settings)

    @jax.jit
    def generation(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        asking, drawing, telling = jax.random.split(key, 3)
        population, state = search.ask(asking, state, settings)
        batch = draw(config, drawing, config.texts)

        def accuracy(numbers: jax.Array) -> jax.Array:
            return read(graph, arrays, batch, policy_of(config, replace(scorer, **restore(numbers))))[0]

        right = jax.vmap(accuracy)(population)
        return search.tell(telling, population, -right, state, settings)[0], right.mean()

    curve = []
    for number in range(config.generations):
        state, right = generation(state, jax.random.fold_in(second, number))
        curve.append((float(number), float(right)))
        if number % 10 == 0:
            console.print(f"generation {number}: {right:.3f}")
    return replace(scorer, **restore(state.mean)), curve


def run(config, seed, folder, console):
    if not config.pairs < config.slots < length(config):
        raise ValueError(
            f"slots is {config.slots}: need more than {config.pairs} pairs, fewer than {length(config)} tokens"
        )
    found: list[dict[str, Any]] = []
    of: dict[tuple[str, str], float] = {}
    scorer: HistoryScorer | None = None
    curve: list[tuple[float, float]] = []
    held_out = draw(config, jax.random.key(seed + 10**6), config.held_out)
    for number, name in enumerate(("model of the search", "other model")):
        graph, arrays = nnx.split(trained(config, number, seed, folder, console))
        if scorer is None:
            scorer, curve = evolve(config, graph, arrays, seed, console)
        policies = {
            "whole cache": Policy(),
            "evolved": policy_of(config, scorer),
            "heavy hitters": Policy(HeavyHitters(0, config.every), config.slots),
            "mean attention": Policy(HeavyHitters(0, config.every, mean=True), config.slots),
            "attended to last": Policy(Attentive("last", 2, 0, config.every), config.slots),
            "recent": Policy(Recent(0), config.slots),
        }
        measured = jax.jit(lambda batch, policy, graph=graph, arrays=arrays: read(graph, arrays, batch, policy)[:2])
        for which, policy in policies.items():
            right, held = (float(x) for x in measured(held_out, policy))
            found.append({"model": name, "policy": which, "accuracy": right, "tokens held": held})
            of[name, which] = right
    here, there = "model of the search", "other model"
    whole = of[here, "whole cache"]
    numbers = {
        "evolved over whole cache": of[here, "evolved"] / whole if whole else None,
        "evolved over heavy hitters: accuracy gained": of[here, "evolved"] - of[here, "heavy hitters"],
        "evolved over recent: accuracy gained": of[here, "evolved"] - of[here, "recent"],
        "evolved over mean attention: accuracy gained": of[here, "evolved"] - of[here, "mean attention"],
        "transferred over heavy hitters: accuracy gained": of[there, "evolved"] - of[there, "heavy hitters"],
        "transferred over mean attention: accuracy gained": of[there, "evolved"] - of[there, "mean attention"],
    }
    figure = Curves("generation", "mean accuracy of a generation", {"evolution": curve})
    return Result(numbers, {"Policies of as many slots": found}, {"Accuracy by generation": figure})
