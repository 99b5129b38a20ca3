"""GGUF files: numbers, names, layouts and blocks come out as the published folder has them."""

import itertools
import subprocess
import sys

import gguf
import numpy as np
import pytest
from published import GEMMA2, LLAMA, LLAMA_TIED, QWEN3
from published_decoders import GEMMA3, QWEN2
from safetensors.numpy import load_file
from test_pretrained import MEASURE
from tokenizers import pre_tokenizers

from jaxattn.models import load_pretrained, save_pretrained
from jaxattn.models.pretrained import decoders as published_decoders

# Of Llama 3.1: a file has only what it divides frequencies by. Of 7 pairs some are kept, one is mixed, one divided.
PUBLISHED_SCALING = LLAMA.config["rope_scaling"] | {"original_max_position_embeddings": 8192}
LLAMA3 = LLAMA.changed(rope_scaling=PUBLISHED_SCALING)
# Files of Gemma do not have what scores are divided by: the channels of a head, but in one size.
FAMILIES = {
    "llama": LLAMA_TIED,
    "llama 3": LLAMA3,
    "qwen2": QWEN2.changed(use_sliding_window=False),
    "qwen3": QWEN3,
    "gemma2": GEMMA2.changed(query_pre_attn_scalar=GEMMA2.config["head_dim"]),
    "gemma3": GEMMA3.changed(
        num_hidden_layers=7,
        query_pre_attn_scalar=GEMMA3.config["head_dim"],
        rope_local_base_freq=10000.0,
        sliding_window_pattern=6,
    ),
}
CONFIGS = {
    "llama": published_decoders.llama,
    "qwen2": published_decoders.qwen2,
    "qwen3": published_decoders.qwen3,
    "gemma2": published_decoders.gemma2,
    "gemma3_text": published_decoders.gemma3_text,
}
NAMES = {  # written out, not read from the library
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
NORMS = {
    False: {"post_attention_layernorm": "ffn_norm"},
    True: {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


def side_by_side(rows, heads):
    """Rows of the halves of each head, pair by pair."""
    size = len(rows) // heads
    order = [
        head * size + half * (size // 2) + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return rows[order]


def gguf_names(weights, config):
    """The arrays of a family as a GGUF file has them, by their names there."""
    kind, arrays = config["model_type"], {}
    names = NAMES | NORMS["gemma" in kind]
    for name, array in weights.items():
        body, kind_of_array = name.rsplit(".", 1)
        layer = ""
        if body.startswith("model.layers."):
            _, _, number, body = body.split(".", 3)
            layer = f"blk.{number}."
        array = array.astype(np.float32)
        if kind == "llama" and body.endswith(("q_proj", "k_proj")):
            array = side_by_side(array, config["num_attention_heads" if "q_" in body else "num_key_value_heads"])
        if "gemma" in kind and body.endswith("norm"):
            array = array + np.float32(1)
        arrays[f"{layer}{names[body]}.{kind_of_array}"] = array
    return arrays


def write(path, family, stored=gguf.GGMLQuantizationType.F32, tokens=None, **more):
    """The family's random weights as a GGUF file, maps in blocks of a kind; returns them by their names there."""
    config = family.config
    kind, heads = config["model_type"].removesuffix("_text"), config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, kind)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    if f"{kind}__attention__head_count_kv" not in more:
        writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if "gemma" in kind:
        writer.add_sliding_window(config["sliding_window"])
    for name, value in more.items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(name.replace("__", "."), value)
    arrays = gguf_names(family.weights(0), config)
    if kind == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    elif config.get("rope_scaling"):
        base, scaling = config["rope_theta"], config["rope_scaling"]
        divisors = []
        for frequency in base ** (-np.arange(0, head_dim, 2) / head_dim):
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
            share = min(max((turns - 1) / 3, 0), 1)
            divisors.append(1 / ((1 - share) / scaling["factor"] + share))
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    if tokens is not None:
        tokens(writer)
    for name, array in arrays.items():
        if array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_the_published_folder(name, tmp_path):
    """All arrays and numbers, through a folder that is written from the file."""
    family = FAMILIES[name]
    write(tmp_path / "model.gguf", family)
    loaded = load_pretrained(tmp_path / "model.gguf")
    config = CONFIGS[family.config["model_type"]]
    assert config(loaded.config) == config(family.config)
    save_pretrained(loaded, tmp_path / "again")
    again, weights = load_file(tmp_path / "again" / "model.safetensors"), family.weights(0)
    assert again.keys() == weights.keys()
    for each, x in weights.items():
        # Gains of Gemma are stored with 1 added, and so rounded.
        within = 2.0**-23 * (1 + abs(x)) if "gemma" in name and each.endswith("norm.weight") else 0.0
        assert np.all(abs(again[each] - x.astype(np.float32)) <= within), each


def test_windows_of_gemma_3_are_read_in_both_forms(tmp_path):
    """By their period, and for each layer."""
    period, each = "gemma3__attention__sliding_window_pattern", [True, False, True, True, False, True, True]
    kinds = [("full_attention", "sliding_attention")[near] for near in each]
    for value, expected in ((3, {"sliding_window_pattern": 3}), (each, {"layer_types": kinds})):
        write(tmp_path / "model.gguf", FAMILIES["gemma3"], **{period: value})
        loaded = load_pretrained(tmp_path / "model.gguf")
        family = FAMILIES["gemma3"].changed(**expected)
        assert loaded.model.config == published_decoders.gemma3_text(family.config)


def test_blocks_are_their_numbers_times_a_scale(tmp_path):
    """Q8_0 is d·q and Q4_1 is d·q + m, over 32 channels; and half precision."""
    family = LLAMA_TIED.changed(hidden_size=96, intermediate_size=128)
    kinds = gguf.GGMLQuantizationType

    def q8(raw):
        rows = raw.reshape(len(raw), -1, 34)
        return rows[..., :2].copy().view(np.float16).astype(np.float32) * rows[..., 2:].view(np.int8)

    def q4(raw):
        rows = raw.reshape(len(raw), -1, 20)
        scale, least = (rows[..., i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
        return scale * np.concatenate([rows[..., 4:] & 15, rows[..., 4:] >> 4], -1) + least

    for kind, read in ((kinds.Q8_0, q8), (kinds.Q4_1, q4), (kinds.F16, lambda raw: raw.astype(np.float32))):
        arrays = write(tmp_path / "model.gguf", family, kind)
        loaded = load_pretrained(tmp_path / "model.gguf")
        block = loaded.model.runs[0].branches[1].module
        for layer in range(family.config["num_hidden_layers"]):
            stored = arrays[f"blk.{layer}.ffn_down.weight"]
            expected = read(gguf.quantize(stored, kind)).reshape(stored.shape)
            np.testing.assert_array_equal(block.down.kernel[layer].T, expected)
            assert abs(expected - stored).max() > 0


def vocabulary(kind, model="gpt2", **more):
    """A function that writes a vocabulary of bytes, with a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e", "Ġ c", "Ġc a", "Ġca t", "1 2"]
    tokens = [*letters, *("".join(merge.split(" ")) for merge in merges), "<|end|>"]

    def add(writer):
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(kind)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - 1) + [3])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(len(tokens) - 1)
        for name, value in more.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")

    return add, tokens


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("gpt-2", ["12", "1"]), ("smollm", ["1", "2", "1"]), ("llama-bpe", ["12", "1"]), ("qwen2", ["1", "2", "1"])],
)
def test_the_tokenizer_cuts_as_the_kind_says(kind, numbers, tmp_path):
    add, tokens = vocabulary(kind, add_bos_token=False)
    write(tmp_path / "model.gguf", LLAMA_TIED, tokens=add)
    loaded = load_pretrained(tmp_path / "model.gguf")
    found = loaded.tokenizer.encode("the cat<|end|>121\n é")
    letters = ["Ċ", "Ġ", "Ã", "©"]
    assert found.tokens == ["the", "Ġcat", "<|end|>", *numbers, *letters]
    assert found.ids == [tokens.index(each) for each in found.tokens]
    assert loaded.tokenizer.decode(found.ids, skip_special_tokens=False) == "the cat<|end|>121\n é"
    assert loaded.chat_template == "{{ messages[0]['content'] }}<|end|>"
    save_pretrained(loaded, tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    assert again.chat_template == loaded.chat_template
    assert again.config["bos_token_id"] == len(tokens) - 1


def joined(text, scores):
    """Joins the two neighbours with the best score, the first of them, until there are none."""
    parts = list(text)
    while True:
        found = [(-scores[a + b], place) for place, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not found:
            return parts
        place = min(found)[1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_with_scores_are_joined_from_the_best(prefix, tmp_path):
    draw = np.random.default_rng(0)
    pieces = sorted({"".join(draw.choice(list("abc▁"), size)) for size in (2, 2, 2, 3, 3, 4) for _ in range(12)})
    scores = {piece: -float(number) for number, piece in enumerate(draw.permutation(pieces))}
    scores |= dict.fromkeys("abc▁", -1000.0)
    special, whole = ["<unk>", "<s>"], ["ccc"]
    codes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *codes, *whole, *(piece for piece in scores if piece not in whole)]
    kinds = [2, 3, *[6] * 256, 4, *[1] * (len(tokens) - 259)]

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
        writer.add_token_types(kinds)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        if not prefix:
            writer.add_add_space_prefix(False)

    write(tmp_path / "model.gguf", LLAMA_TIED.changed(vocab_size=len(tokens)), tokens=add)
    loaded = load_pretrained(tmp_path / "model.gguf")
    for _ in range(200):
        text = "".join(draw.choice(list("aabbc "), 12))
        if "ccc" not in text:
            found = loaded.tokenizer.encode(text, add_special_tokens=False).tokens
            assert found == joined(("▁" if prefix else "") + text.replace(" ", "▁"), scores)
            assert loaded.decode(loaded.encode(text)) == text
    found = loaded.token_strings(loaded.encode("é"))
    assert found == ["<s>", *["␣"] * prefix, "<0xC3>", "<0xA9>"]
    assert "ccc" in loaded.token_strings(loaded.encode("acccb"))


def test_texts_begin_with_a_token_where_the_file_says_so(tmp_path):
    for kind, more, begins in (("gpt-2", {"add_bos_token": True}, True), ("llama-bpe", {}, True), ("qwen2", {}, False)):
        add, _ = vocabulary(kind, **more)
        write(tmp_path / "model.gguf", LLAMA_TIED, tokens=add)
        found = load_pretrained(tmp_path / "model.gguf").tokenizer.encode("the")
        assert found.tokens == ["<|end|>", "the"] if begins else ["the"]


def test_what_a_file_has_and_no_model_is_refused(tmp_path):
    path = tmp_path / "model.gguf"

    def refused(match, family=LLAMA_TIED, tokens=None, **more):
        write(path, family, tokens=tokens, **more)
        with pytest.raises(ValueError, match=match):
            load_pretrained(path)

    refused(r"model\.gguf' has llama\.\['expert_count', 'expert_used_count'\], which no model here has",
            llama__expert_count=4, llama__expert_used_count=2)  # fmt: skip
    refused(
        "config has rope_type='unheard' for its rotary",
        llama__rope__scaling__type="unheard",
        llama__rope__scaling__factor=2,
    )
    refused(r"has attention\.head_count_kv=\[2, 2, 1\]: need one number", llama__attention__head_count_kv=[2, 2, 1])
    refused(r"config has sliding_window=4: need None", llama__attention__sliding_window=4)
    refused(r"divides the frequencies of its rotation by \[1\.0", LLAMA)
    refused(r"tokenizer\.ggml\.pre='poro-chat': need one of \['command-r', 'gpt-2'", tokens=vocabulary("poro-chat")[0])
    refused(r"tokenizer\.ggml\.model='rwkv': need 'gpt2' or", tokens=vocabulary("gpt-2", model="rwkv")[0])
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.gguf' is no complete GGUF file"):
        load_pretrained(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"model\.gguf' is no complete GGUF file"):
        load_pretrained(path)
    writer = gguf.GGUFWriter(path, "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture='rwkv6': need one of \['gemma2', 'gemma3', 'llama'"):
        load_pretrained(path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as Linux says it")
def test_loading_takes_little_more_memory_than_the_parameters(tmp_path):
    """At most 1.3 times as much as they have in 32 bits, which the file has in 4."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 20, "vocab_size": 60_000}
    files = [tmp_path / name for name in ("small.gguf", "large.gguf")]
    write(files[0], LLAMA_TIED)
    arrays = write(files[1], LLAMA_TIED.changed(**sizes), gguf.GGMLQuantizationType.Q4_1)
    size = sum(array.nbytes for array in arrays.values())
    assert size > 200e6
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, files)], capture_output=True, text=True, check=True)
    assert size < int(done.stdout) < 1.3 * size
