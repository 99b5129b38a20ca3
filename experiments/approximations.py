"""What a window instead of full attention costs a trained language model, layer by layer, and what its attention reads.

The same weights (SmolLM2) read a paragraph of English with full attention, and with a window in the first layers, with
and without the first tokens as sinks. Errors of the stream add up from layer to layer. Of full attention it is measured
how much is far away, how much position alone explains, and how much it changes when the paragraph stands behind an
instruction, beside a prefix of as many random tokens.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import inside_smollm2
from experiments.inside_smollm2 import PARAGRAPH, RANDOM, nll
from experiments.trained import encoded
from jaxattn import Causal, Sinks, Window, analysis, models, trace
from jaxattn.claims import Claim, Curves, Result, at_least, at_most
from jaxattn.core.attend.mask import Mask

INSTRUCTION = "Translate the following paragraph into French, word by word:\n"


@dataclass(frozen=True)
class Config:
    """A trained decoder, and what replaces its attention.

    Attributes:
        weights: As of `experiments.inside_smollm2`.
        tokens: The most tokens of the paragraph.
        window: How many tokens before itself a token sees.
        sinks: How many first tokens all see, where there are sinks.
        prefixes: Prefixes of random tokens that the instruction is compared with.
    """

    weights: str = "smollm2"
    tokens: int = 96
    window: int = 16
    sinks: int = 4
    prefixes: int = 4


QUICK = Config(weights=RANDOM, tokens=24, window=4, sinks=2, prefixes=1)
LONG, PEOPLE = "long_range_effectiveness", "human_attention"

CLAIMS = (
    Claim(
        "Errors add up: the more layers have the window, the farther the stream is from that of full attention "
        "(Spearman).",
        paper=LONG,
        number="rank correlation of layers and error, with sinks",
        confirmed=at_least(0.9),
        refuted=at_most(0.3),
    ),
    Claim(
        "And so does the loss, from no layer to all of them (Spearman).",
        paper=LONG,
        number="rank correlation of layers and loss, with sinks",
        confirmed=at_least(0.9),
        refuted=at_most(0.3),
    ),
    Claim(
        "What is given up matters more than how much: without the first tokens the window costs 3 times as many nats "
        "as with them, or more.",
        paper=LONG,
        number="cost of the window without sinks over with sinks",
        confirmed=at_least(3),
        refuted=at_most(1),
    ),
    Claim(
        "Models look far only here and there: but for the first tokens, at most a quarter of the attention is farther "
        "than the window.",
        paper=LONG,
        number="attention beyond the window, without sinks",
        confirmed=at_most(0.25),
        refuted=at_least(0.5),
    ),
    Claim(
        "A model that was tuned for instructions attends to a text in another way behind an instruction: its attention "
        "diverges more from that of the bare text than behind random tokens.",
        paper=PEOPLE,
        number="divergence behind the instruction over behind random tokens",
        confirmed=at_least(1.05),
        refuted=at_most(1),
    ),
)


def with_mask(mask: Mask, layer: int, mixer: models.Spec) -> models.Spec:
    return mixer.replace(mask=mask)


def run(config, seed, folder, console):
    if config.tokens <= config.window + config.sinks:
        raise ValueError(f"tokens is {config.tokens}: need more than window and sinks, {config.window + config.sinks}")
    got, rng, log = inside_smollm2.loaded(config), np.random.default_rng(seed), console.print
    model: Any = got.model
    tokens = jnp.asarray(encoded(got, PARAGRAPH)[None, : config.tokens])

    def loss(logits: Array) -> Array:
        return nll(logits, tokens).mean()

    near = Causal() & Window(config.window)
    masks = {"window": near, "window and sinks": Causal() & (Window(config.window) | Sinks(config.sinks))}
    errors = {}
    for name, mask in masks.items():
        log(f"errors of layers with {name}")
        other = models.replace_mixers(model, functools.partial(with_mask, mask))
        errors[name] = analysis.accumulated_error(model, other, tokens, loss)
        del other
    stream = {name: np.asarray(each.stream, np.float64) for name, each in errors.items()}
    losses = {name: np.asarray(each.metric, np.float64) for name, each in errors.items()}
    layers = len(stream["window"]) - 1
    costs = {name: float(each[-1] - each[0]) for name, each in losses.items()}

    log("what is read")
    weights = np.asarray(trace.run(model, tokens, record=("weights",))[1]["weights"][:, 0], np.float64)
    length = weights.shape[-1]
    apart = np.arange(length)[:, None] - np.arange(length)
    queries = slice(config.window + config.sinks, None)  # those that could look farther
    sink = weights[:, :, queries, : config.sinks].sum(-1).mean((1, 2))
    beyond = (apart > config.window) & (np.arange(length) >= config.sinks)
    far = (weights * beyond)[:, :, queries].sum(-1).mean((1, 2))
    trivial = analysis.trivial_share(weights)

    log("prefixes")
    instruction = np.asarray(encoded(got, INSTRUCTION))
    among = min(256, model.config.vocabulary) if got.tokenizer is None else model.config.vocabulary
    prefixes = [instruction, *(rng.integers(0, among, len(instruction)) for _ in range(config.prefixes))]
    behind = []
    for prefix in prefixes:
        both = jnp.concatenate([jnp.asarray(prefix)[None], tokens], 1)
        seen = trace.run(model, both, record=("weights",))[1]["weights"][:, 0]
        there = seen[:, :, len(prefix) :, len(prefix) :]
        behind.append(np.asarray(analysis.depth_divergence(jnp.asarray(weights), there, min(4, layers))))
    instructed, drawn = behind[0], np.mean(behind[1:], 0)

    def correlation(values: np.ndarray) -> float:
        return float(analysis.rank_correlation(np.arange(len(values)), values))

    numbers = {
        "loss with full attention (nats)": float(losses["window"][0]),
        **{f"cost of the {name} (nats)": cost for name, cost in costs.items()},
        "cost of the window without sinks over with sinks": costs["window"] / costs["window and sinks"],
        "rank correlation of layers and error, with sinks": correlation(stream["window and sinks"]),
        "rank correlation of layers and loss, with sinks": correlation(losses["window and sinks"]),
        "attention on the first tokens": float(sink.mean()),
        "attention beyond the window, without sinks": float(far.mean()),
        "attention explained by position alone (R²)": float(trivial.mean()),
        "the same, most of a head": float(trivial.max()),
        "the same, least of a head": float(trivial.min()),
        "divergence behind the instruction (nats)": float(instructed.mean()),
        "divergence behind random tokens (nats)": float(drawn.mean()),
        "divergence behind the instruction over behind random tokens": float(instructed.mean() / drawn.mean()),
    }
    return Result(
        numbers,
        {
            "By quarters of the depth": [
                {"quarter": number + 1, "behind the instruction": float(a), "behind random tokens": float(b)}
                for number, (a, b) in enumerate(zip(instructed, drawn, strict=True))
            ],
        },
        {
            "Error of the stream": Curves(
                "first layers that have the window",
                "distance from full attention, share of its norm",
                {name: list(enumerate(map(float, each))) for name, each in stream.items()},
            ),
            "Loss": Curves(
                "first layers that have the window",
                "loss (nats per token)",
                {name: list(enumerate(map(float, each))) for name, each in losses.items()},
            ),
            "What is read": Curves(
                "layer",
                "share",
                {
                    "first tokens": list(enumerate(map(float, sink))),
                    "beyond the window": list(enumerate(map(float, far))),
                    "explained by position (R²)": list(enumerate(map(float, trivial.mean(1)))),
                },
            ),
        },
    )
