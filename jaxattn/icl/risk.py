"""Risk curves: how wrong predictors are on a task, by the number of examples they have seen, with standard errors."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

from jaxattn.core.checks import check_static_int
from jaxattn.icl.predict import Predictor
from jaxattn.icl.prompt import Prompt

Loss = Callable[[Num[Array, "b n *k"], Num[Array, "b n *m"]], Float[Array, "b n"]]
"""(answers, truth) -> the loss of each: those below for numbers and signs, and for tokens, whose answers are logits,
such as `optax.softmax_cross_entropy_with_integer_labels`."""


class Estimate(NamedTuple):
    """A mean and its standard error, over independent prompts."""

    mean: Float[np.ndarray, "*n"]
    error: Float[np.ndarray, "*n"]


class RiskTable(NamedTuple):
    """The risk of each predictor after each number of examples: `risks[name].mean[j]` after `lengths[j]`."""

    lengths: tuple[int, ...]
    risks: dict[str, Estimate]

    def __str__(self) -> str:
        """Returns a table in Markdown, the standard error after each mean."""
        lines = [["predictor", *map(str, self.lengths)], ["---"] * (1 + len(self.lengths))]
        for name, risk in self.risks.items():
            numbers = zip(risk.mean, risk.error, strict=True)
            lines.append([name, *(f"{mean:.4g} ± {error:.1g}" for mean, error in numbers)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def square(answers: Float[Array, "b n *m"], truth: Float[Array, "b n *m"]) -> Float[Array, "b n"]:
    """Returns (ŷ − y)², summed over the channels of an answer.

    Raises:
        ValueError: ŷ has another shape than y.
    """
    _check_alike("square", answers, truth)
    return ((answers - truth) ** 2).reshape(*truth.shape[:2], -1).sum(-1)


def mistakes(answers: Float[Array, "b n"], truth: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """Returns the probability of a wrong sign: 1 where it is wrong, 1/2 where the answer is 0. Accuracy is 1 less this.

    Raises:
        ValueError: ŷ has another shape than y.
    """
    _check_alike("mistakes", answers, truth)
    return 0.5 * jnp.abs(jnp.sign(answers) - jnp.sign(truth))


def logistic(answers: Float[Array, "b n"], truth: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """Returns log(1 + exp(−ŷ y)) for y = ±1: ŷ is the log of the odds that y is 1.

    Raises:
        ValueError: ŷ has another shape than y.
    """
    _check_alike("logistic", answers, truth)
    return jax.nn.softplus(-answers * truth)


def _check_alike(loss: str, answers: Array, truth: Array) -> None:
    if answers.shape != truth.shape:
        raise ValueError(f"{loss}: answers has shape {answers.shape} and truth {truth.shape}: need the same")


def icl_score(losses: Float[Array, "*b t"], early: int | None = None, late: int | None = None) -> Float[Array, "*b"]:
    """Returns how much less a model loses late in its context than early: the difference, negative where it learns.

    It is the score of in-context learning of Olsson et al. (2022), whose positions are 50 and 500. Without positions it
    is the mean over the last quarter of positions less that over the first.

    Args:
        losses: [..., T], the mean loss at each position.
        early: A position from 0; give both or none.
        late: A later one.

    Raises:
        TypeError: A position is not an int.
        ValueError: One position is given without the other, they are not in order and within T, or there are fewer than
            4 positions for quarters.
    """
    length = jnp.shape(losses)[-1]
    if early is None and late is None:
        if length < 4:
            raise ValueError(f"losses has {length} positions: need at least 4, or early and late")
        quarter = length // 4
        return losses[..., -quarter:].mean(-1) - losses[..., :quarter].mean(-1)
    if early is None or late is None:
        raise ValueError(f"early is {early} and late {late}: need both positions, or none")
    check_static_int("icl_score", "early", early, 0)
    check_static_int("icl_score", "late", late, early + 1)
    if late >= length:
        raise ValueError(f"late is {late} of {length} positions: need one below")
    return losses[..., late] - losses[..., early]


def compare(
    task: Any,
    predictors: Mapping[str, Callable[..., Any]],
    lengths: Sequence[int],
    key: PRNGKeyArray,
    *,
    batch: int = 256,
    batches: int = 16,
    loss: Loss = square,
    excess: bool = False,
) -> RiskTable:
    """Measures E loss(ŷ, y) of each predictor after each number of examples in `lengths`, over batch · batches prompts.

    All predictors answer the same prompts. For a task with its own query, prompts of every length are drawn by
    themselves. A task of tokens with an answer at every position, such as `MarkovChain`, takes a loss of tokens.

    Args:
        task: The task, with a method `with_length`.
        predictors: Predictors by name.
        lengths: Numbers of examples, from 0 on.
        key: The random key.
        batch: The number of prompts in a batch.
        batches: The number of batches.
        loss: The loss.
        excess: The truth is the answer without noise: E (ŷ − f(x))², the risk less the variance of the noise.

    Raises:
        TypeError: Lengths are not integers, predictors have no names, or the task has no `with_length`, so that its
            prompts have one length.
        ValueError: Lengths are missing or negative, an answer of the task does not count at one of them, the prompts
            are fewer than two, or the loss does not take the answers. A value that is not a predictor raises its own
            error when called.
    """
    if not hasattr(task, "with_length"):
        raise TypeError(f"task is {type(task).__name__}: need one with with_length(length), such as FunctionTask")
    if not isinstance(predictors, Mapping):
        raise TypeError(f"predictors is a {type(predictors).__name__}: need a mapping of names to predictors")
    try:
        lengths = tuple(operator.index(length) for length in lengths)
    except TypeError:
        raise TypeError(f"lengths is {lengths!r}: need integers") from None
    if not lengths or min(lengths) < 0:
        raise ValueError(f"lengths is {list(lengths)}: need numbers of examples, from 0 on")
    if batch < 1 or batches < 1 or batch * batches < 2:
        raise ValueError(f"batch is {batch} and batches {batches}: need at least two prompts for a standard error")
    together = getattr(task, "query", None) is None
    keys = jax.random.split(key, batches)
    measured: dict[str, list[np.ndarray]] = {name: [] for name in predictors}
    for group in [lengths] if together else [(length,) for length in lengths]:
        longer = task.with_length(max(group) + 1)
        weights = jax.jit(lambda key, longer=longer: longer.sample(key, batch).weights)(keys[0])
        counts = set(np.flatnonzero((np.asarray(weights) > 0).all(0)))
        if idle := sorted(set(group) - counts):
            raise ValueError(f"lengths holds {idle[0]}: not every answer of {type(task).__name__} counts there")

        def losses(predictor: Callable[..., Any], key: PRNGKeyArray, longer=longer, group=group) -> Array:
            prompt: Prompt = longer.sample(key, batch)
            truth = (prompt.clean if excess else prompt.y)[:, list(group)]
            if isinstance(predictor, Predictor):
                answers = predictor.after(prompt.x, prompt.y, group)
            else:
                answers = predictor(prompt.x, prompt.y)
                if answers.shape[:2] != prompt.y.shape[:2]:
                    raise ValueError(f"a predictor answers {answers.shape} where the answers are {prompt.y.shape}")
                answers = answers[:, list(group)]
            each = loss(answers, truth)
            if each.shape != truth.shape[:2]:
                raise ValueError(f"loss gives {each.shape} of answers {answers.shape}: need {truth.shape[:2]}")
            return jnp.stack([each.mean(0), ((each - each.mean(0)) ** 2).sum(0)])

        for name, predictor in predictors.items():
            of_batch = jax.jit(functools.partial(losses, predictor))
            measured[name].append(np.stack([np.asarray(of_batch(key), float) for key in keys]))
    risks = {name: _pooled(np.concatenate(each, -1), batch) for name, each in measured.items()}
    return RiskTable(lengths, risks)


def _pooled(moments: Float[np.ndarray, "k 2 n"], batch: int) -> Estimate:
    """Returns the estimate from the mean and the sum of squared deviations of each batch."""
    means, squares = moments[:, 0], moments[:, 1]
    total, mean = batch * len(means), means.mean(0)
    deviations = squares.sum(0) + batch * ((means - mean) ** 2).sum(0)
    return Estimate(mean, np.sqrt(deviations / (total - 1) / total))
