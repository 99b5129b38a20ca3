"""Published decoders: for each a config, from the numbers of its config.json, and a table of names of its weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxattn import nn
from jaxattn.core.attend.maps import SoftCap
from jaxattn.core.attend.mask import Window
from jaxattn.core.attend.position import Llama3, Rotary
from jaxattn.core.attend.score import Dot
from jaxattn.models.config import Branch, Layer, TransformerConfig, pre_norm
from jaxattn.models.pretrained.weights import TRANSPOSED, Layout, Row, Table, columns, linear, norm
from jaxattn.nn.spec import Spec

Published = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""The published names of activations -> those of `nn.FeedForward`."""

MIXER, BLOCK = "layers.*.branches.0", "layers.*.branches.1"
QKV = ("query", "key", "value")


def activation_of(name: str) -> str:
    """Returns the activation of `nn.FeedForward` that a config names.

    Raises:
        ValueError: The name is not known.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is not known: need one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def refuse(config: Published, **expected: Any) -> None:
    """Raises ValueError for options of a config that no model here has, rather than leaving them out."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"config has {name}={config[name]!r}: need {value!r}")


def biased_block(hidden: int, activation: str) -> Spec:
    """Returns the feed-forward block with biases and without a gate, from the published name of its activation."""
    return Spec(nn.FeedForward, hidden=hidden, activation=activation_of(activation), gated=False, use_bias=True)


def gpt2(config: Published) -> TransformerConfig:
    """Returns the config of GPT-2 (Radford et al., 2019).

    The model has LayerNorm before each block, learned positions, biases everywhere, and a tied head.
    """
    refuse(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
    around = Spec(nn.LayerNorm, eps=config["layer_norm_epsilon"])
    attention = Spec(nn.MultiHeadAttention, heads=config["n_head"], position=None, use_bias=True)
    block = biased_block(config.get("n_inner") or 4 * config["n_embd"], config["activation_function"])
    return TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["n_positions"],
        width=config["n_embd"],
        layers=[pre_norm(attention, block, around)] * config["n_layer"],
        positions=Spec(nn.PositionEmbedding),
        norm=around,
    )


def gpt2_table(config: Published) -> Table:
    """Returns the names of GPT-2, whose maps are [in, out], with those of queries, keys and values side by side."""
    layer, attention, block = "transformer.h.*", f"{MIXER}.module", f"{BLOCK}.module"
    kernels, biases = (tuple(f"{attention}.{name}.{kind}" for name in QKV) for kind in ("kernel", "bias"))
    return (
        {"transformer.wte.weight": Row("embed.table"), "transformer.wpe.weight": Row("positions.table")}
        | norm(f"{layer}.ln_1", f"{MIXER}.norm", bias=True)
        | norm(f"{layer}.ln_2", f"{BLOCK}.norm", bias=True)
        | norm("transformer.ln_f", "norm", bias=True)
        | {
            f"{layer}.attn.c_attn.weight": Row(kernels, columns(3)),
            f"{layer}.attn.c_attn.bias": Row(biases, columns(3)),
        }
        | {f"{layer}.attn.c_proj.weight": Row(f"{attention}.out.kernel")}
        | {f"{layer}.attn.c_proj.bias": Row(f"{attention}.out.bias")}
        | {f"{layer}.mlp.c_fc.weight": Row(f"{block}.up.kernel")}
        | {f"{layer}.mlp.c_fc.bias": Row(f"{block}.up.bias")}
        | {f"{layer}.mlp.c_proj.weight": Row(f"{block}.down.kernel")}
        | {f"{layer}.mlp.c_proj.bias": Row(f"{block}.down.bias")}
    )


def rotary_of(config: Published, fraction: float = 1.0) -> Rotary:
    """Returns the rotary position that a config names, in the form of transformers 4 or 5.

    Raises:
        ValueError: The kind of scaling is not known, or there is no base.
    """
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = said.get("rope_theta", config.get("rope_theta"))
    if base is None:
        raise ValueError("config has neither rope_theta nor rope_parameters with one: need the base of the rotation")
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return Rotary(float(base), fraction)
    if kind != "llama3":
        raise ValueError(f"config scales its rotary positions by {said}: need rope_type 'default' or 'llama3'")
    length = said["original_max_position_embeddings"]
    return Rotary(
        float(base), fraction, Llama3(said["factor"], length, said["low_freq_factor"], said["high_freq_factor"])
    )


def llama(config: Published) -> TransformerConfig:
    """Returns the config of Llama 3 (Dubey et al., 2024).

    The model has RMSNorm before each block, rotary positions, grouped heads, gated blocks, and no biases.
    """
    refuse(config, attention_bias=False, mlp_bias=False, sliding_window=None)
    return _llama_like(config)


def qwen3(config: Published) -> TransformerConfig:
    """Returns the config of Qwen 3 (Yang et al., 2025).

    The layers are Llama's with RMSNorm of the queries and keys of each head.
    """
    refuse(config, attention_bias=False, use_sliding_window=False)
    return _llama_like(config, qk_norm=Spec(nn.RMSNorm, eps=config["rms_norm_eps"]))


def _llama_like(config: Published, **options: Any) -> TransformerConfig:
    around = Spec(nn.RMSNorm, eps=config["rms_norm_eps"])
    attention = Spec(nn.MultiHeadAttention, **_heads(config), **options)
    block = Spec(
        nn.FeedForward, hidden=config["intermediate_size"], activation=activation_of(config["hidden_act"]), gated=True
    )
    return TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["hidden_size"],
        layers=[pre_norm(attention, block, around)] * config["num_hidden_layers"],
        norm=around,
        head=Spec(nn.Head, tied=config.get("tie_word_embeddings", False)),
    )


def _heads(config: Published) -> dict[str, Any]:
    """Returns the sizes of grouped attention with rotary positions."""
    heads = config["num_attention_heads"]
    return {
        "heads": heads,
        "key_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "position": rotary_of(config),
    }


def llama_table(config: Published) -> Table:
    """Returns the names of Llama."""
    return _llama_names(config.get("tie_word_embeddings", False)) | _norms_before()


def qwen3_table(config: Published) -> Table:
    """Returns the names of Qwen 3: those of Llama, and of the norms of queries and keys."""
    attention = "model.layers.*.self_attn"
    return (
        llama_table(config)
        | norm(f"{attention}.q_norm", f"{MIXER}.module.query_norm")
        | norm(f"{attention}.k_norm", f"{MIXER}.module.key_norm")
    )


def _llama_names(tied: bool) -> Table:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    blocks = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    table: Table = {"model.embed_tokens.weight": Row("embed.table")} | norm("model.norm", "norm")
    for ours, name in names.items():
        table |= linear(f"model.layers.*.self_attn.{name}", f"{MIXER}.module.{ours}")
    for ours, name in blocks.items():
        table |= linear(f"model.layers.*.mlp.{name}", f"{BLOCK}.module.{ours}")
    return table if tied else table | linear("lm_head", "head.map")


def _norms_before() -> Table:
    return norm("model.layers.*.input_layernorm", f"{MIXER}.norm") | norm(
        "model.layers.*.post_attention_layernorm", f"{BLOCK}.norm"
    )


def gemma2(config: Published) -> TransformerConfig:
    """Returns the config of Gemma 2 (Gemma Team, 2024).

    The model has norms with gains 1 + g before and after each block, capped scores and logits, and a window in every
    other layer, beginning with the first.
    """
    refuse(config, attention_bias=False, tie_word_embeddings=True)
    around = Spec(nn.RMSNorm, eps=config["rms_norm_eps"], offset=1.0)
    cap = config["attn_logit_softcapping"]
    attention = Spec(
        nn.MultiHeadAttention,
        **_heads(config),
        score=Dot(config["query_pre_attn_scalar"] ** -0.5),
        score_maps=() if cap is None else (SoftCap(cap),),
    )
    block = Spec(
        nn.FeedForward,
        hidden=config["intermediate_size"],
        activation=activation_of(config.get("hidden_activation") or config["hidden_act"]),
        gated=True,
    )
    near = attention.replace(mask=Window(config["sliding_window"] - 1))
    count = config["num_hidden_layers"]
    alternating = [("sliding_attention", "full_attention")[number % 2] for number in range(count)]
    kinds = config.get("layer_types") or alternating
    if len(kinds) != count or not set(kinds) <= set(alternating):
        raise ValueError(f"config has layer_types={kinds}: need {count} of 'sliding_attention' and 'full_attention'")

    def layer(mixer: Spec) -> Layer:
        return Layer([Branch(each, around, norm_after=around) for each in (mixer, block)])

    return TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["hidden_size"],
        layers=[layer({"sliding_attention": near, "full_attention": attention}[kind]) for kind in kinds],
        embed=Spec(nn.TokenEmbedding, scale=config["hidden_size"] ** 0.5),
        norm=around,
        head=Spec(nn.Head, tied=True, cap=config["final_logit_softcapping"]),
    )


def gemma2_table(config: Published) -> Table:
    """Returns the names of Gemma 2: those of Llama, with four norms in each layer."""
    layer = "model.layers.*"
    return (
        _llama_names(tied=True)
        | norm(f"{layer}.input_layernorm", f"{MIXER}.norm")
        | norm(f"{layer}.post_attention_layernorm", f"{MIXER}.norm_after")
        | norm(f"{layer}.pre_feedforward_layernorm", f"{BLOCK}.norm")
        | norm(f"{layer}.post_feedforward_layernorm", f"{BLOCK}.norm_after")
    )


def gpt_neox(config: Published) -> TransformerConfig:
    """Returns the config of GPT-NeoX (Black et al., 2022) and Pythia.

    Attention and feed-forward block are in parallel, and part of the channels is rotated.
    """
    refuse(config, attention_bias=True, rope_scaling=None, rope_parameters=None)
    around = Spec(nn.LayerNorm, eps=config["layer_norm_eps"])
    attention = Spec(
        nn.MultiHeadAttention,
        heads=config["num_attention_heads"],
        position=Rotary(float(config["rotary_emb_base"]), config["rotary_pct"]),
        use_bias=True,
    )
    block = biased_block(config["intermediate_size"], config["hidden_act"])
    layer = Layer([Branch(attention, around), Branch(block, around)], parallel=config["use_parallel_residual"])
    return TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["hidden_size"],
        layers=[layer] * config["num_hidden_layers"],
        norm=around,
        head=Spec(nn.Head, tied=config.get("tie_word_embeddings", False)),
    )


def gpt_neox_table(config: Published) -> Table:
    """Returns the names of GPT-NeoX, whose map of queries, keys and values has the three of each head side by side."""
    heads, layer = config["num_attention_heads"], "gpt_neox.layers.*"

    def apart(x: np.ndarray) -> tuple[np.ndarray, ...]:
        of_heads = x.reshape(heads, 3, -1, *x.shape[1:])
        return tuple(of_heads[:, i].reshape(-1, *x.shape[1:]).T for i in range(3))

    def together(*parts: np.ndarray) -> np.ndarray:
        of_heads = [part.T.reshape(heads, -1, *part.T.shape[1:]) for part in parts]
        return np.stack(of_heads, 1).reshape(-1, *parts[0].T.shape[1:])

    fused = f"{layer}.attention.query_key_value"
    kernels, biases = (tuple(f"{MIXER}.module.{name}.{kind}" for name in QKV) for kind in ("kernel", "bias"))
    table = (
        {"gpt_neox.embed_in.weight": Row("embed.table")}
        | {f"{fused}.weight": Row(kernels, Layout(apart, together))}
        | {f"{fused}.bias": Row(biases, Layout(apart, together))}
        | norm(f"{layer}.input_layernorm", f"{MIXER}.norm", bias=True)
        | norm(f"{layer}.post_attention_layernorm", f"{BLOCK}.norm", bias=True)
        | norm("gpt_neox.final_layer_norm", "norm", bias=True)
        | linear(f"{layer}.attention.dense", f"{MIXER}.module.out", bias=True)
        | linear(f"{layer}.mlp.dense_h_to_4h", f"{BLOCK}.module.up", bias=True)
        | linear(f"{layer}.mlp.dense_4h_to_h", f"{BLOCK}.module.down", bias=True)
    )
    return (
        table
        if config.get("tie_word_embeddings", False)
        else table | {"embed_out.weight": Row("head.map.kernel", TRANSPOSED)}
    )
