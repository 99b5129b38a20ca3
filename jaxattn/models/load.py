"""Configs as plain data, and the decoder that a training run left behind."""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxattn.models import spec
from jaxattn.models.config import DecoderConfig, Mixer
from jaxattn.models.decoder import Decoder
from jaxattn.models.spec import Spec


def to_plain(config: Any) -> Any:
    """A config as what JSON and YAML hold; a mixer, a part or a spec inside it becomes class_path and init_args.

    The form is jsonargparse's, so it can stand in a `--config` file.
    """
    if isinstance(config, Spec):
        arguments = {name: to_plain(value) for name, value in config.arguments.items()}
        return {"class_path": spec.path_of(config.target), "init_args": arguments}
    if callable(config) and hasattr(config, "__qualname__"):
        return {"class_path": spec.path_of(config)}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
        kind = type(config)
        named = isinstance(config, Mixer) or not jax.tree_util.all_leaves([config])
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": fields} if named else fields
    if isinstance(config, np.generic):
        return config.item()
    if isinstance(config, tuple | list):
        return [to_plain(item) for item in config]
    return config


def from_plain(plain: Any) -> DecoderConfig:
    """The decoder config that `to_plain` made. Raises ValueError if it is none."""
    from jsonargparse import ArgumentError, ArgumentParser

    register_specs()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=DecoderConfig)
    try:
        return parser.instantiate(parser.parse_object({"model": _as_now(plain)})).model
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"not the config of a decoder: {error}") from None


def _as_now(plain: Any) -> Any:
    """Plain data of an earlier version: parts of core by the wing that they are in now, and flags as what they set."""
    if isinstance(plain, list | tuple):
        return [_as_now(each) for each in plain]
    if not isinstance(plain, Mapping):
        return plain
    now = {name: _as_now(value) for name, value in plain.items()}
    path = now.get("class_path")
    if isinstance(path, str) and path.startswith("jaxattn.core.") and path.count(".") == 3:
        name = path.rsplit(".", 1)[1]
        wings = [importlib.import_module(f"jaxattn.core.{wing}") for wing in ("attend", "linear", "memory")]
        now["class_path"] = next((f"{wing.__name__}.{name}" for wing in wings if hasattr(wing, name)), path)
    flags = now.get("init_args")
    if path == "jaxattn.models.config.Attention" and isinstance(flags, dict):
        if flags.pop("null_logit", False):
            flags["normalize"] = {"class_path": "jaxattn.nn.NullSoftmax"}
        if flags.pop("alibi", False):
            flags["bias"] = {"class_path": "jaxattn.Alibi.geometric"}
    return now


def load_decoder(folder: str | Path) -> tuple[Decoder, int]:
    """The decoder in the newest good checkpoint of a run's output folder, in evaluation mode, and its step.

    Raises ValueError if the folder holds no checkpoint that can be read.
    """
    from jaxattn.train import load, with_params  # of the extra `train`

    def abstract(config: dict[str, Any]) -> Any:
        if "model" not in config:
            raise ValueError(f"the run in {str(folder)!r} has no 'model' in its config: need models.to_plain of it")
        return nnx.state(nnx.eval_shape(lambda: Decoder(from_plain(config["model"]), rngs=nnx.Rngs(0))), nnx.Param)

    loaded = load(folder, abstract)
    model = with_params(Decoder(from_plain(loaded.config["model"]), rngs=nnx.Rngs(0)), loaded.params)
    model.eval()
    return model, loaded.step


@functools.cache
def register_specs() -> None:
    """Lets jsonargparse read specs: call it before a parser of configs is made."""
    from jsonargparse.typing import register_type

    register_type(Spec, to_plain, spec.from_plain, deserializer_exceptions=(ValueError, TypeError))
