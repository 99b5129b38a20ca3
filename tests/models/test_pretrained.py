"""Folders of published models: what is written is read, bit for bit, and what is not understood is refused."""

import json
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from published import GEMMA2, GPT2, LLAMA, LLAMA_TIED, NEOX, QWEN3
from published_decoders import GEMMA, GEMMA3, GPT_OSS, MAMBA2, MISTRAL, OLMO2, QWEN2, RWKV7
from published_more import ALBERT, BERT, DINOV2, ROBERTA, T5, VIT, WHISPER
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxattn.models import generate, load_pretrained, save_pretrained
from jaxattn.models.pretrained import folder as folder_module

DECODERS = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA, GEMMA2, GEMMA3, NEOX, MAMBA2, RWKV7)
PUBLISHED = (*DECODERS, BERT, ROBERTA, ALBERT, VIT, DINOV2, T5, WHISPER)
FAMILIES = {family.config["model_type"]: family for family in PUBLISHED}


def written(folder, family, *, dtype=np.float32, prefix="", files=1, **config):
    """The family's random weights as a folder."""
    weights = {name.removeprefix(prefix): x.astype(dtype) for name, x in family.weights(0).items()}
    names = sorted(weights)
    for i in range(files):
        part = {name: np.ascontiguousarray(weights[name]) for name in names[i::files]}
        save_file(part, folder / f"model-{i + 1:05}-of-{files:05}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.config | config))
    return weights


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_that_was_read_is_written_back(name, tmp_path):
    weights = written(tmp_path, FAMILIES[name], files=2)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == FAMILIES[name].config
    save_pretrained(loaded, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys()
    for each, x in weights.items():
        np.testing.assert_array_equal(again[each], x)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == loaded.config


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_weights_are_read_as_they_are(dtype, tmp_path):
    weights = written(tmp_path, GPT2, dtype=dtype)
    table = load_pretrained(tmp_path).model.embed.table[...]
    assert table.dtype == jnp.float32
    np.testing.assert_array_equal(table, weights["transformer.wte.weight"].astype(np.float32))


def test_names_without_their_prefix_and_buffers_are_read(tmp_path):
    """As in the file of GPT-2 itself."""
    written(tmp_path, GPT2, prefix="transformer.")
    file = tmp_path / "model-00001-of-00001.safetensors"
    save_file(load_file(file) | {"h.0.attn.bias": np.ones((1, 1, 3, 3), np.float32)}, file)
    loaded = load_pretrained(tmp_path)
    drawn = generate(loaded.model, np.array([[1, 2, 3]]), max_new_tokens=3, temperature=0.0)
    ids = np.array([[1, 2, 3]])
    for _ in range(3):
        logits = GPT2.forward(GPT2.weights(0), GPT2.config, input_ids=ids)["logits"]
        ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], 1)
    np.testing.assert_array_equal(drawn.tokens, ids[:, 3:])


def test_a_tokenizer_goes_with_its_model(tmp_path):
    words = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    written(tmp_path, GPT2)
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = load_pretrained(tmp_path)
    assert loaded.tokenizer.encode("the cat sat").ids == [0, 1, 2]
    save_pretrained(loaded, tmp_path / "again")
    assert load_pretrained(tmp_path / "again").tokenizer.encode("cat").ids == [1]


def test_what_is_not_understood_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"which has no config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(ValueError, match="model_type='bloom': need one of"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS.config))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model_type='gpt_oss', whose blocks are mixtures of experts"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps(GPT2.config))
    with pytest.raises(ValueError, match=r"has no safetensors files$"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin may run code when it is read; convert it where torch is"):
        load_pretrained(tmp_path)
    written(tmp_path, GPT2, scale_attn_weights=False)
    with pytest.raises(ValueError, match="config has scale_attn_weights=False: need True"):
        load_pretrained(tmp_path)
    written(tmp_path, GPT2, n_layer=5)
    with pytest.raises(ValueError, match=r"parameters without weights \['layers\.4\.branches\.0\.module\.key\.bias'"):
        load_pretrained(tmp_path)
    written(tmp_path, GPT2, n_layer=3)
    with pytest.raises(ValueError, match=r"unused names \['transformer\.h\.3\.attn\.c_attn\.bias'"):
        load_pretrained(tmp_path)
    written(tmp_path, GPT2, n_positions=9)
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight makes \(515, 54\) of positions\.table, which is"):
        load_pretrained(tmp_path)


def test_a_broken_folder_says_what_is_broken(tmp_path):
    written(tmp_path, GPT2, files=3)
    first, second, third = sorted(tmp_path.glob("*.safetensors"))
    names = {name: file.name for file in (first, second, third) for name in load_file(file)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    save_file({"transformer.wte.weight": np.zeros((1, 1), np.float32)}, tmp_path / "other.safetensors")
    load_pretrained(tmp_path)  # the index does not name the other file
    content = second.read_bytes()
    second.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors' is no complete safetensors file"):
        load_pretrained(tmp_path)
    second.unlink()
    with pytest.raises(
        ValueError, match=r"lacks \['model-00002-of-00003\.safetensors'\], which model\.safetensors\.index"
    ):
        load_pretrained(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json' is no JSON: "):
        load_pretrained(tmp_path)
    index.unlink()
    (tmp_path / "other.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has 2 of 3 safetensors files: need all of them"):
        load_pretrained(tmp_path)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ValueError, match=r"both have \['transformer\.h\.0\.attn\.c_proj\.bias'"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json' holds list: need an object of names and values"):
        load_pretrained(tmp_path)


def test_a_model_without_room_says_how_much_it_needs(tmp_path, monkeypatch):
    weights = written(tmp_path, GPT2)
    needed = 4 * sum(x.size for x in weights.values())
    for dtype, factor in (("float32", 1), ("bfloat16", 1)):
        monkeypatch.setattr(folder_module, "available_memory", lambda factor=factor: factor * needed)
        load_pretrained(tmp_path, dtype=dtype)
        monkeypatch.setattr(folder_module, "available_memory", lambda factor=factor: factor * needed - 1)
        with pytest.raises(MemoryError, match=r"need 0\.00 GiB, but 0\.00 GiB of memory are available"):
            load_pretrained(tmp_path, dtype=dtype)
    monkeypatch.undo()
    assert 2**20 < folder_module.available_memory() < 2**60


def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch):
    written(tmp_path, GPT2)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"load_pretrained needs 'safetensors', .*: install jaxattn\[pretrained"
    ):
        load_pretrained(tmp_path)


MEASURE = r"""
import re, sys
from jaxattn.models import load_pretrained
def peak():
    return int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1]) * 1024
small, large = sys.argv[1:]
load_pretrained(small)
before = peak()
loaded = load_pretrained(large)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as Linux says it")
@pytest.mark.parametrize("vocab_size", [101, 60_000])
def test_loading_takes_little_more_memory_than_the_file_has(vocab_size, tmp_path):
    """At most 1.3 times as much, where layers have most of the parameters, and where one table has most of them."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 20, "vocab_size": vocab_size}
    folders = [tmp_path / name for name in ("small", "large")]
    for each, more in zip(folders, ({}, sizes), strict=True):
        each.mkdir()
        written(each, LLAMA_TIED.changed(**more))
    size = sum(file.stat().st_size for file in folders[1].glob("*.safetensors"))
    assert size > 120e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)], capture_output=True, text=True, check=True
    )
    taken = int(done.stdout)
    assert size < taken < 1.3 * size
