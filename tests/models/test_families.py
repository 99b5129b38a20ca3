"""Configs of published families: both forms of config.json, tied names, and what is refused by name."""

import numpy as np
import pytest
from flax import nnx
from published import GEMMA2, GPT2, LLAMA, NEOX, QWEN3
from published_decoders import GEMMA, GEMMA3, GPT_OSS, MAMBA2, MISTRAL, OLMO2, QWEN2, RWKV7
from published_more import ALBERT, BERT, BERT_MASKED, DINOV2, ROBERTA, T5, T5_GATED, VIT, WHISPER

from jaxattn import Rotary, Window, Yarn
from jaxattn.core.attend import Interpolate
from jaxattn.models import Transformer
from jaxattn.models.pretrained import FAMILIES, assign, decoders, encoders, published, recurrences

FULL, NEAR = "full_attention", "sliding_attention"


def attentions(config):
    """The arguments of the attention of each layer."""
    return [layer.branches[0].module.arguments for layer in config.layers]


def test_rotary_positions_are_read_in_both_forms():
    """transformers 4 has rope_theta beside rope_scaling, and 5 has both in rope_parameters."""
    old = LLAMA.config
    new = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert decoders.llama(new) == decoders.llama(old)
    with pytest.raises(ValueError, match="config has neither rope_theta nor rope_parameters"):
        decoders.qwen3({name: x for name, x in QWEN3.config.items() if name != "rope_theta"})

    old = GEMMA3.config | {"num_hidden_layers": 7, "sliding_window_pattern": 6}
    new = {name: value for name, value in old.items() if not name.startswith("rope") and "pattern" not in name}
    new["rope_parameters"] = {
        FULL: old["rope_scaling"] | {"rope_theta": old["rope_theta"]},
        NEAR: {"rope_type": "default", "rope_theta": old["rope_local_base_freq"]},
    }
    new["layer_types"] = [NEAR] * 5 + [FULL, NEAR]
    assert decoders.gemma3_text(new) == decoders.gemma3_text(old)
    positions = [each["position"] for each in attentions(decoders.gemma3_text(old))]
    assert positions[4:6] == [Rotary(1000.0), Rotary(50000.0, scaling=Interpolate(8.0))]
    with pytest.raises(ValueError, match=r"config has rope_parameters=.*need those of 'sliding_attention'"):
        decoders.gemma3_text(new | {"rope_parameters": {"rope_theta": 10.0}})


def test_part_of_the_channels_is_rotated_in_both_forms():
    old = NEOX.config
    new = {name: x for name, x in old.items() if not name.startswith("rotary")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    assert decoders.gpt_neox(new) == decoders.gpt_neox(old)
    assert attentions(decoders.gpt_neox(old))[0]["position"] == Rotary(10000.0, 0.25)
    assert attentions(decoders.llama(LLAMA.config | {"partial_rotary_factor": 0.5}))[0]["position"].fraction == 0.5


def test_scalings_of_rotary_positions():
    def read(**said):
        return decoders.rotary_of({"rope_theta": 500.0} | said)

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
    assert read(**yarn) == Rotary(500.0, scaling=Yarn(4.0, 64, truncate=False))
    assert read(type="linear", factor=2.0) == Rotary(500.0, scaling=Interpolate(2.0))
    assert read(rope_type="default") == Rotary(500.0)
    with pytest.raises(ValueError, match="rope_type='dynamic' for its rotary positions: need one of"):
        read(rope_type="dynamic", factor=2.0)
    with pytest.raises(ValueError, match=r"with \['attention_factor'\] missing or not known"):
        read(**yarn, attention_factor=1.5)
    with pytest.raises(ValueError, match="need both of mscale and mscale_all_dim, or none"):
        read(**yarn, mscale=0.7)
    with pytest.raises(ValueError, match=r"with \['original_max_position_embeddings'\] missing or not known"):
        read(rope_type="yarn", factor=2.0)


def test_old_files_of_llama_leave_out_what_came_later():
    """Llama 1 and 2 have no base of the rotation, and Llama 1 no number of key heads."""
    new = ("rope_theta", "rope_scaling", "num_key_value_heads", "attention_bias", "mlp_bias")
    old = {name: x for name, x in LLAMA.config.items() if name not in new}
    every = attentions(decoders.llama(old))
    assert all(each["key_heads"] == each["heads"] and each["position"] == Rotary(10000.0) for each in every)


def test_xlm_roberta_is_roberta():
    other = ROBERTA.config | {"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]}
    family = FAMILIES["xlm-roberta"]
    assert family.configs(other) == encoders.roberta(ROBERTA.config)
    assert family.table(other) == encoders.roberta_table(ROBERTA.config)
    with pytest.raises(
        ValueError, match=r"architectures=\['RobertaForMaskedLM'\]: need one of \['XLMRobertaForMaskedLM'"
    ):
        family.configs(other | {"architectures": ["RobertaForMaskedLM"]})


def test_new_files_write_some_numbers_in_another_way():
    """As transformers 5 does: no infinite number in JSON, and T5 1.1 by the scale of its outputs."""
    limits = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert recurrences.mamba2(MAMBA2.config | limits) == recurrences.mamba2(MAMBA2.config)
    for old in (T5.config, T5_GATED.config):
        new = old | {"tie_word_embeddings": True, "scale_decoder_outputs": old["tie_word_embeddings"]}
        assert encoders.t5(new) == encoders.t5(old)
        assert encoders.t5_table(new) == encoders.t5_table(old)


def test_old_files_of_t5_leave_out_what_came_later():
    later = ("feed_forward_proj", "num_decoder_layers", "relative_attention_max_distance", "tie_word_embeddings")
    config = T5.config | {"num_decoder_layers": 3, "relative_attention_max_distance": 128}
    old = {name: x for name, x in config.items() if name not in later}
    assert encoders.t5(old) == encoders.t5(config)
    assert encoders.t5_table(old).keys() == encoders.t5_table(config).keys()


@pytest.mark.parametrize(
    ("make", "config", "windows"),
    [
        (decoders.mistral, MISTRAL.config, [10, 10]),
        (decoders.mistral, MISTRAL.config | {"sliding_window": None}, [None, None]),
        (decoders.qwen2, QWEN2.config, [None, 12, 12]),
        (decoders.qwen2, QWEN2.config | {"use_sliding_window": False}, [None] * 3),
        (decoders.qwen2, QWEN2.config | {"layer_types": [NEAR, FULL, NEAR]}, [12, None, 12]),
        (decoders.qwen3, QWEN3.config | {"use_sliding_window": True, "sliding_window": 5}, [None, None]),
        (decoders.gemma2, GEMMA2.config, [6, None, 6]),
        (decoders.gemma2, GEMMA2.config | {"layer_types": [FULL, NEAR, FULL]}, [None, 6, None]),
        (decoders.gemma3_text, GEMMA3.config, [8, 8, None]),
    ],
)
def test_windows(make, config, windows):
    """A window of W keys counts the query itself."""
    masks = [each.get("mask") for each in attentions(make(config))]
    assert masks == [None if left is None else Window(left) for left in windows]


def test_sizes_of_rwkv7_that_a_file_leaves_out():
    """Hidden units are a multiple of 32, heads are counted or measured, and the eps goes with the channels of one."""
    config = RWKV7.config | {"intermediate_size": None, "fuse_norm": False, "head_dim": None, "num_heads": 8}
    mixer, block = (
        branch.module.arguments for branch in recurrences.rwkv7(config | {"value_dim": 40}).layers[1].branches
    )
    assert (mixer["heads"], mixer["eps"], mixer["unit_eps"], mixer["keys_from"]) == (8, 0.05, 1e-24, "layer")
    assert block["hidden"] == 160
    assert recurrences.rwkv7(RWKV7.config).layers[0].branches[1].module.arguments["hidden"] == 66


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (decoders.llama, LLAMA.config | {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        (decoders.llama, LLAMA.config | {"rope_interleaved": True}, "config has rope_interleaved=True: need False"),
        (decoders.llama, LLAMA.config | {"sliding_window": 4}, "config has sliding_window=4: need None"),
        (decoders.mistral, MISTRAL.config | {"layer_types": [NEAR] * 2}, "config has layer_types="),
        (
            decoders.qwen2,
            QWEN2.config | {"use_sliding_window": False, "layer_types": [NEAR] * 3},
            "with use_sliding_window=False and sliding_window=13: need a window",
        ),
        (decoders.olmo2, OLMO2.config | {"attention_bias": True}, "config has attention_bias=True: need False"),
        (decoders.gemma, GEMMA.config | {"hidden_activation": "mish"}, "the activation 'mish' is not known"),
        (decoders.gemma2, GEMMA2.config | {"layer_types": [FULL]}, r"layer_types=\['full_attention'\]: need 3 of"),
        (
            decoders.gemma3_text,
            GEMMA3.config | {"use_bidirectional_attention": True},
            "config has use_bidirectional_attention=True: need False",
        ),
        (
            encoders.bert,
            BERT.config | {"architectures": ["BertForQuestionAnswering"]},
            r"config has architectures=\['BertForQuestionAnswering'\]: need one of \['BertForMaskedLM', ",
        ),
        (
            encoders.bert,
            BERT_MASKED.config | {"tie_word_embeddings": False},
            "config has tie_word_embeddings=False: need True",
        ),
        (lambda config: decoders.gpt_oss_attention(config, 0), GPT_OSS.config | {"attention_bias": False}, "need True"),
        (recurrences.mamba2, MAMBA2.config | {"n_groups": 8}, "config has n_groups=8: need 1"),
        (recurrences.mamba2, MAMBA2.config | {"time_step_limit": [0.0, 0.1]}, r"need \[0.0, inf\], no limit"),
        (recurrences.mamba2, MAMBA2.config | {"head_dim": 13}, "config has 5 heads of head_dim=13: need 60 channels"),
        (recurrences.rwkv7, RWKV7.config | {"value_dim": 80}, "config has value_dim=80: need 40 in each layer"),
        (recurrences.rwkv7, RWKV7.config | {"norm_first": False}, "config has norm_first=False: need True"),
        (encoders.roberta, ROBERTA.config | {"is_decoder": True}, "config has is_decoder=True: need False"),
        (encoders.albert, ALBERT.config | {"num_hidden_groups": 2}, "config has num_hidden_groups=2: need 1"),
        (
            encoders.dinov2,
            DINOV2.config | {"architectures": ["Dinov2ForImageClassification"]},
            r"need one of \['Dinov2M",
        ),
    ],
)
def test_options_that_no_model_has_are_refused(make, config, message):
    with pytest.raises(ValueError, match=message):
        make(config)


@pytest.mark.parametrize(
    "family",
    [GPT2, LLAMA, QWEN2, GEMMA3, OLMO2, NEOX, MAMBA2, RWKV7, BERT, ROBERTA, ALBERT, VIT, DINOV2, T5, WHISPER],
)
def test_a_missing_number_is_named_with_its_family(family):
    kind = family.config["model_type"]
    names = ("n_layer", "num_hidden_layers", "num_layers", "encoder_layers")
    (name,) = (each for each in names if each in family.config)
    config = {each: x for each, x in family.config.items() if each != name}
    with pytest.raises(ValueError, match=f"config of model_type='{kind}' has no '{name}'"):
        FAMILIES[kind].configs(config)


def test_a_tied_head_may_stand_under_either_name():
    """A file holds the embedding, the head, or both with the same numbers; two that differ are a contradiction."""
    table = decoders.qwen2_table(QWEN2.config)
    model = Transformer(decoders.qwen2(QWEN2.config), rngs=nnx.Rngs(0))
    weights = {name: x.astype(np.float32) for name, x in QWEN2.weights(0).items()}
    embedding = weights.pop("model.embed_tokens.weight")
    for given in ("model.embed_tokens.weight",), ("lm_head.weight",), ("lm_head.weight", "model.embed_tokens.weight"):
        assign(model, weights | dict.fromkeys(given, embedding), table)
        np.testing.assert_array_equal(model.embed.table[...], embedding)
    assert "lm_head.weight" not in published(model, table)
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1}
    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but by the config"
    ):
        assign(model, weights | both, table)
    with pytest.raises(ValueError, match=r"parameters without weights \['embed\.table'\]"):
        assign(model, weights, table)
