"""Trains byte-level decoders of the experiments on the Python standard library, in stages, and measures their text."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from jaxattn.train import (
    OptimizerConfig,
    TrainConfig,
    Windows,
    bits_per_byte,
    fit,
    language_loss,
    make_optimizer,
    ordered_batches,
    split,
    standard_library,
    with_params,
)


class Stages:
    """Stages of training of one seed of an experiment, each of which is taken up again where it was stopped.

    Attributes:
        windows: The training data.
        held_out: The validation data.
        learning: Name of a stage -> (step, bits per byte of the step's batch), or its loss where there are no bytes.
    """

    def __init__(
        self,
        experiment: str,
        config: Mapping[str, Any],
        seed: int,
        folder: Path,
        console: Console,
        *,
        saves: int = 2,
        lines: int = 20,
    ):
        """Splits the text into windows.

        Args:
            experiment: Its name.
            config: Its config, with `context`, `batch_size` and `eval_batches`.
            seed: The seed of the split and of the batches.
            folder: The folder of the seed; each stage has its own in it.
            console: The console for progress.
            saves: Checkpoints per stage.
            lines: Lines of the log per stage.
        """
        documents, validation = split(standard_library(), 0.05, seed)
        self.windows, self.held_out = (Windows(text, config["context"]) for text in (documents, validation))
        self.learning: dict[str, list[tuple[float, float]]] = {}
        self._experiment, self._config, self._seed = experiment, config, seed
        self._folder, self._console, self._saves, self._lines = folder, console, saves, lines

    def trained(self, name: str, given: Any, steps: int, optimizer: OptimizerConfig) -> Any:
        """Returns the parameters after `steps` of the loss in `given`, (params, loss_fn).

        Raises KeyboardInterrupt if it was stopped.
        """
        self._console.print(f"{self._experiment}: {name}")
        params, loss_fn = given
        result = fit(
            loss_fn=loss_fn,
            params=params,
            optimizer=make_optimizer(optimizer, steps),
            train_data=self.windows,
            validation_data=self.held_out,
            config=TrainConfig(
                steps=steps,
                batch_size=self._config["batch_size"],
                eval_every=steps,
                eval_batches=1,
                save_every=max(steps // self._saves, 1),
                keep=1,
                log_every=max(steps // self._lines, 1),
                seed=self._seed,
            ),
            run_config={"stage": name, self._experiment: self._config},
            folder=self._folder / name.replace(" ", "_").replace(",", ""),
            console=self._console,
        )
        if not result.complete:
            raise KeyboardInterrupt
        key = "bits_per_byte" if "bits_per_byte" in result.history[0] else "loss"
        self.learning[name] = [(line["step"], line[key]) for line in result.history if key in line]
        return result.params

    def on_text(self, name: str, model: Any, steps: int, optimizer: OptimizerConfig) -> Any:
        """Returns the model after `steps` on text, in evaluation."""
        model = with_params(model, self.trained(name, language_loss(model), steps, optimizer))
        model.eval()
        return model

    def bits(self, model: nnx.Module) -> float:
        """Returns the bits per byte of the validation data."""
        params, loss_fn = language_loss(model)
        measure = jax.jit(lambda batch: loss_fn(params, batch, None)[1])
        sums: Counter = Counter()
        for batch in ordered_batches(self.held_out, self._config["batch_size"], self._config["eval_batches"]):
            sums.update({name: float(value) for name, value in measure(batch).items()})
        return bits_per_byte(sums)
