"""Forward passes of published transformers in plain NumPy and float64: what a loaded checkpoint has to compute.

Nothing here uses jaxattn. This file has the parts that the families share, and the decoders: GPT-2, Llama 3, Qwen 3,
GPT-NeoX (Pythia) and Gemma 2. `published_more.py` has BERT, ViT, T5 and Whisper.

Array names carry their axes: B batch, T queries, S keys, E features of the stream, N heads, K key heads, D features of
a head. Matrices are stored [out, in], in GPT-2 [in, out].

The sizes in one config are all different, so that no swapped axis goes unseen. Where the config has an epsilon, it is
far larger than the published one, so that a pass with another epsilon is visibly wrong.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import erf, expit, log_softmax

Config = dict[str, Any]
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """A published architecture at a small size.

    Attributes:
        config: The published config.json of the family with small numbers.
        draw: (config, `Draws`) ↦ None: names and draws all weights of the published checkpoint.
        example: (config, generator, length, batch) ↦ the keyword arguments of `forward`.
        forward: (weights, config, **inputs) ↦ the outputs by their published names, such as "logits".
    """

    config: Config
    draw: Callable[[Config, "Draws"], None]
    example: Callable[[Config, np.random.Generator, int, int], dict[str, np.ndarray]]
    forward: Callable[..., dict[str, np.ndarray]]

    def weights(self, seed: int) -> Weights:
        """Random weights under their published names: attention is far from uniform, and no bias or gain is neutral.

        A bias of keys that are not rotated adds the same to all scores of a query, so no output depends on it.
        """
        draws = Draws(np.random.default_rng(seed))
        self.draw(self.config, draws)
        return draws.weights

    def inputs(self, seed: int, length: int, batch: int) -> dict[str, np.ndarray]:
        """Random keyword arguments of `forward`."""
        return self.example(self.config, np.random.default_rng(seed), length, batch)

    def changed(self, **numbers: Any) -> "Family":
        """The family with other values of these keys of the config."""
        return dataclasses.replace(self, config=self.config | numbers)


class Draws:
    """Random weights, collected in `weights` by name."""

    def __init__(self, generator: np.random.Generator):
        self.generator = generator
        self.weights: Weights = {}

    def normal(self, name: str, *shape: int, mean: float = 0.0, scale: float = 1.0) -> None:
        assert name not in self.weights, f"{name} was drawn before"
        self.weights[name] = mean + scale * self.generator.standard_normal(shape)

    def linear(self, name: str, out: int, into: int, scale: float = 1.0, bias: bool = False) -> None:
        """A map [out, in] that turns features of size 1 into features of size `scale`."""
        self.normal(f"{name}.weight", out, into, scale=scale / np.sqrt(into))
        if bias:
            self.normal(f"{name}.bias", out, scale=0.4)

    def norm(self, name: str, size: int, bias: bool = False, mean: float = 1.0) -> None:
        self.normal(f"{name}.weight", size, mean=mean, scale=0.3)
        if bias:
            self.normal(f"{name}.bias", size, scale=0.4)


def gelu(x: np.ndarray) -> np.ndarray:
    """x·Φ(x) with the exact normal distribution function Φ (Hendrycks and Gimpel, 2016)."""
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The approximation x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))) of the same paper."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
}


def linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """x·Wᵀ, plus the bias where the checkpoint has one."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(weights: Weights, name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    """g·(x − mean)/√(variance + ε) + b."""
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return weights[f"{name}.weight"] * scaled + weights[f"{name}.bias"]


def rms_norm(x: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
    """g·x/√(mean of x² + ε)."""
    return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def split(x_BxTxE: np.ndarray, heads: int) -> np.ndarray:
    """[B, T, N·D] ↦ [B, N, T, D]; the features of one head are neighbours."""
    batch, length, features = x_BxTxE.shape
    return x_BxTxE.reshape(batch, length, heads, features // heads).transpose(0, 2, 1, 3)


def merge(x_BxNxTxD: np.ndarray) -> np.ndarray:
    """[B, N, T, D] ↦ [B, T, N·D]."""
    batch, heads, length, features = x_BxNxTxD.shape
    return x_BxNxTxD.transpose(0, 2, 1, 3).reshape(batch, length, heads * features)


def attend(
    query_BxNxTxD: np.ndarray,
    key_BxKxSxD: np.ndarray,
    value_BxKxSxD: np.ndarray,
    visible: np.ndarray | bool,
    scale: float,
    bias: np.ndarray | float = 0.0,
    cap: float | None = None,
) -> np.ndarray:
    """softmax(c·tanh(scale·q·k / c) + bias)·v over the visible keys; without a cap c the tanh is left out.

    Query head n reads key head ⌊n·K/N⌋. `visible` and `bias` broadcast to [B, N, T, S].
    """
    group = query_BxNxTxD.shape[1] // key_BxKxSxD.shape[1]
    key_BxNxSxD, value_BxNxSxD = (np.repeat(x, group, axis=1) for x in (key_BxKxSxD, value_BxKxSxD))
    scores_BxNxTxS = query_BxNxTxD @ key_BxNxSxD.swapaxes(-1, -2) * scale
    if cap is not None:
        scores_BxNxTxS = cap * np.tanh(scores_BxNxTxS / cap)
    scores_BxNxTxS = np.where(visible, scores_BxNxTxS + bias, -np.inf)
    return np.exp(log_softmax(scores_BxNxTxS, axis=-1)) @ value_BxNxSxD


def distances(length: int) -> np.ndarray:
    """[T, T]: how far each key is behind its query; negative for later keys."""
    return np.arange(length)[:, None] - np.arange(length)[None, :]


def frequencies(features: int, base: float) -> np.ndarray:
    """Radians per position of the pairs of rotated features: base^(−2i/features) (Su et al., 2021)."""
    return float(base) ** (-np.arange(0, features, 2) / features)


def llama3_frequencies(plain: np.ndarray, scaling: Config) -> np.ndarray:
    """The frequencies of Llama 3.1: slow ones are divided by the factor, fast ones kept, those between mixed.

    What counts is how often a pair turns in the original context: below low_freq_factor times it is slow, above
    high_freq_factor times it is fast.
    """
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / scaling["factor"]


def rotate(x_BxNxTxD: np.ndarray, radians: np.ndarray) -> np.ndarray:
    """Turns pair i of the first 2·len(radians) features by position·radians[i]; the other features pass unchanged.

    Pair i is feature i with feature i + len(radians).
    """
    pairs = len(radians)
    angle_TxP = np.arange(x_BxNxTxD.shape[2])[:, None] * radians
    cosine, sine = np.cos(angle_TxP), np.sin(angle_TxP)
    first, second, rest = np.split(x_BxNxTxD, [pairs, 2 * pairs], axis=-1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)


def gated(weights: Weights, name: str, x: np.ndarray, activation: str) -> np.ndarray:
    """down(activation(gate(x)) ⊙ up(x)) (Shazeer, 2020)."""
    hidden = ACTIVATIONS[activation](linear(weights, f"{name}.gate_proj", x)) * linear(weights, f"{name}.up_proj", x)
    return linear(weights, f"{name}.down_proj", hidden)


def draw_gated(draws: Draws, name: str, features: int, hidden: int) -> None:
    draws.linear(f"{name}.gate_proj", hidden, features)
    draws.linear(f"{name}.up_proj", hidden, features)
    draws.linear(f"{name}.down_proj", features, hidden)


def draw_grouped(draws: Draws, name: str, config: Config, head_dim: int, scale: float) -> None:
    """Projections of an attention with fewer key heads; queries and keys get features of size `scale`."""
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    draws.linear(f"{name}.q_proj", queries, config["hidden_size"], scale)
    draws.linear(f"{name}.k_proj", keys, config["hidden_size"], scale)
    draws.linear(f"{name}.v_proj", keys, config["hidden_size"])
    draws.linear(f"{name}.o_proj", config["hidden_size"], queries)


def example_ids(config: Config, generator: np.random.Generator, length: int, batch: int) -> dict[str, np.ndarray]:
    return {"input_ids": generator.integers(config["vocab_size"], size=(batch, length))}


def draw_gpt2(config: Config, draws: Draws) -> None:
    width = config["n_embd"]
    hidden = config["n_inner"] or 4 * width

    def stored_in_out(name: str, into: int, out: int, scale: float = 1.0) -> None:
        draws.normal(f"{name}.weight", into, out, scale=scale / np.sqrt(into))
        draws.normal(f"{name}.bias", out, scale=0.4)

    draws.normal("transformer.wte.weight", config["vocab_size"], width, scale=0.5)
    draws.normal("transformer.wpe.weight", config["n_positions"], width, scale=0.5)
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        draws.norm(f"{block}.ln_1", width, bias=True)
        stored_in_out(f"{block}.attn.c_attn", width, 3 * width, scale=1.5)
        stored_in_out(f"{block}.attn.c_proj", width, width)
        draws.norm(f"{block}.ln_2", width, bias=True)
        stored_in_out(f"{block}.mlp.c_fc", width, hidden)
        stored_in_out(f"{block}.mlp.c_proj", hidden, width)
    draws.norm("transformer.ln_f", width, bias=True)


def gpt2(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Radford et al., 2019: norms before, learned positions, one matrix for queries, keys and values, tied head."""
    epsilon, heads = config["layer_norm_epsilon"], config["n_head"]
    activation = ACTIVATIONS[config["activation_function"]]
    length = input_ids.shape[1]
    causal = distances(length) >= 0

    def stored_in_out(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["transformer.wte.weight"][input_ids] + weights["transformer.wpe.weight"][:length]
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        normed = layer_norm(weights, f"{block}.ln_1", x, epsilon)
        query, key, value = np.split(stored_in_out(f"{block}.attn.c_attn", normed), 3, axis=-1)
        scale = (config["n_embd"] // heads) ** -0.5
        seen = attend(split(query, heads), split(key, heads), split(value, heads), causal, scale)
        x = x + stored_in_out(f"{block}.attn.c_proj", merge(seen))
        normed = layer_norm(weights, f"{block}.ln_2", x, epsilon)
        x = x + stored_in_out(f"{block}.mlp.c_proj", activation(stored_in_out(f"{block}.mlp.c_fc", normed)))
    return {"logits": layer_norm(weights, "transformer.ln_f", x, epsilon) @ weights["transformer.wte.weight"].T}


GPT2 = Family(
    {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 0.01,
        "n_ctx": 515,
        "n_embd": 54,
        "n_head": 6,
        "n_inner": None,
        "n_layer": 4,
        "n_positions": 515,
        "vocab_size": 89,
    },
    draw_gpt2,
    example_ids,
    gpt2,
)


def draw_llama(config: Config, draws: Draws) -> None:
    width = config["hidden_size"]
    draws.normal("model.embed_tokens.weight", config["vocab_size"], width, scale=0.5)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        draws.norm(f"{block}.input_layernorm", width)
        draw_grouped(draws, f"{block}.self_attn", config, width // config["num_attention_heads"], scale=1.5)
        draws.norm(f"{block}.post_attention_layernorm", width)
        draw_gated(draws, f"{block}.mlp", width, config["intermediate_size"])
    draws.norm("model.norm", width)
    if not config["tie_word_embeddings"]:
        draws.linear("lm_head", config["vocab_size"], width, scale=2)


def llama(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Dubey et al., 2024: RMS norms before, rotated queries and keys, grouped heads, gated feed-forward, no biases."""
    epsilon, heads, key_heads = config["rms_norm_eps"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    radians = frequencies(head_dim, config["rope_theta"])
    if config["rope_scaling"] is not None:
        radians = llama3_frequencies(radians, config["rope_scaling"])
    causal = distances(input_ids.shape[1]) >= 0
    x = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{block}.input_layernorm.weight"], epsilon)
        query = rotate(split(linear(weights, f"{block}.self_attn.q_proj", normed), heads), radians)
        key = rotate(split(linear(weights, f"{block}.self_attn.k_proj", normed), key_heads), radians)
        value = split(linear(weights, f"{block}.self_attn.v_proj", normed), key_heads)
        seen = attend(query, key, value, causal, head_dim**-0.5)
        x = x + linear(weights, f"{block}.self_attn.o_proj", merge(seen))
        normed = rms_norm(x, weights[f"{block}.post_attention_layernorm.weight"], epsilon)
        x = x + gated(weights, f"{block}.mlp", normed, config["hidden_act"])
    x = rms_norm(x, weights["model.norm.weight"], epsilon)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return {"logits": x @ weights[head].T}


# Turns in the original 80 positions: 12.7 (kept), 3.8 and 1.1 (mixed), 0.33 and fewer (divided by the factor).
LLAMA = Family(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 84,
        "intermediate_size": 100,
        "max_position_embeddings": 530,
        "mlp_bias": False,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 0.01,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 80,
            "rope_type": "llama3",
        },
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "vocab_size": 101,
    },
    draw_llama,
    example_ids,
    llama,
)
LLAMA_TIED = LLAMA.changed(tie_word_embeddings=True, rope_scaling=None)


def draw_qwen3(config: Config, draws: Draws) -> None:
    width, head_dim = config["hidden_size"], config["head_dim"]
    draws.normal("model.embed_tokens.weight", config["vocab_size"], width, scale=0.5)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        draws.norm(f"{block}.input_layernorm", width)
        draw_grouped(draws, f"{block}.self_attn", config, head_dim, scale=1)
        # The norms make queries and keys of size 1, so their gains have to sharpen the attention.
        draws.norm(f"{block}.self_attn.q_norm", head_dim, mean=1.5)
        draws.norm(f"{block}.self_attn.k_norm", head_dim, mean=1.5)
        draws.norm(f"{block}.post_attention_layernorm", width)
        draw_gated(draws, f"{block}.mlp", width, config["intermediate_size"])
    draws.norm("model.norm", width)
    if not config["tie_word_embeddings"]:
        draws.linear("lm_head", config["vocab_size"], width, scale=2)


def qwen3(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Yang et al., 2025: Llama's layers with RMS norms of each head's queries and keys before they are rotated."""
    epsilon, heads, key_heads = config["rms_norm_eps"], config["num_attention_heads"], config["num_key_value_heads"]
    radians = frequencies(config["head_dim"], config["rope_theta"])
    causal = distances(input_ids.shape[1]) >= 0
    x = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{block}.input_layernorm.weight"], epsilon)
        query = split(linear(weights, f"{block}.self_attn.q_proj", normed), heads)
        key = split(linear(weights, f"{block}.self_attn.k_proj", normed), key_heads)
        value = split(linear(weights, f"{block}.self_attn.v_proj", normed), key_heads)
        query = rotate(rms_norm(query, weights[f"{block}.self_attn.q_norm.weight"], epsilon), radians)
        key = rotate(rms_norm(key, weights[f"{block}.self_attn.k_norm.weight"], epsilon), radians)
        seen = attend(query, key, value, causal, config["head_dim"] ** -0.5)
        x = x + linear(weights, f"{block}.self_attn.o_proj", merge(seen))
        normed = rms_norm(x, weights[f"{block}.post_attention_layernorm.weight"], epsilon)
        x = x + gated(weights, f"{block}.mlp", normed, config["hidden_act"])
    x = rms_norm(x, weights["model.norm.weight"], epsilon)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return {"logits": x @ weights[head].T}


QWEN3 = Family(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 60,
        "intermediate_size": 92,
        "max_position_embeddings": 560,
        "max_window_layers": 2,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "rms_norm_eps": 0.01,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 103,
    },
    draw_qwen3,
    example_ids,
    qwen3,
)
QWEN3_TIED = QWEN3.changed(tie_word_embeddings=True)


def draw_neox(config: Config, draws: Draws) -> None:
    width, hidden = config["hidden_size"], config["intermediate_size"]
    draws.normal("gpt_neox.embed_in.weight", config["vocab_size"], width, scale=0.5)
    for layer in range(config["num_hidden_layers"]):
        block = f"gpt_neox.layers.{layer}"
        draws.norm(f"{block}.input_layernorm", width, bias=True)
        draws.norm(f"{block}.post_attention_layernorm", width, bias=True)
        draws.linear(f"{block}.attention.query_key_value", 3 * width, width, scale=1.5, bias=True)
        draws.linear(f"{block}.attention.dense", width, width, bias=True)
        draws.linear(f"{block}.mlp.dense_h_to_4h", hidden, width, bias=True)
        draws.linear(f"{block}.mlp.dense_4h_to_h", width, hidden, bias=True)
    draws.norm("gpt_neox.final_layer_norm", width, bias=True)
    draws.linear("embed_out", config["vocab_size"], width, scale=2)


def neox(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Black et al., 2022: some features of each head rotated, attention and feed-forward side by side or in turn."""
    epsilon, heads, width = config["layer_norm_eps"], config["num_attention_heads"], config["hidden_size"]
    head_dim = width // heads
    radians = frequencies(int(head_dim * config["rotary_pct"]), config["rotary_emb_base"])
    activation = ACTIVATIONS[config["hidden_act"]]
    batch, length = input_ids.shape
    causal = distances(length) >= 0
    x = weights["gpt_neox.embed_in.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"gpt_neox.layers.{layer}"
        normed = layer_norm(weights, f"{block}.input_layernorm", x, epsilon)
        fused = linear(weights, f"{block}.attention.query_key_value", normed)
        # The outputs of the fused matrix are [heads, 3, head_dim]: query, key and value of the first head come first.
        query, key, value = fused.reshape(batch, length, heads, 3, head_dim).transpose(3, 0, 2, 1, 4)
        seen = attend(rotate(query, radians), rotate(key, radians), value, causal, head_dim**-0.5)
        attended = linear(weights, f"{block}.attention.dense", merge(seen))
        into_mlp = x if config["use_parallel_residual"] else x + attended
        normed = layer_norm(weights, f"{block}.post_attention_layernorm", into_mlp, epsilon)
        hidden = activation(linear(weights, f"{block}.mlp.dense_h_to_4h", normed))
        x = x + attended + linear(weights, f"{block}.mlp.dense_4h_to_h", hidden)
    x = layer_norm(weights, "gpt_neox.final_layer_norm", x, epsilon)
    return {"logits": linear(weights, "embed_out", x)}


NEOX = Family(
    {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 80,
        "intermediate_size": 108,
        "layer_norm_eps": 0.01,
        "max_position_embeddings": 570,
        "num_attention_heads": 5,
        "num_hidden_layers": 3,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 107,
    },
    draw_neox,
    example_ids,
    neox,
)
NEOX_SEQUENTIAL = NEOX.changed(use_parallel_residual=False)


def draw_gemma2(config: Config, draws: Draws) -> None:
    width = config["hidden_size"]
    # The final cap shows only if the logits, which these vectors make, reach its size.
    draws.normal("model.embed_tokens.weight", config["vocab_size"], width, scale=1.5)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        # The cap of the scores shows only if scores come near it, so queries and keys are larger than elsewhere.
        draw_grouped(draws, f"{block}.self_attn", config, config["head_dim"], scale=3)
        draw_gated(draws, f"{block}.mlp", width, config["intermediate_size"])
        draws.norm(f"{block}.input_layernorm", width, mean=0)
        draws.norm(f"{block}.post_attention_layernorm", width, mean=0)
        draws.norm(f"{block}.pre_feedforward_layernorm", width, mean=0)
        draws.norm(f"{block}.post_feedforward_layernorm", width, mean=0)
    draws.norm("model.norm", width, mean=0)


def gemma2(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Gemma team, 2024: norms before and after, capped scores and logits, every other layer sees a window only.

    A norm with weight w multiplies by 1 + w. A query in a window layer sees itself and the sliding_window − 1 keys
    before.
    """
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    scale = config["query_pre_attn_scalar"] ** -0.5
    radians = frequencies(config["head_dim"], config["rope_theta"])
    distance = distances(input_ids.shape[1])
    causal = distance >= 0

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, 1 + weights[f"{name}.weight"], config["rms_norm_eps"])

    x = weights["model.embed_tokens.weight"][input_ids] * config["hidden_size"] ** 0.5
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        visible = causal & (distance < config["sliding_window"]) if layer % 2 == 0 else causal
        normed = norm(f"{block}.input_layernorm", x)
        query = rotate(split(linear(weights, f"{block}.self_attn.q_proj", normed), heads), radians)
        key = rotate(split(linear(weights, f"{block}.self_attn.k_proj", normed), key_heads), radians)
        value = split(linear(weights, f"{block}.self_attn.v_proj", normed), key_heads)
        seen = attend(query, key, value, visible, scale, cap=config["attn_logit_softcapping"])
        attended = linear(weights, f"{block}.self_attn.o_proj", merge(seen))
        x = x + norm(f"{block}.post_attention_layernorm", attended)
        normed = norm(f"{block}.pre_feedforward_layernorm", x)
        fed = gated(weights, f"{block}.mlp", normed, config["hidden_activation"])
        x = x + norm(f"{block}.post_feedforward_layernorm", fed)
    logits = norm("model.norm", x) @ weights["model.embed_tokens.weight"].T
    cap = config["final_logit_softcapping"]
    return {"logits": cap * np.tanh(logits / cap)}


GEMMA2 = Family(
    {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 10,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "intermediate_size": 68,
        "max_position_embeddings": 541,
        "num_attention_heads": 8,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 24,
        "rms_norm_eps": 0.01,
        "rope_theta": 10000.0,
        "sliding_window": 7,
        "vocab_size": 109,
    },
    draw_gemma2,
    example_ids,
    gemma2,
)
