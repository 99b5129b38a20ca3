"""Published recurrent decoders: configs and tables of names, as in `decoders.py`."""

from collections.abc import Mapping

import numpy as np

from jaxattn import nn
from jaxattn.models.config import Branch, Layer, TransformerConfig, pre_norm
from jaxattn.models.pretrained.decoders import Published, head_table, of_published, refuse
from jaxattn.models.pretrained.weights import Layout, Row, Table, linear, norm, shaped, stacked
from jaxattn.nn.spec import Spec

MECHANISM = "layers.*.branches.0.module.mechanism"
ANY_LENGTH = 2**20
"""The most tokens of a model whose config names none, since its state does not grow."""


@of_published
def mamba2(config: Published) -> TransformerConfig:
    """Returns the config of Mamba-2 (Dao & Gu, 2024): layers of RMSNorm and a state-space mixer alone.

    Keys and queries of several groups are refused: published programs differ in what they norm together then.

    Raises:
        ValueError: The heads do not fill the channels, or steps are limited.
    """
    refuse(config, n_groups=1, use_bias=False, use_conv_bias=True, hidden_act="silu", rms_norm=True)
    limits = config.get("time_step_limit", (0.0, np.inf))
    # transformers 5 writes the infinite as {"__float__": "Infinity"}.
    if [float(x["__float__"]) if isinstance(x, Mapping) else x for x in limits] != [0.0, np.inf]:
        raise ValueError(f"config has time_step_limit={limits}: need [0.0, inf], no limit")
    heads, inner = config["num_heads"], config["expand"] * config["hidden_size"]
    if heads * config["head_dim"] != inner:
        raise ValueError(f"config has {heads} heads of head_dim={config['head_dim']}: need {inner} channels together")
    around = Spec(nn.RMSNorm, eps=config["layer_norm_epsilon"])
    mixer = Spec(
        nn.Mamba2,
        heads=heads,
        state=config["state_size"],
        expand=config["expand"],
        convolution=config["conv_kernel"],
        eps=config["layer_norm_epsilon"],
    )
    return TransformerConfig(
        vocabulary=config["vocab_size"],
        length=ANY_LENGTH,
        width=config["hidden_size"],
        layers=[pre_norm(mixer, None, around)] * config["num_hidden_layers"],
        norm=around,
        head=Spec(nn.Head, tied=config.get("tie_word_embeddings", False)),
    )


def mamba2_table(config: Published) -> Table:
    """Returns the names of Mamba-2, which has one map for all that a mixer reads, and one convolution."""
    inner, state = config["expand"] * config["hidden_size"], config["state_size"]
    mixer, convolved = "backbone.layers.*.mixer", ("value", "key", "query")
    read = (
        f"{MECHANISM}.gate.kernel",
        *(f"{MECHANISM}.project.linear.{name}.kernel" for name in convolved),
        f"{MECHANISM}.step.kernel",
    )
    filters, biases = (
        tuple(f"{MECHANISM}.project.convolution.{name}.{kind}" for name in convolved) for kind in ("weight", "bias")
    )
    sizes = (inner, state, state)
    parts = stacked(*sizes)

    def lags(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return parts.read(x[:, 0, ::-1])

    def filtering(*parts_of: np.ndarray) -> np.ndarray:
        return parts.write(*parts_of)[:, None, ::-1]

    return (
        {
            "backbone.embeddings.weight": Row("embed.table"),
            f"{mixer}.in_proj.weight": Row(read, stacked(inner, *sizes, config["num_heads"])),
            f"{mixer}.conv1d.weight": Row(filters, Layout(lags, filtering)),
            f"{mixer}.conv1d.bias": Row(biases, parts),
            f"{mixer}.A_log": Row(f"{MECHANISM}.a_log"),
            f"{mixer}.D": Row(f"{MECHANISM}.skip"),
            f"{mixer}.dt_bias": Row(f"{MECHANISM}.step_bias"),
        }
        | norm(f"{mixer}.norm", f"{MECHANISM}.norm")
        | linear(f"{mixer}.out_proj", f"{MECHANISM}.out")
        | norm("backbone.layers.*.norm", "layers.*.branches.0.norm")
        | norm("backbone.norm_f", "norm")
        | head_table(tied=config.get("tie_word_embeddings", False))
    )


@of_published
def rwkv7(config: Published) -> TransformerConfig:
    """Returns the config of RWKV-7 (Peng et al., 2025), as flash-linear-attention publishes it.

    The embedding has a LayerNorm. The layers after the first mix their values with its own.

    Raises:
        ValueError: A layer has another number of value channels than the model.
    """
    refuse(config, attn=None, norm_first=True, norm_bias=True, hidden_act="sqrelu")
    width, count = config["hidden_size"], config["num_hidden_layers"]
    if (values := config.get("value_dim")) not in (None, width, [width] * count):
        raise ValueError(f"config has value_dim={values}: need {width} in each layer")
    around = Spec(nn.LayerNorm, eps=config["norm_eps"])
    mixer = Spec(
        nn.RWKV7,
        heads=_heads(config),
        rank=config["decay_low_rank_dim"],
        rate_rank=config["a_low_rank_dim"],
        gate_rank=config["gate_low_rank_dim"],
        eps=config["norm_eps"] * (width // _heads(config)),
        # Without its fused norm the program divides by the larger of the length and 1e-12.
        unit_eps=1e-6 if config["fuse_norm"] else 1e-24,
    )
    later = mixer.replace(keys_from="layer", value_rank=config["v_low_rank_dim"])
    hidden = config["intermediate_size"] or -(-int(width * config["hidden_ratio"]) // 32) * 32
    block = Branch(Spec(nn.ChannelMix, hidden=hidden), around, name="channel")
    return TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=width,
        layers=[Layer([Branch(later if number else mixer, around), block]) for number in range(count)],
        embed_norm=around,
        norm=around,
        head=Spec(nn.Head, tied=config.get("tie_word_embeddings", False)),
    )


def _heads(config: Published) -> int:
    if config.get("head_dim") is None:
        return config["num_heads"]
    return config["hidden_size"] // config["head_dim"]


def rwkv7_table(config: Published) -> Table:
    """Returns the names of RWKV-7."""
    layer, block = "model.layers.*", "layers.*.branches.1"
    attention, width, heads = f"{layer}.attn", config["hidden_size"], _heads(config)
    mixes = {"r": "receptance", "w": "decay", "k": "key", "v": "value", "a": "rate", "g": "gate"}
    by_head = shaped((width,), (heads, width // heads))
    table: Table = {
        "model.embeddings.weight": Row("embed.table"),
        f"{attention}.k_k": Row(f"{MECHANISM}.removed"),
        f"{attention}.k_a": Row(f"{MECHANISM}.replaced"),
        f"{attention}.r_k": Row(f"{MECHANISM}.bonus"),
        f"{attention}.g_norm.weight": Row(f"{MECHANISM}.scale", by_head),
        f"{attention}.g_norm.bias": Row(f"{MECHANISM}.shift", by_head),
        f"{layer}.ffn.x_k": Row(f"{block}.module.mechanism.mix"),
    }
    for letter, ours in mixes.items():
        table |= {f"{attention}.x_{letter}": Row(f"{MECHANISM}.mix.{ours}", shaped((1, 1, width), (width,)))}
    for letter in "rkv":
        table |= linear(f"{attention}.{letter}_proj", f"{MECHANISM}.linear.{mixes[letter]}")
    for letter in "wavg":
        low_rank = f"{MECHANISM}.low_rank.{mixes[letter]}"
        table |= linear(f"{attention}.{letter}_lora.lora.0", f"{low_rank}.down")
        table |= linear(f"{attention}.{letter}_lora.lora.2", f"{low_rank}.up", bias=letter != "g")
    return (
        table
        | linear(f"{attention}.o_proj", f"{MECHANISM}.out")
        | linear(f"{layer}.ffn.key", f"{block}.module.mechanism.block.up")
        | linear(f"{layer}.ffn.value", f"{block}.module.mechanism.block.down")
        | norm("model.layers.0.pre_norm", "embed_norm", bias=True)
        | norm(f"{layer}.attn_norm", "layers.*.branches.0.norm", bias=True)
        | norm(f"{layer}.ffn_norm", f"{block}.norm", bias=True)
        | norm("model.norm", "norm", bias=True)
        | head_table(tied=config.get("tie_word_embeddings", False))
    )
