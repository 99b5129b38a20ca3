"""What a model finds important in a text, by attention, gradients and removal, held against what people mark.

The twelve vectors of Kou et al. (2024) are `attention_importance` (six), `gradient_importance` (four), and for
perturbation `token_effects` with a substitute, and `shapley`. Their list is from a summary and from memory: what is
defined here is said in each docstring, and may differ from the code of the paper.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxattn.core.checks import check_static_int
from jaxattn.trace import Add, run
from jaxattn.trace.patching import as_inputs
from jaxattn.trace.sweep import compiled, unchanged


def attention_importance(weights: Float[Array, "layers b n t t"], prompt: int) -> dict[str, Float[Array, "b p"]]:
    """Returns how much each token of a prompt is read, six ways: while reading, and while writing what follows it.

        reading_j = Σ_{i < P} Σ_n A^n_ij,   coding_j = Σ_{i ≥ P} Σ_n A^n_ij

    of the first layer, of the last, and of all.

    Args:
        weights: [L, B, N, T, T], recorded attention weights of prompt and answer.
        prompt: P, the number of tokens of the prompt, 1 to T.

    Returns:
        "reading, first", "reading, last", "reading, all", and the same of "coding" -> [B, P].

    Raises:
        ValueError: `prompt` is out of range.
    """
    if not 1 <= prompt <= weights.shape[-1]:
        raise ValueError(f"prompt is {prompt}: need 1 to {weights.shape[-1]}, the number of tokens")
    by_head = jnp.asarray(weights).sum(2)[..., :prompt]
    while_doing = {"reading": by_head[:, :, :prompt].sum(2), "coding": by_head[:, :, prompt:].sum(2)}
    return {
        f"{name}, {which}": layers
        for name, read in while_doing.items()
        for which, layers in (("first", read[0]), ("last", read[-1]), ("all", read.sum(0)))
    }


class InputGradients(NamedTuple):
    """A gradient at the embedded inputs.

    Attributes:
        embed: x, [B, T, D].
        gradient: ∂ metric / ∂ x, [B, T, D].
    """

    embed: Array
    gradient: Array

    def saliency(self, order: int = 2) -> Float[Array, "b t"]:
        """Returns the norm of the gradient of each token, ‖∂ metric / ∂ x_t‖.

        Args:
            order: 2 for the Euclidean norm, 1 for the sum of sizes.
        """
        return jnp.linalg.norm(self.gradient, order, axis=-1)

    def times_input(self) -> Float[Array, "b t"]:
        """Returns x_t · ∂ metric / ∂ x_t, by how much a linear metric would fall without the vector of a token."""
        return (self.embed * self.gradient).sum(-1)


@unchanged()
def input_gradients(model: Any, inputs: Any, metric: Callable[[Any], Array], **options: Any) -> InputGradients:
    """Returns the gradient of a metric at the embedded tokens, site `embed`.

    Args:
        model: The model.
        inputs: Its inputs: tokens, or a tuple of inputs.
        metric: From the output to a number, or to one number per text, which are added up.
        options: Other arguments of the model.
    """
    inputs = as_inputs("inputs", inputs, options)
    embed = run(model, *inputs, record=("embed",), **options)[1]["embed"]

    def total(added: Array) -> Array:
        return jnp.sum(metric(model(*inputs, edits={"embed": Add(added)}, **options)[0]))

    return InputGradients(embed, compiled(jax.grad(total), jnp.zeros_like(embed)))


def gradient_importance(
    model: Any, tokens: Int[Array, "b t"], prompt: int, **options: Any
) -> dict[str, Float[Array, "b p"]]:
    """Returns how much the tokens of a prompt matter to what a decoder says of them, and of what follows, four ways.

    The metric of "reading" is the log-likelihood of the prompt, Σ_{1 ≤ t < P} log p(token t), and that of "coding" the
    one of the answer, Σ_{t ≥ P} log p(token t). "saliency" is the norm of its gradient at the embedding of a token, and
    "input x gradient" the product with the embedding.

    Args:
        model: A decoder.
        tokens: [B, T], prompts of P tokens and their answers.
        prompt: P, 1 to T − 1.
        options: Other arguments of the model.

    Returns:
        "saliency, reading", "input x gradient, reading", and the same of "coding" -> [B, P].

    Raises:
        ValueError: `prompt` is out of range.
    """
    tokens = jnp.asarray(tokens)
    if not 1 <= prompt < tokens.shape[1]:
        raise ValueError(f"prompt is {prompt}: need 1 to {tokens.shape[1] - 1}, with an answer behind it")

    def said(some: slice) -> Callable[[Array], Array]:
        def metric(logits: Array) -> Array:
            log_p = jax.nn.log_softmax(logits[:, :-1])
            of_token = jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
            return of_token[:, some].sum(1)

        return metric

    found = {}
    for name, some in (("reading", slice(0, prompt - 1)), ("coding", slice(prompt - 1, None))):
        at = input_gradients(model, tokens, said(some), **options)
        found[f"saliency, {name}"] = at.saliency()[:, :prompt]
        found[f"input x gradient, {name}"] = at.times_input()[:, :prompt]
    return found


def shapley(
    F: Callable[[Bool[np.ndarray, "m n"]], ArrayLike],
    count: int,
    *,
    orders: int | None = None,
    rng: np.random.Generator | None = None,
) -> Float[np.ndarray, " n"]:
    """Returns the Shapley value of each of n players, its mean gain over all orders in which players come:

        φ_i = Σ_{S without i} |S|! (n − |S| − 1)! / n! (F(S + i) − F(S))

    Values sum to F(all) − F(none).

    Args:
        F: From rows of who is there, [m, n] booleans, to a number each, [m]: one call for all sets.
        count: n, at most 16 unless `orders` are drawn.
        orders: How many orders are drawn at random instead; the sum is the same, and values have a standard error.
        rng: What orders are drawn with.

    Raises:
        TypeError: A number is not an int.
        ValueError: There are too many players for all sets, or `orders` is given without `rng`.
    """
    check_static_int("shapley", "count", count, 1)
    if orders is None:
        if count > 16:
            raise ValueError(f"count is {count}, of which there are 2**{count} sets: need at most 16, or orders=")
        sets = (np.arange(2**count)[:, None] >> np.arange(count)) & 1 == 1
        values = np.asarray(F(sets), np.float64)
        sizes = np.arange(count)
        ways = np.cumprod(np.concatenate([[1.0], np.arange(1, count)]))  # factorials
        share = ways[sizes] * ways[count - 1 - sizes] / (ways[-1] * count)
        found = np.empty(count)
        for player in range(count):
            without = np.flatnonzero(~sets[:, player])
            gains = values[without | 1 << player] - values[without]
            found[player] = share[sets[without].sum(1)] @ gains
        return found
    check_static_int("shapley", "orders", orders, 1)
    if rng is None:
        raise ValueError("orders is given without rng: need np.random.default_rng(seed)")
    drawn = rng.permuted(np.tile(np.arange(count), (orders, 1)), axis=1)
    rank = np.argsort(drawn, axis=1)
    there = rank[:, None] < np.arange(count + 1)[:, None]  # [orders, n + 1, n]: the first 0 .. n of each order
    values = np.asarray(F(there.reshape(-1, count)), np.float64).reshape(orders, count + 1)
    return np.take_along_axis(np.diff(values, axis=1), rank, 1).mean(0)


class Overlap(NamedTuple):
    """How the k most important tokens agree with the marked ones.

    Attributes:
        precision: The share of these k that are marked.
        recall: The share of marked tokens that are among them: keyword coverage.
        f1: Their harmonic mean, 0 where nothing agrees.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def top_overlap(importance: Float[Any, "*b t"], marked: Bool[Any, "*b t"], k: int) -> Overlap:
    """Returns the agreement of the k most important tokens with those that people marked.

    Of equally important tokens the first count. NaN where nothing is marked, or the importance has a NaN.

    Args:
        importance: [..., T].
        marked: [..., T].
        k: 1 to T.

    Raises:
        ValueError: The shapes differ, or `k` is out of range.
    """
    scores, wanted = np.asarray(importance, np.float64), np.asarray(marked, bool)
    if scores.shape != wanted.shape:
        raise ValueError(f"importance has shape {scores.shape} and marked {wanted.shape}: need the same")
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k is {k}: need 1 to {scores.shape[-1]}, the number of tokens")
    top = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    hits = np.take_along_axis(wanted, top, -1).sum(-1).astype(np.float64)
    hits = np.where(np.isnan(scores).any(-1), np.nan, hits)
    count = wanted.sum(-1)
    count = np.where(count == 0, np.nan, count)
    return Overlap(hits / k + 0 * count, hits / count, 2 * hits / (k + count))


def krippendorff_alpha(codings: Float[Any, "coders units"]) -> float:
    """Returns Krippendorff's α of nominal codings, 1 − observed / expected disagreement (Krippendorff, 2004).

    1 is for codings that all agree, and 0 on average for independent ones. The pairs of values of each unit count, each
    with the weight 1 / (number of its values − 1). NaN where all values are the same, or no unit has two.

    Args:
        codings: [coders, units], any numbers that stand for categories, NaN where a coder has none.
    """
    table = np.asarray(codings, np.float64)
    there = ~np.isnan(table)
    paired = there.sum(0) > 1
    table, there = table[:, paired], there[:, paired]
    values = np.unique(table[there])
    counts = (table[..., None] == values).sum(0)  # [units, values]
    size = counts.sum(1, keepdims=True)
    agree = (counts * (counts - 1) / (size - 1)).sum()
    total, of_value = counts.sum(), counts.sum(0)
    expected = 1 - (of_value * (of_value - 1)).sum() / (total * (total - 1)) if total > 1 else 0
    return float(1 - (1 - agree / total) / expected) if expected > 0 else float("nan")
