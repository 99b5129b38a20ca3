"""More forward passes of published transformers in plain NumPy: BERT and ViT. See `published.py`."""

import numpy as np
from published import (
    ACTIVATIONS,
    Config,
    Draws,
    Family,
    Weights,
    attend,
    layer_norm,
    linear,
    merge,
    split,
)


def example_mask(generator: np.random.Generator, length: int, batch: int) -> np.ndarray:
    """[B, S] of ones, then zeros: the first row has no padding, every later row has some unless the length is 1."""
    present = np.concatenate([[length], generator.integers(1, max(length, 2), size=batch - 1)])
    return (np.arange(length) < present[:, None]).astype(int)


def draw_bert(config: Config, draws: Draws) -> None:
    width, hidden = config["hidden_size"], config["intermediate_size"]
    draws.normal("bert.embeddings.word_embeddings.weight", config["vocab_size"], width)
    draws.normal("bert.embeddings.position_embeddings.weight", config["max_position_embeddings"], width)
    draws.normal("bert.embeddings.token_type_embeddings.weight", config["type_vocab_size"], width)
    draws.norm("bert.embeddings.LayerNorm", width, bias=True)
    for layer in range(config["num_hidden_layers"]):
        block = f"bert.encoder.layer.{layer}"
        draws.linear(f"{block}.attention.self.query", width, width, scale=1.5, bias=True)
        draws.linear(f"{block}.attention.self.key", width, width, scale=1.5, bias=True)
        draws.linear(f"{block}.attention.self.value", width, width, bias=True)
        draws.linear(f"{block}.attention.output.dense", width, width, bias=True)
        draws.norm(f"{block}.attention.output.LayerNorm", width, bias=True)
        draws.linear(f"{block}.intermediate.dense", hidden, width, bias=True)
        draws.linear(f"{block}.output.dense", width, hidden, bias=True)
        draws.norm(f"{block}.output.LayerNorm", width, bias=True)
    draws.linear("bert.pooler.dense", width, width, bias=True)


def example_bert(config: Config, generator: np.random.Generator, length: int, batch: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": generator.integers(config["vocab_size"], size=(batch, length)),
        "attention_mask": example_mask(generator, length, batch),
        "token_type_ids": generator.integers(config["type_vocab_size"], size=(batch, length)),
    }


def bert(
    weights: Weights, config: Config, input_ids: np.ndarray, attention_mask: np.ndarray, token_type_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Devlin et al., 2018: norms after each sum, no causal mask; the pooler reads the first token.

    Keys where the mask is 0 are hidden.
    """
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]
    scale = (config["hidden_size"] // heads) ** -0.5
    activation = ACTIVATIONS[config["hidden_act"]]
    visible_Bx1x1xS = attention_mask[:, None, None, :] == 1
    word = weights["bert.embeddings.word_embeddings.weight"][input_ids]
    position = weights["bert.embeddings.position_embeddings.weight"][: input_ids.shape[1]]
    kind = weights["bert.embeddings.token_type_embeddings.weight"][token_type_ids]
    x = layer_norm(weights, "bert.embeddings.LayerNorm", word + position + kind, epsilon)
    for layer in range(config["num_hidden_layers"]):
        block = f"bert.encoder.layer.{layer}"
        query = split(linear(weights, f"{block}.attention.self.query", x), heads)
        key = split(linear(weights, f"{block}.attention.self.key", x), heads)
        value = split(linear(weights, f"{block}.attention.self.value", x), heads)
        seen = attend(query, key, value, visible_Bx1x1xS, scale)
        attended = linear(weights, f"{block}.attention.output.dense", merge(seen))
        x = layer_norm(weights, f"{block}.attention.output.LayerNorm", x + attended, epsilon)
        fed = linear(weights, f"{block}.output.dense", activation(linear(weights, f"{block}.intermediate.dense", x)))
        x = layer_norm(weights, f"{block}.output.LayerNorm", x + fed, epsilon)
    return {"last_hidden_state": x, "pooler_output": np.tanh(linear(weights, "bert.pooler.dense", x[:, 0]))}


BERT = Family(
    {
        "architectures": ["BertForMaskedLM"],
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


def draw_vit(config: Config, draws: Draws) -> None:
    width, hidden, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    kernel = (width, config["num_channels"], patch, patch)
    patches = (config["image_size"] // patch) ** 2
    draws.normal("vit.embeddings.cls_token", 1, 1, width)
    draws.normal("vit.embeddings.position_embeddings", 1, 1 + patches, width)
    draws.normal("vit.embeddings.patch_embeddings.projection.weight", *kernel, scale=np.prod(kernel[1:]) ** -0.5)
    draws.normal("vit.embeddings.patch_embeddings.projection.bias", width, scale=0.4)
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
    draws.linear("classifier", len(config["id2label"]), width, bias=True)


def example_vit(config: Config, generator: np.random.Generator, length: int, batch: int) -> dict[str, np.ndarray]:
    """Images of the size in the config: the number of tokens is fixed, so `length` has no say."""
    size = config["image_size"]
    return {"pixel_values": generator.standard_normal((batch, config["num_channels"], size, size))}


def vit(weights: Weights, config: Config, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """Dosovitskiy et al., 2020: one token per patch after a class token, norms before, classes from the class token."""
    epsilon, heads, patch = config["layer_norm_eps"], config["num_attention_heads"], config["patch_size"]
    scale = (config["hidden_size"] // heads) ** -0.5
    activation = ACTIVATIONS[config["hidden_act"]]
    batch, channels, height, width = pixel_values.shape
    # A convolution whose stride is its width is one product per patch; patches are counted row by row.
    tiles = pixel_values.reshape(batch, channels, height // patch, patch, width // patch, patch)
    patches = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)
    kernel = weights["vit.embeddings.patch_embeddings.projection.weight"].reshape(config["hidden_size"], -1)
    tokens = patches @ kernel.T + weights["vit.embeddings.patch_embeddings.projection.bias"]
    first = np.broadcast_to(weights["vit.embeddings.cls_token"], (batch, 1, config["hidden_size"]))
    x = np.concatenate([first, tokens], axis=1) + weights["vit.embeddings.position_embeddings"]
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
