"""More forward passes of published transformers in plain NumPy. See `published.py`.

These are BERT, RoBERTa, ALBERT, ViT, DINOv2, T5 and Whisper.
"""

from typing import Any

import numpy as np
from published import (
    ACTIVATIONS,
    Config,
    Draws,
    Family,
    Weights,
    attend,
    distances,
    layer_norm,
    linear,
    merge,
    rms_norm,
    split,
)


def example_mask(generator: np.random.Generator, length: int, batch: int) -> np.ndarray:
    """[B, S] of ones, then zeros: the first row has no padding, every later row has some unless the length is 1."""
    present = np.concatenate([[length], generator.integers(1, max(length, 2), size=batch - 1)])
    return (np.arange(length) < present[:, None]).astype(int)


def draw_bert(config: Config, draws: Draws) -> None:
    """BERT's names, which are RoBERTa's with another beginning."""
    width, hidden, model = config["hidden_size"], config["intermediate_size"], config["model_type"]
    draws.normal(f"{model}.embeddings.word_embeddings.weight", config["vocab_size"], width)
    draws.normal(f"{model}.embeddings.position_embeddings.weight", config["max_position_embeddings"], width)
    draws.normal(f"{model}.embeddings.token_type_embeddings.weight", config["type_vocab_size"], width)
    draws.norm(f"{model}.embeddings.LayerNorm", width, bias=True)
    for layer in range(config["num_hidden_layers"]):
        block = f"{model}.encoder.layer.{layer}"
        draws.linear(f"{block}.attention.self.query", width, width, scale=1.5, bias=True)
        draws.linear(f"{block}.attention.self.key", width, width, scale=1.5, bias=True)
        draws.linear(f"{block}.attention.self.value", width, width, bias=True)
        draws.linear(f"{block}.attention.output.dense", width, width, bias=True)
        draws.norm(f"{block}.attention.output.LayerNorm", width, bias=True)
        draws.linear(f"{block}.intermediate.dense", hidden, width, bias=True)
        draws.linear(f"{block}.output.dense", width, hidden, bias=True)
        draws.norm(f"{block}.output.LayerNorm", width, bias=True)
    draw_outputs(config, draws)


OUTPUTS = {
    "bert": {
        "pooler": "bert.pooler.dense",
        "first": "bert.pooler.dense",
        "classes": "classifier",
        "guess": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
    },
    "roberta": {
        "pooler": "roberta.pooler.dense",
        "first": "classifier.dense",
        "classes": "classifier.out_proj",
        "guess": "lm_head.dense",
        "norm": "lm_head.layer_norm",
        "bias": "lm_head.bias",
    },
    "albert": {
        "pooler": "albert.pooler",
        "first": "albert.pooler",
        "classes": "classifier",
        "guess": "predictions.dense",
        "norm": "predictions.LayerNorm",
        "bias": "predictions.bias",
    },
}


def draw_outputs(config: Config, draws: Draws) -> None:
    """What comes after the layers: a pooler, classes behind one, or guesses of masked tokens."""
    width, names = config["hidden_size"], OUTPUTS[config["model_type"]]
    if config["architectures"][0].endswith("Model"):
        draws.linear(names["pooler"], width, width, bias=True)
    elif config["architectures"][0].endswith("ForSequenceClassification"):
        draws.linear(names["first"], width, width, bias=True)
        draws.linear(names["classes"], len(config["id2label"]), width, bias=True)
    else:
        inner = config.get("embedding_size", width)
        draws.linear(names["guess"], inner, width, bias=True)
        draws.norm(names["norm"], inner, bias=True)
        draws.normal(names["bias"], config["vocab_size"], scale=0.4)


def outputs(weights: Weights, config: Config, x: np.ndarray) -> dict[str, np.ndarray]:
    """Pooled and classes are of the first token; guesses are products with the embedding of the tokens."""
    names = OUTPUTS[config["model_type"]]
    if config["architectures"][0].endswith("Model"):
        return {"pooler_output": np.tanh(linear(weights, names["pooler"], x[:, 0]))}
    if config["architectures"][0].endswith("ForSequenceClassification"):
        return {"logits": linear(weights, names["classes"], np.tanh(linear(weights, names["first"], x[:, 0])))}
    # RoBERTa has the exact gelu here, whatever its layers have.
    activation = ACTIVATIONS["gelu" if config["model_type"] == "roberta" else config["hidden_act"]]
    hidden = layer_norm(
        weights, names["norm"], activation(linear(weights, names["guess"], x)), config["layer_norm_eps"]
    )
    table = weights[f"{config['model_type']}.embeddings.word_embeddings.weight"]
    return {"logits": hidden @ table.T + weights[names["bias"]]}


def example_bert(config: Config, generator: np.random.Generator, length: int, batch: int) -> dict[str, np.ndarray]:
    """Texts with padding, which in RoBERTa is a token that stands nowhere else."""
    ids = generator.integers(config["vocab_size"], size=(batch, length))
    mask = example_mask(generator, length, batch)
    if config["model_type"] == "roberta":
        ids = np.where(mask == 1, np.maximum(ids, config["pad_token_id"] + 1), config["pad_token_id"])
    kinds = generator.integers(config["type_vocab_size"], size=(batch, length))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}


def embedded(weights: Weights, config: Config, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
    """The normed sum of words, places and kinds. RoBERTa's first place comes behind that of padding."""
    name, length = f"{config['model_type']}.embeddings", input_ids.shape[1]
    first = config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0
    word = weights[f"{name}.word_embeddings.weight"][input_ids]
    position = weights[f"{name}.position_embeddings.weight"][first : first + length]
    kind = weights[f"{name}.token_type_embeddings.weight"][token_type_ids]
    return layer_norm(weights, f"{name}.LayerNorm", word + position + kind, config["layer_norm_eps"])


def bert_layer(weights: Weights, config: Config, names: dict[str, str], x: np.ndarray, visible: Any) -> np.ndarray:
    """Attention and feed-forward with a norm after each sum."""
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]
    query, key, value = (split(linear(weights, names[each], x), heads) for each in ("query", "key", "value"))
    seen = attend(query, key, value, visible, (config["hidden_size"] // heads) ** -0.5)
    x = layer_norm(weights, names["norm"], x + linear(weights, names["out"], merge(seen)), epsilon)
    fed = linear(weights, names["down"], ACTIVATIONS[config["hidden_act"]](linear(weights, names["up"], x)))
    return layer_norm(weights, names["norm after"], x + fed, epsilon)


def bert(
    weights: Weights, config: Config, input_ids: np.ndarray, attention_mask: np.ndarray, token_type_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Devlin et al., 2018, and Liu et al., 2019: norms after each sum, no causal mask.

    Keys where the mask is 0 are hidden.
    """
    x = embedded(weights, config, input_ids, token_type_ids)
    for layer in range(config["num_hidden_layers"]):
        block = f"{config['model_type']}.encoder.layer.{layer}"
        names = {each: f"{block}.attention.self.{each}" for each in ("query", "key", "value")} | {
            "out": f"{block}.attention.output.dense",
            "norm": f"{block}.attention.output.LayerNorm",
            "up": f"{block}.intermediate.dense",
            "down": f"{block}.output.dense",
            "norm after": f"{block}.output.LayerNorm",
        }
        x = bert_layer(weights, config, names, x, attention_mask[:, None, None, :] == 1)
    return {"last_hidden_state": x} | outputs(weights, config, x)


BERT = Family(
    {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": 63,
        "intermediate_size": 94,
        "layer_norm_eps": 0.01,
        "max_position_embeddings": 518,
        "num_attention_heads": 7,
        "num_hidden_layers": 4,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "vocab_size": 113,
    },
    draw_bert,
    example_bert,
    bert,
)
CLASSES = {"id2label": {str(index): f"class {index}" for index in range(5)}}
BERT_CLASSES = BERT.changed(architectures=["BertForSequenceClassification"], num_hidden_layers=1, **CLASSES)
BERT_MASKED = BERT.changed(architectures=["BertForMaskedLM"], num_hidden_layers=1, hidden_act="gelu_new")

ROBERTA = Family(
    BERT.config
    | {
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        "hidden_act": "relu",
        "max_position_embeddings": 516,
        "num_hidden_layers": 1,
        "pad_token_id": 1,
        "type_vocab_size": 1,
    },
    draw_bert,
    example_bert,
    bert,
)
ROBERTA_CLASSES = ROBERTA.changed(architectures=["RobertaForSequenceClassification"], **CLASSES)


def draw_albert(config: Config, draws: Draws) -> None:
    width, hidden, inner = config["hidden_size"], config["intermediate_size"], config["embedding_size"]
    draws.normal("albert.embeddings.word_embeddings.weight", config["vocab_size"], inner)
    draws.normal("albert.embeddings.position_embeddings.weight", config["max_position_embeddings"], inner)
    draws.normal("albert.embeddings.token_type_embeddings.weight", config["type_vocab_size"], inner)
    draws.norm("albert.embeddings.LayerNorm", inner, bias=True)
    draws.linear("albert.encoder.embedding_hidden_mapping_in", width, inner, bias=True)
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    draws.linear(f"{block}.attention.query", width, width, scale=1.5, bias=True)
    draws.linear(f"{block}.attention.key", width, width, scale=1.5, bias=True)
    draws.linear(f"{block}.attention.value", width, width, bias=True)
    draws.linear(f"{block}.attention.dense", width, width, bias=True)
    draws.norm(f"{block}.attention.LayerNorm", width, bias=True)
    draws.linear(f"{block}.ffn", hidden, width, bias=True)
    draws.linear(f"{block}.ffn_output", width, hidden, bias=True)
    draws.norm(f"{block}.full_layer_layer_norm", width, bias=True)
    draw_outputs(config, draws)


def albert(
    weights: Weights, config: Config, input_ids: np.ndarray, attention_mask: np.ndarray, token_type_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Lan et al., 2020: BERT with a narrow embedding and a map from it, and one layer that is run again and again."""
    x = embedded(weights, config, input_ids, token_type_ids)
    x = linear(weights, "albert.encoder.embedding_hidden_mapping_in", x)
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    names = {each: f"{block}.attention.{each}" for each in ("query", "key", "value")} | {
        "out": f"{block}.attention.dense",
        "norm": f"{block}.attention.LayerNorm",
        "up": f"{block}.ffn",
        "down": f"{block}.ffn_output",
        "norm after": f"{block}.full_layer_layer_norm",
    }
    for _ in range(config["num_hidden_layers"]):
        x = bert_layer(weights, config, names, x, attention_mask[:, None, None, :] == 1)
    return {"last_hidden_state": x} | outputs(weights, config, x)


ALBERT = Family(
    {
        "architectures": ["AlbertForMaskedLM"],
        "model_type": "albert",
        "embedding_size": 37,
        "hidden_act": "gelu_new",
        "hidden_size": 66,
        "inner_group_num": 1,
        "intermediate_size": 95,
        "layer_norm_eps": 0.01,
        "max_position_embeddings": 519,
        "num_attention_heads": 6,
        "num_hidden_groups": 1,
        "num_hidden_layers": 3,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "vocab_size": 117,
    },
    draw_albert,
    example_bert,
    albert,
)
ALBERT_MODEL = ALBERT.changed(architectures=["AlbertModel"])


def draw_patches(config: Config, draws: Draws, name: str) -> None:
    width, patch = config["hidden_size"], config["patch_size"]
    kernel = (width, config["num_channels"], patch, patch)
    draws.normal(f"{name}.cls_token", 1, 1, width)
    draws.normal(f"{name}.position_embeddings", 1, 1 + (config["image_size"] // patch) ** 2, width)
    draws.normal(f"{name}.patch_embeddings.projection.weight", *kernel, scale=np.prod(kernel[1:]) ** -0.5)
    draws.normal(f"{name}.patch_embeddings.projection.bias", width, scale=0.4)


def patches(weights: Weights, config: Config, name: str, pixel_values: np.ndarray) -> np.ndarray:
    """One token per patch after a class token, at learned places.

    A convolution whose stride is its width is one product per patch; patches are counted row by row.
    """
    batch, channels, height, width = pixel_values.shape
    patch = config["patch_size"]
    tiles = pixel_values.reshape(batch, channels, height // patch, patch, width // patch, patch)
    flat = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)
    kernel = weights[f"{name}.patch_embeddings.projection.weight"].reshape(config["hidden_size"], -1)
    tokens = flat @ kernel.T + weights[f"{name}.patch_embeddings.projection.bias"]
    first = np.broadcast_to(weights[f"{name}.cls_token"], (batch, 1, config["hidden_size"]))
    return np.concatenate([first, tokens], axis=1) + weights[f"{name}.position_embeddings"]


def draw_vit(config: Config, draws: Draws) -> None:
    width, hidden = config["hidden_size"], config["intermediate_size"]
    draw_patches(config, draws, "vit.embeddings")
    for layer in range(config["num_hidden_layers"]):
        block = f"vit.encoder.layer.{layer}"
        draws.norm(f"{block}.layernorm_before", width, bias=True)
        draws.linear(f"{block}.attention.attention.query", width, width, scale=1.5, bias=config["qkv_bias"])
        draws.linear(f"{block}.attention.attention.key", width, width, scale=1.5, bias=config["qkv_bias"])
        draws.linear(f"{block}.attention.attention.value", width, width, bias=config["qkv_bias"])
        draws.linear(f"{block}.attention.output.dense", width, width, bias=True)
        draws.norm(f"{block}.layernorm_after", width, bias=True)
        draws.linear(f"{block}.intermediate.dense", hidden, width, bias=True)
        draws.linear(f"{block}.output.dense", width, hidden, bias=True)
    draws.norm("vit.layernorm", width, bias=True)
    if config["architectures"] == ["ViTModel"]:
        draws.linear("vit.pooler.dense", width, width, bias=True)
    else:
        draws.linear("classifier", len(config["id2label"]), width, bias=True)


def example_vit(config: Config, generator: np.random.Generator, length: int, batch: int) -> dict[str, np.ndarray]:
    """Images of the size in the config: the number of tokens is fixed, so `length` has no say."""
    size = config["image_size"]
    return {"pixel_values": generator.standard_normal((batch, config["num_channels"], size, size))}


def vit(weights: Weights, config: Config, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """Dosovitskiy et al., 2020: one token per patch after a class token, norms before, classes from the class token."""
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]
    scale = (config["hidden_size"] // heads) ** -0.5
    activation = ACTIVATIONS[config["hidden_act"]]
    x = patches(weights, config, "vit.embeddings", pixel_values)
    for layer in range(config["num_hidden_layers"]):
        block = f"vit.encoder.layer.{layer}"
        normed = layer_norm(weights, f"{block}.layernorm_before", x, epsilon)
        query = split(linear(weights, f"{block}.attention.attention.query", normed), heads)
        key = split(linear(weights, f"{block}.attention.attention.key", normed), heads)
        value = split(linear(weights, f"{block}.attention.attention.value", normed), heads)
        seen = attend(query, key, value, True, scale)
        x = x + linear(weights, f"{block}.attention.output.dense", merge(seen))
        normed = layer_norm(weights, f"{block}.layernorm_after", x, epsilon)
        hidden = activation(linear(weights, f"{block}.intermediate.dense", normed))
        x = x + linear(weights, f"{block}.output.dense", hidden)
    x = layer_norm(weights, "vit.layernorm", x, epsilon)
    if config["architectures"] == ["ViTModel"]:
        return {"pooler_output": np.tanh(linear(weights, "vit.pooler.dense", x[:, 0]))}
    return {"logits": linear(weights, "classifier", x[:, 0])}


# 529 patches and the class token.
VIT = Family(
    {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_act": "gelu",
        "hidden_size": 44,
        "id2label": {str(index): f"class {index}" for index in range(13)},
        "image_size": 115,
        "intermediate_size": 86,
        "label2id": {f"class {index}": index for index in range(13)},
        "layer_norm_eps": 0.01,
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 5,
        "qkv_bias": True,
    },
    draw_vit,
    example_vit,
    vit,
)


VIT_MODEL = VIT.changed(architectures=["ViTModel"])


def draw_dinov2(config: Config, draws: Draws) -> None:
    width, hidden = config["hidden_size"], int(config["hidden_size"] * config["mlp_ratio"])
    draw_patches(config, draws, "embeddings")
    for layer in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{layer}"
        draws.linear(f"{block}.attention.attention.query", width, width, scale=1.5, bias=config["qkv_bias"])
        draws.linear(f"{block}.attention.attention.key", width, width, scale=1.5, bias=config["qkv_bias"])
        draws.linear(f"{block}.attention.attention.value", width, width, bias=config["qkv_bias"])
        draws.linear(f"{block}.attention.output.dense", width, width, bias=True)
        for number in (1, 2):
            draws.norm(f"{block}.norm{number}", width, bias=True)
            draws.normal(f"{block}.layer_scale{number}.lambda1", width, mean=0.5, scale=0.3)
        if config["use_swiglu_ffn"]:
            hidden = (int(int(width * config["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8
            draws.linear(f"{block}.mlp.weights_in", 2 * hidden, width, bias=True)
            draws.linear(f"{block}.mlp.weights_out", width, hidden, bias=True)
        else:
            draws.linear(f"{block}.mlp.fc1", hidden, width, bias=True)
            draws.linear(f"{block}.mlp.fc2", width, hidden, bias=True)
    draws.norm("layernorm", width, bias=True)


def dinov2(weights: Weights, config: Config, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """Oquab et al., 2024: ViT with gains per channel of what each block adds, and in large models gated blocks."""
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]
    scale = (config["hidden_size"] // heads) ** -0.5
    x = patches(weights, config, "embeddings", pixel_values)
    for layer in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{layer}"
        normed = layer_norm(weights, f"{block}.norm1", x, epsilon)
        query, key, value = (
            split(linear(weights, f"{block}.attention.attention.{each}", normed), heads)
            for each in ("query", "key", "value")
        )
        attended = linear(weights, f"{block}.attention.output.dense", merge(attend(query, key, value, True, scale)))
        x = x + weights[f"{block}.layer_scale1.lambda1"] * attended
        normed = layer_norm(weights, f"{block}.norm2", x, epsilon)
        if config["use_swiglu_ffn"]:
            gate, up = np.split(linear(weights, f"{block}.mlp.weights_in", normed), 2, axis=-1)
            fed = linear(weights, f"{block}.mlp.weights_out", ACTIVATIONS["silu"](gate) * up)
        else:
            hidden = ACTIVATIONS[config["hidden_act"]](linear(weights, f"{block}.mlp.fc1", normed))
            fed = linear(weights, f"{block}.mlp.fc2", hidden)
        x = x + weights[f"{block}.layer_scale2.lambda1"] * fed
    return {"last_hidden_state": layer_norm(weights, "layernorm", x, epsilon)}


# 529 patches and the class token.
DINOV2 = Family(
    {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_act": "gelu",
        "hidden_size": 45,
        "image_size": 92,
        "layer_norm_eps": 0.01,
        "layerscale_value": 1.0,
        "mlp_ratio": 2,
        "num_attention_heads": 3,
        "num_channels": 2,
        "num_hidden_layers": 2,
        "patch_size": 4,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    },
    draw_dinov2,
    example_vit,
    dinov2,
)
DINOV2_GATED = DINOV2.changed(use_swiglu_ffn=True, qkv_bias=False)


def t5_buckets(distance: np.ndarray, two_sided: bool, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance (position of the key minus position of the query), from 0 to buckets − 1.

    Two-sided, the second half of the buckets is for keys after the query; one-sided, such keys get bucket 0. On a side
    with b buckets, each distance n < e = ⌊b/2⌋ has a bucket of its own. Longer distances share the widening buckets
    e + ⌊(b − e)·log(n/e)/log(m/e)⌋, and all from m = max_distance on share the last one.
    """
    each = buckets // 2 if two_sided else buckets
    after = np.where(distance > 0, each, 0) if two_sided else 0
    far = np.abs(distance) if two_sided else np.maximum(-distance, 0)
    exact = each // 2
    grown = np.log(np.maximum(far, exact) / exact) / np.log(max_distance / exact) * (each - exact)
    wide = np.minimum(exact + np.floor(grown).astype(int), each - 1)
    return after + np.where(far < exact, far, wide)


def draw_t5_attention(config: Config, draws: Draws, name: str) -> None:
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    # Scores are not divided by √d_kv, so queries and keys are smaller by d_kv^¼ each.
    draws.linear(f"{name}.q", inner, width, scale=1.5 * config["d_kv"] ** -0.25)
    draws.linear(f"{name}.k", inner, width, scale=1.5 * config["d_kv"] ** -0.25)
    draws.linear(f"{name}.v", inner, width)
    draws.linear(f"{name}.o", width, inner)


def draw_t5(config: Config, draws: Draws) -> None:
    width, hidden = config["d_model"], config["d_ff"]
    draws.normal("shared.weight", config["vocab_size"], width)
    for stack, layers in ("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"]):
        attentions = ["SelfAttention"] if stack == "encoder" else ["SelfAttention", "EncDecAttention"]
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        draws.normal(table, config["relative_attention_num_buckets"], config["num_heads"], scale=1.5)
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            for place, attention in enumerate(attentions):
                draw_t5_attention(config, draws, f"{block}.{place}.{attention}")
                draws.norm(f"{block}.{place}.layer_norm", width)
            last = f"{block}.{len(attentions)}"
            ins = ["wi_0", "wi_1"] if config["feed_forward_proj"].startswith("gated-") else ["wi"]
            for name in ins:
                draws.linear(f"{last}.DenseReluDense.{name}", hidden, width)
            draws.linear(f"{last}.DenseReluDense.wo", width, hidden)
            draws.norm(f"{last}.layer_norm", width)
        draws.norm(f"{stack}.final_layer_norm", width)
    if not config["tie_word_embeddings"]:
        draws.linear("lm_head", config["vocab_size"], width, scale=2)


def example_t5(config: Config, generator: np.random.Generator, length: int, batch: int) -> dict[str, np.ndarray]:
    """Encoder inputs of this length with padding, and decoder inputs that are shorter by three tokens."""
    return {
        "input_ids": generator.integers(config["vocab_size"], size=(batch, length)),
        "attention_mask": example_mask(generator, length, batch),
        "decoder_input_ids": generator.integers(config["vocab_size"], size=(batch, max(length - 3, 1))),
    }


def t5(
    weights: Weights, config: Config, input_ids: np.ndarray, attention_mask: np.ndarray, decoder_input_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Raffel et al., 2020: RMS norms before, no scale of the scores, a bias by distance in self-attention.

    The first block of each stack holds the table of that bias for all blocks of the stack. Attention from the decoder
    to the encoder has no such bias.
    """
    epsilon, heads = config["layer_norm_epsilon"], config["num_heads"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, weights[f"{name}.weight"], epsilon)

    def attention(
        name: str, x: np.ndarray, source: np.ndarray, visible: np.ndarray, bias: np.ndarray | float
    ) -> np.ndarray:
        query = split(linear(weights, f"{name}.q", x), heads)
        key = split(linear(weights, f"{name}.k", source), heads)
        value = split(linear(weights, f"{name}.v", source), heads)
        return linear(weights, f"{name}.o", merge(attend(query, key, value, visible, scale=1, bias=bias)))

    def bias_NxTxS(stack: str, length: int) -> np.ndarray:
        buckets = t5_buckets(
            -distances(length),
            stack == "encoder",
            config["relative_attention_num_buckets"],
            config["relative_attention_max_distance"],
        )
        table = weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return table[buckets].transpose(2, 0, 1)

    def feed_forward(name: str, x: np.ndarray) -> np.ndarray:
        if config["feed_forward_proj"] == "gated-gelu":
            # The published checkpoints with this setting were trained with the approximation by tanh.
            gate = ACTIVATIONS["gelu_new"](linear(weights, f"{name}.wi_0", x))
            return linear(weights, f"{name}.wo", gate * linear(weights, f"{name}.wi_1", x))
        return linear(weights, f"{name}.wo", ACTIVATIONS[config["feed_forward_proj"]](linear(weights, f"{name}.wi", x)))

    present_Bx1x1xS = attention_mask[:, None, None, :] == 1
    x = weights["shared.weight"][input_ids]
    bias = bias_NxTxS("encoder", input_ids.shape[1])
    for layer in range(config["num_layers"]):
        block = f"encoder.block.{layer}.layer"
        normed = norm(f"{block}.0.layer_norm", x)
        x = x + attention(f"{block}.0.SelfAttention", normed, normed, present_Bx1x1xS, bias)
        x = x + feed_forward(f"{block}.1.DenseReluDense", norm(f"{block}.1.layer_norm", x))
    encoded = norm("encoder.final_layer_norm", x)

    causal = distances(decoder_input_ids.shape[1]) >= 0
    x = weights["shared.weight"][decoder_input_ids]
    bias = bias_NxTxS("decoder", decoder_input_ids.shape[1])
    for layer in range(config["num_decoder_layers"]):
        block = f"decoder.block.{layer}.layer"
        normed = norm(f"{block}.0.layer_norm", x)
        x = x + attention(f"{block}.0.SelfAttention", normed, normed, causal, bias)
        normed = norm(f"{block}.1.layer_norm", x)
        x = x + attention(f"{block}.1.EncDecAttention", normed, encoded, present_Bx1x1xS, 0.0)
        x = x + feed_forward(f"{block}.2.DenseReluDense", norm(f"{block}.2.layer_norm", x))
    x = norm("decoder.final_layer_norm", x)
    if config["tie_word_embeddings"]:
        logits = x * config["d_model"] ** -0.5 @ weights["shared.weight"].T
    else:
        logits = linear(weights, "lm_head", x)
    return {"logits": logits, "encoder_last_hidden_state": encoded}


T5 = Family(
    {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_ff": 74,
        "d_kv": 9,
        "d_model": 40,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "relu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 0.01,
        "num_decoder_layers": 4,
        "num_heads": 6,
        "num_layers": 3,
        "pad_token_id": 0,
        "relative_attention_max_distance": 45,
        "relative_attention_num_buckets": 14,
        "tie_word_embeddings": True,
        "vocab_size": 131,
    },
    draw_t5,
    example_t5,
    t5,
)
# Version 1.1 and Flan-T5, with the published buckets.
T5_GATED = T5.changed(
    feed_forward_proj="gated-gelu",
    relative_attention_max_distance=128,
    relative_attention_num_buckets=32,
    tie_word_embeddings=False,
)


# No published config has this number: every layer norm of Whisper has this epsilon.
WHISPER_EPSILON = 1e-5


def draw_whisper_attention(draws: Draws, name: str, width: int) -> None:
    draws.linear(f"{name}.q_proj", width, width, scale=1.5, bias=True)
    draws.linear(f"{name}.k_proj", width, width, scale=1.5)
    draws.linear(f"{name}.v_proj", width, width, bias=True)
    draws.linear(f"{name}.out_proj", width, width, bias=True)


def draw_whisper(config: Config, draws: Draws) -> None:
    width, bins = config["d_model"], config["num_mel_bins"]
    draws.normal("model.encoder.conv1.weight", width, bins, 3, scale=(bins * 3) ** -0.5)
    draws.normal("model.encoder.conv1.bias", width, scale=0.4)
    draws.normal("model.encoder.conv2.weight", width, width, 3, scale=(width * 3) ** -0.5)
    draws.normal("model.encoder.conv2.bias", width, scale=0.4)
    draws.normal("model.encoder.embed_positions.weight", config["max_source_positions"], width, scale=0.5)
    # Vectors this small make the fixed epsilon of the first norm visible.
    draws.normal("model.decoder.embed_tokens.weight", config["vocab_size"], width, scale=0.05)
    draws.normal("model.decoder.embed_positions.weight", config["max_target_positions"], width, scale=0.05)
    for stack in "encoder", "decoder":
        for layer in range(config[f"{stack}_layers"]):
            block = f"model.{stack}.layers.{layer}"
            for attention in ["self_attn"] if stack == "encoder" else ["self_attn", "encoder_attn"]:
                draw_whisper_attention(draws, f"{block}.{attention}", width)
                draws.norm(f"{block}.{attention}_layer_norm", width, bias=True)
            draws.linear(f"{block}.fc1", config[f"{stack}_ffn_dim"], width, bias=True)
            draws.linear(f"{block}.fc2", width, config[f"{stack}_ffn_dim"], bias=True)
            draws.norm(f"{block}.final_layer_norm", width, bias=True)
        draws.norm(f"model.{stack}.layer_norm", width, bias=True)


def example_whisper(config: Config, generator: np.random.Generator, length: int, batch: int) -> dict[str, np.ndarray]:
    """Decoder inputs of this length; the number of frames is fixed, twice that of the encoder's positions."""
    frames = 2 * config["max_source_positions"]
    return {
        "input_features": generator.standard_normal((batch, config["num_mel_bins"], frames)),
        "decoder_input_ids": generator.integers(config["vocab_size"], size=(batch, length)),
    }


def convolve(weights: Weights, name: str, x_BxCxF: np.ndarray, stride: int) -> np.ndarray:
    """y[b, o, f] = bias[o] + Σ_c Σ_j W[o, c, j]·x[b, c, stride·f + j − 1] with zeros outside of x, for three taps j."""
    kernel, frames = weights[f"{name}.weight"], x_BxCxF.shape[2]
    padded = np.pad(x_BxCxF, [(0, 0), (0, 0), (1, 1)])
    taps = [kernel[:, :, tap] @ padded[:, :, tap : tap + frames : stride] for tap in range(3)]
    return sum(taps) + weights[f"{name}.bias"][:, None]


def whisper(
    weights: Weights, config: Config, input_features: np.ndarray, decoder_input_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Radford et al., 2022: two convolutions over log-mel frames, norms before, keys without bias, tied head."""
    activation = ACTIVATIONS[config["activation_function"]]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return layer_norm(weights, name, x, WHISPER_EPSILON)

    def attention(name: str, x: np.ndarray, source: np.ndarray, visible: np.ndarray | bool, heads: int) -> np.ndarray:
        query = split(linear(weights, f"{name}.q_proj", x), heads)
        key = split(linear(weights, f"{name}.k_proj", source), heads)
        value = split(linear(weights, f"{name}.v_proj", source), heads)
        seen = attend(query, key, value, visible, (config["d_model"] // heads) ** -0.5)
        return linear(weights, f"{name}.out_proj", merge(seen))

    def feed_forward(block: str, x: np.ndarray) -> np.ndarray:
        return linear(weights, f"{block}.fc2", activation(linear(weights, f"{block}.fc1", x)))

    # These two are exact GELUs whatever activation_function says.
    frames = ACTIVATIONS["gelu"](convolve(weights, "model.encoder.conv1", input_features, stride=1))
    frames = ACTIVATIONS["gelu"](convolve(weights, "model.encoder.conv2", frames, stride=2))
    x = frames.swapaxes(1, 2) + weights["model.encoder.embed_positions.weight"]
    for layer in range(config["encoder_layers"]):
        block = f"model.encoder.layers.{layer}"
        normed = norm(f"{block}.self_attn_layer_norm", x)
        x = x + attention(f"{block}.self_attn", normed, normed, True, config["encoder_attention_heads"])
        x = x + feed_forward(block, norm(f"{block}.final_layer_norm", x))
    encoded = norm("model.encoder.layer_norm", x)

    length, heads = decoder_input_ids.shape[1], config["decoder_attention_heads"]
    causal = distances(length) >= 0
    x = weights["model.decoder.embed_tokens.weight"][decoder_input_ids]
    x = x + weights["model.decoder.embed_positions.weight"][:length]
    for layer in range(config["decoder_layers"]):
        block = f"model.decoder.layers.{layer}"
        normed = norm(f"{block}.self_attn_layer_norm", x)
        x = x + attention(f"{block}.self_attn", normed, normed, causal, heads)
        normed = norm(f"{block}.encoder_attn_layer_norm", x)
        x = x + attention(f"{block}.encoder_attn", normed, encoded, True, heads)
        x = x + feed_forward(block, norm(f"{block}.final_layer_norm", x))
    logits = norm("model.decoder.layer_norm", x) @ weights["model.decoder.embed_tokens.weight"].T
    return {"logits": logits, "encoder_last_hidden_state": encoded}


WHISPER = Family(
    {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": 60,
        "decoder_attention_heads": 3,
        "decoder_ffn_dim": 76,
        "decoder_layers": 4,
        "decoder_start_token_id": 1,
        "encoder_attention_heads": 5,
        "encoder_ffn_dim": 68,
        "encoder_layers": 2,
        "is_encoder_decoder": True,
        "max_source_positions": 514,
        "max_target_positions": 523,
        "num_mel_bins": 10,
        "pad_token_id": 0,
        "scale_embedding": False,
        "vocab_size": 137,
    },
    draw_whisper,
    example_whisper,
    whisper,
)
