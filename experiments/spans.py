"""Which span of the past each head of a trained model (SmolLM2) needs, and whether it can be told beforehand (MoA).

Each key head sees the first tokens and its last ones, α + β n of n. The rules are chosen under a budget by how much the
loss is expected to grow for every pair that they hide, from one backward pass of a few texts. On other texts they are
held against one span for all heads, and against the chosen spans given to heads by chance. The expected growth is a
sum over hidden keys, each hidden alone; beside it rules are chosen by what hiding all of them together does to what a
head reads. Texts are slices of the manuals of Python that seeds draw. The rules are then read at twice the length that
they were chosen at.
"""

import pydoc_data.topics
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments import inside_smollm2
from experiments.inside_smollm2 import RANDOM, nll
from jaxattn import Causal, analysis, attend, trace
from jaxattn.analysis import choose_rules, elastic_rules, span_influence
from jaxattn.claims import Claim, Curves, Maps, Result, at_least, at_most
from jaxattn.core.attend import Mask
from jaxattn.core.part import part

MOA = "moa"
SEARCHED, UNIFORM, SHUFFLED = "searched spans", "one span for all", "searched spans, heads by chance"
TOGETHER = "searched by keys hidden together"


@dataclass(frozen=True)
class Config:
    """A trained decoder, its texts, and budgets.

    Attributes:
        weights: As of the experiment `inside_smollm2`.
        length: Tokens of a text by which rules are chosen, and of one that they are measured on.
        calibration: Texts by which rules are chosen, one at a time.
        held_out: Texts that they are measured on, one at a time.
        budgets: The mean span of the heads, in shares of the text.
        stretched: The budgets at which rules are read at twice the length.
        step: α is −1, 0, 1 or 2 times so many tokens.
        betas: β.
        sinks: First tokens that every span shows.
        characters: Characters of the manuals that a text is cut from.
    """

    weights: str = "smollm2"
    length: int = 512
    calibration: int = 3
    held_out: int = 2
    budgets: tuple[float, ...] = (0.125, 0.25, 0.5)
    stretched: tuple[float, ...] = (0.25,)
    step: int = 64
    betas: tuple[float, ...] = (0, *(i / 32 for i in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32)))
    sinks: int = 4
    characters: int = 8000


QUICK = Config(
    weights=RANDOM,
    length=32,
    calibration=1,
    held_out=1,
    budgets=(0.25,),
    step=4,
    betas=(0, 0.125, 0.25, 0.5, 1),
    sinks=1,
    characters=200,
)
EIGHTH, QUARTER = ", at 1/8", ", at 1/4"
CLAIMS = (
    Claim(
        "Heads need different spans: at an eighth of the text on average, searched spans cost at most seven tenths of "
        "what one span for all heads costs.",
        paper=MOA,
        number="cost of searched spans over one span" + EIGHTH,
        confirmed=at_most(0.7),
        refuted=at_least(1),
    ),
    Claim(
        "And at a quarter.",
        paper=MOA,
        number="cost of searched spans over one span" + QUARTER,
        confirmed=at_most(0.7),
        refuted=at_least(1),
    ),
    Claim(
        "What counts is which head gets which span: given to heads by chance, the same spans cost more, so that the "
        "searched ones cost at most seven tenths of that.",
        paper=MOA,
        number="cost of searched spans over spans by chance" + QUARTER,
        confirmed=at_most(0.7),
        refuted=at_least(1),
    ),
    Claim(
        "At half of the text the loss grows by at most 5 percent.",
        paper=MOA,
        number="relative cost of searched spans, at 1/2",
        confirmed=at_most(0.05),
        refuted=at_least(0.09),
    ),
    Claim(
        "The effective context is longer: one span for all heads must be twice as long to cost as little as searched "
        "spans of an eighth, or longer.",
        paper=MOA,
        number="the span for all heads that costs as much, over searched spans" + EIGHTH,
        confirmed=at_least(2),
        refuted=at_most(1),
    ),
    Claim(
        "Rules stretch: at twice the length they still cost at most seven tenths of one span of the same share.",
        paper=MOA,
        number="cost of searched spans over one span, twice the length" + QUARTER,
        confirmed=at_most(0.7),
        refuted=at_least(1),
    ),
    Claim(
        "One backward pass tells what spans cost: over all assignments of spans the expected growth of the loss and "
        "the measured one have a rank correlation of 0.9 or more.",
        paper=MOA,
        number="rank correlation of expected and measured cost",
        confirmed=at_least(0.9),
        refuted=at_most(0.5),
    ),
)


@part
class HeadSpans(Mask):
    """Shows each head the first `sinks` keys and its last `spans[n]` ones, its own among them.

    Attributes:
        spans: [N], at least 1.
        sinks: The number of first keys.
    """

    spans: Int[Array, " heads"]
    sinks: Int[Array, ""] | int = 4

    def __call__(self, query, key):
        return (key < self.sinks) | (query - key < self.spans[:, None, None])


def texts(got: Any, config: Config, rng: np.random.Generator) -> tuple[list[Array], list[Array]]:
    """(texts for calibration, held-out texts twice as long), [1, tokens] each, from two halves of the manuals."""
    manuals = " ".join(" ".join(pydoc_data.topics.topics[name].split()) for name in sorted(pydoc_data.topics.topics))
    half, found = len(manuals) // 2, []
    for first, count, length in ((0, config.calibration, config.length), (half, config.held_out, 2 * config.length)):
        starts = rng.choice(half // config.characters, count, replace=False) * config.characters + first
        slices = (manuals[start : start + config.characters] for start in starts)
        if got.tokenizer is None:
            tokens = [np.frombuffer(text.encode("ascii", "replace"), np.uint8) for text in slices]
        else:
            tokens = [np.asarray(got.encode(text, special=False)) for text in slices]
        if min(map(len, tokens)) < length:
            raise ValueError(
                f"characters is {config.characters}, which are {min(map(len, tokens))} tokens: need {length}, or more "
                "characters"
            )
        found.append([jnp.asarray(text[None, :length].astype(np.int32)) for text in tokens])
    return found[0], found[1]


def late_loss(logits: Float[Array, "b t v"], tokens: Int[Array, "b t"]) -> Array:
    """The loss on the second half of a text, whose tokens have a past to lose."""
    return nll(logits, tokens)[:, tokens.shape[1] // 2 :].mean()


def influence(
    model: Any, tokens: Int[Array, "1 t"], spans: Int[np.ndarray, " r"], sinks: int
) -> tuple[Float[Array, "l n r"], Float[Array, "l n r"]]:
    """By how much the loss is expected to grow under each span of each head, in first order.

    The first is the sum over hidden keys of the size of what each does by itself, the second what they do together.
    """
    sites = ("q_rotated", "k_rotated", "v")
    still = jax.eval_shape(lambda: model(tokens, record=("z",))[2]["z"])

    def loss(delta: Array) -> Any:
        logits, _, records = model(tokens, edits={"z": trace.Layers(trace.Add(delta))}, record=sites)
        return late_loss(logits, tokens), records

    slope, records = jax.grad(loss, has_aux=True)(jnp.zeros(still.shape, still.dtype))

    def of_layer(given: Any) -> tuple[Array, Array]:
        query, key, value, slope = given
        whole = attend(query, key, value, mask=Causal())

        def together(span: Array) -> Array:
            shown = Causal() & HeadSpans(jnp.broadcast_to(span, query.shape[2:3]), sinks)
            return (slope * (attend(query, key, value, mask=shown) - whole)).sum((0, 1, 3))

        alone = span_influence(query, key, value, slope, spans, sinks=sinks).sum(0)
        return alone, jax.lax.map(together, jnp.asarray(spans)).T

    return jax.lax.map(of_layer, (*(records[site] for site in sites), slope))


def span_of(rules: Float[np.ndarray, "r 2"], chosen: Int[np.ndarray, " h"], length: int) -> Int[np.ndarray, " h"]:
    """The span of each key head at a length."""
    return np.maximum(np.floor(rules[chosen] @ [1, length]), 1).astype(int)


def run(config, seed, folder, console):
    got, rng = inside_smollm2.loaded(config), np.random.default_rng(seed)
    (graph, arrays), (known, unknown) = nnx.split(got.model), texts(got, config, rng)
    short, length = config.length // 2, config.length
    lengths = (short, length)
    rules = elastic_rules([i * config.step for i in (-1, 0, 1, 2)], config.betas, (*lengths, 2 * length))
    of_rule = {n: span_of(rules, np.arange(len(rules)), n) for n in lengths}
    at = {n: np.unique(spans) for n, spans in of_rule.items()}  # the spans that there are at a length
    heads = got.model.runs[0].branches[0].module
    layers, groups = sum(got.model.lengths), heads.heads // heads.key_heads

    @partial(jax.jit, static_argnames="length")
    def gained(arrays: Any, text: Array, length: int) -> tuple[Array, Array]:
        return influence(nnx.merge(graph, arrays), text[:, :length], at[length], config.sinks)

    @jax.jit
    def loss(arrays: Any, tokens: Array, spans: Int[Array, "l n"]) -> Array:
        edits = {"scores": trace.Layers(HeadSpans(spans, jnp.full(len(spans), config.sinks)))}
        return late_loss(nnx.merge(graph, arrays)(tokens, edits=edits)[0], tokens)

    gains = np.zeros((2, layers * heads.key_heads, len(rules)))
    for number, text in enumerate(known):
        console.print(f"spans: influence, text {number + 1} of {len(known)}")
        for n in lengths:
            found = np.stack(gained(arrays, text, n))
            by_key_head = found.reshape(2, layers * heads.key_heads, groups, -1).sum(2)
            gains += by_key_head[..., np.searchsorted(at[n], of_rule[n])] / len(known) / len(lengths)
    (gain, gain_together), count = gains, gains.shape[1]
    cost = np.stack([np.tile(rules @ [1, n] / n, (count, 1)) for n in lengths])

    def measured(spans: Int[np.ndarray, " h"], length: int) -> float:
        by_head = jnp.asarray(np.repeat(spans.reshape(layers, -1), groups, 1))
        return float(np.mean([loss(arrays, text[:, :length], by_head) for text in unknown]))

    whole = {n: measured(np.full(count, n), n) for n in (length, 2 * length)}
    costs: dict[tuple[str, float, int], float] = {}
    expected: list[tuple[float, float]] = []
    spread: dict[str, list[list[float]]] = {}
    hoped: dict[float, float] = {}
    rows: list[dict[str, Any]] = []
    for budget in config.budgets:
        console.print(f"spans: budget {budget:g}")
        chosen = choose_rules(gain, cost, np.full(2, budget))
        chosen_together = choose_rules(gain_together, cost, np.full(2, budget))
        mixed = rng.permutation(chosen)
        spread[f"{budget:g} of the text"] = (span_of(rules, chosen, length) / length).reshape(layers, -1).T.tolist()
        row: dict[str, Any] = {"budget": f"{budget:g}"}
        for n in (length, 2 * length) if budget in config.stretched else (length,):
            ways = {UNIFORM: np.full(count, int(budget * n)), SEARCHED: span_of(rules, chosen, n)}
            if n == length:
                ways |= {TOGETHER: span_of(rules, chosen_together, n), SHUFFLED: span_of(rules, mixed, n)}
            for name, spans in ways.items():
                costs[name, budget, n] = measured(spans, n) - whole[n]
                if n == length:
                    row[name] = costs[name, budget, n]
        for name, picked in ((SEARCHED, chosen), (SHUFFLED, mixed)):
            expected.append((float(gain[np.arange(count), picked].sum()), costs[name, budget, length]))
        nearest = np.flatnonzero((rules[:, 0] == 0) & (rules[:, 1] == budget))
        if len(nearest):
            expected.append((float(gain[:, nearest[0]].sum()), costs[UNIFORM, budget, length]))
            hoped[budget] = expected[-3][0] / expected[-1][0]
        rows.append(row | {"mean of the searched spans": float(span_of(rules, chosen, length).mean() / length)})
    numbers: dict[str, float | None] = {f"expected of that, at {b:g} of the text": ratio for b, ratio in hoped.items()}
    result = results(config, whole, costs, np.array(expected), spread, rows)
    return replace(result, numbers={**result.numbers, **numbers})


def results(config: Config, whole: Any, costs: Any, expected: np.ndarray, spread: Any, rows: Any) -> Result:
    """Numbers, tables and figures of the costs by name, budget and length."""
    length = config.length

    def of(name: str, budget: float, n: int = length) -> float | None:
        return costs.get((name, budget, n))

    def over(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    half = of(SEARCHED, 0.5)
    numbers: dict[str, float | None] = {
        "cost of searched spans over one span" + EIGHTH: over(of(SEARCHED, 0.125), of(UNIFORM, 0.125)),
        "cost of searched spans over one span" + QUARTER: over(of(SEARCHED, 0.25), of(UNIFORM, 0.25)),
        "cost of searched spans over spans by chance" + QUARTER: over(of(SEARCHED, 0.25), of(SHUFFLED, 0.25)),
        "relative cost of searched spans, at 1/2": over(half, whole[length]),
        "the span for all heads that costs as much, over searched spans" + EIGHTH: longer(config, costs, 0.125),
        "cost of searched spans over one span, twice the length" + QUARTER: over(
            of(SEARCHED, 0.25, 2 * length), of(UNIFORM, 0.25, 2 * length)
        ),
        "rank correlation of expected and measured cost": (
            float(analysis.rank_correlation(*expected.T)) if len(expected) > 2 else None
        ),
    }
    numbers |= {
        f"cost of keys hidden together over one span, at {b:g} of the text": over(of(TOGETHER, b), of(UNIFORM, b))
        for b in config.budgets
    }
    numbers |= {f"loss with the whole text, {n} tokens": value for n, value in whole.items()}
    names = (UNIFORM, SEARCHED, TOGETHER, SHUFFLED)
    figures: dict[str, Curves | Maps] = {
        "Cost by budget": Curves(
            "mean span, in shares of the text",
            "growth of the loss (nats)",
            {name: [(b, costs[name, b, length]) for b in config.budgets] for name in names},
            log="x",
        )
    }
    figures["Searched spans"] = Maps(spread, y="key head", x="layer")
    return Result(numbers, {"Cost of spans": rows}, figures)


def longer(config: Config, costs: Any, budget: float) -> float | None:
    """The budget of one span for all heads that costs what searched spans of a budget do, over that budget.

    Costs between two budgets lie on a line over the logarithm of the budget. Outside the budgets that were measured
    the nearest one counts.
    """
    goal = costs.get((SEARCHED, budget, config.length))
    if goal is None:
        return None
    budgets = sorted(config.budgets)
    found = np.array([costs[UNIFORM, each, config.length] for each in budgets])
    return float(np.exp(np.interp(-goal, -found, np.log(budgets))) / budget)
