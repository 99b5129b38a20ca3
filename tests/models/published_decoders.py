"""More published decoders in plain NumPy: Mistral, Qwen 2, OLMo 2, Gemma 1 and Gemma 3. See `published.py`."""

from collections.abc import Callable

import numpy as np
from published import (
    Config,
    Draws,
    Family,
    Weights,
    attend,
    distances,
    draw_gated,
    draw_grouped,
    example_ids,
    frequencies,
    gated,
    linear,
    merge,
    rms_norm,
    rotate,
    split,
)


def head_dim_of(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def visible_in(config: Config, length: int, windowed: bool) -> np.ndarray:
    """[T, S]: a query sees itself and earlier keys, in a window layer the sliding_window − 1 keys before."""
    distance = distances(length)
    return (distance >= 0) & (distance < config["sliding_window"]) if windowed else distance >= 0


def unchanged(name: str, x: np.ndarray) -> np.ndarray:
    return x


def grouped(
    weights: Weights,
    config: Config,
    name: str,
    x: np.ndarray,
    radians: np.ndarray,
    visible: np.ndarray,
    scale: float | None = None,
    together: Callable[[str, np.ndarray], np.ndarray] = unchanged,
    by_head: Callable[[str, np.ndarray], np.ndarray] = unchanged,
) -> np.ndarray:
    """Attention with fewer key heads and rotated queries and keys.

    `together` norms the queries or the keys of all heads at once, and `by_head` those of each head.
    """
    query, key = (together(f"{name}.{one}_norm", linear(weights, f"{name}.{one}_proj", x)) for one in "qk")
    query = by_head(f"{name}.q_norm", split(query, config["num_attention_heads"]))
    key = by_head(f"{name}.k_norm", split(key, config["num_key_value_heads"]))
    value = split(linear(weights, f"{name}.v_proj", x), config["num_key_value_heads"])
    scale = head_dim_of(config) ** -0.5 if scale is None else scale
    seen = attend(rotate(query, radians), rotate(key, radians), value, visible, scale)
    return linear(weights, f"{name}.o_proj", merge(seen))


def draw_plain(config: Config, draws: Draws) -> None:
    """Llama's names, with biases of queries, keys and values in Qwen 2, and without a head where it is tied."""
    width, head_dim = config["hidden_size"], head_dim_of(config)
    draws.normal("model.embed_tokens.weight", config["vocab_size"], width, scale=0.5)
    mean = 0 if config["model_type"] == "gemma" else 1
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        draws.norm(f"{block}.input_layernorm", width, mean=mean)
        draw_grouped(draws, f"{block}.self_attn", config, head_dim, scale=1.5)
        if config["model_type"] == "qwen2":
            for name in "qkv":
                heads = config["num_attention_heads" if name == "q" else "num_key_value_heads"]
                draws.normal(f"{block}.self_attn.{name}_proj.bias", heads * head_dim, scale=0.4)
        draws.norm(f"{block}.post_attention_layernorm", width, mean=mean)
        draw_gated(draws, f"{block}.mlp", width, config["intermediate_size"])
    draws.norm("model.norm", width, mean=mean)
    if not config.get("tie_word_embeddings", True):
        draws.linear("lm_head", config["vocab_size"], width, scale=2)


def plain(weights: Weights, config: Config, input_ids: np.ndarray, windowed: list[bool]) -> dict[str, np.ndarray]:
    """Llama's layers, some of which see a window only. The projections have biases where the checkpoint has them."""
    epsilon, length = config["rms_norm_eps"], input_ids.shape[1]
    radians = frequencies(head_dim_of(config), config["rope_theta"])
    x = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        visible = visible_in(config, length, windowed[layer])
        normed = rms_norm(x, weights[f"{block}.input_layernorm.weight"], epsilon)
        x = x + grouped(weights, config, f"{block}.self_attn", normed, radians, visible)
        normed = rms_norm(x, weights[f"{block}.post_attention_layernorm.weight"], epsilon)
        x = x + gated(weights, f"{block}.mlp", normed, config["hidden_act"])
    x = rms_norm(x, weights["model.norm.weight"], epsilon)
    return {"logits": x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T}


def mistral(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Jiang et al., 2023: Llama's layers, all of which see a window only."""
    windowed = config["sliding_window"] is not None
    return plain(weights, config, input_ids, [windowed] * config["num_hidden_layers"])


MISTRAL = Family(
    {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 56,
        "intermediate_size": 90,
        "max_position_embeddings": 590,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 0.01,
        "rope_theta": 10000.0,
        "sliding_window": 11,
        "tie_word_embeddings": False,
        "vocab_size": 97,
    },
    draw_plain,
    example_ids,
    mistral,
)


def qwen2(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Yang et al., 2024: biases of queries, keys and values; the layers from max_window_layers on see a window."""
    first = config["max_window_layers"] if config["use_sliding_window"] else config["num_hidden_layers"]
    return plain(weights, config, input_ids, [layer >= first for layer in range(config["num_hidden_layers"])])


QWEN2 = Family(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 72,
        "intermediate_size": 98,
        "max_position_embeddings": 600,
        "max_window_layers": 1,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "rms_norm_eps": 0.01,
        "rope_theta": 1000000.0,
        "sliding_window": 13,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "vocab_size": 105,
    },
    draw_plain,
    example_ids,
    qwen2,
)


def gemma(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Gemma team, 2024: Llama's layers with gains 1 + w, gelu by tanh, and embeddings times the root of the width."""
    epsilon, length = config["rms_norm_eps"], input_ids.shape[1]
    radians = frequencies(config["head_dim"], config["rope_theta"])
    x = weights["model.embed_tokens.weight"][input_ids] * config["hidden_size"] ** 0.5
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        normed = rms_norm(x, 1 + weights[f"{block}.input_layernorm.weight"], epsilon)
        x = x + grouped(weights, config, f"{block}.self_attn", normed, radians, visible_in(config, length, False))
        normed = rms_norm(x, 1 + weights[f"{block}.post_attention_layernorm.weight"], epsilon)
        x = x + gated(weights, f"{block}.mlp", normed, "gelu_pytorch_tanh")
    return {"logits": rms_norm(x, 1 + weights["model.norm.weight"], epsilon) @ weights["model.embed_tokens.weight"].T}


GEMMA = Family(
    {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "attention_bias": False,
        "head_dim": 14,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 46,
        "intermediate_size": 82,
        "max_position_embeddings": 610,
        "num_attention_heads": 5,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 0.01,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 99,
    },
    draw_plain,
    example_ids,
    gemma,
)


def draw_gemma3(config: Config, draws: Draws) -> None:
    width = config["hidden_size"]
    draws.normal("model.embed_tokens.weight", config["vocab_size"], width, scale=0.5)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        draw_grouped(draws, f"{block}.self_attn", config, config["head_dim"], scale=1)
        draws.norm(f"{block}.self_attn.q_norm", config["head_dim"], mean=0.5)
        draws.norm(f"{block}.self_attn.k_norm", config["head_dim"], mean=0.5)
        draw_gated(draws, f"{block}.mlp", width, config["intermediate_size"])
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            draws.norm(f"{block}.{place}_layernorm", width, mean=0)
    draws.norm("model.norm", width, mean=0)


def gemma3(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Gemma team, 2025: norms before and after, of queries and keys too; windows in five of six layers.

    A norm with weight w multiplies by 1 + w. The layers that see everything are rotated by their own base and, where
    it is scaled, with positions divided by the factor. Those with a window have another base, which is never scaled.
    """
    length = input_ids.shape[1]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, 1 + weights[f"{name}.weight"], config["rms_norm_eps"])

    near = frequencies(config["head_dim"], config["rope_local_base_freq"])
    far = frequencies(config["head_dim"], config["rope_theta"])
    if config["rope_scaling"] is not None:
        far = far / config["rope_scaling"]["factor"]
    x = weights["model.embed_tokens.weight"][input_ids] * config["hidden_size"] ** 0.5
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        windowed = (layer + 1) % config["sliding_window_pattern"] != 0
        attended = grouped(
            weights,
            config,
            f"{block}.self_attn",
            norm(f"{block}.input_layernorm", x),
            near if windowed else far,
            visible_in(config, length, windowed),
            scale=config["query_pre_attn_scalar"] ** -0.5,
            by_head=norm,
        )
        x = x + norm(f"{block}.post_attention_layernorm", attended)
        fed = gated(weights, f"{block}.mlp", norm(f"{block}.pre_feedforward_layernorm", x), config["hidden_activation"])
        x = x + norm(f"{block}.post_feedforward_layernorm", fed)
    return {"logits": norm("model.norm", x) @ weights["model.embed_tokens.weight"].T}


GEMMA3 = Family(
    {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 10,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 52,
        "intermediate_size": 78,
        "max_position_embeddings": 620,
        "num_attention_heads": 6,
        "num_hidden_layers": 7,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 21,
        "rms_norm_eps": 0.01,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 50000.0,
        "sliding_window": 9,
        "sliding_window_pattern": 6,
        "vocab_size": 111,
    },
    draw_gemma3,
    example_ids,
    gemma3,
)


def draw_olmo2(config: Config, draws: Draws) -> None:
    width, head_dim = config["hidden_size"], head_dim_of(config)
    draws.normal("model.embed_tokens.weight", config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        draw_grouped(draws, f"{block}.self_attn", config, head_dim, scale=1)
        draws.norm(f"{block}.self_attn.q_norm", config["num_attention_heads"] * head_dim, mean=1.5)
        draws.norm(f"{block}.self_attn.k_norm", config["num_key_value_heads"] * head_dim, mean=1.5)
        draws.norm(f"{block}.post_attention_layernorm", width)
        draw_gated(draws, f"{block}.mlp", width, config["intermediate_size"])
        draws.norm(f"{block}.post_feedforward_layernorm", width)
    draws.norm("model.norm", width)
    draws.linear("lm_head", config["vocab_size"], width, scale=2)


def olmo2(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """OLMo team, 2025: norms after attention and feed-forward and none before; one norm over the queries of all heads.

    The keys of all heads have one norm together as well.
    """
    radians = frequencies(head_dim_of(config), config["rope_theta"])
    causal = distances(input_ids.shape[1]) >= 0

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, weights[f"{name}.weight"], config["rms_norm_eps"])

    x = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        attended = grouped(weights, config, f"{block}.self_attn", x, radians, causal, together=norm)
        x = x + norm(f"{block}.post_attention_layernorm", attended)
        fed = gated(weights, f"{block}.mlp", x, config["hidden_act"])
        x = x + norm(f"{block}.post_feedforward_layernorm", fed)
    return {"logits": linear(weights, "lm_head", norm("model.norm", x))}


OLMO2 = Family(
    {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 88,
        "intermediate_size": 76,
        "max_position_embeddings": 630,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 0.01,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": 115,
    },
    draw_olmo2,
    example_ids,
    olmo2,
)
