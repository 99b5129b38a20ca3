"""Where attention rests when it has nothing to read: sinks in a layer that copies or does nothing, and in SmolLM2.

One layer learns to copy the token before where a flag is set, and to answer 0 otherwise. Weights that sum to 1 must
rest somewhere; others need not. The same metric counts the sinks of a trained model, by layer.
"""

import pydoc_data.topics
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import decoders
from experiments.inside_smollm2 import RANDOM, Compiled, loaded
from jaxattn import Causal, Sigmoid, Softmax, analysis, icl
from jaxattn.claims import Claim, Curves, Result, at_least, at_most, check_names
from jaxattn.core.attend import attention_weights
from jaxattn.train import OptimizerConfig, drawn, prompt_loss

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=0, final_fraction=0.0, weight_decay=0.0, beta2=0.999, clip_norm=None
)


class Layer(NamedTuple):
    """How a layer of attention weighs keys.

    Attributes:
        normalize: The name of the normaliser.
        extra: The standard deviation at the start of a key of the layer's own, whose value is 0; 0 for none.
    """

    normalize: str
    extra: float = 0.0


LAYERS = {
    "softmax": Layer("softmax"),
    "off by one": Layer("off by one"),
    "sigmoid": Layer("sigmoid"),
    "extra key": Layer("softmax", extra=0.02),
    "large extra key": Layer("softmax", extra=1.0),
}


@dataclass(frozen=True)
class Config:
    """A layer that learns gated copying, and a trained model whose sinks are counted.

    Attributes:
        layers: Some of `LAYERS`, each with and without a start token.
        dim: Channels of the content that is copied.
        length: Tokens of a prompt.
        probability: How often the flag is set.
        head_dim: Channels of queries and keys.
        steps: Training steps.
        batch_size: Prompts per step.
        eval_every: Steps between measurements.
        optimizer: The optimiser.
        prompts: Prompts that trained layers are measured on.
        threshold: The mean weight above which a head rests on a token.
        weights: A trained decoder, as in `inside_smollm2`.
        texts: Texts that it reads.
        tokens: Tokens of a text.
    """

    layers: tuple[str, ...] = ("softmax", "off by one", "sigmoid", "extra key")
    dim: int = 8
    length: int = 16
    probability: float = 0.3
    head_dim: int = 16
    steps: int = 2000
    batch_size: int = 64
    eval_every: int = 100
    optimizer: OptimizerConfig = OPTIMIZER
    prompts: int = 2048
    threshold: float = 0.3
    weights: str = "smollm2"
    texts: int = 32
    tokens: int = 64


QUICK = Config(
    layers=("softmax", "sigmoid"),
    length=6,
    steps=40,
    batch_size=16,
    eval_every=20,
    prompts=64,
    weights=RANDOM,
    texts=2,
    tokens=16,
)

PAPER = "attention_sinks"
CLAIMS = (
    Claim(
        "Softmax rests on the start token: queries with nothing to copy give it 0.95 of their weight or more.",
        paper=PAPER,
        number="softmax, with a start token: mass on it, no flag",
        confirmed=at_least(0.95),
        refuted=at_most(0.5),
    ),
    Claim(
        "The start token is a sink for them alone: queries that copy give it 0.05 or less.",
        paper=PAPER,
        number="softmax, with a start token: mass on it, flag",
        confirmed=at_most(0.05),
        refuted=at_least(0.5),
    ),
    Claim(
        "The sink says nothing: its value is at most 0.05 of the length of other values.",
        paper=PAPER,
        number="softmax, with a start token: value of the start over others",
        confirmed=at_most(0.05),
        refuted=at_least(0.5),
    ),
    Claim(
        "The sink is needed: with the start token hidden from the trained layer, the error is 100 times as large.",
        paper=PAPER,
        number="softmax, with a start token: error with the start hidden over error",
        confirmed=at_least(100),
        refuted=at_most(2),
    ),
    Claim(
        "Without a start token softmax cannot do the task: an error of 0.05 per channel or more is left.",
        paper=PAPER,
        number="softmax, without: error",
        confirmed=at_least(0.05),
        refuted=at_most(0.005),
    ),
    Claim(
        "Softmax with a null logit of 0 (off by one) can: its error is 0.002 or less.",
        paper=PAPER,
        number="off by one, without: error",
        confirmed=at_most(0.002),
        refuted=at_least(0.05),
    ),
    Claim(
        "So can sigmoid attention.",
        paper=PAPER,
        number="sigmoid, without: error",
        confirmed=at_most(0.002),
        refuted=at_least(0.05),
    ),
    Claim(
        "Without normalisation no sink forms: sigmoid attention with a start token gives it 0.05 of weight or less.",
        paper=PAPER,
        number="sigmoid, with a start token: mass on it, no flag",
        confirmed=at_most(0.05),
        refuted=at_least(0.3),
    ),
    Claim(
        "A key of the layer itself, with the value 0, takes the place of the start token: it has half of the weight of "
        "queries with nothing to copy, or more.",
        paper=PAPER,
        number="extra key, with a start token: mass on the extra key, no flag",
        confirmed=at_least(0.5),
        refuted=at_most(0.1),
    ),
    Claim(
        "It takes the weight from the start token, which is left with half of what it had, or less.",
        paper=PAPER,
        number="mass on the start token, extra key over softmax",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "Sinks come with training: before it no head rests on the start token, and after it one does in all texts.",
        paper=PAPER,
        number="softmax, with a start token: sink rate gained",
        confirmed=at_least(0.9),
        refuted=at_most(0.1),
    ),
    Claim(
        "A trained language model has sinks: in a quarter of all heads and texts of 64 tokens, the mean weight on the "
        "first token is above 0.3.",
        paper=PAPER,
        number="sink rate, text",
        confirmed=at_least(0.25),
        refuted=at_most(0.05),
    ),
    Claim(
        "The first token alone is one: on the second the rate is a tenth of that or less.",
        paper=PAPER,
        number="sink rate at the second token over the first",
        confirmed=at_most(0.1),
        refuted=at_least(0.5),
    ),
    Claim(
        "Random tokens have sinks as text has: the rate is three quarters of that or more.",
        paper=PAPER,
        number="sink rate, random tokens over text",
        confirmed=at_least(0.75),
        refuted=at_most(0.25),
    ),
)


def features(x: jax.Array) -> jax.Array:
    """Tokens beside their position, one-hot."""
    positions = jnp.broadcast_to(jnp.eye(x.shape[1]), (len(x), x.shape[1], x.shape[1]))
    return jnp.concatenate([x, positions], -1)


def read(layer: Layer, params: Any, x: jax.Array, *, hidden: bool = False) -> tuple[jax.Array, jax.Array]:
    """(answers [B, T, dim], weights [B, T, keys], an extra key the last) of one head without a residual.

    With `hidden` the first token is no key.
    """
    tokens, length = features(x), x.shape[1]
    query, key, value = (tokens @ params[name] for name in ("query", "key", "value"))
    places = jnp.arange(length).at[0].set(-1 if hidden else 0)
    if layer.extra:
        own = jnp.broadcast_to(params["extra"], (len(x), 1, query.shape[-1]))
        key, value = jnp.concatenate([key, own], 1), jnp.pad(value, ((0, 0), (0, 1), (0, 0)))
        places = jnp.append(places, 0)  # every query sees it
    normalize = {
        "softmax": Softmax(),
        "off by one": Softmax(null_logit=jnp.zeros(1)),
        "sigmoid": Sigmoid(-float(np.log(length))),
    }[layer.normalize]
    weights = attention_weights(
        query[:, :, None], key[:, :, None], normalize=normalize, mask=Causal(), key_positions=places
    )[0][:, 0]
    return weights @ value, weights


def train(config: Config, name: str, start: bool, seed: int, folder, console) -> tuple[Any, list[tuple[float, float]]]:
    """(the parameters, (step, sink rate at the first token)) of a layer; the rate is that of further prompts."""
    layer, task = LAYERS[name], icl.GatedCopy(config.dim, config.length, config.probability, start)
    width, keys = task.width + config.length, jax.random.split(jax.random.key(seed), 4)
    sizes = {"query": config.head_dim, "key": config.head_dim, "value": config.dim}
    params = {
        kind: jax.random.normal(key, (width, size)) / width**0.5
        for key, (kind, size) in zip(keys, sizes.items(), strict=False)
    }
    if layer.extra:
        params["extra"] = layer.extra * jax.random.normal(keys[3], (config.head_dim,))

    def rate(params: Any, x: jax.Array) -> jax.Array:
        alpha = read(layer, params, x)[1][..., 0].mean(-1)
        return (alpha > config.threshold).mean()

    def loss(params: Any, prompt: icl.Prompt, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        of_answers = prompt_loss(lambda params, x, _: read(layer, params, x)[0], icl.square)
        total, sums = of_answers(params, prompt, key)
        return total, sums | {"sinks": sums["weight"] * rate(params, prompt.x)}

    result = decoders.train_params(
        loss,
        params,
        drawn(task),
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        eval_batches=2,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"layer": name, "start": start},
        folder=folder,
        console=console,
    )
    before = float(rate(params, task.sample(jax.random.key(seed), config.prompts).x))
    return result.params, [(0.0, before), *decoders.measured(result, "sinks")]


def measure(config: Config, name: str, start: bool, params: Any, seed: int) -> dict[str, float]:
    """The error per channel and the weights of a trained layer, on prompts that it was not trained on."""
    layer, task = LAYERS[name], icl.GatedCopy(config.dim, config.length, config.probability, start)
    prompt = task.sample(jax.random.fold_in(jax.random.key(seed), 1), config.prompts)
    later = np.arange(config.length) > 0
    flags = np.asarray(prompt.hidden)[:, later]

    def error(hidden: bool) -> float:
        answers = read(layer, params, prompt.x, hidden=hidden)[0]
        return float(jnp.square(answers - prompt.y)[:, 2:].mean())  # the second token has no other key than the first

    answers, weights = (np.asarray(x)[:, later] for x in read(layer, params, prompt.x))
    values = np.linalg.norm(np.asarray(features(prompt.x) @ params["value"]), axis=-1)
    on_first, total = weights[..., 0], weights.sum(-1)
    found = {
        "error": float(np.square(answers - np.asarray(prompt.y)[:, later]).mean()),
        "error without a flag": float(np.square(answers)[~flags].mean()),
        "mass on it, no flag": float(on_first[~flags].mean()),
        "mass on it, flag": float(on_first[:, 1:][flags[:, 1:]].mean()),  # the first that copies copies the first token
        "mass in all, no flag": float(total[~flags].mean()),
        "value of the start over others": float(values[:, 0].mean() / values[:, 1:].mean()),
        "error with the start hidden over error": error(True) / error(False),
    }
    if layer.extra:
        found["mass on the extra key, no flag"] = float(weights[..., -1][~flags].mean())
    return found


def of_model(config: Config, seed: int) -> tuple[dict[str, float], dict[str, Curves]]:
    """(numbers, figures) of the sink rate of a trained decoder, on texts and on random tokens."""
    got, rng = loaded(config), np.random.default_rng(seed)  # type: ignore[arg-type]  # it reads the name of the weights
    prose = " ".join(" ".join(text.split()) for text in pydoc_data.topics.topics.values())
    ids = np.frombuffer(prose.encode(), np.uint8) if got.tokenizer is None else got.encode(prose, special=False)
    begins = rng.integers(0, len(ids) - config.tokens, config.texts)
    texts = np.stack([np.asarray(ids)[i : i + config.tokens] for i in begins]).astype(np.int32)
    shown = {"text": texts, "random tokens": rng.integers(0, got.model.config.vocabulary, texts.shape).astype(np.int32)}
    compiled, numbers, lines = Compiled(got.model), {}, {}
    for name, tokens in shown.items():
        rates = {
            at: np.asarray(
                compiled(
                    lambda model, tokens, at=at: analysis.sink_rate(model, tokens, at=at, threshold=config.threshold),
                    jnp.asarray(tokens),
                )
            )
            for at in (0, 1)
        }
        numbers[f"sink rate, {name}"] = float(rates[0].mean())
        lines[f"{name}, first token"] = list(enumerate(rates[0].mean(-1).tolist()))
        if name == "text":
            numbers["sink rate at the second token over the first"] = float(
                rates[1].mean() / max(rates[0].mean(), 1e-9)
            )
            lines["text, second token"] = list(enumerate(rates[1].mean(-1).tolist()))
    numbers["sink rate, random tokens over text"] = numbers["sink rate, random tokens"] / max(
        numbers["sink rate, text"], 1e-9
    )
    return numbers, {"Sink rate by layer": Curves("layer", "share of heads and texts", lines)}


def run(config, seed, folder, console):
    check_names("layers", config.layers, LAYERS)
    numbers: dict[str, float | None] = {claim.number: None for claim in CLAIMS}
    rows, training, masses = [], {}, {}
    for name in config.layers:
        for start in (True, False):
            where = "with a start token" if start else "without"
            console.print(f"sinks: {name}, {where}")
            place = folder / f"{name.replace(' ', '_')}_{'start' if start else 'none'}"
            params, rates = train(config, name, start, seed, place, console)
            found = measure(config, name, start, params, seed)
            if not start:
                found = {kind: found[kind] for kind in found if kind.startswith(("error", "mass in", "mass on the"))}
                del found["error with the start hidden over error"]
            numbers |= {f"{name}, {where}: {kind}": value for kind, value in found.items()}
            rows.append({"layer": name, "start token": "yes" if start else "no"} | row_of(found))
            if start:
                training[name] = rates
                masses[name] = found["mass on it, no flag"]
                numbers[f"{name}, {where}: sink rate gained"] = rates[-1][1] - rates[0][1]
    if {"softmax", "extra key"} <= masses.keys():
        numbers["mass on the start token, extra key over softmax"] = masses["extra key"] / masses["softmax"]
    of_trained, figures = of_model(config, seed)
    return Result(
        numbers | of_trained,
        {"Gated copying": rows},
        {"Sink rate over training": Curves("step", "share of prompts", training)} | figures,
    )


def row_of(found: dict[str, float]) -> dict[str, float | None]:
    """The columns of the table, with None for what a layer does not have."""
    columns = (
        "error",
        "error without a flag",
        "mass on it, no flag",
        "mass on it, flag",
        "mass in all, no flag",
        "mass on the extra key, no flag",
        "value of the start over others",
    )
    return {name: found.get(name) for name in columns}
