"""Which score of queries and keys, and which normaliser, finds the key that a query asks for: a table on four tasks.

One query reads eight values. What it asks for is a key that it resembles, a key whose map it resembles, a key among
keys of very different lengths, or a place. Scores have learned parameters of their own, and there is nothing else to
learn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import decoders
from jaxattn import Dot, Entmax15, Sigmoid, Softmax, Sparsemax, attend
from jaxattn.claims import Claim, Result, at_least, at_most, check_names
from jaxattn.core.attend import (
    Additive,
    Bilinear,
    LinearWeights,
    Location,
    NegativeDistance,
    Neural,
    PairSum,
    Relu,
    TopK,
)
from jaxattn.train import Drawn, OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=3e-2, warmup_steps=0, final_fraction=0.0, weight_decay=0.0, beta2=0.99)
KEYS = 8  # keys of a query, and channels of both, so that a place can be asked for by one channel
TASKS = ("alike", "mapped", "lengths", "place")


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / shape[0] ** 0.5


def _network(key: jax.Array) -> Neural:
    first, last = jax.random.split(key)
    return Neural(_normal(first, 2 * KEYS, 32), jnp.zeros(32), _normal(last, 32))


def _additive(key: jax.Array) -> Additive:
    keys = jax.random.split(key, 3)
    return Additive(_normal(keys[0], KEYS, 32), _normal(keys[1], KEYS, 32), _normal(keys[2], 32))


def _pairs(key: jax.Array) -> PairSum:
    of_queries, of_keys = jax.random.split(key)
    return PairSum(_normal(of_queries, KEYS), _normal(of_keys, KEYS))


SCORES: dict[str, Callable[[jax.Array], Any]] = {
    "dot": lambda key: Dot(jnp.asarray(1.0)),
    "distance": lambda key: NegativeDistance(jnp.asarray(1.0)),
    "general": lambda key: Bilinear(_normal(key, KEYS, KEYS)),
    "additive": _additive,
    "network": _network,
    "sum of both": _pairs,
    "location": lambda key: Location(_normal(key, KEYS, KEYS)),
}
NORMALISERS = {
    "softmax": Softmax(),
    "off by one": Softmax(null_logit=jnp.zeros(1)),
    "entmax": Entmax15(),
    "sparsemax": Sparsemax(),
    "top 2": TopK(2),
    "relu": Relu(normalized=True),
    "sigmoid": Sigmoid(-float(np.log(KEYS))),
    "none": LinearWeights(normalized=False),
}


@dataclass(frozen=True)
class Config:
    """What is compared, and how it is trained.

    Attributes:
        tasks: Some of `TASKS`.
        scores: Some of `SCORES`, under softmax, on every task.
        normalisers: Some of `NORMALISERS`, of the score "general", on the task "alike".
        noise: Standard deviation of a query around what it resembles, of length 1.
        steps: Training steps.
        batch_size: Queries per step.
        optimizer: The optimiser.
        queries: Queries that the error is measured on.
    """

    tasks: tuple[str, ...] = TASKS
    scores: tuple[str, ...] = tuple(SCORES)
    normalisers: tuple[str, ...] = tuple(NORMALISERS)
    noise: float = 0.1
    steps: int = 1500
    batch_size: int = 64
    optimizer: OptimizerConfig = OPTIMIZER
    queries: int = 8192


QUICK = Config(tasks=("alike",), scores=("dot",), normalisers=("softmax", "none"), steps=20, batch_size=8, queries=64)

PAPER = "attention_survey"
CLAIMS = (
    Claim(
        "A map between queries and keys takes parameters: the general score has at most a quarter of the error of the "
        "dot product.",
        paper=PAPER,
        number="mapped: general over dot",
        confirmed=at_most(0.25),
        refuted=at_least(0.9),
    ),
    Claim(
        "The additive score learns it too: at most half of the error of the dot product.",
        paper=PAPER,
        number="mapped: additive over dot",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "Where keys differ in length, distance has at most half of the error of the dot product.",
        paper=PAPER,
        number="lengths: distance over dot",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "A place can be asked for by location alone: it has at most a tenth of the error of the general score.",
        paper=PAPER,
        number="place: location over general",
        confirmed=at_most(0.1),
        refuted=at_least(0.9),
    ),
    Claim(
        "A sum of a term of the query and a term of the key ranks keys alike for all queries: its error stays at half "
        "of the variance of values, or more.",
        paper=PAPER,
        number="alike: sum of both",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "Sparse weights lose nothing where one key is asked for: the error of sparsemax is at most that of softmax.",
        paper=PAPER,
        number="alike, general: sparsemax over softmax",
        confirmed=at_most(1.0),
        refuted=at_least(2.0),
    ),
    Claim(
        "A normaliser is what makes weights sharp: without one, the error is twice that of softmax or more.",
        paper=PAPER,
        number="alike, general: none over softmax",
        confirmed=at_least(2.0),
        refuted=at_most(1.0),
    ),
)


def draw(key: jax.Array, rows: int, *, task: str, noise: float, turn: jax.Array) -> dict[str, jax.Array]:
    """Queries [B, 8], keys [B, 8, 8], values [B, 8], and the value that is asked for [B].

    Keys are directions, in the task "lengths" of log-normal lengths; `turn` [8, 8] maps a key to the query of "mapped".
    """
    of_keys, of_values, of_source, of_noise, of_lengths = jax.random.split(key, 5)
    keys = jax.random.normal(of_keys, (rows, KEYS, KEYS))
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    if task == "lengths":
        keys = keys * jnp.exp(jax.random.normal(of_lengths, (rows, KEYS, 1)))
    values, source = jax.random.normal(of_values, (rows, KEYS)), jax.random.randint(of_source, (rows,), 0, KEYS)
    own = jnp.take_along_axis(keys, source[:, None, None], 1)[:, 0]
    asked = {"mapped": own @ turn, "place": jax.nn.one_hot(source, KEYS)}.get(task, own)
    query = asked + noise * jax.random.normal(of_noise, asked.shape)
    answer = jnp.take_along_axis(values, source[:, None], 1)[:, 0]
    return {"query": query, "key": keys, "value": values, "answer": answer}


def squares(score: Any, normalize: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """The squared error of each answer."""
    query, key, value = batch["query"][:, None, None], batch["key"][:, :, None], batch["value"][:, :, None, None]
    read = attend(query, key, value, score=score, normalize=normalize)[:, 0, 0, 0]
    return jnp.square(read - batch["answer"])


class Run(NamedTuple):
    """A score that is trained on a task under a normaliser."""

    task: str
    score: str
    normaliser: str

    @property
    def name(self) -> str:
        return ", ".join(self)


def train(config: Config, runs: list[Run], seed: int, folder, console) -> dict[Run, float]:
    """The mean squared error of each run, beside a variance of values of 1.

    All are trained at once: their parameters are apart, and the optimiser takes each by itself.
    """
    of_turn, of_scores, of_test = jax.random.split(jax.random.key(seed), 3)
    turn = jnp.linalg.qr(jax.random.normal(of_turn, (KEYS, KEYS)))[0]
    tasks = sorted({run.task for run in runs})

    def sample(key: jax.Array, rows: int) -> dict[str, dict[str, jax.Array]]:
        return {task: draw(key, rows, task=task, noise=config.noise, turn=turn) for task in tasks}

    def errors(scores: Any, batch: Any) -> dict[str, jax.Array]:
        return {
            run.name: squares(scores[run.name], NORMALISERS[run.normaliser], batch[run.task]).mean() for run in runs
        }

    start = {run.name: SCORES[run.score](jax.random.fold_in(of_scores, i)) for i, run in enumerate(runs)}
    leaves, structure = jax.tree.flatten(start)

    def loss(leaves: Any, batch: Any, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        each = errors(jax.tree.unflatten(structure, leaves), batch)
        return sum(each.values(), jnp.zeros(())), {"weight": jnp.ones(())}

    result = decoders.train_params(
        loss,
        leaves,
        Drawn(sample, KEYS, f"{tasks} {config.noise} {seed}"),
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=max(config.steps // 5, 1),
        eval_batches=1,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"runs": [run.name for run in runs]},
        folder=folder,
        console=console,
    )
    found = jax.jit(errors)(jax.tree.unflatten(structure, result.params), sample(of_test, config.queries))
    return {run: float(found[run.name]) for run in runs}


def run(config, seed, folder, console):
    check_names("tasks", config.tasks, TASKS)
    check_names("scores", config.scores, SCORES)
    check_names("normalisers", config.normalisers, NORMALISERS)
    numbers: dict[str, float | None] = {claim.number: None for claim in CLAIMS}
    of_scores = [Run(task, score, "softmax") for score in config.scores for task in config.tasks]
    of_normalisers = [Run("alike", "general", name) for name in config.normalisers]
    errors = train(config, list(dict.fromkeys([*of_scores, *of_normalisers])), seed, folder, console)
    found = {(each.task, each.score): errors[each] for each in of_scores}
    numbers |= {f"{task}: {score}": value for (task, score), value in found.items()}
    by_normaliser = {each.normaliser: errors[each] for each in of_normalisers}
    rows = [{"score": score} | {task: found[task, score] for task in config.tasks} for score in config.scores]
    for claim in CLAIMS:
        where, _, pair = claim.number.partition(": ")
        one, _, other = pair.partition(" over ")
        if where == "alike, general" and {one, other} <= by_normaliser.keys():
            numbers[claim.number] = by_normaliser[one] / by_normaliser[other]
        elif other and {(where, one), (where, other)} <= found.keys():
            numbers[claim.number] = found[where, one] / found[where, other]
    return Result(
        numbers,
        {
            "Squared error by score and task, under softmax": rows,
            "Squared error by normaliser, of the general score": [
                {"normaliser": name, "alike": value} for name, value in by_normaliser.items()
            ],
        },
    )
