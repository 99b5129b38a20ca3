"""Weights of `jaxattn weights` as folders that `models.load_pretrained` reads: `python -m experiments.weights NAME`.

Some packages have their weights as ONNX, as files of CTranslate2, or as pickles of torch. What is in them is written
once as config.json and model.safetensors beside the file that was fetched. Pickles are read by a reader that knows
tensors and nothing else, so that none of them runs code. Needs the package onnx for ONNX.
"""

import io
import json
import math
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import save_file

from jaxattn.models.pretrained import fetch_weights, weights_folder

Arrays = dict[str, np.ndarray]


def folder_of(name: str) -> Path:
    """Returns what `models.load_pretrained` reads: fetches weights, and writes their folder, where it is not there.

    Args:
        name: As of `models.fetch_weights`.

    Raises:
        ValueError: There is no such name, or a file is not what it was when this was written.
        ConnectionError: The registry cannot be reached.
    """
    given = fetch_weights(name)
    if name not in CONVERTED:
        return given
    made = weights_folder(name) / "converted"
    if made.is_dir():
        return made
    with tempfile.TemporaryDirectory(dir=weights_folder(name)) as work:
        folder = Path(work) / "converted"
        folder.mkdir()
        arrays, config = CONVERTED[name](weights_folder(name))
        arrays = {each: np.ascontiguousarray(array, np.float32) for each, array in arrays.items()}
        save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            if (weights_folder(name) / file).is_file():
                shutil.copy(weights_folder(name) / file, folder)
        if name == "rxnmapper":
            _of_reactions(folder / "vocab.txt").save(str(folder / "tokenizer.json"))
        folder.rename(made)
    return made


def onnx_arrays(path: Path) -> Arrays:
    """Returns the weights in an ONNX file under the names that they had in torch, maps as [out, in].

    An exported map has lost its name; the node that multiplies by it has kept the name of its module. Whole numbers of
    8 bits become (q − zero point) · scale.
    """
    from onnx import load, numpy_helper

    graph = load(path).graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}

    def value(name: str) -> np.ndarray:
        if name in stored:
            return stored[name]
        zero, scale = stored[f"{name}_zero_point"].astype(np.float32), stored[f"{name}_scale"]
        return (stored[f"{name}_quantized"].astype(np.float32) - zero) * scale

    names = {name.removesuffix("_quantized") for name in stored}
    names = {name for name in names if not name.endswith(("_scale", "_zero_point"))}
    arrays = {name: value(name) for name in names if not name.startswith("onnx::")}
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulInteger"):
            module = node.name.rsplit("/", 1)[0].strip("/").replace("/", ".")
            for name in (name.removesuffix("_quantized") for name in node.input):
                if name in names:
                    arrays[f"{module}.weight"] = value(name).T
    return arrays


def torch_arrays(path: Path) -> Arrays:
    """Returns the tensors of a state that torch saved, in its zip format or the one before, as arrays.

    Raises:
        ValueError: The pickle names anything but tensors and dicts, or a tensor reaches beyond its numbers.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            main = next(name for name in packed.namelist() if name.endswith("/data.pkl"))
            reader = _Tensors(io.BytesIO(packed.read(main)))
            state = reader.load()
            for key, numbers in reader.storages.items():
                numbers[:] = np.frombuffer(packed.read(f"{main.removesuffix('data.pkl')}data/{key}"), numbers.dtype)
            return dict(state)
    with open(path, "rb") as file:
        for _ in range(3):  # a magic number, the version of the protocol, and sizes of the machine
            _Tensors(file).load()
        reader = _Tensors(file)
        state = reader.load()
        for key in _Tensors(file).load():
            numbers = reader.storages[key]
            (count,) = struct.unpack("<q", file.read(8))
            numbers[:] = np.frombuffer(file.read(count * numbers.itemsize), numbers.dtype)
        return dict(state)


class _Tensors(pickle.Unpickler):
    """A reader of pickles that can make tensors and dicts. Arrays are filled after it has read all of their shapes."""

    DTYPES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "LongStorage": np.int64}  # noqa: RUF012

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.storages: Arrays = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        raise ValueError(f"the pickle names {module}.{name}: need tensors and dicts only")

    def persistent_load(self, said: Any) -> np.ndarray:
        _, dtype, key, _, count, *_ = said
        return self.storages.setdefault(key, np.zeros(count, dtype))


def _tensor(numbers: np.ndarray, offset: int, shape: tuple, steps: tuple, *_: Any) -> np.ndarray:
    last = offset + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    if min(offset, *shape, *steps, 0) < 0 or (math.prod(shape) and last >= len(numbers)):
        raise ValueError(f"a tensor {shape} with steps {steps} reaches beyond its {len(numbers)} numbers")
    strides = [step * numbers.itemsize for step in steps]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, strides)


def ctranslate2_arrays(path: Path) -> Arrays:
    """Returns the variables of a model of CTranslate2 (binary version 6) by name."""
    dtypes = (np.float32, np.int8, np.int16, np.int32, np.float16)
    with open(path, "rb") as file:

        def number(kind: str) -> int:
            return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        if (version := number("I")) != 6:
            raise ValueError(f"file {str(path)!r} has version {version}: need 6")
        text(), number("I")  # the kind of the model, and its revision
        arrays = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype = np.dtype(dtypes[number("B")])
            arrays[name] = np.frombuffer(file.read(number("I")), dtype).reshape(shape)
        return arrays


def _bert(architecture: str, **more: Any) -> Callable[[Path], tuple[Arrays, dict[str, Any]]]:
    """Makes the conversion of a BERT of 12 layers, 12 heads and width 384, the sizes of all three there are."""

    def convert(folder: Path) -> tuple[Arrays, dict[str, Any]]:
        arrays = onnx_arrays(folder / "model.onnx")
        if architecture == "BertModel" and "pooler.dense.weight" not in arrays:  # the vectors are its output
            arrays |= {"pooler.dense.weight": np.zeros((384, 384)), "pooler.dense.bias": np.zeros(384)}
        sizes: dict[str, Any] = {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        }
        sizes |= {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
        return arrays, {"model_type": "bert", "architectures": [architecture], "hidden_act": "gelu"} | sizes | more

    return convert


def _vit(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """The encoder of images, for those of 224 x 224 pixels: its 37 x 37 positions are resized as the file says."""
    from onnx import helper, load, numpy_helper
    from onnx.reference import ReferenceEvaluator

    arrays = {
        name.removeprefix("backbone."): array
        for name, array in onnx_arrays(folder / "model.onnx").items()
        if name.startswith("backbone.")
    }
    model = load(folder / "model.onnx")
    stored = {each.name: each for each in model.graph.initializer}
    first, table = (numpy_helper.to_array(stored[name]) for name in ("onnx::Concat_1957", "onnx::Reshape_1962"))
    side, width = math.isqrt(table.shape[1]), table.shape[2]
    resize = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"])
    said = next(node for node in model.graph.node if node.name == "/backbone/embeddings/Resize")
    resize.attribute.extend(said.attribute)
    inputs = [helper.make_tensor_value_info("x", 1, None), helper.make_tensor_value_info("sizes", 7, None)]
    graph = helper.make_graph([resize], "resize", inputs, [helper.make_tensor_value_info("y", 1, None)])
    run = ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import))
    square = table.reshape(1, side, side, width).transpose(0, 3, 1, 2)
    (resized,) = map(np.asarray, run.run(None, {"x": square, "sizes": np.array([1, width, 16, 16])}))
    positions = resized.transpose(0, 2, 3, 1).reshape(1, 256, width)
    arrays["embeddings.position_embeddings"] = np.concatenate([first, positions], 1)
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_act": "gelu",
        "hidden_size": 384,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
        "mlp_ratio": 4,
        "num_attention_heads": 6,
        "num_channels": 3,
        "num_hidden_layers": 12,
        "patch_size": 14,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }
    return arrays, config


def _whisper(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    stored = ctranslate2_arrays(folder / "model.bin")
    arrays: Arrays = {}

    def linear(name: str, weight: np.ndarray, bias: np.ndarray) -> None:
        arrays[f"model.{name}.weight"] = weight
        if name.endswith(".k_proj"):
            if bias.any():
                raise ValueError(f"{name} has a bias: need keys without, as Whisper has them")
        else:
            arrays[f"model.{name}.bias"] = bias

    def norm(name: str, of: str) -> None:
        arrays.update({f"model.{name}.weight": stored[f"{of}/gamma"], f"model.{name}.bias": stored[f"{of}/beta"]})

    layers = 6
    for stack in ("encoder", "decoder"):
        norm(f"{stack}.layer_norm", f"{stack}/layer_norm")
        arrays[f"model.{stack}.embed_positions.weight"] = stored[f"{stack}/position_encodings/encodings"]
        kinds = {"self_attention": "self_attn"} | ({"attention": "encoder_attn"} if stack == "decoder" else {})
        for layer in range(layers):
            of, name = f"{stack}/layer_{layer}", f"{stack}.layers.{layer}"
            for theirs, ours in kinds.items():
                norm(f"{name}.{ours}_layer_norm", f"{of}/{theirs}/layer_norm")
                maps = [
                    (stored[f"{of}/{theirs}/linear_{i}/weight"], stored[f"{of}/{theirs}/linear_{i}/bias"])
                    for i in range(2 if theirs == "self_attention" else 3)
                ]
                # Queries, keys and values are one map, or keys and values are where they read another sequence.
                parts = [
                    part for w, b in maps for part in zip(*(np.split(x, len(w) // 512) for x in (w, b)), strict=True)
                ]
                for each, (weight, bias) in zip(("q_proj", "k_proj", "v_proj", "out_proj"), parts, strict=True):
                    linear(f"{name}.{ours}.{each}", weight, bias)
            norm(f"{name}.final_layer_norm", f"{of}/ffn/layer_norm")
            for i in range(2):
                linear(f"{name}.fc{i + 1}", stored[f"{of}/ffn/linear_{i}/weight"], stored[f"{of}/ffn/linear_{i}/bias"])
    for i in (1, 2):
        linear(f"encoder.conv{i}", stored[f"encoder/conv{i}/weight"], stored[f"encoder/conv{i}/bias"])
    arrays["model.decoder.embed_tokens.weight"] = stored["decoder/embeddings/weight"]
    heads = {f"{stack}_attention_heads": int(stored[f"{stack}/num_heads"]) for stack in ("encoder", "decoder")}
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "activation_function": "gelu",
        "alignment_heads": said["alignment_heads"],
        "d_model": 512,
        "decoder_ffn_dim": 2048,
        "decoder_layers": layers,
        "encoder_ffn_dim": 2048,
        "encoder_layers": layers,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "num_mel_bins": 80,
        "scale_embedding": bool(stored["decoder/scale_embeddings"]),
        "vocab_size": len(stored["decoder/embeddings/weight"]),
    }
    return arrays, config | heads


def _pickled(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arrays = torch_arrays(folder / "pytorch_model.bin")
    return {name: array for name, array in arrays.items() if array.dtype == np.float32}, config


# A reaction in SMILES is cut into atoms, in brackets or without, and signs of bonds, branches and rings.
REACTION = r"\[[^\]]+\]|Br|Cl|%\([0-9]{3}\)|%[0-9]{2}|>>|."


def _of_reactions(vocabulary: Path) -> Any:
    """Returns the tokenizer of chemical reactions."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = vocabulary.read_text(encoding="utf-8").split("\n")
    numbers = {word.rstrip("\r"): number for number, word in enumerate(words) if word}
    made = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(REACTION), "isolated")
    made.add_special_tokens([word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word in numbers])
    ends = [(word, numbers[word]) for word in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return made


CONVERTED: Mapping[str, Callable[[Path], tuple[Arrays, dict[str, Any]]]] = {
    "cross-encoder": _bert("BertForSequenceClassification", id2label={"0": "LABEL_0"}),
    "colbert": _bert("BertModel"),
    "bge-small": _bert("BertModel"),
    "whisper-base": _whisper,
    "gut-gpt2": _pickled,
    "vit-focus": _vit,
    "rxnmapper": _pickled,
}
"""The names of weights in other files than safetensors and GGUF -> the function from them to arrays and a config."""


def main(arguments: list[str] | None = None) -> None:
    """Prints the path for each name. Errors of the user's making are one line on stderr and exit status 2."""
    names = sys.argv[1:] if arguments is None else arguments
    try:
        for name in names:
            print(folder_of(name))
    except (ValueError, OSError) as error:
        print(f"experiments.weights: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
