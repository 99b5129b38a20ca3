"""Specs: what a config says of classes is what is built, and it goes to YAML and back."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from tiny import assert_close

from jaxattn import Alibi, Causal, Dot, RelativeBias, SoftCap, Softmax, Window, attend, nn
from jaxattn.models import Spec, Transformer, TransformerConfig, from_plain, pre_norm, to_plain
from jaxattn.nn import (
    AdditiveScore,
    BilinearScore,
    HeadMixing,
    KeyQueryConvolution,
    LearnedTemperature,
    NeuralScore,
    NullSoftmax,
    RelativePositionBias,
)

N, D, T, V = 2, 8, 7, 11
TOKENS = np.random.default_rng(0).integers(0, V, (2, T))

YAML = """
vocabulary: 11
length: 7
width: 8
layers:
- branches:
  - module:
      class_path: jaxattn.nn.MultiHeadAttention
      init_args: {heads: 2, position: null, SLOT}
  - module: {class_path: jaxattn.nn.FeedForward, init_args: {hidden: 8}}
"""
# name: (what stands in the YAML, the slot, the type of part that the module makes)
SLOTS = {
    "neural score": ("score: {class_path: jaxattn.nn.NeuralScore, init_args: {hidden: 5}}", "score"),
    "additive score": ("score: {class_path: jaxattn.nn.AdditiveScore, init_args: {hidden: 5}}", "score"),
    "bilinear score": ("score: {class_path: jaxattn.nn.BilinearScore}", "score"),
    "T5 bias": ("bias: {class_path: jaxattn.nn.RelativePositionBias, init_args: {buckets: 6}}", "bias"),
    "ALiBi": ("bias: {class_path: jaxattn.Alibi.geometric}", "bias"),
    "null logit": ("normalize: {class_path: jaxattn.nn.NullSoftmax}", "normalize"),
    "temperature": ("score_maps: [{class_path: jaxattn.nn.LearnedTemperature}]", "score_maps"),
    "key-query convolution": (
        "score_maps: [{class_path: jaxattn.nn.KeyQueryConvolution, init_args: {queries: 2, keys: 3}}]",
        "score_maps",
    ),
    "talking heads": (
        "score_maps: [{class_path: jaxattn.SoftCap, init_args: {cap: 5.0}}, {class_path: jaxattn.nn.HeadMixing}], "
        "weight_maps: [{class_path: jaxattn.nn.HeadMixing}]",
        "weight_maps",
    ),
}


def read(slot):
    return from_plain(yaml.safe_load(YAML.replace("SLOT", slot)))


@pytest.mark.parametrize("name", SLOTS)
def test_every_learned_slot_stands_in_a_decoder_from_yaml(name):
    """What its attention reads is `attend` with the parts that its modules make; gradients reach their parameters."""
    text, slot = SLOTS[name]
    config = read(text)
    assert from_plain(to_plain(config)) == config
    assert from_plain(yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config
    assert hash(config) == hash(copy.deepcopy(config))
    model = Transformer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)

    def noisy(x):
        return jnp.asarray(np.asarray(x) + 0.3 * rng.standard_normal(x.shape).astype(np.float32))

    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))

    @nnx.jit
    def run(model):
        records = model(TOKENS, record=("q", "k", "v", "z"))[2]
        return records, nnx.grad(lambda model: (model(TOKENS)[0] ** 2).sum())(model)

    records, gradient = run(model)
    graph, arrays = nnx.split(model.runs[0])
    mixer = nnx.merge(graph, jax.tree.map(lambda x: x[0], arrays)).mixers[0]

    def part(x):
        return x() if isinstance(x, nnx.Module) else x

    slots = {each: part(getattr(mixer, each)) for each in ("score", "bias", "normalize")} | {"mask": Causal()}
    slots |= {each: tuple(map(part, getattr(mixer, each))) for each in ("score_maps", "weight_maps")}
    assert_close(records["z"][0], attend(*(records[x][0] for x in "qkv"), **slots), 100)
    made = slots[slot][-1] if isinstance(slots[slot], tuple) else slots[slot]
    assert jax.tree.leaves(made), name
    if name != "ALiBi":  # whose slopes are constants
        leaves = [x for path, x in nnx.to_flat_state(gradient) if slot in path]
        assert leaves
        assert all(np.abs(x[...]).max() > 0 for x in leaves)


def test_the_place_supplies_what_has_no_default_and_nothing_else():
    """`BilinearScore(heads=None)` is one weight for all heads: the heads of the place must not change that."""
    sizes = {"heads": 4, "head_dim": 3, "features": 12, "rngs": nnx.Rngs(0), "dtype": jnp.float32}
    assert Spec(BilinearScore).build(**sizes).weight.shape == (3, 3)
    assert Spec(BilinearScore, heads=4).build(**sizes).weight.shape == (4, 3, 3)
    assert Spec(NeuralScore, hidden=5).build(**sizes).w1.shape == (6, 5)
    assert Spec(RelativePositionBias).build(**sizes)().table.shape == (4, 32)
    assert Spec(RelativeBias, max_distance=9).build(table=jnp.zeros((4, 6))).max_distance == 9
    np.testing.assert_array_equal(Spec(Alibi.geometric).build(**sizes).slopes, Alibi.geometric(4).slopes)
    assert Spec(SoftCap, cap=3.0).build(**sizes) == SoftCap(3.0)
    for kind in (AdditiveScore, HeadMixing, KeyQueryConvolution, LearnedTemperature, NullSoftmax):
        assert Spec(kind).arguments == {}


def test_specs_are_data():
    one = Spec(NeuralScore, hidden=8, second=4)
    assert one == Spec(NeuralScore, second=4, hidden=8) != one.replace(hidden=9)
    assert hash(one) == hash(one.replace(hidden=8))
    assert repr(one) == "Spec(jaxattn.nn.learned.NeuralScore, hidden=8, second=4)"
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    with pytest.raises(AttributeError, match="a Spec is frozen"):
        one.target = NullSoftmax
    nested = Spec(nn.Linearized, attention=Spec(nn.MultiHeadAttention, heads=2, mask=Window(3)))
    assert Spec(nn.FeedForward, hidden=[1, [2]]).arguments["hidden"] == (1, (2,))
    assert nested == nested.replace() != nested.replace(kind="exp")
    given = to_plain(nested)["init_args"]["attention"]  # a spec among the arguments
    assert (given["class_path"], given["init_args"]["heads"]) == ("jaxattn.nn.attention.MultiHeadAttention", 2)
    assert from_plain(to_plain(TransformerConfig(layers=[pre_norm(nested)]))).layers[0].branches[0].module == nested


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Spec(NeuralScore, hiden=8),
            TypeError,
            "NeuralScore has an unknown argument 'hiden': did you mean 'hid",
        ),
        (lambda: Spec(NullSoftmax, xyz=8), TypeError, r"unknown argument 'xyz': need some of \['heads'\]"),
        (lambda: Spec(3), TypeError, "target must be a class or a function, got 3"),
        (lambda: Spec(lambda heads: heads), TypeError, "cannot be imported"),
        (lambda: Spec(Softmax, null_logit=jnp.zeros(2)), TypeError, "null_logit holds an array"),
        (lambda: Spec(NeuralScore).build(head_dim=3, rngs=nnx.Rngs(0)), TypeError, "NeuralScore lacks 'hidden'"),
        (
            lambda: Spec(nn.MultiHeadAttention, heads=4, normalize=Softmax(jnp.zeros(4))),
            TypeError,
            "normalize holds an array",
        ),
        (
            lambda: Spec(nn.MultiHeadAttention, heads=4, score_maps=SoftCap(3.0)).build(features=8, rngs=nnx.Rngs(0)),
            TypeError,
            r"score_maps must be a tuple such as \(SoftCap",
        ),
        (lambda: read("score: {class_path: jaxattn.nn.NeuralScore, init_args: {hiden: 5}}"), ValueError, "hiden"),
        (lambda: read("score: {class_path: jaxattn.nn.NoScore}"), ValueError, "NoScore"),
        (lambda: read("score: {hidden: 5}"), ValueError, "not the config of a model"),
    ],
)
def test_what_is_no_spec_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_plain_parts_stand_in_slots_as_they_are():
    config = TransformerConfig(
        V,
        T,
        D,
        [
            pre_norm(
                Spec(nn.MultiHeadAttention, heads=N, score=Dot(0.3), score_maps=[SoftCap(2.0)]),
                Spec(nn.FeedForward, hidden=8),
            )
        ],
    )
    assert from_plain(to_plain(config)) == config
    mixer = Transformer(config, rngs=nnx.Rngs(0)).runs[0].mixers[0]
    assert (mixer.score, tuple(mixer.score_maps)) == (Dot(0.3), (SoftCap(2.0),))
