"""Published recurrent decoders: configs and tables of names, as in `decoders.py`."""

import numpy as np

from jaxattn import nn
from jaxattn.models.config import TransformerConfig, pre_norm
from jaxattn.models.pretrained.decoders import Published, head_table, of_published, refuse
from jaxattn.models.pretrained.weights import Layout, Row, Table, linear, norm, stacked
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
    if list(config.get("time_step_limit", [0.0, np.inf])) != [0.0, np.inf]:
        raise ValueError(f"config has time_step_limit={config['time_step_limit']}: need [0.0, inf], no limit")
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
