"""Trains predictors that are parts, such as merged attention layers, to answer the last question of fresh prompts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments import decoders
from jaxattn import icl
from jaxattn.claims import check_multiple
from jaxattn.train import OptimizerConfig, drawn, prompt_loss

BATCH = 4096  # prompts that a risk is measured on at a time


def check(steps: int, prompts: int) -> None:
    """Raises ValueError for steps of training that are no multiple of 10, and prompts that are none of `BATCH`."""
    check_multiple("steps", steps, 10)
    check_multiple("prompts", prompts, BATCH)


def train(
    task: icl.FunctionTask,
    params: Any,
    build: Callable[[Any], icl.Predictor],
    name: str,
    seed: int,
    record: Mapping[str, Any],
    optimizer: OptimizerConfig,
    steps: int,
    batch_size: int,
    folder: Path,
    console: Console,
    draws: int | None = None,
) -> tuple[Any, list[tuple[float, float]]]:
    """(the params after training, (step, risk) at 10 measurements), build(params) being the predictor.

    With `draws`, the params of so many predictors lie along a first axis, and each learns from prompts of its own, an
    equal part of the batch. They are as they would be alone if the optimiser clips nothing.

    Raises KeyboardInterrupt if it was stopped: it goes on when called again.
    """
    last, every = [task.length - 1], steps // 10

    def answers(params: Any, x: Any, y: Any) -> jax.Array:
        if draws is None:
            return build(params).after(x, y, last)
        parts = [a.reshape(draws, -1, *a.shape[1:]) for a in (x, y)]
        each = jax.vmap(lambda one, x, y: build(one).after(x, y, last))(params, *parts)
        return each.reshape(-1, *each.shape[2:])

    result = decoders.train_params(
        prompt_loss(answers, icl.square, last),
        params,
        drawn(task),
        steps=steps,
        batch_size=batch_size,
        eval_every=every,
        eval_batches=4,
        optimizer=optimizer,
        seed=seed,
        run_config={"name": name, **record},
        folder=folder / name.replace(" ", "_"),
        console=console,
    )
    return result.params, decoders.measured(result, "loss")


def risk(
    task: icl.FunctionTask, predictor: icl.Predictor, prompts: int, seed: int, *, excess: bool = False
) -> tuple[float, float]:
    """(E (ŷ − y)² of the last answer, its standard error), over so many prompts, as `check` has them."""
    options: dict[str, Any] = {"batch": BATCH, "batches": prompts // BATCH, "excess": excess}
    measured = icl.compare(task, {"": predictor}, [task.length - 1], jax.random.key(seed), **options).risks[""]
    return float(measured.mean[0]), float(measured.error[0])
