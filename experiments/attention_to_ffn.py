"""Attention layers of a trained encoder, each distilled into a feed-forward network on the whole flattened sequence.

The encoder counts letters: each token is to say how often it occurs. A network with one hidden layer of ReLU learns
what an attention layer adds to the stream, from the stream before it, at a fixed length. It is compared with the best
affine map, put in the place of the layer, and shown the same tokens in another order.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments import decoders
from jaxattn import icl, models, nn, trace
from jaxattn.claims import Claim, Curves, Result, at_least, at_most
from jaxattn.train import OptimizerConfig, drawn

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=50, final_fraction=0.0, weight_decay=0.01)
Params = dict[str, Array]


@dataclass(frozen=True)
class Config:
    """An encoder without positions that is trained to count, and networks that are distilled from its layers.

    Attributes:
        letters: Different letters.
        string: Letters of a string; the sequence is one token longer.
        width: Width of the encoder.
        layers: Its layers.
        heads: Heads of a layer.
        steps: Its training steps.
        batch_size: Strings per step, of the encoder and of distillation.
        eval_every: Steps between measurements in its training.
        optimizer: Its optimiser.
        hidden: Numbers of hidden units of a network.
        distilling: Steps of distillation.
        rate: Their largest learning rate, of Adam.
        examples: Strings that the affine map is fitted on.
        tested: Further strings, on which everything is measured.
    """

    letters: int = 5
    string: int = 7
    width: int = 16
    layers: int = 2
    heads: int = 2
    steps: int = 1500
    batch_size: int = 128
    eval_every: int = 250
    optimizer: OptimizerConfig = OPTIMIZER
    hidden: tuple[int, ...] = (32, 128, 512)
    distilling: int = 4000
    rate: float = 2e-3
    examples: int = 8192
    tested: int = 1024


QUICK = Config(
    layers=1, steps=60, eval_every=30, batch_size=32, hidden=(16, 32), distilling=50, examples=256, tested=64
)

PAPER = "attention_to_ffn"
CLAIMS = (
    Claim(
        "A feed-forward network of the flattened sequence comes close to each attention layer of an encoder: it "
        "explains 95 percent of what the worst of them adds.",
        paper=PAPER,
        number="R², worst layer, largest network",
        confirmed=at_least(0.95),
        refuted=at_most(0.5),
    ),
    Claim(
        "An affine map does not: it leaves at least three times as much.",
        paper=PAPER,
        number="variance left, worst layer, affine over network",
        confirmed=at_least(3.0),
        refuted=at_most(1.0),
    ),
    Claim(
        "With all layers of attention replaced, the encoder loses at most 5 points of accuracy.",
        paper=PAPER,
        number="accuracy lost by networks in place of all layers",
        confirmed=at_most(0.05),
        refuted=at_least(0.5),
    ),
    Claim(
        "With affine maps in their place it loses 20 points or more.",
        paper=PAPER,
        number="accuracy lost by affine maps in place of all layers",
        confirmed=at_least(0.2),
        refuted=at_most(0.05),
    ),
    Claim(
        "The networks are equivariant only as far as they fit: shown the tokens in another order, they change their "
        "answer by a tenth of the error that is left, or more, where attention changes by rounding.",
        paper=PAPER,
        number="permutation error over variance left, worst layer",
        confirmed=at_least(0.1),
        refuted=at_most(0.001),
    ),
)


def initial(key: PRNGKeyArray, size: int, hidden: int) -> Params:
    """A network of so many hidden units on vectors of one size, which starts at 0."""
    inward = jax.random.normal(key, (size, hidden)) * (2 / size) ** 0.5
    return {"in": inward, "shift": jnp.zeros(hidden), "out": jnp.zeros((hidden, size)), "mean": jnp.zeros(size)}


def network(params: Params, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """W₂ relu(W₁ x + b₁) + b₂ of sequences that are flattened to [B, T D]."""
    hidden = jax.nn.relu(x.reshape(len(x), -1) @ params["in"] + params["shift"])
    return (hidden @ params["out"] + params["mean"]).reshape(x.shape)


def affine(x: Float[Array, "b t d"], y: Float[Array, "b t d"]) -> Any:
    """The affine map of flattened sequences with the least squared error, as a function."""
    flat, target = (np.asarray(each, np.float64).reshape(len(each), -1) for each in (x, y))
    centre, mean = flat.mean(0), target.mean(0)
    solved = jnp.asarray(np.linalg.lstsq(flat - centre, target - mean, rcond=1e-6)[0], x.dtype)
    offset = jnp.asarray(mean - centre @ np.asarray(solved, np.float64), x.dtype)
    return lambda x: (x.reshape(len(x), -1) @ solved + offset).reshape(x.shape)


@partial(jax.jit, static_argnames=("hidden", "steps", "batch", "rate"))
def distilled(
    key: PRNGKeyArray,
    x: Float[Array, "n t d"],
    y: Float[Array, "n t d"],
    *,
    hidden: int,
    steps: int,
    batch: int,
    rate: float,
) -> tuple[Params, Float[Array, " steps"]]:
    """(a network that Adam fits to y at x by its squared error, the error by step)."""
    params = initial(key, x[0].size, hidden)
    rule = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry: Any, key: PRNGKeyArray) -> tuple[Any, Array]:
        params, state = carry
        rows = jax.random.randint(key, (batch,), 0, len(x))
        value, slope = jax.value_and_grad(lambda p: ((network(p, x[rows]) - y[rows]) ** 2).mean())(params)
        updates, state = rule.update(slope, state)
        return (optax.apply_updates(params, updates), state), value

    (params, _), errors = jax.lax.scan(step, (params, rule.init(params)), jax.random.split(key, steps))
    return params, errors


def left(x: Array, y: Array) -> float:
    """The squared distance of x from y over the variance of y, as of each entry over the sequences: 1 − R²."""
    said, truth = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(((said - truth) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum())


def swapped(model: models.Transformer, tokens: Int[Array, "b t"], maps: Sequence[Any]) -> Float[Array, "b t v"]:
    """Logits with maps of the stream in place of attention layers; None leaves a layer as it is.

    The stream before a layer depends on what replaces those before it, so there is one run for each layer.
    """
    edits: dict[int, trace.Put] = {}
    for layer, each in enumerate(maps):
        if each is not None:
            _, records = trace.run(model, tokens, edits=_edits(edits), record=("resid_pre",))
            edits[layer] = trace.Put(each(records["resid_pre"][layer]))
    return trace.run(model, tokens, edits=_edits(edits))[0]


def _edits(by_layer: dict[int, trace.Put]) -> dict[str, Any]:
    return {"attn_out": dict(by_layer)} if by_layer else {}


def run(config, seed, folder, console):
    task = icl.Histogram(config.letters, config.string, causal=False)
    model, result = decoders.train(
        decoders.build(
            models.Spec(nn.MultiHeadAttention, heads=config.heads, position=None),
            vocabulary=task.vocabulary,
            length=task.length,
            width=config.width,
            layers=config.layers,
            seed=seed,
            causal=False,
        ),
        drawn(task),
        loss=decoders.answered_tokens,
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        eval_batches=4,
        optimizer=config.optimizer,
        seed=seed,
        run_config={"attention_to_ffn": asdict(config)},
        folder=folder / "encoder",
        console=console,
    )
    keys = jax.random.split(jax.random.key(1000 + seed), 4)
    prompts = [task.sample(key, count) for key, count in zip(keys, (config.examples, config.tested), strict=False)]
    (x, y), (x_new, y_new) = (
        (records["resid_pre"], records["attn_out"])
        for _, records in (trace.run(model, prompt.x, record=("resid_pre", "attn_out")) for prompt in prompts)
    )
    # The first token stays where it is: it is what the others are counted against.
    order = 1 + np.asarray(jax.random.permutation(keys[2], config.string))
    order = np.concatenate([[0], order])
    moved = trace.run(model, prompts[1].x[:, order], record=("attn_out",))[1]["attn_out"]
    most = max(config.hidden)
    rows: list[dict[str, Any]] = []
    networks, maps, by_size = [], [], {}
    for layer in range(config.layers):
        maps.append(affine(x[layer], y[layer]))
        row: dict[str, Any] = {"layer": str(layer), "affine": 1 - left(maps[-1](x_new[layer]), y_new[layer])}
        for hidden in config.hidden:
            console.print(f"attention_to_ffn: layer {layer}, {hidden} hidden units")
            options = {"steps": config.distilling, "batch": config.batch_size, "rate": config.rate}
            params, _ = distilled(jax.random.fold_in(keys[3], layer), x[layer], y[layer], hidden=hidden, **options)
            row[f"{hidden} hidden units"] = 1 - left(network(params, x_new[layer]), y_new[layer])
            if hidden == most:
                networks.append(partial(network, params))
        said, other = (networks[-1](each) for each in (x_new[layer], x_new[layer][:, order]))
        row["permutation error, network"] = left(other, said[:, order])
        row["permutation error, attention"] = left(moved[layer], y_new[layer][:, order])
        rows.append(row)
        by_size[f"layer {layer}"] = [(hidden, 1 - row[f"{hidden} hidden units"]) for hidden in config.hidden]
        by_size[f"layer {layer}, affine map"] = [(hidden, 1 - row["affine"]) for hidden in config.hidden]

    def accuracy(maps: Sequence[Any]) -> float:
        prompt = prompts[1]
        right = swapped(model, prompt.x, maps).argmax(-1) == prompt.y
        return float((prompt.weights * right).sum() / prompt.weights.sum())

    nothing = [lambda x: jnp.zeros_like(x)] * config.layers
    ways: dict[str, list[Any]] = {
        "attention": [None] * config.layers,
        **{
            f"{name} in layer {layer}": [each[number] if number == layer else None for number in range(config.layers)]
            for name, each in (("network", networks), ("affine map", maps))
            for layer in range(config.layers)
        },
        "networks in all layers": networks,
        "affine maps in all layers": maps,
        "nothing in all layers": nothing,
    }
    accuracies = {name: accuracy(each) for name, each in ways.items()}
    worst = min(rows, key=lambda row: row[f"{most} hidden units"])
    rest = 1 - worst[f"{most} hidden units"]
    size = task.length * config.width
    numbers = {
        "accuracy of the encoder": accuracies["attention"],
        "accuracy without attention": accuracies["nothing in all layers"],
        "R², worst layer, largest network": 1 - rest,
        "variance left, worst layer, affine over network": (1 - worst["affine"]) / rest,
        "accuracy lost by networks in place of all layers": accuracies["attention"]
        - accuracies["networks in all layers"],
        "accuracy lost by affine maps in place of all layers": accuracies["attention"]
        - accuracies["affine maps in all layers"],
        "permutation error over variance left, worst layer": worst["permutation error, network"] / rest,
        "permutation error of attention": max(row["permutation error, attention"] for row in rows),
        "parameters of the largest network": float(2 * size * most + most + size),
        "parameters of an attention layer": float(4 * config.width**2),
    }
    return Result(
        numbers,
        {
            "R² of what a layer adds": rows,
            "Accuracy": [{"in place of attention": name, "accuracy": each} for name, each in accuracies.items()],
        },
        {
            "Variance left by hidden units": Curves("hidden units", "share of the variance left", by_size, log="xy"),
            "Learning to count": Curves("step", "accuracy", {"encoder": decoders.measured(result, "correct")}),
        },
    )
