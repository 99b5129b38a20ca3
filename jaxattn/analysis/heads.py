"""What heads do: statistics of their weights, and scores that tell previous-token and induction heads.

Nothing of size T x T is held, so contexts may be long; only `head_statistics` takes weights that were recorded whole.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.core.attend.measure import AtKeys, AtLags, Distance, Entropy, Mass, Matching, Measure
from jaxattn.core.part import part
from jaxattn.core.table import take
from jaxattn.trace import run
from jaxattn.trace.patching import as_inputs


@part
class HeadStatistics:
    """Numbers per layer and head, each a mean over batch and queries.

    Attributes:
        entropy: [L, N], in nats.
        sink_mass: [L, N], in 0..1.
    """

    entropy: Float[Array, "*layers n"]
    sink_mass: Float[Array, "*layers n"]


def head_statistics(weights: Float[Array, "*layers b n t s"]) -> HeadStatistics:
    """Returns the entropy −Σ_j p_ij log p_ij and the sink mass p_i0 of each head.

    Here p_i is row i of the weights, normalised. Rows are normalised first, so weights that do not sum to 1 (sigmoid)
    are compared on the same footing, as in the sink metric of Gu et al. (2024). Rows without any weight are left out of
    the means; a head that has none gives 0.

    Args:
        weights: [..., B, N, T, S], recorded attention weights, with leading axes for layers.
    """
    total = weights.sum(-1, keepdims=True)
    seen = total[..., 0] > 0
    p = weights / jnp.where(total > 0, total, 1)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)

    def mean(rows: Float[Array, "*layers b n t"]) -> Float[Array, "*layers n"]:
        return (rows * seen).sum((-3, -1)) / jnp.maximum(seen.sum((-3, -1)), 1)

    return HeadStatistics(mean(entropy), mean(p[..., 0]))


USUAL: dict[str, Measure] = {
    "entropy": Entropy(),
    "first": AtKeys((0,)),
    "previous": AtLags((1,)),
    "distance": Distance(),
}
"""The measures of `statistics`: the entropy in nats, the weight of the first token (sinks) and of the token before, and
the mean distance in tokens."""


def statistics(
    model: Any, inputs: Any, measures: Mapping[str, Measure] = USUAL, **options: Any
) -> dict[str, Float[Array, "layers n ..."]]:
    """Returns measures of the weights of every head, each a mean over all tokens that are no padding.

    Measures of whole calls, such as `Received` and `LagProfile`, are a mean over the batch.

    Args:
        model: The model.
        inputs: Its inputs: tokens, or a tuple of inputs.
        measures: Name -> measure.
        options: Other arguments of the model. Padding has position −1 in `positions`.

    Returns:
        Name -> [L, N], with further axes if the measure has them; a list by layer where layers differ. Tokens that the
        model has of its own before the sequence count too.
    """
    inputs = as_inputs("inputs", inputs, options, ("record",))
    record = {name: ("weights", measure) for name, measure in measures.items()}
    _, records = run(model, *inputs, record=record, **options)
    places = options.get("positions")
    seen = jnp.ones((1, 1), bool) if places is None else jnp.atleast_2d(jnp.asarray(places)) >= 0

    def mean(name: str, x: Array, axis: int) -> Array:
        if measures[name].over == "sum":
            return x.mean(axis)
        own = x.shape[axis + 1] - seen.shape[1]  # tokens of the model before the sequence
        on = jnp.pad(seen, [(0, 0), (own, 0)], constant_values=True)
        on = jnp.broadcast_to(on, x.shape[axis : axis + 2])
        on = on.reshape(*on.shape, *(1,) * (x.ndim - axis - 2))
        return jnp.where(on, x, 0).sum((axis, axis + 1)) / jnp.maximum(on.sum(), 1)

    def of(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [None if each is None else jax.tree.map(lambda x: mean(name, x, 0), each) for each in value]
        return jax.tree.map(lambda x: mean(name, x, 1), value)

    return {name: of(name, value) for name, value in records.items()}


def sink_rate(
    model: Any, inputs: Any, *, at: int = 0, threshold: float = 0.3, **options: Any
) -> Float[Array, "layers n"]:
    """Returns the share of texts, [L, N], in which a head rests on the token at a position (Gu et al., 2025):

        mean over b of [α_b > threshold],   α_b = mean over queries t ≥ at of the weight of t on the key at `at`

    Texts that end before the position do not count. Weights are taken as they are: those of a normaliser whose rows do
    not sum to 1 (sigmoid) form no sink by being the largest of a row that is nearly 0.

    Args:
        model: The model.
        inputs: Its inputs: tokens, or a tuple of inputs.
        at: The position of the key.
        threshold: What the mean weight must exceed. With 64 tokens uniform causal attention has 0.074 on the first.
        options: Other arguments of the model. Padding has position −1 in `positions`.

    Raises:
        ValueError: `at` is negative, or layers have different numbers of heads, or not all have weights, or the model
            has tokens of its own before the sequence.
    """
    inputs = as_inputs("inputs", inputs, options, ("record",))
    _, records = run(model, *inputs, record={"mass": ("weights", AtKeys((at,)))}, **options)
    check_heads(records["mass"], inputs[0].shape[1])
    mass = records["mass"][..., 0]  # [L, B, T, N]
    places = options.get("positions")
    places = jnp.arange(mass.shape[2]) if places is None else jnp.asarray(places)
    later = jnp.broadcast_to(jnp.atleast_2d(places) >= at, mass.shape[1:3])[..., None]
    alpha = jnp.where(later, mass, 0).sum(2) / jnp.maximum(later.sum(1), 1)  # [L, B, N]
    rests = jnp.where(jnp.isnan(alpha), alpha, alpha > threshold)  # NaN is not "no sink"
    counts = later.any(1)
    return jnp.where(counts, rests, 0).sum(1) / counts.sum(0)


def between_classes(
    model: Any, inputs: Any, classes: Int[Array, "b t"], size: int, **options: Any
) -> Float[Array, "layers n from to"]:
    """Returns how much the tokens of one class read from those of another, [L, N, G, G], each row a mean over queries.

    Args:
        model: The model.
        inputs: Its inputs.
        classes: [B, P], the class of the token at each position, 0 .. size − 1; −1 for tokens that are left out. With
            padding that is by position and not by place in the row.
        size: G.
        options: As of `statistics`.

    Raises:
        ValueError: Layers have different numbers of heads, or not all have weights, or the model has tokens of its own
            before the sequence.
    """
    groups, inputs = jnp.asarray(classes), as_inputs("inputs", inputs, options, ("record",))
    record = {"mass": ("weights", Mass(groups, size))}
    _, records = run(model, *inputs, record=record, **options)
    check_heads(records["mass"], groups.shape[1] if options.get("positions") is None else inputs[0].shape[1])
    at = groups
    if options.get("positions") is not None:
        at = take(groups, jnp.atleast_2d(jnp.asarray(options["positions"])), grid=1, fill=-1)
    reading = jax.nn.one_hot(at, size, dtype=records["mass"].dtype)  # [B, T, G]
    total = jnp.einsum("btf,lbtng->lnfg", reading, records["mass"])
    return total / jnp.maximum(reading.sum((0, 1)), 1)[:, None]


def check_unpadded(options: Mapping[str, Any]) -> None:
    if "positions" in options:
        raise ValueError("positions is given: need rows without padding, whose tokens stand at 0, 1, ...")


def check_heads(record: Any, length: int) -> None:
    if isinstance(record, list):
        raise ValueError("the layers have different numbers of heads, or not all have weights: need the same in all")
    if record.shape[2] != length:
        raise ValueError(
            f"the model sees {record.shape[2]} tokens where the inputs have {length}: need none of the model's own"
        )


def repeated_tokens(
    key: Array, batch: int, period: int, vocabulary: int, *, first: int | None = None
) -> Int[Array, "b t"]:
    """Returns random tokens that come twice, [B, 2 P], behind the token `first` if it is given.

    Args:
        key: The key.
        batch: B.
        period: P.
        vocabulary: Tokens are from 0 .. vocabulary − 1.
        first: A token that every text begins with.
    """
    tokens = jnp.tile(jax.random.randint(key, (batch, period), 0, vocabulary), (1, 2))
    return tokens if first is None else jnp.concatenate([jnp.full((batch, 1), first), tokens], 1)


class HeadScores(NamedTuple):
    """How much heads look at certain tokens while random tokens come for the second time: means of weights, 0 to 1.

    Attributes:
        previous: [L, N], the token before: previous-token heads.
        duplicate: [L, N], the same token in the first copy: duplicate-token heads.
        induction: [L, N], the token behind the same token in the first copy: induction heads (Olsson et al., 2022).
        first: [L, N], the first token: sinks.
        chance: The mean of each of them if all visible tokens had the same weight.
    """

    previous: Array
    duplicate: Array
    induction: Array
    first: Array
    chance: float


def head_scores(
    model: Any,
    key: Array,
    *,
    vocabulary: int | None = None,
    batch: int = 4,
    period: int = 50,
    first: int | None = None,
    **options: Any,
) -> HeadScores:
    """Returns the scores of all heads on random tokens that come twice.

    Args:
        model: A decoder, at least 2 P tokens long.
        key: The key of the tokens.
        vocabulary: The number of tokens that are drawn from; by default those of the model.
        batch: How many texts.
        period: P, how many tokens are repeated.
        first: A token that every text begins with, such as the one by which texts begin in training.
        options: Other arguments of the model.

    Raises:
        ValueError: Layers have different numbers of heads, or not all have weights, or the model has tokens of its own
            before the sequence.
    """
    vocabulary = model.config.vocabulary if vocabulary is None else vocabulary
    tokens = repeated_tokens(key, batch, period, vocabulary, first=first)
    lags = {"lags": ("weights", AtLags((1, period, period - 1))), "first": ("weights", USUAL["first"])}
    _, records = run(model, *as_inputs("tokens", tokens, options, ("record",)), record=lags, **options)
    check_heads(records["lags"], tokens.shape[1])
    second = slice(tokens.shape[1] - period, None)
    previous, duplicate, induction = jnp.moveaxis(records["lags"][:, :, second].mean((1, 2)), -1, 0)
    counts = jnp.arange(tokens.shape[1])[second] + 1
    sink = records["first"][:, :, second, :, 0].mean((1, 2))
    return HeadScores(previous, duplicate, induction, sink, float((1 / counts).mean()))


def prefix_scores(model: Any, tokens: Int[Array, "b t"], **options: Any) -> Float[Array, "layers n"]:
    """Returns how much heads look behind earlier occurrences of the token at hand: prefix matching, 0 to 1, [L, N].

        mean over i of Σ_{j ≤ i} w_ij [token_{j−1} = token_i]

    over all tokens that were seen before in their row, at any distance (Olsson et al., 2022). 1 is an induction head.
    Copies of random tokens of one period can be followed by position alone; copies of several periods cannot.

    Args:
        model: The model.
        tokens: [B, T].
        options: Other arguments of the model, without `positions`.

    Raises:
        ValueError: No token comes again, layers have different numbers of heads, or not all have weights, or the model
            has tokens of its own before the sequence.
    """
    check_unpadded(options)
    tokens = jnp.asarray(tokens)
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    record = {"behind": ("weights", Matching(tokens, before))}
    _, records = run(model, *as_inputs("tokens", tokens, options, ("record",)), record=record, **options)
    check_heads(records["behind"], tokens.shape[1])
    again = jnp.tril(tokens[:, :, None] == tokens[:, None], -1).any(-1)
    if not isinstance(again, jax.core.Tracer) and not bool(again.any()):
        raise ValueError("tokens has no token that comes again in its row: need one such as of repeated_tokens")
    return jnp.where(again[..., None], records["behind"], 0).sum((1, 2)) / again.sum()
