"""Configs as plain data, and the model that a training run left behind."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxattn.models.config import TransformerConfig
from jaxattn.models.transformer import Transformer
from jaxattn.nn import spec
from jaxattn.nn.spec import Spec


def to_plain(config: Any) -> Any:
    """Returns a config as plain data for JSON and YAML.

    A mixer, a part or a spec inside the config becomes class_path and init_args. The form is jsonargparse's, so the
    result can stand in a `--config` file.
    """
    if isinstance(config, Spec):
        arguments = {name: to_plain(value) for name, value in config.arguments.items()}
        return {"class_path": spec.path_of(config.target), "init_args": arguments}
    if callable(config) and hasattr(config, "__qualname__"):
        return {"class_path": spec.path_of(config)}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
        kind = type(config)
        named = not jax.tree_util.all_leaves([config])
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": fields} if named else fields
    if isinstance(config, np.generic):
        return config.item()
    if isinstance(config, tuple | list):
        return [to_plain(item) for item in config]
    return config


def from_plain(plain: Any) -> TransformerConfig:
    """Returns the config of a model that `to_plain` made.

    Raises:
        ValueError: `plain` is not such a config.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    register_specs()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=TransformerConfig)
    try:
        return parser.instantiate(parser.parse_object({"model": plain})).model
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"not the config of a model: {error}") from None


def load_model(folder: str | Path) -> tuple[Transformer, int]:
    """Returns the model in the newest good checkpoint of a run's output folder, in evaluation mode, and its step.

    Raises:
        ValueError: The folder holds no checkpoint that can be read, or its config has no model.
    """
    from jaxattn.train import load, with_params  # of the extra `train`

    def abstract(config: dict[str, Any]) -> Any:
        if "model" not in config:
            raise ValueError(f"the run in {str(folder)!r} has no 'model' in its config: need models.to_plain of it")
        return nnx.state(nnx.eval_shape(lambda: Transformer(from_plain(config["model"]), rngs=nnx.Rngs(0))), nnx.Param)

    loaded = load(folder, abstract)
    model = with_params(Transformer(from_plain(loaded.config["model"]), rngs=nnx.Rngs(0)), loaded.params)
    model.eval()
    return model, loaded.step


@functools.cache
def register_specs() -> None:
    """Lets jsonargparse read specs: call `register_specs` before a parser of configs is made."""
    from jsonargparse.typing import register_type

    register_type(Spec, to_plain, spec.from_plain, deserializer_exceptions=(ValueError, TypeError))
