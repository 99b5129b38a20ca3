"""Published architectures: their configs compute what plain NumPy does with the same random weights.

Weights come by their published names through the tables, so names and layouts are tested too. In float64, where only
rounding is left.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import GEMMA2, GPT2, LLAMA, LLAMA_TIED, NEOX, NEOX_SEQUENTIAL, QWEN3, QWEN3_TIED
from published_decoders import GEMMA, GEMMA3, GPT_OSS, MAMBA2, MISTRAL, OLMO2, QWEN2, RWKV7
from published_more import (
    ALBERT,
    ALBERT_MODEL,
    BERT,
    BERT_CLASSES,
    BERT_MASKED,
    DINOV2,
    DINOV2_GATED,
    ROBERTA,
    ROBERTA_CLASSES,
    T5,
    T5_GATED,
    VIT,
    VIT_MODEL,
    WHISPER,
)

from jaxattn import nn
from jaxattn.models import (
    EncoderDecoder,
    Spec,
    Transformer,
    TransformerConfig,
    from_plain,
    generate,
    pre_norm,
    to_plain,
)
from jaxattn.models.pretrained import Row, decoders, encoders, recurrences
from jaxattn.models.pretrained.weights import assign, norm, published

B, LENGTH = 2, 512
slow = pytest.mark.slow


def gpt_oss(config):
    """The attention of gpt-oss in a decoder without other blocks."""
    around = Spec(nn.RMSNorm, eps=config["rms_norm_eps"])
    count = config["num_hidden_layers"]
    return TransformerConfig(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["hidden_size"],
        layers=[pre_norm(decoders.gpt_oss_attention(config, layer), None, around) for layer in range(count)],
        norm=around,
        head=None,
    )


def gpt_oss_table(config):
    around = norm("model.layers.*.input_layernorm", "layers.*.branches.0.norm") | norm("model.norm", "norm")
    return decoders.gpt_oss_table(config) | around | {"model.embed_tokens.weight": Row("embed.table")}


CAUSAL = {
    "GPT-2": (GPT2, decoders.gpt2, decoders.gpt2_table),
    "Llama 3": (LLAMA, decoders.llama, decoders.llama_table),
    "Llama, tied": (LLAMA_TIED, decoders.llama, decoders.llama_table),
    "Mistral": (MISTRAL, decoders.mistral, decoders.llama_table),
    "Qwen 2": (QWEN2, decoders.qwen2, decoders.qwen2_table),
    "Qwen 3": (QWEN3, decoders.qwen3, decoders.qwen3_table),
    "Qwen 3, tied": (QWEN3_TIED, decoders.qwen3, decoders.qwen3_table),
    "OLMo 2": (OLMO2, decoders.olmo2, decoders.olmo2_table),
    "Gemma": (GEMMA, decoders.gemma, decoders.gemma_table),
    "Gemma 3": (GEMMA3, decoders.gemma3_text, decoders.gemma3_table),
    "Gemma 2": (GEMMA2, decoders.gemma2, decoders.gemma2_table),
    "gpt-oss, its attention": (GPT_OSS, gpt_oss, gpt_oss_table),
    "Mamba-2": (MAMBA2, recurrences.mamba2, recurrences.mamba2_table),
    "RWKV-7": (RWKV7, recurrences.rwkv7, recurrences.rwkv7_table),
    "GPT-NeoX": (NEOX, decoders.gpt_neox, decoders.gpt_neox_table),
    "GPT-NeoX, sequential": (NEOX_SEQUENTIAL, decoders.gpt_neox, decoders.gpt_neox_table),
}
TEXTS = {
    "BERT": (BERT, encoders.bert, encoders.bert_table),
    "BERT with classes": (BERT_CLASSES, encoders.bert, encoders.bert_table),
    "BERT of masked tokens": (BERT_MASKED, encoders.bert, encoders.bert_table),
    "RoBERTa of masked tokens": (ROBERTA, encoders.roberta, encoders.roberta_table),
    "RoBERTa with classes": (ROBERTA_CLASSES, encoders.roberta, encoders.roberta_table),
    "ALBERT of masked tokens": (ALBERT, encoders.albert, encoders.albert_table),
    "ALBERT": (ALBERT_MODEL, encoders.albert, encoders.albert_table),
}
IMAGES = {
    "ViT": (VIT, encoders.vit, encoders.vit_table),
    "ViT, plain": (VIT_MODEL, encoders.vit, encoders.vit_table),
    "DINOv2": (DINOV2, encoders.dinov2, encoders.dinov2_table),
    "DINOv2, gated": (DINOV2_GATED, encoders.dinov2, encoders.dinov2_table),
}
BOTH = {
    "T5": (T5, encoders.t5, encoders.t5_table),
    "T5 1.1": (T5_GATED, encoders.t5, encoders.t5_table),
    "Whisper": (WHISPER, encoders.whisper, encoders.whisper_table),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def double(model):
    """The model with parameters of 64 bits, in evaluation mode."""
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), params), rest)


def loaded(family, config, table):
    """(model in float64, weights, inputs)."""
    said = config(family.config)
    kind = EncoderDecoder if isinstance(said, tuple) else Transformer
    options = {"share_embedding": True} if family.config["model_type"] == "t5" else {}
    given = said if isinstance(said, tuple) else (said,)
    for each in given:
        assert from_plain(to_plain(each)) == each
    given = [dataclasses.replace(each, dtype="float64") for each in given]
    model = double(kind(*given, **options, rngs=nnx.Rngs(0)))
    weights = family.weights(1)
    assign(model, weights, table(family.config))
    return model, weights


def run(model, *arguments, **options):
    """As the model, compiled."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, arguments, options: nnx.merge(graph, state)(*arguments, **options))(
        state, arguments, options
    )


def assert_equal(actual, expected, shown=None):
    """Equal to 1e-8 of the largest number: a few layers of rounding in float64."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    where = slice(None) if shown is None else shown
    np.testing.assert_allclose(actual[where], expected[where], rtol=0, atol=1e-8 * abs(expected).max())


# What differs in these is in another.
SEEN_ELSEWHERE = (
    *("Llama, tied", "Mistral", "Qwen 3, tied", "Gemma", "GPT-NeoX, sequential", "T5 1.1"),
    *("BERT of masked tokens", "RoBERTa with classes", "ALBERT", "ViT, plain"),
)


def by_name(names):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=slow) if name in SEEN_ELSEWHERE else name for name in names]
    )


@by_name(CAUSAL)
def test_decoders(name):
    """The whole text at once, and the last tokens one by one behind the first."""
    family, config, table = CAUSAL[name]
    model, weights = loaded(family, config, table)
    inputs = family.inputs(2, LENGTH, B)
    ids = inputs["input_ids"]
    (expected,) = family.forward(weights, family.config, **inputs).values()
    assert_equal(run(model, ids)[0], expected)
    state = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, model.init_state(B, LENGTH))
    _, state, _ = run(model, ids[:, :-2], state=state)
    for place in (-2, -1):
        logits, state, _ = run(model, ids[:, place:][:, :1], state=state)
        assert_equal(logits[:, 0], expected[:, place])


@by_name(TEXTS)
def test_encoders_of_texts(name):
    """Two texts of different lengths, the second padded; hidden tokens reach nothing."""
    family, config, table = TEXTS[name]
    model, weights = loaded(family, config, table)
    inputs = family.inputs(2, LENGTH, B)
    shown = inputs["attention_mask"] == 1
    assert not shown.all()
    expected = family.forward(weights, family.config, **inputs)
    positions = np.where(shown, np.arange(LENGTH), -1)
    options = {"positions": positions, "types": inputs["token_type_ids"]}
    graph, state = nnx.split(model)
    result, _, records = jax.jit(
        lambda state, ids, options: nnx.merge(graph, state)(ids, record=("final_norm",), **options)
    )(state, inputs["input_ids"], options)
    (of_head,) = expected.keys() - {"last_hidden_state"}
    assert_equal(result, expected[of_head], shown if result.ndim == 3 else None)
    assert_equal(records["final_norm"], expected["last_hidden_state"], shown)


@by_name(IMAGES)
def test_encoders_of_images(name):
    family, config, table = IMAGES[name]
    model, weights = loaded(family, config, table)
    images = family.inputs(2, LENGTH, B)["pixel_values"]
    ((kind, expected),) = family.forward(weights, family.config, pixel_values=images).items()
    result = run(model, images.transpose(0, 2, 3, 1))[0]
    assert_equal(result[:, 0] if kind == "logits" else result, expected)
    with pytest.raises(ValueError, match=r"for which there are positions"):
        model(images.transpose(0, 2, 3, 1)[:, : 2 * family.config["patch_size"]])


@by_name(BOTH)
def test_encoder_decoders(name):
    """All at once, and token by token with the keys of the encoder's vectors computed once."""
    family, config, table = BOTH[name]
    model, weights = loaded(family, config, table)
    inputs = family.inputs(2, LENGTH, B)
    expected = family.forward(weights, family.config, **inputs)
    ids = inputs["decoder_input_ids"]
    if name == "Whisper":
        given, positions = inputs["input_features"].swapaxes(1, 2), None
    else:
        shown = inputs["attention_mask"] == 1
        assert not shown.all()
        given, positions = inputs["input_ids"], np.where(shown, np.arange(LENGTH), -1)
    logits = run(model, given, ids, input_positions=positions)[0]
    assert_equal(logits, expected["logits"])

    graph, state = nnx.split(model)
    context, _ = jax.jit(lambda state, x: nnx.merge(graph, state).encode(x, positions=positions))(state, given)
    assert_equal(context.x, expected["encoder_last_hidden_state"], None if positions is None else shown)
    held = model.decoder.init_state(B, ids.shape[1])
    _, held, _ = run(model.decoder, ids[:, :-2], state=held, context=context)
    for place in (-2, -1):
        logits, held, _ = run(model.decoder, ids[:, place:][:, :1], state=held)
        assert_equal(logits[:, 0], expected["logits"][:, place])


def test_generation_reads_the_context_once():
    """Greedy tokens of an encoder-decoder are those of the likeliest logits of full passes."""
    family, config, table = BOTH["T5"]
    model, _ = loaded(family, config, table)
    given = family.inputs(3, 9, B)["input_ids"]
    context, _ = model.encode(given)
    prompts = np.zeros((B, 1), np.int32)
    drawn = generate(model.decoder, prompts, max_new_tokens=4, temperature=0.0, context=context)
    ids = prompts
    for _ in range(4):
        likeliest = np.asarray(run(model, given, ids)[0][:, -1].argmax(-1))
        ids = np.concatenate([ids, likeliest[:, None]], 1)
    np.testing.assert_array_equal(drawn.tokens, ids[:, 1:])


def test_names_that_do_not_fit_are_refused():
    family, config, table = CAUSAL["GPT-2"]
    model, weights = loaded(family, config, table)
    names = table(family.config)
    fewer = {name: array for name, array in weights.items() if name != "transformer.h.1.mlp.c_fc.bias"}
    with pytest.raises(ValueError, match=r"parameters without weights \['layers\.1\.branches\.1\.module\.up\.bias'\]"):
        assign(model, fewer, names)
    with pytest.raises(ValueError, match=r"unused names \['transformer\.h\.1\.attn\.mask'\]"):
        assign(model, weights | {"transformer.h.1.attn.mask": np.zeros(3)}, names)
    assign(model, weights | {"transformer.h.1.attn.mask": np.zeros(3)}, names, ignored=["transformer.h.*.attn.mask"])
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight makes \(3, 3\) of positions\.table"):
        assign(model, weights | {"transformer.wpe.weight": np.zeros((3, 3))}, names)
    without = {name: row for name, row in names.items() if name != "transformer.wpe.weight"}
    with pytest.raises(ValueError, match=r"the table has no names for the parameters \['positions\.table'\]"):
        published(model, without)
    with pytest.raises(ValueError, match="the activation 'mish' is not known"):
        config(family.config | {"activation_function": "mish"})
    with pytest.raises(ValueError, match="config has scale_attn_by_inverse_layer_idx=True: need False"):
        config(family.config | {"scale_attn_by_inverse_layer_idx": True})
