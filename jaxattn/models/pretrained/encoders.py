"""Published encoders and encoder-decoders: configs and tables of names, as in `decoders.py`."""

from typing import Any

import numpy as np

from jaxattn import nn
from jaxattn.core.attend.score import Dot
from jaxattn.models.config import Branch, Layer, TransformerConfig, pre_norm
from jaxattn.models.pretrained.decoders import (
    BLOCK,
    MIXER,
    QKV,
    Numbers,
    Published,
    activation_of,
    biased_block,
    changed,
    of_published,
    refuse,
)
from jaxattn.models.pretrained.weights import (
    CONVOLUTION,
    FIRST_ROW,
    TRANSPOSED,
    Layout,
    Row,
    Table,
    linear,
    norm,
    stacked,
)
from jaxattn.nn.spec import Spec

HEADS = ("ForPreTraining", "ForMaskedLM", "ForSequenceClassification")
"""What BERT and its kin are for, besides vectors. Of the first the guesses of masked tokens are kept."""

ROBERTAS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
"""The `model_type` of RoBERTa and its kin -> what the names of their classes begin with."""

SHARED = Row("decoder.embed.table", copy=True)
"""A second name of the embedding of the decoder."""


def purpose_of(config: Published, family: str, *more: str) -> str:
    """Returns what a model is for, from the name of its class in `architectures`: "Model" is the plain one.

    Args:
        config: The numbers of config.json.
        family: What the name of the class begins with.
        more: The other purposes of the family that there are here.

    Raises:
        ValueError: The class is another.
    """
    given = config.get("architectures") or [f"{family}Model"]
    purposes = {f"{family}{purpose}": purpose for purpose in ("Model", *more)}
    if len(given) != 1 or given[0] not in purposes:
        raise ValueError(f"config has architectures={given}: need one of {sorted(purposes)}")
    return purposes[given[0]]


def classes_of(config: Published) -> int:
    """Returns the number of classes. A file leaves out their names where there are two without any."""
    return len(config.get("id2label") or range(2))


@of_published
def bert(config: Published) -> TransformerConfig:
    """Returns the config of BERT (Devlin et al., 2019), of MiniLM, and of rankers made of them (cross-encoders).

    The model has norms of the sums, learned positions and token types. Its output is that of the pooler, classes made
    of that, or guesses of masked tokens, as `architectures` says. The vectors of all tokens are at the site
    `final_norm`.
    """
    refuse(config, position_embedding_type="absolute", is_decoder=False)
    return _bert_like(config, _head(config, "Bert"))


@of_published
def roberta(config: Published) -> TransformerConfig:
    """Returns the config of RoBERTa (Liu et al., 2019) and XLM-RoBERTa (Conneau et al., 2020).

    The model is BERT, with positions that begin behind that of padding.
    """
    refuse(config, position_embedding_type="absolute", is_decoder=False)
    offset = config["pad_token_id"] + 1
    head = _head(changed(config, hidden_act="gelu"), ROBERTAS[config["model_type"]])
    return _bert_like(
        config,
        head,
        length=config["max_position_embeddings"] - offset,
        positions=Spec(nn.PositionEmbedding, offset=offset),
    )


@of_published
def albert(config: Published) -> TransformerConfig:
    """Returns the config of ALBERT (Lan et al., 2020): BERT with a narrow embedding, and one layer that runs again and
    again.
    """
    refuse(config, position_embedding_type="absolute", num_hidden_groups=1, inner_group_num=1)
    inner = config["embedding_size"]
    return _bert_like(config, _head(config, "Albert", inner=inner), embed_width=inner, shared=True)


def _head(config: Published, family: str, **options: Any) -> Spec:
    purpose = purpose_of(config, family, *HEADS)
    if purpose == "Model":
        return Spec(nn.Pooler)
    if purpose == "ForSequenceClassification":
        return Spec(nn.Pooler, classes=classes_of(config))
    refuse(config, tie_word_embeddings=True)
    activation = activation_of(config["hidden_act"])
    return Spec(nn.MaskedTokenHead, activation=activation, eps=config["layer_norm_eps"], **options)


def _bert_like(config: Published, head: Spec, **options: Any) -> TransformerConfig:
    around = Spec(nn.LayerNorm, eps=config["layer_norm_eps"])
    layer = Layer([Branch(each, None, norm_sum=around) for each in _plain(config)])
    said: dict[str, Any] = {"length": config["max_position_embeddings"], "positions": Spec(nn.PositionEmbedding)}
    return TransformerConfig(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        layers=[layer] * config["num_hidden_layers"],
        causal=False,
        embed=Spec(nn.TokenEmbedding, types=config["type_vocab_size"]),
        embed_norm=around,
        norm=None,
        head=head,
        **(said | options),
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
    guess = "cls.predictions"
    masked = _guesses(f"{guess}.transform.dense", f"{guess}.transform.LayerNorm", guess)
    of_head = _head_table(config, "Bert", "bert.pooler.dense", ("bert.pooler.dense", "classifier"), masked)
    return _embeddings("bert") | _layers_of_bert("bert") | of_head


def roberta_table(config: Published) -> Table:
    """Returns the names of RoBERTa and XLM-RoBERTa."""
    masked = _guesses("lm_head.dense", "lm_head.layer_norm", "lm_head")
    classifier = ("classifier.dense", "classifier.out_proj")
    of_head = _head_table(config, ROBERTAS[config["model_type"]], "roberta.pooler.dense", classifier, masked)
    return _embeddings("roberta") | _layers_of_bert("roberta") | of_head


def albert_table(config: Published) -> Table:
    """Returns the names of ALBERT, whose layers have one set of parameters."""
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    mixer, block = (name.replace("*", "0") for name in (MIXER, BLOCK))
    table = _embeddings("albert") | linear("albert.encoder.embedding_hidden_mapping_in", "embed_map", bias=True)
    names = {**{name: name for name in QKV}, "out": "dense"}
    for ours, name in names.items():
        table |= linear(f"{layer}.attention.{name}", f"{mixer}.module.{ours}", bias=True)
    table |= norm(f"{layer}.attention.LayerNorm", f"{mixer}.norm_sum", bias=True)
    table |= linear(f"{layer}.ffn", f"{block}.module.up", bias=True)
    table |= linear(f"{layer}.ffn_output", f"{block}.module.down", bias=True)
    table |= norm(f"{layer}.full_layer_layer_norm", f"{block}.norm_sum", bias=True)
    masked = _guesses("predictions.dense", "predictions.LayerNorm", "predictions")
    return table | _head_table(config, "Albert", "albert.pooler", ("albert.pooler", "classifier"), masked)


def _embeddings(prefix: str) -> Table:
    name = f"{prefix}.embeddings"
    table = {
        f"{name}.word_embeddings.weight": Row("embed.table"),
        f"{name}.position_embeddings.weight": Row("positions.table"),
        f"{name}.token_type_embeddings.weight": Row("embed.types"),
    }
    return table | norm(f"{name}.LayerNorm", "embed_norm", bias=True)


def _layers_of_bert(prefix: str) -> Table:
    layer = f"{prefix}.encoder.layer.*"
    return (
        _plain_table(layer, "attention.self")
        | norm(f"{layer}.attention.output.LayerNorm", f"{MIXER}.norm_sum", bias=True)
        | norm(f"{layer}.output.LayerNorm", f"{BLOCK}.norm_sum", bias=True)
    )


def _head_table(config: Published, family: str, pooler: str, classifier: tuple[str, str], masked: Table) -> Table:
    """Returns the names of the head that the class of the model has, from those of all its kinds."""
    purpose = purpose_of(config, family, *HEADS)
    if purpose == "Model":
        return linear(pooler, "head.map", bias=True)
    first, second = classifier
    classes = linear(first, "head.map", bias=True) | linear(second, "head.classes", bias=True)
    return classes if purpose == "ForSequenceClassification" else masked


def _guesses(dense: str, around: str, decoder: str) -> Table:
    """Returns the names of a head for masked tokens, with second names of the embedding and the bias."""
    return (
        linear(dense, "head.map", bias=True)
        | norm(around, "head.norm", bias=True)
        | {f"{decoder}.bias": Row("head.bias")}
        | {f"{decoder}.decoder.bias": Row("head.bias", copy=True)}
        | {f"{decoder}.decoder.weight": Row("embed.table", copy=True)}
    )


@of_published
def vit(config: Published) -> TransformerConfig:
    """Returns the config of ViT (Dosovitskiy et al., 2021): patches behind a class token.

    The classes are the logits of the class token; a plain model has the pooler's output instead.
    """
    refuse(config, pooler_act="tanh")
    plain = purpose_of(config, "ViT", "ForImageClassification") == "Model"
    around = Spec(nn.LayerNorm, eps=config["layer_norm_eps"])
    layer = pre_norm(*_plain(config, _biased(config)), around)
    head = Spec(nn.Pooler) if plain else Spec(nn.Head, use_bias=True)
    return _of_patches(config, layer, head, 1 if plain else classes_of(config))


@of_published
def dinov2(config: Published) -> TransformerConfig:
    """Returns the config of DINOv2 (Oquab et al., 2024): ViT with learned gains of what each block adds (LayerScale).

    The outputs are the normed vectors of the class token and of the patches.
    """
    purpose_of(config, "Dinov2")
    around = Spec(nn.LayerNorm, eps=config["layer_norm_eps"])
    width = config["hidden_size"]
    attention, block = _plain(changed(config, intermediate_size=int(width * config["mlp_ratio"])), _biased(config))
    if config["use_swiglu_ffn"]:
        block = Spec(nn.FeedForward, hidden=_gated_size(config), activation="silu", gated=True, use_bias=True)
    layer = Layer([Branch(each, around, scale=1.0) for each in (attention, block)])
    return _of_patches(config, layer, None)


def _gated_size(config: Published) -> int:
    return -(-int(int(config["hidden_size"] * config["mlp_ratio"]) * 2 / 3) // 8) * 8


def _biased(config: Published) -> tuple[str, ...]:
    return (*QKV, "out") if config.get("qkv_bias", True) else ("out",)


def _of_patches(config: Published, layer: Layer, head: Spec | None, classes: int = 1) -> TransformerConfig:
    size, patch = config["image_size"], config["patch_size"]
    return TransformerConfig(
        vocabulary=classes,
        length=(size // patch) ** 2 + 1,
        width=config["hidden_size"],
        layers=[layer] * config["num_hidden_layers"],
        causal=False,
        embed=Spec(nn.PatchEmbedding, patch=(patch, patch), channels=config["num_channels"], size=(size, size)),
        positions=Spec(nn.PositionEmbedding),
        norm=Spec(nn.LayerNorm, eps=config["layer_norm_eps"]),
        head=head,
    )


def vit_table(config: Published) -> Table:
    """Returns the names of ViT."""
    layer = "vit.encoder.layer.*"
    plain = purpose_of(config, "ViT", "ForImageClassification") == "Model"
    classes: Table = {"classifier.weight": Row("head.map.kernel", TRANSPOSED), "classifier.bias": Row("head.bias")}
    return (
        _patches("vit.embeddings", config)
        | _plain_table(layer, "attention.attention", biased=config.get("qkv_bias", True))
        | norm(f"{layer}.layernorm_before", f"{MIXER}.norm", bias=True)
        | norm(f"{layer}.layernorm_after", f"{BLOCK}.norm", bias=True)
        | norm("vit.layernorm", "norm", bias=True)
        | (linear("vit.pooler.dense", "head.map", bias=True) if plain else classes)
    )


def dinov2_table(config: Published) -> Table:
    """Returns the names of DINOv2. The two inner maps of a gated block are published as one."""
    layer, block = "encoder.layer.*", f"{BLOCK}.module"
    attention = f"{layer}.attention"
    table = _patches("embeddings", config) | linear(f"{attention}.output.dense", f"{MIXER}.module.out", bias=True)
    for name in QKV:
        biased = config.get("qkv_bias", True)
        table |= linear(f"{attention}.attention.{name}", f"{MIXER}.module.{name}", bias=biased)
    if config["use_swiglu_ffn"]:
        for kind, published in (("kernel", "weight"), ("bias", "bias")):
            both = tuple(f"{block}.{name}.{kind}" for name in ("gate", "up"))
            table |= {f"{layer}.mlp.weights_in.{published}": Row(both, stacked(*[_gated_size(config)] * 2))}
        table |= linear(f"{layer}.mlp.weights_out", f"{block}.down", bias=True)
    else:
        table |= linear(f"{layer}.mlp.fc1", f"{block}.up", bias=True)
        table |= linear(f"{layer}.mlp.fc2", f"{block}.down", bias=True)
    for number, branch in ((1, MIXER), (2, BLOCK)):
        table |= norm(f"{layer}.norm{number}", f"{branch}.norm", bias=True)
        table |= {f"{layer}.layer_scale{number}.lambda1": Row(f"{branch}.scale")}
    return table | norm("layernorm", "norm", bias=True)


def _patches(name: str, config: Published) -> Table:
    """Returns the names of patches, whose map is published as a convolution, [out, channels, height, width]."""
    size, channels, width = config["patch_size"], config["num_channels"], config["hidden_size"]

    def rows(x: np.ndarray) -> tuple[np.ndarray]:
        return (x.transpose(2, 3, 1, 0).reshape(-1, width),)

    def convolution(x: np.ndarray) -> np.ndarray:
        return x.reshape(size, size, channels, width).transpose(3, 2, 0, 1)

    return {
        f"{name}.cls_token": Row("embed.class_token", FIRST_ROW),
        f"{name}.position_embeddings": Row("positions.table", FIRST_ROW),
        f"{name}.patch_embeddings.projection.weight": Row("embed.map.kernel", Layout(rows, convolution)),
        f"{name}.patch_embeddings.projection.bias": Row("embed.map.bias"),
    }


@of_published
def t5(config: Published) -> tuple[TransformerConfig, TransformerConfig]:
    """Returns the pair (encoder, decoder) of T5 (Raffel et al., 2020), which share their embedding.

    The models have RMSNorm before each block, scores without a scale, and one table of biases by distance for all
    self-attention of a stack. Files of the first T5 leave out what came later.

    Raises:
        ValueError: The kind of the feed-forward blocks is not known.
    """
    config = _whole(config)
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


def _whole(config: Published) -> Numbers:
    """Returns the numbers of T5 as transformers 4 writes all of them.

    In transformers 5 every T5 says that its head is tied. The head is its own where outputs are not scaled.
    """
    first = {
        "feed_forward_proj": "relu",
        "num_decoder_layers": config["num_layers"],
        "relative_attention_max_distance": 128,
    }
    tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return Numbers({**first, **config, "tie_word_embeddings": tied})


def t5_table(config: Published) -> Table:
    """Returns the names of T5."""
    config = _whole(config)
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
