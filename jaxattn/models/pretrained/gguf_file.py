"""Published models in one GGUF file: its metadata as config.json says it, its arrays under their published names.

A GGUF file has the weights of a model, often in blocks of 4 to 8 bits with a common scale, beside its numbers and its
vocabulary. Blocks are turned into float32 one array at a time.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxattn.core.attend.position import Llama3, rotary_frequencies

Numbers = dict[str, Any]

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""What stands behind `blk.*.` -> what stands behind `model.layers.*.`."""

NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""The same, where norms stand before and after each block (Gemma 2 and 3)."""

FREQUENCIES = "rope_freqs.weight"
"""The array that divides the frequencies of the rotation."""


def _llama(numbers: Numbers, config: Numbers) -> Numbers:
    window = numbers.pop("attention.sliding_window", None)
    return {"hidden_act": "silu", "sliding_window": window, "attention_bias": False, "mlp_bias": False}


def _qwen(numbers: Numbers, config: Numbers) -> Numbers:
    return {"hidden_act": "silu"}


def _gemma(numbers: Numbers, config: Numbers, of_width: int) -> Numbers:
    # No number of the file says what scores are divided by: the channels of a head, but in one size width / heads.
    width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "sliding_window": _taken(numbers, "attention.sliding_window"),
        "query_pre_attn_scalar": width if config["num_hidden_layers"] == of_width else config["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma2(numbers: Numbers, config: Numbers) -> Numbers:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return _gemma(numbers, config, of_width=46) | {name: _short(_taken(numbers, name)) for name in caps}


def _gemma3(numbers: Numbers, config: Numbers) -> Numbers:
    pattern = numbers.pop("attention.sliding_window_pattern", 6)  # of how many layers the last has no window
    if isinstance(pattern, list):  # or for each layer whether it has one
        kinds = [("full_attention", "sliding_attention")[bool(near)] for near in pattern]
        said: Numbers = {"layer_types": kinds}
    else:
        said = {"sliding_window_pattern": pattern}
    said |= {"model_type": "gemma3_text", "rope_local_base_freq": _short(numbers.pop("rope.freq_base_swa", 10000.0))}
    caps = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"))
    return _gemma(numbers, config, of_width=62) | caps | said


@dataclass(frozen=True)
class Architecture:
    """What a GGUF file of an architecture says beside, and stores otherwise than, the published folder.

    Attributes:
        more: (numbers of the file, config so far) -> more of the config; takes what it used out of the numbers.
        names: `BLOCK`, or it with other names.
        interleaved: Whether rows of queries and keys have the two channels of a rotated pair side by side.
        raised: Whether gains of norms have 1 added to them.
    """

    more: Callable[[Numbers, Numbers], Numbers]
    names: Mapping[str, str]
    interleaved: bool = False
    raised: bool = False


ARCHITECTURES = {
    "llama": Architecture(_llama, BLOCK, interleaved=True),
    "qwen2": Architecture(_qwen, BLOCK),
    "qwen3": Architecture(_qwen, BLOCK),
    "gemma2": Architecture(_gemma2, BLOCK | NORMS_AROUND, raised=True),
    "gemma3": Architecture(_gemma3, BLOCK | NORMS_AROUND, raised=True),
}
"""`general.architecture`, which is the `model_type` of config.json if that is not said -> how its files are read."""


@dataclass(frozen=True)
class _Stored:
    """Where an array is in a file, as bytes of blocks or as numbers."""

    name: str
    kind: Any
    offset: int
    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, tensor: Any) -> "_Stored":
        return cls(tensor.name, tensor.tensor_type, tensor.data_offset, tensor.data.shape, tensor.data.dtype)


class GgufFile(Mapping[str, np.ndarray]):
    """The arrays of a GGUF file under their published names, in float32, read when they are asked for.

    Args:
        path: The file.

    Attributes:
        config: The numbers of config.json.
        vocabulary: The metadata of the tokenizer, by the names behind `tokenizer.`.

    Raises:
        ValueError: The file is no complete GGUF file, its architecture is not known, or it has numbers or arrays that
            are not understood.
    """

    def __init__(self, path: Path):
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"file {str(path)!r} is no complete GGUF file: {error}") from error
        name = fields.get("general.architecture")
        if name not in ARCHITECTURES:
            raise ValueError(
                f"file {str(path)!r} has general.architecture={name!r}: need one of {sorted(ARCHITECTURES)}"
            )
        self.path, self.architecture = path, ARCHITECTURES[name]
        self.arrays = {self._published(each.name): _Stored.of(each) for each in reader.tensors}
        numbers = {key.removeprefix(f"{name}."): field for key, field in fields.items() if key.startswith(f"{name}.")}
        self.vocabulary = {
            key.removeprefix("tokenizer."): field for key, field in fields.items() if key.startswith("tokenizer.")
        }
        self.config = {"model_type": name} | self._config(numbers)
        if numbers:
            raise ValueError(f"file {str(path)!r} has {name}.{sorted(numbers)}, which no model here has")

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf import dequantize

        stored = self.arrays[name]
        # Not from the mapped file of the reader, whose pages would stay in memory beside the result.
        raw = np.fromfile(self.path, stored.dtype, math.prod(stored.shape), offset=stored.offset).reshape(stored.shape)
        try:
            array = dequantize(raw, stored.kind)
        except NotImplementedError as error:
            raise ValueError(f"{stored.name} is stored as {stored.kind.name}, which is not known") from error
        if self.architecture.interleaved and (kind := re.search(r"\.([qk])_proj\.", name)):
            heads = self.config["num_attention_heads" if kind[1] == "q" else "num_key_value_heads"]
            array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array - 1 if self.architecture.raised and name.endswith("norm.weight") else array

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def _published(self, name: str) -> str:
        """Returns the published name of an array; one that is not known stays."""
        outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if found is None:
            return name
        layer, module, kind = found.groups()
        names = outside if layer is None else self.architecture.names
        prefix = "" if layer is None else f"model.layers.{layer}."
        return f"{prefix}{names[module]}.{kind}" if module in names else name

    def _config(self, numbers: Numbers) -> Numbers:
        """Returns the numbers of config.json, and takes those that it used out of the numbers of the file."""
        numbers.pop("vocab_size", None)  # the rows of the table say it
        width, heads = _taken(numbers, "embedding_length"), _taken(numbers, "attention.head_count")
        head_dim = _taken(numbers, "attention.key_length", width // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            if (size := numbers.pop(name, head_dim)) != head_dim:
                raise ValueError(f"the file has {name}={size} where queries have {head_dim} channels: need the same")
        table = self.arrays.get("model.embed_tokens.weight")
        if table is None:
            raise ValueError("the file has no array token_embd.weight: need the table of tokens")
        config = {
            "vocab_size": table.shape[0],
            "hidden_size": width,
            "intermediate_size": _taken(numbers, "feed_forward_length"),
            "num_hidden_layers": _taken(numbers, "block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": _taken(numbers, "attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": _taken(numbers, "context_length"),
            "rms_norm_eps": _short(_taken(numbers, "attention.layer_norm_rms_epsilon")),
            "rope_theta": _short(_taken(numbers, "rope.freq_base", 10000.0)),
            "rope_scaling": self._scaling(numbers),
            "tie_word_embeddings": "lm_head.weight" not in self.arrays,
        }
        if FREQUENCIES in self.arrays:
            config["rope_scaling"] = _llama3(self[FREQUENCIES], config)
            del self.arrays[FREQUENCIES]
        for name in ("bos", "eos"):
            if (token := self.vocabulary.get(f"ggml.{name}_token_id")) is not None:
                config[f"{name}_token_id"] = token
        return config | self.architecture.more(numbers, config)

    def _scaling(self, numbers: Numbers) -> Numbers | None:
        """Returns the scaling of rotary positions as config.json says it."""
        numbers.pop("rope.scaling.finetuned", None)
        kind = numbers.pop("rope.scaling.type", "none")
        if kind == "none":
            return None
        said = {"rope_type": kind, "factor": _short(_taken(numbers, "rope.scaling.factor"))}
        length = numbers.pop("rope.scaling.original_context_length", None)
        return said if length is None else said | {"original_max_position_embeddings": length}


def _taken(numbers: Numbers, name: str, default: Any = None) -> Any:
    """Takes a number out of those of the file; without a default it must be there."""
    if name not in numbers:
        if default is not None:
            return default
        raise ValueError(f"the file has no {name}: need it for the config")
    number = numbers.pop(name)
    if isinstance(number, list):
        raise ValueError(f"the file has {name}={number}: need one number for all layers")
    return number


def _short(number: float) -> float:
    """Returns the shortest decimal number that is this one in float32, in which the file has it."""
    return float(str(np.float32(number)))


def _llama3(divisors: np.ndarray, config: Numbers) -> Numbers:
    """Returns the scaling of Llama 3.1 from what it divides the frequencies by.

    The file has the divisors only. They must be those of Llama 3.1, with the length of training and the two borders of
    its publication.
    """
    said: Numbers = {
        "rope_type": "llama3",
        "factor": _short(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base, channels = config["rope_theta"], config["head_dim"]
    scaled = Llama3(said["factor"], said["original_max_position_embeddings"])(base, channels, jnp.float32)
    expected = np.asarray(rotary_frequencies(base, channels, jnp.float32) / scaled)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5):
        raise ValueError(
            f"the file divides the frequencies of its rotation by {divisors.tolist()}: need those of Llama 3.1, with "
            "low_freq_factor=1, high_freq_factor=4 and original_max_position_embeddings=8192"
        )
    return said
