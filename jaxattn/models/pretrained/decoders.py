"""Published decoders: for each a config, from the numbers of its config.json, and a table of names of its weights."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from jaxattn import nn
from jaxattn.core.attend.maps import SoftCap
from jaxattn.core.attend.mask import Window
from jaxattn.core.attend.position import Interpolate, Llama3, Rotary, RotaryScaling, Yarn
from jaxattn.core.attend.score import Dot
from jaxattn.models.config import Branch, Layer, TransformerConfig, pre_norm
from jaxattn.models.pretrained.weights import Layout, Row, Table, columns, linear, norm
from jaxattn.nn.spec import Spec

Published = Mapping[str, Any]
Made = TypeVar("Made")

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""The published names of activations -> those of `nn.FeedForward`."""

SLIDING, FULL = "sliding_attention", "full_attention"
MIXER, BLOCK = "layers.*.branches.0", "layers.*.branches.1"
QKV = ("query", "key", "value")
OF_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}


class Numbers(dict[str, Any]):
    """The numbers of a config.json; a missing one is an error that names it."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"the config of model_type={self.get('model_type')!r} has no {name!r}: need a value for it")


def changed(config: Published, **numbers: Any) -> Numbers:
    """Returns the numbers of a config.json with others in place of these."""
    return Numbers({**config, **numbers})


def of_published(make: Callable[[Published], Made]) -> Callable[[Published], Made]:
    """Makes a function of the numbers of config.json name the one that it misses."""
    return functools.wraps(make)(lambda config: make(Numbers(config)))


def activation_of(name: str) -> str:
    """Returns the activation of `nn.FeedForward` that a config names.

    Raises:
        ValueError: The name is not known.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is not known: need one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def refuse(config: Published, **expected: Any) -> None:
    """Raises ValueError for options of a config that no model here has, rather than leaving them out.

    An option that is null is one that is left out.
    """
    for name, value in expected.items():
        if config.get(name) not in (None, value):
            raise ValueError(f"config has {name}={config[name]!r}: need {value!r}")


def biased_block(hidden: int, activation: str) -> Spec:
    """Returns the feed-forward block with biases and without a gate, from the published name of its activation."""
    return Spec(nn.FeedForward, hidden=hidden, activation=activation_of(activation), gated=False, use_bias=True)


def kinds_of_layers(config: Published, default: list[str]) -> list[str]:
    """Returns the kind of attention of each layer, from `layer_types` where the config has them.

    Raises:
        ValueError: There are not as many as layers, or a kind is not known.
    """
    kinds = config.get("layer_types") or default
    if len(kinds) != config["num_hidden_layers"] or not set(kinds) <= {SLIDING, FULL}:
        raise ValueError(
            f"config has layer_types={kinds}: need {config['num_hidden_layers']} of {SLIDING!r} and {FULL!r}"
        )
    return kinds


@of_published
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
        | head_table(tied=True)
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


SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
    ),
}
"""The published kinds of rotary scaling -> the numbers that each must have, and those that it may have."""


def rope_of(config: Published) -> dict[str, Any]:
    """Returns all that a config says of rotary positions: transformers 4 has a base beside the rest, 5 all in one."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    beside = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
    return {**beside, **said}


def rotary_of(said: Published) -> Rotary:
    """Returns the rotary position with the numbers of `rope_of`.

    Raises:
        ValueError: The kind of scaling or a number of it is not known, a number is missing, or there is no base.
    """
    base = said.get("rope_theta")
    if base is None:
        raise ValueError("config has neither rope_theta nor rope_parameters with one: need the base of the rotation")
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in SCALINGS:
        raise ValueError(f"config has rope_type={kind!r} for its rotary positions: need one of {list(SCALINGS)}")
    needed, more = SCALINGS[kind]
    others = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
    given = {name: x for name, x in said.items() if name not in others and x is not None}
    if kind == "default":  # a file may say where scaling would begin
        given.pop("original_max_position_embeddings", None)
    if kind == "yarn" and ("mscale" in given) != ("mscale_all_dim" in given):
        raise ValueError(f"config has {said} for its rotary positions: need both of mscale and mscale_all_dim, or none")
    if wrong := sorted((set(given) - set(needed) - set(more)) | (set(needed) - set(given))):
        raise ValueError(
            f"config has {said} for its rotary positions, with {wrong} missing or not known: need {needed}"
        )
    fraction = said.get("partial_rotary_factor")
    return Rotary(float(base), 1.0 if fraction is None else fraction, _scaling(kind, given))


def _scaling(kind: str, given: dict[str, Any]) -> RotaryScaling | None:
    length = given.pop("original_max_position_embeddings", None)
    if kind == "linear":
        return Interpolate(given["factor"])
    if kind == "llama3":
        return Llama3(given["factor"], length, given["low_freq_factor"], given["high_freq_factor"])
    return Yarn(original_length=length, **given) if kind == "yarn" else None


@of_published
def llama(config: Published) -> TransformerConfig:
    """Returns the config of Llama 1 to 3.2 (Touvron et al., 2023; Dubey et al., 2024).

    The model has RMSNorm before each block, rotary positions, grouped heads, gated blocks, and no biases. Files of
    Llama 1 and 2 do not say the base of the rotation, which is 10000.
    """
    refuse(config, attention_bias=False, mlp_bias=False, sliding_window=None, rope_interleaved=False)
    return _llama_like(Numbers({"rope_theta": 10000.0, "num_key_value_heads": config["num_attention_heads"], **config}))


@of_published
def mistral(config: Published) -> TransformerConfig:
    """Returns the config of Mistral (Jiang et al., 2023): Llama's layers, which may see a window of keys only."""
    refuse(config, layer_types=None)
    window = config["sliding_window"]
    return _llama_like(config, [FULL if window is None else SLIDING] * config["num_hidden_layers"])


@of_published
def qwen2(config: Published) -> TransformerConfig:
    """Returns the config of Qwen 2 and 2.5 (Yang et al., 2024): Llama's layers with biases of queries, keys and values.

    The layers from `max_window_layers` on may see a window of keys only.
    """
    return _llama_like(config, _kinds_of_qwen(config), use_bias=QKV)


@of_published
def qwen3(config: Published) -> TransformerConfig:
    """Returns the config of Qwen 3 (Yang et al., 2025).

    The layers are Llama's with RMSNorm of the queries and keys of each head, and windows as in Qwen 2.
    """
    refuse(config, attention_bias=False)
    return _llama_like(config, _kinds_of_qwen(config), qk_norm=Spec(nn.RMSNorm, eps=config["rms_norm_eps"]))


def _kinds_of_qwen(config: Published) -> list[str]:
    count = config["num_hidden_layers"]
    windows = config.get("use_sliding_window", False) and config["sliding_window"] is not None
    first = config["max_window_layers"] if windows else count
    kinds = kinds_of_layers(config, [FULL if number < first else SLIDING for number in range(count)])
    if SLIDING in kinds and not windows:
        raise ValueError(
            f"config has layer_types={kinds} with use_sliding_window={config.get('use_sliding_window', False)} and "
            f"sliding_window={config.get('sliding_window')}: need a window, or {FULL!r} alone"
        )
    return kinds


@of_published
def olmo2(config: Published) -> TransformerConfig:
    """Returns the config of OLMo 2 (OLMo Team, 2025).

    The layers are Llama's with norms after the blocks in place of those before, and RMSNorm of all queries and of all
    keys of a token together.
    """
    refuse(config, attention_bias=False)
    around = Spec(nn.RMSNorm, eps=config["rms_norm_eps"])
    return _llama_like(
        config,
        layer=lambda *blocks: Layer([Branch(each, None, norm_after=around) for each in blocks]),
        qk_norm=Spec(nn.AcrossHeads, norm=around),
    )


@of_published
def gemma(config: Published) -> TransformerConfig:
    """Returns the config of Gemma 1 (Gemma Team, 2024).

    The layers are Llama's with gains 1 + g in the norms. The model multiplies embeddings by the root of the width. The
    first files name the exact gelu as `hidden_act`, but the model was trained with its approximation by tanh.
    """
    refuse(config, attention_bias=False, tie_word_embeddings=True, use_bidirectional_attention=False)
    if config["hidden_act"] == "gelu" and config.get("hidden_activation") is None:
        config = changed(config, hidden_act="gelu_pytorch_tanh")
    return _gemma(config)


@of_published
def gemma2(config: Published) -> TransformerConfig:
    """Returns the config of Gemma 2 (Gemma Team, 2024).

    The model is that of Gemma 1 with norms before and after each block, capped scores and logits, and a window in every
    other layer, beginning with the first.
    """
    refuse(config, attention_bias=False, tie_word_embeddings=True, use_bidirectional_attention=False)
    alternating = [(SLIDING, FULL)[number % 2] for number in range(config["num_hidden_layers"])]
    return _gemma(config, kinds_of_layers(config, alternating), sandwich=True)


@of_published
def gemma3_text(config: Published) -> TransformerConfig:
    """Returns the config of Gemma 3 (Gemma Team, 2025), without images.

    The layers are those of Gemma 2 with RMSNorm of the queries and keys of each head. Five layers with a window and a
    base of their own for the rotation stand before each layer that sees everything.
    """
    refuse(config, attention_bias=False, tie_word_embeddings=True, use_bidirectional_attention=False)
    count = config["num_hidden_layers"]
    default = []
    if not config.get("layer_types"):
        period = config["sliding_window_pattern"]
        default = [SLIDING if (number + 1) % period else FULL for number in range(count)]
    nested = config.get("rope_parameters") or {}
    if not set(nested) <= {SLIDING, FULL}:
        raise ValueError(f"config has rope_parameters={nested}: need those of {SLIDING!r} and of {FULL!r}")
    ropes = nested or {FULL: rope_of(config), SLIDING: {"rope_theta": config["rope_local_base_freq"]}}
    norm_of_heads = Spec(nn.RMSNorm, eps=config["rms_norm_eps"], offset=1.0)
    return _gemma(config, kinds_of_layers(config, default), sandwich=True, ropes=ropes, qk_norm=norm_of_heads)


def _gemma(
    config: Published, kinds: list[str] | None = None, *, sandwich: bool = False, **options: Any
) -> TransformerConfig:
    """Returns what the Gemmas share."""
    around = Spec(nn.RMSNorm, eps=config["rms_norm_eps"], offset=1.0)
    after = around if sandwich else None
    cap = config.get("attn_logit_softcapping")
    scalar = config["query_pre_attn_scalar"] if sandwich else config["head_dim"]
    activation = config.get("hidden_activation") or config["hidden_act"]
    return _llama_like(
        changed(config, hidden_act=activation, tie_word_embeddings=True),
        kinds,
        layer=lambda *blocks: Layer([Branch(each, around, norm_after=after) for each in blocks]),
        of_model={"embed": Spec(nn.TokenEmbedding, scale=config["hidden_size"] ** 0.5), "norm": around},
        cap=config.get("final_logit_softcapping"),
        score=Dot(scalar**-0.5),
        score_maps=() if cap is None else (SoftCap(cap),),
        **options,
    )


def _llama_like(
    config: Published,
    kinds: list[str] | None = None,
    *,
    layer: Callable[..., Layer] | None = None,
    ropes: Mapping[str, Published] | None = None,
    of_model: Mapping[str, Any] = {},
    cap: float | None = None,
    **options: Any,
) -> TransformerConfig:
    """Returns what Llama and its kin share: rotary positions, grouped heads, and gated blocks.

    Args:
        config: The numbers of config.json.
        kinds: The kind of attention of each layer; None for full attention.
        layer: A function from attention and feed-forward block to a layer, by default with RMSNorm before each.
        ropes: The kind of attention -> what is said of its rotary positions; by default `rope_of` the config.
        of_model: Arguments of the model's config.
        cap: The cap of the logits.
        options: Arguments of attention.
    """
    around = Spec(nn.RMSNorm, eps=config["rms_norm_eps"])
    kinds = [FULL] * config["num_hidden_layers"] if kinds is None else kinds
    block = Spec(
        nn.FeedForward, hidden=config["intermediate_size"], activation=activation_of(config["hidden_act"]), gated=True
    )

    def made(kind: str) -> Layer:
        attention = _attention(config, kind, rope_of(config) if ropes is None else ropes[kind], **options)
        return pre_norm(attention, block, around) if layer is None else layer(attention, block)

    said: dict[str, Any] = {"norm": around} | dict(of_model)
    return TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["hidden_size"],
        layers=[made(kind) for kind in kinds],
        head=Spec(nn.Head, tied=config.get("tie_word_embeddings", False), cap=cap),
        **said,
    )


def _attention(config: Published, kind: str, rope: Published, **options: Any) -> Spec:
    """Returns attention of grouped heads that are rotated, in a window where the kind says so."""
    heads = config["num_attention_heads"]
    near = {"mask": Window(config["sliding_window"] - 1)} if kind == SLIDING else {}
    return Spec(
        nn.MultiHeadAttention,
        heads=heads,
        key_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        position=rotary_of(rope),
        **near,
        **options,
    )


@of_published
def gpt_oss(config: Published) -> TransformerConfig:
    """Refuses gpt-oss (OpenAI, 2025), for which there is no mixture of experts here: see `gpt_oss_attention`."""
    raise ValueError(
        "config has model_type='gpt_oss', whose blocks are mixtures of experts, which there are none of here: need "
        "another model, or gpt_oss_attention and gpt_oss_table for its attention alone"
    )


def gpt_oss_attention(config: Published, layer: int) -> Spec:
    """Returns the attention of a layer of gpt-oss (OpenAI, 2025).

    Each head has a learned logit that takes weight and reads nothing (a sink). The maps have biases. The positions are
    rotated as YaRN says, and every other layer has a window, beginning with the first.
    """
    config = Numbers(config)
    refuse(config, attention_bias=True)
    alternating = [(SLIDING, FULL)[number % 2] for number in range(config["num_hidden_layers"])]
    kind = kinds_of_layers(config, alternating)[layer]
    return _attention(config, kind, rope_of(config), use_bias=True, normalize=Spec(nn.NullSoftmax))


def gpt_oss_table(config: Published) -> Table:
    """Returns the names of the attention of gpt-oss."""
    name = "model.layers.*.self_attn"
    table: Table = {f"{name}.sinks": Row(f"{MIXER}.module.normalize.null_logit")}
    for ours, published in OF_ATTENTION.items():
        table |= linear(f"{name}.{published}", f"{MIXER}.module.{ours}", bias=True)
    return table


def llama_table(config: Published) -> Table:
    """Returns the names of Llama and Mistral."""
    return _llama_names(config.get("tie_word_embeddings", False)) | _norms_before()


def qwen2_table(config: Published) -> Table:
    """Returns the names of Qwen 2: those of Llama, with biases."""
    attention = "model.layers.*.self_attn"
    rows = {f"{attention}.{OF_ATTENTION[name]}.bias": Row(f"{MIXER}.module.{name}.bias") for name in QKV}
    return llama_table(config) | rows


def qwen3_table(config: Published) -> Table:
    """Returns the names of Qwen 3: those of Llama, and of the norms of queries and keys."""
    return llama_table(config) | _norms_of_heads()


def olmo2_table(config: Published) -> Table:
    """Returns the names of OLMo 2: those of Llama, with norms after the blocks, and of all queries and all keys."""
    tied = config.get("tie_word_embeddings", False)
    return _llama_names(tied) | _norms_after() | _norms_of_heads(".norm")


def gemma_table(config: Published) -> Table:
    """Returns the names of Gemma 1: those of Llama, tied."""
    return _llama_names(tied=True) | _norms_before()


def gemma2_table(config: Published) -> Table:
    """Returns the names of Gemma 2: those of Llama, with four norms in each layer."""
    layer = "model.layers.*"
    return (
        _llama_names(tied=True)
        | norm(f"{layer}.input_layernorm", f"{MIXER}.norm")
        | norm(f"{layer}.pre_feedforward_layernorm", f"{BLOCK}.norm")
        | _norms_after()
    )


def gemma3_table(config: Published) -> Table:
    """Returns the names of Gemma 3: those of Gemma 2, and of the norms of queries and keys."""
    return gemma2_table(config) | _norms_of_heads()


def head_table(*, tied: bool, name: str = "lm_head") -> Table:
    """Returns the row of the head: a map of its own, or where tied a second name of the embedding."""
    return {f"{name}.weight": Row("embed.table", copy=True)} if tied else linear(name, "head.map")


def _llama_names(tied: bool) -> Table:
    blocks = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    table: Table = {"model.embed_tokens.weight": Row("embed.table")} | norm("model.norm", "norm")
    for ours, name in OF_ATTENTION.items():
        table |= linear(f"model.layers.*.self_attn.{name}", f"{MIXER}.module.{ours}")
    for ours, name in blocks.items():
        table |= linear(f"model.layers.*.mlp.{name}", f"{BLOCK}.module.{ours}")
    return table | head_table(tied=tied)


def _norms_before() -> Table:
    return norm("model.layers.*.input_layernorm", f"{MIXER}.norm") | norm(
        "model.layers.*.post_attention_layernorm", f"{BLOCK}.norm"
    )


def _norms_after() -> Table:
    return norm("model.layers.*.post_attention_layernorm", f"{MIXER}.norm_after") | norm(
        "model.layers.*.post_feedforward_layernorm", f"{BLOCK}.norm_after"
    )


def _norms_of_heads(inside: str = "") -> Table:
    attention = "model.layers.*.self_attn"
    return norm(f"{attention}.q_norm", f"{MIXER}.module.query_norm{inside}") | norm(
        f"{attention}.k_norm", f"{MIXER}.module.key_norm{inside}"
    )


@of_published
def gpt_neox(config: Published) -> TransformerConfig:
    """Returns the config of GPT-NeoX (Black et al., 2022) and Pythia.

    Attention and feed-forward block are in parallel, and part of the channels is rotated.
    """
    refuse(config, attention_bias=True)
    rope = rope_of(config)
    if "rope_parameters" not in config:
        rope |= {"rope_theta": config["rotary_emb_base"], "partial_rotary_factor": config["rotary_pct"]}
    around = Spec(nn.LayerNorm, eps=config["layer_norm_eps"])
    attention = Spec(
        nn.MultiHeadAttention,
        heads=config["num_attention_heads"],
        position=rotary_of(rope),
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
    return table | head_table(tied=config.get("tie_word_embeddings", False), name="embed_out")
