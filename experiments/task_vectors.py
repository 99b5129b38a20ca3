"""Task vectors: what heads say at the end of a prompt, weighted and added to a query that comes without examples.

A decoder that has learned linear functions in context reads prompts of 32 fixed functions. Of each function a vector is
made: a learned weighting of the outputs of heads, the mean residual stream, or the sum of the heads with the largest
effect. The vector is added to a query that comes without examples, and the squared error says what it brought.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from experiments import decoders, function_classes
from jaxattn import icl, models, trace
from jaxattn.claims import Claim, Curves, Result, at_least, at_most

LINEAR = function_classes.Config(classes=("linear",))


@dataclass(frozen=True)
class Config:
    """A decoder that learns linear functions in context, and vectors made from its heads for some fixed functions.

    Attributes:
        model: The decoder, and how it is trained.
        tasks: Fixed functions, each with its own vector; as many again test whether weights of heads carry over.
        prompts: Prompts of each function that its heads are averaged over, and queries that weights are learned from.
        steps: Steps of learning the weights.
        rate: Their learning rate.
        top: Heads that the function vector is made of.
    """

    model: function_classes.Config = LINEAR
    tasks: int = 32
    prompts: int = 100
    steps: int = 500
    rate: float = 0.03
    top: int = 3


QUICK = Config(function_classes.QUICK, tasks=4, prompts=20, steps=50)
PAPER = "learned_task_vector"
CLAIMS = (
    Claim(
        "A learned weighting of head outputs, added to a query without examples, cuts the squared error below half of "
        "that without a vector, on new queries of the same functions.",
        paper=PAPER,
        number="learned over none",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
    Claim(
        "The mean residual stream, put in at the best layer, does not do as well.",
        paper=PAPER,
        number="learned over mean residual",
        confirmed=at_most(0.9),
        refuted=at_least(1.1),
    ),
    Claim(
        "Nor does the sum of the heads with the largest effect, the function vector.",
        paper=PAPER,
        number="learned over function vector",
        confirmed=at_most(0.9),
        refuted=at_least(1.1),
    ),
    Claim(
        "The weights belong to the model and not to the functions: on functions that they were not learned from, the "
        "error is below half of that without a vector too.",
        paper=PAPER,
        number="learned over none, other functions",
        confirmed=at_most(0.5),
        refuted=at_least(0.9),
    ),
)


def head_outputs(
    model: models.Transformer, tokens: Float[Array, "b t d"]
) -> tuple[Float[Array, "l n d"], Float[Array, "l d"]]:
    """(what each head adds to the stream at the last token, the stream there after each layer), means over prompts."""
    *_, records = model(tokens, record=("z", "resid"))
    z = records["z"][:, :, -1].mean(1)
    kernels = jnp.concatenate([run.mixers[0].out.kernel[...] for run in model.runs])
    return jnp.einsum("lnh,lnhd->lnd", z, kernels.reshape(*z.shape, -1)), records["resid"][:, :, -1].mean(1)


def error(model: models.Transformer, queries: Float[Array, "k p d"], truth: Float[Array, "k p"], edit: Any) -> Array:
    """The mean squared error [K] of answers to queries without examples, under an edit of the stream per function."""

    def of_one(queries: Float[Array, "p d"], truth: Float[Array, " p"], edit: Any) -> Array:
        said = model(queries[:, None], edits={"resid": edit})[0][:, 0, 0]
        return ((said - truth) ** 2).mean()

    return jax.vmap(of_one)(queries, truth, edit)


def draw(config: Config, key: PRNGKeyArray) -> tuple[Any, Float[Array, "k p d"], Float[Array, "k p"]]:
    """(prompts of each function, further queries [K, P, d], their answers [K, P]), K functions, P prompts each."""
    task = function_classes.SETTINGS["linear"].task
    weights = jax.random.normal(key, (config.tasks, task.inputs.dim))
    keys = jax.random.split(jax.random.fold_in(key, 1), config.tasks)

    def of_one(w: Float[Array, " d"], key: PRNGKeyArray) -> icl.Prompt:
        return icl.FunctionTask(icl.Pool(w[None]), task.inputs, task.length, task.noise).sample(key, config.prompts)

    prompts = jax.vmap(of_one)(weights, keys)
    queries = jax.random.normal(jax.random.fold_in(key, 2), (*prompts.x.shape[:2], task.inputs.dim))
    return prompts, queries, jnp.einsum("kpd,kd->kp", queries, weights)


def vectors(phi: Float[Array, "l n"], heads: Float[Array, "k l n d"]) -> trace.Layers:
    """v_l = Σ_h Φ_lh a_lh, added to the residual stream after layer l at every token; one per function."""
    return trace.Layers(trace.Add(jnp.einsum("ln,klnd->kld", phi, heads)))


def learned(config: Config, loss: Any, shape: tuple[int, ...]) -> tuple[Float[Array, "l n"], list[tuple[int, float]]]:
    """(the weights Φ that Adam comes to from 0, the loss on the way)."""
    rule = optax.adam(config.rate)

    def step(carry, _):
        phi, state = carry
        value, gradient = jax.value_and_grad(loss)(phi)
        updates, state = rule.update(gradient, state)
        return (optax.apply_updates(phi, updates), state), value

    start = jnp.zeros(shape)
    (phi, _), losses = jax.jit(lambda: jax.lax.scan(step, (start, rule.init(start)), length=config.steps))()
    every = max(1, config.steps // 50)
    return phi, [(number, float(losses[number])) for number in range(0, config.steps, every)]


def run(config, seed, folder, console):
    if config.top < 1 or config.tasks < 2 or config.prompts < 2:
        raise ValueError(
            f"top is {config.top}, tasks {config.tasks}, prompts {config.prompts}: need 1, 2 and 2 or more"
        )
    if config.model.classes != LINEAR.classes:
        raise ValueError(f"model.classes is {config.model.classes}: need {LINEAR.classes}, which the vectors are of")
    model, _ = function_classes.train(config.model, "linear", seed, folder, console)
    measure = jax.jit(lambda queries, truth, edit: error(model, queries, truth, edit).mean())
    for_these, for_others = jax.random.split(jax.random.key(seed))
    seen: dict[str, tuple[Any, ...]] = {}
    for name, key in (("these", for_these), ("others", for_others)):
        prompts, queries, truth = draw(config, key)
        tokens = jax.vmap(icl.interleave)(prompts.x, prompts.y)[:, :, :-1]  # up to the last input, which is asked
        heads, streams = jax.jit(lambda tokens: jax.lax.map(lambda each: head_outputs(model, each), tokens))(tokens)
        half = config.prompts // 2  # queries to learn from, and to test on
        fit, test = (queries[:, :half], truth[:, :half]), (queries[:, half:], truth[:, half:])
        seen[name] = heads, streams, fit, test, prompts
    heads, streams, fit, test, prompts = seen["these"]
    layers, count = heads.shape[1:3]

    phi, learning = learned(
        config, lambda phi: error(model, fit[0], fit[1], vectors(phi, heads)).mean(), (layers, count)
    )
    alone = jnp.eye(layers * count).reshape(-1, layers, count)
    effects = np.array([float(measure(*fit, vectors(each, heads))) for each in alone])
    chosen = alone[np.argsort(effects)[: config.top]].sum(0)

    def instead(layer: int, streams: Float[Array, "k l d"]) -> trace.Layers:
        return trace.Layers(trace.Put(streams), jnp.broadcast_to(jnp.arange(layers) == layer, streams.shape[:2]))

    best = int(np.argmin([float(measure(*fit, instead(layer, streams))) for layer in range(layers)]))
    in_context = jax.jit(decoders.predictor(model))
    with_examples = [in_context(x, y)[:, -1] for x, y in zip(prompts.x, prompts.y, strict=True)]
    rows: list[dict[str, Any]] = []
    for name, (heads, streams, _, test, _) in seen.items():
        ways = {
            "none": vectors(jnp.zeros_like(phi), heads),
            "learned": vectors(phi, heads),
            "function vector": vectors(chosen, heads),
            "mean residual": instead(best, streams),
        }
        rows.append({"functions": name} | {way: float(measure(*test, edit)) for way, edit in ways.items()})
    these, others = rows
    numbers = {
        "learned over none": these["learned"] / these["none"],
        "learned over mean residual": these["learned"] / these["mean residual"],
        "learned over function vector": these["learned"] / these["function vector"],
        "learned over none, other functions": others["learned"] / others["none"],
        "squared error with all examples": float(((jnp.stack(with_examples) - prompts.clean[:, :, -1]) ** 2).mean()),
        "largest weight": float(jnp.abs(phi).max()),
    }
    weights: list[dict[str, Any]] = [
        {
            "layer": f"{layer}",
            "head": f"{head}",
            "weight": float(phi[layer, head]),
            "error with it alone": float(effect),
        }
        for (layer, head), effect in zip(np.ndindex(layers, count), effects, strict=True)
    ]
    return Result(
        numbers,
        {"Squared error of queries without examples": rows, "Heads": weights},
        {"Learning the weights": Curves("step", "squared error", {"learned": learning})},
    )
