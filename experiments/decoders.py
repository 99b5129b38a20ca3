"""Trains the small decoders of the experiments: layers of one mixer, on prompts that are drawn in the step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from jaxattn import icl, models, nn
from jaxattn.train import (
    Drawn,
    OptimizerConfig,
    TrainConfig,
    drawn,
    fit,
    make_optimizer,
    module_loss,
    next_token_loss,
    prompt_loss,
    with_params,
)
from jaxattn.train.loop import Result
from jaxattn.train.step import LossFunction

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=50, final_fraction=0.0)


def build(
    mixer: models.Spec,
    *,
    vocabulary: int,
    length: int,
    width: int,
    layers: int,
    seed: int,
    hidden: int | None = 2,
    inputs: int = 0,
    positions: models.Spec | None = None,
    causal: bool = True,
) -> models.Transformer:
    """A decoder of `layers` layers, of the mixer and a feed-forward block of `hidden` units per channel, or none.

    `positions` is the module whose vectors are added to those of the tokens, if any. Without `causal` the model is an
    encoder, whose tokens see all others.
    """
    block = models.Spec(nn.FeedForward, hidden=(hidden or 0) * width, activation="gelu_tanh", gated=False)
    layer = models.pre_norm(mixer, None if hidden is None else block)
    config = models.TransformerConfig(
        vocabulary,
        length,
        width,
        [layer] * layers,
        embed=models.Spec(nn.VectorEmbedding, inputs=inputs) if inputs else models.Spec(nn.TokenEmbedding),
        positions=positions,
        causal=causal,
        head=models.Spec(nn.Head),
    )
    return models.Transformer(config, rngs=nnx.Rngs(seed))


def predictor(model: models.Transformer) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A decoder of vectors as a predictor: it reads interleaved prompts, and its answers are read at the inputs."""
    return icl.interleaved(lambda tokens: model(tokens)[0], model.config.length)


def next_token(model: models.Transformer, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss on a batch of tokens, and what is measured beside it."""
    logits, *_ = model(batch["tokens"])
    total, sums = next_token_loss(logits, batch)
    return total, {name: sums[name] for name in ("weight", "correct")}


def answered_tokens(model: models.Transformer, prompt: icl.Prompt) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss on a batch of prompts of tokens, as of `next_token`."""
    return next_token(model, prompt.tokens())


def answers(loss: icl.Loss) -> Callable[[models.Transformer, icl.Prompt], tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss on a batch of prompts."""
    return lambda model, prompt: prompt_loss(lambda _, x, y: predictor(model)(x, y), loss)(None, prompt, None)


def train(
    model: models.Transformer,
    source: Drawn,
    *,
    loss: Callable[[models.Transformer, Any], tuple[jax.Array, dict[str, jax.Array]]] = next_token,
    look: Callable[[models.Transformer, Any], dict[str, jax.Array]] | None = None,
    trained: Any = nnx.Param,
    **options: Any,
) -> tuple[models.Transformer, Result]:
    """(the trained model, what `fit` says of the run), as `train_params` does with these options.

    `look(model, batch)` are further numbers, means over a batch, of evaluations alone. `trained` is the filter of NNX
    for what is trained; all else stays as it is. Random streams of the model restart at every step, and measurements
    have no dropout (`module_loss`).
    """

    def measured_loss(model, batch, key):
        total, sums = loss(model, batch)
        if look is None or key is not None:  # evaluations have no key
            return total, sums
        return total, sums | {name: value * sums["weight"] for name, value in look(model, batch).items()}

    params, loss_fn = module_loss(model, measured_loss, trained)
    result = train_params(loss_fn, params, source, **options)
    return with_params(model, result.params, trained), result


def train_params(
    loss_fn: LossFunction,
    params: Any,
    source: Drawn,
    *,
    steps: int,
    batch_size: int,
    eval_every: int,
    eval_batches: int,
    optimizer: OptimizerConfig,
    seed: int,
    run_config: Mapping[str, Any],
    folder: Path,
    console: Console,
    validation: Drawn | None = None,
    on_eval: Any = (),
) -> Result:
    """What `fit` says of a run that is measured on further batches of the same source, or on those of `validation`.

    Raises KeyboardInterrupt if it was stopped: it goes on from its checkpoint when called again.
    """
    result = fit(
        loss_fn=loss_fn,
        params=params,
        optimizer=make_optimizer(optimizer, steps),
        train_data=source,
        validation_data=source if validation is None else validation,
        config=TrainConfig(
            steps=steps,
            batch_size=batch_size,
            eval_every=eval_every,
            eval_batches=eval_batches,
            save_every=4 * eval_every,
            keep=2,
            log_every=eval_every,
            seed=seed,
        ),
        run_config=run_config,
        folder=folder,
        on_eval=on_eval,
        console=console,
    )
    if not result.complete:
        raise KeyboardInterrupt
    return result


@dataclass(frozen=True)
class Learner:
    """A decoder of vectors, with feed-forward blocks of 4 times its width, and how it is trained on prompts.

    Attributes:
        width: Width of the model.
        layers: Number of layers.
        steps: Training steps.
        batch_size: Prompts per step.
        eval_every: Steps between measurements in training.
        optimizer: The optimiser.
    """

    width: int = 64
    layers: int = 3
    steps: int = 2000
    batch_size: int = 64
    eval_every: int = 200
    optimizer: OptimizerConfig = OPTIMIZER

    def learn(
        self,
        task: icl.FunctionTask | icl.Curriculum,
        mixer: models.Spec,
        loss: icl.Loss,
        *,
        seed: int,
        run_config: Mapping[str, Any],
        folder: Path,
        console: Console,
    ) -> tuple[models.Transformer, Result]:
        """(the decoder trained on a task, or along a curriculum, what `fit` says of the run)."""
        end = task.task if isinstance(task, icl.Curriculum) else task
        model = build(
            mixer,
            vocabulary=1,
            length=2 * end.length,
            width=self.width,
            layers=self.layers,
            seed=seed,
            hidden=4,
            inputs=end.inputs.dim,
        )
        return train(
            model,
            drawn(task),
            steps=self.steps,
            batch_size=self.batch_size,
            eval_every=self.eval_every,
            eval_batches=4,
            optimizer=self.optimizer,
            seed=seed,
            run_config=run_config,
            folder=folder,
            console=console,
            loss=answers(loss),
        )


def first_step(line: Sequence[tuple[float, float]], level: float) -> float | None:
    """The first step at which a line is at a level or above it; None if it never is."""
    return next((step for step, value in line if value >= level), None)


def measured(result: Result, name: str) -> list[tuple[float, float]]:
    """(step, value) of a metric at every measurement, such as `correct` and `loss`."""
    name = f"validation_{name}"
    return [(line["step"], line[name]) for line in result.history if name in line]
