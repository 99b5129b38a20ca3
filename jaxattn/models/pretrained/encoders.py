"""Published encoders and encoder-decoders: configs and tables of names, as in `decoders.py`."""

from typing import Any

import numpy as np

from jaxattn import nn
from jaxattn.core.attend.score import Dot
from jaxattn.models.config import Branch, Layer, TransformerConfig, pre_norm
from jaxattn.models.pretrained.decoders import BLOCK, MIXER, QKV, Published, biased_block, of_published, refuse
from jaxattn.models.pretrained.weights import CONVOLUTION, FIRST_ROW, TRANSPOSED, Layout, Row, Table, linear, norm
from jaxattn.nn.spec import Spec

SHARED = Row("decoder.embed.table", copy=True)
"""A second name of the embedding of the decoder."""


@of_published
def bert(config: Published) -> TransformerConfig:
    """Returns the config of BERT (Devlin et al., 2019).

    The model has norms of the sums, learned positions and token types. Its output is that of the pooler; the vectors of
    all tokens are at the site `final_norm`.
    """
    refuse(config, position_embedding_type="absolute", is_decoder=False)
    around = Spec(nn.LayerNorm, eps=config["layer_norm_eps"])
    layer = Layer([Branch(each, None, norm_sum=around) for each in _plain(config)])
    return TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["hidden_size"],
        layers=[layer] * config["num_hidden_layers"],
        causal=False,
        embed=Spec(nn.TokenEmbedding, types=config["type_vocab_size"]),
        positions=Spec(nn.PositionEmbedding),
        embed_norm=around,
        norm=None,
        head=Spec(nn.Pooler),
    )


def _plain(config: Published, use_bias: Any = True) -> tuple[Spec, Spec]:
    """Returns attention without positions, and a feed-forward block, with biases."""
    heads = config["num_attention_heads"]
    attention = Spec(nn.MultiHeadAttention, heads=heads, position=None, use_bias=use_bias)
    return attention, biased_block(config["intermediate_size"], config["hidden_act"])


def _plain_table(layer: str, attention: str, *, biased: bool = True) -> Table:
    """Returns the names of both, with those of queries, keys and values behind `attention`."""
    table: Table = {}
    for name in QKV:
        table |= linear(f"{layer}.{attention}.{name}", f"{MIXER}.module.{name}", bias=biased)
    return (
        table
        | linear(f"{layer}.attention.output.dense", f"{MIXER}.module.out", bias=True)
        | linear(f"{layer}.intermediate.dense", f"{BLOCK}.module.up", bias=True)
        | linear(f"{layer}.output.dense", f"{BLOCK}.module.down", bias=True)
    )


def bert_table(config: Published) -> Table:
    """Returns the names of BERT."""
    embeddings, layer = "bert.embeddings", "bert.encoder.layer.*"
    table: Table = {
        f"{embeddings}.word_embeddings.weight": Row("embed.table"),
        f"{embeddings}.position_embeddings.weight": Row("positions.table"),
        f"{embeddings}.token_type_embeddings.weight": Row("embed.types"),
    }
    table |= norm(f"{embeddings}.LayerNorm", "embed_norm", bias=True)
    return (
        table
        | _plain_table(layer, "attention.self")
        | norm(f"{layer}.attention.output.LayerNorm", f"{MIXER}.norm_sum", bias=True)
        | norm(f"{layer}.output.LayerNorm", f"{BLOCK}.norm_sum", bias=True)
        | linear("bert.pooler.dense", "head.map", bias=True)
    )


@of_published
def vit(config: Published) -> TransformerConfig:
    """Returns the config of ViT (Dosovitskiy et al., 2021): patches behind a class token.

    The classes are the logits of the class token.
    """
    around = Spec(nn.LayerNorm, eps=config["layer_norm_eps"])
    size, patch = config["image_size"], config["patch_size"]
    biased = ("query", "key", "value", "out") if config.get("qkv_bias", True) else ("out",)
    return TransformerConfig(
        vocabulary=len(config["id2label"]),
        length=(size // patch) ** 2 + 1,
        width=config["hidden_size"],
        layers=[pre_norm(*_plain(config, biased), around)] * config["num_hidden_layers"],
        causal=False,
        embed=Spec(nn.PatchEmbedding, patch=(patch, patch), channels=config["num_channels"]),
        positions=Spec(nn.PositionEmbedding),
        norm=around,
        head=Spec(nn.Head, use_bias=True),
    )


def vit_table(config: Published) -> Table:
    """Returns the names of ViT. The map of patches is published as a convolution, [out, channels, height, width]."""
    embeddings, layer, width = "vit.embeddings", "vit.encoder.layer.*", config["hidden_size"]
    size, channels = config["patch_size"], config["num_channels"]

    def rows(x: np.ndarray) -> tuple[np.ndarray]:
        return (x.transpose(2, 3, 1, 0).reshape(-1, width),)

    def convolution(x: np.ndarray) -> np.ndarray:
        return x.reshape(size, size, channels, width).transpose(3, 2, 0, 1)

    patches = f"{embeddings}.patch_embeddings.projection"
    biased = config.get("qkv_bias", True)
    table: Table = {
        f"{embeddings}.cls_token": Row("embed.class_token", FIRST_ROW),
        f"{embeddings}.position_embeddings": Row("positions.table", FIRST_ROW),
        f"{patches}.weight": Row("embed.map.kernel", Layout(rows, convolution)),
        f"{patches}.bias": Row("embed.map.bias"),
        "classifier.weight": Row("head.map.kernel", TRANSPOSED),
        "classifier.bias": Row("head.bias"),
    }
    return (
        table
        | _plain_table(layer, "attention.attention", biased=biased)
        | norm(f"{layer}.layernorm_before", f"{MIXER}.norm", bias=True)
        | norm(f"{layer}.layernorm_after", f"{BLOCK}.norm", bias=True)
        | norm("vit.layernorm", "norm", bias=True)
    )


@of_published
def t5(config: Published) -> tuple[TransformerConfig, TransformerConfig]:
    """Returns the pair (encoder, decoder) of T5 (Raffel et al., 2020), which share their embedding.

    The models have RMSNorm before each block, scores without a scale, and one table of biases by distance for all
    self-attention of a stack.

    Raises:
        ValueError: The kind of the feed-forward blocks is not known.
    """
    kind = config["feed_forward_proj"]
    if kind not in ("relu", "gated-gelu"):
        raise ValueError(f"config has feed_forward_proj={kind!r}: need 'relu' or 'gated-gelu'")
    around = Spec(nn.RMSNorm, eps=config["layer_norm_epsilon"])
    heads = config["num_heads"]
    attention = Spec(nn.MultiHeadAttention, heads=heads, head_dim=config["d_kv"], position=None, score=Dot(1.0))
    block = Spec(
        nn.FeedForward,
        hidden=config["d_ff"],
        activation="relu" if kind == "relu" else "gelu_tanh",
        gated=kind != "relu",
    )
    cross = Branch(attention.replace(keys_from="context"), around, name="cross")
    bias = Spec(
        nn.RelativePositionBias,
        heads=heads,
        buckets=config["relative_attention_num_buckets"],
        max_distance=config["relative_attention_max_distance"],
    )
    tied = config["tie_word_embeddings"]
    shared: dict[str, Any] = {
        "vocabulary": config["vocab_size"],
        "length": config.get("n_positions", 512),
        "width": config["d_model"],
        "norm": around,
    }
    encoder = TransformerConfig(
        **shared,
        layers=[pre_norm(attention, block, around)] * config["num_layers"],
        causal=False,
        bias=bias.replace(bidirectional=True),
        head=None,
    )
    decoder = TransformerConfig(
        **shared,
        layers=[Layer([Branch(attention, around), cross, Branch(block, around)])] * config["num_decoder_layers"],
        bias=bias,
        head=Spec(nn.Head, tied=tied, scale=config["d_model"] ** -0.5 if tied else 1.0),
    )
    return encoder, decoder


def t5_table(config: Published) -> Table:
    """Returns the names of T5."""
    table: Table = {"shared.weight": Row("decoder.embed.table")}
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    for stack, kinds in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        layer, ours = f"{stack}.block.*.layer", f"{stack}.layers.*.branches"
        for place, kind in enumerate(kinds):
            table |= norm(f"{layer}.{place}.layer_norm", f"{ours}.{place}.norm")
            for name, published in names.items():
                table |= linear(f"{layer}.{place}.{kind}.{published}", f"{ours}.{place}.module.{name}")
        last = len(kinds)
        table |= norm(f"{layer}.{last}.layer_norm", f"{ours}.{last}.norm")
        gated = config["feed_forward_proj"] != "relu"
        maps = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
        for name, published in maps.items():
            table |= linear(f"{layer}.{last}.DenseReluDense.{published}", f"{ours}.{last}.module.{name}")
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table |= {first: Row(f"{stack}.bias.table", TRANSPOSED)} | norm(f"{stack}.final_layer_norm", f"{stack}.norm")
    copies = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), SHARED)
    copies |= {"lm_head.weight": SHARED} if config["tie_word_embeddings"] else linear("lm_head", "decoder.head.map")
    return table | copies


@of_published
def whisper(config: Published) -> tuple[TransformerConfig, TransformerConfig]:
    """Returns the pair (encoder, decoder) of Whisper (Radford et al., 2023).

    The models read log-mel frames. They have LayerNorm before each block, and keys without bias.
    """
    refuse(config, scale_embedding=False)
    around = Spec(nn.LayerNorm, eps=1e-5)

    def parts(stack: str) -> tuple[Spec, Spec]:
        attention = Spec(
            nn.MultiHeadAttention,
            heads=config[f"{stack}_attention_heads"],
            position=None,
            use_bias=("query", "value", "out"),
        )
        return attention, biased_block(config[f"{stack}_ffn_dim"], config["activation_function"])

    encoder = TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["max_source_positions"],
        width=config["d_model"],
        layers=[pre_norm(*parts("encoder"), around)] * config["encoder_layers"],
        causal=False,
        embed=Spec(nn.AudioEmbedding, channels=config["num_mel_bins"]),
        positions=Spec(nn.PositionEmbedding),
        norm=around,
        head=None,
    )
    attention, block = parts("decoder")
    cross = Branch(attention.replace(keys_from="context"), around, name="cross")
    decoder = TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["max_target_positions"],
        width=config["d_model"],
        layers=[Layer([Branch(attention, around), cross, Branch(block, around)])] * config["decoder_layers"],
        positions=Spec(nn.PositionEmbedding),
        norm=around,
    )
    return encoder, decoder


def whisper_table(config: Published) -> Table:
    """Returns the names of Whisper. Its convolutions are published as [out, in, width]."""
    table: Table = {"model.decoder.embed_tokens.weight": Row("decoder.embed.table"), "proj_out.weight": SHARED}
    for name, ours in (("conv1", "first"), ("conv2", "second")):
        table |= {f"model.encoder.{name}.weight": Row(f"encoder.embed.{ours}.kernel", CONVOLUTION)}
        table |= {f"model.encoder.{name}.bias": Row(f"encoder.embed.{ours}.bias")}
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    for stack, kinds in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        layer, ours = f"model.{stack}.layers.*", f"{stack}.layers.*.branches"
        table |= {f"model.{stack}.embed_positions.weight": Row(f"{stack}.positions.table")}
        for place, kind in enumerate(kinds):
            table |= norm(f"{layer}.{kind}_layer_norm", f"{ours}.{place}.norm", bias=True)
            for name, published in names.items():
                mine = f"{ours}.{place}.module.{name}"
                table |= linear(f"{layer}.{kind}.{published}", mine, bias=name != "key")
        last = len(kinds)
        table |= norm(f"{layer}.final_layer_norm", f"{ours}.{last}.norm", bias=True)
        table |= linear(f"{layer}.fc1", f"{ours}.{last}.module.up", bias=True)
        table |= linear(f"{layer}.fc2", f"{ours}.{last}.module.down", bias=True)
        table |= norm(f"model.{stack}.layer_norm", f"{stack}.norm", bias=True)
    return table
