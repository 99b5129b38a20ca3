"""More published decoders in plain NumPy. See `published.py`.

These are Mistral, Qwen 2, OLMo 2, Gemma 1 and 3, the attention of gpt-oss, Mamba-2 and RWKV-7.
"""

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
    layer_norm,
    linear,
    merge,
    rms_norm,
    rotate,
    split,
)
from scipy.special import expit, log_softmax


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
    """Gemma team, 2025: norms before and after, of queries and keys too; windows in all but every n-th layer.

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
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 21,
        "rms_norm_eps": 0.01,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 50000.0,
        "sliding_window": 9,
        "sliding_window_pattern": 3,
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


def draw_gpt_oss(config: Config, draws: Draws) -> None:
    """The weights of its attention, and of the norms around."""
    width, head_dim = config["hidden_size"], config["head_dim"]
    draws.normal("model.embed_tokens.weight", config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        draws.norm(f"{block}.input_layernorm", width)
        draw_grouped(draws, f"{block}.self_attn", config, head_dim, scale=1.5)
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            draws.normal(f"{block}.self_attn.{name}_proj.bias", config[heads] * head_dim, scale=0.4)
        draws.normal(f"{block}.self_attn.o_proj.bias", width, scale=0.4)
        draws.normal(f"{block}.self_attn.sinks", config["num_attention_heads"], mean=1)
    draws.norm("model.norm", width)


def yarn_frequencies(plain: np.ndarray, base: float, scaling: Config) -> np.ndarray:
    """The frequencies of YaRN (Peng et al., 2023): fast pairs are kept, slow ones divided, those between mixed.

    The mix goes linearly with the number of the pair. Its ends are the numbers at which a pair would turn beta_fast and
    beta_slow times in the original context.
    """
    features, length = 2 * len(plain), scaling["original_max_position_embeddings"]

    def number(turns: float) -> float:
        return features * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(base))

    low, high = number(scaling["beta_fast"]), number(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = np.floor(low), np.ceil(high)
    divided = np.clip((np.arange(len(plain)) - low) / (high - low), 0, 1)
    return (1 - divided) * plain + divided * plain / scaling["factor"]


def gpt_oss(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """OpenAI, 2025, without its experts: a sink per head, biases, windows in every other layer, YaRN.

    The sink of a head is one more score for the softmax, whose weight reads nothing. Queries and keys are multiplied by
    0.1·log(factor) + 1 each.
    """
    heads, key_heads, length = config["num_attention_heads"], config["num_key_value_heads"], input_ids.shape[1]
    scaling = config["rope_scaling"]
    radians = yarn_frequencies(frequencies(config["head_dim"], config["rope_theta"]), config["rope_theta"], scaling)
    larger = 0.1 * np.log(scaling["factor"]) + 1
    x = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn"
        normed = rms_norm(x, weights[f"model.layers.{layer}.input_layernorm.weight"], config["rms_norm_eps"])
        query = larger * rotate(split(linear(weights, f"{name}.q_proj", normed), heads), radians)
        key = larger * rotate(split(linear(weights, f"{name}.k_proj", normed), key_heads), radians)
        value = split(linear(weights, f"{name}.v_proj", normed), key_heads)
        key, value = (np.repeat(each, heads // key_heads, axis=1) for each in (key, value))
        scores = query @ key.swapaxes(-1, -2) * config["head_dim"] ** -0.5
        scores = np.where(visible_in(config, length, layer % 2 == 0), scores, -np.inf)
        sinks = np.broadcast_to(weights[f"{name}.sinks"][None, :, None, None], (*scores.shape[:-1], 1))
        shares = np.exp(log_softmax(np.concatenate([scores, sinks], axis=-1), axis=-1))[..., :-1]
        x = x + linear(weights, f"{name}.o_proj", merge(shares @ value))
    return {"last_hidden_state": rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])}


# Of 8 pairs the first is kept, those from number 5 on are divided; the ends of the mix are 1.1 and 4.3.
GPT_OSS = Family(
    {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": 16,
        "hidden_size": 58,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 640,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 0.01,
        "rope_scaling": {
            "beta_fast": 3.0,
            "beta_slow": 0.1,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 5000.0,
        "sliding_window": 9,
        "vocab_size": 85,
    },
    draw_gpt_oss,
    example_ids,
    gpt_oss,
)


def draw_mamba2(config: Config, draws: Draws) -> None:
    width, heads, state = config["hidden_size"], config["num_heads"], config["state_size"]
    inner = config["expand"] * width
    draws.normal("backbone.embeddings.weight", config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        mixer = f"backbone.layers.{layer}.mixer"
        draws.norm(f"backbone.layers.{layer}.norm", width)
        draws.linear(f"{mixer}.in_proj", 2 * inner + 2 * state + heads, width)
        draws.normal(f"{mixer}.conv1d.weight", inner + 2 * state, 1, config["conv_kernel"], scale=0.6)
        draws.normal(f"{mixer}.conv1d.bias", inner + 2 * state, scale=0.4)
        draws.normal(f"{mixer}.A_log", heads)
        draws.normal(f"{mixer}.D", heads)
        # Small steps: what is remembered fades over some ten tokens.
        draws.normal(f"{mixer}.dt_bias", heads, mean=-2)
        draws.norm(f"{mixer}.norm", inner)
        draws.linear(f"{mixer}.out_proj", width, inner)
    draws.norm("backbone.norm_f", width)
    draws.linear("lm_head", config["vocab_size"], width, scale=2)


def mamba2(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Dao and Gu, 2024: a state [heads, head_dim, state_size] per sequence that fades and is written token by token.

    state ← e^(−e^a·step)·state + step·(signal ⊗ key), and what is read is state·query + D·signal.
    """
    width, heads, size = config["hidden_size"], config["num_heads"], config["state_size"]
    inner, kernel, epsilon = config["expand"] * width, config["conv_kernel"], config["layer_norm_epsilon"]
    batch, length = input_ids.shape
    x = weights["backbone.embeddings.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        mixer = f"backbone.layers.{layer}.mixer"
        normed = rms_norm(x, weights[f"backbone.layers.{layer}.norm.weight"], epsilon)
        gate, mixed, step = np.split(linear(weights, f"{mixer}.in_proj", normed), [inner, 2 * inner + 2 * size], -1)
        padded = np.concatenate([np.zeros((batch, kernel - 1, mixed.shape[-1])), mixed], axis=1)
        filters = weights[f"{mixer}.conv1d.weight"][:, 0]
        convolved = sum(padded[:, place : place + length] * filters[:, place] for place in range(kernel))
        convolved = convolved + weights[f"{mixer}.conv1d.bias"]
        signal, key, query = np.split(convolved * expit(convolved), [inner, inner + size], -1)
        signal = signal.reshape(batch, length, heads, -1)
        step = np.logaddexp(0, step + weights[f"{mixer}.dt_bias"])
        fading = np.exp(-np.exp(weights[f"{mixer}.A_log"]) * step)
        state, read = np.zeros((batch, heads, inner // heads, size)), []
        for t in range(length):
            written = step[:, t, :, None, None] * signal[:, t, :, :, None] * key[:, t, None, None, :]
            state = fading[:, t, :, None, None] * state + written
            read.append((state @ query[:, t, None, :, None])[..., 0])
        y = np.stack(read, axis=1) + weights[f"{mixer}.D"][:, None] * signal
        y = y.reshape(batch, length, inner) * gate * expit(gate)
        x = x + linear(weights, f"{mixer}.out_proj", rms_norm(y, weights[f"{mixer}.norm.weight"], epsilon))
    return {"logits": linear(weights, "lm_head", rms_norm(x, weights["backbone.norm_f.weight"], epsilon))}


MAMBA2 = Family(
    {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "conv_kernel": 4,
        "expand": 2,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 30,
        "layer_norm_epsilon": 0.01,
        "n_groups": 1,
        "num_heads": 5,
        "num_hidden_layers": 2,
        "rms_norm": True,
        "state_size": 9,
        "tie_word_embeddings": False,
        "time_step_limit": [0.0, float("inf")],
        "use_bias": False,
        "use_conv_bias": True,
        "vocab_size": 93,
    },
    draw_mamba2,
    example_ids,
    mamba2,
)


def draw_rwkv7(config: Config, draws: Draws) -> None:
    width, heads = config["hidden_size"], config["hidden_size"] // config["head_dim"]
    draws.normal("model.embeddings.weight", config["vocab_size"], width)
    draws.norm("model.layers.0.pre_norm", width, bias=True)
    ranks = {"w": "decay", "v": "v", "a": "a", "g": "gate"}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        draws.norm(f"{block}.attn_norm", width, bias=True)
        draws.norm(f"{block}.ffn_norm", width, bias=True)
        for name in "rwkvag":
            draws.normal(f"{block}.attn.x_{name}", 1, 1, width, mean=0.5, scale=0.3)
        for name in "rkvo":
            draws.linear(f"{block}.attn.{name}_proj", width, width)
        for name, rank in ranks.items():
            if layer or name != "v":  # the first layer has no other values to mix in
                draws.linear(f"{block}.attn.{name}_lora.lora.0", config[f"{rank}_low_rank_dim"], width)
                size = config[f"{rank}_low_rank_dim"]
                draws.linear(f"{block}.attn.{name}_lora.lora.2", width, size, bias=name != "g")
        draws.normal(f"{block}.attn.k_k", width, mean=0.85, scale=0.3)
        draws.normal(f"{block}.attn.k_a", width, mean=1, scale=0.3)
        draws.normal(f"{block}.attn.r_k", heads, config["head_dim"], scale=0.5)
        draws.norm(f"{block}.attn.g_norm", width, bias=True)
        draws.normal(f"{block}.ffn.x_k", width, mean=0.5, scale=0.3)
        draws.linear(f"{block}.ffn.key", config["intermediate_size"], width)
        draws.linear(f"{block}.ffn.value", width, config["intermediate_size"])
    draws.norm("model.norm", width, bias=True)
    draws.linear("lm_head", config["vocab_size"], width, scale=2)


def rwkv7(weights: Weights, config: Config, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Peng et al., 2025, as flash-linear-attention has it: a state [keys, values] per head, written token by token.

    Each token first fades the state by channel, then takes what stands under its key in part away, then writes. Layers
    after the first mix their values with those of the first.
    """
    epsilon, head_dim = config["norm_eps"], config["head_dim"]
    heads, (batch, length) = config["hidden_size"] // head_dim, input_ids.shape

    def moved(x: np.ndarray, share: np.ndarray) -> np.ndarray:
        before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        return x + (before - x) * share

    x = layer_norm(weights, "model.layers.0.pre_norm", weights["model.embeddings.weight"][input_ids], epsilon)
    first = None
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        name = f"{block}.attn"
        normed = layer_norm(weights, f"{block}.attn_norm", x, epsilon)
        of = {each: moved(normed, weights[f"{name}.x_{each}"]) for each in "rwkvag"}

        def low_rank(letter: str, inner: Callable, name: str = name, of: dict = of) -> np.ndarray:
            hidden = inner(linear(weights, f"{name}.{letter}_lora.lora.0", of[letter]))
            return linear(weights, f"{name}.{letter}_lora.lora.2", hidden)

        query, key, value = (linear(weights, f"{name}.{each}_proj", of[each]) for each in "rkv")
        kept = np.exp(-np.exp(-0.5) * expit(low_rank("w", np.tanh)))
        if first is None:
            first = value
        else:
            value = value + (first - value) * expit(low_rank("v", lambda y: y))
        rate, gate = expit(low_rank("a", lambda y: y)), low_rank("g", expit)
        removed = (key * weights[f"{name}.k_k"]).reshape(batch, length, heads, head_dim)
        squares = (removed**2).sum(-1, keepdims=True)
        removed = removed / (np.sqrt(squares + 1e-6) if config["fuse_norm"] else np.maximum(np.sqrt(squares), 1e-12))
        key = key * (1 + (rate - 1) * weights[f"{name}.k_a"])
        query, key, value, kept, rate = (
            each.reshape(batch, length, heads, head_dim) for each in (query, key, value, kept, rate)
        )
        state, read = np.zeros((batch, heads, head_dim, head_dim)), []
        for t in range(length):
            found = removed[:, t, :, None, :] @ state  # [B, N, 1, V]
            state = kept[:, t, :, :, None] * state - (removed * rate)[:, t, :, :, None] * found
            state = state + key[:, t, :, :, None] * value[:, t, :, None, :]
            read.append((query[:, t, :, None, :] @ state)[:, :, 0])
        y = np.stack(read, axis=1)
        centred = y - y.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + head_dim * epsilon)
        y = y.reshape(batch, length, -1) * weights[f"{name}.g_norm.weight"] + weights[f"{name}.g_norm.bias"]
        bonus = (query * key * weights[f"{name}.r_k"]).sum(-1, keepdims=True) * value
        x = x + linear(weights, f"{name}.o_proj", (y + bonus.reshape(y.shape)) * gate)
        mixed = moved(layer_norm(weights, f"{block}.ffn_norm", x, epsilon), weights[f"{block}.ffn.x_k"])
        hidden = np.maximum(linear(weights, f"{block}.ffn.key", mixed), 0) ** 2
        x = x + linear(weights, f"{block}.ffn.value", hidden)
    return {"logits": linear(weights, "lm_head", layer_norm(weights, "model.norm", x, epsilon))}


RWKV7 = Family(
    {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "a_low_rank_dim": 7,
        "attn": None,
        "decay_low_rank_dim": 11,
        "fuse_norm": True,
        "gate_low_rank_dim": 13,
        "head_dim": 10,
        "hidden_act": "sqrelu",
        "hidden_ratio": 4,
        "hidden_size": 40,
        "intermediate_size": 66,
        "max_position_embeddings": 650,
        "norm_bias": True,
        "norm_eps": 0.01,
        "norm_first": True,
        "num_heads": None,
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "v_low_rank_dim": 9,
        "value_dim": [40, 40, 40],
        "vocab_size": 95,
    },
    draw_rwkv7,
    example_ids,
    rwkv7,
)
