"""Published models in GGUF files, and in folders as Hugging Face's: config.json, safetensors, tokenizer.json."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn.models.config import TransformerConfig
from jaxattn.models.encoder_decoder import EncoderDecoder
from jaxattn.models.pretrained import decoders, encoders, recurrences, tokenizer
from jaxattn.models.pretrained.gguf_file import GgufFile
from jaxattn.models.pretrained.loaded import Pretrained
from jaxattn.models.pretrained.weights import Table, assign, published
from jaxattn.models.transformer import Transformer

Configs = TransformerConfig | tuple[TransformerConfig, TransformerConfig]


@dataclass(frozen=True)
class Family:
    """What there is to know of a published architecture.

    Attributes:
        configs: From the numbers of config.json to a config, or to those of an encoder and a decoder.
        table: From the same numbers to the table of names.
        ignored: Patterns of published names that are no parameters.
        prefix: What stands before the names of the table, and is left out in some files.
        share_embedding: Whether encoder and decoder share their embedding.
    """

    configs: Callable[[Mapping[str, Any]], Configs]
    table: Callable[[Mapping[str, Any]], Table]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    share_embedding: bool = False


_ROBERTA = Family(
    encoders.roberta,
    encoders.roberta_table,
    (
        "roberta.embeddings.position_ids",
        "roberta.embeddings.token_type_ids",
        "roberta.pooler.dense.weight",
        "roberta.pooler.dense.bias",
    ),
    "roberta.",
)

FAMILIES = {
    "gpt2": Family(
        decoders.gpt2,
        decoders.gpt2_table,
        ("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
        "transformer.",
    ),
    "llama": Family(decoders.llama, decoders.llama_table, ("model.layers.*.self_attn.rotary_emb.inv_freq",), "model."),
    "mistral": Family(decoders.mistral, decoders.llama_table, (), "model."),
    "qwen2": Family(decoders.qwen2, decoders.qwen2_table, (), "model."),
    "qwen3": Family(decoders.qwen3, decoders.qwen3_table, (), "model."),
    "olmo2": Family(decoders.olmo2, decoders.olmo2_table, (), "model."),
    "gemma": Family(decoders.gemma, decoders.gemma_table, (), "model."),
    "gemma2": Family(decoders.gemma2, decoders.gemma2_table, (), "model."),
    "gemma3_text": Family(decoders.gemma3_text, decoders.gemma3_table, (), "model."),
    "gpt_neox": Family(
        decoders.gpt_neox,
        decoders.gpt_neox_table,
        tuple(f"gpt_neox.layers.*.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),
        "gpt_neox.",
    ),
    "gpt_oss": Family(decoders.gpt_oss, decoders.gpt_oss_table),
    "mamba2": Family(recurrences.mamba2, recurrences.mamba2_table, (), "backbone."),
    "rwkv7": Family(recurrences.rwkv7, recurrences.rwkv7_table, (), "model."),
    "bert": Family(
        encoders.bert,
        encoders.bert_table,
        (
            "bert.embeddings.position_ids",
            "bert.pooler.dense.weight",
            "bert.pooler.dense.bias",
            "cls.seq_relationship.weight",
            "cls.seq_relationship.bias",
        ),
        "bert.",
    ),
    **dict.fromkeys(encoders.ROBERTAS, _ROBERTA),
    "albert": Family(
        encoders.albert,
        encoders.albert_table,
        (
            "albert.embeddings.position_ids",
            "albert.pooler.weight",
            "albert.pooler.bias",
            "sop_classifier.classifier.weight",
            "sop_classifier.classifier.bias",
        ),
        "albert.",
    ),
    "vit": Family(encoders.vit, encoders.vit_table, (), "vit."),
    "dinov2": Family(encoders.dinov2, encoders.dinov2_table, ("embeddings.mask_token",)),
    "t5": Family(
        encoders.t5,
        encoders.t5_table,
        ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        share_embedding=True,
    ),
    "whisper": Family(encoders.whisper, encoders.whisper_table, (), "model."),
}
"""The `model_type` of config.json -> its family."""


class _Files(Mapping[str, np.ndarray]):
    """Arrays of safetensors files by name, read when they are asked for."""

    def __init__(self, files: list[Path]):
        from safetensors import SafetensorError, safe_open

        self.where: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="np") as opened:
                    names = list(opened.keys())
            except SafetensorError as error:
                raise ValueError(f"file {str(file)!r} is no complete safetensors file: {error}") from error
            if twice := sorted(set(names) & set(self.where)):
                raise ValueError(
                    f"{str(self.where[twice[0]])!r} and {str(file)!r} both have {twice}: need each name once"
                )
            self.where |= dict.fromkeys(names, file)

    def __getitem__(self, name: str) -> np.ndarray:
        from safetensors import safe_open

        # Opened anew: the pages of a file that stays open stay in memory beside the arrays that were read from it.
        with safe_open(self.where[name], framework="np") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


class _Renamed(Mapping[str, np.ndarray]):
    """Arrays under other names."""

    def __init__(self, arrays: Mapping[str, np.ndarray], names: Mapping[str, str]):
        self.arrays, self.names = arrays, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def load_pretrained(path: str | Path, *, dtype: Literal["float32", "bfloat16", "float64"] = "float32") -> Pretrained:
    """Returns the published model in a folder or in a GGUF file, with its tokenizer.

    The weights stay as they were published: nothing is folded into a norm, scaled, or re-ordered beyond the layout of
    a map. They are read one array after the other into the memory of the parameters, and little more than that is
    taken. Weights that a GGUF file has in blocks of a few bits are computed with in full.

    Args:
        path: A folder with config.json, and one or several safetensors files; with tokenizer.json for a tokenizer, or
            for BERT with vocab.txt, for GPT-2 with vocab.json and merges.txt. Or a GGUF file, which has all of it.
        dtype: Of the computation; parameters are float32, or float64 with "float64".

    Raises:
        ValueError: There is no config.json, its `model_type` or an option of it is not known, a file is missing or
            broken, the weights are in a format that runs code when it is read, names or shapes do not fit (all of them
            are listed), or a GGUF file has a tokenizer of an unknown kind.
        MemoryError: The parameters need more memory than there is. Nothing was read then.
        ModuleNotFoundError: A library that reads the files is not installed.
    """
    try:
        return _read(Path(path), dtype)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"load_pretrained needs {error.name!r}, which is not installed: install jaxattn[pretrained]",
            name=error.name,
        ) from error


def _read(path: Path, dtype: Any) -> Pretrained:
    if path.is_file():
        weights = GgufFile(path)
        words, template = tokenizer.of_metadata(weights.vocabulary), weights.vocabulary.get("chat_template")
        return Pretrained(_filled(weights.config, weights, dtype), words, weights.config, template)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"path is {str(path)!r}, which has no config.json and is no file: need the folder of a published model, or "
            "a GGUF file"
        )
    config = _json(path / "config.json")
    family_of(config)
    files = _weight_files(path)
    said, template = path / "tokenizer_config.json", path / "chat_template.jinja"
    settings = _json(said) if said.is_file() else {}
    words = tokenizer.of_folder(path, config["model_type"], settings)
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(chat, list):  # several by name
        chat = {each["name"]: each["template"] for each in chat}.get("default")
    return Pretrained(_filled(config, _Files(files), dtype), words, config, chat)


def _json(file: Path) -> dict[str, Any]:
    """Returns what a JSON file says."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"file {str(file)!r} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"file {str(file)!r} holds {type(said).__name__}: need an object of names and values")
    return said


def _weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder: those of its index, or the only one, or all."""
    index, one = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = sorted({folder / Path(name).name for name in _json(index).get("weight_map", {}).values()})
    else:
        files = [one] if one.is_file() else sorted(folder.glob("*.safetensors"))
        of = {int(found[1]) for file in files if (found := re.search(r"-of-(\d+)\.safetensors$", file.name))}
        if len(of) == 1 and len(files) != max(of):
            raise ValueError(
                f"folder {str(folder)!r} has {len(files)} of {max(of)} safetensors files: need all of them"
            )
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"folder {str(folder)!r} lacks {missing}, which {index.name} names: need all of them")
    if not files:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        hint = (
            f": {pickles[0]} may run code when it is read; convert it where torch is installed, by safetensors.torch."
            f"save_file(torch.load({pickles[0]!r}, weights_only=True), 'model.safetensors')"
            if pickles
            else ""
        )
        raise ValueError(f"folder {str(folder)!r} has no safetensors files{hint}")
    return files


def _filled(config: Mapping[str, Any], weights: Mapping[str, np.ndarray], dtype: Any) -> Any:
    """Returns the model of a published config with published weights."""
    family = family_of(config)
    model = build(config, dtype)
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    room = available_memory()
    if room is not None and needed > room:
        raise MemoryError(
            f"the parameters of the model need {needed / 2**30:.2f} GiB, but {room / 2**30:.2f} GiB of memory are "
            "available: need a smaller model or more memory"
        )
    assign(model, _Renamed(weights, _full_names(weights, family)), family.table(config), family.ignored)
    return model


def available_memory() -> int | None:
    """Returns the bytes that JAX's default device has left for arrays, or None where the system does not say."""
    stats = jax.devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family of a published config.

    Raises:
        ValueError: Its `model_type` is not known.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config has model_type={kind!r}: need one of {sorted(FAMILIES)}")
    return FAMILIES[kind]


def build(config: Mapping[str, Any], dtype: Literal["float32", "bfloat16", "float64"] = "float32") -> Any:
    """Returns the model of a published config in evaluation mode, without numbers: only shapes, for `assign` to fill.

    Args:
        config: The numbers of config.json.
        dtype: Of the computation; parameters are float32, or float64 with "float64".

    Raises:
        ValueError: The `model_type` or an option of the config is not known.
    """
    family = family_of(config)
    said = family.configs(config)

    def make() -> Any:
        rngs = nnx.Rngs(0)
        if isinstance(said, tuple):
            encoder, decoder = (replace(each, dtype=dtype) for each in said)
            return EncoderDecoder(encoder, decoder, share_embedding=family.share_embedding, rngs=rngs)
        return Transformer(replace(said, dtype=dtype), rngs=rngs)

    model = nnx.eval_shape(make)
    if dtype == "float64":
        wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64), nnx.state(model, nnx.Param))
        nnx.update(model, wide)
    model.eval()
    return model


def save_pretrained(loaded: Pretrained, folder: str | Path) -> None:
    """Writes a folder as Hugging Face's: what `load_pretrained` reads, also where it came from a GGUF file.

    Weights that were float32 come back bit for bit.

    Args:
        loaded: A model with its published config, such as `load_pretrained` returns; its parameters may have changed.
        folder: The folder to write; it is made if it does not exist.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = published(loaded.model, family_of(loaded.config).table(loaded.config))
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(loaded.config, indent=2) + "\n", encoding="utf-8")
    if loaded.tokenizer is not None:
        loaded.tokenizer.save(str(folder / "tokenizer.json"))
    if loaded.chat_template is not None:
        (folder / "chat_template.jinja").write_text(loaded.chat_template, encoding="utf-8")


def _full_names(weights: Mapping[str, Any], family: Family) -> dict[str, str]:
    """Returns the name in the table -> the name in the files, which may lack the prefix of the family."""
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in weights)
    return {family.prefix + name if bare else name: name for name in weights}
